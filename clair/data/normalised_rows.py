"""Detect datasets that need no reading, by checks of whole Arrow columns: about a second for a million rows."""
# pyright: reportAttributeAccessIssue=false
# pyarrow.compute defines its functions when it is imported, so a type checker does not see them.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from clair.data.row_formats import COLUMNS, CONSUMED_COLUMNS, ROLES

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


def arrow_batches(dataset: Dataset, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of some columns as Arrow tables of 10,000 rows."""
    batches = dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=10_000)
    return cast("Iterator[pa.Table]", batches)


def is_normalised(dataset: Dataset) -> bool:
    """True if `read_row` would change no row of the dataset, as in the pairs that `clair build` writes."""
    from datasets import List, Value

    message = List({"role": Value("string"), "content": Value("string")})
    columns = set(dataset.column_names)
    sides = COLUMNS if "chosen" in columns else ("prompt", "completion")
    if columns & set(CONSUMED_COLUMNS) != set(sides) or any(dataset.features[side] != message for side in sides):
        return False
    return all(
        _are_prompts(batch["prompt"]) and all(_are_single_answers(batch[side]) for side in sides[1:])
        for batch in arrow_batches(dataset, sides)
    )


def _are_prompts(column: pa.ChunkedArray) -> bool:
    """True if every conversation of a column ends with a turn that has text and is not the assistant's."""
    import pyarrow as pa
    import pyarrow.compute as pc

    turns: Any = column.combine_chunks()
    if not _are_messages(turns, ROLES):
        return False
    last = pc.subtract(turns.offsets[1:], 1)
    role = turns.values.field("role").take(last)
    text = pc.utf8_trim_whitespace(turns.values.field("content").take(last))
    return not pc.any(pc.or_(pc.equal(role, pa.scalar("assistant")), pc.equal(text, pa.scalar("")))).as_py()


def _are_single_answers(column: pa.ChunkedArray) -> bool:
    """True if every conversation of a column is one turn of the assistant."""
    import pyarrow.compute as pc

    turns: Any = column.combine_chunks()
    return _are_messages(turns, ("assistant",)) and pc.max(turns.value_lengths()).as_py() == 1


def _are_messages(turns: Any, roles: Sequence[str]) -> bool:
    """True if no list of a column is null or empty, and each message has content and one of `roles`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    messages = turns.flatten()
    if turns.null_count or messages.null_count or pc.min(turns.value_lengths()).as_py() == 0:
        return False
    role, content = messages.field("role"), messages.field("content")
    return not content.null_count and pc.all(pc.is_in(role, pa.array(roles))).as_py()
