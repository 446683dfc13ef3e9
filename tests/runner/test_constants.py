"""One copy of the weights and the state, shared by both methods."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import answer
from qwen_runner import _core
from qwen_runner.export import export_program
from random_checkpoints import SPECS, Spec, make_checkpoint


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_both_methods_read_every_constant_at_the_same_address(
    exported: Callable[..., Path], quantize: str
) -> None:
    engine = _core.Engine(str(exported("interval", quantize=quantize)))
    addresses: dict[str, dict[str, tuple[int, int, bool]]] = {"prefill": {}, "decode": {}}
    for method, name, address, size, is_state in engine.bound_constants():
        assert name not in addresses[method]
        addresses[method][name] = address, size, is_state
    assert addresses["prefill"] == addresses["decode"]
    constants = addresses["prefill"]
    weights = {name: size for name, (_, size, is_state) in constants.items() if not is_state}
    states = {name: size for name, (_, size, is_state) in constants.items() if is_state}
    assert len({address for address, _, _ in constants.values()}) == len(constants)
    assert sum(weights.values()) == engine.memory["weight_bytes"]
    assert sum(states.values()) == engine.memory["state_bytes"]
    assert {name.rsplit(".", 1)[-1] for name in states} == {
        "seen", "conv_state", "recurrent_state", "key_cache", "value_cache"
    }  # fmt: skip


def test_loading_holds_little_more_than_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Large enough that a second copy of anything would show.
    monkeypatch.setitem(SPECS, "large", Spec(17, "LF", hidden=256, vocab=240_000))
    make_checkpoint(tmp_path / "checkpoint", "large")
    program = export_program(
        tmp_path / "checkpoint", tmp_path / "program", quantize="none", max_seq_len=64, slots=1
    )
    memory = answer(program, "--max_new_tokens", "1", prompt=("--prompt_ids", "1,2,3"))["memory"]
    weights = (program / "model.ptd").stat().st_size
    assert weights > 480e6
    assert memory["weight_bytes"] > 0.99 * weights
    assert memory["peak_resident_bytes"] < 1.25 * weights + 150e6


def test_a_second_engine_of_a_process_maps_the_same_file_pages(demo_program: Path) -> None:
    # Weights are views of the mapped file: two engines hold one copy of them between them.
    script = """
import json
import sys
from qwen_runner import _core
engines = [_core.Engine(sys.argv[1]) for _ in range(2)]
constants = [constant for engine in engines for constant in engine.bound_constants()]
addresses = {address for _, _, address, _, is_state in constants if not is_state}
shared = 0
for line in open("/proc/self/maps"):
    span, _, _, _, inode, *path = line.split(None, 5)
    begin, end = (int(value, 16) for value in span.split("-"))
    if path and path[0].strip().endswith("model.ptd"):
        shared += sum(begin <= address < end for address in addresses)
print(json.dumps([shared, len(addresses)]))
"""
    output = subprocess.run(
        [sys.executable, "-c", script, str(demo_program)], capture_output=True, check=True, text=True
    )
    shared, count = json.loads(output.stdout)
    assert shared == count > 0
