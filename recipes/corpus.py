"""The pretraining text of `ptune-mini`: what is read, in which shares, its tokenizer and its rows of tokens.

Only train parts are read, as plain text without any label, so that the frozen model meets the classification sets as
fairly as it meets any other text. A document is `<s>text</s>`; documents lie end to end in a stream of tokens.

There are two streams. The shares of the main one follow the hardest goal, English sentiment: every film review once,
the few thousand review sentences three times, and only a part of the books, of the encyclopedia and of the classical
poems, which teach other words. The review stream, for the end of the training, leaves those out.

Short texts (review sentences, takeaway reviews, questions, intents) are shuffled and joined line by line into a
document: alone they would be half `<s>` and `</s>`, and in the order of their files, which some sort by class, a run of
one class would give the label away.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 8192
PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]
MASK, NO_TEXT_HAS = "<mask>", chr(0xC0)  # how a byte-level vocabulary writes the byte 0xC0
HELD_OUT_EVERY, HELD_OUT_PLACE = 100, 7  # of the books, which have no dev part, one passage in a hundred is held out
POEM_LENGTH = 300  # characters; a few poems are very long, and none is to weigh more than a review


@dataclass(frozen=True)
class Source:
    """Texts of one source and how they are laid into the stream.

    `share` is how often the texts are seen in one pass (1.5: all once and a random half again); `joined` is how many
    shuffled texts make one document.
    """

    texts: list[str]
    share: float = 1.0
    joined: int = 1

    def documents(self, rng: random.Random) -> list[str]:
        """The documents of one pass."""
        documents: list[str] = []
        for _ in range(int(self.share)):
            documents += self.texts if self.joined == 1 else grouped(shuffled(self.texts, rng), self.joined)
        return documents + rng.sample(self.texts, int(len(self.texts) * (self.share % 1)))


def shuffled(texts: list[str], rng: random.Random) -> list[str]:
    """A shuffled copy."""
    copy = list(texts)
    rng.shuffle(copy)
    return copy


def grouped(texts: list[str], count: int) -> list[str]:
    """Every `count` neighbouring texts as one, a line each."""
    return ["\n".join(texts[start : start + count]) for start in range(0, len(texts), count)]


def rows(data: Path, name: str, part: str) -> Iterator[dict]:
    """The rows of one part (train, dev) of a set."""
    with (data / name / f"{part}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def texts(data: Path, name: str, part: str) -> list[str]:
    """The stripped, non-empty texts of one part of a set; an instruction row becomes a turn of talk."""
    found = (instruction_text(row) if "instruction" in row else row["text"].strip() for row in rows(data, name, part))
    return [text for text in found if text]


def instruction_text(row: dict) -> str:
    """`Human: ...`, a blank line, `Assistant: ...`."""
    question = "\n".join([row["instruction"], row["input"]])
    return f"{f'Human: {question}'.strip()}\n\nAssistant: {row['output']}".strip()


def passages(path: Path, lines_each: int, shortest: int) -> list[str]:
    """A running text, one paragraph a line, as passages of `lines_each` paragraphs longer than `shortest` characters.

    Shorter lines are mostly headings and single words of talk.
    """
    with path.open(encoding="utf-8") as lines:
        return grouped([line.strip() for line in lines if len(line) > shortest], lines_each)


def book_passages(path: Path, *, held_out: bool) -> list[str]:
    """The passages of a book that are trained on, or those held out."""
    every = enumerate(passages(path, lines_each=6, shortest=40))
    return [text for at, text in every if (at % HELD_OUT_EVERY == HELD_OUT_PLACE) == held_out]


def review_sentences(data: Path) -> list[str]:
    """The English sentences about films."""
    return texts(data, "mr", "train") + texts(data, "sst2", "train")


def training_sources(data: Path) -> list[Source]:
    """The main stream: the sources under `data`, in the order in which they draw from the random generator."""
    with (data / "text_zh" / "poems.txt").open(encoding="utf-8") as lines:
        poems = [text for line in lines if (text := line.strip()[:POEM_LENGTH].strip())]
    return [
        Source(texts(data, "imdb", "train")),
        Source(review_sentences(data), share=3, joined=4),
        *(
            Source(book_passages(path, held_out=False), share=0.35 if path.stem.startswith("wikitext") else 0.5)
            for path in sorted((data / "text_en").glob("*.txt"))
        ),
        Source(texts(data, "clinc150", "train"), share=2, joined=8),
        Source(texts(data, "trec", "train"), share=2, joined=8),
        Source(texts(data, "alpaca_en", "train"), share=2),
        Source(texts(data, "alpaca_zh", "train"), share=2),
        Source(texts(data, "shopping_zh", "train")),
        Source(texts(data, "waimai_zh", "train"), joined=4),
        Source(passages(data / "text_zh" / "d2l.txt", lines_each=4, shortest=20)),
        Source(poems, share=0.05),
    ]


def review_sources(data: Path) -> list[Source]:
    """The stream of the end of the training: what people write in reviews and questions, without the books."""
    return [
        Source(texts(data, "imdb", "train")),
        Source(review_sentences(data), share=5, joined=4),
        Source(texts(data, "clinc150", "train"), joined=8),
        Source(texts(data, "trec", "train"), joined=8),
        Source(texts(data, "alpaca_en", "train"), share=0.5),
        Source(texts(data, "alpaca_zh", "train"), share=0.5),
        Source(texts(data, "shopping_zh", "train"), share=0.4),
        Source(texts(data, "waimai_zh", "train"), joined=4),
    ]


def held_out_texts(data: Path, limit: int) -> dict[str, list[str]]:
    """Up to `limit` texts that no part of the training saw, by source."""
    books = [path for path in sorted((data / "text_en").glob("*.txt")) if not path.stem.startswith("wikitext")]
    found = {"books": [text for path in books for text in book_passages(path, held_out=True)]}
    for name in ("imdb", "mr", "sst2", "alpaca_en", "shopping_zh", "waimai_zh", "alpaca_zh"):
        found[name] = texts(data, name, "dev")
    return {name: shuffled(each, random.Random(0))[:limit] for name, each in found.items()}


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """A byte-level BPE: no text is unknown to it, and one vocabulary serves both languages."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it; it puts `<s>` before a text by itself."""
    pad, bos, eos = SPECIAL_TOKENS
    own = Tokenizer.from_str(tokenizer.to_str())
    own.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token=pad, bos_token=bos, eos_token=eos)


