"""All of `apo advise`: asks, looks, applies the rule, and writes advice.json; run again, it pays for nothing twice."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apo.advice.config import RESULT, AdviseConfig, Checked, check
from apo.advice.judge_evidence import Asked, ask
from apo.advice.likelihood import Seen, interval, look
from apo.advice.rule import STRANGE, Evidence, advise, sample_size
from apo.analysis.distinguishability import Interval
from apo.evaluation.config import public, same_settings
from apo.evaluation.winrate.run import Outcome
from apo.evaluation.winrate.verdicts import Compared, key_of, summary
from clair.core.errors import UserError
from clair.core.event_loop import run_async
from clair.core.files import write_json
from clair.core.provenance import provenance
from clair.core.statistics import clustered_mean, wilson
from clair.data.contrast import contrast_of
from clair.ledger.ledger import Ledger
from clair.pipeline.build import lock_output
from clair.pipeline.steps import position_bias


def run(
    config: AdviseConfig, *, checked: Checked | None = None, tell: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Gather the evidence and write advice.json. Raises UserError for the user's mistakes before any work."""
    checked = checked or check(config)
    out, started = Path(config.out), time.monotonic()
    known = sum(checked.strange.values()) <= STRANGE * len(checked.rows)  # else no judge is paid for what is refused
    with lock_output(out), Ledger(config.ledger_path) as ledger:
        same_settings(config, out, ledger, RESULT)
        asked = run_async(ask(config, checked, ledger, tell, judge=config.judge is not None and known))
    if asked.stopped or asked.failures:
        return Outcome(out, None, len(asked.failures), next(iter(asked.failures), ""), asked.stopped)
    ended = [_ended(asked, checked, row) for row in checked.rows]
    cut_off = sum(answer.truncated for answer in asked.own.values())
    if sum(text is not None for text in ended) < max(2, len(ended) / 2):
        raise UserError(
            f"the model ends {len(asked.own) - cut_off} of {len(ended)} answers within {config.model.max_tokens} "
            "tokens: it has not learned its chat template; give one that has, or raise --max-tokens where they are long"
        )
    assert config.model.path is not None
    trust = config.model.trust_remote_code
    seen = look(config.model.path, checked.rows, ended, seed=config.seed, trust_remote_code=trust, tell=tell)
    result = {**_result(checked, asked, seen), "settings": public(config), **provenance()}
    write_json(out / RESULT, {**result, "seconds": round(time.monotonic() - started, 1)})
    return Outcome(out, result)


def _ended(asked: Asked, checked: Checked, row: Mapping[str, Any]) -> str | None:
    answer = asked.own.get(key_of(checked.prompt(row)))
    return None if answer is None or answer.truncated else answer.text


def _result(checked: Checked, asked: Asked, seen: Seen) -> dict[str, Any]:
    contrast = contrast_intervals(checked.rows)
    evidence = evidence_of(checked, asked, seen, contrast)
    advice = advise(evidence)
    notes = [f"the judge is not used: {asked.distrust}"] if asked.distrust else []
    if evidence.win is None and not asked.distrust:
        notes.append(
            "no judge was asked: nobody knows whether winners are better than losers, or than what the model says "
            "itself; this is worth less than with one"
        )
    if len(checked.rows) < sample_size(0.1):
        notes.append(f"{len(checked.rows)} prompts; {sample_size(0.1)} are needed to see winners that win 3 times of 5")
    if checked.strange:
        told = "; ".join(f"{count}: {what}" for what, count in checked.strange.items())
        notes.append(f"{sum(checked.strange.values())} of {len(checked.rows)} prompts are not in its template ({told})")
    notes += [f"{count} pairs are left out ({reason.replace('_', ' ')})" for reason, count in seen.left_out.items()]
    return {
        "format": 1,
        "advice": asdict(advice),
        "notes": notes,
        "sample": {"rows": len(checked.rows), "prompts": checked.prompts, "pairs": checked.pairs, "own": seen.own},
        "evidence": asdict(evidence),
        "contrast": {name: asdict(found) for name, found in contrast.items()},
        "likelihood": {name: asdict(found) for name, found in seen.intervals.items()},
        "judge": _judge(asked),
        "strange": dict(checked.strange),
        "usage": asked.usage,
    }


def evidence_of(checked: Checked, asked: Asked, seen: Seen, contrast: Mapping[str, Interval]) -> Evidence:
    """What the rule is told. A judge that is not believed has no say."""
    judged = {name: None if asked.distrust else rate(getattr(asked, name)) for name in ("win", "right")}
    names = ("winner_gap", "loser_gap", "winner_total", "coherence", "displacement")
    return Evidence(
        pairs=checked.pairs,
        parameters=seen.parameters,
        **judged,
        **{name: seen.intervals[name] for name in names},
        longer=contrast["longer"],
        winners_own=checked.winners_own,
        losers_own=checked.losers_own,
        strange=sum(checked.strange.values()) / len(checked.rows),
    )


def rate(compared: Sequence[Compared]) -> Interval | None:
    """How often the winner is preferred, a tie one half; None where nobody was asked or no verdict could be read."""
    found = summary(compared)["win_rate"] if compared else None
    return Interval(found["mean"], *found["ci95"]) if found and found["ci95"] else None


def contrast_intervals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """Means of Jaccard, Levenshtein and length ratio, and the share of longer winners (equal lengths: one half)."""
    pairs = [tuple(row[side][-1]["content"] for side in ("chosen", "rejected")) for row in rows]
    found = [contrast_of(*pair) for pair in pairs]
    names = ("jaccard", "levenshtein", "length_ratio")
    means = {name: [float(getattr(one, name)) for one in found] for name in names}
    longer = math.fsum(0.5 if one.length_ratio == 1 else float(one.length_ratio > 1) for one in found)
    told = {name: interval(clustered_mean(values, range(len(values)))) for name, values in means.items()}
    return {**told, "longer": interval(wilson(longer, len(found)))}


def _judge(asked: Asked) -> dict[str, Any] | None:
    if not asked.plants:
        return None
    parts = {name: summary(getattr(asked, name)) for name in ("plants", "win", "right") if getattr(asked, name)}
    return {
        "used": asked.distrust is None,
        "distrust": asked.distrust,
        "position": position_bias(asked.seen) if asked.seen else None,
        **parts,
    }
