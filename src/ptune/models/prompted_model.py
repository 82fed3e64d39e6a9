"""Encoder, linear head, table of virtual tokens and backbone as one model: what is trained.

The encoder runs once a forward in training (a fresh dropout mask each time), and once in eval mode for evaluation,
generation and the file, which share that very tensor: an MLP over many rows is not bit for bit the MLP over one.

Knows nothing of files, tasks or the command line. Shapes: B batch, T tokens, P virtual tokens, H width, V rows of the
backbone's input matrix, N chosen positions.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptune.errors import BackboneError
from ptune.families import CAUSAL
from ptune.models.backbone import Backbone
from ptune.pretrained.losses import at_least_float32
from ptune.prompts.deep_encoder import DeepEncoder
from ptune.prompts.encoder import PromptEncoder
from ptune.prompts.linear_head import LinearHead


class PromptedModel(nn.Module):
    """A frozen backbone that knows P virtual tokens, given by a prompt encoder.

    The backbone is held, not registered: ``parameters()``, ``state_dict()`` and ``train()`` concern encoder and linear
    head alone. A task applies the head itself, to what `forward` returns for ``states``.

    Virtual token k has the id ``first_virtual_id + k``. Use as a context manager, or ``close()`` it, to leave the
    backbone as it was.

    Attributes:
        encoder: what is trained.
        head: what is trained beside it, where the task wants one; None for none.
        deep: how keys and values lie in the rows of a deep prompt; None for virtual tokens at the input.
        first_virtual_id: of the first virtual token.
        num_virtual_tokens: P.
    """

    def __init__(self, backbone: Backbone, encoder: PromptEncoder | DeepEncoder) -> None:
        super().__init__()
        self.deep = encoder.shape if isinstance(encoder, DeepEncoder) else None
        self.encoder = encoder.to(backbone.device)
        self.head: LinearHead | None = None
        self._held = (backbone,)  # in a tuple, for nn.Module would register its modules
        self._rows: Tensor | None = None
        self._weights_of_rows: list[tuple[int, int]] = []
        with torch.no_grad():
            count = len(encoder())
        self.virtual_tokens = backbone.attach()
        self.first_virtual_id = self.virtual_tokens.allocate(count)
        self.num_virtual_tokens = count

    @property
    def backbone(self) -> Backbone:
        """The frozen backbone."""
        return self._held[0]

    def rows(self) -> Tensor:
        """Return the virtual tokens ``[P, H]`` float32; ``[P, W]`` where they are keys and values.

        In training a new pass of the encoder, with gradient; in eval mode the one tensor that evaluation, generation
        and the saved file share.
        """
        if self.training:
            return self.encoder()
        # Loading a checkpoint, a cast or an optimizer step may change the encoder without a change of mode. A fused
        # optimizer of torch does so unseen, for it leaves version counters alone; `Learner.finish_step` raises them.
        weights = [(w.data_ptr(), w._version) for w in self.encoder.state_dict(keep_vars=True).values()]
        if self._rows is None or weights != self._weights_of_rows:
            with torch.no_grad():
                self._rows = self.encoder()
            self._weights_of_rows = weights
        return self._rows

    def train(self, mode: bool = True) -> PromptedModel:
        """Set the encoder's mode. The backbone stays in eval mode whatever is asked."""
        super().train(mode)
        self._rows = None
        return self

    def use(self, rows: Tensor | None = None) -> int:
        """Let the backbone know virtual tokens, the present ones or ``rows`` ``[P, H]``; return the first one's id."""
        rows = self.rows() if rows is None else rows.to(self.backbone.device)
        self.virtual_tokens.set_rows(self.first_virtual_id, rows, self.deep)
        return self.first_virtual_id

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        columns: Tensor | None = None,
        states: bool = False,
    ) -> Tensor:
        """Run the backbone on ids ``[B, T]`` with the present virtual tokens, as `Backbone.__call__` has it all."""
        rows = self.rows()
        self.use(rows)
        try:
            return self.backbone(
                input_ids, attention_mask, labels=labels, positions=positions, columns=columns, states=states
            )
        finally:
            # Else the backward pass of another prompted model on this backbone would go through the graph of this
            # one's rows, which is freed by then.
            self.use(rows.detach())

    def token_log_probabilities(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the log-probability of every real token given what stands before it.

        The plain call for any outer loss or evaluator. Virtual tokens, pads and each row's first token have none: nan.
        Nor has the first token of text behind a deep prompt, for keys and values predict nothing.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, T]`` int64.

        Returns:
            ``[B, T]`` float32; entry t belongs to the token at t, so it lines up with ``input_ids``.

        Raises:
            BackboneError: the model does not read from left to right.
        """
        if self.backbone.kind is not CAUSAL:
            raise BackboneError(
                f"{self.backbone.kind.words} gives no token a probability from what stands before it; "
                "use a causal language model"
            )
        ids, mask = input_ids.to(self.backbone.device), attention_mask.to(self.backbone.device)
        real = (ids < self.backbone.vocabulary_size) & mask.bool()
        seen = mask.bool() if self.deep is None else real
        preceded = functional.pad(seen[:, :-1], (1, 0))
        wanted = real & preceded  # [B, T]
        before = functional.pad(wanted[:, 1:], (0, 1))  # the position that predicts each of them
        logits = self(ids, mask, positions=before)  # [N, V]
        log_probabilities = torch.log_softmax(at_least_float32(logits), -1)
        chosen = log_probabilities.gather(-1, ids[wanted].unsqueeze(-1)).squeeze(-1)  # [N]
        result = torch.full(ids.shape, torch.nan, device=ids.device, dtype=chosen.dtype)
        result[wanted] = chosen
        return result.to(input_ids.device)

    def close(self) -> None:
        """Take the virtual tokens away from the backbone. Nothing can be run afterwards."""
        self.virtual_tokens.release(self.first_virtual_id)
        self.virtual_tokens.detach()

    def __enter__(self) -> PromptedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
