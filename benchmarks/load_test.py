"""A server under load: every answer is the engine's own, nothing is lost or crossed, and memory stays flat.

    python benchmarks/load_test.py [--requests 10000] [--at-once 64] [--size tiny|full] [--json FILE]

`ptune serve` runs as a process of its own with eight soft prompts. Half of the requests ask for a label, the others for
at most 8 new tokens, some of them streamed. In between, clients go away before their answer, and bodies are wrong. Each
answer is held against that of the engine alone, computed once for each distinct input; a text may differ only where the
engine's two best tokens lie within 1e-4. The exit code is 1 where something was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from engine_models import SIZES, Size, text_of
from serving_models import CLASSIFYING, WRITING, make_folders, ptune_command, started

from ptune.config.run import ModelConfig
from ptune.engine.engine import Engine
from ptune.generation.generate import GenerationOptions

TEXTS, NEW_TOKENS, TIE, TOLERANCE = 40, 8, 1e-4, 1e-5
GONE, WRONG, STREAMED = 0.03, 0.03, 0.2
"""Shares: of clients that go away, of wrong bodies, and of streams among texts to write."""
BAD_BODIES: tuple[tuple[str, Any, int], ...] = (
    ("/classify", b"{", 400),
    ("/classify", {"model": "labell0", "input": "w9"}, 404),
    ("/classify", {"model": "label0", "input": []}, 400),
    ("/classify", {"model": "write0", "input": "w9"}, 400),
    ("/completions", {"model": "write0", "prompt": "w9", "temperature": -1}, 400),
    ("/completions", {"model": "label0", "prompt": "w9"}, 400),
    ("/completions", {"model": "write0", "prompt": "w9 " * 4000}, 400),
    ("/chat/completions", {"model": "write0", "messages": []}, 400),
)


@dataclass(frozen=True)
class Reference:
    """What the engine alone says: probabilities of labels, or a text and how far it is from another."""

    probabilities: dict[str, float] | None = None
    text: str | None = None
    tie: bool = False


def references(model: Path, prompts: Path, texts: Sequence[str]) -> dict[tuple[str, str], Reference]:
    """Return the right answers by soft prompt and text."""
    found: dict[tuple[str, str], Reference] = {}
    with Engine(ModelConfig(name=str(model), dtype="float32"), prompts=prompts) as engine:
        for name in CLASSIFYING:
            for text, answer in zip(texts, engine.classify(name, texts), strict=True):
                found[name, text] = Reference(probabilities=answer["probabilities"])
        options = GenerationOptions(max_new_tokens=NEW_TOKENS, logprobs=True, top_logprobs=2)
        for name in WRITING:
            for text in texts:
                answer = engine.generate(name, text, options)
                gaps = [one.top[0][1] - one.top[1][1] for one in answer.logprobs or ()]
                found[name, text] = Reference(text=answer.text, tie=min(gaps, default=1.0) < TIE)
    return found


class Load:
    """Clients that ask, and what became of their requests."""

    def __init__(self, url: str, texts: Sequence[str], right: dict[tuple[str, str], Reference]) -> None:
        self._url, self._texts, self._right = url, texts, right
        self.counts: Counter[str] = Counter()
        self.mistakes: list[str] = []

    async def run(self, count: int, at_once: int, seed: int) -> None:
        """Send requests, so many in flight."""
        draw = random.Random(seed)
        plans = [(draw.random(), draw.random(), draw.random(), draw.randrange(2**31)) for _ in range(count)]
        gate = asyncio.Semaphore(at_once)
        limits = httpx.Limits(max_connections=2 * at_once)
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:

            async def one(plan: tuple[float, float, float, int]) -> None:
                async with gate:
                    try:
                        await self._one(client, *plan)
                    except Exception as error:  # whatever it is, a request was lost
                        self.mistakes.append(f"lost: {error!r}")

            await asyncio.gather(*map(one, plans))

    async def _one(self, client: httpx.AsyncClient, kind: float, what: float, how: float, number: int) -> None:
        if kind < WRONG:
            path, body, status = BAD_BODIES[number % len(BAD_BODIES)]
            given = {"content": body} if isinstance(body, bytes) else {"json": body}
            answer = await client.post(self._url + path, headers={"Content-Type": "application/json"}, **given)
            self.counts["refused"] += 1
            if answer.status_code != status or "error" not in answer.json():
                self.mistakes.append(f"{path} {body!r:.80}: {answer.status_code}, expected {status}")
            return
        text, labels = self._texts[number % len(self._texts)], what < 0.5
        name = (CLASSIFYING if labels else WRITING)[number // len(self._texts) % 4]
        body = {"model": name, "input": text} if labels else {"model": name, "prompt": text, "max_tokens": NEW_TOKENS}
        if kind < WRONG + GONE:
            asking = asyncio.create_task(self._answer(client, labels, body, streamed=how < STREAMED))
            await asyncio.sleep(0.03 * how)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            self.counts["gone"] += 1
            return
        given = await self._answer(client, labels, body, streamed=how < STREAMED)
        self.counts["labels" if labels else "texts"] += 1
        self._check(self._right[name, text], given, f"{name}, {text[:20]}")

    async def _answer(self, client: httpx.AsyncClient, labels: bool, body: dict[str, Any], *, streamed: bool) -> Any:
        if labels:
            answer = await client.post(f"{self._url}/classify", json=body)
            answer.raise_for_status()
            return answer.json()["data"][0]["probabilities"]
        if not streamed:
            answer = await client.post(f"{self._url}/completions", json=body)
            answer.raise_for_status()
            return answer.json()["choices"][0]["text"]
        text, ended = "", False
        async with client.stream("POST", f"{self._url}/completions", json=body | {"stream": True}) as stream:
            stream.raise_for_status()
            async for line in stream.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line:
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        if not ended:
            raise RuntimeError("a stream broke off")
        self.counts["streams"] += 1
        return text

    def _check(self, right: Reference, given: Any, place: str) -> None:
        if right.probabilities is None:
            if given != right.text and right.tie:
                self.counts["ties"] += 1
            elif given != right.text:
                self.mistakes.append(f"{place}: {given!r}, expected {right.text!r}")
        elif max(abs(given[label] - value) for label, value in right.probabilities.items()) > TOLERANCE:
            self.mistakes.append(f"{place}: {given}, expected {right.probabilities}")


def main(given: Sequence[str] | None = None) -> int:
    """Run the test and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--virtual-tokens", type=int, default=20)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(given)
    size: Size = SIZES[arguments.size]
    texts = [text_of(size, 2 + seed, seed) for seed in range(TEXTS)]
    with tempfile.TemporaryDirectory() as temporary:
        model, prompts = make_folders(Path(temporary), size, arguments.virtual_tokens)
        right = references(model, prompts, texts)
        with started(ptune_command(model, prompts)) as (url, process):
            load = Load(url, texts, right)
            begin = arguments.requests // 10  # prompts are loaded, buffers grown
            asyncio.run(load.run(begin, arguments.at_once, arguments.seed))
            before, begun = psutil.Process(process).memory_info().rss, time.monotonic()
            asyncio.run(load.run(arguments.requests - begin, arguments.at_once, arguments.seed + 1))
            seconds, after = time.monotonic() - begun, psutil.Process(process).memory_info().rss
            health = httpx.get(f"{url}/models").status_code
    counts, mistakes = dict(load.counts), load.mistakes
    print(f"{arguments.requests} requests, {arguments.at_once} in flight: {counts}")
    print(
        f"{(arguments.requests - begin) / seconds:.0f} requests/s; memory {before / 1e6:.0f} MB, then {after / 1e6:.0f}"
    )
    print(f"{len(mistakes)} lost, crossed or wrong" + "".join(f"\n  {one}" for one in mistakes[:10]))
    if arguments.json is not None:
        content = {"counts": counts, "mistakes": mistakes, "rss": [before, after], "seconds": seconds}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if mistakes or health != 200 else 0


if __name__ == "__main__":
    raise SystemExit(main())
