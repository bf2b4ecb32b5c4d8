"""Write UltraFeedback's prompts as files for `clair build`: without answers, and with its answers and scores.

    python -m recipes.experiments.paper.ultrafeedback                          # from the hub, into data/paper
    python -m recipes.experiments.paper.ultrafeedback --source ./UltraFeedback # a copy that `datasets` reads

`prompts.jsonl` is for the recipes that ask the target, `answered.jsonl` (the same prompts, where at least two answers
of other models have a score) for off_policy.yaml. The paper takes 32K prompts uniformly; which ones is not known.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clair.core.errors import UserError, one_line
from clair.core.files import content_hash, write_atomically

COUNT = 32_000


def row_of(source_row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of UltraFeedback (`instruction`, `completions` with `response` and `overall_score`) as a prompt row.

    Answers without text or score are left out. Raises UserError if a column is missing.
    """
    try:
        prompt = source_row["instruction"]
        completions = [
            (completion["response"], completion["overall_score"]) for completion in source_row["completions"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"a row without {error}; UltraFeedback's have instruction and completions (response, overall_score)"
        ) from error
    scored = [
        (text, float(score)) for text, score in completions if text and score is not None and math.isfinite(score)
    ]
    answers, scores = [text for text, _ in scored], [score for _, score in scored]
    return {"id": content_hash(prompt), "prompt": prompt, "answers": answers, "scores": scores}


def prompt_rows(source: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows drawn without replacement, in the order of the source. Raises UserError if it has fewer."""
    from datasets import load_dataset

    path = Path(source)
    try:
        if path.is_file():
            kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix, "json")
            rows = load_dataset(kind, data_files=str(path), split="train")
        else:
            rows = load_dataset(source, split="train")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{source} cannot be read: {one_line(error)}") from error
    if len(rows) < count:
        raise UserError(f"{source} has {len(rows):,} rows, fewer than the {count:,} requested; lower --count")
    return [row_of(rows[index]) for index in sorted(random.Random(seed).sample(range(len(rows)), count))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", default="openbmb/UltraFeedback", help="a folder, a file or a name on the hub")
    parser.add_argument("--count", type=int, default=COUNT, help="number of prompts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawn prompts")
    parser.add_argument("--out", type=Path, default=Path("data/paper"), help="the folder of both files")
    args = parser.parse_args()
    try:
        rows = prompt_rows(args.source, args.count, args.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    answered = [row for row in rows if len(row["answers"]) > 1]
    write_rows(args.out / "prompts.jsonl", [{"id": row["id"], "prompt": row["prompt"]} for row in rows])
    write_rows(args.out / "answered.jsonl", answered)
    print(f"{len(rows):,} prompts in {args.out}, {len(answered):,} of them with answers that have scores")


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object per line."""
    write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()
