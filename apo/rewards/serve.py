"""Score answers for `clair build`: the checker of a recipe, with a fitted reward.

A line `{"id": ..., "prompt": [messages], "answers": [texts]}` is answered by `{"id": ..., "scores": [numbers]}`: win
rates against the reward's reference answers, in [0, 1]. An answer that is too long for the model has the score null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from apo.analysis.features import NAMES, encode
from apo.data.tokenize import eos_ids, tokenize
from apo.models import load as models
from apo.models import tensor_cache
from apo.rewards.reward_dir import Reward
from apo.rewards.scorer import win_rate
from clair.core.errors import UserError
from clair.core.files import content_hash


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

    def scores(self, prompt: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[float | None]:
        """The win rate of each answer; None if it is too long."""
        from datasets import Dataset

        rows = []
        for index, text in enumerate(answers):
            other = "-" if text != "-" else "+"  # the features of a pair are computed, and this side is not read
            turns = {side: [{"role": "assistant", "content": t}] for side, t in (("chosen", text), ("rejected", other))}
            rows.append({"prompt": list(prompt), **turns, "id": str(index), "_index": index})
        scores: list[float | None] = [None] * len(answers)
        try:
            tokenized = tokenize(Dataset.from_list(rows), self._tokenizer, self._context, self._eos, "given").dataset
        except UserError:  # no answer fits the context
            return scores
        vectors = dict(zip(NAMES, encode(self._model, [dict(row) for row in tokenized]), strict=True))
        prompts, features = vectors["prompt"], vectors["chosen_mean" if self._reward.pooling == "mean" else "chosen"]
        states = self._state.expand(len(features), -1)
        rates = win_rate(self._reward.scorer, prompts, features, states, self._reward.references)
        for index, rate in zip(tokenized["_index"], rates.tolist(), strict=True):
            scores[index] = rate
        return scores


def score_lines(scorer: AnswerScorer, lines: Iterable[str]) -> Iterator[str]:
    """The line for each line."""
    for line in lines:
        row = json.loads(line)
        yield json.dumps({"id": row["id"], "scores": scorer.scores(row["prompt"], row["answers"])})
