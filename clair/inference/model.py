"""The protocol of a model (an endpoint, a pool of endpoints, a local model), its errors, and the parsing of replies."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

from clair.core.errors import EXIT_BUDGET, UserError
from clair.data.records import Reply, incomplete_reason, replace_surrogates


class Model(Protocol):
    """A model that completes chats. `request` is the body of a chat completion, without the model's name."""

    name: str
    identity: str
    """The model's part of a ledger key: hash of the weights, `id:` of the recipe, or model name and base URL."""

    async def check(self) -> None:
        """Check that the model is there and takes requests, before anything is spent.

        Raises Refused, and Unreachable with `starting` if the model may be there a little later.
        """

    async def complete(self, request: Mapping[str, Any], sample: int = 0) -> str:
        """Return the raw JSON text of a chat completion. Raises Refused, RequestFailed, RateLimited or Unreachable.

        `sample` is the index among equal requests that need different answers; an endpoint samples anew by itself.
        """
        ...

    async def close(self) -> None:
        """Close the connections, or free the weights."""


class Refused(UserError):
    """The endpoint refuses every request (wrong key, unknown model, no quota left): the run stops at once."""


class PaymentRequired(Refused):
    """The endpoint requires payment: the run stops, and can go on after it."""


class LimitReached(Refused):
    """A rate limit or a quota is used up for longer than `patience`: the run ends, and can go on later."""

    exit_code = EXIT_BUDGET


class RequestFailed(Exception):
    """The endpoint refuses this request for good; other requests go on.

    `moderated`: the content of its prompt is the reason, so that the refusal says nothing about other requests.
    """

    def __init__(self, reason: str, detail: str, raw: str | None = None, *, moderated: bool = False) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.raw = raw
        self.moderated = moderated


class RateLimited(Exception):
    """429: too many requests. `retry_after` is in seconds, None if the server stated none.

    `in_body`: the error came with status 200, and is retried like any error of the server.
    """

    def __init__(self, retry_after: float | None, message: str = "", *, in_body: bool = False) -> None:
        super().__init__(f"429: {message}" if message else "429")
        self.retry_after = retry_after
        self.in_body = in_body


class Unreachable(Exception):
    """A server error, a timeout or a broken connection: the request is tried again.

    `billed`: the request may have been answered and paid for, and the reply was lost. `busy`: the server took too long
    and may be overloaded. `waiting`: it accepted no connection while it answered other requests, which is no failure.
    `starting`: it says that it is not ready yet.
    """

    def __init__(self, message: str, *, billed: bool = False, busy: bool = False, starting: bool = False) -> None:
        super().__init__(message)
        self.billed = billed
        self.busy = busy
        self.waiting = False
        self.starting = starting


def parse_reply(raw: str, *, tools: bool = False) -> Reply:
    """Parse the raw JSON text of a chat completion. Raises RequestFailed if it has no usable reply.

    `tools`: the request has tools, so that a reply may call one.
    Hidden reasoning is separated from the answer, by the server (`reasoning_content`, `reasoning`) or else by
    `split_thinking`.
    """
    try:
        body = json.loads(raw)
        choice = body["choices"][0]
        message = choice["message"]
        content = message.get("content")
        finish = choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise RequestFailed("malformed_reply", f"the reply is no chat completion: {raw[:200]!r}", raw) from error
    content, thinking = _join_blocks(content)
    calls = message.get("tool_calls")
    calls = tuple(calls) if isinstance(calls, list) and all(isinstance(call, dict) for call in calls) else ()
    if message.get("tool_calls") and not (content or (tools and calls)):
        raise RequestFailed("tool_call", "the reply calls a tool and says nothing", raw)
    hidden = next((h for name in _THINKING_KEYS if isinstance(h := message.get(name), str) and h.strip()), thinking)
    text = content if isinstance(content, str) else ""
    if not hidden:  # else the server has separated the two, and the content is the answer
        hidden, text = split_thinking(text)
    text = _strip_marks(text)
    finish = None if finish is None else str(finish)
    if incomplete_reason(finish) == "server_error":
        raise RequestFailed("server_error", f"the server broke off: finish_reason {finish!r}", raw)
    cut_character = replace_surrogates(text) != text or text.rstrip().endswith("\ufffd")
    if cut_character and incomplete_reason(finish, tools=tools) is None:
        raise RequestFailed("malformed_reply", "the reply holds half a character, such as half of an emoji", raw)
    refusal = message.get("refusal")
    refusal = replace_surrogates(refusal) if isinstance(refusal, str) and not text.strip() else ""
    return Reply(
        text=replace_surrogates(text),
        thinking=replace_surrogates(hidden),
        finish_reason="refusal" if refusal else finish,
        refusal=refusal,
        tool_calls=calls,
        usage=_usage(body.get("usage")),
        model=str(body.get("model") or ""),
    )


