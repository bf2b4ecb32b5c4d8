"""The phases of a round: each is a command with its output folder and its result file."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from clair.core.files import read_json
from clair.pipeline.config import MAY_CHANGE
from clair.pipeline.export import next_round
from clair.rounds.config import IterateConfig, Recipes, override

_RESULTS = {"winrate": "winrate.json", "ifeval": "score.json", "mixeval": "score.json"}
CLAIR, APO = (sys.executable, "-m", "clair.cli"), (sys.executable, "-m", "apo")


@dataclass(frozen=True, slots=True)
class Phase:
    """A command of a round. It is complete if the file `result` exists and has a value under the key `finished`."""

    round: int
    name: str
    command: tuple[str, ...]
    out: Path
    result: Path
    finished: str | None = None
    allowed: tuple[int, ...] = field(default=(0,))
    """Exit codes after which the round continues."""

    @property
    def is_complete(self) -> bool:
        """True if the command has written its result."""
        if self.finished is None or not self.result.is_file():
            return self.result.exists()
        return read_json(self.result).get(self.finished) is not None

    @property
    def shown(self) -> str:
        """The command as a user writes it."""
        programs: dict[tuple[str, ...], str] = {CLAIR: "clair", APO: "apo"}
        return shlex.join([programs[self.command[:3]], *self.command[3:]])


@dataclass(frozen=True, slots=True)
class Rounds:
    """The folders, models and phases of the rounds."""

    config: IterateConfig
    recipes: Recipes

    def folder(self, number: int) -> Path:
        """Return the folder of a round. Round 0 is the untrained model."""
        return Path(self.config.out) / f"round-{number}"

    def model(self, number: int) -> str:
        """Return the model that a round trains; an adapter is merged into its base model."""
        name = "merged" if self.recipes.train.lora else "model"
        return str(self.folder(number) / name) if number else self.recipes.train.model

    def evaluation(self, number: int) -> Path:
        """Return the result folder of a round's evaluation."""
        return self.folder(number) / self.config.evaluate.kind

    def build_recipe(self, number: int) -> str:
        """Return the data recipe of a round. `prepare` writes that of a later round."""
        return self.config.build if number == 1 else str(self.folder(number) / "pairs.yaml")

    def prepare(self, number: int) -> None:
        """Write recipe and prompts of a later round's build, as `clair next` does, unless they exist."""
        recipe, pairs = Path(self.build_recipe(number)), self.folder(number) / "pairs"
        if recipe.is_file():
            return
        pairs.with_name(f"{pairs.name}-prompts.jsonl").unlink(missing_ok=True)  # the recipe is written last
        next_round(self.folder(number - 1) / "pairs", self.model(number - 1), pairs)

    def phases(self, number: int) -> Iterator[Phase]:
        """Yield the phases of a round in order. Round 0 has one if the evaluation scores a model by itself."""
        folder, kind = self.folder(number), self.config.evaluate.kind
        if number:
            yield self._build(number)
            yield self._train(number)
            if self.recipes.train.lora:
                merged = Path(self.model(number))
                command = (*APO, "merge", str(folder / "model"), "--out", str(merged))
                yield Phase(number, "merge", command, merged, merged)
        elif kind == "winrate":
            return
        yield self._evaluate(number)
        if number and kind != "winrate":
            compared, results = folder / "compare", (self.evaluation(number - 1), self.evaluation(number))
            command = (*APO, "compare", *map(str, results), "--out", str(compared))
            yield Phase(number, "compare", command, compared, compared / "compare.json")

    def _build(self, number: int) -> Phase:
        out, build = self.folder(number) / "pairs", self.recipes.build
        # One ledger for all rounds: a reviser is not paid again for an answer that training has not changed.
        settings = {"ledger": str(build.ledger or Path(self.config.out) / "pairs.sqlite")}
        if number > 1:  # the limits of the first recipe hold in every round
            values = build.model_dump(mode="json", exclude_defaults=True)
            settings |= {key: values[key] for key in sorted(MAY_CHANGE - {"out", "ledger"}) if key in values}
        sets = (argument for key, value in settings.items() for argument in override(key, value))
        command = (*CLAIR, "build", self.build_recipe(number), "--out", str(out), *sets)
        return Phase(number, "build", command, out, out / "manifest.json", allowed=(0, 3))

    def _train(self, number: int, pairs: Path | None = None) -> Phase:
        out = self.folder(number) / "model"
        model = override("model", self.model(number - 1))
        dataset = override("dataset", pairs or self.folder(number) / "pairs")
        command = (*APO, "train", self.config.train, *model, *dataset, "--out", str(out))
        return Phase(number, "train", command, out, out / "run.json", finished="finished")

    def _evaluate(self, number: int, tuned: str | None = None) -> Phase:
        kind, out, tuned = self.config.evaluate.kind, self.evaluation(number), tuned or self.model(number)
        models = {"model.path": tuned}
        if kind == "winrate":
            models = {"base.path": self.model(number - 1), "tuned.path": tuned}
        # One ledger for all rounds: a model answers the same prompts only once.
        settings = models | {"ledger": str(Path(self.config.out) / "evaluation.sqlite")}
        sets = (argument for key, value in settings.items() for argument in override(key, value))
        command = (*APO, "eval", kind, self.config.evaluate.recipe, *sets, "--out", str(out))
        finished = "win_rate" if kind == "winrate" else None
        return Phase(number, "evaluate", command, out, out / _RESULTS[kind], finished)

    def checks(self, pairs: Path) -> Iterator[Phase]:
        """Yield training and evaluation of the first round with `--dry-run`, on `pairs` and the untrained model."""
        # A win rate refuses to compare a model with itself: give the same folder under another name.
        evaluated = f"{self.model(0)}/." if self.config.evaluate.kind == "winrate" else self.model(0)
        for phase in (self._train(1, pairs), self._evaluate(1, evaluated)):
            yield replace(phase, command=(*phase.command, "--dry-run"))
