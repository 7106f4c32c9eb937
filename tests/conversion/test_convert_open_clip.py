"""open_clip's CLIP as transformers' CLIPModel. All weights are random."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer, PreTrainedTokenizerFast

from cmcr_hf.cli import main
from cmcr_hf.conversion import convert_open_clip
from cmcr_hf.conversion.checkpoint import Checkpoint
from cmcr_hf.conversion.convert_open_clip import (
    clip_config,
    convert_state_dict,
    read_clip,
    tokenizer,
)
from cmcr_hf.conversion.prove_open_clip import prove_clip

Weights = dict[str, torch.Tensor]

VOCABULARY, LENGTH = 40, 12


def layers(prefix: str, width: int, number: int, draw: Callable[..., torch.Tensor]) -> Weights:
    weights: Weights = {}
    for layer in range(number):
        block = f"{prefix}transformer.resblocks.{layer}"
        for name, rows, columns in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 2 * width, width),
            ("mlp.c_proj.", width, 2 * width),
        ):
            weights[f"{block}.{name}weight"], weights[f"{block}.{name}bias"] = draw(rows, columns), draw(rows)
        for name in ("ln_1", "ln_2"):
            weights[f"{block}.{name}.weight"], weights[f"{block}.{name}.bias"] = 1 + draw(width), draw(width)
    return weights


def tiny_weights(
    text: str = "", vision_width: int = 64, text_width: int = 64, vocabulary: int = VOCABULARY
) -> Weights:
    """Random weights in open_clip's layout: 32-pixel images in patches of 8, two layers a tower, 24 dimensions."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.2)

    return {
        "visual.class_embedding": draw(64),
        "visual.positional_embedding": draw(17, 64),
        "visual.conv1.weight": draw(64, 3, 8, 8),
        "visual.ln_pre.weight": 1 + draw(64),
        "visual.ln_pre.bias": draw(64),
        **layers("visual.", 64, 2, draw),
        "visual.ln_post.weight": 1 + draw(64),
        "visual.ln_post.bias": draw(64),
        "visual.proj": draw(64, 24),
        f"{text}token_embedding.weight": draw(vocabulary, text_width),
        f"{text}positional_embedding": draw(LENGTH, text_width),
        **layers(text, text_width, 2, draw),
        f"{text}ln_final.weight": 1 + draw(text_width),
        f"{text}ln_final.bias": draw(text_width),
        f"{text}text_projection": draw(text_width, 24),
        "logit_scale": torch.tensor(2.6592),
    }


MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 64, "heads": 2, "layers": 2},
}
MODEL["text_cfg"]["mlp_ratio"] = 2


def put(folder: Path, weights: Weights, model: dict | None = MODEL, name: str = "open_clip_model.safetensors") -> Path:
    path = folder / name
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    if model is not None:
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    return path


def without(weights: Weights, key: str) -> Weights:
    return {name: tensor for name, tensor in weights.items() if name != key}


# Weights


