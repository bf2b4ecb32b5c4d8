"""Score answers for `clair build`: the checker of a recipe, with a fitted reward.

A line `{"id": ..., "prompt": [messages], "answers": [texts]}` is answered by `{"id": ..., "scores": [numbers]}`: win
rates against the reward's reference answers, in [0, 1]. An answer that is too long for the model has the score null.
For answers that call tools a line also has `tool_calls`, one list for each answer, and `tools`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from apo.analysis.features import NAMES, encode
from apo.data.tokenize import encode as encode_row
from apo.data.tokenize import eos_ids
from apo.models import load as models
from apo.models import tensor_cache
from apo.rewards.reward_dir import Reward
from apo.rewards.scorer import win_rate
from clair.core.errors import UserError, one_line
from clair.core.files import content_hash

_FORM = '{"id": ..., "prompt": [messages], "answers": [texts]}'


class AnswerScorer:
    """A reward and the frozen model whose features it reads, loaded once."""

    def __init__(self, reward: Reward, user: str | None = None) -> None:
        """`user` is a user or a group; None: the mean of all users. Raises UserError if the model is another one."""
        self._reward = reward
        self._state = reward.scorer.mean_state() if user is None else reward.user_state(user)
        if reward.facts["model"] is None:
            raise UserError(
                "this reward was fitted on features of a file, so nothing here computes those of new answers"
            )
        if reward.pooling == "cumulative":
            raise UserError("cumulative features are those of a pair, not of one answer; fit with pooling last or mean")
        name = models.find_model(reward.facts["model"])
        self._tokenizer = models.load_tokenizer(name)
        self._eos = eos_ids(self._tokenizer, models.load_generation_config(name))
        self._context = models.context_length(name)
        self._model = models.load_model(name)
        self._model.requires_grad_(False).eval()
        weights = tensor_cache.hash_model(self._model, adapter=True)
        attention = getattr(self._model.config, "_attn_implementation", None)
        identity = content_hash([weights, str(self._model.dtype), attention])
        identity = identity if reward.pooling == "last" else content_hash([identity, reward.pooling])
        if identity != reward.facts["features"]:
            raise UserError(
                f"model {reward.facts['model']} is not the one that this reward was fitted on; give it its old place"
            )

    def scores(
        self,
        prompt: Sequence[Mapping[str, Any]],
        answers: Sequence[str],
        tools: Sequence[Mapping[str, Any]] = (),
        tool_calls: Sequence[Sequence[Mapping[str, Any]]] = (),
    ) -> list[float | None]:
        """The win rate of each answer, with its `tool_calls` if there are any; None if it is too long.

        Raises UserError for a prompt or an answer that cannot be rendered.
        """
        scores: list[float | None] = [None] * len(answers)
        pairs: dict[int, dict[str, Any]] = {}
        for index, text in enumerate(answers):
            calls = {"tool_calls": list(tool_calls[index])} if tool_calls and tool_calls[index] else {}
            answer = {"completion": [{"role": "assistant", "content": text, **calls}], "label": True}
            row = {"prompt": list(prompt), **answer, **({"tools": list(tools)} if tools else {})}
            ids = encode_row(row, self._tokenizer, sorted(self._eos), self._context)
            if ids["_verdict"] not in ("", "too_long"):
                raise UserError(ids["_verdict"])
            if not ids["_verdict"]:
                pairs[index] = {**ids, "rejected_ids": ids["chosen_ids"]}  # features are those of pairs
        if not pairs:
            return scores
        vectors = dict(zip(NAMES, encode(self._model, [*pairs.values()]), strict=True))
        prompts, features = vectors["prompt"], vectors["chosen_mean" if self._reward.pooling == "mean" else "chosen"]
        states = self._state.expand(len(features), -1)
        rates = win_rate(self._reward.scorer, prompts, features, states, self._reward.references)
        for index, rate in zip(pairs, rates.tolist(), strict=True):
            scores[index] = rate
        return scores


def score_lines(scorer: AnswerScorer, lines: Iterable[str]) -> Iterator[str]:
    """The line for each line that is not blank. Raises UserError for a malformed one, and for a row without scores."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            id, prompt, answers = row["id"], row["prompt"], row["answers"]
            calls = row.get("tools") or (), row.get("tool_calls") or ()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"line {number} cannot be read ({one_line(error)}); needed: {_FORM}") from error
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise UserError(f"line {number}: answers is {answers!r}; needed: {_FORM}")
        try:
            yield json.dumps({"id": id, "scores": scorer.scores(prompt, answers, *calls)})
        except UserError as error:
            raise UserError(f"line {number}, id {id!r}: {error}") from error
