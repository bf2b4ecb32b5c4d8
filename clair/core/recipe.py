"""Recipes: YAML in, strict, with `--set` overrides.

A recipe is one frozen pydantic model per verb. Unknown keys are refused with the nearest allowed name, and
everything is resolved before any work is done or money spent. `apo` uses this module too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from clair.core.errors import UserError, near_miss, one_line


class Recipe(BaseModel):
    """Base of every recipe and of its parts: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


R = TypeVar("R", bound=Recipe)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 values: `1e-6` is a number, as everybody expects, and `2024-06-01` is text. A key twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        names = [key.value for key in written]
        for place, key in enumerate(written):
            if key.value in names[:place]:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


_YAML_11_ONLY = {"tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _YAML_11_ONLY]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError where it is none, or where its aliases make too much of it."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


_MOST_VALUES = 100_000


def _check_size(node: yaml.Node) -> None:
    """An alias repeats what it stands for, and aliases of aliases grow without end. Raises yaml.MarkedYAMLError."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_VALUES  # where it holds itself
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in pairs for part in pair]
            sizes[id(node)] = 1 + sum(size(part) for part in parts)
        return sizes[id(node)]

    if size(node) > _MOST_VALUES:
        told = f"it has more than {_MOST_VALUES:,} values, its aliases written out"
        raise yaml.MarkedYAMLError(problem=told, problem_mark=node.start_mark)


def load_recipe(model: type[R], path: str | Path, overrides: Iterable[str] = ()) -> R:
    """Read the YAML file at `path`, apply `key.sub=value` overrides, and check it against `model`.

    Raises UserError, in one line, for a missing file, broken YAML, an unknown key (with the near miss), a wrong
    value, or an override that is not `key=value`.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"recipe {file} does not exist; give the path of a YAML file")
    try:
        values = parse_yaml(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"recipe {file} is not YAML: {_yaml_words(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {file} holds {type(values).__name__}, not keys and values; see docs/recipes")
    try:
        json.dumps(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"recipe {file} holds a value that is no text, number, list or mapping: {error}") from error
    return resolve(model, apply_overrides(values, overrides), source=str(file))


def _yaml_words(error: Exception) -> str:
    """What is wrong and in which line, without the line itself, which may hold a password."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return one_line(error)


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=value` put in place; the value is read as YAML."""
    result: dict[str, Any] = json.loads(json.dumps(values))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set takes key=value, got {override!r}; for example --set beta=0.05")
        *parents, last = key.split(".")
        if not all((*parents, last)):
            raise UserError(f"--set {key}: a key between two dots is missing; for example --set trainer.seed=1")
        place = result
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        try:
            place[last] = parse_yaml(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {key}: the value is not YAML ({_yaml_words(error)})") from error
    return result


def text_override(key: str, text: str | Path) -> str:
    """An override that puts text into the recipe, whatever YAML would read in it: `--out 7` is the folder 7."""
    return f"{key}={json.dumps(str(text), ensure_ascii=False)}"


def resolve(model: type[R], values: Mapping[str, Any], source: str = "recipe") -> R:
    """`values` as a checked `model`; the first thing wrong becomes a one-line UserError."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(f"{source}: {_first_problem(model, error)}") from error


# What pydantic puts into a place to tell which arm of a union it tried: a class of ours, or a type.
_UNION_ARM = re.compile(r"[A-Z]\w*|str|bool|int|float|(?:dict|list|tuple|constrained-\w+|lax-or-strict)\[.*\]")


def _first_problem(model: type[BaseModel], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # An unknown key explains a missing one ("promts" for "prompts"), so it is told first.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), _deepest_arm(problems))
    where = ".".join(str(part) for part in problem["loc"] if not _UNION_ARM.fullmatch(str(part)))
    if problem["type"] == "extra_forbidden":
        allowed = sorted(_fields_at(model, problem["loc"][:-1]))
        return f"unknown key {where!r}{near_miss(str(problem['loc'][-1]), allowed)}; allowed: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"the key {where!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    found = problem["input"]
    told = f", found {found!r}" if isinstance(found, str | int | float | bool) else ""
    return f"{where}: {message}{told}" if where else message


def _deepest_arm(problems: Sequence[Any]) -> Any:
    """The first problem, or of a union the arm that came farthest: `{requests: -1}` is no bool, but meant a mapping."""
    *where, last = problems[0]["loc"] or ("",)
    if not _UNION_ARM.fullmatch(str(last)):
        return problems[0]
    return max((p for p in problems if list(p["loc"][: len(where)]) == where), key=lambda p: len(p["loc"]))


def _fields_at(model: type[BaseModel], place: tuple[Any, ...]) -> set[str]:
    """The keys allowed at a place of the recipe; union arms and list positions in `place` are stepped over."""
    fields: set[str] = set(model.model_fields)
    current: list[type[BaseModel]] = [model]
    for part in place:
        inner = [m for c in current for m in _models_in(getattr(c.model_fields.get(str(part)), "annotation", None))]
        if inner:
            current, fields = inner, {name for m in inner for name in m.model_fields}
    return fields


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for argument in getattr(annotation, "__args__", ()) for m in _models_in(argument)]


def resolved(recipe: BaseModel) -> dict[str, Any]:
    """The recipe as plain JSON values, defaults filled in: what `--dry-run` prints and every output keeps."""
    return recipe.model_dump(mode="json")


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys whose values differ between two resolved recipes, sorted."""
    keys: list[str] = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            keys += changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            keys.append(prefix + key)
    return keys
