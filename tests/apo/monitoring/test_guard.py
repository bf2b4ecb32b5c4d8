"""Guards: their measurements, when they stop a run, and what it leaves."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from apo import cli
from apo.monitoring import guard
from apo.monitoring.failures import TrainingStopped
from apo.monitoring.guard import Guard, GuardMeasurement, guard_metrics, higher, load_guard, measure_guard, violation
from apo.packing.logps import response_logps
from apo.run_dir.checkpoints import checkpoints, resume_problem
from apo.training.config import TrainConfig
from apo.training.plan import plan
from apo.training.train import build_trainer, train
from clair.core.errors import UserError
from tests.apo.conftest import VOCABULARY, make_pairs, make_tokenizer


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(n=12, seed=0):
    rng = random.Random(seed)
    return [{"text": " ".join(rng.choices(VOCABULARY, k=rng.randint(3, 30)))} for _ in range(n)]


def tasks(n=20, seed=0):
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        options = rng.sample(VOCABULARY, 3)
        rows.append({"prompt": "what is " + rng.choice(VOCABULARY), "options": options, "answer": rng.randrange(3)})
    return rows


@pytest.fixture
def recipe(tmp_path, model_dir):
    """A run of 20 steps with both rails."""
    trainer = {"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-4, "logging_steps": 5}
    return {
        "model": str(model_dir), "dataset": write(tmp_path / "pairs.jsonl", make_pairs(24)), "trainer": trainer,
        "guard": {"text": write(tmp_path / "text.jsonl", texts()), "tasks": write(tmp_path / "tasks.jsonl", tasks())},
        "out": str(tmp_path / "run"),
    }  # fmt: skip


def run(recipe, **changes):
    messages: list[str] = []
    return train(TrainConfig(**{**recipe, **changes}), log=messages.append), messages


def metrics(recipe):
    return [json.loads(line) for line in (Path(recipe["out"]) / "metrics.jsonl").read_text().splitlines()]


# What is measured


def test_differences_by_hand():
    # Texts of 10 and 30 tokens: 2 and 0 nats more, 0.05 a token. Tasks: of 4 right before, one is lost and one won.
    base = GuardMeasurement((20.0, 60.0), (10, 30), (1.0, 1.0, 0.0, 1.0))
    now = GuardMeasurement((22.0, 60.0), (10, 30), (0.0, 1.0, 1.0, 1.0))
    differences = guard_metrics(base, now)
    assert differences["guard/text_loss"] == pytest.approx(82 / 40)
    assert differences["guard/text_loss_rise"] == pytest.approx(2 / 40)
    assert differences["guard/text_loss_rise_noise"] > 0.5  # two texts say next to nothing
    assert differences["guard/accuracy"] == 0.75
    assert differences["guard/accuracy_drop"] == 0
    assert differences["guard/accuracy_drop_noise"] == pytest.approx(
        3.1824 * math.sqrt(2 / 3) / 2, rel=1e-4
    )  # t with 3 df


def test_a_rail_is_crossed_beyond_its_noise_only():
    rails = Guard(text="a", tasks="b", most_loss_rise=0.1, most_accuracy_drop=0.2)

    def measured(rise, rise_noise, drop, drop_noise):
        names = ("text_loss_rise", "text_loss_rise_noise", "accuracy_drop", "accuracy_drop_noise")
        return violation(
            rails, {f"guard/{n}": v for n, v in zip(names, (rise, rise_noise, drop, drop_noise), strict=True)}
        )

    assert measured(0.3, 0.25, 0.4, 0.25) is None
    assert (
        measured(0.3, 0.15, 0.4, 0.25)
        == "the loss on the guard's text rose by 0.3 nats per token (+- 0.15; guard.most_loss_rise allows 0.1)"
    )
    assert (
        measured(-0.3, 0.01, 0.4, 0.15)
        == "the accuracy on the guard's tasks fell by 0.4 (+- 0.15; guard.most_accuracy_drop allows 0.2)"
    )
    assert " and the accuracy" in measured(0.3, 0.1, 0.4, 0.1)
    assert "rose by nan" in measured(math.nan, math.nan, 0, 0)


def test_winners_are_compared_with_their_highest_and_own_answers_with_the_untrained_model():
    start = GuardMeasurement((), (), (), answers=(10.0, 30.0), answer_tokens=(10, 10), winners=(-2.0, -1.0, -3.0))
    peak = GuardMeasurement((), (), (), answers=(12.0, 32.0), answer_tokens=(10, 10), winners=(-1.0, -0.5, -2.0))
    later = GuardMeasurement((), (), (), answers=(14.0, 34.0), answer_tokens=(10, 10), winners=(-1.5, -0.9, -2.4))
    assert higher(start, peak) is peak
    assert higher(peak, later) is peak
    rails = Guard(winners=True, answers="a", max_kl=0.3)
    assert violation(rails, guard_metrics(start, later, start)) == (
        "the model's own answers fell by 0.4 nats per token (+- 0; guard.max_kl allows 0.3)"
    )
    fallen = guard_metrics(start, later, peak)
    assert fallen["guard/winners_fall"] == pytest.approx((0.5 + 0.4 + 0.4) / 3)
    assert fallen["guard/winners_fall_noise"] == pytest.approx(2 * math.sqrt((2 / 3) * 0.01 / 2 / 3), rel=1e-6)
    assert "held-out chosen answers fell by 0.433 nats per token from their highest" in violation(rails, fallen)


def test_own_answers_and_winners_can_each_stop_a_run(recipe, folder, tmp_path):
    own = [{"prompt": "what is " + row["text"], "answer": row["text"]} for row in texts(6)]
    file = write(tmp_path / "own.jsonl", own)
    recipe |= {"dataset": str(folder), "trainer": {**recipe["trainer"], "learning_rate": 0.05}}
    assert "6 own answers, 6 winners" in plan(
        TrainConfig(**{**recipe, "guard": {"answers": file, "winners": True}})
    ).guard_set.summary(20)
    with pytest.raises(TrainingStopped, match=r"own answers fell by .*guard.max_kl allows 0.001"):
        run(recipe, guard={"answers": file, "max_kl": 0.001})
    with pytest.raises(TrainingStopped, match="held-out chosen answers fell by"):
        run(recipe, objective="apo_down", guard={"winners": True}, out=str(tmp_path / "down"))


def test_a_look_is_what_the_plain_log_probs_say(recipe, tmp_path, model_dir):
    planned = plan(TrainConfig(**recipe))
    tokenizer, model = make_tokenizer(), AutoModelForCausalLM.from_pretrained(model_dir)
    measurement = measure_guard(build_trainer(planned).response_logps, planned.guard_set)

    def logp(ids, start):
        ids = torch.tensor([ids])
        mask = (torch.arange(ids.shape[1])[None] >= start).long()
        return response_logps(model, ids, torch.ones_like(ids), mask).item()

    for row, loss, tokens in zip(texts(), measurement.losses, measurement.tokens, strict=True):
        ids = tokenizer(row["text"])["input_ids"]
        assert tokens == len(ids) - 1
        assert loss == pytest.approx(-logp(ids, 1), rel=1e-5)
    for row, right in zip(tasks(), measurement.right, strict=True):
        prompt = [{"role": "user", "content": row["prompt"]}]
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        answers = [start + tokenizer(option)["input_ids"] + [3] for option in row["options"]]
        scores = [logp(ids, len(start)) for ids in answers]
        assert right == float(scores.index(max(scores)) == row["answer"])
    assert 0 < sum(measurement.right) < len(measurement.right)


def test_long_texts_are_read_in_pieces(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five\n\n\n\nsix seven\n\neight")
    rails = load_guard(Guard(text=str(tmp_path / "a.txt")), make_tokenizer(), None, max_tokens=3)
    lengths = [len(piece["chosen_ids"]) for piece in rails.pieces]
    assert (lengths, rails.texts) == ([2, 1, 1], [0, 0, 1])  # 5 tokens as 3 + 2, one unread at each piece's start


# A run with rails


@pytest.mark.slow
def test_a_run_within_its_rails_is_followed_and_not_changed(recipe):
    run(recipe)
    rows = [row for row in metrics(recipe) if "guard/accuracy" in row]
    assert [row["step"] for row in rows] == [0, *range(2, 21, 2)]
    assert rows[0]["guard/text_loss_rise"] == rows[0]["guard/accuracy_drop"] == 0
    assert len({row["guard/text_loss"] for row in rows}) > 5
    assert [folder.name for folder in checkpoints(Path(recipe["out"]))] == ["checkpoint-18", "checkpoint-20"]
    unguarded = {**recipe, "out": recipe["out"] + "-alone", "guard": None}
    run(unguarded)
    weights, alone = (load_file(Path(out) / "model.safetensors") for out in (recipe["out"], unguarded["out"]))
    assert all(torch.equal(weights[name], alone[name]) for name in weights)
    assert not any("guard/accuracy" in row for row in metrics(unguarded))


def test_a_crossed_rail_stops_the_run_and_leaves_the_last_good_checkpoint(recipe, tmp_path, monkeypatch, capsys):
    from yaml import safe_dump

    recipe["trainer"] |= {"learning_rate": 0.02, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 12}
    recipe["guard"] |= {"most_loss_rise": 0.3, "every": 2}
    (tmp_path / "r.yaml").write_text(safe_dump(recipe))
    monkeypatch.setattr("sys.argv", ["apo", "train", str(tmp_path / "r.yaml")])
    for time in (1, 2):  # the second time, it goes on from the good checkpoint and comes to the same end
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 5
        stderr = capsys.readouterr().err
        rows = [row for row in metrics(recipe) if "guard/text_loss" in row]
        last = rows[-1]
        assert last["guard/text_loss_rise"] - last["guard/text_loss_rise_noise"] > 0.3
        assert all(row["guard/text_loss_rise"] - row["guard/text_loss_rise_noise"] <= 0.3 for row in rows[:-1])
        assert 2 < last["step"] < 20
        good = Path(recipe["out"]) / f"checkpoint-{last['step'] - 2}"
        assert f"error: step {last['step']}: the loss on the guard's text rose by" in stderr
        assert (
            "; guard.most_loss_rise allows 0.3); lower trainer.learning_rate, or allow more and run the same" in stderr
        )
        assert f"the last good checkpoint is {good}" in stderr
        assert checkpoints(Path(recipe["out"]))[-1] == good
        assert resume_problem(good) is None
        AutoModelForCausalLM.from_pretrained(good)
        record = json.loads((Path(recipe["out"]) / "run.json").read_text())
        assert len(record["stopped"]) == time
        assert "finished" not in record
    looser = {**recipe, "guard": {**recipe["guard"], "most_loss_rise": 1000.0}}
    assert run(looser)[0]["finished"]


def test_accuracy_alone_can_stop_a_run(recipe):
    rows = tasks(200)
    write(Path(recipe["guard"]["tasks"]), rows)
    planned = plan(TrainConfig(**recipe))
    initial = measure_guard(build_trainer(planned).response_logps, planned.guard_set)
    # Tasks that the model gets right now: whatever training does to it, some are lost.
    write(Path(recipe["guard"]["tasks"]), [row for row, right in zip(rows, initial.right, strict=True) if right])
    recipe["guard"] = {"tasks": recipe["guard"]["tasks"]}
    recipe["trainer"] |= {"learning_rate": 0.05}
    with pytest.raises(
        TrainingStopped, match=r"the accuracy on the guard's tasks fell by 0\.\d+ \(\+- 0.*drop allows 0.05\)"
    ):
        run(recipe)


@pytest.mark.parametrize("every", [100, 6], ids=["looked at by the epoch's end", "by its last step"])
def test_the_epochs_end_saves_nothing_that_was_not_passed(recipe, every):
    recipe["trainer"] = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "save_strategy": "epoch"}
    recipe["trainer"] |= {"learning_rate": 0.05, "lr_scheduler_type": "constant"}
    recipe["guard"] |= {"most_loss_rise": 0.0, "every": every}
    with pytest.raises(TrainingStopped, match=r"^step 6: the loss .*no checkpoint had been saved$"):
        run(recipe)
    assert not checkpoints(Path(recipe["out"]))


def test_trackers_are_given_the_rails_too(recipe, tmp_path):
    logged = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            logged.append(set(logs))

    trainer = build_trainer(plan(TrainConfig(**recipe)))
    trainer.add_callback(Tracker())
    trainer.train()
    assert sum("guard/accuracy" in keys for keys in logged) == 11
    assert sum({"loss", "saturation", "mfu"} <= keys for keys in logged) >= 5


# Bad input


def bad_text(content, name="t.jsonl"):
    def make(tmp_path):
        (tmp_path / name).write_text(content)
        return {"text": str(tmp_path / name)}

    return make


def bad_task(**changes):
    def make(tmp_path):
        good = {"prompt": "one", "options": ["two", "three"], "answer": 0}
        return {"tasks": write(tmp_path / "t.jsonl", [good, {**good, **changes}])}

    return make


BAD = {
    "nothing": (lambda _: {}, "a guard without text and tasks"),
    "misspelt": (lambda _: {"txt": "a"}, "txt"),
    "winners without pairs": (lambda _: {"winners": True}, "guard.winners: at least 2 held-out pairs are needed"),
    "own answers without a text": (
        lambda t: {"answers": write(t / "t.jsonl", [{"prompt": "one", "answer": 2}])},
        "line 1: a row needs prompt and answer, a text",
    ),
    "limit without file": (
        lambda _: {"tasks": "a", "most_loss_rise": 1},
        "most_loss_rise would be ignored without text",
    ),
    "no file": (lambda _: {"text": "nowhere.txt"}, "guard.text: nowhere.txt does not exist"),
    "other kind": (bad_text("a", "t.csv"), "neither .txt nor .jsonl"),
    "not JSON": (bad_text("{"), "t.jsonl, line 1: not JSON"),
    "no text": (bad_text('{"txt": "a"}\n'), "line 1: a row has to be an object with a text in `text`"),
    "one text": (bad_text("one two", "t.txt"), "holds 1 text(s) of two tokens or more; give at least 2"),
    "no tasks file": (lambda _: {"tasks": "nowhere.jsonl"}, "guard.tasks: nowhere.jsonl does not exist"),
    "answer out of range": (bad_task(answer=2), "line 2: answer 2 is neither an option nor its index from 0"),
    "answer that is no option": (bad_task(answer="four"), "answer 'four' is neither an option"),
    "true as answer": (bad_task(answer=True), "answer True is neither"),
    "one option": (bad_task(options=["two"]), "options have to be at least two texts"),
    "an option twice": (bad_task(options=["two", "two"]), "an option occurs twice"),
    "no options": (
        lambda t: {"tasks": write(t / "t.jsonl", [{"prompt": "a", "answers": []}])},
        "a row needs prompt, options and answer",
    ),
    "one task": (lambda t: {"tasks": write(t / "t.jsonl", tasks(1))}, "holds 1 task(s); give at least 2"),
    "too long": (bad_task(options=["two", "one " * 300]), "are longer than the 256 tokens that the model takes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_guards_are_refused_before_any_work(case, recipe, tmp_path):
    make, message = BAD[case]
    with pytest.raises((UserError, ValueError)) as error:
        plan(TrainConfig(**{**recipe, "guard": make(tmp_path)}))
    assert message in str(error.value)
    assert not Path(recipe["out"]).exists()


def test_a_dry_run_describes_the_guards_measurements(recipe):
    description = plan(TrainConfig(**recipe)).guard_set.summary(20)
    tokens = sum(len(row["text"].split()) for row in texts())
    assert description.startswith("12 texts, 20 tasks, ")
    assert int(description.split(", ")[2].split(" ")[0]) > tokens
    assert description.endswith("a measurement, every 2 steps")


def test_how_often_to_look():
    rails = guard.GuardSet(Guard(text="a"), [], [], [], [])
    assert [rails.interval(steps) for steps in (3, 10, 15, 1000)] == [1, 1, 2, 100]
    assert guard.GuardSet(Guard(text="a", every=7), [], [], [], []).interval(1000) == 7
