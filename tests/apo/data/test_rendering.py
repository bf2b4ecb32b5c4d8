"""Rows as their chat template writes them: what is trained, what is left out, what is refused, each with the row."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from apo.data.tokenize import ID_COLUMNS, encode, eos_ids, tokenize
from clair.core.errors import UserError
from tests.apo.data.letters import CHATML, letters, turn

TOOLS = (
    "{% if tools %}<|start|>system\n{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% for c in m.get('tool_calls', []) %}<call>{{ c['function'] | tojson }}</call>{% endfor %}"
    "{{ m['content'] or '' }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
NO_THOUGHTS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GLM = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PICKY = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}" + CHATML


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def pair(chosen="Pear.", rejected="Chair.", prompt="Name a fruit.", **more):
    """A row; a text is one turn."""
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {key: [turn(roles[key], text)] if isinstance(text, str) else text for key, text in row.items()} | more


def encoded(row, tokenizer=None, end_tokens=()):
    tokenizer = tokenizer or letters()
    return encode(
        row, tokenizer, sorted(tokenizer.convert_tokens_to_ids(list(end_tokens)) or [tokenizer.eos_token_id]), None
    )


def noted(row):
    """The notes about a row, except for the line break that ChatML writes after each end of turn."""
    return [note for note in row["_notes"] if note != "after_end"]


def trained(row, side, tokenizer=None):
    """The trained text of a side, one piece for each stretch of tokens."""
    tokenizer = tokenizer or letters()
    ids, mask = row[f"{side}_ids"], row[f"{side}_mask"] or [1] * len(row[f"{side}_ids"])
    marked = [(token if keep else None) for token, keep in zip(ids, mask, strict=True)]
    pieces: list[list[int]] = [[]]
    for token in marked:
        if token is not None:
            pieces[-1].append(token)
        elif pieces[-1]:
            pieces.append([])
    return [tokenizer.decode(piece) for piece in pieces if piece]


def refusal(row, template=CHATML):
    verdict = encoded(row, letters(template))["_verdict"]
    assert verdict, "not refused"
    assert "\n" not in verdict
    return verdict


# ---- what is trained


def test_a_single_turn_has_no_mask_and_ends_with_its_end_of_turn():
    encoding = encoded(pair())
    assert trained(encoding, "chosen") == ["Pear.<|end|>"]
    assert encoding["chosen_mask"] == encoding["rejected_mask"] == []
    assert not encoding["_verdict"]
    assert not noted(encoding)


def test_of_several_turns_the_assistants_are_trained_and_no_others():
    calls = turn("assistant", "", tool_calls=[call("weather", {"city": "Oslo"})])
    chosen = [
        calls,
        turn("tool", "4 degrees"),
        turn("assistant", "Cold."),
        turn("user", "Sure?"),
        turn("assistant", "Yes."),
    ]
    encoding = encoded(pair(chosen, "Hot."), letters(TOOLS))
    assert not encoding["_verdict"]
    assert trained(encoding, "chosen") == [
        '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call><|end|>', "Cold.<|end|>", "Yes.<|end|>",
    ]  # fmt: skip
    assert trained(encoding, "rejected") == ["Hot.<|end|>"]
    text = letters().decode(encoding["chosen_ids"])
    assert "<|start|>tool\n4 degrees<|end|>" in text
    assert text.endswith("Yes.<|end|>")


def test_a_mask_is_there_for_unpaired_rows_too():
    row = {"prompt": [turn("user", "Hi")], "label": False}
    row["completion"] = [turn("assistant", "Yes?"), turn("user", "Bye"), turn("assistant", "Ciao")]
    encoding = encoded(row)
    assert encoding["chosen_ids"] == encoding["chosen_mask"] == []
    assert trained(encoding, "rejected") == ["Yes?<|end|>", "Ciao<|end|>"]


def test_a_row_is_rendered_again_where_the_templates_clock_has_ticked(monkeypatch):
    times = iter(["11:59", "12:00", *["12:01"] * 20])
    clock = "<|start|>system\n{{ strftime_now('%H:%M') }}<|end|>\n" + CHATML
    tokenizer, apply = letters(clock), PreTrainedTokenizerFast.apply_chat_template

    def with_clock(self, *args, **options):
        return re.sub(r"\d\d:\d\d", next(times), apply(self, *args, **options))

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.apply_chat_template", with_clock)
    row = encoded(pair(), tokenizer)
    assert trained(row, "chosen", tokenizer) == ["Pear.<|end|>"]
    assert "12:01" in tokenizer.decode(row["prompt_ids"])


def test_a_template_that_writes_another_time_each_time_is_refused():
    clock = "<|start|>system\n{{ strftime_now('%f') }}<|end|>\n" + CHATML
    assert "the chat template writes a time that changes with each rendering" in refusal(pair(), clock)


def test_an_answer_without_text_is_noted():
    assert noted(encoded(pair("", " "))) == ["empty"]
    assert noted(encoded({"prompt": "Name a fruit:", "chosen": " pear", "rejected": ""})) == ["empty"]
    assert noted(encoded(pair("", prompt="What is <|end|>?"))) == ["empty", "marks"]


def test_a_begun_turn_at_the_end_of_a_prompt_continues_in_the_answer():
    encoding = encoded(pair(" pear.", " chair.", [turn("user", "A fruit?"), turn("assistant", "It is a")]))
    assert letters().decode(encoding["prompt_ids"]).endswith("<|start|>assistant\nIt is a")
    assert trained(encoding, "chosen") == [" pear.<|end|>"]
    assert noted(encoding) == ["begun"]


def test_the_text_of_a_control_token_is_encoded_as_text():
    tokenizer = letters()
    end, start = tokenizer.convert_tokens_to_ids(["<|end|>", "<|start|>"])
    answer = "The mark <|end|> ends a turn; <|start|> begins one."
    encoding = encoded(pair(answer, prompt="What is <|end|>?"), tokenizer)
    assert not encoding["_verdict"]
    assert noted(encoding) == ["marks"]
    assert encoding["chosen_ids"].count(end) == 1
    assert encoding["chosen_ids"][-1] == end
    assert start not in encoding["chosen_ids"]
    assert trained(encoding, "chosen") == [answer + "<|end|>"]
    assert (encoding["prompt_ids"].count(end), encoding["prompt_ids"].count(start)) == (1, 2)


def test_in_rows_of_plain_text_a_mark_is_text_unless_the_prompt_has_been_rendered():
    tokenizer = letters()
    (end,) = tokenizer.convert_tokens_to_ids(["<|end|>"])
    encoding = encoded(
        {"prompt": "Ends? ", "chosen": "<|end|> and <|start|> ", "rejected": "None.<|end|>\n"}, tokenizer
    )
    assert trained(encoding, "chosen") == ["<|end|> and <|start|> <|end|>"]
    assert (encoding["chosen_ids"].count(end), encoding["chosen_ids"][-1], noted(encoding)) == (1, end, ["marks"])
    assert trained(encoding, "rejected") == ["None.<|end|>"]
    assert encoding["rejected_ids"].count(end) == 1
    prompt = "<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    encoding = encoded({"prompt": prompt, "chosen": "Yes<|end|>\n", "rejected": "No"}, tokenizer)
    assert encoding["prompt_ids"].count(end) == 1
    assert [trained(encoding, side) for side in ("chosen", "rejected")] == [["Yes<|end|>"], ["No<|end|>"]]
    assert "ends with the end of turn twice" in refusal(
        {"prompt": "Hi ", "chosen": "a<|end|> <|end|>", "rejected": "b"}
    )


def test_rows_without_such_marks_have_the_ids_that_the_template_gives():
    tokenizer = letters(TOOLS)
    row = pair([turn("assistant", None, tool_calls=[call("look", {"x": "é ☂"})])], tools=[{"name": "look"}])
    encoding = encoded(row, tokenizer)
    for side in ("chosen", "rejected"):
        ids = tokenizer.apply_chat_template(row["prompt"] + row[side], tools=row["tools"], return_dict=True)[
            "input_ids"
        ]
        assert encoding["prompt_ids"] + encoding[f"{side}_ids"] == ids[:-1]  # ChatML's line break


# ---- families whose templates end answers in their own way


def test_an_end_of_the_whole_text_after_the_end_of_turn_is_the_templates():
    encoding = encoded(pair(), letters(PHI, "<|text_end|>"), ["<|end|>", "<|text_end|>"])
    assert not encoding["_verdict"]
    assert trained(encoding, "chosen") == ["Pear.<|end|>"]


def test_a_template_that_writes_no_end_gets_the_token_that_generation_stops_at():
    encoding = encoded(pair(), letters(GLM, "<|text_end|>"), ["<|text_end|>", "<|user|>", "<|tool|>"])
    assert trained(encoding, "chosen") == ["Pear.<|user|>"]
    assert noted(encoding) == ["no_end"]
    turns = [turn("assistant", "Wait."), turn("tool", "4"), turn("assistant", "Four.")]
    encoding = encoded(pair(turns), letters(GLM, "<|text_end|>"), ["<|text_end|>", "<|user|>", "<|tool|>"])
    assert trained(encoding, "chosen") == ["Wait.<|tool|>", "Four.<|user|>"]


def test_the_token_after_a_tool_call_ends_it_and_thoughts_that_a_later_turn_removes_do_not_matter():
    end_tokens = ["<|text_end|>", "<|user|>", "<|tool|>"]
    written = "{% for c in m.get('tool_calls', []) %}{{ c['function'] | tojson }}{% endfor %}{% endfor %}{% if"
    calls = GLM.replace("{% endfor %}{% if", written)
    encoding = encoded(
        pair([turn("assistant", "", tool_calls=[call("look", {"x": 1})])]), letters(calls, "<|text_end|>"), end_tokens
    )
    assert trained(encoding, "chosen") == ['{"name": "look", "arguments": {"x": 1}}<|tool|>']
    last_only = GLM.replace("m['content'] }}", "m['content'] if loop.last else m['content'].split('</think>')[-1] }}")
    encoding = encoded(pair("<think>hm</think>Pear."), letters(last_only, "<|text_end|>"), end_tokens)
    assert trained(encoding, "chosen") == ["<think>hm</think>Pear.<|user|>"]


def test_a_turn_within_an_answer_that_ends_otherwise_than_the_last_is_trained_without_its_end():
    harmony = CHATML.replace("<|end|>", "{{ '<|end|>' if loop.last or m.role != 'assistant' else '<|call|>' }}")
    turns = [turn("assistant", "Where?"), turn("user", "Oslo"), turn("assistant", "Cold.")]
    encoding = encoded(pair(turns), letters(harmony))
    assert trained(encoding, "chosen") == ["Where?", "Cold.<|end|>"]
    assert noted(encoding) == ["inner_end"]


def test_a_template_that_writes_no_end_gets_the_end_of_text_where_generation_stops_at_nothing_else():
    encoding = encoded(pair(), letters(GLM, "<|text_end|>"))
    assert trained(encoding, "chosen") == ["Pear.<|text_end|>"]


# ---- what the template leaves out


def test_a_tool_call_that_the_template_leaves_out_is_refused():
    message = refusal(pair([turn("assistant", "", tool_calls=[call("weather", {"city": "Oslo"})])]))
    assert "leaves out a tool call of 'chosen'" in message
    assert "weather, city, Oslo" in message


def test_an_answers_thoughts_that_the_template_leaves_out_are_noted():
    assert noted(encoded(pair([turn("assistant", "12", reasoning_content="3 * 4")]))) == ["thoughts"]
    row = pair("<think>3 * 4</think>\n\n12", "<think>eh</think>\n\n13")
    assert noted(encoded(row, letters(NO_THOUGHTS))) == ["parted", "thoughts"]
    assert noted(encoded(row)) == []
    assert trained(encoded(row), "chosen") == ["<think>3 * 4</think>\n\n12<|end|>"]


def test_a_thought_that_continues_across_the_end_of_the_prompt_is_not_left_out():
    begins = CHATML.replace("<|start|>assistant\n{% endif %}", "<|start|>assistant\n<think>\n{% endif %}")
    encoding = encoded(pair("<think>\nhm\n</think>12", "<think>\nno\n</think>13"), letters(begins))
    assert noted(encoding) == []
    assert trained(encoding, "chosen") == ["hm\n</think>12<|end|>"]
    encoding = encoded(pair("<b>12</b>", "13"), letters(NO_THOUGHTS))
    assert (encoding["_verdict"], noted(encoding)) == ("", ["parted"])


def test_earlier_thoughts_and_tools_that_the_template_leaves_out_are_noted():
    prompt = [turn("user", "3*4?"), turn("assistant", "<think>easy</think>12"), turn("user", "And 5*4?")]
    encoding = encoded(pair("20", "24", prompt), letters(NO_THOUGHTS))
    assert noted(encoding) == ["parted", "prompt_thoughts"]
    assert noted(encoded(pair(tools=[{"name": "look"}]))) == ["tools"]
    assert noted(encoded(pair(tools=json.dumps([{"name": "look"}])), letters(TOOLS))) == []


def test_other_keys_of_messages_that_the_template_leaves_out_are_noted_by_their_names():
    prompt = [turn("system", "Help.", functions='[{"name": "look"}]'), turn("user", "Hi", name="Ann", turn_id="7")]
    rows = [pair(prompt=prompt), pair([turn("assistant", "Pear.", plan={"steps": ["think"]}, score="9")])]
    tokenizer = letters(CHATML.replace("<|end|>\n", "<|end|>"))
    assert tokenize(Dataset.from_list(rows), tokenizer, None, eos_ids(tokenizer)).notes == [
        "train: the chat template leaves out other keys of messages, with text, in 2 of 2 rows (first: row 0): "
        "functions, name, plan"
    ]
    named = letters(CHATML.replace("m['role']", "m['role'] + (m['name'] or '')"))
    assert noted(encoded(pair(prompt=[turn("user", "Hi", name="Ann")]), named)) == []


def test_prompts_and_answers_that_the_template_leaves_out_are_noted_and_refused():
    deaf = "{% for m in messages if m['role'] != 'system' %}" + CHATML.split("%}", 1)[1]
    encoding = encoded(pair(prompt=[turn("system", "Be kind."), turn("user", "Hi")]), letters(deaf))
    assert noted(encoding) == ["prompt_text"]
    mute = CHATML.replace("{{ m['content'] or '' }}", "{{ m['content'] if m['role'] == 'user' else '' }}")
    assert "leaves out text of 'chosen': 'Pear.'" in refusal(pair(), mute)


@pytest.mark.parametrize("text", ["  a\n\n  b ", 'say "a"\\b\n', "tab\tand é and ☂", "<a href='x'>&amp;</a>"])
@pytest.mark.parametrize("written", ["m['content'] | trim", "m['content'] | tojson"])
def test_text_that_is_trimmed_or_escaped_is_not_left_out(text, written):
    template = CHATML.replace("m['content'] or ''", written)
    encoding = encoded(pair("x" + text, "y" + text, [turn("user", text)]), letters(template))
    assert not encoding["_verdict"]
    assert not noted(encoding)


def test_arguments_come_as_the_template_takes_them():
    """JSON text, as OpenAI has it, is written as an object by templates that write JSON, and as text by the others."""
    want = '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call><|end|>'
    for arguments in ({"city": "Oslo"}, '{"city": "Oslo"}'):
        encoding = encoded(pair([turn("assistant", "", tool_calls=[call("weather", arguments)])]), letters(TOOLS))
        assert trained(encoding, "chosen") == [want]
        joins = TOOLS.replace(
            "{{ c['function'] | tojson }}", "{{ c['function']['name'] + c['function']['arguments'] }}"
        )
        encoding = encoded(pair([turn("assistant", None, tool_calls=[call("weather", arguments)])]), letters(joins))
        assert trained(encoding, "chosen") == ['<call>weather{"city": "Oslo"}</call><|end|>']


def test_keys_that_arrow_pads_with_null_are_not_trained():
    rows = [
        pair([turn("assistant", "", tool_calls=[call("weather", {"city": "Oslo"})])],
             tools=[{"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}]),
        pair([turn("assistant", "", tool_calls=[call("stock", {"ticker": "ACME"})])],
             tools=[{"name": "stock", "parameters": {"properties": {"ticker": {"type": "string"}}}}]),
    ]  # fmt: skip
    tokenizer = letters(TOOLS)
    tokenized = tokenize(Dataset.from_list(rows), tokenizer, None, eos_ids(tokenizer)).dataset
    for row in tokenized:
        assert "null" not in tokenizer.decode(row["prompt_ids"] + row["chosen_ids"])
    assert '"arguments": {"city": "Oslo"}' in tokenizer.decode(tokenized[0]["chosen_ids"])


# ---- what is refused, by row

REFUSED = {
    "user": (pair([turn("user", "Pear.")]), "'chosen' begins with a user turn, which is the prompt's"),
    "tool last": (pair([turn("assistant", "a"), turn("tool", "b")]), "'chosen' ends with a tool turn"),
    "a strange role": (pair([turn("bard", "Pear.")]), "message 1 of 'chosen' has the role 'bard'"),
    "a strange role asks": (pair(prompt=[turn("muse", "Hi")]), "message 1 of 'prompt' has the role 'muse'"),
    "no turn": (pair([]), "'chosen' is an empty list"),
    "no prompt": (pair(prompt=[]), "'prompt' is an empty list"),
    "null content": (pair([turn("assistant", None)]), "message 1 of 'chosen' has no content"),
    "null column": (pair() | {"rejected": None}, "'rejected' is empty"),
    "number": (pair() | {"prompt": 7}, "'prompt' is 7; text or messages needed"),
    "no message": (pair(["Pear."]), "'chosen' is a list of 1 texts"),
    "picture": (pair([turn("assistant", [{"type": "image"}])]), "has a content part of type 'image'"),
    "half a character": (pair("ok \ud83d"), "message 1 of 'chosen' holds half of a surrogate pair"),
    "rendered": (pair(prompt="<|im_start|>user\nHi<|im_end|>\n"), "a chat template has already been applied to it"),
    "rendered for Llama": (pair(prompt="<s>[INST] Hi [/INST]"), "a chat template has already been applied to it"),
    "rendered by this template": (pair(prompt="<|start|>user\nHi<|end|>\n<|start|>assistant\n"),
                                  "message 1 of 'prompt' begins with '<|start|>user': a chat template has already"),
    "an answer that is rendered": (pair("<|start|>assistant\nPear."), "message 1 of 'chosen' begins with '<|start|>a"),
    "an end in the text": (pair("Pear.<|end|>\n"), "end of turn twice: the text of 'chosen' ends with it"),
    "tools": (pair(tools="look it up"), "'tools' is not JSON"),
    "a turn after the end of text": ({"prompt": "<|start|>user\nHi<|end|>\n", "chosen": "a<|end|>b", "rejected": "c"},
                                     "'chosen' goes on after the end of turn <|end|>"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_row_that_cannot_be_trained_is_refused_in_its_own_words(case):
    row, reason = REFUSED[case]
    assert reason in refusal(row)


def test_a_text_prompt_of_which_no_token_is_left_is_refused():
    row = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    reason = r"row 1: no token of the prompt is left, .* \('QA'\); begin the answers with a space or a line break"
    tokenizer = letters(merged="QA")
    with pytest.raises(UserError, match=reason):
        tokenize(Dataset.from_list([row | {"prompt": "P"}, row]), tokenizer, None, eos_ids(tokenizer))


def test_messages_without_a_chat_template_are_refused_in_plain_words():
    assert refusal(pair(), None) == (
        "messages need a chat template, and the tokenizer has none; give it one, or rows of text"
    )


def test_text_that_only_resembles_a_rendered_chat_or_json_messages_is_trained():
    assert not encoded(pair('[{"role": "user", "content": "a"}]', "no idea"))["_verdict"]
    assert not encoded(pair(prompt="<|im_start|> is what?"))["_verdict"]
    assert not encoded(pair(prompt="[INST] is what?"))["_verdict"]
    assert not encoded(pair("<|end|> ends a turn.", prompt="<|start|> or <|end|>?"))["_verdict"]


def test_a_text_that_this_template_has_been_applied_to_is_refused_in_any_family():
    granite = CHATML.replace("<|start|>", "<|call|>").replace("\n{{", "<|tool|>{{")
    message = refusal(pair(prompt="<|call|>user<|tool|>Hi<|end|>\n<|call|>assistant<|tool|>"), granite)
    assert "message 1 of 'prompt' begins with '<|call|>user<|tool|>': a chat template has already" in message


@pytest.mark.parametrize(
    "text",
    ["<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>", "<｜User｜>Hi", "<|start_of_role|>user<|end_of_role|>Hi",
     "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi", "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHi",
     "[gMASK]<sop><|user|>\nHi", "<extra_id_0>System\nBe kind.\n<extra_id_1>User\nHi"],
)  # fmt: skip
def test_a_text_that_another_familys_template_has_been_applied_to_is_refused(text):
    assert "a chat template has already been applied to it" in refusal(pair(prompt=text))
    assert not encoded(pair(prompt=f"What is {text}?"))["_verdict"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (PICKY, "the chat template does not take the turns system, user: no system turn, please"),
        ("{{ messages.append('x') }}" + CHATML, "the chat template does not take the turns system, user: "),
        ("{{ messages[0]['content'] + nothing }}" + CHATML, "'nothing' is undefined"),
        ("{% if %}" + CHATML, "the chat template does not take"),
    ],
    ids=["its own", "sandbox", "undefined", "syntax"],
)
def test_an_error_of_a_template_is_one_line_with_the_row(template, reason):
    row = pair(prompt=[turn("system", "Be kind."), turn("user", "Hi")])
    tokenizer = letters(template)
    with pytest.raises(UserError) as error:
        tokenize(Dataset.from_list([row] * 2), tokenizer, None, eos_ids(tokenizer))
    assert reason in str(error.value)
    assert str(error.value).startswith("train dataset, 2 of 2 rows; first row 0: ")
    assert "\n" not in str(error.value)


def test_a_stream_of_rows_is_encoded_as_a_dataset_is():
    tokenizer, rows = (
        letters(),
        [pair(), pair("Plum.", [turn("assistant", "a"), turn("user", "b"), turn("assistant", "c")])],
    )
    arguments = {"tokenizer": tokenizer, "eos": [tokenizer.eos_token_id], "max_length": None}
    stream = list(IterableDataset.from_generator(lambda: iter(rows)).map(encode, fn_kwargs=arguments))
    dataset = tokenize(Dataset.from_list(rows), tokenizer, None, eos_ids(tokenizer)).dataset
    for column in ("prompt_ids", "chosen_ids", "rejected_ids", "rejected_mask"):
        assert [row[column] for row in stream] == dataset[column][:]


def test_notes_say_how_many_rows_they_are_about_and_which_is_the_first():
    rows = [pair(), pair([turn("assistant", "12", reasoning_content="3 * 4")]), pair("<|start|>")]
    tokenizer = letters(CHATML.replace("<|end|>\n", "<|end|>"))
    assert tokenize(Dataset.from_list(rows), tokenizer, None, eos_ids(tokenizer)).notes == [
        "train: the chat template leaves out thoughts of an answer in 1 of 3 rows (first: row 1); they are not trained",
        "train: 1 of 3 rows (first: row 2) hold the text of a control token, which is encoded as text",
    ]


def test_pairs_that_differ_only_in_text_that_the_template_leaves_out_are_reported():
    rows = [pair("<think>a</think>12", "<think>b</think>12")] * 2
    tokenizer = letters(NO_THOUGHTS)
    with pytest.raises(UserError, match=r"in 2 of 2 pairs .*in 2 of them once the chat template has left out text"):
        tokenize(Dataset.from_list(rows), tokenizer, None, eos_ids(tokenizer))


def test_if_all_answers_are_equal_nothing_else_is_reported():
    with pytest.raises(UserError, match="train dataset: no pair is left to train on: train: chosen is equal"):
        tokenize(Dataset.from_list([pair("Pear.", "Pear.")] * 2), letters(), None, eos_ids(letters()))


DATED = "<|start|>system\n{{ strftime_now('%d %b %Y') }}<|end|>\n" + CHATML


@pytest.mark.parametrize("template", [DATED, DATED.replace("{% for", "{{ bos_token or '' }}{% for")])
def test_a_template_writes_the_day_that_it_is_given(template):
    tokenizer = letters(template)
    ids = encode(pair(), tokenizer, [tokenizer.eos_token_id], None, day="2024-02-29")
    assert tokenizer.decode(ids["prompt_ids"]).startswith("<|start|>system\n29 Feb 2024<|end|>\n")
    assert trained(ids, "chosen", tokenizer) == ["Pear.<|end|>"]


def test_a_day_is_no_time_of_day():
    ticking = letters(DATED.replace("%d %b %Y", "%f"))
    row = encode(pair(), ticking, [ticking.eos_token_id], None, day="2024-02-29")
    assert "the chat template writes a time that changes with each rendering" in row["_verdict"]
    hourly = letters(DATED.replace("%d %b %Y", "%Y %Hh"))
    row = encode(pair(), hourly, [hourly.eos_token_id], None, day="1999-02-28")
    assert "1999" not in hourly.decode(row["prompt_ids"])


@pytest.mark.parametrize("name", ["llama3_2", "gptoss"])
def test_templates_of_model_families_write_the_day_that_they_are_given(name):
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    tokenizer = letters(template)
    tokenizer.bos_token = "<|call|>"
    written = {}
    for day in ("2024-02-29", "2024-03-01"):
        row = encode(pair(), tokenizer, [tokenizer.eos_token_id], None, day=day)
        written[day] = tokenizer.decode(row["prompt_ids"] + row["chosen_ids"])
    assert ("29 Feb 2024" if name == "llama3_2" else "2024-02-29") in written["2024-02-29"]
    assert ("01 Mar 2024" if name == "llama3_2" else "2024-03-01") in written["2024-03-01"]


def test_a_row_may_bring_its_own_date():
    tokenizer = letters("{{ date_string or strftime_now('%Y') }}" + CHATML)
    row = pair(chat_template_kwargs={"date_string": "26 Jul 2024"})
    ids = encode(row, tokenizer, [tokenizer.eos_token_id], None, day="1999-01-01")
    assert tokenizer.decode(ids["prompt_ids"]).startswith("26 Jul 2024")


def test_only_a_template_that_writes_a_date_is_tokenised_again_for_another_day():
    def cached(template, day):
        tokenizer = letters(template)
        return tokenize(Dataset.from_list([pair()] * 2), tokenizer, None, eos_ids(tokenizer), day=day).dataset

    first, second = (cached(CHATML, day)._fingerprint for day in ("2024-02-29", "2024-03-01"))
    assert first == second
    first, second = (cached(DATED, day) for day in ("2024-02-29", "2024-03-01"))
    assert first._fingerprint != second._fingerprint
    assert first["prompt_ids"][:] != second["prompt_ids"][:]


def test_a_row_alone_and_in_a_dataset_has_the_same_ids():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    rows = [
        {"question": "what is one", "chosen": "one", "rejected": "two", "system": "a"},
        {"conversations": [{"from": "human", "value": "one plus one"}], "chosen": "two", "rejected": "a",
         "tools": json.dumps([{"type": "function", "function": {"name": "add", "description": "plus"}}])},
        {"prompt": [{"role": "user", "content": "one plus one"}], "rejected": "one", "chosen": [
            {"role": "assistant", "content": None, "tool_calls": [call], "name": "a"},
            {"role": "tool", "content": "two"}, {"role": "assistant", "content": "is two"}]},
    ]  # fmt: skip
    template = (
        "{{ tools | tojson if tools else '' }}{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['name'] or '' }}"
        "{% for c in m['tool_calls'] or [] %}{{ c | tojson }}{% endfor %}{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    tokenizer = letters(template)
    texts = [
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()} for row in rows
    ]
    texts = [dict.fromkeys(key for row in rows for key in row) | row for row in texts]
    dataset = tokenize(Dataset.from_list(texts), tokenizer, None, eos_ids(tokenizer)).dataset
    for row, ids in zip(rows, dataset, strict=True):
        alone = encode(row, tokenizer, sorted(eos_ids(tokenizer)), None)
        assert not alone["_verdict"]
        for name in (*ID_COLUMNS, "chosen_mask", "rejected_mask"):
            assert ids[name] == alone[name]
