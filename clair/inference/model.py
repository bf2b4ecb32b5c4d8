"""One protocol, several ways to ask a model: any OpenAI-compatible endpoint, or a local transformers model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

from clair.core.errors import EXIT_BUDGET, UserError
from clair.data.records import Reply, incomplete_reason


class Model(Protocol):
    """A model that can be asked. `request` is the body of a chat completion, without the model's name."""

    name: str
    identity: str
    """What a reply belongs to: weights hash, `id:` of the recipe, or model name and base URL."""

    async def check(self) -> None:
        """See that the model is there and may be asked, before anything is spent.

        Raises Refused, and Unreachable with `starting` where it may be there a little later.
        """

    async def complete(self, request: Mapping[str, Any], sample: int = 0) -> str:
        """The raw JSON text of a chat completion. Raises Refused, RequestFailed, TooMany or Unreachable.

        `sample` tells equal requests apart that want different answers; an endpoint draws anew by itself.
        """

    async def close(self) -> None:
        """Let connections or weights go."""


class Refused(UserError):
    """The endpoint refuses every request: wrong key, unknown model, no quota left. The run stops at once."""


class Unpaid(Refused):
    """The endpoint wants money. The run stops, and goes on when there is some."""


class LimitReached(Refused):
    """The endpoint takes no more for now: a rate or a quota is used up. The run ends, and goes on at another time."""

    exit_code = EXIT_BUDGET


class RequestFailed(Exception):
    """The endpoint refuses this one request, for good; the others may go on.

    `moderated`: for what its prompt says, so that it tells nothing about the others.
    """

    def __init__(self, reason: str, detail: str, raw: str | None = None, *, moderated: bool = False) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.raw = raw
        self.moderated = moderated


class TooMany(Exception):
    """429: asked too often or too much at once. `retry_after` is in seconds, None where the server gave none.

    `in_body`: the status was 200, so that asking goes on as after any error of a server.
    """

    def __init__(self, retry_after: float | None, words: str = "", *, in_body: bool = False) -> None:
        super().__init__(f"429: {words}" if words else "429")
        self.retry_after = retry_after
        self.in_body = in_body


class Unreachable(Exception):
    """A server error, a timeout or a broken connection: worth another try.

    `billed`: the request may have been answered and paid for, only the reply did not arrive. `busy`: the server
    took too long, and may have too much to do. `waiting`: it took no connection while it answered others, which is no
    failure. `starting`: it is there, and says that it is not ready.
    """

    def __init__(self, told: str, *, billed: bool = False, busy: bool = False, starting: bool = False) -> None:
        super().__init__(told)
        self.billed = billed
        self.busy = busy
        self.waiting = False
        self.starting = starting


