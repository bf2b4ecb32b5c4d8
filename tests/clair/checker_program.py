"""A checker for tests: it does to each answer what the answer says, and counts its own starts in a file.

python -m tests.clair.checker_program STARTS
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any


def score(answer: str, reference: Any) -> Any:
    """The score of an answer, or the fault that it names."""
    word, _, value = answer.partition(" ")
    if word == "hang":
        subprocess.Popen(["sleep", "600"])  # a child of its own, which has to end too
        time.sleep(600)
    if word == "crash":
        raise ValueError("this answer breaks the checker")
    if word == "die":
        os._exit(7)
    if word == "memory":
        return len(bytearray(3_000_000_000))
    if word == "reference":
        return float(value == reference)
    return {"nan": float("nan"), "null": None, "infinite": 1e999, "words": "good", "true": True}.get(word, len(answer))


def reply(row: dict[str, Any]) -> str:
    """The line for a row; some answers spoil all of it."""
    scores = [score(answer, row.get("reference")) for answer in row["answers"]]
    if "short" in row["answers"]:
        return json.dumps({"id": row["id"], "scores": scores[1:]})
    if "other" in row["answers"]:
        return json.dumps({"id": "another row", "scores": scores})
    if "chatty" in row["answers"]:
        return "I think that both are good."
    if "twice" in row["answers"]:
        return "\n".join([json.dumps({"id": row["id"], "scores": scores})] * 2)
    return json.dumps({"id": row["id"], "scores": scores})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        with open(sys.argv[1], "a") as file:
            file.write(f"{os.getpid()}\n")
    for line in sys.stdin:
        print(reply(json.loads(line)), flush=True)
