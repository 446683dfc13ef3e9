"""Checkpoints: every layout equals transformers' reading, and a wrong file is one clear error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from qwen_runner.export.checkpoint import Checkpoint
from qwen_runner.export.errors import ExportError
from random_checkpoints import SPECS, hf_greedy, hf_model, random_prompt
from safetensors import safe_open
from safetensors.torch import load_file, save_file

RandomCheckpoint = Callable[[str], Path]
FILE = "model.safetensors"


@pytest.fixture
def copy(tmp_path: Path, random_checkpoint: RandomCheckpoint) -> RandomCheckpoint:
    """A random checkpoint's own copy, to be damaged."""
    return lambda name: shutil.copytree(random_checkpoint(name), tmp_path / name)


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = FILE) -> None:
    tensors = load_file(path / file)
    change(tensors)
    save_file(tensors, path / file)


@pytest.mark.parametrize("name", SPECS)
def test_equals_transformers(random_checkpoint: RandomCheckpoint, name: str) -> None:
    path = random_checkpoint(name)
    model = hf_model(path)
    theirs = model.state_dict()
    if SPECS[name].tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        del theirs["lm_head.weight"]
    with Checkpoint(path) as checkpoint:
        assert checkpoint.tied == SPECS[name].tied
        assert set(checkpoint.names()) == set(theirs)
        for key in checkpoint.names():
            tensor = checkpoint.tensor(key)
            assert tensor.dtype == SPECS[name].dtype
            assert torch.equal(tensor.float(), theirs[key]), key


@pytest.mark.parametrize("name", SPECS)
def test_the_oracle_is_worth_comparing_with(random_checkpoint: RandomCheckpoint, name: str) -> None:
    """The fixture's promise: finite, well-spread logits, text that varies, no arg-max close to a tie."""
    tokens, logits = hf_greedy(hf_model(random_checkpoint(name)), random_prompt(SPECS[name], 7), 64)
    assert logits.isfinite().all()
    assert 2 < logits.std() < 5
    assert len(set(tokens)) >= 32
    first, second = logits.topk(2).values.T
    assert (first - second).min() > 2e-3


def test_layers_come_in_order_with_their_own_names(random_checkpoint: RandomCheckpoint) -> None:
    with Checkpoint(random_checkpoint("nested_per_expert")) as checkpoint:
        names = checkpoint.names()
        layers = [checkpoint.layer(index) for index in range(3)]
        assert torch.equal(
            layers[1]["self_attn.q_proj.weight"], checkpoint.tensor("model.layers.1.self_attn.q_proj.weight")
        )
    expected = [f"model.layers.{index}.{name}" for index, layer in enumerate(layers) for name in layer]
    assert names == ["model.embed_tokens.weight", *expected, "model.norm.weight"]
    assert "linear_attn.A_log" in layers[0]
    assert "linear_attn.A_log" not in layers[1]
    assert layers[0]["mlp.experts.gate_up_proj"].shape == (6, 64, 64)


def test_tensors_outlive_the_checkpoint(random_checkpoint: RandomCheckpoint) -> None:
    path = random_checkpoint("smallest")
    with Checkpoint(path) as checkpoint:
        norm = checkpoint.tensor("model.norm.weight")
    assert torch.equal(norm, load_file(path / FILE)["model.norm.weight"])


def test_opening_reads_headers_only(copy: RandomCheckpoint) -> None:
    path = copy("smallest")
    with (path / FILE).open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"\xff" * 4096)  # NaN
    checkpoint = Checkpoint(path)
    with safe_open(path / FILE, "pt") as file:
        (last,) = file.offset_keys()[-1:]
    with pytest.raises(ExportError, match=rf"tensor {last} holds NaN or infinite values"):
        checkpoint.tensor(last)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite(copy: RandomCheckpoint, value: float) -> None:
    path = copy("tied_stored")
    edit(path, lambda tensors: tensors["model.norm.weight"].view(-1)[3:4].fill_(value))
    with (
        Checkpoint(path) as checkpoint,
        pytest.raises(ExportError, match=r"tensor model\.norm\.weight holds NaN"),
    ):
        checkpoint.tensor("model.norm.weight")


@pytest.mark.parametrize("name", ["smallest", "per_expert", "nested"])
def test_a_missing_tensor_is_named(copy: RandomCheckpoint, name: str) -> None:
    path = copy(name)
    whole = load_file(path / FILE)
    for missing in list(whole)[:: 5 if name == "per_expert" else 1]:  # its experts are many and alike
        if missing.startswith(("mtp.", "model.visual.")):
            continue
        save_file({key: tensor for key, tensor in whole.items() if key != missing}, path / FILE)
        with pytest.raises(ExportError, match=r"tensor .* is missing") as caught:
            Checkpoint(path)
        named = str(caught.value).split("tensor ")[1].split(" ")[0]
        canonical = missing.replace("model.language_model.", "model.")
        # Without its first part, an expert layout is not recognized and the fused tensor is asked for.
        assert canonical == named or ".experts.0." in canonical


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("smallest", "model.layers.2.input_layernorm.weight"),
        ("smallest", "model.layers.0.self_attn.q_proj.weight"),
        ("smallest", "model.layers.0.linear_attn.in_proj_qkv.bias"),
        ("smallest", "model.layers.0.mlp.experts.0.up_proj.weight"),
        ("smallest", "model.language_model.norm.weight"),
        ("per_expert", "model.layers.0.mlp.experts.12.down_proj.weight"),
        ("per_expert", "visualizer.weight"),
    ],
)
def test_an_extra_tensor_is_named(copy: RandomCheckpoint, name: str, tensor: str) -> None:
    path = copy(name)
    edit(path, lambda tensors: tensors.update({tensor: torch.zeros(3, 2)}))
    with pytest.raises(ExportError, match=rf"{FILE}: unexpected tensor {tensor} of shape \[3, 2\]"):
        Checkpoint(path)


