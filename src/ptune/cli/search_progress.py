"""Shows a search on the terminal: a progress bar, scores of all candidates at each evaluation, the table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from ptune.cli.progress import format_value, print_comparison
from ptune.config.candidates import Candidate
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.task import Assessment
from ptune.training.assembly import Parts
from ptune.training.checkpoint import Progress as RunProgress
from ptune.training.comparison import Comparison
from ptune.training.reporting import SearchReporter

_WHOLE = 16
"""Characters of a value that a narrow terminal does not break: a number or a name, and no template."""


class SearchProgress(SearchReporter):
    """A `SearchReporter` for people. Use as a context manager, so that the bar is taken away at the end."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("[bold]searching"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[running]} candidates"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )

    def search_started(self, candidates: Sequence[Candidate], parts: Parts, total_steps: int) -> None:
        """List the candidates, and show the bar."""
        self.console.print(
            f"[bold]{len(candidates)} candidates[/] on {escape(candidates[0].config.model.name)}, "
            f"{len(parts.train):,} examples, {len(parts.dev):,} held out, {total_steps:,} steps"
        )
        for candidate in candidates:
            self.console.print(f"{candidate.number:>4}  {escape(varied(candidate.varied))}", style="dim")
        self._task = self._bar.add_task("searching", total=total_steps, running=len(candidates))
        self._bar.start()

    def kept_contexts(self, count: int, size: int, *, full: bool) -> None:
        """Say that text before the virtual tokens is run once."""
        more = "; no room for more (training.context_cache)" if full else ""
        self.console.print(f"frozen context: {count:,} texts run once for all, {size / 1e6:,.0f} MB{more}", style="dim")

    def planned(self, plan: str, why: str) -> None:
        """Say how forward passes are carried out."""
        self.console.print(f"plan: {plan} ({escape(why)})", style="dim")

    def went_on(self, step: int, running: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step, running=running)

    def scored(self, step: int, metric: str, values: Mapping[int, float]) -> None:
        """Print the candidates' scores on one line."""
        shown = "  ".join(f"[dim]{number}:[/] {format_value(metric, value)}" for number, value in values.items())
        self.console.print(f"step {step:>6}  {metric}  {shown}")

    def halved(self, step: int, kept: Sequence[int], dropped: Sequence[int]) -> None:
        """Say who goes on."""
        self.console.print(
            f"step {step:>6}  [green]go on:[/] {', '.join(map(str, kept))}; dropped: {', '.join(map(str, dropped))}"
        )

    def warned(self, sentence: str) -> None:
        """Print a warning."""
        self.console.print(f"[yellow]warning:[/] {escape(sentence)}")

    def assessed(self, assessment: Assessment, sentence: str) -> None:
        """Say at which temperature the best prompt's probabilities are given."""
        self.console.print(escape(sentence))

    def finished(self, prompt: SoftPrompt, progress: RunProgress, comparison: Comparison | None) -> None:
        """Say how far the best prompt's answers are from the bare model's."""
        self._bar.stop()
        if comparison is not None:
            print_comparison(self.console, comparison)

    def ranked(self, table: Mapping[str, Any]) -> None:
        """Print the table of all candidates, a column for each varied setting; a narrow terminal breaks long values."""
        names = list(dict.fromkeys(name for row in table["candidates"] for name in row["settings"]))
        shown = Table(Column("", no_wrap=True), box=None, padding=(0, 2, 0, 0))
        for name in names:
            longest = max(len(str(row["settings"].get(name, ""))) for row in table["candidates"])
            shown.add_column(_short(name), no_wrap=longest <= _WHOLE, overflow="fold")
        for heading in (table["metric"], "best step"):
            shown.add_column(heading, no_wrap=True)
        shown.add_column("ended")
        for row in table["candidates"]:
            best = "-" if row["best"] is None else format_value(table["metric"], row["best"])
            mark = f"{row['candidate']} [green]best[/]" if row["candidate"] == table["best"] else str(row["candidate"])
            settings = (escape(str(row["settings"].get(name, ""))) for name in names)
            ended = f"step {row['steps']}" + (f": {escape(row['ended'])}" if row["ended"] else "")
            shown.add_row(mark, *settings, best, str(row["best_step"]), ended)
        self.console.print(shown, soft_wrap=False)

    def __enter__(self) -> SearchProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def varied(settings: Mapping[str, Any]) -> str:
    """Return the settings of a candidate on one line, each by the last part of its name."""
    return "  ".join(f"{_short(name)}={value}" for name, value in settings.items())


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1]
