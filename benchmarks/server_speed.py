"""`ptune serve` against PEFT behind the same FastAPI, with a lock and ``set_adapter``: 64 requests in flight, 8 tasks.

    python benchmarks/server_speed.py [--requests 128] [--size full|tiny] [--rounds 7] [--json FILE]

Both servers run in processes of their own with the same model and the same soft prompts (PEFT loads its own pair of
files from their folders), and take turns, so many requests a round. Half of them ask for a label, half for 16 new
tokens; texts have 32 words. Every soft prompt has been used before, and the answers are held against each other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from engine_models import LABELS, SIZES, Size, text_of
from pydantic import BaseModel
from serving_models import CLASSIFYING, WRITING, make_folders, ptune_command, started

NEW_TOKENS, WORDS = 16, 32


class Classify(BaseModel):
    """Body of the peer's ``/v1/classify``."""

    model: str
    input: str


class Complete(BaseModel):
    """Body of the peer's ``/v1/completions``."""

    model: str
    prompt: str
    max_tokens: int


def peer(model_folder: Path, prompts: Path) -> None:
    """Serve PEFT's adapters as people do: one model, one lock, the adapter set for each request."""
    import socket
    import threading
    import warnings

    import torch
    import uvicorn
    from fastapi import FastAPI
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    first, *others = (*CLASSIFYING, *WRITING)
    model = PeftModel.from_pretrained(base, str(prompts / first), adapter_name=first)
    for name in others:
        model.load_adapter(str(prompts / name), adapter_name=name)
    model.eval()
    labels = torch.tensor([tokenizer(words)["input_ids"][0] for words in LABELS.values()])
    lock, app = threading.Lock(), FastAPI()

    @app.post("/v1/classify")
    def classify(body: Classify) -> dict[str, Any]:
        given = tokenizer(body.input, return_tensors="pt")
        with lock, torch.no_grad():
            model.set_adapter(body.model)
            logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits[0, -1, labels]
        return {"data": [{"label": list(LABELS)[int(logits.argmax())]}]}

    @app.post("/v1/completions")
    def complete(body: Complete) -> dict[str, Any]:
        given = tokenizer(body.prompt, return_tensors="pt")
        with lock, torch.no_grad():
            model.set_adapter(body.model)
            output = model.generate(
                input_ids=given["input_ids"],
                attention_mask=given["attention_mask"],
                max_new_tokens=body.max_tokens,
                do_sample=False,
            )
        said = output[0, given["input_ids"].shape[1] :]
        return {"choices": [{"text": tokenizer.decode(said, skip_special_tokens=True)}]}

    listening = socket.create_server(("127.0.0.1", 0))
    print(json.dumps({"url": f"http://127.0.0.1:{listening.getsockname()[1]}/v1"}), file=sys.stderr, flush=True)
    uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run(sockets=[listening])


def requests_of(count: int, size: Size) -> list[tuple[str, dict[str, Any]]]:
    """Return paths and bodies, the same for the same count."""
    draw = random.Random(0)
    asked: list[tuple[str, dict[str, Any]]] = []
    for number in range(count):
        text = text_of(size, WORDS, draw.randrange(10_000))
        if number % 2:
            asked.append(("/completions", {"model": draw.choice(WRITING), "prompt": text, "max_tokens": NEW_TOKENS}))
        else:
            asked.append(("/classify", {"model": draw.choice(CLASSIFYING), "input": text}))
    return asked


async def ask(url: str, asked: Sequence[tuple[str, dict[str, Any]]], at_once: int) -> tuple[float, list[float], list]:
    """Send requests, so many in flight, and return the seconds of all, those of each, and the answers."""
    gate, seconds, answers = asyncio.Semaphore(at_once), [0.0] * len(asked), [None] * len(asked)
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:

        async def one(number: int) -> None:
            path, body = asked[number]
            async with gate:
                begun = time.perf_counter()
                answer = await client.post(url + path, json=body)
                seconds[number] = time.perf_counter() - begun
            answer.raise_for_status()
            answers[number] = answer.json()

        begun = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(len(asked))))
        return time.perf_counter() - begun, seconds, answers


def check(theirs: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> None:
    """See that two servers give the same labels and texts, save where the two likeliest words are all but alike."""
    labels = [[answer["data"][0]["label"] for answer in answers if "data" in answer] for answers in (theirs, ours)]
    texts = [[answer["choices"][0]["text"] for answer in answers if "choices" in answer] for answers in (theirs, ours)]
    same = sum(one == other for one, other in zip(*texts, strict=True))
    if labels[0] != labels[1] or same < 0.8 * len(texts[0]):
        raise SystemExit(f"the two servers answer differently: {labels}, {same} of {len(texts[0])} texts alike")


def spread(values: Sequence[float]) -> str:
    """Return a median with the least and the greatest."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main(given: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--virtual-tokens", type=int, default=20)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.peer:
        peer(*arguments.peer)
        return 0
    size = SIZES[arguments.size]
    asked = requests_of(arguments.requests, size)
    with tempfile.TemporaryDirectory() as temporary:
        model, prompts = make_folders(Path(temporary), size, arguments.virtual_tokens)
        theirs = [sys.executable, __file__, "--peer", str(model), str(prompts)]
        with started(theirs) as (peer_url, _), started(ptune_command(model, prompts)) as (url, _):
            servers = {"PEFT, lock and set_adapter": peer_url, "ptune serve": url}
            warm = requests_of(2 * len((*CLASSIFYING, *WRITING)), size)
            check(*(asyncio.run(ask(one, warm, arguments.at_once))[2] for one in servers.values()))
            rounds: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in servers}
            for number in range(arguments.rounds):
                for name, one in servers.items():
                    whole, each, _ = asyncio.run(ask(one, asked, arguments.at_once))
                    rounds[name].append((whole, each))
                    print(f"round {number + 1}, {name}: {whole:.1f} s", file=sys.stderr, flush=True)
    rows = {}
    for name, measured in rounds.items():
        rates = [len(asked) / whole for whole, _ in measured]
        points = [statistics.quantiles(each, n=100) for _, each in measured]
        rows[name] = {"rates": rates, "p50": [cut[49] for cut in points], "p99": [cut[98] for cut in points]}
    peer_name, own = rows
    times = [ours / other for ours, other in zip(rows[own]["rates"], rows[peer_name]["rates"], strict=True)]
    print("| server | requests/s | p50, ms | p99, ms |\n| --- | ---: | ---: | ---: |")
    for name, row in rows.items():
        rate, p50, p99 = (spread(row["rates"]), *(spread([1000 * one for one in row[cut]]) for cut in ("p50", "p99")))
        print(f"| {name} | {rate} | {p50} | {p99} |")
    print(f"\n{spread(times)} times as many requests")
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {arguments.size} model, {arguments.requests} requests a round, {arguments.at_once} in flight")
    if arguments.json is not None:
        content = {"size": arguments.size, "requests": arguments.requests, "rows": rows, "times": times}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
