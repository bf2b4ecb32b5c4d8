"""Arguments that the commands with a recipe share, and the checked recipe from them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml
from pydantic import AfterValidator

from clair.core.errors import UserError, near_miss
from clair.core.recipe import Recipe, apply_overrides, load_recipe, text_override
from clair.core.urls import public_url
from clair.storage.location import LocalPath, local

RecipeFile = Annotated[Path | None, typer.Argument(help="The recipe, a YAML file.")]
Out = Annotated[Path | None, typer.Option("--out", callback=local, help="The result folder, instead of the recipe's.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value put into the recipe; repeatable.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check all and print the settings; write nothing.")]
EXTRA_ARGUMENTS = {"ignore_unknown_options": True, "allow_extra_args": True}
"""Context settings of a command that calls `read_recipe`: it names the recipe keys of options that became keys."""

_OPTION = re.compile("--?[A-Za-z]")
_ROLE_KEYS = {"base_url": "url", "name": "model", "key_env": "api_key_env"}
_PATH_KEYS = ("model", "base", "tuned", "prompts")
_KEYS = {
    "budget": "budget.money",
    "budget_tokens": "budget.tokens",
    "patience": "judge.patience",
    **{name: f"model.{name}" for name in ("temperature", "max_tokens", "batch_tokens")},
    "most": "max_tastes",
    "pad": "padding",
    "sure": "min_preference",
    "least": "min_worst",
}
"""The keys of former options with other names. A name that is a key itself comes first."""


def _check_file(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file; give the name of a file to write")
    return path


def _check_folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, not a folder; choose another --out")
    return path


OutFile = Annotated[LocalPath, AfterValidator(_check_file)]
"""The type of a recipe's key that names a file to write, checked before any work."""
OutFolder = Annotated[LocalPath, AfterValidator(_check_folder)]
"""The type of a recipe's key that names a folder to write into, checked before any work."""

Config = TypeVar("Config", bound=Recipe)


def read_recipe(
    context: typer.Context,
    kind: type[Config],
    recipe: Path | None,
    overrides: Sequence[str] | None,
    out: Path | None = None,
    **values: Path | str | None,
) -> Config:
    """The checked recipe with `--set`, `--out` and further `values` by dotted key put into it.

    Raises UserError for a missing recipe, and for options that are keys of the recipe, with the recipe to write.
    """
    arguments = [*([str(recipe)] if recipe else []), *context.args]
    if any(map(_OPTION.match, arguments)):
        raise UserError(_options_message(context.command_path, kind, arguments))
    if recipe is None or context.args or recipe.suffix not in (".yaml", ".yml"):
        problem = f"found {' '.join(arguments)}" if arguments else "none is named"
        raise UserError(f"{context.command_path} takes one recipe, a YAML file, and {problem}; see docs/recipes.md")
    texts = {"out": out, **values}
    assignments = [text_override(key, text) for key, text in texts.items() if text is not None]
    return load_recipe(kind, recipe, [*(overrides or []), *assignments])


def _options_message(command: str, kind: type[Recipe], arguments: Sequence[str]) -> str:
    """Options that are keys of the recipe, as the recipe to write; or an unknown option."""
    first_option = next(index for index, argument in enumerate(arguments) if _OPTION.match(argument))
    values: dict[str, list[str]] = {}
    if first_option and not arguments[0].endswith((".yaml", ".yml")):
        values["reward" if "pool" in kind.model_fields else "dataset"] = list(arguments[:first_option])
    for index, argument in enumerate(arguments):
        if not _OPTION.match(argument):
            continue
        option, equals, text = argument.partition("=")
        key = _recipe_key(option, kind)
        if key is None:
            return f"unknown option {option}{near_miss(option, ['--out', '--dry-run'])}; see {command} --help"
        following = arguments[index + 1] if index + 1 < len(arguments) else "--none"
        value = text if equals else "true" if _OPTION.match(following) else following
        if (
            key in _PATH_KEYS
            and kind.model_fields[key].annotation is not str
            and (key == "prompts" or Path(value).is_dir())
        ):
            key += ".path"
        if value.startswith(("http://", "https://")):
            key, value = (key if key.endswith(".url") else f"{key}.url"), public_url(value)
        values.setdefault(key, []).append(json.dumps(value) if key.endswith((".path", ".url")) else value)
    texts = {key: texts[0] if len(texts) == 1 else json.dumps(texts) for key, texts in values.items()}
    recipe: Mapping[str, Any] = apply_overrides({}, [f"{key}={text}" for key, text in texts.items()])
    written = yaml.safe_dump(recipe, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True).strip()
    name = command.split()[-1]
    return f"the settings stand in a recipe: write {written} into {name}.yaml, then run {command} {name}.yaml"


def _recipe_key(option: str, kind: type[Recipe]) -> str | None:
    name = option.lstrip("-").replace("-", "_")
    role = next((role for role in ("judge", "model", "base", "tuned") if name.startswith(f"{role}_")), None)
    if role in kind.model_fields:
        suffix = name.removeprefix(f"{role}_")
        return f"{role}.{_ROLE_KEYS.get(suffix, suffix)}"
    key = name if name in kind.model_fields else _KEYS.get(name, "")
    return key if key.partition(".")[0] in kind.model_fields else None
