"""Records of different soft prompts answered together: one batch holds rows of any of them.

A virtual token is an id like any other, so nothing need be switched between rows; each is answered as if alone.
Knows tasks and backbones, and nothing of engines. Shapes: S places read, V rows of the backbone's input matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ptune.backbone import Backbone
from ptune.generation import GenerationOptions, generate
from ptune.tasks import Generation, Task
from ptune.tasks.scoring import ScoringTask, logits_read

Question = tuple[Task, Mapping[str, Any]]
"""A record, and the task of the soft prompt that is to answer it."""


def answer_together(backbone: Backbone, questions: Sequence[Question], *, batch_size: int = 32) -> list[dict[str, Any]]:
    """Return each record's answer, in order, as its task's own ``predict`` gives it.

    Args:
        backbone: whose table holds the virtual tokens of all tasks.
        questions: of any mix of soft prompts, lengths and kinds of task.
        batch_size: rows read at once, or texts written at once.

    Raises:
        DataError: a record lacks a field of its template.
        BackboneError: a context leaves no room for an answer.
    """
    answers: list[dict[str, Any] | None] = [None] * len(questions)
    scored = [n for n, (task, _) in enumerate(questions) if isinstance(task, ScoringTask)]
    written = [n for n, (task, _) in enumerate(questions) if isinstance(task, Generation)]
    for numbers, given in (
        (scored, _scored(backbone, [questions[n] for n in scored], batch_size)),
        (written, _written(backbone, [questions[n] for n in written], batch_size)),
    ):
        for number, answer in zip(numbers, given, strict=True):
            answers[number] = answer
    return [answer for answer in answers if answer is not None]


def _scored(backbone: Backbone, questions: Sequence[Question], batch_size: int) -> Iterator[dict[str, Any]]:
    tasks = [task for task, _ in questions if isinstance(task, ScoringTask)]
    rows = [task.rows(record) for task, (_, record) in zip(tasks, questions, strict=True)]
    order = sorted(range(len(rows)), key=lambda number: -max(len(row.ids) for row in rows[number]))
    scores: dict[int, torch.Tensor] = {}
    start = 0
    with torch.no_grad():
        while start < len(order):
            end = start + 1  # as many as fit, and one at least
            while end < len(order) and sum(len(rows[n]) for n in order[start : end + 1]) <= batch_size:
                end += 1
            together = order[start:end]
            logits = logits_read(backbone, [row for n in together for row in rows[n]], backbone.tokenizer.pad_token_id)
            places = [sum(len(row.read_at) for row in rows[n]) for n in together]
            for number, own in zip(together, logits.split(places), strict=True):
                given = tasks[number].scores_of(own, [rows[number]]).float().cpu()
                scores[number] = tasks[number].corrected(given, backbone)[0]
            start = end
    for number, (_, record) in enumerate(questions):
        yield tasks[number].answer_from(record, scores[number])


def _written(backbone: Backbone, questions: Sequence[Question], batch_size: int) -> Iterator[dict[str, Any]]:
    tasks = [task for task, _ in questions if isinstance(task, Generation)]
    lengths = [task.config.max_new_tokens for task in tasks]
    contexts = [task.renderer.question(record, n) for (task, record), n in zip(questions, lengths, strict=True)]
    answers: dict[int, dict[str, Any]] = {}
    for length in dict.fromkeys(lengths):
        numbers = [number for number, own in enumerate(lengths) if own == length]
        options = GenerationOptions(max_new_tokens=length)
        texts = generate(backbone, [contexts[number] for number in numbers], options, batch_size=batch_size)
        for number, text in zip(numbers, texts, strict=True):
            answers[number] = tasks[number].answer_from(questions[number][1], text)
    yield from (answers[number] for number in range(len(questions)))
