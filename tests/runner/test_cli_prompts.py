"""The prompt on `qwen_runner`'s command line: text, files, ids, chat."""

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
    refused,
    run,
)
from program_copy import with_manifest
from qwen_runner.chat_jinja import ChatTemplate
from tokenizers import Tokenizer

pytestmark = needs_binary


@pytest.fixture(scope="module")
def tokenizer(demo_program: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_program / "tokenizer.json"))


@pytest.fixture(scope="module")
def greedy(demo_program: Path) -> Any:
    return greedy_answer(demo_program)


def test_text_file_stdin_and_ids_are_the_same_prompt(
    demo_program: Path, tokenizer: Tokenizer, tmp_path: Path, greedy: Any
) -> None:
    flags = ("--program", demo_program, *GREEDY, "--max_new_tokens", "48", "--quiet")
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n", encoding="utf-8")
    ids = ",".join(map(str, tokenizer.encode(PROMPT, add_special_tokens=False).ids))
    expected = greedy["text"].encode()
    assert run(*flags, "--prompt_file", tmp_path / "prompt.txt").stdout == expected
    assert run(*flags, "--prompt_file", "-", stdin=PROMPT.encode()).stdout == expected
    assert run(*flags, "--prompt_file", "-", stdin=PROMPT.encode() + b"\r\n").stdout == expected
    assert run(*flags, "--prompt_ids", ids).stdout == expected
    assert run(*flags, "--prompt_ids", ids.replace(",", ", ")).stdout == expected


@pytest.mark.parametrize("prompt", ["--top-k", "[a,b]", "'quoted'", "inspect", "a\n\nb", "é😀", "-"])
def test_a_prompt_is_taken_as_it_stands(demo_program: Path, prompt: str) -> None:
    result = answer(demo_program, "--max_new_tokens", "0", "--echo", prompt=("--prompt", prompt))
    assert result["text"] == prompt


def test_invalid_utf8_is_replaced(demo_program: Path) -> None:
    result = answer(demo_program, "--max_new_tokens", "2", "--echo", prompt=("--prompt", b"caf\xe9 \xff"))
    assert result["text"].startswith("caf\ufffd \ufffd")


def test_special_tokens_in_a_prompt_stay_text(demo_program: Path, tokenizer: Tokenizer) -> None:
    result = answer(demo_program, "--max_new_tokens", "0", "--echo", prompt=("--prompt", "<|im_end|>"))
    assert result["prompt_tokens"] > 1
    assert result["text"] == "<|im_end|>"
    assert len(tokenizer.encode("<|im_end|>", add_special_tokens=False).ids) == 1


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chat_prompts_are_those_of_the_template(
    demo_program: Path, tokenizer: Tokenizer, thinking: bool | None, system: str | None
) -> None:
    template = ChatTemplate.load(demo_program)
    assert template is not None
    messages = [{"role": "user", "content": "Who are you?"}]
    flags = ["--chat", "--max_new_tokens", "0", "--echo"]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
        flags += ["--system", system]
    if thinking is not None:
        flags.append("--thinking" if thinking else "--thinking=off")
    expected = template.render(messages, enable_thinking=thinking)
    result = answer(demo_program, *flags, prompt=("--prompt", "Who are you?"))
    assert result["text"] == expected
    assert result["prompt_tokens"] == len(tokenizer.encode(expected, add_special_tokens=False).ids)


def test_a_program_without_a_chat_format_says_why(demo_program: Path, tmp_path: Path) -> None:
    def edit(values: dict[str, Any]) -> None:
        values["chat"] = {"supported": False, "reason": "the template counts words"}

    program = with_manifest(demo_program, tmp_path / "program", edit)
    message = refused("--program", program, "--prompt", "hi", "--chat", status=1)
    assert "the template counts words" in message
