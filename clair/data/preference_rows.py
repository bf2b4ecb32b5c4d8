"""Read one preference row of any supported format: prompt, chosen and rejected, or prompt and completion.

`read_row` needs nothing but the row, so that a stream can be mapped with it. See docs/format.md for the formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clair.core.errors import UserError
from clair.data.comparison_rows import as_pair
from clair.data.message_reader import (
    CONTENT_KEYS,
    MessageReader,
    Messages,
    excerpt,
    parse_literal,
    require_utf8,
)
from clair.data.row_formats import (
    ALIASES,
    CONSUMED_COLUMNS,
    CONVERSATION_COLUMNS,
    DOCUMENT_COLUMNS,
    PROMPT_TEXT_COLUMNS,
)

_COMPARED_KEYS = ("role", "tool_calls", "tool_call_id", "name", "reasoning_content")


def read_row(
    row: Mapping[str, Any], *, keep_text: bool = False, keep_nulls: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Normalise a preference row of any supported format. Returns it and its repairs (keys of `repair_note`).

    The result has `prompt`, `chosen` and `rejected` (or `prompt`, `completion` and the unchanged label) as lists of
    messages. A message has a standard `role`, `content` (text; "" beside tool calls alone), and its other keys; the
    `arguments` of `tool_calls` are objects. `tools`, if the row has any, is a list of objects, and
    `chat_template_kwargs` an object. The columns that these come from are left out; all others are copied.

    Text without a prompt column stays text: the common prefix of its answers is the prompt (TRL's implicit prompt).
    With `keep_text`, so does a row with TRL's column names that holds plain text. In all other rows a text becomes one
    turn.

    `keep_nulls` keeps nulls inside messages and tools. Without it they are removed, because Arrow adds the keys of all
    other rows as nulls.

    Reading the result again changes nothing. Raises UserError, without the number of the row, if it cannot be read.
    """
    reader = _RowReader(as_pair(row), keep_nulls)
    return reader.read(keep_text), list(dict.fromkeys(reader.repairs))