def test_every_misshapen_tensor_is_named(copy: RandomCheckpoint) -> None:
    path = copy("interval")
    whole = load_file(path / FILE)
    for name, tensor in whole.items():
        wrong = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)
        save_file({**whole, name: wrong}, path / FILE)
        found, expected = (str(list(t.shape)).replace("[", r"\[") for t in (wrong, tensor))
        with pytest.raises(ExportError, match=rf"tensor {name} has shape {found}, expected {expected}"):
            Checkpoint(path)


def test_a_misshapen_expert_is_named(copy: RandomCheckpoint) -> None:
    path = copy("per_expert")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    edit(path, lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    with pytest.raises(ExportError, match=rf"tensor {name} has shape \[3, 3\], expected \[64, 64\]"):
        Checkpoint(path)


def test_a_dtype_that_is_not_supported(copy: RandomCheckpoint) -> None:
    path = copy("smallest")
    name = "model.layers.0.linear_attn.A_log"
    edit(path, lambda tensors: tensors.update({name: tensors[name].double()}))
    with pytest.raises(ExportError, match=rf"tensor {name} has dtype F64, expected F32, BF16, F16"):
        Checkpoint(path)


def test_experts_of_different_dtypes(copy: RandomCheckpoint) -> None:
    path = copy("per_expert")
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    edit(path, lambda tensors: tensors.update({name: tensors[name].half()}))
    with pytest.raises(ExportError, match=r"experts\.down_proj have dtypes \['F16', 'F32'\]; expected one"):
        Checkpoint(path)


def test_a_head_that_is_not_the_embedding_it_is_tied_to(copy: RandomCheckpoint) -> None:
    path = copy("tied_stored")
    edit(path, lambda tensors: tensors["lm_head.weight"][5, 5].add_(1))
    with Checkpoint(path) as checkpoint, pytest.raises(ExportError, match=r"lm_head\.weight differs from"):
        checkpoint.tensor("model.embed_tokens.weight")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.999999])
def test_a_truncated_file(copy: RandomCheckpoint, keep: float) -> None:
    path = copy("smallest")
    content = (path / FILE).read_bytes()
    (path / FILE).write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(ExportError, match=rf"{FILE}: not a whole safetensors file \(.*\); download it again"):
        Checkpoint(path)


def test_a_corrupt_header_never_goes_unnoticed(copy: RandomCheckpoint) -> None:
    """Each byte of the length and of the first entries in turn is overwritten."""
    path = copy("smallest")
    content = (path / FILE).read_bytes()
    for offset in range(400):
        if content[offset] == 0:
            continue
        (path / FILE).write_bytes(content[:offset] + b"\0" + content[offset + 1 :])
        with pytest.raises(ExportError) as caught:
            Checkpoint(path)
        assert "\n" not in str(caught.value)


def test_a_missing_shard(copy: RandomCheckpoint) -> None:
    path = copy("sharded")
    (path / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(ExportError, match=r"model-00003-of-00004\.safetensors: no such file"):
        Checkpoint(path)


def test_a_tensor_that_its_shard_does_not_have(copy: RandomCheckpoint) -> None:
    path = copy("sharded")
    edit(path, lambda tensors: tensors.popitem(), "model-00002-of-00004.safetensors")
    with pytest.raises(ExportError, match=r"model-00002-of-00004\.safetensors: tensor .* is missing, though"):
        Checkpoint(path)


def test_a_tensor_that_the_index_does_not_place_in_its_shard(copy: RandomCheckpoint) -> None:
    path = copy("sharded")
    edit(
        path,
        lambda tensors: tensors.update({"lm_head.weight": torch.zeros(1)}),
        "model-00002-of-00004.safetensors",
    )
    with pytest.raises(
        ExportError, match=r"unexpected tensor lm_head\.weight; model\.safetensors\.index\.json does"
    ):
        Checkpoint(path)


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", 5])
def test_an_index_that_leads_elsewhere(copy: RandomCheckpoint, file: object) -> None:
    path = copy("sharded")
    index_path = path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["lm_head.weight"] = file
    index_path.write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"index\.json: weight_map|5: no such file"):
        Checkpoint(path)


def test_no_weights(copy: RandomCheckpoint) -> None:
    path = copy("smallest")
    (path / FILE).unlink()
    with pytest.raises(ExportError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        Checkpoint(path)
    (path / FILE).mkdir()
    with pytest.raises(ExportError, match=rf"{FILE}: not a whole safetensors file"):
        Checkpoint(path)
