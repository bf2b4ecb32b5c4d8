"""The form of a text does not matter: encodings, line ends and indentation are the same on both sides of a pair."""

from __future__ import annotations

import pytest

from clair.core.errors import UserError
from clair.data.records import trimmed, written_like
from clair.pipeline.build import build
from clair.prompting.templates import load_template
from tests.clair.building import clair, error_line, pairs, write_recipe
from tests.clair.scripted import Scripted, between, choice, endpoint, install, recipe


def test_a_file_that_is_not_utf8_is_refused_with_its_line_before_any_request(tmp_path, server):
    file = tmp_path / "p.jsonl"
    file.write_bytes('{"prompt": "fine"}\n{"prompt": "O\u00f9 est-il?"}\n'.encode("cp1252"))
    columns = {"prompts": {"path": str(file)}, "target": {"url": server.url, "model": "t"}}
    message = error_line(clair("build", write_recipe(tmp_path, server.url, **columns)))
    assert (message, server.requests()) == (f"{file}, line 2: not UTF-8 (byte 0xf9); save the file as UTF-8", [])


def test_a_template_that_is_not_utf8_is_reported_by_its_line(tmp_path):
    (tmp_path / "t.j2").write_bytes("{{ task }}\nR\u00e9vise {{ answer }}".encode("latin-1"))
    with pytest.raises(UserError, match=r"t\.j2, line 2: not UTF-8"):
        load_template(str(tmp_path / "t.j2"), "reviser.j2", ("task", "answer"))


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("    x = 1\n    y\n", "    x = 1\n    y"),
        ("\n\n    x\n  \n", "    x"),
        ("\r\n \t\r\n\tx\r\n", "\tx"),
        (" It is 4.", "It is 4."),
        ("  two\u2003", "  two"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_blank_lines_go_and_indentation_stays(text, form):
    assert trimmed(text) == form


@pytest.mark.parametrize(
    ("text", "answer", "form"),
    [
        ("a\nb\nc", "a\r\nx\r\nc", "a\r\nb\r\nc"),
        ("a\nb", "a\nx", "a\nb"),
        ("a\nb\nc\nd", "a\r\nx\nc\r\nd\r\n", "a\r\nb\r\nc\r\nd"),
        ("a\nnew\nb\nc", "a\nb\r\nc\n", "a\nnew\nb\r\nc"),
        ("    a", "    b", "    a"),
        ("\n    a\n", "b", "a"),
        ("a", "    b", "a"),
    ],
)
def test_a_revision_is_written_as_its_answer_is(text, answer, form):
    assert written_like(text, answer) == form


def both(folder, monkeypatch, answer, revise, **reviser):
    """(chosen, rejected, requests) of one row; by the target where the answer is a mapping."""
    scripted = Scripted("m", lambda messages, sample: "{teacher_reasoning}\nwhy\n\n" + revise(messages))
    install(monkeypatch, reviser=scripted, target=Scripted("t", lambda messages, sample: choice(answer["said"])))
    row = {"id": "r", "prompt": "task"} | ({"answer": answer} if isinstance(answer, str) else {})
    target = None if isinstance(answer, str) else endpoint()
    build(recipe(folder, [row], pipeline="revised", target=target, reviser=endpoint(**reviser)))
    (pair,) = pairs(folder)
    return *(pair[side][0]["content"] for side in ("chosen", "rejected")), len(scripted.requests)


CODE = "    total = 0\n    for x in xs:\n        total += x\n    return totl"


@pytest.mark.parametrize("answer", [CODE, {"said": CODE + "\n"}, "\n" + CODE + "\n\n"])
@pytest.mark.parametrize("end", ["\n", ":\n", ":\n\n", "\n\n"])
def test_code_is_as_far_to_the_right_on_both_sides(tmp_path, monkeypatch, answer, end):
    def revise(messages):
        text = between(messages[0]["content"], "student_solution")
        return "{corrected_student_solution}" + end + text.replace("totl", "total")

    chosen, rejected, _ = both(tmp_path / "out", monkeypatch, answer, revise)
    assert (chosen, rejected) == (CODE.replace("totl", "total"), CODE)


@pytest.mark.parametrize("answer", ["One line.\r\nA lnie.\r\nThree.", "One line.\r\nA lnie.\r\nThree.\nFour."])
def test_line_ends_are_the_answers_on_both_sides(tmp_path, monkeypatch, answer):
    def rewrite(messages):
        text = between(messages[0]["content"], "student_solution")
        return "{corrected_student_solution}\n" + text.replace("\r\n", "\n").replace("lnie", "line")

    def edit(messages):
        block = "<<<<<<< FIND\nA lnie.\nThree\n=======\nA line.\nThree\n>>>>>>> REPLACE"
        return "{minimal_edits}\n" + block

    for mode, revise in (("rewrite", rewrite), ("edits", edit)):
        result = both(tmp_path / mode, monkeypatch, answer, revise, mode=mode)
        assert result == (answer.replace("lnie", "line"), answer, 1), mode
