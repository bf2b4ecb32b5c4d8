"""What happens to one row: its answer is generated, revised, and kept or dropped. Each step is a coroutine.

A row runs through its steps by itself, so that a slow one holds up no other; how many are in flight is for the
limiter of each role to decide. A step returns what it made or raises Dropped with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clair.contrast import contrast_of
from clair.filters import first_reason
from clair.models.asking import Asker
from clair.parse import FAILURES, ParseFailure, is_refusal, parse_revision
from clair.prompts import revision_request
from clair.records import Dropped, Pair, Prompt, Revision


@dataclass(frozen=True, slots=True)
class Reviser:
    """The stronger model with the words it is asked in."""

    asker: Asker
    template: str
    system: str | None = None


async def generate(prompt: Prompt, target: Asker | None) -> str:
    """The target's answer, or the ready one. Drops an answer that was cut off: its winner would merely finish it."""
    if prompt.answer is not None:
        return prompt.answer
    if target is None:
        raise Dropped("target", "no_answer", "the row has no answer and the recipe has no target")
    reply = await target.ask(list(prompt.messages), row=prompt.id)
    if reply.finish_reason == "length":
        raise Dropped("target", "truncated", "the answer ran into max_tokens; raise target.max_tokens")
    if not reply.text.strip():
        raise Dropped("target", "empty_reply", "the target said nothing")
    return reply.text.strip()


async def revise(prompt: Prompt, answer: str, reviser: Reviser) -> Revision:
    """The reviser's minimal improvement of an answer. Drops a reply that cannot be read with certainty, by name."""
    request = revision_request(reviser.template, prompt.messages, answer, reviser.system)
    reply = await reviser.asker.ask(list(request), row=prompt.id)
    try:
        return parse_revision(reply.text, reply.finish_reason)
    except ParseFailure as failure:
        name = "refusal" if failure.name == "no_label" and is_refusal(reply.text) else failure.name
        raise Dropped("reviser", name, f"{FAILURES[name]}: {reply.text[:200]!r}") from failure


def keep(pair: Pair, filters: Sequence[str]) -> Pair:
    """The pair with its contrast numbers, or Dropped with the first filter's reason."""
    reason = first_reason(pair, filters)
    if reason:
        raise Dropped("filter", *reason)
    contrast = contrast_of(pair.chosen, pair.rejected)._asdict()
    return Pair(pair.id, pair.messages, pair.chosen, pair.rejected, pair.reasoning, pair.models, contrast)
