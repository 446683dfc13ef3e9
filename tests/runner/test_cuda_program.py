"""cuda programs: graphs, sessions and faults, on a real GPU and on an emulated one."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_script import Gpu
from program_copy import link_program, with_manifest
from random_checkpoints import SPECS, random_prompt

NAME = "smallest"

GENERATE = """
engine = core.Engine(program, arguments[1])
answer = engine.generate(arguments[0], arguments[2], None, core.Cancel())
show([answer["tokens"], answer["finish_reason"], engine.gpu["graph_nodes"]])
"""


@pytest.fixture(scope="module", params=["emulated", "cuda"])
def gpu(request: pytest.FixtureRequest) -> Gpu:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
        return Gpu("_core", emulated=False)
    if importlib.util.find_spec("qwen_runner._emulated_core") is None:
        pytest.skip("needs qwen_runner._emulated_core: build with QWEN_BUILD_TESTS and the CUDA toolkit")
    return Gpu("_emulated_core", emulated=True)


@pytest.fixture(scope="module")
def program(exported: Callable[..., Path]) -> Path:
    return exported(NAME, target="cuda", quantize="int4")


def prompt(length: int) -> list[int]:
    return random_prompt(SPECS[NAME], length)


def generate(
    gpu: Gpu, program: Path, tokens: list[int], *, cuda_graph: bool | None = None, **options: Any
) -> Any:
    return gpu.run(
        program, GENERATE, tokens, cuda_graph, {"ignore_eos": True, "max_new_tokens": 20} | options
    )


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 7, "top_k": 20}])
@pytest.mark.parametrize("length", [1, 5, 37])
def test_a_graph_gives_the_tokens_that_plain_launches_give(
    gpu: Gpu, program: Path, length: int, options: dict[str, Any]
) -> None:
    replayed, reason, nodes = generate(gpu, program, prompt(length), **options)
    launched, _, none = generate(gpu, program, prompt(length), cuda_graph=False, **options)
    assert len(replayed) == 20
    assert reason == "length"
    assert (replayed, nodes > 0, none) == (launched, True, 0)


def test_an_answer_ends_at_the_end_of_its_slot(gpu: Gpu, program: Path) -> None:
    tokens, reason, _ = generate(gpu, program, prompt(120), max_new_tokens=100)
    assert (len(tokens), reason) == (9, "length")


def test_one_step_behind_gives_what_step_by_step_gives(gpu: Gpu, program: Path) -> None:
    script = """
engine = core.Engine(program)
tokens = arguments[0]
session = engine.open_session()
alone = continued(engine, session, session.run(engine, tokens, GREEDY), 20)
session.reset()
ahead = [session.run(engine, tokens, GREEDY)]
while len(ahead) < 20:
    ahead.append(session.decode(engine, ahead[-1], GREEDY, len(ahead) % 5 != 0))
refusals = []
session.decode(engine, ahead[-1], GREEDY, True)
for attempt in (
    lambda: session.run(engine, [0, 1], GREEDY),
    lambda: session.decode(engine, ahead[-1] + 1, {"temperature": 1.0}, True),
    session.fork,
):
    try:
        attempt()
    except ValueError as error:
        refusals.append(str(error))
session.reset()
again = continued(engine, session, session.run(engine, tokens, GREEDY), 20)
show([alone, ahead, again, refusals])
"""
    alone, ahead, again, refusals = gpu.run(program, script, prompt(9))
    assert ahead == again == alone
    assert len(refusals) == 3
    assert all("ahead" in refusal for refusal in refusals)


def test_sessions_share_a_graph_and_nothing_else(gpu: Gpu, program: Path) -> None:
    script = """
engine = core.Engine(program)
def sampling(i):
    return dict(temperature=0.0) if i == 0 else dict(temperature=0.8, seed=i, top_k=30)
def start(i):
    session = engine.open_session()
    return session, [session.run(engine, arguments[i], sampling(i))]
def step(i, session, output):
    output.append(session.decode(engine, output[-1], sampling(i), len(output) < 14))
alone = []
for i in range(3):
    session, output = start(i)
    while len(output) < 15:
        step(i, session, output)
    alone.append(output)
    del session
