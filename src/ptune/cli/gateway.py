"""`ptune serve --upstream` and `--engine vllm`: the same face over servers that run elsewhere, or a vLLM of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptune.cli.listening import check_extra, checked, json_log, listen, run
from ptune.errors import ConfigError

UPSTREAM_TOKEN = "PTUNE_UPSTREAM_TOKEN"


def serve_gateway(
    upstreams: Sequence[str],
    merged: Path | None,
    embedded: tuple[str, Path] | None,
    vllm: dict[str, Any] | None,
    host: str,
    port: int,
    tokens_file: Path | None,
    drain: int,
    limits: dict[str, Any],
) -> None:
    """Serve what others run.

    Args:
        upstreams: URLs of running servers.
        merged: what they serve, where they are engines over a merged model; what vLLM shall serve.
        embedded: else, where they are engines that take embeddings, the backbone that they run, or vLLM shall run, and
            the folder of soft prompts.
        vllm: ``python``, ``arguments`` and ``start_seconds`` of a vLLM to start; None for none.
        host: to listen on.
        port: to listen on.
        tokens_file: bearer tokens.
        drain: seconds that SIGTERM leaves to requests in flight.
        limits: of `ptune.serve.settings.GatewaySettings`.

    Raises:
        ConfigError: an option is missing or wrong, or vLLM does not start.
        BackboneError: the backbone's rows cannot be read from its files.
    """
    check_extra()
    from ptune.cli.quiet import quiet

    quiet()
    from ptune.serve.embedded_tasks import EmbeddedTasks
    from ptune.serve.gateway import Tasks, create_gateway
    from ptune.serve.merged_tasks import MergedTasks
    from ptune.serve.security import read_tokens
    from ptune.serve.settings import GatewaySettings
    from ptune.serve.stored_backbone import StoredBackbone
    from ptune.serve.vllm_process import running_vllm

    settings = checked(GatewaySettings, **limits)
    for url in upstreams:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f'--upstream takes a URL such as http://10.0.0.1:8000, not "{url}"')
    tasks: Tasks | None = None
    folder, further = merged, []  # what vLLM shall run, and how
    if merged is not None:
        tasks = MergedTasks.read(merged)
    elif embedded is not None:
        backbone = StoredBackbone(embedded[0])
        tasks = EmbeddedTasks(embedded[1], backbone)
        folder, further = backbone.folder, ["--enable-prompt-embeds"]
    tokens = read_tokens(tokens_file)
    log = json_log(__name__)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(listen(host, port))
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # while vLLM loads: it is not left behind
        stack.callback(signal.signal, signal.SIGTERM, before)
        started = []
        if vllm is not None:
            assert folder is not None
            log.info("starting vLLM", extra={"model": str(folder)})
            arguments = [*further, *vllm["arguments"]]
            started = [stack.enter_context(running_vllm(folder=folder, **vllm | {"arguments": arguments}))]
        token = os.environ.get(UPSTREAM_TOKEN) or None
        app = create_gateway([*started, *upstreams], tasks, settings, tokens, token)
        run(app, listening, drain, len(tokens), log, upstreams=len(started) + len(upstreams))
    log.info("stopped")
