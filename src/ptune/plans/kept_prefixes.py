"""Virtual tokens that open rows, read without gradient once for as long as they mean the same, whatever the call.

Knows nothing of tasks or encoders. Shapes: B batch, T tokens, L layers, K key-value heads, P virtual tokens that open a
row, D width of a head, V rows of the backbone's input matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ptune.prompts.virtual_tokens import VirtualTokens


class KeptPrefixes:
    """Gives the keys and values of virtual tokens that open rows, from the cache that their table keeps."""

    def __init__(
        self,
        run_contexts: Callable[[Sequence[tuple[int, ...]]], list[Tensor]],
        virtual_tokens: Callable[[], VirtualTokens | None],
    ) -> None:
        """Read the virtual tokens of one model.

        Args:
            run_contexts: gives the keys and values of ids, each ``[2 L, K, P, D]``.
            virtual_tokens: the model's table, where it has one.
        """
        self._run_contexts, self._virtual_tokens = run_contexts, virtual_tokens

    def of(self, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[Tensor]:
        """Return keys and values of the virtual tokens that open rows. To be called without gradient.

        Args:
            rows: ids of each.
            lengths: how many of them are wanted; 0 for none.

        Returns:
            For each row ``[2 L, K, P, D]``, of P = 0 where none are wanted or they mean nothing in the table; nothing
            at all where that is so of all rows.
        """
        openings = [tuple(row[:length]) for row, length in zip(rows, lengths, strict=True)]
        found = {ids: past for ids in dict.fromkeys(openings) if (past := self._past(ids)) is not None}
        if not found:
            return []
        nothing = next(iter(found.values()))[:, :, :0]
        return [found.get(ids, nothing) for ids in openings]

    def _past(self, ids: tuple[int, ...]) -> Tensor | None:
        tokens = self._virtual_tokens()
        meaning = tokens.meaning(ids) if tokens is not None and ids else None
        if tokens is None or meaning is None:
            return None
        past = tokens.prefixes.get(ids, meaning)
        if past is None:
            (past,) = self._run_contexts([ids])  # alone, so that its numbers are the same in all company
            tokens.prefixes.put(ids, meaning, past)
        return past


def opening_lengths(input_ids: Tensor, attention_mask: Tensor, positions: Tensor, vocabulary_size: int) -> Tensor:
    """Return how many virtual tokens open each row and are not asked for, ``[B]`` int64; 0 where they do not pay.

    Args:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64, pads on the right of rows that open with virtual tokens.
        positions: ``[B, T]`` bool.
        vocabulary_size: V.
    """
    mask = attention_mask.bool()
    free = ((input_ids >= vocabulary_size) & mask & ~positions).int().cumprod(-1).sum(-1)  # [B]
    opening = free.minimum(mask.sum(-1) - 1)  # a row keeps a token of its own
    return opening.masked_fill(opening < 2, 0)


def opening_run(ids: Sequence[int], vocabulary_size: int) -> int:
    """Return how many virtual tokens open a context of which a token must be left to read, 0 where it does not pay."""
    run = next((place for place, token in enumerate(ids) if token < vocabulary_size), len(ids))
    run = min(run, len(ids) - 1)
    return run if run >= 2 else 0
