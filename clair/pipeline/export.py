"""Pass a dataset folder on: as rows for other trainers, to the hub, or into a further round."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clair.core.errors import UserError
from clair.core.files import write_atomically
from clair.core.recipe import resolve
from clair.data.dataset import SPLITS, read_dropped, read_manifest, read_rows
from clair.data.prompt_sources import each_prompt
from clair.pipeline.config import BuildConfig, without_file_hashes
from clair.storage.hub import push_files

FORMS = ("preference", "unpaired", "text")
PUSHED = ("README.md", "manifest.json", "dropped.jsonl", "data/*.parquet")
"""The files that `clair push` sends. The ledger is not sent: it holds raw replies."""


def convert_rows(form: str, folder: str | Path, split: str) -> Iterator[dict[str, Any]]:
    """Convert the pairs of a split to a form that other trainers read.

    preference  prompt, chosen, rejected as message lists (TRL's explicit prompt)
    unpaired    prompt, completion, label: each pair as two rows (TRL's KTO)
    text        prompt, chosen, rejected as plain text, of single-turn prompts only (raises UserError for others)
    """
    read_manifest(folder)
    for row in read_rows(folder, [split]):
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        tools = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}
        if form == "preference":
            yield {"id": row["id"], "prompt": prompt, "chosen": chosen, "rejected": rejected, **tools}
        elif form == "unpaired":
            yield {"id": row["id"], "prompt": prompt, "completion": chosen, "label": True, **tools}
            yield {"id": row["id"], "prompt": prompt, "completion": rejected, "label": False, **tools}
        else:
            if len(prompt) != 1 or tools:
                more = f"{len(prompt)} turns before the answer" if len(prompt) != 1 else " and ".join(tools)
                raise UserError(f"pair {row['id']} has {more}; use --as preference")
            yield {"id": row["id"], **{k: row[k][-1]["content"] for k in ("prompt", "chosen", "rejected")}}


def export(form: str, folder: str | Path, split: str, out: str | Path) -> int:
    """Write a split as JSONL to `out`, atomically. Returns the number of rows."""
    lines = [json.dumps(row, ensure_ascii=False) for row in convert_rows(form, folder, split)]
    write_atomically(out, "".join(line + "\n" for line in lines))
    return len(lines)


def files_to_push(folder: str | Path) -> list[Path]:
    """The files of a finished dataset folder that `push` sends to the hub."""
    read_manifest(folder)
    return [file for pattern in PUSHED for file in sorted(Path(folder).glob(pattern))]


def push(folder: str | Path, name: str, *, private: bool) -> str:
    """Send a dataset folder to the hub as `org/name` (`push_files`). Returns the URL."""
    files = {str(file.relative_to(folder)): file for file in files_to_push(folder)}
    return push_files(files, name, kind="dataset", private=private, message="Preference pairs built by clair-apo")


def next_round(folder: str | Path, model: str, out: str | Path) -> tuple[Path, int, int]:
    """Write a recipe and a prompt file for a further round, with the tuned `model` folder as the target.

    Its prompts are those that gave a pair, which the previous model answered wrong, followed by those that the build
    did not reach because of `limit` or `accept`. They keep their labels, tools, reference and stronger answer. Prompts
    that were dropped are left out, and so are answers in place of the target's, which are another model's. Returns the
    recipe's path and the number of prompts of each kind.
    """
    manifest, new_folder = read_manifest(folder), Path(out)
    recipe = new_folder.with_name(f"{new_folder.name}.yaml")
    prompts = new_folder.with_name(f"{new_folder.name}-prompts.jsonl")
    for file in (recipe, prompts):
        if file.exists():
            raise UserError(f"{file} exists already; choose another --out")
    config = resolve(BuildConfig, without_file_hashes(manifest["recipe"]), source=f"{folder}/manifest.json")
    repeated = [_prompt_row(row["id"], row["prompt"], row.get("tools")) for row in read_rows(folder, SPLITS)]
    known_ids = {row["id"] for row in repeated}
    known_ids |= {row["id"] for row in read_dropped(Path(folder)) if not row["failed"]}
    columns = {name: name for name in ("reference", "stronger") if name in config.prompts.columns}
    by_id, unseen = {row["id"]: row for row in repeated}, []
    for prompt in (prompt for prompt, left_out in each_prompt(config.prompts) if left_out is None):
        row = by_id.get(prompt.id) or _prompt_row(prompt.id, list(prompt.messages), prompt.tools)
        row.update({**prompt.labels, **{name: getattr(prompt, name) for name in columns}})
        if prompt.id not in known_ids:
            unseen.append(row)
    target_config = config.target
    sampling: dict[str, Any] = (
        {"temperature": target_config.temperature, "max_tokens": target_config.max_tokens} if target_config else {}
    )
    if target_config and target_config.chat_template_kwargs:
        sampling["chat_template_kwargs"] = dict(target_config.chat_template_kwargs)
    if target_config and target_config.serve:  # the same server, with the new weights
        sampling = target_config.model_dump(mode="json", exclude_defaults=True, exclude={"path", "id"})
    changed = {"limit", "accept", "prompts", "target", "out"}
    values: Mapping[str, Any] = {
        **config.model_dump(mode="json", exclude_defaults=True, exclude=changed),
        "prompts": {"path": str(prompts), **({"columns": columns} if columns else {})},
        "target": {"path": model, **sampling},
        "out": str(new_folder),
    }
    resolve(BuildConfig, values)
    import yaml

    write_atomically(prompts, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in repeated + unseen))
    write_atomically(recipe, yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))
    return recipe, len(repeated), len(unseen)


def _prompt_row(id: str, messages: Any, tools: Any) -> dict[str, Any]:
    return {"id": id, "prompt": messages, **({"tools": list(tools)} if tools else {})}
