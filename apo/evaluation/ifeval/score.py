"""Items of IFEval, and their aggregation to shares of prompts and instructions with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from apo.evaluation.answers import RowAnswer
from apo.evaluation.ifeval.benchmark import IFEvalRow
from apo.evaluation.ifeval.checkers import follows
from apo.evaluation.intervals import score_interval
from apo.evaluation.records.ifeval import MEASURES, IFEvalItem, Instruction, InstructionScore


def make_item(answer: RowAnswer[IFEvalRow]) -> IFEvalItem:
    """The line of items.jsonl. What has no answer follows no instruction."""
    row = answer.row
    text = answer.text if answer.unresolved is None else ""
    results = follows(row.text, row.instructions, row.arguments, text)
    return IFEvalItem(
        row=row.row,
        sample=answer.sample,
        prompt_key=row.key,
        question=row.question,
        prompt=row.text,
        response=answer.text,
        truncated=answer.truncated,
        instructions=tuple(
            Instruction(type=name, kwargs=kwargs, loose=loose, strict=strict)
            for name, kwargs, (loose, strict) in zip(row.instructions, row.arguments, results, strict=True)
        ),
        unresolved=answer.unresolved,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
    )


def aggregate(items: Sequence[IFEvalItem], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The fields of an `IFEvalScore` that are computed from its items. A group without an instruction is left out."""
    scored = {measure: [scored for item in items for scored in item.scored(measure)] for measure in MEASURES}
    intervals = {measure: score_interval(scores) for measure, scores in scored.items()}
    types = sorted({name for item in items for name in (i.type for i in item.instructions)})

    def of_types(names: Collection[str]) -> InstructionScore | None:
        loose, strict = ([s for s in scored[m] if s.kind in names] for m in ("instruction_loose", "instruction_strict"))
        return InstructionScore(loose=score_interval(loose), strict=score_interval(strict)) if loose else None

    by_group = {name: of_types(members) for name, members in groups.items()}
    return {
        **{measure: interval.mean for measure, interval in intervals.items()},
        "intervals": intervals,
        "by_type": {name: of_types([name]) for name in types},
        "groups": groups,
        "by_group": {name: score for name, score in by_group.items() if score},
        "unresolved": sum(item.unresolved is not None for item in items),
        "unresolved_reasons": dict(sorted(Counter(i.unresolved for i in items if i.unresolved).items())),
        "unanswered": sum(item.unanswered for item in items),
        "truncated": sum(item.truncated for item in items),
    }
