"""Times a cuda program, and the peers' scripts beside it in the same run.

    python benchmarks/cuda_model.py PROGRAM [--peers DIR] [--json FILE] [--repetitions N]

Runs `qwen_runner bench`, in a process of its own each time, for several lengths of prompt and answer, with
and without a CUDA graph. DIR holds executorch_model.py and executorch_moe.py: they run first, a few minutes
each, so that the card is as warm for us as for them. Prints a Markdown table and what the peers printed; what
fails gets a row that says so, and the status is 1 then.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MEBIBYTE, GIBIBYTE = 1 << 20, 1 << 30

# Of prompt and answer, in tokens: 1642 is what the peers measure.
LENGTHS = ((128, 128), (512, 128), (512, 256), (1642, 128), (2048, 256))
# Without a graph: one length shows what it costs.
WITHOUT_GRAPH = ((512, 128),)
# Scripts of the peers and their arguments. Compiling a model takes them minutes.
PEERS = (
    ("executorch_model.py", "decode"),
    ("executorch_model.py", "prefill", "int8"),
    ("executorch_moe.py",),
)


@dataclass(frozen=True)
class Row:
    """One run of `qwen_runner bench`."""

    prompt: int
    new: int
    graph: bool
    report: dict[str, Any] | None
    failure: str = ""

    def cells(self) -> list[str]:
        cells = ["qwen_runner", str(self.prompt), str(self.new), "on" if self.graph else "off"]
        if self.report is None:
            return [*cells, self.failure, *[""] * 5]
        gpu = self.report.get("gpu", {})
        return [
            *cells,
            spread(self.report, "prefill_tokens_per_second", 0),
            spread(self.report, "ttft_ms", 1),
            spread(self.report, "decode_tokens_per_second", 1),
            f"{self.report['load_ms'] / 1e3:.2f}",
            f"{gpu['allocated_bytes'] / GIBIBYTE:.2f}" if gpu else "",
            f"{self.report['memory']['peak_resident_bytes'] / MEBIBYTE:.0f}",
        ]


HEADER = (
    "",
    "prompt",
    "answer",
    "graph",
    "prefill, tok/s",
    "first token, ms",
    "decode, tok/s",
    "load, s",
    "GPU memory, GiB",
    "resident at peak, MiB",
)


@dataclass(frozen=True)
class Peer:
    """What a peer's script printed."""

    command: str
    seconds: float
    lines: list[str] = field(default_factory=list)
    failure: str = ""

    def cells(self) -> list[str]:
        """Its row beside ours; none if it printed no tokens a second."""
        if self.failure:
            return [f"`{self.command}`", "", "", "", self.failure, *[""] * 5]
        for line in self.lines:
            found = re.match(r"(decode|prefill).*: ([\d.]+) tok/s(?:.* for (\d+) tokens)?", line)
            if found is None:
                continue
            what, speed, prompt = found.groups()
            prefill, decode = (speed, "") if what == "prefill" else ("", speed)
            return [f"`{self.command}`", prompt or "", "", "", prefill, "", decode, *[""] * 3]
        return []


def spread(report: dict[str, Any], name: str, digits: int) -> str:
    if name not in report:
        return ""
    value = report[name]
    return f"{value['mean']:.{digits}f} ± {value['deviation']:.{digits}f}"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def execute(command: list[str], timeout: float, folder: Path | None = None) -> tuple[str, str]:
    """What `command` printed and, if it failed, why."""
    print("$ " + " ".join(command), file=sys.stderr, flush=True)
    try:
        result = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return "", f"it took longer than {timeout:.0f} s"
    except OSError as error:
        return "", str(error)
    return result.stdout, "" if result.returncode == 0 else last_line(result.stderr)


