"""`apo advise`: each piece of evidence by pencil, bad input, and the whole on the tiny world with a real judge."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from apo.advice.config import AdviseConfig, load_inputs, own_shares, template_mismatch
from apo.advice.judge_evidence import distrust_reason
from apo.advice.likelihood import ResponseLogp, first_step, gaps
from apo.advice.run import contrast_intervals, preference_rate, run
from apo.cli import app
from apo.evaluation.winrate.verdicts import AnswerText, Comparison
from clair.core.errors import UserError
from clair.core.files import write_json
from clair.core.recipe import resolve
from clair.data.dataset import DatasetWriter
from clair.data.records import Pair, Prompt
from clair.inference.model_folder import weights_identity
from recipes.world.judge import Leanings
from recipes.world.running import ROOT, running
from recipes.world.server import ServerOptions
from recipes.world.tasks import distinct_tasks
from tests.apo.conftest import make_tokenizer
from tests.apo.evaluation.evaluating import write_recipe

MODEL = ROOT / "recipes/world/model"


def turn(text: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def compared(first: str, second: str, text: str = "a") -> Comparison:
    return Comparison(Prompt(text, tuple(turn(text))), 0, AnswerText("base"), AnswerText("tuned"), (first, second))


# ---- by pencil


def test_gaps_of_log_probs_per_token_and_in_all():
    winners, losers = [ResponseLogp(-2.0, 2), ResponseLogp(-6.0, 2)], [ResponseLogp(-8.0, 4), ResponseLogp(-2.0, 1)]
    intervals = gaps(winners, losers, [ResponseLogp(-4.0, 2), ResponseLogp(-4.0, 2)])
    values = {name: interval.value for name, interval in intervals.items()}
    assert values == pytest.approx({
        "own": -2.0, "winner_gap": 0.0, "loser_gap": 0.0, "winner_total": 0.0, "loser_total": -1.0,
        "pair_gap": 0.0, "pair_total": 1.0,  # (-1 + 2, -3 + 2) / 2 a token, (-2 + 8, -6 + 2) / 2 in all
    })  # fmt: skip
    half = 12.706 * 1.0  # t of one degree, and the standard error of -1 + 2 and -3 + 2
    assert (intervals["pair_gap"].lo, intervals["pair_gap"].hi) == pytest.approx((-half, half), rel=1e-4)


def test_an_own_answer_without_an_end_is_compared_with_nothing():
    scored = [ResponseLogp(-2.0, 2), ResponseLogp(-6.0, 2), ResponseLogp(-9.0, 2)]
    intervals = gaps(scored, scored[::-1], [ResponseLogp(-4.0, 2), None, ResponseLogp(-4.0, 2)])
    assert intervals["own"].value == -2.0
    assert intervals["winner_gap"].value == pytest.approx(((-1 + 2) + (-4.5 + 2)) / 2)
    assert intervals["pair_gap"].value == 0


def test_the_first_step_moves_winners_and_losers():
    winners = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    losers = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    # steps (1, 0), (1, -1), (-1, 1): products 1, -1, -2, of which the mean is -2/3; squares 1, 2, 2
    intervals = first_step(winners, losers)
    assert intervals["coherence"].value == pytest.approx((-2 / 3) / (5 / 3))
    # of the winners with the others' steps: 1 - 1, 1 - 1, 0 - 1; of both: twice -2
    assert intervals["displacement"].value == pytest.approx((0 + 0 - 1) / (2 * -2))
    assert intervals["winner_wrong"].value == pytest.approx(1 / 3)  # the third falls
    assert intervals["loser_wrong"].value == pytest.approx(2 / 3)  # 0; -0 + 1 rises; 1 + 1 rises


def test_pairs_that_all_pull_alike_are_coherent_and_their_winners_rise():
    direction = torch.tensor([[3.0, 4.0]]).repeat(40, 1)
    intervals = first_step(direction, -direction)
    values = [(intervals[name].value, intervals[name].lo, intervals[name].hi) for name in ("coherence", "displacement")]
    assert values == [pytest.approx((1.0,) * 3), pytest.approx((0.5,) * 3)]
    assert intervals["winner_wrong"].value == intervals["loser_wrong"].value == 0


def test_labels_drawn_by_lot_have_no_coherence_and_an_interval_that_reports_it():
    torch.manual_seed(0)
    shared = torch.randn(1, 50)
    sides = shared + torch.randn(300, 50)
    drawn = torch.where(torch.rand(300, 1) < 0.5, -1.0, 1.0)
    by_lot, by_rule = (
        first_step(sides * drawn, -sides * drawn)["coherence"],
        first_step(sides, -sides)["coherence"],
    )
    assert by_lot.lo < 0 < by_lot.hi
    assert 0.3 < by_rule.lo < by_rule.value < by_rule.hi < 0.7
    assert by_rule.value == pytest.approx(0.5, abs=0.12)


def test_contrast_and_the_share_of_longer_winners():
    def row(chosen: str, rejected: str) -> dict:
        return {"chosen": turn(chosen, "assistant"), "rejected": turn(rejected, "assistant")}

    intervals = contrast_intervals([row("a b c d", "a b"), row("a b", "a c"), row("x", "x y"), row("x y", "x")])
    assert intervals["jaccard"].value == pytest.approx((2 / 4 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    assert intervals["levenshtein"].value == pytest.approx((4 + 1 + 2 + 2) / 4)
    assert intervals["length_ratio"].value == pytest.approx((2 + 1 + 0.5 + 2) / 4)
    assert intervals["longer"].value == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert 0 < intervals["longer"].lo < 0.625 < intervals["longer"].hi < 1


def test_the_rate_at_which_winners_win_counts_ties_as_half():
    verdicts = [("tuned", "tuned"), ("base", "tuned"), ("tie", "tuned"), ("base", "base")]
    interval = preference_rate([compared(*verdict, text=str(number)) for number, verdict in enumerate(verdicts)])
    assert interval is not None
    assert interval.value == pytest.approx((1 + 0.5 + 0.75 + 0) / 4)
    assert preference_rate([]) is None


# ---- judges that are not believed


def plants(tuned: int, base: int, split: int) -> list[Comparison]:
    return [
        *[compared("tuned", "tuned")] * tuned, *[compared("base", "base")] * base, *[compared("base", "tuned")] * split
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shown", "counts", "why"),
    [
        (plants(60, 2, 2), {1: 62, 2: 66}, None),
        (plants(60, 2, 2), {1: 70, 2: 58}, None),  # 55 % for the first: no clear lean
        (plants(60, 2, 2), {1: 220, 2: 160}, None),  # 58 %: a clear one, small enough for both orders to cancel
        (plants(30, 2, 32), {1: 96, 2: 32}, "decides by position: the first answer wins 75%"),
        (plants(30, 2, 32), {1: 32, 2: 96}, "decides by position: the first answer wins 25%"),
        (plants(20, 14, 30), {1: 64, 2: 64}, "at random: only 34 of 64 decided comparisons are alike"),
        (plants(30, 30, 4), {1: 64, 2: 64}, "prefers the answer to another prompt in 30 of 60"),
        ([compared("tie", "tie")] * 64, {0: 128}, "all its verdicts are ties"),
        ([*plants(7, 0, 0), *[compared("tie", "tie")] * 57], {0: 114, 1: 7, 2: 7}, "decides 7 of 64 comparisons"),
        ([*plants(8, 0, 0), *[compared("tie", "tie")] * 56], {0: 112, 1: 8, 2: 8}, None),
        ([], {}, "none of its verdicts can be read"),
    ],
)
def test_a_judge_is_believed_only_where_it_stands_the_test(shown, counts, why):
    reason = distrust_reason(shown, [], Counter(counts))
    assert (reason is None) if why is None else (reason is not None and why in reason)


def test_a_judge_that_knows_the_plants_and_no_pair_is_not_believed_in_the_end():
    reason = distrust_reason(plants(60, 2, 2), plants(60, 60, 180), Counter({1: 370, 2: 358}))
    assert reason is not None
    assert "at random" in reason


# ---- bad input


def write_rows(file: Path, count: int, *, prompt: str = "{}", swap: bool = False) -> Path:
    """Pairs of the world's tasks, right against wrong."""
    rows = []
    for task in distinct_tasks("train", count, seed=3):
        answers = [turn(task.wrong if swap else task.right, "assistant"), turn(task.right, "assistant")]
        answers[1] = answers[1] if swap else turn(task.wrong, "assistant")
        rows.append({"prompt": turn(prompt.format(task.prompt)), "chosen": answers[0], "rejected": answers[1]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def settings(tmp_path: Path, dataset: Path, url: str | None = None, **changes: object) -> AdviseConfig:
    values: dict[str, object] = {
        "dataset": str(dataset),
        "model": {"path": str(MODEL), "temperature": 1.0, "max_tokens": 48, "batch_size": 64},
        "out": str(tmp_path / "out"),
    }
    if url:
        values["judge"] = {"url": url, "model": "world-judge", "id": "judge"}
    return resolve(AdviseConfig, values | changes)


def test_pairs_that_call_tools_and_pairs_of_plain_text_are_refused(tmp_path):
    rows = [json.loads(line) for line in write_rows(tmp_path / "rows.jsonl", 40).read_text("utf-8").splitlines()]
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    rows[3]["chosen"][0]["tool_calls"] = [call]
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with pytest.raises(UserError, match=r"calls\.jsonl: 1 of 40 pairs call tools, and advice compares texts"):
        load_inputs(settings(tmp_path, tmp_path / "calls.jsonl"))
    texts = [{"chosen": f"Task {n} is 3", "rejected": f"Task {n} is 4"} for n in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), "utf-8")
    with pytest.raises(UserError, match=r"40 of 40 pairs are plain text without turns; give a column `prompt`"):
        load_inputs(settings(tmp_path, tmp_path / "texts.jsonl"))


def test_too_few_prompts_are_reported_with_how_many_are_needed(tmp_path):
    file = write_rows(tmp_path / "few.jsonl", 31)
    file.write_text(file.read_text("utf-8") * 3, "utf-8")  # the same again is not more
    with pytest.raises(UserError, match=r"31 different prompts, too few .* 32 are needed .* 3 times of 4, 197 for 3"):
        load_inputs(settings(tmp_path, file))
    assert not (tmp_path / "out").exists()


def test_the_sample_holds_each_prompt_once_and_is_sized_by_power(tmp_path):
    file = write_rows(tmp_path / "many.jsonl", 60)
    file.write_text(file.read_text("utf-8") * 2, "utf-8")
    full, small = (load_inputs(settings(tmp_path, file, difference=difference)) for difference in (0.1, 0.25))
    assert (len(full.rows), full.prompts, full.pairs) == (60, 60, 120)
    assert len(small.rows) == 32
    prompts = [row["prompt"][0]["content"] for row in small.rows]
    assert len(set(prompts)) == 32
    assert prompts == [row["prompt"][0]["content"] for row in full.rows][:32]
    assert (full.winners_own, full.losers_own, full.strange) == (None, None, {})


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (turn("what is one plus two"), None),
        (turn("<|im_start|>user what is one"), "its text contains <|im_start|>"),
        (turn("### Instruction: add"), "its text contains ### Instruction"),
        (turn("Human: hello\n\nAssistant:"), "contains Human:"),
        (turn("[INST] add [/INST]"), "contains [INST]"),
        (turn("say\n\nAssistant: hello"), "contains Assistant:"),
        (turn("is a human: yes"), None),
        (turn("what is <|start|>"), "its text contains the model's own <|start|>"),
    ],
)
def test_prompts_in_another_template_are_recognised(messages, why):
    reason = template_mismatch(messages, make_tokenizer())
    assert (reason is None) if why is None else (reason is not None and why in reason)


