"""Bad input on the command line: one sentence that names the place and the mend, exit code 2, nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soft_prompts
import yaml
from tiny_models import tiny_model, tiny_tokenizer

from ptune.cli import main
from ptune.models.backbone import Backbone

RECORDS = [
    {"text": f"{word} is {'great' if number % 2 else 'terrible'}", "label": "good" if number % 2 else "bad"}
    for number, word in enumerate(["soup", "film", "room", "waiter", "apple", "hotel", "door", "song"])
]
GOOD = "".join(json.dumps(record) + "\n" for record in RECORDS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model, one of other weights, one whose tokenizer never ends, and one with too long a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("sound", 0), ("other", 1), ("endless", 0), ("long", 0)):
        tiny_model("gpt2", seed=seed).save_pretrained(folder / name)
        tokenizer = tiny_tokenizer()
        if name == "endless":
            tokenizer.eos_token = None
        if name == "long":
            tokenizer.add_tokens([f"word{number}" for number in range(40)])
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def prompt(models: Path) -> Path:
    """A sound soft prompt of the sound model."""
    soft_prompts.make(Backbone.load(str(models / "sound"))).save(models / "prompt")
    return models / "prompt"


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run `ptune` with arguments, and return its exit code and standard error."""

    def attempt(*arguments: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["ptune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, capfd.readouterr().err

    return attempt


@pytest.fixture
def run(attempt: Any) -> Any:
    """Run `ptune` with arguments that hold a mistake, and return the sentence that it says."""

    def run(*arguments: object) -> str:
        code, error = attempt(*arguments)
        assert code == 2, error
        return sentence(error)

    return run


def sentence(error: str) -> str:
    """Return the one sentence that standard error holds, without the program's name; a template may be shown below."""
    assert "Traceback" not in error
    assert error.startswith("ptune: ")
    assert error.endswith("\n")
    said, *shown = error.removeprefix("ptune: ").splitlines()
    assert all(line.startswith("  ") for line in shown), error
    assert not shown or "template" in said, error
    return "\n".join([said, *shown])


def config_file(folder: Path, model: Path, content: str | bytes | None = GOOD, **changes: Any) -> Path:
    """Write records and the settings of a short run, ``changes`` by name with ``__`` for dots; return the file."""
    if content is not None:
        (folder / "train.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
    values: dict[str, Any] = {
        "model": str(model),
        "data": {"train": str(folder / "train.jsonl"), "dev_fraction": 0.3},
        "task": {"type": "classification", "verbalizer": {"good": " great", "bad": " terrible"}},
        "prompt": {"template": "{text}[P*4]{answer}", "encoder": {"type": "embedding"}},
        "training": {"max_steps": 3, "batch_size": 2, "evaluations": 1},
        "output": str(folder / "out"),
    }
    for name, value in changes.items():
        section, _, leaf = name.rpartition("__")
        (values[section] if section else values)[leaf] = value
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def tree(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ["train.jsonl does not exist; check the path.", 'Did you mean "train1.jsonl"?']),
        ("", ["train.jsonl is empty", "expected at least one record"]),
        ("\n \n", ["train.jsonl is empty"]),
        ('{"text": "a", "label": "good"}\n{"text": "b", "label"\n', ["train.jsonl, line 2, column 22: broken JSON"]),
        ('{"text": "a", "label": "good"}\n["b", "bad"]\n', ["train.jsonl, line 2", "object", "list"]),
        (b'{"text": "a", "label": "good"}\n{"text": "\xff"}\n', ["train.jsonl", "UTF-8"]),
        (
            GOOD + '{"txt": "b", "label": "bad"}\n',
            ["train.jsonl, line 9", 'lacks the field "text"', "and has txt, label"],
        ),
        (GOOD + '{"text": "b", "label": "bda"}\n', ["train.jsonl, line 9", "bda", 'Did you mean "bad"?']),
        (GOOD + '{"text": "b", "lable": "bad"}\n', ["train.jsonl, line 9", '"label"', "text, lable"]),
    ],
    ids=["missing", "empty", "blank", "broken-json", "no-object", "not-utf8", "no-field", "unknown-label", "no-label"],
)
def test_data_that_cannot_be_used(
    run: Any, models: Path, tmp_path: Path, content: str | bytes | None, expected: list[str]
) -> None:
    (tmp_path / "train1.jsonl").write_text(GOOD, encoding="utf-8")
    said = run("train", config_file(tmp_path, models / "sound", content))
    assert all(part in said for part in expected), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task__verbalizer": {"good": " a", "bad": " a"}}, ['"good"', '"bad"', "cannot be told apart", "are equal"]),
        ({"task__verbalizer": {"good": " great", "bad": " great room"}}, ['"good"', '"bad"', "begin"]),
        ({"prompt__template": "{text}[P*4]"}, ["{answer}", "{text}[P*4]"]),
        ({"prompt__template": "{text}{answer}"}, ["no virtual tokens stand in it", "[P*10]"]),
        (
            {"prompt__template": "{text}[P*x]{answer}"},
            ["character 7: this [ is no part of [P*10]", "\n  {text}[P*x]{answer}\n        ^"],
        ),
        ({"prompt__template": "{text}[P*4]{answer"}, ["character 12: this { is no part of a {field}"]),
        ({"prompt__template": "[P*4]{text}{answer}{answer}"}, ["one {answer}", "2 of them"]),
        ({"prompt__template": "[P*4][?{text}]{answer}]"}, ["character 23: a lone ] closes nothing; write ]]"]),
        (
            {"prompt__max_lenth": 3},
            ['there is no setting "prompt.max_lenth"', 'Did you mean "max_length"?', "run.yaml"],
        ),
        ({"training__learning_rate": "fast"}, ['"training.learning_rate"', "number", "'fast'", "run.yaml"]),
        ({"data": {"dev": "x"}}, ['"data.train" is missing: a file, a folder or a Hub name']),
        ({"prompt__start": {"method": "prompt", "prompt": "/no/where"}}, ['no soft prompt folder "/no/where"']),
        ({"training__trackers": ["nonesuch"]}, ["training.trackers", "nonesuch"]),
    ],
    ids=lambda value: next(iter(value.values()), "") if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_used(
    run: Any, models: Path, tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    said = run("train", config_file(tmp_path, models / "sound", **changes))
    assert all(part in said for part in expected), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("soud", ["there is no model folder", 'Did you mean "sound"?']),
        ("", ["is no model folder: it has no config.json"]),
        ("endless", ["has no end token", "set eos_token in its tokenizer_config.json"]),
        ("long", ["has 380 tokens", "only 352 rows", "resize the model's embeddings"]),
    ],
)
def test_models_that_cannot_be_used(run: Any, models: Path, tmp_path: Path, model: str, expected: list[str]) -> None:
    said = run("train", config_file(tmp_path, models / model))
    assert str(models / model) in said
    assert all(part in said for part in expected), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["eval", "predict", "generate", "inspect"])
