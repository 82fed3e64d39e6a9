"""The training loop, on accelerate: a short loop that can be read, stopped at any moment, and gone on with.

What is trained is tiny, so the whole state is one file (`checkpoint`), and a resumed run ends bit for bit as the
unbroken one does, on one process and with as many threads: the order of examples follows from seed and epoch alone,
the encoder's dropout from the saved random state. The loss of an optimizer step is weighted by what is supervised in
it, so 1 x 8 equals 8 x 1.

Knows nothing of the command line or HTTP; what is shown while it runs is a `Reporter`'s business.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ptune.assembly import Parts, assemble, read_records
from ptune.backbone import Backbone
from ptune.batch import length_grouped_batches, within_budget
from ptune.checkpoint import Progress, load_checkpoint, random_state, save_checkpoint, set_random_state
from ptune.comparison import compare_with_bare_model
from ptune.config import RunConfig, TrainingConfig
from ptune.data import Record
from ptune.dev_assessment import assess_dev
from ptune.errors import ConfigError, MissingExtraError, TrainingError
from ptune.linear_head import head_from, head_tensors
from ptune.reporting import Reporter
from ptune.run_folder import RunFolder
from ptune.soft_prompt import SoftPrompt
from ptune.summary import summary
from ptune.template import Template

_CONSTANT_SHARE = 0.98
_DIVERGED = 2.0


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and has saved where it stands."""