def reply_of(raw: str, *, tools: bool = False) -> Reply:
    """The reply in the raw JSON text of a chat completion. Raises RequestFailed where there is none.

    `tools`: the request has tools, so that a reply may call one.
    Hidden reasoning is kept apart from the answer, as the server does it (`reasoning_content`, `reasoning`), or else by
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
    content, thought = _joined(content)
    calls = message.get("tool_calls")
    calls = tuple(calls) if isinstance(calls, list) and all(isinstance(call, dict) for call in calls) else ()
    if message.get("tool_calls") and not (content or (tools and calls)):
        raise RequestFailed("tool_call", "the reply calls a tool and says nothing", raw)
    hidden = next((h for name in _HIDDEN if isinstance(h := message.get(name), str) and h.strip()), thought)
    text = content if isinstance(content, str) else ""
    if not hidden:  # else the server has split the two already, and the content is the answer, word for word
        hidden, text = split_thinking(text)
    text = _without_marks(text)
    finish = None if finish is None else str(finish)
    if incomplete_reason(finish) == "server_error":
        raise RequestFailed("server_error", f"the server broke off: finish_reason {finish!r}", raw)
    half = encodable(text) != text or text.rstrip().endswith("\ufffd")
    if half and incomplete_reason(finish, tools=tools) is None:
        raise RequestFailed("malformed_reply", "the reply holds half a character, such as half of an emoji", raw)
    refusal = message.get("refusal")
    refusal = encodable(refusal) if isinstance(refusal, str) and not text.strip() else ""
    return Reply(
        text=encodable(text),
        thinking=encodable(hidden),
        finish_reason="refusal" if refusal else finish,
        refusal=refusal,
        tool_calls=calls,
        usage=_usage(body.get("usage")),
        model=str(body.get("model") or ""),
    )


_HIDDEN = ("reasoning_content", "reasoning")
_MARKS = tuple(
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
"""How models open and close their hidden reasoning."""
_UNSEEN = "\ufeff\u200b\u200c\u200d\u2060 \t\r\n\v\f\xa0"
_HARMONY = re.compile(
    r"<\|channel\|>\s*(\w+).*?<\|message\|>(.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)", re.DOTALL
)
_BARE_HARMONY = re.compile(r"analysis(.*?)assistantfinal(.*)", re.DOTALL)
"""What is left of the channels where a server takes the marks out."""
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
"""What a template writes before an answer, which some servers repeat."""


def _joined(content: Any) -> tuple[Any, str]:
    """(text, hidden reasoning) of content in parts, as some servers send it; other content as it is."""
    if not isinstance(content, list):
        return content, ""
    parts = [part for part in content if isinstance(part, dict)]
    texts = [part.get("text") for part in parts if part.get("type") in ("text", "output_text")]
    thoughts = [part["thinking"] for part in parts if part.get("type") == "thinking" and part.get("thinking")]
    hidden = "".join(str(_joined(thought)[0]) for thought in thoughts)
    whole = "".join(text for text in texts if isinstance(text, str))
    return whole.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass"), hidden  # an emoji cut in two


def split_thinking(text: str) -> tuple[str, str]:
    """(hidden reasoning, answer) of a text that may begin with `<think> ... </think>`; never closed: all hidden.

    Also in the marks of other models, in the channels of gpt-oss, and where the template has opened it for the model,
    so that only the end stands there. A tag in code or in a line of prose is a mention of it, and stays.
    """
    start = _BEGIN_MARK.sub("", text.lstrip(_UNSEEN)).lstrip(_UNSEEN)
    if start.startswith(("<|channel|>", "<|start|>")) and (channels := _HARMONY.findall(start)):
        said = [part for name, part in channels if name == "final"]
        return "\n".join(part for name, part in channels if name != "final").strip(), _behind("".join(said))
    if bare := _BARE_HARMONY.fullmatch(start):
        return bare[1].strip(), _behind(bare[2])
    for opening, closing in _MARKS:
        opened = opening.match(start)
        if not opened and opening.search(text):
            continue
        inside = start[opened.end() :] if opened else text
        ends = (end for end in closing.finditer(inside) if not _is_mention(inside, end, bool(opened)))
        if end := next(ends, None):
            return inside[: end.start()].strip(), _behind(inside[end.end() :])
        if opened and not re.match(r" +[a-z`]|-[a-z]", inside):
            return inside.strip(), ""
    return "", text


def _behind(text: str) -> str:
    """What stands behind hidden reasoning: without blank lines before it, but as far to the right as it was."""
    blank = re.match(r"(?:[ \t]*\r?\n)+", text)
    return text[blank.end() :] if blank else text.lstrip(" ")


def _is_mention(text: str, tag: re.Match[str], opened: bool) -> bool:
    """Whether the end of hidden reasoning is only spoken of: in code, or inside a line of prose."""
    before, after = text[: tag.start()], text[tag.end() :].partition("\n")[0]
    if before.endswith(("`", '"', "'", "“")) or after.startswith(("`", '"', "'", "”")):
        return True
    if not opened and len(re.findall(r"^[ \t]*(?:```|~~~)", before, re.MULTILINE)) % 2:
        return True
    line = before.rpartition("\n")[2]
    if not (line.strip() and line.endswith((" ", "(")) and after.strip()):
        return False
    return not opened or bool(re.match(r"[ \t]+[a-z]|[.,;:!?)]", after))


def _without_marks(text: str) -> str:
    """The text without the marks of a turn around it, which a server should have taken for its beginning and end."""
    text = _BEGIN_MARK.sub("", text)
    found = _END_MARKS.search(text)
    if not found or ("</s>" in found[0] and "<s>" in text):
        return text
    return text[: found.start()]


def visible(answer: str) -> str:
    """A ready answer without what a model thought before it, and without marks of an ended turn."""
    return _without_marks(split_thinking(answer)[1])


def encodable(text: str) -> str:
    """Half of a surrogate pair, which JSON can carry and UTF-8 cannot, becomes the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _usage(usage: object) -> dict[str, int]:
    if not isinstance(usage, dict):
        return {}
    numbers = {k: usage.get(k) for k in ("prompt_tokens", "completion_tokens")}
    # Servers send null, NaN and worse; a number that no request can have is as good as none.
    return {k: int(v) for k, v in numbers.items() if isinstance(v, int | float) and 0 <= v < 1e9}


def as_completion(text: str, finish_reason: str, model: str, prompt_tokens: int, completion_tokens: int) -> str:
    """The raw JSON text of a chat completion that was made in this process."""
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
