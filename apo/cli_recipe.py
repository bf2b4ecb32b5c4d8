"""Arguments that the commands with a recipe share, and the checked recipe from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml

from clair.core.errors import UserError, near_miss
from clair.core.recipe import Recipe, apply_overrides, load_recipe, text_override
from clair.core.urls import public_url
from clair.storage.object_store import local

RecipeFile = Annotated[Path | None, typer.Argument(help="The recipe, a YAML file.")]
Out = Annotated[Path | None, typer.Option("--out", callback=local, help="The result folder, instead of the recipe's.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value put into the recipe; repeatable.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check all and print the settings; write nothing.")]
EXTRA_ARGUMENTS = {"ignore_unknown_options": True, "allow_extra_args": True}
"""Context settings of a command that calls `read_recipe`: it names the recipe keys of options that became keys."""

_ROLE_KEYS = {"base_url": "url", "name": "model", "key_env": "api_key_env"}
_KEYS = {
    "budget": "budget.money",
    "budget_tokens": "budget.tokens",
    "patience": "judge.patience",
    **{name: f"model.{name}" for name in ("temperature", "max_tokens", "batch_tokens")},
}

Config = TypeVar("Config", bound=Recipe)


def read_recipe(
    context: typer.Context,
    kind: type[Config],
    recipe: Path | None,
    overrides: Sequence[str] | None,
    out: Path | None,
    **values: Path | str | None,
) -> Config:
    """The checked recipe with `--set`, `--out` and further `values` by dotted key put into it.

    Raises UserError for a missing recipe, and for options that are keys of the recipe, with the recipe to write.
    """
    words = [*([str(recipe)] if recipe else []), *context.args]
    if any(word.startswith("-") for word in words):
        raise UserError(_options_message(context.command_path, kind, words))
    if recipe is None or context.args or recipe.suffix not in (".yaml", ".yml"):
        problem = f"found {' '.join(words)}" if words else "none is named"
        raise UserError(f"{context.command_path} takes one recipe, a YAML file, and {problem}; see docs/evaluation.md")
    texts = {"out": out, **values}
    assignments = [text_override(key, text) for key, text in texts.items() if text is not None]
    return load_recipe(kind, recipe, [*(overrides or []), *assignments])


def _options_message(command: str, kind: type[Recipe], words: Sequence[str]) -> str:
    """Options that are keys of the recipe, as the recipe to write; or an unknown option."""
    assignments = []
    for index, word in enumerate(words):
        if not word.startswith("--"):
            continue
        option, equals, text = word.partition("=")
        key = _recipe_key(option, kind)
        if key is None:
            return f"unknown option {option}{near_miss(option, ['--out', '--dry-run'])}; see {command} --help"
        following = words[index + 1] if index + 1 < len(words) and not words[index + 1].startswith("--") else "true"
        value = text if equals else following
        if key in ("model", "base", "tuned", "prompts") and (key == "prompts" or Path(value).is_dir()):
            key += ".path"
        if value.startswith(("http://", "https://")):
            key, value = (key if key.endswith(".url") else f"{key}.url"), public_url(value)
        assignments.append(f"{key}={json.dumps(value) if key.endswith(('.path', '.url')) else value}")
    values: Mapping[str, Any] = apply_overrides({}, assignments)
    text = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True).strip()
    name = command.split()[-1]
    return f"the settings stand in a recipe: write {text} into {name}.yaml, then run {command} {name}.yaml"


def _recipe_key(option: str, kind: type[Recipe]) -> str | None:
    name = option.removeprefix("--").replace("-", "_")
    role = next((role for role in ("judge", "model", "base", "tuned") if name.startswith(f"{role}_")), None)
    if role in kind.model_fields:
        rest = name.removeprefix(f"{role}_")
        return f"{role}.{_ROLE_KEYS.get(rest, rest)}"
    return _KEYS.get(name, name if name in kind.model_fields else None)
