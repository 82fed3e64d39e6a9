"""`ptune generate`: one instruction, or a chat; streamed; with the soft prompt or, by `--no-prompt`, without."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from ptune.cli.evaluate import column_mapping
from ptune.cli.loading import Device, Dtype, Model, TrustRemoteCode, loading
from ptune.cli.unused import refuse_unused
from ptune.config.mistakes import said_of
from ptune.errors import ConfigError

if TYPE_CHECKING:
    from ptune.engine.chat import Chat
    from ptune.generation.generate import GenerationOptions


def generate(
    prompt: Annotated[Path, typer.Argument(help="Folder of a soft prompt.")],
    text: Annotated[str | None, typer.Argument(help="The template's first field. Without it, a chat begins.")] = None,
    field: Annotated[
        list[str] | None, typer.Option("--field", help="Another field=text of the template; may be repeated.")
    ] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    no_prompt: Annotated[
        bool, typer.Option("--no-prompt", help="The bare model, on the same template without virtual tokens.")
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="As the prompt's task says, where absent.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sample at this temperature; greedy where absent.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from so many likeliest tokens.")] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample from tokens at least so likely as the likeliest.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="Above 1 discourages repeating.")] = 1.0,
    no_repeat_ngram_size: Annotated[int, typer.Option(min=0, help="No n-gram of this size twice; 0 allows all.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="For the same sample again.")] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, max=20, help="Behind the answer, each token's log-probability and of so many likeliest."),
    ] = None,
) -> None:
    """Answer one instruction, or chat until an empty line."""
    samples = any(value is not None for value in (temperature, top_p, top_k, min_p))
    if not samples:
        refuse_unused("nothing is drawn without --temperature, --top-p, --top-k or --min-p", seed=seed)
    from ptune.cli.quiet import quiet

    quiet()
    from ptune.engine.chat import Chat
    from ptune.engine.engine import Engine

    with Engine.for_prompt(prompt, model, **loading(device, dtype, trust_remote_code)) as engine:
        (name,) = engine.prompts
        loaded = engine.prompts[name]
        options = _options(
            max_new_tokens=max_new_tokens or getattr(loaded.prompt.task, "max_new_tokens", 128),
            do_sample=samples,
            temperature=1.0 if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,
            top_k=top_k or 0,
            min_p=min_p or 0.0,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            stop=tuple(stop or ()),
            seed=seed,
            logprobs=logprobs is not None,
            top_logprobs=logprobs or 0,
        )
        chat = Chat(engine, name, options, with_prompt=not no_prompt)
        others = column_mapping(field)
        tokenizer = engine.backbone.tokenizer

        def spelt(token: int) -> str:
            return str(tokenizer.decode([token]))

        if text is not None:
            _answer(chat, engine.record_for(name, text, others), spelt)
            return
        if sys.stdin.isatty():
            typer.echo("An empty line ends the chat.", err=True)
        while line := _question():
            _answer(chat, engine.record_for(name, line, others), spelt)


def _options(**values: Any) -> GenerationOptions:
    from ptune.generation.generate import GenerationOptions

    try:
        return GenerationOptions(**values)
    except ValidationError as error:
        entry = error.errors()[0]
        option = str(entry["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option}{said_of([entry])}") from None


def _question() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _answer(chat: Chat, record: dict[str, str], spelt: Callable[[int], str]) -> None:
    answer = chat.say(record, on_text=lambda piece: typer.echo(piece, nl=False))
    typer.echo()
    for one in answer.logprobs or ():
        pairs = [(one.id, one.logprob), *one.top]
        typer.echo("\t".join(f"{spelt(token)!r} {logprob:.3f}" for token, logprob in pairs))
