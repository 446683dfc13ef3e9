"""Several sessions a decode step: a session's tokens are its own, whoever is beside it.

Steps of two rows or more agree bit for bit, whatever their number. A step of one row may sum in another
order, so what it samples is the same but for near ties.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cuda_script import SMALLEST, Gpu, prompt
from program_copy import with_manifest

LENGTHS = [7, 1, 20, 3, 33, 12, 16, 9]  # of prompts, so that sessions are at different positions
NEAR_TIE = 0.02  # how much of the logits' range bfloat16's rounding may turn


@pytest.fixture(scope="module")
def wide(exported: Callable[..., Path]) -> Path:
    """The model SMALLEST with as many slots as a decode step has rows at the most."""
    return exported(SMALLEST, target="cuda", quantize="int4", slots=8)


def prompts(count: int) -> list[list[int]]:
    tokens = prompt(60)
    return [tokens[i : i + length] for i, length in enumerate(LENGTHS[:count])]


SESSIONS = """
def sampling(i):
    if i % 3 == 0:
        return GREEDY
    return dict(temperature=0.7 + 0.05 * i, seed=i, top_k=10 + i, presence_penalty=0.1 * i)
class Row:
    def __init__(self, engine, i, tokens):
        self.engine, self.i, self.session = engine, i, engine.open_session()
        self.session.set_generated_from(len(tokens))
        self.output = [self.session.run(engine, tokens, sampling(i))]
    def result(self):
        states = sorted({name for _, name, _, _, is_state in self.engine.bound_constants() if is_state})
        return self.output, [hash(self.session.state(name).tobytes()) for name in states]
def step(rows, ahead):
    sessions, tokens = [row.session for row in rows], [row.output[-1] for row in rows]
    options = [sampling(row.i) for row in rows]
    for row, token in zip(rows, rows[0].engine.decode_together(sessions, tokens, options, ahead)):
        row.output.append(token)
def alike(engine, tokens, one, other):
    "Whether `other` is `one` or parts from it at a near tie."
    for i, (a, b) in enumerate(zip(one, other)):
        if a != b:
            session = engine.open_session()
            session.keep_logits(True)
            session.run(engine, tokens + one[:i], GREEDY)
            logits = session.logits()
            return bool(abs(logits[a] - logits[b]) < near_tie * np.ptp(logits))
    return len(one) == len(other)
"""


@pytest.mark.parametrize("graph", [None, False])
def test_rows_do_not_depend_on_each_other(gpu: Gpu, wide: Path, graph: bool | None) -> None:
    script = """
graph, *prompts = arguments
def run(groups, ahead):
    engine = core.Engine(program, graph)
    assert engine.batch == 8
    rows = [Row(engine, i, tokens) for i, tokens in enumerate(prompts)]
    nodes = []
    for n in range(10):
        for group in groups:
            step([rows[i] for i in group], ahead and n < 9)
            nodes.append(engine.gpu["graph_nodes"])
    return [row.result() for row in rows], nodes[-1] > 0
everyone = range(8)
show([run(*way) for way in (
    ([everyone], True),
    ([everyone], False),
    ([[7, 2, 4, 0, 1, 3, 6, 5]], True),
    ([[0, 1, 2, 3], [4, 5, 6, 7]], True),
    ([[6, 0, 5], [1, 2, 3, 4, 7]], True),
    ([[0, 1], [2, 3], [4, 5], [6, 7]], False),
)])
"""
    results = gpu.run(wide, SESSIONS + script, graph, *prompts(8))
    assert len({json.dumps(rows) for rows, _ in results}) == 1
    assert [has_graph for _, has_graph in results] == [graph is None] * 6


def test_a_row_is_what_its_session_would_be_alone(gpu: Gpu, wide: Path) -> None:
    """To bfloat16's rounding: logits after the same tokens."""
    script = """
engine = core.Engine(program)
def start(i, tokens):
    session = engine.open_session()
    session.run(engine, tokens, GREEDY)
    session.keep_logits(True)
    return session
follow = arguments[0][:6]
alone = []
for i, tokens in enumerate(arguments):
    session, logits = start(i, tokens), []
    for token in follow:
        session.decode(engine, token, GREEDY, False)
        logits.append(session.logits().copy())
    alone.append(logits)
    del session
sessions, errors = [start(i, tokens) for i, tokens in enumerate(arguments)], []
for n, token in enumerate(follow):
    sampled = engine.decode_together(sessions, [token] * len(sessions), [GREEDY] * len(sessions), True)
    for i, session in enumerate(sessions):
        assert sampled[i] == session.logits().argmax()
        errors.append(float(np.linalg.norm(session.logits() - alone[i][n]) / np.linalg.norm(alone[i][n])))
show([len(errors), max(errors)])
"""
    count, error = gpu.run(wide, script, *prompts(5))
    assert count == 30
    assert error < 2e-2


