"""The output head: what makes logits of hidden states, where it is asked to, and what may be had without all of it.

A head is **plain** where a model's logits are its hidden states times one frozen matrix, with a bias or without. Then a
loss needs no logits of all positions at once, and a task that asks for a few words needs their rows alone. What a model
does besides (a scale, a soft cap, a matrix in parts) makes its head not plain, and the model's own forward gives the
logits then; which of the two it is, is found out by trying and not by the family's name.

Knows nothing of plans, tasks or virtual tokens. Shapes: B batch, T tokens, N chosen positions, H width, V rows of the
output matrix, C chosen tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ptune.pretrained.losses import summed_linear_loss

Wanted = Literal["logits", "head inputs", "final states"]
"""What a forward pass is run for: logits; what the head reads, which may be a transform's output (BERT's, for one); or
the hidden states of the last layer, before any such transform."""

_PROBE_LOGIT = 1000.0
"""Size of the logits that a head is tried with: far beyond every soft cap, and within half precision's range."""


class OutputHead:
    """The output head of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._tried: nn.Linear | None = None
        self._matrix: Tensor | None = None

    @contextmanager
    def at(self, positions: Tensor | None, wanted: Wanted = "logits") -> Iterator[list[Tensor]]:
        """Let the head see only the hidden states at some positions, while the block runs one forward pass.

        The model applies its scale and soft cap after the head, to what the head gives, so nothing else need be known.

        Args:
            positions: ``[B, T]`` bool; None for all.
            wanted: logits, or one of two kinds of hidden states (see `Wanted`), which are then kept from the head.

        Returns:
            A list, which then holds the hidden states at the positions, ``[N, H]``; empty where logits are wanted.
        """
        head, body = self._model.get_output_embeddings(), self._model.base_model
        taken: list[Tensor] = []
        thread = threading.get_ident()  # another may run the model meanwhile, as it pleases
        if positions is None or head is None:
            yield taken
            return

        def take_last_states(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:
            if threading.get_ident() != thread:
                return output
            states = output.last_hidden_state
            taken.append(states[positions.to(states.device)])  # [B, T, H] -> [N, H]
            output.last_hidden_state = states[:, :0]
            return output

        def narrow(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if taken or threading.get_ident() != thread:
                return None  # there is nothing left, or it is another's pass
            states = arguments[0][positions.to(arguments[0].device)]  # [B, T, H] -> [N, H]
            if wanted != "logits":
                taken.append(states)
                states = states[:0]
            return (states, *arguments[1:])

        hooks: list[RemovableHandle] = [head.register_forward_pre_hook(narrow)]
        # A family that has no model below its head, or runs its parts (T5, OPT), has no transform before the head.
        if wanted == "final states" and body is not self._model:
            hooks.append(body.register_forward_hook(take_last_states))
        try:
            yield taken
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def on_dense_states(self) -> Iterator[None]:
        """Give the head a dense block of hidden states in every forward pass of the block.

        The last position of each row, ``[B, 1, H]``, is a view with gaps, for which torch multiplies row by row by B
        copies of the matrix: seconds in bfloat16.
        """
        head = self._model.get_output_embeddings()
        if head is None:
            yield
            return
        hook = head.register_forward_pre_hook(lambda _, arguments: (arguments[0].contiguous(), *arguments[1:]))
        try:
            yield
        finally:
            hook.remove()

    def examine(self, run: Callable[[], Tensor]) -> None:
        """Find out whether the head is plain, by hidden states whose logits are large enough to show what follows it.

        Args:
            run: one forward pass of the model, which returns its logits, ``[B, T, V]``.
        """
        head = self._model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
            return
        given: list[Tensor] = []

        def probe(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            generator = torch.Generator().manual_seed(0)
            states = torch.randn(arguments[0].shape, generator=generator).to(arguments[0])
            largest = functional.linear(states, head.weight).abs().max()
            given.append(states * (_PROBE_LOGIT / largest))
            return (given[0], *arguments[1:])

        with torch.no_grad():
            if head.weight.is_meta:
                return
            hook = head.register_forward_pre_hook(probe)
            try:
                logits = run()
            finally:
                hook.remove()
            # The very same product of the very same tensors: anything but equality is something done besides.
            if len(given) == 1 and torch.equal(logits, functional.linear(given[0], head.weight, head.bias).to(logits)):
                self._tried, self._matrix = head, head.weight

    @property
    def plain(self) -> bool:
        """Whether the head is plain, and still the one that was examined."""
        head = self._tried
        return (
            head is not None
            and self._matrix is not None
            and self._model.get_output_embeddings() is head
            and head.weight is self._matrix  # else somebody has cut it in parts since, or put another in its place
            and not self._matrix.requires_grad
        )

    def logits(self, states: Tensor, columns: Tensor) -> Tensor:
        """Return the logits of some words alone, ``[N, H] -> [N, C]``; the head must be plain.

        Args:
            states: ``[N, H]``, as `at` takes them away.
            columns: ``[C]`` int64, ids of the words.
        """
        assert self._tried is not None
        columns = columns.to(self._tried.weight.device)
        bias = None if self._tried.bias is None else self._tried.bias[columns]
        return functional.linear(states, self._tried.weight[columns], bias)

    def loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Return the summed cross-entropy of hidden states ``[N, H]`` for labels ``[N]``; the head must be plain."""
        assert self._tried is not None
        return summed_linear_loss(states, self._tried.weight, self._tried.bias, labels.to(states.device))
