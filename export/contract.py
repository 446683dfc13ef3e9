"""What a program and its runner agree on: names, versions, and the C functions a compiled method may call.

The runner states the same on its side: versions, layouts and the widest batch in `runner/manifest.h`, the
delegate's name in `runner/delegate.h`, the methods in `runner/program.cpp`, the order of their inputs in
`runner/host_steps.cpp` and `runner/cuda_lane.cpp`, the C functions in `runner/shims/`. Tests hold both equal.
"""

from __future__ import annotations

import qwen_runner.kernels  # noqa: F401  registers the operators
import torch

FORMAT_VERSION = 1

PROGRAM_FILE = "model.pte"
WEIGHTS_FILE = "model.ptd"
TOKENIZER_FILE = "tokenizer.json"
# Optional, as is the template; Python's `chat` reads the special tokens' texts from it.
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
MANIFEST_FILE = "manifest.json"

# How a cuda program's int4 weights lie in memory: `Int4Matrix` of kernels/cuda/types.h, and its version.
INT4_TILES = "tiles-16x64-1"

# Bytes; a cache line, and the widest vector load.
WEIGHT_ALIGNMENT = 64

# The delegate's id in the .pte; `backend.py` has the class of this name.
BACKEND_ID = "QwenAotiBackend"

# `decode` has one row; `decode_batch` any number B from 2 to the program's batch, each a session's.
PREFILL, DECODE, DECODE_BATCH = "prefill", "decode", "decode_batch"

# The most rows that the kernels take in a decode step.
MAX_BATCH = 8


def methods(batch: int) -> tuple[str, ...]:
    """Those of a program whose decode steps have at most `batch` rows."""
    return (PREFILL, DECODE) if batch == 1 else (PREFILL, DECODE, DECODE_BATCH)


# A method's inputs: tokens i64 [1, T] or [B, 1], then these, [B] each.
ROW_INPUTS = {
    "position": torch.int64,
    "slot": torch.int64,
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "presence_penalty": torch.float32,
    "repetition_penalty": torch.float32,
    "seed": torch.int64,
    "generated_from": torch.int64,
}

CPU, CUDA = "cpu", "cuda"

# The operators that a program of each target calls, by their name in `torch.ops.qwen`.
OPERATORS = {
    CPU: (
        "attention",
        "float_linear",
        "float_moe",
        "gated_delta",
        "int4_linear",
        "int4_moe",
        "int8_embedding",
        "int8_linear",
        "router",
        "sample",
    ),
    CUDA: ("attention_block", "deltanet_block", "embedding_block", "head_block", "moe_block", "sample"),
}

# And PyTorch's own.
_ATEN_OPERATORS: dict[str, tuple[str, ...]] = {CPU: (), CUDA: ("sort_stable",)}

_BASE_SYMBOLS = """
    check clone create_tensor_from_blob create_tensor_from_blob_v2 delete_tensor_object empty_strided
    get_data_ptr get_device_type get_dim get_dtype get_numel get_sizes get_storage_offset get_storage_size
    get_strides grad_mode_is_enabled grad_mode_set_enabled layout_strided new_tensor_handle
    _reinterpret_tensor device_type_cpu device_type_cuda dtype_bfloat16 dtype_bool dtype_float16 dtype_float32
    dtype_int8 dtype_int16 dtype_int32 dtype_int64 dtype_uint8
"""


# What Inductor begins the name of an operator's C function with. It compiles a cuda program for the cpu, too:
# the code only hands on tensors, which are on the GPU.
_OPERATOR_PREFIX = "aoti_torch_cpu_"


def shim_symbol(operator: str) -> str:
    """The C function behind the operator `qwen::<operator>`, or one of PyTorch's, as Inductor names it."""
    return _OPERATOR_PREFIX + operator


def shims(target: str) -> frozenset[str]:
    """What generated code of `target` calls and the runner implements, by AOTInductor's names."""
    base = (f"aoti_torch_{name}" for name in _BASE_SYMBOLS.split())
    return frozenset([*base, *map(shim_symbol, (*OPERATORS[target], *_ATEN_OPERATORS[target]))])


def runner_symbol(shim: str, target: str) -> str:
    """The runner's name of a function that PyTorch has too (see `symbols`): an operator's is its target's."""
    if shim.startswith(_OPERATOR_PREFIX):
        return f"qwen_aoti_torch_{target}_{shim.removeprefix(_OPERATOR_PREFIX)}"
    return f"qwen_{shim}"


def allowed_symbols(target: str) -> frozenset[str]:
    """Every symbol that a compiled library of `target` may leave to the program that loads it."""
    return frozenset(runner_symbol(shim, target) for shim in shims(target))


_C_TYPES = {"Tensor": "AtenTensorHandle", "int": "int64_t", "float": "double", "bool": "int32_t"}


def shim_declarations(target: str) -> dict[torch._ops.OpOverload, list[str]]:
    """The C declaration of every operator of `target`, as Inductor's `custom_ops_to_c_shims` takes it.

    It follows from the schema: the arguments in order, mutated ones like any other, then a pointer to a
    handle for each output.
    """
    declarations = {}
    for name in OPERATORS[target]:
        operator = getattr(torch.ops.qwen, name).default
        arguments = [_C_TYPES[str(argument.type)] for argument in operator._schema.arguments]
        arguments += ["AtenTensorHandle*"] * len(operator._schema.returns)
        declarations[operator] = [f"AOTITorchError {shim_symbol(name)}({', '.join(arguments)});"]
    return declarations
