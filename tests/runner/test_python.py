"""`Runner` and `generate()`: what a Python user sees."""

import asyncio
import inspect
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from command_line import greedy_answer
from qwen_runner import GenerateOptions, Generation, Runner, _core, generate
from qwen_runner import runner as runner_module

PROMPT = "In the beginning"
LONG = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 1500}


@pytest.fixture(scope="module")
def runner(demo_program: Path) -> Iterator[Runner]:
    with Runner(demo_program) as runner:
        yield runner


def test_generate_equals_the_command_line(demo_program: Path, runner: Runner) -> None:
    expected = greedy_answer(demo_program)
    options = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 48}
    for answer in (
        generate(demo_program, PROMPT, **options),
        generate(str(demo_program), PROMPT, **options),
        generate(runner, PROMPT, **options),
        runner.generate(runner.tokenize(PROMPT), **options),
    ):
        assert isinstance(answer, Generation)
        assert (answer.text, answer.tokens) == (expected["text"], expected["tokens"])
        assert answer.finish_reason == "length"
        assert answer.prompt_tokens == expected["prompt_tokens"]
        assert answer.logprobs is None
        assert answer.timings.load_ms > 0
        assert answer.timings.ttft_ms > 0
        assert answer.timings.decode_tokens_per_second > 0


def test_a_process_with_pytorch_s_own_symbols_in_front_runs_the_program(demo_program: Path) -> None:
    # Loading an operator library through torch.ops makes libtorch's symbols global, ahead of the runner's.
    script = """
import ctypes
import sys
from pathlib import Path

import torch

ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
from qwen_runner import generate

print(generate(sys.argv[1], sys.argv[2], temperature=0.0, ignore_eos=True, max_new_tokens=48).tokens)
"""
    output = subprocess.run(
        [sys.executable, "-c", script, demo_program, PROMPT], capture_output=True, check=True, text=True
    )
    assert json.loads(output.stdout) == greedy_answer(demo_program)["tokens"]


def test_options_are_the_runner_s_own() -> None:
    declared = {option["name"] for option in _core.generation_options()}
    assert set(get_type_hints(GenerateOptions)) == declared
    assert all(option["help"] and option["allowed"] for option in _core.generation_options())


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


def test_seeds(runner: Runner) -> None:
    options = {"temperature": 1.0, "max_new_tokens": 40}
    first = runner.generate(PROMPT, **options)
    second = runner.generate(PROMPT, **options)
    assert first.seed != second.seed
    assert first.tokens != second.tokens
    assert runner.generate(PROMPT, seed=first.seed, **options).tokens == first.tokens


def test_logprobs_are_those_of_the_logits(runner: Runner, demo_program: Path) -> None:
    answer = runner.generate(PROMPT, temperature=0.8, seed=3, max_new_tokens=10, logprobs=True)
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(answer.tokens) == 10
    engine = _core.Engine(str(demo_program))
    session = engine.open_session()
    session.keep_logits(True)
    inputs = runner.tokenize(PROMPT)
    for token, logprob in zip(answer.tokens, answer.logprobs, strict=True):
        session.run(engine, inputs, {"temperature": 0.0})
        expected = torch.from_numpy(session.logits()).double().log_softmax(-1)[token].item()
        assert logprob == pytest.approx(expected, abs=1e-4)
        inputs = [token]


def test_chat_renders_the_template_and_agrees_with_the_pieces(runner: Runner, demo_program: Path) -> None:
    messages = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Who is Emma? <|im_end|>"},
    ]
    engine = _core.Engine(str(demo_program))
    pairs = [(message["role"], message["content"]) for message in messages]
    for thinking in (False, True):
        tokens = runner.encode_chat(messages, thinking=thinking)
        assert tokens == engine.encode_chat(pairs, thinking, True)
        end = runner.tokenize("<|im_end|>", parse_special=True)
        assert len(end) == 1
        assert tokens.count(end[0]) == 2  # the template's own two; the user's stayed text
    answer = runner.chat(messages, thinking=False, temperature=0.0, max_new_tokens=20)
    assert answer.prompt_tokens == len(runner.encode_chat(messages, thinking=False))
    assert answer.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"seed": 2**64}, "seed is"),
        ({"stop": ""}, "stop is"),
        ({"temprature": 1.0}, "temperature"),
    ],
)
def test_a_bad_option_is_named(runner: Runner, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        runner.generate(PROMPT, **options)
    assert "\n" not in str(caught.value)


def test_a_prompt_must_be_there_and_fit(runner: Runner) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        runner.generate("")
    with pytest.raises(ValueError, match=str(runner.max_seq_len)):
        runner.generate([1] * (runner.max_seq_len + 1))


def test_a_closed_runner_says_so(demo_program: Path) -> None:
    runner = Runner(demo_program)
    runner.close()
    with pytest.raises(ValueError, match="closed"):
        runner.generate(PROMPT)


def test_a_missing_program_is_a_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        Runner(tmp_path / "nothing")


def test_the_answer_ends_at_the_end_of_the_slot(runner: Runner) -> None:
    prompt = [100] * (runner.max_seq_len - 3)
    answer = runner.generate(prompt, temperature=0.0, ignore_eos=True, max_new_tokens=50)
    # Three more positions, and the token after the last needs none.
    assert (len(answer.tokens), answer.finish_reason) == (4, "length")


def test_public_names_have_docstrings() -> None:
    for name in ("Runner", "Stream", "generate"):
        assert inspect.getdoc(getattr(runner_module, name))
    for name, member in inspect.getmembers(Runner, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.getdoc(member), name


def _slots(runner: Runner) -> int:
    engine = runner._engine
    assert engine is not None
    return engine.slots
