"""The documentation is true: settings are those of the code, links lead somewhere, examples parse."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from ptune.cli import app
from ptune.config.file import override, setting_names
from ptune.config.run import RunConfig
from ptune.template import Template

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.md")]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_page_of_settings_is_made_from_the_settings() -> None:
    specification = importlib.util.spec_from_file_location("configuration", ROOT / "docs" / "configuration.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: python docs/configuration.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_commands_of_the_readme_exist(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = re.findall(r"^    ptune (.*?)(?:\s{2,}#.*)?$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(lines) >= 6
    for line in lines:
        name, *rest = shlex.split(line, comments=True)
        options = {option for parameter in commands[name].params for option in parameter.opts}
        for word in rest:
            if word.startswith("--") and word not in options:
                assert name == "train", line
                assert override(word.removeprefix("--")) in setting_names(), line


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_the_readme_s_config_is_a_whole_one(page: Path) -> None:
    (config,) = (RunConfig.model_validate(yaml.safe_load(text)) for text in fenced(page, "yaml"))
    assert Template.parse(config.prompt.template).num_virtual_tokens == 10


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_the_readme_s_python_compiles_and_names_what_exists(page: Path) -> None:
    import ptune

    blocks = fenced(page, "python")
    assert len(blocks) == 2
    for block in blocks:
        compile(block, page.name, "exec")
        for name in re.findall(r"\bptune\.(\w+)", block):
            assert hasattr(ptune, name), name


def test_templates_in_the_docs_parse() -> None:
    text = (ROOT / "docs" / "templates.md").read_text(encoding="utf-8")
    templates = set(re.findall(r"`([^`\n]+)`|^    (.+)$", text, flags=re.MULTILINE))
    whole = {one or other for one, other in templates if "{answer}" in (one or other) and "[P" in (one or other)}
    assert len(whole) >= 4
    for template in whole:
        assert Template.parse(template).num_virtual_tokens > 0
