"""The recipes of `apo calibrate` and `apo certify`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from apo.cli_recipe import OutFile
from apo.guarantees.calibrate import Guarantee
from apo.guarantees.properties import PropertyKind
from clair.core.recipe import Recipe, check_used
from clair.data.records import SCORES


class GuaranteeConfig(Recipe):
    """Scored pairs, the risk to guarantee, and the ids that the scorer was trained on."""

    dataset: str
    alpha: float = Field(default=0.1, gt=0, lt=1)
    trained_on: list[str] = Field(default_factory=list)
    decisions: OutFile | None = None


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

    property: PropertyKind = "rises"
    of: str = SCORES[0]
    than: str = SCORES[1]
    ladder: tuple[str, ...] = ()
    bound: float = 0.0
    distance: str | None = None

    @model_validator(mode="after")
    def _check_used(self) -> CertifyConfig:
        kind, bounded = self.property, self.property in ("floor", "ceiling", "lipschitz")
        check_used(self, kind in ("rises", "same"), "property: rises and same", "decisions")
        check_used(self, kind in ("rises", "same", "lipschitz"), "property: rises, same and lipschitz", "than")
        check_used(self, not bounded, "property: rises, same and concave", "ladder")
        check_used(self, bounded, "property: floor, ceiling and lipschitz", "bound")
        check_used(self, kind == "lipschitz", "property: lipschitz", "distance")
        check_used(self, not self.ladder, "a property without a ladder", "of", "than")
        fewest = 3 if kind == "concave" else 2
        if (self.ladder or kind == "concave") and len(self.ladder) < fewest:
            raise ValueError(f"property: {kind} needs a ladder of at least {fewest} columns, not {len(self.ladder)}")
        if kind == "lipschitz" and not (self.distance and self.bound > 0):
            raise ValueError("property: lipschitz needs distance, such as contrast.levenshtein, and a bound above 0")
        return self
