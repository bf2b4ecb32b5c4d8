"""Tasks that need a tool call, the calls of a target that is half wrong, and a reviser that mends their arguments.

python -m recipes.world.tides --count 100 --out prompts.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from recipes.world.reviser import SOLUTION, ReplyPlan, ServedReply, read_request, share, written

PORTS = ("Brest", "Calais", "Dover", "Esbjerg", "Galway")
TOOL = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "The time of high water in a port.",
        "parameters": {
            "type": "object",
            "properties": {
                "port": {"type": "string", "enum": list(PORTS)},
                "day": {"type": "integer", "minimum": 1, "maximum": 31},
            },
            "required": ["port", "day"],
            "additionalProperties": False,
        },
    },
}
_TASK = re.compile(r"When is high water in (\w+) on day (\d+) of this month\?")


def right_arguments(text: str) -> dict[str, Any] | None:
    """The arguments that the task in a text needs; None without such a task."""
    match = _TASK.search(text)
    return {"port": match[1], "day": int(match[2])} if match else None


def call(text: str, seed: int, body: str) -> dict[str, Any] | None:
    """The target's call for a task: right for half of the requests, else of another port, or with the day as text."""
    arguments = right_arguments(text)
    if arguments is None:
        return None
    number = share(seed, body, "tide")
    if number < 0.25:
        arguments["port"] = next(port for port in PORTS if port != arguments["port"])
    elif number < 0.5:
        arguments["day"] = str(arguments["day"])
    function = {"name": "tide", "arguments": json.dumps(arguments)}
    return {"id": f"call-{body}", "type": "function", "function": function}


def revise_call(turns: list[str], planned: ReplyPlan) -> ServedReply | None:
    """The reviser's reply to a request whose solution calls the tool; None to any other."""
    request = read_request(turns[0])
    arguments = right_arguments(request.task) if request else None
    if arguments is None:
        return None
    solution = "Tool calls:\n" + json.dumps({"name": "tide", "arguments": arguments})
    return written("I read port and day in the task and compare.", SOLUTION, solution, planned)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write prompts that need a call of the tool `tide`.")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    questions = [f"When is high water in {port} on day {day} of this month?" for day in range(1, 32) for port in PORTS]
    rows = [{"prompt": question, "tools": [TOOL]} for question in questions[: options.count]]
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main()
