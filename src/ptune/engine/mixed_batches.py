"""Records of different soft prompts answered together: one batch holds rows of any of them.

A virtual token is an id like any other, so nothing need be switched between rows; each is answered as if alone. Rows of
which logits are read, and rows of which hidden states are, go in batches of their own, as do those of each deep prompt,
which stands before a whole batch.

Knows tasks and backbones, and nothing of engines. Shapes: N places read, V rows of the backbone's input matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ptune.generation.generate import GenerationOptions, generate
from ptune.models.backbone import Backbone
from ptune.tasks.generation import Generation
from ptune.tasks.reading import ReadingTask, in_batches
from ptune.tasks.scoring import ScoringTask
from ptune.tasks.task import Task

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
    answers: dict[int, dict[str, Any]] = {}
    for numbers in _read_alike(questions).values():
        answers |= zip(numbers, _read(backbone, [questions[n] for n in numbers], batch_size), strict=True)
    written = [n for n, (task, _) in enumerate(questions) if isinstance(task, Generation)]
    answers |= zip(written, _written(backbone, [questions[n] for n in written], batch_size), strict=True)
    return [answers[number] for number in range(len(questions))]


def _read_alike(questions: Sequence[Question]) -> dict[tuple[bool, int | None], list[int]]:
    """Return the numbers of questions that may share a pass."""
    groups: dict[tuple[bool, int | None], list[int]] = {}
    for number, (task, _) in enumerate(questions):
        if isinstance(task, ReadingTask):
            deep = task.renderer.first_virtual_id if task.renderer.deep else None
            groups.setdefault((task.reads_states, deep), []).append(number)
    return groups


def _read(backbone: Backbone, questions: Sequence[Question], batch_size: int) -> list[dict[str, Any]]:
    tasks = [task for task, _ in questions if isinstance(task, ReadingTask)]
    rows = [task.rows(record) for task, (_, record) in zip(tasks, questions, strict=True)]
    answers: dict[int, dict[str, Any]] = {}
    scores: dict[ScoringTask, dict[int, Tensor]] = {}
    with torch.no_grad():
        for together in in_batches(rows, batch_size):
            all_rows = [row for n in together for row in rows[n]]
            read = tasks[0].read(backbone, all_rows, backbone.tokenizer.pad_token_id)  # [N, V] or [N, H]
            places = [sum(len(row.read_at) for row in rows[n]) for n in together]
            for number, own in zip(together, read.split(places), strict=True):
                task, record = tasks[number], questions[number][1]
                if isinstance(task, ScoringTask):
                    scores.setdefault(task, {})[number] = task.scores_read(rows[number], own)
                else:
                    answers[number] = task.answer_read(record, rows[number], own, backbone)
        for task, of in scores.items():
            said = task.answers_from([questions[number][1] for number in of], list(of.values()), backbone)
            answers |= zip(of, said, strict=True)
    return [answers[number] for number in range(len(questions))]


def _written(backbone: Backbone, questions: Sequence[Question], batch_size: int) -> list[dict[str, Any]]:
    tasks = [task for task, _ in questions if isinstance(task, Generation)]
    options = [GenerationOptions(max_new_tokens=task.config.max_new_tokens) for task in tasks]
    contexts = [
        task.renderer.question(record, own.max_new_tokens)
        for task, (_, record), own in zip(tasks, questions, options, strict=True)
    ]
    texts = generate(backbone, contexts, options, batch_size=batch_size)
    return [task.answer_from(record, text) for task, (_, record), text in zip(tasks, questions, texts, strict=True)]
