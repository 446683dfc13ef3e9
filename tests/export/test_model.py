"""The model in eager mode, where its operators run their references, against Hugging Face's model."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from qwen_runner.export import ExportError, ExportOptions
from qwen_runner.export.checkpoint import Checkpoint
from qwen_runner.export.model import Model
from qwen_runner.export.quantize import QuantizationConfig
from qwen_runner.export.weights import CheckpointWeights
from random_checkpoints import SPECS, hf_model, random_prompt
from torch import Tensor

LENGTH = 37
FLOAT = QuantizationConfig(scheme="none")


@dataclass
class Session:
    """A slot of a model, run greedily."""

    model: Model
    slot: int = 0
    position: int = 0

    @torch.no_grad()
    def run(self, tokens: Sequence[int]) -> tuple[int, Tensor]:
        """The token after `tokens`, and its logits f32 [V]."""
        sampling = ((0.0, 0, 1.0, 0.0, 0.0, 1.0), (0, 1 << 40))
        token, logits = self.model(
            torch.tensor([list(tokens)]),
            torch.tensor([self.position]),
            torch.tensor([self.slot]),
            *(torch.tensor([value]) for group in sampling for value in group),
        )
        self.position += len(tokens)
        return int(token), logits[0]


def load(path: Path, quantization: QuantizationConfig = FLOAT, dtype: torch.dtype = torch.float32) -> Model:
    with Checkpoint(path) as checkpoint:
        weights = CheckpointWeights(checkpoint, quantization, dtype)
        return Model(checkpoint.config, weights, slots=3, max_seq_len=64, dtype=dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", SPECS)
def test_logits_are_hugging_faces_in_whatever_pieces_the_prompt_comes(
    name: str, random_checkpoint: Callable[[str], Path]
) -> None:
    path = random_checkpoint(name)
    prompt = random_prompt(SPECS[name], LENGTH)
    with torch.no_grad():
        expected = hf_model(path)(torch.tensor([prompt]), use_cache=False).logits[0, -1]
    model = load(path)
    states = []
    for slot, pieces in enumerate(([LENGTH], [16, 16, 5], [1] * LENGTH)):
        session = Session(model, slot)
        for length in pieces:
            token, logits = session.run(prompt[session.position : session.position + length])
        assert relative_error(logits, expected) < 1e-4
        assert token == int(expected.argmax())
        states.append({key: value[slot].clone() for key, value in model.named_buffers()})
    for other in states[1:]:
        for key, state in states[0].items():
            assert relative_error(other[key].float(), state.float()) < 2e-5, key


def test_a_slot_is_untouched_by_another(random_checkpoint: Callable[[str], Path]) -> None:
    model = load(random_checkpoint("interval"))
    prompt = random_prompt(SPECS["interval"], LENGTH)
    alone = Session(model, 0).run(prompt)[1]
    first, second = Session(model, 1), Session(model, 2)
    for start in range(0, LENGTH - 1, 4):
        logits = first.run(prompt[start : start + 4])[1]
        second.run(prompt[::-1][start : start + 4])
    logits = first.run(prompt[first.position :])[1] if first.position < LENGTH else logits
    assert relative_error(logits, alone) < 1e-5


def test_batched_decode_gives_each_row_its_own_session(random_checkpoint: Callable[[str], Path]) -> None:
    model = load(random_checkpoint("interval"))
    prompt = random_prompt(SPECS["interval"], 12)
    expected = []
    for slot, length in enumerate((5, 9)):
        session = Session(model, slot)
        session.run(prompt[:length])
        before = {key: value.clone() for key, value in model.named_buffers()}
        expected.append(session.run(prompt[length : length + 1])[1])
        model.load_state_dict(before, strict=False)
    rows = torch.tensor([5, 9])
    with torch.no_grad():
        _, logits = model(
            torch.tensor([[prompt[5]], [prompt[9]]]),
            rows,
            torch.tensor([0, 1]),
            *(torch.full((2,), value) for value in (0.0, 0, 1.0, 0.0, 0.0, 1.0, 0, 1 << 40)),
        )
    for row, one in zip(logits, expected, strict=True):
        assert relative_error(row, one) < 1e-5


@pytest.mark.parametrize("name", ["interval", "full_only", "bfloat16"])
def test_bfloat16_is_as_near_to_float32_as_hugging_faces(
    name: str, random_checkpoint: Callable[[str], Path], record_property: Callable[[str, object], None]
) -> None:
    """The medians over prompts: where rounding makes a router choose another expert, logits jump for both."""
    path = random_checkpoint(name)
    exact, theirs = hf_model(path), hf_model(path, torch.bfloat16)
    distances: dict[str, list[float]] = {"ours": [], "theirs": []}
    for start in range(8):
        prompt = random_prompt(SPECS[name], LENGTH + start)[start:]
        inputs = torch.tensor([prompt])
        with torch.no_grad():
            expected = exact(inputs, use_cache=False).logits[0, -1]
            rounded = theirs(inputs, use_cache=False).logits[0, -1].float()
        logits = Session(load(path, dtype=torch.bfloat16)).run(prompt)[1]
        for who, value in (("ours", logits), ("theirs", rounded)):
            distances[who].append(float((value - expected).norm() / expected.norm()))
    ours, their = (statistics.median(distances[who]) for who in ("ours", "theirs"))
    record_property("relative distance to float32", {"ours": ours, "theirs": their})
    assert ours < 1.25 * their


@pytest.mark.parametrize(("name", "head"), [("interval", "int4"), ("interval", "int8"), ("tied", "int8")])
def test_quantized_weights_are_where_the_policy_says(
    name: str, head: str, random_checkpoint: Callable[[str], Path]
) -> None:
    quantization = QuantizationConfig(scheme="int4", head=head, method="rtn")  # type: ignore[arg-type]
    model = load(random_checkpoint(name), quantization)
    kinds = {key: str(value.dtype).removeprefix("torch.") for key, value in model.named_parameters()}
    assert kinds["embed_tokens.qweight"] == "int8"
    assert kinds["layers.0.mlp.experts.gate_up_qweight"] == "uint8"
    assert kinds["layers.0.linear_attn.in_proj_qkvz.qweight"] == "uint8"
    assert kinds["layers.0.linear_attn.in_proj_qkvz.scales"] == "bfloat16"
    assert kinds["layers.0.mlp.gate"] == kinds["layers.0.linear_attn.in_proj_ab.weight"] == "float32"
    if name == "tied":
        assert not any(key.startswith("lm_head") for key in kinds)
    else:
        assert kinds["lm_head.qweight"] == {"int4": "uint8", "int8": "int8"}[head]
    assert torch.isfinite(Session(model).run(random_prompt(SPECS[name], 8))[1]).all()


def test_options_that_do_not_fit_a_model_are_named(random_checkpoint: Callable[[str], Path]) -> None:
    config = Checkpoint(random_checkpoint("tied")).config
    for options, named in (
        ({"max_seq_len": 513}, "--max-seq-len 513"),
        ({"max_seq_len": 1}, "--max-seq-len 1"),
        ({"max_seq_len": 64, "chunk": 65}, "--chunk 65"),
        ({"chunk": 1}, "--chunk 1"),
        ({"head": "int4"}, "--head int4"),
        ({"group_size": 128}, "--group-size"),
    ):
        with pytest.raises(ExportError, match=named):
            ExportOptions(**options).resolved(config)  # type: ignore[arg-type]
