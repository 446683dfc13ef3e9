"""Fixtures of all tests. This file also puts its folder on the path, for the helpers that lie in it."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the random checkpoint of a name in `random_checkpoints.SPECS`; read only, written once."""
    from random_checkpoints import make_checkpoint

    paths: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in paths:
            paths[name] = tmp_path_factory.mktemp("checkpoints") / name
            make_checkpoint(paths[name], name)
        return paths[name]

    return make
