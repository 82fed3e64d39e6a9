"""Measure a language model as it stands: perplexity of held-out text, and linear probes of what it knows of a text.

    python recipes/probe.py MODEL --data DIR [--json FILE]

MODEL is `mini`, a folder or a Hub name; `--data` holds the sets that `corpus.py` reads. Perplexity is over every token
of the held-out texts, read in windows that each begin with `<s>`; bits per byte compare models of different tokenizers.
A masked model has neither: its perplexity is over the tokens that were hidden from it, every seventh, all at once.

A probe is a logistic regression on two means over the tokens of a text, of the middle layer's hidden states and of the
last layer's; the last token's state added nothing to them. Its strength is chosen on dev, its accuracy counted on test.
It says about how much of a task a soft prompt could draw from the frozen model, not how much one does.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import held_out_texts, rows
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ptune.families import MASKED, kind_of
from ptune.files import write_json
from ptune.pretrained.loading import MINI

PROBED = ("sst2", "imdb", "shopping_zh", "trec")
STRENGTHS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)  # values of scikit-learn's C, the smallest the most regularised
LENGTH = 320  # tokens, as the rows that mini was trained on
BATCH_SIZE = 16
HIDDEN_EVERY = 7  # tokens; about the 15% that BERT hid


@dataclass(frozen=True)
class Measured:
    """A model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, name: str) -> Measured:
        """The model in float32; `name` is `mini`, a folder or a Hub name."""
        source = str(MINI) if name == "mini" else name
        auto_class = kind_of(AutoConfig.from_pretrained(source)).auto_class
        model = auto_class.from_pretrained(source, dtype=torch.float32).eval()
        return cls(model, AutoTokenizer.from_pretrained(source))

    @property
    def masked(self) -> bool:
        """Whether it fills masked places instead of continuing."""
        return kind_of(self.model.config) is MASKED

    def windows(self, text: str) -> list[list[int]]:
        """All tokens of a text, `LENGTH` at most in a window with the `<s>` that each begins with.

        A masked model's window ends with the `</s>` that it knows behind a text.
        """
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        last = [self.tokenizer.sep_token_id] if self.masked else []
        room = LENGTH - 1 - len(last)
        return [[self.first_id, *ids[at : at + room], *last] for at in range(0, len(ids), room)]

    @property
    def first_id(self) -> int:
        """`<s>`, or what a model without one begins with."""
        known = (self.tokenizer.cls_token_id if self.masked else None, self.tokenizer.bos_token_id)
        return next((first for first in known if first is not None), self.tokenizer.eos_token_id)

    def batches(self, windows: Sequence[list[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Windows of similar length together: their places, ids [B, T] and mask [B, T]."""
        places = sorted(range(len(windows)), key=lambda place: len(windows[place]))
        for start in range(0, len(places), BATCH_SIZE):
            batch = places[start : start + BATCH_SIZE]
            ids = torch.full((len(batch), len(windows[batch[-1]])), self.first_id)
            mask = torch.zeros_like(ids)
            for row, place in enumerate(batch):
                ids[row, : len(windows[place])] = torch.tensor(windows[place])
                mask[row, : len(windows[place])] = 1
            yield batch, ids, mask

    @torch.inference_mode()
    def perplexity(self, texts: Sequence[str]) -> dict[str, float]:
        """Perplexity per token, bits per byte, and over how many tokens."""
        nats, tokens = 0.0, 0
        for _, ids, mask in self.batches([window for text in texts for window in self.windows(text)]):
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
            nats += cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            tokens += int(mask[:, 1:].sum())
        size = sum(len(text.encode()) for text in texts)
        return {"perplexity": math.exp(nats / tokens), "bits_per_byte": nats / math.log(2) / size, "tokens": tokens}

    @torch.inference_mode()
    def hidden_perplexity(self, texts: Sequence[str]) -> dict[str, float]:
        """Perplexity of a masked model over every seventh token, those hidden, and over how many."""
        nats, tokens = 0.0, 0
        for _, ids, mask in self.batches([window for text in texts for window in self.windows(text)]):
            hidden = torch.zeros_like(mask, dtype=torch.bool)
            hidden[:, HIDDEN_EVERY // 2 :: HIDDEN_EVERY] = True
            inside = mask.sum(1, keepdim=True) - 1  # the place of </s>
            hidden &= torch.arange(ids.shape[1]) < inside
            shown = ids.masked_fill(hidden, self.tokenizer.mask_token_id)
            logits = self.model(input_ids=shown, attention_mask=mask).logits[hidden]
            nats += cross_entropy(logits, ids[hidden], reduction="sum").item()
            tokens += int(hidden.sum())
        return {"perplexity": math.exp(nats / tokens), "tokens": tokens}

    @torch.inference_mode()
    def features(self, texts: Sequence[str]) -> np.ndarray:
        """What the model makes of each text's first window: [N, 2 * H] float32."""
        first_windows = [(self.windows(text) or [[self.first_id]])[0] for text in texts]
        found: list[Any] = [None] * len(texts)
        for places, ids, mask in self.batches(first_windows):
            states = self.model.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            middle, last = states[len(states) // 2], states[-1]
            weights = mask[:, :, None] / mask.sum(1)[:, None, None]
            means = torch.cat([(middle * weights).sum(1), (last * weights).sum(1)], dim=1)
            for place, row in zip(places, means.numpy(), strict=True):
                found[place] = row
        return np.stack(found)


def examples(data: Path, name: str, part: str, limit: int | None = None) -> tuple[list[str], list[str]]:
    """Texts and labels of one part of a set; `limit` draws as many at random."""
    found = list(rows(data, name, part))
    if limit is not None and limit < len(found):
        found = random.Random(0).sample(found, limit)
    return [row["text"] for row in found], [row["label"] for row in found]


def probe(measured: Measured, data: Path, name: str, limit: int | None) -> dict[str, float]:
    """Fit on up to `limit` train texts, choose the strength on dev, and give the accuracy on test."""
    train_texts, train_labels = examples(data, name, "train", limit)
    train_features = measured.features(train_texts)
    parts = {part: examples(data, name, part) for part in ("dev", "test")}
    features = {part: measured.features(texts) for part, (texts, _) in parts.items()}
    scores: dict[float, float] = {}
    classifiers = {}
    for strength in STRENGTHS:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
        classifiers[strength] = classifier.fit(train_features, train_labels)
        scores[strength] = classifier.score(features["dev"], parts["dev"][1])
    best = max(STRENGTHS, key=lambda strength: scores[strength])  # of equals the most regularised
    test = classifiers[best].score(features["test"], parts["test"][1])
    return {"test": test, "dev": scores[best], "C": best, "train_texts": len(train_texts)}


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """What was measured, for a terminal."""
    text = Table("held-out text", "perplexity", "bits per byte", "tokens", title=result["model"])
    for name, row in result["text"].items():
        bits = f"{row['bits_per_byte']:.3f}" if "bits_per_byte" in row else "-"
        text.add_row(name, f"{row['perplexity']:.1f}", bits, f"{row['tokens']:,}")
    yield text
    probes = Table("linear probe", "test accuracy", "dev accuracy", "C", "train texts")
    for name, row in result["probes"].items():
        probes.add_row(name, f"{row['test']:.3f}", f"{row['dev']:.3f}", f"{row['C']}", f"{row['train_texts']:,}")
    yield probes


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="mini, a folder or a Hub name")
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per set")
    parser.add_argument("--probes", nargs="*", choices=PROBED, default=PROBED, help="sets to probe; none without names")
    parser.add_argument("--train-limit", type=int, default=10_000, help="most train texts of a probe, drawn at random")
    parser.add_argument("--held-out", type=int, default=300, help="most held-out texts of a source")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", type=Path, help="also write the figures into this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    measured = Measured.load(options.model)
    held_out = held_out_texts(options.data, options.held_out)
    perplexity = measured.hidden_perplexity if measured.masked else measured.perplexity
    result = {
        "model": options.model,
        "text": {name: perplexity(found) for name, found in held_out.items()},
        "probes": {name: probe(measured, options.data, name, options.train_limit) for name in options.probes},
    }
    for table in tables(result):
        Console().print(table)
    if options.json:
        write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