def test_a_session_that_leaves_or_comes_disturbs_nobody(gpu: Gpu, wide: Path) -> None:
    """What ran ahead for a session that has ended is forgotten; the others go on from what ran for them."""
    script = """
near_tie, *prompts = arguments
def run(ahead):
    engine = core.Engine(program)
    rows = [Row(engine, i, tokens) for i, tokens in enumerate(prompts[:4])]
    for _ in range(4):
        step(rows, ahead)
    gone = rows.pop(1)
    for _ in range(3):
        step(rows, ahead)
    gone.session.reset()
    gone.i, gone.output = 3, [gone.session.run(engine, prompts[4], sampling(3))]
    rows.append(gone)
    for _ in range(5):
        step(rows, ahead)
    step(rows, False)
    return engine, [row.result() for row in rows]
_, expected = run(False)
engine, found = run(True)
show([found[:3] == expected[:3], alike(engine, prompts[4], expected[3][0], found[3][0]), len(found[3][0])])
"""
    same, near, count = gpu.run(wide, SESSIONS + script, NEAR_TIE, *prompts(5))
    assert (same, near, count) == (True, True, 7)


def test_sessions_alone_and_together_take_turns(gpu: Gpu, wide: Path) -> None:
    """Lanes of one row and of two see the same sessions, neither uses what the other left behind."""
    script = """
near_tie, *prompts = arguments
def run(ahead):
    engine = core.Engine(program)
    rows = [Row(engine, 3 * i, tokens) for i, tokens in enumerate(prompts)]
    for n in range(12):
        if n % 4 == 3:
            for row in rows:
                step([row], ahead)
        elif n % 4 == 1:
            step(rows[::-1], ahead)
        else:
            step(rows, ahead)
    return engine, [row.output for row in rows]
_, expected = run(False)
engine, found = run(True)
show([alike(engine, *each) for each in zip(prompts, expected, found)])
"""
    assert gpu.run(wide, SESSIONS + script, NEAR_TIE, *prompts(2)) == [True, True]


ANSWERS = """
import threading
near_tie, prompts, options, each = arguments
def generate_all(engine, on_piece=None, cancel=None):
    every = [options | one for one in each]
    answers = engine.generate_batch(prompts, every, on_piece, cancel or core.Cancel())
    return [[answer["tokens"], answer["finish_reason"]] for answer in answers]
def generate_one(engine, i):
    answer = engine.generate(prompts[i], options | each[i], None, core.Cancel())
    return [answer["tokens"], answer["finish_reason"]]
"""


def test_answers_of_a_batch_are_those_of_each_alone(gpu: Gpu, program: Path) -> None:
    """More prompts than slots: those that end, one of them at the end of its slot, make room for others."""
    script = """
engine = core.Engine(program)
assert engine.batch == engine.slots == 3
pieces = [""] * len(prompts)
def on_piece(index, piece):
    pieces[index] += piece
together = generate_all(engine, on_piece)
alone = [generate_one(engine, i) for i in range(len(prompts))]
full = engine.generate_batch(prompts, [options | one for one in each], None, core.Cancel())
show([
    [alike(engine, tokens, a[0], b[0]) for tokens, a, b in zip(prompts, alone, together)],
    [len(tokens) for tokens, _ in together],
    [reason for _, reason in together],
    pieces == [answer["text"] for answer in full],
    engine.gpu["graph_nodes"] > 0,
    [engine.open_session().slot for _ in range(3)],
    engine.generate_batch([], [], None, core.Cancel()),
])
"""
    texts = [*prompts(6), prompt(120)]
    each: list[dict[str, Any]] = [{} for _ in texts]
    for i, length in enumerate((5, 14, 1, 0, 23, 9, 100)):
        each[i]["max_new_tokens"] = length
    options = {"temperature": 0.0, "ignore_eos": True}
    alike, lengths, reasons, pieces, graph, slots, none = gpu.run(
        program, SESSIONS + ANSWERS + script, NEAR_TIE, texts, options, each
    )
    assert alike == [True] * 7
    assert lengths == [5, 14, 1, 0, 23, 9, 9]
    assert reasons == ["length"] * 7
    assert (pieces, graph, slots, none) == (True, True, [0, 0, 0], [])


def test_a_batch_is_cancelled_whole_or_by_the_answer(gpu: Gpu, program: Path) -> None:
    script = """
engine = core.Engine(program)
cancel, seen = core.Cancel(), []
def on_piece(index, piece):
    seen.append(index)
    if len(seen) == 8:
        cancel.set()
cancelled = [reason for _, reason in generate_all(engine, on_piece, cancel)]
def refuse(index, piece):
    raise KeyError(index)
try:
    generate_all(engine, refuse)
    raised = None
except KeyError as error:
    raised = str(error)
try:
    engine.generate_batch([prompts[0], []], [options, options], None, core.Cancel())
    empty = None
except ValueError as error:
    empty = str(error)
show([cancelled, raised, empty, [len(tokens) for tokens, _ in generate_all(engine)]])
"""
    options = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 30}
    cancelled, raised, empty, lengths = gpu.run(
        program, ANSWERS + script, NEAR_TIE, prompts(5), options, [{}] * 5
    )
    assert cancelled == ["cancelled"] * 5
    assert raised == "0"
    assert "the prompt is empty" in empty
    assert lengths == [30] * 5


