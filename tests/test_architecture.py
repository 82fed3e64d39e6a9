"""The house holds its own rules: the map is true, imports point one way, every public name says what it is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
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


@pytest.mark.parametrize("path", FILES, ids=_relative)
def test_every_module_and_public_name_has_a_docstring_and_tensors_have_shapes(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    missing = [] if ast.get_docstring(tree) else [_relative(path)]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            text = ast.get_docstring(node) or ""
            takes_tensors = isinstance(node, ast.FunctionDef) and "Tensor" in ast.unparse(node.args)
            if not text or (takes_tensors and not re.search(r"\[[A-Z]|shape|scalar", text)):
                missing.append(f"{_relative(path)}: {node.name}")
    assert missing == []


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


def test_public_names_are_what_they_say() -> None:
    for name in ptune.__all__:
        assert getattr(ptune, name) is not None, name
    assert set(ptune.__all__) <= set(dir(ptune))
    with pytest.raises(AttributeError, match="no attribute 'promted'"):
        ptune.promted  # noqa: B018


def test_no_runtime_module_imports_peft() -> None:
    assert [_relative(p) for p in FILES if any(n == "peft" or n.startswith("peft.") for n in _imported(p))] == []
