"""A real server on a free port, for tests: tiny model, a folder of soft prompts, uvicorn in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
import uvicorn
from soft_prompts import make
from tiny_models import tiny_model, tiny_tokenizer

from ptune.config.task import (
    ChoiceConfig,
    ClassificationConfig,
    ExtractionConfig,
    GenerationConfig,
    LinearClassificationConfig,
    TaggingConfig,
)
from ptune.engine.engine import Engine
from ptune.models.backbone import Backbone
from ptune.prompts.linear_head import LinearHead
from ptune.serve.app import create_app
from ptune.serve.settings import ServeSettings
from ptune.soft_prompts.soft_prompt import SoftPrompt


def tiny_backbone() -> Backbone:
    return Backbone(tiny_model("llama"), tiny_tokenizer(), "tiny")


def rows(backbone: Backbone, count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, backbone.hidden_size, generator=torch.Generator().manual_seed(seed)) * 0.3


def soft_prompts(backbone: Backbone) -> dict[str, SoftPrompt]:
    """Return soft prompts of all tasks, lengths and places, by name."""
    mood = make(backbone, rows=rows(backbone, 4, 1), max_length=None)
    words = ClassificationConfig(verbalizer={"food": " good soup", "film": " good film", "none": " bad"})
    answer = make(
        backbone,
        rows=rows(backbone, 3, 3),
        template="[P*3]Human: {instruction}[?\n{input}]\nAssistant: {answer}",
        task=GenerationConfig(max_new_tokens=12),
        max_length=None,
        overlong="cut",
    )
    return {
        "mood": mood,
        "team/topic": replace(mood, rows=rows(backbone, 5, 2), template="[P*2]{text}[P*3]:{answer}", task=words),
        "chooser": replace(mood, template="[P*4]{text}{answer}", task=ChoiceConfig(choices=("one", "two"))),
        "answer": answer,
        "brief": replace(answer, rows=rows(backbone, 3, 9), task=GenerationConfig(max_new_tokens=5)),
    }


def soft_prompts_with_heads(backbone: Backbone) -> dict[str, SoftPrompt]:
    """Return soft prompts that are read by a linear head, and such that write entities out, by name."""
    mood, tags = soft_prompts(backbone)["mood"], ("B-FOOD", "I-FOOD", "B-FILM", "O")
    labels = ("food", "film", "room", "door", "song")
    linear = replace(mood, task=LinearClassificationConfig(labels=labels), head=_head(backbone, len(labels)))
    entities = ExtractionConfig(types={"FOOD": "good", "FILM": "film"}, max_new_tokens=9)
    of_text = replace(mood, template="[P*4]{text} {domain}\n{answer}", task=entities, overlong="cut")
    return {
        "topic": linear,
        "topics": replace(linear, task=LinearClassificationConfig(labels=labels, multi_label=True)),
        "tags": replace(
            mood,
            template="[P*4]{tokens}",
            task=TaggingConfig(tags=tags),
            head=_head(backbone, len(tags)),
            max_length=40,
            overlong="cut",
        ),
        "entities": replace(of_text, template="[P*4]{tokens}\n{answer}"),
        "entities/of_text": of_text,
    }


def _head(backbone: Backbone, outputs: int) -> LinearHead:
    states = torch.randn(8, backbone.hidden_size, generator=torch.Generator().manual_seed(5))
    return LinearHead.new(outputs, states, seed=outputs)


@dataclass
class Served:
    """A running server, and what asks it."""

    url: str
    folder: Path
    backbone: Backbone
    http: httpx.Client
    openai: openai.OpenAI
    forwards: list[int] = field(default_factory=list)  # rows of each forward pass
    before_forward: list[Any] = field(default_factory=list)  # called before each of them

    def metric(self, name: str) -> float:
        text = self.http.get("/metrics").text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


@contextmanager
def serving(backbone: Backbone, folder: Path, *, tokens: tuple[str, ...] = (), **settings: Any) -> Iterator[Served]:
    """Serve a backbone and a folder while the block runs."""
    with Engine(backbone) as engine:
        app = create_app(engine, folder, ServeSettings(**{"watch_seconds": 0.05, **settings}), tokens)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=20))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        key = tokens[0] if tokens else "none"
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=url, timeout=60, headers=headers) as http:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)
            served = Served(url, folder, backbone, http, client)

            def hook(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
                served.forwards.append(len(named["input_ids"]))
                for listener in served.before_forward:
                    listener()

            handle = backbone.model.register_forward_pre_hook(hook, with_kwargs=True)
            try:
                yield served
            finally:
                handle.remove()
                server.should_exit = True
                thread.join()
