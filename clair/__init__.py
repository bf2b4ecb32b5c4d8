"""Contrastive preference pairs from AI revisions (CLAIR, arXiv 2408.06266). Importing this never imports torch."""

from __future__ import annotations

import importlib

_HOMES = {
    "BuildConfig": "clair.config",
    "Contrast": "clair.contrast",
    "Dropped": "clair.records",
    "Pair": "clair.records",
    "Prompt": "clair.records",
    "UserError": "clair.recipe",
    "contrast_of": "clair.contrast",
    "load_pairs": "clair.dataset",
    "load_recipe": "clair.recipe",
    "parse_revision": "clair.parse",
    "revised": "clair.pipelines",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'clair' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
