"""Held-out perplexity of a checkpoint, as it is and with int4 weights, through transformers' own model.

    python demo/perplexity.py [CHECKPOINT] [--text FILE] [--limit BYTES]

The text is cut into windows of 1024 tokens; each is scored alone from its second token on. int4 means
symmetric groups of 32 along the input axis for every linear layer, one scale a group (absmax / 7, or the
scale of least squared error), and int8 groups for the embedding; the router, norms, convolution and gates
stay as they are.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3_5MoeForCausalLM

WINDOW = 1024
GROUP = 32
INT4 = re.compile(r"(q|k|v|o|out|in|gate|up|down|gate_up)_proj(_qkv|_z)?(\.weight)?$")


@dataclass(frozen=True)
class Score:
    """Held-out figures: `perplexity` a token, `bits_per_byte` of the predicted tokens' text."""

    perplexity: float
    bits_per_byte: float
    tokens: int


def score(model: Qwen3_5MoeForCausalLM, tokenizer: Tokenizer, text: str) -> Score:
    """Scores `text` window by window in the model's own dtype; logits are compared in float32."""
    tokens = tokenizer.encode(text).ids
    nats, count, size = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, WINDOW):
            window = torch.tensor(tokens[start : start + WINDOW])
            if len(window) < 2:
                break
            logits = model(window[None, :-1], use_cache=False).logits[0].float()
            nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
            size += len(tokenizer.decode(window[1:].tolist(), skip_special_tokens=False).encode())
    return Score(math.exp(nats / count), nats / math.log(2) / size, count)


def rounded(weight: Tensor, limit: int, search: bool) -> Tensor:
    """`weight` rounded to integers in [-limit - 1, limit], one scale a group, and back in its own dtype."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(1e-8) / limit
    best, best_error = torch.zeros_like(groups), torch.full_like(largest, torch.inf)
    for factor in torch.linspace(0.75, 1.1, 15) if search else (1.0,):
        scale = (largest * factor).bfloat16().float()
        candidate = (groups / scale).round().clamp(-limit - 1, limit) * scale
        error = (candidate - groups).square().sum(-1, keepdim=True)
        best = torch.where(error < best_error, candidate, best)
        best_error = torch.minimum(error, best_error)
    return best.flatten(-2).to(weight.dtype)


def quantize(model: Qwen3_5MoeForCausalLM, search: bool) -> None:
    """Replaces the weights in place by what int4 (embedding: int8) storage makes of them."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                weight.copy_(rounded(weight, 127, search=False))
            elif INT4.search(name):
                weight.copy_(rounded(weight, 7, search))


def main() -> None:
    """Entry point."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", default=here)
    parser.add_argument("--text", type=Path, default=here / "heldout.txt")
    parser.add_argument("--limit", type=int, default=None, help="bytes of the text to score")
    options = parser.parse_args()
    text = options.text.read_bytes()[: options.limit].decode("utf-8", "ignore")
    tokenizer = Tokenizer.from_file(str(options.checkpoint / "tokenizer.json"))
    for label, dtype, search in (
        ("bf16 weights, float32 arithmetic", torch.float32, None),
        ("bf16 weights, bf16 arithmetic", torch.bfloat16, None),
        ("int4, absmax scale", torch.float32, False),
        ("int4, searched scale", torch.float32, True),
    ):
        model = Qwen3_5MoeForCausalLM.from_pretrained(options.checkpoint, dtype=dtype).eval()
        if search is not None:
            quantize(model, search)
        result = score(model, tokenizer, text)
        print(
            f"{label:34} perplexity {result.perplexity:7.3f}  {result.bits_per_byte:.4f} bits/byte  "
            f"{result.tokens} tokens",
            flush=True,
        )


if __name__ == "__main__":
    main()
