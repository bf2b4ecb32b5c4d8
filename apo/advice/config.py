"""What `apo advise` is asked, the pairs it looks at, and what is checked before any model is loaded or asked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from apo.advice.rule import COARSE, FINE, sample_size
from apo.evaluation.config import Evaluation, check_folder
from clair.core.errors import UserError, one_line
from clair.core.files import content_hash
from clair.data.records import Prompt
from clair.inference.config import JudgeConfig, ModelConfig
from clair.inference.open import check_models
from clair.prompting.templates import JUDGE_NEEDS, load_template
from clair.storage.object_store import local_copy

RESULT = "advice.json"
_MARKS = re.compile(
    r"<\|im_(?:start|end)\|>|<\|(?:start_header_id|end_header_id|eot_id|endoftext|user|assistant|system|end)\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|^#{2,3} ?(?:Instruction|Response|Human|Assistant)\b"
    r"|^(?:Human|Assistant|USER|ASSISTANT):",
    re.MULTILINE,
)
"""What other chat templates write around turns."""


class AdviseConfig(Evaluation):
    """Pairs, the model that is to be trained on them, and a judge where there is one."""

    dataset: str
    model: ModelConfig
    judge: JudgeConfig | None = None
    difference: float = Field(FINE, gt=0, lt=0.5)
    """The difference from one half that the sample is large enough to see."""
    seed: int = 0

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models that are asked, by role."""
        return {"model": self.model, **({"judge": self.judge} if self.judge else {})}


@dataclass(frozen=True, slots=True)
class Checked:
    """The sample: `rows` of different prompts, of `pairs` in all; what the dataset says of who made them."""

    rows: Sequence[Mapping[str, Any]]
    pairs: int
    prompts: int
    winners_own: float | None
    losers_own: float | None
    strange: Mapping[str, int]
    """How many prompts of the sample are not in the model's template, by what is wrong."""
    template: str

    def prompt(self, row: Mapping[str, Any]) -> Prompt:
        """The row's prompt, to be answered or judged."""
        return Prompt(row["id"], tuple(row["prompt"]))


def check(config: AdviseConfig) -> Checked:
    """Everything that can be wrong before any work. Raises UserError; spends nothing, writes nothing."""
    from apo.analysis.features import read_rows
    from apo.models import load as models

    check_folder(Path(config.out), RESULT)
    template = load_template(config.judge.template if config.judge else None, "judge.j2", JUDGE_NEEDS)
    check_models(config.models, config.budget, config.seed)
    assert config.model.path is not None
    tokenizer = models.load_tokenizer(models.find_model(config.model.path, config.model.trust_remote_code))
    rows = [row for row in read_rows([config.dataset]) if row["chosen"] != row["rejected"]]
    different = {content_hash(row["prompt"]): row for row in reversed(rows)}
    if len(different) < sample_size(COARSE):
        raise UserError(
            f"{config.dataset} has pairs of {len(different)} different prompts, too few to say anything: "
            f"{sample_size(COARSE)} are needed to see winners that win 3 times of 4, {sample_size(FINE)} for 3 of 5"
        )
    drawn = sorted(different, key=lambda prompt: content_hash([config.seed, prompt]))
    sample = [different[prompt] for prompt in drawn[: sample_size(config.difference)]]
    strange = Counter(what for row in sample if (what := strangeness(row["prompt"], tokenizer)))
    return Checked(sample, len(rows), len(different), *authors(config), dict(strange), template)


def strangeness(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> str | None:
    """Why the model cannot have seen such a prompt, or None: marks of a chat template as text, a turn left out."""
    from jinja2 import TemplateError

    for turn in messages:
        if found := _MARKS.search(turn["content"]):
            return f"{found[0]} stands in its text"
        if found := next((token for token in tokenizer.all_special_tokens if token in turn["content"]), None):
            return f"the model's own {found} stands in its text"
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        return f"the model's template refuses it: {one_line(error, 80)}"
    out = next((turn["role"] for turn in messages if turn["content"].strip() not in text), None)
    return f"the model's template leaves its {out} turn out" if out else None


def authors(config: AdviseConfig) -> tuple[float | None, float | None]:
    """The shares of winners and losers that a folder of `clair build` says this very model made; None if it cannot."""
    from clair.data.dataset import read_manifest, read_rows
    from clair.inference.model_folder import weights_identity

    with local_copy(config.dataset) as folder:
        if not (folder / "manifest.json").is_file():
            return None, None
        identity = weights_identity(config.model.path or "")
        made = {told["model"] for told in read_manifest(folder)["models"].values() if told["identity"] == identity}
        if not made:
            return None, None
        rows = [row["models"] or {} for row in read_rows(folder)]
    winners, losers = (sum(row.get(side) in made for row in rows) / len(rows) for side in ("chosen", "rejected"))
    return winners, losers
