"""Warnings of a build about its result: a doubtful reviser, too few held-out pairs, a custom template."""

from __future__ import annotations

import json

import pytest

from clair.cluster.merge import merge
from clair.data.dataset_card import quality_warnings
from clair.pipeline.build import build
from clair.pipeline.shards import Shard
from tests.clair.building import clair, scripted_rows, write_prompts, write_recipe
from tests.clair.scripted import Scripted, between, endpoint, install, recipe, revision


def rows(n):
    return [{"id": f"r{i}", "prompt": f"question {i}", "answer": f"a bad answer to {i}"} for i in range(n)]


def number_of(messages):
    return int(between(messages[0]["content"], "student_solution").split()[-1])


def weak(messages, sample):
    """Half of its first replies have no label, and a third of what can be read alludes."""
    number = number_of(messages)
    if number % 2 and len(messages) == 1:
        return "The answer is good."
    text = revision(messages)
    return text if number % 3 else text.replace("a good", "Here is the revised solution: a good")


def test_a_doubtful_reviser_is_reported_in_numbers(tmp_path, monkeypatch):
    install(monkeypatch, reviser=Scripted("weak", weak))
    built = build(recipe(tmp_path / "out", rows(30), pipeline="revised", reviser=endpoint(), test_fraction=0.5))
    assert built.manifest["first_replies"] == {"no_label": 15, "read": 15}
    (doubt,) = quality_warnings(built.manifest)
    assert doubt.startswith(
        "the reviser's work is doubtful: 15 of 30 first replies could not be read (no_label 15); of 30 revisions 10 "
        "speak of the correction and 0 change nothing. Nobody has judged whether the 20 winners are better"
    )


def test_a_reviser_that_does_its_work_is_not_doubted_and_counted_over_all_shards(tmp_path, monkeypatch):
    install(monkeypatch, reviser=Scripted("good", lambda messages, sample: revision(messages)))
    config = recipe(tmp_path / "out", rows(40), pipeline="revised", reviser=endpoint(), test_fraction=0.5)
    single = build(config).manifest
    assert quality_warnings(single) == []
    shard_config = recipe(tmp_path / "parts", rows(40), pipeline="revised", reviser=endpoint(), test_fraction=0.5)
    for index in (1, 2):
        build(shard_config, shard=Shard(index, 2))
    merged = merge(f"{shard_config.out}-shards")
    assert merged["first_replies"] == single["first_replies"] == {"read": 40}


def test_too_few_held_out_pairs_are_reported_unless_none_were_requested(tmp_path, monkeypatch):
    install(monkeypatch, reviser=Scripted("good", lambda messages, sample: revision(messages)))
    few = build(recipe(tmp_path / "few", rows(15), pipeline="revised", reviser=endpoint()))
    (doubt,) = quality_warnings(few.manifest)
    test = few.manifest["counts"]["test"]
    assert doubt.startswith(f"{test} of 15 pairs are held out (test_fraction 0.05), too few to measure on")
    none = build(recipe(tmp_path / "none", rows(15), pipeline="revised", reviser=endpoint(), test_fraction=0))
    assert quality_warnings(none.manifest) == []


@pytest.mark.parametrize(
    ("template", "noted"),
    [
        ("{{ task }} {{ answer }}", True),
        ("{{ task }} {{ answer }} Write it under {corrected_student_solution}.", False),
        ("{{ task }} {{ answer }} Write it under **Corrected student solution**.", False),
    ],
)
def test_a_template_that_never_names_the_label_that_is_parsed_is_noted_before_any_cost(
    tmp_path, server, template, noted
):
    template_path = tmp_path / "own.j2"
    template_path.write_text(template)
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"]))
    reviser = {"url": server.url, "model": "m", "template": str(template_path)}
    result = clair("build", write_recipe(tmp_path, server.url, reviser=reviser), "--dry-run")
    assert result.code == 0, result
    assert (f"note: reviser.template {template_path} never names {{corrected_student_solution}}" in result.err) == noted
    assert server.requests() == []


def test_the_system_message_may_name_the_part_too(tmp_path, server):
    template_path = tmp_path / "own.j2"
    template_path.write_text("{{ task }} {{ answer }}")
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"]))
    reviser = {
        "url": server.url,
        "model": "m",
        "template": str(template_path),
        "system": "Use {corrected_student_solution}.",
    }
    assert "note:" not in clair("build", write_recipe(tmp_path, server.url, reviser=reviser), "--dry-run").err


def test_messages_as_json_text_are_noted_before_any_cost(tmp_path, server):
    rows = [{"prompt": json.dumps([{"role": "user", "content": "Hi"}]), "answer": "a"}, {"prompt": "Hi", "answer": "b"}]
    write_prompts(tmp_path / "prompts.jsonl", rows)
    result = clair("build", write_recipe(tmp_path, server.url), "--dry-run")
    assert "note: 1 of 2 prompts are messages as JSON text; read as messages" in result.err
    assert server.requests() == []


@pytest.mark.parametrize(("set_", "expected"), [(0.3, 0.8), (0.7, 1.0), (1.2, 1.2), (None, None)])
def test_a_reply_that_cannot_be_read_is_requested_again_at_another_temperature(tmp_path, monkeypatch, set_, expected):
    def forgetful(messages, sample):
        return revision(messages) if len(messages) == 3 else "The answer is good."

    reviser = Scripted("forgetful", forgetful)
    install(monkeypatch, reviser=reviser)
    build(recipe(tmp_path / "out", rows(1), pipeline="revised", reviser=endpoint(temperature=set_)))
    assert [request.get("temperature") for request in reviser.requests] == [set_, expected]
