"""Run `apo advise`: collect replies, measure likelihoods, apply the rule, and write advice.json."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.advice.config import OWN_ANSWERS, RESULT, AdviceInputs, AdviseConfig, load_inputs
from apo.advice.judge_evidence import CollectedReplies, collect_replies
from apo.advice.likelihood import LikelihoodEvidence, as_interval, measure_likelihood
from apo.advice.rule import MAX_STRANGE, Evidence, advise, pilot_order, refusal, sample_size
from apo.advice.tables import advice_lines, evidence_table
from apo.analysis.bootstrap import Interval
from apo.evaluation.config import Outcome, redacted, resumable_ledger
from apo.evaluation.winrate.verdicts import Comparison, prompt_key, summary
from clair.core.errors import UserError
from clair.core.event_loop import run_async
from clair.core.files import write_atomically, write_json
from clair.core.provenance import provenance
from clair.core.statistics import clustered_mean, wilson
from clair.data.contrast import contrast_of
from clair.pipeline.steps import position_bias

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True, repr=False)
class AdviceOutcome(Outcome):
    """The outcome of a run. `result` is the content of advice.json, None if the run ended early."""

    result: Mapping[str, Any] | None = None

    @property
    def headline(self) -> str | None:
        """The recommended objective with its certainty."""
        return next(advice_lines(self.result)) if self.result else None

    def lines(self) -> list[str]:
        """Return the advice, its reason and the warnings, one per line. Raises UserError if the run ended early."""
        return list(advice_lines(self._finished()))

    def table(self) -> Table:
        """Return the evidence with 95 % intervals as the command prints it. Raises UserError if the run ended early."""
        result = self._finished()
        return evidence_table(result, str(result["settings"]["dataset"]))

    def _finished(self) -> Mapping[str, Any]:
        if self.result is None:
            raise UserError(f"{self!r}")
        return self.result


def run(
    config: AdviseConfig, *, inputs: AdviceInputs | None = None, log: Callable[[str], None] = lambda _: None
) -> AdviceOutcome:
    """Collect the evidence and write advice.json. Raises UserError before any work for what the user can correct."""
    inputs = inputs or load_inputs(config)
    out, started = Path(config.out), time.monotonic()
    # Above this limit the rule refuses the pairs, so a judge would be paid for nothing.
    in_template = sum(inputs.strange.values()) <= MAX_STRANGE * len(inputs.rows)
    with resumable_ledger(config, RESULT) as ledger:
        replies = run_async(
            collect_replies(config, inputs, ledger, log, judge=config.judge is not None and in_template)
        )
    if early := AdviceOutcome.early(out, replies.stopped, replies.failures):
        return early
    own_answers = [_complete_answer(replies, inputs, row) for row in inputs.rows]
    cut_off = sum(answer.truncated for answer in replies.own_answers.values())
    if sum(text is not None for text in own_answers) < max(2, len(own_answers) / 2):
        raise UserError(
            f"the model ends {len(replies.own_answers) - cut_off} of {len(own_answers)} answers within "
            f"{config.model.max_tokens} tokens: it does not follow its chat template; give a model that does, or raise "
            "model.max_tokens if its answers are long"
        )
    _write_own_answers(out / OWN_ANSWERS, inputs, own_answers)
    assert config.model.path is not None
    trust = config.model.trust_remote_code
    likelihood = measure_likelihood(
        config.model.path, inputs.rows, own_answers, seed=config.seed, trust_remote_code=trust, log=log
    )
    result = {**_result(inputs, replies, likelihood), "settings": redacted(config), **provenance()}
    write_json(out / RESULT, {**result, "seconds": round(time.monotonic() - started, 1)})
    return AdviceOutcome(out=out, result=result)


def _write_own_answers(file: Path, inputs: AdviceInputs, answers: Sequence[str | None]) -> None:
    """Write the model's complete answers, which the guard of a training run can read."""
    rows = [
        {"prompt": list(row["prompt"]), "answer": text}
        for row, text in zip(inputs.rows, answers, strict=True)
        if text is not None
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(file, lines.encode("utf-8", "backslashreplace"))


def _complete_answer(replies: CollectedReplies, inputs: AdviceInputs, row: Mapping[str, Any]) -> str | None:
    answer = replies.own_answers.get(prompt_key(inputs.prompt(row)))
    return None if answer is None or answer.truncated else answer.text


def _result(inputs: AdviceInputs, replies: CollectedReplies, likelihood: LikelihoodEvidence) -> dict[str, Any]:
    contrast = contrast_intervals(inputs.rows)
    evidence = evidence_of(inputs, replies, likelihood, contrast)
    advice = advise(evidence)
    notes = [f"the judge is not used: {replies.distrust_reason}"] if replies.distrust_reason else []
    if evidence.win is None and not replies.distrust_reason:
        notes.append(
            "without a judge, it is unknown if winners are better than losers, or than the model's own answers; this "
            "advice is less certain than with one"
        )
    if len(inputs.rows) < sample_size(0.1):
        notes.append(
            f"{len(inputs.rows)} prompts; {sample_size(0.1)} are needed to detect winners that win 3 of 5 times"
        )
    if inputs.strange:
        counts = "; ".join(f"{count}: {mismatch}" for mismatch, count in inputs.strange.items())
        notes.append(f"{sum(inputs.strange.values())} of {len(inputs.rows)} prompts do not fit its template ({counts})")
    notes += [
        f"{count} pairs are left out ({reason.replace('_', ' ')})" for reason, count in likelihood.left_out.items()
    ]
    return {
        "format": 1,
        "advice": asdict(advice),
        "refused": refusal(evidence) is not None,
        "pilot_order": pilot_order(evidence),
        "notes": notes,
        "sample": {
            "rows": len(inputs.rows),
            "prompts": inputs.prompts,
            "pairs": inputs.pairs,
            "own": likelihood.own_answers,
        },
        "evidence": asdict(evidence),
        "contrast": {name: asdict(value) for name, value in contrast.items()},
        "likelihood": {name: asdict(value) for name, value in likelihood.intervals.items()},
        "judge": _judge_summary(replies),
        "strange": dict(inputs.strange),
        "usage": replies.usage,
    }


def evidence_of(
    inputs: AdviceInputs, replies: CollectedReplies, likelihood: LikelihoodEvidence, contrast: Mapping[str, Interval]
) -> Evidence:
    """Return the evidence for the rule, without the verdicts of a distrusted judge."""
    judged = {
        name: None if replies.distrust_reason else preference_rate(getattr(replies, name)) for name in ("win", "right")
    }
    names = ("winner_gap", "loser_gap", "winner_total", "coherence", "displacement")
    return Evidence(
        pairs=inputs.pairs,
        parameters=likelihood.parameters,
        **judged,
        **{name: likelihood.intervals[name] for name in names},
        longer=contrast["longer"],
        winners_own=inputs.winners_own,
        losers_own=inputs.losers_own,
        strange=sum(inputs.strange.values()) / len(inputs.rows),
    )


def preference_rate(compared: Sequence[Comparison]) -> Interval | None:
    """Return the share of comparisons that the winner wins, with a tie as one half; None without a readable verdict."""
    win_rate = summary(compared)["win_rate"] if compared else None
    return Interval(win_rate["mean"], *win_rate["ci95"]) if win_rate and win_rate["ci95"] else None


def contrast_intervals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """Return means of Jaccard, Levenshtein and length ratio, and the share of longer winners, with ties as one half."""
    pairs = [tuple(row[side][-1]["content"] for side in ("chosen", "rejected")) for row in rows]
    contrasts = [contrast_of(*pair) for pair in pairs]
    names = ("jaccard", "levenshtein", "length_ratio")
    means = {name: [float(getattr(contrast, name)) for contrast in contrasts] for name in names}
    longer = math.fsum(
        0.5 if contrast.length_ratio == 1 else float(contrast.length_ratio > 1) for contrast in contrasts
    )
    intervals = {name: as_interval(clustered_mean(values, range(len(values)))) for name, values in means.items()}
    return {**intervals, "longer": as_interval(wilson(longer, len(contrasts)))}


def _judge_summary(replies: CollectedReplies) -> dict[str, Any] | None:
    if not replies.plants:
        return None
    summaries = {name: summary(getattr(replies, name)) for name in ("plants", "win", "right") if getattr(replies, name)}
    return {
        "used": replies.distrust_reason is None,
        "distrust": replies.distrust_reason,
        "position": position_bias(replies.verdicts_by_position) if replies.verdicts_by_position else None,
        **summaries,
    }
