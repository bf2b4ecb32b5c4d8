"""The data recipe: its keys, their validation, and which of them determine the dataset's content."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from clair.core.recipe import Recipe, changed_keys, check_used, resolved
from clair.data.prompt_sources import PromptSource
from clair.inference.budget import BudgetConfig
from clair.inference.config import (
    JudgeConfig,
    ModelConfig,
    ReviserConfig,
    RewardConfig,
    ScoreJudgeConfig,
    content_settings,
    redacted_model,
)
from clair.pipeline.filters import make_filters
from clair.storage.location import Location

_ROLES = ("target", "reviser", "judge", "weaker", "stronger")
_PIPELINES = {
    "revised": ("target", "reviser"),
    "judged": ("target", "judge", "samples", "candidates", "scores"),
    "stronger": ("target", "stronger"),
    "delta": ("weaker", "stronger"),
}
"""The roles and keys that only some pipelines use; first the role whose answers are rejected or compared."""


class BalanceConfig(Recipe):
    """`balance:` of a data recipe: leave out pairs until winners are not longer than losers on average."""

    tokens: int = Field(ge=0)
    """The largest difference between the answers of a pair, in tokens."""
    tokenizer: str | None = None
    """The folder or hub name of the tokenizer that counts. Absent: that of the first model with a `path`."""


class CheckerConfig(Recipe):
    """`scores.checker:` a command that scores answers."""

    command: tuple[str, ...] = Field(min_length=1)
    """The program and its arguments."""
    seconds: float = Field(default=30.0, gt=0)
    """The time for one prompt, including the start of the process."""
    megabytes: int = Field(default=4096, ge=1)
    """The limit on the address space of a process, in 10^6 bytes."""
    processes: int = Field(default=4, ge=1)
    """The maximum number of processes."""


class MarginConfig(Recipe):
    """`scores.margin:` the difference between the scores of winner and loser."""

    least: float = Field(default=0.0, ge=0)
    most: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Absent: no limit."""

    @model_validator(mode="after")
    def _check_order(self) -> MarginConfig:
        if self.most is not None and self.most < self.least:
            raise ValueError(f"no margin lies between least: {self.least:g} and most: {self.most:g}; raise most")
        return self


DEFAULT_RUBRIC = (
    "Correctness counts first: a wrong result, a false statement, or a task that is not done is a serious fault. Next "
    "comes what the task asks for and the solution leaves out, then clarity. Length counts neither for nor against it."
)


