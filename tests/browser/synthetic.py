"""Dataset folders of any size with realistic or malicious text; equal arguments give equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from clair.core.files import content_hash, write_atomically, write_json
from clair.data.contrast import contrast_of
from clair.data.dataset import DatasetWriter
from clair.data.dataset_card import card
from clair.data.records import Dropped, Pair

_VOCABULARY = """
the of and to in a is that for it as was with be by on not he this are or his from at which but have an had they you
were their one all we can her has there been if more when will would who so no said water light energy cell answer
because therefore however example method number result value system process language history question temperature
between during structure important different several usually probably certain evidence measure city
"""
WORDS = _VOCABULARY.split()
TOPICS = ("photosynthesis", "the French Revolution", "binary search", "interest rates", "sourdough", "plate tectonics")
INJECTIONS = (
    "<script>window.hacked = 1; alert('hacked')</script>",
    '</script><script>window.hacked = 2</script><img src=x onerror="window.hacked = 3">',
    "<!--<script>alert(4)</script>--> ]]> {{ 7 * 7 }} {% raw %} ${alert(5)} `javascript:alert(6)`",
    "<svg onload=alert(7)><iframe srcdoc='<script>alert(8)</script>'></iframe><style>*{display:none}</style>",
    "<a href='javascript:alert(9)'>click</a> <meta http-equiv=refresh content='0;url=https://example.com/'>",
)
_WORD_OF_HARM = "<img/src=x/onerror=alert(10)>"
OTHER_TEXTS = (
    ("תרגם את המשפט הבא לאנגלית: הכלב רץ מהר.", "The dog run fast. הכלב רץ", "The dog runs fast. הכלב רץ מהר."),
    ("ما هي عاصمة مصر؟ ولماذا؟", "عاصمة مصر هي الإسكندرية.", "عاصمة مصر هي القاهرة، منذ القرن العاشر."),
    ("Say it with emoji 👩‍👩‍👧‍👦🏳️‍🌈", "Family 👨‍👩‍👧 day! 🎉", "Family 👩‍👩‍👧‍👦 day! 🎉🏳️‍🌈"),
    ("用中文解释光合作用。", "光合作用是植物吃土的过程。", "光合作用是植物用光制造糖的过程。"),
    ("Write a function\u2028that adds\u2029two numbers.", "```python\ndef add(a, b):\n\treturn a - b\n```",
     "```python\ndef add(a, b):\n\treturn a + b\n```"),
    ("What does \x00 NUL do, and \x1b[31mred?", "It \x07rings.", "It does nothing; \x07 rings.\r\nThat is all."),
)  # fmt: skip


def sentence(rng: Random) -> str:
    """Words in a row, with a capital and a full stop."""
    drawn = [WORDS[int(len(WORDS) * rng.random() ** 2)] for _ in range(rng.randint(6, 22))]
    return " ".join(drawn).capitalize() + "."


def passage(rng: Random, characters: int) -> str:
    """Paragraphs of about `characters` characters."""
    text = ""
    while len(text) < characters:
        text += sentence(rng) + ("\n\n" if rng.random() < 0.2 else " ")
    return text.strip()


def revised(rng: Random, text: str, amount: float) -> str:
    """The text with about that share of its words changed, left out, or followed by a new sentence."""
    out = []
    for word in text.split(" "):
        chance = rng.random() / max(amount, 1e-9)
        if chance > 1:
            out.append(word)
        elif chance < 0.5:
            out.append(rng.choice(WORDS))
        elif chance < 0.55:
            out.append(f"{word} {sentence(rng)}")
    return " ".join(out) or "Nothing."


def synthetic_pairs(count: int, seed: int = 0, characters: int = 2200, different: int = 2000) -> list[Pair]:
    """Pairs with two answers of about `characters` each: the first ones strange or harmful, the others ordinary.

    Of a great many, only the first are `different`; the others repeat them under ids of their own, which is quicker.
    """
    rng = Random(seed)
    pairs: list[Pair] = []
    for number in range(count):
        if number >= different:
            pairs.append(replace(pairs[number - different], id=content_hash([seed, number])[:16]))
            continue
        if number < len(INJECTIONS):
            harm = INJECTIONS[number]
            texts = (f"Say {harm}", f"{harm} old{_WORD_OF_HARM} {harm}", f"{harm} new{_WORD_OF_HARM} {harm}")
        elif number < len(INJECTIONS) + len(OTHER_TEXTS):
            texts = OTHER_TEXTS[number - len(INJECTIONS)]
        else:
            answer = passage(rng, int(characters * rng.lognormvariate(0, 0.4) / 1.08))
            better = revised(rng, answer, rng.betavariate(1.2, 4))
            texts = (f"Explain {rng.choice(TOPICS)} to me. {passage(rng, characters // 10)}", answer, better)
        pairs.append(_pair(f"{content_hash([seed, number])[:16]}", *texts, reasoning=sentence(rng)))
    return pairs


def _pair(id: str, prompt: str, rejected: str, chosen: str, reasoning: str = "") -> Pair:
    messages = ({"role": "user", "content": prompt},)
    models = {"chosen": "world-reviser", "rejected": "world-target"}
    return Pair(id, messages, chosen, rejected, reasoning, models, contrast_of(chosen, rejected)._asdict())


DROPS = (
    Dropped("target", "truncated", "the answer ran into max_tokens; raise target.max_tokens"),
    Dropped("reviser", "no_label", "{corrected_student_solution} does not stand at the start of a line"),
    Dropped("reviser", "http_500", "<script>alert('dropped')</script> Internal Server Error", failed=True),
    Dropped("filter", "identical", "chosen and rejected are the same"),
    Dropped("filter", "allusion", "in this corrected version of the student's solution we see"),
)


def write_dataset(folder: Path, pairs: Sequence[Pair], drops: int = 0, test_fraction: float = 0.05) -> Path:
    """A dataset folder as `clair build` leaves it, without its ledger: these pairs, and a number of dropped rows."""
    writer = DatasetWriter(folder, seed=0, test_fraction=test_fraction)
    for pair in pairs:
        writer.add(pair.row())
    for number in range(drops):
        writer.drop(DROPS[number * 7 % 11 % len(DROPS)].row(content_hash(["dropped", number])[:16]))
    files = writer.close(keep=True)
    manifest = _manifest(writer, files)
    write_json(folder / "manifest.json", manifest)
    write_atomically(folder / "README.md", card(manifest))
    return folder


def _manifest(writer: DatasetWriter, files: dict[str, str]) -> dict[str, Any]:
    rows = writer.pairs + writer.counts["dropped"]
    splits = {split: writer.counts[split] for split in ("train", "test")}
    tokens = {"prompt": 130 * rows, "completion": 560 * rows, "calls": rows, "reused": 12, "retries": 3}
    return {
        "format": 1,
        "pipeline": "revised",
        "counts": {"prompts": rows, "pairs": writer.pairs, **splits, "dropped": writer.counts["dropped"]},
        "drop_reasons": dict(sorted(writer.reasons.items())),
        "failed": writer.failed,
        "contrast": writer.contrast_means(),
        "models": {role: {"model": f"world-{role}", "identity": role} for role in ("target", "reviser")},
        "sampling": {"target": {"temperature": 0.6, "max_tokens": 512}, "reviser": {"temperature": 0.7}},
        "tokens": {"target": tokens, "reviser": {**tokens, "prompt": 690 * rows}},
        "files": files,
        "seed": 0,
        "recipe": {"pipeline": "revised", "out": "runs/pairs"},
        "python": "3.11",
        "versions": {"clair-apo": "0.1.0"},
        "seconds": 61.5,
    }
