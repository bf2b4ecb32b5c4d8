"""What the model itself says of the pairs: how likely it finds both sides and its own answers, and where a step leads.

The first step of DPO and of APO-zero goes the same way: winner up and loser down by as much. Where it takes the
log-probs of *other* pairs, seen through the gradients of the LM head (as `apo distinguish` does), tells whether the
pairs have a direction in common, and whether winners will rise with it or fall.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from apo.analysis.distinguishability import DRAWS, Interval
from clair.core.progress import progress
from clair.core.statistics import Estimate, clustered_mean, wilson

if TYPE_CHECKING:
    from torch import Tensor

_BATCH_TOKENS = 8192


class Scored(NamedTuple):
    """A response's log-prob in nats, summed, and its tokens, end of turn included."""

    logp: float
    tokens: int

    @property
    def mean(self) -> float:
        """Per token."""
        return self.logp / self.tokens


def interval(found: Estimate) -> Interval:
    """An estimate as a value with its 95 % interval."""
    return Interval(found.mean, found.lo, found.hi)


def gaps(winners: Sequence[Scored], losers: Sequence[Scored], own: Sequence[Scored | None]) -> dict[str, Interval]:
    """Differences of log-probs with intervals over pairs, in nats: per token, and (`_total`) summed over a response.

    Where the model's own answer has no end (None), only winner and loser are compared.
    """
    with_own = [(w, lo, o) for w, lo, o in zip(winners, losers, own, strict=True) if o is not None]

    def mean(values: Sequence[float]) -> Interval:
        return interval(clustered_mean(values, range(len(values))))

    return {
        "own": mean([o.mean for *_, o in with_own]),
        "winner_gap": mean([w.mean - o.mean for w, _, o in with_own]),
        "loser_gap": mean([lo.mean - o.mean for _, lo, o in with_own]),
        "winner_total": mean([w.logp - o.logp for w, _, o in with_own]),
        "loser_total": mean([lo.logp - o.logp for _, lo, o in with_own]),
        "pair_gap": mean([w.mean - lo.mean for w, lo in zip(winners, losers, strict=True)]),
        "pair_total": mean([w.logp - lo.logp for w, lo in zip(winners, losers, strict=True)]),
    }


