"""One page on a soft prompt: how its run went, where it errs, how sure it may be, what its virtual tokens are near.

The page is a single HTML file: no script, nothing fetched, readable in light and dark. Every text of the user's is
escaped. Knows what there is to tell, and neither files nor models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ptune.reports.pictures import check_matplotlib, curves, reliability_diagram
from ptune.reports.story import Story, last_name
from ptune.soft_prompts.nearest_words import Word
from ptune.tasks.calibration import Bin, calibration_error

_MOST_LABELS = 30
"""Of more labels a page shows the confusions that happen most, instead of all."""
_MOST_CONFUSIONS = 25
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1c1e21; --faint: #63676e; --rule: #d9dce1;
  --share: 37, 99, 235; --line0: #2563eb; --line1: #d97706; --line2: #059669; --line3: #9333ea; }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --ink: #e6e8eb; --faint: #9aa0a8; --rule: #34383e;
  --share: 96, 165, 250; --line0: #60a5fa; --line1: #fbbf24; --line2: #34d399; --line3: #c084fc; } }
body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.note { color: var(--faint); max-width: 44rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--faint); } tr + tr > * { border-top: 1px solid var(--rule); }
td.number, th.number { text-align: right; }
table.confusion td { text-align: right; padding: .25rem .5rem; min-width: 2rem; border: 1px solid var(--rule); }
table.confusion th { padding: .25rem .5rem; white-space: nowrap; }
.wide { overflow-x: auto; } figure { margin: 0 0 1rem; } svg { max-width: 100%; height: auto; font-family: inherit; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: start; }
code, pre { font: 13px/1.45 ui-monospace, monospace; } pre { border: 1px solid var(--rule); padding: .8rem;
  overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
code { overflow-wrap: anywhere; white-space: pre-wrap; }
"""


