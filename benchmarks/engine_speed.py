"""Speed of the engine against PEFT: labels, mixed tasks, first tokens, texts, and a library of a thousand prompts.

    python benchmarks/engine_speed.py [--case NAME ...] [--size full|tiny] [--rounds 7] [--json FILE]

Both run one random Llama-shaped model in float32 on the same ids, take turns in one process, and hold 100 virtual
tokens in front of the text. PEFT's adapters are in inference mode, as they are when loaded; its tasks are switched by
``set_adapter``. Our engine has answered with its prompts before, as it has after its first request: their keys and
values are kept. "Library" is ours against ours.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import torch
import transformers
from engine_models import LABELS, SIZES, Size, model_of, soft_prompt, text_of, tokenizer_of
from peft import PromptEncoderConfig, TaskType, get_peft_model
from timing import interleaved, ratio

from ptune.engine.engine import Engine
from ptune.generation.generate import GenerationOptions, generate
from ptune.models.backbone import Backbone
from ptune.rendering.batch import IGNORED, Row, collate

TASKS, TEXT, MOST_NEW = 8, 32, 64
Cases = dict[str, Callable[[], object]]


class Ours:
    """The engine with soft prompts of one length."""

    def __init__(self, size: Size, virtual_tokens: int, tasks: int) -> None:
        self.size = size
        self.backbone = Backbone(model_of(size), tokenizer_of(size), "random")
        self.engine = Engine(self.backbone, key_memory="4GB")
        for task in range(tasks):
            self.engine.add(str(task), soft_prompt(self.backbone, virtual_tokens, task))
        self.virtual = [
            list(range(one.first_virtual_id, one.first_virtual_id + virtual_tokens))
            for one in self.engine.prompts.values()
        ]
        self.labels = torch.tensor([self.backbone.tokenizer(words)["input_ids"][0] for words in LABELS.values()])

    def scores(self, texts: Sequence[list[int]], tasks: Sequence[int]) -> torch.Tensor:
        """Return the logits of the labels ``[B, C]`` behind texts of one length."""
        rows = [[*self.virtual[task], *text] for text, task in zip(texts, tasks, strict=True)]
        batch = collate([Row(tuple(ids), (IGNORED,) * len(ids)) for ids in rows], 0)
        positions = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        positions[:, -1] = True
        with torch.no_grad():
            return self.backbone.logits(batch.input_ids, batch.attention_mask, positions, self.labels)

    def write(self, texts: Sequence[list[int]], tasks: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Return what is written behind texts, each up to its own length."""
        contexts = [[*self.virtual[task], *text] for text, task in zip(texts, tasks, strict=True)]
        answers = generate(
            self.backbone,
            contexts,
            GenerationOptions(max_new_tokens=max(lengths)),
            go_on=lambda number, length: length < lengths[number],
        )
        return [list(answer.ids) for answer in answers]


class Peft:
    """PEFT's P-tuning, an adapter a task, of the very same rows."""

    def __init__(self, ours: Ours, virtual_tokens: int, tasks: int) -> None:
        config = PromptEncoderConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=virtual_tokens, inference_mode=True, encoder_hidden_size=32
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = get_peft_model(model_of(ours.size), config, adapter_name="0").eval()
            for task in range(1, tasks):
                self.model.add_adapter(str(task), config)
        for task in range(tasks):
            rows = ours.engine.prompts[str(task)].prompt.rows
            encoder = self.model.prompt_encoder[str(task)]
            encoder.embedding.weight.data.copy_(rows)
        self.labels = ours.labels

    def scores(self, texts: Sequence[list[int]], task: int) -> torch.Tensor:
        """Return the logits of the labels ``[B, C]`` behind texts of one length."""
        self.model.set_adapter(str(task))
        ids = torch.tensor(texts)
        with torch.no_grad():
            return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1, self.labels]

    def write(self, texts: Sequence[list[int]], task: int, length: int) -> list[list[int]]:
        """Return what is written behind texts of one length."""
        self.model.set_adapter(str(task))
        ids = torch.tensor(texts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says at each call that it makes position ids itself
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            )
        return output[:, ids.shape[1] :].tolist()


def ids_of(size: Size, words: int, seed: int) -> list[int]:
    """Return the ids of a text of so many words."""
    return [int(word[1:]) for word in text_of(size, words, seed).split()]


def classify(size: Size, virtual_tokens: int, batch: int) -> Cases:
    """One task, a batch of texts of 32 tokens."""
    ours = Ours(size, virtual_tokens, 1)
    theirs = Peft(ours, virtual_tokens, 1)
    texts = [ids_of(size, TEXT, seed) for seed in range(batch)]
    check_scores(ours.scores(texts, [0] * batch), theirs.scores(texts, 0))
    return {"PEFT": lambda: theirs.scores(texts, 0), "ptune": lambda: ours.scores(texts, [0] * batch)}


