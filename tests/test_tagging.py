"""Tagging: words to tokens, tags of every scheme to entities, runs, answers, what is cut, bad input."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from heads import RECORDS, TAGGING, backbone_of, settings
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES, Entities
from tiny_models import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ptune.config.file import load_config
from ptune.config.task import TaggingConfig
from ptune.engine.engine import Engine
from ptune.errors import ConfigError, DataError, MissingExtraError, PtuneError, SoftPromptError, TemplateError
from ptune.models.backbone import Backbone
from ptune.records.record import Record
from ptune.rendering.words import spelled_out, split_text, tokenised_words
from ptune.tasks.registry import task_for
from ptune.tasks.spans import Span, plain_tag, spans_of
from ptune.tasks.tagging import Tagging
from ptune.template import Template
from ptune.training.assembly import assemble
from ptune.training.train import train

SENTENCE = ["EU", "rejects", "German", "call", "of", "New", "York", "Times"]
SCHEMES = {
    "BIO": (IOB2, ["B-ORG", "O", "B-MISC", "O", "O", "B-ORG", "I-ORG", "I-ORG"]),
    "IOB1": (IOB1, ["I-ORG", "O", "I-MISC", "O", "O", "I-ORG", "I-ORG", "I-ORG"]),
    "BIOES": (IOBES, ["S-ORG", "O", "S-MISC", "O", "O", "B-ORG", "I-ORG", "E-ORG"]),
    "BMES": (IOBES, ["S-ORG", "O", "S-MISC", "O", "O", "B-ORG", "M-ORG", "E-ORG"]),
    "BILOU": (BILOU, ["U-ORG", "O", "U-MISC", "O", "O", "B-ORG", "I-ORG", "L-ORG"]),
}


def tagging(family: str = "gpt2", template: str = "[P*4]{tokens}", **config: Any) -> Tagging:
    limits = {name: config.pop(name) for name in ("max_length", "overlong") if name in config}
    values = {"tags": ("B-FOOD", "B-SIGN", "O")} | config
    task = task_for(backbone_of(family), TaggingConfig(**values), Template.parse(template), **limits)
    assert isinstance(task, Tagging)
    return task


@pytest.mark.parametrize("name", list(SCHEMES))
def test_every_scheme_gives_the_same_entities_as_seqeval(name: str) -> None:
    scheme, tags = SCHEMES[name]
    assert spans_of(tags) == [Span(0, 1, "ORG"), Span(2, 3, "MISC"), Span(5, 8, "ORG")]
    strict = [tag.replace("M-ORG", "I-ORG") for tag in tags]
    expected = [(e.start, e.end, e.tag) for e in Entities([strict], scheme).entities[0]]
    assert [(span.start, span.end, span.type) for span in spans_of(tags)] == expected


@pytest.mark.parametrize("letters", ["BIO", "IO", "BIESO", "BMESO", "BILUO"])
def test_any_sequence_of_tags_gives_seqevals_entities(letters: str) -> None:
    chance = random.Random(letters)
    for _ in range(300):
        tags = [f"{letter}-{chance.choice('XY')}" for letter in chance.choices(letters, k=8)]
        tags = ["O" if tag[0] == "O" else tag for tag in tags]
        expected = [(kind, start, end + 1) for kind, start, end in get_entities([plain_tag(tag) for tag in tags])]
        assert [(span.type, span.start, span.end) for span in spans_of(tags)] == expected


def test_tags_without_types_make_words() -> None:
    assert spans_of(["B", "M", "E", "S", "B", "E"]) == [Span(0, 3, ""), Span(3, 4, ""), Span(4, 6, "")]


def test_words_are_joined_as_their_language_does() -> None:
    assert spelled_out(["EU", "rejects", "it", "."]) == ("EU rejects it .", [0, 3, 11, 14])
    assert spelled_out(["中", "国", "（", "P", "M", "）", "1"]) == ("中国（PM）1", [0, 1, 2, 3, 4, 5, 6])
    assert spelled_out(["我", "用", "Python", "3"]) == ("我用 Python 3", [0, 1, 3, 10])
    assert spelled_out(["A", "b"]) == ("A b", [0, 2])


def test_a_text_is_split_into_words() -> None:
    assert split_text("The U.N. met co-pilots, in\u3000Rome: 3.5!") == [
        *("The", "U.N.", "met", "co-pilots", ",", "in", "Rome", ":", "3.5", "!")
    ]
    assert split_text("我用Python，好。") == ["我", "用", "Python", "，", "好", "。"]


@pytest.mark.parametrize("words", [SENTENCE, ["The", "waiter", "'s", "soup"], ["这", "家", "店", "的", "苹", "果"]])
def test_every_word_begins_a_token_of_its_own(words: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    ids, places = tokenised_words(tokenizer, words)
    assert [place for place in places if place is not None] == sorted(set(places))  # type: ignore[type-var]
    starts = [place for place in places if place is not None]
    pieces = [ids[start:end] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
    assert [tokenizer.decode(piece).strip() for piece in pieces] == words


def test_where_tokens_are_not_shared_they_are_the_texts_own() -> None:
    tokenizer = tiny_tokenizer()
    ids, _ = tokenised_words(tokenizer, SENTENCE)
    assert ids == tokenizer(" ".join(SENTENCE), add_special_tokens=False)["input_ids"]


def test_a_token_over_two_characters_is_taken_apart() -> None:
    model = models.BPE(vocab={"苹": 0, "果": 1, "苹果": 2, "新": 3}, merges=[("苹", "果")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    assert tokenizer("苹果新")["input_ids"] == [2, 3]
    assert tokenised_words(tokenizer, list("苹果新")) == ([0, 1, 3], [0, 1, 2])


def test_a_word_is_read_behind_the_blank_before_it() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "b": 2}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert tokenised_words(fast, ["a", "b"]) == ([1, 0, 2], [0, 2])


def like_sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts a blank in front of a text, a token of its own before most words."""
    words = [
        ("<unk>", -9.0),
        ("▁", -2.0),
        ("▁the", -1.0),
        *((word, -1.0) for word in ("soup", "film", "新", "鲜", "苹果")),
    ]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=0))
    if kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    if kind == "t5":
        tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


