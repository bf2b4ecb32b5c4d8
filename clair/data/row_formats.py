"""The formats of preference rows that are read: names of columns, roles and keys; and the notes on repaired rows.

docs/format.md describes the formats.
"""

from __future__ import annotations

COLUMNS = ("prompt", "chosen", "rejected")
UNPAIRED_COLUMNS = ("prompt", "completion", "label")
ROLES = ("system", "developer", "user", "assistant", "tool")

ROLE_NAMES = {
    **{name: name for name in ROLES},
    **dict.fromkeys(("human", "prompter", "instruction", "question"), "user"),
    **dict.fromkeys(("gpt", "bot", "chatgpt", "model", "ai", "chatbot", "llm", "agent", "function_call"), "assistant"),
    **dict.fromkeys(("function", "ipython", "observation", "tool_response", "function_response"), "tool"),
}
"""Role names of other formats, and the standard role of each."""
PROMPT_TEXT_COLUMNS = ("prompt", "question", "instruction", "query")
CONVERSATION_COLUMNS = ("conversations", "conversation", "messages", "context", "trajectory", "dialogue", "dialog")
ALIASES = {
    "chosen": ("chosen_response", "preferred_output", "answer_matching_behavior"),
    "rejected": ("rejected_response", "non_preferred_output", "answer_not_matching_behavior"),
    "system": ("system_prompt", "system_message", "system_instruction"),
}
DOCUMENT_COLUMNS = ("documents", "functions")
"""Columns of other formats that are no part of a conversation here; rows that have them get a note."""
CONSUMED_COLUMNS = (
    *("prompt", "chosen", "rejected", "completion", "question", "instruction", "query", *CONVERSATION_COLUMNS),
    *(*DOCUMENT_COLUMNS, "input", "system", "history", "tools", "chat_template_kwargs"),
    *(alias for aliases in ALIASES.values() for alias in aliases),
)
"""The columns that a preference row is read from. All other columns are copied."""

_NOTES = {
    "repeated": "repeated the prompt in their answers; read once",
    "blanks": "have copies of the prompt that differ by white space at their ends; read once",
    "roles": "name roles otherwise (human, gpt, bot and the like); read as user, assistant, system and tool",
    "transcript": "are transcripts (Human: ... Assistant: ...); read as messages",
    "system": "have a column of system texts; read as the system turn",
    "input": "have a column 'input'; its text stands under the question",
    "history": "have a column 'history'; its turns stand before the question",
}


def repair_note(repair: str) -> str:
    """The note on rows with a repair, to follow "12 of 500 rows "."""
    kind, _, name = repair.partition(":")
    if kind == "unread":
        return f"have a column {name!r} that is neither part of the prompt nor of an answer; not read"
    return _NOTES[kind]
