"""Runs Python code with the runner's emulated GPU, or with a real one, in a process of its own.

A process of its own, because ExecuTorch takes one runner only, and tests have loaded the one for the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALLEST = "smallest"  # of random_checkpoints.SPECS
GREEDY_OPTIONS = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 20}

_PRELUDE = """
import json, sys, warnings
import numpy as np
from qwen_runner import {module} as core
warnings.simplefilter("always")
program, arguments = sys.argv[1], json.loads(sys.argv[2])
GREEDY = dict(temperature=0.0)
def show(value):
    print(json.dumps(value))
def continued(engine, session, token, n, options=GREEDY):
    tokens = [token]
    while len(tokens) < n:
        tokens.append(session.run(engine, tokens[-1:], options))
    return tokens
"""


@dataclass(frozen=True)
class Gpu:
    module: str
    emulated: bool

    def run(self, program: Path, script: str, *arguments: Any, **environment: str) -> Any:
        """The value that `script` passes to `show`; it finds `core`, `program` and `arguments`."""
        return json.loads(self.process(program, script, *arguments, **environment).stdout)

    def process(
        self, program: Path, script: str, *arguments: Any, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        code = _PRELUDE.format(module=self.module) + script
        result = subprocess.run(
            [sys.executable, "-c", code, str(program), json.dumps(arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | environment,
        )
        assert result.returncode == 0, result.stderr
        return result


GENERATE = """
engine = core.Engine(program, arguments[1])
answer = engine.generate(arguments[0], arguments[2], None, core.Cancel())
show([answer["tokens"], answer["finish_reason"], engine.gpu["graph_nodes"]])
"""


def prompt(length: int) -> list[int]:
    """So many tokens for the model SMALLEST."""
    from random_checkpoints import SPECS, random_prompt  # transformers takes seconds to import

    return random_prompt(SPECS[SMALLEST], length)


def generate(
    gpu: Gpu, program: Path, tokens: list[int], *, cuda_graph: bool | None = None, **options: Any
) -> Any:
    return gpu.run(
        program, GENERATE, tokens, cuda_graph, {"ignore_eos": True, "max_new_tokens": 20} | options
    )