class Slow:
    """A tokenizer that tells no offsets."""

    is_fast = False

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        self._fast, self.decode = fast, fast.decode

    def __call__(self, text: str, **how: Any) -> Any:
        assert "return_offsets_mapping" not in how
        return self._fast(text, **how)


@pytest.mark.parametrize(
    "words", [["soup", "film"], ["the", "soup", "the"], list("新鲜"), ["新", "鲜", "苹果"], ["door"]]
)
@pytest.mark.parametrize("kind", ["t5", "llama", "without a decoder"])
def test_no_word_is_read_at_a_lone_blank_before_it(kind: str, words: list[str]) -> None:
    tokenizer = like_sentencepiece(kind)
    assert tokenizer.convert_ids_to_tokens(tokenizer("soup")["input_ids"]) == ["▁", "soup"]
    for one in (tokenizer, Slow(tokenizer)):
        ids, places = tokenised_words(one, words)  # type: ignore[arg-type]
        read = tokenizer.convert_ids_to_tokens([ids[place] for place in places if place is not None])
        assert [piece.replace("▁", "").replace("<unk>", "door") for piece in read] == words


def test_a_word_that_tokenises_to_nothing_counts_as_o() -> None:
    backbone = backbone_of("bert")
    normalizer = normalizers.Replace("☃", "")
    backbone.tokenizer.backend_tokenizer.normalizer = normalizer
    task = task_for(backbone, TaggingConfig(tags=("B-FOOD", "O")), Template.parse("[P]{tokens}"))
    record = {"tokens": ["soup", "☃", "film"], "tags": ["B-FOOD", "O", "O"]}
    example = task.example(record)
    assert example is not None
    assert len(example.target) == 2


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_a_word_is_read_at_its_first_token(family: str) -> None:
    task = tagging(family, "Tag: [P*4]{tokens}" if family == "gpt2" else "Tag: {tokens}[P*4] now")
    (row,) = task.rows({"tokens": SENTENCE})
    tokenizer = task.renderer.tokenizer
    read = [tokenizer.decode([row.ids[place]]).strip() for place in row.read_at]
    assert len(read) == len(SENTENCE)
    assert all(word.startswith(piece) and piece for word, piece in zip(SENTENCE, read, strict=True))


def test_words_that_are_cut_away_count_as_o_and_are_counted(tmp_path: Path) -> None:
    backbone = backbone_of("gpt2")
    long = Record({"tokens": ["soup"] * 30 + ["apple"], "tags": ["B-FOOD"] * 31}, "a long one")
    config = settings(tmp_path, TAGGING, {"max_length": 12, "overlong": "drop"}, max_steps=2)
    prompt = train(config, backbone=backbone, records=([*RECORDS[0], long], [*RECORDS[1], long]))
    assert prompt.summary["dropped"] > 0
    assert prompt.summary["after"]["unread_words"] > 20
    with Engine(backbone) as engine:
        engine.add("one", prompt)
        (answer,) = engine.tag("one", [list(long["tokens"])])
    assert len(answer["tags"]) == 31
    assert answer["unread_words"] > 0
    assert answer["tags"][-answer["unread_words"] :] == ["O"] * answer["unread_words"]
    assert tagging(max_length=12, overlong="cut").example(long) is not None
    with pytest.raises(DataError, match="its answer has .* tokens"):
        tagging(max_length=12, overlong="error").example(long)


