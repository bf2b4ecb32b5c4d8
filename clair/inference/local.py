"""A transformers model in this process: requests are batched, and a reply depends on its own request only.

`clair.inference.generation` generates the tokens of a batch; this module fills it from the queue of requests.
"""

from __future__ import annotations

import asyncio
import json
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clair.core.errors import check_name, one_line
from clair.core.files import content_hash
from clair.data.records import message_text
from clair.inference.generation.running_batch import (
    GenerationRow,
    RunningBatch,
    eos_token_ids,
    temperature_of,
    uniform_draws,
)
from clair.inference.model import THINKING_TOKENS, Refused, RequestFailed, Unreachable, completion_json
from clair.inference.model_folder import adapter_base, check_model_folder, resize_vocabulary, weights_identity

if TYPE_CHECKING:
    from clair.inference.generation.soft_prompt import SoftPrompt

_OPTIONS = ("messages", "max_tokens", "temperature", "top_p", "top_k", "seed", "tools", "chat_template_kwargs")
_DEFAULT_MAX_TOKENS = 1024
_CHANGED_FRACTION = 8
"""Rows leave and join a batch when an eighth of it has ended or waits: each change costs about one token's time."""
_GATHER_SECONDS = 0.005  # time for requests to arrive before a batch is formed


def check_options(options: Mapping[str, Any], role: str = "target") -> None:
    """Check that a local model supports all options of a request. Raises UserError naming the first other one."""
    for key in options:
        check_name(f"{role}: a local model does not understand the option", key, _OPTIONS)


@dataclass(eq=False, slots=True)
class _QueuedRequest:
    request: Mapping[str, Any]
    sample: int
    size: int
    row: GenerationRow | None = None
    """None until it is tokenised."""
    future: Future[str] = field(default_factory=Future)
    """Its reply, for the event loop that waits for it."""

    def resolve(self, reply: str | Exception) -> None:
        """Set the result of its future, in any thread."""
        with suppress(InvalidStateError):  # cancelled
            if isinstance(reply, Exception):
                self.future.set_exception(reply)
            else:
                self.future.set_result(reply)


