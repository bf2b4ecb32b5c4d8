"""Content ids: equal content, equal id, on every machine; anything different, another id."""

from __future__ import annotations

import hashlib
import re
import string
import subprocess
import sys

import pytest

from clair.data.records import Dropped, Pair, Prompt, content_id, fold_case

USER = ({"role": "user", "content": "Say é"},)


def test_the_content_id_is_the_hash_of_the_canonical_json():
    text = '[[{"content":"Say é","role":"user"}],null]'
    assert content_id(USER, None) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_order_of_the_keys_of_a_message_does_not_matter():
    assert content_id(({"content": "Say é", "role": "user"},), None) == content_id(USER, None)


@pytest.mark.parametrize(
    ("messages", "answer"),
    [
        (({"role": "user", "content": "Say e"},), None),
        (({"role": "system", "content": "Say é"},), None),
        ((*USER, *USER), None),
        (USER, "é"),
        (USER, ""),
    ],
)
def test_anything_different_gives_another_id(messages, answer):
    assert content_id(messages, answer) != content_id(USER, None)


def test_a_prompt_without_an_id_has_its_content_id():
    assert Prompt("", USER).id == Prompt("mine", USER).content_id
    assert Prompt("mine", USER).id == "mine"


def test_the_users_own_id_changes_nothing_about_the_content_id():
    assert Prompt("mine", USER).content_id == Prompt("other", USER).content_id == content_id(USER, None)


def test_another_process_with_another_hash_seed_gives_the_same_id():
    code = "from clair.data.records import content_id; print(content_id(({'role': 'user', 'content': 'Say é'},), None))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONUTF8": "1", "PYTHONPATH": ":".join(p for p in sys.path if p)},
    )
    assert result.stdout.strip() == content_id(USER, None)


def test_a_lone_half_of_a_surrogate_pair_has_an_id_too():
    assert content_id(({"role": "user", "content": "\ud83d"},), None) != content_id(USER, None)


def test_a_pair_becomes_a_row_of_message_lists():
    models, labels = {"chosen": "r", "rejected": "t"}, {"user": "ann", "source": "revised"}
    row = Pair("p", USER, "good", "bad", "why", models, {"kept": 0.5}, labels, (4.0, 2.5)).row()
    assert row == {
        "id": "p",
        "prompt": [{"role": "user", "content": "Say é"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
        "reasoning": "why",
        "models": {"chosen": "r", "rejected": "t"},
        "contrast": {"kept": 0.5},
        "score_chosen": 4.0,
        "score_rejected": 2.5,
        "user": "ann",
        "group": None,
        "behaviour": None,
        "source": "revised",
    }
    assert Pair("p", USER, "good", "bad").row()["score_chosen"] is None


def test_a_drop_has_stage_reason_and_a_bounded_detail():
    row = Dropped("reviser", "no_label", "x" * 501, failed=False).row("p")
    assert row == {"id": "p", "stage": "reviser", "reason": "no_label", "detail": "x" * 499 + "…", "failed": False}


def test_folded_characters_are_equal_where_a_pattern_that_ignores_case_finds_them_equal():
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    assert all(len(fold_case(character)) == 1 for character in characters)
    text = "".join(characters)
    for letter in string.ascii_lowercase:
        matches = [match.start() for match in re.finditer(letter, text, re.IGNORECASE)]
        assert matches == [match.start() for match in re.finditer(letter, fold_case(text))]
