"""Measures the kernels and a program on this machine and adds a dated section to benchmarks/RESULTS.md.

    python benchmarks/record.py [--program DIR] [--only kernels|model] [--peers DIR] [OPTION ...]

The kernels are the CUDA ones where there is a GPU, else the CPU's. A program for cuda is measured at many
lengths, beside the peers' scripts in --peers, and its decode step kernel by kernel; another by one
`qwen_runner bench`, which OPTIONs are for. The section says what everything ran on and which commands they
were; nothing is added when one of them fails, as the kernels' do when a result is wrong. On a GPU the plots
in benchmarks/figures/ of what was measured are drawn anew.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MEBIBYTE = 1 << 20
# What the scripts write for plot.py.
MEASURED = ROOT / "build" / "bench"
FILES = ("kernels.json", "timeline.json", "model.json")


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


def run(command: list[str]) -> str:
    """What `command` prints, shown as it comes; ends this process if it fails."""
    print("$ " + shlex.join(command), flush=True)
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode != 0:
        sys.exit(f"{shlex.join(command)} failed: nothing was recorded")
    return "".join(lines)


def shown(command: list[str]) -> str:
    """A command as someone at the repository's root would type it."""
    program = "python" if command[0] == sys.executable else Path(command[0]).name
    return shlex.join([program, *(word.removeprefix(f"{ROOT}/") for word in command[1:])])


def kernels() -> str:
    """The part of the section that is about kernels."""
    cuda = torch.cuda.is_available() and importlib.util.find_spec("qwen_runner._cuda_kernels") is not None
    if not cuda:
        command = [sys.executable, str(HERE / "cpu_kernels.py")]
        return f"`{shown(command)}`:\n\n```\n{run(command)}```\n"
    command = [sys.executable, str(HERE / "cuda_kernels.py")]
    return f"`{shown(command)}`:\n\n```\n{run([*command, '--json', str(MEASURED / 'kernels.json')])}```\n"


def model(program: Path, options: list[str], peers: list[str]) -> str:
    """The part of the section that is about a program."""
    beside = Path(sys.executable).parent / "qwen_runner"
    binary = str(beside) if beside.exists() else shutil.which("qwen_runner")
    if binary is None:
        sys.exit("qwen_runner is not installed: make run, or pip install .")
    manifest = json.loads((program / "manifest.json").read_text(encoding="utf-8"))
    parts = []
    if manifest["target"]["device"] == "cuda":
        command = [sys.executable, str(HERE / "cuda_model.py"), str(program), *peers]
        text = run([*command, "--json", str(MEASURED / "model.json")])
        parts.append(f"`{shown(command)}`: {text}")
        command = [sys.executable, str(HERE / "decode_timeline.py"), str(program)]
        text = run([*command, "--json", str(MEASURED / "timeline.json")])
        parts.append(f"`{shown(command)}`:\n\n```\n{text}```\n")
    if options or not parts:
        command = [binary, "bench", str(program), *options]
        parts.append(f"`{shown(command)}`{model_table(json.loads(run([*command, '--json'])))}")
    return "\n".join(parts)


def draw() -> None:
    """Of what was measured now: what is not drawn anew stays."""
    files = [str(file) for name in FILES if (file := MEASURED / name).exists()]
    if files:
        run([sys.executable, str(HERE / "plot.py"), *files])


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
    machine = conditions()
    MEASURED.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (MEASURED / name).unlink(missing_ok=True)
    peers = ["--peers", str(arguments.peers)] if arguments.peers else []
    parts = []
    if arguments.only != "model":
        parts.append(kernels())
    if arguments.only != "kernels":
        parts.append(model(arguments.program, options, peers))
    draw()
    what = {"kernels": "kernels", "model": arguments.program.name}.get(
        arguments.only, f"kernels and {arguments.program.name}"
    )
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    title = f"## {datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {what}, {where}"
    insert(arguments.results, "\n".join([title, "", machine, "", "\n".join(parts)]))
    print(f"added to {arguments.results}: {title.removeprefix('## ')}")


if __name__ == "__main__":
    main()
