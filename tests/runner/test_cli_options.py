"""The generation flags of `qwen_runner`: each one does what its help says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import (
    GREEDY,
    PROMPT,
    answer,
    greedy_answer,
    needs_binary,
    read_manifest,
    run,
)
from program_copy import with_manifest

pytestmark = needs_binary

SAMPLED = ("--temperature", "1.5", "--top_k", "0", "--top_p", "1", "--ignore_eos", "--max_new_tokens", "24")


@pytest.fixture(scope="module")
def greedy(demo_program: Path) -> Any:
    return greedy_answer(demo_program)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_max_new_tokens(demo_program: Path, greedy: Any, count: int) -> None:
    result = answer(demo_program, *GREEDY, "--max_new_tokens", str(count))
    assert result["tokens"] == greedy["tokens"][:count]
    assert result["finish_reason"] == "length"


def test_the_slot_ends_the_answer(demo_program: Path) -> None:
    most = read_manifest(demo_program)["max_seq_len"]
    for room in (0, 3):
        ids = ",".join(["5"] * (most - room))
        result = answer(demo_program, *GREEDY, "--max_new_tokens", "100", prompt=("--prompt_ids", ids))
        # The last token needs no place, as it is not run.
        assert len(result["tokens"]) == room + 1
        assert result["finish_reason"] == "length"


def test_same_seed_same_text_and_without_a_seed_it_is_told(demo_program: Path) -> None:
    first = answer(demo_program, *SAMPLED, "--seed", "7")
    assert first["seed"] == 7
    assert answer(demo_program, *SAMPLED, "--seed", "7")["tokens"] == first["tokens"]
    assert answer(demo_program, *SAMPLED, "--seed", "8")["tokens"] != first["tokens"]
    unseeded = answer(demo_program, *SAMPLED)
    assert answer(demo_program, *SAMPLED, "--seed", str(unseeded["seed"]))["tokens"] == unseeded["tokens"]
    assert answer(demo_program, *SAMPLED)["seed"] != unseeded["seed"]


@pytest.mark.parametrize("only_one_left", [("--top_k", "1"), ("--top_p", "1e-6"), ("--min_p", "1")])
def test_filters_that_leave_one_token_are_greedy(demo_program: Path, greedy: Any, only_one_left: Any) -> None:
    assert answer(demo_program, *SAMPLED, *only_one_left)["tokens"] == greedy["tokens"][:24]


def test_penalties_change_repeating_text(demo_program: Path, greedy: Any) -> None:
    flags = (*GREEDY, "--max_new_tokens", "48")
    assert len(set(greedy["tokens"])) < 48
    distinct = answer(demo_program, *flags, "--presence_penalty", "100")["tokens"]
    assert len(set(distinct)) == 48
    assert answer(demo_program, *flags, "--repetition_penalty", "3")["tokens"] != greedy["tokens"]


def test_stop_ends_the_text_before_the_first_match(demo_program: Path, greedy: Any) -> None:
    text = greedy["text"]
    late, early = text[40:46], text[20:26]
    for stops in ((early,), (late, early)):
        flags = [part for stop in stops for part in ("--stop", stop)]
        result = answer(demo_program, *GREEDY, "--max_new_tokens", "48", *flags)
        assert result["text"] == text[: text.index(early)]
        assert result["finish_reason"] == "stop"
        assert result["tokens"] == greedy["tokens"][: len(result["tokens"])]
    streamed = run("--program", demo_program, "--prompt", PROMPT, *GREEDY, "--stop", early, "--quiet")
    assert streamed.stdout.decode() == text[: text.index(early)]


def test_eos_ends_the_answer_unless_ignored(demo_program: Path, tmp_path: Path, greedy: Any) -> None:
    eos = greedy["tokens"][10]
    before = greedy["tokens"].index(eos)

    def edit(values: dict[str, Any]) -> None:
        values["eos_token_ids"] = [eos]

    program = with_manifest(demo_program, tmp_path / "program", edit)
    result = answer(program, "--temperature", "0", "--max_new_tokens", "48")
    assert result["tokens"] == greedy["tokens"][:before]
    assert result["finish_reason"] == "stop"
    ignored = answer(program, *GREEDY, "--max_new_tokens", "48")
    assert ignored["tokens"] == greedy["tokens"]
    assert ignored["finish_reason"] == "length"


def test_echo_begins_with_the_prompt(demo_program: Path, greedy: Any) -> None:
    flags = (*GREEDY, "--max_new_tokens", "48", "--echo")
    assert answer(demo_program, *flags)["text"] == PROMPT + greedy["text"]
    streamed = run("--program", demo_program, "--prompt", PROMPT, *flags, "--quiet")
    assert streamed.stdout.decode() == PROMPT + greedy["text"]


def test_defaults_are_the_programs_and_a_flag_wins(demo_program: Path, tmp_path: Path, greedy: Any) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["sampling"].update(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)

    program = with_manifest(demo_program, tmp_path / "program", edit)
    flags = ("--ignore_eos", "--max_new_tokens", "24", "--seed", "3")
    assert answer(program, *flags)["tokens"] == answer(demo_program, *SAMPLED, "--seed", "3")["tokens"]
    assert answer(program, *flags, "--temperature", "0")["tokens"] == greedy["tokens"][:24]


@pytest.mark.parametrize(
    ("flag", "warns"),
    [
        ("--cuda_graph", True),
        ("--cuda-graph=on", True),
        ("--cuda_graph=off", False),
        ("--expert_activations=int8", True),
        ("--expert-activations=bfloat16", False),
    ],
)
def test_what_a_gpu_alone_has_is_a_warning_on_a_cpu_program(
    demo_program: Path, greedy: Any, flag: str, warns: bool
) -> None:
    flags = ("--program", demo_program, "--prompt", PROMPT, *GREEDY, "--max_new_tokens", "48", flag)
    result = run(*flags)
    assert result.returncode == 0
    assert result.stdout.decode() == greedy["text"]
    lines = result.stderr.decode().splitlines()
    assert len(lines) == 1 + warns
    option = flag.partition("=")[0].replace("-", "_").replace("__", "--", 1)
    assert lines[0].startswith(f"warning: {option} has no effect") == warns
    assert run(*flags, "--quiet").stderr == b""
