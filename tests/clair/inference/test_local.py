"""A model in this process: its reply is what transformers would say, and the same whatever else is in the batch."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from clair.core.errors import UserError
from clair.inference.generation import onednn, running_batch
from clair.inference.generation.running_batch import GenerationRow, RunningBatch
from clair.inference.local import LocalModel
from clair.inference.model import RequestFailed, Unreachable, parse_reply
from clair.inference.model_folder import weights_identity
from clair.pipeline.build import build
from tests.clair import tiny_model
from tests.clair.building import config_for, drops, manifest, pairs, write_prompts

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("model"))


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def texts(count: int, longest: int = 40, seed: int = 0) -> list[str]:
    """Prompts of one word to many."""
    random = Random(seed)
    return [
        " ".join(random.choices(tiny_model.VOCABULARY, k=1 + n * (longest - 1) // (count - 1))) for n in range(count)
    ]


def ask(folder: Path, requests: list[dict[str, Any]], samples: list[int] | None = None, **options: Any) -> list[Any]:
    """The replies to concurrent requests. Exceptions are returned."""

    async def gather_replies():
        model = LocalModel(folder, **options)
        calls = (model.complete(r, s) for r, s in zip(requests, samples or [0] * len(requests), strict=True))
        try:
            return await asyncio.gather(*calls, return_exceptions=True)
        finally:
            await model.close()

    replies = asyncio.run(gather_replies())
    return [reply if isinstance(reply, BaseException) else parse_reply(reply) for reply in replies]


def greedily(folder: Path, text: str, max_tokens: int) -> list[int]:
    """The tokens that transformers itself generates, one prompt at a time and without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        messages(text), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return generated[0, ids.shape[1] :].tolist()


# ---- replies


def test_greedy_is_what_transformers_generates_from_each_prompt_alone(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = texts(12)
    replies = ask(folder, [{"messages": messages(t), "temperature": 0, "max_tokens": 20} for t in prompts])
    for text, reply in zip(prompts, replies, strict=True):
        expected = greedily(folder, text, 20)
        assert reply.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert reply.usage["completion_tokens"] == len(expected)
    assert len({reply.text for reply in replies}) > 1


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20}])
def test_a_sampled_reply_is_the_same_whatever_the_batch(folder, options):
    requests = [{"messages": messages(t), "max_tokens": 24, "seed": 0, **options} for t in texts(16)]
    together = ask(folder, requests, batch_size=16)
    assert ask(folder, requests, batch_size=1) == together
    assert ask(folder, requests, batch_size=5) == together
    order = list(range(16))
    Random(3).shuffle(order)
    shuffled = ask(folder, [requests[n] for n in order], batch_size=7)
    assert [shuffled[order.index(n)] for n in range(16)] == together
    assert [ask(folder, [request])[0] for request in requests[::5]] == together[::5]
    assert len({reply.text for reply in together}) > 12


def test_a_local_model_multiplies_with_onednn_where_it_is_the_faster(folder, monkeypatch):
    if onednn.speeds()[1] == 0:
        pytest.skip("this torch has no oneDNN for this processor")
    request = {"messages": messages("what is one"), "max_tokens": 20, "temperature": 0}
    products, really = [], onednn.PackedLinear.forward
    monkeypatch.setattr(onednn.PackedLinear, "forward", lambda self, x: products.append(1) or really(self, x))
    monkeypatch.setattr(onednn, "is_faster_for_generation", lambda: False)
    expected = ask(folder, [request])
    assert not products
    monkeypatch.setattr(onednn, "is_faster_for_generation", lambda: True)
    assert ask(folder, [request]) == expected
    assert len(products) >= 20 * 7


@pytest.mark.parametrize(("seconds", "expected"), [((1.2, 1.0), True), ((1.19, 1.0), False), ((1.0, math.inf), False)])
def test_a_product_of_a_few_rows_decides_for_generation_whatever_large_products_say(seconds, expected, monkeypatch):
    monkeypatch.setattr(onednn, "speeds", lambda: (2.0, 1.0) if expected else (1.0, 2.0))
    monkeypatch.setattr(onednn, "_best_times", lambda *products: list(seconds))
    assert onednn.is_faster_for_generation.__wrapped__() == expected
    with torch.inference_mode():
        monkeypatch.setattr(onednn, "is_faster_for_generation", lambda: expected)
        assert onednn._uses_onednn(7, torch.ones(7, 3)) == expected


