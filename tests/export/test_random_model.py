"""Exports without a checkpoint: random weights in a known model's shape, the weights of another program."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from qwen_runner.export import ExportError, ExportOptions, export_program, random_weights
from qwen_runner.export.__main__ import main
from qwen_runner.export.cuda_model import CudaModel
from qwen_runner.export.manifest import write_manifest
from qwen_runner.export.model import Model
from qwen_runner.export.ptd import WeightsFile
from qwen_runner.export.quantize import QuantizationConfig
from qwen_runner.export.random_weights import RandomWeights, known_models, load_known_config
from qwen_runner.export.sources import open_source
from random_checkpoints import SPECS, random_prompt
from test_model import Session
from test_program import FakeProgram

Checkpoints = Callable[[str], Path]


@pytest.fixture
def small_models(
    tmp_path_factory: pytest.TempPathFactory,
    random_checkpoint: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Known models of the shape of the random checkpoints: aligned to tiles, not aligned, tied."""
    folder = tmp_path_factory.mktemp("known")
    for name in ("interval", "linear_only", "tied"):
        (folder / name).mkdir()
        shutil.copy(random_checkpoint(name) / "config.json", folder / name)
    monkeypatch.setattr(random_weights, "KNOWN_MODELS", folder)
    monkeypatch.setattr(random_weights, "_BLOCK_BYTES", 10_007)  # less than a matrix
    monkeypatch.setattr(random_weights, "_BLOCK_SCALES", 1009)


def test_the_35b_models_shape() -> None:
    assert "qwen3.5-35b-a3b" in known_models()
    config = load_known_config("qwen3.5-35b-a3b")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (2048, 40, 248320)
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == list(
        range(3, 40, 4)
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 2, 256)
    assert (config.rotary_dim, config.rope_theta, config.rms_norm_eps) == (64, 1e7, 1e-6)
    assert (config.linear_conv_size, config.linear_value_size) == (8192, 4096)
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (256, 8, 512)
    assert config.eos_token_ids == (248046, 248044)
    assert not config.tie_word_embeddings


@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize("name", ["interval", "linear_only", "tied"])
@pytest.mark.parametrize("kind", [Model, CudaModel])
def test_random_models_compute_something_in_bounds(name: str, kind: type[Model]) -> None:
    config = load_known_config(name)
    quantization = QuantizationConfig(head="int8" if config.tie_word_embeddings else "int4")

    def logits(seed: int) -> torch.Tensor:
        weights = RandomWeights(config, quantization, torch.bfloat16, seed)
        model = kind(config, weights, slots=1, max_seq_len=64, dtype=torch.bfloat16)
        return Session(model).run(random_prompt(SPECS[name], 12))[1]

    first = logits(0)
    assert torch.isfinite(first).all()
    if not config.tie_word_embeddings:
        assert 1 < float(first.std()) < 6
    assert torch.equal(first, logits(0))
    assert not torch.equal(first, logits(1))


@pytest.mark.usefixtures("small_models")
def test_padding_of_random_tiles_is_zero() -> None:
    """96 columns take two tiles of 64."""
    weights = RandomWeights(load_known_config("linear_only"), QuantizationConfig(), torch.bfloat16)
    part = weights.scope("model.layers.0.").gate_up_tiles("mlp.experts.gate_up_proj")
    assert part.tiles.shape[-2] == 2
    words = part.tiles.view(torch.int32).unflatten(-1, (32, 4))  # {columns 0..31, 32..63} of two rows each
    assert words[..., -1, :, 1::2].eq(0).all()
    assert words[..., -1, :, 0::2].ne(0).any()
    assert part.scales[..., 3:, :].eq(0).all()


@pytest.mark.usefixtures("small_models", "without_lowering")
def test_a_random_program_has_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    from qwen_runner import _core

    output = export_program(None, tmp_path / "program", random="interval", target="cuda")
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["name"] == "interval-random"
    assert manifest["chat"]["supported"] is False
    assert set(manifest["files"]) == {"model.pte", "model.ptd", "tokenizer.json"}
    tokenizer = _core.Tokenizer(str(output / "tokenizer.json"))
    text = "naïve 日本語\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


