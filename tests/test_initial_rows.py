"""What starts the virtual tokens: each method's rows, their order and number, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ptune.config.run import StartConfig
from ptune.errors import BackboneError, ConfigError, SoftPromptError
from ptune.prompts import initial_rows as module
from ptune.prompts.initial_rows import initial_rows

V, H = 400, 16
"""The matrix has more rows than the tokenizer has tokens, as real backbones do."""

_TEXT = [
    "a good film, a very good film, and a bad one: 3 stars of 10!",
    "the waiter brought the wrong soup; the soup was good",
    "这家店的苹果很新鲜，送货也快。",
]


def byte_level_tokenizer(vocabulary: list[str] | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.BPE({token: id for id, token in enumerate(vocabulary)}, []) if vocabulary else models.BPE()
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if vocabulary is None:
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_TEXT, trainer)
        tokenizer.add_tokens(["<tool>"])  # a control token which is not called special, as Qwen has
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


MATRIX = torch.randn(V, H, generator=torch.Generator().manual_seed(0)) * 0.3 + torch.linspace(-1, 1, H)


def take(
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    *,
    seed: int = 0,
    label_words: tuple[str, ...] = (),
    prompt_rows: Callable[[str], Tensor] | None = None,
    matrix: Tensor = MATRIX,
    **start: Any,
) -> Tensor:
    return initial_rows(
        StartConfig(**start),
        count,
        embeddings=lambda ids: matrix[ids],
        tokenizer=tokenizer,
        vocabulary_size=len(matrix),
        label_words=label_words,
        prompt_rows=prompt_rows,
        seed=seed,
    )


def ids_of(rows: Tensor) -> list[int]:
    """Return which row of MATRIX each row is; fails where it is none of them."""
    return [(row == MATRIX).all(1).nonzero().item() for row in rows]


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def words_of(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids 0 to 2 are special and the last was added; of the rest, what has a letter and is whole characters."""
    texts = {token: tokenizer.decode([token]) for token in range(3, len(tokenizer) - 1)}
    return {token for token, text in texts.items() if any(c.isalpha() for c in text) and "\ufffd" not in text}


EVERY_METHOD = pytest.mark.parametrize(
    "start",
    [
        {"method": "vocabulary"},
        {"method": "text", "text": "a good film"},
        {"method": "labels"},
        {"method": "prompt", "prompt": "folder"},
        {"method": "normal"},
        {"method": "uniform"},
    ],
    ids=lambda start: start["method"],
)


@EVERY_METHOD
@pytest.mark.parametrize("count", [1, 4, 40])
def test_any_number_of_float32_rows_of_the_backbones_width(
    tokenizer: PreTrainedTokenizerFast, start: dict[str, str], count: int
) -> None:
    for matrix in (MATRIX, MATRIX.to(torch.bfloat16), MATRIX.double()):
        rows = take(
            tokenizer,
            count,
            label_words=(" good", " bad"),
            prompt_rows=lambda _: torch.ones(3, H),
            matrix=matrix,
            **start,
        )
        assert rows.shape == (count, H)
        assert rows.dtype == torch.float32
        assert not rows.requires_grad


@EVERY_METHOD
def test_same_seed_gives_the_same_rows_and_global_state_is_untouched(
    tokenizer: PreTrainedTokenizerFast, start: dict[str, str]
) -> None:
    arguments: dict[str, Any] = {"label_words": (" good", " bad"), "prompt_rows": lambda _: torch.ones(3, H), **start}
    before = torch.random.get_rng_state()
    one = take(tokenizer, 8, seed=3, **arguments)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, take(tokenizer, 8, seed=3, **arguments))
    drawn = start["method"] in ("vocabulary", "labels", "normal", "uniform")
    assert torch.equal(one, take(tokenizer, 8, seed=4, **arguments)) != drawn


@EVERY_METHOD
def test_rows_are_a_copy_that_may_be_changed(tokenizer: PreTrainedTokenizerFast, start: dict[str, str]) -> None:
    matrix, earlier = MATRIX.clone(), torch.ones(4, H)
    take(tokenizer, 4, label_words=(" good",), prompt_rows=lambda _: earlier, matrix=matrix, **start).zero_()
    assert torch.equal(matrix, MATRIX)
    assert torch.equal(earlier, torch.ones(4, H))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 150))
