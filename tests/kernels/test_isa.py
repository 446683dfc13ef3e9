"""The kernels on the instruction sets that this machine would not choose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_checks import Kernel


@pytest.mark.parametrize("isa", ["v3", "base"])
def test_lesser_instruction_sets_match_the_references(kernel: Kernel, isa: str) -> None:
    tests = "matches_reference or bit_for_bit or does_not_depend"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", tests]
    skipped = (Path(__file__).name, "test_cuda_")  # no GPU, emulated or not, knows of instruction sets
    files = [str(p) for p in Path(__file__).parent.glob("test_*.py") if not p.name.startswith(skipped)]
    done = subprocess.run(
        command + files, env={**os.environ, "QWEN_CPU_ISA": isa}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:]
