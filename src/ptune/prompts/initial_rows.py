"""What the virtual tokens are before the first step: rows of the vocabulary, of a text, of label words, or noise.

A text that says the task was ahead on two sets of three in docs/recipes.md; between the others, noise of the
vocabulary's scale among them, no difference lasted. Methods are those of Lester et al. 2021, "The Power of Scale",
section 3.2 (sampled vocabulary, class labels, random uniform), a written text, and the rows of an earlier soft prompt
(Vu et al. 2022, "SPoT").

Knows nothing of encoders, templates or how backbones and files are read: it is given functions for both.
Shapes: P virtual tokens, H width, n ids, V rows of the backbone's input matrix, p rows of an
earlier soft prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain, islice, zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptune.config.run import StartConfig
from ptune.errors import BackboneError, ConfigError, SoftPromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMMON_WORDS = 5000
"""Lester et al. 2021 sample from so many of the most common tokens. Vocabularies learnt from a corpus (BPE,
SentencePiece) number them by how common they are, so these are the lowest ids that are words."""

_STATISTICS_ROWS = 4096
"""From how many rows, evenly spread over the vocabulary, the embeddings' mean and deviation are estimated."""


def initial_rows(
    start: StartConfig,
    count: int,
    *,
    embeddings: Callable[[Tensor], Tensor],
    tokenizer: PreTrainedTokenizerBase,
    vocabulary_size: int,
    label_words: Sequence[str] = (),
    prompt_rows: Callable[[str], Tensor] | None = None,
    seed: int,
) -> Tensor:
    """Return the rows that start the virtual tokens: ``[P, H]`` float32 on the CPU, the same for the same seed.

    Args:
        start: the method, with its text or soft prompt.
        count: P, how many rows.
        embeddings: ``[n] int64 -> [n, H]``, what the input embedding gives, after any scaling of its own (Gemma).
        tokenizer: the backbone's.
        vocabulary_size: V. A tokenizer may have fewer tokens: the rows beyond them are never taken.
        label_words: what stands for each label, blanks kept, for method ``labels``.
        prompt_rows: reads a soft prompt's rows ``[p, H]`` by its folder, for method ``prompt``.
        seed: of sampled words and of noise. Global generators are not touched.

    Raises:
        ConfigError: the text is of no tokens, there are no label words, the vocabulary holds no word, or the method
            is ``prompt`` and there is no ``prompt_rows``.
        SoftPromptError: the soft prompt's width is not H, or its rows are none or not finite.
        BackboneError: the embeddings taken are not finite.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    if start.method == "prompt":
        return _rows_of_prompt(start.prompt or "", count, embeddings, prompt_rows)
    if start.method in ("normal", "uniform"):
        rows = _noise(start.method, count, embeddings, min(len(tokenizer), vocabulary_size), generator)
    else:
        ids = _ids(start, count, tokenizer, vocabulary_size, label_words, generator)
        rows = _rows_of_ids(embeddings, ids)
    if not torch.isfinite(rows).all():
        raise BackboneError(
            f'start method "{start.method}" expected finite embeddings, and the backbone\'s hold a value that is '
            "infinite or not a number; load it in another dtype, or check its files"
        )
    return rows


def _ids(
    start: StartConfig,
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary_size: int,
    label_words: Sequence[str],
    generator: torch.Generator,
) -> list[int]:
    if start.method == "text":
        ids = _tokens(tokenizer, start.text or "")
        if not ids:
            raise ConfigError(
                f"start.text expected words, and {start.text!r} gives no tokens; write what the task asks for, "
                'or choose method "vocabulary"'
            )
        return _repeated(ids, count)
    ids = _label_ids(tokenizer, label_words)[:count] if start.method == "labels" else []
    if len(ids) < count:
        words = _common_words(tokenizer, vocabulary_size)
        fresh = [word for word in words if word not in ids] or words  # a label's word only where nothing else is left
        ids = ids + _sampled(fresh, count - len(ids), generator)
    return ids


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _label_ids(tokenizer: PreTrainedTokenizerBase, label_words: Sequence[str]) -> list[int]:
    """Return the tokens of all label words, each once: every label's first, then every label's second, and so on.

    Lester et al. 2021 average the tokens of a label. Taken in turn they stay rows of the vocabulary, and where there
    are fewer virtual tokens than tokens, no label is left out for the sake of another's ending.
    """
    of_each_label = [_tokens(tokenizer, words) for words in label_words]
    in_turn = chain.from_iterable(zip_longest(*of_each_label))
    ids = list(dict.fromkeys(token for token in in_turn if token is not None))
    if not ids:
        raise ConfigError(
            'start.method "labels" needs label words, and the task has none; give the task a verbalizer, '
            'or choose method "vocabulary" or "text"'
        )
    return ids


def _common_words(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> list[int]:
    """Return the lowest ids that stand for text with a letter in it: no control token or half a character."""
    # All added tokens, for models mark turns and tools by tokens which are not called special (Qwen's <tool_call>).
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    candidates = (token for token in range(min(len(tokenizer), vocabulary_size)) if token not in added)
    words = list(islice((token for token in candidates if _is_word(tokenizer, token)), COMMON_WORDS))
    if not words:
        raise ConfigError(
            "sampled virtual tokens need words in the tokenizer's vocabulary, and none of its tokens has a letter; "
            'choose start.method "text" or "normal"'
        )
    return words


def _is_word(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    text = str(tokenizer.decode([token]))
    return "\N{REPLACEMENT CHARACTER}" not in text and any(character.isalpha() for character in text)


def _sampled(ids: list[int], count: int, generator: torch.Generator) -> list[int]:
    """Return ``count`` of ``ids``, none a second time before all were taken."""
    taken: list[int] = []
    while len(taken) < count:
        order = torch.randperm(len(ids), generator=generator, device="cpu").tolist()
        taken += [ids[index] for index in order[: count - len(taken)]]
    return taken


def _rows_of_ids(embeddings: Callable[[Tensor], Tensor], ids: Sequence[int]) -> Tensor:
    return embeddings(torch.tensor(ids, dtype=torch.long, device="cpu")).detach().float().cpu()


def _noise(
    method: str, count: int, embeddings: Callable[[Tensor], Tensor], tokens: int, generator: torch.Generator
) -> Tensor:
    """Return noise with the embeddings' own mean and standard deviation in each dimension, ``[P, H]``."""
    spread = torch.linspace(0, tokens - 1, min(tokens, _STATISTICS_ROWS), dtype=torch.float64, device="cpu")
    sample = _rows_of_ids(embeddings, spread.round().long().tolist())
    mean, deviation = sample.mean(0), sample.std(0, correction=0)  # [H] each
    shape = (count, sample.shape[1])
    if method == "normal":
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    else:  # a uniform distribution of deviation one reaches from -sqrt(3) to sqrt(3)
        noise = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
        noise = (2 * noise - 1) * math.sqrt(3)
    return mean + deviation * noise


def _rows_of_prompt(
    prompt: str,
    count: int,
    embeddings: Callable[[Tensor], Tensor],
    prompt_rows: Callable[[str], Tensor] | None,
) -> Tensor:
    if prompt_rows is None:
        raise ConfigError(
            f'start.method "prompt" needs a way to read "{prompt}", and none was given; '
            "pass prompt_rows, a function from the folder to its rows"
        )
    rows = prompt_rows(prompt).detach().float().cpu()
    width = _rows_of_ids(embeddings, [0]).shape[1]
    if rows.dim() != 2 or rows.numel() == 0 or rows.shape[1] != width:
        raise SoftPromptError(
            f'start.prompt "{prompt}" has rows of shape {list(rows.shape)}, and the backbone takes rows of width '
            f"{width}; start from a soft prompt that was trained on a backbone of this width"
        )
    if not torch.isfinite(rows).all():
        raise SoftPromptError(
            f'start.prompt "{prompt}" holds a value that is infinite or not a number; start from another soft prompt'
        )
    return rows[_repeated(list(range(len(rows))), count)]  # a copy


def _repeated(items: list[int], count: int) -> list[int]:
    """Return ``items`` repeated or cut to ``count``."""
    return [items[index % len(items)] for index in range(count)]
