"""The cache of contexts: found again by content on disk, never wrong, shared by processes, shown and cleared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor

from ptune.config.run import RunConfig
from ptune.errors import ConfigError
from ptune.models.backbone import Backbone
from ptune.plans.context_cache import ContextCache
from ptune.plans.context_store import ContextStore, clear_contexts, stored_contexts
from ptune.pretrained.fingerprint import exact_key
from ptune.training.reporting import Reporter
from ptune.training.train import train

IDS = [(5, 6, 7), (8, 9, 10, 11), (12, 13)]


def past_of(ids: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 2, len(ids), 8, generator=torch.Generator().manual_seed(ids[0])).to(dtype)


def store(folder: Path, key: str = "one", budget: int = 10**9, dtype: str = "float32") -> ContextStore:
    return ContextStore(key, budget, name=f"model {key}", dtype=dtype, folder=folder)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


class Listener(Reporter):
    def __init__(self) -> None:
        self.kept: list[int] = []
        self.warnings: list[str] = []

    def kept_contexts(self, count: int, size: int, *, full: bool) -> None:
        self.kept.append(count)

    def warned(self, sentence: str) -> None:
        self.warnings.append(sentence)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("PTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_put_is_found_by_a_later_store_and_nothing_else(tmp_path: Path) -> None:
    assert store(tmp_path).put(IDS[0], past_of(IDS[0]))
    found = store(tmp_path).get(IDS[0])
    assert found is not None
    assert found.equal(past_of(IDS[0]))
    assert store(tmp_path).get(IDS[1]) is None
    assert store(tmp_path, key="another").get(IDS[0]) is None
    assert store(tmp_path, dtype="bfloat16").get(IDS[0]) is None


@pytest.mark.parametrize("how", ["cut", "altered", "emptied", "swapped", "nonsense"])
def test_a_damaged_file_is_a_miss_and_is_removed(how: str, tmp_path: Path) -> None:
    first = store(tmp_path)
    first.put((5, 6, 7), past_of((5, 6, 7)))
    (path,) = files(tmp_path)
    data = path.read_bytes()
    if how == "swapped":  # another context of the same shape under this one's name
        first.put((8, 6, 7), past_of((8, 6, 7)))
        (other,) = (each for each in files(tmp_path) if each != path)
        data = other.read_bytes()
    damaged = {
        "cut": data[:-40],
        "altered": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        "emptied": b"",
        "swapped": data,
        "nonsense": b"\xff" * 64,
    }[how]
    path.write_bytes(damaged)
    assert store(tmp_path).get((5, 6, 7)) is None
    assert not path.exists()


def test_a_file_altered_while_a_run_uses_it_is_found_out(tmp_path: Path) -> None:
    one = store(tmp_path)
    one.put(IDS[0], past_of(IDS[0]))
    assert one.get(IDS[0]) is not None
    (path,) = files(tmp_path)
    data = path.read_bytes()
    time.sleep(0.02)
    replaced = path.with_suffix(".new")
    replaced.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.replace(replaced, path)
    assert one.get(IDS[0]) is None


def test_old_contexts_make_room_and_those_in_use_stay(tmp_path: Path) -> None:
    size = past_of(IDS[0]).numel() * 4
    old = store(tmp_path, key="old")
    for number in range(4):
        old.put((number + 50, 1, 2), past_of((number + 50, 1, 2)))
    for age, path in enumerate(sorted(files(tmp_path))):
        os.utime(path, (time.time() - 1000 - age, time.time() - 1000 - age))
    room = sum(path.stat().st_size for path in files(tmp_path)) + size // 2
    new = store(tmp_path, key="new", budget=room)
    taken = [new.put((number + 80, 1, 2), past_of((number + 80, 1, 2))) for number in range(6)]
    assert taken[0]
    assert not taken[-1]
    assert new.full
    assert all(new.get((number + 80, 1, 2)) is not None for number, kept in enumerate(taken) if kept)
    assert (
        sum(path.stat().st_size for path in files(tmp_path)) <= room + 400 * 6
    )  # headers are not counted when written


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_cache(tmp_path: Path) -> None:
    (tmp_path / "contexts").write_text("a file stands where the folder should")
    broken = store(tmp_path)
    assert not broken.put(IDS[0], past_of(IDS[0]))
    assert broken.full
    assert broken.mistake is not None


def test_memory_comes_first_and_the_disk_takes_the_rest(tmp_path: Path) -> None:
    size = past_of(IDS[0]).numel() * 4
    kept = ContextCache(size, store(tmp_path))
    for ids in IDS:
        kept.put(ids, past_of(ids))
    assert (len(kept), kept.bytes, kept.full) == (3, size, False)
    for ids in IDS:
        found = kept.get(ids)
        assert found is not None
        assert found.equal(past_of(ids))
    later = ContextCache(0, store(tmp_path))
    assert all(later.find(ids) for ids in IDS)
    assert later.bytes == 0
    clear_contexts(folder=tmp_path)
    assert later.get(IDS[1]) is None
    assert IDS[1] not in later


def test_bfloat16_halves_what_is_kept(tmp_path: Path) -> None:
    kept = ContextCache(10**6, store(tmp_path, dtype="bfloat16"), torch.bfloat16)
    kept.put(IDS[0], past_of(IDS[0]))
    assert kept.bytes == past_of(IDS[0]).numel() * 2
    again = store(tmp_path, dtype="bfloat16").get(IDS[0])
    assert again is not None
    assert again.equal(past_of(IDS[0], torch.bfloat16))


def test_the_key_is_another_for_any_other_weight_or_setting() -> None:
    model = tiny_model("llama")
    before = exact_key("llama", model.config, model.state_dict())
    assert exact_key("llama", model.config, tiny_model("llama").state_dict()) == before
    with torch.no_grad():  # deep inside, where a fingerprint of the input matrix does not look
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-4
    assert exact_key("llama", model.config, model.state_dict()) != before
    other = tiny_model("llama")
    other.config.rms_norm_eps *= 2
    assert exact_key("llama", other.config, other.state_dict()) != before


def test_two_processes_write_one_cache(tmp_path: Path) -> None:
    script = (
        "import sys, torch\nfrom pathlib import Path\nfrom ptune.plans.context_store import ContextStore\n"
        "store = ContextStore('one', 10**9, name='m', dtype='float32', folder=Path(sys.argv[1]))\n"
        "for number in range(40):\n"
        "    past = torch.full((4, 2, 3, 8), float(number))\n"
        "    assert store.put((number, 1, 2), past)\n"
        "    found = store.get((number, 1, 2))\n"
        "    assert found is not None and found.equal(past)\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert len(files(tmp_path)) == 40
    assert [path for path in tmp_path.rglob("*") if "tmp" in path.name] == []


def run_config(output: Path, **training: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "task": {"type": "classification", "verbalizer": {"positive": " good", "negative": " bad"}},
            "prompt": {"template": "{text}[P*3]{answer}", "encoder": {"type": "embedding"}},
            "training": {"max_steps": 6, "batch_size": 4, "evaluations": 1} | training,
            "output": str(output),
        }
    )


def records(word: str = "soup") -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    texts = [f"the {word} number {number} was a wonder in the room" for number in range(12)]
    every = [{"text": text, "label": ("positive", "negative")[n % 2]} for n, text in enumerate(texts)]
    return every[:8], every[8:]


def count_runs(backbone: Backbone) -> list[int]:
    counted: list[int] = []
    run = backbone.plans._run_contexts

    def watched(contexts: Any) -> Any:
        counted.extend([len(contexts)] if torch.is_grad_enabled() else [])
        return run(contexts)

    backbone.plans._run_contexts = watched  # type: ignore[method-assign]
    return counted


def test_a_second_run_computes_no_context_and_ends_alike(tmp_path: Path, cache: Path) -> None:
    rows = []
    for number, context_cache in enumerate(("2GB", "2GB", "0")):
        backbone = Backbone(tiny_model("llama"), tiny_tokenizer("llama"), "tiny")
        counted = count_runs(backbone)
        config = run_config(tmp_path / str(number), context_cache=context_cache, context_cache_disk="1GB")
        rows.append(train(config, backbone=backbone, records=records()).rows)
        assert sum(counted) == (8 if number == 0 else 0)
    assert rows[0].equal(rows[1])
    assert rows[0].equal(rows[2])
    (entry,) = stored_contexts(cache)
    assert (entry.backbone, entry.dtype, entry.contexts) == ("tiny", "float32", 8)


def test_another_record_template_or_model_is_a_miss(tmp_path: Path, cache: Path) -> None:
    def computed(name: str, template: str | None = None, word: str = "soup", seed: int | None = None) -> int:
        model = tiny_model("llama")
        if seed is not None:
            with torch.no_grad():
                model.model.layers[0].self_attn.q_proj.weight[0, 0] += 0.5
        backbone = Backbone(model, tiny_tokenizer("llama"), "tiny")
        counted = count_runs(backbone)
        values = run_config(tmp_path / name, context_cache_disk="1GB").model_dump(mode="json")
        values["prompt"]["template"] = template or values["prompt"]["template"]
        train(RunConfig.model_validate(values), backbone=backbone, records=records(word))
        return sum(counted)

    assert computed("first") == 8
    assert computed("again") == 0
    assert computed("record", word="apple") == 8
    assert computed("template", template="Well: {text}[P*3]{answer}") == 8
    assert computed("model", seed=1) == 8
    assert computed("longer", template="{text}[P*5]{answer}") == 0


def test_a_low_share_is_said_once_with_what_would_do(tmp_path: Path) -> None:
    backbone, listener = Backbone(tiny_model("llama"), tiny_tokenizer("llama"), "tiny"), Listener()
    whole = run_config(tmp_path / "whole")
    train(whole, backbone=backbone, records=records(), reporter=listener)
    assert not any("context_cache" in sentence for sentence in listener.warnings)
    assert listener.kept == [8]
    little = run_config(tmp_path / "little", context_cache="7kB")
    train(little, backbone=backbone, records=records(), reporter=listener)
    (said,) = [sentence for sentence in listener.warnings if "context_cache" in sentence]
    assert said.startswith("only ")
    assert "of 8 texts before the virtual tokens fit into training.context_cache (7kB)" in said
    assert "raise it, to about 1MB, or give training.context_cache_disk" in said


def ptune(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ptune", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
        check=False,
    )


def test_the_command_shows_and_clears(cache: Path) -> None:
    assert "nothing is kept" in ptune("cache").stdout
    for key in ("one", "two"):
        store(cache, key=key).put(IDS[0], past_of(IDS[0]))
    shown = ptune("cache").stdout
    assert "model one" in shown
    assert "model two" in shown
    refused = ptune("cache", "--clear", "--backbone", "model oen")
    assert refused.returncode == 2
    assert 'nothing of a backbone "model oen". Did you mean "model one"?' in refused.stderr
    alone = ptune("cache", "--backbone", "model one")
    assert alone.returncode == 2
    assert "--backbone says what to clear, and --clear is missing; add it, or leave --backbone out" in alone.stderr
    assert "1 contexts removed" in ptune("cache", "--clear", "--backbone", "model one").stdout
    assert [entry.backbone for entry in stored_contexts(cache)] == ["model two"]
    assert ptune("cache", "--clear").returncode == 0
    assert stored_contexts(cache) == []


def test_a_store_without_its_description_is_still_shown_and_cleared(cache: Path) -> None:
    store(cache).put(IDS[0], past_of(IDS[0]))
    (about,) = cache.rglob("backbone.json")
    assert json.loads(about.read_text())["backbone"] == "model one"
    about.write_text("{")
    (entry,) = stored_contexts(cache)
    assert (entry.dtype, entry.contexts) == ("unknown", 1)
    with pytest.raises(ConfigError, match="holds nothing of a backbone"):
        clear_contexts("model one", cache)
    assert len(clear_contexts(folder=cache)) == 1
