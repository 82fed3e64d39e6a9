"""The house holds its own rules: the map is true, imports point one way, every public name says what it is."""

from __future__ import annotations

import ast
import io
import itertools
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import ptune

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "ptune"
FILES = sorted(p for p in SOURCE.rglob("*.py"))
MAP = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def _relative(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def _module(path: Path) -> str:
    return ".".join(("ptune", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""}
    return names


def _order() -> list[str]:
    """Modules as ARCHITECTURE.md lists them, from left to right of the way of the data."""
    return re.findall(r"^\| `([\w/]+\.py)` \|", MAP, flags=re.MULTILINE)


def test_the_map_names_every_file_and_no_other() -> None:
    assert sorted(_order()) == [_relative(p) for p in FILES if p.name not in ("__init__.py", "__main__.py")]


def test_imports_point_one_way() -> None:
    order = {("ptune." + name.removesuffix(".py").replace("/", ".")): place for place, name in enumerate(_order())}
    backwards = [
        f"{_module(path)} imports {other}"
        for path in FILES
        for other in _imported(path)
        if other in order and _module(path) in order and order[other] >= order[_module(path)]
    ]
    assert backwards == []


@pytest.mark.parametrize("path", FILES, ids=_relative)
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


Function = ast.FunctionDef | ast.AsyncFunctionDef


def _public(node: ast.Module | ast.ClassDef, within: str = "") -> Iterator[tuple[str, Function | ast.ClassDef, str]]:
    """Public classes, functions and methods: name, definition, and the docstrings that speak of it."""
    for child in node.body:
        if not isinstance(child, Function | ast.ClassDef) or (child.name.startswith("_") and child.name != "__init__"):
            continue
        said = ast.get_docstring(child) or ""
        if child.name == "__init__":
            said += ast.get_docstring(node) or ""
        yield f"{within}{child.name}", child, said
        if isinstance(child, ast.ClassDef):
            yield from _public(child, f"{child.name}.")


def _takes_or_gives_tensors(function: Function) -> bool:
    returns = "" if function.returns is None else ast.unparse(function.returns)
    return re.search(r"\bTensor\b", f"{ast.unparse(function.args)} {returns}") is not None


def _raises(function: Function) -> bool:
    """Whether its own body raises an error; what it defines inside does not count."""
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            return True
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            todo += ast.iter_child_nodes(node)
    return False


@pytest.mark.parametrize("path", FILES, ids=_relative)
def test_docstrings_say_what_is_public_its_shapes_and_its_errors(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    mistakes = [] if ast.get_docstring(tree) else ["no docstring"]
    for name, node, said in _public(tree):
        setter = any(ast.unparse(each).endswith(".setter") for each in node.decorator_list)
        if not said and not setter:
            mistakes.append(f"{name} has no docstring")
        if isinstance(node, ast.ClassDef):
            continue
        if _takes_or_gives_tensors(node) and not re.search(r"\[(?:[A-Z\d.]|[a-z][],])|shape|scalar", said):
            mistakes.append(f"{name} tells no shape")
        if _raises(node) and "Raises:" not in said and path.parent.name != "cli":  # there it is the help page
            mistakes.append(f"{name} does not say what it raises")
    assert mistakes == []


def _said(path: Path) -> tuple[str, Iterator[str]]:
    """What a module's own docstring says of shapes, and each docstring and comment within it."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    docstrings = (each.value for each in strings if isinstance(each, ast.Constant) and isinstance(each.value, str))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = (token.string for token in tokens if token.type == tokenize.COMMENT)
    return (ast.get_docstring(tree) or "").partition("Shapes:")[2], itertools.chain(docstrings, comments)


@pytest.mark.parametrize("path", FILES, ids=_relative)
def test_a_letter_of_a_shape_means_one_thing(path: Path) -> None:
    table = set(re.findall(r"^\| \*\*([A-Z])\*\* \|", MAP, flags=re.MULTILINE))
    listed, texts = _said(path)
    a_shape = re.compile(r"\[(?!P\*)([\w\s,.*+/<=-]+)\]")  # [P*10] is of a template
    shapes = [shape for text in texts for shape in a_shape.findall(text)]
    used = {letter for shape in shapes for letter in re.findall(r"(?<![\w.])[A-Za-z](?![\w'])", shape)}
    used |= set(re.findall(r"\b[B-Z]\b", listed))
    assert {letter for letter in used if letter.isupper()} - table == set(), "not in the table of ARCHITECTURE.md"
    own = {letter for letter in used if letter.islower()}
    assert own - set(re.findall(r"\b[a-z]\b", listed)) == set(), "not explained in the module's docstring"


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.argv = ['ptune', '--help']\n"
        "from ptune.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert done.stderr.strip() == "[]"


PUBLIC = """
    Backbone BackboneError ConfigError DataError EncoderConfig Engine Generated GenerationOptions MINI MergedModel
    MissingExtraError ModelConfig OutputError PromptEncoder PromptedModel PtuneError Reporter RunConfig SearchConfig
    SearchReporter SoftPrompt SoftPromptError StartConfig Stopped Template TemplateError TrainingError VirtualTokens
    __version__ load_config load_records merge_prompts prompted search train
"""


def test_public_names_are_these_and_stand_where_they_say() -> None:
    assert sorted(ptune.__all__) == sorted(PUBLIC.split())
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    declared = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == {name: f"ptune.{home}" for name, home in ptune._HOMES.items()}  # what type checkers see
    for name in ptune.__all__:
        assert getattr(ptune, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'promted'"):
        ptune.promted  # noqa: B018


def test_no_runtime_module_imports_peft() -> None:
    assert [_relative(p) for p in FILES if any(n == "peft" or n.startswith("peft.") for n in _imported(p))] == []
