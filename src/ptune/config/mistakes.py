"""What pydantic finds wrong with a value, said to the person who wrote it. Knows no setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list, as in [a, b]",
    "list_type": "a list, as in [a, b]",
    "dict_type": "settings as in {{name: value}}",
    "model_type": "settings as in {{name: value}}",
    "model_attributes_type": "settings as in {{name: value}}",
    "literal_error": "{expected}",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of {ge} or more",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of {le} or less",
    "too_short": "{min_length} entries or more",
    "string_too_short": "text that is not empty",
}


def said_of(entries: Sequence[Mapping[str, Any]], *, null: bool = False) -> str:
    """Return what is wrong with one value, to be put behind its name: `` takes a number, and is 'fast'``.

    Args:
        entries: of ``ValidationError.errors()``, all of one value; several where it may be of several kinds.
        null: whether there may be none.
    """
    found, kind = entries[0]["input"], entries[0]["type"]
    if kind in ("missing", "extra_forbidden"):
        return " is missing" if kind == "missing" else " is unknown"
    wanted = [_WANTED[one["type"]].format(**_limits(one)) for one in entries if one["type"] in _WANTED]
    if len(wanted) < len(entries):
        message = next(one["msg"] for one in entries if one["type"] not in _WANTED).removeprefix("Value error, ")
        shown = "" if isinstance(found, dict) or f'"{found}"' in message else f" (found {_shown(found)})"
        return f": {message[:1].lower()}{message[1:]}{shown}"
    kinds = ", or ".join([*dict.fromkeys(wanted), *(["null"] if null else [])])
    quoted = wanted == ["text"] and isinstance(found, bool | int | float)
    return f" takes {kinds}, and is {_shown(found)}{'; put it into quotes' if quoted else ''}"


def listed(place: str, mistakes: Sequence[str]) -> str:
    """Return one mistake, or several, a line each, behind the ``place`` where they were made, or behind none."""
    behind = f"{place}: " if place else ""
    return behind + (mistakes[0] if len(mistakes) == 1 else "".join(f"\n  - {mistake}" for mistake in mistakes))


def _limits(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what pydantic says beside a mistake, whole numbers as people write them."""
    values = entry.get("ctx", {})
    return {name: int(one) if isinstance(one, float) and one.is_integer() else one for name, one in values.items()}


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value) if isinstance(value, str | int | float | list | tuple) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
