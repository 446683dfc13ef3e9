"""Writing a program: the manifest vouches for every byte, and a failure leaves what was there before.

The model's lowering, half a minute, is replaced by a program of a few bytes; `test_lower.py` has real ones.
"""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qwen_runner.export import export_program, manifest, program, staging
from qwen_runner.export.__main__ import main
from qwen_runner.export.manifest import BLOCK_SIZE, HashingFile, write_manifest
from qwen_runner.export.staging import staged_folder

Checkpoints = Callable[[str], Path]


class FakeProgram:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def write_to_file(self, file: Any) -> None:
        file.write(self.data)


@pytest.fixture
def without_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "lower", lambda *_, **__: FakeProgram(b"methods"))


def python_environment() -> dict[str, str]:
    """For a child process: it imports what the tests import."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_manifest_vouches_for_every_byte(
    tmp_path: Path, random_checkpoint: Checkpoints, without_lowering: None
) -> None:
    output = export_program(random_checkpoint("interval"), tmp_path / "program", quantize="none")
    text = (output / "manifest.json").read_bytes()
    described = json.loads(text)
    assert list(described)[-1] == "manifest_sha256"
    digest = described["manifest_sha256"]
    assert hashlib.sha256(text.replace(digest.encode(), b"0" * 64)).hexdigest() == digest
    assert set(described["files"]) == {path.name for path in output.iterdir()} - {"manifest.json"}
    for name, entry in described["files"].items():
        data = (output / name).read_bytes()
        assert entry["size"] == len(data)
        assert entry["sha256"] == [hashlib.sha256(data).hexdigest()]


def test_the_manifest_says_what_the_program_is(
    tmp_path: Path, random_checkpoint: Checkpoints, without_lowering: None
) -> None:
    output = export_program(random_checkpoint("tied"), tmp_path / "program", max_seq_len=200, slots=2)
    described = json.loads((output / "manifest.json").read_text())
    assert described["quantization"] == {
        "scheme": "int4",
        "group_size": 32,
        "method": "hqq",
        "head": "int8",
        "embedding": "int8",
    }
    assert described["target"]["isa"] in ("avx512", "avx2", "default")
    assert (described["max_seq_len"], described["chunk"], described["slots"]) == (200, 200, 2)
    assert described["batch"] == 1
    assert (described["name"], described["dtype"]) == ("tied", "float32")
    assert described["eos_token_ids"] == [299, 297]
    assert described["sampling"]["temperature"] == 0.7
    assert described["model"]["layer_types"] == ["linear_attention", "linear_attention", "full_attention"]
    assert described["chat"]["supported"] is False
    assert described["versions"]["executorch"] == "1.5.1"


def test_the_program_takes_the_tokenizers_files_along(
    tmp_path: Path, random_checkpoint: Checkpoints, without_lowering: None
) -> None:
    checkpoint = random_checkpoint("interval")
    output = export_program(checkpoint, tmp_path / "program", quantize="none")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (checkpoint / name).read_bytes()


def test_a_checkpoint_without_a_tokenizer_config_or_a_name_in_unicode_will_do(
    tmp_path: Path, random_checkpoint: Checkpoints, without_lowering: None
) -> None:
    folder, checkpoint = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / "link"
    shutil.copytree(random_checkpoint("interval"), folder)
    checkpoint.symlink_to(folder)
    (folder / "tokenizer_config.json").unlink()
    output = export_program(checkpoint, tmp_path / "program", quantize="none")
    assert not (output / "tokenizer_config.json").exists()
    assert json.loads((output / "manifest.json").read_text(encoding="utf-8"))["name"] == "caf?"


def test_a_terminal_sees_the_layers_go_by(
    tmp_path: Path,
    random_checkpoint: Checkpoints,
    without_lowering: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    output = tmp_path / "program"
    export_program(random_checkpoint("interval"), output, quantize="none", progress=True)
    seen = re.findall(r"write the weights: layer (\d+) of (\d+)", terminal.getvalue())
    layers = len(json.loads((output / "manifest.json").read_text())["model"]["layer_types"])
    assert dict.fromkeys(seen) == {(str(i), str(layers)): None for i in range(1, layers + 1)}
    assert not [thread for thread in threading.enumerate() if "_tick" in thread.name]


def test_files_are_hashed_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "BLOCK_SIZE", 10)
    for case, sizes in enumerate(([], [10], [3, 3, 3, 3], [25], [9, 2, 29])):
        path = tmp_path / str(case)
        with HashingFile(path) as file:
            for size in sizes:
                assert file.write(os.urandom(size)) == size
        data = path.read_bytes()
        blocks = [data[i : i + 10] for i in range(0, len(data), 10)]
        assert file.entry()["size"] == sum(sizes) == len(data)
        assert file.entry()["sha256"] == [hashlib.sha256(block).hexdigest() for block in blocks]
    assert BLOCK_SIZE == 64 << 20


def test_the_digest_is_found_whatever_the_manifest_holds(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m", {"name": "0" * 64})
    text = (tmp_path / "m").read_text()
    assert json.loads(text)["name"] == "0" * 64
    digest = json.loads(text)["manifest_sha256"]
    assert hashlib.sha256(text.replace(digest, "0" * 64).encode()).hexdigest() == digest


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_program_is_replaced_whole(
    can_exchange: bool,
    tmp_path: Path,
    random_checkpoint: Checkpoints,
    without_lowering: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not can_exchange:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    output = tmp_path / "program"
    for name in ("interval", "tied"):
        export_program(random_checkpoint(name), output, quantize="none")
        assert json.loads((output / "manifest.json").read_text())["name"] == name
    assert not (output / "chat_template.jinja").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["program"]


def test_a_replacement_that_fails_halfway_puts_the_old_program_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two folders cannot be swapped in one step, and the new one cannot be put in place."""
    output = tmp_path / "program"
    with staged_folder(output) as stage:
        (stage.content / "model.pte").write_text("old")
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if self.name == "content":
            assert not output.exists()
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="no"), staged_folder(output) as stage:
        (stage.content / "model.pte").write_text("new")
    assert (output / "model.pte").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["program"]