def test_vocabulary_samples_words_only_and_none_twice_before_all_were_taken(seed: int, count: int) -> None:
    tokenizer = byte_level_tokenizer()
    words = words_of(tokenizer)
    ids = ids_of(take(tokenizer, count, seed=seed, method="vocabulary"))
    assert set(ids) <= words
    assert len(set(ids)) == min(count, len(words))
    most = max(ids.count(token) for token in ids)
    assert most == -(-count // len(words))


def test_vocabulary_leaves_out_added_tokens_punctuation_and_halves_of_characters(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    taken = set(ids_of(take(tokenizer, 1000, method="vocabulary")))
    assert taken == words_of(tokenizer)
    for text in ("<tool>", "!", "3", "</s>"):
        assert not taken & set(tokens(tokenizer, text))
    assert set(tokens(tokenizer, " good")) <= taken


def test_vocabulary_never_takes_rows_beyond_the_matrix(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = take(tokenizer, 200, method="vocabulary", matrix=MATRIX[:60])
    assert max(ids_of(rows)) < 60


def test_vocabulary_prefers_the_most_common_words(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMMON_WORDS", 20)
    assert set(ids_of(take(tokenizer, 20, method="vocabulary"))) == set(sorted(words_of(tokenizer))[:20])


def test_a_vocabulary_without_words_is_refused() -> None:
    digits = byte_level_tokenizer(["<pad>", "<s>", "</s>", "1", "2", "!"])
    with pytest.raises(ConfigError) as caught:
        take(digits, 4, method="vocabulary")
    assert str(caught.value) == (
        "sampled virtual tokens need words in the tokenizer's vocabulary, and none of its tokens has a letter; "
        'choose start.method "text" or "normal"'
    )


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 60), text=st.sampled_from(["a good film", "这家店的苹果", "the soup was good!", "x"]))
def test_text_is_cut_or_repeated_to_the_number_of_virtual_tokens(count: int, text: str) -> None:
    tokenizer = byte_level_tokenizer()
    expected = (tokens(tokenizer, text) * count)[:count]
    assert ids_of(take(tokenizer, count, method="text", text=text)) == expected


def test_text_of_no_tokens_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    empty = byte_level_tokenizer(["<pad>", "<s>", "</s>", "a"])
    with pytest.raises(ConfigError) as caught:
        take(empty, 4, method="text", text="!!")
    assert str(caught.value) == (
        "start.text expected words, and '!!' gives no tokens; write what the task asks for, "
        'or choose method "vocabulary"'
    )


def test_labels_come_first_and_sampled_words_fill_the_rest(tokenizer: PreTrainedTokenizerFast) -> None:
    good, bad = tokens(tokenizer, " good"), tokens(tokenizer, "!")
    assert len(good) == len(bad) == 1
    ids = ids_of(take(tokenizer, 30, method="labels", label_words=(" good", "!")))
    assert ids[:2] == good + bad
    assert set(ids[2:]) <= words_of(tokenizer) - set(good)
    assert len(set(ids)) == 30


def test_tokens_of_long_labels_are_taken_in_turn_and_once(tokenizer: PreTrainedTokenizerFast) -> None:
    labels = ("xyz", "xq")
    assert [len(tokens(tokenizer, words)) for words in labels] == [3, 2]
    x, y, z, q = tokens(tokenizer, "xyzq")
    assert ids_of(take(tokenizer, 3, method="labels", label_words=labels)) == [x, y, q]
    assert ids_of(take(tokenizer, 4, method="labels", label_words=labels)) == [x, y, q, z]


@pytest.mark.parametrize("label_words", [(), ("",)])
def test_labels_without_words_are_refused(tokenizer: PreTrainedTokenizerFast, label_words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        take(tokenizer, 4, method="labels", label_words=label_words)
    assert str(caught.value) == (
        'start.method "labels" needs label words, and the task has none; give the task a verbalizer, '
        'or choose method "vocabulary" or "text"'
    )


@pytest.mark.parametrize(("count", "order"), [(2, [0, 1]), (3, [0, 1, 2]), (7, [0, 1, 2, 0, 1, 2, 0])])
def test_another_prompts_rows_are_cut_or_repeated(
    tokenizer: PreTrainedTokenizerFast, count: int, order: list[int]
) -> None:
    earlier = torch.randn(3, H, generator=torch.Generator().manual_seed(1))
    asked = []

    def read(folder: str) -> Tensor:
        asked.append(folder)
        return earlier

    assert torch.equal(take(tokenizer, count, method="prompt", prompt="prompts/one", prompt_rows=read), earlier[order])
    assert asked == ["prompts/one"]


@pytest.mark.parametrize("shape", [(3, H + 2), (0, H), (H,)])
def test_a_prompt_of_another_width_is_refused_with_both_widths(
    tokenizer: PreTrainedTokenizerFast, shape: tuple[int, ...]
) -> None:
    with pytest.raises(SoftPromptError) as caught:
        take(tokenizer, 4, method="prompt", prompt="prompts/one", prompt_rows=lambda _: torch.zeros(shape))
    assert str(caught.value) == (
        f'start.prompt "prompts/one" has rows of shape {list(shape)}, and the backbone takes rows of width {H}; '
        "start from a soft prompt that was trained on a backbone of this width"
    )


def test_a_prompt_that_is_not_finite_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SoftPromptError) as caught:
        take(tokenizer, 4, method="prompt", prompt="prompts/one", prompt_rows=lambda _: torch.full((2, H), torch.nan))
    assert str(caught.value) == (
        'start.prompt "prompts/one" holds a value that is infinite or not a number; start from another soft prompt'
    )


def test_a_prompt_without_a_reader_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError) as caught:
        take(tokenizer, 4, method="prompt", prompt="prompts/one")
    assert str(caught.value) == (
        'start.method "prompt" needs a way to read "prompts/one", and none was given; '
        "pass prompt_rows, a function from the folder to its rows"
    )


@pytest.mark.parametrize("method", ["normal", "uniform"])
def test_noise_has_mean_and_deviation_of_the_real_tokens_in_every_dimension(
    tokenizer: PreTrainedTokenizerFast, method: str
) -> None:
    matrix = MATRIX.clone()
    matrix *= torch.linspace(0.1, 2, H)
    matrix[len(tokenizer) :] = 1000.0  # padding rows must not be measured
    rows = take(tokenizer, 20_000, method=method, matrix=matrix)
    real = matrix[: len(tokenizer)]
    assert torch.allclose(rows.mean(0), real.mean(0), atol=0.03)
    assert torch.allclose(rows.std(0), real.std(0), rtol=0.03)


def test_uniform_noise_keeps_within_its_bounds_and_normal_noise_does_not(tokenizer: PreTrainedTokenizerFast) -> None:
    real = MATRIX[: len(tokenizer)]
    bound = real.std(0, correction=0) * 3**0.5 * 1.0001

    def farthest(method: str) -> float:
        rows = take(tokenizer, 2000, method=method)
        return ((rows - real.mean(0)).abs() / bound).max().item()

    assert 0.99 < farthest("uniform") <= 1
    assert farthest("normal") > 1.5


def test_noise_measures_a_fixed_even_sample_of_a_large_vocabulary(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STATISTICS_ROWS", 5)
    asked: list[list[int]] = []

    def embeddings(ids: Tensor) -> Tensor:
        asked.append(ids.tolist())
        return MATRIX[ids]

    for seed in (0, 1):
        initial_rows(
            StartConfig(method="normal"), 3, embeddings=embeddings, tokenizer=tokenizer, vocabulary_size=101, seed=seed
        )
    assert asked == [[0, 25, 50, 75, 100]] * 2


@pytest.mark.parametrize("start", [{"method": "vocabulary"}, {"method": "text", "text": "good"}, {"method": "normal"}])
def test_embeddings_that_are_not_finite_are_refused(tokenizer: PreTrainedTokenizerFast, start: dict[str, str]) -> None:
    with pytest.raises(BackboneError) as caught:
        take(tokenizer, 4, matrix=torch.full((V, H), torch.inf), **start)
    assert str(caught.value) == (
        f'start method "{start["method"]}" expected finite embeddings, and the backbone\'s hold a value that is '
        "infinite or not a number; load it in another dtype, or check its files"
    )
