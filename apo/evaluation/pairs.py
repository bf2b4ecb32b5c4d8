"""Metrics of a trained model on held-out pairs: reward accuracy, margin, likelihood displacement, KL to the reference.

Each has an interval clustered by prompt, and accuracy is compared with a rule that only looks at lengths. CLAIR's pairs
are near-duplicates, for which the likelihood of a winner can fall while its margin grows (likelihood displacement,
arXiv 2410.08847). Log-probs are therefore also given for the tokens that both responses share, and for the edited ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from apo.evaluation.intervals import mean_with_interval
from clair.core.errors import UserError
from clair.core.files import content_hash, write_atomically, write_json
from clair.core.progress import progress
from clair.core.provenance import provenance
from clair.core.recipe import Recipe, TemplateVariable, resolved
from clair.core.statistics import clustered_mean, clustered_score, paired_difference
from clair.data.contrast import shared_tokens
from clair.storage.location import Location

if TYPE_CHECKING:
    from torch import Tensor

RESULT = "pairs.json"
ROWS = "pairs.jsonl"
_SELECTION = ("name", "columns", "where")
"""Keys of a training recipe's source that select its pairs, besides path and split."""
_CHUNK = 256
"""Positions whose logits over the vocabulary are converted to float32 at a time."""


class PairsConfig(Recipe):
    """A trained model or adapter, its reference, and the split of a dataset to measure both on.

    Values that are absent are read from the run.json of the run that trained `model`.
    """

    model: str
    reference: str
    dataset: Location
    split: str = "test"
    name: str | None = None
    """The configuration of a dataset that has several."""
    columns: Mapping[str, str] = {}
    where: dict[str, str | int | bool] | None = None
    """Use only the rows with these values in these columns."""
    chat_template_kwargs: dict[str, TemplateVariable] | None = None
    """Variables of the chat template for rows without a column of that name."""
    beta: float = Field(default=0.1, gt=0)
    limit: int | None = Field(default=None, ge=1)
    max_length: int | None = Field(default=None, ge=2)
    """Longer pairs are left out; absent: the model's context length."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_tokens: int = Field(default=4096, ge=1)
    trust_remote_code: bool = False
    out: str = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_run(cls, values: dict[str, Any]) -> dict[str, Any]:
        from apo.run_dir.files import RUN, read_run

        folder, defaults = Path(str(values.get("model", ""))), dict[str, Any]()
        if (folder / RUN).is_file():
            recipe = read_run(folder)["recipe"]
            sources = [{"path": recipe["dataset"]}] if isinstance(recipe["dataset"], str) else recipe["dataset"]
            defaults = {"reference": recipe["model"], "beta": recipe["beta"]}
            defaults["trust_remote_code"] = recipe.get("trust_remote_code", False)
            if len(sources) == 1:
                defaults["chat_template_kwargs"] = sources[0].get("chat_template_kwargs")
            if "dataset" not in values:
                if len(sources) > 1:
                    paths = ", ".join(source["path"] for source in sources)
                    raise ValueError(f"{folder} was trained on {paths}; name one, with its `where`, as `dataset`")
                defaults["dataset"] = sources[0]["path"]
                defaults |= {key: sources[0][key] for key in _SELECTION if key in sources[0]}
        if values.get("dataset") and _is_file(str(values["dataset"])):
            defaults["split"] = "train"  # a single file has no test split: all of it is held out
        for key in ("reference", "dataset"):
            if values.get("model") and key not in defaults | values:
                raise ValueError(f"the key {key!r} is missing, and {folder} is no folder of `apo train` that names it")
        return defaults | values


def _is_file(dataset: str) -> bool:
    return Path(dataset).is_file() or (Location(dataset).is_url and bool(Path(dataset).suffix))


# ---- one pair


@dataclass(frozen=True, slots=True)
class Response:
    """One response under both models: sums over its tokens, in nats.

    `logratio` is log policy - log reference; `logratio_shared` counts only tokens that the other response has as well.
    `kl` is the KL(policy || reference) of the next-token distributions.
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
class MeasuredPair:
    """A pair under both models. `prompt` is a hash of the prompt: the cluster."""

    id: str
    prompt: str
    chosen: Response
    rejected: Response


