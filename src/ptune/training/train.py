"""The training loop, on accelerate: a short loop that can be read, stopped at any moment, and gone on with.

What is trained is tiny, so the whole state is one file (`checkpoint`), and a resumed run ends bit for bit as the
unbroken one does, on one process and with as many threads: the order of examples follows from seed and epoch alone,
the encoder's dropout from the saved random state. The loss of an optimizer step is weighted by what is supervised in
it, so 1 x 8 equals 8 x 1.

Knows nothing of the command line or HTTP; what is shown while it runs is a `Reporter`'s business.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import parse_flag_from_env

from ptune.config.run import RunConfig
from ptune.errors import ConfigError, MissingExtraError, Stopped
from ptune.models.backbone import Backbone
from ptune.pretrained.loading import find_device
from ptune.records.record import Record
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.task import Example
from ptune.training.assembly import Parts, assemble, train_and_dev_records
from ptune.training.checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from ptune.training.ending import save_best, tell_the_end
from ptune.training.kept_contexts import keep_contexts
from ptune.training.learner import Learner
from ptune.training.rehearsal import rehearse
from ptune.training.reporting import Reporter
from ptune.training.run_folder import RunFolder
from ptune.training.stopping import stop_signal


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
    accelerator = _accelerator(config, None if backbone is None else backbone.device)
    before = random_state()
    shard = config.training.shard_backbone and accelerator.num_processes > 1
    if shard and backbone is not None:
        raise ConfigError(
            "training.shard_backbone shares out a model that a run loads itself, and a loaded one was given; leave one "
            "of the two out, and train one soft prompt at a time"
        )
    with RunFolder(config, resume=resume, overwrite=overwrite, writes=accelerator.is_main_process) as folder:
        if records is None:  # read before a model is loaded, which takes its time
            records = train_and_dev_records(config)
        if backbone is None:
            model = config.model
            if model.device == "auto" and accelerator.num_processes > 1:  # each process has a device of its own
                model = model.model_copy(update={"device": str(accelerator.device)})
            backbone = Backbone.load(model, shard=shard)
        parts = assemble(config, backbone, records)
        try:
            with parts.prompted, backbone.left_as_it_was():
                rehearse(parts)
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
        self.prompted.backbone.plan = self.settings.plan
        self.learner = Learner(config, parts, accelerator.num_processes)
        self.schedule, self.bare_optimizer = self.learner.schedule, self.learner.optimizer
        self.model, self.learner.optimizer = accelerator.prepare(self.prompted, self.learner.optimizer)
        self.progress = self.learner.progress
        self.plans_told: set[str] = set()
        going_on = folder.checkpoint.exists()
        if going_on:
            self._resume()
        folder.go_on_after(self.progress.step if going_on else -1)
        accelerator.wait_for_everyone()  # else the first to go on writes a checkpoint that another takes for an old one

    def _resume(self) -> None:
        self.progress, best, state = load_checkpoint(
            self.folder.checkpoint, trained=self.prompted, optimizer=self.bare_optimizer, origin=self.parts.origin()
        )
        self.learner.progress, self.learner.best, self.learner.random_state = self.progress, best, state

    def finish(self) -> SoftPrompt:
        """Train to the end and save the best soft prompt."""
        self.reporter.started(self.config, self.parts, self.schedule.total_steps, self.progress.step)
        for note in self.parts.notes:
            self.reporter.warned(note)
        if self.settings.shard_backbone and self.accelerator.num_processes == 1:
            self.reporter.warned(
                "training.shard_backbone shares nothing out, for there is one process; start it by torchrun or "
                "accelerate launch"
            )
        with stop_signal() as stop:
            keep_contexts([self.learner], self.reporter)
            if not self.progress.history:
                self._evaluate()
            self._steps(stop)
        if stop.is_set():
            raise Stopped(f'stopped after step {self.progress.step}; "ptune train ... --resume" goes on')
        return self._save()

    def _steps(self, stop: threading.Event) -> None:
        settings, last_save = self.settings, time.monotonic()
        begun, seconds_before = time.monotonic(), self.progress.seconds
        while self.progress.step < self.schedule.total_steps and not self._ends(stop):
            loss = self._step(self.progress.step)
            self.progress.step += 1
            self.progress.seconds = seconds_before + time.monotonic() - begun
            self.learner.random_state = random_state()
            self.reporter.stepped(self.progress.step, loss, self.bare_optimizer.param_groups[0]["lr"])
            if self.progress.step % settings.logging_steps == 0:
                self._track({"train_loss": loss})
            if self.progress.step in self.schedule.evaluation_steps:
                self._evaluate()
                last_save = time.monotonic()
            elif time.monotonic() - last_save >= 60 * settings.checkpoint_minutes:
                self._checkpoint()  # by the clock of each process, so none may wait for another here
                last_save = time.monotonic()
        if stop.is_set():
            self._checkpoint()
            self.accelerator.wait_for_everyone()  # who ends first may be taken for a reason to kill the one that writes

    def _ends(self, stop: threading.Event) -> bool:
        """Whether the run ends before its last step: it was asked to, or the metric gets no better."""
        out_of_patience = self.learner.out_of_patience
        if self.accelerator.num_processes > 1:  # all of them stop where one does, for dev may differ in the last bit
            asked = torch.tensor([float(stop.is_set()), float(out_of_patience)], device=self.accelerator.device)
            stops, patience = self.accelerator.reduce(asked, "sum").tolist()
            out_of_patience = patience > 0
            if stops:
                stop.set()
        if out_of_patience and not stop.is_set():
            self.reporter.stopped_early(self.progress.step, self.settings.patience or 0)
            return True
        return stop.is_set()

    def _step(self, step: int) -> float:
        """Take one optimizer step and return its mean loss."""
        set_random_state(self.learner.random_state)  # evaluation and signals in between leave no trace
        self.model.train()
        self.learner.set_rate(step)
        window = self.schedule.window(step)  # one list of examples for each forward of this step, over all processes
        weight = self.learner.weight(window)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes

        def forwards_of(process: int) -> list[list[Example]]:
            return self.learner.forwards(window[process::processes] or [window[0]])

        mine = forwards_of(rank)
        own = 0 if rank >= len(window) else len(mine)  # a process left without a batch goes along with weight 0
        if self.prompted.backbone.sharded:  # and one that has fewer, for layers are gathered by all at once
            mine += mine[:1] * (max(len(forwards_of(one)) for one in range(processes)) - len(mine))
        total = torch.zeros((), device=self.prompted.backbone.device)
        for number, examples in enumerate(mine, 1):
            share = 1.0 if number <= own else 0.0
            synchronised = nullcontext() if number == len(mine) else self.accelerator.no_sync(self.model)
            with synchronised:
                loss = self.task.loss(self.model, examples, self.prompted.backbone.tokenizer.pad_token_id)
                self.accelerator.backward(loss * share)
            self._tell_plan()
            total += loss.detach().to(total) * share
        self.learner.scale_gradients(processes / weight)  # processes average theirs
        mean = float(self.accelerator.reduce(total, "sum")) / weight
        self.learner.finish_step(mean, self.accelerator.clip_grad_norm_)
        return mean

    def _tell_plan(self) -> None:
        plans = self.prompted.backbone.plans
        if plans.last not in self.plans_told:
            self.plans_told.add(plans.last)
            self.reporter.planned(plans.last, plans.why)

    def _evaluate(self) -> None:
        metrics = self.learner.evaluate(self.reporter)
        self.learner.answer_samples(self.reporter)
        self._track(metrics)
        self._checkpoint()

    def _checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.folder.checkpoint,
                trained=self.prompted,
                optimizer=self.bare_optimizer,
                progress=self.progress,
                best=self.learner.best,
                random_state=self.learner.random_state,
                origin=self.parts.origin(),
            )

    def _track(self, values: dict[str, float]) -> None:
        self.folder.log({"step": self.progress.step, **values})
        if self.settings.trackers:
            self.accelerator.log(values, step=self.progress.step)

    def _save(self) -> SoftPrompt:
        prompt = save_best(self.learner, self.folder, self.reporter, writes=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        if self.settings.trackers:
            self.accelerator.end_training()
        tell_the_end(self.parts, prompt, self.progress, self.folder, self.reporter)
        return prompt


def _accelerator(config: RunConfig, given: torch.device | None) -> Accelerator:
    """Return accelerate's face of this process, which leaves everything on the device where it is.

    Args:
        config: the settings.
        given: the device of a backbone that is loaded already, which goes before the settings'.

    Raises:
        ConfigError: accelerate is set up otherwise, or was in this process by an earlier run.
        MissingExtraError: a tracker is not installed.
    """
    settings, device = config.training, config.model.device if given is None else str(given)
    for flag in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{flag}"):
            raise ConfigError(
                f"accelerate is set up for {flag}, which would cut the little that is trained in parts; leave it out "
                "there, and set training.shard_backbone to share out the frozen model"
            )
    if device.startswith("cuda:"):
        torch.cuda.set_device(find_device(device))  # the accelerator takes the current one
    try:
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            device_placement=False,
            cpu=device == "cpu" and not is_initialized(),  # it keeps the device of an earlier run, and refuses another
            log_with=list(settings.trackers) or None,
            project_dir=str(config.output / "run"),
        )
    except ValueError as error:  # accelerate keeps one precision for the life of a process, and knows its trackers
        raise ConfigError(
            f"training.mixed_precision {settings.mixed_precision} with training.trackers {list(settings.trackers)}: "
            f"{error}"
        ) from error
    if settings.mixed_precision != "no" and device.split(":")[0] not in ("auto", accelerator.device.type):
        raise ConfigError(
            f"training.mixed_precision {settings.mixed_precision} is for one device in the life of a process, and an "
            f"earlier run was on {accelerator.device}; start this one, on {device}, in a process of its own"
        )
    installed = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    missing = sorted(set(settings.trackers) - installed)
    if missing:
        raise MissingExtraError(
            f"training.trackers names {', '.join(missing)}, which is not installed; install it, or leave it out"
        )
    return accelerator
