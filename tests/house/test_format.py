"""The dataset folder: `clair build` writes what docs/format.md says, and `datasets` and `apo` read it."""

from __future__ import annotations

import json
import re

import pytest

from tests.house.pages import pages, tables

ROWS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset folder built over HTTP from prompts with wrong answers, the last row twice and one reply a refusal."""
    from clair.pipeline.build import build
    from clair.pipeline.config import BuildConfig
    from recipes.world.running import running
    from recipes.world.tasks import distinct_tasks

    path = tmp_path_factory.mktemp("format")
    rows = [{"prompt": task.prompt, "answer": task.wrong} for task in distinct_tasks("train", ROWS - 1, 0)]
    lines = [json.dumps(row) + "\n" for row in [*rows, rows[-1]]]
    (path / "prompts.jsonl").write_text("".join(lines), "utf-8")
    with running() as server:
        config = BuildConfig.model_validate(
            {
                "pipeline": "revised",
                "prompts": {"path": str(path / "prompts.jsonl")},
                "reviser": {"url": server.url, "model": "world-reviser"},
                "test_fraction": 0.3,
                "out": str(path / "pairs"),
            }
        )
        build(config)
    return path / "pairs"


def test_the_folder_holds_the_files_that_the_page_lists(folder):
    listing = re.search(r"```text\ndata/my-pairs/\n(.*?)```", pages()["docs/format.md"], re.DOTALL)[1]
    listed = {line.split()[0] for line in listing.splitlines()}
    present = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {name for name in present if not name.startswith(".")} == listed


def test_the_schema_is_the_one_of_the_page(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clair.data.dataset import CONTRAST, schema, split_file

    def kind(type: pa.DataType) -> str:
        if pa.types.is_list(type):
            assert {field.name for field in type.value_type} == {"role", "content"}
            return "list of messages"
        return "struct" if pa.types.is_struct(type) else str(type)

    expected = [(f"`{field.name}`", kind(field.type)) for field in schema()]
    ((_, _, (_, *rows)),) = tables("schema")
    assert [(row[0], row[1]) for row in rows] == expected
    ((_, _, (_, *rows)),) = tables("contrast")
    assert [row[0] for row in rows] == [f"`{name}`" for name in CONTRAST]
    for split in ("train", "test"):
        assert pq.read_schema(folder / split_file(split)).equals(schema())


def test_the_manifest_has_the_keys_of_the_page_and_its_counts_add_up(folder):
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    ((_, _, (_, *rows)),) = tables("manifest")
    always = [row[0] for row in rows if not row[1].startswith("if ")]
    assert sorted(manifest) == sorted(key for cell in always for key in cell.replace("`", "").split(", "))
    counts = manifest["counts"]
    assert counts["prompts"] == ROWS == counts["pairs"] + counts["dropped"]
    assert counts["pairs"] == counts["train"] + counts["test"]
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text("utf-8").splitlines()]
    assert len(dropped) == counts["dropped"] == sum(manifest["drop_reasons"].values()) >= 1
    assert set(dropped[0]) == {"id", "stage", "reason", "detail", "failed"}


def test_datasets_reads_it_as_it_is(folder, tmp_path):
    import datasets

    splits = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))
    counts = json.loads((folder / "manifest.json").read_text("utf-8"))["counts"]
    assert {name: len(split) for name, split in splits.items()} == {"train": counts["train"], "test": counts["test"]}
    assert min(counts["train"], counts["test"]) > 0
    for row in splits["train"]:
        assert [turn["role"] for turn in row["prompt"]] == ["user"]
        assert [turn["role"] for turn in row["chosen"] + row["rejected"]] == ["assistant", "assistant"]
        assert row["chosen"] != row["rejected"]


def test_exported_unpaired_rows_are_the_pairs_cut_in_two(folder, tmp_path):
    from apo.data.sources import Source, load_train
    from clair.pipeline.export import export

    count = export("unpaired", folder, "train", tmp_path / "rows.jsonl")
    pairs, rows = (load_train([Source(path=str(path))], 0) for path in (folder, tmp_path / "rows.jsonl"))
    assert count == len(rows) == 2 * len(pairs)
    assert rows["prompt"][::2] == rows["prompt"][1::2] == pairs["prompt"][:]
    assert (rows["completion"][::2], rows["completion"][1::2]) == (pairs["chosen"][:], pairs["rejected"][:])
    assert rows["label"][:] == [True, False] * len(pairs)


def test_every_format_that_the_page_lists_is_read_as_the_same_row():
    from clair.data.preference_rows import read_row

    ((page, _, (_, *rows)),) = tables("read")
    turns = {"prompt": ("user", "2 + 2?"), "chosen": ("assistant", "4"), "rejected": ("assistant", "5")}
    same = {name: [{"role": role, "content": text}] for name, (role, text) in turns.items()}
    for name, example in rows:
        assert read_row(json.loads(example.strip("`")))[0] == same, f"{page}: {name}"
    assert len(rows) > 8