class ScoresConfig(Recipe):
    """`scores:` of a data recipe: the source of the scores, and the choice of a pair by them."""

    checker: CheckerConfig | None = None
    reward: RewardConfig | None = None
    judges: tuple[ScoreJudgeConfig, ...] = ()
    """Models that score each answer by itself. The score of an answer is their mean."""
    rubric: str = DEFAULT_RUBRIC
    scale: tuple[int, int] = (1, 10)
    """The lowest and the highest score of a judge."""
    floor: float | None = None
    """The lowest score of a winner. Absent: no limit."""
    margin: MarginConfig | None = None
    """Absent: the best answer is paired with the worst."""
    flat: float = Field(default=0.0, ge=0)
    """A prompt is flat if the standard deviation of its scores is at most this."""
    leave_out_flat: bool = False

    @property
    def has_source(self) -> bool:
        """True if the recipe names a source of scores; otherwise the rows have them."""
        return bool(self.checker or self.reward or self.judges)

    @model_validator(mode="after")
    def _check(self) -> ScoresConfig:
        sources = [name for name in ("checker", "reward", "judges") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(f"{sources[0]} and {sources[1]} both give scores; keep one of them")
        for n, judge in enumerate(self.judges, 1):
            if judge in self.judges[: n - 1]:
                raise ValueError(
                    f"judge {n} is the same as an earlier one, so that one reply would count twice; remove it"
                )
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale goes from the lowest to the highest score, such as [1, 10]; found {self.scale}")
        return check_used(self, bool(self.judges), "judges", "rubric", "scale")


class BuildConfig(Recipe):
    """A data recipe. Every key, with its default, is in docs/data.md."""

    pipeline: Literal["revised", "judged", "stronger", "delta"]
    prompts: PromptSource
    target: ModelConfig | None = None
    reviser: ReviserConfig | None = None
    judge: JudgeConfig | None = None
    weaker: ModelConfig | None = None
    """`delta`: the model whose answers are rejected."""
    stronger: ModelConfig | None = None
    samples: int = Field(default=2, ge=1)
    """`judged`: how many answers the target, and each of `candidates`, gives to each prompt."""
    candidates: tuple[ModelConfig, ...] = ()
    """`judged`: further models whose answers compete with the target's."""
    scores: ScoresConfig | None = None
    """`judged`: choose pairs by scores. Absent: by the scores of the row, or by the judge."""
    filters: Mapping[str, bool | Mapping[str, Any]] = {}
    balance: BalanceConfig | None = None
    budget: BudgetConfig | None = None
    """The spending limit, including resumed runs and retries: {money: 20} or {tokens: 5000000}."""
    accept: int | None = Field(default=None, ge=1)
    """Stop at exactly this many pairs: the first in the order of the prompts."""
    concurrency: int = Field(default=64, ge=1)
    attempts: int = Field(default=6, ge=1)
    """Attempts for a request that gets no answer (server errors, timeouts, broken connections)."""
    seed: int = 0
    limit: int | None = Field(default=None, ge=1)
    test_fraction: float = Field(default=0.05, ge=0, lt=1)
    ledger: Location | None = None
    out: Location

    @model_validator(mode="after")
    def _keys_fit(self) -> BuildConfig:
        make_filters(self.filters)
        name, used = self.pipeline, _PIPELINES[self.pipeline]
        for key in (*_ROLES, "samples", "candidates", "scores"):
            if key not in used and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is not used by the pipeline {name!r}; remove it")
        template_options = [model.chat_template_kwargs for model in (self.weaker, self.stronger) if model]
        mistakes = {
            "ledger is a file of this machine, and cannot go with URLs; remove it: out has its own": (
                self.ledger and (self.ledger.is_url or self.out.is_url)
            ),
            f"filter gap needs scores, and the pipeline {name!r} has none; remove it": (
                self.filters.get("gap") and name != "judged"
            ),
            "the pipeline 'revised' needs reviser": name == "revised" and self.reviser is None,
            f"the pipeline {name!r} needs stronger, a model; or its answers: prompts.columns.stronger": (
                "stronger" in used and self.stronger is None and "stronger" not in self.prompts.columns
            ),
            "weaker and stronger differ in chat_template_kwargs, and a pair has one mode; make them equal": (
                name == "delta" and any(options != template_options[0] for options in template_options)
            ),
            "candidates compete with the target's answers, and there is no target; add it": (
                self.candidates and self.target is None
            ),
            "samples: 1 of one model leaves nothing to compare; give more samples, or candidates": (
                name == "judged" and self.target and self.samples * len(self.answerers) < 2
            ),
            "judge compares two answers, and scores decides without it; remove one of them": self.judge and self.scores,
            "balance leaves pairs out when all are made, so accept cannot count them; remove accept, and use limit": (
                self.balance and self.accept
            ),
            "balance counts tokens and no model is named by path; give balance.tokenizer, the folder of the model that "
            "you will train": self.balance and self.tokenizer is None,
        }
        for message, is_mistake in mistakes.items():
            if is_mistake:
                raise ValueError(message)
        return self

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models by role. Those of lists are numbered; a single judge that gives scores is `judge`."""
        models = {role: getattr(self, role) for role in _ROLES if getattr(self, role) is not None}
        return models | {f"candidate_{n}": model for n, model in enumerate(self.candidates, 1)} | self.score_judges

    @property
    def score_judges(self) -> dict[str, ScoreJudgeConfig]:
        """The judges that give scores, by role."""
        judges = self.scores.judges if self.scores else ()
        return {f"judge_{n}" if len(judges) > 1 else "judge": judge for n, judge in enumerate(judges, 1)}

    def with_models(self, change: Callable[[ModelConfig], ModelConfig]) -> BuildConfig:
        """The recipe with every model changed."""
        changes: dict[str, Any] = {role: change(model) for role in _ROLES if (model := getattr(self, role))}
        changes["candidates"] = tuple(map(change, self.candidates))
        if self.scores:
            changes["scores"] = self.scores.model_copy(update={"judges": tuple(map(change, self.scores.judges))})
        return self.model_copy(update=changes)

    @property
    def answerer(self) -> str:
        """The role whose answers are rejected or compared."""
        return _PIPELINES[self.pipeline][0]

    @property
    def answerers(self) -> list[str]:
        """All roles whose answers are rejected or compared."""
        return [self.answerer, *(f"candidate_{n}" for n, _ in enumerate(self.candidates, 1))]

    @property
    def template_options(self) -> Mapping[str, Any] | None:
        """The chat template variables that each pair stores: those of the answering model."""
        model = getattr(self, self.answerer) or (self.stronger if self.pipeline == "delta" else None)
        return model and model.chat_template_kwargs

    @property
    def tokenizer(self) -> str | None:
        """The folder or hub name of the tokenizer that counts for `balance`, if there is one."""
        paths = (model.path for model in self.models.values() if model.path)
        return self.balance and (self.balance.tokenizer or next(paths, None))

    @property
    def ledger_path(self) -> Path:
        """The ledger: the recipe's, or the output folder's own."""
        return Path(self.ledger) if self.ledger else self.out.folder / "ledger.sqlite"


def redacted(config: BuildConfig) -> dict[str, Any]:
    """The resolved recipe without secrets, as outputs record it."""
    recipe = resolved(config, public=True)
    for role in _ROLES:
        if model := getattr(config, role):
            recipe[role] = redacted_model(model, recipe[role])
    for models, settings in (
        (config.candidates, recipe["candidates"]),
        *([(config.scores.judges, recipe["scores"]["judges"])] if config.scores else []),
    ):
        settings[:] = map(redacted_model, models, settings)
    return recipe


HASHES = ("template_sha256", "not_in_sha256", "scorer_sha256")
"""Keys that only recorded recipes have: hashes of the files that the recipe names by path."""

MAY_CHANGE = {"concurrency", "attempts", "out", "ledger", "limit", "accept", "budget"}
"""Keys that do not affect the dataset's content."""


def changed_content_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted keys in which two recorded recipes differ and that determine the dataset's content.

    A hash that only one of them has is not a difference: an older version did not record it.
    """
    keys = changed_keys(content_settings(old, MAY_CHANGE), content_settings(new, MAY_CHANGE))
    return [key for key in keys if not key.endswith(HASHES) or all(_nested_value(recipe, key) for recipe in (old, new))]


def without_file_hashes(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded recipe without the hashes of files, which can be resolved again."""
    return {
        name: {key: inner for key, inner in value.items() if key not in HASHES} if isinstance(value, Mapping) else value
        for name, value in recipe.items()
    }


def _nested_value(recipe: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return (recipe.get(section) or {}).get(name)
