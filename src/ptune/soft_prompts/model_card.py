"""The model card of a soft prompt: a short ``README.md`` written from what its run saw.

Knows the values that `SoftPrompt.describe` gives, and nothing of tensors or models.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptune.files import write_atomically

CARD = "README.md"
_MARK = "<!-- Written by ptune. Without this line ptune leaves the file alone. -->"


def write_model_card(folder: str | Path, description: Mapping[str, Any]) -> None:
    """Write ``README.md``, unless one stands there that is not ptune's.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = Path(folder) / CARD
    if path.exists() and not is_model_card(path):
        return
    text = model_card(Path(folder).resolve().name, description)
    write_atomically(path, lambda temporary: _write(temporary, text))


def is_model_card(path: Path) -> bool:
    """Whether a file is there and was written by ptune."""
    with contextlib.suppress(OSError):
        return _MARK in path.read_text(encoding="utf-8", errors="replace")
    return False


def model_card(name: str, description: Mapping[str, Any]) -> str:
    """Return the card's Markdown.

    Args:
        name: of the soft prompt's folder.
        description: what `SoftPrompt.describe` returned.
    """
    backbone, count, width = description["backbone"], description["virtual_tokens"], description["width"]
    of_what = f"of width {width}"
    if deep := description.get("deep"):
        of_what = f"at each of {deep['layers']} layers (a deep prompt: {width} numbers of keys and values a token)"
    if head := description.get("head"):
        of_what += f" and a linear head of {head['outputs']} outputs"
    parts = [
        _front_matter(description),
        f"# {name}",
        f"A soft prompt for `{backbone}`: {count} virtual tokens {of_what} that teach the frozen model one "
        f"task, {description['task']['type']}. Its template:",
        "\n".join(f"    {line}" for line in description["template"].splitlines()),
        "## Use",
        _in_ptune(name),
    ]
    if description["loads_in_peft"]:
        parts.append(_in_peft(name, backbone))
    parts += [*_results(description["summary"]), _MARK]
    return "\n\n".join(parts) + "\n"


def _front_matter(description: Mapping[str, Any]) -> str:
    lines = ["---", "library_name: ptune", "tags: [ptune, p-tuning, soft-prompt]"]
    backbone = description["backbone"]
    if backbone.count("/") == 1 and not backbone.startswith((".", "/")) and not Path(backbone).exists():
        lines.append(f"base_model: {backbone}")  # a folder's path would mean nothing to others
    return "\n".join([*lines, "---"])


def _in_ptune(name: str) -> str:
    return "\n".join(
        [
            "```python",
            "from ptune import Engine",
            "",
            f"engine = Engine.for_prompt({_quoted(name)})",
            f"answers = engine.predict({_quoted(name)}, records)  # records: dicts with the template's fields",
            "```",
        ]
    )


def _in_peft(name: str, backbone: str) -> str:
    source = "MINI" if backbone == "mini" else _quoted(backbone)
    lines = [
        "Or in PEFT, on the template's text without its virtual tokens, not padded or padded on the right:",
        "",
        "```python",
        "from peft import PeftModel",
        *(["from ptune import MINI"] if backbone == "mini" else []),
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({source}), {_quoted(name)})",
        "```",
    ]
    return "\n".join(lines)


def _results(summary: Mapping[str, Any]) -> list[str]:
    """Return the sections on metrics and on the run, of what the summary holds."""
    parts = []
    before, after = summary.get("before") or {}, summary.get("after") or {}
    if after:
        rows = [f"| {metric} | {_number(before.get(metric))} | {_number(value)} |" for metric, value in after.items()]
        of = f"{summary['dev_records']} held-out records" if "dev_records" in summary else "held-out records"
        parts += ["## Results", f"On {of}:", "\n".join(["| metric | before | after |", "| --- | --- | --- |", *rows])]
    training = summary.get("training") or {}
    facts = {
        "imported from": _pairs(summary.get("imported")),
        "seed": training.get("seed", summary.get("seed")),
        "steps": summary.get("steps"),
        "training examples": summary.get("train_examples"),
        "data": summary.get("data"),
        "data hash": summary.get("data_hash"),
        "seconds": summary.get("seconds"),
        "date": summary.get("date"),
        "versions": _pairs(summary.get("versions")),
    }
    listed = [f"- {fact}: {value}" for fact, value in facts.items() if value is not None and value != ""]
    return [*parts, "## Run", "\n".join(listed)] if listed else parts


def _pairs(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (values or {}).items() if value is not None)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "-"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a string of JSON is one of Python, too


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
