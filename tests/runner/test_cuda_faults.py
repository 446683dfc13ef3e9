"""Faults of a GPU: its memory runs out at load, at prefill and at capture; kernels that are not made for it.

The runner works in a process of its own, which stops wherever it says something; meanwhile this process
takes the rest of the GPU's memory away or gives it back. That needs the whole GPU: pytest-xdist's processes
skip it.
Faults that only an emulated GPU has at hand are in test_cuda_program.py.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_script import Gpu

DEMO = Path(__file__).resolve().parents[2] / "demo"
MEBIBYTE = 1 << 20
SHORT = [3, 1, 4, 1, 5, 9, 2, 6]
LONGEST_PAUSE_S = 240

PRELUDE = """
import gc, json, sys, warnings
from qwen_runner import _core as core
warnings.simplefilter("always")
program, arguments = sys.argv[1], json.loads(sys.argv[2])
GREEDY = dict(temperature=0.0)
def say(value):
    print(json.dumps(value), flush=True)
    sys.stdin.readline() or sys.exit("nobody listens")
def attempt(action):
    try:
        return dict(value=action(), failure=None)
    except Exception as error:
        return dict(value=None, failure=[type(error).__name__, str(error)])
def answer(engine, session, prompt, new=12):
    session.reset()
    tokens = [session.run(engine, prompt, GREEDY)]
    while len(tokens) < new:
        tokens.append(session.decode(engine, tokens[-1], GREEDY, len(tokens) + 1 < new))
    return tokens
def load_and_answer():
    engine = core.Engine(program)
    return answer(engine, engine.open_session(), arguments[0])
def long_prompt(engine):
    return [1 + i % (engine.vocab_size - 1) for i in range(min(engine.chunk, engine.max_seq_len - 16))]
"""


class Runner:
    """A process that runs PRELUDE and a script, from one `say` to the next."""

    def __init__(self, program: Path, script: str, *arguments: Any, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + script, str(program), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def hear(self) -> Any:
        """What it says next; it then waits."""
        assert self._process.stdout is not None
        watchdog = threading.Timer(LONGEST_PAUSE_S, self._process.kill)
        watchdog.start()
        line = self._process.stdout.readline()
        watchdog.cancel()
        if not line:
            errors = self._process.communicate()[1]
            pytest.fail(f"the runner's process ended with {self._process.returncode}: {errors}")
        return json.loads(line)

    def go_on(self) -> Any:
        """Lets it go on, until it says something."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.hear()


class Card:
    """The GPU's memory. By the driver's own calls: PyTorch's allocator rounds and keeps."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")  # makes the context that the calls are for
        self._driver = ctypes.CDLL("libcuda.so.1")

    @contextmanager
    def occupied(self, leave: int) -> Iterator[None]:
        """Nearly all of it is taken: `leave` bytes stay free, to 2 MiB."""
        unit = 2 * MEBIBYTE
        taken: list[ctypes.c_uint64] = []

        def spare() -> int:
            return max(0, torch.cuda.mem_get_info()[0] - leave) // unit * unit

        try:
            size = spare()
            while size > 0:
                address = ctypes.c_uint64()
                if self._driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)) == 0:
                    taken.append(address)
                    size = min(size, spare())
                else:
                    size = size // 2 // unit * unit
            print(f"{torch.cuda.mem_get_info()[0] / MEBIBYTE:.1f} MiB free")
            yield
        finally:
            for address in taken:
                assert self._driver.cuMemFree_v2(address) == 0


@pytest.fixture(scope="module")
def card() -> Card:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("needs the whole GPU: run it without -n")
    return Card()


@pytest.fixture(scope="module")
def program(card: Card, made_once: Callable[..., Path]) -> Path:
    """The demo model in chunks of 2048, or what it holds: temporaries of many MiB."""
    from qwen_runner.export import export_program

    return made_once(
        "programs/demo,target=cuda",
        lambda folder: export_program(DEMO, folder, quantize="int4", target="cuda"),
    )


@pytest.fixture(scope="module")
def expected(program: Path) -> dict[str, list[int]]:
    """Answers with memory for everything."""
    script = """
engine = core.Engine(program)
session = engine.open_session()
say(dict(short=answer(engine, session, arguments[0]), long=answer(engine, session, long_prompt(engine)),
         longer=answer(engine, session, arguments[0], 24)))
"""
    with Runner(program, script, SHORT) as runner:
        answers: dict[str, list[int]] = runner.hear()
    return answers


def assert_one_line(outcome: dict[str, Any], message: str) -> None:
    assert outcome["failure"] is not None, f"it worked: {outcome['value']}"
    kind, text = outcome["failure"]
    print(f"{kind}: {text}")
    assert kind in ("MemoryError", "RuntimeError")
    assert re.search(message, text), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("used_before", "leave", "message"),
    [
        pytest.param(True, 0, "^no GPU memory for .*: it needs .* are free; end other programs", id="full"),
        pytest.param(
            True,
            256 * MEBIBYTE,
            "^no GPU memory for a step's temporaries, beside .*state",
            id="no-temporaries",
        ),
        # Not even for a context.
        pytest.param(False, 64 * MEBIBYTE, "memory", id="first-use"),
    ],
)
def test_out_of_memory_at_load(
    card: Card, program: Path, expected: dict[str, list[int]], used_before: bool, leave: int, message: str
) -> None:
    script = """
