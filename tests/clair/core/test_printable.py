"""Text of a model or a server never steers the terminal, and no recipe or folder runs code."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import yaml

from apo.models import load as models
from clair.core.console import show
from clair.core.errors import UserError, one_line
from clair.core.progress import print_line, printable
from clair.core.recipe import load_recipe, parse_yaml
from clair.inference.model_folder import check_remote_code
from clair.pipeline.config import BuildConfig
from tests.clair.building import clair, pairs, scripted_rows, write_prompts, write_recipe
from tests.clair.scripted_server import STEER

_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_STYLES = re.compile("\x1b\\[[0-9;]*m")  # rich's own


def steering(text: str) -> list[str]:
    return _STEERS.findall(_STYLES.sub("", text))


def test_every_control_character_becomes_a_sign_and_no_other_character_changes():
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x3000)]))
    assert not steering(printable(every))
    assert len(printable(every)) == len(every)
    plain = "".join(char for char in every if not _STEERS.match(char))
    assert printable(plain) == plain
    assert printable("\x1b[2J\x9b\x7f\n\t") == "\u241b[2J\ufffd\u2421\n\t"
    assert printable(printable(every)) == printable(every)


def test_errors_notes_and_lines_print_no_control_character(capsys):
    print_line(STEER)
    show(STEER)
    assert not steering(one_line(STEER))
    out, err = capsys.readouterr()
    assert "cHduZWQ=" in out
    assert "cHduZWQ=" in err
    assert not steering(out + err)


@pytest.mark.parametrize("step", ["400steer", "401steer", "429steer ok", "steer"])
def test_no_error_and_no_answer_steers_the_terminal(tmp_path, server, step):
    rows = [{"prompt": f"Task {STEER} [[{step}]]", "answer": f"bad answer {STEER}"}, *scripted_rows(["ok"])]
    write_prompts(tmp_path / "prompts.jsonl", rows)
    built = clair("build", write_recipe(tmp_path, server.url))
    assert not steering(built.out + built.err)
    if built.code != 2:
        if step == "steer":  # the file has the text unchanged
            assert sum(row["chosen"][0]["content"].endswith(STEER) for row in pairs(tmp_path / "out")) == 1
        for command in ("show", "stats"):
            shown = clair(command, tmp_path / "out")
            assert shown.code == 0
            assert not steering(shown.out + shown.err)


# ---- recipes that grow


def bomb(line: str) -> str:
    levels = [f"a0: &a0 {line}"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join(levels)


MERGES = "a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 40))


@pytest.mark.parametrize("text", [bomb("[lol, lol]"), bomb("lol"), MERGES, "a: &a [*a]", "a: &a {b: *a}"])
def test_aliases_that_grow_without_end_are_one_line(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"is not YAML: line 1: it has more than 100,000 values, its aliases written"):
        load_recipe(BuildConfig, file)


def test_aliases_as_people_use_them_are_read():
    text = "base: &base {url: u, model: m}\ntarget: {<<: *base, model: t}\nrest: [*base, *base]"
    assert parse_yaml(text) == {
        "base": {"url": "u", "model": "m"},
        "target": {"url": "u", "model": "t"},
        "rest": [{"url": "u", "model": "m"}] * 2,
    }
    assert parse_yaml("") is None
    assert len(parse_yaml(yaml.safe_dump(list(range(50_000))))) == 50_000


# ---- folders with code of their own


@pytest.fixture
def with_code(tmp_path):
    """A model folder that transformers loads by code in it alone, which leaves a file where it is run."""
    folder = tmp_path / "model"
    folder.mkdir()
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "of_its_own", "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}", "eos_token": "e"}))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    return folder


def test_a_folder_with_code_of_its_own_is_one_line_and_the_code_does_not_run(tmp_path, with_code):
    write_prompts(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    recipe = write_recipe(tmp_path, "http://127.0.0.1:9/v1", target={"path": str(with_code)})
    result = clair("build", recipe)
    assert result.code == 2
    assert re.fullmatch(
        r"error: target: .*model needs custom code to be loaded \('of_its_own' is no model type of transformers\), "
        r"and it is not run; set trust_remote_code: true if you have read it\n",
        "".join(line for line in result.err.splitlines(keepends=True) if not line.startswith("building")),
    )
    with pytest.raises(UserError, match="needs custom code"):
        models.find_model(str(with_code))
    assert not (tmp_path / "ran").exists()


def test_a_folder_with_code_that_is_not_needed_is_loaded_without_it(with_code):
    (with_code / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "code.C"}}))
    check_remote_code(with_code, "target")
    shutil.rmtree(with_code)
    check_remote_code(with_code, "target")