class _RowReader:
    def __init__(self, row: dict[str, Any], keep_nulls: bool) -> None:
        self.row = row
        self.messages = MessageReader(keep_nulls)
        self.repairs = self.messages.repairs
        self.prompt_column: str | None = None

    def read(self, keep_text: bool) -> dict[str, Any]:
        row = self.row
        for name, aliases in ALIASES.items():
            alias = next((alias for alias in aliases if row.get(name) is None and row.get(alias) is not None), None)
            if alias:
                row[name] = row.pop(alias)
        request = row.get("input")
        if isinstance(request, Mapping) and "messages" in request:  # OpenAI's format for preferences
            row |= {"input": None, "messages": request["messages"]}
            row.setdefault("tools", request.get("tools"))
        unpaired = row.get("chosen") is None and row.get("completion") is not None
        sides = ("completion",) if unpaired else ("chosen", "rejected")
        answers = [self._value(side) for side in sides]
        tools, options = self._tools(), self._template_options()
        texts = [answer for answer in answers if isinstance(answer, str)]
        all_text = len(texts) == len(answers)
        prompt = self._value("prompt") if all_text and keep_text and row.get("prompt") is not None else None
        if all_text and not unpaired and not self._has_prompt():
            result: dict[str, Any] = self._split_implicit_prompt(*texts)
        elif isinstance(prompt, str) and not self._has_context():
            result = dict(zip(("prompt", *sides), self._plain_text(sides, prompt, texts), strict=True))
            self._note_unread(list(result.values()))
        else:
            result = self._conversation(dict(zip(sides, answers, strict=True)))
        copied = {name: value for name, value in row.items() if name not in CONSUMED_COLUMNS}
        objects = {"tools": tools, "chat_template_kwargs": options}
        return {**copied, **result, **{name: value for name, value in objects.items() if value is not None}}

    # ---- columns

    def _value(self, column: str) -> str | Messages:
        value = self.row.get(column)
        if value is None:
            columns = ", ".join(map(str, self.row)) or "none"
            reason = "is empty" if column in self.row else f"is missing; columns found: {columns}"
            raise UserError(f"{column!r} {reason}; text or messages needed")
        return self.messages.read(value, column)

    def _tools(self) -> list[dict[str, Any]] | None:
        value = self.row.get("tools")
        if value is None or value == "":
            return None
        return self.messages.objects(value, "'tools'") or None

    def _template_options(self) -> dict[str, Any] | None:
        value = self.row.get("chat_template_kwargs")
        if value is None or value == "":
            return None
        options = self.messages.parse_json(value, "'chat_template_kwargs'")
        if not isinstance(options, Mapping):
            raise UserError(f"'chat_template_kwargs' is {excerpt(value)}; an object needed")
        return dict(options) or None

    def _has_prompt(self) -> bool:
        names = (*PROMPT_TEXT_COLUMNS, *CONVERSATION_COLUMNS, "input")
        return any(self.row.get(name) is not None for name in names)

    def _has_context(self) -> bool:
        """True if other columns hold text that belongs to the prompt."""
        texts = (self.row.get(name) for name in ("system", "input"))
        return any(isinstance(text, str) and text.strip() for text in texts) or bool(self.row.get("history"))

    # ---- plain text

    def _split_implicit_prompt(self, chosen: str, rejected: str) -> dict[str, str]:
        """Split the prompt from two texts by TRL's rule: it is their common prefix, without a space at its end."""
        if self._has_context():
            self.repairs += [f"unread:{name}" for name in ("system", "history") if self.row.get(name)]
        chosen, rejected = require_utf8(chosen, "'chosen'"), require_utf8(rejected, "'rejected'")
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        if shared and chosen[shared - 1] == " ":
            shared -= 1
        if not chosen[:shared].strip():
            raise UserError(
                f"there is no prompt: no column 'prompt', and 'chosen' ({excerpt(chosen)}) and 'rejected' "
                f"({excerpt(rejected)}) share no beginning; columns found: {', '.join(map(str, self.row))}"
            )
        return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}

    def _plain_text(self, sides: Sequence[str], prompt: str, answers: Sequence[str]) -> tuple[str, ...]:
        """Prompt and answers as text. If every answer begins with the prompt, it is removed from them."""
        if not prompt.strip():
            raise UserError("'prompt' is empty; text needed")
        for column, text in zip(("prompt", *sides), (prompt, *answers), strict=True):
            require_utf8(text, repr(column))
        if all(answer.startswith(prompt) and _repeats_prompt(answer, prompt) for answer in answers):
            self.repairs.append("repeated")
            return prompt, *(answer[len(prompt) :] for answer in answers)
        return prompt, *answers

    # ---- messages

    def _conversation(self, answers: dict[str, str | Messages]) -> dict[str, Messages]:
        """Prompt and answers as messages."""
        includes_prompt = any(isinstance(answer, list) and _includes_prompt(answer) for answer in answers.values())
        prompt = self._prompt(optional=includes_prompt and len(answers) == 2)
        turns = {side: self._answer_turns(side, answer, prompt, answers) for side, answer in answers.items()}
        if len(turns) == 2 and includes_prompt:
            prompt, turns["chosen"], turns["rejected"] = self._split_prompt(prompt, turns["chosen"], turns["rejected"])
        prompt = self._add_system_turn(_drop_repeated_answer(prompt, turns))
        self._check(prompt, turns)
        self._note_unread([turn["content"] for messages in (prompt, *turns.values()) for turn in messages])
        return {"prompt": prompt, **turns}

    def _answer_turns(
        self, side: str, answer: str | Messages, prompt: Messages, answers: Mapping[str, Any]
    ) -> Messages:
        """An answer as messages. A text is one turn; if all answers are text and repeat the question, it is removed."""
        if isinstance(answer, list):
            return answer
        question = prompt[-1]["content"] if prompt else ""
        if all(isinstance(text, str) and _repeats_prompt(text, question) for text in answers.values()):
            self.repairs.append("repeated")
            answer = answer[len(question.strip()) :].lstrip()
        elif "transcript" in self.repairs:  # a text of a transcript follows "Assistant:" and a space
            answer = answer.removeprefix(" ")
        return [{"role": "assistant", "content": require_utf8(answer, repr(side))}]

    def _prompt(self, *, optional: bool) -> Messages:
        """The prompt columns of the row as messages. If they are `optional`, an empty list if there are none."""
        row = self.row
        column = next((name for name in PROMPT_TEXT_COLUMNS if row.get(name) is not None), None)
        if optional and column and (not row[column] or (isinstance(row[column], str) and not row[column].strip())):
            column = None
        if column is None and not optional:
            column = next((name for name in (*CONVERSATION_COLUMNS, "input") if row.get(name) is not None), None)
        if column is None:
            return []
        self.prompt_column = column
        value = self._value(column)
        if isinstance(value, str) and not value.strip():
            raise UserError(f"{column!r} is empty; text or messages needed")
        messages = [{"role": "user", "content": require_utf8(value, repr(column))}] if isinstance(value, str) else value
        for name in (*PROMPT_TEXT_COLUMNS, "input"):
            if name != column:
                messages = self._add_text(messages, name, is_text=isinstance(value, str))
        if history := row.get("history"):
            messages = self._history_turns(history) + messages
            self.repairs.append("history")
        return messages

    def _add_text(self, messages: Messages, column: str, *, is_text: bool) -> Messages:
        """The prompt with the text of another column. `input` goes under a question that is text; others get a note."""
        text = self.row.get(column)
        # A blank text stands in every message.
        if not isinstance(text, str) or any(text.strip() in message["content"] for message in messages):
            return messages
        if column != "input" or not is_text:
            self.repairs.append(f"unread:{column}")
            return messages
        self.repairs.append("input")
        question = messages[-1]["content"]
        return [*messages[:-1], {**messages[-1], "content": f"{question}\n\n{require_utf8(text, 'input')}"}]

    def _history_turns(self, history: Any) -> Messages:
        rounds = self.messages.parse_json(history, "'history'")
        rounds = rounds if isinstance(rounds, list | tuple) else [rounds]
        if all(isinstance(turn, Mapping) for turn in rounds):
            return [self.messages.message(turn, f"message {n} of 'history'") for n, turn in enumerate(rounds, 1)]
        if not all(isinstance(turns, list | tuple) and len(turns) == 2 for turns in rounds) or not all(
            isinstance(text, str) for turns in rounds for text in turns
        ):
            raise UserError(f"'history' is {excerpt(history)}; a list of [question, answer] needed")
        names = ("user", "assistant")
        return [{"role": name, "content": text} for turns in rounds for name, text in zip(names, turns, strict=True)]

    def _add_system_turn(self, prompt: Messages) -> Messages:
        text = self.row.get("system")
        if text is not None and not isinstance(text, str):
            raise UserError(f"'system' is {excerpt(text)}; text needed")
        if not text or not text.strip():
            return prompt
        if prompt and prompt[0]["role"] in ("system", "developer"):
            if text.strip() not in prompt[0]["content"]:
                self.repairs.append("unread:system")
            return prompt
        self.repairs.append("system")
        return [{"role": "system", "content": require_utf8(text, "'system'")}, *prompt]

    def _split_prompt(
        self, prompt: Messages, chosen: Messages, rejected: Messages
    ) -> tuple[Messages, Messages, Messages]:
        """Split the prompt from two whole conversations: it is their common prefix, merged with the prompt column."""
        if prompt and _includes_prompt(chosen) != _includes_prompt(rejected):
            return prompt, self._remove_prompt(prompt, chosen), self._remove_prompt(prompt, rejected)
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and _equal_turns([chosen[shared]], [rejected[shared]]):
            shared += 1
        while shared and chosen[shared - 1]["role"] == "assistant":  # an answer starts where the assistant does
            shared -= 1
        common = chosen[:shared]
        if any(turn["content"] != twin["content"] for turn, twin in zip(common, rejected, strict=False)):
            self.repairs.append("blanks")
        if not shared and not prompt:
            raise UserError(
                f"there is no prompt: 'chosen' begins with {_describe_turn(chosen[0])} and 'rejected' with "
                f"{_describe_turn(rejected[0])}; the two must share their first turns, or a column 'prompt' must hold "
                f"them"
            )
        answers = chosen[shared:], rejected[shared:]
        if not prompt or not shared:
            return prompt or common, *answers
        if _contains_turns(common, prompt):
            self.repairs.append("repeated" if _contains_turns(common, prompt, exactly=True) else "blanks")
            return common, *answers
        if _equal_turns(prompt[-shared:], common):
            self.repairs.append("repeated" if _equal_turns(prompt[-shared:], common, exactly=True) else "blanks")
            return prompt, *answers
        if prompt[-1]["role"] == "assistant" and common[0]["role"] == "user":
            return prompt + common, *answers
        raise UserError(
            f"the prompt ends with {_describe_turn(prompt[-1])}, and the conversations of 'chosen' and 'rejected' "
            f"begin with {_describe_turn(common[0])}; leave the prompt out of one of them, or make the two equal"
        )

    def _remove_prompt(self, prompt: Messages, answer: Messages) -> Messages:
        """An answer without the prompt that it begins with."""
        if len(answer) <= len(prompt) or not _equal_turns(answer[: len(prompt)], prompt):
            return answer
        self.repairs.append("repeated")
        return answer[len(prompt) :]

    # ---- checks

    def _note_unread(self, texts: Sequence[str]) -> None:
        """Note the conversation and document columns that hold a text which `texts` lack."""
        all_text = "\n".join(texts)
        for name in CONVERSATION_COLUMNS:
            value = self.row.get(name) if name != self.prompt_column else None
            if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
                value = parse_literal(value) or value
            if any(text.strip() not in all_text for text in _message_texts(value)):
                self.repairs.append(f"unread:{name}")
        for name in DOCUMENT_COLUMNS:
            value = self.row.get(name)
            if value and not (isinstance(value, str) and value.strip() in all_text):
                self.repairs.append(f"unread:{name}")

    def _check(self, prompt: Messages, answers: Mapping[str, Messages]) -> None:
        if not prompt:
            columns = ", ".join(map(str, self.row))
            raise UserError(f"there is no prompt: no column 'prompt' or 'question'; columns found: {columns}")
        if not any(turn["content"].strip() for turn in prompt):
            raise UserError("'prompt' is empty: no turn of it has text")
        for side, turns in answers.items():
            for turn, end, reason in (
                (turns[0], "begins", "which is the prompt's"),
                (turns[-1], "ends", "which is no answer"),
            ):
                if turn["role"] != "assistant":
                    raise UserError(
                        f"{side!r} {end} with a {turn['role']} turn, {reason}: {excerpt(turn['content'])}; an answer "
                        "is assistant turns, with tool and user turns between them at most"
                    )
            if wrong := next((turn for turn in turns if turn["role"] in ("system", "developer")), None):
                raise UserError(f"{side!r} has a {wrong['role']} turn after the prompt: {excerpt(wrong['content'])}")


