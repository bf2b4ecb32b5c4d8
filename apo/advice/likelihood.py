"""Evidence from the model: log-probs of winners, losers and its own answers, and the effect of the first training step.

The first steps of DPO and APO-zero have the same direction: winner up and loser down by the same amount. The effect of
one pair's step on the log-probs of *other* pairs is computed from the gradients of the LM head, as by `apo
distinguish`. It shows if the pairs have a common direction, and if winners become more or less likely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from apo.analysis.bootstrap import DRAWS, Interval
from clair.core.progress import progress
from clair.core.statistics import Estimate, clustered_mean, wilson
from clair.storage.location import cache_root

if TYPE_CHECKING:
    from torch import Tensor

_BATCH_TOKENS = 8192


class ResponseLogp(NamedTuple):
    """A response's log-prob, summed in nats, and its number of tokens, end of turn included."""

    logp: float
    tokens: int

    @property
    def mean(self) -> float:
        """The log-prob per token."""
        return self.logp / self.tokens


def as_interval(estimate: Estimate) -> Interval:
    """Return an estimate as a value with its 95 % interval."""
    return Interval(estimate.mean, estimate.lo, estimate.hi)


def gaps(
    winners: Sequence[ResponseLogp], losers: Sequence[ResponseLogp], own_answers: Sequence[ResponseLogp | None]
) -> dict[str, Interval]:
    """Return differences of log-probs in nats, with intervals over pairs: per token, and (`_total`) per response.

    A pair whose own answer is incomplete (None) counts in the differences of winner and loser only.
    """
    pairs = list(zip(winners, losers, strict=True))
    triples = [(*pair, answer) for pair, answer in zip(pairs, own_answers, strict=True) if answer is not None]

    def mean(values: Sequence[float]) -> Interval:
        return as_interval(clustered_mean(values, range(len(values))))

    return {
        "own": mean([answer.mean for _, _, answer in triples]),
        "winner_gap": mean([winner.mean - answer.mean for winner, _, answer in triples]),
        "loser_gap": mean([loser.mean - answer.mean for _, loser, answer in triples]),
        "winner_total": mean([winner.logp - answer.logp for winner, _, answer in triples]),
        "loser_total": mean([loser.logp - answer.logp for _, loser, answer in triples]),
        "pair_gap": mean([winner.mean - loser.mean for winner, loser in pairs]),
        "pair_total": mean([winner.logp - loser.logp for winner, loser in pairs]),
    }