@pytest.mark.parametrize("text", ["", "text."], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_plain_reading_of_the_file_agrees(tmp_path: Path, text: str, quick_gelu: bool) -> None:
    model, checkpoint = read_clip(put(tmp_path, tiny_weights(text), {**MODEL, "quick_gelu": quick_gelu}))
    proof = prove_clip(model, checkpoint)
    assert proof.reference.startswith(("a plain reading", "open_clip_torch"))
    assert set(proof.differences) == {"image", "text"}
    assert max(proof.differences.values()) < 2e-6


def test_every_weight_reaches_the_model_unchanged(tmp_path: Path) -> None:
    weights = tiny_weights()
    model, _ = read_clip(put(tmp_path, weights))
    state = model.state_dict()
    assert torch.equal(state["visual_projection.weight"], weights["visual.proj"].T)
    assert torch.equal(state["text_projection.weight"], weights["text_projection"].T)
    third = weights["transformer.resblocks.1.attn.in_proj_weight"].chunk(3)[2]
    assert torch.equal(state["text_model.encoder.layers.1.self_attn.v_proj.weight"], third)
    assert sum(tensor.numel() for tensor in state.values()) == sum(tensor.numel() for tensor in weights.values())


@pytest.mark.parametrize("wrong", [{"head_width": 32}, {"head_width": 64}])
def test_other_heads_are_noticed_by_the_proof(tmp_path: Path, wrong: dict[str, int]) -> None:
    path = put(tmp_path, tiny_weights())
    _, checkpoint = read_clip(path)
    model, _ = read_clip(put(tmp_path, tiny_weights(), {**MODEL, "vision_cfg": {**MODEL["vision_cfg"], **wrong}}))
    right, _ = read_clip(put(tmp_path, tiny_weights()))
    model.config.vision_config.num_attention_heads = right.config.vision_config.num_attention_heads
    with pytest.raises(ValueError, match="its image embeddings differ by"):
        prove_clip(model, checkpoint)


def test_another_activation_is_noticed_by_the_proof(tmp_path: Path) -> None:
    model, checkpoint = read_clip(put(tmp_path, tiny_weights()))
    model.config.vision_config.hidden_act = "quick_gelu"
    with pytest.raises(ValueError, match="Nothing was written"):
        prove_clip(model, checkpoint)


def test_a_training_checkpoint_is_read(tmp_path: Path) -> None:
    weights = tiny_weights()
    content = {"epoch": 3, "name": "run", "state_dict": {f"module.{key}": value for key, value in weights.items()}}
    content["optimizer"] = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}
    trained, _ = read_clip(put(tmp_path, content, name="epoch_3.pt"))
    plain, _ = read_clip(put(tmp_path, weights))
    torch.testing.assert_close(trained.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_half_precision_and_a_logit_scale_of_one_row_are_read(tmp_path: Path) -> None:
    weights = {key: tensor.half() for key, tensor in tiny_weights().items()}
    weights["logit_scale"] = weights["logit_scale"].reshape(1)
    model, checkpoint = read_clip(put(tmp_path, weights, name="weights.bin"))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert model.logit_scale.item() == weights["logit_scale"].item()
    prove_clip(model, checkpoint)


def test_weights_of_double_precision_are_proven_as_the_float32_that_is_saved(tmp_path: Path) -> None:
    # No float32 has these values.
    weights = {key: tensor.double() * (1 + 2.0**-26) for key, tensor in tiny_weights().items()}
    model, checkpoint = read_clip(put(tmp_path, weights))
    assert checkpoint.weights["visual.proj"].dtype == torch.float64
    assert torch.equal(model.visual_projection.weight, weights["visual.proj"].float().T)
    assert max(prove_clip(model, checkpoint).differences.values()) < 2e-6


def test_the_stored_mask_has_no_counterpart(tmp_path: Path) -> None:
    weights = {**tiny_weights(), "attn_mask": torch.full((LENGTH, LENGTH), -torch.inf).triu(1)}
    assert convert_state_dict(weights).keys() == convert_state_dict(tiny_weights()).keys()


@pytest.mark.parametrize(
    "key",
    [
        "visual.transformer.resblocks.0.ls_1.gamma",
        "visual.attn_pool.query",
        "visual.trunk.blocks.0.norm1.weight",
        "visual.layer1.0.conv1.weight",
        "text_decoder.ln_final.weight",
        "text.cls_emb",
        "logit_bias",
    ],
)
def test_another_architecture_is_refused_with_the_key_and_where_to_go(key: str) -> None:
    with pytest.raises(ValueError, match="open_clip:NAME/TAG") as caught:
        convert_state_dict({**tiny_weights("text." if key.startswith("text.") else ""), key: torch.zeros(3)})
    assert repr(key.removeprefix("text.")) in str(caught.value)


@pytest.mark.parametrize("key", ["visual.ln_pre.weight", "visual.transformer.resblocks.1.ln_2.bias", "logit_scale"])
def test_a_missing_weight_is_an_error(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="lacks"):
        read_clip(put(tmp_path, without(tiny_weights(), key)))


def test_two_text_towers_are_refused() -> None:
    weights = tiny_weights("text.")
    with pytest.raises(ValueError, match=r"with and without 'text\.'"):
        convert_state_dict({**weights, "ln_final.weight": weights["text.ln_final.weight"]})


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    weights = tiny_weights()
    weights["visual.proj"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'visual\.proj' are not finite"):
        read_clip(put(tmp_path, weights))


def test_a_key_of_a_far_layer_takes_no_memory(tmp_path: Path) -> None:
    weights = tiny_weights()
    weights["transformer.resblocks.99999999.ln_1.weight"] = torch.ones(64)
    with pytest.raises(ValueError, match=r"99999999.*, 3 are there"):
        read_clip(put(tmp_path, weights))


def test_a_first_layer_larger_than_the_others_takes_no_memory(tmp_path: Path) -> None:
    weights = tiny_weights()
    for name, shape in (("c_fc.weight", (2**14, 64)), ("c_fc.bias", (2**14,)), ("c_proj.weight", (64, 2**14))):
        weights[f"visual.transformer.resblocks.0.mlp.{name}"] = torch.zeros(shape)
    with pytest.raises(ValueError, match="lacks weights"):
        read_clip(put(tmp_path, weights, changed("vision_cfg", "mlp_ratio", 256)))


# Configuration


def test_shapes_and_the_file_beside_the_weights_tell_the_configuration(tmp_path: Path) -> None:
    config = read_clip(put(tmp_path, tiny_weights(), {**MODEL, "quick_gelu": True}))[0].config
    vision, text = config.vision_config, config.text_config
    assert (config.projection_dim, vision.projection_dim, text.projection_dim) == (24, 24, 24)
    assert (vision.image_size, vision.patch_size, vision.hidden_size, vision.intermediate_size) == (32, 8, 64, 128)
    assert (vision.num_attention_heads, text.num_attention_heads) == (4, 2)
    assert (vision.hidden_act, text.hidden_act, vision.layer_norm_eps) == ("quick_gelu", "quick_gelu", 1e-5)
    assert (text.vocab_size, text.max_position_embeddings, text.num_hidden_layers) == (VOCABULARY, LENGTH, 2)
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (38, 39, 39)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 16), (1408, 16), (1664, 16), (1792, 16)])
def test_widths_of_released_models_tell_their_heads(width: int, heads: int) -> None:
    with torch.device("meta"):
        weights = {key: tensor.to("meta") for key, tensor in tiny_weights().items()}
        weights |= {"visual.conv1.weight": torch.empty(width, 3, 8, 8)}
    assert clip_config(weights, activation="gelu").vision_config.num_attention_heads == heads


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="attention heads of a vision tower of width 64"):
        clip_config(tiny_weights(), activation="gelu", vision_heads=3)
    with pytest.raises(ValueError, match=r"of a text tower of width 32.*open_clip_config\.json"):
        clip_config(tiny_weights(text_width=32), activation="gelu")


