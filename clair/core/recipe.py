"""Recipes: strict YAML with `--set` overrides, validated by a pydantic model.

A recipe is one frozen model per verb. An unknown key is refused with the most similar allowed key, and everything is
resolved before any work is done or money spent. `apo` uses this module too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from clair.core.errors import UserError, near_miss, one_line
from clair.core.urls import without_secrets


class Recipe(BaseModel):
    """Base class of recipes and of their sections: frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


R = TypeVar("R", bound=Recipe)


def check_used(recipe: R, condition: bool, setting: str, *keys: str) -> R:
    """The recipe. Raises ValueError if `condition` is false, so that `keys` are ignored, and one is not its default."""
    fields = type(recipe).model_fields
    ignored = [key for key in keys if not condition and getattr(recipe, key) != fields[key].default]
    if ignored:
        raise ValueError(f"{ignored[0]} is for {setting}, and would be ignored here; leave it out")
    return recipe


class _Loader(yaml.SafeLoader):
    """Loads YAML 1.2 values: `1e-6` is a number, `no` and `2024-06-01` are text. A repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        scalar_keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        names = [key.value for key in scalar_keys]
        for index, key in enumerate(scalar_keys):
            if key.value in names[:index]:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


_YAML_11_ONLY = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _YAML_11_ONLY]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def check_booleans(value: Any) -> Any:
    """`value`. Raises ValueError if it holds the text `yes`, `no`, `on` or `off`, each of which counts as true if it is
    used as a boolean."""
    for inner in value.values() if isinstance(value, Mapping) else ():
        check_booleans(inner)
    if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
        raise ValueError(f"{value!r} is text; allowed for a boolean: true, false")
    return value


TemplateVariable = Annotated[bool | int | float | str, BeforeValidator(check_booleans)]
"""The value of a variable of a chat template."""


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError if it is not YAML or if its aliases expand to too many values."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


_MAX_VALUES = 100_000


def _check_size(node: yaml.Node) -> None:
    """Raise yaml.MarkedYAMLError if a document has too many values: aliases of aliases grow exponentially."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MAX_VALUES  # counts if the node contains itself
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            items = node.value if isinstance(node, yaml.SequenceNode) else []
            sizes[id(node)] = 1 + sum(size(child) for child in (*items, *(child for pair in pairs for child in pair)))
        return sizes[id(node)]

    if size(node) > _MAX_VALUES:
        problem = f"it has more than {_MAX_VALUES:,} values, its aliases written out"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def load_recipe(model: type[R], path: str | Path, overrides: Iterable[str] = ()) -> R:
    """Read the YAML file at `path`, apply `key.sub=value` overrides, and validate it as `model`.

    Raises UserError for a missing file, broken YAML, an unknown key (with the most similar one), a wrong value, or an
    override that is not `key=value`.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"recipe {file} does not exist; give the path of a YAML file")
    try:
        values = parse_yaml(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"recipe {file} is not YAML: {_yaml_problem(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {file} holds {type(values).__name__}, not keys and values; see docs/recipes")
    try:
        json.dumps(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"recipe {file} holds a value that is no text, number, list or mapping: {error}") from error
    return resolve(model, apply_overrides(values, overrides), source=str(file))


def _yaml_problem(error: Exception) -> str:
    """The line number and the problem, without the text of the line, which may hold a password."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return one_line(error)


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=value` applied. The value is parsed as YAML."""
    result: dict[str, Any] = json.loads(json.dumps(values))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set takes key=value, got {override!r}; for example --set beta=0.05")
        *parents, last = key.split(".")
        if not all((*parents, last)):
            raise UserError(f"--set {key}: a key between two dots is missing; for example --set trainer.seed=1")
        mapping = result
        for parent in parents:
            if not isinstance(mapping.get(parent), dict):
                mapping[parent] = {}
            mapping = mapping[parent]
        try:
            mapping[last] = parse_yaml(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {key}: the value is not YAML ({_yaml_problem(error)})") from error
    return result


def text_override(key: str, text: str | Path) -> str:
    """An override whose value is text, also if YAML would parse it as another type: `--out 7` is the folder 7."""
    return f"{key}={json.dumps(str(text), ensure_ascii=False)}"


def resolve(model: type[R], values: Mapping[str, Any], source: str = "recipe") -> R:
    """Validate `values` as `model`. Raises UserError, in one line, for the first problem."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(f"{source}: {_first_problem(model, error)}") from error


def config_from(
    model: type[R], recipe: str | Path | Mapping[str, Any] | R, overrides: Mapping[str, Any] | None = None, **keys: Any
) -> R:
    """The checked config of a recipe in any of its forms: a YAML file, a mapping of its keys, or a config.

    `overrides` are values by dotted key; `keys` are further top-level values, ignored if None. Paths become text.
    Raises UserError as `load_recipe` does, and for a value that a recipe cannot hold.
    """
    changes = dict(overrides or {}) | {key: value for key, value in keys.items() if value is not None}
    assignments = [f"{key}={_json(value, key)}" for key, value in changes.items()]
    if isinstance(recipe, str | Path):
        return load_recipe(model, recipe, assignments)
    values = resolved(recipe) if isinstance(recipe, BaseModel) else json.loads(_json(dict(recipe), "recipe"))
    return resolve(model, apply_overrides(values, assignments))


def _json(value: Any, name: str) -> str:
    """`value` as JSON, paths as text. Raises UserError for a value that a recipe cannot hold."""
    try:
        return json.dumps(value, ensure_ascii=False, default=os.fspath)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} holds a value that is no text, number, list or mapping: {error}") from error


# The steps of a pydantic location that name the member of a union: a class of ours, or a type.
_UNION_ARM = re.compile(
    r"[A-Z]\w*|str|bool|int|float|(?:dict|list|tuple|constrained-\w+|lax-or-strict|function-\w+)\[.*\]"
)


def _first_problem(model: type[BaseModel], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # An unknown key explains a missing one ("promts" for "prompts"), so it comes first.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), _deepest_arm(problems))
    key = ".".join(str(step) for step in problem["loc"] if not _UNION_ARM.fullmatch(str(step)))
    if problem["type"] == "extra_forbidden":
        allowed = sorted(_allowed_keys(model, problem["loc"][:-1]))
        return f"unknown key {key!r}{near_miss(str(problem['loc'][-1]), allowed)}; allowed: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    found_text = f", found {without_secrets(value)!r}" if isinstance(value, str | int | float | bool) else ""
    return f"{key}: {message}{found_text}" if key else message


def _deepest_arm(problems: Sequence[Any]) -> Any:
    """The first problem, or that of the union member which matched most: `{requests: -1}` is a mapping, not a bool."""
    *prefix, last = problems[0]["loc"] or ("",)
    if not _UNION_ARM.fullmatch(str(last)):
        return problems[0]
    return max((p for p in problems if list(p["loc"][: len(prefix)]) == prefix), key=lambda p: len(p["loc"]))


def _allowed_keys(model: type[BaseModel], location: tuple[Any, ...]) -> set[str]:
    """The keys allowed at a location of the recipe. Union members and list indices in `location` are skipped."""
    fields: set[str] = set(model.model_fields)
    current: list[type[BaseModel]] = [model]
    for step in location:
        inner = [m for c in current for m in _models_in(getattr(c.model_fields.get(str(step)), "annotation", None))]
        if inner:
            current, fields = inner, {name for m in inner for name in m.model_fields}
    return fields


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for argument in getattr(annotation, "__args__", ()) for m in _models_in(argument)]


def resolved(recipe: BaseModel, *, public: bool = False) -> dict[str, Any]:
    """The recipe as JSON values with all defaults. With `public`, as outputs contain it: URLs without their queries."""
    return recipe.model_dump(mode="json", context={"public": public})


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys whose values differ between two resolved recipes, sorted."""
    keys: list[str] = []
    for key in sorted(set(old) | set(new)):
        old_value, new_value = old.get(key), new.get(key)
        if isinstance(old_value, Mapping) and isinstance(new_value, Mapping):
            keys += changed_keys(old_value, new_value, f"{prefix}{key}.")
        elif old_value != new_value:
            keys.append(prefix + key)
    return keys
