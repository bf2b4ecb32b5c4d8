"""Contrastive preference pairs from AI revisions (CLAIR, arXiv 2408.06266). Importing this never imports torch."""

from __future__ import annotations

import importlib

_HOMES = {
    "BuildConfig": "clair.pipeline.config",
    "Contrast": "clair.data.contrast",
    "Dropped": "clair.data.records",
    "Pair": "clair.data.records",
    "Prompt": "clair.data.records",
    "UserError": "clair.core.recipe",
    "contrast_of": "clair.data.contrast",
    "load_pairs": "clair.data.dataset",
    "load_recipe": "clair.core.recipe",
    "parse_revision": "clair.prompting.parse",
    "revised": "clair.pipeline.pipelines",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'clair' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