@pytest.mark.usefixtures("small_models", "without_lowering")
def test_a_random_program_takes_a_tokenizer_that_is_given(
    tmp_path: Path, random_checkpoint: Checkpoints
) -> None:
    folder = random_checkpoint("interval")
    output = export_program(None, tmp_path / "program", random="interval", tokenizer=folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((output / "manifest.json").read_text())["chat"]["supported"] is True


def test_an_unknown_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--random", "llama", "--output", str(tmp_path / "program")]) == 1
    assert "--random llama: known models: qwen3.5-35b-a3b" in capsys.readouterr().err


def test_a_checkpoint_has_its_own_tokenizer(tmp_path: Path, random_checkpoint: Checkpoints) -> None:
    with pytest.raises(ExportError, match=r"--tokenizer .*goes with --random"):
        export_program(random_checkpoint("interval"), tmp_path / "program", tokenizer=tmp_path)


@pytest.fixture
def without_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_runner.export import program

    monkeypatch.setattr(program, "lower", lambda *_, **__: FakeProgram(b"methods"))


@pytest.mark.usefixtures("without_lowering")
@pytest.mark.parametrize(
    "options",
    [
        {"target": "cpu", "quantize": "none"},
        {"target": "cpu", "quantize": "int4", "quantize_method": "rtn", "dtype": "bfloat16"},
        {"target": "cuda", "head": "int8", "quantize_method": "rtn"},
    ],
)
def test_a_program_is_a_source_of_packed_weights(
    options: dict[str, str], tmp_path: Path, random_checkpoint: Checkpoints
) -> None:
    first = export_program(
        random_checkpoint("interval"), tmp_path / "a", **options, max_seq_len=100, chunk=50, slots=2
    )
    second = export_program(first, tmp_path / "b", max_seq_len=40, slots=7)
    before, after = (json.loads((path / "manifest.json").read_text()) for path in (first, second))
    assert (first / "model.ptd").read_bytes() == (second / "model.ptd").read_bytes()
    assert (after["max_seq_len"], after["chunk"], after["slots"]) == (40, 40, 7)
    assert (before["batch"], after["batch"]) == ((2, 7) if options["target"] == "cuda" else (1, 1))
    same = before.keys() - {"max_seq_len", "chunk", "slots", "batch", "manifest_sha256"}
    assert {key: before[key] for key in same} == {key: after[key] for key in same}
    assert export_program(second, second, max_seq_len=64).is_dir()  # in its own place
    manifest = json.loads((second / "manifest.json").read_text())
    assert (manifest["max_seq_len"], manifest["batch"]) == (64, after["batch"])


@pytest.mark.usefixtures("without_lowering")
def test_a_batch_stays_unless_slots_change(tmp_path: Path, random_checkpoint: Checkpoints) -> None:
    def exported(source: Path, **options: int | str) -> int:
        output = export_program(source, tmp_path / "a", **options)
        batch: int = json.loads((output / "manifest.json").read_text())["batch"]
        return batch

    assert exported(random_checkpoint("smallest"), target="cuda", slots=16) == 8
    assert exported(tmp_path / "a", batch=3) == 3
    assert exported(tmp_path / "a", chunk=32) == 3
    assert exported(tmp_path / "a", slots=2) == 2
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    del manifest["batch"], manifest["manifest_sha256"]  # as before there were batches
    write_manifest(tmp_path / "a" / "manifest.json", manifest)
    assert exported(tmp_path / "a") == 2


@pytest.mark.usefixtures("without_lowering")
def test_packed_weights_stay_as_they_are(tmp_path: Path, random_checkpoint: Checkpoints) -> None:
    first = export_program(random_checkpoint("interval"), tmp_path / "a", target="cuda")
    for options, named in (
        ({"group_size": 64}, "--group-size 64: .*has 32, packed"),
        ({"target": "cpu"}, "--target cpu: .*has cuda, packed"),
        ({"head": "int8"}, "--head int8: .*has int4"),
        ({"max_seq_len": 600}, "--max-seq-len 600: the model has max_position_embeddings 512"),
        ({"slots": 0}, "--slots 0"),
    ):
        with pytest.raises(ExportError, match=named):
            export_program(first, tmp_path / "b", **options)
    assert export_program(first, tmp_path / "b", group_size=32, target="cuda").is_dir()


@pytest.mark.usefixtures("without_lowering")
def test_options_without_effect_are_refused(tmp_path: Path, random_checkpoint: Checkpoints) -> None:
    checkpoint = random_checkpoint("interval")
    unquantized = export_program(checkpoint, tmp_path / "a", quantize="none")
    for source, options, named in (
        (unquantized, {"head": "int8"}, "--head int8: it has no effect, .*a is not quantized"),
        (unquantized, {"group_size": 32}, "--group-size 32: it has no effect"),
        (
            checkpoint,
            {"quantize": "none", "group_size": 64},
            "--group-size 64: it has no effect, --quantize none",
        ),
        (None, {"quantize_method": "rtn"}, "--quantize-method rtn: it has no effect, random weights"),
    ):
        random = {} if source else {"random": "qwen3.5-35b-a3b"}
        with pytest.raises(ExportError, match=named):
            export_program(source, tmp_path / "b", **random, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damage", ["a bit", "cut", "manifest", "no json", "layout", "format", "tokenizer", "foreign"]
)
def test_a_damaged_program_is_no_source(
    damage: str, tmp_path: Path, random_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is found before anything is compiled, which takes minutes."""
    from qwen_runner.export import program

    monkeypatch.setattr(program, "lower", lambda *_, **__: FakeProgram(b"methods"))
    first = export_program(random_checkpoint("smallest"), tmp_path / "a", target="cuda")
    monkeypatch.setattr(program, "lower", lambda *_, **__: pytest.fail("it compiles"))
    weights, manifest, tokenizer = (
        first / f"{name}" for name in ("model.ptd", "manifest.json", "tokenizer.json")
    )
    if damage == "a bit":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"slots": 4', '"slots": 5'))
    elif damage == "no json":
        manifest.write_text(manifest.read_text()[:100])
    elif damage == "tokenizer":
        tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    elif damage == "foreign":
        (first / "chat_template.jinja").write_text("another")
    else:
        changed = json.loads(manifest.read_text())
        del changed["manifest_sha256"]
        if damage == "layout":
            changed["quantization"]["layout"] = "another"
        else:
            changed["format_version"] = 0
        write_manifest(manifest, changed)
    named = {
        "a bit": r"model\.ptd: does not match its digests",
        "cut": r"model\.ptd: does not match its digests",
        "manifest": r"manifest\.json: does not match its own digest",
        "no json": r"manifest\.json: not JSON .*; copy or export the program again",
        "layout": "have the layout another",
        "format": "program format 0",
        "tokenizer": r"tokenizer\.json: does not match its digests",
        "foreign": r"chat_template\.jinja: it is no part of the program",
    }
    with pytest.raises(ExportError, match=named[damage]):
        export_program(first, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("small_models")
def test_weights_are_made_one_after_the_other(tmp_path: Path) -> None:
    """Nothing is computed before it is asked for."""
    made: list[str] = []

    class Watched(RandomWeights):
        def _int4(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
            made.append(name)
            return super()._int4(name)

    from qwen_runner.export import sources

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "RandomWeights", Watched)
        with open_source(None, "interval", None, {"target": "cpu"}) as source:
            weights = source.weights(None, lambda _: None)  # type: ignore[arg-type]
            assert not made
            names = [name for name, _ in zip(weights, range(20), strict=False)]
            assert any(name.startswith("layers.0.") for name, _ in names)
            assert {name.split(".")[2] for name in made} == {"0"}


def test_options_inherit_nothing_by_accident() -> None:
    """Every option is either free in a program compiled anew, or packed."""
    from dataclasses import fields

    from qwen_runner.export.packed import _FREE

    packed = {"target", "quantize", "group_size", "quantize_method", "head", "dtype"}
    assert packed | set(_FREE) == {option.name for option in fields(ExportOptions)}


def test_a_weights_file_lists_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        WeightsFile(tmp_path / "model.ptd")
