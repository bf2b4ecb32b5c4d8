"""Shared prefixes against the plain reference: same log-probs, same gradients, no token sees what it must not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Lfm2Config
from transformers.models.qwen3_5 import Qwen3_5TextConfig

from apo.packing import head
from apo.packing.batch import unstack
from apo.packing.layout import crop_around_divergence, pack_bins, pack_pairs, packed_length
from apo.packing.logps import plain_logps
from apo.packing.packed_model import enable_packing, enable_packing_if_exact, packed_logps
from tests.apo.packing.packing_models import (
    FAMILIES,
    SHAPES,
    VOCABULARY,
    batch_of,
    gradients,
    packed,
    pairs,
    stacked,
    tiny,
)


def assert_packed_is_plain(model, examples):
    """Log-probs, lengths and gradients of packed rows are those of the padded batch."""
    plain = plain_logps(model, stacked(examples))
    expected = gradients(model, plain)
    enable_packing(model)
    actual = packed(model, examples)
    for ours, theirs in zip(actual[:4], plain[:4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=3e-5)
    assert (gradients(model, actual) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_the_plain_log_probs_and_gradients(family):
    assert_packed_is_plain(tiny(family), pairs(*SHAPES))


@pytest.mark.parametrize("family", ["llama", "mistral, sliding window", "gemma2, soft caps and window"])
def test_unpaired_rows_among_pairs_give_the_plain_log_probs_and_gradients(family):
    examples = pairs(*SHAPES)
    for index, side in ((0, "rejected_ids"), (1, "chosen_ids"), (3, "chosen_ids"), (4, "rejected_ids")):
        examples[index][side] = []
    model = tiny(family)
    plain = plain_logps(model, stacked(examples))
    assert (plain.rejected[0], plain.chosen[1]) == (0, 0)
    assert_packed_is_plain(model, examples)
    assert pack_pairs(examples).input_ids.shape[1] == sum(packed_length(example) for example in examples)


def with_turns(examples, seed=7):
    """Responses of which some tokens are not trained: of one, of both, and also where they are still the same."""
    generator = torch.Generator().manual_seed(seed)
    for number, example in enumerate(examples):
        shared = torch.randint(0, 2, (8,), generator=generator).tolist()
        for side in ("chosen", "rejected")[: 1 + number % 2]:
            length = len(example[f"{side}_ids"])
            mask = [*shared, *torch.randint(0, 2, (length,), generator=generator).tolist()]
            example[f"{side}_mask"] = [1, *mask[1 : length - 1], 1][:length]
    return examples


@pytest.mark.parametrize("family", ["llama", "mistral, sliding window", "gemma2, soft caps and window"])
@pytest.mark.parametrize("unpaired", [False, True])
def test_turns_that_are_not_trained_are_left_out_of_packed_rows_as_of_the_plain_batch(family, unpaired):
    examples = with_turns(pairs(*SHAPES))
    for index, side in ((0, "rejected"), (1, "chosen")) if unpaired else ():
        examples[index][f"{side}_ids"] = examples[index][f"{side}_mask"] = []
    batch, whole = stacked(examples), [{k: v for k, v in e.items() if "mask" not in k} for e in examples]
    assert batch["completion_mask"].sum() < stacked(whole)["completion_mask"].sum()
    assert_packed_is_plain(tiny(family), examples)
    assert pack_pairs(examples).input_ids.shape[1] == sum(packed_length(example) for example in examples)
    assert len(pack_pairs(examples).labels) <= batch["completion_mask"].sum()


def test_a_token_that_only_one_response_trains_is_not_shared():
    example = {
        "prompt_ids": [1, 2],
        "chosen_ids": [5, 6, 7, 3],
        "rejected_ids": [5, 6, 8, 3],
        "chosen_mask": [1, 0, 1, 1],
    }
    layout = pack_pairs([example])
    assert layout.input_ids.tolist() == [[1, 2, 5, 6, 7, 3, 6, 8, 3]]
    assert layout.labels.tolist() == [5, 7, 3, 6, 8, 3]
    assert layout.lengths.tolist() == [[3, 4]]


def test_a_pair_with_turns_is_cut_together_with_its_masks():
    long = with_turns(pairs((300, 184, 200, 30)))[0]
    cut = crop_around_divergence(long)
    for side in ("chosen", "rejected"):
        assert len(cut.get(f"{side}_mask", cut[f"{side}_ids"])) == len(cut[f"{side}_ids"])
    assert unstack(stacked([cut])) == [cut]


@pytest.mark.parametrize("family", ["llama", "gemma2, soft caps and window"])
def test_a_model_that_shares_prefixes_answers_all_other_input_as_before(family):
    model, batch = tiny(family), stacked(pairs(*SHAPES))
    plain = plain_logps(model, batch)
    enable_packing(model)
    shared = plain_logps(model, batch)
    torch.testing.assert_close(torch.stack(shared[:2]), torch.stack(plain[:2]), rtol=0, atol=2e-5)


def test_a_saved_model_does_not_know_that_it_shared_prefixes(tmp_path):
    model = tiny()
    enable_packing(model)
    model.save_pretrained(tmp_path)
    assert "shared_prefix" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("limit", [0, 10**9], ids=["logits made anew", "logits kept"])
def test_in_mixed_precision_the_head_has_the_gradients_of_a_plain_one(monkeypatch, limit):
    # Products of backward too are in bfloat16, which a GPU does some 15 times as fast, by its maker's figures.
    monkeypatch.setattr(head, "_STORED_BYTES", limit)
    monkeypatch.setattr(head, "HEAD_CHUNK", 64)
    generator = torch.Generator().manual_seed(0)
    model, hidden = tiny(), torch.randn(40, 32, generator=generator)
    labels, weights = torch.randint(VOCABULARY, (40,), generator=generator), torch.randn(40, generator=generator)

    def plain(_, hidden, labels):
        return model.lm_head(hidden).float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)

    results = []
    for logps in (head.head_logps, plain):
        inputs = hidden.clone().requires_grad_()
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = logps(model, inputs, labels)
        (out * weights).sum().backward()
        results.append((out.detach(), inputs.grad, model.lm_head.weight.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_gradient_checkpointing_changes_no_gradient():
    model, examples = tiny(), pairs(*SHAPES)
    enable_packing(model)
    expected = gradients(model, packed(model, examples))
    model.activation_checkpointing_enable()
    model.train()
    actual = gradients(model, packed(model, examples))
    assert (actual - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("changed", ["chosen_ids", "rejected_ids"])
def test_no_token_of_one_response_changes_the_other_or_another_pair(changed):
    model, examples = tiny(), pairs(*SHAPES)
    enable_packing(model)
    original = packed_logps(model, pack_pairs(examples))
    # The last token may change without changing what is shared.
    examples[1][changed] = [*examples[1][changed][:-1], examples[1][changed][-1] % 90 + 5]
    again = packed_logps(model, pack_pairs(examples))
    for name in ("chosen", "rejected"):
        same = torch.isclose(getattr(original, name), getattr(again, name), rtol=0, atol=1e-6)
        assert same.tolist() == [not (pair == 1 and changed.startswith(name)) for pair in range(len(examples))]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_of_one_response_comes_from_a_token_of_the_other_or_of_another_pair(family):
    model, layout = tiny(family), pack_pairs(pairs(*SHAPES))
    enable_packing(model)
    embedded = []
    model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[2]) or call[2].retain_grad())
    logps = packed_logps(model, layout)
    for pair, span in enumerate(layout.spans):
        start, middle, end, last = span.bounds
        for name, positions in (
            ("chosen", range(start, end)),
            ("rejected", [*range(start, middle), *range(end, last)]),
        ):
            embedded[0].grad = None
            getattr(logps, name)[pair].backward(retain_graph=True)
            reached = embedded[0].grad[0].abs().sum(-1).nonzero().flatten().tolist()
            assert reached  # the response's own tokens: all but its last, and those that no window has left behind
            assert set(reached) <= set(positions)
            assert positions[-1] not in reached  # which is predicted and predicts nothing


def test_any_order_of_pairs_gives_each_pair_its_own_log_probs():
    model, examples = tiny(), pairs(*SHAPES)
    enable_packing(model)
    forward, back = (packed_logps(model, pack_pairs(order)) for order in (examples, examples[::-1]))
    torch.testing.assert_close(forward.chosen, back.chosen.flip(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(forward.rejected, back.rejected.flip(0), rtol=1e-5, atol=1e-5)


def test_a_layout_by_hand():
    layout = pack_pairs([{"prompt_ids": [11, 12], "chosen_ids": [13, 14, 2], "rejected_ids": [13, 15, 16, 2]}])
    assert layout.input_ids.tolist() == [[11, 12, 13, 14, 2, 15, 16, 2]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert layout.predictors.tolist() == [1, 2, 3, 2, 5, 6]
    assert layout.labels.tolist() == [13, 14, 2, 15, 16, 2]
    assert layout.owner.tolist() == [0, 1, 1, 2, 2, 2]
    assert layout.lengths.tolist() == [[3, 4]]


def test_an_empty_prompt_and_no_response_are_refused():
    for empty in (["prompt_ids"], ["chosen_ids", "rejected_ids"]):
        with pytest.raises(ValueError, match="empty prompt or no response"):
            pack_pairs([{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7], **{key: [] for key in empty}}])


def test_a_model_that_keeps_its_options_from_its_attention_is_noticed():
    model = tiny()
    enable_packing(model)
    for layer in model.model.layers:
        inner = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, _inner=inner, shared_prefix=None, **k: _inner(*a, **k)
    with pytest.raises(RuntimeError, match="does not hand its options on"):
        packed_logps(model, pack_pairs(pairs(*SHAPES)))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(20, 100))
@settings(deadline=None)
def test_bins_hold_every_row_once_and_no_more_than_allowed(sizes, max_tokens):
    bins = pack_bins(sizes, max_tokens)
    assert sorted(index for members in bins for index in members) == list(range(len(sizes)))
    assert all(sum(sizes[p] for p in members) <= max_tokens or len(members) == 1 for members in bins)


def test_tokens_of_counts_a_packed_row():
    for example in pairs(*SHAPES):
        assert packed_length(example) == pack_pairs([example]).input_ids.shape[1]


def test_a_long_pair_is_cropped_around_the_divergence_of_its_answers():
    (long,) = pairs((300, 200, 150, 40))
    cut = crop_around_divergence(long, context=64)
    assert cut["prompt_ids"] == [*long["prompt_ids"], *long["chosen_ids"]][300 + 184 - 64 : 300 + 184]
    assert cut["chosen_ids"] == long["chosen_ids"][184:248]
    assert cut["rejected_ids"] == long["rejected_ids"][184:]
    (short,) = pairs((7, 3, 9, 14))
    assert crop_around_divergence(short, context=32) == short


@pytest.mark.parametrize("kinds", [["conv", "full_attention"], ["linear_attention", "full_attention"]])
def test_layers_that_carry_tokens_from_pair_to_pair_are_not_packed_whatever_the_check_of_two_pairs_says(kinds):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": kinds, "pad_token_id": 0}
    heads = {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    heads |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    config = Lfm2Config(**sizes) if "conv" in kinds else Qwen3_5TextConfig(**sizes, **heads)
    torch.manual_seed(1)
    model, batch = AutoModelForCausalLM.from_config(config), batch_of(pairs(*SHAPES))
    loosely = torch.bfloat16  # in whose rounding the leak is hidden
    reason, notes = enable_packing_if_exact([model], batch, batch, loosely, torch.device("cpu"))
    assert reason == f"its layers of the kind {kinds[0]} carry one pair's tokens into the next pair of the row"
    assert notes == []
