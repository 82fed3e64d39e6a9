"""`ptune serve`: an OpenAI-compatible server over one backbone and a folder of soft prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ptune.cli.listening import check_extra, checked, json_log, listen, run
from ptune.cli.unused import refuse_unused
from ptune.errors import ConfigError


def serve(
    backbone: Annotated[str | None, typer.Option(help='Folder, Hub name, or "mini", which is the default.')] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Folder of soft prompts; each is a model. Looked at while the server runs.")
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 answers to other machines; by default only to this one.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    dtype: Annotated[
        str | None, typer.Option(help="Of the backbone: auto, float32, bfloat16, float16. Default: auto.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps. Default: auto.")] = None,
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
    vllm_python: Annotated[str | None, typer.Option(help="Python that has vLLM. Default: python3.")] = None,
    vllm_arg: Annotated[
        list[str] | None, typer.Option(help="Argument for vLLM, such as --tensor-parallel-size=2; more than once.")
    ] = None,
    vllm_start: Annotated[
        float | None, typer.Option(min=1, help="Seconds that vLLM may take to load. Default: 900.")
    ] = None,
) -> None:
    """Serve a backbone, and each soft prompt in a folder as a model, by OpenAI's interface."""
    if engine not in ("ptune", "vllm"):
        raise ConfigError(f'--engine is ptune or vllm, not "{engine}"')
    starts_vllm = engine == "vllm"
    if not starts_vllm:
        why = "it is one of the vLLM that --engine vllm starts"
        refuse_unused(why, vllm_python=vllm_python, vllm_arg=vllm_arg, vllm_start=vllm_start)
    where = (host, port, tokens_file, drain)
    own = {"max_batch": max_batch, "prompt_memory": prompt_memory, "key_memory": key_memory}
    own["log_text"] = log_text or None
    limits: dict[str, Any] = {"max_body": max_body, "max_items": max_items, "max_tokens": max_tokens}
    limits |= {"max_queue": max_queue, "deadline_seconds": deadline, "watch_seconds": watch}
    if not (upstream or starts_vllm):
        if merged is not None:
            raise ConfigError("--merged goes with --engine vllm or --upstream; ptune's own engine serves --prompts")
        if prompts is None:
            why = "no folder of soft prompts is served; name one by --prompts"
            refuse_unused(why, watch=watch, prompt_memory=prompt_memory, key_memory=key_memory)
        _serve_here({"name": backbone, "dtype": dtype, "device": device}, prompts, where, limits | own)
        return
    why = "it is one of ptune's own engine, which does not run here"
    refuse_unused(why, dtype=dtype, device=device, **own)
    if prompts is None:
        refuse_unused("without --prompts nothing is rendered here", backbone=backbone)
    _check_elsewhere(starts_vllm, merged, prompts)
    from ptune.cli.gateway import serve_gateway

    vllm = {"python": vllm_python or "python3", "arguments": vllm_arg or [], "start_seconds": vllm_start or 900}
    embedded = None if prompts is None else (backbone or "mini", prompts)
    serve_gateway(upstream or [], merged, embedded, vllm if starts_vllm else None, *where, limits)


def _check_elsewhere(starts_vllm: bool, merged: Path | None, prompts: Path | None) -> None:
    """See that others can serve what the command line names.

    Raises:
        ConfigError: they cannot.
    """
    if starts_vllm and prompts is None and (merged is None or not merged.is_dir()):
        raise ConfigError(
            "--engine vllm serves a merged model: name its folder by --merged; ptune merge writes one. Or name a "
            "folder of soft prompts by --prompts: they are sent as embeddings"
        )
    if merged is not None and prompts is not None:
        raise ConfigError("a merged model has its tasks in it; give --merged or --prompts, not both")


def _serve_here(
    model: dict[str, str | None],
    prompts: Path | None,
    where: tuple[str, int, Path | None, int],
    limits: dict[str, Any],
) -> None:
    """Serve by ptune's own engine, in this process.

    Args:
        model: of `ModelConfig`; None for its defaults.
        prompts: folder of soft prompts.
        where: host, port, file of bearer tokens, and seconds that SIGTERM leaves to requests in flight.
        limits: of `ServeSettings`; None for its defaults.

    Raises:
        ConfigError: an option is wrong.
    """
    check_extra()
    from ptune.cli.quiet import quiet

    quiet()
    from ptune.config.run import ModelConfig
    from ptune.serve.app import create_app
    from ptune.serve.security import read_tokens
    from ptune.serve.settings import ServeSettings

    host, port, tokens_file, drain = where
    settings = checked(ServeSettings, **limits)
    loading = checked(ModelConfig, **model)
    tokens = read_tokens(tokens_file)
    log = json_log(__name__)
    listening = listen(host, port)
    from ptune.engine.engine import Engine

    with listening, Engine(loading) as engine:
        run(create_app(engine, prompts, settings, tokens), listening, drain, len(tokens), log, backbone=loading.name)
    log.info("stopped")
