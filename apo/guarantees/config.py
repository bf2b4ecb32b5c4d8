"""The recipes of `apo calibrate` and `apo certify`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from apo.guarantees.calibrate import Guarantee, Kind
from clair.core.recipe import Recipe, check_used
from clair.data.records import SCORES
from clair.storage.location import LocalPath


class GuaranteeConfig(Recipe):
    """Scored pairs, the risk to guarantee, and the ids that the scorer was trained on."""

    dataset: str
    alpha: float = Field(default=0.1, gt=0, lt=1)
    trained_on: list[str] = Field(default_factory=list)
    decisions: LocalPath | None = None


class CalibrateConfig(GuaranteeConfig):
    """A filter on the score gap, calibrated by an audit."""

    audit: Path
    guarantee: Guarantee = "joint"
    delta: float = Field(default=0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _check_used(self) -> CalibrateConfig:
        return check_used(self, self.guarantee == "precision", "guarantee: precision", "delta")


class CertifyConfig(GuaranteeConfig):
    """A property that score columns should have."""

    property: Kind = "rises"
    of: str = SCORES[0]
    than: str = SCORES[1]
    bound: float = 0.0

    @model_validator(mode="after")
    def _check_used(self) -> CertifyConfig:
        compares = self.property in ("rises", "same")
        check_used(self, compares, "property: rises and same", "than", "decisions")
        return check_used(self, not compares, "property: floor and ceiling", "bound")
