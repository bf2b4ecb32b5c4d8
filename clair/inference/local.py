"""A transformers model in this process: requests are batched, and a reply depends on its own request only.

Sampling draws one uniform number per token from a generator seeded by the request. So equal requests get equal replies,
whatever else is in their batch (up to the rounding of padded matrix products).
"""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clair.core.errors import UserError, near_miss, one_line
from clair.core.files import content_hash
from clair.data.records import message_text
from clair.inference.model import Refused, RequestFailed, Unreachable, completion_json
from clair.inference.model_folder import adapter_base, check_model_folder, resize_vocabulary, weights_identity

_OPTIONS = ("messages", "max_tokens", "temperature", "top_p", "top_k", "seed", "tools")
_DEFAULT_MAX_TOKENS = 1024
_FIRST_CHUNK = 64
"""Tokens after which finished rows leave their batch for the first time."""
_GATHER_SECONDS = 0.005  # time for requests to arrive before a batch is formed
_CHARACTERS_PER_TOKEN = 3.0  # until the first batch is tokenised


def check_options(options: Mapping[str, Any], role: str = "target") -> None:
    """Check that a local model supports all options of a request. Raises UserError naming the first other one."""
    for key in options:
        if key not in _OPTIONS:
            raise UserError(
                f"{role}: a local model does not understand the option {key!r}{near_miss(key, _OPTIONS)}; allowed: "
                f"{', '.join(_OPTIONS[1:])}"
            )


@dataclass(slots=True)
class _QueuedRequest:
    request: Mapping[str, Any]
    sample: int
    size: int
    future: asyncio.Future[str]