def _message_texts(value: Any) -> list[str]:
    """A text, or the texts in a list of texts and messages: only the values of keys that hold content."""
    if isinstance(value, str):
        return [value]
    turns = value if isinstance(value, list | tuple) else [value]
    keys = (*CONTENT_KEYS, "input", "output")
    contents = [turn.get(key) for turn in turns if isinstance(turn, Mapping) for key in keys]
    return [text for text in (*contents, *turns) if isinstance(text, str)]


def _describe_turn(message: Mapping[str, Any]) -> str:
    return f"the {message['role']} turn {excerpt(message['content'])}"


def _includes_prompt(turns: Messages) -> bool:
    """True if messages are a whole conversation: they begin with another turn than the assistant's."""
    return turns[0]["role"] != "assistant"


def _comparison_key(message: Mapping[str, Any], exactly: bool) -> tuple[Any, ...]:
    content = message["content"] if exactly else message["content"].strip()
    return (content, *(message.get(name) for name in _COMPARED_KEYS))


def _equal_turns(turns: Messages, others: Messages, *, exactly: bool = False) -> bool:
    """True if turns are equal. Leading and trailing white space counts only with `exactly`."""
    return [_comparison_key(turn, exactly) for turn in turns] == [_comparison_key(turn, exactly) for turn in others]


def _contains_turns(turns: Messages, sequence: Messages, *, exactly: bool = False) -> bool:
    """True if `turns` contain `sequence` without a gap."""
    starts = range(len(turns) - len(sequence) + 1)
    return any(_equal_turns(turns[start : start + len(sequence)], sequence, exactly=exactly) for start in starts)


def _repeats_prompt(answer: str, prompt: str) -> bool:
    """True if an answer begins with the prompt, and the prompt has more than one word."""
    prompt = prompt.strip()
    return len(prompt.split()) > 1 and answer.startswith(prompt) and answer[len(prompt) : len(prompt) + 1].isspace()


def _drop_repeated_answer(prompt: Messages, turns: Mapping[str, Messages]) -> Messages:
    """The prompt without its last turn if that is one of the answers."""
    repeated = len(prompt) > 1 and any(_equal_turns(prompt[-1:], answer) for answer in turns.values())
    return prompt[:-1] if repeated else prompt