together = [start(i) for i in range(3)]
while len(together[0][1]) < 15:
    for i, (session, output) in enumerate(together):
        step(i, session, output)
show([alone, [output for _, output in together], engine.gpu["graph_nodes"] > 0])
"""
    alone, together, graph = gpu.run(program, script, prompt(7), prompt(20)[9:], prompt(3))
    assert together == alone
    assert graph


def test_a_fork_goes_on_as_a_run_of_its_own(gpu: Gpu, program: Path) -> None:
    script = """
engine = core.Engine(program)
common, *rests = arguments
states = sorted({name for _, name, _, _, is_state in engine.bound_constants() if is_state})
def state(session):
    return [session.state(name).tobytes().hex() for name in states]
def run(session, rest):
    output = continued(engine, session, session.run(engine, rest, GREEDY), 8)
    return [output, state(session)]
alone = []
for rest in rests:
    session = engine.open_session()
    session.run(engine, common, GREEDY)
    alone.append(run(session, rest))
    del session
session = engine.open_session()
session.run(engine, common, GREEDY)
fork = session.fork()
show([run(fork, rests[0]) == alone[0], run(session, rests[1]) == alone[1], alone[0] != alone[1]])
"""
    assert gpu.run(program, script, prompt(11), prompt(16)[11:], prompt(20)[14:]) == [True] * 3


def test_reset_after_nan_gives_a_clean_run(gpu: Gpu, program: Path) -> None:
    script = """
engine = core.Engine(program)
session = engine.open_session()
run = lambda: continued(engine, session, session.run(engine, arguments[0], GREEDY), 8)
clean = run()
for name in {name for _, name, _, _, is_state in engine.bound_constants() if is_state}:
    session.write_state(name, np.full_like(session.state(name), 0xFF))
session.reset()
show([clean, run()])
"""
    clean, again = gpu.run(program, script, prompt(10))
    assert again == clean


def test_both_methods_read_every_constant_at_the_same_address(gpu: Gpu, program: Path) -> None:
    script = """
engine = core.Engine(program)
show([engine.bound_constants(), engine.gpu["allocated_bytes"], engine.memory["weight_bytes"]])
"""
    constants, allocated, weights = gpu.run(program, script)
    places: dict[str, dict[str, tuple[int, int]]] = {"prefill": {}, "decode": {}}
    for method, name, address, size, _ in constants:
        places[method][name] = address, size
    assert places["prefill"] == places["decode"]
    assert weights == sum(size for _, name, _, size, state in constants if not state) // 2
    assert weights < allocated


def test_memory_stays_as_it_is_over_prompts_of_every_length(gpu: Gpu, program: Path) -> None:
    script = """
engine = core.Engine(program)
session = engine.open_session()
def use(length):
    session.reset()
    token = session.run(engine, [1 + i % 50 for i in range(length)], GREEDY)
    continued(engine, session, token, 4)
    return engine.gpu["allocated_bytes"]
for length in (16, 16, 16):
    most = use(length)
show([most, [use(length) for length in range(1, 17)]])
"""
    most, used = gpu.run(program, script)
    assert max(used) == most


def test_logits_and_logprobs_come_when_asked_for(gpu: Gpu, program: Path) -> None:
    script = """
engine = core.Engine(program)
session = engine.open_session()
session.keep_logits(True)
token = session.run(engine, arguments[0], GREEDY)
first = session.logits()
second_token = session.run(engine, [token], GREEDY)
second = session.logits()
options = dict(temperature=0.0, ignore_eos=True, max_new_tokens=6)
plain = engine.generate(arguments[0], options, None, core.Cancel())["tokens"]
answer = engine.generate(arguments[0], options | dict(logprobs=True), None, core.Cancel())
show([int(first.argmax()) == token, int(second.argmax()) == second_token, first.shape[0] == engine.vocab_size,
      answer["tokens"] == plain, len(answer["logprobs"])])
