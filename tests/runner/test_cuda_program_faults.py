"""cuda programs that cannot be loaded or fail while they run: one clear line, and the next request works."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from cuda_script import GENERATE, Gpu, generate, prompt
from program_copy import link_program, with_manifest

FAULTS = """
try:
    engine = core.Engine(program)
    answer = engine.generate(arguments[0], arguments[1], None, core.Cancel())["tokens"]
    failure = None
except Exception as error:
    answer, failure = None, [type(error).__name__, str(error)]
try:
    engine = core.Engine(program)
    again = engine.generate(arguments[0], arguments[1], None, core.Cancel())["tokens"]
except Exception as error:
    again = str(error)
show([answer, failure, again])
"""


@pytest.mark.parametrize("kind", ["load", "run"])
def test_out_of_memory_is_one_line_and_the_next_request_works(program: Path, gpu: Gpu, kind: str) -> None:
    if not gpu.emulated:
        pytest.skip("faults are injected into the emulated GPU")
    options = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 6}
    calls = gpu.run(program, "engine = core.Engine(program)\nshow(len(engine.bound_constants()))")
    states = gpu.run(
        program,
        "show(len({n for _, n, _, _, s in core.Engine(program).bound_constants() if s}))",
    )
    assert calls > states > 0
    # Counters, weights, states, inputs of a prefill and of a decode step; then temporaries.
    call = 3 if kind == "load" else 2 + states + 2 + 1
    answer, failure, again = gpu.run(
        program, FAULTS, prompt(6), options, QWEN_EMULATED_FAIL=f"cudaMalloc:{call}"
    )
    assert answer is None
    assert failure[0] == "MemoryError"
    assert ("the state" if kind == "load" else "a step's temporaries") in failure[1]
    assert "\n" not in failure[1]
    assert again == generate(gpu, program, prompt(6), max_new_tokens=6, temperature=0.0)[0]


def test_a_prefill_out_of_memory_leaves_the_engine_usable(program: Path, gpu: Gpu) -> None:
    if not gpu.emulated:
        pytest.skip("faults are injected into the emulated GPU")
    states = gpu.run(
        program,
        "show(len({n for _, n, _, _, s in core.Engine(program).bound_constants() if s}))",
    )
    script = """
engine = core.Engine(program)
session = engine.open_session()
try:
    session.run(engine, arguments[0], GREEDY)
    failure = ""
except MemoryError as error:
    failure = str(error)
try:
    session.run(engine, [1], GREEDY)
    poisoned = ""
except ValueError as error:
    poisoned = str(error)
session.reset()
show([failure, poisoned, continued(engine, session, session.run(engine, arguments[0], GREEDY), 6)])
"""
    failure, poisoned, tokens = gpu.run(
        program, script, prompt(6), QWEN_EMULATED_FAIL=f"cudaMalloc:{2 + states + 2 + 1}"
    )
    assert "temporaries" in failure
    assert "reset" in poisoned
    assert tokens == generate(gpu, program, prompt(6), max_new_tokens=6, temperature=0.0)[0]


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaGraphInstantiate"])
def test_a_capture_that_fails_is_a_warning(program: Path, gpu: Gpu, call: str) -> None:
    if not gpu.emulated:
        pytest.skip("faults are injected into the emulated GPU")
    arguments = [prompt(5), None, {"ignore_eos": True, "max_new_tokens": 20, "temperature": 0.0}]
    process = gpu.process(program, GENERATE, *arguments, QWEN_EMULATED_FAIL=f"{call}:1")
    tokens, _, nodes = json.loads(process.stdout)
    assert nodes == 0
    assert process.stderr.count("decoding goes on without a CUDA graph") == 1
    assert tokens == generate(gpu, program, prompt(5), temperature=0.0)[0]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"QWEN_EMULATED_FAIL": "cudaDriverGetVersion:1"}, "no NVIDIA driver was found"),
        ({"QWEN_EMULATED_FAIL": "cudaGetDeviceCount:1"}, "no GPU was found"),
        ({"QWEN_EMULATED_FAIL": "cudaHostAlloc:1"}, "no pinned memory"),
        ({"QWEN_EMULATED_FAIL": "cudaMemcpyAsync:1"}, "cudaMemcpyAsync failed"),
        (
            {"QWEN_EMULATED_MEMORY": "5000"},
            "no GPU memory for .*weights: it needs .* are free; end other programs",
        ),
        (
            {"QWEN_EMULATED_MEMORY": "250000000"},
            "no GPU memory for a step's temporaries, beside .* of weights",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_a_line(
    program: Path, gpu: Gpu, environment: dict[str, str], message: str
) -> None:
    if not gpu.emulated:
        pytest.skip("faults are injected into the emulated GPU")
    script = """
