"""`qwen_runner inspect`, `bench`, `--version` and `--help`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from command_line import (
    needs_binary,
    read_manifest,
    refused,
    run,
)

pytestmark = needs_binary

ROOT = Path(__file__).resolve().parents[2]


def test_inspect_describes_the_program(demo_program: Path) -> None:
    values = read_manifest(demo_program)
    result = run("inspect", "--json", demo_program)
    assert result.returncode == 0, result.stderr.decode()
    described = json.loads(result.stdout)
    for key in ("name", "format_version", "dtype", "quantization", "max_seq_len", "chunk", "slots", "model"):
        assert described[key] == values[key]
    assert described["batch"] == values.get("batch", 1)
    assert described["files"] == {name: entry["size"] for name, entry in values["files"].items()}
    assert described["total_bytes"] == sum(entry["size"] for entry in values["files"].values())
    assert described["defaults"]["temperature"] == values["sampling"]["temperature"]
    table = run("inspect", "--program", demo_program)
    assert table.returncode == 0
    assert table.stderr == b""
    for text in (values["name"], "model.ptd", str(values["max_seq_len"]), "num_hidden_layers"):
        assert text in table.stdout.decode()


def test_bench_measures(demo_program: Path) -> None:
    flags = ("--prompt_tokens", "12", "--new-tokens", "4", "--repetitions", "3")
    result = run("bench", demo_program, *flags, "--json")
    assert result.returncode == 0, result.stderr.decode()
    report = json.loads(result.stdout)
    assert (report["prompt_tokens"], report["new_tokens"], report["repetitions"]) == (12, 4, 3)
    for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "ttft_ms"):
        values = report[key]["values"]
        assert len(values) == 3
        assert min(values) > 0
        mean = sum(values) / 3
        assert report[key]["mean"] == pytest.approx(mean)
        assert report[key]["deviation"] == pytest.approx((sum((v - mean) ** 2 for v in values) / 2) ** 0.5)
    assert report["load_ms"] > 0
    assert report["memory"]["weight_bytes"] > 0
    table = run("bench", demo_program, *flags).stdout.decode()
    for text in ("mean", "deviation", "prefill", "decode", "first token", "tok/s", "peak memory", "MiB"):
        assert text in table


def test_bench_s_batch_must_fit(demo_program: Path) -> None:
    assert "--batch 2 is more than the 1" in refused("bench", demo_program, "--batch", "2")
    assert '--batch is "0"' in refused("bench", demo_program, "--batch", "0")
    flags = ("--prompt_tokens", "12", "--new-tokens", "4", "--repetitions", "1", "--batch", "1")
    report = json.loads(run("bench", demo_program, *flags, "--json").stdout)
    assert report["batch"] == 1
    assert "decode_tokens_per_second_in_sum" not in report


def test_bench_lengths_must_fit(demo_program: Path) -> None:
    most = read_manifest(demo_program)["max_seq_len"]
    message = refused("bench", demo_program, "--prompt_tokens", str(most), "--new_tokens", "1")
    assert str(most) in message
    default = json.loads(run("bench", demo_program, "--repetitions", "1", "--json").stdout)
    assert default["prompt_tokens"] + default["new_tokens"] <= most


def test_version_and_help() -> None:
    version = run("--version")
    assert version.returncode == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert version.stdout.decode() == f"qwen_runner {project['version']}\n"
    help_text = run("--help")
    assert help_text.returncode == 0
    assert help_text.stderr == b""
    from qwen_runner import _core

    flags = [option["name"] for option in _core.generation_options()]
    for flag in [*flags, "program", "prompt", "prompt_file", "prompt_ids", "chat", "system", "json", "quiet"]:
        assert f"--{flag}" in help_text.stdout.decode()
    for command in ("inspect", "bench"):
        assert b"--json" in run(command, "--help").stdout