"""
    assert gpu.run(program, script, prompt(6)) == [True, True, True, True, 6]


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
    # Counters, weights, states, two inputs and the count of steps; then temporaries.
    call = 3 if kind == "load" else 2 + states + 3 + 1
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
        program, script, prompt(6), QWEN_EMULATED_FAIL=f"cudaMalloc:{2 + states + 3 + 1}"
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


def test_a_warning_waits_for_no_thread_that_uses_the_engine(program: Path, gpu: Gpu) -> None:
    """Python's warning needs the interpreter, which another thread has while it asks the engine."""
    if not gpu.emulated:
        pytest.skip("faults are injected into the emulated GPU")
    script = """
import faulthandler, threading
faulthandler.dump_traceback_later(100, exit=True)
engine = core.Engine(program)
session, done = engine.open_session(), threading.Event()
def use():
    while not done.is_set():
        engine.gpu
        session.reset()
        session.state(name)
        session.fork()
name = next(name for _, name, _, _, is_state in engine.bound_constants() if is_state)
thread = threading.Thread(target=use)
sys.setswitchinterval(1e-5)
thread.start()
answer = engine.generate(arguments[0], arguments[1], None, core.Cancel())
done.set()
thread.join()
show(answer["tokens"])
"""
    options = {"ignore_eos": True, "max_new_tokens": 20, "temperature": 0.0}
    process = gpu.process(program, script, prompt(5), options, QWEN_EMULATED_FAIL="cudaGraphInstantiate:1")
    assert process.stderr.count("decoding goes on without a CUDA graph") == 1
    assert json.loads(process.stdout) == generate(gpu, program, prompt(5), temperature=0.0)[0]


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
    for call in range(2 + states + 3 + 2, 2 + states + 3 + 8):  # behind decode's temporaries
        failure, tokens, nodes = gpu.run(program, script, prompt(6), QWEN_EMULATED_FAIL=f"cudaMalloc:{call}")
        if failure:
            break
    assert "temporaries" in failure
    assert nodes == [False, False, True, True, True]
    assert tokens == generate(gpu, program, prompt(6), max_new_tokens=6, temperature=0.0)[0]


def test_logits_are_never_another_sessions(program: Path, gpu: Gpu) -> None:
    script = """
engine = core.Engine(program)
session, other = engine.open_session(), engine.open_session()
token = session.decode(engine, session.run(engine, arguments[0], GREEDY), GREEDY, True)
session.keep_logits(True)
other.run(engine, arguments[0][:2], GREEDY)
other.run(engine, arguments[0][2:3], GREEDY)
try:
    session.decode(engine, token, GREEDY, False)
    refusal = int(session.logits().argmax())
except ValueError as error:
    refusal = str(error)
session.keep_logits(False)
after = session.decode(engine, token, GREEDY, False)
session.reset()
session.keep_logits(True)
session.run(engine, arguments[0], GREEDY)
show([refusal, after, session.logits().shape[0] == engine.vocab_size])
"""
    refusal, after, kept = gpu.run(program, script, prompt(6))
    assert re.search("keep logits before running ahead, or reset", str(refusal)), refusal
    assert kept
    assert after == generate(gpu, program, prompt(6), max_new_tokens=3, temperature=0.0)[0][2]


def test_the_callers_current_gpu_is_left_to_it(program: Path, gpu: Gpu) -> None:
    if gpu.emulated or torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    script = """
import threading, torch
torch.zeros(1, device="cuda:1")
torch.cuda.set_device(1)
free = torch.cuda.mem_get_info(1)[0]
engine = core.Engine(program)
session = engine.open_session()
def use():
    torch.cuda.set_device(1)
    return continued(engine, session, session.run(engine, arguments[0], GREEDY), 10)
tokens = use()
session.reset()
thread = threading.Thread(target=lambda: tokens.extend(use()))
thread.start()
thread.join()
show([tokens, torch.cuda.current_device(), free - torch.cuda.mem_get_info(1)[0]])
"""
    tokens, current, taken = gpu.run(program, script, prompt(6))
    expected = generate(gpu, program, prompt(6), max_new_tokens=10, temperature=0.0)[0]
    assert (tokens, current, taken) == (expected * 2, 1, 0)


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
