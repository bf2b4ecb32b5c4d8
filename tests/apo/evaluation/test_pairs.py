"""Held-out pairs: by pencil, against the plain log-probs, with adapters, and the folder of a real run."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest

from apo.evaluation.pairs import (
    MeasuredPair,
    PairsConfig,
    Response,
    compare_models,
    evaluate_pairs,
    summary,
)
from apo.packing.logps import response_logps
from clair.core.errors import UserError
from clair.core.recipe import resolve
from clair.data.contrast import shared_tokens
from tests.apo.conftest import make_model, make_pairs, make_tokenizer, write_jsonl
from tests.apo.evaluation.evaluating import apo, write_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Another model with the tokenizer of `model_dir`."""
    folder = tmp_path_factory.mktemp("trained")
    make_model(seed=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """A dataset with 16 training and 10 held-out pairs, of which two answer the same prompt."""
    folder = tmp_path_factory.mktemp("dataset")
    rows = make_pairs(26)
    rows[25]["prompt"] = rows[24]["prompt"]
    for name, split_rows in {"train": rows[:16], "test": rows[16:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in split_rows))
    return folder


def measured(pairs: Path, out: Path, **changes: object) -> dict:
    return evaluate_pairs(PairsConfig(**{"dataset": str(pairs), "out": str(out), "batch_tokens": 150, **changes}))


def pairs_config(model: Path, **values: object) -> PairsConfig:
    return resolve(PairsConfig, {"model": str(model), "out": "x", **values})


# ---- by pencil


def test_shared_tokens_by_pencil():
    # rejected 1 2 3 4, chosen 1 5 3 4 4: the longest common subsequence is 1 3 4.
    chosen, rejected = shared_tokens([1, 5, 3, 4, 4], [1, 2, 3, 4])
    assert (sum(chosen), sum(rejected)) == (3, 3)
    assert chosen[:3] == [True, False, True]
    assert rejected == [True, False, True, True]


def pair(prompt: str, chosen: float, rejected: float, lengths: tuple[int, int] = (4, 4), **more: float) -> MeasuredPair:
    """A pair with these log-ratios, half of the chosen one's in shared tokens."""
    both = zip(lengths, (chosen, rejected), strict=True)
    sides = [Response(n, 2, -10.0, ratio, ratio / 2, more.get("kl", 0.5)) for n, ratio in both]
    return MeasuredPair(f"{prompt}{chosen}", prompt, *sides)


def test_the_summary_by_pencil():
    pairs = [pair("a", 1, -1), pair("b", -2, -3, (6, 4)), pair("c", -1, 0, (6, 4)), pair("d", 0, 0, (2, 4))]
    result = summary(pairs, beta=0.5)
    assert result["reward_accuracy"]["mean"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert result["ties"]["mean"] == 0.25
    assert result["margin"]["mean"] == pytest.approx(0.5 * (2 + 1 - 1 + 0) / 4)
    assert result["rewards"]["chosen"]["mean"] == pytest.approx(0.5 * -2 / 4)
    assert result["displacement"]["chosen"]["falls"]["mean"] == 0.5
    assert result["displacement"]["chosen"]["logratio_edited"]["mean"] == pytest.approx(-2 / 4 / 2)
    assert result["displacement"]["rejected"]["falls"]["mean"] == 0.5
    # Lengths: a tie, longer, longer, shorter: 0.5 + 1 + 1 + 0.
    assert result["length_only"]["prefers"] == "longer"
    assert result["length_only"]["accuracy"]["mean"] == pytest.approx(2.5 / 4)
    assert result["length_only"]["reward_accuracy_minus_it"]["mean"] == pytest.approx(0)
    assert result["length_ratio"]["mean"] == pytest.approx((1 + 1.5 + 1.5 + 0.5) / 4)
    assert result["kl"]["chosen"] == {"response": {"mean": 0.5, "se": 0.0, "ci95": [0.5, 0.5]},
                                     "token": result["kl"]["chosen"]["token"]}  # fmt: skip
    assert result["kl"]["chosen"]["token"]["mean"] == pytest.approx(0.5 * (1 / 4 + 1 / 6 + 1 / 6 + 1 / 2) / 4)


def test_pairs_of_one_prompt_are_one_cluster():
    configs_by_model = summary([pair(str(n), (-1) ** (n // 2), 0) for n in range(8)], beta=1)
    together = summary([pair(str(n // 2), (-1) ** (n // 2), 0) for n in range(8)], beta=1)
    assert together["prompts"] == 4
    assert together["margin"]["se"] == pytest.approx(math.sqrt(2) * configs_by_model["margin"]["se"] * math.sqrt(7 / 6))
    alone = summary([pair("a", 1, 0), pair("a", 2, 0)], beta=1)
    assert alone["reward_accuracy"] == {"mean": 1.0, "se": None, "ci95": None}


def test_if_winners_are_shorter_the_length_rule_prefers_shorter():
    result = summary([pair("a", 1, 0, (2, 4)), pair("b", 1, 0, (2, 4)), pair("c", 1, 0, (4, 2))], beta=1)
    assert result["length_only"]["prefers"] == "shorter"
    assert result["length_only"]["accuracy"]["mean"] == pytest.approx(2 / 3)


# ---- against the plain log-probs


def test_log_ratios_are_those_of_the_plain_reference(dataset, model_dir, trained, tmp_path):
    import torch

    result = measured(dataset, tmp_path, model=str(trained), reference=str(model_dir), beta=0.2)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == result["pairs"] == 10
    assert result["prompts"] == 9
    policy, reference = make_model(seed=1).eval(), make_model().eval()
    tokenizer, count = make_tokenizer(), 0
    for row, source in zip(rows, make_pairs(26)[16:], strict=True):
        prompt = source["prompt"] if row["id"] != "p25" else make_pairs(26)[24]["prompt"]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for side in ("chosen", "rejected"):
            all_ids = tokenizer.apply_chat_template(prompt + source[side], return_dict=True)["input_ids"]
            mask = torch.tensor([[0] * len(ids) + [1] * (len(all_ids) - len(ids))])
            batch = torch.tensor([all_ids]), torch.ones(1, len(all_ids)), mask
            with torch.no_grad():
                ours, theirs = (response_logps(model, *batch).item() for model in (policy, reference))
                logits = [model(batch[0]).logits[0, len(ids) - 1 : -1].log_softmax(-1) for model in (policy, reference)]
            assert row[f"{side}_tokens"] == len(all_ids) - len(ids)
            assert row[f"{side}_reference"] == pytest.approx(theirs, abs=1e-4)
            assert row[f"{side}_logratio"] == pytest.approx(ours - theirs, abs=1e-4)
            kl = torch.nn.functional.kl_div(logits[1], logits[0], reduction="sum", log_target=True).item()
            assert row[f"{side}_kl"] == pytest.approx(kl, abs=1e-4)
            count += 1
        assert row["margin"] == pytest.approx(0.2 * (row["chosen_logratio"] - row["rejected_logratio"]))
    assert count == 20


def test_shared_and_edited_tokens_add_up(model_dir):
    policy, reference = make_model(seed=1).eval(), make_model().eval()
    pairs = [{"prompt_ids": [1, 10, 11], "chosen_ids": [12, 13, 14, 3], "rejected_ids": [12, 15, 14, 3]}]
    ((_, comparison),) = compare_models(policy, lambda: nullcontext(reference), pairs, 100)
    assert (comparison.chosen.shared_tokens, comparison.rejected.shared_tokens) == (3, 3)
    assert comparison.chosen.logratio == pytest.approx(
        comparison.chosen.logratio_shared + comparison.chosen.logratio_edited
    )
    # The edited token is the second: its log-ratio is what the plain log-probs of two and of one token differ by.
    import torch

    def upto(model: object, count: int) -> float:
        ids = torch.tensor([[1, 10, 11, 12, 13][: 3 + count]])
        mask = torch.tensor([[0, 0, 0, 1, 1][: 3 + count]])
        with torch.no_grad():
            return response_logps(model, ids, torch.ones_like(ids), mask).item()

    ours, theirs = (upto(model, 2) - upto(model, 1) for model in (policy, reference))
    assert comparison.chosen.logratio_edited == pytest.approx(ours - theirs, abs=1e-5)


def test_numbers_do_not_depend_on_the_batches(dataset, model_dir, trained, tmp_path):
    options = {"model": str(trained), "reference": str(model_dir)}
    single = measured(dataset, tmp_path / "one", **options, batch_tokens=1)
    many = measured(dataset, tmp_path / "many", **options, batch_tokens=10_000)
    for key in ("margin", "reward_accuracy", "length_ratio"):
        assert single[key]["mean"] == pytest.approx(many[key]["mean"], abs=1e-6)
    assert single["kl"]["rejected"]["token"]["mean"] == pytest.approx(many["kl"]["rejected"]["token"]["mean"], abs=1e-6)


def test_a_model_against_itself_ties_everywhere(dataset, model_dir, tmp_path):
    result = measured(dataset, tmp_path, model=str(model_dir), reference=str(model_dir))
    assert result["ties"]["mean"] == 1
    assert result["reward_accuracy"]["mean"] == 0.5
    assert result["displacement"]["chosen"]["falls"]["mean"] == 0
    assert result["kl"]["chosen"]["response"]["mean"] == pytest.approx(0, abs=1e-9)


# ---- adapters and runs


@pytest.fixture(scope="module")
def adapter(model_dir, tmp_path_factory) -> Path:
    """An adapter on `model_dir` that changes what it says."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    model = make_model()
    model.name_or_path = str(model_dir)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(model_dir)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(folder / "merged")
    make_tokenizer().save_pretrained(folder / "merged")
    return folder


def test_an_adapter_is_its_merged_model_and_its_base_the_reference(dataset, model_dir, adapter, tmp_path):
    options = {"reference": str(model_dir)}
    alone = measured(dataset, tmp_path / "a", model=str(adapter), **options)
    merged = measured(dataset, tmp_path / "m", model=str(adapter / "merged"), **options)
    assert abs(alone["margin"]["mean"]) > 1e-4
    assert alone["margin"]["mean"] == pytest.approx(merged["margin"]["mean"], abs=1e-5)
    assert alone["kl"]["chosen"]["token"]["mean"] == pytest.approx(merged["kl"]["chosen"]["token"]["mean"], rel=1e-3)


@pytest.mark.slow
def test_the_folder_of_a_run_says_the_rest(dataset, model_dir, tmp_path):
    recipe = f"model: {model_dir}\ndataset: {dataset}\nobjective: dpo\nbeta: 0.3\nout: {tmp_path}/run\n"
    options = "trainer: {max_steps: 2, learning_rate: 1.0e-3, per_device_train_batch_size: 4, eval_strategy: 'no'}\n"
    (tmp_path / "recipe.yaml").write_text(recipe + options)
    trained = apo("train", tmp_path / "recipe.yaml")
    assert trained.code == 0, trained.err
    result = apo(
        "eval", "pairs", write_recipe(tmp_path / "pairs.yaml", model=tmp_path / "run"), "--out", tmp_path / "held-out"
    )
    assert result.code == 0, result.err
    numbers = json.loads((tmp_path / "held-out" / "pairs.json").read_text("utf-8"))
    settings = numbers["settings"]
    assert (settings["reference"], settings["dataset"], numbers["beta"]) == (str(model_dir), str(dataset), 0.3)
    assert numbers["pairs"] == 10
    assert numbers["ties"]["mean"] < 1
    assert "reward accuracy" in result.out
    assert f"{100 * numbers['reward_accuracy']['mean']:.1f}" in result.out
    config = pairs_config(tmp_path / "run", beta=0.7)
    assert (config.beta, config.reference) == (0.7, str(model_dir))


def test_a_single_file_is_held_out_whole_unless_it_is_what_the_run_trained_on(model_dir, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("{}\n")
    assert pairs_config(model_dir, reference="r", dataset=str(file)).split == "train"
    assert pairs_config(model_dir, reference="r", dataset=str(file), split="test").split == "test"
    assert pairs_config(model_dir, reference="r", dataset=str(tmp_path)).split == "test"
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"dataset": str(file), "model": "m", "beta": 0.1}}))
    assert pairs_config(tmp_path).split == "test"


@pytest.fixture
def run_on(model_dir, tmp_path):
    """A function that makes the folder of a run on these sources, with an untrained model; returns the folder."""

    def make(*sources: dict) -> Path:
        folder = tmp_path / "run"
        make_model(seed=1).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        recipe = {"model": str(model_dir), "beta": 0.1, "dataset": list(sources)}
        (folder / "run.json").write_text(json.dumps({"recipe": recipe}))
        return folder

    return make


@pytest.fixture
def grouped(tmp_path) -> Path:
    """A dataset with two configurations: in `b` the groups ann and bob have 3 and 5 held-out pairs, and the winner
    is called `better`."""
    folder = tmp_path / "grouped"
    rows = [{**row, "group": "ann" if n < 3 else "bob", "better": row["chosen"]} for n, row in enumerate(make_pairs(8))]
    front = ["configs:"]
    for name, pairs in {"a": rows[:2], "b": [{**row, "chosen": "worst"} for row in rows]}.items():
        (folder / name).mkdir(parents=True)
        write_jsonl(folder / name / "train.jsonl", pairs)
        write_jsonl(folder / name / "test.jsonl", pairs)
        front += [f"- config_name: {name}", f"  data_dir: {name}"]
    (folder / "README.md").write_text("\n".join(["---", *front, "---", ""]))
    return folder


def test_the_pairs_of_a_run_are_selected_as_the_run_did(run_on, grouped, tmp_path):
    source = {"path": str(grouped), "name": "b", "split": "train", "columns": {"chosen": "better"}}
    folder = run_on({**source, "where": {"group": "ann"}})
    messages: list[str] = []
    result = evaluate_pairs(pairs_config(folder, out=str(tmp_path / "ann")), messages.append)
    rows = [json.loads(line) for line in (tmp_path / "ann" / "pairs.jsonl").read_text("utf-8").splitlines()]
    assert [row["id"] for row in rows] == ["p0", "p1", "p2"]
    assert all(row["chosen_tokens"] > 3 for row in rows)  # `better`: the words of `chosen` are one token
    assert {key: result["settings"][key] for key in ("name", "columns", "where", "split")} == {
        "name": "b", "columns": {"chosen": "better"}, "where": {"group": "ann"}, "split": "test"
    }  # fmt: skip
    assert messages == [f"3 pairs of {grouped}, split test where {{'group': 'ann'}}"]
    everybody = pairs_config(folder, out=str(tmp_path / "all"), where=None)
    assert evaluate_pairs(everybody)["pairs"] == 8
    nobody = pairs_config(folder, where={"group": "eve"})
    with pytest.raises(UserError, match=r"has no pairs where \{'group': 'eve'\} to measure"):
        evaluate_pairs(nobody)


def test_a_dataset_that_is_named_is_not_selected_as_the_run_did(run_on, dataset, grouped, tmp_path):
    folder = run_on({"path": str(grouped), "name": "b", "where": {"group": "ann"}})
    config = pairs_config(folder, dataset=str(dataset), out=str(tmp_path / "out"))
    assert (config.name, config.where) == (None, None)
    assert evaluate_pairs(config)["pairs"] == 10


def test_of_a_run_on_several_datasets_one_must_be_named(run_on, dataset, grouped):
    folder = run_on({"path": str(dataset)}, {"path": str(grouped), "name": "b"})
    with pytest.raises(UserError, match=rf"was trained on {dataset}, {grouped}; name one, with its `where`"):
        pairs_config(folder)
    assert pairs_config(folder, dataset=str(dataset)).dataset == str(dataset)


# ---- refused


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"split": "validation"}, "has no split 'validation'; found: t"),
        ({"dataset": "/nowhere/data"}, "dataset '/nowhere/data': Couldn't find"),
        ({"reference": "/nowhere/model"}, "model folder /nowhere/model does not exist"),
        ({"max_length": 5}, "all 10 pairs are longer than 5 tokens"),
    ],
)
def test_pairs_that_cannot_be_measured_are_refused_first(dataset, model_dir, trained, tmp_path, changes, match):
    with pytest.raises(UserError, match=match):
        measured(dataset, tmp_path / "out", **{"model": str(trained), "reference": str(model_dir), **changes})
    assert not (tmp_path / "out").exists()


def test_a_reference_with_another_vocabulary_is_refused(dataset, model_dir, tmp_path):
    folder = tmp_path / "other"
    make_model(vocab_size=48).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match=r"40 tokens and the reference .* 48"):
        measured(dataset, tmp_path / "out", model=str(model_dir), reference=str(folder))


def test_a_model_that_no_run_made_needs_its_reference_and_dataset(model_dir):
    with pytest.raises(UserError, match=r"'reference' is missing, and .* is no folder of `apo train`"):
        pairs_config(model_dir)
    with pytest.raises(UserError, match="'dataset' is missing"):
        pairs_config(model_dir, reference="r")


def test_pairs_without_a_prompt_are_refused(dataset, model_dir, tmp_path):
    # A template that begins otherwise before an answer leaves nothing that both renderings share.
    odd = tmp_path / "odd"
    make_model().save_pretrained(odd)
    start = "{% if add_generation_prompt %}<|start|>{% else %}<|begin|>{% endif %}"
    make_tokenizer(template=start + "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}").save_pretrained(odd)
    with pytest.raises(UserError, match="a prompt has no tokens"):
        measured(dataset, tmp_path / "out", model=str(odd), reference=str(model_dir))