def test_a_soft_prompt_of_another_backbone_is_refused_by_every_command(
    run: Any, models: Path, prompt: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "test.jsonl").write_text(GOOD, encoding="utf-8")
    typed = {
        "eval": ["--data", tmp_path / "test.jsonl", "--json", tmp_path / "metrics.json"],
        "predict": [tmp_path / "test.jsonl", "--output", tmp_path / "out.jsonl"],
        "generate": ["The soup?"],
        "inspect": [],
    }[command]
    said = run(command, prompt, *typed, "--model", models / "other")
    assert str(models / "other") in said
    assert "belongs to" in said or "another" in said or "trained on" in said, said
    assert os.listdir(tmp_path) == ["test.jsonl"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("truncated", "soft_prompt.safetensors"),
        ("altered", "soft_prompt.safetensors"),
        ("missing", "is damaged: it has no soft_prompt.safetensors; copy the folder again"),
        ("description", "ptune.json, line "),
    ],
)
def test_a_damaged_soft_prompt_is_named(run: Any, prompt: Path, tmp_path: Path, damage: str, expected: str) -> None:
    folder = tmp_path / "prompt"
    shutil.copytree(prompt, folder)
    tensors, description = folder / "soft_prompt.safetensors", folder / "ptune.json"
    data = tensors.read_bytes()
    if damage == "truncated":
        tensors.write_bytes(data[:-7])
    elif damage == "altered":
        tensors.write_bytes(data[:-7] + bytes([data[-7] ^ 1]) + data[-6:])
    elif damage == "missing":
        tensors.unlink()
    else:
        description.write_text(description.read_text(encoding="utf-8")[:-40], encoding="utf-8")
    said = run("predict", folder, "a soup")
    assert str(folder) in said
    assert expected in said, said
    assert "copy" in said or "correct it" in said, said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "PROMPT", "--data", "DATA/none.jsonl"], "none.jsonl does not exist"),
        (["eval", "PROMPT", "--data", "DATA/test.jsonl", "--field", "text"], 'field=column, and got "text"'),
        (["eval", "PROMPT", "--data", "DATA/bare.jsonl"], "bare.jsonl, line 1"),
        (["predict", "PROMPT", "DATA/test.jsonl", "--field", "text=body"], "body"),
        (["generate", "PROMPT", "The soup?", "--top-p", "0"], "--top-p takes a number greater than 0, and is 0.0"),
        (["generate", "PROMPT", "The soup?", "--stop", ""], "--stop: an empty stop text would stop"),
        (["generate", "PROMPT", "The soup?", "--dtype", "float31"], "--dtype takes 'auto', 'float32', "),
        (["train", "DATA/run.yaml", "--output", "DATA/test.jsonl/out"], 'test.jsonl/out/run": Not a directory'),
        (["generate", "PROMPTT", "The soup?"], "there is no soft prompt folder"),
        (["inspect", "data"], "ptune inspect data CONFIG.yaml"),
        (["inspect", "PROMPT", "--learning-rate", "3"], "takes nothing more"),
        (["import", "DATA", "--config", "DATA/run.yaml", "--output", "DATA/out"], "adapter_config.json"),
        (["train", "DATA/rnu.yaml"], 'Did you mean "run.yaml"?'),
        (["train", "/proc/self/mem"], '"/proc/self/mem" cannot be read (Input/output error); check its permissions'),
        (["train", "DATA"], "is a folder where a config file was expected; name a file in it"),
        (["train", f"DATA/{'long ' * 60}.yaml"], "there is no config file"),
        (["train", "DATA/run.yaml", "--data", "long " * 60], "does not exist; check the path"),
        (["eval", "PROMPT", "--data", "long " * 60], "does not exist; check the path"),
        (["predict", "long " * 60, "a text"], "there is no soft prompt folder"),
        (["list", "long " * 60], "there is no folder"),
        (["train", "DATA/run.yaml", "--learning-rte", "3"], 'Did you mean "learning_rate"?'),
        (["train", "DATA/run.yaml", "--resume", "--overwrite"], "and --overwrite begins anew; give one of the two"),
        (["train", "DATA/run.yaml", "--resume", "--from", "PROMPT"], "--resume and --from do not go together: a run"),
        (["train", "--learning_rate", "0.01", "DATA/run.yaml"], "give the config file first, and settings behind it"),
        (["search", "--epochs=3", "DATA/run.yaml"], "give the config file first, and settings behind it"),
        (["inspect", "data", "--epochs", "3", "DATA/run.yaml"], "give the config file first, and settings behind"),
        (["train", "DATA/run.yaml", "--resume"], "holds no run to resume; leave --resume out to begin one"),
    ],
    ids=lambda value: " ".join(value).replace("/", "-") if isinstance(value, list) else "",
)
def test_mistyped_commands(
    run: Any, models: Path, prompt: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    (tmp_path / "test.jsonl").write_text(GOOD, encoding="utf-8")
    (tmp_path / "bare.jsonl").write_text('{"text": "soup"}\n', encoding="utf-8")
    config_file(tmp_path, models / "sound")
    said = run(*(part.replace("PROMPT", str(prompt)).replace("DATA", str(tmp_path)) for part in arguments))
    assert expected in said, said
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_longer_than_a_name_of_a_file_is_answered(attempt: Any, prompt: Path) -> None:
    assert attempt("predict", prompt, "the soup is great " * 20) == (0, "")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("", "a folder of that name stands there; remove it or choose another path"),
        ("test.jsonl/out.json", "a part of the path is a file, not a folder; choose another path"),
    ],
)
@pytest.mark.parametrize("typed", ["predict PROMPT DATA --output", "eval PROMPT --data DATA --json"])
def test_a_file_that_has_no_place_is_refused_before_a_model_is_loaded(
    run: Any, models: Path, tmp_path: Path, typed: str, place: str, said: str
) -> None:
    (tmp_path / "test.jsonl").write_text(GOOD, encoding="utf-8")
    words = typed.replace("PROMPT", str(models / "none")).replace("DATA", str(tmp_path / "test.jsonl")).split()
    assert run(*words, tmp_path / place).endswith(f"{said}.")  # not that there is no such soft prompt


