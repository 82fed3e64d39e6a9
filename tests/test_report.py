"""The report page: whole, self-contained, every text of the user's escaped; without matplotlib one clear sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import soft_prompts
import yaml
from tiny_models import tiny_model, tiny_tokenizer

from ptune.config.task import ClassificationConfig
from ptune.errors import DataError, SoftPromptError
from ptune.models.backbone import Backbone
from ptune.reports.page import report_page
from ptune.reports.story import read_story
from ptune.soft_prompts.nearest_words import nearest_words
from ptune.soft_prompts.soft_prompt import SoftPrompt

EVIL = "</pre><script>alert('x')</script>&\"<b onclick=x>"
TASK = ClassificationConfig(verbalizer={EVIL: " great", "bad": " terrible"})
BINS = [{"confidence": 0.6, "accuracy": 0.5, "records": 30}, {"confidence": 0.9, "accuracy": 0.7, "records": 30}]
ASSESSMENT = {
    "metrics": {"accuracy": 0.75},
    "labels": [EVIL, "bad"],
    "confusion": [[41, 5], [7, 11]],
    "calibration": {"temperature": 1.5, "before": BINS, "after": BINS[:1]},
}
COMPARISON = {
    "changed": 31,
    "total": 64,
    "shift": 0.271,
    "off_task": {"question": "Which animals?", "without": f"bare {EVIL}", "with": f"tuned {EVIL}"},
}
EMPTY = {"temperature": None, "before": [], "after": [{"wrong": 1}]}
LOG = [
    {"step": 0, "loss": 2.0, "accuracy": 0.5},
    {"step": 10, "train_loss": 1.5},
    {"step": 20, "loss": float("nan"), "accuracy": 0.75},
]
VOID = {"meta", "link", "img", "br", "hr", "path"}


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], "tags that nothing closes"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A soft prompt with its run's files, full of text that would like to be markup."""
    folder = tmp_path_factory.mktemp("report")
    tiny_model("gpt2").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    summary = soft_prompts.SUMMARY | {"data": EVIL, "best_step": 20, "after": {"accuracy": 0.75, "loss": 0.125}}
    backbone = Backbone.load(str(folder / "model"))
    template = "[P*4]<script>{text}</script>{answer}"
    soft_prompts.make(backbone, task=TASK, template=template, temperature=1.5, summary=summary).save(folder / "prompt")
    run = folder / "prompt" / "run"
    run.mkdir()
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG), encoding="utf-8")
    (run / "assessment.json").write_text(json.dumps(ASSESSMENT), encoding="utf-8")
    (run / "comparison.json").write_text(json.dumps(COMPARISON), encoding="utf-8")
    settings = {
        "model": {"name": str(folder / "model")},
        "data": {"train": str(folder / "train.jsonl"), "dev": "~/dev.jsonl"},
        "prompt": {"template": f"/模型 {EVIL}", "start": {"method": "prompt", "prompt": str(folder / "other")}},
        "output": str(folder / "prompt"),
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    return folder


def command(*arguments: object, without_matplotlib: bool = False, code: int = 0) -> subprocess.CompletedProcess[str]:
    blocked = "sys.modules['matplotlib'] = None\n" if without_matplotlib else ""
    script = f"import sys\n{blocked}from ptune.cli import main\nsys.argv[0] = 'ptune'\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, done.stderr
    return done


def test_without_matplotlib_the_command_says_what_to_install(folder: Path) -> None:
    done = command("report", folder / "prompt", without_matplotlib=True, code=2)
    assert done.stderr == "ptune: a report's pictures need matplotlib: pip install ptune[report]\n"
    assert not (folder / "prompt" / "report.html").exists()


def test_the_page_is_whole_escaped_and_fetches_nothing(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    said = command("report", folder / "prompt", "--output", tmp_path / "page.html", "--count", 2).stdout
    assert said == f"report written to {tmp_path / 'page.html'}\n"
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "b", "iframe", "object", "link", "img", "image"} & set(page.tags)
    assert page.tags.count("svg") == 3  # two pictures of curves and one of calibration
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("#") for name, value in page.attributes if name in ("href", "src", "xlink:href"))
    assert not re.search(r"https?:|//www|@import|url\((?!#)", text)
    assert "default-src 'none'" in dict(page.attributes)["content"] or "default-src 'none'" in text
    for shown in (EVIL, "[P*4]<script>{text}</script>{answer}", "模型", "torch 2.13.0", "as they are", "held-out"):
        assert shown in page.text
    assert "31 of 64 held-out answers differ; probabilities move by 0.27 on average." in page.text
    for shown in ("Which animals?", f"bare {EVIL}", f"tuned {EVIL}"):
        assert shown in page.text
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert len(headings) == len(set(headings)) == 7
    ids = [value for name, value in page.attributes if name == "id"]
    assert {value[1:] for name, value in page.attributes if name == "href"} <= set(ids)
    paths = [name for name in ids if re.fullmatch(r"[mp][0-9a-f]{10}", name)]
    assert len(paths) == len(set(paths))
    assert [f">{count}</td>" in text for count in (41, 5, 7, 11)] == [True] * 4
    with pytest.raises(AssertionError):
        Page(text.replace("&lt;script&gt;", "<script>"))


