"""Records that are tokenised already: their ids and labels, seen to be such as a model reads. Knows no templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptune.errors import DataError
from ptune.rendering.batch import IGNORED
from ptune.rendering.filling import location


def tokenised_lists(record: Mapping[str, Any], vocabulary_size: int) -> tuple[list[int], list[int]]:
    """Return a record's ``input_ids`` and ``labels``, of one length.

    Args:
        record: with both, as lists, arrays or tensors of integers.
        vocabulary_size: V; ids and labels are below it.

    Raises:
        DataError: one is no list of integers, they differ in length, or hold an id that the model lacks.
    """
    ids, labels = _integers(record, "input_ids"), _integers(record, "labels")
    if len(ids) != len(labels):
        raise DataError(
            f"{location(record)}: input_ids and labels should be lists of one length, and have {len(ids)} and "
            f"{len(labels)}; tokenise the record again"
        )
    for name, values, also in (("input_ids", ids, ""), ("labels", labels, f", or {IGNORED} where nothing is learnt")):
        for value in values:
            if not 0 <= value < vocabulary_size and not (also and value == IGNORED):
                raise DataError(
                    f"{location(record)}: {name} holds {value}, and the model knows 0 to {vocabulary_size - 1}{also}; "
                    "tokenise the record again, with this model's own tokenizer"
                )
    return ids, labels


def _integers(record: Mapping[str, Any], name: str) -> list[int]:
    values: Any = record.get(name)
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, list | tuple) and all(type(value) is int for value in values):
        return list(values)
    found = "none" if name not in record else repr(values)
    shown = found if len(found) <= 60 else f"{found[:60]}..."
    raise DataError(
        f"{location(record)}: expected a list of integers as {name}, for it is tokenised already, and found {shown}; "
        "write input_ids and labels, or text in the template's fields"
    )
