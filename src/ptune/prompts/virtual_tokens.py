"""The one idea: virtual tokens are tokens. Teaches a frozen model's input embedding what ids from V on mean.

V is the number of rows of the backbone's input matrix. An id below V takes the frozen row, as ever; an id from V on
takes a row of a table that belongs to whoever set it: a prompted model in training, or an engine with its prompts.

Every module stays in its place: each `nn.Embedding` that shares the input matrix gets another ``forward`` on the
instance while somebody is attached, and its own back afterwards. Names, tying, saving, quantised weights and device
hooks are as they were. (Setting a wrapper by ``set_input_embeddings`` would give the same numbers, but makes
``tie_weights`` fail on T5, BART and BERT, and ``save_pretrained`` write a folder that reloads with random embeddings.)

A deep prompt's ids have no row in the table: they mean keys and values, which `deep_prompts` holds.

Knows nothing of encoders, tasks or training.
"""

from __future__ import annotations

import bisect
import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ptune.errors import BackboneError
from ptune.prompts.deep_prompts import DeepPrompts
from ptune.prompts.keys_and_values import KeyValueShape
from ptune.prompts.prefix_cache import PrefixCache

_attached: WeakKeyDictionary[nn.Module, VirtualTokens] = WeakKeyDictionary()


class VirtualTokens:
    """The table of virtual tokens of one model, shared by all that use the model.

    Get it by :meth:`attach`, and :meth:`detach` when done: the model is as before after the last user has left.
    Id ranges are given once and never again, so that a cache keyed by ids cannot answer with another prompt's keys.

    Attributes:
        vocabulary_size: V.
        deep: those of its ranges that mean keys and values.
        prefixes: kept keys and values of virtual tokens that open a row.
        lock: for those who share the model between threads, to be held while it runs.
    """

    def __init__(self, model: nn.Module) -> None:
        matrix = input_embedding(model)
        self.vocabulary_size: int = input_matrix(model).shape[0]
        self.deep = DeepPrompts()
        self.prefixes = PrefixCache()
        self.lock = threading.RLock()
        self._users = 0
        self._next_id = self.vocabulary_size
        self._segments: dict[int, Tensor] = {}
        self._starts: list[int] = []  # first ids of the segments, in order
        self._settings: dict[int, int] = {}  # how often a segment's rows were set
        self._times_set = 0
        self._table: Tensor | None = None
        self._ranges = torch.empty(3, 0, dtype=torch.long)  # each segment's first id, end, and first row in the table
        self._modules = [m for m in model.modules() if m is matrix or getattr(m, "weight", None) is matrix.weight]
        self._modules = [m for m in self._modules if isinstance(m, nn.Embedding) or m is matrix]
        self._own_forward: list[Callable[..., Tensor] | None] = []

    @classmethod
    def attach(cls, model: nn.Module) -> VirtualTokens:
        """Return the model's virtual tokens; the first user's call gives the embeddings their new ``forward``."""
        tokens = _attached.get(model)
        if tokens is None:
            tokens = _attached[model] = cls(model)
        if tokens._users == 0:
            tokens._own_forward = [module.__dict__.get("forward") for module in tokens._modules]
            for module in tokens._modules:
                tokens._teach(module)
        tokens._users += 1
        return tokens

    def detach(self) -> None:
        """Leave the model; the last to leave gives the embeddings their own ``forward`` back."""
        self._users -= 1
        if self._users:
            return
        for module, own in zip(self._modules, self._own_forward, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own  # a device hook of accelerate had put its own forward there

    def allocate(self, count: int) -> int:
        """Return the first of ``count`` new ids, which no one else had or will have."""
        first = self._next_id
        self._next_id += count
        return first

    def set_rows(self, first_id: int, rows: Tensor, deep: KeyValueShape | None = None) -> None:
        """Let ids ``first_id ..`` mean ``rows``.

        Args:
            first_id: where their range starts.
            rows: ``[P, H]`` of any float dtype, with or without gradient; ``[P, W]`` for a deep prompt.
            deep: how keys and values lie in the rows of a deep prompt.

        Raises:
            ValueError: the ids were never allocated.
        """
        if not self.vocabulary_size <= first_id <= self._next_id - len(rows):
            raise ValueError(f"ids {first_id} to {first_id + len(rows) - 1} were never allocated")
        if deep is not None:
            self.deep.set(first_id, rows, deep)
            return
        before = self._segments.get(first_id)
        if before is None:
            bisect.insort(self._starts, first_id)
        if before is None or before.data_ptr() != rows.data_ptr() or before.shape != rows.shape:
            self._times_set += 1
            self._settings[first_id] = self._times_set
            self.prefixes.forget(first_id, first_id + len(rows))
        self._segments[first_id] = rows
        self._table = None

    def meaning(self, ids: Sequence[int]) -> Hashable:
        """Return what tells the rows that virtual ids mean now from those that they meant or will mean.

        None where an id means nothing, keys and values, or a parameter.
        """
        found = []
        place = 0
        while place < len(ids):
            number = bisect.bisect_right(self._starts, ids[place]) - 1
            first = self._starts[number] if number >= 0 else 0
            rows = self._segments.get(first)
            if rows is None or ids[place] >= first + len(rows):
                return None
            if rows.is_leaf and rows.requires_grad:  # an optimizer may change them in place, and leave no trace
                return None
            # Others' changes in place are counted, where there is a counter.
            found.append((first, self._settings[first], 0 if rows.is_inference() else rows._version))
            while place < len(ids) and first <= ids[place] < first + len(rows):
                place += 1
        return tuple(found)

    def release(self, first_id: int) -> None:
        """Forget the rows of the range that starts at ``first_id``; its ids are not given again."""
        self.deep.release(first_id)
        rows = self._segments.pop(first_id, None)
        if rows is not None:
            self._starts.remove(first_id)
            del self._settings[first_id]
            self.prefixes.forget(first_id, first_id + len(rows))
        self._table = None

    def _build_table(self) -> Tensor:
        # Several ranges, freed ones between them: rows stand densely, and a second table finds them by id.
        segments = [self._segments[first] for first in self._starts]
        with torch.enable_grad():  # the first to ask may be a pass without gradient, and the next one with
            table = torch.cat(segments) if len(segments) > 1 else segments[0]
        lengths = torch.tensor([len(rows) for rows in segments])
        starts = torch.tensor(self._starts)
        self._ranges = torch.stack([starts, starts + lengths, lengths.cumsum(0) - lengths]).to(table.device)
        return table

    def _teach(self, module: nn.Module) -> None:
        frozen_rows = module.forward

        @functools.wraps(frozen_rows)
        def forward(input_ids: Tensor) -> Tensor:
            if not self._segments:
                return frozen_rows(input_ids)
            if self._table is None:
                self._table = self._build_table()
            virtual = input_ids >= self.vocabulary_size
            words = frozen_rows(input_ids.masked_fill(virtual, 0))
            starts, ends, first_rows = self._ranges.to(input_ids.device)
            numbers = (torch.searchsorted(starts, input_ids.contiguous(), right=True) - 1).clamp(min=0)
            rows = input_ids - starts[numbers] + first_rows[numbers]
            rows = rows.masked_fill((input_ids < starts[numbers]) | (input_ids >= ends[numbers]), -1)  # means nothing
            table = self._table.to(words.device)
            prompted = nn.functional.embedding(rows.masked_fill(~virtual, 0), table).to(words.dtype)
            return torch.where(virtual.unsqueeze(-1), prompted, words)

        module.forward = forward


def virtual_tokens_of(model: nn.Module) -> VirtualTokens | None:
    """Return the table of a model; None where nobody ever attached to it."""
    return _attached.get(model)


def deep_prompts_of(model: nn.Module) -> DeepPrompts:
    """Return the deep prompts of a model: none where nobody is attached to it."""
    tokens = _attached.get(model)
    return DeepPrompts() if tokens is None else tokens.deep


def input_embedding(model: nn.Module) -> nn.Module:
    """Return the module that holds the model's input matrix ``[V, H]``."""
    return model.get_input_embeddings()  # type: ignore[operator]


def input_matrix(model: nn.Module) -> Tensor:
    """Return the model's input matrix ``[V, H]``.

    Raises:
        BackboneError: its weights lie elsewhere, as DeepSpeed's ZeRO-3 has them.
    """
    matrix: Tensor = input_embedding(model).weight  # type: ignore[assignment]
    if matrix.dim() != 2:
        raise BackboneError(
            f"the input embedding has weights of shape {list(matrix.shape)} in place of [tokens, width], as where "
            "DeepSpeed's ZeRO-3 has taken them; load the model whole (ZeRO-2 or DDP do with a frozen one), or share "
            "its layers out with training.shard_backbone"
        )
    return matrix
