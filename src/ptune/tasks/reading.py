"""What tasks share that answer a record by one forward pass, read at some places of its rows.

What is read there is logits, or the last layer's hidden states where a linear head makes scores of them. Rows of any
tasks that read the same can share a pass (`ptune.engine.mixed_batches`).

Shapes: N places read, V rows of the backbone's input matrix, C outputs of a linear head, H width of hidden states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ptune.models.backbone import Backbone
from ptune.rendering.batch import Row, check_batch_size, collate
from ptune.tasks.task import Asked, Forward, Task


class ReadingTask(Task):
    """Answers a record by what is read in its rows."""

    reads_states: bool = False
    """Whether hidden states are read, for a linear head, and not logits."""

    @abstractmethod
    def rows(self, record: Mapping[str, Any]) -> tuple[Row, ...]:
        """Return the rows that the model reads for a record."""

    @abstractmethod
    def answer_read(
        self, record: Mapping[str, Any], rows: Sequence[Row], read: Tensor, backbone: Backbone
    ) -> dict[str, Any]:
        """Return what `predict` says of a record.

        Args:
            record: the record.
            rows: its rows.
            read: ``[N, V]`` logits or ``[N, H]`` hidden states, of all places that the rows read, in their order.
            backbone: that they come from.
        """

    def asked(self, rows: Sequence[Row], pad_id: int, columns: Tensor | None = None) -> Asked:
        """Return the question for what all places of rows hold, in their order: ``[N, V]`` or ``[N, H]``.

        For the logits of some tokens alone, ``[N, C]``, where they are given as ``columns``, ``[C]`` int64.
        """
        batch = collate(rows, pad_id)
        positions = torch.zeros_like(batch.input_ids, dtype=torch.bool)  # [B, T]
        for number, row in enumerate(rows):
            positions[number, list(row.read_at)] = True
        return Asked(
            batch.input_ids, batch.attention_mask, positions=positions, columns=columns, states=self.reads_states
        )

    def read(self, forward: Forward, rows: Sequence[Row], pad_id: int) -> Tensor:
        """Return what `asked` asks for, by one forward pass: ``[N, V]``, ``[N, C]`` or ``[N, H]``."""
        return self.asked(rows, pad_id).of(forward)

    def head_scores(self, states: Tensor) -> Tensor:
        """Return the linear head's scores ``[N, C]`` for hidden states ``[N, H]``."""
        assert self.head is not None, "a task that reads states is answered with its head, and has none"
        return self.head(states)


def in_batches(rows: Sequence[Sequence[Row]], batch_size: int, max_tokens: int | None = None) -> Iterator[list[int]]:
    """Give numbers of examples that are read together: of similar length, longest first, and one at least.

    Args:
        rows: of each example.
        batch_size: rows at once.
        max_tokens: at once, padding included; None for no limit.

    Raises:
        ConfigError: no rows may be read at once.
    """
    check_batch_size(batch_size)
    lengths = [max(len(row.ids) for row in each) for each in rows]
    order = sorted(range(len(rows)), key=lambda number: -lengths[number])
    start = 0
    while start < len(order):
        end, longest = start + 1, lengths[order[start]]
        most = batch_size if max_tokens is None else min(batch_size, max_tokens // max(1, longest))
        while end < len(order) and sum(len(rows[n]) for n in order[start : end + 1]) <= most:
            end += 1
        yield order[start:end]
        start = end
