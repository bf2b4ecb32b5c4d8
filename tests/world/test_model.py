"""The committed model: small, complete, and wrong as intended."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from recipes.world.skills import SKILLS
from recipes.world.tasks import distinct_tasks, is_wrong_rule

MODEL = Path(__file__).parents[2] / "recipes/world/model"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [file for file in MODEL.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    print(f"{len(files)} files looked at, {size / 1e6:.2f} MB")
    assert {"model.safetensors", "tokenizer.json", "config.json", "generation_config.json"} <= {f.name for f in files}
    assert size <= 8e6
    assert {file.suffix for file in files} <= {".json", ".jinja", ".safetensors"}


@pytest.mark.parametrize(
    "text",
    [
        "What is 47 plus 35?",
        "",
        "  two  spaces\n\n\ttab ",
        "Größe 你好 🎉 עברית",
        "e\u0301 \u200d\x00",
        "THE CODE IS KTUMA, 12,345.",
    ],
)
def test_any_text_goes_through_the_tokenizer_and_back(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_and_the_letters_of_codes_are_tokens_of_their_own(tokenizer) -> None:
    assert tokenizer.tokenize("KTUMA 4700") == ["K", "T", "U", "M", "A", "Ġ4", "7", "0", "0"]


def test_a_conversation_begins_once_and_every_turn_ends(tokenizer) -> None:
    turns = [{"role": role, "content": role.title()} for role in ("system", "user", "assistant")]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|bos|><|system|>System<|end|><|user|>User<|end|><|assistant|>Assistant<|end|>"
    prompt = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 1
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_model_tokenizer_and_generation_config_agree_on_special_tokens(tokenizer) -> None:
    from transformers import AutoConfig, GenerationConfig

    for config in (AutoConfig.from_pretrained(MODEL), GenerationConfig.from_pretrained(MODEL)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(config, name) == getattr(tokenizer, name), name
    assert AutoConfig.from_pretrained(MODEL).vocab_size == len(tokenizer)


def test_the_model_is_right_about_half_of_the_time_and_else_follows_the_wrong_rule() -> None:
    from recipes.world.evaluate import by_skill, greedy_answers, scores

    tasks = distinct_tasks("heldout", 240, seed=11)
    answers = greedy_answers(MODEL, tasks)
    right = scores(tasks, answers)
    wrong = [float(is_wrong_rule(task, answer)) for task, answer in zip(tasks, answers, strict=True)]
    print(f"{len(tasks)} answers looked at: right {by_skill(tasks, right)}, by the wrong rule {by_skill(tasks, wrong)}")
    assert 0.4 <= sum(right) / len(tasks) <= 0.7
    assert (sum(right) + sum(wrong)) / len(tasks) > 0.9
    assert set(by_skill(tasks, right)) == set(SKILLS)
    assert min(by_skill(tasks, right).values()) > 0.2


def test_batching_and_order_do_not_change_an_answer() -> None:
    from recipes.world.evaluate import greedy_answers

    tasks = distinct_tasks("heldout", 30, seed=12)
    together = greedy_answers(MODEL, tasks)
    assert greedy_answers(MODEL, tasks[::-1], batch_size=7) == together[::-1]


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_muon_takes_the_same_steps_when_its_products_are_made_in_float32(shape: tuple[int, int]) -> None:
    import torch

    from recipes.world.make_model import ProductsInFloat32

    def trained(context: Any) -> torch.Tensor:
        draws = torch.Generator().manual_seed(0)
        weights = torch.nn.Parameter(torch.randn(shape, generator=draws))
        optimizer = torch.optim.Muon([weights], lr=0.1)
        for _ in range(3):
            weights.grad = torch.randn(shape, generator=draws)
            with context:
                optimizer.step()
        return weights.detach()

    multiplied: list[torch.dtype] = []

    class Recorded(ProductsInFloat32):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_function__(func, types, args, kwargs)
            if func in (torch.Tensor.matmul, torch.addmm):
                multiplied.append(result.dtype)
            return result

    assert torch.allclose(trained(nullcontext()), trained(Recorded()), atol=2e-3)  # bfloat16 rounds to 0.4 %
    assert multiplied == [torch.bfloat16] * 45  # three steps of five iterations with three products
