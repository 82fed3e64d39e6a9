"""The command line in processes of its own: a prompt is trained, scored, used, looked into, resumed, started from."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PromptTuningConfig, get_peft_model
from tiny_models import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

import ptune
from ptune.cli import app
from ptune.cli.evaluate import confusion_table
from ptune.engine.chat import Chat
from ptune.engine.engine import Engine
from ptune.generation.generate import GenerationOptions, generate
from ptune.soft_prompts.soft_prompt import SoftPrompt

WORDS = ["soup", "film", "room", "waiter", "apple", "hotel", "door", "song"]
COMMANDS = ["train", "search", "eval", "predict", "generate", "inspect", "report"]
COMMANDS += ["list", "import", "cache", "demo"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ptune", *map(str, arguments)]


def run(*arguments: object, given: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*arguments), input=given, capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode == code, done.stderr
    return done


def file_hash(prompt: Path) -> str:
    return hashlib.sha256((prompt / "soft_prompt.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, records, and the settings of a classification and of a generation."""
    place = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    chance = random.Random(0)
    for name, count in (("train", 48), ("dev", 16), ("test", 20)):
        rows = []
        for number in range(count):
            good = chance.random() < 0.5
            text = " ".join(chance.sample(WORDS, chance.randint(1, 5)) + ["great" if good else "terrible"])
            rows.append({"number": number, "text": text, "label": good, "output": "good" if good else "bad"})
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    classify: dict[str, Any] = {
        "model": str(place / "model"),
        "data": {"train": str(place / "train.jsonl"), "dev": str(place / "dev.jsonl")},
        "task": {"type": "classification", "verbalizer": {True: " good", False: " bad"}},
        "prompt": {"template": "{text}[P*4]{answer}", "encoder": {"hidden_size": 16, "dropout": 0.1}},
        "training": {"max_steps": 150, "batch_size": 8, "learning_rate": 0.02, "evaluations": 3},
    }
    answer = classify | {
        "task": {"type": "generation", "max_new_tokens": 12},
        "prompt": {"template": "[P*3]Human: {text}[?\n{more}]\n\nAssistant: {answer}"},
        "training": {"max_steps": 4, "samples": 1},
    }
    for name, settings in (("classify", classify), ("answer", answer)):
        (place / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def classifier(place: Path) -> Path:
    """A trained soft prompt that classifies; its output lies beside it."""
    done = run("train", place / "classify.yaml", "--output", place / "classifier")
    (place / "classifier.txt").write_text(done.stdout, encoding="utf-8")
    return place / "classifier"


@pytest.fixture(scope="module")
def answerer(place: Path) -> Path:
    """A trained soft prompt that answers; every setting of its run but the task was given on the command line."""
    typed = ["--data", place / "train.jsonl", "--output", place / "answerer", "--dev-fraction=0.2", "--seed", 3]
    run("train", place / "answer.yaml", *typed)
    return place / "answerer"


@pytest.fixture(scope="module")
def engine(answerer: Path) -> Engine:
    return Engine.for_prompt(answerer)


def test_training_says_what_it_trains_what_was_gained_and_what_to_do_next(classifier: Path, place: Path) -> None:
    said = (place / "classifier.txt").read_text(encoding="utf-8")
    size = (classifier / "soft_prompt.safetensors").stat().st_size
    assert f"saved {classifier}: {size / 1024:.0f} kB of tensors; try" in said
    assert "all frozen; trained: " in said
    assert "for 4 virtual tokens" in said
    assert "48 examples, 16 held out, 150 steps" in said
    summary = SoftPrompt.load(classifier).summary
    before, after = summary["before"]["accuracy"], summary["after"]["accuracy"]
    assert after > before
    assert f"accuracy {100 * before:.1f}% -> {100 * after:.1f}%" in said
    assert f"ptune predict {classifier}" in said
    assert f"ptune inspect {classifier}" in said


def test_settings_of_the_command_line_go_before_the_file(answerer: Path) -> None:
    settings = yaml.safe_load((answerer / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert settings["data"]["dev"] is None  # --data leaves nothing of the file's own data
    assert (settings["data"]["dev_fraction"], settings["training"]["seed"]) == (0.2, 3)
    assert settings["output"] == str(answerer)


def test_eval_shows_a_table_and_writes_the_same_as_json(classifier: Path, place: Path, tmp_path: Path) -> None:
    done = run("eval", classifier, "--data", place / "test.jsonl", "--json", tmp_path / "metrics.json")
    result = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert (result["records"], result["prompt"]) == (20, str(classifier))
    assert result["metrics"]["accuracy"] in [n / 20 for n in range(21)]
    assert "on 20 records of" in " ".join(done.stdout.split())  # a long path breaks the title anywhere
    assert "accuracy" in done.stdout
    assert f"{100 * result['metrics']['accuracy']:.1f}%" in done.stdout
    assert result["labels"] == ["false", "true"]
    (false_false, false_true), (true_false, true_true) = result["confusion"]
    assert true_true + true_false + false_true + false_false == 20
    assert (true_true + false_false) / 20 == result["metrics"]["accuracy"]
    assert re.search(rf"1 false +│ +{false_false} +│ +{false_true} ", done.stdout)
    assert re.search(rf"2 true +│ +{true_false} +│ +{true_true} ", done.stdout)
    assert sum(one["records"] for one in result["calibration"]["before"]) == 20
    assert "no temperature: 16 held-out records are too few" in (place / "classifier.txt").read_text(encoding="utf-8")


def test_a_confusion_matrix_too_wide_for_a_terminal_is_in_the_file_alone() -> None:
    labels = [f"label{number}" for number in range(13)]
    assert confusion_table(labels, [[0] * 13] * 13) == (
        "the confusion matrix of 13 labels is in the file that --json names"
    )
    assert len(confusion_table(labels[:12], [[0] * 12] * 12).rows) == 12  # type: ignore[union-attr]


def test_predict_writes_each_record_with_its_answer_in_order(classifier: Path, place: Path, tmp_path: Path) -> None:
    run("predict", classifier, place / "test.jsonl", "--output", tmp_path / "out.jsonl", "--batch-size", 3)
    given = [json.loads(line) for line in (place / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["number"] for line in lines] == list(range(20))
    assert [line["text"] for line in lines] == [record["text"] for record in given]
    assert {line["label"] for line in lines} <= {"true", "false"}
    assert all(0.5 <= line["probability"] <= 1 for line in lines)
    engine = Engine.for_prompt(classifier)
    with engine:
        assert [a["label"] for a in engine.predict("classifier", given)] == [line["label"] for line in lines]


def test_predict_answers_each_record_by_the_soft_prompt_that_a_column_names(
    classifier: Path, answerer: Path, place: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts"
    for folder in (classifier, answerer):
        shutil.copytree(folder, prompts / "mine" / folder.name, ignore=shutil.ignore_patterns("run"))
    shutil.copytree(answerer, prompts / "classifier", ignore=shutil.ignore_patterns("run"))  # of the same last name
    (tmp_path / "mixed.jsonl").write_text(
        '{"text": "quiet wonder", "task": "mine/classifier"}\n'
        '{"text": "Sing.", "more": "", "task": "mine/answerer"}\n'
        '{"text": "great soup", "task": "mine/classifier"}\n'
        '{"text": "Sing.", "more": "", "task": "classifier"}\n',
        encoding="utf-8",
    )
    lines = run("predict", prompts, tmp_path / "mixed.jsonl", "--by", "task").stdout.splitlines()
    first, second, third, fourth = map(json.loads, lines)
    for line in (first, third):
        (alone,) = run("predict", classifier, line["text"]).stdout.splitlines()
        assert line["label"] == json.loads(alone)["label"]
        assert line["probabilities"] == pytest.approx(json.loads(alone)["probabilities"], abs=1e-5)
    assert run("generate", answerer, "Sing.").stdout == second["text"] + "\n" == fourth["text"] + "\n"

    (tmp_path / "unknown.jsonl").write_text('{"text": "a", "task": "clasifier"}\n', encoding="utf-8")
    said = run("predict", prompts, tmp_path / "unknown.jsonl", "--by", "task", code=2).stderr
    assert 'no soft prompt "clasifier"' in said
    (tmp_path / "none.jsonl").write_text('{"text": "a", "task": "mine/classifier"}\n{"text": "b"}\n', encoding="utf-8")
    said = run("predict", prompts, tmp_path / "none.jsonl", "--by", "task", code=2).stderr
    assert 'line 2 names no soft prompt in its column "task"' in said


def test_predict_takes_a_text_and_prints_one_json_line(classifier: Path) -> None:
    (line,) = run("predict", classifier, "这家店的 soup 很好").stdout.splitlines()
    assert "这家店的" in line  # written as it is, not as escapes
    assert json.loads(line)["text"] == "这家店的 soup 很好"
    assert json.loads(line)["label"] in ("true", "false")


def test_generate_answers_one_instruction_as_python_does(answerer: Path, engine: Engine) -> None:
    expected = engine.generate("answerer", {"text": "Give three tips.", "more": "Sleep, eat"})
    done = run("generate", answerer, "Give three tips.", "--field", "more=Sleep, eat")
    assert done.stdout == expected.text + "\n"
    assert expected.text != engine.generate("answerer", "Give three tips.").text


def test_generate_tells_log_probabilities_behind_the_answer(answerer: Path, engine: Engine) -> None:
    done = run("generate", answerer, "Sing.", "--max-new-tokens", 3, "--logprobs", 2)
    lines = done.stdout.splitlines()[-3:]
    assert all(line.count("\t") == 2 for line in lines)
    values = [float(part.rpartition(" ")[2]) for part in lines[0].split("\t")]
    assert max(values) <= 0
    assert values[0] == values[1] > values[2]  # greedy: the token is the likeliest


def test_generate_without_the_prompt_is_the_bare_model_on_the_same_words(answerer: Path, engine: Engine) -> None:
    backbone = engine.backbone
    words = backbone.tokenizer("Human: Give three tips.\n\nAssistant: ", add_special_tokens=False)["input_ids"]
    (bare,) = generate(backbone, [words], GenerationOptions(max_new_tokens=5))
    done = run("generate", answerer, "Give three tips.", "--no-prompt", "--max-new-tokens", 5)
    assert done.stdout == bare.text + "\n"


def test_sampling_options_reach_the_decoder_and_a_seed_repeats(answerer: Path, engine: Engine) -> None:
    typed = ["--temperature", 1.5, "--top-p", 0.9, "--top-k", 40, "--repetition-penalty", 1.2, "--max-new-tokens", 9]
    options = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2}
    texts = [
        engine.generate("answerer", "Sing.", GenerationOptions(max_new_tokens=9, seed=seed, **options)).text
        for seed in (5, 6)
    ]
    assert texts[0] != texts[1]
    assert run("generate", answerer, "Sing.", *typed, "--seed", 5).stdout == texts[0] + "\n"


def test_a_chat_ends_with_its_input_and_sees_what_was_said(answerer: Path, engine: Engine) -> None:
    done = run("generate", answerer, given="The soup?\nAnd the film?\n")
    chat = Chat(engine, "answerer", GenerationOptions(max_new_tokens=12))
    texts = [chat.say({"text": text, "more": ""}).text for text in ("The soup?", "And the film?")]
    assert done.stdout == "".join(text + "\n" for text in texts)
    assert texts[1] != engine.generate("answerer", "And the film?").text


def test_an_empty_line_ends_a_chat(answerer: Path, engine: Engine) -> None:
    done = CliRunner().invoke(app, ["generate", str(answerer)], input="The soup?\n\nAnd the film?\n")
    assert done.exit_code == 0
    assert done.stdout == engine.generate("answerer", "The soup?").text + "\n"


def test_a_chat_forgets_its_oldest_turns_at_the_context_limit(engine: Engine) -> None:
    backbone = engine.backbone
    chat = Chat(engine, "answerer", options := GenerationOptions(max_new_tokens=10))
    first = engine.prompts["answerer"].first_virtual_id
    turns: list[tuple[str, str]] = []
    kept = []
    for number in range(12):
        question = f"Human: {number} and what of the {WORDS[number % 8]}?\n\nAssistant: "
        for start in range(number + 1):  # the longest history that leaves room for an answer
            told = turns[start:]
            ids = [first, first + 1, first + 2]
            for place, (words, answer) in enumerate([*told, (question, "")]):
                ids += backbone.tokenizer(f"\n\n{words}" if place else words)["input_ids"]
                if place < len(told):
                    ids += [*backbone.tokenizer(answer)["input_ids"], backbone.tokenizer.eos_token_id]
            if len(ids) + 10 <= 256:
                break
        expected = generate(backbone, [ids], options)[0]
        said = chat.say({"text": f"{number} and what of the {WORDS[number % 8]}?", "more": ""})
        assert said == expected
        turns.append((question, said.text))
        kept.append(len(told))
    assert kept[0] == 0
    assert kept[1] == 1
    assert kept[-1] < 8  # old turns went


def test_a_question_longer_than_the_context_is_cut_and_pushes_history_out(engine: Engine) -> None:
    chat, alone = (Chat(engine, "answerer", GenerationOptions(max_new_tokens=10)) for _ in range(2))
    chat.say({"text": "short", "more": ""})
    long = {"text": "soup " * 400, "more": ""}
    assert chat.say(long) == alone.say(long)


def test_inspect_says_what_a_prompt_is_and_which_words_are_near(classifier: Path) -> None:
    said = run("inspect", classifier, "--count", 2).stdout
    assert re.search(r"template +\{text\}\[P\*4\]\{answer\}", said)
    assert re.search(r"labels +false ' bad', true ' good'", said)
    assert re.search(r"result +accuracy \d+\.\d% -> \d+\.\d% on 16 held-out records, step \d+ of 150", said)
    whole = json.loads(run("inspect", classifier, "--json").stdout)
    assert whole["summary"]["steps"] == 150
    assert re.search(r"trained in +float32 on cpu", said)
    assert re.search(rf"data hash +{whole['summary']['data_hash']}", said)
    assert re.search(rf"versions +ptune {re.escape(ptune.__version__)}, torch ", said)
    rows = [line for line in said.splitlines() if line.strip("│ ")[:2] in ("0 ", "1 ", "2 ", "3 ")]
    assert len(rows) == 4
    assert all(row.count("'") + row.count('"') >= 4 for row in rows)  # two words each, quoted


def test_inspect_data_shows_examples_as_the_model_sees_them(place: Path) -> None:
    said = run("inspect", "data", place / "classify.yaml", "--count", 2, "--data", place / "test.jsonl").stdout
    record = json.loads((place / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert "test.jsonl, line 1" in said
    assert said.count(" supervised") == 2
    assert record["text"] in said
    assert f">>{' good' if record['label'] else ' bad'}<<" in said  # what is supervised
    words = len(tiny_tokenizer()(" good" if record["label"] else " bad")["input_ids"])
    text = len(tiny_tokenizer()(record["text"])["input_ids"])
    assert f"{text + 4 + words} tokens, {words} supervised" in said


def test_columns_that_are_no_json_stand_beside_the_answers_as_text(classifier: Path, tmp_path: Path) -> None:
    from datetime import date

    import pyarrow
    from pyarrow import parquet

    rows = [{"text": "a soup", "day": date(2026, 3, 1)}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "dated.parquet")
    said = json.loads(run("predict", classifier, tmp_path / "dated.parquet").stdout)
    assert said["day"] == "2026-03-01"


def test_a_peft_adapter_is_imported_with_its_rows(place: Path, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.save_pretrained(tmp_path / "adapter")
    said = run(
        "import", tmp_path / "adapter", "--config", place / "answer.yaml", "--output", tmp_path / "prompt"
    ).stdout
    assert said == f"3 virtual tokens imported to {tmp_path / 'prompt'}\n"
    rows = model.prompt_encoder["default"].embedding.weight.detach()
    assert torch.equal(SoftPrompt.load(tmp_path / "prompt").rows, rows)
    with Engine.for_prompt(tmp_path / "prompt") as engine:
        assert engine.generate("prompt", "The soup?").text


def test_after_ctrl_c_the_run_goes_on_and_ends_as_the_unbroken_one(
    classifier: Path, place: Path, tmp_path: Path
) -> None:
    output = tmp_path / "stopped"
    typed = ["train", place / "classify.yaml", "--output", output, "--checkpoint-minutes=1e-9"]
    process = subprocess.Popen(
        command(*typed), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    checkpoint, seen = output / "run" / "checkpoint.safetensors", set()
    while process.poll() is None and len(seen) < 5:  # strike in the midst of the steps, each of which saves
        seen |= {checkpoint.stat().st_mtime_ns} if checkpoint.exists() else set()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "ptune: stopped after step " in errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert not (output / "ptune.json").exists()
    said = run(*typed, "--resume").stdout
    assert "going on after step " in said
    assert file_hash(output) == file_hash(classifier)


def test_from_starts_at_another_prompts_rows(classifier: Path, place: Path, tmp_path: Path) -> None:
    typed = ["--from", classifier, "--output", tmp_path / "second", "--max-steps", 1, "--learning-rate", "1e-12"]
    run("train", place / "classify.yaml", *typed)
    torch.testing.assert_close(SoftPrompt.load(tmp_path / "second").rows, SoftPrompt.load(classifier).rows)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert f"ptune {name} " in done.stdout
    assert len(done.stdout.splitlines()) > 8


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['ptune', '--help']\n"
        "from ptune.cli import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print('heavy:', *{'torch', 'transformers', 'accelerate', 'datasets', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    *said, heavy = done.stdout.splitlines()
    assert heavy == "heavy:"
    assert all(any(f" {name} " in line for line in said) for name in COMMANDS)


def test_the_version_is_printed() -> None:
    assert run("--version").stdout == ptune.__version__ + "\n"


def test_a_command_that_does_not_exist_is_refused() -> None:
    assert "No such command 'trian'" in run("trian", code=2).stderr