def train(
    config: RunConfig,
    *,
    backbone: Backbone | None = None,
    records: tuple[Sequence[Record], Sequence[Record]] | None = None,
    reporter: Reporter | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> SoftPrompt:
    """Train a soft prompt and save it in ``config.output``.

    Args:
        config: every setting of the run.
        backbone: a loaded model, to save loading it; it is left as it was.
        records: training and dev records already at hand; read as ``config.data`` says where absent.
        reporter: what to show while it runs; nothing where absent.
        resume: go on with the run that stopped in this folder.
        overwrite: begin anew in a folder that holds another run.

    Returns:
        The soft prompt of the evaluation with the best metric, as saved.

    Raises:
        PtuneError: settings, data, model or folder cannot be used; nothing was written.
        TrainingError: the loss is not a number, or no gradient reaches the prompt; the last checkpoint stands.
        Stopped: by Ctrl-C or SIGTERM, after the step in hand; ``resume`` goes on.
    """
    reporter = reporter or Reporter()
    accelerator = _accelerator(config)
    before = random_state()
    with RunFolder(config, resume=resume, overwrite=overwrite, writes=accelerator.is_main_process) as folder:
        if records is None:  # read before a model is loaded, which takes its time
            records = read_records(config, Template.parse(config.prompt.template))
        if backbone is None:
            device = config.model.device if config.model.device != "auto" else str(accelerator.device)
            backbone = Backbone.load(config.model.model_copy(update={"device": device}))
        parts = assemble(config, backbone, records)
        try:
            with parts.prompted, backbone.left_as_it_was():
                folder.begin()
                accelerator.wait_for_everyone()
                if config.training.trackers:
                    accelerator.init_trackers(folder.path.name)
                return _Run(parts.config, parts, accelerator, folder, reporter).finish()
        finally:
            set_random_state(before)


class _Run:
    """One run from its first step, or from its checkpoint, to the saved soft prompt."""

    def __init__(
        self, config: RunConfig, parts: Parts, accelerator: Accelerator, folder: RunFolder, reporter: Reporter
    ) -> None:
        self.config, self.settings = config, config.training
        self.parts, self.task, self.prompted = parts, parts.task, parts.prompted
        self.accelerator, self.folder, self.reporter = accelerator, folder, reporter
        torch.manual_seed(self.settings.seed)
        if self.settings.gradient_checkpointing:
            self.prompted.backbone.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(
            self.prompted.parameters(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        self.prompted.backbone.plan = self.settings.plan
        self.model, self.optimizer = accelerator.prepare(self.prompted, optimizer)
        lengths = [max(len(row.ids) for row in example.rows) for example in parts.train]
        self.tokens = [length * len(example.rows) for length, example in zip(lengths, parts.train, strict=True)]
        self.schedule = StepPlan(lengths, self.settings, accelerator.num_processes)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self.random_state = random_state()
        self.plans_told: set[str] = set()
        if folder.checkpoint.exists():
            self._resume()
            folder.forget_after(self.progress.step)
        accelerator.wait_for_everyone()  # else the first to go on writes a checkpoint that another takes for an old one

    def _resume(self) -> None:
        self.progress, self.best, self.random_state = load_checkpoint(
            self.folder.checkpoint, trained=self.prompted, optimizer=self._bare_optimizer
        )

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def finish(self) -> SoftPrompt:
        """Train to the end and save the best soft prompt."""
        self.reporter.started(self.config, self.parts, self.schedule.total_steps, self.progress.step)
        for note in self.parts.notes:
            self.reporter.warned(note)
        with _stop_signal() as stop:
            self._keep_contexts()
            if not self.progress.history:
                self._evaluate()
            self._steps(stop)
        if stop.is_set():
            raise Stopped(f'stopped after step {self.progress.step}; "ptune train ... --resume" goes on')
        return self._save()

    def _keep_contexts(self) -> None:
        """Run what stands before virtual tokens once, where it will be read again and again."""
        again = self.schedule.total_steps > self.schedule.steps_per_epoch
        rows = [row.ids for example in self.parts.train for row in example.rows] if again else []
        kept = self.prompted.backbone.keep_contexts(rows, self.settings.context_cache_bytes)
        if len(kept):
            self.reporter.kept_contexts(len(kept), kept.bytes, full=kept.full)

    def _steps(self, stop: threading.Event) -> None:
        settings, last_save = self.settings, time.monotonic()
        begun, seconds_before = time.monotonic(), self.progress.seconds
        while self.progress.step < self.schedule.total_steps and not self._ends(stop):
            loss = self._step(self.progress.step)
            self.progress.step += 1
            self.progress.seconds = seconds_before + time.monotonic() - begun
            self.random_state = random_state()
            self.reporter.stepped(self.progress.step, loss, self.optimizer.param_groups[0]["lr"])
            if self.progress.step % settings.logging_steps == 0:
                self._track({"train_loss": loss})
            if self.progress.step in self.schedule.evaluation_steps:
                self._evaluate()
                last_save = time.monotonic()
            elif time.monotonic() - last_save >= 60 * settings.checkpoint_minutes:
                self._checkpoint()
                last_save = time.monotonic()
        if stop.is_set():
            self._checkpoint()

    def _ends(self, stop: threading.Event) -> bool:
        """Whether the run ends before its last step: it was asked to, or the metric gets no better."""
        if self.accelerator.num_processes > 1:  # all of them stop where one was asked to
            asked = torch.tensor(float(stop.is_set()), device=self.accelerator.device)
            if float(self.accelerator.reduce(asked, "sum")):
                stop.set()
        patience = self.settings.patience
        if patience is not None and self.progress.evaluations_without_gain >= patience and not stop.is_set():
            self.reporter.stopped_early(self.progress.step, patience)
            return True
        return stop.is_set()

    def _step(self, step: int) -> float:
        """Take one optimizer step and return its mean loss."""
        set_random_state(self.random_state)  # evaluation and signals in between leave no trace
        self.model.train()
        learning_rate = self.settings.learning_rate * self.schedule.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        window = self.schedule.window(step)  # one list of examples for each forward of this step, over all processes
        weight = sum(self.parts.train[i].weight for batch in window for i in batch)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = window[rank::processes] or [window[0]]  # a process left without a batch goes along with weight 0
        if self.settings.max_tokens_per_batch is not None:
            limit = self.settings.max_tokens_per_batch
            mine = [part for batch in mine for part in within_budget(batch, self.tokens, limit)]
        share = 0.0 if rank >= len(window) else processes / weight
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(mine, 1):
            examples = [self.parts.train[i] for i in batch]
            synchronised = nullcontext() if number == len(mine) else self.accelerator.no_sync(self.model)
            with synchronised:
                loss = self.task.loss(self.model, examples, self.prompted.backbone.tokenizer.pad_token_id)
                self.accelerator.backward(loss * share)
            self._tell_plan()
            total += loss.detach().float() * share / processes
        mean = float(self.accelerator.reduce(total, "sum"))
        reached = step > 0 or any(bool(p.grad.any()) for p in self.prompted.encoder.parameters() if p.grad is not None)
        norm = float(self.accelerator.clip_grad_norm_(self.prompted.parameters(), self.settings.max_grad_norm))
        self._check(step, mean, norm, reached)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mean

    def _tell_plan(self) -> None:
        plans = self.prompted.backbone.plans
        if plans.last not in self.plans_told:
            self.plans_told.add(plans.last)
            self.reporter.planned(plans.last, plans.why)

    def _check(self, step: int, loss: float, gradient_norm: float, reached: bool) -> None:
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise TrainingError(
                f"at step {step + 1} the loss is {loss} and its gradient {gradient_norm}: lower training.learning_rate "
                f"(now {self.settings.learning_rate:g}), or use model.dtype float32 or bfloat16 if it is float16"
            )
        if not reached:
            raise TrainingError(
                "no gradient reaches the virtual tokens at the first step; the loss does not depend on them"
            )

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Score dev by the very path that serves, keep the best rows, save."""
        self.prompted.eval()
        self.prompted.use()
        metrics = self.task.evaluate(self.prompted.backbone, self.parts.dev, batch_size=2 * self.settings.batch_size)
        value, sign = metrics[self.task.metric], 1 if self.task.greater_is_better else -1
        progress = self.progress
        if progress.best_metric is None or sign * value > sign * progress.best_metric:
            progress.best_metric, progress.best_step, progress.evaluations_without_gain = value, progress.step, 0
            self.best = {"rows": self.prompted.rows().cpu().clone()} | head_tensors(self.prompted.head)
        else:
            progress.evaluations_without_gain += 1
        progress.history.append({"step": progress.step, **metrics})
        self.reporter.evaluated(progress.step, metrics, best=progress.best_step == progress.step)
        self._track(metrics)
        self._warn(metrics)
        if self.settings.samples and progress.step and self.task.renderer.template.fields:
            some = self.parts.dev[: self.settings.samples]
            answers = self.task.predict(self.prompted.backbone, some, batch_size=len(some))
            self.reporter.sampled(some, answers)
        self._checkpoint()

    def _warn(self, metrics: dict[str, float]) -> None:
        first = self.progress.history[0]
        if self.progress.step and metrics.get("prediction_share", 0.0) >= _CONSTANT_SHARE:
            self.reporter.warned(
                "nearly all predictions are one label: the prompt has learnt nothing yet but the majority; "
                "try another learning rate or seed, or more steps"
            )
        if self.progress.step and metrics["loss"] > _DIVERGED * first["loss"]:
            self.reporter.warned(
                f"dev loss is {metrics['loss']:.3f} and was {first['loss']:.3f} before training: it diverges; "
                "lower training.learning_rate"
            )

    def _checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.folder.checkpoint,
                trained=self.prompted,
                optimizer=self._bare_optimizer,
                progress=self.progress,
                best=self.best,
                random_state=self.random_state,
            )
        self.accelerator.wait_for_everyone()

    def _track(self, values: dict[str, float]) -> None:
        self.folder.log({"step": self.progress.step, **values})
        if self.settings.trackers:
            self.accelerator.log(values, step=self.progress.step)

    def _save(self) -> SoftPrompt:
        self.prompted.use(self.best["rows"])  # there is an evaluation before the first step
        self.task.head = head_from(self.best, self.prompted.backbone.device)
        assessed = assess_dev(self.parts, batch_size=2 * self.settings.batch_size)
        prompt = SoftPrompt(
            rows=self.best["rows"],
            head=self.task.head,
            deep=self.prompted.deep,
            temperature=assessed and assessed[0].temperature,
            template=self.task.renderer.template.source,
            task=self.config.task,
            max_length=self.config.prompt.max_length,
            overlong=self.task.renderer.overlong,
            encoder=self.config.prompt.encoder,
            backbone_name=self.config.model.name,
            fingerprint=self.prompted.backbone.fingerprint(),
            summary=summary(self.config, self.parts, self.progress, self.task),
        )
        if self.accelerator.is_main_process:
            prompt.save(self.folder.path)
        if assessed is not None:
            self.folder.assessed(assessed[0].values())
            self.reporter.assessed(*assessed)
        self.accelerator.wait_for_everyone()
        if self.settings.trackers:
            self.accelerator.end_training()
        comparison = compare_with_bare_model(self.parts)
        self.reporter.finished(prompt, self.progress, comparison)
        if comparison is not None and comparison.nothing_changed:
            self.reporter.warned("the prompt changes no answer: train longer, or at another learning rate")
        return prompt


class StepPlan:
    """Which examples each step learns from, at which rate, and when dev is evaluated: all from settings and seed."""

    def __init__(self, lengths: Sequence[int], settings: TrainingConfig, processes: int = 1) -> None:
        self._lengths, self._settings = lengths, settings
        self._window = settings.gradient_accumulation_steps * processes
        batches = math.ceil(len(lengths) / settings.batch_size)
        self.steps_per_epoch = math.ceil(batches / self._window)
        self.total_steps = settings.max_steps or max(1, math.ceil(settings.epochs * self.steps_per_epoch))
        count = min(settings.evaluations, self.total_steps)
        self.evaluation_steps = {round(self.total_steps * k / count) for k in range(1, count + 1)}
        self._epoch: int | None = None
        self._batches: list[list[int]] = []

    def window(self, step: int) -> list[list[int]]:
        """Return the batches of one optimizer step, over all processes, as indices of examples."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + epoch)
            self._batches = length_grouped_batches(self._lengths, self._settings.batch_size, generator)
            self._epoch = epoch
        return self._batches[place * self._window : (place + 1) * self._window]

    def rate(self, step: int) -> float:
        """Return the share of the learning rate at a step: warm-up, then linear, cosine or constant."""
        warmup = math.ceil(self._settings.warmup_ratio * self.total_steps)
        if step < warmup:
            return (step + 1) / warmup
        rest = (step - warmup) / max(1, self.total_steps - warmup)
        if self._settings.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * rest))
        return 1.0 if self._settings.schedule == "constant" else 1 - rest


def _accelerator(config: RunConfig) -> Accelerator:
    settings = config.training
    try:
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            cpu=config.model.device == "cpu",
            log_with=list(settings.trackers) or None,
            project_dir=str(config.output / "run"),
        )
    except ValueError as error:  # accelerate keeps one precision for the life of a process, and knows its trackers
        raise ConfigError(
            f"training.mixed_precision {settings.mixed_precision} with training.trackers {list(settings.trackers)}: "
            f"{error}"
        ) from error
    installed = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    missing = sorted(set(settings.trackers) - installed)
    if missing:
        raise MissingExtraError(
            f"training.trackers names {', '.join(missing)}, which is not installed; install it, or leave it out"
        )
    return accelerator


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into an event while the block runs; a second Ctrl-C stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before: dict[int, Any] = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
