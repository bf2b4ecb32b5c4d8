"""A running batch of a transformers model: rows join and leave it while it generates, and change no other row's tokens.

Sampling draws one uniform number per token from a generator seeded by the row. So equal rows get equal tokens,
whatever else is in their batch (up to the rounding of padded matrix products).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_SPARE_POSITIONS = 64
"""Tokens after which a cache layer is copied to grow."""


@dataclass(eq=False, slots=True)
class GenerationRow:
    """A prompt, and the tokens generated so far. It ends at an end-of-turn token or at `max_tokens`."""

    prompt: list[int]
    max_tokens: int
    draws: Any = None
    """A uniform number for each token, `[max_tokens]`; None for greedy decoding."""
    tokens: list[int] = field(default_factory=list)

    @property
    def max_length(self) -> int:
        """The number of tokens that it may come to, prompt included."""
        return len(self.prompt) + self.max_tokens


class RunningBatch:
    """Rows that generate together, aligned at their newest token: ids and mask are `[B, L]`, padded on the left.

    The cache has room for the longest row present. Rows join it by concatenation if all layers keep keys and values
    of every position (`can_join`); otherwise, as with state-space models, they join an empty batch only.
    """

    def __init__(self, model: Any, eos: Sequence[int], pad: int, sampling: Mapping[str, Any]) -> None:
        self.model = model
        self.eos = list(eos)
        self.pad = pad
        self.rows: list[GenerationRow] = []
        self._warpers = _warpers(model, sampling)
        self._ids: Any = None
        self._mask: Any = None
        self._cache: Any = None
        self._joins_by_cache = _new_cache(model) is not None

    @property
    def can_join(self) -> bool:
        """True if rows can join now."""
        return not self.rows or self._joins_by_cache

    def join(self, rows: Sequence[GenerationRow], on_end: Callable[[GenerationRow], None]) -> None:
        """Read the prompts of rows and generate one token of each; a row that was interrupted goes on."""
        import torch

        texts = [row.prompt + row.tokens for row in rows]
        longest = max(map(len, texts))
        device = self.model.device
        # A row is padded with its own first token, so that a repetition penalty penalizes nothing else.
        ids = torch.tensor([[text[0]] * (longest - len(text)) + text for text in texts], device=device)
        mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts], device=device)
        rest, rest_ids, rest_mask, rest_cache = self.rows, self._ids, self._mask, self._cache
        self.rows, self._ids, self._mask, self._cache = list(rows), ids, mask, _new_cache(self.model)
        try:
            self.generate(on_end, lambda ended: True)
        except BaseException:
            self.rows = [*rest, *self.rows]
            raise
        if not rest:
            return
        joined, self.rows = self.rows, [*rest, *self.rows]
        if not joined:
            self._ids, self._mask, self._cache = rest_ids, rest_mask, rest_cache
            return
        length = max(rest_ids.shape[1], self._ids.shape[1])
        self._ids = torch.cat([_pad_ids(part, length) for part in (rest_ids, self._ids)])
        self._mask = torch.cat([_pad_left(part, length) for part in (rest_mask, self._mask)])
        _append_cache(rest_cache, self._cache, length - 1)
        self._cache = rest_cache

    def generate(self, on_end: Callable[[GenerationRow], None], is_enough: Callable[[int], bool]) -> None:
        """Generate until all rows have ended or `is_enough(number of ended rows)`; then ended rows leave.

        `on_end` receives each row when it ends, `is_enough` is called after each token.
        """
        import torch
        from transformers import LogitsProcessorList

        rows, ended = self.rows, [False] * len(self.rows)

        def is_stopped(ids: Any, scores: Any, **_: Any) -> Any:
            for index, token in enumerate(ids[:, -1].tolist()):
                row = rows[index]
                if ended[index]:
                    continue
                row.tokens.append(token)
                if token in self.eos or len(row.tokens) == row.max_tokens:
                    ended[index] = True
                    on_end(row)
            stop = is_enough(sum(ended)) or all(ended)
            return torch.full((len(ids),), stop, device=ids.device)

        sampler = [] if rows[0].draws is None else [*self._warpers, _SeededSampler(rows)]
        room = max(row.max_tokens - len(row.tokens) for row in rows)
        try:
            with torch.inference_mode():
                output = self.model.generate(
                    self._ids,
                    attention_mask=self._mask,
                    past_key_values=self._cache,
                    generation_config=_greedy_config(self.model, room, self.eos, self.pad),
                    logits_processor=LogitsProcessorList(sampler),
                    stopping_criteria=[is_stopped],
                )
        finally:
            self.rows = [row for row, has_ended in zip(rows, ended, strict=True) if not has_ended]
        self._cache = output.past_key_values
        self._mask = torch.nn.functional.pad(self._mask, (0, output.sequences.shape[1] - self._ids.shape[1]), value=1)
        self._ids = output.sequences
        if any(ended):
            self._select([index for index, has_ended in enumerate(ended) if not has_ended])

    def clear(self) -> list[GenerationRow]:
        """Remove all rows, and free the cache. Returns the rows, which can join a batch again."""
        rows, self.rows = self.rows, []
        self._ids = self._mask = self._cache = None
        return rows

    def _select(self, indices: Sequence[int]) -> None:
        """Keep the rows at `indices`, and cut the padding that they have in common."""
        import torch

        if not indices:
            self.clear()
            return
        selected = torch.tensor(indices, dtype=torch.long, device=self._ids.device)
        if self._cache is not None:
            self._cache.reorder_cache(selected)  # the one method that every kind of layer has
        self._ids, self._mask = self._ids[selected], self._mask[selected]
        cut = int(self._mask.argmax(dim=1).min())
        if cut and self._joins_by_cache:
            self._ids, self._mask = self._ids[:, cut:], self._mask[:, cut:]
            for layer in self._cache.layers:
                layer.cut(cut)


def eos_token_ids(tokenizer: Any, model: Any) -> list[int]:
    """The tokens that end a turn: the tokenizer's and all of the generation config's."""
    eos = model.generation_config.eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    return sorted({tokenizer.eos_token_id, *(token for token in ids if token is not None)})


def temperature_of(model: Any, sampling: Mapping[str, Any]) -> float:
    """The temperature that the options of a request set, or else the generation config; 0 for greedy decoding."""
    if (temperature := sampling.get("temperature")) is not None:
        return float(temperature)
    config = model.generation_config
    return float(config.temperature or 1.0) if config.do_sample else 0.0


def uniform_draws(seed: int, max_tokens: int) -> Any:
    """The uniform numbers by which a row with this seed is sampled, `[max_tokens]`."""
    import torch

    return torch.rand(max_tokens, generator=torch.Generator().manual_seed(seed))


def _new_cache(model: Any) -> Any:
    """An empty cache that rows can join; None if the model needs another kind, which `generate` makes.

    Sliding layers keep all positions too: the mask hides those outside of the window.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    config = model.config.get_text_config(decoder=True)
    other_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other_layers or getattr(config, "num_kv_shared_layers", 0) or not model._supports_default_dynamic_cache():
        return None
    base = getattr(model, "get_base_model", lambda: model)()
    if "position_ids" not in inspect.signature(base.forward).parameters:  # else it takes them from the cache's length
        return None
    if not {type(layer) for layer in DynamicCache(config=config).layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    cache = DynamicCache()
    cache.layer_class_to_replicate = _growing_layer()
    return cache


@functools.cache
def _growing_layer() -> Any:
    """The class of a cache layer with spare positions: transformers' own copies the whole layer for each token."""
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
                self.spare: dict[str, Any] = {"keys": self.keys, "values": self.values}
            self.keys = self._append("keys", key_states)
            self.values = self._append("values", value_states)
            return self.keys, self.values

        def _append(self, name: str, states: Any) -> Any:
            present, spare = getattr(self, name), self.spare[name]
            start, end = present.shape[-2], present.shape[-2] + states.shape[-2]
            # A layer whose rows were selected or joined has other memory.
            if spare.data_ptr() != present.data_ptr() or len(spare) != len(present) or spare.shape[-2] < end:
                spare = present.new_empty((*states.shape[:-2], end + _SPARE_POSITIONS, states.shape[-1]))
                spare[..., :start, :] = present
            spare[..., start:end, :] = states
            self.spare[name] = spare
            return spare[..., :end, :]

        def cut(self, count: int) -> None:
            """Remove the first `count` positions."""
            for name in ("keys", "values"):
                setattr(self, name, getattr(self, name)[..., count:, :])
                self.spare[name] = self.spare[name][..., count:, :]

    return GrowingLayer


def _append_cache(cache: Any, other: Any, length: int) -> None:
    """Append the rows of another cache layer by layer, both padded on the left to `length` positions."""
    import torch

    for layer, joining in zip(cache.layers, other.layers, strict=True):
        for name in ("keys", "values"):
            parts = [getattr(part, name) for part in (layer, joining)]
            padded = [torch.nn.functional.pad(part, (0, 0, length - part.shape[-2], 0)) for part in parts]
            setattr(layer, name, torch.cat(padded))
            setattr(joining, name, None)
            layer.spare[name] = joining.spare[name] = getattr(layer, name)


def _pad_left(mask: Any, length: int) -> Any:
    import torch

    return torch.nn.functional.pad(mask, (length - mask.shape[1], 0))


def _pad_ids(ids: Any, length: int) -> Any:
    import torch

    return torch.cat([ids[:, :1].expand(-1, length - ids.shape[1]), ids], dim=1)


def _greedy_config(model: Any, max_new_tokens: int, eos: list[int], pad: int) -> Any:
    """The model's generation config without sampling, which `_SeededSampler` adds."""
    from transformers import GenerationConfig

    names = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens")
    options = {name: getattr(model.generation_config, name, None) for name in names}
    return GenerationConfig(
        return_dict_in_generate=True,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=pad,
        **{name: value for name, value in options.items() if value is not None},
    )


def _warpers(model: Any, sampling: Mapping[str, Any]) -> list[Any]:
    """The logits processors set by the options of a request, or else by the generation config; none for greedy."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    config, temperature = model.generation_config, temperature_of(model, sampling)
    if temperature == 0:
        return []
    top_k, top_p = sampling.get("top_k", config.top_k), sampling.get("top_p", config.top_p)
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(int(top_k))] if top_k else []
    warpers += [TopPLogitsWarper(float(top_p))] if top_p and top_p < 1 else []
    return warpers


class _SeededSampler:
    """Keep one token per row: the one that the row's uniform number selects from the warped distribution."""

    def __init__(self, rows: Sequence[GenerationRow]) -> None:
        import torch

        remaining = [row.draws[len(row.tokens) :] for row in rows]
        self._draws = torch.nn.utils.rnn.pad_sequence(remaining, batch_first=True)
        self._step = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        cumulative = torch.cumsum(torch.softmax(scores.float(), dim=-1), dim=-1)
        draw = self._draws[:, self._step].to(scores.device)[:, None] * cumulative[:, -1:]
        self._step += 1
        token = torch.searchsorted(cumulative, draw, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
