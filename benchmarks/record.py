"""Measures the kernels and a program on this machine and adds a dated section to benchmarks/RESULTS.md.

    python benchmarks/record.py [--program DIR] [--only kernels|model] [--peers DIR] [OPTION ...]

The kernels are the CUDA ones where there is a GPU, else the CPU's. A program for cuda is measured at many
lengths, beside the peers' scripts in --peers, and its decode step and its prefill kernel by kernel; another
by one `qwen_runner bench`, which OPTIONs are for. The section says what everything ran on and which commands
they were. Of a command that fails, as the kernels' does when a result is wrong, it has what was printed and
why it failed, and the status is 1; nothing is added where no command printed anything. On a GPU the plots in
benchmarks/figures/ of what was measured are drawn anew.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MEBIBYTE = 1 << 20
# What the scripts write for plot.py.
MEASURED = ROOT / "build" / "bench"
FILES = ("kernels.json", "timeline.json", "prefill.json", "model.json")


def output_of(*command: str) -> str:
    """What a command prints; nothing if there is no such command or it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit() -> str:
    """The commit that is checked out, and whether tracked files differ from it."""
    name = output_of("git", "rev-parse", "--short=10", "HEAD") or "unknown"
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no")
    return name + (" with uncommitted changes" if changed else "")


def processor() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    name = found[1] if found else platform.machine()
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def conditions() -> str:
    """Card or processor, versions, commit, and how busy the machine is."""
    parts = []
    if torch.cuda.is_available():
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        compiler = re.search(r"release ([\d.]+)", output_of("nvcc", "--version"))
        parts.append(f"one {torch.cuda.get_device_name()}")
        parts.append(f"driver {driver[0] if driver else 'unknown'}")
        parts.append(f"CUDA {compiler[1]}" if compiler else f"PyTorch's CUDA {torch.version.cuda}")
    parts.append(processor())
    parts.append(f"Python {platform.python_version()}, torch {torch.__version__}")
    parts.append(f"executorch {importlib.metadata.version('executorch')}")
    parts.append(f"commit {commit()}")
    parts.append(f"load average before: {os.getloadavg()[0]:.1f}")
    return ", ".join(parts) + "."


def shown(command: list[str]) -> str:
    """A command as someone at the repository's root would type it."""
    program = "python" if command[0] == sys.executable else Path(command[0]).name
    return shlex.join([program, *(word.removeprefix(f"{ROOT}/") for word in command[1:])])


@dataclass(frozen=True)
class Output:
    """What a command printed."""

    command: list[str]
    text: str
    failure: str = ""  # why it failed, if it did

    def block(self) -> str:
        """A part of the section, the text as it is."""
        return f"`{shown(self.command)}`:\n\n```\n{self.text}```\n" if self.text else ""


def run(command: list[str]) -> Output:
    """Shows what `command` prints as it comes."""

    def forward(source: IO[str], target: IO[str], lines: list[str]) -> None:
        for line in source:
            print(line, end="", file=target, flush=True)
            lines.append(line)

    print("$ " + shlex.join(command), flush=True)
    text: list[str] = []
    errors: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        reader = threading.Thread(target=forward, args=(process.stderr, sys.stderr, errors))
        reader.start()
        forward(process.stdout, sys.stdout, text)
        reader.join()
    said = [line.strip() for line in errors if line.strip()] or ["it said nothing"]
    failure = f"status {process.returncode}, {said[-1]}" if process.returncode else ""
    return Output(command, "".join(text), failure)


def find_binary() -> str:
    beside = Path(sys.executable).parent / "qwen_runner"
    binary = str(beside) if beside.exists() else shutil.which("qwen_runner")
    if binary is None:
        sys.exit("qwen_runner is not installed: make run, or pip install .")
    return binary


def measured_by(script: str, *arguments: str, json_file: str = "") -> Output:
    """Of one of the scripts beside this one; where it writes its measurements is not part of the section."""
    command = [sys.executable, str(HERE / script), *arguments]
    output = run([*command, "--json", str(MEASURED / json_file)] if json_file else command)
    return replace(output, command=command)


def kernels() -> Output:
    cuda = torch.cuda.is_available() and importlib.util.find_spec("qwen_runner._cuda_kernels") is not None
    return measured_by("cuda_kernels.py", json_file="kernels.json") if cuda else measured_by("cpu_kernels.py")


def cuda_model(program: Path, peers: list[str]) -> list[tuple[Output, str]]:
    """What was run, and its part of the section."""
    times = measured_by("cuda_model.py", str(program), *peers, json_file="model.json")
    parts = [(times, f"`{shown(times.command)}`: {times.text}")]
    for script, json_file in (
        ("decode_timeline.py", "timeline.json"),
        ("prefill_timeline.py", "prefill.json"),
    ):
        timeline = measured_by(script, str(program), json_file=json_file)
        parts.append((timeline, timeline.block()))
    return parts


