"""The scheduler answers all that it took, also what came while it was being closed."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serving import soft_prompts, tiny_backbone

from ptune import Engine
from ptune.serve.jobs import Scoring
from ptune.serve.metrics import Metrics
from ptune.serve.prompts import PromptFolder
from ptune.serve.refusals import RefusedError
from ptune.serve.scheduler import Scheduler
from ptune.serve.settings import ServeSettings


def test_what_came_in_the_last_round_before_closing_is_answered(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    soft_prompts(backbone)["mood"].save(tmp_path / "mood")
    folder = PromptFolder(tmp_path, backbone)
    with Engine(backbone) as engine:
        scheduler = Scheduler(engine, ServeSettings(gather_seconds=0), Metrics())

        def job() -> Scoring:
            return Scoring("/v1/classify", folder.find("mood"), lambda _loaded: [{"text": "great soup"}], 1)

        first, last = job(), job()
        closing = threading.Thread(target=scheduler.close)

        def while_the_first_is_read(*_: Any) -> None:
            handle.remove()
            scheduler.submit([last])
            closing.start()
            while scheduler.alive:
                time.sleep(0.001)

        scheduler.start()
        handle = backbone.model.register_forward_pre_hook(while_the_first_is_read)
        scheduler.submit([first])
        expected = first.future.result(20).answers
        assert last.future.result(5).answers == expected
        closing.join()
        with pytest.raises(RefusedError, match="this server is going down; ask another"):
            scheduler.submit([job()])
