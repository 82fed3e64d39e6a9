"""Texts that grow together, join and leave at any time say what each says alone by transformers' own way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import ENCODER_DECODER_FAMILIES, FAMILIES, tiny_model, tiny_tokenizer

from ptune.errors import ConfigError
from ptune.generation.generate import Generated, GenerationOptions, Writer, generate
from ptune.generation.growing_cache import GrowingCache
from ptune.generation.growing_text import GrowingText, Listener
from ptune.models.backbone import Backbone
from ptune.models.deep_start import keys_and_values_of

TEXTS = [[9, 40, 60, 70, 80, 99], [50, 41, 42], [100, 200, 7, 7, 30, 31, 32, 33, 34, 35], [3], [12, 13], [60, 61, 62]]
LENGTHS = [9, 3, 12, 1, 7, 20]
SAMPLED = {"do_sample": True, "temperature": 1.7, "top_p": 0.95}


def backbone_of(family: str = "llama") -> Backbone:
    return Backbone(tiny_model(family), tiny_tokenizer(family), family)


def contexts_of(backbone: Backbone) -> list[list[int]]:
    """The texts, most of them behind or around virtual tokens of soft prompts of two lengths, two of them deep."""
    tokens = backbone.attach()
    rows = [backbone.embeddings(torch.arange(30, 30 + count)) for count in (5, 2)]
    firsts = [tokens.allocate(len(one)) for one in rows]
    for first, one in zip(firsts, rows, strict=True):
        tokens.set_rows(first, one)
    short, long = ([*range(first, first + len(one))] for first, one in zip(firsts, rows, strict=True))
    first, (values, shape) = tokens.allocate(4), keys_and_values_of(backbone, backbone.embeddings(torch.arange(70, 74)))
    tokens.set_rows(first, values, shape)
    deep = [*range(first, first + 4)]
    opened = [short, long, [], [*long, *short], deep, deep]
    contexts = [[*virtual, *text] for virtual, text in zip(opened, TEXTS, strict=True)]
    return [*contexts[:2], [*contexts[2][:4], *long, *contexts[2][4:]], *contexts[3:]]


def alone(backbone: Backbone, contexts: list[list[int]], options: list[GenerationOptions]) -> list[Generated]:
    """Return what transformers' ``generate`` says to each."""
    backbone.plan = "reference"
    try:
        return [generate(backbone, [one], own)[0] for one, own in zip(contexts, options, strict=True)]
    finally:
        backbone.plan = "auto"


