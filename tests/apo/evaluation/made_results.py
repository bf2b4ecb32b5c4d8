"""Result folders of models that never were: answers drawn at random, questions repeated as in MixEval-Hard."""

from __future__ import annotations

from pathlib import Path
from random import Random

from apo.evaluation.records.benchmark import ModelUsed, ScoreInterval
from apo.evaluation.records.mixeval import SPLITS, JudgeUsed, MixEvalItem, MixEvalScore, SubsetScore
from apo.evaluation.results import write_results

BENCHMARKS = {"free-form": ("TriviaQA", "DROP", "BBH"), "multiple-choice": ("MMLU", "HellaSwag", "ARC")}
QUESTION = "The Nile flows through {n} countries and {split} of them meet at item {n}. Which one is it?"
TEXTS = ("It is the first one, since the others are farther away.", "It is not known. I would say the second one.")


def make_items(
    accuracy: float,
    *,
    seed: int = 0,
    shift: float = 0.0,
    questions: int = 60,
    samples: int = 1,
    repeats: int = 2,
    texts: tuple[str, ...] = TEXTS,
) -> list[MixEvalItem]:
    """Items of `questions` questions a split, each asked in `repeats` rows; the last one is alone in ARC or BBH.

    Questions are as hard for every model (they do not depend on `seed`); `shift` is what this one answers better.
    """
    items = []
    for split in SPLITS:
        row = 0
        for question in range(questions):
            hard = Random(f"{split} {question}").betavariate(accuracy, 1 - accuracy)
            benchmark = BENCHMARKS[split][2 if question == questions - 1 else question % 2]
            for _ in range(repeats):
                for sample in range(samples):
                    draw = Random(f"{split} {row} {sample} {seed}")
                    right = draw.random() < min(1, max(0, hard + shift))
                    graded = split == "free-form" and question % 5 == 0
                    items.append(
                        MixEvalItem(
                            split=split,
                            row=row,
                            sample=sample,
                            question=f"{split}-{question}",
                            benchmark=benchmark,
                            prompt=QUESTION.format(n=question, split=split),
                            target=("A",) if split == "multiple-choice" else ("the first one", "number one"),
                            response=f"{texts[0 if right else 1]} (row {row})",
                            judgement=f"It says what is right: [[{int(right)}]]",
                            verdict=str(int(right)),
                            score=(0.8 if graded else 1.0) if right else (0.3 if graded else 0.0),
                        )
                    )
                row += 1
    return items


def write_folder(folder: Path, items: list[MixEvalItem], model: str = "m", **changes: object) -> Path:
    """The result folder that holds these items; `changes` are of its score."""
    mean = sum(item.score for item in items) / len(items)
    interval = ScoreInterval(
        mean=mean, n=len(items), questions=2, se_naive=0.0, se_clustered=0.0, ci95=None, unique_mean=mean,
        bracket=(mean, mean),
    )  # fmt: skip
    of_split = {s: [i.score for i in items if i.split == s] or [0.0] for s in SPLITS}
    free_form, multiple_choice = (sum(of_split[s]) / len(of_split[s]) for s in SPLITS)
    values = {
        "version": "2024-06-01",
        "split": "hard",
        "profile": "strict",
        "judge": JudgeUsed(kind="model", model="world-judge", options={"temperature": 0}, prompts_sha256="0" * 64),
        "model": ModelUsed(name=model, identity=f"weights:{model}"),
        "samples": 1 + max(item.sample for item in items),
        "overall": mean,
        "free_form": free_form,
        "multiple_choice": multiple_choice,
        "by_benchmark": {s: {"all": SubsetScore(score=mean, n=len(items), right=mean, unresolved=0)} for s in SPLITS},
        "intervals": dict.fromkeys(("overall", "free_form", "multiple_choice"), interval),
        "unresolved": sum(item.unresolved is not None for item in items),
        "fallbacks": sum(item.fallback for item in items),
        "truncated": sum(item.truncated for item in items),
        "shared_judgements": True,
        "data": {"free-form.json": "0" * 64},
        "items_sha256": "",
    }
    write_results(folder, MixEvalScore(**{**values, **changes}), items)
    return folder
