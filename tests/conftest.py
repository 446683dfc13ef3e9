"""Fixtures of all tests."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of the checkpoint `random_checkpoints.SPECS[name]`: written once, read only."""
    from tests.random_checkpoints import make_checkpoint  # transformers takes seconds to import

    paths: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in paths:
            paths[name] = tmp_path_factory.mktemp("checkpoints") / name
            make_checkpoint(paths[name], name)
        return paths[name]

    return make