def test_a_template_that_leaves_a_turn_out_or_refuses_it_is_reported():
    spoken = [*turn("be short", "system"), *turn("hello")]
    silent = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    assert template_mismatch(spoken, make_tokenizer(silent)) == "the model's template omits its system turn"
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    reason = template_mismatch(spoken, make_tokenizer(strict))
    assert reason == "the model's template rejects it: no system turns"


def test_the_authors_of_both_sides_are_read_from_the_folder(tmp_path):
    folder = tmp_path / "pairs"
    writer = DatasetWriter(folder, seed=0, test_fraction=0.0)
    for number in range(4):
        models = {"chosen": "model" if number else "stronger", "rejected": "model"}
        writer.add(Pair(str(number), tuple(turn(f"what is {number}")), "yes", "no", "", models).row())
    writer.close(keep=True)
    manifest = {"model": {"model": "model", "identity": weights_identity(MODEL)}}
    write_json(folder / "manifest.json", {"models": {"target": manifest["model"]}})
    assert own_shares(settings(tmp_path, folder)) == (0.75, 1.0)
    write_json(folder / "manifest.json", {"models": {"target": {"model": "model", "identity": "weights:other"}}})
    assert own_shares(settings(tmp_path, folder)) == (None, None)


@pytest.mark.parametrize("judge", [{"model": "j"}, {"url": "http://127.0.0.1:9/v1"}])
def test_half_a_judge_is_refused(tmp_path, judge):
    values = {"dataset": "none.jsonl", "model": {"path": MODEL}, "judge": judge, "out": tmp_path / "out"}
    result = CliRunner().invoke(app, ["advise", str(write_recipe(tmp_path / "advise.yaml", **values))])
    assert isinstance(result.exception, UserError)
    assert "judge" in str(result.exception)


