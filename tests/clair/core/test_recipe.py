"""Recipes by hand: YAML values, --set, near misses, what changed, and files that are never half written."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from clair.core.errors import UserError, list_some, near_miss, one_line
from clair.core.files import canonical_json, content_hash, write_atomically, write_json
from clair.core.provenance import provenance
from clair.core.recipe import Recipe, apply_overrides, changed_keys, load_recipe, parse_yaml, resolve, resolved


class Inner(Recipe):
    rank: int = 16
    alpha: int = 32


class Outer(Recipe):
    name: str
    beta: float = 0.1
    inner: Inner | None = None
    several: list[Inner] = []


# ---- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E6", 1e6),
        ("1.0e-6", 1e-6),
        ("-2e+3", -2000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("0.1", 0.1),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("7", 7),
        ("-7", -7),
        ("2024-06-01", "2024-06-01"),
        ("2024-06-01 10:00:00", "2024-06-01 10:00:00"),
        ("1.2.3", "1.2.3"),
        ("e6", "e6"),
        ("1e", "1e"),
        ("a 1e-6", "a 1e-6"),
        ("'1e-6'", "1e-6"),
        ("true", True),
        ("[True, TRUE, false, False, FALSE]", [True, True, False, False, False]),
        ("[yes, No, ON, off, y, n]", ["yes", "No", "ON", "off", "y", "n"]),
        ("null", None),
        ("", None),
        ("[1e-3, 2]", [1e-3, 2]),
        ("{a: 1e-3}", {"a": 1e-3}),
    ],
)
def test_a_yaml_value_is_what_everybody_expects(text, value):
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_not_a_number_is_a_number():
    assert math.isnan(parse_yaml(".nan"))


@given(st.floats(allow_nan=False))
def test_every_float_that_python_writes_is_read_back(number):
    assert parse_yaml(repr(number).replace("inf", ".inf")) == number


def test_yaml_that_would_build_objects_is_refused():
    with pytest.raises(yaml.YAMLError):
        parse_yaml("!!python/object/apply:os.getcwd []")


# ---- reading a recipe


def test_a_recipe_is_read_with_its_overrides(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("name: x\ninner: {rank: 4}\n")
    recipe = load_recipe(Outer, file, ["beta=1e-2", "inner.alpha=8"])
    assert recipe == Outer(name="x", beta=0.01, inner=Inner(rank=4, alpha=8))
    assert resolved(recipe) == {"name": "x", "beta": 0.01, "inner": {"rank": 4, "alpha": 8}, "several": []}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "does not exist"),
        ("", "holds NoneType, not keys and values"),
        ("- a\n- b\n", "holds list"),
        ("name: [", "is not YAML"),
        ("name: x\n\tbeta: 1", "is not YAML"),
        (b"name: \xff\xfe", "is not YAML"),
        ("beta: 1", "the key 'name' is missing"),
        ("name: x\nbeat: 1", "unknown key 'beat' (did you mean 'beta'?); allowed: beta, inner, name, several"),
        ("name: x\nqqq: 1", "unknown key 'qqq'; allowed: beta"),
        ("nmae: x", "unknown key 'nmae' (did you mean 'name'?)"),
        ("name: x\ninner: {rnk: 4}", "unknown key 'inner.rnk' (did you mean 'rank'?); allowed: alpha, rank"),
        ("name: x\nseveral: [{alhpa: 1}]", "'several.0.alhpa' (did you mean 'alpha'?)"),
        ("name: x\nbeta: high", "beta: Input should be a valid number"),
        ("name: x\nname: y", "the key 'name' stands twice"),
        ("name: x\ninner: {rank: 1, alpha: 2, rank: 3}", "the key 'rank' stands twice"),
        ("name: !!binary aGk=", "no text, number, list or mapping"),
        ("name: &a [*a]", "is not YAML: line 1: it has more than 100,000 values"),
        ("name: " + "[" * 5000, "is not YAML"),
        ("name: 3", "name: Input should be a valid string, found 3"),
    ],
)
def test_a_wrong_recipe_is_one_line(tmp_path, content, reason):
    file = tmp_path / "r.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        load_recipe(Outer, file)
    message = str(error.value)
    assert reason in message
    assert str(file) in message
    assert "\n" not in message
    assert "pydantic" not in message


def test_a_broken_line_is_reported_by_its_number_and_not_its_content(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("name: x\ninner: {url: http://u:password@h: 1}: 2\n")
    with pytest.raises(UserError, match=r"is not YAML: line 2: ") as error:
        load_recipe(Outer, file)
    assert "password" not in str(error.value)


def test_a_merge_key_may_repeat_what_it_overrides(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("inner: &i {rank: 1}\nseveral: [{<<: *i, alpha: 3}, {<<: *i, rank: 2}]\nname: x\n")
    assert load_recipe(Outer, file).several == [Inner(rank=1, alpha=3), Inner(rank=2)]


# ---- --set


def test_set_reads_its_value_as_yaml_and_makes_what_is_not_there():
    old = {"a": {"b": 1}, "c": "x"}
    new = apply_overrides(old, ["a.b=1e-6", "a.d=[1, 2]", "e.f.g=true", "c=2024-06-01", "h=", "i=a=b"])
    assert new == {
        "a": {"b": 1e-6, "d": [1, 2]},
        "c": "2024-06-01",
        "e": {"f": {"g": True}},
        "h": None,
        "i": "a=b",
    }
    assert old == {"a": {"b": 1}, "c": "x"}


def test_the_last_set_wins():
    assert apply_overrides({}, ["a=1", "a=2"]) == {"a": 2}


@pytest.mark.parametrize("override", ["beta", "=1", "", "a=[1", "a={", "a..b=1", ".a=1", "a.=1"])
def test_an_invalid_set_is_refused(override):
    with pytest.raises(UserError, match="--set"):
        apply_overrides({}, [override])


def test_a_recipe_with_a_yaml_date_or_a_key_that_is_no_text_can_be_overridden(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("name: 2024-06-01\n")
    assert load_recipe(Outer, file, ["beta=2"]).name == "2024-06-01"


# ---- near misses, changes, hashes


@pytest.mark.parametrize(
    ("name", "expected"),
    [("temprature", " (did you mean 'temperature'?)"), ("Target", " (did you mean 'target'?)"), ("zzz", "")],
)
def test_a_near_miss_is_named(name, expected):
    assert near_miss(name, ["temperature", "target", "url"]) == expected


def test_a_long_list_is_cut():
    assert list_some(["a", "b"], 2) == "'a', 'b'"
    assert list_some(["a", "b", "c", "d"], 2) == "'a', 'b' and 2 more"


def test_changed_keys_are_dotted_and_sorted():
    old = {"a": 1, "b": {"c": 1, "d": {"e": 1}}, "f": [1], "gone": 0}
    new = {"a": 1, "b": {"c": 2, "d": {"e": 2}}, "f": [2], "new": 0}
    assert changed_keys(old, new) == ["b.c", "b.d.e", "f", "gone", "new"]
    assert changed_keys(old, old) == []
    assert changed_keys({"a": {"b": 1}}, {"a": None}) == ["a"]


def test_canonical_json_sorts_keys_and_wastes_nothing():
    assert canonical_json({"b": [1, None], "a": "é"}) == '{"a":"é","b":[1,null]}'.encode()
    assert content_hash({"b": 1, "a": 2}) == content_hash({"a": 2, "b": 1})
    assert content_hash({"a": 1}) != content_hash({"a": "1"})


# ---- files


def test_a_file_is_written_whole_with_ordinary_permissions(tmp_path):
    file = tmp_path / "deep" / "x.txt"
    umask = os.umask(0o022)
    try:
        write_atomically(file, "one é")
        write_atomically(file, "two \ud83d")
    finally:
        os.umask(umask)
    assert file.read_bytes() == b"two \\ud83d"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert [f.name for f in file.parent.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch, broken):
    file = tmp_path / "x.txt"
    write_atomically(file, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "new")
    monkeypatch.undo()
    assert file.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["x.txt"]


def test_the_content_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    order = []
    really = {"fsync": os.fsync, "replace": os.replace}
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), really["fsync"](handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), really["replace"](a, b)))
    write_atomically(tmp_path / "x", "text")
    assert order == ["fsync", "replace", "fsync"]  # the file, the name, the folder


def test_json_is_indented_and_ends_with_a_line(tmp_path):
    write_json(tmp_path / "x.json", {"a": "é"})
    assert (tmp_path / "x.json").read_text("utf-8") == '{\n  "a": "é"\n}\n'
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": "é"}


def test_provenance_names_versions_python_and_commit(monkeypatch, tmp_path):
    record = provenance()
    assert record["versions"]["clair-apo"]
    assert record["python"].startswith("3.")
    monkeypatch.chdir(tmp_path)
    assert provenance()["git_commit"] is None


def test_a_recipe_cannot_be_changed_after_it_was_checked():
    recipe = resolve(Outer, {"name": "x"})
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "y"


def test_paths_in_errors_are_the_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^recipe nope\.yaml does not exist"):
        load_recipe(Outer, Path("nope.yaml"))


@pytest.mark.parametrize(
    ("text", "line"),
    [("a\n\tb  c\r\n", "a b c"), (OSError(28, "No\nroom"), "[Errno 28] No room"), ("x " * 400, ("x " * 400)[:400])],
)
def test_an_errors_message_becomes_one_line(text, line):
    assert one_line(text) == line
    assert one_line(text, 3) == line[:3]
