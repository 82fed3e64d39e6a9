"""`ptune serve`: an OpenAI-compatible server over one backbone and a folder of soft prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ptune.cli.listening import check_extra, checked, json_log, listen, run
from ptune.errors import ConfigError


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
    upstream: Annotated[
        list[str] | None,
        typer.Option(help="URL of a running server to send requests to; more than once. No model is loaded here."),
    ] = None,
    merged: Annotated[
        Path | None,
        typer.Option(help="Merged model that engines behind --upstream serve, or its ptune_merged.json."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="ptune, or vllm: started over --merged, or over --backbone, with --prompts as embeddings."),
    ] = "ptune",
    vllm_python: Annotated[str, typer.Option(help="Python that has vLLM.")] = "python3",
    vllm_arg: Annotated[
        list[str] | None, typer.Option(help="Argument for vLLM, such as --tensor-parallel-size=2; more than once.")
    ] = None,
    vllm_start: Annotated[float, typer.Option(min=1, help="Seconds that vLLM may take to load.")] = 900,
) -> None:
    """Serve a backbone, and each soft prompt in a folder as a model, by OpenAI's interface."""
    limits: dict[str, Any] = {
        "max_body": max_body,
        "max_items": max_items,
        "max_tokens": max_tokens,
        "max_queue": max_queue,
        "deadline_seconds": deadline,
        "watch_seconds": watch,
    }
    ours = {"max_batch": max_batch, "prompt_memory": prompt_memory, "key_memory": key_memory}
    ours["log_text"] = log_text or None
    where = (host, port, tokens_file, drain)
    if engine not in ("ptune", "vllm"):
        raise ConfigError(f'--engine is ptune or vllm, not "{engine}"')
    if not (upstream or engine == "vllm"):
        if merged is not None:
            raise ConfigError("--merged goes with --engine vllm or --upstream; ptune's own engine serves --prompts")
        _serve_here(backbone, dtype, device, prompts, where, limits | ours)
        return
    _check_elsewhere(engine, merged, prompts, ours)
    from ptune.cli.gateway import serve_gateway

    vllm = {"python": vllm_python, "arguments": vllm_arg or [], "start_seconds": vllm_start}
    embedded = None if prompts is None else (backbone, prompts)
    serve_gateway(upstream or [], merged, embedded, vllm if engine == "vllm" else None, *where, limits)


def _check_elsewhere(engine: str, merged: Path | None, prompts: Path | None, ours: dict[str, Any]) -> None:
    """See that others can serve what the command line names.

    Raises:
        ConfigError: they cannot.
    """
    if engine == "vllm" and prompts is None and (merged is None or not merged.is_dir()):
        raise ConfigError(
            "--engine vllm serves a merged model: name its folder by --merged; ptune merge writes one. Or name a "
            "folder of soft prompts by --prompts: they are sent as embeddings"
        )
    if merged is not None and prompts is not None:
        raise ConfigError("a merged model has its tasks in it; give --merged or --prompts, not both")
    if given := [name for name, value in ours.items() if value is not None]:
        option = "--" + given[0].replace("_", "-")
        raise ConfigError(f"{option} is an option of ptune's own engine, which does not run here; leave it out")


def _serve_here(
    backbone: str,
    dtype: str,
    device: str,
    prompts: Path | None,
    where: tuple[str, int, Path | None, int],
    limits: dict[str, Any],
) -> None:
    """Serve by ptune's own engine, in this process."""
    check_extra()
    from ptune.cli.quiet import quiet

    quiet()
    from ptune.config import ModelConfig
    from ptune.serve.app import create_app
    from ptune.serve.security import read_tokens
    from ptune.serve.settings import ServeSettings

    host, port, tokens_file, drain = where
    settings = checked(ServeSettings, **limits)
    model = checked(ModelConfig, name=backbone, dtype=dtype, device=device)
    tokens = read_tokens(tokens_file)
    log = json_log(__name__)
    listening = listen(host, port)
    from ptune.engine import Engine

    with listening, Engine(model) as engine:
        run(create_app(engine, prompts, settings, tokens), listening, drain, len(tokens), log, backbone=backbone)
    log.info("stopped")