def test_arguments_of_before_are_answered_with_the_recipe_to_write():
    result = CliRunner().invoke(app, ["advise", "pairs.jsonl", "--model-id", "m", "--difference", "0.2"])
    assert isinstance(result.exception, UserError)
    assert "write {dataset: pairs.jsonl, model: {id: m}, difference: 0.2} into advise.yaml" in str(result.exception)


# ---- the whole, on the tiny world


@pytest.mark.slow
def test_revised_pairs_ask_for_apo_zero_and_nothing_is_paid_for_twice(tmp_path):
    dataset = write_rows(tmp_path / "pairs.jsonl", 48)
    with running() as server:
        config = settings(tmp_path, dataset, server.url)
        short = settings(tmp_path, dataset, server.url, budget={"tokens": 30_000})
        stopped = run(short)
        assert stopped.result is None
        assert "budget" in (stopped.stopped or "")
        paid = server.stats()["paid_total"]
        assert 0 < paid < 2 * (48 + 48 + 48)
        result = run(config).result
        stats = server.stats()
        assert result is not None
        assert stats["paid_more_than_once"] == 0
        again = run(config).result
        assert again is not None
        assert server.stats()["paid_total"] == stats["paid_total"]
        assert [of["calls"] for of in again["usage"].values()] == [0, 0]
    assert again["evidence"] == result["evidence"] == json.loads((tmp_path / "out/advice.json").read_text())["evidence"]
    assert result["advice"]["objective"] == "apo_zero"
    assert result["advice"]["sure"] in ("fair", "high")
    assert (result["advice"]["beta"], result["advice"]["learning_rate"]) == (0.1, 1.5e-5)
    # Winners are always right; the model by a fair coin: 3/4 counting ties.
    assert result["evidence"]["win"]["lo"] > 0.5
    assert result["evidence"]["win"]["value"] == pytest.approx(0.75, abs=0.15)
    assert result["evidence"]["right"]["value"] == 1.0
    assert result["evidence"]["parameters"] == 882_432
    assert result["judge"]["used"] is True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("leanings", "why"),
    [(Leanings(position_bias=0.7), "decides by position"), (Leanings(judge_error=0.5), "at random")],
)
def test_a_judge_that_leans_or_guesses_is_not_used_and_not_asked_further(tmp_path, leanings, why):
    dataset = write_rows(tmp_path / "pairs.jsonl", 64)
    with running(ServerOptions(leanings=leanings)) as server:
        result = run(settings(tmp_path, dataset, server.url)).result
        assert server.stats()["paid_total"] <= 2 * 64
    assert result is not None
    assert why in result["judge"]["distrust"]
    assert (result["evidence"]["win"], result["evidence"]["right"]) == (None, None)
    assert any(note.startswith("the judge is not used: it ") for note in result["notes"])
    assert result["advice"]["sure"] == "low"


