"""Getting to know a new user by asking: the comparison whose answer says most, again and again. Answers are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from apo.rewards.reward_dir import Reward, read_answers, save_user
from apo.rewards.scorer import Comparisons
from apo.rewards.vpl import VPL, next_question
from clair.core.errors import UserError
from clair.core.files import content_hash

if TYPE_CHECKING:
    from torch import Tensor

    from apo.analysis.features import Labelled


def ask(reward: Reward, user: str, found: Labelled, pool: Comparisons, questions: int) -> Tensor:
    """Ask on the terminal until `questions` answers of the user are there; returns and keeps the state.

    Answers given before count. Raises UserError where the reward cannot choose questions, or the input ends.
    """
    from apo.console import tell
    from clair.data.records import task_text

    scorer = reward.scorer
    if not isinstance(scorer, VPL):
        raise UserError(f"a {scorer.kind} reward cannot choose questions; fit one of kind vpl, or give --comparisons")
    assert reward.folder is not None
    places = {row["id"]: place for place, row in enumerate(found.rows)}
    answers = read_answers(reward.folder, user)
    if strange := [answer["id"] for answer in answers if answer["id"] not in places]:
        raise UserError(f"{user!r} has answered {strange[0]!r}, which is not in this pool; give the same --pool")
    if len(answers) + (questions - len(answers)) > len(pool):
        raise UserError(f"{questions} questions but {len(pool)} pairs in the pool; ask fewer, or give more")
    while len(answers) < questions:
        given = answered(pool, answers, places)
        place, gain = next_question(scorer, pool, given, asked={places[a["id"]] for a in answers}, seed=len(answers))
        row = found.rows[place]
        sides = ["chosen", "rejected"]
        if int(content_hash([user, row["id"]])[0], 16) % 2:  # where it stands must not tell which is which
            sides.reverse()
        tell(f"\nQuestion {len(answers) + 1} of {questions} ({gain:.2f} nats)\n{task_text(row['prompt'])}")
        for number, side in enumerate(sides, 1):
            tell(f"\n[{number}] {row[side][-1]['content']}")
        answers.append({"id": row["id"], "chosen": sides[_answer() - 1] == "chosen"})
        save_user(reward, user, None, answers)
    state = scorer.adapt(answered(pool, answers, places))
    save_user(reward, user, state, answers)
    return state


def answered(pool: Comparisons, answers: list[dict[str, object]], places: dict[str, int]) -> Comparisons:
    """The comparisons of the pool that were answered, turned to what was preferred."""
    some = pool.select([places[str(answer["id"])] for answer in answers])
    keep = torch.tensor([bool(answer["chosen"]) for answer in answers], dtype=torch.bool)[:, None]
    chosen, rejected = some.chosen.where(keep, some.rejected), some.rejected.where(keep, some.chosen)
    return replace(some, chosen=chosen, rejected=rejected)


def _answer() -> int:
    while True:
        try:
            said = input("Which do you prefer, 1 or 2? ").strip()
        except EOFError:
            raise UserError("the input ended; every answer so far is kept, and the same command goes on") from None
        if said in ("1", "2"):
            return int(said)
