"""Times a cuda program, and the peers' scripts beside it in the same run.

    python benchmarks/cuda_model.py PROGRAM [--peers DIR] [--json FILE] [--repetitions N]

Runs `qwen_runner bench`, in a process of its own each time: prompts and answers of several lengths, one of
them without a CUDA graph; short answers after prompts up to what the program holds; several answers at once.
DIR holds executorch_model.py and executorch_moe.py: they run first, a few minutes each, so that the card is
as warm for us as for them. Prints Markdown tables and what the peers printed; what fails gets a row that says
so, and the status is 1 then. plot.py draws the JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GIBIBYTE = 1 << 30

# Scripts of the peers and their arguments. Compiling a model takes them minutes.
PEERS = (
    ("executorch_model.py", "decode"),
    ("executorch_model.py", "prefill", "int8"),
    ("executorch_moe.py",),
)
# llama-cpp-python 0.3.36, Q4_0, flash attention, on another H200, 2026-11-21: no script of ours runs it.
LLAMA_CPP_DECODE = {0: 260.0, 4096: 259.0}  # by context, tok/s
LLAMA_CPP_PREFILL = {512: 9400.0, 1642: 10600.0, 8192: 11300.0}  # by tokens, tok/s


@dataclass(frozen=True)
class Run:
    """What `qwen_runner bench` is asked for."""

    prompt: int
    new: int
    graph: bool = True
    batch: int = 1


# PyTorch PR 19062's ten pairs of prompt and answer, in tokens.
LENGTHS = tuple(Run(prompt, new) for new in (128, 512) for prompt in (128, 256, 512, 1024, 2048))
# Without a graph: one length shows what it costs.
WITHOUT_GRAPH = Run(512, 128, graph=False)
# Prompts of which a short answer shows prefill and decode; 1642 is what the peers measure.
CONTEXTS = (32, 128, 512, 1642, 2048, 4096, 8192, 16384, 32768)
AFTER_CONTEXT = 64
BATCHES = tuple(Run(512, 128, batch=batch) for batch in (1, 2, 4, 8))


@dataclass(frozen=True)
class Row:
    """One run of `qwen_runner bench`."""

    run: Run
    report: dict[str, Any] | None
    failure: str = ""

    def mean(self, name: str) -> float | None:
        """None where it failed, and of what it does not say."""
        return self.report[name]["mean"] if self.report and name in self.report else None

    def cell(self, name: str, digits: int) -> str:
        if self.report is None or name not in self.report:
            return ""
        value = self.report[name]
        return f"{value['mean']:.{digits}f} ± {value['deviation']:.{digits}f}"


@dataclass(frozen=True)
class Peer:
    """What a peer's script printed."""

    command: str
    seconds: float
    lines: list[str] = field(default_factory=list)
    failure: str = ""

    def speed(self, what: str) -> float | None:
        """Its `decode` or `prefill` in tok/s, if it printed that."""
        for line in self.lines:
            found = re.match(rf"{what}\b.*: ([\d.]+) tok/s", line)
            if found is not None:
                return float(found[1])
        return None


def speed_of(peers: Iterable[Peer], what: str) -> str:
    speeds = [speed for peer in peers if (speed := peer.speed(what)) is not None]
    return f"{speeds[0]:.0f}" if speeds else ""