def first_step(winners: Tensor, losers: Tensor, *, seed: int = 0, draws: int = DRAWS) -> dict[str, Interval]:
    """Where the mean step v_j = winner_j - loser_j of all other pairs takes each pair, from gradients [n, m].

    coherence     the mean of <v_i, v_j>, i != j, over the mean of |v_i|^2
    displacement  the mean of <winner_i, v_j> over that of <v_i, v_j>, i != j
    winner_wrong  share of pairs whose winner falls: <winner_i, sum of v_j> < 0, the wrong side of APO-zero's anchor
    loser_wrong   share of pairs whose loser rises

    The first two with percentile intervals of a bootstrap over pairs, in which no pair meets itself.
    """
    import torch

    from apo.analysis.distinguishability import resampled

    steps = (winners - losers).double()
    rise, fall = (side.double() @ steps.T for side in (winners, losers))
    squares = (steps**2).sum(1)
    for products in (rise, fall):
        products.fill_diagonal_(0)
    n, weights = len(steps), resampled(len(steps), draws, seed).double()

    def ratios(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Coherence and displacement of samples with these weights, [draws, n] each row adding up to 1."""
        up, both = ((weight @ part * weight).sum(1) for part in (rise, rise - fall))
        return both / (1 - (weight**2).sum(1)) / (weight @ squares), up / both

    values, spread = ratios(torch.full((1, n), 1 / n, dtype=torch.float64)), ratios(weights)
    found = {}
    for name, value, drawn in zip(("coherence", "displacement"), values, spread, strict=True):
        lo, hi = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
        found[name] = Interval(float(value), lo, hi)
    wrong = int((rise.sum(1) < 0).sum()), int((fall.sum(1) > 0).sum())
    shares = [interval(wilson(count, n)) for count in wrong]
    return {**found, "winner_wrong": shares[0], "loser_wrong": shares[1]}


class Seen(NamedTuple):
    """What the model says: its parameters, the intervals of `gaps` and `first_step`, and pairs left out by reason."""

    parameters: int
    intervals: dict[str, Interval]
    left_out: dict[str, int]
    own: int
    """Own answers that were compared with."""


def look(
    path: str,
    rows: Sequence[Mapping[str, Any]],
    own: Sequence[str | None],
    *,
    seed: int = 0,
    trust_remote_code: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Seen:
    """Load the model and look at all rows; `own` are its own answers to them, None where there is none with an end."""
    import torch

    from apo.models import load as models

    name = models.find_model(path, trust_remote_code)
    tokenizer = models.load_tokenizer(name)
    (pairs, ours), left_out = _tokenized(name, tokenizer, rows, own)
    model = models.load_model(name)
    models.check_vocabulary(model, tokenizer, name.base)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False).eval()
    with progress(f"log-probs and gradients of {len(pairs)} pairs", len(pairs) + len(ours)) as work:
        kept = _gradients(model, pairs, tell, work.advance)
        said = dict(zip((row["_place"] for row in ours), _logps(model, ours, work.advance), strict=True))
    sums = {side: [Scored(*one) for one in kept[f"{side}_logps"].tolist()] for side in ("chosen", "rejected")}
    matched = [said.get(row["_place"]) for row in pairs]
    intervals = gaps(sums["chosen"], sums["rejected"], matched) | first_step(
        kept["chosen"], kept["rejected"], seed=seed
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Seen(parameters, intervals, left_out, sum(one is not None for one in matched))


def _tokenized(name: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], own: Sequence[str | None]) -> Any:
    """The pairs, and the own answers, as token ids with their `_place` among the rows; and how many pairs were left
    out, by reason. Raises UserError for none."""
    from datasets import Dataset

    from apo.data.tokenize import eos_ids, tokenize
    from apo.models import load as models
    from clair.core.errors import UserError

    ends, most = eos_ids(tokenizer, models.load_generation_config(name)), models.context_length(name)
    columns = ("prompt", "chosen", "rejected")
    paired = [{**{c: row[c] for c in columns}, "_place": at} for at, row in enumerate(rows)]
    single = [
        {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": text}], "label": True, "_place": at}
        for at, (row, text) in enumerate(zip(rows, own, strict=True))
        if text is not None
    ]
    done = [tokenize(Dataset.from_list(part), tokenizer, most, ends, "given") for part in (paired, single)]
    found = [[dict(row) for row in part.dataset] for part in done]
    if min(map(len, found)) < 2:
        raise UserError(f"{len(found[0])} pairs and {len(found[1])} own answers fit the context of {name.path}")
    return found, done[0].dropped


def _gradients(
    model: Any, pairs: Sequence[Mapping[str, Any]], tell: Callable[[str], None], advance: Callable[[int], None]
) -> dict[str, Tensor]:
    """Both sides' gradients [n, m] and log-probs with lengths [n, 2], from the cache where they are."""
    import torch

    from apo.analysis.distinguishability import SKETCH, head_gradients
    from apo.models import tensor_cache as cache
    from clair.core.files import content_hash

    ids = [[pair[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")] for pair in pairs]
    key = content_hash(["advice 1", cache.hash_model(model, adapter=True), SKETCH, ids])
    n, m = len(pairs), min(SKETCH, model.get_output_embeddings().weight.numel())
    shapes = {"chosen": (n, m), "rejected": (n, m), "chosen_logps": (n, 2), "rejected_logps": (n, 2)}
    folder = cache.default_folder()
    if (kept := cache.load(folder, key, shapes)) is not None:
        return kept

    def counted() -> Iterator[Mapping[str, Any]]:
        for pair in pairs:
            yield pair
            advance(1)

    chosen, rejected, logps = head_gradients(model, counted())
    both = [
        torch.stack([part.double(), count.double()], 1)
        for part, count in ((logps.chosen, logps.chosen_len), (logps.rejected, logps.rejected_len))
    ]
    made = dict(zip(shapes, (chosen, rejected, *both), strict=True))
    if note := cache.store(folder, key, made):
        tell(note)
    return made


def _logps(model: Any, rows: Sequence[Mapping[str, Any]], advance: Callable[[int], None]) -> list[Scored]:
    """The log-prob of each row's answer, as many rows at once as fit."""
    import torch

    from apo.packing.logps import response_logps

    whole = [(row["prompt_ids"], row["chosen_ids"]) for row in rows]
    longest = max(len(prompt) + len(answer) for prompt, answer in whole)
    count, found = max(1, _BATCH_TOKENS // longest), []
    with torch.no_grad():
        for start in range(0, len(whole), count):
            part = whole[start : start + count]
            ids, mask, answers = (torch.zeros(len(part), longest, dtype=torch.long) for _ in range(3))
            for at, (prompt, answer) in enumerate(part):
                end = len(prompt) + len(answer)
                ids[at, :end] = torch.tensor([*prompt, *answer])
                mask[at, :end], answers[at, len(prompt) : end] = 1, 1
            sums = response_logps(model, *(tensor.to(model.device) for tensor in (ids, mask, answers)))
            found += [Scored(value, len(answer)) for value, (_, answer) in zip(sums.tolist(), part, strict=True)]
            advance(len(part))
    return found
