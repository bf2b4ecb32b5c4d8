"""A transformers model in this process: requests gather into batches, and a reply depends on its own request only.

Sampling draws one uniform number a token from a generator seeded by the request, so that the same request gives the
same reply whatever else was in its batch (up to the rounding of padded matrix products).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clair.core.errors import UserError, near_miss, one_line
from clair.core.files import content_hash, file_sha256
from clair.data.records import message_text
from clair.inference.model import Refused, RequestFailed, Unreachable, as_completion

_UNDERSTOOD = ("messages", "max_tokens", "temperature", "top_p", "top_k", "seed", "tools")
_DEFAULT_MAX_TOKENS = 1024
_LOOK_AFTER = 64
"""Tokens after which the rows that have ended leave their batch, for the first time."""
_GATHER_SECONDS = 0.005
_CHARACTERS_PER_TOKEN = 3.0  # until the first batch is tokenised
_ANSWERS_DEPEND_ON = re.compile(
    r".*\.safetensors$|.*\.model$|(config|generation_config|adapter_config|tokenizer|special_tokens|added_tokens|"
    r"chat_template|vocab|merges).*\.(json|jinja|txt)$"
)


def weights_identity(path: str | Path) -> str:
    """SHA-256 over everything in a model folder that its answers depend on: weights, configs, tokenizer, template.

    An adapter's answers depend on its base too: on all of it where it is a folder, else on its name.
    """
    digest = hashlib.sha256()
    for file in sorted(file for file in Path(path).iterdir() if _ANSWERS_DEPEND_ON.match(file.name)):
        digest.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    base = adapter_base(path)
    if base is not None:
        digest.update((weights_identity(base) if Path(base).is_dir() else f"hub:{base}").encode())
    return f"weights:{digest.hexdigest()}"


def adapter_base(path: str | Path) -> str | None:
    """The folder or hub name of the base model where `path` holds an adapter; None for a whole model.

    Raises UserError where the adapter does not name its base, or names an adapter: itself, or another one.
    """
    config = Path(path) / "adapter_config.json"
    if not config.is_file():
        return None
    base = _json(config, "the adapter").get("base_model_name_or_path")
    if not base:
        raise UserError(f"the adapter in {path} names no base_model_name_or_path; write it into {config.name}")
    if (Path(base) / config.name).is_file():
        which = "itself" if Path(base).samefile(path) else f"another adapter, {base},"
        raise UserError(
            f"the adapter in {path} names {which} as its base; write the model's folder into {config.name}, or fold "
            "the lower adapter into its base first (apo merge)"
        )
    return str(base)


def fit_vocabulary(model: Any, adapter: Path) -> None:
    """Give a base as many embeddings as the adapter in this file has, which was trained with tokens added or cut off.

    New rows are the mean of the old ones, the same every time: with the adapter on its own rows take their place.
    """
    import torch
    from safetensors import safe_open

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = tuple(f"base_model.model.{name}." for name, module in model.named_modules() if module in (embeddings, head))
    rows = set()
    with safe_open(adapter, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            if key.startswith(names) and key.endswith(".weight") and ".lora_" not in key:
                rows.add(file.get_slice(key).get_shape()[0])
    before = embeddings.weight.shape[0]
    if len(rows) != 1 or (wanted := rows.pop()) == before:
        return
    model.resize_token_embeddings(wanted, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None and wanted > before:
                module.weight[before:] = module.weight[:before].mean(0)


def check_model_folder(path: str | Path, role: str = "target") -> None:
    """See that a folder holds a chat model, or an adapter of one. Raises UserError naming what is missing."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{role}: model folder {folder} does not exist; give the path of a saved transformers model")
    base = adapter_base(folder)
    if base is None:
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise UserError(
                f"{role}: {folder} holds no config.json with *.safetensors; save a model with save_pretrained"
            )
        _check_chat(folder, role)
        return
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{role}: the adapter {folder} has no adapter_model.safetensors; only safetensors are read")
    if Path(base).is_dir():
        check_model_folder(base, role)
    elif base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise UserError(f"{role}: the base model {base} of the adapter {folder} does not exist")
    if (folder / "tokenizer_config.json").is_file():
        _check_chat(folder, role)


def check_code(folder: str | Path, role: str) -> None:
    """See that a folder needs none of its own code to be loaded (`auto_map`). Raises UserError; runs nothing of it."""
    file = Path(adapter_base(Path(folder)) or folder) / "config.json"
    config = _json(file, role) if file.is_file() else {}
    if "auto_map" not in config:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise UserError(
            f"{role}: {folder} needs code of its own to be loaded ({config.get('model_type')!r} is no model type of "
            f"transformers), and it is not run; set trust_remote_code: true if you have read it"
        )


