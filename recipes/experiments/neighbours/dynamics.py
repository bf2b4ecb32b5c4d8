"""In which order are behaviours learned, and can it be predicted? After Im & Li (arXiv 2403.18742), on SmolLM2-135M.

    CLAIR_REAL_MODEL=... python -m recipes.experiments.neighbours.dynamics     # 15 CPU minutes; goes on where it was
    python -m recipes.experiments.neighbours.dynamics_page --write             # tables and picture from raw results

A seed draws the statements of eight behaviours (persona.py), and which of their items are held out.

    head    the theory's setting: each behaviour alone, the LM head's rows of the two answers on frozen features
    train   all behaviours together, by the commands that a user would type: `apo distinguish` on the training pairs,
            `apo train` with a LoRA on the last layers, which measures each behaviour's held-out pairs, and the check of
            the prediction that `apo diagnose` makes

Each cell is a line of results/dynamics.jsonl. The design is in docs/log, and was committed before the first run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.losses.objectives import apo_down, apo_zero, dpo
from clair.core.errors import UserError
from recipes.experiments.neighbours.persona import BEHAVIOURS, persona_rows, read_persona
from recipes.experiments.tastes.run import apo

if TYPE_CHECKING:
    from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "dynamics.jsonl"
OBJECTIVES = {"dpo": dpo, "apo_zero": apo_zero, "apo_down": apo_down}
HEAD_SEEDS, TRAIN_SEEDS = range(5), range(3)
BETA, TRAIN, HELD_OUT = 0.1, 24, 6
"""Statements of each behaviour."""
HEAD_STEPS, HEAD_RATE = 100, 0.1
"""Steps and rate of the paper's run on the last layer; ours takes all statements at each step."""
RECIPE: dict[str, Any] = {
    "lora": {"r": 8, "alpha": 32, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": list(range(20, 30))},
    "pairs_per_step": 16,
    "samples": 0,
    "probe": 0,
    "trainer": {
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 24,
        "train_sampling_strategy": "sequential",
        "logging_steps": 4,
        "eval_strategy": "no",
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
    },
}


def real_model() -> Path:
    """The model's folder, named by CLAIR_REAL_MODEL."""
    folder = Path(os.environ.get("CLAIR_REAL_MODEL") or Path.home() / ".cache" / "clair-apo" / "smollm2-135m")
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"no model in {folder}; name the folder of SmolLM2-135M-Instruct by CLAIR_REAL_MODEL")
    return folder


