"""The prompt encoder: turns P trained rows into the P virtual tokens, in float32, while they are trained.

Three kinds, each a plain setting of one class:

    embedding   the rows themselves                                 (Lester et al. 2021, prompt tuning)
    mlp         linear, ReLU, dropout, ``num_layers`` times; linear (PEFT's MLP is ``num_layers`` 2, dropout 0)
    lstm        bidirectional LSTM, then linear, ReLU, linear       (Liu et al. 2021, P-tuning)

With ``residual`` an mlp or lstm is f in ``rows + f(rows)`` (Razdaibiedina et al. 2023, Residual Prompt Tuning,
section 3), its last layer zero at the start, so that training sets out from exactly the initial rows. As in the paper
the rows are trained together with f: the way around f keeps a gradient for every row while f is still zero.

Every kind works in units of the initial rows. Embeddings have a standard deviation of 0.02 in one backbone and of 1 in
another, and Adam moves every parameter by about the learning rate a step, so one learning rate would be a leap here and
nothing there. So the parameter holds ``initial / scale`` and the result is multiplied by ``scale``: rows and f's input
are near one, f's output counts in units of the embeddings, and a learning rate, a clipped gradient norm and Adam's
epsilon mean the same for every backbone. The scale is fixed and a power of two, the nearest to the initial rows' root
mean square, for multiplying by it and dividing by it lose no bit.

Knows nothing of templates, tokenizers, backbones or files. Shapes: P virtual tokens, H width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from ptune.config.run import EncoderConfig
from ptune.errors import ConfigError

_PEFT_MLP_LAYERS = 2


class PromptEncoder(nn.Module):
    """Gives the P virtual tokens from rows that it owns. Build it by `build_encoder` or `PromptEncoder.peft`.

    Parameters carry PEFT's names: ``embedding.weight``, ``lstm_head.*``, ``mlp_head.0.weight`` and so on, whatever the
    dropout. Everything is float32 at the start; ``double()`` takes all of it along.

    Attributes:
        embedding: the trained rows ``[P, H]``, in units of ``scale``.
        lstm_head: the LSTM, for kind ``lstm`` only.
        mlp_head: the MLP, for kinds ``mlp`` and ``lstm``.
        residual: whether the rows are added to what the heads give.
        scale: what one unit of the rows is worth, a scalar that is saved but not trained; None for one.
    """

    scale: Tensor | None

    def __init__(self, config: EncoderConfig, initial: Tensor, scale: float | None = None) -> None:
        """Make an encoder whose weights come from torch's global generator.

        Args:
            config: kind, hidden size (H where absent), layers, dropout, residual. ``dropout`` acts after every hidden
                layer of an mlp; between the layers of an lstm, or on the output of its only layer.
            initial: ``[P, H]`` of any float dtype, copied.
            scale: the unit in which rows are stored; a power of two keeps the initial rows to the last bit.
        """
        super().__init__()
        width = initial.shape[1]
        rows = initial.detach().to(device="cpu", dtype=torch.float32, copy=True)
        self.embedding = nn.Embedding.from_pretrained(rows if scale is None else rows / scale, freeze=False)
        self.register_buffer("scale", None if scale is None else torch.tensor(scale, dtype=torch.float32))
        self.residual = config.residual and config.type != "embedding"
        self.lstm_head: nn.LSTM | None = None
        self.mlp_head: nn.Sequential | None = None
        self.lstm_dropout = nn.Dropout(0.0)
        hidden = config.hidden_size or width
        if config.type == "mlp":
            self.mlp_head = mlp([width, *[hidden] * config.num_layers, width], config.dropout)
        elif config.type == "lstm":
            between = config.dropout if config.num_layers > 1 else 0.0
            self.lstm_dropout.p = config.dropout - between  # nn.LSTM would ignore it where nothing is in between
            self.lstm_head = nn.LSTM(
                width, hidden, config.num_layers, dropout=between, bidirectional=True, dtype=torch.float32
            )
            self.mlp_head = mlp([2 * hidden, 2 * hidden, width], dropout=0.0)
        if self.residual and self.mlp_head is not None:
            for parameter in self.mlp_head[-1].parameters():
                nn.init.zeros_(parameter)

    @classmethod
    def peft(
        cls,
        kind: str,
        num_virtual_tokens: int,
        token_dim: int,
        hidden_size: int,
        num_layers: int = 2,
        dropout: float = 0.0,
    ) -> PromptEncoder:
        """Make one of the two encoders of PEFT's P-tuning (`peft.tuners.p_tuning.model.PromptEncoder`).

        No residual and no scale. ``load_state_dict`` takes PEFT's weights as they are, and from the same state of
        torch's global generator both start with the same weights.

        Raises:
            ConfigError: a kind that PEFT has not, or layers or dropout that PEFT would ignore.
        """
        if kind not in ("mlp", "lstm"):
            raise ConfigError(f'PEFT\'s encoder is "mlp" or "lstm", and kind is "{kind}"; choose one of the two')
        if kind == "mlp" and (num_layers != _PEFT_MLP_LAYERS or dropout):
            raise ConfigError(
                f"PEFT's mlp has {_PEFT_MLP_LAYERS} hidden layers and no dropout, and num_layers is {num_layers} and "
                f"dropout {dropout}; leave them out, or use build_encoder, which honours them"
            )
        if kind == "lstm" and num_layers == 1 and dropout:
            raise ConfigError(
                f"PEFT's lstm has dropout between its layers only, and num_layers is 1 and dropout {dropout}; "
                "leave dropout out, or use build_encoder, which honours it"
            )
        config = EncoderConfig(
            type=kind,
            hidden_size=hidden_size,
            num_layers=num_layers,
            dropout=dropout,
            residual=False,
        )
        return cls(config, torch.randn(num_virtual_tokens, token_dim, dtype=torch.float32))

    def forward(self) -> Tensor:
        """Return the virtual tokens ``[P, H]``, float32 unless the module was cast."""
        rows: Tensor = self.embedding.weight
        if self.mlp_head is not None:
            hidden = rows
            if self.lstm_head is not None:
                hidden = self.lstm_dropout(self.lstm_head(rows)[0])  # [P, 2 * hidden_size], both directions
            output = self.mlp_head(hidden)  # [P, H]
            rows = rows + output if self.residual else output
        if self.scale is not None:
            return rows * self.scale
        # Never the parameter itself: an optimizer would change in place what others have kept as rows.
        return rows.clone() if rows is self.embedding.weight else rows


def build_encoder(config: EncoderConfig, initial: Tensor, seed: int) -> PromptEncoder:
    """Return a new encoder on the CPU, the same for the same seed; torch's global generators stay as they are.

    Kind ``embedding`` and every residual encoder give ``initial`` itself before the first step, bit for bit (entries
    more than 2**126 below the rows' scale aside). Without residual an mlp or lstm takes ``initial`` as its input and
    gives what a random network gives, in units of the initial rows.

    To restore a saved encoder, build it from any rows of the same shape and load its state, scale included.

    Args:
        config: the encoder's settings.
        initial: ``[P, H]`` of any float dtype and device.
        seed: of the random weights.

    Raises:
        ConfigError: ``initial`` is not P x H with P and H at least 1, or holds a value that is not finite.
    """
    if initial.dim() != 2 or initial.numel() == 0:
        raise ConfigError(
            f"a prompt encoder starts from rows of shape [P, H], both at least 1, and found {list(initial.shape)}; "
            "give one row of the backbone's width for each virtual token"
        )
    if not torch.isfinite(initial).all():
        raise ConfigError(
            "a prompt encoder starts from finite rows, and found one with a value that is infinite or not a number; "
            "check the embeddings or the soft prompt that they come from"
        )
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
        return PromptEncoder(config, initial, scale=power_of_two_near_rms(initial))


def count_parameters(module: nn.Module) -> int:
    """Return how many numbers of a module are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def mlp(widths: list[int], dropout: float, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers between these widths, an activation and dropout after each but the last, in float32."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        # Activation and dropout share one place, so that weights have the same names with dropout and without.
        between = nn.Sequential(activation(), nn.Dropout(dropout))
        layers += [nn.Linear(inputs, outputs, dtype=torch.float32), between]
    return nn.Sequential(*layers[:-1])


def power_of_two_near_rms(rows: Tensor) -> float:
    """Return the unit in which ``rows`` (any shape) are stored: dividing by it and multiplying lose no bit."""
    rms = rows.detach().double().square().mean().sqrt().item()
    return 2.0 ** round(math.log2(rms)) if rms > 0 else 1.0