def _check_chat(folder: Path, role: str) -> None:
    settings = folder / "tokenizer_config.json"
    config = _json(settings, f"{role}: the tokenizer") if settings.is_file() else {}
    if not config.get("chat_template") and not (folder / "chat_template.jinja").is_file():
        raise UserError(f"{role}: the tokenizer in {folder} has no chat template; use a chat model or save one with it")
    if not config.get("eos_token"):
        raise UserError(f"{role}: the tokenizer in {folder} has no end-of-turn token (eos_token): answers cannot end")


def _json(file: Path, whose: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{whose}: {file} is not JSON ({error}); save it with save_pretrained") from error
    return value


def check_options(options: Mapping[str, Any], role: str = "target") -> None:
    """See that a local model understands all options of a request. Raises UserError naming the first it does not."""
    for key in options:
        if key not in _UNDERSTOOD:
            raise UserError(
                f"{role}: a local model does not understand the option {key!r}{near_miss(key, _UNDERSTOOD)}; allowed: "
                f"{', '.join(_UNDERSTOOD[1:])}"
            )


@dataclass(slots=True)
class _Waiting:
    request: Mapping[str, Any]
    sample: int
    size: int
    future: asyncio.Future[str]


class LocalModel:
    """A transformers model folder, loaded on first use, answering in batches from a thread of its own.

    A batch holds at most `batch_size` requests, or with `batch_tokens` as many as fit: prompts padded to the longest,
    and the room for their answers. One that does not fit into memory is halved. An adapter is put on its base.
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
        self._trust = trust_remote_code
        self._waiting: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "local-model")
        self._loaded: Any = None
        self.kept = False
        """Whether a further run in this process asks it again."""
        self.doing = ""
        """What its thread is at, in words."""
        self._halted = False

    async def check(self) -> None:
        """Load the weights. Raises Refused."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise Refused(f"model {self.path} cannot be loaded: {one_line(error)}") from error

    async def close(self) -> None:
        """Let the weights go, unless they are `kept`; a batch that is being generated ends first."""
        if self._worker:
            await asyncio.wait([self._worker])
        self._worker = None
        if self.kept:
            return
        self._thread.shutdown()
        self._loaded = None

    async def complete(self, request: Mapping[str, Any], sample: int = 0) -> str:
        """The raw JSON text of a chat completion. Raises UserError for an option a local model does not understand."""
        check_options(request)
        size = sum(len(message_text(message)) for message in request["messages"])
        waiting = _Waiting(request, sample, size, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await waiting.future

    def abandon(self) -> None:
        """Give up the requests that no batch has begun, as unanswered; what is being generated is finished."""
        for waiting in self._waiting:
            if not waiting.future.done():
                waiting.future.set_exception(Unreachable("not begun"))
        self._waiting = []

    def halt(self) -> None:
        """Give up all requests at the next token, also of the batch that is being generated."""
        self._halted = True

    async def _work(self) -> None:
        await asyncio.sleep(_GATHER_SECONDS)
        while self._waiting:
            batch = self._next_batch()
            try:
                replies = await asyncio.get_running_loop().run_in_executor(self._thread, self._generate, batch)
            except Exception as error:  # told to each row that waits; the run goes on with the others
                for waiting in batch:
                    if not waiting.future.done():
                        told = f"{type(error).__name__}: {error}"
                        waiting.future.set_exception(RequestFailed("generation_failed", told))
            else:
                for waiting, reply in zip(batch, replies, strict=True):
                    if waiting.future.done():  # cancelled: nobody waits for it any more
                        continue
                    if isinstance(reply, RequestFailed):
                        waiting.future.set_exception(reply)
                    else:
                        waiting.future.set_result(reply)
            await asyncio.sleep(_GATHER_SECONDS)

    def _next_batch(self) -> list[_Waiting]:
        """Requests of one kind and of similar length, beside the one that has waited longest."""
        first = self._waiting[0]
        like = [w for w in self._waiting if _sampling(w.request) == _sampling(first.request)]
        like.sort(key=lambda w: abs(w.size - first.size))
        batch = like[: self._at_once(like)]
        chosen = {id(w) for w in batch}
        self._waiting = [w for w in self._waiting if id(w) not in chosen]
        return batch

    def _at_once(self, like: Sequence[_Waiting]) -> int:
        """How many of these make a batch. Tokens are guessed here; `_chunks` counts them."""
        if self.batch_tokens is None:
            return self.batch_size
        most, longest = like[0].request.get("max_tokens") or _DEFAULT_MAX_TOKENS, 0.0
        for count, waiting in enumerate(like):
            longest = max(longest, waiting.size / self._characters_per_token)
            if (count + 1) * (longest + most) > self.batch_tokens:
                return max(1, count)
        return len(like)

    # ---- on the model's own thread

    def _load(self) -> Any:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging

            self.doing = "loading the weights"
            logging.disable_progress_bar()  # a build has its own
            device = "cuda" if torch.cuda.is_available() else "cpu"
            base = adapter_base(self.path)
            own_words = base is None or (self.path / "tokenizer_config.json").is_file()
            words = self.path if own_words else base
            tokenizer = AutoTokenizer.from_pretrained(words, trust_remote_code=self._trust)
            model = AutoModelForCausalLM.from_pretrained(
                base or self.path, dtype=self._dtype, trust_remote_code=self._trust, use_safetensors=True
            )
            if base is not None:
                from peft import PeftModel

                with warnings.catch_warnings():  # peft 0.21 uses a name that transformers 5.23 gave up
                    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                    fit_vocabulary(model, self.path / "adapter_model.safetensors")
                    model = PeftModel.from_pretrained(model, str(self.path))
            self._loaded = tokenizer, model.to(device).eval()
            self.doing = ""
        return self._loaded

    def _tokenize(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[int]:
        tokenizer, _ = self._load()
        # The template writes the BOS where there is one; the tokenizer must not add a second.
        given = {"tools": list(tools)} if tools else {}
        turns = [_with_objects(message) for message in messages]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **given)
        calls = [call for turn in messages for call in turn.get("tool_calls", [])]
        names = [one.get("function", one).get("name") for one in [*calls, *tools]]
        if lost := [name for name in names if name and name not in text]:
            raise ValueError(f"the model's chat template leaves the tool {lost[0]} out; use a model that knows tools")
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # its length is checked later

    def _generate(self, batch: Sequence[_Waiting]) -> list[str | RequestFailed]:
        """A reply to each request. Those with less room for an answer go by themselves: a batch cuts nobody short."""
        prompts: list[list[int]] = []
        faults: dict[int, RequestFailed] = {}  # a row that the template refuses takes no other one with it
        for place, waiting in enumerate(batch):
            try:
                prompts.append(self._tokenize(waiting.request["messages"], waiting.request.get("tools", ())))
            except Exception as error:  # whatever a template can raise
                prompts.append([])
                faults[place] = RequestFailed("generation_failed", f"{type(error).__name__}: {error}")
        self._characters_per_token = max(0.5, sum(w.size for w in batch) / max(1, sum(map(len, prompts))))
        room = [
            0 if place in faults else self._room(waiting.request, len(prompts[place]))
            for place, waiting in enumerate(batch)
        ]
        replies: list[str | RequestFailed] = [
            faults.get(place)
            or RequestFailed("prompt_too_long", f"the prompt has {len(prompt)} tokens, more than the model takes")
            for place, prompt in enumerate(prompts)
        ]
        for most in sorted({most for most in room if most > 0}):
            alike = [place for place, own in enumerate(room) if own == most]
            for places in self._chunks(alike, prompts, most):
                rows = self._generate_rows([batch[p] for p in places], [prompts[p] for p in places], most)
                for place, row in zip(places, rows, strict=True):
                    replies[place] = self._reply(len(prompts[place]), row)
        return replies

    def _chunks(self, places: Sequence[int], prompts: Sequence[list[int]], most: int) -> list[list[int]]:
        """Places in runs that keep to `batch_tokens`, shortest prompts first."""
        if self.batch_tokens is None:
            return [list(places)]
        chunks: list[list[int]] = [[]]
        for place in sorted(places, key=lambda p: len(prompts[p])):
            if chunks[-1] and (len(chunks[-1]) + 1) * (len(prompts[place]) + most) > self.batch_tokens:
                chunks.append([])
            chunks[-1].append(place)
        return chunks

    def _room(self, request: Mapping[str, Any], prompt_tokens: int) -> int:
        """How many tokens a reply may have."""
        _, model = self._load()
        wanted = request.get("max_tokens") or model.generation_config.max_new_tokens or _DEFAULT_MAX_TOKENS
        context = getattr(model.config, "max_position_embeddings", None)
        return min(wanted, context - prompt_tokens) if context else wanted

    def _generate_rows(self, batch: Sequence[_Waiting], prompts: Sequence[list[int]], most: int) -> list[list[int]]:
        import torch

        try:
            return self._generated(batch, prompts, most)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()
        if self.batch_tokens is not None:  # the next batches may be no larger
            self.batch_tokens = self.batch_tokens // 2
        half = len(batch) // 2
        first, second = (slice(None, half), slice(half, None))
        return [row for part in (first, second) for row in self._generate_rows(batch[part], prompts[part], most)]

    def _generated(self, batch: Sequence[_Waiting], prompts: Sequence[list[int]], most: int) -> list[list[int]]:
        """The tokens of each reply. After 64 tokens, 128, 256 ... the rows that have ended leave the batch."""
        import torch

        tokenizer, model = self._load()
        ends, rows = _ends(tokenizer, model), [[] for _ in batch]
        longest = max(map(len, prompts))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        going, cache, made = list(range(len(batch))), None, 0
        while going and made < most:
            with torch.inference_mode():
                found = model.generate(
                    ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    generation_config=_greedy_config(model, min(max(made, _LOOK_AFTER), most - made), ends, pad),
                    logits_processor=_samplers(model, [batch[place] for place in going], most, made),
                    stopping_criteria=[self._watch(longest, most)],
                )
            self.doing = ""
            if self._halted:
                raise Unreachable("given up")
            new = found.sequences[:, ids.shape[1] :].tolist()
            for place, tokens in zip(going, new, strict=True):
                rows[place] += tokens
            made += len(new[0])
            left = [at for at, tokens in enumerate(new) if not set(ends).intersection(tokens)]
            chosen = torch.tensor(left, dtype=torch.long, device=model.device)
            cache = found.past_key_values
            if cache is not None and len(left) < len(going):
                cache.reorder_cache(chosen)  # every kind of layer has it
            mask = torch.nn.functional.pad(mask[chosen], (0, len(new[0])), value=1)
            ids, going = found.sequences[chosen], [going[at] for at in left]
        return rows

    def _watch(self, prompt_tokens: int, most: int) -> Callable[..., Any]:
        """What generation asks after each token: whether to end. Nothing but `halt` ends it."""
        import torch

        def ended(ids: Any, scores: Any, **_: Any) -> Any:
            made = ids.shape[1] - prompt_tokens
            self.doing = f"a batch of {len(ids)} is at token {made:,} of at most {most:,}"
            return torch.full((len(ids),), self._halted, device=ids.device)

        return ended

    def _reply(self, prompt_tokens: int, row: list[int]) -> str:
        tokenizer, model = self._load()
        ends = _ends(tokenizer, model)
        end = next((i for i, token in enumerate(row) if token in ends), None)
        tokens = row if end is None else row[:end]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        finish_reason = "length" if end is None else "stop"
        return as_completion(text, finish_reason, self.name, prompt_tokens, len(tokens) + (end is not None))


def _with_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    """A turn whose tool calls have objects for their arguments, as chat templates expect; the API has JSON text."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") or {}
        with suppress(TypeError, ValueError):
            function = {**function, "arguments": json.loads(function.get("arguments"))}
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def _sampling(request: Mapping[str, Any]) -> str:
    given = {k: v for k, v in request.items() if k not in ("messages", "tools")}
    return json.dumps([given, "tools" in request], sort_keys=True)


def _ends(tokenizer: Any, model: Any) -> list[int]:
    """Every token that ends a turn: the tokenizer's and all of the generation config's."""
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return sorted({tokenizer.eos_token_id, *(token for token in listed if token is not None)})


def _greedy_config(model: Any, most: int, ends: list[int], pad: int) -> Any:
    """The model's generation config with its sampling off: what is sampled is decided by `_samplers`."""
    from transformers import GenerationConfig

    kept = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens")
    own = {name: getattr(model.generation_config, name, None) for name in kept}
    return GenerationConfig(
        return_dict_in_generate=True,
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=pad,
        **{name: value for name, value in own.items() if value is not None},
    )


def _samplers(model: Any, batch: Sequence[_Waiting], most: int, made: int) -> Any:
    """The warpers that the request, or else the model's own generation config, asks for; none for greedy decoding."""
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    request, own = batch[0].request, model.generation_config
    temperature = request.get("temperature")
    if temperature is None:
        temperature = (own.temperature or 1.0) if own.do_sample else 0.0
    if temperature == 0:
        return LogitsProcessorList()
    top_k, top_p = request.get("top_k", own.top_k), request.get("top_p", own.top_p)
    warpers = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(int(top_k))] if top_k else []
    warpers += [TopPLogitsWarper(float(top_p))] if top_p and top_p < 1 else []
    return LogitsProcessorList([*warpers, _OneDraw(batch, most, made)])


class _OneDraw:
    """Leaves one token a row: the one that the row's own uniform number picks from the warped distribution."""

    def __init__(self, batch: Sequence[_Waiting], most: int, made: int) -> None:
        import torch

        seeds = [int(content_hash([dict(w.request), w.sample])[:15], 16) for w in batch]
        self._draws = torch.stack([torch.rand(most, generator=torch.Generator().manual_seed(s)) for s in seeds])
        self._step = made

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        below = torch.cumsum(torch.softmax(scores.float(), dim=-1), dim=-1)
        draw = self._draws[:, self._step].to(scores.device)[:, None] * below[:, -1:]
        self._step += 1
        token = torch.searchsorted(below, draw, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
