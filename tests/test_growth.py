"""The benchmark of growth, on tiny sizes: it measures the plans that it names, goes on, and draws what it stored."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("peft")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("growth")


def test_an_axis_is_measured_once_and_drawn(
    growth: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, drawn = tmp_path / "growth.json", tmp_path / "growth.svg"
    given = ["--quick", "--rounds", "1", "--output", str(output), "--picture", str(drawn)]
    assert growth.main([*given, "--only", "candidates"]) == 0
    stored = output.read_bytes()
    first = drawn.read_bytes()
    assert growth.main([*given, "--only", "candidates"]) == 0
    assert output.read_bytes() == stored
    assert drawn.read_bytes() == first
    assert "| candidates in a step | 1, 3 (x3) |" in capsys.readouterr().out
    assert growth.main([*given, "--only", "rows"]) == 0
    assert set(json.loads(output.read_bytes())["tasks"]) == {"candidates", "rows"}
    titles = [text.text for text in ElementTree.fromstring(drawn.read_bytes()).iter("{http://www.w3.org/2000/svg}text")]
    assert "candidates in a step" in titles
    assert "rows of a batch" in titles
    assert len(drawn.read_bytes()) < 60_000


@pytest.mark.parametrize("named", [[], ["--output", "one.json"], ["--picture", "one.svg"]])
def test_quick_sizes_never_stand_among_the_published(growth: ModuleType, named: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        growth.main(["--quick", *named])


def test_what_is_timed_is_what_it_is_called(growth: ModuleType) -> None:
    setting = growth.Setting(growth.TINY.shape, tokens=22, virtual=3, rows=4, candidates=2)
    rows = setting.batch()
    model = setting.shape.model("qwen", torch.float32)
    kept = growth.AtOnce(model, setting)
    kept.keep(rows)
    computed: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: computed.append(output[..., 0].numel()))
    kept.step(rows, behind=True)
    assert kept.backbone.plans.last == "frozen context"
    assert sum(computed) == 2 * 4 * 3  # of each row the virtual tokens alone: the label predicts nothing
    computed.clear()
    kept.step(rows, behind=False)
    assert kept.backbone.plans.last == "packed rows"
    text = sum(len(ids) for ids, _ in rows)
    assert sum(computed) == 2 * (2 + text)  # of each row its last virtual token, and all but the label


def test_lengths_have_the_mean_that_is_asked_for(growth: ModuleType) -> None:
    for rows in (1, 8, 32):
        lengths = [len(ids) - 1 for ids, _ in growth.Setting(rows=rows).batch()]
        assert sum(lengths) / rows == pytest.approx(44, abs=0.5)
    assert (min(lengths), max(lengths)) == (25, 63)


def test_a_picture_places_points_by_their_numbers(growth: ModuleType) -> None:
    point = growth.Point
    lines = {"PEFT": [point(1, 1.0, 0.9, 1.1), point(10, 10.0, 9.0, 11.0), point(100, 100.0, 90.0, 110.0)]}
    drawn = growth.picture([growth.Panel("rows & more", lines)])
    (path,) = re.findall(r'class="line peer" d="M([\d. ]+)L([\d. ]+)L([\d. ]+)"', drawn.split("</g>\n<g")[0])
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, one.split())) for one in path)
    assert x0 < x1 < x2
    assert y0 > y1 > y2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert "rows &amp; more" in drawn
