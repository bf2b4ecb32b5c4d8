"""Serve two programs, a reviser and a judge, as an OpenAI-compatible endpoint on 127.0.0.1.

    python -m recipes.experiments.real_model.server --prompts FOLDER/train.jsonl

prints its URL when it is ready. `constraint-reviser` repairs the broken constraints of an answer (mend.py), or refuses
with the reason. `constraint-judge` prefers the answer that follows more constraints. Both know the constraints of these
prompts, and nothing of the tasks. The server exits after `--max-seconds`, or when the process that started it ends.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from recipes.experiments.real_model import constraints, mend
from recipes.experiments.real_model.constraints import Constraint, held
from recipes.experiments.real_model.mend import Unmendable
from recipes.experiments.real_model.mend import mend as mended
from recipes.world.judge import VERDICT, read_sections
from recipes.world.reviser import REASONING, SOLUTION, ServedReply, read_request, user_texts
from recipes.world.server import ErrorResponse, body_hash, completion_object, model_list, read_body, run_server

REVISER, JUDGE = "constraint-reviser", "constraint-judge"
Prompts = Mapping[str, Sequence[Constraint]]


def program_id() -> str:
    """Return the identity of the two programs in a ledger. It changes with their source."""
    from clair.core.files import content_hash

    sources = [Path(str(module.__file__)).read_text("utf-8") for module in (constraints, mend)]
    return f"constraint-program-{content_hash(sources)[:8]}"


def read_constraints(file: Path) -> dict[str, list[Constraint]]:
    """Read the constraints of each prompt in a file of `write_prompts`."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return {
        row["prompt"]: [
            Constraint(type, kwargs, "") for type, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True)
        ]
        for row in rows
    }


def revise(text: str, prompts: Prompts) -> ServedReply:
    """Return the repaired answer, or a refusal with the reason. An answer that follows all constraints is unchanged."""
    request = read_request(text)
    if request is None or request.edits or request.task not in prompts:
        return _refusal("unknown_prompt: this program only knows the constraints of its prompts file")
    try:
        answer = mended(prompts[request.task], request.student)
    except Unmendable as problem:
        if problem.reason != "holds_all":
            return _refusal(problem.reason)
        answer = request.student
    return ServedReply(f"{REASONING}\nThe program checks the constraints.\n\n{SOLUTION}\n{answer}")


def judge(text: str, prompts: Prompts) -> ServedReply:
    """Return the verdict for the answer that follows more constraints, or a tie."""
    sections = read_sections(text)
    if sections is None or sections[0] not in prompts:
        return _refusal("unknown_prompt: this program only knows the constraints of its prompts file")
    task, *answers = sections
    counts = [sum(held(prompts[task], answer)) for answer in answers]
    verdict = "tie" if counts[0] == counts[1] else 1 if counts[0] > counts[1] else 2
    return ServedReply(f"{REASONING}\nThey hold {counts[0]} and {counts[1]} constraints.\n\n{VERDICT}\n[{verdict}]")


def _refusal(reason: str) -> ServedReply:
    return ServedReply("", refusal=reason)


def make_app(prompts: Prompts) -> web.Application:
    """Return the endpoint."""

    async def chat(request: web.Request) -> web.Response:
        try:
            body: dict[str, Any] = await read_body(request, (REVISER, JUDGE))
            text = user_texts(body["messages"])[-1]
        except ErrorResponse as refused:
            return refused.response
        except (ValueError, AttributeError) as error:
            return ErrorResponse(400, str(error), "invalid_messages").response
        reply = (revise if body["model"] == REVISER else judge)(text, prompts)
        return web.json_response(completion_object(body, body_hash(body), [reply]))

    async def models(_: web.Request) -> web.Response:
        return web.json_response(model_list((REVISER, JUDGE)))

    app = web.Application(client_max_size=16 * 2**20)
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", chat)])
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the reviser program and the judge on 127.0.0.1.")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--max-seconds", type=float, default=4 * 3600.0)
    args = parser.parse_args()
    run_server(make_app(read_constraints(args.prompts)), args.port, args.max_seconds)


if __name__ == "__main__":
    main()