def test_images_that_are_no_squares_are_refused() -> None:
    weights = {**tiny_weights(), "visual.positional_embedding": torch.zeros(13, 64)}
    with pytest.raises(ValueError, match=r"square of patches.*got 12"):
        clip_config(weights, activation="gelu")


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="'gelu' or 'quick_gelu', got 'relu'"):
        clip_config(tiny_weights(), activation="relu")


def test_without_a_configuration_the_activation_has_to_be_named(tmp_path: Path) -> None:
    path = put(tmp_path, tiny_weights(), None)
    with pytest.raises(ValueError, match=r"open_clip_model\.safetensors: no weights show the activation"):
        read_clip(path)
    with pytest.raises(ValueError, match="its vocabulary of 40 is not CLIP's"):
        read_clip(path, activation="gelu")


def test_with_clips_own_vocabulary_the_activation_is_enough(tmp_path: Path) -> None:
    weights = tiny_weights(vocabulary=49408)
    model, _ = read_clip(put(tmp_path, weights, None), activation="quick_gelu")
    text = model.config.text_config
    assert (text.hidden_act, text.bos_token_id, text.eos_token_id) == ("quick_gelu", 49406, 49407)


def test_an_activation_other_than_that_of_the_configuration_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path, tiny_weights())
    assert read_clip(path, activation="gelu")[0].config.text_config.hidden_act == "gelu"
    with pytest.raises(ValueError, match="its configuration has the activation 'gelu'"):
        read_clip(path, activation="quick_gelu")


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vision_cfg", "timm_model_name", "convnext_base"),
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "ls_init_value", 1e-4),
        ("text_cfg", "pool_type", "eos"),
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "hf_tokenizer_name", "facebook/xlm-v-base"),
        (None, "multimodal_cfg", {"width": 64}),
    ],
)
def test_what_weights_do_not_show_is_refused(tmp_path: Path, part: str | None, field: str, value: object) -> None:
    model = {**MODEL, part: {**MODEL[part], field: value}} if part else {**MODEL, field: value}
    with pytest.raises(ValueError, match=rf"{field}=.*open_clip:NAME/TAG"):
        read_clip(put(tmp_path, tiny_weights(), model))


