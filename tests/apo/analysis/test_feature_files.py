"""Features of a file: which pair each row is, and what is refused, with file, row and column."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from apo.analysis.feature_files import file_features
from clair.core.errors import UserError

ROWS = [{"id": id} for id in "abc"]
CHOSEN = np.arange(6.0).reshape(3, 2)
REJECTED = CHOSEN + 10


def npz(tmp_path, **arrays):
    np.savez(tmp_path / "f.npz", **{"chosen": CHOSEN, "rejected": REJECTED, **arrays})
    return tmp_path / "f.npz"


def parquet(tmp_path, metadata=None, **columns):
    columns = {"chosen": CHOSEN.tolist(), "rejected": REJECTED.tolist(), **columns}
    table = pa.table(columns).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "f.parquet")
    return tmp_path / "f.parquet"


@pytest.mark.parametrize("write", [npz, parquet])
def test_a_file_of_either_kind_gives_each_pair_its_row(tmp_path, write):
    in_order = file_features(write(tmp_path), ROWS)
    assert in_order.chosen.tolist() == CHOSEN.tolist()
    assert in_order.rejected.dtype == torch.float32
    assert in_order.prompt.tolist() == [[0.0]] * 3
    prompts = [[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]
    by_id = file_features(write(tmp_path, id=["c", "a", "b"], prompt=prompts), ROWS[:2], prompt=True)
    assert by_id.chosen.tolist() == CHOSEN[[1, 2]].tolist()
    assert by_id.prompt.tolist() == prompts[1:]
    assert by_id.chosen_cumulative.tolist() == by_id.chosen.tolist()


def test_the_identity_is_that_of_encoder_and_widths(tmp_path):
    plain = file_features(npz(tmp_path), ROWS).model
    assert file_features(npz(tmp_path, chosen=REJECTED), ROWS).model == plain
    assert file_features(parquet(tmp_path), ROWS).model == plain
    named = file_features(npz(tmp_path, encoder="mini"), ROWS).model
    assert named != plain
    assert file_features(parquet(tmp_path, metadata={"encoder": "mini"}), ROWS).model == named
    wide = np.ones((3, 4))
    assert file_features(npz(tmp_path, chosen=wide, rejected=wide), ROWS).model != plain


NAN = np.array([[1.0, 2], [3, np.nan], [5, 6]])
REFUSED = {
    "no column": (npz, {"selected": CHOSEN}, "unknown column 'selected'"),
    "two widths": (npz, {"chosen": np.ones((3, 4))}, "'chosen' is 4 wide and 'rejected' 2"),
    "rows of columns": (npz, {"chosen": np.ones((2, 2))}, "different numbers of rows (chosen 2, rejected 3)"),
    "rows of pairs": (npz, {"chosen": CHOSEN[:2], "rejected": REJECTED[:2]}, "have 2 rows and the dataset 3 pairs"),
    "nan": (npz, {"chosen": NAN}, "row 2: 'chosen' has nan in column 2"),
    "too large": (npz, {"chosen": CHOSEN * 1e300}, "row 1: 'chosen' has 1e+300 in column 2"),
    "text": (npz, {"chosen": np.array([["a"]] * 3)}, "'chosen' is <U1 of shape (3, 1)"),
    "flat": (npz, {"chosen": np.ones(3)}, "'chosen' is float64 of shape (3,)"),
    "id twice": (npz, {"id": ["a", "b", "a"]}, "row 3: the id 'a' stands twice"),
    "id missing": (npz, {"id": ["a", "b", "d"]}, "lack 1 of 3 pairs by their id: 'c'"),
    "ragged": (parquet, {"chosen": [[1.0, 2], [3.0], [5, 6]]}, "row 2: 'chosen' is 1 wide, and the first row 2"),
    "null": (parquet, {"chosen": [[1.0, 2], None, [5, 6]]}, "row 2: 'chosen' is 0 wide, and the first row 2"),
    "null within": (parquet, {"chosen": [[1.0, 2], [3, None], [5, 6]]}, "row 2: 'chosen' has nan in column 2"),
    "number": (parquet, {"chosen": [1.0, 2.0, 3.0]}, "'chosen' is double, not lists of numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_one_vector_a_pair_is_refused_in_one_line(tmp_path, case):
    write, columns, message = REFUSED[case]
    path = write(tmp_path, **columns)
    with pytest.raises(UserError) as error:
        file_features(path, ROWS)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_none_or_lacks_prompts_is_refused(tmp_path):
    with pytest.raises(UserError, match="no column 'prompt'"):
        file_features(npz(tmp_path), ROWS, prompt=True)
    with pytest.raises(UserError, match="does not exist"):
        file_features(tmp_path / "g.npz", ROWS)
    with pytest.raises(UserError, match=r"of no kind that is read: \.npz, \.parquet"):
        file_features(tmp_path / "f.csv", ROWS)
    for name in ("torn.npz", "torn.parquet"):
        (tmp_path / name).write_bytes(b"torn")
        with pytest.raises(UserError, match="cannot be read"):
            file_features(tmp_path / name, ROWS)