def first_step(winners: Tensor, losers: Tensor, *, seed: int = 0, draws: int = DRAWS) -> dict[str, Interval]:
    """Measure the effect on each pair of the mean step v_j = winner_j - loser_j of all other pairs.

    `winners` and `losers` are gradients of log-probs, [n, m].

    coherence     the mean of <v_i, v_j>, i != j, over the mean of |v_i|^2
    displacement  the mean of <winner_i, v_j> over that of <v_i, v_j>, i != j
    winner_wrong  share of pairs whose winner falls: <winner_i, sum of v_j> < 0, the wrong side of APO-zero's anchor
    loser_wrong   share of pairs whose loser rises

    The intervals of the first two are percentiles of a bootstrap over pairs, in which no pair is combined with itself.
    """
    import torch

    from apo.analysis.bootstrap import bootstrap_weights

    steps = (winners - losers).double()
    rise, fall = (side.double() @ steps.T for side in (winners, losers))
    squares = (steps**2).sum(1)
    for products in (rise, fall):
        products.fill_diagonal_(0)
    n, weights = len(steps), bootstrap_weights(len(steps), draws, seed).double()

    def ratios(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return coherence and displacement of samples with weights [draws, n], whose rows sum to 1."""
        winner, margin = ((weight @ products * weight).sum(1) for products in (rise, rise - fall))
        return margin / (1 - (weight**2).sum(1)) / (weight @ squares), winner / margin

    values, spread = ratios(torch.full((1, n), 1 / n, dtype=torch.float64)), ratios(weights)
    intervals = {}
    for name, value, drawn in zip(("coherence", "displacement"), values, spread, strict=True):
        lo, hi = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
        intervals[name] = Interval(float(value), lo, hi)
    wrong = int((rise.sum(1) < 0).sum()), int((fall.sum(1) > 0).sum())
    shares = [as_interval(wilson(count, n)) for count in wrong]
    return {**intervals, "winner_wrong": shares[0], "loser_wrong": shares[1]}


class LikelihoodEvidence(NamedTuple):
    """The evidence from the model."""

    parameters: int
    intervals: dict[str, Interval]
    """The results of `gaps` and `first_step`."""
    left_out: dict[str, int]
    """The number of pairs left out, by reason."""
    own_answers: int
    """The number of own answers in the comparison."""


def measure_likelihood(
    path: str,
    rows: Sequence[Mapping[str, Any]],
    own_answers: Sequence[str | None],
    *,
    seed: int = 0,
    trust_remote_code: bool = False,
    log: Callable[[str], None] = lambda _: None,
) -> LikelihoodEvidence:
    """Load the model and measure all rows. `own_answers` are its answers to them, None for an incomplete answer."""
    import torch

    from apo.models import load as models

    name = models.find_model(path, trust_remote_code)
    tokenizer = models.load_tokenizer(name)
    (pairs, own_rows), left_out = _tokenized(name, tokenizer, rows, own_answers)
    model: Any = models.load_model(name)  # Any: the types of transformers reject `.to(device)`
    models.check_vocabulary(model, tokenizer, name.base)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False).eval()
    with progress(f"log-probs and gradients of {len(pairs)} pairs", len(pairs) + len(own_rows)) as work:
        gradients = _gradients(model, pairs, log, work.advance)
        own_logps = dict(zip((row["_index"] for row in own_rows), _logps(model, own_rows, work.advance), strict=True))
    sums = {
        side: [ResponseLogp(*columns) for columns in gradients[f"{side}_logps"].tolist()]
        for side in ("chosen", "rejected")
    }
    matched = [own_logps.get(row["_index"]) for row in pairs]
    intervals = gaps(sums["chosen"], sums["rejected"], matched) | first_step(
        gradients["chosen"], gradients["rejected"], seed=seed
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return LikelihoodEvidence(parameters, intervals, left_out, sum(columns is not None for columns in matched))


def _tokenized(name: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], own_answers: Sequence[str | None]) -> Any:
    """Return pairs and own answers as token ids, with their row's index in `_index`, and the counts of dropped pairs.

    Raises UserError if fewer than two of either fit the model's context.
    """
    from datasets import Dataset

    from apo.data.tokenize import eos_ids, tokenize
    from apo.models import load as models
    from clair.core.errors import UserError

    eos, max_length = eos_ids(tokenizer, models.load_generation_config(name)), models.context_length(name)
    columns = ("prompt", "chosen", "rejected")
    modes = [{"chat_template_kwargs": row.get("chat_template_kwargs")} for row in rows]
    paired = [{**{c: row[c] for c in columns}, **modes[index], "_index": index} for index, row in enumerate(rows)]
    single = [
        {
            "prompt": row["prompt"],
            "completion": [{"role": "assistant", "content": text}],
            "label": True,
            **modes[index],
            "_index": index,
        }
        for index, (row, text) in enumerate(zip(rows, own_answers, strict=True))
        if text is not None
    ]
    tokenized = [tokenize(Dataset.from_list(split), tokenizer, max_length, eos, "given") for split in (paired, single)]
    token_rows = [[dict(row) for row in split.dataset] for split in tokenized]
    if min(map(len, token_rows)) < 2:
        raise UserError(
            f"{len(token_rows[0])} pairs and {len(token_rows[1])} own answers fit the context of {name.path}; two of "
            f"each are needed"
        )
    return token_rows, tokenized[0].dropped


def _gradients(
    model: Any, pairs: Sequence[Mapping[str, Any]], log: Callable[[str], None], advance: Callable[[int], None]
) -> dict[str, Tensor]:
    """Return gradients [n, m] and log-probs with lengths [n, 2] of both sides, from the cache if possible."""
    import torch

    from apo.analysis.gradients import SKETCH, head_gradients
    from apo.models import tensor_cache as cache
    from clair.core.files import content_hash

    ids = [[pair[f"{field}_ids"] for field in ("prompt", "chosen", "rejected")] for pair in pairs]
    key = content_hash(["advice 2", cache.hash_model(model, adapter=True), SKETCH, ids])
    n, m = len(pairs), min(SKETCH, model.get_output_embeddings().weight.numel())
    shapes = {"chosen": (n, m), "rejected": (n, m), "chosen_logps": (n, 2), "rejected_logps": (n, 2)}
    folder = cache_root()
    if (cached := cache.load(folder, key, shapes)) is not None:
        return cached

    def with_progress() -> Iterator[Mapping[str, Any]]:
        for pair in pairs:
            yield pair
            advance(1)

    chosen, rejected, logps = head_gradients(model, with_progress())
    sums = [
        torch.stack([logp.double(), length.double()], 1)
        for logp, length in ((logps.chosen, logps.chosen_len), (logps.rejected, logps.rejected_len))
    ]
    tensors = dict(zip(shapes, (chosen, rejected, *sums), strict=True))
    if note := cache.store(folder, key, tensors):
        log(note)
    return tensors


def _logps(model: Any, rows: Sequence[Mapping[str, Any]], advance: Callable[[int], None]) -> list[ResponseLogp]:
    """Return the log-prob of each row's answer, computed in batches."""
    import torch

    from apo.packing.logps import pad_right, response_logps

    sequences = [(row["prompt_ids"], row["chosen_ids"]) for row in rows]
    longest = max(len(prompt) + len(answer) for prompt, answer in sequences)
    count, logps = max(1, _BATCH_TOKENS // longest), []
    with torch.no_grad():
        for start in range(0, len(sequences), count):
            batch = sequences[start : start + count]
            ids, mask = pad_right([[*prompt, *answer] for prompt, answer in batch], longest)
            answers = mask.clone()
            for index, (prompt, _) in enumerate(batch):
                answers[index, : len(prompt)] = 0
            sums = response_logps(model, *(tensor.to(model.device) for tensor in (ids, mask, answers)))
            logps += [ResponseLogp(value, len(answer)) for value, (_, answer) in zip(sums.tolist(), batch, strict=True)]
            advance(len(batch))
    return logps
