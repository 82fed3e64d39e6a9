"""The encoder of a deep prompt: gives the keys and values of P virtual tokens at all layers while they are trained.

    embedding   the keys and values themselves
    mlp         linear, tanh, dropout, ``num_layers`` times; linear, over P rows of the embeddings' width (Liu et al.
                2022, section 3.3; PEFT's ``prefix_projection`` is ``num_layers`` 1, dropout 0)

With ``residual`` an mlp is f in ``values + f(rows)``, its last layer zero at the start, so that training sets out from
exactly the initial keys and values: those that the backbone itself computes for words (`deep_start`).

Keys and values of one layer may be a hundred times those of another. So each layer's keys, and its values, are stored
in a unit of their own, a power of two, for the reasons that `encoder` gives, whose counterpart this is.

Knows nothing of templates, backbones or files. Shapes: P virtual tokens, H width, L layers, K key-value heads, D width
of a head, W = 2 L K D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptune.config.run import EncoderConfig
from ptune.prompts.encoder import mlp, power_of_two_near_rms
from ptune.prompts.keys_and_values import KeyValueShape


class DeepEncoder(nn.Module):
    """Gives rows ``[P, W]`` of keys and values. Build it by `build_deep_encoder` or `DeepEncoder.peft`.

    Parameters carry PEFT's names, ``embedding.weight`` and ``transform.0.weight``, whatever the dropout.

    Attributes:
        shape: how keys and values lie in a row.
        embedding: what is trained: ``[P, W]`` in units of ``scale``, or the mlp's input ``[P, H]``.
        transform: the mlp, if any.
        values: ``[P, W]`` in units of ``scale``, to which a residual mlp adds; else None.
        scale: ``[2 L]``, what one unit of each layer's keys and values is worth; saved, not trained.
    """

    scale: Tensor

    def __init__(
        self, config: EncoderConfig, shape: KeyValueShape, initial: Tensor, values: Tensor, scale: Tensor
    ) -> None:
        """Make an encoder whose weights come from torch's global generator.

        Args:
            config: kind, hidden size (H where absent), layers, dropout, residual.
            shape: how keys and values lie in a row.
            initial: ``[P, H]``, the mlp's input at the start, which an embedding has no use for.
            values: ``[P, W]``, what an embedding or a residual mlp gives at the start.
            scale: ``[2 L]``, powers of two.
        """
        super().__init__()
        self.shape = shape
        self.register_buffer("scale", scale.float())
        self.values: nn.Parameter | None = None
        self.transform: nn.Sequential | None = None
        stored = values.detach().float().cpu() / self._units()
        if config.type == "embedding":
            self.embedding = nn.Embedding.from_pretrained(stored, freeze=False)
            return
        rows = initial.detach().float().cpu()
        self.embedding = nn.Embedding.from_pretrained(rows / power_of_two_near_rms(rows), freeze=False)
        width = rows.shape[1]
        hidden = config.hidden_size or width
        self.transform = mlp([width, *[hidden] * config.num_layers, shape.row_width], config.dropout, nn.Tanh)
        if config.residual:
            self.values = nn.Parameter(stored)
            for parameter in self.transform[-1].parameters():
                nn.init.zeros_(parameter)

    @classmethod
    def peft(
        cls, num_virtual_tokens: int, shape: KeyValueShape, *, token_dim: int = 1, hidden_size: int | None = None
    ) -> DeepEncoder:
        """Make the encoder of PEFT's prefix tuning (`peft.PrefixEncoder`), whose weights ``load_state_dict`` takes.

        Args:
            num_virtual_tokens: P.
            shape: how keys and values lie in a row.
            token_dim: width of the projection's input.
            hidden_size: of the projection, PEFT's ``encoder_hidden_size``; None for no projection.
        """
        kind = "embedding" if hidden_size is None else "mlp"
        settings = {} if hidden_size is None else {"hidden_size": hidden_size, "num_layers": 1, "residual": False}
        config = EncoderConfig.model_validate({"type": kind, **settings})
        values, scale = torch.randn(num_virtual_tokens, shape.row_width), torch.ones(2 * shape.layers)
        return cls(config, shape, torch.randn(num_virtual_tokens, token_dim), values, scale)

    def forward(self) -> Tensor:
        """Return keys and values ``[P, W]``, float32 unless the module was cast."""
        rows: Tensor = self.embedding.weight
        if self.transform is not None:
            rows = self.transform(rows)
            rows = rows if self.values is None else self.values + rows
        return rows * self._units()

    def _units(self) -> Tensor:
        return self.scale.repeat_interleave(self.shape.heads * self.shape.head_width)  # [2 L] -> [W]


def build_deep_encoder(
    config: EncoderConfig, shape: KeyValueShape, initial: Tensor, values: Tensor, seed: int
) -> DeepEncoder:
    """Return a new encoder on the CPU, the same for the same seed; torch's global generators stay as they are.

    An embedding and a residual mlp give ``values`` before the first step, bit for bit; an mlp without residual gives
    what a random network makes of ``initial``, in units of the values.

    Args:
        config: the encoder's settings.
        shape: how keys and values lie in a row.
        initial: ``[P, H]``, the mlp's input at the start.
        values: ``[P, W]``, keys and values at the start.
        seed: of the random weights.
    """
    halves = values.detach().float().cpu().view(len(values), 2 * shape.layers, -1).unbind(1)
    scale = torch.tensor([power_of_two_near_rms(half) for half in halves])
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return DeepEncoder(config, shape, initial, values, scale)
