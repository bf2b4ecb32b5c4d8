"""Tool calls in the text that a reviser revises: a line of JSON each, parsed and validated by the tool's schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from clair.core.errors import UserError, one_line
from clair.data.records import Revision, Tools
from clair.prompting.parse import ParseFailure

HEADING = "Tool calls:"


def with_calls(text: str, calls: Sequence[Mapping[str, Any]]) -> str:
    """The text of an answer, and under a heading its calls: `{"name": ..., "arguments": {...}}` on a line each."""
    if not calls:
        return text
    lines = [
        json.dumps({"name": _function(call).get("name"), "arguments": _arguments(call)}, ensure_ascii=False)
        for call in calls
    ]
    return "\n".join([*([text.rstrip(), ""] if text.strip() else []), HEADING, *lines])


def read_calls(revision: Revision, calls: Sequence[Mapping[str, Any]], tools: Tools) -> Revision:
    """Split a revised text into text and calls. Raises ParseFailure.

    The calls must be those of the answer in number, order and name; their arguments must fit the tool's schema.
    """
    text, heading, listed = revision.answer.rpartition(HEADING)
    lines = [line for line in listed.splitlines() if line.strip() and not line.lstrip().startswith("```")]
    if not heading or len(lines) != len(calls) or (text and not text.endswith("\n")):
        raise ParseFailure("calls_changed", detail=f"expected {len(calls)} under {HEADING!r}")
    revised = [_revised_call(line, call, tools) for line, call in zip(lines, calls, strict=True)]
    return Revision(revision.reasoning, text.rstrip(), tuple(revised))


def _revised_call(line: str, call: Mapping[str, Any], tools: Tools) -> Mapping[str, Any]:
    name = _function(call).get("name")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ParseFailure("calls_changed", detail=f"{one_line(line, 80)} is not JSON ({error})") from error
    arguments = value.get("arguments") if isinstance(value, dict) and value.get("name") == name else None
    if not isinstance(arguments, dict):
        raise ParseFailure("calls_changed", detail=f'expected {{"name": {json.dumps(name)}, "arguments": {{...}}}}')
    if problem := schema_problem(name, arguments, tools):
        raise ParseFailure("arguments_invalid", detail=problem)
    if arguments == _arguments(call):
        return call
    as_text = isinstance(_function(call).get("arguments"), str)
    written = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
    return {**call, "function": {**_function(call), "arguments": written}}


def schema_problem(name: str | None, arguments: Mapping[str, Any], tools: Tools) -> str | None:
    """What is wrong with the arguments by the schema of the tool, or None."""
    from jsonschema import validators

    functions = {tool.get("name"): tool for tool in map(_function, tools)}
    if name not in functions:
        return f"there is no tool {name!r}; the tools are {', '.join(map(repr, functions))}"
    schema = functions[name].get("parameters") or {}
    error = next(iter(validators.validator_for(schema)(schema).iter_errors(arguments)), None)
    return error and one_line(f"{'.'.join(map(str, error.absolute_path)) or name}: {error.message}", 200)


def check_tools(tools: Tools, location: str) -> None:
    """Check that the schema of every tool is a JSON schema. Raises UserError that names the `location`."""
    from jsonschema import SchemaError, validators

    for tool in map(_function, tools):
        schema = tool.get("parameters") or {}
        try:
            validators.validator_for(schema).check_schema(schema)
        except SchemaError as error:
            raise UserError(
                f"{location}: the parameters of tool {tool.get('name')!r} are no JSON schema: {one_line(error.message)}"
            ) from error


def _function(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of a call or of a tool in OpenAI's format, or the value itself."""
    function = value.get("function")
    return function if isinstance(function, Mapping) else value


def _arguments(call: Mapping[str, Any]) -> Any:
    """The arguments of a call as a value; text that is no JSON stays text."""
    arguments = _function(call).get("arguments")
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