def test_more_sessions_than_a_step_has_rows_are_split(gpu: Gpu, program: Path, tmp_path: Path) -> None:
    """As programs from before there were batches are: one row a step."""
    copy = with_manifest(program, tmp_path / "old", lambda manifest: manifest.pop("batch"))
    script = """
engine = core.Engine(program)
rows = [Row(engine, i, tokens) for i, tokens in enumerate(arguments)]
for _ in range(8):
    step(rows, True)
together = [row.output for row in rows]
del rows
alone = []
for i, tokens in enumerate(arguments):
    row = Row(engine, i, tokens)
    for n in range(8):
        step([row], n < 7)
    alone.append(row.output)
    del row
show([engine.batch, together == alone])
"""
    assert gpu.run(copy, SESSIONS + script, *prompts(3)) == [1, True]


def test_a_manifest_that_promises_another_batch_is_refused(gpu: Gpu, program: Path, tmp_path: Path) -> None:
    script = """
try:
    core.Engine(program)
except RuntimeError as error:
    show(str(error))
"""
    for batch, named in ((2, "disagree on get_batch"), (4, "contradicts itself")):
        copy = with_manifest(
            program, tmp_path / str(batch), lambda manifest, b=batch: manifest.update(batch=b)
        )
        assert named in gpu.run(copy, script)


def test_sessions_that_cannot_be_stepped_together_are_refused(gpu: Gpu, program: Path) -> None:
    script = """
engine, other = core.Engine(program), core.Engine(program)
rows, stranger = [Row(engine, 0, tokens) for tokens in arguments], Row(other, 0, arguments[0])
refusals = []
for group in ([rows[0], rows[0]], [rows[0], stranger], []):
    try:
        engine.decode_together([row.session for row in group], [1] * len(group), [GREEDY] * len(group), False)
    except ValueError as error:
        refusals.append(str(error))
step(rows, False)
show(refusals)
"""
    refusals = gpu.run(program, SESSIONS + script, *prompts(2))
    for refusal, named in zip(refusals, ("named twice", "two engines", "must be a session"), strict=True):
        assert named in refusal


def test_a_step_that_fails_fails_all_its_sessions(gpu: Gpu, program: Path) -> None:
    if not gpu.emulated:
        pytest.skip("faults are injected into the emulated GPU")
    script = """
engine, failure = core.Engine(program), ""
try:
    rows = [Row(engine, 0, tokens) for tokens in arguments]
except MemoryError:
    show(["", 0, [], False])
    sys.exit()
try:
    step(rows, True)
except MemoryError as error:
    failure = str(error)
poisoned = 0
for row in rows:
    try:
        row.session.run(engine, [1], GREEDY)
    except ValueError as error:
        poisoned += "reset" in str(error)
del rows
rows = [Row(engine, 0, tokens) for tokens in arguments]
for _ in range(6):
    step(rows, True)
show([failure, poisoned, [row.output for row in rows], engine.gpu["graph_nodes"] > 0])
"""
    _, _, expected, _ = gpu.run(program, SESSIONS + script, *prompts(2))
    failures = []  # of what comes after the prompts' own memory
    states = gpu.run(
        program, "show(len({n for _, n, _, _, s in core.Engine(program).bound_constants() if s}))"
    )
    for call in range(2 + states + 2 + 2, 2 + states + 2 + 8):
        failure, poisoned, tokens, graph = gpu.run(
            program, SESSIONS + script, *prompts(2), QWEN_EMULATED_FAIL=f"cudaMalloc:{call}"
        )
        if failure:
            assert (poisoned, graph) == (2, True)
            assert tokens == expected
            failures.append(failure)
    assert any("inputs of a step" in failure for failure in failures), failures
    assert any("temporaries" in failure for failure in failures), failures


def test_without_a_graph_a_batch_goes_on(gpu: Gpu, program: Path) -> None:
    if not gpu.emulated:
        pytest.skip("faults are injected into the emulated GPU")
    script = """
engine = core.Engine(program)
rows = [Row(engine, 0, tokens) for tokens in arguments]
for _ in range(8):
    step(rows, True)
step(rows, False)
nodes = [engine.gpu["graph_nodes"]]
step(rows[:2], False)
nodes.append(engine.gpu["graph_nodes"])
show([[row.output for row in rows], nodes])
"""
    expected, nodes = gpu.run(program, SESSIONS + script, *prompts(3))
    assert nodes[0] > 0
    assert nodes[1] == 0  # the first step of two rows
    process = gpu.process(
        program, SESSIONS + script, *prompts(3), QWEN_EMULATED_FAIL="cudaGraphInstantiate:1"
    )
    assert process.stderr.count("decoding goes on without a CUDA graph") == 1
    assert json.loads(process.stdout) == [expected, [0, 0]]