def measure(
    binary: str, program: Path, prompt: int, new: int, graph: bool, repetitions: int, timeout: float
) -> Row:
    command = [binary, "bench", str(program), f"--prompt_tokens={prompt}", f"--new_tokens={new}"]
    command += [f"--repetitions={repetitions}", f"--cuda_graph={'on' if graph else 'off'}", "--json"]
    output, failure = execute(command, timeout)
    if failure:
        return Row(prompt, new, graph, None, failure)
    report = json.loads(output)
    # A capture that fails is only a warning.
    if graph and report.get("device") == "cuda" and not report["gpu"]["cuda_graph"]:
        return Row(prompt, new, graph, None, "no CUDA graph was captured")
    return Row(prompt, new, graph, report)


def run_peer(folder: Path, script: str, arguments: tuple[str, ...], timeout: float) -> Peer:
    began = time.monotonic()
    # In their folder, so that nothing of this repository is taken for a package of theirs.
    output, failure = execute([sys.executable, script, *arguments], timeout, folder)
    lines = [line for line in output.splitlines() if line.strip()]
    return Peer(" ".join(["python", script, *arguments]), time.monotonic() - began, lines, failure)


def table(rows: list[Row], peers: list[Peer]) -> str:
    cells = [row.cells() for row in rows] + [peer.cells() for peer in peers]
    lines = [HEADER, ["---"] * len(HEADER), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines if line)


def peers_text(peers: list[Peer]) -> str:
    parts = []
    for peer in peers:
        lines = [f"failed: {peer.failure}"] if peer.failure else peer.lines
        parts.append("\n".join([f"`{peer.command}` ({peer.seconds:.0f} s):", "", "```", *lines, "```"]))
    return "\n\n".join(parts)


def find_binary(given: str | None) -> str:
    beside = Path(sys.executable).with_name("qwen_runner")
    found = given or (str(beside) if beside.exists() else shutil.which("qwen_runner"))
    if found is None:
        sys.exit("qwen_runner is not installed: make run, pip install ., or --runner FILE")
    return found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("program", type=Path, help="folder of the program")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder of the peers' scripts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the results to")
    parser.add_argument("--runner", metavar="FILE", help="the qwen_runner to use")
    parser.add_argument("--repetitions", type=int, default=5, help="answers to measure in each run (5)")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="for one process (300)")
    arguments = parser.parse_args()
    binary = find_binary(arguments.runner)
    manifest = json.loads((arguments.program / "manifest.json").read_text(encoding="utf-8"))
    fitting = [lengths for lengths in LENGTHS if sum(lengths) <= manifest["max_seq_len"]]
    if not fitting:
        fitting = [(manifest["max_seq_len"] // 2,) * 2]
    runs = [(*lengths, True) for lengths in fitting]
    runs += [(*lengths, False) for lengths in fitting if lengths in WITHOUT_GRAPH or len(fitting) == 1]

    peers: list[Peer] = []
    for script, *words in PEERS if arguments.peers else ():
        if (arguments.peers / script).is_file():
            peers.append(run_peer(arguments.peers, script, tuple(words), arguments.timeout))
        else:
            peers.append(Peer(script, 0, failure=f"{arguments.peers} has no {script}"))
    rows = [
        measure(binary, arguments.program, *run, arguments.repetitions, arguments.timeout) for run in runs
    ]

    reports = [row.report for row in rows if row.report is not None]
    quantization = manifest["quantization"]
    where = reports[0].get("gpu", {}).get("name", "the CPU") if reports else "nothing that worked"
    print(
        f"{manifest['name']} for {manifest['target']['device']}, {manifest['dtype']}, "
        f"{quantization['scheme']} in groups of {quantization.get('group_size', 'any size')}, on {where}; "
        f"mean and deviation of {arguments.repetitions} answers after one to warm up:\n\n{table(rows, peers)}"
    )
    if peers:
        print(f"\nWhat the peers printed:\n\n{peers_text(peers)}")
    if arguments.json is not None:
        results = {"program": str(arguments.program), "rows": [asdict(row) for row in rows]}
        results["peers"] = [asdict(peer) for peer in peers]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if any(row.failure for row in rows) or any(peer.failure for peer in peers):
        sys.exit(1)


if __name__ == "__main__":
    main()
