"""Trains the demo model from random weights, in minutes on one large GPU.

    python demo/train.py CORPUS OUT --minutes 3   # CORPUS: of corpus.py; OUT: model.safetensors, log.txt

Two phases share one warm-up and cosine schedule, driven by the clock. Phase one sees short windows. Phase
two sees windows of the model's full length and rounds a random share of the int4 groups at every step
(`forward.noisy`), so that the weights lose little when they are quantized. The checkpoint with the lowest
validation loss stays.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import chats
import forward
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

HERE = Path(__file__).parent
NOVELS = {"Emma", "Mansfield Park", "Northanger Abbey", "Persuasion", "Pride And Prejudice",
          "Sense And Sensibility", "Moby-Dick"}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What a run depends on, besides the text."""

    minutes: float  # of training, compilation included
    batch_tokens: int = 32768
    short: int = 512  # tokens a window, phase one
    long: int = 2048  # tokens a window, phase two
    long_share: float = 0.35  # of the time
    noise: float = 0.5  # share of int4 groups rounded in phase two
    learning_rate: float = 3e-3
    weight_decay: float = 1.0
    dropout: float = 0.2
    warmup: float = 0.03  # of the time
    conversations: int = 6000
    seed: int = 1


def token_stream(corpus: Path, tokenizer: Tokenizer, recipe: Recipe) -> Tensor:
    """All training text, [tokens] int64: chapters and conversations shuffled, <|endoftext|> after each."""
    chapters = json.loads((corpus / "train.json").read_text())
    definitions = json.loads((corpus / "definitions.json").read_text())
    novels = [chapter["text"] for chapter in chapters if chapter["book"] in NOVELS]
    source = chats.Conversations(novels, definitions, recipe.seed)
    documents = [chapter["text"] for chapter in chapters]
    documents += [chats.render(source.draw()) for _ in range(recipe.conversations)]
    random.Random(recipe.seed).shuffle(documents)
    end = tokenizer.token_to_id("<|endoftext|>")
    return torch.tensor([token for document in documents for token in [*tokenizer.encode(document).ids, end]])


def new_model(recipe: Recipe, device: torch.device) -> Qwen3_5MoeForCausalLM:
    """The model of config.json with random float32 weights."""
    torch.manual_seed(recipe.seed)
    config = Qwen3_5MoeTextConfig.from_pretrained(HERE)
    config.dtype = torch.float32
    model = Qwen3_5MoeForCausalLM(config)
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            nn.init.uniform_(
                module.weight, -0.5, 0.5
            )  # the usual 0.02 leaves four taps that pass next to nothing
    return model.to(device)


def optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; vectors (norms, decay rates) carry no weight decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Linear warm-up, then cosine to 1 % of the peak; progress in [0, 1] is the share of time gone."""
    if progress < recipe.warmup:
        return recipe.learning_rate * progress / recipe.warmup
    done = min((progress - recipe.warmup) / (1 - recipe.warmup), 1.0)
    return recipe.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, length: int, rate: float) -> float:
    """Mean loss in nats a token over windows of `length`; rate 1 rounds every int4 group."""
    rows = tokens[: (len(tokens) - 1) // length * length + 1]
    windows = torch.stack([rows[i : i + length + 1] for i in range(0, len(rows) - 1, length)])
    with torch.autocast(tokens.device.type, torch.bfloat16):
        return forward.loss(model, windows, rate=rate)[0].item()


def save(model: nn.Module, path: Path) -> None:
    """Writes the weights as bfloat16 under transformers' names; the tied head is not repeated."""
    state = {name: value.to(torch.bfloat16).contiguous().cpu() for name, value in model.state_dict().items()}
    del state["lm_head.weight"]
    save_file(state, path, metadata={"format": "pt"})


def train(corpus: Path, out: Path, recipe: Recipe, device: torch.device) -> None:
    """Runs the recipe; leaves the best checkpoint in out/model.safetensors, the losses in out/log.txt."""
    torch.set_float32_matmul_precision("high")
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    stream = token_stream(corpus, tokenizer, recipe).to(device)
    validation = torch.tensor(tokenizer.encode((corpus / "validation.txt").read_text()).ids, device=device)
    model = new_model(recipe, device)
    update = optimizer(model, recipe)
    torch._dynamo.config.recompile_limit = 64  # two kinds of layers, two phases, eight instances
    layer = torch.compile(forward.layer, dynamic=False) if device.type == "cuda" else forward.layer
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "log.txt").open("w", buffering=1)
    start, step, seen, best, next_report = time.monotonic(), 0, 0, math.inf, 0.02
    print(recipe, f"{sum(p.numel() for p in model.parameters())} parameters, {len(stream)} tokens", file=log)
    while (progress := (time.monotonic() - start) / (60 * recipe.minutes)) < 1:
        late = progress > 1 - recipe.long_share
        length = recipe.long if late else recipe.short
        offsets = torch.randint(len(stream) - length - 1, (recipe.batch_tokens // length, 1), device=device)
        windows = stream[offsets + torch.arange(length + 1, device=device)]
        for group in update.param_groups:
            group["lr"] = learning_rate(recipe, progress)
        with torch.autocast(device.type, torch.bfloat16):
            loss, balance = forward.loss(model, windows, recipe.dropout, recipe.noise if late else 0.0, layer)
        (loss + model.config.router_aux_loss_coef * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update.step()
        update.zero_grad()
        step, seen = step + 1, seen + windows.numel()
        if progress >= next_report or step == 1:
            next_report = progress + 0.02
            exact, rounded = (evaluate(model, validation, 512, rate) for rate in (0.0, 1.0))
            print(
                f"{progress:5.1%} step {step} epoch {seen / len(stream):.1f} train {loss.item():.3f} balance "
                f"{balance.item():.2f} validation {exact:.4f} int4 {rounded:.4f}",
                file=log,
            )
            if exact < best and late:
                best = exact
                save(model, out / "model.safetensors")
    exact, rounded = (evaluate(model, validation, 512, rate) for rate in (0.0, 1.0))
    print(f"end step {step} validation {exact:.4f} int4 {rounded:.4f}", file=log)
    if exact < best:
        save(model, out / "model.safetensors")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--dropout", type=float, default=Recipe.dropout)
    parser.add_argument("--weight_decay", type=float, default=Recipe.weight_decay)
    parser.add_argument("--batch_tokens", type=int, default=Recipe.batch_tokens)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    recipe = Recipe(
        minutes=options.minutes,
        dropout=options.dropout,
        weight_decay=options.weight_decay,
        batch_tokens=options.batch_tokens,
    )
    train(options.corpus, options.out, recipe, torch.device(options.device))


if __name__ == "__main__":
    main()
