"""A template's words with a record's fields filled in: text in, one string out.

What a record puts in at one place, neighbouring fields and optional pieces taken together, loses the blanks at its two
ends; those between its fields stay. Knows no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from ptune.config.settings import label_text
from ptune.errors import DataError, did_you_mean
from ptune.template import SYSTEM, Field, Optional, Template, Text

WITHOUT_BLANKS = re.compile(r"[\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uff00-\uffef]")
"""A character of a script that writes no blanks between words."""


def filled(pieces: Iterable[Text | Field | Optional], values: Mapping[str, str]) -> str:
    """Return words with fields filled in and empty optional pieces left out."""
    text = ""
    for _, group in groupby(pieces, key=lambda piece: isinstance(piece, Text)):
        together = list(group)
        text += "".join(p.text for p in together if isinstance(p, Text)) or _put_in(together, values)
    return text


def record_of_text(template: Template, text: str, others: Mapping[str, str], name: str) -> dict[str, str]:
    """Return the record in which a text stands for the template's first field, that of a system message apart.

    Args:
        template: whose fields are filled.
        text: of the first field.
        others: further fields; optional ones may be absent, and are then empty.
        name: of the soft prompt, for messages.

    Raises:
        DataError: the template has no field, needs more of them, has none of a given name, or the text's own is given.
    """
    fields = template.fields
    question = check_fields(fields, others, f' of "{name}"')
    known = (question, *template.optional_fields, *others)
    needed = [field for field in fields if field not in known]
    if needed:
        raise DataError(
            f'the template of "{name}" needs {", ".join(needed)} beside its first field; it has {", ".join(fields)}'
        )
    return dict.fromkeys(fields, "") | {question: text} | dict(others)


def check_fields(fields: Sequence[str], others: Iterable[str], whose: str = "") -> str:
    """Return the field that a text stands for: the first, that of a system message apart.

    Args:
        fields: of the template.
        others: names of the fields that are given beside the text.
        whose: the template is, for messages, as in ``the template of "film"``.

    Raises:
        DataError: there is no field for a text, or none of a given name, or the text's own is given.
    """
    question = next((name for name in fields if name != SYSTEM), None)
    if question is None:
        raise DataError(f"the template{whose} has no field for a text; give records with the fields that it has")
    for name in others:
        check_field(fields, name, whose)
        if name == question:
            raise DataError(f'the field "{name}" is the text itself, which is given beside it; give one of the two')
    return question


def check_field(fields: Sequence[str], name: str, whose: str = "") -> None:
    """See that a template has a field.

    Args:
        fields: of the template.
        name: the field.
        whose: the template is, for messages.

    Raises:
        DataError: it has not; names those that it has.
    """
    if name not in fields:
        listed = ", ".join(fields)
        raise DataError(
            f'the template{whose} has no field "{name}"; it has {listed}.{did_you_mean(name, list(fields))}'
        )


def _put_in(pieces: Iterable[Text | Field | Optional], values: Mapping[str, str]) -> str:
    """Return what a record puts in at one place: neighbouring fields, and optional pieces whose fields are filled."""
    parts: list[Text | Field] = []
    for piece in pieces:
        if isinstance(piece, Field):
            parts.append(piece)
        elif isinstance(piece, Optional) and any(values[f.name].strip() for f in piece.pieces if isinstance(f, Field)):
            parts += piece.pieces
    texts = [part.text if isinstance(part, Text) else values[part.name] for part in parts]
    for order, strip in ((range(len(parts)), str.lstrip), (range(len(parts) - 1, -1, -1), str.rstrip)):
        for place in order:  # from this end as far as the first words, which keep their blanks
            if isinstance(parts[place], Text):
                break
            texts[place] = strip(texts[place])
            if texts[place]:
                break
    return "".join(texts)


def field_text(record: Mapping[str, Any], name: str) -> str:
    """Return a record's field as text; nothing where it lacks it.

    Raises:
        DataError: it holds something that is no text.
    """
    value = record.get(name)
    if value is None:
        return ""
    if isinstance(value, (str, bool, int, float)):
        return label_text(value)
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return joined(value)
    raise DataError(
        f'{location(record)}: the field "{name}" holds {type(value).__name__}, and a template takes text; '
        "name a field of text, or write the text into one"
    )


def joined(words: Sequence[str]) -> str:
    """Return words as one text: with blanks between them, but not between two Chinese or Japanese ones."""
    text = ""
    for word in words:
        text += gap(text, word) + word
    return text


def gap(text: str, word: str) -> str:
    """Return what stands between a text and a word that follows it: a blank, or nothing."""
    return "" if not text or (WITHOUT_BLANKS.match(text[-1]) and WITHOUT_BLANKS.match(word)) else " "


def lacking(record: Mapping[str, Any], field: str, said: str, mend: str = "") -> DataError:
    """Return the error of a record that lacks a field, which names those that it has and the nearest.

    Args:
        record: that lacks it.
        field: what it lacks.
        said: of the record, as in ``lacks the field "text" that the template names``.
        mend: what to do, where that is more than to correct the record.
    """
    known = [str(key) for key in record]
    listed = ", ".join(known) or "none"
    return DataError(
        f"{location(record)} {said} and has {listed}{f'; {mend}' if mend else ''}.{did_you_mean(field, known)}"
    )


def location(record: Mapping[str, Any]) -> str:
    """Return where a record stands, for messages."""
    return getattr(record, "location", "a record")