def compare_models(
    policy: Any,
    reference: Callable[[], AbstractContextManager[Any]],
    pairs: Sequence[dict[str, Any]],
    batch_tokens: int,
) -> Iterator[tuple[int, MeasuredPair]]:
    """Measure pairs under both models: yields (index, measured pair), the longest pairs first.

    `reference()` is a context that gives the reference: a second model, or the policy with its adapter off. No
    gradients are stored.
    """
    import torch

    from apo.packing.layout import SIDES, response_mask

    sizes = [len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs]
    order = sorted(range(len(pairs)), key=lambda index: (-sizes[index], index))
    with torch.inference_mode():
        while order:
            count = max(1, batch_tokens // (2 * sizes[order[0]]))
            batch, order = order[:count], order[count:]
            chosen = [(pairs[p]["prompt_ids"], pairs[p]["chosen_ids"]) for p in batch]
            rejected = [(pairs[p]["prompt_ids"], pairs[p]["rejected_ids"]) for p in batch]
            measured = _token_logps(policy, reference, [*chosen, *rejected])
            for position, index in enumerate(batch):
                sides = measured[position], measured[len(batch) + position]
                marks = shared_tokens(pairs[index]["chosen_ids"], pairs[index]["rejected_ids"])
                responses = []
                for side, (logps, reference_logps, kl), mark in zip(SIDES, sides, marks, strict=True):
                    trained = response_mask(pairs[index], side)
                    mask = torch.tensor(trained, dtype=torch.bool)
                    shared = [*compress(mark, trained)]
                    responses.append(_response(logps[mask], reference_logps[mask], kl[mask], shared))
                prompt = content_hash(list(pairs[index]["prompt_ids"]))[:16]
                yield index, MeasuredPair(str(pairs[index].get("id", index)), prompt, responses[0], responses[1])


def _token_logps(
    policy: Any, reference: Callable[[], AbstractContextManager[Any]], rows: Sequence[tuple[list[int], list[int]]]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each (prompt, response): log-probs under policy and reference, and their KL, each `[T]` in float64."""
    import torch

    from apo.packing.logps import pad_right

    ids, mask = (tensor.to(policy.device) for tensor in pad_right([[*prompt, *response] for prompt, response in rows]))
    policy_logits = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with reference() as model:
        reference_logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    results = []
    for index, (prompt, response) in enumerate(rows):
        chunks = []
        first, last = len(prompt) - 1, len(prompt) + len(response) - 1
        for start in range(first, last, _CHUNK):
            span = slice(start, min(start + _CHUNK, last))
            logps, reference_logps = (
                logits[index, span].float().log_softmax(-1) for logits in (policy_logits, reference_logits)
            )
            labels = ids[index, span.start + 1 : span.stop + 1, None]
            kl = (logps.exp() * (logps - reference_logps)).sum(-1)
            chunks.append((logps.gather(-1, labels)[:, 0], reference_logps.gather(-1, labels)[:, 0], kl))
        results.append(tuple(torch.cat(columns).double().cpu() for columns in zip(*chunks, strict=True)))
    return results


def _response(logps: Tensor, reference: Tensor, kl: Tensor, shared: list[bool]) -> Response:
    import torch

    both = torch.tensor(shared)
    ratio = logps - reference
    sums = (reference.sum(), ratio.sum(), ratio[both].sum(), kl.sum())
    return Response(len(logps), int(both.sum()), *(float(value) for value in sums))


# ---- all pairs


def summary(measured: Sequence[MeasuredPair], beta: float) -> dict[str, Any]:
    """The numbers of pairs.json: shares of pairs in [0, 1], sums over a response in nats, rewards in beta times nats.

    There is no interval if all pairs have the same prompt.
    """
    prompts = [pair.prompt for pair in measured]

    def mean(values: Sequence[float]) -> dict[str, Any]:
        return mean_with_interval(values, prompts, clustered_mean)

    def share(values: Sequence[float]) -> dict[str, Any]:
        return mean_with_interval(values, prompts, clustered_score)

    sides = {side: [getattr(pair, side) for pair in measured] for side in ("chosen", "rejected")}
    ratios = {side: [response.logratio for response in responses] for side, responses in sides.items()}
    margins = [
        beta * (chosen - rejected) for chosen, rejected in zip(ratios["chosen"], ratios["rejected"], strict=True)
    ]
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
        "rewards": {side: mean([beta * ratio for ratio in responses]) for side, responses in ratios.items()},
        "length_only": {
            "prefers": prefers,
            "accuracy": share(by_length),
            "reward_accuracy_minus_it": mean_difference(by_length, right, prompts),
        },
        "length_ratio": mean([pair.chosen.tokens / pair.rejected.tokens for pair in measured]),
        "displacement": {side: _displacement(responses, mean, share) for side, responses in sides.items()},
        "kl": {side: _divergence(responses, mean) for side, responses in sides.items()},
    }


def _preferred(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)


def _displacement(responses: Sequence[Response], mean: Callable[..., Any], share: Callable[..., Any]) -> dict[str, Any]:
    """The change of one side's log-prob by training: of all tokens, of the shared and of the edited ones."""
    return {
        "reference_logp": mean([response.reference for response in responses]),
        "logratio": mean([response.logratio for response in responses]),
        "falls": share([float(response.logratio < 0) for response in responses]),
        "logratio_shared": mean([response.logratio_shared for response in responses]),
        "logratio_edited": mean([response.logratio_edited for response in responses]),
        "edited_falls": share([float(response.logratio_edited < 0) for response in responses]),
        "edited_tokens": mean([float(response.tokens - response.shared_tokens) for response in responses]),
        "tokens": mean([float(response.tokens) for response in responses]),
    }


def _divergence(responses: Sequence[Response], mean: Callable[..., Any]) -> dict[str, Any]:
    """KL(policy || reference) along the responses of one side: summed over a response, and its mean per token."""
    return {"response": mean([r.kl for r in responses]), "token": mean([r.kl / r.tokens for r in responses])}


def mean_difference(base: Sequence[float], tuned: Sequence[float], prompts: Sequence[str]) -> dict[str, Any]:
    """The mean of tuned minus base, both shares, with its interval and p-value, as `apo compare` computes them."""
    mean = {"mean": math.fsum(b - a for a, b in zip(base, tuned, strict=True)) / len(base)}
    test = paired_difference(base, tuned, prompts) if len(set(prompts)) > 1 else None
    if test is None or not test.interval:
        return {**mean, "se": None, "ci95": None, "p": test.cautious_p if test and test.differing else None}
    return {**mean, "se": test.estimate.se, "ci95": list(test.interval), "p": test.cautious_p}


# ---- one model


def evaluate_pairs(config: PairsConfig, log: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure held-out pairs and write pairs.json and pairs.jsonl into `config.out`; returns the former's content.

    Raises UserError, before any model is loaded, if dataset, split or model does not exist, and afterwards if the two
    models have different vocabularies.
    """
    from apo.models import load as models

    name = models.find_model(config.model, config.trust_remote_code)
    reference_name = models.find_model(config.reference, config.trust_remote_code)
    tokenizer = models.load_tokenizer(name)
    pairs = _load_pairs(config)
    tokenized = _tokenize(config, pairs, tokenizer, name)
    rows = [dict(row) for row in tokenized.dataset]
    if any(not row["prompt_ids"] for row in rows):
        raise UserError(f"dataset {config.dataset.public}: a prompt has no tokens to predict its answers from")
    policy, reference = _load_models(config, name, reference_name, tokenizer)
    log(f"{len(rows):,} pairs of {config.dataset.public}, split {config.split}{_where(config)}")
    by_index: dict[int, MeasuredPair] = {}
    with progress("held-out pairs", len(rows)) as work:
        for index, measured in compare_models(policy, reference, rows, config.batch_tokens):
            by_index[index] = measured
            work.advance()
    ordered = [by_index[index] for index in range(len(rows))]
    result = {
        "format": 1,
        **summary(ordered, config.beta),
        "dropped": tokenized.dropped,
        "notes": tokenized.notes,
        "settings": resolved(config, public=True),
        **provenance(),
    }
    out = Path(config.out)
    lines = [json.dumps(_jsonl_row(pair, config.beta), ensure_ascii=False) + "\n" for pair in ordered]
    write_atomically(out / ROWS, "".join(lines))
    write_json(out / RESULT, result)
    return result


def _jsonl_row(pair: MeasuredPair, beta: float) -> dict[str, Any]:
    sides = {side: getattr(pair, side) for side in ("chosen", "rejected")}
    fields = ("tokens", "shared_tokens", "reference", "logratio", "logratio_shared", "kl")
    columns = {f"{side}_{name}": getattr(response, name) for side, response in sides.items() for name in fields}
    margin = beta * (pair.chosen.logratio - pair.rejected.logratio)
    return {"id": pair.id, "prompt": pair.prompt, "margin": margin, **columns}


def _where(config: PairsConfig) -> str:
    return f" where {config.where}" if config.where else ""


def _load_pairs(config: PairsConfig) -> Any:
    from apo.data.sources import Source, load_eval, split_names

    exists = config.dataset.is_url or Path(config.dataset).exists()
    names = split_names(config.dataset, config.name) if exists else [config.split]
    if config.split not in names:
        raise UserError(f"dataset {config.dataset.public} has no split {config.split!r}; found: {', '.join(names)}")
    options = {key: getattr(config, key) for key in (*_SELECTION, "chat_template_kwargs")}
    pairs = load_eval([Source(path=config.dataset, **options)], config.split)
    if pairs is None:
        raise UserError(
            f"dataset {config.dataset.public}, split {config.split!r}, has no pairs{_where(config)} to measure"
        )
    return pairs if config.limit is None else pairs.select(range(min(config.limit, len(pairs))))


def _tokenize(config: PairsConfig, pairs: Any, tokenizer: Any, name: Any) -> Any:
    from apo.data.tokenize import eos_ids, tokenize
    from apo.models import load as models

    max_length = config.max_length or models.context_length(name)
    tokenized = tokenize(
        pairs, tokenizer, max_length, eos_ids(tokenizer, models.load_generation_config(name)), config.split
    )
    if not len(tokenized.dataset):
        raise UserError(f"all {len(pairs):,} pairs are longer than {max_length:,} tokens, so none is left to measure")
    return tokenized


def _load_models(
    config: PairsConfig, name: Any, reference_name: Any, tokenizer: Any
) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """The policy, and a context that gives the reference: the policy with its adapter off, or a second model."""
    import torch
    from transformers.utils import logging

    from apo.models import load as models
    from apo.models.decomposed_lora import is_decomposed

    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Any: the types of transformers reject `.to(device)`.
    policy: Any = models.load_model(name, dtype=config.dtype)
    policy = policy.to(device).eval()
    models.check_vocabulary(policy, tokenizer, name.path)
    is_reference_below = name.is_adapter and not is_decomposed(policy.peft_config["default"])
    if is_reference_below and _same_model(name.base, reference_name.path):
        return policy, lambda: _adapter_off(policy)
    reference: Any = models.load_model(reference_name, dtype=config.dtype)
    reference = reference.to(device).eval()
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{name.path} has {sizes[0]:,} tokens and the reference {reference_name.path} {sizes[1]:,}; the reference "
            f"is the model that training started from"
        )
    return policy, lambda: nullcontext(reference)


def _same_model(first: str, second: str) -> bool:
    return first == second or (Path(first).exists() and Path(second).exists() and Path(first).samefile(second))


@contextmanager
def _adapter_off(model: Any) -> Iterator[Any]:
    with model.disable_adapter():
        yield model
