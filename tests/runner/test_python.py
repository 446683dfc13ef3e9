"""`Runner` and `generate()`: what a Python user sees."""

import inspect
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from command_line import greedy_answer
from qwen_runner import GenerateOptions, Generation, Runner, _core, generate
from qwen_runner import runner as runner_module

PROMPT = "In the beginning"


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


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (None, TypeError, "a prompt must be text or token ids, not None"),
        (["a"], TypeError, "a prompt must be text or token ids, not 'a'"),
        ([1, 1.5], TypeError, "a prompt must be text or token ids, not 1.5"),
        (np.ones((2, 90), int), TypeError, "a prompt must be text or token ids, not array("),
        ([-1], ValueError, "token id -1 is not in the vocabulary"),
        ([2**70], ValueError, f"token id {2**70} is not in the vocabulary"),
    ],
)
def test_what_is_no_prompt_is_named(
    runner: Runner, prompt: Any, error: type[Exception], message: str
) -> None:
    for ask in (runner.generate, runner.stream):
        with pytest.raises(error) as caught:
            ask(prompt)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


def test_token_ids_are_any_integers(runner: Runner) -> None:
    tokens = runner.tokenize(PROMPT)
    options = {"temperature": 0.0, "max_new_tokens": 5}
    expected = runner.generate(tokens, **options).tokens
    for prompt in (tuple(tokens), np.array(tokens, np.uint32), torch.tensor(tokens)):
        assert runner.generate(prompt, **options).tokens == expected
        assert runner.detokenize(prompt) == PROMPT
    with pytest.raises(TypeError, match="tokens must be token ids, not 'a'"):
        runner.detokenize(["a"])


def test_a_lone_surrogate_is_a_text_like_any_other(runner: Runner) -> None:
    answer = runner.generate(PROMPT, stop=["\ud800"], temperature=0.0, max_new_tokens=5)
    assert answer.tokens == runner.generate(PROMPT, temperature=0.0, max_new_tokens=5).tokens
    with pytest.raises(ValueError, match="temperature is"):
        runner.generate(PROMPT, temperature="\ud800")


def test_a_program_s_relative_path_holds_in_another_folder(
    demo_program: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(demo_program.parent)
    with Runner(demo_program.name) as runner:
        monkeypatch.chdir(tmp_path)
        assert runner.encode_chat([{"role": "user", "content": "Who is Emma?"}])


def test_a_closed_runner_says_so(demo_program: Path) -> None:
    runner = Runner(demo_program)
    runner.close()
    for ask in (runner.generate, runner.stream):
        with pytest.raises(ValueError, match="closed"):
            ask(PROMPT)


def test_a_missing_program_is_a_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        Runner(tmp_path / "nothing")


def test_the_answer_ends_at_the_end_of_the_slot(runner: Runner) -> None:
    prompt = [100] * (runner.max_seq_len - 3)
    answer = runner.generate(prompt, temperature=0.0, ignore_eos=True, max_new_tokens=50)
    # Three more positions, and the token after the last needs none.
    assert (len(answer.tokens), answer.finish_reason) == (4, "length")


def test_a_batch_gives_each_prompt_its_own_answer(runner: Runner) -> None:
    prompts = [PROMPT, b"She was", runner.tokenize("It is a truth")]
    each: list[GenerateOptions] = [
        {"temperature": 0.0},
        {"seed": 5, "max_new_tokens": 3, "logprobs": True},
        {"stop": " "},
    ]
    pieces = ["", "", ""]

    def on_piece(index: int, piece: str) -> None:
        pieces[index] += piece

    answers = runner.generate_batch(prompts, each=each, on_piece=on_piece, seed=9, max_new_tokens=12)
    for prompt, own, answer, text in zip(prompts, each, answers, pieces, strict=True):
        alone = runner.generate(prompt, **{"seed": 9, "max_new_tokens": 12, **own})
        assert (answer.text, answer.tokens, answer.finish_reason) == (text, alone.tokens, alone.finish_reason)
        assert answer.text == alone.text
        assert (answer.seed, answer.logprobs) == (alone.seed, alone.logprobs)
    assert runner.generate_batch([]) == []
    seeds = {answer.seed for answer in runner.generate_batch([PROMPT] * 3, temperature=1.0, max_new_tokens=1)}
    assert len(seeds) == 3


def test_what_is_wrong_with_a_batch_is_named(runner: Runner) -> None:
    with pytest.raises(ValueError, match="each has options for 1 prompts, there are 2"):
        runner.generate_batch([PROMPT, PROMPT], each=[{}])
    with pytest.raises(ValueError, match="prompt is empty"):
        runner.generate_batch([PROMPT, ""])
    with pytest.raises(ValueError, match="top_k is -1"):
        runner.generate_batch([PROMPT, PROMPT], each=[{}, {"top_k": -1}])
    with pytest.raises(TypeError, match=r"token ids, not 1\.5"):
        runner.generate_batch([PROMPT, [1.5]])  # type: ignore[list-item]
    with pytest.raises(ZeroDivisionError):
        runner.generate_batch([PROMPT, PROMPT], on_piece=lambda index, piece: print(1 / 0))
    assert not runner._running


def test_a_batch_is_cancelled_whole(runner: Runner) -> None:
    def on_piece(index: int, piece: str) -> None:
        if index == 1:
            runner.cancel()

    reasons = [
        answer.finish_reason
        for answer in runner.generate_batch(
            [PROMPT] * 3, temperature=0.0, ignore_eos=True, max_new_tokens=9, on_piece=on_piece
        )
    ]
    assert reasons == ["length", "cancelled", "cancelled"]


def test_public_names_have_docstrings() -> None:
    for name in ("Runner", "Stream", "generate"):
        assert inspect.getdoc(getattr(runner_module, name))
    for name, member in inspect.getmembers(Runner, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.getdoc(member), name
