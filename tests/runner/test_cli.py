"""What `qwen_runner` prints and reads, and how it ends before its answer does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import (
    BINARY,
    GREEDY,
    PROMPT,
    answer,
    greedy_answer,
    needs_binary,
    run,
    start,
)
from tokenizers import Tokenizer

pytestmark = needs_binary


@pytest.fixture(scope="module")
def tokenizer(demo_program: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_program / "tokenizer.json"))


@pytest.fixture(scope="module")
def greedy(demo_program: Path) -> Any:
    return greedy_answer(demo_program)


def test_the_answer_alone_is_on_stdout_and_one_line_of_statistics_on_stderr(
    demo_program: Path, greedy: Any
) -> None:
    result = run("--program", demo_program, "--prompt", PROMPT, *GREEDY, "--max_new_tokens", "48")
    assert result.returncode == 0
    assert result.stdout.decode() == greedy["text"]
    line = result.stderr.decode()
    assert line.count("\n") == 1
    number = r"\d+(\.\d+)?"
    assert re.fullmatch(
        rf"prompt {greedy['prompt_tokens']} tokens, answer 48 tokens \(length\), first token {number} ms, "
        rf"prefill {number} tok/s, decode {number} tok/s, load {number} ms, peak memory {number} MiB\n",
        line,
    ), line


def test_json_is_one_object_of_the_documented_keys(demo_program: Path, tokenizer: Tokenizer) -> None:
    result = answer(demo_program, *GREEDY, "--max_new_tokens", "5", "--logprobs")
    assert result.keys() == {
        "text", "tokens", "prompt_tokens", "finish_reason", "seed", "timings", "memory", "logprobs"
    }  # fmt: skip
    assert result["text"] == tokenizer.decode(result["tokens"])
    assert len(result["tokens"]) == len(result["logprobs"]) == 5
    assert all(-100 < value <= 0 for value in result["logprobs"])
    assert result["prompt_tokens"] == len(tokenizer.encode(PROMPT, add_special_tokens=False).ids)
    assert result["finish_reason"] == "length"
    assert result["timings"].keys() == {
        "load_ms", "ttft_ms", "prefill_tokens_per_second", "decode_tokens_per_second"
    }  # fmt: skip
    assert all(value > 0 for value in result["timings"].values())
    memory = result["memory"]
    assert memory.keys() == {"peak_resident_bytes", "resident_bytes", "weight_bytes", "state_bytes"}
    assert 0 < memory["weight_bytes"] < memory["peak_resident_bytes"]
    assert 0 < memory["resident_bytes"] <= memory["peak_resident_bytes"]
    assert memory["state_bytes"] > 0


def test_quiet_leaves_stderr_empty(demo_program: Path) -> None:
    result = run("--program", demo_program, "--prompt", PROMPT, "--quiet", "--max_new_tokens", "3")
    assert result.returncode == 0
    assert result.stdout
    assert result.stderr == b""


def test_hyphens_and_underscores_are_the_same(demo_program: Path, greedy: Any) -> None:
    flags = ("--temperature", "0", "--ignore-eos", "--max-new-tokens", "48", "--repetition-penalty=1")
    assert answer(demo_program, *flags)["tokens"] == greedy["tokens"]


def test_of_a_flag_given_twice_the_last_counts(demo_program: Path, greedy: Any) -> None:
    result = answer(
        demo_program, *GREEDY, "--max_new_tokens", "9", "--max-new-tokens", "2", "--echo", "--echo=off"
    )
    assert result["tokens"] == greedy["tokens"][:2]
    assert result["text"] == answer(demo_program, *GREEDY, "--max_new_tokens", "2")["text"]


@pytest.mark.skipif(not Path("/proc/self/exe").exists(), reason="ldd is Linux's")
def test_no_libtorch_is_linked() -> None:
    libraries = subprocess.run(["ldd", BINARY], capture_output=True, text=True, check=True).stdout
    assert "libqwen_runner" in libraries
    assert not re.search(r"libtorch|libc10|not found", libraries), libraries


def wait_until(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "it ended first"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def catches_sigint(process: subprocess.Popen[bytes]) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGINT - 1) & 1)


@pytest.mark.parametrize("as_json", [False, True])
def test_interrupt_ends_the_answer_cleanly(demo_program: Path, as_json: bool) -> None:
    flags = ["--program", demo_program, "--prompt", PROMPT, *GREEDY, "--max_new_tokens", "1000000"]
    process = start(*flags, *(["--json"] if as_json else []))
    wait_until(process, lambda: catches_sigint(process))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    if as_json:
        assert json.loads(out)["finish_reason"] == "cancelled"
        assert err == b""
    else:
        assert err.count(b"\n") == 1
        assert b"(cancelled)" in err


def test_a_second_interrupt_ends_the_process(demo_program: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    # Full, so that writing the echo waits for ever and the first interrupt cannot end the answer.
    command = [BINARY, "--program", str(demo_program), "--prompt", PROMPT, "--echo"]
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.DEVNULL)
    wait_until(process, lambda: catches_sigint(process))
    process.send_signal(signal.SIGINT)
    wait_until(process, lambda: not catches_sigint(process))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT
    os.close(reader)
    os.close(writer)


def test_a_reader_that_leaves_is_no_failure(demo_program: Path) -> None:
    process = start("--program", demo_program, "--prompt", PROMPT, *GREEDY, "--max_new_tokens", "1000000")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_full_disk_is_a_failure(demo_program: Path, flags: tuple[str, ...]) -> None:
    command = [BINARY, "--program", str(demo_program), "--prompt", PROMPT, "--max_new_tokens", "2", *flags]
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=120, check=False)
    assert result.returncode == 1
    assert result.stderr == b"error: cannot write to standard output: No space left on device\n"
