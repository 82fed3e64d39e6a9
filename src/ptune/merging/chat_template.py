"""The chat template of a merged model: the `Renderer` said in Jinja, for one task or for many.

What a record puts in is stripped and joined as `filling.filled` does it, and text between two runs of virtual tokens is
one string, so that the tokenizer, which cuts a text at special tokens, sees what ptune's own rendering shows it. Only
filters and slices are used, no methods of Python's strings, for engines that are not written in Python run it, too.

A text that spells the name of a virtual token would become it: names begin with a mark that no text has by chance, and
in what a user says the mark is broken by a blank.

A conversation goes on as in `ptune.rendering.renderer`: the first turn carries the virtual tokens, and an answer that
is not the last ends as it did in training. Cutting at ``max_length`` is not done. Knows templates, and nothing of
models or files.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from keyword import iskeyword
from typing import TypeAlias

from ptune.rendering.further import Further
from ptune.template import Answer, Bos, Field, Optional, Piece, Template, Text, Virtual

_RESERVED = {
    *("messages", "task", "tasks", "fields", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens", "conversation", "content", "ns"),
    *("range", "dict", "namespace", "loop", "lipsum", "cycler", "joiner", "raise_exception", "strftime_now", "add"),
    *("true", "false", "none", "True", "False", "None", "self", "super", "caller", "varargs", "kwargs", "context"),
    *("block", "macro", "call", "set", "endif", "endfor", "elif", "filter", "extends", "include", "do", "message"),
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
}


Form: TypeAlias = tuple[tuple[Piece, ...], Further]


@dataclass(frozen=True)
class TaskShape:
    """One task as the chat template needs it.

    Attributes:
        pieces: of its template, with [bos] in its place.
        first: number of its first virtual token among all of the merged model.
        further: how a conversation goes on behind an answer.
    """

    pieces: tuple[Piece, ...]
    first: int
    further: Further

    @property
    def form(self) -> Form:
        """What tasks may have in common: all but the virtual tokens' numbers."""
        return self.pieces, self.further


@dataclass(frozen=True)
class Words:
    """How a tokenizer's own tokens and a virtual token are written.

    Attributes:
        mark: what every virtual token's name begins with.
        bos: what stands for [bos] in a template, as text.
        opening: the tokens that a tokenizer puts before any text, as text; often the same, or nothing.
        leading_blank: a text behind a special token needs a blank in front to be tokenised as if it stood alone.
    """

    mark: str
    bos: str
    opening: str
    leading_blank: bool = False


def chat_template(tasks: Mapping[str, TaskShape], words: Words, own: str | None) -> str:
    """Return the template, in Jinja.

    The task is the one that ``task`` names; where it is None or not given, the only one there is. Where it is empty,
    or not given and there are many, the bare model is shown: by its own chat template, or else the messages' texts
    alone.

    Args:
        tasks: by name.
        words: how tokens are written.
        own: the model's own chat template.
    """
    shapes: dict[Form, int] = {}
    for shape in tasks.values():
        shapes.setdefault(shape.form, len(shapes))
    listed = ", ".join(f"{_literal(name)}: [{shapes[shape.form]}, {shape.first}]" for name, shape in tasks.items())
    only = _literal(next(iter(tasks))) if len(tasks) == 1 else "''"
    lines = [
        "{%- set tasks = {" + listed + "} -%}",
        "{%- set chosen = task if task is defined and task is not none else " + only + " -%}",
        "{%- if chosen and chosen not in tasks -%}",
        "{{- raise_exception('there is no task ' ~ chosen ~ '; the tasks are ' ~ (tasks | join(', '))) -}}",
        "{%- endif -%}",
        "{%- if chosen -%}",
        *_conversation(words, shapes),
        "{%- else -%}",
        *(_bare(words) if own is None else [_as_it_is(own)]),
        "{%- endif -%}",
    ]
    return "".join(lines)


