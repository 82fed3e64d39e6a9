"""An option that would do nothing beside the others is refused by name; none is accepted and ignored."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import soft_prompts
import yaml
from tiny_models import tiny_model, tiny_tokenizer

from ptune.cli import main
from ptune.models.backbone import Backbone


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a soft prompt of it, records, and settings of a run."""
    place = tmp_path_factory.mktemp("unused")
    tiny_model("gpt2").save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    soft_prompts.make(Backbone.load(str(place / "model"))).save(place / "prompt")
    records = [{"text": f"soup {number}", "label": "good" if number % 2 else "bad"} for number in range(8)]
    (place / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    settings = {
        "model": str(place / "model"),
        "data": str(place / "test.jsonl"),
        "task": {"type": "classification", "verbalizer": {"good": " good", "bad": " bad"}},
        "prompt": {"template": "{text}[P*2]{answer}"},
        "output": str(place / "out"),
    }
    (place / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return place


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("train run.yaml --from prompt --prompt.start.text soup", "--from and --prompt.start.text both say what the"),
        ("train run.yaml --from prompt --start.method=normal", "--from and --prompt.start.method both say what the"),
        ("train run.yaml --explain --resume", "--resume would do nothing, for --explain trains nothing; leave it out"),
        ("train run.yaml --explain --seeds 3", "--seeds would do nothing, for --explain trains nothing; leave it out"),
        ("train run.yaml --explain --overwrite", "--overwrite would do nothing, for --explain trains nothing"),
        ("train run.yaml --model a --model.name b", "--model and --model.name both say the same thing"),
        ("train run.yaml --data a --data.train b", "--data and --data.train both say the same thing"),
        ("train run.yaml --seed 1 --training.seed 2", "--training.seed is given twice; leave one of the two out"),
        ("search run.yaml --vary seed=1,2 --explain --overwrite", "--overwrite would do nothing, for --explain"),
        ("search run.yaml --vary seed=1,2 --seed 3", "training.seed is given by --vary and as --training.seed"),
        ("eval prompt --data test.jsonl --split dev", '--split would do nothing, for "test.jsonl" is a single file'),
        ("predict prompt test.jsonl --split dev", '--split would do nothing, for "test.jsonl" is a single file'),
        ("predict prompt soup --split test", '--split would do nothing, for "soup" is no file, folder or Hub name'),
        ("predict prompt soup --limit 1", '--limit would do nothing, for "soup" is no file, folder or Hub name'),
        ("predict prompt soup --field text=a", '--field would do nothing, for "soup" is no file, folder or Hub name'),
        ("generate prompt soup --seed 3", "--seed would do nothing, for nothing is drawn without --temperature"),
        ("generate prompt soup --field text=a", 'the field "text" is the text itself, which is given beside it'),
        ("inspect prompt --data test.jsonl", "--data would do nothing, for a soft prompt holds no data"),
        ("inspect prompt --json --count 5", "--count would do nothing, for --json says nothing of nearest words"),
        ("inspect prompt --json --model a", "--model would do nothing, for --json says nothing of nearest words"),
        (
            "serve --vllm-arg=--enforce-eager",
            "--vllm-arg would do nothing, for it is one of the vLLM that --engine vllm",
        ),
        ("serve --vllm-start 5", "--vllm-start would do nothing, for it is one of the vLLM that --engine vllm starts"),
        ("serve --watch 5", "--watch would do nothing, for no folder of soft prompts is served; name one by --prompts"),
        ("serve --upstream http://a --backbone mini", "--backbone would do nothing, for without --prompts nothing"),
        ("serve --upstream http://a --device cpu", "--device would do nothing, for it is one of ptune's own engine"),
        ("serve --upstream http://a --log-text", "--log-text would do nothing, for it is one of ptune's own engine"),
        ("serve --upstream http://a --max-batch 3", "--max-batch would do nothing, for it is one of ptune's own"),
        ("inspect data run.yaml --json", "--json would do nothing, for it goes with a soft prompt"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], typed: str, expected: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["ptune", *typed.split(" ")])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr().err.strip()
    assert ended.value.code == 2
    assert expected in said, said
    assert "\n" not in said
    assert not (place / "out").exists()
