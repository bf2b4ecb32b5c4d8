"""The answer of a completion: without hidden reasoning, in any mark-up, and with nothing else removed."""

from __future__ import annotations

import json

import pytest

from clair.inference.model import RequestFailed, parse_reply, split_thinking, visible_answer
from clair.pipeline.build import build
from tests.clair.building import outcomes, pairs
from tests.clair.scripted import Scripted, choice, endpoint, install, recipe, revision

SPLIT = {
    "<think>\nhm\n</think>\n\nIt is 4.": ("hm", "It is 4."),
    "<think>hm</think>It is 4.": ("hm", "It is 4."),
    "<think>hm</think>it is 4.": ("hm", "it is 4."),
    "<think> I add. </think> It is 4.": ("I add.", "It is 4."),
    "<think>\n\n</think>\n\nIt is 4.": ("", "It is 4."),
    "<think>\nnever closed": ("never closed", ""),
    "<think>\nThe tag `</think>` ends it.\n</think>\n\nIt does.": ("The tag `</think>` ends it.", "It does."),
    "hm, so 4.\n</think>\n\nIt is 4.": ("hm, so 4.", "It is 4."),
    "hm, so 4.</think>It is 4.": ("hm, so 4.", "It is 4."),
    "<think>\nhm\n</think>\n\n    return 4": ("hm", "    return 4"),
    "[THINK]hm[/THINK]It is 4.": ("hm", "It is 4."),
    "<thinking>\nhm\n</thinking>\nIt is 4.": ("hm", "It is 4."),
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|return|>": (
        "hm",
        "It is 4.",
    ),
    "<|channel|>analysis<|message|>never ended": ("never ended", ""),
    "<Think>\nhm\n</THINK>\nIt is 4.": ("hm", "It is 4."),
    "\ufeff\u200b<think>hm</think>It is 4.": ("hm", "It is 4."),
}
MENTIONS = [
    "Write `</think>` where it ends, and `<think>` where it begins.",
    "In these templates `</think>` comes last.",
    "The mark is </think> and it stands alone.",
    "<think> is what begins it.",
    "<think>-tags begin it.",
    "<|assistant|> is a mark, and so is `<|user|>`.",
    "<think> begins it and </think> ends it.",
    "A template:\n```\nfoo\n</think>\n\nbar\n```\nand so on",
    "The channels are called <|channel|>analysis and <|channel|>final.",
    "[THINK] is how it begins there, and [/THINK] how it ends",
    "analysis of the assistant",
]


def text_of(content, finish="stop", **message):
    return parse_reply(json.dumps({"choices": [choice(content, finish, **message)]})).text


@pytest.mark.parametrize("text", SPLIT, ids=range(len(SPLIT)))
def test_reasoning_is_split_off_in_every_known_mark(text):
    assert split_thinking(text) == SPLIT[text]
    assert text_of(text) == visible_answer(text) == SPLIT[text][1]


@pytest.mark.parametrize("text", MENTIONS, ids=range(len(MENTIONS)))
def test_a_tag_that_is_spoken_of_stays_in_the_answer(text):
    assert split_thinking(text) == ("", text)
    assert text_of(text) == visible_answer(text) == text


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("text", [*SPLIT, *MENTIONS], ids=range(len(SPLIT) + len(MENTIONS)))
def test_thoughts_that_the_server_has_split_off_are_not_split_again(field, text):
    answer = text_of(text, **{field: "They ask."})
    assert answer == text.removesuffix("<|return|>")
    assert text_of(text, **{field: None}) == text_of(text)


@pytest.mark.parametrize(
    "mark", ["<|im_end|>", "<|eot_id|>\n", "</s>", "<|end|><|endoftext|>", "<end_of_turn>\n\n", "<|eot|>", "<|user|>"]
)
def test_marks_of_an_ended_turn_are_no_part_of_it(mark):
    assert text_of(f"It is 4.{mark}") == visible_answer(f"It is 4.{mark}") == "It is 4."
    for text in ("It ends by `<|im_end|>`.", f"{mark} ends it.", "<s>old</s>"):
        assert text_of(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>It is 4.<|END_RESPONSE|>",
        "<|channel>thought\nhm<channel|>It is 4.<turn|>",
        "<|begin_of_thought|>hm<|end_of_thought|>\n<|begin_of_solution|>It is 4.<|end_of_solution|>",
        "<|im_start|>assistant\n<think>hm</think>\nIt is 4.<|im_end|>\n<|im_start|>assistant\n",
        "<|start_header_id|>assistant<|end_header_id|>\n\nIt is 4.<|eot_id|>",
    ],
)
def test_marks_of_a_turn_and_of_what_was_thought_in_it_go_together(text):
    assert text_of(text) == visible_answer(text) == "It is 4."


def test_parts_of_content_are_joined_whatever_lies_between_them():
    empty = [{"type": "text", "text": None}, {"type": "text"}, {"type": "image"}, None]
    halves = [{"type": "text", "text": half} for half in ("It is \ud83d", "\ude00.")]
    assert text_of([halves[0], *empty, halves[1]]) == "It is \U0001f600."
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    reply = parse_reply(json.dumps({"choices": [choice([thought, {"type": "text", "text": "`</think>`"}])]}))
    assert (reply.thinking, reply.text) == ("hm", "`</think>`")


@pytest.mark.parametrize("text", ["fine \ud83d", "fine \ud83d and more", "fine \ufffd\n"])
def test_half_an_emoji_is_no_answer(text):
    with pytest.raises(RequestFailed, match="half a character") as failed:
        text_of(text)
    assert failed.value.reason == "malformed_reply"
    assert "fine" in text_of(text, "length")
    assert text_of("The sign \ufffd stands for it.") == "The sign \ufffd stands for it."


def test_ready_answers_lose_what_was_thought_and_a_blank_one_buys_nothing(tmp_path, monkeypatch):
    reviser = Scripted("m", revision)
    install(monkeypatch, reviser=reviser)
    ready = {"think": "<think>\nhm, bad\n</think>\n\na bad answer", "blank": " \n", "only": "<think>\nhm\n</think>\n"}
    rows = [{"id": id, "prompt": f"task {id}", "answer": text} for id, text in ready.items()]
    build(recipe(tmp_path / "out", rows, pipeline="revised", reviser=endpoint()))
    assert outcomes(tmp_path / "out") == {
        "think": "a good answer",
        "blank": "target.empty_reply",
        "only": "target.empty_reply",
    }
    assert pairs(tmp_path / "out")[0]["rejected"][0]["content"] == "a bad answer"
    assert len(reviser.requests) == 1


def test_ready_answers_that_are_compared_lose_what_was_thought(tmp_path, monkeypatch):
    install(monkeypatch)
    rows = [{"id": "r", "prompt": "task", "answers": ["<think>\nx\n</think>\nfirst one", "[THINK]y[/THINK]second one"],
             "scores": [2, 1]}]  # fmt: skip
    build(recipe(tmp_path / "out", rows, pipeline="judged"))
    (pair,) = pairs(tmp_path / "out")
    assert [pair[side][0]["content"] for side in ("chosen", "rejected")] == ["first one", "second one"]
