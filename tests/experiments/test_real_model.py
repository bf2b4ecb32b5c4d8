"""The experiment on a real model: constraints, prompts, the reviser program, its server, the steps, and a short run."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import yaml

from apo.evaluation.ifeval.checkers import check_instruction, instruction_types
from clair.core.errors import UserError
from clair.data.dataset import read_manifest, read_rows
from clair.data.deduplication import BenchmarkQuestions
from clair.pipeline.build import build
from clair.pipeline.config import BuildConfig
from recipes.experiments.real_model import model, table
from recipes.experiments.real_model import run as experiment
from recipes.experiments.real_model.cells import CELLS, PRIMARY
from recipes.experiments.real_model.constraints import (
    KINDS,
    LEAST,
    LESS,
    TYPES,
    UNSEEN,
    Constraint,
    draw_constraint,
    draw_constraints,
    holds,
    unseen_types,
)
from recipes.experiments.real_model.mend import MENDERS, Unmendable, mend
from recipes.experiments.real_model.model import make_model
from recipes.experiments.real_model.prompts import SEED, PromptFiles, write_prompts
from recipes.experiments.real_model.run import Experiment, Size, Step
from recipes.experiments.real_model.server import judge, program_id, read_constraints, revise
from recipes.world.running import ROOT, running_module

pytest.importorskip("if_verifiable", reason="IFEval's checkers are not installed: pip install 'clair-apo[ifeval]'")


# ---- constraints


def test_there_are_25_types_those_of_the_library_and_eight_are_never_trained():
    assert set(TYPES) == set(instruction_types())
    assert (len(TYPES), UNSEEN, len(unseen_types(SEED))) == (25, 8, 8)
    recipe = yaml.safe_load((ROOT / experiment.RECIPES / "ifeval.yaml").read_text("utf-8"))
    assert set(recipe["groups"]["unseen"]) == unseen_types(SEED)
    assert set(recipe["groups"]["seen"]) == set(TYPES) - unseen_types(SEED)


@pytest.mark.parametrize("type", TYPES)
def test_every_drawn_constraint_has_the_arguments_its_checker_takes_and_names_them(type):
    for seed in range(40):
        constraint = draw_constraint(type, "Write a short letter to a neighbour about the garden fence.", Random(seed))
        check_instruction(type, constraint.kwargs)
        assert not {"{", "}"} & set(constraint.text)
        numbers = [str(value) for value in constraint.kwargs.values() if isinstance(value, int)]
        if type != "length_constraints:nth_paragraph_first_word":
            assert all(number in constraint.text for number in numbers)


def test_two_constraints_of_a_prompt_never_exclude_each_other():
    drawn = [draw_constraints("Describe a river.", TYPES, Random(seed)) for seed in range(300)]
    pairs = {frozenset(constraint.type for constraint in constraints) for constraints in drawn if len(constraints) > 1}
    assert len(pairs) > 20
    assert frozenset({"change_case:english_capital", "change_case:english_lowercase"}) not in pairs


# ---- the reviser program

TEXT = "The garden is small, but it has a tree. Birds visit it every morning, and Anna feeds them. It is a quiet place."
SHORT = "The garden is small, but it has a tree."
MENDED = [
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LESS}, TEXT, SHORT),
    ("length_constraints:number_words", {"num_words": 10, "relation": LESS}, TEXT, SHORT),
    (
        "length_constraints:number_paragraphs", {"num_paragraphs": 3}, TEXT,
        "The garden is small, but it has a tree.\n***\nBirds visit it every morning, and Anna feeds them.\n***\n"
        "It is a quiet place.",
    ),
    (
        "detectable_content:number_placeholders", {"num_placeholders": 1}, TEXT,
        TEXT.replace("Anna", "[Anna]"),
    ),
    (
        "detectable_content:postscript", {"postscript_marker": "P.S."}, TEXT,
        "The garden is small, but it has a tree. Birds visit it every morning, and Anna feeds them.\n\n"
        "P.S. It is a quiet place.",
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "Buy:\n1. milk\n2. bread\n3. tea",
     "Buy:\n* milk\n* bread"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, TEXT,
     TEXT.replace("The garden is", "*The garden is*")),
    (
        "detectable_format:multiple_sections", {"num_sections": 2, "section_spliter": "Section"}, "A tree.\n\nA bird.",
        "Section 1\nA tree.\n\nSection 2\nA bird.",
    ),
    ("detectable_format:json_format", {}, SHORT, f'{{"answer": "{SHORT}"}}'),
    ("detectable_format:title", {}, f"# My garden\n{TEXT}", f"<<My garden>>\n{TEXT}"),
    ("detectable_format:title", {}, TEXT, f"<<The Garden Is Small But>>\n\n{TEXT}"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Describe a garden."}, TEXT, f"Describe a garden.\n\n{TEXT}"),
    ("startend:end_checker", {"end_phrase": "Over to you."}, TEXT, f"{TEXT}\n\nOver to you."),
    (
        "change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": LEAST}, TEXT,
        TEXT.replace("morning", "MORNING"),
    ),
    ("change_case:english_capital", {}, TEXT, TEXT.upper()),
    ("change_case:english_lowercase", {}, TEXT, TEXT.lower()),
    ("punctuation:no_comma", {}, TEXT, TEXT.replace(",", "")),
    ("startend:quotation", {}, TEXT, f'"{TEXT}"'),
]  # fmt: skip


@pytest.mark.parametrize(("type", "kwargs", "answer", "expected"), MENDED, ids=lambda value: str(value)[:30])
def test_the_program_mends_the_broken_constraint_and_leaves_the_rest(type, kwargs, answer, expected):
    constraint = Constraint(type, kwargs, "")
    assert not holds(constraint, answer)
    assert mend([constraint], answer) == expected
    assert holds(constraint, expected)


def test_every_type_that_counts_as_mendable_has_a_mender_and_an_example():
    mendable = {type for type, kind in KINDS.items() if kind.mendable}
    assert mendable == set(MENDERS) == {type for type, *_ in MENDED}


def test_two_broken_constraints_are_mended_in_an_order_in_which_both_hold():
    quoted = Constraint("startend:quotation", {}, "")
    lower = Constraint("change_case:english_lowercase", {}, "")
    assert mend([quoted, lower], TEXT) == f'"{TEXT.lower()}"'
    ending = Constraint("startend:end_checker", {"end_phrase": "Over to you."}, "")
    comma = Constraint("punctuation:no_comma", {}, "")
    assert mend([ending, comma], TEXT) == f"{TEXT.replace(',', '')}\n\nOver to you."


@pytest.mark.parametrize(
    ("constraints", "answer", "reason"),
    [
        ([Constraint("punctuation:no_comma", {}, "")], "No comma here.", "holds_all"),
        ([Constraint("keywords:existence", {"keywords": ["moon"]}, "")], TEXT, "new_content"),
        (
            [Constraint("length_constraints:number_words", {"num_words": 80, "relation": LEAST}, "")],
            TEXT,
            "new_content",
        ),
        ([Constraint("detectable_content:postscript", {"postscript_marker": "P.S."}, "")], SHORT, "too_little_text"),
        (
            [Constraint("length_constraints:number_words", {"num_words": 5, "relation": LESS}, "")],
            TEXT,
            "too_little_text",
        ),
        (
            [
                Constraint("length_constraints:number_words", {"num_words": 10, "relation": LESS}, ""),
                Constraint("keywords:existence", {"keywords": ["quiet"]}, ""),
            ],
            TEXT,
            "breaks_another",
        ),
    ],
)
def test_what_the_program_cannot_mend_has_a_reason(constraints, answer, reason):
    with pytest.raises(Unmendable) as problem:
        mend(constraints, answer)
    assert problem.value.reason == reason


# ---- prompts


def write_tasks(folder: Path, tasks: list[str], benchmark: list[str]) -> Path:
    (folder / "instructions").mkdir(parents=True)
    (folder / "ifeval").mkdir()
    rows = [{"instruction": task, "instances": [{"input": "", "output": "A short answer."}]} for task in tasks]
    (folder / "instructions/seed_tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "instructions/user_oriented.jsonl").write_text("")
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in benchmark)
    (folder / "ifeval/input_data.jsonl").write_text(lines)
    return folder


def read_prompts(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in PromptFiles(folder).of(split).read_text("utf-8").splitlines()]


def test_prompts_have_no_unseen_type_and_share_no_task_and_none_is_the_benchmark_s(tmp_path):
    tasks = [f"Describe the colour of animal number {number} in a few words." for number in range(30)]
    long = "Write a poem about the sea and the wind and the sand and the sun and the stars at night."
    data = write_tasks(tmp_path / "data", [*tasks, long], [f"Please do this now. {long} Use no commas."])
    summary = write_prompts(data, tmp_path, {"train": 60, "validation": 20})
    rows = {split: read_prompts(tmp_path, split) for split in ("train", "validation")}
    assert {split: len(of_split) for split, of_split in rows.items()} == {"train": 60, "validation": 20}
    unseen = unseen_types(SEED)
    assert not [row for of_split in rows.values() for row in of_split if unseen & set(row["instruction_id_list"])]
    used = {split: {row["prompt"].split("\n\n")[0] for row in of_split} for split, of_split in rows.items()}
    assert not used["train"] & used["validation"]
    assert long not in used["train"] | used["validation"]
    assert summary["train"]["near_ifeval"] + summary["validation"]["near_ifeval"] > 0


def test_real_prompts_are_as_many_as_said_and_none_is_near_the_benchmark(shared, tmp_path):
    write_prompts(shared / "data", tmp_path, experiment.WHOLE.prompts)
    questions = (shared / "data/ifeval/input_data.jsonl").read_text("utf-8").splitlines()
    benchmark = BenchmarkQuestions(json.loads(line)["prompt"] for line in questions)
    unseen = unseen_types(SEED)
    for split, count in experiment.WHOLE.prompts.items():
        rows = read_prompts(tmp_path, split)
        assert len(rows) == len({row["prompt"] for row in rows}) == count
        assert not any(benchmark.overlaps(row["prompt"]) or unseen & set(row["instruction_id_list"]) for row in rows)


def test_a_missing_data_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"seed_tasks\.jsonl is missing; give the data folder"):
        write_prompts(tmp_path, tmp_path, {"train": 1})


# ---- the server

PROMPTS = [
    {"prompt": "Describe a garden. Use no comma.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "prompt": "Describe a garden. Use the word moon.",
        "instruction_id_list": ["keywords:existence"],
        "kwargs": [{"keywords": ["moon"]}],
    },
]


def request(**parts: str) -> str:
    return "\n\n".join(f"<{name}>\n{text}\n</{name}>" for name, text in parts.items())


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return file


def test_the_reviser_mends_or_refuses_by_name(prompts_file):
    prompts = read_constraints(prompts_file)
    reply = revise(request(task=PROMPTS[0]["prompt"], student_solution=TEXT), prompts)
    assert reply.text.endswith(TEXT.replace(",", ""))
    assert revise(request(task=PROMPTS[1]["prompt"], student_solution=TEXT), prompts).refusal == "new_content"
    unknown = revise(request(task="Another task", student_solution=TEXT), prompts).refusal
    assert str(unknown).startswith("unknown_prompt")


def test_the_judge_counts_constraints(prompts_file):
    prompts = read_constraints(prompts_file)

    def verdict(first: str, second: str) -> str:
        parts = {"task": PROMPTS[0]["prompt"], "student_solution_1": first, "student_solution_2": second}
        return judge(request(**parts), prompts).text.rpartition("\n")[2]

    assert [verdict("No comma.", "A, b."), verdict("A, b.", "No comma."), verdict("A.", "B.")] == [
        "[1]",
        "[2]",
        "[tie]",
    ]


def test_a_build_makes_pairs_with_the_program_and_drops_what_it_cannot_mend(prompts_file, tmp_path):
    rows = [{**PROMPTS[0], "answer": TEXT}, {**PROMPTS[1], "answer": TEXT}]
    answered = tmp_path / "answered.jsonl"
    answered.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with running_module("recipes.experiments.real_model.server", ["--prompts", str(prompts_file)], 60) as server:
        reviser = {"url": server.url, "model": "constraint-reviser", "id": program_id(), "temperature": 0}
        recipe = {"pipeline": "revised", "prompts": {"path": str(answered)}, "reviser": reviser, "test_fraction": 0}
        build(BuildConfig.model_validate({**recipe, "out": str(tmp_path / "pairs")}))
    (pair,) = read_rows(tmp_path / "pairs")
    assert (pair["rejected"][-1]["content"], pair["chosen"][-1]["content"]) == (TEXT, TEXT.replace(",", ""))
    (drop,) = [json.loads(line) for line in (tmp_path / "pairs/dropped.jsonl").read_text().splitlines()]
    assert (drop["stage"], drop["reason"], drop["detail"]) == (
        "reviser",
        "refusal",
        "the reply refuses the task: new_content",
    )
    assert read_manifest(tmp_path / "pairs")["counts"]["pairs"] == 1


def test_a_judged_build_prefers_the_answer_that_holds_more_and_drops_ties(prompts_file, tmp_path):
    rows = [{**PROMPTS[0], "answers": [TEXT, "No comma."]}, {**PROMPTS[1], "answers": ["A tree.", "A bird."]}]
    answered = tmp_path / "answered.jsonl"
    answered.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with running_module("recipes.experiments.real_model.server", ["--prompts", str(prompts_file)], 60) as server:
        judge = {"url": server.url, "model": "constraint-judge", "id": program_id(), "order": "random"}
        recipe = {"pipeline": "judged", "prompts": {"path": str(answered)}, "judge": judge, "test_fraction": 0}
        build(BuildConfig.model_validate({**recipe, "out": str(tmp_path / "pairs")}))
    (pair,) = read_rows(tmp_path / "pairs")
    assert (pair["rejected"][-1]["content"], pair["chosen"][-1]["content"]) == (TEXT, "No comma.")
    (drop,) = [json.loads(line) for line in (tmp_path / "pairs/dropped.jsonl").read_text().splitlines()]
    assert (drop["stage"], drop["reason"]) == ("judge", "tie")


def test_the_build_recipes_differ_in_pipeline_and_roles_alone_and_share_the_target(tmp_path):
    recipes = [yaml.safe_load((ROOT / experiment.RECIPES / f"{name}.yaml").read_text()) for name in ("clair", "judged")]
    for key in ("target", "prompts", "ledger", "seed", "test_fraction"):
        assert recipes[0][key] == recipes[1][key], key


# ---- steps


def python_step(code: str, **settings: object) -> Step:
    return Step("a step", [Path(sys.executable).name, "-c", code], "train.yaml", settings)


def test_a_finished_step_is_not_done_again_and_a_changed_one_is(tmp_path):
    steps = Experiment(tmp_path, tmp_path, tmp_path, experiment.SMALL)
    code = f"import time; time.sleep(0.3); open({str(tmp_path / 'count')!r}, 'a').write('x')"
    for _ in range(2):
        steps.run(python_step(code, beta=0.1))
    assert (tmp_path / "count").read_text() == "x"
    steps.run(python_step(code, beta=0.2))
    assert (tmp_path / "count").read_text() == "xx"
    first, second = [json.loads(line) for line in steps.log.read_text().splitlines()]
    assert first["key"] != second["key"]
    assert first["seconds"] >= 0.3
    assert first["peak_mib"] > 1


def test_a_failed_step_ends_the_run_with_its_exit_code_and_is_done_again(tmp_path, capfd):
    steps = Experiment(tmp_path, tmp_path, tmp_path, experiment.SMALL)
    flag = tmp_path / "flag"
    code = f"import pathlib, sys; sys.exit(0 if pathlib.Path({str(flag)!r}).exists() else 5)"
    with pytest.raises(SystemExit) as end:
        steps.run(python_step(code))
    assert end.value.code == 5
    assert "run the same command to continue" in capfd.readouterr().err
    assert not steps.log.exists()
    flag.touch()
    steps.run(python_step(code))
    assert len(steps.log.read_text().splitlines()) == 1


def test_the_best_checkpoint_on_validation_is_chosen_and_of_equal_ones_the_lower_rate_and_fewer_epochs(
    tmp_path, monkeypatch
):
    steps = Experiment(tmp_path, tmp_path, tmp_path, experiment.WHOLE)
    low, high = PRIMARY.rates

    def train(self: Experiment, cell: object, rate: float) -> Path:
        for step in (9, 12, 18):  # the one of step 12 is that of a run which was stopped
            checkpoint = tmp_path / f"{rate:g}" / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / "trainer_state.json").write_text(json.dumps({"epoch": step / 9}))
        return tmp_path / f"{rate:g}"

    scores = {(low, 1): 0.2, (low, 2): 0.3, (high, 1): 0.3, (high, 2): 0.1}

    def validate(self: Experiment, name: str, folder: Path) -> float:
        _, rate, epoch = name.split("/")
        return scores[float(rate), int(epoch)]

    monkeypatch.setattr(Experiment, "train", train)
    monkeypatch.setattr(Experiment, "validate", validate)
    assert steps.choose(PRIMARY) == tmp_path / f"{low:g}" / "checkpoint-18"
    chosen = json.loads((tmp_path / "chosen.json").read_text())[PRIMARY.name]
    assert (chosen["rate"], chosen["epochs"], len(chosen["candidates"])) == (low, 2, 4)


def test_the_cells_are_those_of_the_plan():
    assert CELLS[0] == PRIMARY
    assert Counter((cell.pairs, cell.objective) for cell in CELLS) == {
        ("clair", "apo_zero"): 3,
        ("clair", "dpo"): 1,
        ("clair", "sft"): 1,
        ("judged", "apo_zero"): 1,
    }


def test_a_model_that_is_there_is_not_made_again_and_other_files_are_never_removed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds files but no model\.safetensors"):
        make_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert make_model(tmp_path) == {"source": "unknown"}
    (tmp_path / "source.json").write_text('{"package": "a"}')
    assert make_model(tmp_path) == {"package": "a"}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_hub_that_does_not_answer_and_one_that_is_not_asked_give_way_to_the_package(tmp_path, monkeypatch, capsys):
    asked = []

    def model_info(self: object, name: str, **options: object) -> None:
        asked.append(name)
        raise OSError("no route to host")

    def from_package(folder: Path) -> dict:
        (folder / "model.safetensors").write_bytes(b"weights")
        return {"package": "a package"}

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr(model, "from_package", from_package)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert make_model(tmp_path / "offline")["package"] == "a package"
    assert not asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    source = make_model(tmp_path / "model")
    assert asked == [model.HUB_NAME]
    assert "no route to host" in capsys.readouterr().out
    assert json.loads((tmp_path / "model/source.json").read_text()) == source
    assert (tmp_path / "model/model.safetensors").read_bytes() == b"weights"
    assert len(list(tmp_path.iterdir())) == 2


# ---- the page


def section(level: str, split: str | None, benchmark: str | None = None) -> dict:
    numbers = {
        "score": 0.25,
        "ci95": [0.21, 0.29],
        "delta": 0.05,
        "delta_ci95": [0.01, 0.09],
        "p": 0.02,
        "p_holm": 0.04,
    }
    tuned = {**numbers, "better": 30, "worse": 3}
    base = {"score": 0.2, "ci95": [0.16, 0.24]}
    return {"level": level, "split": split, "benchmark": benchmark, "rows": 541, "base": base, "tuned": [tuned]}


def results_of(names: list[str], p: float) -> dict:
    """Results of a run with these cells, each with this p-value."""
    answered = {"scores": "01" * 5, "tokens": [100, 300], "truncated": 7}
    other = {**answered, "scores": "0111" + "01" * 3}
    choice = {"rate": 3e-4, "epochs": 2, "model": "runs/a/checkpoint-9"}
    overall, unseen = section("overall", "prompt_loose"), section("split", "instruction_loose", "unseen")
    for part in (overall, unseen):
        part["tuned"] = [{**part["tuned"][0], "p": p} for _ in names]
    models = {name: answered if name == PRIMARY.name else other for name in names}
    return {
        "evaluations": {"ifeval": {"base": answered, **models}, "mixeval": {}},
        "compared": {"ifeval": {"names": names, "sections": [overall, unseen]}, "mixeval": None},
        "pairs": {"clair": {"counts": {"pairs": 6, "dropped": 4}, "drops": {"reviser/refusal/new_content": 4}}},
        "chosen": {name: {**choice, "candidates": [{**choice, "validation": 0.3}]} for name in names},
        "moved": {name: {"logratios/chosen": 2.0, "logratios/rejected": -3.0, "chosen_falls": 0.1} for name in names},
        "steps": [
            {"step": "pairs clair", "seconds": 60, "cpu_seconds": 30, "peak_mib": 1000},
            {"step": "train a 0.0003", "seconds": 120, "cpu_seconds": 180, "peak_mib": 900},
            {"step": "train a 0.001", "seconds": 60, "cpu_seconds": 60, "peak_mib": 700},
            {"step": "answers a/0.001/1", "seconds": 60, "cpu_seconds": 90, "peak_mib": 700},
            {"step": "answers IFEval a", "seconds": 240, "cpu_seconds": 300, "peak_mib": 800},
        ],
        "answers": [],
    }


def test_the_page_says_what_the_results_of_each_run_hold():
    answer = {
        "prompt": "Write.",
        "before": "B" * 500,
        "before_held": "a: not followed",
        "after": "A",
        "after_held": "a",
    }
    first = {**results_of([PRIMARY.name, "clair-dpo"], 0.01), "answers": [answer]}
    second = results_of(["judged-apo_zero"], 0.02)
    text = table.page({1: first, 2: second})
    # Holm over the three cells of both runs: 3 x 0.01; its maximum with 1 x 0.02
    assert f"| 1 | {PRIMARY.name} | 25.0 [21.0, 29.0] | +5.0 [+1.0, +9.0] | 0.010 | 0.030 | 30, 3 | 7 |" in text
    assert "| 2 | judged-apo_zero | 25.0 [21.0, 29.0] | +5.0 [+1.0, +9.0] | 0.020 | 0.030 | 30, 3 | 7 |" in text
    numbers = "541 | 20.0 [16.0, 24.0] | 25.0 [21.0, 29.0] | +5.0 [+1.0, +9.0] |"
    assert text.count(f"instruction, loose, types unseen | {numbers}") == 1
    assert "| 2 | judged-apo_zero |  | +5.0 [+1.0, +9.0] |" in text
    assert "| 2 | clair | 10 | 6 | reviser/refusal/new_content 4 |" in text
    # one of ten differs: the standard error is 0.1, t of 9 degrees of freedom 2.262; the bases of both runs are equal
    contrast = "-10.0 [-32.6, +12.6] | 0, 1 |"
    assert f"| 1 | clair-dpo | {contrast}" in text
    assert f"| 2 | judged-apo_zero | {contrast}" in text
    second["evaluations"]["ifeval"]["base"] = {**first["evaluations"]["ifeval"]["base"], "scores": "11" * 5}
    assert text.replace(f"| 2 | judged-apo_zero | {contrast}\n", "") == table.page({1: first, 2: second})
    assert f"| 1 | {PRIMARY.name} | 0.0003, 2: 30.0 | 0.0003, 2 |" in text
    assert "| 2 | judged-apo_zero | 200 | +2.0 | -3.0 | 10 |" in text
    assert "| 2 | clair | 0.5 |  |  |  |  | 0.5 | 1.0 | 1000 |" in text
    assert "| 2 | a |  | 4.0 | 1.5 | 5.0 |  | 10.5 | 8.0 | 900 |" in text
    assert "| 2 | all | 0.5 | 4.0 | 1.5 | 5.0 |  | 11.0 | 9.0 | 1000 |" in text
    assert text.count("B ... (500 characters)") == 1
    assert "MixEval-Hard" not in text


def test_the_page_is_what_the_committed_results_make():
    assert (ROOT / table.PAGE).read_text("utf-8") == table.page(table.read_runs(ROOT / table.COMMITTED))


# ---- the real model


@pytest.mark.slow
def test_the_whole_road_on_the_real_model(real_model, shared, tmp_path):
    size = Size({"train": 24, "validation": 2}, epochs=1, rates=1, ifeval=4, mixeval=1)
    Experiment(tmp_path, real_model.resolve(), (shared / "data").resolve(), size).whole((PRIMARY,))
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert read_manifest(tmp_path / "pairs/clair")["counts"]["pairs"] >= 3
    for pair in read_rows(tmp_path / "pairs/clair"):
        constraints = read_constraints(tmp_path / "prompts/train.jsonl")[pair["prompt"][-1]["content"]]
        assert all(holds(constraint, pair["chosen"][-1]["content"]) for constraint in constraints)
        assert not all(holds(constraint, pair["rejected"][-1]["content"]) for constraint in constraints)
    text = table.page({1: table.collect(tmp_path)})
    assert "## IFEval, prompts" in text
    assert "## Five answers" in text
    compared = json.loads((tmp_path / "evals/ifeval/compare/compare.json").read_text())
    assert compared["tuned"][0]["name"].endswith(PRIMARY.name)
