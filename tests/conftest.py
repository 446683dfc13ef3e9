"""Fixtures of all tests. pytest puts this folder on the path, for the helpers in it."""

import sys
from collections.abc import Callable
from pathlib import Path

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