class LocalModel:
    """A transformers model folder, loaded on first use, that answers in batches in its own thread.

    A batch has at most `batch_size` requests, or with `batch_tokens` as many as fit, counting prompts padded to the
    longest and the room for their answers. A batch that does not fit into memory is halved. An adapter is loaded onto
    its base.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int = 16,
        batch_tokens: int | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        check_model_folder(path)
        self.path = Path(path)
        self.name = self.path.name
        self.identity = weights_identity(path)
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self._characters_per_token = _CHARACTERS_PER_TOKEN
        self._dtype = dtype
        self._trust_remote_code = trust_remote_code
        self._queue: list[_QueuedRequest] = []
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "local-model")
        self._loaded: Any = None
        self.keep_loaded = False
        """True if a further run in this process uses it again."""
        self.activity = ""
        """The current work of its thread, for display."""
        self._halted = False

    async def check(self) -> None:
        """Load the weights. Raises Refused."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise Refused(f"model {self.path} cannot be loaded: {one_line(error)}") from error

    async def close(self) -> None:
        """Finish the batch in progress, and free the weights unless `keep_loaded`."""
        if self._worker:
            await asyncio.wait([self._worker])
        self._worker = None
        if self.keep_loaded:
            return
        self._thread.shutdown()
        self._loaded = None

    async def complete(self, request: Mapping[str, Any], sample: int = 0) -> str:
        """Return the raw JSON text of a chat completion. Raises UserError for an option that is not supported."""
        check_options(request)
        size = sum(len(message_text(message)) for message in request["messages"])
        queued = _QueuedRequest(request, sample, size, asyncio.get_running_loop().create_future())
        self._queue.append(queued)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await queued.future

    def abandon(self) -> None:
        """Fail the requests that are in no batch yet; the batch in progress is finished."""
        for queued in self._queue:
            if not queued.future.done():
                queued.future.set_exception(Unreachable("not begun"))
        self._queue = []

    def halt(self) -> None:
        """Fail all requests at the next token, those of the batch in progress too."""
        self._halted = True

    async def _work(self) -> None:
        await asyncio.sleep(_GATHER_SECONDS)
        while self._queue:
            batch = self._next_batch()
            try:
                replies = await asyncio.get_running_loop().run_in_executor(self._thread, self._generate, batch)
            except Exception as error:  # fails the rows of this batch; the run goes on with the others
                for queued in batch:
                    if not queued.future.done():
                        message = f"{type(error).__name__}: {error}"
                        queued.future.set_exception(RequestFailed("generation_failed", message))
            else:
                for queued, reply in zip(batch, replies, strict=True):
                    if queued.future.done():  # cancelled
                        continue
                    if isinstance(reply, RequestFailed):
                        queued.future.set_exception(reply)
                    else:
                        queued.future.set_result(reply)
            await asyncio.sleep(_GATHER_SECONDS)

    def _next_batch(self) -> list[_QueuedRequest]:
        """Take the next batch: the longest-waiting request, and those with its options and of similar length."""
        first = self._queue[0]
        similar = [w for w in self._queue if _options_key(w.request) == _options_key(first.request)]
        similar.sort(key=lambda w: abs(w.size - first.size))
        batch = similar[: self._batch_length(similar)]
        chosen = {id(w) for w in batch}
        self._queue = [w for w in self._queue if id(w) not in chosen]
        return batch

    def _batch_length(self, requests: Sequence[_QueuedRequest]) -> int:
        """The number of these requests that fit into a batch, by an estimate of their tokens; `_chunks` counts them."""
        if self.batch_tokens is None:
            return self.batch_size
        max_tokens, longest = requests[0].request.get("max_tokens") or _DEFAULT_MAX_TOKENS, 0.0
        for count, queued in enumerate(requests):
            longest = max(longest, queued.size / self._characters_per_token)
            if (count + 1) * (longest + max_tokens) > self.batch_tokens:
                return max(1, count)
        return len(requests)

    # ---- in the model's thread

    def _load(self) -> Any:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging

            self.activity = "loading the weights"
            logging.disable_progress_bar()  # a build shows its own
            device = "cuda" if torch.cuda.is_available() else "cpu"
            base = adapter_base(self.path)
            has_tokenizer = base is None or (self.path / "tokenizer_config.json").is_file()
            tokenizer = AutoTokenizer.from_pretrained(
                self.path if has_tokenizer else base, trust_remote_code=self._trust_remote_code
            )
            model = AutoModelForCausalLM.from_pretrained(
                base or self.path, dtype=self._dtype, trust_remote_code=self._trust_remote_code, use_safetensors=True
            )
            if base is not None:
                from peft import PeftModel

                with warnings.catch_warnings():  # peft 0.21 uses a name that transformers 5.23 deprecates
                    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                    resize_vocabulary(model, self.path / "adapter_model.safetensors")
                    model = PeftModel.from_pretrained(model, str(self.path))
            model.to(device)  # pyright: ignore[reportArgumentType]  # a decorator hides the method's signature
            self._loaded = tokenizer, model.eval()
            self.activity = ""
        return self._loaded

    def _tokenize(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[int]:
        tokenizer, _ = self._load()
        # The template writes the BOS token, if any; the tokenizer must not add a second one.
        options = {"tools": list(tools)} if tools else {}
        turns = [_parse_arguments(message) for message in messages]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **options)
        calls = [call for turn in messages for call in turn.get("tool_calls", [])]
        names = [tool.get("function", tool).get("name") for tool in [*calls, *tools]]
        if missing := [name for name in names if name and name not in text]:
            raise ValueError(
                f"the model's chat template leaves the tool {missing[0]} out; use a model that knows tools"
            )
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # `_generate` checks the length

    def _generate(self, batch: Sequence[_QueuedRequest]) -> list[str | RequestFailed]:
        """Reply to each request, grouped by the room for an answer, so that a batch truncates no answer."""
        prompts: list[list[int]] = []
        errors: dict[int, RequestFailed] = {}  # if the template refuses a row, the others go on
        for index, queued in enumerate(batch):
            try:
                prompts.append(self._tokenize(queued.request["messages"], queued.request.get("tools", ())))
            except Exception as error:  # a template can raise anything
                prompts.append([])
                errors[index] = RequestFailed("generation_failed", f"{type(error).__name__}: {error}")
        self._characters_per_token = max(0.5, sum(w.size for w in batch) / max(1, sum(map(len, prompts))))
        room = [
            0 if index in errors else self._room(queued.request, len(prompts[index]))
            for index, queued in enumerate(batch)
        ]
        replies: list[str | RequestFailed] = [
            errors.get(index)
            or RequestFailed("prompt_too_long", f"the prompt has {len(prompt)} tokens, more than the model takes")
            for index, prompt in enumerate(prompts)
        ]
        for max_tokens in sorted({tokens for tokens in room if tokens > 0}):
            group = [index for index, tokens in enumerate(room) if tokens == max_tokens]
            for chunk in self._chunks(group, prompts, max_tokens):
                rows = self._generate_rows([batch[i] for i in chunk], [prompts[i] for i in chunk], max_tokens)
                for index, row in zip(chunk, rows, strict=True):
                    replies[index] = self._reply(len(prompts[index]), row)
        return replies

    def _chunks(self, indices: Sequence[int], prompts: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
        """Split indices into chunks within `batch_tokens`, shortest prompts first."""
        if self.batch_tokens is None:
            return [list(indices)]
        chunks: list[list[int]] = [[]]
        for index in sorted(indices, key=lambda i: len(prompts[i])):
            if chunks[-1] and (len(chunks[-1]) + 1) * (len(prompts[index]) + max_tokens) > self.batch_tokens:
                chunks.append([])
            chunks[-1].append(index)
        return chunks

    def _room(self, request: Mapping[str, Any], prompt_tokens: int) -> int:
        """The number of tokens that a reply may have."""
        _, model = self._load()
        max_tokens = request.get("max_tokens") or model.generation_config.max_new_tokens or _DEFAULT_MAX_TOKENS
        context = getattr(model.config, "max_position_embeddings", None)
        return min(max_tokens, context - prompt_tokens) if context else max_tokens

    def _generate_rows(
        self, batch: Sequence[_QueuedRequest], prompts: Sequence[list[int]], max_tokens: int
    ) -> list[list[int]]:
        import torch

        try:
            return self._generate_tokens(batch, prompts, max_tokens)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()
        if self.batch_tokens is not None:  # for the next batches as well
            self.batch_tokens = self.batch_tokens // 2
        half = len(batch) // 2
        first, second = (slice(None, half), slice(half, None))
        return [row for s in (first, second) for row in self._generate_rows(batch[s], prompts[s], max_tokens)]

    def _generate_tokens(
        self, batch: Sequence[_QueuedRequest], prompts: Sequence[list[int]], max_tokens: int
    ) -> list[list[int]]:
        """Generate the tokens of each reply. After 64, 128, 256 ... tokens, finished rows leave the batch."""
        import torch

        tokenizer, model = self._load()
        eos, rows = _eos_token_ids(tokenizer, model), [[] for _ in batch]
        longest = max(map(len, prompts))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        active, cache, generated = list(range(len(batch))), None, 0
        while active and generated < max_tokens:
            with torch.inference_mode():
                output = model.generate(
                    ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    generation_config=_greedy_config(
                        model, min(max(generated, _FIRST_CHUNK), max_tokens - generated), eos, pad
                    ),
                    logits_processor=_samplers(model, [batch[index] for index in active], max_tokens, generated),
                    stopping_criteria=[self._stopping_criterion(longest, max_tokens)],
                )
            self.activity = ""
            if self._halted:
                raise Unreachable("given up")
            new = output.sequences[:, ids.shape[1] :].tolist()
            for index, tokens in zip(active, new, strict=True):
                rows[index] += tokens
            generated += len(new[0])
            unfinished = [i for i, tokens in enumerate(new) if not set(eos).intersection(tokens)]
            chosen = torch.tensor(unfinished, dtype=torch.long, device=model.device)
            cache = output.past_key_values
            if cache is not None and len(unfinished) < len(active):
                cache.reorder_cache(chosen)  # the one method that every kind of layer has
            mask = torch.nn.functional.pad(mask[chosen], (0, len(new[0])), value=1)
            ids, active = output.sequences[chosen], [active[i] for i in unfinished]
        return rows

    def _stopping_criterion(self, prompt_tokens: int, max_tokens: int) -> Callable[..., Any]:
        """A stopping criterion that shows the progress after each token; only `halt` stops generation."""
        import torch

        def is_halted(ids: Any, scores: Any, **_: Any) -> Any:
            generated = ids.shape[1] - prompt_tokens
            self.activity = f"a batch of {len(ids)} is at token {generated:,} of at most {max_tokens:,}"
            return torch.full((len(ids),), self._halted, device=ids.device)

        return is_halted

    def _reply(self, prompt_tokens: int, row: list[int]) -> str:
        tokenizer, model = self._load()
        eos = _eos_token_ids(tokenizer, model)
        end = next((i for i, token in enumerate(row) if token in eos), None)
        tokens = row if end is None else row[:end]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        finish_reason = "length" if end is None else "stop"
        return completion_json(text, finish_reason, self.name, prompt_tokens, len(tokens) + (end is not None))


def _parse_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the arguments of a turn's tool calls, JSON text in the API, to objects, as chat templates expect."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") or {}
        with suppress(KeyError, TypeError, ValueError):
            function = {**function, "arguments": json.loads(function["arguments"])}
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _options_key(request: Mapping[str, Any]) -> str:
    options = {k: v for k, v in request.items() if k not in ("messages", "tools")}
    return json.dumps([options, "tools" in request], sort_keys=True)


def _eos_token_ids(tokenizer: Any, model: Any) -> list[int]:
    """The tokens that end a turn: the tokenizer's and all of the generation config's."""
    eos = model.generation_config.eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    return sorted({tokenizer.eos_token_id, *(token for token in ids if token is not None)})


def _greedy_config(model: Any, max_new_tokens: int, eos: list[int], pad: int) -> Any:
    """The model's generation config without sampling, which `_samplers` adds."""
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


def _samplers(model: Any, batch: Sequence[_QueuedRequest], max_tokens: int, generated: int) -> Any:
    """The logits processors set by the request, or else by the generation config; none for greedy decoding."""
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    request, config = batch[0].request, model.generation_config
    temperature = request.get("temperature")
    if temperature is None:
        temperature = (config.temperature or 1.0) if config.do_sample else 0.0
    if temperature == 0:
        return LogitsProcessorList()
    top_k, top_p = request.get("top_k", config.top_k), request.get("top_p", config.top_p)
    warpers = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(int(top_k))] if top_k else []
    warpers += [TopPLogitsWarper(float(top_p))] if top_p and top_p < 1 else []
    return LogitsProcessorList([*warpers, _SeededSampler(batch, max_tokens, generated)])


class _SeededSampler:
    """Keep one token per row: the one that the row's uniform number selects from the warped distribution."""

    def __init__(self, batch: Sequence[_QueuedRequest], max_tokens: int, generated: int) -> None:
        import torch

        seeds = [int(content_hash([dict(w.request), w.sample])[:15], 16) for w in batch]
        self._draws = torch.stack([torch.rand(max_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds])
        self._step = generated

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        cumulative = torch.cumsum(torch.softmax(scores.float(), dim=-1), dim=-1)
        draw = self._draws[:, self._step].to(scores.device)[:, None] * cumulative[:, -1:]
        self._step += 1
        token = torch.searchsorted(cumulative, draw, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