@pytest.mark.parametrize("scheme", ["BIO", "BMES"])
def test_a_run_learns_its_entities_and_tells_where_they_stand(scheme: str, tmp_path: Path) -> None:
    backbone = backbone_of("llama")
    chance, data = random.Random(0), []
    for number in range(48):
        words = chance.choices(["soup", "film", "room"], k=3)
        tags = ["O"] * 3
        place = chance.randint(0, 3)
        words[place:place] = ["New", "York", "Times"]
        middle, end = ("M", "E") if scheme == "BMES" else ("I", "I")
        tags[place:place] = ["B-ORG", f"{middle}-ORG", f"{end}-ORG"]
        data.append(Record({"tokens": words, "tags": tags}, f"record {number}"))
    config = settings(tmp_path, TAGGING, {"deep": True}, max_steps=60, batch_size=8, learning_rate=0.05)
    prompt = train(config, backbone=backbone, records=(data[:40], data[40:]))
    assert prompt.summary["metric"] == "entity_f1"
    with Engine(backbone) as engine:
        engine.add("names", prompt)
        answers = engine.predict("names", data[40:])
        metrics = engine.evaluate("names", data[40:])
    plain = [[[plain_tag(tag) for tag in one["tags"]] for one in many] for many in (data[40:], answers)]
    assert metrics["entity_f1"] == pytest.approx(f1_score(*plain))
    assert metrics["entity_f1"] > 0.6
    spans = [span for answer in answers for span in answer["spans"]]
    whole = next(span for span in spans if span["text"] == "New York Times")
    assert (whole["type"], whole["end"] - whole["start"]) == ("ORG", 3)
    assert 0 < whole["probability"] <= 1


def test_numbers_with_names_are_tags() -> None:
    task = tagging(tags=("O", "B-FOOD"), tag_names={0: "O", 1: "B-FOOD"})
    example = task.example({"tokens": ["soup", "is"], "tags": [1, 0]})
    assert example is not None
    assert example.target == [1, 0]


def test_without_seqeval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
    task = tagging()
    with pytest.raises(MissingExtraError, match=r"need seqeval: pip install ptune\[metrics\]"):
        task.evaluate(backbone_of("gpt2"), RECORDS[1])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tokens": ["soup", "is"], "tags": ["O"]}, "has 1 tags for 2 words; write both as lists of one length"),
    ({"tokens": ["soup"], "tags": ["B-FOD"]}, 'the tag "B-FOD" is not among B-FOOD, B-SIGN, O; add it to task.tags or'),
    ({"tokens": ["soup"], "tags": ["NN"]}, "the tag 'NN' is of no scheme that ptune reads; write O, or B-"),
    ({"tokens": ["soup"], "tags": [3]}, "or say by task.tag_names what the data means, as in {0: O, 1: B-PER}"),
    ({"tokens": ["soup"], "tags": "O"}, 'the field "tags" holds str, and should hold a list of tags'),
    ({"tokens": "soup", "tags": ["O"]}, 'the field "tokens" holds one text; write its words as a list'),
    ({"tokens": [], "tags": []}, 'the field "tokens" holds no words; leave the record out'),
    ({"tokens": ["soup", " "], "tags": ["O", "O"]}, "should hold a list of words, none of them empty"),
    ({"words": ["soup"], "tags": ["O"]}, 'has no words: it lacks the field "tokens" and has words, tags; name the'),
    ({"tokens": ["soup"], "ner": ["O"]}, 'has no tags: it lacks the field "tags" and has tokens, ner; name the right'),
]


@pytest.mark.parametrize(("record", "sentence"), BAD)
def test_mistakes_in_records_are_named(record: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        tagging().example(Record(record, "record 7"))
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("record 7")


def test_templates_and_models_that_cannot_tag_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="so virtual tokens behind the words would change no tag; put {tokens} at"):
        tagging("gpt2", "{tokens}[P*4]")
    with pytest.raises(TemplateError, match="so text behind the words would change no tag"):
        tagging("gpt2", "[P*4]{tokens} now")
    with pytest.raises(ConfigError, match="an encoder-decoder model reads words with one half .* so it cannot tag"):
        tagging("t5")
    with pytest.raises(ConfigError, match="a tagging needs at least two tags, and has O; list them as task.tags"):
        tagging(tags=("O",))
    with pytest.raises(PtuneError, match="names the field of its words once, outside optional pieces"):
        tagging("gpt2", "[P*4][?{tokens}]")
    with Engine(backbone_of("gpt2")) as engine, pytest.raises(SoftPromptError, match='no soft prompt "x" is loaded'):
        engine.tag("x", ["soup"])


