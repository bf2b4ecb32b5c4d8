"""One reader for preference rows: each row by itself, every format into one, and what is repaired is counted."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from datasets import Dataset

from clair.core.errors import UserError
from clair.data.preference_rows import read_row
from clair.data.preferences import read_dataset, restore_row
from clair.data.row_formats import repair_note


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


TURNS = {"prompt": [user("Who sews?")], "chosen": [assistant("A tailor.")], "rejected": [assistant("A miller.")]}
IMPLICIT = {side: TURNS["prompt"] + TURNS[side] for side in ("chosen", "rejected")}
LONG = [user("Who sews?"), assistant("A tailor."), user("And mends shoes?")]
FLAT = {"prompt": "Who sews?", "chosen": "A tailor.", "rejected": "A miller."}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "CET"}}}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]


def sharegpt(*texts):
    return [{"from": who, "value": text} for who, text in zip(("human", "gpt") * 2, texts, strict=False)]


# name: (row, what it is read as, what was repaired)
READ = {
    "messages": (TURNS, TURNS, []),
    "text": (FLAT, TURNS, []),
    "implicit": (IMPLICIT, TURNS, []),
    "a prompt column that repeats the first turn": (
        {"prompt": "Who sews?", "chosen": [*LONG, assistant("A cobbler.")], "rejected": [*LONG, assistant("Nobody.")]},
        {"prompt": LONG, "chosen": [assistant("A cobbler.")], "rejected": [assistant("Nobody.")]}, ["repeated"],
    ),
    "a prompt column that repeats the last question": (
        {"prompt": "And mends shoes?", "chosen": [*LONG, assistant("A")], "rejected": [*LONG, assistant("B")]},
        {"prompt": LONG, "chosen": [assistant("A")], "rejected": [assistant("B")]}, ["repeated"],
    ),
    "a prompt column with a system turn more": (
        {"prompt": [system("Be brief."), user("Who sews?")], **IMPLICIT},
        {**TURNS, "prompt": [system("Be brief."), user("Who sews?")]}, ["repeated"],
    ),
    "a prompt column that differs by blanks": ({"prompt": " Who sews?\n", **IMPLICIT}, TURNS, ["blanks"]),
    "copies of the question that differ by blanks": (
        {"chosen": IMPLICIT["chosen"], "rejected": [user("Who sews? "), assistant("A miller.")]}, TURNS, ["blanks"],
    ),
    "one answer that repeats the prompt": ({**TURNS, "chosen": IMPLICIT["chosen"]}, TURNS, ["repeated"]),
    "texts that repeat the prompt": (
        {"prompt": "Who sews?", "chosen": "Who sews? A tailor.", "rejected": "Who sews?\nA miller."}, TURNS,
        ["repeated"],
    ),
    "a transcript": (
        {"chosen": "\n\nHuman: Who sews?\n\nAssistant: A tailor.",
         "rejected": "\n\nHuman: Who sews?\n\nAssistant: A miller."}, TURNS, ["transcript"],
    ),
    "a transcript of Windows": (
        {side: f"\r\n\r\nHuman: Who sews?\r\n\r\nAssistant: {TURNS[side][0]['content']}"
         for side in ("chosen", "rejected")}, TURNS, ["transcript"],
    ),
    "a transcript with an empty answer": (
        {"chosen": "\n\nHuman: Who sews?\n\nAssistant: A tailor.", "rejected": "\n\nHuman: Who sews?\n\nAssistant:"},
        {**TURNS, "rejected": [assistant("")]}, ["transcript"],
    ),
    "an empty prompt column beside whole conversations": ({"prompt": "", **IMPLICIT}, TURNS, []),
    "a call of ShareGPT": (
        {"conversations": [{"from": "human", "value": "Who sews?"}, {"from": "observation", "value": "nine"},
                           {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "CET"}}'},
                           {"from": "observation", "value": "nine"}], "chosen": "A tailor.", "rejected": "A miller."},
        {**TURNS, "prompt": [user("Who sews?"), {"role": "tool", "content": "nine"}, assistant("", tool_calls=[CALL]),
                             {"role": "tool", "content": "nine"}]}, [],
    ),
    "OpenAI's preference format": (
        {"input": {"messages": TURNS["prompt"], "tools": TOOLS}, "preferred_output": TURNS["chosen"],
         "non_preferred_output": TURNS["rejected"]}, {**TURNS, "tools": TOOLS}, [],
    ),
    "a transcript as the prompt": (
        {"prompt": "\n\nHuman: Who sews?\n\nAssistant:", "chosen": " A tailor.", "rejected": " A miller."}, TURNS,
        ["transcript"],
    ),
    "a transcript with headings": (
        {"chosen": "### Human: Who sews?\n### Assistant: A tailor.",
         "rejected": "### Human: Who sews?\n### Assistant: A miller."}, TURNS, ["transcript"],
    ),
    "earlier answers that differ by blanks": (
        {"chosen": [*LONG, assistant("A")], "rejected": [LONG[0], assistant("A tailor.\n"), LONG[2], assistant("B")]},
        {"prompt": LONG, "chosen": [assistant("A")], "rejected": [assistant("B")]}, ["blanks"],
    ),
    "speaker and text": (
        {"chosen": [{"speaker": "user", "text": "Who sews?"}, {"speaker": "bot", "text": "A tailor."}],
         "rejected": [{"speaker": "user", "text": "Who sews?"}, {"speaker": "bot", "text": "A miller."}]}, TURNS, [],
    ),
    "a context beside the question": (
        {**FLAT, "context": "It was in Rome."}, TURNS, ["unread:context"],
    ),
    "another conversation beside the prompt": (
        {**FLAT, "messages": [user("Who bakes?"), assistant("A baker.")]}, TURNS, ["unread:messages"],
    ),
    "question": ({"question": "Who sews?", "chosen": "A tailor.", "rejected": "A miller."}, TURNS, []),
    "question and system": (
        {"system": "Be brief.", "question": "Who sews?", "chosen": "A tailor.", "rejected": "A miller."},
        {**TURNS, "prompt": [system("Be brief."), user("Who sews?")]}, ["system"],
    ),
    "a system_message column": (
        {**FLAT, "system_message": "Be brief."}, {**TURNS, "prompt": [system("Be brief."), *TURNS["prompt"]]},
        ["system"],
    ),
    "documents beside the prompt": (
        {**TURNS, "documents": [{"title": "Trades"}]}, TURNS, ["unread:documents"],
    ),
    "functions that the prompt has": (
        {**FLAT, "functions": "sews"}, TURNS, [],
    ),
    "a conversation as Python writes it that the prompt has": (
        {**TURNS, "conversation": "[{'input': 'Who sews?', 'output': 'A tailor.'}]"}, TURNS, [],
    ),
    "an empty system column": ({**FLAT, "system": ""}, TURNS, []),
    "a system column that is in the messages": (
        {**TURNS, "prompt": [system("Be brief."), user("Who sews?")], "system": "Be brief."},
        {**TURNS, "prompt": [system("Be brief."), user("Who sews?")]}, [],
    ),
    "a system column beside another system turn": (
        {**TURNS, "prompt": [system("Be brief."), user("Who sews?")], "system": "Be loud."},
        {**TURNS, "prompt": [system("Be brief."), user("Who sews?")]}, ["unread:system"],
    ),
    "instruction and input": (
        {"instruction": "Double it.", "input": "4", "chosen": "8", "rejected": "9"},
        {"prompt": [user("Double it.\n\n4")], "chosen": [assistant("8")], "rejected": [assistant("9")]}, ["input"],
    ),
    "input alone": ({"input": "Who sews?", "chosen": "A tailor.", "rejected": "A miller."}, TURNS, []),
    "history": (
        {"instruction": "And mends shoes?", "history": [["Who sews?", "A tailor."]], "chosen": "A", "rejected": "B"},
        {"prompt": LONG, "chosen": [assistant("A")], "rejected": [assistant("B")]}, ["history"],
    ),
    "history as messages": (
        {"question": "And mends shoes?", "history": LONG[:2], "chosen": "A", "rejected": "B"},
        {"prompt": LONG, "chosen": [assistant("A")], "rejected": [assistant("B")]}, ["history"],
    ),
    "another question beside the prompt": ({**FLAT, "question": "What is this?"}, TURNS, ["unread:question"]),
    "sharegpt": (
        {"conversations": sharegpt("Who sews?"), "chosen": sharegpt("", "A tailor.")[1],
         "rejected": sharegpt("", "A miller.")[1]}, TURNS, [],
    ),
    "sharegpt, whole": (
        {"chosen": sharegpt("Who sews?", "A tailor."), "rejected": sharegpt("Who sews?", "A miller.")}, TURNS, [],
    ),
    "messages beside answers as text": (
        {"messages": [user("Who sews?"), assistant("A tailor.")], "chosen": "A tailor.", "rejected": "A miller."},
        TURNS, [],
    ),
    "messages of the chosen answer beside the prompt": ({**FLAT, "messages": IMPLICIT["chosen"]}, TURNS, []),
    "a single message": ({"prompt": TURNS["prompt"][0], "chosen": TURNS["chosen"][0], "rejected": "A miller."},
                         TURNS, []),
    "JSON text": ({name: json.dumps(turns) for name, turns in TURNS.items()}, TURNS, []),
    "JSON text of JSON text": ({name: json.dumps(json.dumps(turns)) for name, turns in TURNS.items()}, TURNS, []),
    "JSON text of messages as JSON text": (
        {name: json.dumps([json.dumps(turn) for turn in turns]) for name, turns in TURNS.items()}, TURNS, [],
    ),
    "messages with text as Python's own text": (
        {**FLAT, "prompt": "[{'role': 'prompter', 'text': 'Who sews?'}]"}, TURNS, ["roles"],
    ),
    "a speaker as JSON text": ({**FLAT, "prompt": '[{"speaker": "user", "text": "Who sews?"}]'}, TURNS, []),
    "an answer with a role and a text": (
        {**FLAT, "chosen": '{"role": "tailor", "text": "Hm."}'},
        {**TURNS, "chosen": [assistant('{"role": "tailor", "text": "Hm."}')]}, [],
    ),
    "texts around the question": ({**FLAT, "context": ["Tailors sew.", "Who"]}, TURNS, ["unread:context"]),
    "texts that the question has": ({**FLAT, "context": ["Who", "sews?"]}, TURNS, []),
    "an answer in quotes": (
        {**FLAT, "chosen": '"A \'role\': tailor."'}, {**TURNS, "chosen": [assistant('"A \'role\': tailor."')]}, [],
    ),
    "Python's own text": ({name: repr(turns) for name, turns in TURNS.items()}, TURNS, []),
    "an answer that is JSON": (
        {**FLAT, "chosen": '{"role": "tailor", "name": "Ann"}', "rejected": "[1, 2]"},
        {**TURNS, "chosen": [assistant('{"role": "tailor", "name": "Ann"}')], "rejected": [assistant("[1, 2]")]}, [],
    ),
    "content in parts": (
        {**TURNS, "prompt": [user([{"type": "text", "text": "Who "}, {"type": "text", "text": "sews?"}])]}, TURNS, [],
    ),
    "role names": (
        {"chosen": [{"role": "Human", "content": "Who sews?"}, {"role": "Bot", "content": "A tailor."}],
         "rejected": [{"role": "human", "content": "Who sews?"}, {"role": "AI", "content": "A miller."}]},
        TURNS, ["roles"],
    ),
    "columns of other names": (
        {"prompt": "Who sews?", "chosen_response": "A tailor.", "rejected_response": "A miller."}, TURNS, [],
    ),
    "no content beside tool calls": (
        {**TURNS, "chosen": [{"role": "assistant", "tool_calls": [CALL]}]},
        {**TURNS, "chosen": [assistant("", tool_calls=[CALL])]}, [],
    ),
    "null content beside tool calls": (
        {**TURNS, "chosen": [assistant(None, tool_calls=[CALL], name=None)]},
        {**TURNS, "chosen": [assistant("", tool_calls=[CALL])]}, [],
    ),
    "arguments and calls as JSON text": (
        {**TURNS, "chosen": [assistant("", tool_calls=json.dumps(
            [{"type": "function", "function": {"name": "clock", "arguments": '{"zone": "CET"}'}}]))]},
        {**TURNS, "chosen": [assistant("", tool_calls=[CALL])]}, [],
    ),
    "tools as Python's own text": ({**TURNS, "tools": repr(TOOLS)}, {**TURNS, "tools": TOOLS}, []),
    "tools as JSON text": ({**TURNS, "tools": json.dumps(TOOLS)}, {**TURNS, "tools": TOOLS}, []),
    "no tools": ({**TURNS, "tools": []}, TURNS, []),
    "an answer of several turns": (
        {**TURNS, "chosen": [assistant("", tool_calls=[CALL]), {"role": "tool", "content": "9", "name": "clock"},
                             assistant("Nine.")]},) * 2 + ([],),
    "text that nothing asks for": (
        {"chosen": "Wool is warm.", "rejected": "Wool is cold."},
        {"prompt": "Wool is", "chosen": " warm.", "rejected": " cold."}, [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_a_row_of_this_form_is_read(case):
    row, expected, repairs = READ[case]
    assert read_row({"id": 7, **row}, keep_nulls=True) == ({"id": 7, **expected}, repairs)
    for repair in repairs:
        assert repair_note(repair)


@pytest.mark.parametrize("case", READ)
def test_rows_read_from_a_dataset_are_read_unchanged(case):
    row, expected, repairs = READ[case]
    read = read_dataset(Dataset.from_list([{"id": 7, **row}]), "dataset d")
    assert [note.split("rows ")[1] for note in read.notes] == [repair_note(repair) for repair in repairs]
    assert restore_row(read.dataset[0]) == {"id": 7, **expected}
    again = read_dataset(read.dataset, "dataset d", keep_text=True)
    assert again.notes == []
    assert again.dataset.to_list() == read.dataset.to_list()
    assert read_row(again.dataset[0], keep_text=True) == ({"id": 7, **expected}, [])


def test_unpaired_rows_are_read():
    row = {"prompt": "Who sews?", "completion": json.dumps([{"from": "gpt", "value": "A tailor."}]), "label": True}
    read = {"prompt": [user("Who sews?")], "completion": [assistant("A tailor.")], "label": True}
    assert read_row(row) == (read, [])


def test_plain_text_stays_text_where_that_is_requested_and_all_of_it_is():
    assert read_row(FLAT, keep_text=True) == (FLAT, [])
    assert read_row({**FLAT, "context": "Trades."}, keep_text=True) == (FLAT, ["unread:context"])
    assert read_row({**FLAT, "documents": ["Trades."]}, keep_text=True) == (FLAT, ["unread:documents"])
    with_system = {**FLAT, "system": "Be brief."}
    assert read_row(with_system, keep_text=True)[0]["prompt"] == [system("Be brief."), user("Who sews?")]
    both = Dataset.from_list([{**FLAT, "system": text} for text in ("", "Be brief.")])
    assert [len(row["prompt"]) for row in read_dataset(both, "d", keep_text=True).dataset] == [1, 2]


# name: (row, the words of the error)
REFUSED = {
    "an empty answer": ({**FLAT, "chosen": None}, "'chosen' is empty"),
    "an empty prompt": ({**TURNS, "prompt": []}, "'prompt' is an empty list"),
    "a blank turn": ({**TURNS, "prompt": [user(" ")]}, "'prompt' is empty"),
    "a turn without parts": ({**TURNS, "prompt": [user([])]}, "message 1 of 'prompt' has no content"),
    "a blank prompt": ({**FLAT, "prompt": " "}, "'prompt' is empty"),
    "no prompt": ({name: TURNS[name] for name in ("chosen", "rejected")}, "there is no prompt: no column 'prompt'"),
    "nothing shared": ({"chosen": "Red", "rejected": "Blue"}, "share no beginning"),
    "no turn shared": (
        {side: [system(side), *IMPLICIT[side]] for side in ("chosen", "rejected")},
        "'chosen' begins with the system turn 'chosen' and 'rejected' with the system turn 'rejected'",
    ),
    "another prompt": ({"prompt": "Who bakes?", **IMPLICIT}, "the prompt ends with the user turn 'Who bakes?'"),
    "a user turn as an answer": ({**TURNS, "rejected": [user("No.")]}, "'rejected' begins with a user turn"),
    "an answer that ends with a user turn": (
        {**TURNS, "chosen": [assistant("A"), user("B")]}, "'chosen' ends with a user turn",
    ),
    "a role of another kind": ({**TURNS, "chosen": [{"role": "bard", "content": "A"}]}, "has the role 'bard'"),
    "no role": ({**TURNS, "chosen": [{"text": "A"}]}, "message 1 of 'chosen' has no role; keys found: text"),
    "no content": ({**TURNS, "chosen": [assistant(None)]}, "message 1 of 'chosen' has no content"),
    "content that is a number": ({**TURNS, "chosen": [assistant(7)]}, "has content 7"),
    "an image": ({**TURNS, "prompt": [user([{"type": "image", "text": None}])]}, "content part of type 'image'"),
    "a part without text": ({**TURNS, "prompt": [user([{"type": "text", "text": None}])]}, "whose text is None"),
    "several answers": ({**FLAT, "rejected": ["A miller.", "A baker."]}, "'rejected' is a list of 2 texts"),
    "a number": ({**FLAT, "rejected": 4}, "'rejected' is 4"),
    "half of a surrogate pair": ({**FLAT, "chosen": "ok \ud83d"}, "'chosen' holds half of a surrogate pair"),
    "several answers as conversations": (
        {**TURNS, "rejected": [TURNS["rejected"]] * 2}, "'rejected' is a list of 2 conversations; one list of messages",
    ),
    "an array as numpy writes it": (
        {**FLAT, "chosen": "array([{'role': 'assistant', 'content': 'A'}], dtype=object)"}, "looks like messages, but",
    ),
    "messages that are no JSON": ({**FLAT, "chosen": '[{"role": "assistant", "content": A}]'}, "but is not JSON"),
    "history that is no list": ({**FLAT, "history": 5}, "'history' is 5; a list of [question, answer] needed"),
    "tools that are no JSON": ({**TURNS, "tools": "[{"}, "'tools' is not JSON"),
    "a call without a name": (
        {**TURNS, "chosen": [assistant("", tool_calls=[{"type": "function"}])]}, "a call without the name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("keep_text", [False, True])
def test_a_row_that_cannot_be_read_says_why(case, keep_text):
    row, reason = REFUSED[case]
    with pytest.raises(UserError) as error:
        read_row(row, keep_text=keep_text)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [{}, {"arguments": None}, {"arguments": ""}, {"arguments": "{}"}])
def test_a_call_without_arguments_has_none(arguments):
    row = {**TURNS, "chosen": [assistant("", tool_calls=[{"function": {"name": "clock", **arguments}}])]}
    assert read_row(row)[0]["chosen"][0]["tool_calls"] == [{"function": {"name": "clock", "arguments": {}}}]


def test_documents_beside_clean_pairs_are_noted():
    rows = [{**TURNS, "documents": text} for text in ("Trades.", None)]
    assert read_dataset(Dataset.from_list(rows), "d").notes == [f"1 of 2 rows {repair_note('unread:documents')}"]


def test_each_row_is_read_by_itself_and_the_first_at_fault_is_named():
    rows = [{"id": f"r{number}", **row} for number, row in enumerate([TURNS, {**TURNS, **IMPLICIT}, TURNS])]
    read = read_dataset(Dataset.from_list(rows), "dataset d")
    assert read.notes == [f"1 of 3 rows {repair_note('repeated')}"]
    assert [row["chosen"] for row in read.dataset] == [TURNS["chosen"]] * 3
    rows[2] = {**rows[2], "rejected": [user("No.")]}
    with pytest.raises(UserError, match=r"^dataset d, row 2 \(id r2\): 'rejected' begins with a user turn"):
        read_dataset(Dataset.from_list(rows), "dataset d")


def test_nulls_that_arrow_adds_are_not_read():
    """In a table each object has the keys of all, null where it has none."""
    second_call = {"type": "function", "function": {"name": "map", "arguments": {"town": "Rome", "zoom": 3}}}
    tools = [[{"type": "function", "function": {"name": name, "parameters": {"properties": {key: {"type": "string"}}}}}]
             for name, key in (("clock", "zone"), ("map", "town"))]  # fmt: skip
    rows = [{**TURNS, "chosen": [assistant("", tool_calls=[call])], "tools": some}
            for call, some in zip((CALL, second_call), tools, strict=True)]  # fmt: skip
    table = Dataset(pa.Table.from_pylist(rows))
    assert table[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"] == {
        "zone": "CET",
        "town": None,
        "zoom": None,
    }
    read = read_dataset(table, "dataset d").dataset
    assert [read_row(row)[0] for row in read] == [restore_row(row) for row in read] == rows
    assert [read_row(row)[0] for row in table] == rows


def test_clean_pairs_are_taken_as_they_are():
    pairs = Dataset.from_list([TURNS] * 3)
    with pytest.raises(UserError, match="row 1: 'prompt' is empty"):
        read_dataset(Dataset.from_list([TURNS, {**TURNS, "prompt": [user("")]}]), "d")
    assert read_dataset(pairs, "d").dataset is pairs
    assert read_dataset(pairs.select([2, 0]), "d").notes == []
    for spoilt in ({**TURNS, **IMPLICIT}, {**TURNS, "prompt": [*TURNS["prompt"], {"role": "Human", "content": "a"}]}):
        assert read_dataset(Dataset.from_list([TURNS, spoilt]), "d").notes