def write_pairs(out: Path, seed: int) -> None:
    """Write the pairs of a seed: train.jsonl and test.jsonl, with their behaviour."""
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for behaviour in BEHAVIOURS:
        for split, statements in persona_rows(behaviour, seed, TRAIN, HELD_OUT).items():
            rows[split] += read_persona(Path(f"{behaviour}.jsonl"), statements)
    # One statement of each behaviour and answer after another: a batch of 16 has one of each, so that the base rate of
    # Yes, which is no behaviour, gets no gradient.
    for split, pairs in rows.items():
        kinds: dict[tuple[str, bool], list[dict[str, Any]]] = defaultdict(list)
        for pair in pairs:
            kinds[pair["behaviour"], pair["chosen"].endswith("Yes")].append(pair)
        pairs = [pair for group in zip(*kinds.values(), strict=True) for pair in group]
        (out / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")


# ---- the head alone


def run_head(model: Path, data: Path) -> list[dict[str, Any]]:
    """For each behaviour: its distances on the training pairs, and what training the head on it alone gives."""
    import torch

    from apo.analysis.distinguishability import distinguishability
    from apo.analysis.features import encode_datasets

    splits = {split: encode_datasets([str(data / f"{split}.jsonl")], str(model)) for split in ("train", "test")}
    head, answers = splits["train"].model.get_output_embeddings().weight.detach(), _answer_ids(splits["train"])
    result = []
    for behaviour in BEHAVIOURS:
        parts = {}
        for split, pairs in splits.items():
            indices = [index for index, row in enumerate(pairs.rows) if row["behaviour"] == behaviour]
            yes = torch.tensor([pairs.rows[index]["chosen"].endswith("Yes") for index in indices])
            parts[split] = pairs.features.prompt[indices], yes
        literal = distinguishability(*parts["train"])
        curves = {
            name: train_head(objective, head, answers, list(parts.values())) for name, objective in OBJECTIVES.items()
        }
        result.append({"behaviour": behaviour, **vars(literal), "curves": curves})
    return result


def _answer_ids(pairs: Any) -> tuple[int, int]:
    """The first token of " Yes" and of " No"."""
    rows = zip(pairs.rows, pairs.tokenized, strict=True)
    first = {row["chosen"].rsplit("\n", 1)[-1]: ids["chosen_ids"][0] for row, ids in rows}
    return first[" Yes"], first[" No"]


def train_head(
    objective: Any, head: Tensor, answers: tuple[int, int], parts: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, list[float]]:
    """Train the rows of the two answers on the first part by gradient descent.

    Each part is hidden states [N, D] and whether Yes is preferred. Returns the loss and the share of right orders of
    each part at each step. The other rows stay as they are, which is exact for DPO.
    """
    import torch

    first = head[list(answers)].clone()
    others = torch.ones(len(head), dtype=torch.bool)
    others[list(answers)] = False
    rest = [(hidden @ head[others].T).logsumexp(1, keepdim=True) for hidden, _ in parts]

    def logps(rows: Tensor, part: int) -> Tensor:
        logits = parts[part][0] @ rows.T
        return logits - torch.cat([logits, rest[part]], 1).logsumexp(1, keepdim=True)

    references = [logps(first, part) for part in range(len(parts))]

    def evaluate(rows: Tensor, part: int) -> tuple[Tensor, Tensor]:
        ratios, yes = logps(rows, part) - references[part], parts[part][1]
        chosen, rejected = ratios[:, 0].where(yes, ratios[:, 1]), ratios[:, 1].where(yes, ratios[:, 0])
        right = (chosen > rejected).float() + (chosen == rejected).float() / 2
        return objective(chosen, rejected, beta=BETA).mean(), right.mean()

    rows = first.clone()
    names = ("train_loss", "train_right", "test_loss", "test_right")
    curves: dict[str, list[float]] = {name: [] for name in names}
    for step in range(HEAD_STEPS + 1):
        rows.requires_grad_()
        loss, right = evaluate(rows, 0)
        with torch.no_grad():
            values = (loss, right, *evaluate(rows, 1))
        for name, value in zip(names, values, strict=True):
            curves[name].append(round(float(value.detach()), 5))
        if step < HEAD_STEPS:
            (gradient,) = torch.autograd.grad(loss, rows)
            rows = (rows - HEAD_RATE * gradient).detach()
    return curves


# ---- the whole way, by commands


def run_train(model: Path, data: Path, out: Path, objective: str, seed: int) -> dict[str, Any]:
    """Predict, train and check one cell. Returns the prediction's groups and the log of their held-out pairs."""
    from apo.run_dir.files import METRICS, read_log

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    common = {"model": str(model), "objective": objective, "beta": BETA, "seed": seed}
    recipes = {
        "distinguish": {"dataset": str(data / "train.jsonl"), "by": "behaviour", "out": str(out / "prediction")},
        "train": {
            **RECIPE,
            "dataset": str(data / "train.jsonl"),
            "eval": str(data / "test.jsonl"),
            "prediction": str(out / "prediction"),
            "out": str(out / "run"),
        },
    }
    for command, recipe in recipes.items():
        file = out / f"{command}.yaml"
        file.write_text(json.dumps({**common, **recipe}), "utf-8")  # JSON is YAML
        apo(command, file)
    apo("diagnose", out / "run")
    report = json.loads((out / "prediction" / "distinguish.json").read_text("utf-8"))
    report["model"] = model.name  # no path of one machine
    log = [
        {key: round(value, 5) for key, value in row.items() if key == "step" or key.startswith("group/")}
        for row in read_log(out / "run" / METRICS)
        if any(key.startswith("group/") for key in row)
    ]
    return {"prediction": report, "log": log}


def cells() -> list[dict[str, Any]]:
    """All cells in the order in which they run: the cheap ones first, then training seed by seed."""
    trained = [{"part": "train", "objective": name, "seed": seed} for seed in TRAIN_SEEDS for name in OBJECTIVES]
    return [{"part": "head", "objective": None, "seed": seed} for seed in HEAD_SEEDS] + trained


def run_cell(cell: Mapping[str, Any], model: Path, out: Path) -> dict[str, Any]:
    """Run one cell. Returns its line, with the processor seconds that it took."""
    started = time.process_time()
    seed = cell["seed"]
    data = out / f"data-{seed}"
    write_pairs(data, seed)
    if cell["part"] == "head":
        result: dict[str, Any] = {"behaviours": run_head(model, data)}
    else:
        result = run_train(model, data, out / f"{cell['objective']}-{seed}", cell["objective"], seed)
    return {**cell, **result, "cpu_seconds": round(time.process_time() - started, 1)}


def read_results() -> list[dict[str, Any]]:
    """The lines that there are."""
    return [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()] if RESULTS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/neighbours/dynamics"))
    parser.add_argument("--pilot", action="store_true", help="one cell with a seed of its own; nothing is recorded")
    args = parser.parse_args()
    model = real_model()
    if args.pilot:
        for cell in ({"part": "train", "objective": "dpo", "seed": 100},):
            print(json.dumps(run_cell(cell, model, args.out / "pilot")))
        return
    present = [{key: line[key] for key in ("part", "objective", "seed")} for line in read_results()]
    for cell in (cell for cell in cells() if cell not in present):
        line = run_cell(cell, model, args.out)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