def test_a_file_above_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_open_clip, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="expected at most 1000"):
        read_clip(put(tmp_path, tiny_weights()))


# A configuration of another model


def changed(part: str | None, field: str, value: object) -> dict:
    return {**MODEL, part: {**MODEL[part], field: value}} if part else {**MODEL, field: value}


OTHER_SIZES = [
    (None, "embed_dim", 32, "24"),
    ("vision_cfg", "width", 128, "64"),
    ("vision_cfg", "layers", 3, "2"),
    ("vision_cfg", "patch_size", 16, "8"),
    ("vision_cfg", "image_size", 64, "32"),
    ("vision_cfg", "mlp_ratio", 4.0, r"2\.0"),
    ("vision_cfg", "mlp_ratio", float("nan"), r"2\.0"),
    ("vision_cfg", "mlp_ratio", 1e308, r"2\.0"),
    ("vision_cfg", "mlp_ratio", "2.0", r"2\.0"),
    ("vision_cfg", "mlp_ratio", None, r"2\.0"),
    ("text_cfg", "width", 128, "64"),
    ("text_cfg", "layers", 1, "2"),
    ("text_cfg", "context_length", 77, "12"),
    ("text_cfg", "vocab_size", 49408, "40"),
    ("text_cfg", "mlp_ratio", 4.0, r"2\.0"),
]


@pytest.mark.parametrize(("part", "field", "value", "shown"), OTHER_SIZES)
def test_a_size_other_than_that_of_the_weights_is_refused(
    tmp_path: Path, part: str | None, field: str, value: object, shown: str
) -> None:
    message = rf"Cannot convert .*open_clip_config\.json has .*{field}=.*weights have {shown}: .* of another model"
    with pytest.raises(ValueError, match=message):
        read_clip(put(tmp_path, tiny_weights(), changed(part, field, value)))


@pytest.mark.parametrize(
    ("part", "field"),
    [("vision_cfg", "width"), ("vision_cfg", "image_size"), ("text_cfg", "layers"), (None, "embed_dim")],
)
def test_a_size_that_is_left_out_is_open_clips_default(tmp_path: Path, part: str | None, field: str) -> None:
    model = json.loads(json.dumps(MODEL))
    del (model[part] if part else model)[field]
    with pytest.raises(ValueError, match=rf"{field}="):
        read_clip(put(tmp_path, tiny_weights(), model))


@pytest.mark.parametrize("value", ["64", None, [64], 64.0, True, 0, -64, {}])
@pytest.mark.parametrize(
    ("part", "field"),
    [
        (None, "embed_dim"),
        ("vision_cfg", "width"),
        ("vision_cfg", "head_width"),
        ("text_cfg", "heads"),
        ("text_cfg", "context_length"),
    ],
)
def test_a_size_that_is_no_positive_whole_number_is_refused(
    tmp_path: Path, part: str | None, field: str, value: object
) -> None:
    with pytest.raises(
        ValueError, match=rf"open_clip_config\.json has .*{field}=.*, expected a positive whole number"
    ):
        read_clip(put(tmp_path, tiny_weights(), changed(part, field, value)))


@pytest.mark.parametrize(("part", "field"), [("vision_cfg", "head_width"), ("text_cfg", "heads")])
def test_heads_of_a_configuration_that_do_not_divide_the_width_are_refused(
    tmp_path: Path, part: str, field: str
) -> None:
    for value in (3, 128):
        with pytest.raises(ValueError, match=rf"{field}={value}, expected a divisor of the width 64"):
            read_clip(put(tmp_path, tiny_weights(), changed(part, field, value)))


