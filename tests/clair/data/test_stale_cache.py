"""`datasets` keeps what it read under the folder's name; what is read here is what the folder holds now."""

from __future__ import annotations

import json

import datasets
import pytest

from clair.data.dataset import DatasetWriter, load_pairs
from clair.data.dataset_card import card
from clair.data.prompt_sources import PromptSource, read_prompts
from clair.data.records import Pair

CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: rows.jsonl\n---\n"


@pytest.fixture
def write(tmp_path):
    """Writes texts into a folder with a card, as anybody's may be: `rows` rows, each time others."""

    def write(text: str) -> str:
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        row = {"prompt": text, "chosen": f"{text} yes", "rejected": f"{text} no"}
        (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
        (folder / "README.md").write_text(CARD)
        return str(folder)

    return write


def test_pairs_of_a_folder_that_changed_are_the_new_ones(write):
    for text in ("first", "second"):
        assert load_pairs(write(text))[0]["chosen"][0]["content"] == f"{text} yes"


def test_prompts_of_a_folder_that_changed_are_the_new_ones(write):
    for text in ("third", "fourth"):
        (prompt,) = read_prompts(PromptSource(path=write(text)))
        assert prompt.messages[0]["content"] == text


@pytest.mark.parametrize("read", [load_pairs, lambda path: datasets.load_dataset(path, split="train")])
def test_a_folder_of_ours_rebuilt_reads_as_rebuilt_by_anybody(tmp_path, read):
    """Also for who calls `datasets` itself: the card says which files it belongs to."""
    folder = tmp_path / "pairs"
    for text in ("fifth", "sixth"):
        writer = DatasetWriter(folder, seed=0, test_fraction=0.0)
        contrast = dict.fromkeys(("jaccard", "levenshtein", "kept", "prefix", "length_ratio"), 0.5)
        writer.add(Pair("a", ({"role": "user", "content": text},), "yes", "no", contrast=contrast).row())
        files = writer.close(keep=True)
        counts = {"prompts": 1, "pairs": 1, "train": 1, "test": 0, "dropped": 0}
        manifest = {"counts": counts, "contrast": {}, "pipeline": "revised", "files": files}
        (folder / "README.md").write_text(card({**manifest, "models": {}, "sampling": {}, "drop_reasons": {}}))
        assert read(str(folder))[0]["prompt"][0]["content"] == text
