"""Settings: every mistake named at once, short forms, overrides, and a file that reads back as what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from ptune.cli.overrides import run_overrides
from ptune.config.file import (
    config_yaml,
    differing_settings,
    load_config,
    override,
    parse_config,
    parse_overrides,
    setting_names,
)
from ptune.config.run import DataConfig, EncoderConfig, ModelConfig, RunConfig, StartConfig, TrainingConfig
from ptune.config.task import ChoiceConfig, ClassificationConfig
from ptune.errors import ConfigError

SMALL: dict[str, Any] = {
    "model": "mini",
    "data": "train.jsonl",
    "task": {"type": "classification", "verbalizer": {"yes": " good", "no": " bad"}},
    "prompt": {"template": "{text}[P*4]{answer}"},
}


def changed(**sections: Any) -> dict[str, Any]:
    return SMALL | sections


def mistake(values: dict[str, Any], overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, overrides)
    return str(caught.value)


def test_all_mistakes_are_named_at_once_with_their_paths_and_the_nearest_right_names() -> None:
    message = mistake(
        {
            "modle": "mini",
            "data": {"trian": "a.jsonl", "dev_fraction": 2},
            "task": {"type": "classification", "verbalizer": {"yes": " good"}, "metrik": "accuracy"},
            "prompt": {"encoder": {"type": "gru", "layers": 3}},
            "training": {"learning_rte": 0.1, "epochs": -1},
        }
    )
    lines = [line.removeprefix("  - ") for line in message.splitlines()[1:]]
    expected = [
        ('there is no setting "modle".', 'Did you mean "model"?'),
        ('there is no setting "data.trian".', 'Did you mean "train"?'),
        ('"data.dev_fraction" takes a number ', "less than 1, and is 2"),
        ('there is no setting "task.metrik".', 'Did you mean "metric"?'),
        ('"task.verbalizer": a classification needs at least two labels', ""),
        ('"prompt.template" is missing', ""),
        ('"prompt.encoder.type" takes ', "'gru'"),
        ('there is no setting "prompt.encoder.layers".', 'Did you mean "num_layers"?'),
        ('there is no setting "training.learning_rte".', 'Did you mean "learning_rate"?'),
        ('"training.epochs" takes a number ', "greater than 0, and is -1"),
    ]
    for start, end in expected:
        assert [line for line in lines if line.startswith(start) and line.endswith(end)], f"{start} in {message}"
    assert len(lines) == len(expected)
    assert message.startswith("the config: ")


def test_a_single_mistake_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(changed(training={"batchsize": 3})), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value) == f'{file}: there is no setting "training.batchsize". Did you mean "batch_size"?'


def test_a_setting_in_the_wrong_section_is_shown_where_it_belongs() -> None:
    assert 'there is no setting "prompt.learning_rate". Did you mean "training.learning_rate"?' in mistake(
        changed(prompt={"template": "[P]{answer}", "learning_rate": 1e-3})
    )


@pytest.mark.parametrize("kind", ["classification", "choice", "generation"])
def test_a_mistake_inside_a_task_is_named_as_it_was_written(kind: str) -> None:
    message = mistake(changed(task={"type": kind, "label_fild": 3}))
    assert '"task.label_fild"' in message
    assert f"task.{kind}." not in message


def test_a_label_that_is_called_as_a_task_keeps_its_name_in_a_mistake() -> None:
    task = {"type": "classification", "verbalizer": {"generation": 3, "review": " review"}}
    assert '"task.verbalizer.generation" takes text' in mistake(changed(task=task))


@pytest.mark.parametrize("task", [{}, {"type": "regression"}])
def test_an_unknown_kind_of_task_is_answered_with_all_kinds(task: dict[str, str]) -> None:
    message = mistake(changed(task=task))
    assert '"task.type"' in message
    assert all(kind in message for kind in ("classification", "choice", "generation"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: [1", "is no readable YAML"),
        ("training:\n  seed: 1\ntraining:\n  seed: 2\n", "training stands there twice; leave one of the two out"),
        ("a: 2020-99-01\n", "is no readable YAML"),
        ("task:\n  verbalizer: {yes: a, 'no': b, true: c}\n", "yes and true are one value in YAML; put quotes around"),
        ("label_weights: {1: 2, on: 3}\n", "1 and on are one value in YAML"),
        ("- a\n- b\n", "holds list"),
        ("", "holds NoneType"),
        ("word", "holds str"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, text: str, found: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=found) as caught:
        load_config(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "sst2.yaml").write_text("", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r'there is no config file ".*sts2\.yaml"; check the path\. Did you mean "sst2\.yaml"\?'
    ):
        load_config(tmp_path / "sts2.yaml")


def test_booleans_and_numbers_that_yaml_makes_of_labels_are_their_text() -> None:
    values = yaml.safe_load("{type: classification, verbalizer: {yes: ' good', no: ' bad', 1: ' one'}}")
    assert set(values["verbalizer"]) == {True, False}  # YAML's `yes` is true, and Python's 1 is True
    values = yaml.safe_load("{type: classification, verbalizer: {true: ' a', false: ' b'}, label_weights: {true: 2}}")
    task = ClassificationConfig.model_validate(values)
    assert task.verbalizer == {"true": " a", "false": " b"}
    assert task.label_weights == {"true": 2.0}
    numbers = ClassificationConfig.model_validate({"verbalizer": {0: " bad", 1: " good"}})
    assert numbers.verbalizer == {"0": " bad", "1": " good"}


def test_a_bare_no_in_yaml_is_the_mixed_precision_of_that_name() -> None:
    assert parse_config(SMALL | yaml.safe_load("training: {mixed_precision: no}")).training.mixed_precision == "no"
    assert "'bf16', and is true" in mistake(SMALL | yaml.safe_load("training: {mixed_precision: yes}"))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"verbalizer": {"a": " x", "b": ""}}, "label 'b' has no words"),
        ({"verbalizer": {True: " x", "true": " y", "no": " z"}}, "the name 'true' stands there twice; list each once"),
        ({"verbalizer": {"a": " x", "b": " y"}, "label_weights": {"c": 2}}, "'c' is no label of the verbalizer"),
        ({"verbalizer": {"a": " x", "b": " y"}, "negative_label": "c"}, "'c' is no label of the verbalizer"),
        ({"verbalizer": {"a": " x", "b": " y"}, "metric": "micro_f1"}, "name the label to leave out"),
    ],
)
def test_a_verbalizer_that_cannot_be_used_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        ClassificationConfig.model_validate(values)


def test_a_choice_s_fields_differ() -> None:
    with pytest.raises(ValidationError, match="the choice 'c0' stands there twice; list each once"):
        ChoiceConfig.model_validate({"choices": ["c0", "c1", "c0"]})


def test_a_choice_needs_two_fields() -> None:
    with pytest.raises(ValidationError, match="at least 2 items"):
        ChoiceConfig(choices=("one",))


@pytest.mark.parametrize("overlong", ["cut", "drop"])
@pytest.mark.parametrize(
    "task", [SMALL["task"], {"type": "linear_classification"}, {"type": "choice", "choices": ["a", "b"]}]
)
def test_answers_that_are_read_whole_are_neither_cut_nor_dropped(task: dict[str, Any], overlong: str) -> None:
    prompt = {"template": "[P]{text}{answer}", "overlong": overlong}
    with pytest.raises(ConfigError, match=f"prompt.overlong {overlong} is for .* the task is {task['type']}, whose"):
        parse_config(changed(task=task, prompt=prompt))
    parse_config(changed(task={"type": "generation"}, prompt=prompt))
    parse_config(changed(task=task, prompt=prompt | {"overlong": "error"}))


def test_short_forms_stand_for_the_model_name_and_the_training_data() -> None:
    config = parse_config(SMALL)
    assert config.model == ModelConfig(name="mini")
    assert config.data == DataConfig(train="train.jsonl")
    assert config == parse_config(changed(model={"name": "mini"}, data={"train": "train.jsonl"}))


def test_overrides_keep_what_a_short_form_says() -> None:
    config = parse_config(SMALL, {"model.dtype": "bfloat16", "data.limit": 5})
    assert (config.model.name, config.model.dtype) == ("mini", "bfloat16")
    assert (config.data.train, config.data.limit) == ("train.jsonl", 5)
    assert SMALL["model"] == "mini"  # what was given is not changed


def test_overrides_go_before_the_file_and_make_missing_sections(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(changed(model={"name": "other"})), encoding="utf-8")
    config = load_config(file, {"model.name": "mini", "training.seed": 3, "prompt.encoder.type": "lstm"})
    assert (config.model.name, config.training.seed, config.prompt.encoder.type) == ("mini", 3, "lstm")


def test_a_mistake_in_an_override_is_reported_with_those_of_the_file() -> None:
    message = mistake(changed(training={"epochs": 0}), {"training.batch_size": -1})
    assert '"training.epochs"' in message
    assert "--training.batch_size takes" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--training.learning_rate=1e-3"], {"training.learning_rate": 1e-3}),
        (["--training.learning_rate", "1e-3"], {"training.learning_rate": 1e-3}),
        (["--learning-rate", "0.003"], {"training.learning_rate": 0.003}),
        (["--seed=-1", "--epochs", "2"], {"training.seed": -1, "training.epochs": 2}),
        (["--training.max-steps", "null"], {"training.max_steps": None}),
        (["--residual", "false"], {"prompt.encoder.residual": False}),
        (["--trackers", "[tensorboard]"], {"training.trackers": ("tensorboard",)}),
        (["--data.fields", "{text: sentence}"], {"data.fields": {"text": "sentence"}}),
        (["--verbalizer={a: ' x', b: ' y'}"], {"task.verbalizer": {"a": " x", "b": " y"}}),
        (["--template", "[P*3]{text}: [P]{answer}"], {"prompt.template": "[P*3]{text}: [P]{answer}"}),
        (["--template", "Human: {text}[P]{answer}"], {"prompt.template": "Human: {text}[P]{answer}"}),
        (["--template", "{text}[P*4]{answer}"], {"prompt.template": "{text}[P*4]{answer}"}),
        (["--output", "2024"], {"output": Path("2024")}),
        (["--dev", "1.50"], {"data.dev": "1.50"}),
        (["--label-field", "yes"], {"task.label_field": "yes"}),
        (["--revision", "0123456"], {"model.revision": "0123456"}),
        (["--mixed-precision", "no"], {"training.mixed_precision": "no"}),
        (["--context-cache", "500MB"], {"training.context_cache": "500MB"}),
        (["--encoder.type", "lstm"], {"prompt.encoder.type": "lstm"}),
        (["--data.fields.text", "sentence"], {"data.fields": {"text": "sentence"}}),
        (["--fields.a-b", "c"], {"data.fields": {"a-b": "c"}}),
        (["--fields.text", "句子"], {"data.fields": {"text": "句子"}}),
        (["--quantization", "int8"], {"model.quantization": "int8"}),
        (["--quantization", "{load_in_4bit: true}"], {"model.quantization": {"load_in_4bit": True}}),
        (["--quantization.load_in_4bit", "true"], {"model.quantization": {"load_in_4bit": True}}),
        (["--quantization.bits=4"], {"model.quantization": {"bits": 4}}),
        (["--label-weights.yes", "2"], {"task.label_weights": {"yes": 2.0}}),
        (["--verbalizer.yes", "true"], {"task.verbalizer": {"yes": "true", "no": " bad"}}),
    ],
)
def test_a_setting_is_overridden_as_it_is_typed(arguments: list[str], expected: dict[str, Any]) -> None:
    config: Any = parse_config(SMALL, parse_overrides(arguments))
    for name, value in expected.items():
        found = config
        for part in name.split("."):
            found = getattr(found, part)
        assert found == value
        assert type(found) is type(value) or isinstance(value, (int, Path))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["3"], '"3" stands alone; settings are given as --name value'),
        (["--seed"], "--seed needs a value"),
        (["--deep", "--seed", "3"], "--deep needs a value, and --seed stands behind it"),
        (["--learning-rte", "1"], 'there is no setting "learning-rte". Did you mean "learning_rate"?'),
        (["--type", "lstm"], 'several settings are called "type": task.type, prompt.encoder.type; give one of these'),
        (
            ["--verbalizer", "{a: ' x'"],
            "--task.verbalizer takes a value as it stands in a YAML file, and got '{a: ' x''",
        ),
    ],
)
def test_a_mistyped_override_is_named(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(SMALL, parse_overrides(arguments))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    start = {"method": "prompt", "prompt": "~/other"}
    config = parse_config(SMALL, {"model": "~/model", "output": "~/out", "prompt.start": start})
    assert config.model.name == "/home/of/mine/model"
    assert config.output == Path("/home/of/mine/out")
    assert config.prompt.start.prompt == "/home/of/mine/other"


def test_held_out_records_of_the_command_line_stand_beside_its_data() -> None:
    assert run_overrides(["--dev", "b.jsonl"], data="a.jsonl") == {"data.train": "a.jsonl", "data.dev": "b.jsonl"}
    assert run_overrides([], data="a.jsonl") == {"data.train": "a.jsonl", "data.dev": None}


def test_every_setting_has_a_dotted_name_that_is_found_again() -> None:
    names = setting_names()
    assert len(set(names)) == len(names) > 40
    assert [override(name) for name in names] == names
    assert {"output", "model.name", "task.choices", "prompt.start.text", "training.patience"} <= set(names)


def rich_config() -> RunConfig:
    return parse_config(
        {
            "model": {"name": "some/模型", "quantization": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "data": {"train": "a.jsonl", "fields": {"text": "句子"}},
            "task": {"type": "classification", "verbalizer": {True: " 好", False: " 差", 3: "\n: "}},
            "prompt": {
                "template": "[P*2]{text}\n[?{more}]\\n“: ”[P]{answer}",
                "encoder": {"type": "lstm", "dropout": 0.25},
                "start": {"method": "text", "text": "on: off"},
                "overlong": "error",
            },
            "training": {"learning_rate": 3e-05, "trackers": ["tensorboard"], "patience": 3, "context_cache": 0},
            "output": "somewhere/else",
        }
    )


@pytest.mark.parametrize(
    "config",
    [
        parse_config(SMALL),
        rich_config(),
        parse_config(changed(task={"type": "generation"})),
        parse_config(changed(task={"type": "choice", "choices": ["a", "b"], "before": "\n"})),
        parse_config(changed(prompt={"template": "[P]{answer}", "encoder": {"type": "embedding"}})),
    ],
    ids=["small", "rich", "generation", "choice", "embedding"],
)
def test_a_written_config_reads_back_equal(tmp_path: Path, config: RunConfig) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(config_yaml(config), encoding="utf-8")
    assert load_config(file) == config
    assert differing_settings(load_config(file), config) == []


def test_an_embedding_refuses_settings_that_would_do_nothing() -> None:
    with pytest.raises(ValidationError, match=r"dropout, num_layers would be ignored; remove it, or choose mlp or lst"):
        EncoderConfig.model_validate({"type": "embedding", "num_layers": 5, "dropout": 0.1})
    assert (
        EncoderConfig.model_validate({"type": "embedding", "num_layers": 2}).type == "embedding"
    )  # the default says it
    message = mistake(changed(prompt={"template": "[P]{answer}", "encoder": {"type": "embedding", "hidden_size": 8}}))
    assert '"prompt.encoder": an embedding has no encoder, so hidden_size would be ignored' in message


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"method": "text"}, 'method "text" needs `text`'),
        ({"method": "text", "text": ""}, 'method "text" needs `text`'),
        ({"method": "prompt"}, 'method "prompt" needs `prompt`'),
        ({"text": "great"}, '`text` is only used by method "text", and method is "vocabulary"'),
        ({"method": "labels", "prompt": "folder"}, '`prompt` is only used by method "prompt", and method is "labels"'),
        ({"method": "noise"}, "'vocabulary', 'text', 'labels', 'prompt', 'normal' or 'uniform'"),
    ],
)
def test_a_start_has_what_its_method_needs_and_nothing_else(values: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        StartConfig.model_validate(values)
    assert sentence in str(caught.value)
    assert StartConfig(method="text", text="great").text == "great"


@pytest.mark.parametrize(
    ("size", "count"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), (0, 0), ("1.5k", 1500), ("0", 0), ("7", 7)]
)
def test_a_size_is_read_in_its_unit(size: Any, count: int) -> None:
    assert TrainingConfig(context_cache=size).context_cache_bytes == count


@pytest.mark.parametrize("size", ["much", "-3GB", "2XB", ""])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    assert '"training.context_cache": a size is written as in' in mistake(changed(training={"context_cache": size}))


def test_settings_cannot_be_changed_once_checked() -> None:
    config = parse_config(SMALL)
    with pytest.raises(ValidationError, match="frozen"):
        config.training.seed = 3


def test_differing_settings_are_named_by_their_paths() -> None:
    one = parse_config(SMALL)
    other = parse_config(
        SMALL,
        {"training.seed": 9, "output": "b", "task.verbalizer": {"yes": " fine", "no": " bad"}, "data.limit": 3},
    )
    assert differing_settings(one, other) == ["data.limit", "output", "task.verbalizer.yes", "training.seed"]
    assert differing_settings(one, one) == []


def test_values_that_hold_equals_signs_and_lines_do_not_confuse_the_comparison() -> None:
    one = parse_config(SMALL, {"prompt.template": "a=b\n- c[P]{answer}"})
    other = parse_config(SMALL, {"prompt.template": "a=b\n- d[P]{answer}"})
    assert differing_settings(one, other) == ["prompt.template"]


@pytest.mark.parametrize(
    ("prompt", "training", "rate"),
    [({}, {}, 0.005), ({"deep": True}, {}, 0.05), ({"deep": True}, {"epochs": 1}, 0.05)]
    + [({"deep": True}, {"learning_rate": 0.01}, 0.01), ({"deep": False}, {"epochs": 1}, 0.005)],
)
def test_a_deep_prompt_has_a_rate_of_its_own_unless_one_is_given(
    prompt: dict[str, Any], training: dict[str, Any], rate: float
) -> None:
    values = {
        "task": {"type": "classification", "verbalizer": {"a": " good", "b": " bad"}},
        "prompt": {"template": "[P*4]{text}{answer}"} | prompt,
        "training": training,
    }
    config = RunConfig.model_validate(values)
    assert config.training.learning_rate == rate
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
