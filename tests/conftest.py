"""Fixtures of all tests. pytest puts this folder on the path, for the helpers in it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# transformers looks for a package `kernels`: from the repository's root it would find, and break on, ours.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of the checkpoint `random_checkpoints.SPECS[name]`: written once, read only."""
    from random_checkpoints import make_checkpoint  # transformers takes seconds to import

    paths: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in paths:
            paths[name] = tmp_path_factory.mktemp("checkpoints") / name
            make_checkpoint(paths[name], name)
        return paths[name]

    return make


@pytest.fixture(scope="session")
def exported(
    random_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Gives the program of `SPECS[name]`, exported once for each set of options: small, with three slots."""
    from qwen_runner.export import export_program

    programs: dict[tuple[str, tuple[tuple[str, Any], ...]], Path] = {}

    def export(name: str, **options: Any) -> Path:
        key = name, tuple(sorted(options.items()))
        if key not in programs:
            folder = tmp_path_factory.mktemp("programs") / name
            settings = {"quantize": "none", "max_seq_len": 128, "chunk": 16, "slots": 3} | options
            programs[key] = export_program(random_checkpoint(name), folder, **settings)
        return programs[key]

    return export


@pytest.fixture(scope="session")
def demo_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's int4 program: the one that `make` exported, or else a new one."""
    made = _ROOT / "programs" / "demo"
    if (made / "manifest.json").is_file():
        return made
    from qwen_runner.export import export_program

    return export_program(_ROOT / "demo", tmp_path_factory.mktemp("programs") / "demo", quantize="int4")
