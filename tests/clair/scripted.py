"""Models that answer by a script, in this process: what a build does with them is all its own doing."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clair.core.recipe import resolve
from clair.inference.model import RateLimited, Unreachable, completion_json
from clair.pipeline.config import BuildConfig

Script = Callable[[list[dict[str, str]], int], str | dict[str, Any]]
"""A model's reply; a mapping is the choice of a chat completion."""


class Scripted:
    """A model whose replies are `script(messages, sample)`; records its requests, and bills for them."""

    def __init__(self, name: str, script: Script, *, trouble: float = 0.0, seed: int = 0, latency: float = 0.0) -> None:
        self.name = self.identity = name
        self.script = script
        self.requests: list[Mapping[str, Any]] = []
        self.billed = 0
        self._trouble, self._random, self._latency = trouble, random.Random(seed), latency

    async def check(self) -> None:
        """Always there."""

    async def close(self) -> None:
        """Nothing to close."""

    async def complete(self, request: Mapping[str, Any], sample: int = 0) -> str:
        """The script's reply. Trouble is a refusal, an error, or a reply that was paid for and got lost."""
        await asyncio.sleep(self._random.random() * self._latency)
        self.requests.append(request)
        text = self.script(request["messages"], sample)
        prompt = len(json.dumps(request["messages"])) // 5
        completion = min(len(str(text)) // 4 + 1, request.get("max_tokens", 10**6))
        if self._random.random() < self._trouble:
            kind = self._random.choice(["refused", "error", "lost"])
            if kind == "refused":
                raise RateLimited(0.001)
            if kind == "lost":
                self.billed += prompt + completion
            raise Unreachable(kind, billed=kind == "lost")
        self.billed += prompt + completion
        if isinstance(text, dict):
            return json.dumps({"choices": [text], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})
        return completion_json(text, "stop", self.name, prompt, completion)


def choice(content: Any, finish_reason: str | None = "stop", **message: Any) -> dict[str, Any]:
    """The choice of a chat completion."""
    return {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish_reason}


def install(monkeypatch: Any, **models: Any) -> None:
    """Make builds use these models, by role."""
    monkeypatch.setattr("clair.inference.open.open_model", lambda role, config: models[role])
    monkeypatch.setattr("clair.inference.client._FIRST_BACKOFF", 0.001)


def recipe(out: Path, rows: list[dict[str, Any]], **keys: Any) -> BuildConfig:
    """A data recipe over these prompt rows."""
    prompts = out.with_name(f"{out.name}-prompts.jsonl")
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return resolve(BuildConfig, {"prompts": {"path": str(prompts)}, "out": str(out), **keys})


def endpoint(**keys: Any) -> dict[str, Any]:
    """A role of a recipe; its model is never opened."""
    return {"url": "http://127.0.0.1:9/v1", "model": "scripted", **keys}


def between(text: str, tag: str) -> str:
    """The text between the `<tag>` and `</tag>` lines of a request."""
    return text.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0]


def revision(messages: list[dict[str, str]], sample: int = 0) -> str:
    """The method's format: `bad` becomes `good`."""
    answer = between(messages[0]["content"], "student_solution")
    return "{teacher_reasoning}\nbecause\n\n{corrected_student_solution}\n" + answer.replace("bad", "good")


def verdict(choice: str) -> str:
    """A judge's reply."""
    return "{teacher_reasoning}\nbecause\n\n{best_student_solution}\n" + choice


def oracle_verdict(messages: list[dict[str, str]], sample: int = 0) -> str:
    """Prefers the answer that says `good`."""
    shown = [between(messages[0]["content"], f"student_solution_{n}") for n in (1, 2)]
    good = ["good" in answer for answer in shown]
    return verdict("[1]" if good == [True, False] else "[2]" if good == [False, True] else "[tie]")
