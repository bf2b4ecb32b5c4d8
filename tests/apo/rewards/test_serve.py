"""`apo reward serve`: a score or null for each answer, and one line for what cannot be scored."""

from __future__ import annotations

import json
import shutil

import pytest

from apo.rewards.reward_dir import Reward
from apo.rewards.serve import AnswerScorer, score_lines
from clair.core.errors import UserError
from tests.apo.conftest import TEMPLATE, make_tokenizer

PROMPT = [{"role": "user", "content": "what is one"}]


@pytest.fixture(scope="module")
def scorer(world, tmp_path_factory):
    """A reward whose chat template refuses a system turn and reads tools."""
    folder = tmp_path_factory.mktemp("serve")
    shutil.copytree(world / "model", folder / "model")
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    named = TEMPLATE.replace("m['content'] }}", "m['content'] }}{{ m.tool_calls[0].function.name if m.tool_calls }}")
    tools = "{% if tools %}<|start|>system\n{{ tools[0]['name'] }}<|end|>{% endif %}"
    make_tokenizer(refusal + tools + named).save_pretrained(folder / "model")
    reward = Reward.load(world / "bradley_terry")
    reward.facts["model"] = str(folder / "model")
    return AnswerScorer(reward)


def served(scorer, *rows) -> list[list]:
    lines = [row if isinstance(row, str) else json.dumps({"id": 1, "prompt": PROMPT, **row}) for row in rows]
    return [json.loads(line)["scores"] for line in score_lines(scorer, lines)]


def test_a_score_does_not_depend_on_the_other_answers_and_is_null_if_too_long(scorer):
    long = "one " * 300
    (both, alone, nothing, empty) = served(
        scorer, {"answers": ["one two", long, "-"]}, {"answers": ["one two"]}, {"answers": [long]}, {"answers": []}
    )
    assert both[0] == pytest.approx(alone[0], abs=1e-6)
    assert both[1] is None
    assert 0 <= both[2] <= 1
    assert (nothing, empty) == ([None], [])


def test_a_prompt_that_the_template_refuses_is_no_answer_that_is_too_long(scorer):
    prompt = [{"role": "system", "content": "a"}, *PROMPT]
    with pytest.raises(UserError, match=r"line 2, id 1: .*no system turns"):
        served(scorer, {"answers": ["one"]}, {"prompt": prompt, "answers": ["one"]})


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"id": 1, "answers": ["one"]}'])
def test_a_malformed_line_is_one_line_and_a_blank_one_is_skipped(scorer, line):
    with pytest.raises(UserError, match=r'line 2 cannot be read .*; needed: \{"id"') as caught:
        served(scorer, "\n", line)
    assert "\n" not in str(caught.value)


def test_an_answer_is_text(scorer):
    with pytest.raises(UserError, match="line 1: answers is "):
        served(scorer, {"answers": [None, "two"]})


def test_tools_and_calls_are_part_of_what_is_scored(scorer):
    tools = [{"name": "two"}]
    calls = {"tool_calls": [[{"function": {"name": "six", "arguments": {}}}], []], "tools": tools}
    plain, called = served(scorer, {"answers": ["one", "one"]}, {"answers": ["one", "one"], **calls})
    assert plain[0] == pytest.approx(plain[1], abs=1e-6)
    assert called[0] != pytest.approx(called[1], abs=1e-6)  # the call
    assert called[1] != pytest.approx(plain[1], abs=1e-6)  # the tools
