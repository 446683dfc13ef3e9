"""A damaged program is refused by one line that names the file, and nothing crashes."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

import pytest

pytest.importorskip("qwen_runner._core", reason="needs the built extension: pip install -e .")
from qwen_runner import Runner

FILES = ["manifest.json", "model.pte", "model.ptd", "tokenizer.json"]
SAMPLES = 500


@pytest.fixture(scope="module")
def program(demo_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to damage; each test leaves it as it was."""
    return Path(shutil.copytree(demo_program, tmp_path_factory.mktemp("damaged") / "program"))


def refusal(program: Path) -> str:
    with pytest.raises((RuntimeError, FileNotFoundError)) as raised:
        Runner(program)
    message = str(raised.value)
    assert message
    assert "\n" not in message
    return message


def sampled_offsets(size: int) -> list[int]:
    """One offset in each of `SAMPLES` equal stretches, and both ends."""
    draw = random.Random(size)
    bounds = [size * i // SAMPLES for i in range(SAMPLES + 1)]
    return sorted({0, size - 1, *(draw.randrange(a, b) for a, b in itertools.pairwise(bounds) if a < b)})


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_detected(program: Path, name: str) -> None:
    draw = random.Random(name)
    path = program / name
    size = path.stat().st_size
    with path.open("r+b", buffering=0) as file:
        for offset in sampled_offsets(size):
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ (1 << draw.randrange(8))]))
            message = refusal(program)
            file.seek(offset)
            file.write(bytes([byte]))
            assert name in message, f"byte {offset}: {message}"
    Runner(program).close()


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_detected(program: Path, name: str) -> None:
    path = program / name
    whole = path.read_bytes()
    draw = random.Random(name)
    lengths = {0, 1, len(whole) // 2, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(20))}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        assert name in refusal(program), f"{length} of {len(whole)} bytes"
    path.write_bytes(whole + b"\0")
    assert name in refusal(program)
    path.write_bytes(whole)
    Runner(program).close()


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(program: Path, name: str) -> None:
    hidden = program.parent / name
    (program / name).rename(hidden)
    try:
        with pytest.raises(FileNotFoundError, match=name):
            Runner(program)
    finally:
        hidden.rename(program / name)


def test_files_of_two_exports_do_not_mix(program: Path) -> None:
    path = program / "model.ptd"
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    assert "model.ptd" in refusal(program)
    path.write_bytes(whole)
    Runner(program).close()