def kwarg_of(field: str) -> str | None:
    """Return the name of the variable that holds a field; None where it has to stand in ``fields``."""
    plain = field.isidentifier() and field.isascii() and not iskeyword(field) and not field.startswith("_")
    return field if plain and field not in _RESERVED and field not in ("and", "or", "not", "is", "in", "if") else None


def _conversation(words: Words, shapes: Mapping[Form, int]) -> Iterator[str]:
    yield "{%- set shape = tasks[chosen][0] -%}{%- set first = tasks[chosen][1] -%}"
    yield "{%- if tools is defined and tools -%}{{- raise_exception('a task takes no tools') -}}{%- endif -%}"
    yield "{%- set ns = namespace(text='', body='', tail='', words=false) -%}"
    yield "{%- for message in messages -%}"
    yield "{%- if message['content'] is not string -%}{{- raise_exception('a message is text') -}}{%- endif -%}"
    yield "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
    yield "{{- raise_exception('a task takes messages of user and assistant in turn, and no ' ~ message['role']"
    yield " ~ ' in place ' ~ loop.index) -}}{%- endif -%}"
    yield "{%- if message['role'] == 'assistant' -%}"
    yield "{%- set ns.text = ns.text ~ message['content'] -%}"
    yield "{%- if not loop.last -%}" + _said(words)
    for (_, further), number in shapes.items():
        yield "{%- " + ("if" if number == 0 else "elif") + f" shape == {number} -%}}"
        yield "{{- " + _literal(further.end) + " -}}"
    yield "{%- endif -%}{%- endif -%}{%- else -%}"
    for (pieces, further), number in shapes.items():
        yield "{%- " + ("if" if number == 0 else "elif") + f" shape == {number} -%}}"
        values = yield from _values(Template("", pieces))
        yield "{%- if loop.first -%}"
        yield from _turn(pieces, values, words)
        yield "{%- else -%}"
        yield from _turn(further.words, values, words)
        yield "{%- endif -%}"
    yield "{%- endif -%}{%- endif -%}{%- endfor -%}"
    yield _said(words)


def _values(template: Template) -> Generator[str, None, dict[str, str]]:
    """Yield what sets a variable to each field's text, and return the variables' names by field."""
    fields, optional, question = template.fields, template.optional_fields, template.question_field
    if question is None:
        yield "{%- if message['content'] | trim -%}"
        yield "{{- raise_exception('the template of ' ~ chosen ~ ' has no place for a text') -}}{%- endif -%}"
    for number, field in enumerate(fields):
        if field == question:
            yield f"{{%- set v{number} = message['content'] -%}}"
            continue
        name = kwarg_of(field)
        value = name or f"fields[{_literal(field)}]"
        known = f"{name} is defined" if name else f"fields is defined and {_literal(field)} in fields"
        yield f"{{%- set v{number} = {value} if {known} and {value} is not none else '' -%}}"
        yield f"{{%- if v{number} is not string -%}}"
        yield "{{- raise_exception(" + _literal(f"the field {field} takes text") + ") -}}{%- endif -%}"
        if field not in optional:
            place = "chat_template_kwargs" if name else "chat_template_kwargs.fields"
            yield f"{{%- if not ({known}) -%}}"
            yield "{{- raise_exception('the task ' ~ chosen ~ ' needs the field ' ~ " + _literal(field)
            yield f" ~ ' in {place}') -}}}}{{%- endif -%}}"
    return {field: f"v{number}" for number, field in enumerate(fields)}


