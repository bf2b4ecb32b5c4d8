"""The recipes of `apo reward`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from apo.analysis.config import Datasets
from apo.analysis.features import Pooling
from apo.cli_recipe import OutFile, OutFolder
from clair.core.recipe import Recipe, check_used
from clair.storage.location import LocalPath

RewardKind = Literal["bradley_terry", "pal", "vpl"]
Distance = Literal["squared", "norm"]
Loss = Literal["logistic", "hinge"]


class FeatureConfig(Recipe):
    """Comparisons, and where their features come from: a frozen model, or a file."""

    dataset: Datasets
    model: str | None = None
    features: Path | None = None
    pooling: Pooling = "last"

    @model_validator(mode="after")
    def _check_features(self) -> FeatureConfig:
        if (self.model is None) == (self.features is None):
            raise ValueError("give either model (the frozen model that computes features) or features (a file of them)")
        return check_used(self, self.model is not None, "features of a model", "pooling")


class SelectConfig(FeatureConfig):
    """Comparisons of users, and the numbers of tastes to try."""

    max_tastes: int = Field(default=4, ge=1)
    by_prompt: bool = False
    seed: int = 0
    out: OutFile | None = None


class FitConfig(FeatureConfig):
    """Comparisons, and the reward to fit on them."""

    kind: RewardKind = "bradley_terry"
    prototypes: int = Field(default=2, ge=1)
    by_prompt: bool = False
    distance: Distance = "squared"
    loss: Loss = "logistic"
    beta: float = Field(default=1e-3, ge=0)
    bounded: bool = False
    seed: int = 0
    out: OutFolder

    @model_validator(mode="after")
    def _check_used(self) -> FitConfig:
        check_used(self, self.kind == "pal", "kind: pal", "prototypes", "by_prompt", "distance", "loss")
        check_used(self, not self.by_prompt, "by_prompt: false", "distance")
        return check_used(self, self.kind == "vpl", "kind: vpl", "beta", "bounded")

    def fit_options(self) -> dict[str, Any]:
        """Return the options of a fit (`model_selection.fit_best`) besides its kind."""
        return self.model_dump(include={"prototypes", "by_prompt", "distance", "loss", "beta", "bounded", "seed"})


class CurveConfig(FitConfig):
    """Comparisons of many users, and how many comparisons locate a user whom the fit has not seen."""

    kind: RewardKind = "pal"
    shots: list[int] = Field(default=[1, 2, 5, 10, 20, 50, 100], min_length=1)
    splits: int = Field(default=20, ge=1)
    unseen: float = Field(default=0.2, gt=0, lt=1)

    @model_validator(mode="after")
    def _check_curve(self) -> CurveConfig:
        if self.kind == "bradley_terry":
            raise ValueError("bradley_terry has one reward for all users and learns nothing of one; give pal or vpl")
        if min(self.shots) < 1 or sorted(set(self.shots)) != self.shots:
            raise ValueError("shots are numbers of comparisons, 1 or more, each larger than the one before")
        return self


class ScoreConfig(Recipe):
    """Pairs, the reward that scores them, and the rows to write."""

    dataset: Datasets
    reward: Path
    features: Path | None = None
    user: str | None = None
    padding: str | None = None
    by_group: bool = False
    min_preference: float = Field(default=0.5, ge=0.5, le=1)
    decisions: OutFile | None = None
    min_worst: float = Field(default=0.5, ge=0, le=1)
    out: LocalPath

    @model_validator(mode="after")
    def _check_used(self) -> ScoreConfig:
        if self.decisions and (len(self.dataset) != 1 or self.by_group):
            raise ValueError("decisions are about one unchanged dataset folder; name one, without by_group")
        if self.features is not None and self.padding is not None:
            raise ValueError("padding makes new answers, of which a file has no features; leave one of the two out")
        check_used(self, self.by_group, "by_group: true", "min_preference")
        check_used(self, not self.by_group, "by_group: false", "user", "padding")
        return check_used(self, self.decisions is not None, "decisions", "min_worst")


class AdaptConfig(Recipe):
    """A new user of a reward, and their comparisons, or a pool of pairs to ask them about."""

    reward: Path
    user: str
    features: Path | None = None
    comparisons: Datasets | None = None
    pool: Datasets | None = None
    questions: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _check_used(self) -> AdaptConfig:
        if (self.comparisons is None) == (self.pool is None):
            raise ValueError("give either comparisons (what the user preferred) or pool (pairs to ask about)")
        return check_used(self, self.pool is not None, "pool", "questions")