class LocalModel:
    """A transformers model folder, loaded on first use, that answers in batches in its own thread.

    A batch has at most `batch_size` requests, or with `batch_tokens` as many as fit, counting prompts padded to the
    longest and the room for their answers. A reply is returned as soon as it ends, and the next request with the same
    options takes its place. A batch that does not fit into memory is halved. An adapter is loaded onto its base; a LoRA
    is merged into weights in float32.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int = 32,
        batch_tokens: int | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        user: str | Sequence[float] | None = None,
    ) -> None:
        check_model_folder(path)
        self.path = Path(path)
        self.name = self.path.name
        self.identity = weights_identity(path)
        self._soft_prompt: SoftPrompt | None = None
        """The prompt in front of every turn, for `user`."""
        if user is not None:
            from clair.inference.generation.soft_prompt import SoftPrompt

            self._soft_prompt = SoftPrompt.load(self.path)
            self._soft_prompt.states = self._soft_prompt.state_of(user)[None]
            self.identity += f" user:{content_hash([user])[:16]}"
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self._dtype = dtype
        self._trust_remote_code = trust_remote_code
        self._queue: list[_QueuedRequest] = []
        self._queue_lock = threading.Lock()
        self._arrivals = 0  # since the model's thread last looked
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
        queued = _QueuedRequest(request, sample, size)
        with self._queue_lock:
            self._queue.append(queued)
            self._arrivals += 1
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await asyncio.wrap_future(queued.future)

    def abandon(self) -> None:
        """Fail the requests that are in no batch yet; the batch in progress is finished."""
        with self._queue_lock:
            abandoned, self._queue = self._queue, []
        for queued in abandoned:
            queued.resolve(Unreachable("not begun"))

    def halt(self) -> None:
        """Fail all requests at the next token, those of the batch in progress too."""
        self._halted = True

    async def _work(self) -> None:
        await asyncio.sleep(_GATHER_SECONDS)
        while self._queue:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._answer_queue)
            await asyncio.sleep(_GATHER_SECONDS)

    # ---- in the model's thread

    def _load(self) -> Any:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging

            from clair.inference.generation.onednn import pack_weights, use_onednn

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
            is_whole = base is None
            if base is not None:
                from peft import LoraModel, PeftModel

                with warnings.catch_warnings():  # peft 0.21 uses a name that transformers 5.23 deprecates
                    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                    resize_vocabulary(model, self.path / "adapter_model.safetensors")
                    model = PeftModel.from_pretrained(model, str(self.path))
                    # Each layer multiplies once instead of three times. Narrower weights would round the sum.
                    lora = model.peft_config["default"]
                    is_mergeable = isinstance(model.base_model, LoraModel) and not (
                        getattr(lora, "lora_bias", False) or getattr(lora, "alora_invocation_tokens", None)
                    )
                    if model.dtype == torch.float32 and is_mergeable:
                        model, is_whole = model.merge_and_unload(), True
            model.to(device)  # pyright: ignore[reportArgumentType]  # a decorator hides the method's signature
            model.generation_config.cache_implementation = None  # a batch that changes needs a cache that grows
            (pack_weights if is_whole else use_onednn)(model)  # an adapter's layers read the weights below them
            if self._soft_prompt is not None:
                self._soft_prompt.attach(model)
            self._loaded = tokenizer, model.eval()
            self.activity = ""
        return self._loaded

    def _tokenize(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] = (),
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        tokenizer, _ = self._load()
        # The template writes the BOS token, if any; the tokenizer must not add a second one.
        options = {"tools": list(tools)} if tools else {}
        options |= template_options or {}
        turns = [_parse_arguments(message) for message in messages]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **options)
        calls = [call for turn in messages for call in turn.get("tool_calls", [])]
        names = [tool.get("function", tool).get("name") for tool in [*calls, *tools]]
        if missing := [name for name in names if name and name not in text]:
            raise ValueError(
                f"the model's chat template leaves the tool {missing[0]} out; use a model that knows tools"
            )
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # `_row` checks the length

    def _answer_queue(self) -> None:
        """Answer requests until none waits. An error fails the rows of the batch; the others go on."""
        running: dict[GenerationRow, _QueuedRequest] = {}
        batch: RunningBatch | None = None
        while True:
            try:
                tokenizer, model = self._load()
                joining = self._take(batch, running)
                if not joining and not running:
                    return
                if joining and not running:
                    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
                    batch = RunningBatch(model, eos_token_ids(tokenizer, model), pad, joining[0].request)
                running |= {queued.row: queued for queued in joining if queued.row}
                assert batch is not None
                self._generate(batch, [queued.row for queued in joining if queued.row], running)
            except Exception as error:
                failed = list(running.values())
                if not failed:  # the model cannot be loaded
                    with self._queue_lock:
                        failed, self._queue = self._queue, []
                for queued in failed:
                    queued.resolve(RequestFailed("generation_failed", f"{type(error).__name__}: {error}"))
                running, batch = {}, None
            self.activity = ""

    def _generate(
        self,
        batch: RunningBatch,
        joining: Sequence[GenerationRow],
        running: dict[GenerationRow, _QueuedRequest],
    ) -> None:
        """Let rows join the batch, and generate until rows have ended or others can join."""
        import torch

        def end(row: GenerationRow) -> None:
            queued = running.pop(row)
            queued.resolve(self._reply(row))

        def is_enough(finished: int) -> bool:
            if self._halted:
                raise Unreachable("given up")
            rows = list(running)
            if rows:
                longest, max_tokens = max(len(row.tokens) for row in rows), max(row.max_tokens for row in rows)
                self.activity = f"a batch of {len(rows)} is at token {longest:,} of at most {max_tokens:,}"
            is_full = self.batch_tokens is None and len(rows) >= self.batch_size
            arrivals = 0 if is_full or not batch.can_join else self._arrivals
            return finished + arrivals >= max(1, (len(rows) + finished) // _CHANGED_FRACTION)

        if self._halted:
            raise Unreachable("given up")
        try:
            if joining:
                batch.join(joining, end)
            if batch.rows:
                batch.generate(end, is_enough)
        except torch.OutOfMemoryError:
            if len(running) == 1:
                raise
            batch.clear()
            torch.cuda.empty_cache()
            if self.batch_tokens is None:  # for the next batches as well
                self.batch_size = max(1, len(running) // 2)
            else:
                self.batch_tokens = self.batch_tokens // 2
            with self._queue_lock:
                self._queue = [*running.values(), *self._queue]
            running.clear()

    def _take(
        self, batch: RunningBatch | None, running: Mapping[GenerationRow, _QueuedRequest]
    ) -> list[_QueuedRequest]:
        """Take requests that fit into the batch: the longest-waiting one, and those with its options, by similar size.

        If the longest-waiting request has other options than the batch, the batch has to end first.
        """
        with self._queue_lock:
            self._arrivals = 0
            queue = [queued for queued in self._queue if not queued.future.done()]
        if not queue or (running and batch is not None and not batch.can_join):
            return []
        key = _options_key(queue[0].request)
        if running and _options_key(next(iter(running.values())).request) != key:
            return []
        similar = [queued for queued in queue if _options_key(queued.request) == key]
        similar.sort(key=lambda queued: abs(queued.size - queue[0].size))
        taken: list[_QueuedRequest] = []
        refused: dict[_QueuedRequest, RequestFailed] = {}
        rows = list(running)
        for queued in similar:
            if self.batch_tokens is None and len(rows) >= self.batch_size:
                break
            try:
                queued.row = queued.row or self._row(queued)
            except RequestFailed as error:
                refused[queued] = error
                continue
            longest = max(row.max_length for row in [*rows, queued.row])
            if rows and self.batch_tokens is not None and (len(rows) + 1) * longest > self.batch_tokens:
                break
            rows.append(queued.row)
            taken.append(queued)
        with self._queue_lock:
            waiting = set(self._queue)  # an abandoned request has left it
            taken = [queued for queued in taken if queued in waiting]
            gone = {*taken, *refused}
            self._queue = [queued for queued in self._queue if queued not in gone and not queued.future.done()]
        for queued, error in refused.items():
            queued.resolve(error)
        return taken

    def _row(self, queued: _QueuedRequest) -> GenerationRow:
        """Tokenise a request. Raises RequestFailed if the template refuses it, or if the model has no room for it."""
        request = queued.request
        _, model = self._load()
        try:
            prompt = self._tokenize(request["messages"], request.get("tools", ()), request.get("chat_template_kwargs"))
            prompt = self._soft_prompt.mark(prompt) if self._soft_prompt else prompt
        except Exception as error:  # a template can raise anything
            raise RequestFailed("generation_failed", f"{type(error).__name__}: {error}") from error
        max_tokens = request.get("max_tokens") or model.generation_config.max_new_tokens or _DEFAULT_MAX_TOKENS
        context = getattr(model.config, "max_position_embeddings", None)
        room = min(max_tokens, context - len(prompt)) if context else max_tokens
        if room < 1:
            raise RequestFailed("prompt_too_long", f"the prompt has {len(prompt)} tokens, more than the model takes")
        row = GenerationRow(prompt, room)
        if temperature_of(model, request):
            row.draws = uniform_draws(int(content_hash([dict(request), queued.sample])[:15], 16), room)
        return row

    def _reply(self, row: GenerationRow) -> str:
        tokenizer, model = self._load()
        has_ended = row.tokens[-1] in eos_token_ids(tokenizer, model)
        tokens = row.tokens[:-1] if has_ended else row.tokens
        text = _decode(tokenizer, tokens)
        finish_reason = "stop" if has_ended else "length"
        return completion_json(text, finish_reason, self.name, len(row.prompt), len(row.tokens))


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of an answer without special tokens, but for those that mark where its thoughts end."""
    added = tokenizer.added_tokens_decoder.items()
    marks = {token: mark.content for token, mark in added if mark.special and mark.content in THINKING_TOKENS}
    groups = groupby(tokens, marks.get)
    return "".join(mark or tokenizer.decode(list(group), skip_special_tokens=True) for mark, group in groups)


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
    options = {k: v for k, v in request.items() if k not in ("messages", "tools", "max_tokens")}
    return json.dumps(options, sort_keys=True)
