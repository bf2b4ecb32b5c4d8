"""Held-out pairs after training: does the model prefer the winners, and what became of their likelihood?

Reward accuracy against a rule that looks at lengths only, margins, displacement and divergence from the reference, each
with an interval clustered by prompt. CLAIR's pairs are near-duplicates, for which the likelihood of a winner can fall
while its margin grows (likelihood displacement, arXiv 2410.08847): so log-probs are told apart by tokens that both
responses share and tokens that were edited.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from clair.core.errors import UserError
from clair.core.files import content_hash, write_atomically, write_json
from clair.core.progress import progress
from clair.core.provenance import provenance
from clair.core.recipe import Recipe, resolved
from clair.core.statistics import Estimate, clustered_mean, clustered_score, paired_difference
from clair.data.contrast import shared_tokens
from clair.storage.object_store import is_url

if TYPE_CHECKING:
    from torch import Tensor

RESULT = "pairs.json"
ROWS = "pairs.jsonl"
_CHUNK = 256
"""Positions whose whole vocabulary is in float32 at once."""


class PairsConfig(Recipe):
    """What is measured: a trained model or adapter against its reference on a split of a dataset."""

    model: str
    reference: str
    dataset: str
    split: str = "test"
    beta: float = Field(0.1, gt=0)
    limit: int | None = Field(None, ge=1)
    max_length: int | None = Field(None, ge=2)
    """Pairs longer than this are left out; absent: what the model takes."""
    dtype: str = "float32"
    batch_tokens: int = Field(4096, ge=1)
    trust_remote_code: bool = False
    out: str = Field(min_length=1)


def config_of(model: str | Path, **given: Any) -> PairsConfig:
    """The settings; what is not given is what the run that trained `model` says (its run.json).

    Raises UserError for a key that neither of them knows.
    """
    from apo.run_dir.files import RUN, read_run

    found: dict[str, Any] = {}
    folder = Path(model)
    if (folder / RUN).is_file():
        recipe = read_run(folder)["recipe"]
        sources = recipe["dataset"]
        found = {"reference": recipe["model"], "beta": recipe["beta"]}
        found["trust_remote_code"] = recipe.get("trust_remote_code", False)
        if isinstance(sources, str) or len(sources) == 1:
            found["dataset"] = sources if isinstance(sources, str) else sources[0]["path"]
    found |= {"model": str(model), **{key: value for key, value in given.items() if value is not None}}
    if given.get("dataset") and _is_file(str(given["dataset"])):
        found.setdefault("split", "train")  # what a single file is: somebody has held it out
    for key in ("reference", "dataset"):
        if key not in found:
            raise UserError(f"--{key} is missing: {model} is no folder of `apo train` that says which one it was")
    return PairsConfig(**found)


def _is_file(dataset: str) -> bool:
    return Path(dataset).is_file() or (is_url(dataset) and bool(Path(dataset).suffix))


# ---- one pair


@dataclass(frozen=True, slots=True)
class Response:
    """One response: what training did to its log-prob, in nats, over all tokens and those shared with the other one.

    `kl` is the sum over its tokens of KL(policy || reference) of the whole next-token distribution.
    """

    tokens: int
    shared_tokens: int
    reference: float
    logratio: float
    logratio_shared: float
    kl: float

    @property
    def logratio_edited(self) -> float:
        """The log-ratio of the tokens that the other response does not have."""
        return self.logratio - self.logratio_shared


@dataclass(frozen=True, slots=True)
class Measured:
    """A pair as both models see it; `prompt` is a hash, the same for equal prompts."""

    id: str
    prompt: str
    chosen: Response
    rejected: Response


def compare_models(
    policy: Any,
    reference: Callable[[], AbstractContextManager[Any]],
    pairs: Sequence[dict[str, Any]],
    batch_tokens: int,
) -> Iterator[tuple[int, Measured]]:
    """(place, what both models say) of each pair, the longest first. `reference()` is a context whose value answers as
    the reference: another model, or the same with its adapter off. Nothing is kept for a gradient.
    """
    import torch

    from apo.packing.batch import SIDES, response_mask

    sizes = [len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs]
    order = sorted(range(len(pairs)), key=lambda place: (-sizes[place], place))
    with torch.inference_mode():
        while order:
            count = max(1, batch_tokens // (2 * sizes[order[0]]))
            places, order = order[:count], order[count:]
            chosen = [(pairs[p]["prompt_ids"], pairs[p]["chosen_ids"]) for p in places]
            rejected = [(pairs[p]["prompt_ids"], pairs[p]["rejected_ids"]) for p in places]
            found = _tokens_of(policy, reference, [*chosen, *rejected])
            for at, place in enumerate(places):
                both = found[at], found[len(places) + at]
                marks = shared_tokens(pairs[place]["chosen_ids"], pairs[place]["rejected_ids"])
                responses = []
                for side, three, mark in zip(SIDES, both, marks, strict=True):
                    trained = response_mask(pairs[place], side)
                    parts = (part[torch.tensor(trained, dtype=torch.bool)] for part in three)
                    responses.append(_response(*parts, [*compress(mark, trained)]))
                prompt = content_hash(list(pairs[place]["prompt_ids"]))[:16]
                yield place, Measured(str(pairs[place].get("id", place)), prompt, *responses)


def _tokens_of(
    policy: Any, reference: Callable[[], AbstractContextManager[Any]], rows: Sequence[tuple[list[int], list[int]]]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each (prompt, response): log-probs of its tokens by policy and reference, and their KL, [T] each, float64."""
    import torch

    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for at, (prompt, response) in enumerate(rows):
        ids[at, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        mask[at, : len(prompt) + len(response)] = 1
    ids, mask = ids.to(policy.device), mask.to(policy.device)
    ours = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with reference() as model:
        theirs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = []
    for at, (prompt, response) in enumerate(rows):
        parts = []
        first, last = len(prompt) - 1, len(prompt) + len(response) - 1
        for start in range(first, last, _CHUNK):
            where = slice(start, min(start + _CHUNK, last))
            logps, others = (logits[at, where].float().log_softmax(-1) for logits in (ours, theirs))
            labels = ids[at, where.start + 1 : where.stop + 1, None]
            kl = (logps.exp() * (logps - others)).sum(-1)
            parts.append((logps.gather(-1, labels)[:, 0], others.gather(-1, labels)[:, 0], kl))
        found.append(tuple(torch.cat(columns).double().cpu() for columns in zip(*parts, strict=True)))
    return found


def _response(logps: Tensor, reference: Tensor, kl: Tensor, shared: list[bool]) -> Response:
    import torch

    both = torch.tensor(shared)
    ratio = logps - reference
    sums = (reference.sum(), ratio.sum(), ratio[both].sum(), kl.sum())
    return Response(len(logps), int(both.sum()), *(float(value) for value in sums))


# ---- all pairs


def summary(measured: Sequence[Measured], beta: float) -> dict[str, Any]:
    """The numbers of pairs.json: shares of pairs in [0, 1], nats summed over a response, rewards beta times those.

    A mean of a single prompt has no interval.
    """
    prompts = [pair.prompt for pair in measured]

    def mean(values: Sequence[float]) -> dict[str, Any]:
        return _told(values, prompts, clustered_mean)

    def share(values: Sequence[float]) -> dict[str, Any]:
        return _told(values, prompts, clustered_score)

    sides = {side: [getattr(pair, side) for pair in measured] for side in ("chosen", "rejected")}
    ratios = {side: [response.logratio for response in own] for side, own in sides.items()}
    margins = [beta * (one - other) for one, other in zip(ratios["chosen"], ratios["rejected"], strict=True)]
    right = [_preferred(margin) for margin in margins]
    longer = [_preferred(pair.chosen.tokens - pair.rejected.tokens) for pair in measured]
    prefers = "longer" if math.fsum(longer) >= len(longer) / 2 else "shorter"
    by_length = longer if prefers == "longer" else [1 - value for value in longer]
    return {
        "pairs": len(measured),
        "prompts": len(set(prompts)),
        "beta": beta,
        "reward_accuracy": share(right),
        "ties": share([float(margin == 0) for margin in margins]),
        "margin": mean(margins),
        "rewards": {side: mean([beta * ratio for ratio in own]) for side, own in ratios.items()},
        "length_only": {
            "prefers": prefers,
            "accuracy": share(by_length),
            "reward_accuracy_minus_it": _difference(by_length, right, prompts),
        },
        "length_ratio": mean([pair.chosen.tokens / pair.rejected.tokens for pair in measured]),
        "displacement": {side: _displacement(own, mean, share) for side, own in sides.items()},
        "kl": {side: _divergence(own, mean) for side, own in sides.items()},
    }


def _preferred(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)


def _displacement(own: Sequence[Response], mean: Callable[..., Any], share: Callable[..., Any]) -> dict[str, Any]:
    """What training did to the log-prob of one side: of all tokens, of those both responses share, of the edited."""
    return {
        "reference_logp": mean([response.reference for response in own]),
        "logratio": mean([response.logratio for response in own]),
        "falls": share([float(response.logratio < 0) for response in own]),
        "logratio_shared": mean([response.logratio_shared for response in own]),
        "logratio_edited": mean([response.logratio_edited for response in own]),
        "edited_falls": share([float(response.logratio_edited < 0) for response in own]),
        "edited_tokens": mean([float(response.tokens - response.shared_tokens) for response in own]),
        "tokens": mean([float(response.tokens) for response in own]),
    }


def _divergence(own: Sequence[Response], mean: Callable[..., Any]) -> dict[str, Any]:
    """KL(policy || reference) along the responses of one side: summed over a response, and for a token of it."""
    return {"response": mean([r.kl for r in own]), "token": mean([r.kl / r.tokens for r in own])}


def _told(values: Sequence[float], prompts: Sequence[str], how: Callable[..., Estimate]) -> dict[str, Any]:
    if len(set(prompts)) < 2:
        return {"mean": math.fsum(values) / len(values), "se": None, "ci95": None}
    found = how(values, prompts)
    return {"mean": found.mean, "se": found.se, "ci95": [found.lo, found.hi]}


def _difference(base: Sequence[float], tuned: Sequence[float], prompts: Sequence[str]) -> dict[str, Any]:
    """The mean of tuned minus base, shares both, with its interval and p, as `apo compare` has them."""
    told = {"mean": math.fsum(b - a for a, b in zip(base, tuned, strict=True)) / len(base)}
    found = paired_difference(base, tuned, prompts) if len(set(prompts)) > 1 else None
    if found is None or not found.interval:
        return {**told, "se": None, "ci95": None, "p": found.cautious_p if found and found.differing else None}
    return {**told, "se": found.estimate.se, "ci95": list(found.interval), "p": found.cautious_p}


# ---- a whole measurement


def evaluate(config: PairsConfig, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure, and write pairs.json and pairs.jsonl into `config.out`. Raises UserError before any model is loaded for
    a dataset, split or model that is not there, and where both models have different vocabularies.
    """
    from apo.models import load as models

    name = models.find_model(config.model, config.trust_remote_code)
    reference_name = models.find_model(config.reference, config.trust_remote_code)
    tokenizer = models.load_tokenizer(name)
    pairs = _load(config)
    tokenized = _tokenize(config, pairs, tokenizer, name)
    rows = [dict(row) for row in tokenized.dataset]
    if any(not row["prompt_ids"] for row in rows):
        raise UserError(f"dataset {config.dataset}: a prompt has no tokens, so nothing predicts its answers")
    policy, reference = _models(config, name, reference_name, tokenizer)
    tell(f"{len(rows):,} pairs of {config.dataset}, split {config.split}")
    found: dict[int, Measured] = {}
    with progress("held-out pairs", len(rows)) as work:
        for place, measured in compare_models(policy, reference, rows, config.batch_tokens):
            found[place] = measured
            work.advance()
    ordered = [found[place] for place in range(len(rows))]
    result = {
        "format": 1,
        **summary(ordered, config.beta),
        "dropped": tokenized.dropped,
        "notes": tokenized.notes,
        "settings": resolved(config),
        **provenance(),
    }
    out = Path(config.out)
    lines = [json.dumps(_row(pair, config.beta), ensure_ascii=False) + "\n" for pair in ordered]
    write_atomically(out / ROWS, "".join(lines))
    write_json(out / RESULT, result)
    return result


def _row(pair: Measured, beta: float) -> dict[str, Any]:
    sides = {side: getattr(pair, side) for side in ("chosen", "rejected")}
    fields = ("tokens", "shared_tokens", "reference", "logratio", "logratio_shared", "kl")
    told = {f"{side}_{name}": getattr(response, name) for side, response in sides.items() for name in fields}
    margin = beta * (pair.chosen.logratio - pair.rejected.logratio)
    return {"id": pair.id, "prompt": pair.prompt, "margin": margin, **told}


def _load(config: PairsConfig) -> Any:
    from apo.data.sources import Source, load_eval, split_names

    known = is_url(config.dataset) or Path(config.dataset).exists()
    names = split_names(config.dataset) if known else [config.split]
    if config.split not in names:
        raise UserError(f"dataset {config.dataset} has no split {config.split!r}; found: {', '.join(names)}")
    pairs = load_eval([Source(path=config.dataset)], config.split)
    if pairs is None:
        raise UserError(f"dataset {config.dataset}, split {config.split!r}, has no pairs; nothing can be measured")
    return pairs if config.limit is None else pairs.select(range(min(config.limit, len(pairs))))


def _tokenize(config: PairsConfig, pairs: Any, tokenizer: Any, name: Any) -> Any:
    from apo.data.tokenize import eos_ids, tokenize
    from apo.models import load as models

    most = config.max_length or models.context_length(name)
    found = tokenize(pairs, tokenizer, most, eos_ids(tokenizer, models.load_generation_config(name)), config.split)
    if not len(found.dataset):
        raise UserError(f"all {len(pairs):,} pairs are longer than {most:,} tokens; nothing can be measured")
    return found


def _models(
    config: PairsConfig, name: Any, reference_name: Any, tokenizer: Any
) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """The policy, and a context that answers as the reference: its base with the adapter off, or a second model."""
    import torch
    from transformers.utils import logging

    from apo.models import load as models

    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = models.load_model(name, dtype=config.dtype).to(device).eval()
    models.check_vocabulary(policy, tokenizer, name.path)
    if name.is_adapter and _same(name.base, reference_name.path):
        return policy, lambda: _adapter_off(policy)
    reference = models.load_model(reference_name, dtype=config.dtype).to(device).eval()
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{name.path} has {sizes[0]:,} tokens and the reference {reference_name.path} {sizes[1]:,}; the reference "
            f"is the model that training started from"
        )
    return policy, lambda: nullcontext(reference)


def _same(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


@contextmanager
def _adapter_off(model: Any) -> Iterator[Any]:
    with model.disable_adapter():
        yield model
