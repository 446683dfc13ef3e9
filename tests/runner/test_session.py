"""Sessions: the same answer however a prompt is fed, whoever runs beside it, whatever was there before."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from parity import GREEDY
from qwen_runner import _core
from random_checkpoints import SPECS, random_prompt

NAME = "interval"
CHUNK, MAX_SEQ_LEN = 16, 128


@pytest.fixture(scope="module")
def engine(exported: Callable[..., Path]) -> _core.Engine:
    engine = _core.Engine(str(exported(NAME)))
    assert (engine.chunk, engine.max_seq_len, engine.slots) == (CHUNK, MAX_SEQ_LEN, 3)
    return engine


def prompt(length: int) -> list[int]:
    return random_prompt(SPECS[NAME], length)


def state_names(engine: _core.Engine) -> list[str]:
    return sorted({name for _, name, _, _, is_state in engine.bound_constants() if is_state})


def float_states(engine: _core.Engine, session: _core.Session) -> Iterator[tuple[str, np.ndarray]]:
    """The slot's float32 state tensors, flat; `seen` is bytes and compared apart."""
    for name in state_names(engine):
        if name != "seen":
            yield name, session.state(name).view(np.float32)


def answer(
    engine: _core.Engine, session: _core.Session, tokens: list[int], n: int, chunk: int = 0
) -> list[int]:
    output = [session.run(engine, tokens, GREEDY, chunk)]
    while len(output) < n:
        output.append(session.run(engine, output[-1:], GREEDY))
    return output


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5, MAX_SEQ_LEN - 1])
def test_whole_in_chunks_and_token_by_token_end_in_the_same_state(engine: _core.Engine, length: int) -> None:
    new = min(8, MAX_SEQ_LEN - length + 1)
    results = {}
    for chunk in (0, 7, 2, 1):
        session = engine.open_session()
        first = session.run(engine, prompt(length), GREEDY, chunk)
        states = dict(float_states(engine, session))
        seen = session.state("seen")
        rest = answer(engine, session, [first], new - 1) if new > 1 else []
        results[chunk] = [first, *rest], states, seen
    tokens, states, seen = results[0]
    assert any(np.abs(value).max() > 0 for value in states.values())
    for other_tokens, other_states, other_seen in results.values():
        assert other_tokens == tokens
        assert np.array_equal(other_seen, seen)
        for name, value in states.items():
            scale = max(1.0, float(np.abs(value).max()))
            assert np.abs(other_states[name] - value).max() <= 1e-5 * scale, name


def test_interleaved_sessions_give_what_each_gives_alone(engine: _core.Engine) -> None:
    prompts = [prompt(21), prompt(40)[19:], prompt(5)]
    alone = []
    for tokens in prompts:
        session = engine.open_session()
        alone.append((answer(engine, session, tokens, 40), dict(float_states(engine, session))))
        del session
    sessions = [engine.open_session() for _ in prompts]
    outputs = [
        [session.run(engine, tokens, GREEDY)] for session, tokens in zip(sessions, prompts, strict=True)
    ]
    for _ in range(39):
        for session, output in zip(sessions, outputs, strict=True):
            output.append(session.run(engine, output[-1:], GREEDY))
    for session, output, (expected, states) in zip(sessions, outputs, alone, strict=True):
        assert output == expected
        for name, value in float_states(engine, session):
            assert np.array_equal(value, states[name]), name


def test_reset_after_nan_gives_a_clean_run(engine: _core.Engine) -> None:
    session = engine.open_session()
    clean = answer(engine, session, prompt(30), 20)
    for name in state_names(engine):
        session.write_state(name, np.full_like(session.state(name), 0xFF))  # as float32: NaN
    session.reset()
    assert session.position == 0
    for name in state_names(engine):
        assert not session.state(name).any(), name
    assert answer(engine, session, prompt(30), 20) == clean


def test_reset_leaves_nothing_of_what_steps_wrote(engine: _core.Engine) -> None:
    session = engine.open_session()
    for length in (3, 40, MAX_SEQ_LEN):
        answer(engine, session, prompt(length), 1)
        assert all(session.state(name).any() for name in state_names(engine))
        session.reset()
        for name in state_names(engine):
            assert not session.state(name).any(), name


def test_a_fork_leaves_nothing_of_its_slot_s_last_session(engine: _core.Engine) -> None:
    session, longer = engine.open_session(), engine.open_session()
    answer(engine, longer, prompt(60), 1)
    del longer
    session.run(engine, prompt(7), GREEDY)
    fork = session.fork()
    for name in state_names(engine):
        assert np.array_equal(fork.state(name), session.state(name)), name


