"""What a manifest says to a reader: the dataset card, sentences on scores and balance, and doubts about quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from clair.core.files import content_hash
from clair.data.dataset import SPLITS


def card(manifest: Mapping[str, Any]) -> str:
    """The dataset card: front matter for `datasets` and the hub, then a summary for readers."""
    counts, contrast = manifest["counts"], manifest["contrast"]
    # A split without rows would make `datasets.load_dataset` fail for the other split too.
    splits = [split for split in SPLITS if counts[split]] or ["train"]
    lines = [
        "---",
        "configs:",
        "- config_name: default",
        # `datasets` keys its cache by this text, not by the data: without the hash, a rebuilt folder yields old rows.
        f"  description: files {content_hash(manifest['files'])[:16]}",
        "  data_files:",
        *(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in splits),
        "task_categories:\n- text-generation",
        "tags:\n- preference\n- clair\n- dpo",
        "---",
        "",
        "# Preference pairs",
        "",
        f"{counts['pairs']} pairs ({counts['train']} train, {counts['test']} test) from {counts['prompts']} prompts, "
        f"built by the `{manifest['pipeline']}` pipeline of clair-apo.",
        "",
        *(f"- {role}: `{model['model']}`, {manifest['sampling'][role]}" for role, model in manifest["models"].items()),
        *(f"- dropped, {reason}: {count}" for reason, count in manifest["drop_reasons"].items()),
        *(f"- mean {name}: {value:.3f}" for name, value in contrast.items()),
        *_position_lines(manifest),
        *(f"- {text}" for text in scores_texts(manifest)),
        *(f"- {balance_text(balance)}" for balance in [manifest.get("balance")] if balance),
        "",
        "`manifest.json` holds the exact recipe, versions and hashes; `dropped.jsonl` every prompt without a pair.",
        "",
    ]
    return "\n".join(lines)


def _position_lines(manifest: Mapping[str, Any]) -> list[str]:
    if not (position := manifest.get("position")):
        return []
    warning = "; **the judge is biased by position: do not trust these labels**" if position["biased"] else ""
    return [f"- the judge preferred what was shown first in {position['share_first']:.1%} of its verdicts{warning}"]


def scores_texts(manifest: Mapping[str, Any]) -> list[str]:
    """Sentences on the scores of a build: prompts whose scores hardly vary, and the agreement of judges."""
    if not (scores := manifest.get("scores")):
        return []
    texts = [f"scores hardly vary for {scores['flat']} of {scores['prompts']} prompts"]
    for entry in scores["agreement"]:
        first, second = entry["judges"]
        lo, hi = entry["ci95"] or (0.0, 1.0)
        share = f"{entry['share']:.1%} of the pairs of answers (95 % interval {lo:.1%} to {hi:.1%}; chance 50 %)"
        texts.append(f"{first} and {second} agree on the order of {share}, in {entry['prompts']} prompts")
    return texts


def balance_text(balance: Mapping[str, Any]) -> str:
    """The mean difference in tokens between winners and losers before and after balancing, with 95 % intervals."""
    texts = []
    for name in ("before", "after"):
        estimate = balance[name]
        if estimate["mean"] is None:
            texts.append("no pair")
            continue
        interval = " to ".join(f"{end:+.1f}" for end in estimate["ci95"] or ())
        texts.append(f"{estimate['mean']:+.1f}" + (f" (95 % interval {interval})" if interval else ""))
    pairs = balance["before"]["pairs"] - balance["after"]["pairs"]
    return (
        f"tokens of the winner less those of the loser: {texts[1]} on average; {texts[0]} before {pairs} pairs were "
        f"left out"
    )


MAX_UNREADABLE, MAX_ALLUDING = 0.2, 0.2
"""Limits for a reviser: the share of its first replies that cannot be read, and the share of its revisions that allude
to the correction. Of recorded GPT-4 revisions all can be read and 3 of 20 allude."""
MIN_HELD_OUT = 5
"""The smallest number of held-out pairs to measure on."""


def quality_warnings(manifest: Mapping[str, Any]) -> list[str]:
    """Sentences on what makes a dataset doubtful for training, with numbers; often none."""
    warnings, counts, test = [], manifest["counts"], manifest["recipe"]["test_fraction"]
    if test and counts["pairs"] and counts["test"] < MIN_HELD_OUT:
        fraction = next((larger for larger in (0.2, 0.3, 0.5) if larger > test), 0.9)
        warnings.append(
            f"{counts['test']} of {counts['pairs']} pairs are held out (test_fraction {test:g}), too few to measure "
            f"on; a larger one, such as {fraction}, with --update pays for no reply again"
        )
    if balance := manifest.get("balance"):
        made, remaining = balance["before"]["pairs"], balance["after"]["pairs"]
        if remaining < made / 2:
            warnings.append(
                f"balance left out {made - remaining} of {made} pairs, because their winners are longer; a larger "
                f"balance.tokens leaves out fewer, or let both models answer at similar length"
            )
    return [*warnings, *_doubtful_reviser(manifest)]


def _doubtful_reviser(manifest: Mapping[str, Any]) -> Iterator[str]:
    outcomes, pairs = manifest["first_replies"], manifest["counts"]["pairs"]
    replies, unreadable = sum(outcomes.values()), sum(n for name, n in outcomes.items() if name != "read")
    filtered = {r.removeprefix("filter."): n for r, n in manifest["drop_reasons"].items() if r.startswith("filter.")}
    revisions, alluding = pairs + sum(filtered.values()), filtered.get("allusion", 0) + filtered.get("comment", 0)
    if unreadable <= MAX_UNREADABLE * replies and alluding <= MAX_ALLUDING * revisions:
        return
    reasons = ", ".join(f"{name} {count}" for name, count in outcomes.items() if name != "read")
    missed = f"{unreadable} of {replies} first replies could not be read" + (f" ({reasons})" if reasons else "")
    yield (
        f"the reviser's work is doubtful: {missed}; of {revisions} revisions {alluding} speak of the correction and "
        f"{filtered.get('identical', 0)} change nothing. Nobody has judged whether the {pairs} winners are better: "
        f"look at them, or let a judge compare them (apo advise), before you train"
    )