@pytest.mark.slow
def test_a_model_that_does_not_end_its_answers_is_refused_with_both_reasons(tmp_path):
    dataset = write_rows(tmp_path / "pairs.jsonl", 32)
    model = {"path": str(MODEL), "temperature": 1.0, "max_tokens": 2, "batch_size": 64}
    with pytest.raises(UserError, match=r"ends 0 of 32 answers within 2 tokens: .* raise model.max_tokens"):
        run(settings(tmp_path, dataset, model=model))
    assert not (tmp_path / "out/advice.json").exists()


@pytest.mark.slow
def test_exchanged_columns_and_another_template_are_not_trained_on_and_the_command_reports_it(tmp_path):
    swapped = write_rows(tmp_path / "swapped.jsonl", 40, swap=True)
    marked = write_rows(tmp_path / "marked.jsonl", 40, prompt="### Instruction: {}")
    with running() as server:

        def advise(dataset: Path) -> tuple[str, dict]:
            out = tmp_path / dataset.stem
            judge = {"url": server.url, "model": "world-judge"}
            values = {"dataset": dataset, "model": {"path": MODEL, "max_tokens": 48}, "judge": judge, "out": out}
            result = CliRunner().invoke(app, ["advise", str(write_recipe(out.with_suffix(".yaml"), **values))])
            assert result.exit_code == 0, result.output
            return result.output, json.loads((out / "advice.json").read_text("utf-8"))

        output, result = advise(swapped)
        assert "do not train on these pairs (certainty: high)" in output
        assert "are the columns exchanged?" in output
        assert result["advice"]["beta"] is None
        paid = server.stats()["paid_total"]
        output, result = advise(marked)
        assert "100% of the prompts do not fit this model's template" in output
        assert "its text contains ### Instruction" in output
        assert server.stats()["paid_total"] == paid  # no judge is paid for what is refused