def test_no_folder_of_the_machine_is_told(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    summary = soft_prompts.SUMMARY | {"data": str(folder / "train.jsonl")}
    prompt = replace(SoftPrompt.load(folder / "prompt"), summary=summary)
    evaluation = ASSESSMENT | {"records": 111, "data": str(folder / "test.jsonl")}
    (tmp_path / "test.json").write_text(json.dumps(evaluation), encoding="utf-8")
    no_words = f'Nearest words need the backbone: "{folder / "model"}" is gone.'
    page = report_page(read_story(folder / "prompt", prompt, evaluation=tmp_path / "test.json", no_words=no_words))
    assert str(folder) not in page
    assert "~" not in page
    shown = ("model", "name: model", "train: train.jsonl", "dev: dev.jsonl", "prompt: other", "output: prompt")
    for said in (
        *shown,
        "template: /模型",
        "trained ontrain.jsonl",
        "111 records of test.jsonl",
        'backbone: "model" is',
    ):
        assert said in Page(page).text


@pytest.mark.parametrize("kind", ["stopped early", "other scores", "other settings"])
def test_files_of_a_later_run_that_was_stopped_are_left_out(folder: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(folder / "prompt", tmp_path / "prompt")
    run = tmp_path / "prompt" / "run"
    lines = {"stopped early": LOG[:2], "other scores": [LOG[0] | {"accuracy": 0.25}, *LOG[1:]], "other settings": []}[
        kind
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if kind == "other settings":
        (run / "config.yaml").write_text("training: {seed: 8}", encoding="utf-8")
    whole = read_story(folder / "prompt", SoftPrompt.load(folder / "prompt"))
    assert (len(whole.log), whole.no_log) == (3, "")
    assert whole.settings
    story = read_story(tmp_path / "prompt", SoftPrompt.load(tmp_path / "prompt"))
    assert (story.log, story.settings, story.assessment, story.comparison) == ([], None, None, None)
    pytest.importorskip("matplotlib")
    assert "are of a later run, which has not come to its end" in Page(report_page(story)).text


def test_the_virtual_tokens_stand_with_their_nearest_words_and_distances(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    prompt, backbone = SoftPrompt.load(folder / "prompt"), Backbone.load(str(folder / "model"))
    words = nearest_words(prompt.rows, backbone, 2)
    page = Page(report_page(read_story(folder / "prompt", prompt, words=words)))
    for one in words:
        assert f"{one.norm:.2f}" in page.text
        assert all(f"{word.text!r}\N{NO-BREAK SPACE}{word.distance:.2f}" in page.text for word in one.by_distance)
        assert all(f"{word.text!r}\N{NO-BREAK SPACE}{word.cosine:.2f}" in page.text for word in one.by_cosine)


def test_a_copied_prompt_without_its_run_is_reported_with_an_evaluation(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    prompt = SoftPrompt.load(folder / "prompt")
    prompt.save(tmp_path / "copy")
    page = Page(report_page(read_story(tmp_path / "copy", prompt, no_words="Nobody knows.")))
    assert "svg" not in page.tags
    assert "so there are no curves" in page.text
    assert "Nobody knows." in page.text
    labels = [f"label{number}" for number in range(31)]
    table = [[0] * 31 for _ in labels]
    table[3][7], table[2][2] = 12, 99
    evaluation = ASSESSMENT | {"labels": labels, "confusion": table, "records": 111, "data": "<i>test</i>.jsonl"}
    (tmp_path / "test.json").write_text(json.dumps(evaluation), encoding="utf-8")
    page = Page(report_page(read_story(tmp_path / "copy", prompt, evaluation=tmp_path / "test.json")))
    assert "On 111 records of <i>test</i>.jsonl." in page.text
    assert "label3label712" in page.text  # one confusion, and no matrix of 31 labels
    assert "99" not in page.text
    assert page.tags.count("svg") == 1


@pytest.mark.parametrize(
    ("file", "content", "error", "said"),
    [
        ("log.jsonl", '{"step": 1}\nnonsense\n', SoftPromptError, 'log.jsonl", line 2: expected an object with a step'),
        ("assessment.json", '{"labels": ["a"]}', SoftPromptError, "expected the metrics, labels, confusion"),
        ("comparison.json", '{"changed": 1, "total": 2}', SoftPromptError, "expected changed, total, shift and"),
        ("other.json", '{"metrics": {}, "labels": ["a"], "confusion": [[1, 2]]}', DataError, "by ptune eval --json"),
        ("other.json", json.dumps(ASSESSMENT | {"calibration": EMPTY}), DataError, "by ptune eval --json"),
    ],
)
def test_files_that_were_altered_are_named(
    folder: Path, tmp_path: Path, file: str, content: str, error: type[Exception], said: str
) -> None:
    prompt = SoftPrompt.load(folder / "prompt")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / file
    path.write_text(content, encoding="utf-8")
    named: dict[str, Any] = {"evaluation": path} if file == "other.json" else {}
    with pytest.raises(error, match=re.escape(said)):
        read_story(tmp_path, prompt, **named)
