"""config.json and generation_config.json: read as transformers reads them, or one clear error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qwen_runner.export.config import FULL_ATTENTION, LINEAR_ATTENTION, SamplingDefaults, load_config
from qwen_runner.export.errors import ExportError

Write = Callable[..., Path]

# The published text_config of Qwen3.5-35B-A3B in shape, with keys that do not concern an export.
TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 248320,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "attention_bias": False,
    "attn_output_gate": True,
    "attention_dropout": 0.0,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
    "eos_token_id": 248044,
    "mtp_num_hidden_layers": 1,
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a checkpoint folder's JSON files; a key of None is left out."""

    def write(config: Any, generation: Any = None) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path

    return write


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in TEXT.items() if k != key}


def nested(**top: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": TEXT,
        "vision_config": {"model_type": "qwen3_5_moe_vision", "hidden_act": "gelu_pytorch_tanh"},
    } | top


def test_every_random_checkpoint_reads_as_transformers_does(random_checkpoint: Callable[[str], Path]) -> None:
    from random_checkpoints import SPECS
    from transformers import AutoConfig

    for name in SPECS:
        path = random_checkpoint(name)
        theirs = AutoConfig.from_pretrained(path).get_text_config()
        ours = load_config(path)
        same_name = [
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_conv_kernel_dim",
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "tie_word_embeddings",
            "max_position_embeddings",
        ]
        assert {n: getattr(ours, n) for n in same_name} == {n: getattr(theirs, n) for n in same_name}, name
        assert ours.layer_types == tuple(theirs.layer_types)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.rotary_dim == int(theirs.head_dim * theirs.rope_parameters["partial_rotary_factor"])


def test_a_file_with_only_what_has_no_default_reads_as_transformers_does(write: Write) -> None:
    from transformers import Qwen3_5MoeTextConfig

    optional = (
        "rope_parameters",
        "full_attention_interval",
        "max_position_embeddings",
        "hidden_act",
        "eos_token_id",
    )
    path = write({key: value for key, value in TEXT.items() if key not in optional})
    ours, theirs = load_config(path), Qwen3_5MoeTextConfig.from_pretrained(path)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rotary_dim == int(256 * theirs.rope_parameters["partial_rotary_factor"])
    assert ours.layer_types == tuple(theirs.layer_types)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.eos_token_ids == ()
    assert ours.sampling == SamplingDefaults(temperature=0.0)


def test_the_published_shape_flat_and_nested(write: Write) -> None:
    flat = load_config(write(TEXT))
    assert load_config(write(nested())) == flat
    assert flat.layer_types == (LINEAR_ATTENTION, LINEAR_ATTENTION, LINEAR_ATTENTION, FULL_ATTENTION) * 10
    assert (flat.rotary_dim, flat.rope_theta, flat.eos_token_ids) == (64, 1e7, (248044,))
    assert (flat.linear_conv_size, flat.linear_value_size, flat.attention_size) == (8192, 4096, 4096)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}, "rope_theta": 1.0},
        {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}, "rope_theta": 5e5},
    ],
)
def test_rope_old_and_new(write: Write, rope: dict[str, Any]) -> None:
    from transformers import Qwen3_5MoeTextConfig

    path = write(without("rope_parameters") | rope)
    config = load_config(path)
    assert (config.rope_theta, config.rotary_dim) == (5e5, 128)
    theirs = Qwen3_5MoeTextConfig.from_pretrained(path).rope_parameters
    assert (theirs["rope_theta"], theirs["partial_rotary_factor"]) == (5e5, 0.5)


@pytest.mark.parametrize(
    ("top", "text", "tied"), [(True, None, True), (None, True, True), (False, True, False)]
)
def test_tied_embeddings_beside_text_config(write: Write, top: Any, text: Any, tied: bool) -> None:
    config = nested(text_config=TEXT | {"tie_word_embeddings": text}, tie_word_embeddings=top)
    assert load_config(write(config)).tie_word_embeddings is tied


def test_end_of_text_ids_of_the_generation_config_win(write: Write) -> None:
    assert load_config(write(TEXT, {"eos_token_id": [7, 9, 7]})).eos_token_ids == (7, 9)
    assert load_config(write(TEXT, {"temperature": 1.0})).eos_token_ids == (248044,)
    config = nested(text_config=without("eos_token_id"), eos_token_id=3)
    assert load_config(write(config)).eos_token_ids == (3,)


def test_sampling_defaults(write: Write) -> None:
    published = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    expected = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95)
    assert load_config(write(TEXT, published)).sampling == expected
    assert load_config(write(TEXT, {"do_sample": True})).sampling == SamplingDefaults(1.0, 50)
    greedy = published | {"do_sample": False, "repetition_penalty": 1.1, "presence_penalty": 0.5}
    assert load_config(write(TEXT, greedy)).sampling == SamplingDefaults(
        presence_penalty=0.5, repetition_penalty=1.1
    )