try:
    core.Engine(program)
except Exception as error:
    show(str(error))
"""
    refusal = gpu.run(program, script, **environment)
    assert re.search(message, refusal), refusal
    assert "\n" not in refusal


def test_after_memory_was_given_back_a_graph_is_captured_anew(program: Path, gpu: Gpu) -> None:
    """A capture may take no memory: the step before it takes what is missing."""
    if not gpu.emulated:
        pytest.skip("faults are injected into the emulated GPU")
    script = """
engine = core.Engine(program)
session = engine.open_session()
token = session.run(engine, arguments[0][:1], GREEDY)
token = session.run(engine, [token], GREEDY)
try:
    session.run(engine, arguments[0], GREEDY)
    failure = ""
except MemoryError as error:
    failure = str(error)
session.reset()
tokens, nodes = [session.run(engine, arguments[0], GREEDY)], []
while len(tokens) < 6:
    tokens.append(session.run(engine, tokens[-1:], GREEDY))
    nodes.append(engine.gpu["graph_nodes"] > 0)
show([failure, tokens, nodes])
"""
    states = gpu.run(
        program,
        "show(len({n for _, n, _, _, s in core.Engine(program).bound_constants() if s}))",
    )
    for call in range(2 + states + 2 + 2, 2 + states + 2 + 8):  # behind decode's temporaries
        failure, tokens, nodes = gpu.run(program, script, prompt(6), QWEN_EMULATED_FAIL=f"cudaMalloc:{call}")
        if failure:
            break
    assert "temporaries" in failure
    assert nodes == [False, False, True, True, True]
    assert tokens == generate(gpu, program, prompt(6), max_new_tokens=6, temperature=0.0)[0]


REFUSED = """
try:
    core.Engine(program)
except RuntimeError as error:
    show(str(error))
"""


@pytest.mark.parametrize("layout", ["tiles-16x64-2", None])
def test_weights_of_another_layout_are_refused(
    program: Path, gpu: Gpu, tmp_path: Path, layout: str | None
) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["quantization"].pop("layout")
        manifest["quantization"] |= {} if layout is None else {"layout": layout}

    copy = with_manifest(program, tmp_path / "copy", edit)
    refusal = gpu.run(copy, REFUSED)
    assert re.search(f"of layout {layout or 'none'}, this runner reads .*; export .* again", refusal), refusal
    assert "\n" not in refusal


@pytest.mark.parametrize("block_size", [64 << 20, 48, 1000])
def test_a_damaged_table_of_weights_is_refused(
    program: Path, gpu: Gpu, tmp_path: Path, block_size: int
) -> None:
    """It is parsed before the weights are read; the parser itself would crash."""
    weights = (program / "model.ptd").read_bytes()

    def edit(manifest: dict[str, Any]) -> None:
        digests = [
            hashlib.sha256(weights[begin : begin + block_size]).hexdigest()
            for begin in range(0, len(weights), block_size)
        ]
        manifest["files"]["model.ptd"] |= {"block_size": block_size, "sha256": digests}

    copy = with_manifest(program, tmp_path / "copy", edit)
    (copy / "model.ptd").unlink()
    script = """
from pathlib import Path
path = Path(program, "model.ptd")
whole = Path(arguments[0]).read_bytes()
refusals = set()
def attempt(data):
    path.write_bytes(data)
    try:
        core.Engine(program)
    except RuntimeError as error:
        refusals.add(str(error))
table_end = int.from_bytes(whole[32:40], "little")
for offset in [*range(0, 64, 5), *range(64, table_end, 211)]:
    for bits in (0xFF, 0x80):
        attempt(whole[:offset] + bytes([whole[offset] ^ bits]) + whole[offset + 1:])
path.write_bytes(whole)
core.Engine(program)
show([table_end, sorted(refusals)])
"""
    table_end, refusals = gpu.run(copy, script, str(program / "model.ptd"))
    assert 64 < table_end < len(weights)
    assert len(refusals) == 1
    assert "model.ptd does not match its digest" in refusals[0]


def test_damaged_weights_are_refused(program: Path, gpu: Gpu, tmp_path: Path) -> None:
    copy = link_program(program, tmp_path / "copy")
    weights = copy / "model.ptd"
    data = bytearray(weights.read_bytes())
    weights.unlink()
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert "model.ptd does not match its digest" in gpu.run(copy, REFUSED)
    weights.write_bytes(data[:-100])
    assert "the manifest says" in gpu.run(copy, REFUSED)
