"""What an evaluation is asked to do, and what is checked before it costs anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from apo.evaluate import mixeval
from apo.evaluate.answers import Answer, check_system_prompt, read_responses
from apo.evaluate.judging import request_options
from apo.evaluate.mixeval import Benchmark, JudgeWords
from apo.evaluate.results import ITEMS, SCORE, Profile
from clair.core.errors import UserError
from clair.core.files import read_json, write_json
from clair.core.recipe import Recipe, changed_keys, resolved
from clair.inference.budget import BudgetConfig
from clair.inference.config import ROLE_PASSING, ModelConfig, public_model
from clair.inference.open import check_models
from clair.ledger.ledger import Ledger

SETTINGS = "settings.json"
_PASSING = ("concurrency", "attempts", "out", "ledger", "limit", "budget", "upstream_files")


class Evaluation(Recipe):
    """What every evaluation that asks models has."""

    budget: BudgetConfig | None = None
    concurrency: int = Field(100, ge=1)
    attempts: int = Field(6, ge=1)
    ledger: str | None = None
    out: str = Field(min_length=1)

    @property
    def models(self) -> Mapping[str, ModelConfig]:
        """The models that are asked, by role."""
        raise NotImplementedError

    @property
    def ledger_path(self) -> Path:
        """The ledger: the one named, or the result folder's own."""
        return Path(self.ledger) if self.ledger else Path(self.out) / "ledger.sqlite"


class MixEvalConfig(Evaluation):
    """All of an evaluation, resolved before any work."""

    data: str
    version: str = mixeval.VERSIONS[0]
    split: mixeval.HardOrFull = "hard"
    profile: Profile = "faithful"
    model: ModelConfig | None = None
    """Who answers; absent where there are responses."""
    responses: str | None = None
    judge: ModelConfig | Literal["rule"]
    """Who judges. What its requests hold is for the profile to say."""
    system: str | None = None
    samples: int = Field(1, ge=1)
    limit: int | None = Field(None, ge=1)
    seed: int = Field(42, ge=0)
    """What random draws start from: upstream's fallback, a strict judge, a local model's sampling."""
    independent_judgements: bool = False
    upstream_files: bool = False

    @model_validator(mode="after")
    def _fits(self) -> MixEvalConfig:
        if (self.model is None) == (self.responses is None):
            raise ValueError("give either a model that answers or a folder of responses")
        if self.responses is not None and (self.system is not None or self.samples > 1):
            raise ValueError("a system prompt and samples are for a model that answers, and the responses are given")
        if self.judge == "rule" and self.independent_judgements:
            raise ValueError("independent judgements are for a judge that is asked, and the rule parser is not")
        if self.upstream_files and self.samples > 1:
            raise ValueError("upstream's files hold one answer a row; leave out samples or the upstream files")
        return self

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models that are asked, by role; the judge's requests as the profile has them."""
        roles = {"model": self.model} if self.model else {}
        if self.judge != "rule":
            options = request_options(self.profile, self.seed)
            own = {"temperature": options.pop("temperature", None), "max_tokens": options.pop("max_tokens")}
            roles["judge"] = self.judge.model_copy(update={**own, "extra": {**self.judge.extra, **options}})
        return roles


@dataclass(frozen=True, slots=True)
class Checked:
    """What an evaluation starts from, found to be right. `given` are answers that exist already."""

    benchmark: Benchmark
    words: JudgeWords | None
    given: Sequence[Answer] | None


def check(config: MixEvalConfig) -> Checked:
    """Everything that can be wrong before a request is sent. Raises UserError; spends nothing, writes nothing."""
    check_folder(Path(config.out), SCORE)
    benchmark = mixeval.load(config.data, config.version, config.split, config.limit)
    words = mixeval.load_judge_words(config.data) if config.judge != "rule" else None
    given = read_responses(config.responses, benchmark) if config.responses is not None else None
    check_models(config.models, config.budget, config.seed)
    if config.model is not None and config.model.path is not None and config.system is not None:
        check_system_prompt(config.model.path, config.system)
    return Checked(benchmark, words, given)


def check_folder(out: Path, result: str) -> None:
    """See that `out` may be written to: new, empty, or the folder of such an evaluation (`result` is its file)."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out {out} is a file, not a folder; choose another --out")
    if out.is_dir() and not any((out / name).is_file() for name in (SETTINGS, result)):
        strange = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith((".lock", "ledger.sqlite")))
        if strange:
            raise UserError(f"{out} is no result folder and not empty (it holds {strange[0]}); choose another --out")


def same_settings(config: Evaluation, out: Path, ledger: Ledger, items: str = ITEMS) -> None:
    """The folder remembers its settings from before the first request. Raises UserError where these are others.

    A run that came to nothing, such as one with a wrong key, leaves them free. `items` is the file of a finished one.
    """
    file, settings = out / SETTINGS, public(config)
    begun = (out / items).is_file() or any(sum(tokens) for tokens in ledger.spent(payer(config)).values())
    if file.is_file() and begun:
        changed = changed_keys(_lasting(read_json(file)), _lasting(settings))
        if changed:
            raise UserError(
                f"{out} holds an evaluation with other settings (it differs in {', '.join(changed)}); choose another "
                f"--out, so that results are never mixed"
            )
    write_json(file, settings)


def payer(config: Evaluation) -> str:
    """On whose account requests go in the ledger."""
    return str(Path(config.out).resolve())


def public(config: Evaluation) -> dict[str, Any]:
    """The settings as they may be written down: without secrets."""
    settings = resolved(config)
    for role, model in config.models.items():
        settings[role] = public_model(model, settings[role])
    return settings


def _lasting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of the settings decides about the result."""
    kept = {key: value for key, value in settings.items() if key not in _PASSING}
    roles = [key for key, value in kept.items() if isinstance(value, Mapping) and "url" in value]
    for role in roles:
        drop = ROLE_PASSING | ({"url"} if kept[role].get("id") else set())
        kept[role] = {key: value for key, value in kept[role].items() if key not in drop}
    return kept