def planned(max_seq_len: int, batch: int) -> dict[str, list[Run]]:
    """The runs of each table that a program holds; one run may be in several."""
    lengths = [run for run in LENGTHS if run.prompt + run.new <= max_seq_len]
    if not lengths:
        lengths = [Run(max_seq_len // 2, max_seq_len // 2)]
    without = [WITHOUT_GRAPH] if WITHOUT_GRAPH.prompt + WITHOUT_GRAPH.new <= max_seq_len else []
    room = max_seq_len - AFTER_CONTEXT
    # A program of exactly 32768 tokens is measured just below its end.
    contexts = [min(length, room) for length in CONTEXTS if room > 0 and length <= max_seq_len]
    return {
        "lengths": lengths + without,
        "contexts": [Run(length, AFTER_CONTEXT) for length in dict.fromkeys(contexts)],
        "batches": [
            run for run in BATCHES if batch > 1 and run.batch <= batch and run.prompt + run.new <= max_seq_len
        ],
    }


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


def measure(binary: str, program: Path, run: Run, repetitions: int, timeout: float) -> Row:
    command = [binary, "bench", str(program), f"--prompt_tokens={run.prompt}", f"--new_tokens={run.new}"]
    command += [f"--repetitions={repetitions}", f"--cuda_graph={'on' if run.graph else 'off'}", "--json"]
    if run.batch > 1:
        command.append(f"--batch={run.batch}")
    output, failure = execute(command, timeout)
    if failure:
        return Row(run, None, failure)
    report = json.loads(output)
    # A capture that fails is only a warning.
    if run.graph and report.get("device") == "cuda" and not report["gpu"]["cuda_graph"]:
        return Row(run, None, "no CUDA graph was captured")
    return Row(run, report)


def run_peer(folder: Path, script: str, arguments: tuple[str, ...], timeout: float) -> Peer:
    began = time.monotonic()
    # In their folder, so that nothing of this repository is taken for a package of theirs.
    output, failure = execute([sys.executable, script, *arguments], timeout, folder)
    lines = [line for line in output.splitlines() if line.strip()]
    return Peer(" ".join(["python", script, *arguments]), time.monotonic() - began, lines, failure)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Short rows are filled up; columns that no row fills are left out."""
    lines = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    used = [i for i in range(len(header)) if any(line[i] for line in lines)]
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line[i] for i in used) + " |" for line in cells)


def lengths_table(rows: list[Row], peers: list[Peer]) -> str:
    executorch = speed_of(peers, "decode")
    llama = f"{LLAMA_CPP_DECODE[0]:.0f}" if peers else ""

    def cells(row: Row) -> list[str]:
        start = [str(row.run.prompt), str(row.run.new), "on" if row.run.graph else "off"]
        if row.report is None:
            return [*start, row.failure]
        gpu = row.report.get("gpu", {})
        return [
            *start,
            row.cell("prefill_tokens_per_second", 0),
            row.cell("ttft_ms", 1),
            row.cell("decode_tokens_per_second", 1),
            executorch if row.run.graph else "",
            llama if row.run.graph else "",
            f"{row.report['load_ms'] / 1e3:.2f}",
            f"{gpu['allocated_bytes'] / GIBIBYTE:.2f}" if gpu else "",
        ]

    header = (
        "prompt",
        "answer",
        "CUDA graph",
        "prefill, tok/s",
        "first token, ms",
        "decode, tok/s",
        "ExecuTorch at 512",
        "llama.cpp at 0",
        "load, s",
        "GPU memory, GiB",
    )
    return markdown(header, map(cells, rows))


def contexts_table(rows: list[Row], peers: list[Peer]) -> str:
    executorch = {512: speed_of(peers, "decode")}, {1642: speed_of(peers, "prefill")}

    def cells(row: Row) -> list[str]:
        length = row.run.prompt
        if row.report is None:
            return [str(length), row.failure]
        return [
            str(length),
            row.cell("ttft_ms", 1),
            row.cell("prefill_tokens_per_second", 0),
            executorch[1].get(length, ""),
            f"{LLAMA_CPP_PREFILL[length]:.0f}" if peers and length in LLAMA_CPP_PREFILL else "",
            row.cell("decode_tokens_per_second", 1),
            executorch[0].get(length, ""),
            f"{LLAMA_CPP_DECODE[length]:.0f}" if peers and length in LLAMA_CPP_DECODE else "",
        ]

    header = (
        "context",
        "first token, ms",
        "prefill, tok/s",
        "ExecuTorch",
        "llama.cpp",
        "decode, tok/s",
        "ExecuTorch",
        "llama.cpp",
    )
    return markdown(header, map(cells, rows))


def batches_table(rows: list[Row]) -> str:
    def cells(row: Row) -> list[str]:
        each = row.mean("decode_tokens_per_second")
        if each is None:
            return [str(row.run.batch), row.failure]
        # One answer alone is its own sum, and the report does not repeat it.
        in_sum = "decode_tokens_per_second" + ("_in_sum" if row.run.batch > 1 else "")
        return [str(row.run.batch), row.cell(in_sum, 0), f"{each:.1f}", f"{1e3 / each:.3f}"]

    return markdown(
        ("answers at once", "decode in sum, tok/s", "each, tok/s", "a step, ms"), map(cells, rows)
    )


def tables(plan: dict[str, list[Run]], rows: dict[Run, Row], peers: list[Peer]) -> str:
    def of(name: str) -> list[Row]:
        return [rows[run] for run in plan[name]]

    # Both are of this shape alone; another's program is measured without them.
    sources = " (decode in tok/s; ExecuTorch's of this run, llama.cpp's of another day and card)"
    parts = [f"Prompt and answer{sources if peers else ''}:\n\n{lengths_table(of('lengths'), peers)}"]
    if plan["contexts"]:
        title = f"The {AFTER_CONTEXT} tokens after a context, and its prefill"
        parts.append(f"{title}:\n\n{contexts_table(of('contexts'), peers)}")
    if plan["batches"]:
        run = plan["batches"][0]
        title = f"Answers of {run.new} tokens to prompts of {run.prompt}, all in one step"
        parts.append(f"{title}:\n\n{batches_table(of('batches'))}")
    return "\n\n".join(parts)


def peers_text(peers: list[Peer]) -> str:
    parts = []
    for peer in peers:
        lines = [f"failed: {peer.failure}"] if peer.failure else peer.lines
        parts.append("\n".join([f"`{peer.command}` ({peer.seconds:.0f} s):", "", "```", *lines, "```"]))
    return "\n\n".join(parts)


def results(program: Path, plan: dict[str, list[Run]], rows: dict[Run, Row], peers: list[Peer]) -> str:
    """JSON for plot.py, and to look up what the tables leave out."""
    return json.dumps(
        {
            "program": str(program),
            "card": card(rows),
            **{name: [asdict(rows[run]) for run in runs] for name, runs in plan.items()},
            "peers": [asdict(peer) for peer in peers],
            "executorch_decode": next(
                (speed for peer in peers if (speed := peer.speed("decode")) is not None), None
            ),
            "llama_cpp_decode": LLAMA_CPP_DECODE if peers else {},
        },
        indent=2,
    )


def card(rows: dict[Run, Row]) -> str:
    reports = [row.report for row in rows.values() if row.report is not None]
    return reports[0].get("gpu", {}).get("name", "the CPU") if reports else "nothing that worked"


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
    parser.add_argument("--repetitions", type=int, default=3, help="answers to measure in each run (3)")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="for one process (300)")
    arguments = parser.parse_args()
    binary = find_binary(arguments.runner)
    manifest = json.loads((arguments.program / "manifest.json").read_text(encoding="utf-8"))
    plan = planned(manifest["max_seq_len"], manifest.get("batch", 1))

    peers: list[Peer] = []
    for script, *words in PEERS if arguments.peers else ():
        if (arguments.peers / script).is_file():
            peers.append(run_peer(arguments.peers, script, tuple(words), arguments.timeout))
        else:
            peers.append(Peer(script, 0, failure=f"{arguments.peers} has no {script}"))
    rows: dict[Run, Row] = {}
    for run in dict.fromkeys(run for runs in plan.values() for run in runs):
        rows[run] = measure(binary, arguments.program, run, arguments.repetitions, arguments.timeout)

    quantization = manifest["quantization"]
    group = quantization.get("group_size", "any size")
    print(
        f"{manifest['name']} for {manifest['target']['device']}, {manifest['dtype']}, "
        f"{quantization['scheme']} in groups of {group}, on {card(rows)}; "
        f"mean and deviation of {arguments.repetitions} answers after one to warm up.\n\n"
        f"{tables(plan, rows, peers)}"
    )
    if peers:
        print(f"\nWhat the peers printed:\n\n{peers_text(peers)}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = results(arguments.program, plan, rows, peers)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    failures = [row.failure for row in rows.values()] + [peer.failure for peer in peers]
    failures = [failure for failure in failures if failure]
    if failures:
        sys.exit(f"{len(failures)} of the runs failed, the first because: {failures[0]}")


if __name__ == "__main__":
    main()