def test_packed_weights_multiply_a_row_alike_in_any_batch_and_a_tied_head_stays_as_it_is(folder, monkeypatch):
    if onednn.speeds()[1] == 0:
        pytest.skip("this torch has no oneDNN for this processor")
    monkeypatch.setattr(onednn, "is_faster_for_generation", lambda: True)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.lm_head.weight = model.model.embed_tokens.weight
    plain = {name: weight.clone() for name, weight in model.named_parameters()}
    onednn.pack_weights(model)
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    layer, weight = model.model.layers[0].mlp.down_proj, plain["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(layer.weight, weight)
    assert not list(layer.parameters())
    rows = torch.randn(37, layer.in_features)
    with torch.inference_mode():
        together = layer(rows)
        torch.testing.assert_close(together, rows @ weight.T, rtol=1e-5, atol=1e-5)
        for count in (1, 2, 16):
            assert torch.equal(layer(rows[:count]), together[:count])


@pytest.fixture
def row_counts(monkeypatch) -> list[tuple[int, int]]:
    """The shape `[B, L]` of the input ids of each forward pass."""
    shapes: list[tuple[int, int]] = []
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)  # generate() reads its signature
    def counted(self: Any, input_ids: Any, **more: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    return shapes


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.3}])
def test_rows_that_have_ended_leave_the_batch_and_change_no_reply(folder, row_counts, options):
    requests = [{"messages": messages(t), "max_tokens": 60, "seed": 0, **options} for t in texts(16, 20)]
    alone = ask(folder, requests, batch_size=1)
    row_counts.clear()
    assert ask(folder, requests, batch_size=16) == alone
    lengths = [reply.usage["completion_tokens"] for reply in alone]
    assert max(lengths) == 60 > min(lengths)
    # The prompts are read once; then at most an eighth of the rows has ended.
    generated = sum(rows for rows, _ in row_counts[1:])
    assert sum(lengths) - 16 <= generated <= 1.15 * sum(lengths) < 0.95 * 16 * 60
    assert row_counts[0][0] == 16


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.3}])
def test_the_next_requests_take_the_place_of_ended_rows(folder, row_counts, options):
    random = Random(1)
    requests = [
        {"messages": messages(t), "max_tokens": random.randint(2, 60), "seed": 0, **options} for t in texts(64, 30)
    ]
    alone = ask(folder, requests, batch_size=1)
    row_counts.clear()
    assert ask(folder, requests, batch_size=8) == alone
    steps = [rows for rows, length in row_counts if length == 1]
    assert max(steps) == 8
    filled = steps[: len(steps) * 3 // 4]  # the last rows end by themselves
    assert sum(filled) / len(filled) > 0.8 * 8


def test_a_reply_is_returned_when_it_ends(folder, row_counts):
    async def finish_times():
        model, done = LocalModel(folder, batch_size=16), []
        requests = [{"messages": messages("one"), "max_tokens": n, "temperature": 1.0} for n in (100, 2, 90, 20)]

        async def complete(index: int) -> None:
            reply = await model.complete(requests[index], index)
            done.append((index, json.loads(reply)["usage"]["completion_tokens"], len(row_counts)))

        await asyncio.gather(*map(complete, range(4)))
        await model.close()
        return done

    done = asyncio.run(finish_times())
    assert [count for _, count, _ in done] == sorted(count for _, count, _ in done)
    assert done[0][0] == 1
    assert done[0][2] < done[-1][2]  # the others were still being written


def model_of_kind(kind: str, folder: Path) -> Path:
    """A tiny model, in float64, whose layers need a cache of this kind."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0, "initializer_range": 0.3}
    if kind == "sliding":
        config: Any = Gemma3TextConfig(
            **sizes, **tokens, head_dim=8, num_hidden_layers=3, sliding_window=8, sliding_window_pattern=3
        )
        model: Any = Gemma3ForCausalLM(config)
    elif kind == "convolution":
        config = Lfm2Config(**sizes, **tokens, num_hidden_layers=2, layer_types=["conv", "full_attention"])
        model = Lfm2ForCausalLM(config)
    else:
        model = tiny_model.make_model()
        model.generation_config.repetition_penalty = 1.5
    model.double().save_pretrained(folder)
    tiny_model.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["full", "sliding", "convolution"])
def test_rows_that_join_are_what_transformers_generates_from_each_prompt_alone(tmp_path, kind):
    folder = model_of_kind(kind, tmp_path)
    tokenizer, random = AutoTokenizer.from_pretrained(folder), Random(2)
    prompts = texts(24, 30)
    lengths = [random.randint(1, 40) for _ in prompts]
    requests = [
        {"messages": messages(t), "temperature": 0, "max_tokens": n} for t, n in zip(prompts, lengths, strict=True)
    ]
    replies = ask(folder, requests, batch_size=5)
    assert len({reply.text for reply in replies}) > 12
    for text, length, reply in zip(prompts, lengths, replies, strict=True):
        expected = greedily(folder, text, length)
        assert reply.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert reply.usage["completion_tokens"] == len(expected)


def test_another_seed_sample_or_prompt_draws_anew(folder):
    base = {"messages": messages("what is one"), "max_tokens": 24, "temperature": 1.0, "seed": 0}
    requests = [base, base, base | {"seed": 1}, base | {"messages": messages("what is two")}, base]
    replies = ask(folder, requests, samples=[0, 1, 0, 0, 0])
    assert replies[0] == replies[4]
    assert len({reply.text for reply in replies}) == 4


def test_samples_follow_the_models_distribution(folder):
    """3,000 first tokens against the probabilities of the model itself."""
    request = {"messages": messages("tell me"), "max_tokens": 1, "temperature": 1.0}
    replies = ask(folder, [request] * 3000, samples=list(range(3000)), batch_size=500)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        messages("tell me"), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.inference_mode():
        probabilities = torch.softmax(model(ids).logits[0, -1], -1)
    token_ids = {word: tokenizer.convert_tokens_to_ids(word) for word in tiny_model.VOCABULARY}
    for word, token in token_ids.items():
        share = sum(reply.text == word for reply in replies) / 3000
        assert share == pytest.approx(float(probabilities[token]), abs=0.035), word
    assert max(float(probabilities[token]) for token in token_ids.values()) > 0.1


def test_every_token_is_drawn_anew(tmp_path):
    model = tiny_model.make_model()
    torch.nn.init.zeros_(model.lm_head.weight)  # all tokens are equally likely at every step
    model.save_pretrained(tmp_path)
    tiny_model.make_tokenizer().save_pretrained(tmp_path)
    requests = [{"messages": messages(t), "max_tokens": 40, "temperature": 1.0} for t in texts(20, 20)]
    sampled = [word for reply in ask(tmp_path, requests) for word in reply.text.split()]
    repeats = sum(a == b for a, b in pairwise(sampled)) / len(sampled)
    assert repeats < 0.15
    assert set(sampled) >= set(tiny_model.VOCABULARY)


def test_it_stops_at_the_end_of_the_turn_and_reports_it(folder):
    requests = [{"messages": messages(t), "max_tokens": 60, "temperature": 1.5, "seed": 0} for t in texts(20, 20)]
    replies = ask(folder, requests)
    stopped = [reply for reply in replies if reply.finish_reason == "stop"]
    assert len(stopped) > 3
    for reply in replies:
        generated = reply.text.split()
        assert "<|end|>" not in generated
        if reply.finish_reason == "stop":
            assert len(generated) < reply.usage["completion_tokens"] <= 60
        else:
            assert (reply.finish_reason, reply.usage["completion_tokens"]) == ("length", 60)


def test_every_end_that_the_generation_config_names_is_an_end(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "m")
    config = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [3, *range(8, 28)]}))
    replies = ask(copy, [{"messages": messages(t), "max_tokens": 60, "temperature": 1.0} for t in texts(10)])
    assert all(reply.finish_reason == "stop" and reply.usage["completion_tokens"] < 60 for reply in replies)
    assert all(not set(reply.text.split()) & set(tiny_model.VOCABULARY) for reply in replies)


def test_an_answer_that_is_cut_off_is_marked_so(folder):
    (reply,) = ask(folder, [{"messages": messages("what"), "max_tokens": 2, "temperature": 0}])
    assert (reply.finish_reason, reply.usage["completion_tokens"]) == ("length", 2)


def test_the_prompt_begins_with_one_bos_and_ends_where_the_assistant_begins(folder):
    tokens = LocalModel(folder)._tokenize([{"role": "system", "content": "please"}, *messages("what is one")])
    assert tokens.count(1) == 1
    assert tokens[0] == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokens) == [
        "<|begin|>",
        "<|start|>",
        "system",
        "please",
        "<|end|>",
        "<|start|>",
        "user",
        "what",
        "is",
        "one",
        "<|end|>",
        "<|start|>",
        "assistant",
    ]
    (reply,) = ask(folder, [{"messages": messages("what is one"), "max_tokens": 1}])
    assert reply.usage["prompt_tokens"] == 9


# ---- room


def test_a_turn_that_the_template_cannot_write_is_reported_and_the_others_are_answered(folder):
    call = {"function": {"name": "tide", "arguments": '{"port": 3}'}}
    odd = [*messages("what is one"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    requests = [{"messages": turns, "max_tokens": 2} for turns in (messages("one"), odd, messages("two"))]
    replies = ask(folder, [*requests, {**requests[0], "tools": [call]}])
    assert [isinstance(reply, RequestFailed) for reply in replies] == [False, True, False, True]
    assert "leaves the tool tide out" in replies[3].detail


def test_tools_and_calls_reach_the_template_with_objects_for_arguments(folder, tmp_path):
    template = (
        "{{ bos_token }}{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{% for m in messages %}"
        "{{ m.content or '' }} {% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments.port }} "
        "{% endfor %}{% endfor %}"
    )
    model_dir = tiny_model.save(tmp_path / "own")
    tiny_model.make_tokenizer(chat_template=template).save_pretrained(model_dir)
    call = {"function": {"name": "two", "arguments": '{"port": "three"}'}}
    turns = [*messages("what"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    tokens = LocalModel(model_dir)._tokenize(turns, [{"function": {"name": "one"}}])
    pieces = AutoTokenizer.from_pretrained(model_dir).convert_ids_to_tokens(tokens)
    assert pieces == ["<|begin|>", "one", "what", "two", "three"]


def test_a_long_prompt_cuts_nobody_else_short(folder):
    short = {"messages": messages("what"), "max_tokens": 60, "temperature": 0}
    long = {"messages": messages(" ".join(["one"] * 110)), "max_tokens": 60, "temperature": 0}
    (alone,) = ask(folder, [short])
    beside, near_the_end = ask(folder, [short, long])
    assert beside == alone
    assert near_the_end.usage["completion_tokens"] <= 128 - near_the_end.usage["prompt_tokens"]


def test_a_prompt_that_does_not_fit_is_reported_and_the_others_are_answered(folder):
    short = {"messages": messages("what"), "max_tokens": 8, "temperature": 0}
    long = {"messages": messages(" ".join(["one"] * 500)), "max_tokens": 8, "temperature": 0}
    replies = ask(folder, [short, long, short])
    assert isinstance(replies[1], RequestFailed)
    assert replies[1].reason == "prompt_too_long"
    assert replies[0] == replies[2] == ask(folder, [short])[0]


# ---- batches


@pytest.fixture
def batches(monkeypatch) -> list[list[GenerationRow]]:
    """The rows of the batch after each join."""
    joined: list[list[GenerationRow]] = []
    really = RunningBatch.join

    def watched(self, rows, on_end):
        joined.append([*self.rows, *rows])
        really(self, rows, on_end)

    monkeypatch.setattr(RunningBatch, "join", watched)
    return joined


def test_requests_gather_into_batches_of_one_kind(folder, batches):
    requests = [{"messages": messages(t), "max_tokens": 4, "temperature": n % 2} for n, t in enumerate(texts(40))]
    ask(folder, requests, batch_size=8)
    assert max(map(len, batches)) == 8
    assert all(len({row.draws is None for row in batch}) == 1 for batch in batches)
    assert {batch[0].draws is None for batch in batches} == {True, False}


def test_a_batch_is_sized_by_tokens_with_padding_and_room_for_answers(folder, batches):
    requests = [{"messages": messages(t), "max_tokens": 10, "temperature": 0} for t in texts(60, longest=80)]
    replies = ask(folder, requests, batch_tokens=300)
    assert all(len(batch) * max(row.max_length for row in batch) <= 300 for batch in batches)
    assert max(map(len, batches)) > 8
    assert len({id(row) for batch in batches for row in batch}) == 60
    assert replies == ask(folder, requests, batch_size=1)
    batches.clear()
    ask(folder, requests[-3:], batch_tokens=5)  # less than one: by themselves
    assert [len(batch) for batch in batches] == [1, 1, 1]


def test_the_cache_never_holds_more_than_the_longest_row_for_each_row(folder, monkeypatch):
    sizes, really = [], RunningBatch.generate

    def watched(self, on_end, is_enough):
        really(self, on_end, is_enough)
        layers = self._cache.layers
        memory = sum(buffer.untyped_storage().nbytes() for layer in layers for buffer in layer.buffers)
        position = sum(buffer[:1, :, :1].nbytes for layer in layers for buffer in layer.buffers)
        longest = max(len(row.prompt) + len(row.tokens) for row in self._cached_rows)
        sizes.append((memory / position, len(self._cached_rows), longest))

    monkeypatch.setattr(RunningBatch, "generate", watched)
    random = Random(4)
    requests = [{"messages": messages(t), "max_tokens": random.randint(2, 60), "temperature": 1.0} for t in texts(64)]
    monkeypatch.setattr(running_batch, "_ROOM", 8)
    ask(folder, requests, batch_size=8)
    assert max(rows for _, rows, _ in sizes) == 8
    assert len(sizes) > 40
    longest = max(longest for _, _, longest in sizes)
    assert all(positions <= 8 * -(-longest // 8) * 8 for positions, _, _ in sizes)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0}])
def test_a_batch_that_does_not_fit_into_memory_is_halved_and_its_rows_go_on(folder, monkeypatch, options):
    requests = [{"messages": messages(t), "max_tokens": 10, **options} for t in texts(8)]
    expected = ask(folder, requests, batch_size=8)
    sizes, forward = [], LlamaForCausalLM.forward

    @functools.wraps(forward)  # generate() reads its signature
    def small_memory(self: Any, input_ids: Any, **more: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 3 and (len(sizes) > 4 or input_ids.shape[1] > 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", small_memory)
    assert ask(folder, requests, batch_size=8) == expected
    assert [size for size in sizes if size > 3] == [8, 4]
    sizes.clear()
    assert ask(folder, requests, batch_tokens=400) == expected
    assert sum(size > 3 for size in sizes) <= 3  # batches are smaller from then on
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    late = []

    @functools.wraps(forward)  # generate() reads its signature
    def memory_full_once(self: Any, input_ids: Any, **more: Any) -> Any:
        late.append(len(input_ids))
        if len(late) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", memory_full_once)
    assert ask(folder, requests, batch_size=8) == expected
    assert sum(late) < 10 * 8 + 8 + 4 + 4  # the tokens before are kept


def test_requests_that_no_batch_has_begun_can_be_cancelled(folder):
    async def work():
        model = LocalModel(folder, batch_size=4)
        request = {"messages": messages("what"), "max_tokens": 100, "temperature": 1.0}
        asking = [asyncio.ensure_future(model.complete(request, n)) for n in range(400)]
        await asking[0]
        model.abandon()
        replies = await asyncio.gather(*asking, return_exceptions=True)
        await model.close()
        return replies

    replies = asyncio.run(work())
    answered = [reply for reply in replies if isinstance(reply, str)]
    assert 4 <= len(answered) < 100
    assert all(isinstance(reply, Unreachable) and not reply.billed for reply in replies if not isinstance(reply, str))


def test_the_event_loop_stays_awake_while_the_model_works(folder):
    async def work():
        model = LocalModel(folder)
        await model.check()
        request = {"messages": messages("what"), "max_tokens": 100, "temperature": 1.0}
        asking = [asyncio.ensure_future(model.complete(request, n)) for n in range(16)]
        turns = 0
        while not all(task.done() for task in asking):
            await asyncio.sleep(0.001)
            turns += 1
        await model.close()
        return turns

    assert asyncio.run(work()) >= 10  # one or two, if the model ran in the loop's thread


def test_a_failing_batch_fails_its_rows_and_the_next_one_runs(folder, monkeypatch):
    really, failed = RunningBatch.join, []

    def fail_once(self, rows, on_end):
        if not failed:
            failed.append(1)
            raise RuntimeError("out of memory")
        really(self, rows, on_end)

    monkeypatch.setattr(RunningBatch, "join", fail_once)
    request = {"messages": messages("what"), "max_tokens": 4, "temperature": 1.0}
    replies = ask(folder, [request] * 8, samples=list(range(8)), batch_size=4)
    wrong = [reply for reply in replies if isinstance(reply, RequestFailed)]
    assert [(w.reason, w.detail) for w in wrong] == [("generation_failed", "RuntimeError: out of memory")] * 4
    assert len(replies) - len(wrong) == 4


def test_closing_lets_a_batch_end(folder):
    async def work():
        model = LocalModel(folder)
        asking = asyncio.ensure_future(model.complete({"messages": messages("what"), "max_tokens": 30}))
        await asyncio.sleep(0.05)
        await model.close()
        return asking.done()

    assert asyncio.run(work())


def test_an_option_that_is_not_understood_is_refused(folder):
    (error,) = ask(folder, [{"messages": messages("what"), "presence_penalty": 1}])
    assert isinstance(error, UserError)
    assert "does not understand the option 'presence_penalty'" in str(error)


# ---- identity


def test_the_identity_is_that_of_weights_configs_tokenizer_and_template(folder, tmp_path):
    identity = weights_identity(folder)
    assert weights_identity(shutil.copytree(folder, tmp_path / "copy")) == identity
    (tmp_path / "copy" / "README.md").write_text("hello")
    (tmp_path / "copy" / "optimizer.bin").write_text("x")
    assert weights_identity(tmp_path / "copy") == identity
    assert weights_identity(tiny_model.save(tmp_path / "other", seed=1)) != identity
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    ):
        changed = shutil.copytree(folder, tmp_path / f"changed-{name}")
        with open(changed / name, "ab") as file:
            file.write(b" ")
        assert weights_identity(changed) != identity, name


# ---- adapters


def save_adapter(base: Path, out: Path, seed: int = 0) -> Path:
    """A LoRA adapter that changes what its base says."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(out)
    return out


def test_an_adapter_answers_as_its_merged_model_does(folder, tmp_path):
    from peft import AutoPeftModelForCausalLM

    adapter = save_adapter(folder, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        merged = AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny_model.make_tokenizer().save_pretrained(tmp_path / "merged")
    requests = [{"messages": messages(t), "max_tokens": 12, "temperature": 0} for t in texts(12)]
    replies = ask(adapter, requests)
    assert replies != ask(folder, requests)
    assert [r.text for r in replies] == [r.text for r in ask(tmp_path / "merged", requests)]


@pytest.mark.parametrize(("dtype", "is_merged"), [("float32", True), ("bfloat16", False)])
def test_a_lora_is_merged_into_float32_weights_and_not_into_narrower_ones(folder, tmp_path, dtype, is_merged):
    model = LocalModel(save_adapter(folder, tmp_path / "adapter"), dtype=dtype)
    _, network = model._load()
    assert any("lora_" in name for name, _ in network.named_parameters()) is not is_merged


def test_the_identity_of_an_adapter_is_its_own_and_its_bases(folder, tmp_path):
    base = Path(shutil.copytree(folder, tmp_path / "base"))
    adapter = save_adapter(base, tmp_path / "adapter")
    identity = weights_identity(adapter)
    assert identity != weights_identity(base)
    assert weights_identity(save_adapter(base, tmp_path / "other", seed=1)) != identity
    tiny_model.save(base, seed=1)
    assert weights_identity(adapter) != identity


def test_an_adapter_without_weights_or_base_is_refused_before_any_request(folder, tmp_path):
    adapter = save_adapter(folder, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for changes, match in [
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": str(tmp_path / "gone")}, "does not exist"),
    ]:
        (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=match):
            LocalModel(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        LocalModel(adapter)


# ---- a build


def test_a_build_with_a_local_target_is_repeatable_and_runs_the_model_once(tmp_path, folder, server, monkeypatch):
    write_prompts(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts(30)])
    target = {"path": str(folder), "temperature": 1.0, "max_tokens": 100, "batch_size": 7}
    filters = {"identical": False}
    build(config_for(tmp_path, server.url, target=target, filters=filters))
    first = pairs(tmp_path / "out")
    assert len(first) + len(drops(tmp_path / "out")) == 30
    assert {row["reason"] for row in drops(tmp_path / "out")} <= {"truncated", "empty_reply"}
    assert manifest(tmp_path / "out")["models"]["target"]["identity"] == weights_identity(folder)
    assert manifest(tmp_path / "out")["sampling"]["target"] == {"temperature": 1.0, "max_tokens": 100, "seed": 0}

    changed = config_for(
        tmp_path, server.url, target=target | {"batch_size": 3}, filters=filters, out=str(tmp_path / "again")
    )
    build(changed)
    assert pairs(tmp_path / "again") == first

    def never(*_):
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(LocalModel, "_load", never)
    build(config_for(tmp_path, server.url, target=target, filters=filters))
    assert pairs(tmp_path / "out") == first


def test_other_weights_in_the_same_folder_are_asked_anew(tmp_path, server):
    model = tiny_model.save(tmp_path / "model")
    write_prompts(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts(8)])
    target = {"path": str(model), "temperature": 1.0, "max_tokens": 100}
    config = config_for(tmp_path, server.url, target=target, filters={"identical": False})
    build(config)
    tiny_model.save(model, seed=1)
    assert build(config).manifest["tokens"]["target"]["reused"] == 0


# ---- the model of the embedded world


def test_the_worlds_own_model_answers_its_tasks_and_stops(tmp_path):
    folder = ROOT / "recipes" / "world" / "model"
    if not list(folder.glob("*.safetensors")):
        pytest.skip("recipes/world/model is not there yet; recipes/world/make_model.py makes it")
    from recipes.world.tasks import answer_value, distinct_tasks

    tasks = distinct_tasks("train", 60, 5)
    replies = ask(folder, [{"messages": messages(t.prompt), "max_tokens": 64, "temperature": 0} for t in tasks])
    assert all(reply.finish_reason == "stop" for reply in replies)
    answered = sum(answer_value(t.skill, r.text) is not None for t, r in zip(tasks, replies, strict=True))
    assert answered >= 55
    sampled = [{"messages": messages(t.prompt), "max_tokens": 64, "temperature": 1.0, "seed": 0} for t in tasks]
    assert ask(folder, sampled, batch_size=64) == ask(folder, sampled, batch_size=9)


def test_generation_reports_its_progress_and_can_be_cancelled(folder):
    async def abandon():
        model = LocalModel(folder)
        request = asyncio.ensure_future(model.complete({"messages": messages("red"), "max_tokens": 1000}))
        while "token" not in model.activity:  # noqa: ASYNC110 (set by the model's thread)
            await asyncio.sleep(0.001)
        progress = model.activity
        model.halt()
        with pytest.raises(RequestFailed, match="given up"):
            await request
        await model.close()
        return progress

    assert re.fullmatch(r"a batch of 1 is at token \d+ of at most \d+", asyncio.run(abandon()))


def test_a_local_model_answers_without_advice_from_transformers(folder):
    code = (
        "import asyncio, sys; from clair.inference.local import LocalModel\n"
        "async def main():\n"
        "    model = LocalModel(sys.argv[1])\n"
        "    await model.complete({'messages': [{'role': 'user', 'content': 'red'}], 'max_tokens': 3})\n"
        "    await model.close()\n"
        "asyncio.run(main())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stderr == ""
