"""Which kernel of a prefill is which: the kinds of kernels that ran one after the other, and their layers.

A product of int4 weights has one name wherever it is: what is beside it in its layer says which it is, by the
order of runner/shims/cuda_{deltanet,attention,moe}.cpp. Kinds have the names of cuda_kernels.py's workloads
where a kernel is one of those; a kernel of unknown name keeps that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from kernel_timeline import function_name

NORM, EMBEDDING, HEAD, COMBINE = "rms_norm", "embedding", "head", "moe_combine"

# By the function's own name.
KINDS = (
    (re.compile(r"norm_rows"), NORM),
    (re.compile(r"prepare_chunks"), "delta_prepare"),
    (re.compile(r"scan_chunks"), "delta_scan"),
    (re.compile(r"norm_heads|gated_norm"), "gated_rms_norm"),
    (re.compile(r"prepare_heads"), "attention_heads"),
    (re.compile(r"attend"), "attention"),
    (re.compile(r"router"), "router_logits"),
    (re.compile(r"^route"), "router_top_k"),
    (re.compile(r"count_experts|scatter_choices|sort_choices"), "moe_sort"),
    (re.compile(r"gate_up"), "moe_gate_up"),
    (re.compile(r"down"), "moe_down"),
    (re.compile(r"combine"), COMBINE),
    (re.compile(r"^embed"), EMBEDDING),
    (re.compile(r"head_rows"), HEAD),
    (re.compile(r"find_best|filter_bins|draw_token|sample"), "sample"),
    (re.compile(r"publish"), "publish"),
)
# What runs between a mixer's products, which have other names at its beginning than at its end.
MIXERS = {
    "delta_prepare": "delta",
    "delta_scan": "delta",
    "gated_rms_norm": "delta",
    "attention_heads": "attention",
    "attention": "attention",
}
INPUTS = {"delta": "delta_qkvz", "attention": "attention_qkv"}
# The experts' products in their order.
EXPERTS = ("moe_gate_up", "moe_down", "shared_gate_up", "shared_down")

PRODUCT, FLOAT_PRODUCT = re.compile(r"^multiply|^decode_kernel$"), re.compile(r"^multiply_float")
HEAD_OUTPUT = re.compile(r"HeadOutput")
# `Rows` of kernels/linear/gemm_tile.cuh, as names have it: a product's tokens are gathered for the routed
# experts, or scattered from them.
GATHERED, SCATTERED = re.compile(r"Rows\)1"), re.compile(r"Rows\)2")


def prefill_kinds(names: Sequence[str]) -> list[str]:
    kinds = [_known(name) for name in names]
    for begin, end in _sections(kinds):
        kinds[begin:end] = _named(names[begin:end], kinds[begin:end])
    return kinds


def _known(name: str) -> str:
    """Empty of a product, which is named by what is beside it."""
    function = function_name(name)
    if HEAD_OUTPUT.search(name):
        return HEAD
    if GATHERED.search(name):
        return "moe_gate_up"
    if SCATTERED.search(name):
        return "moe_down"
    known = next((kind for pattern, kind in KINDS if pattern.search(function)), "")
    return known or ("" if PRODUCT.search(function) else function)


def _sections(kinds: Sequence[str]) -> list[tuple[int, int]]:
    """Where each norm's section begins and ends: a token mixer, or the experts behind it.

    One begins without a norm, too, after a layer's last kernel.
    """
    begins = [0]
    for i, kind in enumerate(kinds):
        if kind == NORM:
            begins.append(i)
        if kind in (EMBEDDING, COMBINE):
            begins.append(i + 1)
    begins = [*dict.fromkeys(begins), len(kinds)]
    return [(begin, end) for begin, end in zip(begins, begins[1:], strict=False) if begin < end]


def _named(names: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """A section's kinds, its products named."""
    named = list(kinds)
    mixer = [i for i, kind in enumerate(kinds) if kind in MIXERS]
    experts = []
    out = False
    for i, kind in enumerate(kinds):
        if kind:
            continue
        if FLOAT_PRODUCT.search(function_name(names[i])):
            named[i] = "delta_ab" if mixer and i < mixer[-1] else "router_logits"
        elif mixer and i < mixer[-1]:
            named[i] = INPUTS[MIXERS[kinds[mixer[0]]]]
        elif mixer and not out:
            named[i], out = f"{MIXERS[kinds[mixer[0]]]}_out", True
        else:
            experts.append(i)
    left = [kind for kind in EXPERTS if kind not in kinds]
    for i, kind in zip(experts, left, strict=False):
        named[i] = kind
    return [kind or function_name(name) for name, kind in zip(names, named, strict=True)]


def layers(kinds: Sequence[str]) -> list[tuple[str, int, int]]:
    """("delta" or "attention", first kernel, end) of each layer."""
    found: list[tuple[str, int, int]] = []
    for begin, end in _sections(kinds):
        mixers = [MIXERS[kind] for kind in kinds[begin:end] if kind in MIXERS]
        if HEAD in kinds[begin:end]:  # behind the last layer's last kernel
            end = begin + list(kinds[begin:end]).index(HEAD)
        if mixers:
            found.append((mixers[0], begin, end))
        elif found and found[-1][2] == begin:
            found[-1] = (*found[-1][:2], end)
    return found