def test_a_full_disk_leaves_the_old_program(
    tmp_path: Path, random_checkpoint: Checkpoints, without_lowering: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """/dev/full is a disk that is full at the first byte; files here are written through it."""
    output = export_program(random_checkpoint("interval"), tmp_path / "program", quantize="none")
    before = contents(output)

    class FullDisk(FakeProgram):
        def write_to_file(self, file: Any) -> None:
            super().write_to_file(file)
            with Path("/dev/full").open("wb", buffering=0) as full:
                full.write(self.data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "lower", lambda *_, **__: FullDisk(b"methods"))
        assert main([str(random_checkpoint("tied")), "--output", str(output), "--quantize", "none"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "No space left on device" in last
    assert contents(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["program"]


def test_a_limited_file_size_leaves_nothing(tmp_path: Path, random_checkpoint: Checkpoints) -> None:
    """The same by the operating system's own hand, through the command line."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from qwen_runner.export import program\n"
        "from qwen_runner.export.__main__ import main\n"
        "from test_program import FakeProgram\n"
        "def lower(*_, **__):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "    return FakeProgram(b'methods')\n"
        "program.lower = lower\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = [str(random_checkpoint("interval")), "--output", str(tmp_path / "program")]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--quantize", "none"],
        env=python_environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stderr
    assert "File too large" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("had_program", [False, True])
def test_a_killed_writer_leaves_the_old_folder_and_the_next_cleans_up(
    had_program: bool, tmp_path: Path
) -> None:
    output = tmp_path / "program"
    if had_program:
        with staged_folder(output) as stage:
            (stage.content / "model.pte").write_text("old")
    script = (
        "import pathlib, sys, time\n"
        "from qwen_runner.export.staging import staged_folder\n"
        "with staged_folder(pathlib.Path(sys.argv[1])) as stage:\n"
        "    (stage.content / 'model.pte').write_text('half')\n"
        "    print('half written', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(output)],
        env=python_environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half written\n"
        # A second export beside a living one leaves its folder alone.
        with pytest.raises(KeyError), staged_folder(output):
            raise KeyError
        assert len(list(tmp_path.glob(".program.tmp-*"))) == 1
        writer.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.glob(".program.tmp-*"))) == 1
    assert output.exists() == had_program
    if had_program:
        assert (output / "model.pte").read_text() == "old"
    with staged_folder(output) as stage:
        assert not list(tmp_path.glob(".program.tmp-*/content/model.pte"))
        (stage.content / "model.pte").write_text("new")
    assert (output / "model.pte").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["program"]


def test_an_export_killed_while_it_compiles_leaves_no_program(
    tmp_path: Path, random_checkpoint: Checkpoints
) -> None:
    command = [sys.executable, "-m", "qwen_runner.export", str(random_checkpoint("smallest"))]
    with subprocess.Popen(
        [*command, "--output", str(tmp_path / "program")],
        env=python_environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as export:
        assert export.stderr is not None
        reached = next((line for line in export.stderr if "trace prefill" in line), "")
        os.killpg(export.pid, signal.SIGKILL)
    assert "trace prefill" in reached
    assert not (tmp_path / "program").exists()
    with staged_folder(tmp_path / "program") as stage:
        (stage.content / "model.pte").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["program"]
