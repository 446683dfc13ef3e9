"""A cuda program at its full shape on a real GPU: graphs, sessions, memory, a real text.

    QWEN_FULL_PROGRAM=programs/35b python -m pytest -rs -s tests/runner/test_cuda_full.py

Any cuda program will do; what it cannot hold is made shorter, for trying the tests. They measure the memory
of the whole GPU, so nothing else may use it: pytest-xdist's processes skip them.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_script import Gpu

VARIABLE = "QWEN_FULL_PROGRAM"
HELDOUT = Path(__file__).resolve().parents[2] / "demo" / "heldout.txt"
NEW_TOKENS = 512
TEXT_TOKENS = 1600
FLAT_OVER = 10_000
GIBIBYTE = 1 << 30
MEMORY_LIMIT = 19 * GIBIBYTE
LOAD_LIMIT_MS = 6000

GPU = Gpu("_core", emulated=False)


@pytest.fixture(scope="module")
def program() -> Path:
    if VARIABLE not in os.environ:
        pytest.skip(f"needs {VARIABLE}: the folder of a cuda program")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("needs the whole GPU: run it without -n")
    return Path(os.environ[VARIABLE]).resolve()


SESSIONS = """
import hashlib
cuda_graph, text, new = arguments
engine = core.Engine(program, cuda_graph)
new = min(new, engine.max_seq_len // 2)
prompt = engine.tokenize(text, False)[: min(200, engine.max_seq_len // 2)]
sessions = min(4, engine.slots)
states = sorted({name for _, name, _, _, is_state in engine.bound_constants() if is_state})
def sampling(i):
    return GREEDY if i == 0 else dict(temperature=0.8, seed=i, top_k=30)
def start(i):
    session = engine.open_session()
    return session, [session.run(engine, prompt[5 * i :], sampling(i))]
def step(i, session, output):
    output.append(session.decode(engine, output[-1], sampling(i), len(output) + 1 < new))
def digest(session):
    sha256 = hashlib.sha256()
    for name in states:
        sha256.update(session.state(name))
    return sha256.hexdigest()

session, solo = start(0)
while len(solo) < new:
    step(0, session, solo)
solo_state = digest(session)
del session
# The greedy one last: in another slot than alone.
together = [(i, *start(i)) for i in (*range(1, sessions), 0)]
while len(together[-1][2]) < new:
    for i, session, output in together:
        step(i, session, output)
show(dict(solo=solo, solo_state=solo_state, mixed=together[-1][2], mixed_state=digest(together[-1][1]),
          others=[output for _, _, output in together[:-1]], nodes=engine.gpu["graph_nodes"], wanted=new))
"""


def test_graphs_and_other_sessions_change_no_bit(program: Path) -> None:
    """512 greedy tokens and the state after them, alone and between three sampling sessions."""
    text = HELDOUT.read_text(encoding="utf-8")[:4000]
    replayed = GPU.run(program, SESSIONS, True, text, NEW_TOKENS)
    launched = GPU.run(program, SESSIONS, False, text, NEW_TOKENS)
    print(
        f"{len(replayed['solo'])} tokens ({len(set(replayed['solo']))} different ones) four ways, "
        f"beside {len(replayed['others'])} sessions; a graph of {replayed['nodes']} nodes"
    )
    assert (replayed["nodes"] > 0, launched["nodes"]) == (True, 0)
    assert len(replayed["solo"]) == replayed["wanted"]
    for run in (replayed, launched):
        assert run["solo"] == replayed["solo"]
        assert run["mixed"] == replayed["solo"]
        assert run["others"] == replayed["others"]
        assert (run["solo_state"], run["mixed_state"]) == (replayed["solo_state"],) * 2


MEMORY = """
text, total = arguments
engine = core.Engine(program)
tokens = engine.tokenize(text, False)
longest = min(1600, engine.chunk, engine.max_seq_len // 2)
lengths = sorted({longest, longest // 2 + 1, min(40, longest), 2}, reverse=True)
generated, samples = 0, []
def sample():
    gpu = engine.gpu
    samples.append([generated, gpu["allocated_bytes"], gpu["used_bytes"]])
def use(session, length, new, options):
    global generated
    token = session.run(engine, tokens[:length], options)
    generated += 1
    for i in range(1, new):
        token = session.decode(engine, token, options, i + 1 < new)
        generated += 1
        if generated % 100 == 0:
            sample()
# Every length once, and the longest more often: what is kept for temporaries settles. At most 100 tokens.
for turn, length in enumerate((longest, longest, *lengths)):
    session = engine.open_session()
    use(session, length, 16, dict(temperature=0.8, seed=turn + 1))
    del session
warm_up, samples = generated, []
sample()
begun, kept, turn = generated, [], 0
while generated - begun < total:
    # Every slot is in use, the oldest session's again for the newest; each fills its own.
    session = None
    del kept[: max(0, len(kept) + 1 - engine.slots)]
    session = engine.open_session()
    kept.append(session)
    length = lengths[turn % len(lengths)]
    new = min(engine.max_seq_len - length + 1, total - (generated - begun))
    use(session, length, new, GREEDY if turn % 2 else dict(temperature=0.8, seed=turn + 1))
    turn += 1
sample()
show([warm_up, turn, samples, engine.memory["weight_bytes"], engine.memory["state_bytes"]])
"""


def test_memory_is_flat_over_10_000_tokens(program: Path) -> None:
    free, total = torch.cuda.mem_get_info()  # with this process's own context, which stays as it is
    text = HELDOUT.read_text(encoding="utf-8")[:20_000]
    warm_up, sessions, samples, weights, states = GPU.run(program, MEMORY, text, FLAT_OVER)
    assert warm_up <= 100
    tokens = samples[-1][0] - samples[0][0]
    allocated = [sample[1] for sample in samples]
    used = [sample[2] - (total - free) for sample in samples]
    print(
        f"{tokens} tokens in {sessions} sessions, {len(samples)} samples: {allocated[0] / GIBIBYTE:.3f} GiB "
        f"allocated ({weights / GIBIBYTE:.3f} weights, {states / GIBIBYTE:.3f} state), "
        f"{max(used) / GIBIBYTE:.3f} GiB of the GPU with context and kernels"
    )
    assert tokens >= FLAT_OVER
    assert max(allocated) == allocated[0]
    assert max(used) == used[0]
    assert max(used) <= MEMORY_LIMIT


TEXT = """
text, wanted, new = arguments
engine = core.Engine(program)
once = dict(max_new_tokens=1, temperature=0.0)
cold_ms = engine.generate([1], once, None, core.Cancel())["timings"]["load_ms"]
del engine
engine = core.Engine(program)  # now its files are in the page cache
new = min(new, engine.max_seq_len // 4)
prompt = engine.tokenize(text, False)[: min(wanted, engine.max_seq_len - new)]
options = dict(temperature=0.0, ignore_eos=True, max_new_tokens=new)
answers = [engine.generate(prompt, options, None, core.Cancel()) for _ in range(3)]
show(dict(prompt=len(prompt), wanted=new, cold_ms=cold_ms,
          tokens=[answer["tokens"] for answer in answers], timings=[answer["timings"] for answer in answers],
          text=answers[0]["text"], gpu=engine.gpu, memory=engine.memory, constants=engine.bound_constants()))
"""


@pytest.fixture(scope="module")
def text_run(program: Path) -> dict[str, Any]:
    text = HELDOUT.read_text(encoding="utf-8")[:20_000]
    result: dict[str, Any] = GPU.run(program, TEXT, text, TEXT_TOKENS, NEW_TOKENS)
    return result


def test_a_real_text_is_read_and_continued(text_run: dict[str, Any]) -> None:
    """1600 tokens in, 512 out of a CUDA graph, the same three times; loaded in time."""
    first, *_, last = text_run["timings"]
    print(f"{text_run['prompt']} tokens in, {text_run['wanted']} out on {text_run['gpu']['name']}:")
    for name, timings in (("first", first), ("third", last)):
        print(
            f"  {name} answer: prefill {timings['prefill_tokens_per_second']:.0f} tok/s, first token "
            f"{timings['ttft_ms']:.1f} ms, decode {timings['decode_tokens_per_second']:.1f} tok/s"
        )
    print(
        f"  load {text_run['cold_ms']:.0f} ms, again {last['load_ms']:.0f} ms; "
        f"{text_run['gpu']['allocated_bytes'] / GIBIBYTE:.3f} GiB of GPU memory allocated, "
        f"{text_run['memory']['peak_resident_bytes'] / GIBIBYTE:.3f} GiB resident at peak; "
        f"graph of {text_run['gpu']['graph_nodes']} nodes"
    )
    assert text_run["gpu"]["graph_nodes"] > 0
    assert [len(tokens) for tokens in text_run["tokens"]] == [text_run["wanted"]] * 3
    assert text_run["tokens"][1:] == text_run["tokens"][:1] * 2
    assert last["load_ms"] <= LOAD_LIMIT_MS


BATCH = """
new, *prompts = arguments
engine = core.Engine(program)
prompts = [engine.tokenize(prompt, False) for prompt in prompts[: engine.batch // 2 * 2]]
def run(width):
    outputs = []
    for begin in range(0, len(prompts), width):
        sessions = [engine.open_session() for _ in prompts[begin : begin + width]]
        rows = [[s.run(engine, p, GREEDY)] for s, p in zip(sessions, prompts[begin : begin + width])]
        options = [GREEDY] * len(rows)
        while len(rows[0]) < new:
            last = len(rows[0]) + 1 == new
            sampled = engine.decode_together(sessions, [row[-1] for row in rows], options, not last)
            for row, token in zip(rows, sampled):
                row.append(token)
        outputs += rows
    return outputs
show([run(width) for width in (1, 2, len(prompts))])
"""


def test_rows_of_a_step_are_the_same_in_pairs_and_all_together(program: Path) -> None:
    starts = ("It is a truth", "She was", "In the beginning", "The whale", "One day", "No", "At sea,", "Dear")
    alone, pairs, everyone = GPU.run(program, BATCH, 128, *starts)
    assert pairs == everyone
    parted = [
        next((i for i, (a, b) in enumerate(zip(*two, strict=True)) if a != b), 128)
        for two in zip(alone, pairs, strict=True)
    ]
    print(f"{len(everyone)} rows; tokens until they part from those of steps of one row: {parted}")


def test_all_methods_read_one_copy_of_the_weights(text_run: dict[str, Any]) -> None:
    places: dict[str, dict[str, tuple[int, int]]] = {"prefill": {}, "decode": {}, "decode_batch": {}}
    for method, name, address, size, _ in text_run["constants"]:
        places[method][name] = address, size
    assert places["prefill"] == places["decode"] == places["decode_batch"]
    weights, states = text_run["memory"]["weight_bytes"], text_run["memory"]["state_bytes"]
    beside = text_run["gpu"]["allocated_bytes"] - weights - states
    print(f"{len(places['decode'])} constants; {beside / (1 << 20):.0f} MiB beside weights and state")
    assert 0 < beside < max(GIBIBYTE, weights // 16)
