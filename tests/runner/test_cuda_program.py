"""cuda programs: graphs, sessions and faults, on a real GPU and on an emulated one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_script import Gpu, generate, prompt


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


def test_reset_and_fork_leave_nothing_of_what_a_slot_had(gpu: Gpu, program: Path) -> None:
    script = """
engine = core.Engine(program)
names = sorted({name for _, name, _, _, is_state in engine.bound_constants() if is_state})
tokens = arguments[0]
session = engine.open_session()
lost, left, differing = [], [], []
for length in (5, 40):
    continued(engine, session, session.run(engine, tokens[:length], GREEDY), 3)
    session.decode(engine, 1, GREEDY, True)  # and one that runs ahead
    lost += [name for name in names if not session.state(name).any()]
    session.reset()
    left += [name for name in names if session.state(name).any()]
longer = engine.open_session()
longer.run(engine, tokens, GREEDY)
del longer
session.run(engine, tokens[:12], GREEDY)
fork = session.fork()
differing = [name for name in names if not np.array_equal(fork.state(name), session.state(name))]
show([lost, left, differing])
"""
    assert gpu.run(program, script, prompt(60)) == [[], [], []]


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


def test_all_methods_read_every_constant_at_the_same_address(gpu: Gpu, program: Path) -> None:
    script = """
engine = core.Engine(program)
show([engine.bound_constants(), engine.gpu["allocated_bytes"], engine.memory["weight_bytes"]])
"""
    constants, allocated, weights = gpu.run(program, script)
    places: dict[str, dict[str, tuple[int, int]]] = {"prefill": {}, "decode": {}, "decode_batch": {}}
    for method, name, address, size, _ in constants:
        places[method][name] = address, size
    assert places["prefill"] == places["decode"] == places["decode_batch"]
    assert weights == sum(size for _, name, _, size, state in constants if not state) // 3
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