def mask_id(tokenizer: Tokenizer) -> int:
    """The token that hides another: that of the byte 0xC0, which no UTF-8 text holds, so that it stands for nothing."""
    return tokenizer.token_to_id(NO_TEXT_HAS)


def with_mask(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer of a masked model: the same ids for every text, between `<s>` and `</s>`; one token is `<mask>`."""
    pad, bos, eos = SPECIAL_TOKENS
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"][MASK] = content["model"]["vocab"].pop(NO_TEXT_HAS)
    own = Tokenizer.from_str(json.dumps(content))
    own.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", pair=f"{bos} $A {eos} $B {eos}", special_tokens=[(bos, BOS), (eos, EOS)]
    )
    names = {"pad_token": pad, "bos_token": bos, "cls_token": bos, "eos_token": eos, "sep_token": eos}
    return PreTrainedTokenizerFast(tokenizer_object=own, mask_token=MASK, **names)


def prepare(data: Path, folder: Path, seed: int) -> None:
    """Write a new `folder` with `tokenizer.json` and one pass of each stream, `train.npy` and `review.npy`."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    documents = shuffled_documents(training_sources(data), rng)
    tokenizer = train_tokenizer(rng.sample(documents, len(documents) // 3))  # a third gives the same merges sooner
    tokenizer.save(str(folder / "tokenizer.json"))
    np.save(folder / "train.npy", stream(documents, tokenizer))
    np.save(folder / "review.npy", stream(shuffled_documents(review_sources(data), random.Random(seed + 1)), tokenizer))


def shuffled_documents(sources: list[Source], rng: random.Random) -> list[str]:
    """One pass of all sources, shuffled."""
    return shuffled([document for source in sources for document in source.documents(rng)], rng)


def stream(documents: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """The documents end to end, each as `<s>text</s>`: uint16 tokens."""
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    return np.concatenate([np.array([BOS, *each.ids, EOS], np.uint16) for each in encoded])


def training_rows(tokens: np.ndarray, width: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of `width` tokens without end: each pass cuts the stream at another offset and shuffles the rows anew."""
    for at in range(1_000_000):
        rng = np.random.default_rng(seed + at)
        offset = int(rng.integers(0, width))
        for row in rng.permutation((len(tokens) - offset) // width):
            yield tokens[offset + row * width : offset + (row + 1) * width]
