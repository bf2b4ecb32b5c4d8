"""Active queries: ask a new user the most informative comparisons, and store the answers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from apo.data.message_texts import answer_text
from apo.rewards.reward_dir import Reward, read_answers, save_user
from apo.rewards.scorer import Comparisons
from apo.rewards.vpl import VPL, next_question
from clair.core.errors import UserError
from clair.core.files import content_hash

if TYPE_CHECKING:
    from torch import Tensor

    from apo.analysis.features import EncodedPairs


def ask_user(reward: Reward, user: str, pairs: EncodedPairs, pool: Comparisons, questions: int) -> Tensor:
    """Ask on the terminal until the user has given `questions` answers; return and save the user's state.

    Earlier answers count. Of pairs with the same id the first is asked. Raises UserError if the reward cannot choose
    questions, or if the input ends.
    """
    from apo.console import print_line
    from clair.data.records import task_text

    scorer = reward.scorer
    if not isinstance(scorer, VPL):
        raise UserError(
            f"a {scorer.kind} reward cannot choose questions; fit a reward of kind vpl, or give comparisons"
        )
    assert reward.folder is not None
    first = {row["id"]: index for index, row in reversed([*enumerate(pairs.rows)])}  # an id is one question
    pairs, pool = pairs.select([*first.values()]), pool.select([*first.values()])
    indices = {row["id"]: index for index, row in enumerate(pairs.rows)}
    answers = read_answers(reward.folder, user)
    if unknown := [answer["id"] for answer in answers if answer["id"] not in indices]:
        raise UserError(f"{user!r} has answered {unknown[0]!r}, which is not in this pool; give the same pool")
    if questions > len(pool):
        raise UserError(
            f"{questions} questions but {len(pool)} pairs of different ids in the pool; lower questions, or give more"
        )
    while len(answers) < questions:
        answered = answered_comparisons(pool, answers, indices)
        excluded = {indices[answer["id"]] for answer in answers}
        index, gain = next_question(scorer, pool, answered, excluded=excluded, seed=len(answers))
        row = pairs.rows[index]
        sides = ["chosen", "rejected"]
        if int(content_hash([user, row["id"]])[0], 16) % 2:  # the position must not reveal which answer is chosen
            sides.reverse()
        prompt = row["prompt"]
        task = prompt if isinstance(prompt, str) else task_text(prompt, row.get("tools") or ())
        print_line(f"\nQuestion {len(answers) + 1} of {questions} ({gain:.2f} nats)\n{task}")
        for number, side in enumerate(sides, 1):
            print_line(f"\n[{number}] {answer_text(row[side])}")
        answers.append({"id": row["id"], "chosen": sides[_answer() - 1] == "chosen"})
        save_user(reward, user, None, answers)
    state = scorer.adapt(answered_comparisons(pool, answers, indices))
    save_user(reward, user, state, answers)
    return state


def answered_comparisons(pool: Comparisons, answers: list[dict[str, Any]], indices: dict[str, int]) -> Comparisons:
    """Return the answered comparisons of the pool, with chosen and rejected as the user prefers."""
    answered = pool.select([indices[str(answer["id"])] for answer in answers])
    agrees = torch.tensor([bool(answer["chosen"]) for answer in answers], dtype=torch.bool)[:, None]
    chosen, rejected = answered.chosen, answered.rejected
    return replace(answered, chosen=chosen.where(agrees, rejected), rejected=rejected.where(agrees, chosen))


def _answer() -> int:
    while True:
        try:
            reply = input("Which do you prefer, 1 or 2? ").strip()
        except EOFError:
            raise UserError(
                "the input ended; every answer so far is stored, run the same command to continue"
            ) from None
        if reply in ("1", "2"):
            return int(reply)
