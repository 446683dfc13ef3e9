"""What a lowered program holds: methods, compiled code, weights and state, and what the code may call."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorConfig, FlatTensorSerializer
from qwen_runner.export import ExportError, contract
from qwen_runner.export.checkpoint import Checkpoint
from qwen_runner.export.compile import compile_method
from qwen_runner.export.elf import undefined_symbols
from qwen_runner.export.quantize import QuantizationConfig
from test_model import load
from torch import Tensor, nn
from torch.export import export


@dataclass
class Lowered:
    """A program, read back."""

    path: Path
    plans: dict[str, Any]  # by method
    payloads: dict[str, dict[str, Any]]  # what each delegate is handed
    code: dict[str, bytes]  # by key of the .pte's named data
    weights: dict[str, bytes]  # of the .ptd
    layouts: dict[str, tuple[int, list[int]]]  # scalar type and sizes of each weight


def read(path: Path) -> Lowered:
    file = deserialize_pte_binary((path / contract.PROGRAM_FILE).read_bytes())
    program = file.program
    plans = {plan.name: plan for plan in program.execution_plan}
    payloads = {}
    for name in plans.keys() & contract.methods(contract.MAX_BATCH):
        (delegate,) = plans[name].delegates
        assert delegate.id == contract.BACKEND_ID
        payloads[name] = json.loads(bytes(program.backend_delegate_data[delegate.processed.index].data))
    named = file.named_data
    assert named is not None
    code = {key: bytes(named.buffers[entry.buffer_index]) for key, entry in named.pte_data.items()}
    data = FlatTensorSerializer(FlatTensorConfig()).deserialize(
        _cord((path / contract.WEIGHTS_FILE).read_bytes())
    )
    weights = {key: bytes(data.buffers[entry.buffer_index]) for key, entry in data.named_data.items()}
    layouts = {
        key: (int(entry.tensor_layout.scalar_type), list(entry.tensor_layout.sizes))
        for key, entry in data.named_data.items()
    }
    return Lowered(path, plans, payloads, code, weights, layouts)


def _cord(data: bytes) -> Any:
    from executorch.exir._serialize._cord import Cord

    return Cord(data)


@pytest.fixture(scope="module", params=["none", "int4"])
def lowered(request: pytest.FixtureRequest, exported: Callable[..., Path]) -> Lowered:
    return read(exported("interval", quantize=request.param))


def test_methods_take_and_give_what_the_contract_says(lowered: Lowered) -> None:
    for name, longest in ((contract.PREFILL, 16), (contract.DECODE, 1)):
        plan = lowered.plans[name]
        inputs = [plan.values[i].val for i in plan.inputs]
        outputs = [plan.values[i].val for i in plan.outputs]
        assert [list(tensor.sizes) for tensor in inputs] == [[1, longest], *[[1]] * len(contract.ROW_INPUTS)]
        types = ["LONG", *("LONG" if t == torch.int64 else "FLOAT" for t in contract.ROW_INPUTS.values())]
        assert [tensor.scalar_type.name for tensor in inputs] == types
        assert [list(tensor.sizes) for tensor in outputs] == [[1], [1, 320]]
        assert [tensor.scalar_type.name for tensor in outputs] == ["LONG", "FLOAT"]
    constants = {
        name.removeprefix("get_"): plan.values[plan.outputs[0]].val.int_val
        for name, plan in lowered.plans.items()
        if name.startswith("get_")
    }
    assert constants == {
        "format_version": contract.FORMAT_VERSION,
        "vocab_size": 320,
        "max_seq_len": 128,
        "chunk": 16,
        "slots": 3,
        "batch": 1,
    }


def test_both_methods_name_the_same_state_and_none_is_stored(lowered: Lowered) -> None:
    assert lowered.payloads.keys() == set(contract.methods(batch=1))
    prefill, decode = (lowered.payloads[name] for name in (contract.PREFILL, contract.DECODE))
    assert prefill["state"] == decode["state"]
    assert all(payload["method"] == name for name, payload in lowered.payloads.items())
    state = {entry["name"]: (entry["dtype"], entry["shape"]) for entry in prefill["state"]}
    assert state["seen"] == ("uint8", [3, 320])
    assert state["layers.3.self_attn.key_cache"] == ("float32", [3, 2, 128, 32])
    assert state["layers.0.linear_attn.recurrent_state"] == ("float32", [3, 4, 16, 16])
    assert len(state) == 1 + 3 * 2 + 2
    assert not state.keys() & lowered.weights.keys()


def test_weights_are_the_models_byte_for_byte(
    lowered: Lowered, random_checkpoint: Callable[[str], Path]
) -> None:
    is_int4 = any(key.endswith("qweight") for key in lowered.weights)
    scheme = QuantizationConfig(scheme="int4" if is_int4 else "none")
    for name, tensor in load(random_checkpoint("interval"), scheme).named_parameters():
        assert lowered.weights[name] == bytes(tensor.detach().view(torch.uint8).flatten().tolist()), name
        assert lowered.layouts[name][1] == list(tensor.shape)


def test_the_code_calls_the_runner_alone(lowered: Lowered, tmp_path: Path) -> None:
    for payload in lowered.payloads.values():
        library = tmp_path / payload["method"]
        library.write_bytes(lowered.code[payload["library"]])
        symbols = undefined_symbols(library)
        assert contract.runner_symbol(contract.shim_symbol("sample"), contract.CPU) in symbols
        assert symbols <= contract.allowed_symbols(contract.CPU)


def test_the_runner_defines_what_the_contract_allows_and_no_more() -> None:
    sources = Path(__file__).resolve().parents[2] / "runner" / "shims"
    text = "\n".join(path.read_text() for path in sources.glob("*.cpp"))
    defined = set(re.findall(r"QWEN_SHIM \w+ (qwen_aoti_\w+)\(", text))
    defined |= {f"qwen_aoti_torch_dtype_{name}" for name in re.findall(r"^QWEN_DTYPE\((\w+),", text, re.M)}
    assert len(defined) > 35
    assert defined == contract.allowed_symbols(contract.CPU) | contract.allowed_symbols(contract.CUDA)


def test_an_operator_that_no_runner_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.topk(x, 3).values

    with pytest.raises(ExportError, match="topk"):
        compile_method("prefill", export(Sorted(), (torch.randn(16),)))


def test_a_cuda_program_may_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(x.sort(dim=1, descending=True, stable=True))

    compiled = compile_method("prefill", export(Sorted(), (torch.randn(3, 16),)), contract.CUDA)
    library = tmp_path / "sorted.so"
    library.write_bytes(compiled.library)
    assert "qwen_aoti_torch_cuda_sort_stable" in undefined_symbols(library)


def test_undefined_symbols_are_what_the_linker_says(tmp_path: Path) -> None:
    source = tmp_path / "needy.c"
    source.write_text(
        "#include <stdio.h>\nint ours(void);\n__attribute__((weak)) int perhaps(void);\n"
        'int run(void) { puts("x"); return ours() + (perhaps ? perhaps() : 0); }\n'
    )
    library = tmp_path / "needy.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    assert undefined_symbols(library) == {"ours"}
    with pytest.raises(ValueError, match="not a 64-bit"):
        undefined_symbols(source)


def test_the_declared_shims_follow_the_schemas() -> None:
    declarations = contract.shim_declarations(contract.CPU)
    assert len(declarations) == len(contract.OPERATORS[contract.CPU])
    assert declarations[torch.ops.qwen.router.default] == [
        "AOTITorchError aoti_torch_cpu_router("
        "AtenTensorHandle, AtenTensorHandle, int64_t, AtenTensorHandle*, AtenTensorHandle*);"
    ]


def test_importing_the_package_is_light() -> None:
    """The command line answers a wrong flag at once."""
    check = "import sys, qwen_runner.export.options; sys.exit('executorch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_every_tensor_of_the_checkpoint_is_used(random_checkpoint: Callable[[str], Path]) -> None:
    asked: list[str] = []

    class Watched(Checkpoint):
        def tensor(self, name: str) -> Tensor:
            asked.append(name)
            return super().tensor(name)

    from qwen_runner.export.model import Model
    from qwen_runner.export.weights import CheckpointWeights

    checkpoint = Watched(random_checkpoint("interval"))
    weights = CheckpointWeights(checkpoint, QuantizationConfig(scheme="none"), torch.float32)
    Model(checkpoint.config, weights, slots=1, max_seq_len=4, dtype=torch.float32)
    assert sorted(asked) == sorted(checkpoint.names())