def test_an_argument_that_is_no_text_is_refused(prompt: Path) -> None:
    typed = [sys.executable, "-m", "ptune", "predict", str(prompt), b"\xff\xfe bad"]
    done = subprocess.run(typed, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "argument 3 should be text in UTF-8, and is b'\\xff\\xfe bad'" in sentence(done.stderr)


def test_a_folder_of_another_run_keeps_every_byte(run: Any, models: Path, prompt: Path, tmp_path: Path) -> None:
    shutil.copytree(prompt, tmp_path / "out")
    before = tree(tmp_path / "out")
    file = config_file(tmp_path, models / "sound")
    said = run("train", file)
    assert said == f'"{tmp_path / "out"}" holds another run; choose another --output, or --resume it, or --overwrite it'
    run("train", file, "--overwrite", "--prompt.template", "[P*4]{text}")  # not even when the mistake is elsewhere
    assert tree(tmp_path / "out") == before


def test_a_file_of_an_older_run_that_cannot_be_removed_is_named(run: Any, models: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "run" / "log.jsonl").mkdir(parents=True)
    said = run("train", config_file(tmp_path, models / "sound"), "--overwrite")
    assert said.startswith(f'cannot remove "{tmp_path / "out" / "run" / "log.jsonl"}" of an older run: ')


def test_a_folder_in_use_is_refused_with_the_process_that_holds_it(run: Any, models: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from ptune.files import folder_lock\n"
        "with folder_lock(sys.argv[1]): print('held', flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out" / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    said = run("train", config_file(tmp_path, models / "sound"))
    holder.communicate("\n")
    assert f"is in use by another run (process {holder.pid})" in said or str(holder.pid) in said, said
    assert "choose another folder" in said
    assert tree(tmp_path / "out") == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_whole_files_and_the_run_goes_on_when_there_is_room(
    attempt: Any, models: Path, tmp_path: Path, small_disk: Path
) -> None:
    ballast, output = small_disk / "ballast", small_disk / "out"
    file = config_file(tmp_path, models / "sound", prompt__encoder={"type": "mlp", "hidden_size": 8})
    assert attempt("train", file) == (0, "")
    room, code, unwritten = 0, 2, set()
    while code:
        ballast.write_bytes(bytes(256 * 1024 - room))
        begun = ["--resume"] if output.exists() else []
        code, error = attempt("train", file, "--output", output, *begun)
        if code:
            said = re.fullmatch(r"cannot write (.*): the disk is full; free some space or .*", sentence(error))
            assert said is not None, error
            unwritten.add(Path(said[1]).name)
            assert not (output / "ptune.json").exists()
            assert not [path for path in tree(small_disk) if Path(path).name.startswith(".")]
            assert (output / "run" / "config.yaml").exists() == output.exists()
            log = output / "run" / "log.jsonl"
            assert all("step" in json.loads(line) for line in (log.read_text().splitlines() if log.exists() else []))
        room += os.sysconf("SC_PAGE_SIZE")
        ballast.unlink()
    assert {"config.yaml", "log.jsonl", "checkpoint.safetensors", "ptune.json"} <= unwritten
    name = "soft_prompt.safetensors"
    assert (output / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_limit_on_the_size_of_files_is_said(models: Path, tmp_path: Path) -> None:
    file = config_file(tmp_path, models / "sound", prompt__encoder={"type": "mlp", "hidden_size": 64})
    done = subprocess.run(
        [sys.executable, "-m", "ptune", "train", str(file)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert done.returncode == 2, done.stderr
    assert "checkpoint.safetensors: the file would be larger than the system allows" in sentence(done.stderr)
    assert sorted(tree(tmp_path / "out")) == ["run/config.yaml", "run/log.jsonl"]
