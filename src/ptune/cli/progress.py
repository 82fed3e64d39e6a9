"""Shows a run on the terminal: a progress bar with loss, rate and time left, evaluations, samples, what to do next."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ptune.config.run import RunConfig
from ptune.pretrained.sharding import numbers_held
from ptune.rendering.filling import field_text
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.task import Assessment
from ptune.training.assembly import Parts
from ptune.training.checkpoint import Progress as RunProgress
from ptune.training.comparison import Comparison
from ptune.training.reporting import Reporter

_PERCENT = {"accuracy", "macro_f1", "micro_f1", "exact_match", "prediction_share", "token_accuracy", "parsed"}
_PERCENT |= {"f1", "precision", "recall", "entity_f1", "entity_precision", "entity_recall"}
_PERCENT |= {"rouge_1", "rouge_2", "rouge_l"}
_HIDDEN = {"prediction_share"}


class ProgressReporter(Reporter):
    """A `Reporter` for people. Use as a context manager, so that the bar is taken away at the end."""

    def __init__(self, console: Console | None = None) -> None:
        others = os.environ.get("RANK", "0") != "0"  # of several processes the first one speaks
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=others)
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._config: RunConfig | None = None
        self._fields: tuple[str, ...] = ()

    def started(self, config: RunConfig, parts: Parts, total_steps: int, step: int) -> None:
        """Say what will be trained on what, and show the bar."""
        self._config, self._fields = config, parts.task.renderer.template.fields[:2]
        prompted, backbone = parts.prompted, parts.prompted.backbone
        trained = sum(parameter.numel() for parameter in prompted.parameters())
        total = sum(parameter.numel() for parameter in backbone.model.parameters())
        quantization = backbone.quantization
        rounded = f", weights of {quantization}" if isinstance(quantization, str) else ""
        held = f", {numbers_held(backbone.model):,} of them here" if backbone.sharded else ""
        outputs = 0 if prompted.head is None else len(prompted.head.bias)
        head = f" and a linear head of {outputs} outputs" if outputs else ""
        self.console.print(
            f"[bold]{escape(config.model.name)}[/] {total:,} parameters in "
            f"{str(backbone.dtype).removeprefix('torch.')}{rounded}, all frozen{held}; "
            f"trained: {trained:,} ({100 * trained / (trained + total):.2f}%) "
            f"for {prompted.num_virtual_tokens} virtual tokens{head}"
        )
        notes = [f"{parts.cut} cut to max_length"] if parts.cut else []
        notes += [f"{parts.dropped} left out as too long"] if parts.dropped else []
        self.console.print(
            f"{len(parts.train):,} examples{' (' + ', '.join(notes) + ')' if notes else ''}, "
            f"{len(parts.dev):,} held out, {total_steps:,} steps"
        )
        if step:
            self.console.print(f"going on after step {step}")
        self._task = self._bar.add_task("training", total=total_steps, completed=step, loss="-", rate="")
        self._bar.start()

    def kept_contexts(self, count: int, size: int, *, full: bool) -> None:
        """Say that text before the virtual tokens is run once."""
        more = "; no room for more (training.context_cache)" if full else ""
        self.console.print(
            f"frozen context: {count:,} texts run once and kept, {size / 1e6:,.0f} MB{more}", style="dim"
        )

    def planned(self, plan: str, why: str) -> None:
        """Say how forward passes are carried out."""
        self.console.print(f"plan: {plan} ({escape(why)})", style="dim")

    def stepped(self, step: int, loss: float, learning_rate: float) -> None:
        """Move the bar."""
        speed = self._bar.tasks[0].speed
        self._bar.update(self._task, completed=step, loss=f"{loss:.3f}", rate=f"{speed:.1f} steps/s" if speed else "")

    def evaluated(self, step: int, metrics: Mapping[str, float], *, best: bool) -> None:
        """Print one line of metrics."""
        mark = " [green]best[/]" if best and step else ""
        self.console.print(f"step {step:>6}  {format_metrics(metrics)}{mark}")

    def sampled(self, records: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> None:
        """Print records with their answers, a line each."""
        for record, answer in zip(records, answers, strict=True):
            asked = " | ".join(shorten(text, 50) for name in self._fields if (text := field_text(record, name)))
            self.console.print(f"             [dim]{escape(asked)}[/] -> {escape(shorten(shown(answer), 60))}")

    def warned(self, sentence: str) -> None:
        """Print a warning."""
        self.console.print(f"[yellow]warning:[/] {escape(sentence)}")

    def stopped_early(self, step: int, patience: int) -> None:
        """Say why it ended before its time."""
        self.console.print(f"stopped at step {step}: no better for {patience} evaluations")

    def assessed(self, assessment: Assessment, sentence: str) -> None:
        """Say at which temperature probabilities are given."""
        self.console.print(sentence)

    def finished(self, prompt: SoftPrompt, progress: RunProgress, comparison: Comparison | None) -> None:
        """Say what was gained, how answers differ from the bare model's, and what to do next."""
        self._bar.stop()
        assert self._config is not None
        folder, summary = self._config.output, prompt.summary
        metric = summary["metric"]
        before, after = format_value(metric, summary["before"][metric]), format_value(metric, summary["after"][metric])
        self.console.print(
            f"[bold]{metric} {before} -> {after}[/] (step {summary['best_step']}), {summary['seconds']:.0f} s"
        )
        if comparison is not None:
            print_comparison(self.console, comparison)
        size = (folder / "soft_prompt.safetensors").stat().st_size
        self.console.print(f"saved [bold]{escape(str(folder))}[/]: {size / 1024:.0f} kB of tensors; try")
        verb = "generate" if self._config.task.type == "generation" else "predict"
        self.console.print(
            f"  ptune {verb} {escape(str(folder))} ...\n  ptune inspect {escape(str(folder))}", style="cyan"
        )

    def __enter__(self) -> ProgressReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Say how answers differ from the bare model's, on the task and off it."""
    changed = f"{comparison.changed} of {comparison.total} held-out answers differ"
    shift = "" if comparison.shift is None else f"; probabilities move by {comparison.shift:.2f} on average"
    console.print(f"with and without the prompt, {changed}{shift}")
    if comparison.off_task is not None:
        question, bare, tuned = comparison.off_task
        console.print(f'off task: "{escape(question)}"')
        console.print(f"  bare model   {escape(shorten(bare, 90))}")
        console.print(
            f"  with prompt  {escape(shorten(tuned, 90))}  [dim](leave the prompt out for other questions)[/]"
        )


def shown(answer: Mapping[str, Any]) -> str:
    """Return what a task answered, for people: a label, labels, entities or text."""
    if "spans" in answer:
        return ", ".join(f"{span['text']} ({span['type']})" for span in answer["spans"]) or "no entity"
    if "labels" in answer:
        return ", ".join(f"{label} {answer['probabilities'][label]:.0%}" for label in answer["labels"]) or "no label"
    return f"{answer['label']} {answer['probability']:.0%}" if "label" in answer else answer["text"]


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Return metrics as ``name value`` pairs on one line."""
    return "  ".join(f"{name} {format_value(name, value)}" for name, value in metrics.items() if name not in _HIDDEN)


def format_value(metric: str, value: float) -> str:
    """Return a metric's value as people write it: shares in percent, losses with three digits."""
    return f"{100 * value:.1f}%" if metric in _PERCENT else f"{value:.3f}"


def shorten(text: str, length: int) -> str:
    """Return the text on one line, cut to a length."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
