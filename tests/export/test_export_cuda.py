"""The cuda target without a GPU: its model in eager mode, where blocks run their references; its programs."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qwen_runner.export import ExportError, ExportOptions, contract
from qwen_runner.export.checkpoint import Checkpoint
from qwen_runner.export.compile import compile_method
from qwen_runner.export.config import load_config
from qwen_runner.export.cuda_model import CudaModel, check_cuda_shapes
from qwen_runner.export.elf import undefined_symbols
from qwen_runner.export.model import LanguageModel, Model
from qwen_runner.export.program import hollow_model
from qwen_runner.export.quantize import QuantizationConfig
from qwen_runner.export.weights import CheckpointWeights
from random_checkpoints import SPECS, random_prompt
from test_lower import read
from test_model import Session, relative_error
from torch import Tensor, nn
from torch.export import export

LENGTH = 21
Checkpoints = Callable[[str], Path]


def load(model_type: type[LanguageModel], path: Path, quantization: QuantizationConfig) -> LanguageModel:
    with Checkpoint(path) as checkpoint:
        weights = CheckpointWeights(checkpoint, quantization, torch.bfloat16)
        return model_type(checkpoint.config, weights, slots=3, max_seq_len=64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "group_size", "head"),
    [(name, 32, "int8" if SPECS[name].tied else "int4") for name in SPECS if name != "group_128"]
    + [("group_128", 128, "int4"), ("group_128", 64, "int8")],
)
def test_the_cuda_model_computes_what_the_cpus_does(
    name: str, group_size: int, head: str, random_checkpoint: Checkpoints
) -> None:
    quantization = QuantizationConfig("int4", group_size, "rtn", head)  # type: ignore[arg-type]
    path, prompt = random_checkpoint(name), random_prompt(SPECS[name], LENGTH)
    sessions = [Session(load(kind, path, quantization), slot=1) for kind in (Model, CudaModel)]
    for begin, end in (
        (0, 13),
        (13, 18),
        *((i, i + 1) for i in range(18, LENGTH)),
    ):  # prefill twice, then decode
        (token, logits), (cuda_token, cuda_logits) = (s.run(prompt[begin:end]) for s in sessions)
        assert relative_error(cuda_logits, logits) < 1e-6
        assert cuda_token == token
    states = [dict(session.model.named_buffers()) for session in sessions]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        assert states[1][key].shape == state.shape and states[1][key].dtype == state.dtype
        assert relative_error(states[1][key].float(), state.float()) < 1e-5, key


def test_batched_decode_gives_each_row_its_own_session(random_checkpoint: Checkpoints) -> None:
    quantization, prompt = QuantizationConfig(method="rtn"), random_prompt(SPECS["interval"], 12)
    model = load(CudaModel, random_checkpoint("interval"), quantization)
    expected = []
    for slot, length in enumerate((5, 9)):
        session = Session(model, slot)  # type: ignore[arg-type]
        session.run(prompt[:length])
        before = {key: value.clone() for key, value in model.named_buffers()}
        expected.append(session.run(prompt[length : length + 1])[1])
        model.load_state_dict(before, strict=False)
    with torch.no_grad():
        _, logits = model(
            torch.tensor([[prompt[5]], [prompt[9]]]),
            torch.tensor([5, 9]),
            torch.tensor([0, 1]),
            *(torch.full((2,), value) for value in (0.0, 0, 1.0, 0.0, 0.0, 1.0, 0, 1 << 40)),
        )
    for row, one in zip(logits, expected, strict=True):
        assert relative_error(row, one) < 2e-2  # the products' shapes differ, so may their bfloat16


@pytest.fixture(scope="module")
def program(exported: Callable[..., Path]) -> Path:
    return exported("interval", quantize="int4", target="cuda")


def test_a_program_calls_blocks_alone(program: Path, tmp_path: Path) -> None:
    lowered = read(program)
    own = {f"qwen_aoti_torch_cuda_{name}" for name in contract.OPERATORS[contract.CUDA]}
    for payload in lowered.payloads.values():
        code = lowered.code[payload["library"]]
        assert b"cpp_fused" not in code
        library = tmp_path / payload["method"]
        library.write_bytes(code)
        symbols = undefined_symbols(library)
        assert symbols <= contract.allowed_symbols(contract.CUDA)
        assert {symbol for symbol in symbols if re.match("qwen_aoti_torch_(cpu|cuda)_", symbol)} == own


def test_a_batch_takes_any_number_of_rows(program: Path) -> None:
    lowered = read(program)
    assert lowered.payloads.keys() == set(contract.methods(batch=3))
    plan = lowered.plans[contract.DECODE_BATCH]
    inputs, outputs = ([plan.values[i].val for i in ids] for ids in (plan.inputs, plan.outputs))
    assert [list(tensor.sizes) for tensor in inputs] == [[3, 1], *[[3]] * len(contract.ROW_INPUTS)]
    assert [list(tensor.sizes) for tensor in outputs] == [[3], [3, 320]]
    assert {tensor.shape_dynamism.name for tensor in inputs} == {"DYNAMIC_BOUND"}
    assert lowered.payloads["decode_batch"]["state"] == lowered.payloads["decode"]["state"]
    assert json.loads((program / "manifest.json").read_text())["batch"] == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target": "cuda"}, 4),
        ({"target": "cuda", "slots": 20}, 8),
        ({"target": "cuda", "slots": 1}, 1),
        ({"target": "cuda", "batch": 2}, 2),
        ({"target": "cpu", "slots": 20}, 1),
        ({"target": "cuda", "batch": 5}, "--batch 5: --slots allows at most 4"),
        ({"target": "cpu", "batch": 2}, "--batch 2: --target cpu allows at most 1"),
        ({"target": "cuda", "slots": 20, "batch": 9}, "--batch 9: supported: 1, 2, .*8"),
    ],
)
def test_a_batch_fits_slots_and_target(
    options: dict[str, Any], expected: int | str, random_checkpoint: Checkpoints
) -> None:
    config = load_config(random_checkpoint("interval"))
    if isinstance(expected, int):
        assert ExportOptions(**options).resolved(config).batch == expected
    else:
        with pytest.raises(ExportError, match=expected):
            ExportOptions(**options).resolved(config)


def test_a_program_says_that_it_is_for_cuda(program: Path) -> None:
    manifest = json.loads((program / "manifest.json").read_text())
    assert manifest["target"] == {"device": "cuda", "isa": "default"}
    assert manifest["dtype"] == "bfloat16"
    assert manifest["quantization"]["layout"] == contract.INT4_TILES


def test_a_programs_weights_are_the_models(program: Path, random_checkpoint: Checkpoints) -> None:
    lowered = read(program)
    model = load(CudaModel, random_checkpoint("interval"), QuantizationConfig())
    assert sorted(lowered.weights) == sorted(name for name, _ in model.named_parameters())
    for name, tensor in model.named_parameters():
        assert lowered.weights[name] == bytes(tensor.detach().view(torch.uint8).flatten().tolist()), name
    state = {entry["name"]: entry["dtype"] for entry in lowered.payloads["decode"]["state"]}
    assert state.keys() == dict(model.named_buffers()).keys()
    assert state["layers.3.self_attn.key_cache"] == "bfloat16"


def test_a_kernel_of_inductors_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    class Fused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) + 1

    method = export(Fused(), (torch.randn(16),))
    with pytest.raises(ExportError, match=r"prefill: Inductor generated cpp_fused\w*relu"):
        compile_method("prefill", method, contract.CUDA)
    assert compile_method("prefill", method, contract.CPU).library


def test_the_hollow_model_takes_no_memory(random_checkpoint: Checkpoints) -> None:
    """8 GiB of key-value caches: nobody writes to them."""
    config = load_config(random_checkpoint("interval"))
    resolved = ExportOptions(target="cuda", max_seq_len=512, slots=1).resolved(config)
    before = _resident()
    model, _ = hollow_model(config, replace(resolved, max_seq_len=1 << 20, slots=32))
    assert sum(state.nbytes for state in model.buffers()) > 8 << 30
    assert _resident() - before < 64 << 20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"head_dim": 8}, "head_dim 8; supported: 16 to 256, a multiple of 16"),
        ({"linear_key_head_dim": 48}, "linear_key_head_dim 48; supported: 16, 32, 64, 128"),
        ({"linear_conv_kernel_dim": 5}, "linear_conv_kernel_dim 5; supported: 2, 3, 4"),
        ({"num_experts": 2048}, "num_experts 2048; supported: 1 to 1024"),
    ],
)
def test_shapes_that_no_kernel_takes_are_named(
    changes: dict[str, int], named: str, random_checkpoint: Checkpoints
) -> None:
    config = load_config(random_checkpoint("interval"))
    check_cuda_shapes(config)
    with pytest.raises(ExportError, match=named):
        check_cuda_shapes(replace(config, **changes))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"quantize": "none"}, "--quantize none: --target cuda supports int4"),
        ({"dtype": "float32"}, "--dtype float32: --target cuda supports bfloat16"),
    ],
)
def test_cuda_takes_int4_and_bfloat16_alone(options: dict[str, str], named: str) -> None:
    with pytest.raises(ExportError, match=named):
        ExportOptions(target="cuda", **options)  # type: ignore[arg-type]


def test_cudas_defaults(random_checkpoint: Checkpoints) -> None:
    config = load_config(random_checkpoint("interval"))
    resolved = ExportOptions(target="cuda").resolved(config)
    assert (resolved.dtype, resolved.chunk, resolved.batch) == ("bfloat16", 512, 4)
