"""Generation: the prompt is never silently ignored, options are honoured, streams are whole, contexts may mix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_models import FAMILIES, VOCABULARY, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from ptune.config.run import StartConfig
from ptune.errors import BackboneError
from ptune.generation.generate import GenerationOptions, generate
from ptune.models.backbone import Backbone
from ptune.prompts.initial_rows import initial_rows
from ptune.rendering.renderer import Renderer
from ptune.template import Template

TOKENIZER = tiny_tokenizer()
PROMPT = TOKENIZER("Sleep, walk, and eat greens.", add_special_tokens=False)["input_ids"]
TEXTS = ["The film", "这家店的苹果", "Human: Give three tips\n\nAssistant:"]


def words(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def backbone(family: str = "llama", **settings: Any) -> Backbone:
    return Backbone(tiny_model(family, **settings), tiny_tokenizer(), family)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_tokens_of_a_text_generate_what_that_text_generates(family: str, use_cache: bool) -> None:
    """USERS.md, the first: in front, behind and in the middle; alone, and in a batch padded on the left."""
    model = backbone(family)
    tokens = model.attach()
    first = tokens.allocate(len(PROMPT))
    tokens.set_rows(first, model.embeddings(torch.tensor(PROMPT)))
    virtual = list(range(first, first + len(PROMPT)))
    places = [lambda prompt, text: prompt + text, lambda prompt, text: text + prompt, lambda p, t: t[:2] + p + t[2:]]
    soft = [place(virtual, words(text)) for place in places for text in TEXTS]
    hard = [place(PROMPT, words(text)) for place in places for text in TEXTS]
    options = GenerationOptions(max_new_tokens=8)
    alone = [generate(model, [context], options, use_cache=use_cache)[0].ids for context in hard]
    assert len(set(alone)) > 1  # the tiny model does answer differently
    assert [answer.ids for answer in generate(model, soft, options, use_cache=use_cache)] == alone
    assert [generate(model, [context], options, use_cache=use_cache)[0].ids for context in soft] == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_behind_bos_untrained_tokens_of_a_text_generate_what_that_text_generates(family: str) -> None:
    """Where the tokenizer begins every text with <s>, it stands behind opening virtual tokens but for [bos]."""
    tokenizer, text = tiny_tokenizer(), "Sleep, walk, and eat greens."
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model, count = Backbone(tiny_model(family), tokenizer, family), len(PROMPT)
    rows = initial_rows(
        StartConfig(method="text", text=text),
        count,
        embeddings=model.embeddings,
        tokenizer=tokenizer,
        vocabulary_size=VOCABULARY,
        seed=0,
    )
    tokens = model.attach()
    first = tokens.allocate(count)
    tokens.set_rows(first, rows)
    virtual = list(range(first, first + count))

    def contexts(template: str) -> list[list[int]]:
        one = Renderer(Template.parse(template), tokenizer, vocabulary_size=VOCABULARY, first_virtual_id=first)
        return [one.context({"text": text}) for text in TEXTS]

    hard = [list(tokenizer(f"{text} {other}")["input_ids"]) for other in TEXTS]
    behind, before = contexts(f"[bos][P*{count}] {{text}}{{answer}}"), contexts(f"[P*{count}] {{text}}{{answer}}")
    assert [ids[: count + 1] for ids in behind] == [[1, *virtual]] * 3
    assert [ids[: count + 1] for ids in before] == [[*virtual, 1]] * 3
    options = GenerationOptions(max_new_tokens=8)
    expected = [answer.ids for answer in generate(model, hard, options)]
    assert [answer.ids for answer in generate(model, behind, options)] == expected
    last = [model.logits(torch.tensor([ids]), torch.ones(1, len(ids)).long())[0, -1] for ids in (behind[0], before[0])]
    assert not torch.allclose(*last, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "seed": 3},
        {"do_sample": True, "top_p": 0.8, "min_p": 0.02, "seed": 4},
        {"do_sample": True, "temperature": 1.5, "top_k": 30, "repetition_penalty": 1.3, "seed": 5},
    ],
)
def test_without_virtual_tokens_every_option_means_what_it_means_in_transformers(options: dict[str, Any]) -> None:
    model = backbone()
    context = words(TEXTS[0]) + words(" was a quiet wonder")
    ours = generate(model, [context], GenerationOptions(max_new_tokens=12, **options))[0]
    theirs = {name: value for name, value in options.items() if name != "seed"}
    torch.manual_seed(options.get("seed", 0))
    ids = torch.tensor([context])
    output = model.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, pad_token_id=0, **({"top_k": 0} | theirs)
    )
    reply = output[0, len(context) :].tolist()
    assert list(ours.ids) == (reply[: reply.index(2)] if 2 in reply else reply)


def test_penalties_never_meet_virtual_ids_and_look_at_the_text_alone() -> None:
    model = backbone()
    tokens = model.attach()
    first = tokens.allocate(2)
    tokens.set_rows(first, model.embeddings(torch.tensor([20, 21])))
    contexts = [[first, first + 1, *words(text)] for text in TEXTS]
    options = GenerationOptions(max_new_tokens=10, repetition_penalty=1.5, no_repeat_ngram_size=2)
    together = generate(model, contexts, options)
    assert [generate(model, [context], options)[0].ids for context in contexts] == [answer.ids for answer in together]
    for answer in together:
        pairs = list(zip(answer.ids, answer.ids[1:], strict=False))
        assert len(set(pairs)) == len(pairs)


def test_a_seed_gives_the_same_sample_and_leaves_the_global_generator_alone() -> None:
    model = backbone()
    options = GenerationOptions(max_new_tokens=12, do_sample=True, temperature=2.0, seed=7)
    before = torch.get_rng_state()
    one, same = (generate(model, [words(TEXTS[0])], options)[0].ids for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    other = generate(model, [words(TEXTS[0])], options.model_copy(update={"seed": 8}))[0].ids
    assert one == same
    assert one != other


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS])
def test_pieces_of_a_stream_make_the_text_and_hold_no_half_character(texts: list[str]) -> None:
    model = backbone("qwen2")
    pieces: dict[int, list[str]] = {}
    options = GenerationOptions(max_new_tokens=24, do_sample=True, temperature=1.5, seed=1)

    def listen(number: int, text: str) -> None:
        pieces.setdefault(number, []).append(text)

    answers = generate(model, [words(text) for text in texts], options, on_text=listen)
    for number, answer in enumerate(answers):
        assert "".join(pieces[number]) == answer.text
    assert any(len(parts) > 1 for parts in pieces.values())


def test_a_stop_text_ends_the_answer_before_it() -> None:
    model = backbone()
    plain = generate(model, [words(TEXTS[1])], GenerationOptions(max_new_tokens=16))[0]
    stop = plain.text[3:5]
    pieces: list[str] = []
    stopped = generate(
        model,
        [words(TEXTS[1])],
        GenerationOptions(max_new_tokens=16, stop=(stop,)),
        on_text=lambda _, text: pieces.append(text),
    )[0]
    assert stopped.text == plain.text[: plain.text.index(stop)] == "".join(pieces)
    assert stopped.finish_reason == "stop"
    assert plain.finish_reason == "length"


@pytest.mark.parametrize("length", [4, 6, 9])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_nothing_of_a_stop_text_near_the_start_is_told(start: int, length: int) -> None:
    model = backbone()
    plain = generate(model, [words(TEXTS[1])], GenerationOptions(max_new_tokens=16))[0]
    stop, pieces = plain.text[start : start + length], []
    options = GenerationOptions(max_new_tokens=16, stop=(stop,))
    stopped = generate(model, [words(TEXTS[1])], options, on_text=lambda _, text: pieces.append(text))[0]
    assert stopped.text == plain.text[: plain.text.index(stop)] == "".join(pieces)
    assert stopped.finish_reason == "stop"


def test_the_limit_counts_virtual_tokens_and_no_room_is_said() -> None:
    model = backbone()
    assert model.context_limit == 256
    nearly_full = generate(model, [[5] * 250], GenerationOptions(max_new_tokens=50))[0]
    assert len(nearly_full.ids) <= 6
    with pytest.raises(BackboneError, match="has 256 tokens, virtual ones counted, and llama takes 256: no room"):
        generate(model, [[5] * 256])


def test_virtual_tokens_are_never_generated() -> None:
    model = backbone()
    tokens = model.attach()
    tokens.set_rows(tokens.allocate(50), torch.randn(50, 32) * 5)
    options = GenerationOptions(max_new_tokens=40, do_sample=True, temperature=50.0, seed=0)
    assert all(token < VOCABULARY for token in generate(model, [words(TEXTS[0])], options)[0].ids)


def test_options_that_mean_nothing_are_refused() -> None:
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"stop": ("",)}, {"num_beams": 4}):
        with pytest.raises(ValidationError):
            GenerationOptions(**wrong)


def test_a_long_neighbour_shortens_no_answer() -> None:
    backbone = Backbone(tiny_model("gpt2"), tiny_tokenizer(), "tiny")
    limit = backbone.context_limit or 0
    contexts = [[5, 6, 7], [9] * (limit - 6), [8, 9], [4] * (limit - 6)]
    options = GenerationOptions(max_new_tokens=20)
    alone = [generate(backbone, [context], options)[0] for context in contexts]
    assert generate(backbone, contexts, options) == alone
    assert max(len(answer.ids) for answer in alone) > 6


def test_ids_end_where_the_text_does() -> None:
    backbone = Backbone(tiny_model("llama"), tiny_tokenizer(), "tiny")
    (whole,) = generate(backbone, [[5, 6, 7]], GenerationOptions(max_new_tokens=12))
    stop = backbone.tokenizer.decode(whole.ids[6:8])
    (cut,) = generate(backbone, [[5, 6, 7]], GenerationOptions(max_new_tokens=12, stop=(stop,)))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert whole.ids[: len(cut.ids)] == cut.ids
    assert backbone.tokenizer.decode(cut.ids) == cut.text


def test_options_of_sampling_are_refused_without_it() -> None:
    with pytest.raises(ValueError, match="temperature, top_p only count when sampling, and do_sample is off"):
        GenerationOptions(temperature=0.7, top_p=0.9)
    GenerationOptions(do_sample=True, temperature=0.0, top_p=0.9)


def test_nothing_to_continue_is_said() -> None:
    backbone = Backbone(tiny_model("llama"), tiny_tokenizer(), "tiny")
    with pytest.raises(BackboneError, match="there is nothing to continue"):
        generate(backbone, [[]], GenerationOptions())


def test_each_answer_is_told_when_it_ends_and_can_be_ended_alone() -> None:
    model, options = backbone(), GenerationOptions(max_new_tokens=10)
    contexts, limits = [words(text) for text in TEXTS], [3, 10, 6]
    whole = generate(model, contexts, options)
    events: list[tuple[int, object]] = []
    answers = generate(
        model,
        contexts,
        options,
        on_text=lambda number, text: events.append((number, text)),
        on_done=lambda number, answer: events.append((number, answer)),
        go_on=lambda number, length: length < limits[number],
    )
    assert [answer.ids for answer in answers] == [one.ids[:n] for one, n in zip(whole, limits, strict=True)]
    for number, answer in enumerate(answers):
        own = [what for n, what in events if n == number]
        assert own[-1] == answer
        assert "".join(map(str, own[:-1])) == answer.text
    ended = [number for number, what in events if not isinstance(what, str)]
    assert ended == sorted(range(3), key=lambda number: len(answers[number].ids))