def mixed(size: Size, virtual_tokens: int) -> Cases:
    """Eight tasks, a text of 32 tokens each."""
    ours = Ours(size, virtual_tokens, TASKS)
    theirs = Peft(ours, virtual_tokens, TASKS)
    texts = [ids_of(size, TEXT, seed) for seed in range(TASKS)]
    tasks = range(TASKS)
    check_scores(ours.scores(texts, tasks), torch.cat([theirs.scores([texts[task]], task) for task in tasks]))
    return {
        "PEFT, one call a task": lambda: [theirs.scores([texts[task]], task) for task in tasks],
        "ptune, one batch": lambda: ours.scores(texts, tasks),
    }


def first_token(size: Size, virtual_tokens: int) -> Cases:
    """One task, the first token behind eight texts of 32 tokens."""
    ours = Ours(size, virtual_tokens, 1)
    theirs = Peft(ours, virtual_tokens, 1)
    texts = [ids_of(size, TEXT, seed) for seed in range(8)]
    return {
        "PEFT": lambda: theirs.write(texts, 0, 1),
        "ptune": lambda: ours.write(texts, [0] * 8, [1] * 8),
    }


def texts(size: Size, virtual_tokens: int) -> Cases:
    """Eight tasks, texts of 16 to 72 tokens, 8 to 64 new tokens."""
    ours = Ours(size, virtual_tokens, TASKS)
    theirs = Peft(ours, virtual_tokens, TASKS)
    tasks = range(TASKS)
    asked = [ids_of(size, 16 + 8 * task, task) for task in tasks]
    lengths = [MOST_NEW * (1 + (3 * task) % TASKS) // TASKS for task in tasks]
    return {
        "PEFT, a task at a time": lambda: [theirs.write([asked[task]], task, lengths[task]) for task in tasks],
        "ptune, one batch": lambda: ours.write(asked, tasks, lengths),
    }


def library(size: Size, virtual_tokens: int, count: int = 1000) -> Cases:
    """Batches of eight different prompts out of a thousand against eight texts for one; the whole way from text."""
    few, many = Ours(size, virtual_tokens, 1), Ours(size, virtual_tokens, count)
    records = [{"text": text_of(size, TEXT, seed)} for seed in range(8)]
    names = [[str((8 * turn + row) % count) for row in range(8)] for turn in range(count // 8)]
    for group in names:
        many.engine.predict(group, records)
    turns = iter(names * 10_000)
    return {
        "one prompt": lambda: [few.engine.predict(["0"] * 8, records) for _ in range(8)],
        "a thousand": lambda: [many.engine.predict(next(turns), records) for _ in range(8)],
    }


def check_scores(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """See that both computed the same labels' logits, ``[B, C]``."""
    difference = float((ours - theirs).abs().max())
    if difference > 1e-3 * float(theirs.abs().max()):
        raise SystemExit(f"the two do not compute the same: logits differ by {difference:.2g}")


CASES: dict[str, Callable[[Size], Cases]] = {
    "classify, batch 1": lambda size: classify(size, 100, 1),
    "classify, batch 8": lambda size: classify(size, 100, 8),
    "8 tasks in a batch of 8": lambda size: mixed(size, 100),
    "first token, batch 8": lambda size: first_token(size, 100),
    "8 tasks, 8 to 64 new tokens": lambda size: texts(size, 100),
    "library of 1,000": lambda size: library(size, 10),
}


def main(given: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(given)
    rows = []
    print("| benchmark | against | milliseconds | ptune, milliseconds | times | over the rounds |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name in arguments.case or CASES:
        cases = CASES[name](SIZES[arguments.size])
        peer, own = cases
        seconds = interleaved(cases, arguments.rounds, warm_up=2)
        median, least, greatest = ratio(seconds, own, peer)
        theirs, ours = (1000 * statistics.median(seconds[one]) for one in (peer, own))
        rows.append({"case": name, "peer": peer, "own": own, "seconds": seconds, "ratio": [median, least, greatest]})
        span = f"{least:.2f} to {greatest:.2f}"
        print(f"| {name} | {peer} | {theirs:.1f} | {ours:.1f} | {median:.2f} | {span} |", flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    print(f"\n{machine['processor']}, {machine['threads']} threads, {arguments.size} model, {versions}")
    if arguments.json is not None:
        content = {"size": arguments.size, "machine": machine, "versions": versions, "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