def test_the_text_is_what_the_template_shows(tmp_path: Path) -> None:
    backbone = backbone_of("gpt2")
    config = settings(tmp_path, TAGGING, {"template": "[P*4]{kind}: {tokens}"}, max_steps=1)
    with pytest.raises(DataError, match='lacks the field "kind" that the template names'):
        assemble(config, backbone, RECORDS)
    kinds = [[Record(dict(one) | {"kind": "menu"}, "r") for one in part] for part in RECORDS]
    prompt = train(config, backbone=backbone, records=(kinds[0], kinds[1]))
    with Engine(backbone) as engine:
        engine.add("one", prompt)
        assert engine.predict("one", [{"kind": "menu", "tokens": "soup, please"}])[0]["tokens"] == [
            *("soup", ",", "please")
        ]
        with pytest.raises(DataError, match="has the fields kind, tokens; give records to predict"):
            engine.tag("one", ["soup"])
        with pytest.raises(DataError, match="got a single text; write"):
            engine.tag("one", "soup")


def test_the_command_line_trains_scores_and_tags(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer("bert").save_pretrained(tmp_path / "model")
    for name, rows in zip(("train", "dev"), RECORDS, strict=True):
        lines = "".join(json.dumps(dict(row)) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    bad = [{"tokens": ["soup", "is", word], "tags": ["B-FOOD", "O"]} for word in ("hot", "cold")]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(one) + "\n" for one in bad), encoding="utf-8")
    values = settings(tmp_path / "prompt", TAGGING, {"deep": True}).model_dump(mode="json")
    values |= {"model": str(tmp_path / "model")}
    values["data"] = {"train": str(tmp_path / "train.jsonl"), "dev": str(tmp_path / "dev.jsonl")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert load_config(tmp_path / "run.yaml").task.type == "tagging"

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ptune", *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == code, done.stderr
        return done

    assert "for 4 virtual tokens and a linear head of 3 outputs" in run("train", tmp_path / "run.yaml").stdout
    shown = run("eval", tmp_path / "prompt", "--data", tmp_path / "dev.jsonl").stdout
    assert "entity_precision" in shown
    run("predict", tmp_path / "prompt", tmp_path / "dev.jsonl", "--output", tmp_path / "out.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [answer["tokens"] for answer in answers] == [record["tokens"] for record in RECORDS[1]]
    assert all(len(answer["tags"]) == len(answer["tokens"]) for answer in answers)
    assert {"type", "start", "end", "text", "probability"} == set().union(*(s for a in answers for s in a["spans"]))
    assert json.loads(run("predict", tmp_path / "prompt", "Soup, please").stdout)["tokens"] == ["Soup", ",", "please"]
    assert "B-FOOD, B-SIGN, O" in run("inspect", tmp_path / "prompt").stdout
    assert ">>" in run("inspect", "data", tmp_path / "run.yaml", "--count", 1).stdout
    refused = run("train", tmp_path / "run.yaml", "--data", tmp_path / "bad.jsonl", "--overwrite", code=2).stderr
    assert "has 2 tags for 3 words; write both as lists of one length" in refused
    refused = run("eval", tmp_path / "prompt", "--data", tmp_path / "bad.jsonl", code=2).stderr
    assert "has 2 tags for 3 words" in refused


def test_tags_of_real_data_are_read(real_data: Path) -> None:
    for name, family in (("conll2003", "bert"), ("resume_ner_zh", "gpt2")):
        lines = (real_data / name / "dev.jsonl").read_text(encoding="utf-8").splitlines()[:60]
        some = [Record(json.loads(line), name) for line in lines]
        tags = tuple(sorted({tag for record in some for tag in record["tags"]}))
        backbone = Backbone(tiny_model(family), tiny_tokenizer(family), family)
        task = task_for(backbone, TaggingConfig(tags=tags), Template.parse("[P*4]{tokens}"))
        for record in some:
            example = task.example(record)
            assert example is not None
            read = len(example.rows[0].read_at)
            assert read == len(example.target)
            assert read == len(record["tokens"]) or example.rows[0].cut