say(load_and_answer() if arguments[1] else None)
say(attempt(load_and_answer))
say(attempt(load_and_answer))
"""
    with Runner(program, script, SHORT, used_before) as runner:
        assert runner.hear() == (expected["short"] if used_before else None)
        with card.occupied(leave):
            assert_one_line(runner.go_on(), message)
        assert runner.go_on() == {"value": expected["short"], "failure": None}


@pytest.mark.parametrize("used_before", [False, True])
def test_out_of_memory_at_prefill(
    card: Card, program: Path, expected: dict[str, list[int]], used_before: bool
) -> None:
    script = """
short, used_before = arguments
engine = core.Engine(program)
session, other = engine.open_session(), engine.open_session()
say(answer(engine, session, short) if used_before else None)
session.reset()
refused = attempt(lambda: session.run(engine, long_prompt(engine), GREEDY))
poisoned = attempt(lambda: session.run(engine, [1], GREEDY))
say([refused, poisoned, attempt(lambda: answer(engine, other, short)) if used_before else None])
say([answer(engine, session, short), answer(engine, session, long_prompt(engine))])
"""
    with Runner(program, script, SHORT, used_before) as runner:
        runner.hear()
        with card.occupied(leave=2 * MEBIBYTE):
            refused, poisoned, small = runner.go_on()
        # At first use the kernels' code may be what finds no room.
        assert_one_line(refused, "^no GPU memory for a step's temporaries" if used_before else "memory")
        assert "reset" in poisoned["failure"][1]
        if used_before:
            assert small == {"value": expected["short"], "failure": None}, "what fitted before fits still"
        assert runner.go_on() == [expected["short"], expected["long"]]


def test_out_of_memory_at_capture(card: Card, program: Path, expected: dict[str, list[int]]) -> None:
    """A graph that finds no room is a warning and not an error; one that finds it is as good as ever."""
    script = """
engine = core.Engine(program)
session = engine.open_session()
tokens = [session.run(engine, arguments[0], GREEDY)]
def steps(new):
    while len(tokens) < new:
        tokens.append(session.decode(engine, tokens[-1], GREEDY, False))
    return tokens
steps(3)
say(engine.gpu["graph_nodes"])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    outcome = attempt(lambda: steps(24))
say([outcome, engine.gpu["graph_nodes"], [str(warning.message) for warning in caught]])
say(answer(engine, session, arguments[0], 24))
del session, engine
gc.collect()
engine = core.Engine(program)
say([answer(engine, engine.open_session(), arguments[0], 24), engine.gpu["graph_nodes"]])
"""
    with Runner(program, script, SHORT) as runner:
        assert runner.hear() == 0, "the graph was captured too early for this test"
        with card.occupied(leave=0):
            outcome, nodes, warned = runner.go_on()
        print(f"a graph of {nodes} nodes; {warned}")
        assert outcome == {"value": expected["longer"], "failure": None}
        if nodes == 0:
            assert len(warned) == 1
            assert "decoding goes on without a CUDA graph" in warned[0]
            assert "\n" not in warned[0]
        else:
            assert warned == []
        assert runner.go_on() == expected["longer"]
        again, nodes = runner.go_on()
        assert again == expected["longer"]
        assert nodes > 0


def test_kernels_without_code_for_this_gpu(program: Path, expected: dict[str, list[int]]) -> None:
    """The driver is told to pass over what was compiled for it, which is how it meets another GPU's code."""
    script = """
say(attempt(load_and_answer))
say(attempt(load_and_answer))
"""
    with Runner(program, script, SHORT, CUDA_FORCE_PTX_JIT="1") as runner:
        first = runner.hear()
        if first["failure"] is None:
            assert first["value"] == expected["short"], "compiled from PTX"
        else:
            assert_one_line(first, "kernel image|device function|PTX|architecture")
        assert runner.go_on() == first


def test_a_gpu_of_another_architecture_is_refused(exported: Callable[..., Path]) -> None:
    if importlib.util.find_spec("qwen_runner._emulated_core") is None:
        pytest.skip("needs qwen_runner._emulated_core: build with QWEN_BUILD_TESTS and the CUDA toolkit")
    script = """
import os
refusals = []
for capability in ("75", "89"):
    os.environ["QWEN_EMULATED_CAPABILITY"] = capability
    try:
        core.Engine(program)
    except Exception as error:
        refusals.append(str(error))
tokens = []
for capability in ("90", "120"):
    os.environ["QWEN_EMULATED_CAPABILITY"] = capability
    engine = core.Engine(program)
    session = engine.open_session()
    tokens.append(continued(engine, session, session.run(engine, arguments[0], GREEDY), 4))
show([refusals, tokens])
"""
    program = exported("smallest", target="cuda", quantize="int4")
    refusals, tokens = Gpu("_emulated_core", emulated=True).run(program, script, SHORT)
    found = f"{program} is a cuda program, but the GPU found (Emulated GPU) has compute capability"
    assert refusals == [
        f"{found} 7.5, the kernels need 8.0 or newer; use such a machine, or export with --target cpu",
        f"{found} 8.9, this runner was built for 90; build it again with "
        "`make clean && make CUDA_ARCHITECTURES=89-real`, or "
        "`pip install -C cmake.define.QWEN_CUDA_ARCHITECTURES=89-real .`",
    ]
    assert len(tokens) == 2 and tokens[0] == tokens[1]
