"""The prefill of a small model: its shape, and its kernels' names as CUPTI gives them."""

from typing import Any

MANIFEST: dict[str, Any] = {
    "model": {
        "vocab_size": 1000,
        "hidden_size": 64,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 48,
        "rope_theta": 1e4,
    },
    "quantization": {"scheme": "int4", "group_size": 32, "head": "int4", "embedding": "int8"},
}

# In the order that they run in.
LAYER_KINDS = {
    "delta": [
        "rms_norm",
        "delta_qkvz",
        "delta_ab",
        "delta_prepare",
        "delta_scan",
        "gated_rms_norm",
        "delta_out",
    ],
    "attention": ["rms_norm", "attention_qkv", "attention_heads", "attention", "attention_out"],
    "experts": [
        "rms_norm",
        "router_logits",
        "router_top_k",
        "moe_sort",
        "moe_sort",
        "moe_gate_up",
        "moe_down",
        "shared_gate_up",
        "shared_down",
        "moe_combine",
    ],
}
DENSE, GATHERED, SCATTERED = range(3)
SPACE = "qwen::cuda::(anonymous namespace)::"


def multiply(output: int, rows: int, function: str = "multiply<8, 2, 128, ") -> str:
    kinds = f"(qwen::cuda::gemm::Output){output}, (qwen::cuda::gemm::Rows){rows}>"
    return f"void qwen::cuda::gemm::{function}{kinds}(qwen::cuda::gemm::Arguments)"


NORM = f"{SPACE}norm_rows(uint4 const*, uint4 const*, float, uint4*, long, int)"
FLOAT = f"void {SPACE}multiply_float<1, 1, 8, 4>({SPACE}Arguments)"
DELTA = (
    NORM,
    multiply(0, DENSE),
    FLOAT,
    "void qwen::cuda::prepare_chunks<128>(qwen::cuda::Convolution, float const*)",
    "void qwen::cuda::scan_chunks<128, 32, 2>(qwen::cuda::PrefillChunks)",
    f"{SPACE}norm_heads(float const*, __nv_bfloat16 const*, long)",
    multiply(0, DENSE),
)
ATTENTION = (
    NORM,
    multiply(0, DENSE),
    f"{SPACE}prepare_heads(__nv_bfloat16 const*, qwen::cuda::Frequencies)",
    "void qwen::cuda::prefill_attention::attend<256, 8>(qwen::cuda::prefill_attention::Arguments)",
    multiply(0, DENSE),
)
EXPERTS = (
    NORM,
    FLOAT,
    f"void {SPACE}route<8>(float const*, int*, float*, int, int, int)",
    f"{SPACE}count_experts(int const*, int*, int, int, int)",
    f"{SPACE}scatter_choices(int const*, int const*, int*, int*, int, int, int)",
    multiply(1, GATHERED),
    multiply(0, SCATTERED),
    multiply(1, DENSE),
    multiply(0, DENSE),
    f"{SPACE}combine(float const*, __nv_bfloat16 const*)",
)
BEGIN = (f"{SPACE}embed(long const*, qwen::cuda::Int8Matrix, __nv_bfloat16*, long)",)
END = (
    f"void qwen::cuda::decode_kernel<128, 1, 1, qwen::cuda::NormedInput, {SPACE}HeadOutput>(int)",
    "qwen::cuda::sampling::find_best(qwen::cuda::SampleArguments, void*)",
    f"{SPACE}publish_kernel(qwen::cuda::PublishArguments)",
)
# Three layers: DeltaNet, attention, DeltaNet.
PREFILL = (*BEGIN, *DELTA, *EXPERTS, *ATTENTION, *EXPERTS, *DELTA, *EXPERTS, *END)
KINDS = (
    "embedding",
    *(
        kind
        for mixer in ("delta", "attention", "delta")
        for kind in LAYER_KINDS[mixer] + LAYER_KINDS["experts"]
    ),
    *("head", "sample", "publish"),
)
