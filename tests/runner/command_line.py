"""Runs the program `qwen_runner`, found by QWEN_RUNNER_BIN, beside the running Python or on PATH."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BINARY = (
    os.environ.get("QWEN_RUNNER_BIN")
    or shutil.which("qwen_runner", path=Path(sys.executable).parent)
    or shutil.which("qwen_runner")
    or ""
)
needs_binary = pytest.mark.skipif(not BINARY, reason="no qwen_runner on PATH: pip install -e .")

PROMPT = "In the beginning"
GREEDY = ("--temperature", "0", "--ignore_eos")


def run(*args: str | Path | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([BINARY, *args], input=stdin, capture_output=True, timeout=120, check=False)


def start(*args: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([BINARY, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def refused(*args: str | Path | bytes, status: int = 2, stdin: bytes = b"") -> str:
    """The message of a command that must fail: one line on stderr, nothing on stdout."""
    result = run(*args, stdin=stdin)
    message = result.stderr.decode()
    assert result.returncode == status, message
    assert result.stdout == b""
    assert message.startswith("error: ")
    assert message.endswith("\n")
    assert message.count("\n") == 1
    return message


def answer(program: Path, *args: str | bytes, prompt: tuple[str | bytes, ...] = ("--prompt", PROMPT)) -> Any:
    """What `--json` prints."""
    result = run("--program", program, *prompt, *args, "--json")
    assert result.returncode == 0, result.stderr.decode()
    assert result.stderr == b""
    return json.loads(result.stdout)


@functools.cache
def greedy_answer(program: Path) -> Any:
    """48 greedy tokens after PROMPT."""
    return answer(program, *GREEDY, "--max_new_tokens", "48")


def read_manifest(program: Path) -> Any:
    return json.loads((program / "manifest.json").read_text(encoding="utf-8"))
