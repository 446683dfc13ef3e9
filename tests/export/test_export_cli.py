"""The export's command line: usage, and failures that a user can act on, each one line on stderr."""

import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from qwen_runner.export import ExportError, export_program, program
from qwen_runner.export.__main__ import FAILURE, USAGE, main
from qwen_runner.export.checkpoint import Checkpoint
from qwen_runner.export.compile import compile_method
from torch import nn

Checkpoints = Callable[[str], Path]


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status and the one line on stderr."""
    try:
        status = main(arguments)
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("[")]
    assert captured.out == ""
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return status, lines[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--output"),
        (["--output", "program"], "the folder of a checkpoint or of a program, or else --random NAME"),
        (["model", "--output", "program", "--random", "qwen3.5-35b-a3b"], "or else --random NAME"),
        (["model"], "--output"),
        (["model", "--output", "program", "--quantise", "int4"], "--quantise"),
        (["model", "--output", "program", "--quantize", "int3"], "--quantize int3"),
        (["model", "--output", "program", "--target", "tpu"], "--target tpu"),
        (["model", "--output", "program", "--target", "cuda", "--quantize", "none"], "--quantize none"),
        (["model", "--output", "program", "--dtype", "float16"], "--dtype float16"),
        (["model", "--output", "program", "--group-size", "33"], "--group-size 33"),
        (["model", "--output", "program", "--slots", "0"], "--slots 0"),
        (["model", "--output", "program", "--chunk", "many"], "--chunk"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, line = error_of(arguments, capsys)
    assert status == USAGE
    assert named in line


def test_what_is_wrong_with_a_checkpoint_is_named_and_nothing_is_written(
    tmp_path: Path, random_checkpoint: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "program"
    bad = tmp_path / "bad"
    shutil.copytree(random_checkpoint("interval"), bad)
    for path, named in ((tmp_path / "nowhere", "nowhere"), (bad, "tokenizer.json"), (bad, "config.json")):
        if path == bad:
            (bad / named).write_text("{")
        status, line = error_of([str(path), "--output", str(output)], capsys)
        assert status == FAILURE
        assert named in line
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b'{"chat_template": [{"x": 1}]}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": 1}]}'),
        ("tokenizer_config.json", b'{"chat_template": ["default"]}'),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": "\\ud800"}'),
        ("chat_template.jinja", b"\xff"),
        ("tokenizer.json", b'{"added_tokens": [1]}'),
        ("tokenizer.json", b'{"added_tokens": [{}]}'),
        ("tokenizer.json", b'{"model": {"type": "Unigram"}}'),
    ],
)
def test_a_bad_side_file_is_found_before_any_weight_is_read(
    file: str,
    content: bytes,
    tmp_path: Path,
    random_checkpoint: Checkpoints,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(random_checkpoint("interval"), bad)
    (bad / "chat_template.jinja").unlink(missing_ok=True)
    (bad / file).write_bytes(content)
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("weights are read"))
    status, line = error_of([str(bad), "--output", str(tmp_path / "program")], capsys)
    assert status == FAILURE
    assert str(bad / file) in line
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_options_that_do_not_fit_the_model_are_failures(
    tmp_path: Path, random_checkpoint: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(random_checkpoint("interval")), "--output", str(tmp_path / "program"), "--chunk", "600"]
    status, line = error_of(arguments, capsys)
    assert status == FAILURE
    assert "--chunk 600" in line


def test_hyphens_and_underscores_are_both_accepted(
    tmp_path: Path, random_checkpoint: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--max-seq-len", "--max_seq_len"):
        arguments = [str(random_checkpoint("interval")), "--output", str(tmp_path / "program"), flag, "1000"]
        assert "--max-seq-len 1000" in error_of(arguments, capsys)[1]


@pytest.mark.parametrize("content", ["a file", "a foreign folder", "a program with more in it"])
def test_only_a_program_is_replaced(
    content: str, tmp_path: Path, random_checkpoint: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "program"
    if content == "a file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "thesis.tex").write_text("mine")
        if content == "a program with more in it":
            manifest = '{"format_version": 1, "files": {"model.pte": {}}}'
            (output / "manifest.json").write_text(manifest)
    status, line = error_of([str(random_checkpoint("interval")), "--output", str(output)], capsys)
    assert status == FAILURE
    assert str(output) in line
    mine = output if output.is_file() else output / "thesis.tex"
    assert mine.read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, random_checkpoint: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "program"
    status, line = error_of([str(random_checkpoint("interval")), "--output", str(output)], capsys)
    assert status == FAILURE
    assert str(tmp_path / "file") in line


def test_a_missing_compiler_is_named(
    tmp_path: Path,
    random_checkpoint: Checkpoints,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    status, line = error_of(
        [str(random_checkpoint("interval")), "--output", str(tmp_path / "program")], capsys
    )
    assert status == FAILURE
    assert "no-such-compiler" in line


@pytest.fixture
def small_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method of one operator stands for the model: its compilation is Inductor's own."""

    def lower(*_: object, **__: object) -> None:
        compile_method("prefill", torch.export.export(nn.Softmax(0), (torch.randn(16),)))
        pytest.fail("it compiled")

    monkeypatch.setattr(program, "lower", lower)


def test_a_compiler_that_fails_is_one_line(
    tmp_path: Path,
    random_checkpoint: Checkpoints,
    small_lowering: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then exec g++ --version; fi\n'
        "echo In the file:\necho 'x.cpp:1: fatal error: no such header' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    arguments = [str(random_checkpoint("interval")), "--output", str(tmp_path / "program")]
    # Inductor has read CXX by now.
    with torch._inductor.config.patch({"cpp.cxx": (None, str(compiler))}):
        status, line = error_of([*arguments, "--quantize", "none"], capsys)
    assert status == FAILURE
    assert line == "error: prefill: the compiler failed: x.cpp:1: fatal error: no such header"
    assert [path.name for path in tmp_path.iterdir()] == ["g++"]


def test_a_disk_that_fills_up_in_inductor_is_the_systems_error(
    tmp_path: Path, random_checkpoint: Checkpoints, small_lowering: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file may be longer than 500 bytes; the generated code is."""
    lower = program.lower
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments: object, **options: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        try:
            lower(*arguments, **options)  # type: ignore[arg-type]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "lower", limited)
        arguments = [str(random_checkpoint("interval")), "--output", str(tmp_path / "program")]
        status, line = error_of([*arguments, "--quantize", "none"], capsys)
    assert status == FAILURE
    assert "File too large; nothing was changed" in line
    assert not list(tmp_path.iterdir())


def test_the_function_refuses_an_unknown_keyword(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="qantize: no such option"):
        export_program(tmp_path, tmp_path / "program", qantize="int4")


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), "the GPU has no memory left"),
        (
            torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors"),
            "the GPU has no memory left",
        ),
        (MemoryError(), "this machine has no memory left"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "this machine has no memory left",
        ),
    ],
)
def test_memory_that_runs_out_is_one_line(
    error: Exception,
    named: str,
    tmp_path: Path,
    random_checkpoint: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(program, "lower", run_out)
    status, line = error_of(
        [str(random_checkpoint("interval")), "--output", str(tmp_path / "program")], capsys
    )
    assert status == FAILURE
    assert named in line
    assert not list(tmp_path.iterdir())