@contextmanager
def passes(backbone: Backbone) -> Iterator[list[tuple[int, ...]]]:
    """Note the shape of the ids of each forward pass."""
    shapes: list[tuple[int, ...]] = []

    def hook(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
        shapes.append(tuple(named["input_ids"].shape))

    handle = backbone.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_whoever_joins_when_says_what_it_says_alone(family: str, sampled: bool) -> None:
    backbone = backbone_of(family)
    contexts = contexts_of(backbone)
    options = [
        GenerationOptions(max_new_tokens=length, **({"seed": n, **SAMPLED} if sampled and n % 2 else {}))
        for n, length in enumerate(LENGTHS)
    ]
    expected = alone(backbone, contexts, options)
    assert len({one.ids for one in expected}) == len(expected)
    answers = [GrowingText(backbone, *one) for one in zip(contexts, options, strict=True)]
    writer = Writer(backbone)
    for joining in (answers[:1], answers[1:4], [], [], answers[4:5], answers[5:]):
        if joining:
            writer.join(joining)
        writer.step()
    while len(writer):
        writer.step()
    assert [answer.result for answer in answers] == expected
    assert generate(backbone, contexts, options, batch_size=4) == expected


def test_a_pass_computes_a_token_of_each_text_that_still_grows_and_nothing_else() -> None:
    backbone = backbone_of()
    lengths = [4, 1, 2, 4]
    contexts = [[40 + n] * (n + 1) for n in range(4)]
    options = [GenerationOptions(max_new_tokens=length) for length in lengths]
    expected = alone(backbone, contexts, options)
    assert [len(one.ids) for one in expected] == lengths
    with passes(backbone) as shapes:
        assert generate(backbone, contexts, options) == expected
    assert shapes[-4:] == [(1, sum(map(len, contexts))), (3, 1), (2, 1), (2, 1)]


def test_a_text_takes_the_place_of_one_that_has_ended() -> None:
    backbone = backbone_of()
    contexts = [[40, 41], [50], [60, 61, 62]]
    options = [GenerationOptions(max_new_tokens=length) for length in (2, 6, 6)]
    expected = alone(backbone, contexts, options)
    generate(backbone, contexts, options)  # whether rows may be packed is tried once
    with passes(backbone) as shapes:
        assert generate(backbone, contexts, options, batch_size=2) == expected
    assert shapes == [(1, 5), (2, 1), (1, 1), *[(2, 1)] * 4, (1, 1)]  # the longest contexts first; then one joins


def test_one_that_is_called_off_leaves_at_the_next_token_and_the_others_go_on() -> None:
    backbone = backbone_of()
    contexts = [[40, 41], [50], [60, 61, 62]]
    options = [GenerationOptions(max_new_tokens=12)] * 3
    expected = alone(backbone, contexts, options)
    wanted = [True] * 3
    answers = [
        GrowingText(backbone, context, options[0], Listener(go_on=lambda _length, n=number: wanted[n]))
        for number, context in enumerate(contexts)
    ]
    writer = Writer(backbone)
    writer.join(answers)
    writer.step()
    wanted[0] = False
    writer.step()
    assert len(writer) == 2
    assert answers[0].result is not None
    assert answers[0].result.ids == expected[0].ids[:3]
    while len(writer):
        writer.step()
    assert [answer.result for answer in answers[1:]] == expected[1:]


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_long_texts_outgrow_the_room_that_they_began_with(family: str) -> None:
    backbone = backbone_of(family)
    contexts = [[40, 41], [50] * 70]
    options = [GenerationOptions(max_new_tokens=150, repetition_penalty=1.2)] * 2
    assert generate(backbone, contexts, options) == alone(backbone, contexts, options)


@pytest.mark.parametrize("family", sorted(ENCODER_DECODER_FAMILIES))
def test_models_of_other_kinds_write_whole_texts_with_options_of_each(family: str) -> None:
    backbone = backbone_of(family)
    options = [
        GenerationOptions(max_new_tokens=length, repetition_penalty=1.0 + n / 4, seed=n, **(SAMPLED if n % 2 else {}))
        for n, length in enumerate(LENGTHS)
    ]
    assert generate(backbone, TEXTS, options) == alone(backbone, TEXTS, options)
    writer, answer = Writer(backbone), GrowingText(backbone, TEXTS[0])
    writer.join([answer])
    assert answer.result is not None
    assert len(writer) == 0


def test_rows_of_a_cache_keep_their_own_whoever_joins_and_leaves() -> None:
    cache, kept = GrowingCache(), {}

    def part(value: int, length: int) -> torch.Tensor:
        return torch.full((4, 1, length, 2), float(value))

    def step() -> None:
        width = cache.next_mask().shape[1]
        assert cache.past.get_mask_sizes(1, 0) == (width, 0)
        assert cache.past.get_seq_length() == width - 1
        new = torch.tensor([[[[float(name)] * 2]] for name in names])
        for layer in range(2):
            keys, values = cache.past.update(new, -new, layer)
            for row, name in enumerate(names):
                kept[name, layer] = keys[row, 0, : cache.lengths[row] + 1, 0].tolist()
                assert values[row, 0, cache.lengths[row], 0] == -name
        cache.grew()
        assert all(set(kept[name, 0]) == {name} for name in names)

    names = [1, 2, 3]
    cache.join([(part(1, 3),), (part(2, 0), part(2, 60)), (part(3, 2), part(3, 1))])
    for _ in range(8):  # past the first room for columns
        step()
    assert cache.lengths == [11, 68, 11]
    cache.leave(0)
    names = [3, 2]
    step()
    cache.join([(part(4, 5),), (part(5, 100),)])
    names = [3, 2, 4, 5]
    step()
    assert cache.lengths == [13, 70, 6, 101]
    for row in (3, 2, 1, 0):
        cache.leave(row)
    assert cache.lengths == []
    cache.join([(part(6, 1),)])
    names = [6]
    step()


def test_a_text_that_fails_leaves_and_its_neighbours_go_on() -> None:
    backbone, heard = backbone_of(), []
    contexts, options = TEXTS[:3], GenerationOptions(max_new_tokens=9)
    expected = generate(backbone, contexts, options)

    def fail(text: str) -> None:
        heard.append(text)
        if len(heard) == 3:
            raise OSError("the pipe is closed")

    writer = Writer(backbone)
    texts = [GrowingText(backbone, one, options) for one in contexts]
    texts[1] = GrowingText(backbone, contexts[1], options, Listener(on_text=fail))
    writer.join(texts)
    while len(writer):
        writer.step()
    assert [text.result for text in texts] == [expected[0], None, expected[2]]
    assert isinstance(texts[1].error, OSError)
    heard.clear()
    with pytest.raises(OSError, match="the pipe is closed"):
        generate(backbone, contexts, options, on_text=lambda number, text: fail(text) if number == 1 else None)


def test_where_some_cannot_begin_none_has_begun() -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = 16
    backbone = Backbone(model, tiny_tokenizer("mistral"), "mistral")

    def fail_on_the_long_one(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
        if named["input_ids"].shape[1] == len(TEXTS[2]):
            raise RuntimeError("no memory")

    model.register_forward_pre_hook(fail_on_the_long_one, with_kwargs=True)
    short = GrowingText(backbone, TEXTS[3], GenerationOptions(max_new_tokens=4))
    long = GrowingText(backbone, TEXTS[2], GenerationOptions(max_new_tokens=30))  # beyond the window: written whole
    writer = Writer(backbone)
    with pytest.raises(RuntimeError, match="no memory"):
        writer.join([short, long])
    assert len(writer) == 0


def test_as_many_texts_at_once_as_is_possible() -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 1 and is 0; raise it"):
        generate(backbone_of(), TEXTS, batch_size=0)
