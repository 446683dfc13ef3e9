"""Fixtures of all tests. pytest puts this folder on the path, for the helpers in it."""

import fcntl
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# transformers looks for a package `kernels`: from the repository's root it would find, and break on, ours.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]

# Where these are installed, transformers runs their Triton kernels, on a model on the CPU, too: without them
# it takes its own PyTorch functions.
for _package in ("fla", "causal_conv1d"):
    sys.modules[_package] = None  # type: ignore[assignment]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Gives the folder `name` of this run; `make(folder)` makes it where no test of any process did before.

    What is in it is read only.
    """
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if own.name.startswith("popen-") else own) / "shared"  # by pytest-xdist's processes

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a test that failed to make it
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def random_checkpoint(made_once: Callable[..., Path]) -> Callable[[str], Path]:
    """Gives the folder of the checkpoint `random_checkpoints.SPECS[name]`: written once, read only."""
    from random_checkpoints import make_checkpoint  # transformers takes seconds to import

    return lambda name: made_once(f"checkpoints/{name}", lambda folder: make_checkpoint(folder, name))


@pytest.fixture(scope="session")
def precompiled_headers() -> Iterator[None]:
    """Exports to the cpu find PyTorch's headers compiled, a quarter of an export's time.

    They are 250 MB that stay in build/ for the next run; PyTorch compiles them anew when their text changes.
    """
    from qwen_runner.export import compile as compiling
    from torch._inductor import codecache

    folder = _ROOT / "build" / "precompiled_headers"
    options = compiling.compile_options

    def with_headers(target: str) -> dict[str, Any]:
        return options(target) | {"aot_inductor.precompile_headers": target == "cpu"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecache, "_HEADER_DIR", str(folder))
        patch.setattr(codecache, "_HEADER_LOCK_DIR", str(folder / "locks"))
        patch.setattr(compiling, "compile_options", with_headers)
        yield


@pytest.fixture(scope="session")
def exported(
    random_checkpoint: Callable[[str], Path], made_once: Callable[..., Path], precompiled_headers: None
) -> Callable[..., Path]:
    """Gives the program of `SPECS[name]`, exported once for each set of options: small, with three slots."""
    from qwen_runner.export import export_program

    def export(name: str, **options: Any) -> Path:
        settings = {"quantize": "none", "max_seq_len": 128, "chunk": 16, "slots": 3} | options
        key = ",".join(f"{option}={value}" for option, value in sorted(settings.items()))
        return made_once(
            f"programs/{key}/{name}",
            lambda folder: export_program(random_checkpoint(name), folder, **settings),
        )

    return export


@pytest.fixture(scope="session")
def demo_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's int4 program: the one that `make` exported, or else a new one."""
    made = _ROOT / "programs" / "demo"
    if (made / "manifest.json").is_file():
        return made
    from qwen_runner.export import export_program

    return export_program(_ROOT / "demo", tmp_path_factory.mktemp("programs") / "demo", quantize="int4")
