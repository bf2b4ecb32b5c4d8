"""A running batch of a transformers model: rows join and leave it while it generates, and change no other row's tokens.

Sampling draws one uniform number per token from a generator seeded by the row. So equal rows get equal tokens,
whatever else is in their batch (up to the rounding of padded matrix products).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ROOM = 256
"""A cache layer has room for a multiple of so many positions; beyond it, the layer is copied to grow."""


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

    The cache has room for the most rows and for the longest row so far. Rows join the batch if all layers keep keys
    and values of every position (`can_join`); otherwise, as with state-space models, they join an empty batch only.
    """

    def __init__(self, model: Any, eos: Sequence[int], pad: int, sampling: Mapping[str, Any]) -> None:
        self.model = model
        self.eos = list(eos)
        self.pad = pad
        self.rows: list[GenerationRow] = []
        self._warpers = _warpers(model, sampling)
        self._cache: Any = None
        self._cached_rows: list[GenerationRow] = []
        """The row of each entry of the cache, rows that have ended since included."""
        self._joins_by_cache = _new_cache(model) is not None

    @property
    def can_join(self) -> bool:
        """True if rows can join now."""
        return not self.rows or self._joins_by_cache

    def join(self, rows: Sequence[GenerationRow], on_end: Callable[[GenerationRow], None]) -> None:
        """Read the prompts of rows and generate one token of each; a row that was interrupted goes on."""
        joining = copy.copy(self)
        joining.rows, joining._cache, joining._cached_rows = list(rows), _new_cache(self.model), []
        joining.generate(on_end, lambda finished: True)
        if self.rows and joining.rows:
            self._arrange(joining)
        elif joining.rows:
            self.rows, self._cache, self._cached_rows = joining.rows, joining._cache, joining._cached_rows

    def generate(self, on_end: Callable[[GenerationRow], None], is_enough: Callable[[int], bool]) -> None:
        """Generate until all rows have ended or `is_enough(number of ended rows)`; then ended rows leave.

        `on_end` receives each row when it ends, `is_enough` is called after each token.
        """
        import torch
        from transformers import LogitsProcessorList

        if len(self.rows) < len(self._cached_rows):
            self._arrange()
        rows, is_finished = self.rows, [False] * len(self.rows)
        ids, mask = self._inputs()

        def is_stopped(ids: Any, scores: Any, **_: Any) -> Any:
            for index, token in enumerate(ids[:, -1].tolist()):
                row = rows[index]
                if is_finished[index]:
                    continue
                row.tokens.append(token)
                if token in self.eos or len(row.tokens) == row.max_tokens:
                    is_finished[index] = True
                    on_end(row)
            stop = is_enough(sum(is_finished)) or all(is_finished)
            return torch.full((len(ids),), stop, device=ids.device)

        sampler = [] if rows[0].draws is None else [*self._warpers, _SeededSampler(rows)]
        room = max(row.max_tokens - len(row.tokens) for row in rows)
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=mask,
                past_key_values=self._cache,
                generation_config=_greedy_config(self.model, room, self.eos, self.pad),
                logits_processor=LogitsProcessorList(sampler),
                stopping_criteria=[is_stopped],
            )
        self._cache, self._cached_rows = output.past_key_values, rows
        self.rows = [row for row, finished in zip(rows, is_finished, strict=True) if not finished]

    def clear(self) -> None:
        """Remove all rows, and free the cache. The rows can join a batch again."""
        self.rows, self._cache, self._cached_rows = [], None, []

    def _inputs(self) -> tuple[Any, Any]:
        """The token ids and the mask of all rows, `[B, L]`."""
        import torch

        texts = [row.prompt + row.tokens for row in self.rows]
        longest = max(map(len, texts))
        # A row is padded with its own first token, so that a repetition penalty penalizes nothing else.
        ids = [[text[0]] * (longest - len(text)) + text for text in texts]
        mask = [[0] * (longest - len(text)) + [1] * len(text) for text in texts]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)

    def _present(self) -> Any:
        """The indices of the cache's entries whose rows have not ended."""
        import torch

        present = set(self.rows)
        indices = [index for index, row in enumerate(self._cached_rows) if row in present]
        return torch.tensor(indices, device=self.model.device)

    def _arrange(self, joining: RunningBatch | None = None) -> None:
        """Remove the entries of ended rows from the cache, and take in the rows of another batch."""
        import torch

        batches = [self, joining] if joining else [self]
        rows = [row for batch in batches for row in batch.rows]
        length = max(len(row.prompt) + len(row.tokens) for row in rows) - 1
        selected = [batch._present() for batch in batches]
        with torch.inference_mode():
            if self._joins_by_cache:
                for layers in zip(*(batch._cache.layers for batch in batches), strict=True):
                    pairs = zip(layers, selected, strict=True)
                    layers[0].arrange(
                        [(layer.keys[indices], layer.values[indices]) for layer, indices in pairs], length, length + 1
                    )
            else:
                self._cache.reorder_cache(selected[0])  # the one method that every kind of layer has
        self.rows, self._cached_rows = rows, rows


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
            new = (key_states, value_states)
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.buffers = self.keys, self.values = [states[..., :0, :] for states in new]
            assert self.keys is not None
            start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
            if end > self.buffers[0].shape[-2]:
                self.arrange([(self.keys, self.values)], start, end)
            for buffer, states in zip(self.buffers, new, strict=True):
                buffer[: len(states), :, start:end] = states
            self.keys, self.values = (buffer[: len(key_states), :, :end] for buffer in self.buffers)
            return self.keys, self.values

        def arrange(self, states: Sequence[tuple[Any, Any]], length: int, end: int) -> None:
            """Hold the last `length` positions of the (keys, values) of several batches, padded on the left.

            There is room for `end` positions. Memory is kept: made anew for every change, it would be fragmented.
            """
            rows = sum(len(keys) for keys, _ in states)
            buffers = []
            for buffer, *tensors in zip(self.buffers, *states, strict=True):
                max_rows, heads, room, size = buffer.shape
                if rows > max_rows or end > room:
                    room = max(room, -(-end // _ROOM) * _ROOM)
                    buffer = buffer.new_zeros((max(rows, max_rows), heads, room, size))
                target = buffer[:rows, :, :length]
                for source, destination in zip(tensors, target.split([*map(len, tensors)]), strict=True):
                    count = min(length, source.shape[-2])
                    destination[:, :, : length - count] = 0
                    destination[:, :, length - count :] = source[:, :, source.shape[-2] - count :]
                buffers.append(buffer)
            self.buffers = buffers
            self.keys, self.values = (buffer[:rows, :, :length] for buffer in buffers)

    return GrowingLayer


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
