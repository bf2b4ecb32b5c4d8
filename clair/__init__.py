"""Contrastive preference pairs from AI revisions (CLAIR, arXiv 2408.06266): `build`, `estimate` and `report`.

Importing this never imports torch; each name loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clair.api import build, estimate, report
    from clair.core.errors import UserError
    from clair.core.recipe import load_recipe
    from clair.data.contrast import Contrast, contrast_of
    from clair.data.dataset import load_pairs
    from clair.data.records import Dropped, Pair, Prompt
    from clair.pipeline.build import BuildResult
    from clair.pipeline.config import BuildConfig
    from clair.pipeline.pipelines import revised
    from clair.prompting.parse import parse_revision

__all__ = [
    "BuildConfig",
    "BuildResult",
    "Contrast",
    "Dropped",
    "Pair",
    "Prompt",
    "UserError",
    "build",
    "contrast_of",
    "estimate",
    "load_pairs",
    "load_recipe",
    "parse_revision",
    "report",
    "revised",
]

_HOME = {
    **dict.fromkeys(("build", "estimate", "report"), "api"),
    "BuildConfig": "pipeline.config",
    "BuildResult": "pipeline.build",
    "Contrast": "data.contrast",
    "Dropped": "data.records",
    "Pair": "data.records",
    "Prompt": "data.records",
    "UserError": "core.errors",
    "contrast_of": "data.contrast",
    "load_pairs": "data.dataset",
    "load_recipe": "core.recipe",
    "parse_revision": "prompting.parse",
    "revised": "pipeline.pipelines",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clair' has no attribute {name!r}")
    return getattr(importlib.import_module(f"clair.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