@pytest.mark.parametrize("value", ["false", 1, None, []])
def test_an_activation_of_a_configuration_that_is_no_truth_value_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match=r"quick_gelu=.*, expected true or false"):
        read_clip(put(tmp_path, tiny_weights(), changed(None, "quick_gelu", value)))


# Tokenizer


def save_tokenizer(folder: Path, last: str = "</s>") -> str:
    """A tokenizer of 20 words, which ends texts with `last`."""
    words = [*(f"word{index}" for index in range(18)), "<s>", "</s>"]
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="word0"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {last}", special_tokens=[("<s>", 18), (last, words.index(last))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=last, pad_token=last, model_max_length=50
    ).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_is_that_of_its_folder_with_the_length_of_the_model(tmp_path: Path) -> None:
    found = tokenizer(save_tokenizer(tmp_path), vocab_size=20, context_length=5)
    assert found.model_max_length == 5
    assert found("word3 " * 9, truncation=True)["input_ids"] == [18, 3, 3, 3, 19]


def test_a_tokenizer_of_another_vocabulary_is_refused_with_both_sizes(tmp_path: Path) -> None:
    source = save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"has 20 tokens, the model knows 49408\. Name .* as --tokenizer"):
        tokenizer(source, vocab_size=49408, context_length=77)


def test_a_tokenizer_that_transformers_made_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    CLIPTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokens, the model knows 49408"):
        tokenizer(str(tmp_path), vocab_size=49408, context_length=77)


def test_a_tokenizer_that_ends_texts_where_the_model_does_not_pool_is_refused(tmp_path: Path) -> None:
    source = save_tokenizer(tmp_path, "word7")
    with pytest.raises(ValueError, match=r"ends texts with the token \[7\], the model pools .* 19\..* as --tokenizer"):
        tokenizer(source, vocab_size=20, context_length=5)


# The command


def test_a_model_of_its_own_vocabulary_is_written_with_a_tokenizer_of_its_length(tmp_path: Path) -> None:
    path = put(tmp_path, tiny_weights(vocabulary=20), changed("text_cfg", "vocab_size", 20))
    out, source = tmp_path / "out", save_tokenizer(tmp_path / "tokenizer")
    options = ["--output", str(out), "--tokenizer", source]
    assert main(["convert", "open-clip", "--checkpoint", str(path), *options]) == 0
    model, processor = CLIPModel.from_pretrained(out), CLIPProcessor.from_pretrained(out)
    assert processor.tokenizer.model_max_length == LENGTH
    ids = processor.tokenizer(["word3 word4", "word5 " * 50], padding="max_length", truncation=True)["input_ids"]
    assert [len(row) for row in ids] == [LENGTH, LENGTH] and ids[0][:4] == [18, 3, 4, 19] and ids[1][-1] == 19
    assert processor.image_processor.crop_size["height"] == model.config.vision_config.image_size == 32


def test_a_tokenizer_of_another_model_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, source = put(tmp_path, tiny_weights()), save_tokenizer(tmp_path / "tokenizer")
    options = ["--output", str(tmp_path / "out"), "--tokenizer", source]
    assert main(["convert", "open-clip", "--checkpoint", str(path), *options]) == 1
    assert "has 20 tokens, the model knows 40" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["weights.pth", "models/weights.ckpt", "models/vit/weights", "/weights"])
def test_a_missing_file_is_not_taken_for_a_name_of_open_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "open-clip", "--checkpoint", given, "--output", "out"]) == 1
    assert f"Cannot read {given}: there is no such file" in capsys.readouterr().err


def test_a_name_of_open_clip_is_not_taken_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "ViT-B-32").mkdir()
    assert main(["convert", "open-clip", "--checkpoint", "ViT-B-32/laion2b_s34b_b79k", "--output", "out"]) == 1
    assert "The package open_clip is not installed" in capsys.readouterr().err


def test_the_checkpoint_knows_its_file(tmp_path: Path) -> None:
    path = put(tmp_path, tiny_weights())
    checkpoint = read_clip(path)[1]
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.path == path and len(checkpoint.sha256) == 64
