"""Names are made of this field's words: a count over the code keeps a private dialect out of them."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

DIALECT = {  # each word, and what says the thing itself
    "found": "match, result, row", "told": "message, log", "tell": "log, message", "said": "text, output",
    "asked": "requests, prompts", "wanted": "expected, requested", "given": "values, arguments",
    "known": "options, ids", "seen": "requests, batches, count", "looked": "checked, count",
    "look": "measurement, check", "kept": "rows, accepted", "made": "created, result", "done": "completed, result",
    "taken": "used, claimed", "sound": "complete, valid", "lying": "files, shards", "hush": "unregister",
    "own": "local, custom", "mine": "local, actual", "one": "first, item", "other": "second, expected",
    "place": "index, path", "places": "indices, paths", "part": "segment, subset", "parts": "segments, subsets",
    "way": "backend, method", "ways": "backends, methods", "rest": "remaining", "whole": "full, total",
    "most": "max, limit", "words": "text, message", "where": "location, condition", "what": "name",
    "here": "local", "there": "remote", "before": "initial, previous", "after": "final, next",
    "ends": "stops, ids", "ended": "finished, result", "at": "index, offset", "fresh": "new",
}  # fmt: skip

JOINING = {
    "at", "one", "other", "what", "where", "here", "there", "before", "after", "most", "own", "whole", "rest", "words",
    "part", "parts",
}  # fmt: skip
"""Dialect as a whole name only: within a longer one they join or count, as in `retry_after` and `count_words`."""

LIMITS = {"clair": 1.0, "apo": 1.0, "recipes": 1.0, "tests": 1.0}
"""The share of names with such a word that each folder stays below, in percent: a word that is exact may stay."""


@cache
def parse(file: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(file.read_text("utf-8"))


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that the code chooses, with its line: of variables, attributes, arguments, functions and classes.

    Names of tests are sentences, and are left out.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[:5] != "test_":
            yield node.name, node.lineno


def dialect_word(name: str) -> str | None:
    """The first word of a name that is dialect. Words stand between underscores or begin with a capital letter."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_").split("_")
    return next((word for word in words if word in DIALECT and (len(words) == 1 or word not in JOINING)), None)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("found", "found"), ("_told_once", "told"), ("FoundRow", "found"), ("WAYS", "ways"), ("most", "most"),
        ("max_tokens", None), ("retry_after", None), ("partition", None), ("tests", None),
    ],
)  # fmt: skip
def test_a_word_is_recognised_alone_and_within_a_name(name, word):
    assert dialect_word(name) == word


def test_names_of_every_kind_are_counted():
    code = """
class Ham(Egg):
    def method(self, first, *others, last=0, **options):
        self.attribute = variable = [item for item in first]
        for target, (left, right) in others:
            with open(target) as file:
                lambda argument: (walrus := target)
        return variable

def test_of_something(): ...
"""
    assert sorted(name for name, _ in names(ast.parse(code))) == [
        "Ham", "argument", "attribute", "file", "first", "item", "last", "left", "method", "options", "others", "right",
        "self", "target", "variable", "walrus",
    ]  # fmt: skip


@pytest.mark.parametrize("folder", LIMITS)
def test_names_are_made_of_this_fields_words(folder):
    total, matches = 0, []
    for file in sorted((ROOT / folder).rglob("*.py")):
        for name, line in names(parse(file)):
            total += 1
            if word := dialect_word(name):
                matches.append((f"{file.relative_to(ROOT)}", f"{line}: {name} (rather {DIALECT[word]})"))
    share = 100 * len(matches) / total
    report = [f"{folder}: {len(matches)} of {total} names, {share:.2f} %"]
    for path, count in Counter(path for path, _ in matches).most_common(10):
        report.append(f"{count:4} {path}:{next(text for name, text in matches if name == path)}")
    print("\n".join(report))
    assert share < LIMITS[folder], "\n".join(report)


def bound_types(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """The name of every class and every alias of a type (`Row = tuple[int, str]`), and if it is a class.

    A type variable belongs to the functions of its module, and is left out.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name, True
    for node in tree.body:
        if not isinstance(node, ast.Assign) or ast.unparse(node.value).startswith("TypeVar"):
            continue
        yield from (
            (ast.unparse(target), False) for target in node.targets if re.match(r"_?[A-Z]\w*[a-z]", ast.unparse(target))
        )


def test_no_class_has_the_name_of_another_class_or_type():
    bound: dict[str, list[tuple[str, bool]]] = {}
    for folder in ("clair", "apo", "recipes"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for name, is_class in bound_types(parse(file)):
                if is_class or folder != "recipes":  # a script's types are its own
                    bound.setdefault(name, []).append((str(file.relative_to(ROOT)), is_class))
    assert len(bound) > 300
    repeated = {name: bindings for name, bindings in bound.items() if len(bindings) > 1}
    assert {
        name: dict(bindings) for name, bindings in repeated.items() if any(is_class for _, is_class in bindings)
    } == {}


@pytest.mark.parametrize("second", ["class Row: ...", "Row = tuple[int, str]"])
def test_a_class_and_a_type_of_one_name_are_both_seen(second):
    types = [*bound_types(ast.parse("class Row: ...")), *bound_types(ast.parse(second))]
    assert [name for name, _ in types] == ["Row", "Row"]
    assert list(bound_types(ast.parse("Row = TypeVar('Row')\nROWS = 3\nrow = 2"))) == []
