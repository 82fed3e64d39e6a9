"""The peer of every benchmark: PEFT's P-tuning of a causal language model, trained as PEFT's tutorials train it.

Its virtual tokens stand in front of the text, its loss is the model's own on the words of the right label, rows are
padded on the right. Batches, schedule, clipping, checkpoints and the rule that scores labels are those of ptune, so
that what differs is the tuning alone.

Knows nothing of data sets and results. Shapes: B batch, T text tokens, P virtual tokens, H width, V rows of the
backbone's input matrix, N chosen positions.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PromptEncoderConfig, TaskType, get_peft_model
from torch import Tensor

from ptune.config.run import TrainingConfig
from ptune.models.backbone import Backbone
from ptune.rendering.batch import Batch, Row, collate
from ptune.tasks.classification import Classification
from ptune.training.step_plan import StepPlan


class PeftPeer:
    """PEFT's P-tuning with its MLP, on a backbone that is shared and stays frozen.

    Attributes:
        model: what `get_peft_model` gives.
        backbone: the frozen model with its tokenizer.
        tokenizer: the backbone's; with the call below this makes the peer what `Classification` scores.
        virtual_tokens: P.
    """

    def __init__(self, backbone: Backbone, *, virtual_tokens: int = 10, seed: int = 0) -> None:
        """Wrap the backbone; the encoder's hidden layers are as wide as the backbone, its start follows ``seed``."""
        torch.manual_seed(seed)
        settings = PromptEncoderConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=virtual_tokens,
            encoder_reparameterization_type="MLP",
            encoder_hidden_size=backbone.hidden_size,
        )
        with warnings.catch_warnings():  # PEFT asks transformers by a name that is about to change
            warnings.simplefilter("ignore", FutureWarning)
            self.model = get_peft_model(backbone.model, settings).to(backbone.device)
        self.backbone = backbone
        self.tokenizer = backbone.tokenizer
        self.virtual_tokens = virtual_tokens
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def loss(self, batch: Batch) -> Tensor:
        """Return PEFT's own loss: the mean cross-entropy over a batch's supervised tokens."""
        batch = batch.to(self.backbone.device)
        return self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False
        ).loss

    def step(self, optimizer: torch.optim.Optimizer, batch: Batch, max_grad_norm: float = 1.0) -> float:
        """Take one optimizer step and return its loss."""
        self.model.train()
        loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        positions: Tensor,
        columns: Tensor | None = None,
        labels: None = None,
        states: bool = False,
    ) -> Tensor:
        """Return the logits ``[N, V]`` after the tokens at ``positions`` ([B, T] bool), the virtual tokens in front.

        Those of ``columns`` ([C] int64) alone where they are given. ``labels`` are none: the loss is `loss`.
        Hidden states are never asked for: PEFT has no linear head beside its prompt.
        """
        assert not states
        self.model.eval()
        device = self.backbone.device
        logits = self.model(
            input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
        ).logits
        logits = logits[:, self.virtual_tokens :][positions.to(device)]
        return logits if columns is None else logits[:, columns.to(device)]

    def rows(self) -> Tensor:
        """Return the virtual tokens ``[P, H]`` that the encoder now gives."""
        return self.model.get_prompt_embedding_to_save(self.model.active_adapter).detach().clone()


@dataclass
class PeerRun:
    """A finished run of the peer, its best checkpoint by dev at hand.

    Attributes:
        peer: holds the best checkpoint's weights.
        dev: accuracy of that checkpoint.
        best_step: after how many steps it was reached.
        step_seconds: of each step but the first, evaluations left out.
    """

    peer: PeftPeer
    dev: float = -1.0
    best_step: int = 0
    step_seconds: list[float] = field(default_factory=list)

    @property
    def seconds_per_step(self) -> float:
        """The mean over all steps but the first."""
        return sum(self.step_seconds) / max(1, len(self.step_seconds))


def training_rows(task: Classification, records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return each record's text and the words of its label, the words supervised."""
    rows = [task.renderer.row(record, task.answer(record), end=False) for record in records]
    return [row for row in rows if row is not None]


def train_peer(
    peer: PeftPeer,
    task: Classification,
    train: Sequence[Mapping[str, Any]],
    dev: Sequence[Mapping[str, Any]],
    settings: TrainingConfig,
) -> PeerRun:
    """Train the peer as ``settings`` says, and leave it with its best checkpoint by accuracy on dev.

    Args:
        peer: newly built.
        task: without virtual tokens, which PEFT sets in front itself.
        train: records with their labels.
        dev: held-out records, evaluated as often as `TrainingConfig.evaluations` says, and before the first step.
        settings: of a run of ptune: batches, schedule, clipping and seed are taken from it.
    """
    rows = training_rows(task, train)
    plan = StepPlan([len(row.ids) for row in rows], settings)
    optimizer = torch.optim.AdamW(peer.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    run = PeerRun(peer)
    best = _checkpoint(run, task, dev, settings, 0, {})
    for step in range(plan.total_steps):
        begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * plan.rate(step)
        (batch,) = plan.window(step)
        peer.step(optimizer, collate([rows[i] for i in batch], peer.tokenizer.pad_token_id), settings.max_grad_norm)
        if step:
            run.step_seconds.append(time.perf_counter() - begun)
        if step + 1 in plan.evaluation_steps:
            best = _checkpoint(run, task, dev, settings, step + 1, best)
    encoder = peer.model.prompt_encoder[peer.model.active_adapter]
    encoder.load_state_dict(best)
    return run


def accuracy(peer: PeftPeer, task: Classification, records: Sequence[Mapping[str, Any]], batch_size: int) -> float:
    """Return the share of records whose right label has the highest log-probability."""
    return task.evaluate(peer, records, batch_size=batch_size)["accuracy"]


def _checkpoint(
    run: PeerRun,
    task: Classification,
    dev: Sequence[Mapping[str, Any]],
    settings: TrainingConfig,
    step: int,
    best: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Score dev and return the encoder's weights of the best evaluation so far."""
    value = accuracy(run.peer, task, dev, 2 * settings.batch_size)
    if value <= run.dev:
        return best
    run.dev, run.best_step = value, step
    weights = run.peer.model.prompt_encoder[run.peer.model.active_adapter].state_dict()
    return {name: tensor.detach().clone() for name, tensor in weights.items()}
