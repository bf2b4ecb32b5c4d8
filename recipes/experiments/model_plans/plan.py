"""The memory and time of the training recipes of recipes/models and recipes/paper, by `apo train --dry-run`.

    python -m recipes.experiments.model_plans.plan              # a row for each recipe
    python -m recipes.experiments.model_plans.plan --write      # into the table of docs/recipes.md

Nothing is downloaded: a model is a folder with its config and a word-level tokenizer, and pairs are words in the token
lengths of 20 real CLAIR pairs, over and over. Memory and time are arithmetic (apo/cost/memory.py); no GPU has
confirmed them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).resolve().parents[2]
PAGE = RECIPES.parent / "docs" / "recipes.md"
PAIRS = 1000

LENGTHS = (
    (276, 548, 731), (46, 630, 588), (367, 597, 561), (34, 41, 62), (12, 432, 387), (68, 639, 781), (77, 389, 259),
    (68, 570, 760), (95, 415, 400), (108, 286, 239), (37, 475, 542), (66, 522, 613), (128, 304, 89), (118, 266, 237),
    (110, 414, 265), (33, 76, 168), (99, 391, 379), (24, 193, 207), (139, 488, 549), (65, 33, 21),
)  # fmt: skip
"""Tokens of prompt, chosen and rejected of the 20 revisions in the cache of the paper's notebook (MIT licence)."""

CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
    },
    "meta-llama/Llama-3.2-1B-Instruct": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    "models/SmolLM3-3B-it-SFT": {"model_type": "smollm3", "max_position_embeddings": 65536},
}  # fmt: skip
"""The keys of each model's config that determine its cost, by name. SmolLM3's are the defaults of transformers."""

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


@dataclass(frozen=True)
class PlanLine:
    """A dry run's plan for one device: peak memory in GiB, if it fits, and the time as text."""

    needs: str
    fits: bool
    time: str


def training_recipes() -> list[Path]:
    """Every training recipe of the two folders."""
    files = sorted(file for folder in ("models", "paper") for file in (RECIPES / folder).glob("*.yaml"))
    return [file for file in files if "pipeline" not in yaml.safe_load(file.read_text("utf-8"))]


def config_only(name: str, folder: Path) -> Path:
    """Write a model folder for `name` with config and tokenizer but no weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    sizes = dict(CONFIGS[name])
    kind = sizes.pop("model_type")
    config = AutoConfig.for_model(kind, **sizes)
    config.architectures = [{"llama": "LlamaForCausalLM", "smollm3": "SmolLM3ForCausalLM"}[kind]]
    config.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "<bos>", "<s>", "</s>", "a", "b", "c"])}
    raw = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "</s>"}
    tokenizer.add_special_tokens({**special, "additional_special_tokens": ["<s>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(file: Path, count: int = PAIRS) -> Path:
    """Write `count` pairs of the `LENGTHS`, shuffled, since a dry run samples them. Answers share no word."""
    rows = []
    for index in random.Random(0).sample(range(count), count):
        lengths = LENGTHS[index % len(LENGTHS)]
        texts = (" ".join([word] * n) for word, n in zip("abc", lengths, strict=True))
        rows.append(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))) + "\n")
    file.write_text("".join(rows), "utf-8")
    return file


def processes_of(recipe: Path) -> list[str]:
    """The `--processes N` that the recipe's head comment gives with `--dry-run`."""
    match = re.search(rf"apo train \S*{re.escape(recipe.name)} --dry-run(?: (--processes) (\d+))?", recipe.read_text())
    if match is None:
        raise ValueError(f"{recipe} does not say how it was planned: `apo train {recipe.name} --dry-run`")
    return [word for word in match.groups() if word]


def dry_run(recipe: Path, folder: Path, pairs: Path) -> str:
    """The output of `apo train RECIPE --dry-run` on a folder without weights; too little memory is no error."""
    model = config_only(yaml.safe_load(recipe.read_text("utf-8"))["model"], folder / recipe.stem)
    values = [f"model={model}", f"dataset={pairs}", f"out={folder / 'run'}"]
    options = [word for value in values for word in ("--set", value)]
    command = [sys.executable, "-m", "apo", "train", str(recipe), "--dry-run", *processes_of(recipe), *options]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if "# steps:" not in process.stdout or process.returncode not in (0, 2):
        raise RuntimeError(f"{recipe.name}: {process.stderr.strip() or process.stdout}")
    return process.stdout


def lines_of(output: str) -> dict[str, PlanLine]:
    """The plans by device in a dry run's output."""
    pattern = r"^# (.*): ([\d.]+) of [\d.]+ GiB, (fits|does NOT fit), (?:about )?([^,(]+), .* \("
    return {m[1]: PlanLine(m[2], m[3] == "fits", m[4]) for m in re.finditer(pattern, output, re.MULTILINE)}


def row_of(recipe: Path, output: str) -> str:
    """The recipe's row of the table."""
    lines = lines_of(output)
    steps = re.search(r"^# steps: ([\d,]+)", output, re.MULTILINE)
    parameters = re.search(r"parameters: ([\d,]+)", output)
    if steps is None or parameters is None:
        raise RuntimeError(f"{recipe.name}: no steps or parameters in:\n{output}")
    times = [lines[gpu].time if lines[gpu].fits else "–" for gpu in ("A100 80GB", "H100 80GB", "RTX 4090 24GB")]
    gpus = (processes_of(recipe) or ["", "1"])[1]
    name = recipe.relative_to(RECIPES.parent)
    needs = lines["A100 80GB"].needs
    return f"| `{name}` | {gpus} | {needs} GiB | {steps[1]} | " + " | ".join(times) + " |"


def table(recipes: Sequence[Path], pairs: int = PAIRS) -> str:
    """The table of all recipes, each planned by a dry run of its own."""
    head = "| recipe | GPUs | peak of each | steps | A100 | H100 | RTX 4090 |\n|---|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        file = write_pairs(Path(folder) / "pairs.jsonl", pairs)
        return "\n".join([head, *(row_of(recipe, dry_run(recipe, Path(folder), file)) for recipe in recipes)])


def main() -> None:
    """Print the table; with --write put it into the page, after `<!-- planned -->`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table of docs/recipes.md")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="number of pairs of the planned runs")
    args = parser.parse_args()
    if args.write and args.pairs != PAIRS:
        parser.error(f"the page's table is for {PAIRS} pairs")
    plan_table = table(training_recipes(), args.pairs)
    if not args.write:
        print(plan_table)
        return
    text = PAGE.read_text("utf-8")
    written, count = re.subn(r"(?<=<!-- planned -->\n)(\n?)(?:\|.*\n)+", lambda m: f"{m[1]}{plan_table}\n", text)
    if count != 1:
        sys.exit(f"{PAGE.name} has {count} tables after <!-- planned -->; one is needed")
    PAGE.write_text(written, "utf-8")


if __name__ == "__main__":
    main()