def test_a_new_session_sees_nothing_of_the_slot_s_last_one(engine: _core.Engine) -> None:
    session = engine.open_session()
    slot = session.slot
    clean = answer(engine, session, prompt(30), 10)
    name = state_names(engine)[0]
    session.write_state(name, np.full_like(session.state(name), 0xFF))
    del session
    session = engine.open_session()
    assert session.slot == slot
    assert answer(engine, session, prompt(30), 10) == clean


def test_a_fork_goes_on_as_a_run_of_its_own(engine: _core.Engine) -> None:
    common, first, second = prompt(21), prompt(33)[21:], prompt(28)[20:]
    expected = []
    for rest in (first, second):
        session = engine.open_session()
        session.run(engine, common, GREEDY)
        expected.append((answer(engine, session, rest, 20), dict(float_states(engine, session))))
        del session
    session = engine.open_session()
    session.run(engine, common, GREEDY)
    fork = session.fork()
    assert fork.slot != session.slot
    assert fork.position == session.position == len(common)
    for branch, rest, (tokens, states) in zip((fork, session), (second, first), expected[::-1], strict=True):
        assert answer(engine, branch, rest, 20) == tokens
        for name, value in float_states(engine, branch):
            assert np.array_equal(value, states[name]), name


def test_a_fork_takes_a_slot(engine: _core.Engine) -> None:
    session = engine.open_session()
    forks = [session.fork() for _ in range(engine.slots - 1)]
    with pytest.raises(ValueError, match="all 3 slots of the program are in use"):
        session.fork()
    del forks
    assert session.fork().position == 0


def test_a_state_takes_what_has_its_size(engine: _core.Engine) -> None:
    session = engine.open_session()
    with pytest.raises(ValueError, match=f"the state seen has {SPECS[NAME].vocab} bytes a slot, not 3"):
        session.write_state("seen", np.zeros(3, np.uint8))
    with pytest.raises(FileNotFoundError, match="no state nothing"):
        session.state("nothing")


def test_slots_run_out_with_a_message(engine: _core.Engine) -> None:
    sessions = [engine.open_session() for _ in range(engine.slots)]
    assert sorted(session.slot for session in sessions) == [0, 1, 2]
    with pytest.raises(ValueError, match="all 3 slots of the program are in use"):
        engine.open_session()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no tokens"),
        ([1, SPECS[NAME].vocab], f"token id {SPECS[NAME].vocab} is not in"),
        ([-1], "token id -1 is not in"),
        ([1] * (MAX_SEQ_LEN + 1), "129 tokens after 0 do not fit the program's 128 positions"),
    ],
)
def test_what_cannot_run_is_refused_and_changes_nothing(
    engine: _core.Engine, tokens: list[int], message: str
) -> None:
    session = engine.open_session()
    with pytest.raises(ValueError, match=message):
        session.run(engine, tokens, GREEDY)
    assert session.position == 0
    fresh = answer(engine, session, prompt(4), 5)
    session.reset()
    assert answer(engine, session, prompt(4), 5) == fresh


def test_a_full_slot_takes_no_more(engine: _core.Engine) -> None:
    session = engine.open_session()
    session.run(engine, [1] * MAX_SEQ_LEN, GREEDY)
    with pytest.raises(ValueError, match="1 tokens after 128 do not fit"):
        session.run(engine, [1], GREEDY)


def test_one_program_after_another_is_the_other(exported: Callable[..., Path]) -> None:
    # The dynamic loader may keep a program's library after its engine (any with unique symbols), and must not
    # take it for the next one's.
    script = """
import ctypes
import json
import os
import sys
from qwen_runner import _core
def keep_libraries():
    paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    libraries = [path for path in paths if os.path.exists(path) and "memfd:" in os.readlink(path)]
    assert libraries
    for path in libraries:
        ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_NOLOAD | os.RTLD_NODELETE)
options = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 20}
for path in sys.argv[1:]:
    engine = _core.Engine(path)
    answer = engine.generate([1, 2, 3, 4, 5], options, None, _core.Cancel())["tokens"]
    keep_libraries()
    del engine
assert "torch" not in sys.modules  # whose libraries would hide the fault
print(json.dumps(answer))
"""

    def last_answer(*programs: Path) -> list[int]:
        output = subprocess.run(
            [sys.executable, "-c", script, *programs], capture_output=True, check=True, text=True
        )
        return json.loads(output.stdout)

    first, second = exported("smallest"), exported(NAME)
    assert last_answer(first, second) == last_answer(second)