REQUIRED = [
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(write: Write, key: str) -> None:
    with pytest.raises(ExportError, match=rf"config\.json: {key} is missing; "):
        load_config(write(without(key)))


@pytest.mark.parametrize("value", ["64", 0, -1, 1.5, True, [1], 2**64])
@pytest.mark.parametrize("key", ["hidden_size", "num_experts", "linear_conv_kernel_dim"])
def test_a_size_must_be_a_positive_integer(write: Write, key: str, value: Any) -> None:
    with pytest.raises(
        ExportError, match=rf"config\.json: {key} is .*; it must be an integer of at least \d"
    ):
        load_config(write(TEXT | {key: value}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "qwen3_moe"},
            r'model_type is "qwen3_moe"; supported: qwen3_5_moe_text and qwen3_5_moe',
        ),
        (
            {"architectures": ["LlamaForCausalLM"]},
            r'architectures is \["LlamaForCausalLM"\]; supported: Qwen3_5Moe',
        ),
        ({"architectures": "x"}, "architectures is"),
        ({"hidden_act": "gelu"}, r'hidden_act is "gelu"; supported: "silu"'),
        ({"attention_bias": True}, "attention_bias is true; supported: false"),
        ({"attn_output_gate": False}, "attn_output_gate is false; supported: true"),
        ({"norm_topk_prob": False}, "norm_topk_prob is false; supported: true"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; supported: \[\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; supported: 1"),
        ({"sliding_window": 4096}, "sliding_window is 4096; supported: null"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is .*fp8.*; supported: null"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4}},
            r'rope_parameters\.rope_type is "yarn"; supported',
        ),
        ({"rope_scaling": {"type": "mrope"}}, r'rope_scaling\.type is "mrope"; supported: "default"'),
        ({"rope_parameters": {"full_attention": {}}}, r"rope_parameters\.full_attention is"),
        (
            {"rope_parameters": {"rope_theta": 0}},
            r"rope_parameters\.rope_theta is 0; it must be a number above 0",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor is 1.5; .* from 0 to 1"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.0}},
            "head_dim is 256; partial_rotary_factor 0 .* is 0",
        ),
        ({"rope_parameters": []}, r"rope_parameters is \[\]; it must be an object"),
        ({"head_dim": 100}, "head_dim is 100; .* of it is 25; supported: an even number"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads is 16; it must be a multiple of num_key_value_heads, 3",
        ),
        ({"linear_num_key_heads": 5}, "linear_num_value_heads is 32; .* multiple of linear_num_key_heads, 5"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok is 257; it must be at most num_experts, 256"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1; it must be an integer of at least 2"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN; it must be a number above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ({"layer_types": ["linear_attention"] * 39}, "layer_types is .* num_hidden_layers = 40 entries"),
        (
            {"layer_types": ["sliding_attention"] * 40},
            "layer_types is .*; supported: a list of linear_attention",
        ),
        ({"full_attention_interval": 0}, "full_attention_interval is 0"),
        ({"eos_token_id": 248320}, "eos_token_id is 248320; it must be token ids below vocab_size, 248320"),
        ({"eos_token_id": ["a"]}, r'eos_token_id is \["a"\]'),
        ({"text_config": None}, "text_config is null; it must be an object"),
    ],
)
def test_an_unsupported_value_is_named(write: Write, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=rf"config\.json: .*{message}") as caught:
        load_config(write(TEXT | change))
    assert "\n" not in str(caught.value)


def test_a_nested_value_is_named_with_its_section(write: Write) -> None:
    with pytest.raises(ExportError, match=r'config\.json: text_config\.hidden_act is "gelu"'):
        load_config(write(nested(text_config=TEXT | {"hidden_act": "gelu"})))
    with pytest.raises(ExportError, match=r"config\.json: quantization_config is"):
        load_config(write(nested(quantization_config={"quant_method": "fp8"})))
    with pytest.raises(ExportError, match=r'text_config\.model_type is "qwen3_5_text"'):
        load_config(write(nested(text_config=TEXT | {"model_type": "qwen3_5_text"})))
    with pytest.raises(ExportError, match=r"text_config is missing"):
        load_config(write({"model_type": "qwen3_5_moe"}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 2),
        ("min_p", "a"),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("do_sample", "yes"),
        ("eos_token_id", -1),
    ],
)
def test_a_bad_generation_default_is_named(write: Write, key: str, value: Any) -> None:
    with pytest.raises(ExportError, match=rf"generation_config\.json: {key} is "):
        load_config(write(TEXT, {key: value}))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000, b"9" * 5000])
def test_a_file_that_is_no_json_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(
        ExportError, match=r"config\.json: (not JSON .*|holds no JSON object); download it again"
    ):
        load_config(tmp_path)


def test_no_such_folder_or_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"nowhere: no such folder"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ExportError, match=r"config\.json: no such file"):
        load_config(tmp_path)
