"""Files are whole or absent, whatever happens to disk and process; damaged ones are named."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptune.errors import DataError, OutputError, PtuneError, SoftPromptError
from ptune.files import (
    TEMPORARY_SUFFIX,
    folder_lock,
    read_json,
    read_tensors,
    remove_leftovers,
    tensors_hash,
    write_atomically,
    write_json,
    write_tensors,
)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def start(program: str, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# JSON


@given(value=JSON_VALUES)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_json_is_read_back_as_it_was_written(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json", DataError) == value
    assert names(tmp_path) == ["value.json"]


def test_json_keeps_the_order_of_keys_and_characters_as_they_are(tmp_path: Path) -> None:
    write_json(tmp_path / "value.json", {"b": "提示", "a": 1})
    assert (tmp_path / "value.json").read_text(encoding="utf-8") == '{\n  "b": "提示",\n  "a": 1\n}\n'


def test_json_refuses_what_other_readers_of_json_would_not_read(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*value.json: .*not JSON compliant.*; replace the value"):
        write_json(tmp_path / "value.json", {"loss": float("nan")})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": }', r"ptune\.json, line 2, column 7: broken JSON \(Expecting value\); correct it"),
        (b"", r"ptune\.json, line 1, column 1: broken JSON"),
        (b'{"a": "\xc4\xe3"}', r"ptune\.json, line 1, byte 8: expected UTF-8 and found 0xc4; .*iconv -f GB18030"),
        ('{"a": 1}'.encode("utf-16"), r"ptune\.json, line 1, byte 1: expected UTF-8 .*iconv -f UTF-16 -t UTF-8\."),
        (b"[" * 200_000, r"ptune\.json, line 1: JSON that cannot be read \(.+\); simplify it\."),
        (b"1" * 5000, r"ptune\.json, line 1: JSON that cannot be read \(Exceeds.+\); simplify"),
    ],
)
def test_broken_json_is_named_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "ptune.json").write_bytes(content)
    with pytest.raises(SoftPromptError, match=message):
        read_json(tmp_path / "ptune.json", SoftPromptError)


def test_a_byte_order_mark_before_json_is_tolerated(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json", DataError) == {"a": 1}


# Tensors


def test_tensors_are_read_back_with_shape_dtype_and_value(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "whole": base,
        "transposed": base.T,
        "shared": base[1:],
        "expanded": base[:1].expand(5, 4),
        "half": base.to(torch.bfloat16),
        "trained": torch.nn.Parameter(base.clone()),
        "counter": torch.tensor(7),
        "state": torch.get_rng_state(),
    }
    write_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    read = read_tensors(tmp_path / "x.safetensors", SoftPromptError)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.detach())
    assert b'"format":"pt"' in (tmp_path / "x.safetensors").read_bytes()


def test_a_tensor_file_cut_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"rows": torch.ones(3, 4)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(
            SoftPromptError, match=r"x\.safetensors is damaged or not a safetensors file \(.+\); copy it"
        ):
            read_tensors(path, SoftPromptError)


def test_flipped_bytes_of_a_header_are_refused_or_change_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"rows": torch.ones(3, 4), "more": torch.ones(2, dtype=torch.int64)}, {"format": "pt"})
    whole, before = path.read_bytes(), tensors_hash(path, DataError)
    refusals = []
    for position in range(8 + int.from_bytes(whole[:8], "little")):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            assert tensors_hash(path, DataError) != before
            try:
                read_tensors(path, DataError)
            except DataError as error:
                refusals.append(str(error))
    for refusal in refusals:
        assert refusal.startswith(f"{path} is damaged or not a safetensors file (")
        assert "\n" not in refusal
    assert len(refusals) > position  # a flipped letter of a tensor's name may pass; the hash is for those


def test_a_changed_payload_changes_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"rows": torch.ones(3, 4)})
    before = tensors_hash(path, DataError)
    assert len(before) == 64
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    read_tensors(path, SoftPromptError)
    assert tensors_hash(path, DataError) != before


@pytest.mark.parametrize("read", [read_json, read_tensors, tensors_hash])
@pytest.mark.parametrize("error", [SoftPromptError, DataError])
def test_a_missing_file_is_named_with_the_nearest_name(
    tmp_path: Path, read: Callable[[Path, type[PtuneError]], object], error: type[PtuneError]
) -> None:
    (tmp_path / "soft_prompt.safetensors").touch()
    with pytest.raises(error) as caught:
        read(tmp_path / "soft_promt.safetensors", error)
    path = tmp_path / "soft_promt.safetensors"
    assert str(caught.value) == f'{path} does not exist; check the path. Did you mean "soft_prompt.safetensors"?'
    with pytest.raises(error, match=r"no/a\.json does not exist, for there is no folder .*no; check the path"):
        read(tmp_path / "no" / "a.json", error)
    with pytest.raises(error, match=r"is a folder where a file was expected; name a file in it"):
        read(tmp_path, error)
    with pytest.raises(error, match=r"cannot be read \(Not a directory\); check the path"):
        read(tmp_path / "soft_prompt.safetensors" / "a.json", error)


# Writing


def test_a_folder_is_written_whole_and_takes_no_other_folders_place(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "a.txt").write_text("a")

    write_atomically(tmp_path / "step-1", write)
    assert (tmp_path / "step-1" / "inner" / "a.txt").read_text() == "a"
    with pytest.raises(
        OutputError, match=r"cannot write .*step-1: a folder of that name stands there and is not empty"
    ):
        write_atomically(tmp_path / "step-1", write)
    assert names(tmp_path) == ["step-1"]


def test_parents_are_made_and_permissions_are_the_usual_ones(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b" / "c.json", 1)
    (tmp_path / "usual").touch()
    assert (tmp_path / "a" / "b" / "c.json").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_error_of_the_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", "old")

    def interrupted(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.json", interrupted)
    assert read_json(tmp_path / "a.json", DataError) == "old"
    assert names(tmp_path) == ["a.json"]


def test_an_error_of_ptune_within_a_writer_keeps_its_text(tmp_path: Path) -> None:
    def refused(temporary: Path) -> None:
        raise OutputError("exactly this.")

    with pytest.raises(OutputError, match=r"^exactly this\.$"):
        write_atomically(tmp_path / "a.json", refused)


def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*a\.json: a part of the path is a file"):
        write_json(tmp_path / "file" / "a.json", 1)
    with pytest.raises(OutputError, match=r"cannot write .*: a folder of that name stands there"):
        write_json(tmp_path, 1)
    assert names(tmp_path) == ["file"]
    assert not [name for name in os.listdir(tmp_path.parent) if name.endswith(TEMPORARY_SUFFIX)]


def test_a_full_device_is_called_a_full_disk(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", "old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        with open("/dev/full", "wb") as full:
            full.write(b"x")

    with pytest.raises(OutputError, match=r"cannot write .*a\.json: the disk is full; free some space or choose"):
        write_atomically(tmp_path / "a.json", write)
    assert read_json(tmp_path / "a.json", DataError) == "old"
    assert names(tmp_path) == ["a.json"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_the_old_files(small_disk: Path) -> None:
    write_json(small_disk / "a.json", "old")
    write_tensors(small_disk / "x.safetensors", {"rows": torch.ones(4)})
    with pytest.raises(OutputError, match=r"a\.json: the disk is full"):
        write_json(small_disk / "a.json", "x" * 100_000)
    with pytest.raises(OutputError, match=r"x\.safetensors: the disk is full"):
        write_tensors(small_disk / "x.safetensors", {"rows": torch.ones(100_000)})
    assert read_json(small_disk / "a.json", DataError) == "old"
    assert torch.equal(read_tensors(small_disk / "x.safetensors", DataError)["rows"], torch.ones(4))
    assert names(small_disk) == ["a.json", "x.safetensors"]


def test_a_file_larger_than_the_system_allows_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", "old")
    program = (
        "import sys; from ptune.files import write_json\n"
        "from ptune.errors import OutputError\n"
        "try: write_json(sys.argv[1], 'x' * 100_000)\n"
        "except OutputError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.json")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert "a.json: the file would be larger than the system allows; raise the limit (ulimit -f)." in result.stdout
    assert read_json(tmp_path / "a.json", DataError) == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_file_is_whole_after_a_kill_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    program = (
        "import sys; from ptune.files import write_json\n"
        "count = 0\n"
        "while True:\n"
        "    write_json(sys.argv[1], [count, chr(97 + count % 26) * 2_000_000])\n"
        "    if not count: print('ready', flush=True)\n"
        "    count += 1"
    )
    moments = random.Random(0)
    kills = interrupted = 0
    # Twelve times, and on until three kills have fallen within a write: without those it would show nothing.
    while kills < 12 or interrupted < 3:
        assert kills < 100, "no kill falls within a write"
        writer = start(program, path)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0, 0.1))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        count, text = read_json(path, DataError)
        assert text == chr(97 + count % 26) * 2_000_000
        kills += 1
        interrupted += len(names(tmp_path)) > 1
        with folder_lock(tmp_path):
            assert names(tmp_path) == [".lock", "state.json"]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / f".a.json.1-ab{TEMPORARY_SUFFIX}").touch()
    (tmp_path / f".step-1.1-ab{TEMPORARY_SUFFIX}" / "inner").mkdir(parents=True)
    (tmp_path / "mine.tmp").touch()
    (tmp_path / ".hidden").touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "mine.tmp"]


# The lock

HOLD = (
    "import sys, time; from ptune.files import folder_lock\n"
    "with folder_lock(sys.argv[1]): print('held', flush=True); time.sleep({})"
)


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = start(HOLD.format(60), folder)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(OutputError) as caught, folder_lock(folder):
            pass
        assert f"{folder} is in use by another run (process {first.pid} on " in str(caught.value)
        assert str(caught.value).endswith("wait for its end, stop it, or choose another folder.")
        second = start(HOLD.format(0), folder)
        assert second.communicate()[0] == ""
        assert second.returncode == 1
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    with folder_lock(folder):
        assert (folder / ".lock").read_text().split()[0] == str(os.getpid())
    assert names(folder) == []


def test_a_lock_is_refused_within_one_process_too_and_free_after_an_error(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        with pytest.raises(OutputError, match=rf"in use by another run \(process {os.getpid()} on "):
            with folder_lock(tmp_path):
                pass
    with pytest.raises(KeyError), folder_lock(tmp_path):
        raise KeyError
    with folder_lock(tmp_path):
        pass


def test_a_lock_outlives_the_removal_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with folder_lock(folder):
        (folder / ".lock").unlink()
        folder.rmdir()
        with folder_lock(folder):
            assert (folder / ".lock").exists()


def test_only_one_of_many_runs_holds_a_folder_at_a_time(tmp_path: Path) -> None:
    program = (
        "import os, sys; from ptune.errors import OutputError; from ptune.files import folder_lock\n"
        "held = 0\n"
        "while held < 100:\n"
        "    try:\n"
        "        with folder_lock(sys.argv[1]):\n"
        "            os.close(os.open(sys.argv[1] + '/inside', os.O_CREAT | os.O_EXCL))\n"
        "            os.unlink(sys.argv[1] + '/inside')\n"
        "            held += 1\n"
        "    except OutputError: pass\n"
    )
    runs = [start(program, tmp_path / "run") for _ in range(3)]
    assert [run.wait(timeout=60) for run in runs] == [0, 0, 0]
    for run in runs:
        run.communicate()


def test_a_lock_in_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*\.lock: a part of the path is a file"):
        with folder_lock(tmp_path / "file"):
            pass


def test_files_are_imported_without_torch() -> None:
    program = (
        "import sys, json, ptune.files, ptune.records.readers, ptune.records.data; print(json.dumps(list(sys.modules)))"
    )
    loaded = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout)
    assert not {"torch", "transformers", "datasets", "pyarrow", "safetensors"} & set(loaded)