THINKING_TOKENS = ("<think>", "</think>", "[THINK]", "[/THINK]")
"""Tokens around hidden reasoning; if a tokenizer calls them special, they still mark where the answer begins."""
_THINKING_KEYS = ("reasoning_content", "reasoning")
_THINKING_MARKS = tuple(
    (re.compile(opening, re.IGNORECASE), re.compile(closing, re.IGNORECASE))
    for opening, closing in (
        *((rf"<{name} ?>", rf"</{name} ?>") for name in ("think", "thinking", "thought", "seed:think")),
        (r"\[THINK\]", r"\[/THINK\]"),
        (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
        (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Cohere's
        (r"<\|channel>thought\b", r"<channel\|>"),  # Gemma 4's
        (r"<unused94>thought\b", r"<unused95>"),  # MedGemma's
        ("◁think▷", "◁/think▷"),
    )
)
"""The opening and closing marks of hidden reasoning, by model family."""
_ANY_THINKING_MARK = re.compile("|".join(mark.pattern for pair in _THINKING_MARKS for mark in pair), re.IGNORECASE)
_INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060 \t\r\n\v\f\xa0"
_HARMONY = re.compile(
    r"<\|channel\|>\s*(\w+).*?<\|message\|>(.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)", re.DOTALL
)
_STRIPPED_HARMONY = re.compile(r"analysis(.*?)assistantfinal(.*)", re.DOTALL)
"""The channels if a server strips their marks."""
_END_MARKS = re.compile(
    r"(?:\s*(?:<\|(?:im_end|eot_id|eom_id|eot|end|return|endoftext|endofresponse|end_of_text|end_of_turn|end_of_role|"
    r"end_of_turn_token|end_response|end_of_solution|im_start|user|observation)\|>|"
    r"<\|start_header_id\|>(?:assistant|user)?<\|end_header_id\|>|<\|im_start\|>(?:assistant|user)|<end_of_turn>|<turn\|>|"
    r"<end_of_utterance>|<eos>|\[EOS\]|<｜end▁of▁sentence｜>|</s>))+\s*\Z",
    re.IGNORECASE,
)
_BEGIN_MARK = re.compile(
    r"\A\s*(?:<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n*|<start_of_turn>model\n|"
    r"<\|start_response\|>|<\|begin_of_solution\|>\n*|<\|assistant\|>\n)",
    re.IGNORECASE,
)
"""Marks that a template writes before an answer, and that some servers repeat."""


def _join_blocks(content: Any) -> tuple[Any, str]:
    """Join content that a server sends in parts to (text, hidden reasoning); other content is unchanged."""
    if not isinstance(content, list):
        return content, ""
    blocks = [block for block in content if isinstance(block, dict)]
    texts = [block.get("text") for block in blocks if block.get("type") in ("text", "output_text")]
    thoughts = [block["thinking"] for block in blocks if block.get("type") == "thinking" and block.get("thinking")]
    hidden = "".join(str(_join_blocks(thought)[0]) for thought in thoughts)
    joined = "".join(text for text in texts if isinstance(text, str))
    return joined.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass"), hidden  # join a split emoji


def split_thinking(text: str) -> tuple[str, str]:
    """Split a text that may begin with `<think> ... </think>` into (hidden reasoning, answer); unclosed: all is hidden.

    The marks of other model families and the channels of gpt-oss work too, and so does a closing mark alone, if the
    template has written the opening one. A mark inside code or a line of prose is a mention, and stays in the text.
    """
    start = _BEGIN_MARK.sub("", text.lstrip(_INVISIBLE)).lstrip(_INVISIBLE)
    if start.startswith(("<|channel|>", "<|start|>")) and (channels := _HARMONY.findall(start)):
        answer = "".join(text for name, text in channels if name == "final")
        return "\n".join(text for name, text in channels if name != "final").strip(), _strip_blank_lines(answer)
    if stripped := _STRIPPED_HARMONY.fullmatch(start):
        return stripped[1].strip(), _strip_blank_lines(stripped[2])
    if not _ANY_THINKING_MARK.search(text):
        return "", text
    for opening, closing in _THINKING_MARKS:
        opened = opening.match(start)
        if not opened and opening.search(text):
            continue
        inside = start[opened.end() :] if opened else text
        closed = (match for match in closing.finditer(inside) if not _is_mention(inside, match, bool(opened)))
        if end := next(closed, None):
            return inside[: end.start()].strip(), _strip_blank_lines(inside[end.end() :])
        if opened and not re.match(r" +[a-z`]|-[a-z]", inside):
            return inside.strip(), ""
    return "", text


def _strip_blank_lines(text: str) -> str:
    """Remove blank lines before an answer, and keep the indentation of its first line."""
    blank = re.match(r"(?:[ \t]*\r?\n)+", text)
    return text[blank.end() :] if blank else text.lstrip(" ")


def _is_mention(text: str, tag: re.Match[str], opened: bool) -> bool:
    """True if a closing mark is only mentioned: in code, or inside a line of prose."""
    prefix, suffix = text[: tag.start()], text[tag.end() :].partition("\n")[0]
    if prefix.endswith(("`", '"', "'", "“")) or suffix.startswith(("`", '"', "'", "”")):
        return True
    if not opened and len(re.findall(r"^[ \t]*(?:```|~~~)", prefix, re.MULTILINE)) % 2:
        return True
    line = prefix.rpartition("\n")[2]
    if not (line.strip() and line.endswith((" ", "(")) and suffix.strip()):
        return False
    return not opened or bool(re.match(r"[ \t]+[a-z]|[.,;:!?)]", suffix))


def _strip_marks(text: str) -> str:
    """Remove the marks of a turn around a text, which a server should have removed."""
    text = _BEGIN_MARK.sub("", text)
    # A mark ends in one of these; the search reads the whole text and takes ten times as long as this look at its end.
    may_end_in_mark = text.rstrip()[-9:].lower().endswith((">", "]", "assistant", "user"))
    match = _END_MARKS.search(text) if may_end_in_mark else None
    if not match or ("</s>" in match[0] and "<s>" in text):
        return text
    return text[: match.start()]


def visible_answer(answer: str) -> str:
    """An answer without hidden reasoning before it and without marks of a turn."""
    return _strip_marks(split_thinking(answer)[1])


def _usage(usage: object) -> dict[str, int]:
    if not isinstance(usage, dict):
        return {}
    numbers = {k: usage.get(k) for k in ("prompt_tokens", "completion_tokens")}
    # Servers send null, NaN and worse: a number that no request can have is ignored.
    return {k: int(v) for k, v in numbers.items() if isinstance(v, int | float) and 0 <= v < 1e9}


def completion_json(text: str, finish_reason: str, model: str, prompt_tokens: int, completion_tokens: int) -> str:
    """The raw JSON text of a chat completion generated in this process."""
    return json.dumps(
        {
            "object": "chat.completion",
            "model": model,
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
            ],
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
        },
        ensure_ascii=False,
    )
