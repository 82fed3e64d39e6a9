"""A setting that holds a value of another kind: one sentence names it, says what it takes, and what was found."""

from __future__ import annotations

from typing import Any

import pytest

from ptune.config.candidates import parse_vary
from ptune.config.file import parse_config, parse_overrides, setting_names, with_overrides
from ptune.config.other_words import COUNTS, OTHER_WORDS
from ptune.errors import ConfigError

SMALL: dict[str, Any] = {
    "task": {"type": "classification", "verbalizer": {"yes": " good", "no": " bad"}},
    "prompt": {"template": "{text}[P*4]{answer}"},
}


def mistake(overrides: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(SMALL, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trackers", "tensorboard"], "--training.trackers takes a list, as in [a, b], and is 'tensorboard'"),
        (["--quantization", "int9"], "takes 'int8' or 'int4', or settings as in {name: value}, or null, and is 'int9'"),
        (["--patience", "none"], "--training.patience takes a whole number, or null, and is 'none'"),
        (["--batch-size", "true"], "--training.batch_size takes a whole number, and is true"),
        (["--batch-size", "2.5"], "--training.batch_size takes a whole number, and is 2.5"),
        (["--batch-size", "0"], "--training.batch_size takes a number greater than 0, and is 0"),
        (["--learning-rate", "false"], "--training.learning_rate takes a number greater than 0, and is false"),
        (["--learning-rate", "fast"], "--training.learning_rate takes a number, and is 'fast'"),
        (["--deep", "maybe"], "--prompt.deep takes true or false, and is 'maybe'"),
        (["--verbalizer", "[a, b]"], "--task.verbalizer takes settings as in {name: value}, and is ['a', 'b']"),
        (["--verbalizer", "{a: ' x', b: 1}"], "--task.verbalizer.b takes text, and is 1; put it into quotes"),
        (["--label-weights", "{'yes': high}"], "--task.label_weights.yes takes a number, and is 'high'"),
        (["--seed="], "--training.seed takes a whole number, and is null"),
        (["--max-new-tokens", "3"], "It belongs to a task of type generation or extraction, and this one is classif"),
    ],
)
def test_a_value_of_another_kind_is_told_what_its_setting_takes(arguments: list[str], said: str) -> None:
    message = mistake(parse_overrides(arguments))
    assert said in message
    assert "the config" not in message  # it was not written there
    assert "\n" not in message


def test_a_template_without_virtual_tokens_is_shown_behind_the_sentence() -> None:
    message = mistake({"prompt.template": "{text}{answer}"})
    assert message.endswith("put [P*10] where they should (found '{text}{answer}')")


TOKENS = "For 20 virtual tokens write [P*20] in prompt.template."


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("num-virtual-tokens", TOKENS),
        ("prompt.num_virtual_tokens", TOKENS),
        ("pre_seq_len", TOKENS),
        ("prompt.encoder.pre_seq_len", TOKENS),
        ("lr", 'Here it is called "training.learning_rate".'),
        ("training.lr", 'Here it is called "training.learning_rate".'),
        ("per-device-train-batch-size", 'Here it is called "training.batch_size".'),
        ("output_dir", 'Here it is called "output".'),
        ("resume_from_checkpoint", "Give --resume on the command line."),
    ],
)
def test_words_of_others_are_answered_with_the_own_one(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides([f"--{name}", "20"])
    assert str(caught.value) == f'there is no setting "{name}". {said}'
    dotted = name.replace("-", "_")
    with pytest.raises(ConfigError) as caught:
        parse_config(with_overrides(SMALL, {dotted: 20}))
    assert str(caught.value) == f'the config: there is no setting "{dotted}". {said}'


def test_each_word_of_others_stands_for_a_setting_and_is_none_itself() -> None:
    known = setting_names()
    assert set(OTHER_WORDS.values()) <= set(known)
    assert not {*OTHER_WORDS, *COUNTS} & {name.rpartition(".")[-1] for name in known}


def test_words_of_others_are_answered_where_a_search_varies_them() -> None:
    with pytest.raises(ConfigError, match='no setting "lr". Here it is called "training.learning_rate".'):
        parse_vary(["lr=0.1,0.2"])
    with pytest.raises(ConfigError, match='no setting "num_virtual_tokens". Did you mean "prompt.length"?'):
        parse_vary(["num_virtual_tokens=10,20"])


def test_all_mistakes_of_a_command_line_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["--bf16", "--learning-rte", "3", "--seed", "1", "--lr=0.1"])
    assert str(caught.value).splitlines() == [
        "the command line: ",
        '  - there is no setting "bf16". Here it is called "model.dtype".',
        '  - there is no setting "learning-rte". Did you mean "learning_rate"?',
        '  - there is no setting "lr". Here it is called "training.learning_rate".',
    ]
    message = mistake(parse_overrides(["--batch-size", "0", "--patience", "0"]))
    assert message.startswith("the command line: \n  - --training.batch_size takes")


@pytest.mark.parametrize("section", ["model", "data", "task", "prompt", "training", "prompt.encoder", "prompt.start"])
def test_a_section_that_holds_something_else_is_told_that_it_holds_settings(section: str) -> None:
    message = mistake({section: ["a"]})
    assert message == f"the config: \"{section}\" takes settings as in {{name: value}}, and is ['a']"
