"""Bad input gives `qwen_runner` one line on stderr that names it, and status 2 (usage) or 1 (failure)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import (
    needs_binary,
    read_manifest,
    refused,
    run,
)
from program_copy import with_manifest

pytestmark = needs_binary


USAGE_ERRORS = {
    "no program": ((), "--program", "qwen_runner.export"),
    "no prompt": (("--program", "x"), "--prompt", "stdin"),
    "two prompts": (("--program", "x", "--prompt", "a", "--prompt_ids", "1"), "only one"),
    "empty prompt": (("--program", "x", "--prompt", ""), "prompt is empty"),
    "empty ids": (("--program", "x", "--prompt_ids", ""), "prompt is empty"),
    "empty stdin": (("--program", "x", "--prompt_file", "-"), "prompt is empty"),
    "bad id": (("--program", "x", "--prompt_ids", "1,two"), '"two"'),
    "negative id": (("--program", "x", "--prompt_ids", "1,-2"), '"-2"'),
    "ids as chat": (("--program", "x", "--prompt_ids", "1", "--chat"), "--chat"),
    "system without chat": (("--program", "x", "--prompt", "a", "--system", "s"), "--chat"),
    "thinking without chat": (("--program", "x", "--prompt", "a", "--thinking=off"), "--chat"),
    "bad switch": (("--program", "x", "--prompt", "a", "--chat=perhaps"), "perhaps", "on or off"),
    "unknown flag": (("--prompt", "a", "--temprature", "1"), "--temprature", "--temperature?"),
    "unknown flag with value": (("--prompt", "a", "--max-tokens=3"), "--max-tokens", "--max_new_tokens?"),
    "unknown short flag": (("-p", "hello"), "-p", "--help"),
    "stray word": (("hello",), '"hello"', "--prompt"),
    "missing value": (("--program", "x", "--prompt", "a", "--top_k"), "--top_k", "--help"),
    "temperature below 0": (("--prompt", "a", "--temperature", "-0.5"), "temperature", "-0.5", "from 0"),
    "temperature not a number": (("--prompt", "a", "--temperature", "nan"), "temperature", "nan"),
    "temperature a word": (("--prompt", "a", "--temperature", "hot"), "temperature", "hot"),
    "top_p above 1": (("--prompt", "a", "--top_p", "1.5"), "top_p", "1.5", "at most 1"),
    "top_p 0": (("--prompt", "a", "--top-p", "0"), "top_p", "above 0"),
    "min_p above 1": (("--prompt", "a", "--min_p", "2"), "min_p", "from 0 to 1"),
    "top_k below 0": (("--prompt", "a", "--top_k", "-1"), "top_k", "-1"),
    "top_k a fraction": (("--prompt", "a", "--top_k", "1.5"), "top_k", "1.5"),
    "repetition_penalty 0": (("--prompt", "a", "--repetition_penalty", "0"), "repetition_penalty", "0.01"),
    "presence_penalty infinite": (("--prompt", "a", "--presence_penalty", "inf"), "presence_penalty", "inf"),
    "max_new_tokens below 0": (("--prompt", "a", "--max_new_tokens", "-1"), "max_new_tokens", "at least 0"),
    "seed too large": (("--prompt", "a", "--seed", "9223372036854775808"), "seed", "2^63-1"),
    "seed below 0": (("--prompt", "a", "--seed", "-1"), "seed", "-1"),
    "empty stop": (("--prompt", "a", "--stop", ""), "stop", "not empty"),
    "logprobs as text": (("--program", "x", "--prompt", "a", "--logprobs"), "--logprobs", "--json"),
    "bad cuda_graph": (("--prompt", "a", "--cuda_graph=maybe"), "--cuda_graph", "maybe"),
    "bad expert_activations": (
        ("--prompt", "a", "--expert_activations=int4"), "--expert_activations", "int4", "float8"
    ),
    "inspect nothing": (("inspect",), "--program", "qwen_runner.export"),
    "inspect unknown flag": (("inspect", "x", "--jsn"), "--jsn", "--json?"),
    "inspect stray word": (("inspect", "x", "y"), '"y"', "inspect --help"),
    "bench nothing": (("bench",), "--program"),
    "bench no repetitions": (("bench", "x", "--repetitions", "0"), "--repetitions", "at least 1"),
    "bench a word": (("bench", "x", "--new_tokens", "many"), "--new_tokens", "many"),
}  # fmt: skip


@pytest.mark.parametrize("case", USAGE_ERRORS.values(), ids=USAGE_ERRORS.keys())
def test_usage_errors(case: tuple[Any, ...]) -> None:
    args, *expected = case
    message = refused(*args)
    for part in expected:
        assert part in message, message


def test_a_prompt_longer_than_the_slot(demo_program: Path) -> None:
    most = read_manifest(demo_program)["max_seq_len"]
    message = refused("--program", demo_program, "--prompt_ids", ",".join(["5"] * (most + 1)))
    assert str(most) in message
    assert str(most + 1) in message


def test_an_id_outside_the_vocabulary(demo_program: Path) -> None:
    vocabulary = read_manifest(demo_program)["vocab_size"]
    message = refused("--program", demo_program, "--prompt_ids", f"1,{vocabulary}")
    assert str(vocabulary) in message


def test_missing_and_foreign_folders(tmp_path: Path) -> None:
    for command in (("--prompt", "a", "--program"), ("inspect",), ("bench",)):
        assert "nowhere" in refused(*command, tmp_path / "nowhere", status=1)
        assert str(tmp_path) in refused(*command, tmp_path, status=1)
    assert "prompt.txt" in refused("--program", "x", "--prompt_file", tmp_path / "prompt.txt", status=1)
    assert "directory" in refused("--program", "x", "--prompt_file", tmp_path, status=1).lower()


def test_a_program_for_another_target(demo_program: Path, tmp_path: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["target"] = {"device": "cuda", "sm": "90"}

    program = with_manifest(demo_program, tmp_path / "program", edit)
    message = refused("--program", program, "--prompt", "a", status=1)
    assert "cuda" in message
    assert str(program) in message
    assert json.loads(run("inspect", program, "--json").stdout)["target"]["device"] == "cuda"


def test_another_format_version(demo_program: Path, tmp_path: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["format_version"] += 1

    program = with_manifest(demo_program, tmp_path / "program", edit)
    for command in (("--prompt", "a", "--program"), ("inspect",)):
        assert "export" in refused(*command, program, status=1)


def test_a_damaged_program(demo_program: Path, tmp_path: Path) -> None:
    program = Path(shutil.copytree(demo_program, tmp_path / "program"))
    with (program / "model.ptd").open("r+b") as file:
        file.truncate(1000)
    for command in (("--prompt", "a", "--program"), ("inspect",)):
        assert "model.ptd" in refused(*command, program, status=1)
