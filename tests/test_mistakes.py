"""A setting that holds a value of another kind: one sentence names it, says what it takes, and what was found."""

from __future__ import annotations

from typing import Any

import pytest

from ptune.config.file import parse_config, parse_overrides
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
        (["--trackers", "tensorboard"], "\"training.trackers\" takes a list, as in [a, b], and is 'tensorboard'"),
        (["--quantization", "int9"], "takes 'int8' or 'int4', or settings as in {name: value}, or null, and is 'int9'"),
        (["--patience", "none"], "\"training.patience\" takes a whole number, or null, and is 'none'"),
        (["--batch-size", "true"], '"training.batch_size" takes a whole number, and is true'),
        (["--batch-size", "2.5"], '"training.batch_size" takes a whole number, and is 2.5'),
        (["--batch-size", "0"], '"training.batch_size" takes a number greater than 0, and is 0'),
        (["--learning-rate", "false"], '"training.learning_rate" takes a number greater than 0, and is false'),
        (["--learning-rate", "fast"], "\"training.learning_rate\" takes a number, and is 'fast'"),
        (["--deep", "maybe"], "\"prompt.deep\" takes true or false, and is 'maybe'"),
        (["--verbalizer", "[a, b]"], "\"task.verbalizer\" takes settings as in {name: value}, and is ['a', 'b']"),
        (["--verbalizer", "{a: ' x', b: 1}"], '"task.verbalizer.b" takes text, and is 1; put it into quotes'),
        (["--label-weights", "{'yes': high}"], "\"task.label_weights.yes\" takes a number, and is 'high'"),
        (["--seed="], '"training.seed" takes a whole number, and is null'),
        (["--max-new-tokens", "3"], "It belongs to a task of type generation or extraction, and this one is classif"),
    ],
)
def test_a_value_of_another_kind_is_told_what_its_setting_takes(arguments: list[str], said: str) -> None:
    message = mistake(parse_overrides(arguments))
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("section", ["model", "data", "task", "prompt", "training", "prompt.encoder", "prompt.start"])
def test_a_section_that_holds_something_else_is_told_that_it_holds_settings(section: str) -> None:
    message = mistake({section: ["a"]})
    assert message == f"the config: \"{section}\" takes settings as in {{name: value}}, and is ['a']"
