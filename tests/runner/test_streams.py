"""Answers piece by piece, cancelled, at the same time: streams, asyncio and threads."""

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from qwen_runner import Generation, Runner, Stream

PROMPT = "In the beginning"
LONG = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 1500}


@pytest.fixture(scope="module")
def runner(demo_program: Path) -> Iterator[Runner]:
    with Runner(demo_program) as runner:
        yield runner


def test_stream_gives_the_pieces_of_the_answer(runner: Runner) -> None:
    whole = runner.generate(PROMPT, temperature=0.0, max_new_tokens=60)
    with runner.stream(PROMPT, temperature=0.0, max_new_tokens=60) as stream:
        pieces = list(stream)
        assert len(pieces) > 10
        assert "".join(pieces) == whole.text
        assert stream.result is not None
        assert stream.result.tokens == whole.tokens


def test_on_piece_is_called_as_the_text_comes(runner: Runner) -> None:
    pieces: list[str] = []
    answer = runner.generate(PROMPT, on_piece=pieces.append, temperature=0.0, max_new_tokens=20)
    assert "".join(pieces) == answer.text


def test_what_on_piece_raises_ends_the_answer(runner: Runner) -> None:
    class Stop(Exception):
        pass

    calls = []

    def raises(piece: str) -> None:
        calls.append(piece)
        raise Stop

    with pytest.raises(Stop):
        runner.generate(PROMPT, on_piece=raises, **LONG)
    assert len(calls) == 1


def test_leaving_a_stream_cancels_it(runner: Runner) -> None:
    with runner.stream(PROMPT, **LONG) as stream:
        next(stream)
    assert stream.result is None
    assert list(stream) == []
    # Its slot is free again: as many streams as there are slots can start.
    slots = _slots(runner)
    streams = [runner.stream(PROMPT, temperature=0.0, max_new_tokens=5) for _ in range(slots)]
    assert all(list(stream) for stream in streams)


@pytest.mark.parametrize("rest", ["", "del stream"])
def test_a_process_that_ends_within_a_stream_ends_well(demo_program: Path, rest: str) -> None:
    script = f"""
import sys
from qwen_runner import Runner
stream = Runner(sys.argv[1]).stream("In the beginning", temperature=0.0, ignore_eos=True, max_new_tokens=1500)
next(stream)
{rest}
print("end")
"""
    ended = subprocess.run([sys.executable, "-c", script, demo_program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end\n", "")


def test_cancel_right_after_stream_finds_it(runner: Runner, demo_program: Path) -> None:
    stream = runner.stream(PROMPT, **LONG)
    runner.cancel()
    list(stream)
    assert stream.result is not None
    assert stream.result.finish_reason == "cancelled"
    other = Runner(demo_program)
    stream = other.stream(PROMPT, **LONG)
    other.close()
    list(stream)
    assert stream.result is not None
    assert stream.result.finish_reason == "cancelled"


def test_an_astream_left_early_ends_off_the_event_loop(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    closers = []
    close = Stream.close

    def recorded(stream: Stream) -> None:
        closers.append(threading.current_thread())
        close(stream)

    monkeypatch.setattr(Stream, "close", recorded)

    async def first() -> str:
        async with contextlib.aclosing(runner.astream(PROMPT, **LONG)) as pieces:
            return await anext(pieces)

    assert asyncio.run(first())
    assert len(closers) == 1
    assert closers[0] is not threading.current_thread()
    assert not runner._running


def test_astream_does_not_block_the_loop(runner: Runner) -> None:
    async def collect() -> tuple[str, int]:
        ticks = 0
        done = False

        async def tick() -> None:
            nonlocal ticks
            while not done:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        text = "".join([piece async for piece in runner.astream(PROMPT, temperature=0.0, max_new_tokens=60)])
        done = True
        await ticking
        return text, ticks

    text, ticks = asyncio.run(collect())
    assert text == runner.generate(PROMPT, temperature=0.0, max_new_tokens=60).text
    assert ticks > 10


def test_the_gil_is_free_while_the_model_runs(runner: Runner) -> None:
    counted = 0
    during = 0
    done = threading.Event()

    def count() -> None:
        nonlocal counted
        while not done.is_set():
            counted += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = counted
        # No text comes out of a long prompt: nothing but the model runs, in one call.
        runner.generate([100] * (runner.max_seq_len - 1), max_new_tokens=1, temperature=0.0)
        during = counted - before
    finally:
        done.set()
        thread.join()
    assert during > 10


def test_cancel_from_another_thread(runner: Runner) -> None:
    answers: list[Generation] = []
    started = threading.Event()

    def work() -> None:
        answers.append(runner.generate(PROMPT, on_piece=lambda _: started.set(), **LONG))

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(30)
    runner.cancel()
    thread.join(30)
    assert [answer.finish_reason for answer in answers] == ["cancelled"]
    assert 0 < len(answers[0].tokens) < LONG["max_new_tokens"]


def test_answers_at_the_same_time_are_those_of_each_alone(runner: Runner) -> None:
    prompts = [PROMPT, "It is a truth", "She was"][: _slots(runner)]
    options = {"temperature": 0.9, "seed": 11, "max_new_tokens": 60}
    alone = [runner.generate(prompt, **options).tokens for prompt in prompts]
    streams = [runner.stream(prompt, **options) for prompt in prompts]
    for stream in streams:
        list(stream)
    assert [stream.result.tokens for stream in streams if stream.result] == alone


def _slots(runner: Runner) -> int:
    engine = runner._engine
    assert engine is not None
    return engine.slots