def _turn(pieces: Sequence[Piece], values: Mapping[str, str], words: Words) -> Iterator[str]:
    """Yield what adds a user's turn: text collects in ``ns.text`` and is said where a token of another kind stands."""
    offset = 0
    for piece_kind, group in groupby(pieces, key=_kind_of):
        if piece_kind == "text":
            yield "{%- set ns.text = ns.text ~ " + _literal("".join(p.text for p in group if isinstance(p, Text)))
            yield " -%}"
        elif piece_kind == "record":
            yield from _put_in([p for p in group if isinstance(p, Field | Optional)], values)
        elif piece_kind == "virtual":
            count = sum(p.count for p in group if isinstance(p, Virtual))
            yield _said(words)
            yield f"{{%- for k in range(first + {offset}, first + {offset + count}) -%}}"
            yield "{{- " + _literal(words.mark + ":") + " ~ k ~ '|>' -}}{%- endfor -%}"
            offset += count
        elif piece_kind == "bos":
            yield _said(words) + "{{- " + _literal(words.bos) + " -}}"


def _put_in(pieces: Sequence[Field | Optional], values: Mapping[str, str]) -> Iterator[str]:
    """Yield what adds neighbouring fields and optional pieces, stripped together as `filling.filled` does it."""
    if len(pieces) == 1 and isinstance(pieces[0], Field):
        yield f"{{%- set ns.text = ns.text ~ ({values[pieces[0].name]} | trim) -%}}"
        return
    yield "{%- set ns.body = '' -%}{%- set ns.tail = '' -%}{%- set ns.words = false -%}"
    for piece in pieces:
        if isinstance(piece, Field):
            yield f"{{%- set ns.tail = ns.tail ~ {values[piece.name]} -%}}"
            continue
        names = [values[p.name] for p in piece.pieces if isinstance(p, Field)]
        yield "{%- if " + " or ".join(f"({name} | trim)" for name in names) + " -%}"
        for inner in piece.pieces:
            if isinstance(inner, Field):
                yield f"{{%- set ns.tail = ns.tail ~ {values[inner.name]} -%}}"
            else:
                # blanks in front of the first words go: the x behind keeps the others from the trim
                yield "{%- if not ns.words -%}{%- set ns.tail = ((ns.tail ~ 'x') | trim)[:-1] -%}{%- endif -%}"
                yield "{%- set ns.body = ns.body ~ ns.tail ~ " + _literal(inner.text) + " -%}"
                yield "{%- set ns.tail = '' -%}{%- set ns.words = true -%}"
        yield "{%- endif -%}"
    yield "{%- if ns.words -%}{%- set ns.tail = (('x' ~ ns.tail) | trim)[1:] -%}"
    yield "{%- else -%}{%- set ns.tail = ns.tail | trim -%}{%- endif -%}"
    yield "{%- set ns.text = ns.text ~ ns.body ~ ns.tail -%}"


def _said(words: Words) -> str:
    """Return what prints the text collected so far: no part of it spells a virtual token."""
    broken = _literal(f"{words.mark[0]} {words.mark[1:]}")
    said = "{%- set ns.text = ns.text | replace(" + _literal(words.mark) + ", " + broken + ") -%}"
    if words.leading_blank:
        said += "{%- if ns.text and ns.text[0] != ' ' -%}{{- ' ' -}}{%- endif -%}"
    return said + "{{- ns.text -}}{%- set ns.text = '' -%}"


def _bare(words: Words) -> Iterator[str]:
    yield "{%- set ns = namespace(text='') -%}{%- for message in messages -%}"
    yield "{%- if not loop.first -%}{%- set ns.text = ns.text ~ '\\n\\n' -%}{%- endif -%}"
    yield "{%- set ns.text = ns.text ~ message['content'] -%}{%- endfor -%}"
    if words.opening:
        yield "{{- " + _literal(words.opening) + " -}}"
    yield _said(words)


def _as_it_is(own: str) -> str:
    """Return another template so that it renders within ours as it does alone: Jinja drops one last line break."""
    return "{{ '' }}" + own.removesuffix("\n") + "{{ '' }}"


def _kind_of(piece: Piece) -> str:
    if isinstance(piece, Text):
        return "text"
    if isinstance(piece, Field | Optional):
        return "record"
    if isinstance(piece, Virtual):
        return "virtual"
    return "bos" if isinstance(piece, Bos) else "answer" if isinstance(piece, Answer) else ""


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a string of JSON is one of Jinja, too
