"""Too small a disk, memory or GPU is found before an export starts."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from qwen_runner.export import ExportError, ExportOptions, export_program, preflight, program
from qwen_runner.export.preflight import check_resources, quantizing_device
from qwen_runner.export.program import hollow_model
from qwen_runner.export.random_weights import load_known_config

GIB = 1 << 30
FULL_SHAPE = load_known_config("qwen3.5-35b-a3b")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is free, to be changed by the test."""
    free = {"disk": 100 * GIB, "memory": 100 * GIB, "gpu": 100 * GIB}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free["disk"]))
    monkeypatch.setattr(preflight, "_available_memory", lambda: free["memory"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free["gpu"], 2 * free["gpu"]))
    return free


def check(folder: Path, device: str | None) -> None:
    options = ExportOptions(target="cuda").resolved(FULL_SHAPE)
    layout = hollow_model(FULL_SHAPE, options)[1]
    check_resources(folder / "program", layout, FULL_SHAPE, options, device)


def test_the_full_shape_fits_where_the_issue_says(machine: dict[str, int], tmp_path: Path) -> None:
    machine |= {"disk": 20 * GIB, "memory": 24 * GIB, "gpu": 24 * GIB}
    check(tmp_path, None)
    check(tmp_path, "cpu")
    check(tmp_path, "cuda")


@pytest.mark.parametrize(
    ("what", "free", "message"),
    [
        ("disk", 18 * GIB, r"the disk has 18\.0 GiB free, the export takes 18\.7 GiB"),
        ("memory", 3 * GIB, r"this machine has 3\.0 GiB of memory available, the export takes 5\.\d GiB"),
        ("gpu", 2 * GIB, r"the GPU has 2\.0 GiB of memory free, the export takes 4\.\d GiB"),
    ],
)
def test_what_is_too_small_is_named(
    what: str, free: int, message: str, machine: dict[str, int], tmp_path: Path
) -> None:
    machine[what] = free
    with pytest.raises(ExportError, match=message):
        check(tmp_path, "cuda")


def test_nothing_is_begun(
    machine: dict[str, int],
    tmp_path: Path,
    random_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine["disk"] = 1 << 20
    monkeypatch.setattr(program, "lower", lambda *_, **__: pytest.fail("it compiles"))
    with pytest.raises(ExportError, match=f"{tmp_path}: the disk has"):
        export_program(random_checkpoint("interval"), tmp_path / "new" / "program")
    assert not list(tmp_path.iterdir())


def test_a_gpu_quantizes_for_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = {name: ExportOptions(target=name).resolved(FULL_SHAPE) for name in ("cpu", "cuda")}
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert quantizing_device(resolved["cpu"]) == "cpu"
        assert quantizing_device(resolved["cuda"]) == ("cuda" if available else "cpu")


def test_what_linux_says_is_available_is_read() -> None:
    available = preflight._available_memory()
    assert available is not None and available > 1 << 20
