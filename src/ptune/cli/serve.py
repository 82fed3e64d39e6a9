"""`ptune serve`: an OpenAI-compatible server over one backbone and a folder of soft prompts."""

from __future__ import annotations

import logging
import signal
import socket
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from ptune.errors import ConfigError, MissingExtraError

_LOOPBACK = ("localhost", "127.", "::1")
_KEEP_ALIVE = 75
"""Seconds that an idle connection stays: longer than clients keep theirs (httpx and openai: 5), or a request is sent
into a connection that is being closed, and lost."""


def serve(
    backbone: Annotated[str, typer.Option(help='Folder, Hub name, or "mini".')] = "mini",
    prompts: Annotated[
        Path | None, typer.Option(help="Folder of soft prompts; each is a model. Looked at while the server runs.")
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 answers to other machines; by default only to this one.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    dtype: Annotated[str, typer.Option(help="Of the backbone: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    tokens_file: Annotated[
        Path | None, typer.Option(help="Bearer tokens, one a line; where absent, those in PTUNE_SERVE_TOKENS, if any.")
    ] = None,
    max_body: Annotated[int | None, typer.Option(help="Bytes of a request's body.")] = None,
    max_items: Annotated[int | None, typer.Option(help="Texts of one request.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most new tokens of an answer.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Rows that the model reads at once.")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Texts that wait; beyond it a request gets 429.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds after which a request gets 504.")] = None,
    drain: Annotated[int, typer.Option(min=1, help="Seconds that SIGTERM leaves to requests in flight.")] = 60,
    prompt_memory: Annotated[int | None, typer.Option(help="Bytes of soft prompts kept in memory.")] = None,
    key_memory: Annotated[
        int | None, typer.Option(help="Bytes of their keys and values kept from call to call; 0 keeps none.")
    ] = None,
    watch: Annotated[float | None, typer.Option(help="Seconds between looks at the folder of soft prompts.")] = None,
    log_text: Annotated[bool, typer.Option("--log-text", help="Write users' texts and answers into the log.")] = False,
) -> None:
    """Serve a backbone, and each soft prompt in a folder as a model, by OpenAI's interface."""
    limits = {
        "max_body": max_body,
        "max_items": max_items,
        "max_tokens": max_tokens,
        "max_batch": max_batch,
        "max_queue": max_queue,
        "deadline_seconds": deadline,
        "prompt_memory": prompt_memory,
        "key_memory": key_memory,
        "watch_seconds": watch,
    }
    try:
        import uvicorn

        from ptune.serve.app import create_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "prometheus_client", "starlette", "uvicorn"):
            raise
        raise MissingExtraError(f"ptune serve needs {error.name}: pip install ptune[serve]") from error
    from ptune.cli.quiet import quiet
    from ptune.config import ModelConfig
    from ptune.serve.logs import JsonLines
    from ptune.serve.security import read_tokens
    from ptune.serve.settings import ServeSettings

    quiet()
    settings = _checked(ServeSettings, log_text=log_text, **{k: v for k, v in limits.items() if v is not None})
    model = _checked(ModelConfig, name=backbone, dtype=dtype, device=device)
    tokens = read_tokens(tokens_file)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    log = logging.getLogger(__name__)
    listening = _listen(host, port)
    from ptune.engine import Engine

    with listening, Engine(model) as engine:
        app = create_app(engine, prompts, settings, tokens)
        address, number = listening.getsockname()[:2]
        url = f"http://{f'[{address}]' if ':' in address else address}:{number}/v1"
        log.info("serving", extra={"url": url, "backbone": backbone, "tokens": len(tokens)})
        if not tokens and not host.startswith(_LOOPBACK):
            log.warning("anybody who reaches this address can use the server: no tokens are set")
        config = uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=drain, timeout_keep_alive=_KEEP_ALIVE
        )
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it has drained: the end is ours
        uvicorn.Server(config).run(sockets=[listening])
    log.info("stopped")


def _checked(settings: type[Any], **values: Any) -> Any:
    try:
        return settings(**values)
    except ValidationError as error:
        entry = error.errors()[0]
        option = "--" + str(entry["loc"][0]).replace("_", "-").removesuffix("-seconds") if entry["loc"] else "limits"
        raise ConfigError(f"{option}: {entry['msg'].removeprefix('Value error, ')}") from None


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another by --host and --port"
        ) from error