def model(program: Path, device: str, options: list[str], peers: list[str]) -> list[tuple[Output, str]]:
    """What was run, and its part of the section."""
    parts = cuda_model(program, peers) if device == "cuda" else []
    if options or not parts:
        command = [find_binary(), "bench", str(program), *options]
        output = replace(run([*command, "--json"]), command=command)
        text = f"`{shown(command)}`{model_table(json.loads(output.text))}" if not output.failure else ""
        parts.append((output, text))
    return parts


def draw() -> list[Output]:
    """Of what was measured now: what is not drawn anew stays."""
    files = [str(file) for name in FILES if (file := MEASURED / name).exists()]
    return [run([sys.executable, str(HERE / "plot.py"), *files])] if files else []


def model_table(report: dict[str, Any]) -> str:
    """The JSON of `qwen_runner bench` in words and a table."""
    quantization = report["quantization"]
    kind = quantization.get("scheme", "none")
    if "group_size" in quantization:
        kind += f" in groups of {quantization['group_size']}"
    lines = [
        f": {report['program']} for {report['device']}, {report['dtype']}, {kind}; "
        f"{report['prompt_tokens']} prompt tokens, {report['new_tokens']} new ones, "
        f"mean and deviation of {report['repetitions']} after one to warm up:",
        "",
        "| | |",
        "|---|---|",
    ]
    for name, field, unit in (
        ("prefill", "prefill_tokens_per_second", "tok/s"),
        ("first token", "ttft_ms", "ms"),
        ("decode", "decode_tokens_per_second", "tok/s"),
    ):
        if field in report:
            value = report[field]
            lines.append(f"| {name} | {value['mean']:.1f} ± {value['deviation']:.1f} {unit} |")
    memory = report["memory"]
    lines.append(f"| load | {report['load_ms']:.0f} ms |")
    lines.append(f"| peak resident memory | {memory['peak_resident_bytes'] / MEBIBYTE:.0f} MiB |")
    if "gpu" in report:
        gpu = report["gpu"]
        graph = f"{gpu['graph_nodes']} nodes" if gpu["cuda_graph"] else "off"
        lines.append(f"| GPU memory of the runner | {gpu['allocated_bytes'] / MEBIBYTE:.0f} MiB |")
        lines.append(f"| CUDA graph of a decode step | {graph} |")
    return "\n".join(lines) + "\n"


def insert(results: Path, section: str) -> None:
    """Puts the section before the others: the newest comes first."""
    text = results.read_text(encoding="utf-8")
    first = re.search(r"^## ", text, re.M)
    at = first.start() if first else len(text)
    results.write_text(text[:at] + section + "\n" + text[at:], encoding="utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--program", type=Path, default=Path("programs/demo"), help="folder of the program")
    parser.add_argument("--only", choices=("kernels", "model"), help="one of the two parts")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder of the peers' scripts")
    parser.add_argument(
        "--results", type=Path, default=HERE / "RESULTS.md", help="file to add the section to"
    )
    arguments, options = parser.parse_known_args()
    device = ""
    if arguments.only != "kernels":  # what is missing is said before anything is measured
        find_binary()
        manifest = json.loads((arguments.program / "manifest.json").read_text(encoding="utf-8"))
        device = manifest["target"]["device"]
    machine = conditions()
    MEASURED.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (MEASURED / name).unlink(missing_ok=True)
    peers = ["--peers", str(arguments.peers)] if arguments.peers else []
    parts: list[tuple[Output, str]] = []
    if arguments.only != "model":
        output = kernels()
        parts.append((output, output.block()))
    if arguments.only != "kernels":
        parts += model(arguments.program, device, options, peers)
    outputs = [output for output, _ in parts] + draw()
    failures = [f"`{shown(output.command)}`: {output.failure}" for output in outputs if output.failure]
    if not any(output.text for output, _ in parts):
        sys.exit(f"nothing was recorded; failed: {'; '.join(failures)}")
    what = {"kernels": "kernels", "model": arguments.program.name}.get(
        arguments.only, f"kernels and {arguments.program.name}"
    )
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    title = f"## {datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {what}, {where}"
    head = [title, "", machine, ""]
    if failures:
        head += [f"Failed: {'; '.join(failures)}.", ""]
    insert(arguments.results, "\n".join([*head, "\n".join(text for _, text in parts if text)]))
    print(f"added to {arguments.results}: {title.removeprefix('## ')}")
    if failures:
        sys.exit(f"failed: {'; '.join(failures)}")


if __name__ == "__main__":
    main()