def report_page(story: Story) -> str:
    """Return the page.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    check_matplotlib()
    answers = (*_assessment(story.assessment), *_comparison(story.comparison))
    sections = [*_head(story), *_run(story), *answers, *_words(story), *_settings(story)]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{escape(story.name)}</title><style>{_STYLE}</style></head><body>",
            *sections,
            "</body></html>\n",
        ]
    )


def _head(story: Story) -> Iterator[str]:
    described, summary = story.described, story.described["summary"]
    task, encoder = described["task"], described["encoder"]
    yield f"<h1>{escape(story.name)}</h1>"
    yield (
        f'<p class="note">A soft prompt of {described["virtual_tokens"]} virtual tokens that teaches '
        f"{escape(last_name(described['backbone']))}, frozen, a task of type {escape(task['type'])}.</p>"
    )
    facts = {
        "template": f"<code>{escape(described['template'])}</code>",
        "labels": ", ".join(
            f"{escape(label)} <code>{escape(words)}</code>" for label, words in task.get("verbalizer", {}).items()
        ),
        "encoder": escape(", ".join(f"{name} {value}" for name, value in (encoder or {}).items() if value is not None)),
        "temperature": "" if described["temperature"] is None else f"{described['temperature']:.3g}",
        "trained on": escape(
            ", ".join(
                text
                for text in (
                    f"{summary['train_examples']} examples" if "train_examples" in summary else "",
                    last_name(str(summary.get("data") or "")),
                )
                if text
            )
        ),
        "steps": _text(summary.get("steps")),
        "seconds": _text(summary.get("seconds")),
        "date": _text(summary.get("date")),
        "versions": escape(", ".join(f"{name} {value}" for name, value in summary.get("versions", {}).items())),
    }
    yield _table([(f"<th>{name}</th>", f"<td>{value}</td>") for name, value in facts.items() if value])
    before, after = summary.get("before") or {}, summary.get("after") or {}
    if after:
        rows: list[Sequence[str]] = [
            ("<th>on held-out records</th>", '<th class="number">before</th>', '<th class="number">after</th>')
        ]
        for metric, value in after.items():
            numbers = (f'<td class="number">{_number(one)}</td>' for one in (before.get(metric), value))
            rows.append((f"<td>{escape(metric)}</td>", *numbers))
        yield "<h2>What was gained</h2>" + _table(rows)


def _run(story: Story) -> Iterator[str]:
    yield "<h2>The run</h2>"
    if not story.log:
        yield f'<p class="note">{escape(story.no_log)}</p>'
        return
    summary = story.described["summary"]
    names = {"train_loss": "training", "loss": "held-out"}
    losses = {shown: points for name, shown in names.items() if (points := _points(story.log, name))}
    chosen = dict.fromkeys((summary.get("metric"), "accuracy", "macro_f1"))
    shares = {name: points for name in chosen if name and name != "loss" and (points := _points(story.log, name))}
    drawn = [curves(losses, "loss", summary.get("best_step"))] if losses else []
    drawn += [curves(shares, "on held-out records", summary.get("best_step"))] if shares else []
    yield '<div class="pictures">' + "".join(f"<figure>{picture}</figure>" for picture in drawn) + "</div>"


def _assessment(assessment: Mapping[str, Any] | None) -> Iterator[str]:
    if assessment is None:
        return
    data = assessment.get("data") and last_name(assessment["data"])
    on = f"{assessment.get('records')} records of {data}" if data else f"{assessment.get('records')} held-out records"
    labels, confusion = assessment["labels"], assessment["confusion"]
    yield f"<h2>Which label is taken for which</h2><p class='note'>On {escape(on)}.</p>"
    yield _confusion(labels, confusion) if len(labels) <= _MOST_LABELS else _confusions(labels, confusion)
    calibration = assessment["calibration"]
    before, after = ([Bin(**one) for one in calibration[name]] for name in ("before", "after"))
    temperature = calibration["temperature"]
    yield "<h2>How sure it may be</h2>"
    said = f"Calibration error {calibration_error(before):.3f} as scores are"
    if temperature is not None:
        said += f", {calibration_error(after):.3f} with the temperature {temperature:.3g}, which changes no label"
    if temperature is not None and not data:
        said += " and was fitted on these very records"
    yield f'<p class="note">{said}. A point on the dotted line is as often right as it is sure; its size is how many '
    yield "records it stands for.</p>"
    yield f"<figure>{reliability_diagram(before, after if temperature is not None else None)}</figure>"


def _comparison(comparison: Mapping[str, Any] | None) -> Iterator[str]:
    if comparison is None:
        return
    shift, off_task = comparison["shift"], comparison["off_task"]
    moved = "" if shift is None else f"; probabilities move by {shift:.2f} on average"
    yield "<h2>With and without the prompt</h2>"
    yield f'<p class="note">{comparison["changed"]} of {comparison["total"]} held-out answers differ{moved}.</p>'
    if off_task is not None:
        names = {"question": "off the task", "without": "bare model", "with": "with prompt"}
        yield _table([(f"<th>{shown}</th>", f"<td>{escape(off_task[name])}</td>") for name, shown in names.items()])


def _confusion(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    head = ("<th>right label</th>", *(f'<th class="number">{number}</th>' for number, _ in enumerate(labels, 1)))
    rows: list[Sequence[str]] = [head]
    for number, (label, counts) in enumerate(zip(labels, confusion, strict=True), 1):
        whole = max(1, sum(counts))
        cells = (
            f'<td style="background: rgba(var(--share), {0.65 * count / whole:.2f})">{count}</td>' for count in counts
        )
        rows.append((f"<th>{number} {escape(label)}</th>", *cells))
    note = '<p class="note">A row for each right label, a column for the given one by its number.</p>'
    return note + '<div class="wide">' + _table(rows, "confusion") + "</div>"


def _confusions(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    wrong = [
        (count, labels[right], labels[given])
        for right, counts in enumerate(confusion)
        for given, count in enumerate(counts)
        if count and right != given
    ]
    rows = [("<th>right label</th>", "<th>given instead</th>", '<th class="number">records</th>')]
    for count, right, given in sorted(wrong, key=lambda one: -one[0])[:_MOST_CONFUSIONS]:
        rows.append((f"<td>{escape(right)}</td>", f"<td>{escape(given)}</td>", f'<td class="number">{count}</td>'))
    return f'<p class="note">Of {len(labels)} labels the confusions that happen most.</p>' + _table(rows)


def _words(story: Story) -> Iterator[str]:
    yield "<h2>Nearest words of each virtual token</h2>"
    if story.words is None:
        yield f'<p class="note">{escape(story.no_words)}</p>'
        return
    yield (
        '<p class="note">Read little into them: the model reads directions that no word has. Beside each word its '
        "cosine similarity, or its distance from the virtual token.</p>"
    )
    rows: list[Sequence[str]] = [
        ("<th>token</th>", '<th class="number">norm</th>', "<th>by cosine</th>", "<th>by distance</th>")
    ]
    for one in story.words:
        columns = (_near(one.by_cosine, "cosine"), _near(one.by_distance, "distance"))
        rows.append(
            (
                f"<td>{one.virtual_token}</td>",
                f'<td class="number">{one.norm:.2f}</td>',
                *(f"<td>{column}</td>" for column in columns),
            )
        )
    yield _table(rows)


def _near(words: Sequence[Word], measure: str) -> str:
    return ", ".join(f"<code>{escape(repr(word.text))}</code>&nbsp;{getattr(word, measure):.2f}" for word in words)


def _settings(story: Story) -> Iterator[str]:
    if story.settings is not None:
        yield f"<h2>Settings</h2><pre>{escape(story.settings)}</pre>"


def _table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f"<table{named}>" + "\n".join("<tr>" + "".join(row) + "</tr>" for row in rows) + "</table>"


def _points(log: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in log if isinstance(line.get(name), int | float)]


def _text(value: Any) -> str:
    return "" if value is None else escape(str(value))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
