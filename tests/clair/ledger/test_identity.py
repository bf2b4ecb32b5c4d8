"""A dataset's ingredients are identified by content: templates, prompts and files, not their paths."""

from __future__ import annotations

import pytest

from clair.core.errors import UserError
from clair.core.files import read_json, write_json
from clair.pipeline.build import build
from clair.storage.location import Location
from tests.clair.building import manifest, pairs
from tests.clair.scripted import Scripted, endpoint, install, oracle_verdict, recipe, revision

TEMPLATE = "Mend it.\n{{ task }}\n<student_solution>\n{{ answer }}\n</student_solution>\n"
ROWS = [{"id": f"r{n}", "prompt": f"task {n}", "answer": f"a bad answer {n}"} for n in range(3)]


@pytest.mark.parametrize("mode", ["rewrite", "edits"])
def test_a_template_that_was_edited_in_place_is_another_recipe(tmp_path, monkeypatch, mode):
    reviser = Scripted("m", revision)
    install(monkeypatch, reviser=reviser)
    template = tmp_path / "own.j2"
    template.write_text(TEMPLATE)
    config = recipe(tmp_path / "out", ROWS, pipeline="revised", reviser=endpoint(template=str(template), mode=mode))
    build(config)
    request_count, sha256 = len(reviser.requests), manifest(tmp_path / "out")["recipe"]["reviser"]["template_sha256"]
    build(config)
    template.write_text(TEMPLATE.replace("Mend", "Spoil"))
    with pytest.raises(UserError, match=r"differs in reviser\.template_sha256.*--update"):
        build(config)
    assert len(reviser.requests) == request_count
    build(config, update=True)
    assert len(reviser.requests) > request_count
    assert manifest(tmp_path / "out")["recipe"]["reviser"]["template_sha256"] != sha256
    assert read_json(tmp_path / "out" / "recipe.json") == manifest(tmp_path / "out")["recipe"]


def test_the_judges_words_and_the_benchmark_are_known_by_content_too(tmp_path, monkeypatch):
    install(monkeypatch, judge=Scripted("j", oracle_verdict))
    template, benchmark = tmp_path / "judge.j2", tmp_path / "benchmark.jsonl"
    template.write_text(
        "{{ task }}\n<student_solution_1>\n{{ first }}\n</student_solution_1>\n"
        "<student_solution_2>\n{{ second }}\n</student_solution_2>\n"
    )
    benchmark.write_text('{"prompt": "something else"}\n')
    rows = [{"id": "r", "prompt": "task", "answers": ["a bad answer", "a good answer"]}]
    config = recipe(tmp_path / "out", rows, pipeline="judged", judge=endpoint(template=str(template)))
    config = config.model_copy(update={"prompts": config.prompts.model_copy(update={"not_in": Location(benchmark)})})
    build(config)
    for file, key in ((template, "judge.template_sha256"), (benchmark, "prompts.not_in_sha256")):
        text = file.read_text()
        file.write_text(text.replace("something", "anything") + "\n" if file == benchmark else text + "!")
        with pytest.raises(UserError, match=key):
            build(config)
        file.write_text(text)
    build(config)


def test_a_folder_of_a_version_that_noted_no_hashes_resumes(tmp_path, monkeypatch):
    reviser = Scripted("m", revision)
    install(monkeypatch, reviser=reviser)
    config = recipe(tmp_path / "out", ROWS, pipeline="revised", reviser=endpoint())
    build(config)
    old = read_json(tmp_path / "out" / "recipe.json")
    del old["reviser"]["template_sha256"]
    write_json(tmp_path / "out" / "recipe.json", old)
    build(config)
    assert len(reviser.requests) == len(ROWS)


def test_prompts_that_change_during_a_run_make_no_dataset_and_lose_no_reply(tmp_path, monkeypatch):
    """More prompts than a reader's buffer holds; the file grows and changes during the first requests."""
    rows = [{"id": f"r{n}", "prompt": f"task {n} " + "x" * 400, "answer": f"a bad answer {n}"} for n in range(2000)]
    config = recipe(tmp_path / "out", rows, pipeline="revised", reviser=endpoint(), concurrency=1)
    prompts = tmp_path / "out-prompts.jsonl"
    original = prompts.read_text()

    def meddling(messages, sample):
        prompts.write_text(original.replace("task 1999 ", "task 1998 "))
        return revision(messages)

    reviser = Scripted("m", meddling)
    install(monkeypatch, reviser=reviser)
    with pytest.raises(UserError, match=r"out-prompts\.jsonl was changed during the run"):
        build(config)
    assert not (tmp_path / "out" / "manifest.json").exists()
    request_count = len(reviser.requests)
    assert request_count > 0
    prompts.write_text(original)
    reviser.script = revision
    build(config)
    assert len(pairs(tmp_path / "out")) == 2000
    assert len(reviser.requests) <= 2001
