"""Read a released LAION-CLAP checkpoint, such as 630k-fusion-best.pt, as a `ClapModel` of transformers.

Layout: `CLAP` of laion_clap 1.1.7 (clap_module/model.py) with an HTSAT audio branch and a RoBERTa text branch.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from importlib.metadata import version
from math import isqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, RobertaConfig, RobertaModel

from cmcr_hf.conversion.checkpoint import Checkpoint, convert_keys, count, load_weights, read_checkpoint, width
from cmcr_hf.conversion.plain_laion_clap import PAD, audio_outputs, text_outputs
from cmcr_hf.conversion.proof import PLAIN, Proof, prove

UPSTREAM = "a LAION-CLAP checkpoint with HTSAT and RoBERTa"
BLOCK, ENCODER = r"audio_branch\.layers\.(\d+)\.blocks\.(\d+)\.", r"audio_model.audio_encoder"
LAYER = rf"{ENCODER}.layers.\1.blocks.\2"
# Pattern of an upstream key: the key of ClapModel. `None` drops what has no counterpart.
KEYS: dict[str, str | None] = {
    r"logit_scale_([at])": r"logit_scale_\1",
    r"(audio|text)_projection\.0\.(\w+)": r"\1_projection.linear1.\2",
    r"(audio|text)_projection\.2\.(\w+)": r"\1_projection.linear2.\2",
    r"audio_branch\.bn0\.(\w+)": rf"{ENCODER}.batch_norm.\1",
    r"audio_branch\.patch_embed\.((?:proj|norm|mel_conv2d)\.\w+)": rf"{ENCODER}.patch_embed.\1",
    r"audio_branch\.patch_embed\.(fusion_model\.(?:local|global)_att\.\d\.\w+)": rf"{ENCODER}.patch_embed.\1",
    rf"{BLOCK}norm1\.(\w+)": rf"{LAYER}.layernorm_before.\3",
    rf"{BLOCK}norm2\.(\w+)": rf"{LAYER}.layernorm_after.\3",
    rf"{BLOCK}attn\.relative_position_(bias_table|index)": rf"{LAYER}.attention.self.relative_position_\3",
    rf"{BLOCK}attn\.qkv\.(\w+)": rf"{LAYER}.attention.self.{{query,key,value}}.\3",
    rf"{BLOCK}attn\.proj\.(\w+)": rf"{LAYER}.attention.output.dense.\3",
    rf"{BLOCK}mlp\.fc1\.(\w+)": rf"{LAYER}.intermediate.dense.\3",
    rf"{BLOCK}mlp\.fc2\.(\w+)": rf"{LAYER}.output.dense.\3",
    r"audio_branch\.(layers\.\d+\.downsample\.(?:norm|reduction)\.\w+)": rf"{ENCODER}.\1",
    r"audio_branch\.norm\.(\w+)": rf"{ENCODER}.norm.\1",
    r"text_branch\.embeddings\.((?:word|position|token_type)_embeddings\.weight)": r"text_model.embeddings.\1",
    r"text_branch\.(embeddings\.LayerNorm\.\w+)": r"text_model.\1",
    r"text_branch\.(encoder\.layer\.\d+\.attention\.self\.(?:query|key|value)\.\w+)": r"text_model.\1",
    r"text_branch\.(encoder\.layer\.\d+\.attention\.output\.(?:dense|LayerNorm)\.\w+)": r"text_model.\1",
    r"text_branch\.(encoder\.layer\.\d+\.intermediate\.dense\.\w+)": r"text_model.\1",
    r"text_branch\.(encoder\.layer\.\d+\.output\.(?:dense|LayerNorm)\.\w+)": r"text_model.\1",
    r"text_branch\.(pooler\.dense\.\w+)": r"text_model.\1",
    # Second projections, of use to upstream's loss alone.
    r"(?:audio|text)_transform\.sequential\.\d+\.\w+": None,
    # The classifier of AudioSet that HTSAT was trained as.
    r"audio_branch\.(?:tscam_conv|head)\.\w+": None,
    # Constants: the front end, which is the feature extractor's here, and what ClapModel computes itself.
    r"audio_branch\.spectrogram_extractor\.stft\.conv_(?:real|imag)\.weight": None,
    r"audio_branch\.logmel_extractor\.melW": None,
    rf"{BLOCK}attn_mask": None,
    r"text_branch\.embeddings\.position_ids": None,
}
MAX_BYTES = 2**33  # The released files have some 2 GB, the state of their optimizers included.
# In float64. ClapModel takes the softmax of texts in float32 all the same, which leaves some 1e-7.
AUDIO_BOUND, TEXT_BOUND = 1e-9, 1e-6
MODELS = {96: "HTSAT-tiny", 128: "HTSAT-base", 256: "HTSAT-large"}


def convert_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a LAION-CLAP checkpoint, its keys without `module.`, under the names of [`ClapModel`].

    Raises:
        ValueError: a key is none of this architecture, is empty, has values that are not finite, or variances below
            zero; names it.
    """
    for key, tensor in state_dict.items():
        if tensor.numel() == 0:
            raise ValueError(f"Empty key {key!r} of shape {list(tensor.shape)}. Pass the released file as it is.")
    return convert_keys(state_dict, KEYS, UPSTREAM)


def clap_config(state_dict: Mapping[str, torch.Tensor], *, text_heads: int = 12) -> ClapConfig:
    """Return the configuration that the shapes of a LAION-CLAP checkpoint tell.

    Args:
        text_heads: of each RoBERTa layer, which no shape tells; upstream knows `roberta-base` alone, which has 12.

    Raises:
        ValueError: a key is missing, a shape is none of this architecture, or the heads do not divide the width of
            the text branch; names it.
    """
    block, fused = "audio_branch.layers.{}.blocks.0.", "audio_branch.patch_embed.mel_conv2d.weight" in state_dict
    types = width(state_dict, "text_branch.embeddings.token_type_embeddings.weight")
    if types != 1:
        raise ValueError(
            f"Expected {UPSTREAM}, which knows one type of tokens, got {types} types. Other text branches cannot be "
            "converted."
        )
    stages = range(count(state_dict, r"audio_branch\.layers\.(\d+)\."))
    channels = width(state_dict, "audio_branch.patch_embed.proj.weight")
    patch = width(state_dict, "audio_branch.patch_embed.proj.weight", 2)
    bias_table = block + "attn.relative_position_bias_table"
    window = (isqrt(width(state_dict, bias_table.format(0))) + 1) // 2
    # The mask of the first shifted block has an entry for each window of the image.
    windows = width(state_dict, "audio_branch.layers.0.blocks.1.attn_mask")
    audio = {
        "patch_embeds_hidden_size": channels,
        "hidden_size": width(state_dict, "audio_branch.norm.weight"),
        "depths": [count(state_dict, rf"audio_branch\.layers\.{stage}\.blocks\.(\d+)\.") for stage in stages],
        "num_attention_heads": [width(state_dict, bias_table.format(stage), 1) for stage in stages],
        "num_hidden_layers": len(stages),
        "mlp_ratio": width(state_dict, block.format(0) + "mlp.fc1.weight") / max(channels, 1),
        "num_mel_bins": width(state_dict, "audio_branch.bn0.weight"),
        "patch_size": patch,
        "patch_stride": [patch, patch],
        "window_size": window,
        "spec_size": isqrt(windows) * window * patch,
        "enable_fusion": fused,
        "fusion_type": "aff_2d" if fused else None,
    }
    if fused:
        reduced = width(state_dict, "audio_branch.patch_embed.fusion_model.local_att.0.weight")
        audio["aff_block_r"] = channels // max(reduced, 1)
    text_width = width(state_dict, "text_branch.embeddings.word_embeddings.weight", 1)
    if text_heads < 1 or text_width % text_heads:
        raise ValueError(
            f"Expected a text branch whose width is a multiple of its {text_heads} attention heads, got {text_width}. "
            "No weights show the heads: 12 are assumed, as RoBERTa-base has; pass another number as read_clap(path, "
            "text_heads=)."
        )
    text = {
        "vocab_size": width(state_dict, "text_branch.embeddings.word_embeddings.weight"),
        "hidden_size": text_width,
        "num_hidden_layers": count(state_dict, r"text_branch\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": text_heads,
        "intermediate_size": width(state_dict, "text_branch.encoder.layer.0.intermediate.dense.weight"),
        "max_position_embeddings": width(state_dict, "text_branch.embeddings.position_embeddings.weight"),
        # RoBERTa's, where ClapTextConfig has another default.
        "layer_norm_eps": 1e-5,
        "pad_token_id": PAD,
    }
    return ClapConfig(
        text_config=text, audio_config=audio, projection_dim=width(state_dict, "text_projection.0.weight")
    )


def feature_extractor(config: ClapConfig) -> ClapFeatureExtractor:
    """Return LAION's front end: 10 s at 48 kHz, repeated where shorter, as log-mels of 50 to 14000 Hz every 10 ms."""
    audio: Any = config.audio_config
    return ClapFeatureExtractor(
        feature_size=audio.num_mel_bins,
        sampling_rate=48000,
        hop_length=480,
        max_length_s=10,
        fft_window_size=1024,
        frequency_min=50,
        frequency_max=14000,
        truncation="fusion" if audio.enable_fusion else "rand_trunc",
        padding="repeatpad",
    )


def read_clap(path: str | Path, *, text_heads: int = 12) -> tuple[ClapModel, Checkpoint]:
    """Read a LAION-CLAP checkpoint, weights-only, as a [`ClapModel`] in eval mode, and its weights as they were.

    Args:
        text_heads: as for [`clap_config`].

    Raises:
        ValueError: the file is missing, damaged, larger than 8 GiB or holds something else than such a checkpoint, or
            one whose front end is not that of [`feature_extractor`]; names it.
    """
    checkpoint = read_checkpoint(path, max_bytes=MAX_BYTES)
    weights = checkpoint.weights
    try:
        converted = convert_state_dict(weights)
        config = clap_config(weights, text_heads=text_heads)
        # Without memory, before the shapes are known to be those of the file.
        with torch.device("meta"):
            model = ClapModel(config)
        positions = width(weights, "text_branch.embeddings.position_embeddings.weight")
        converted["text_model.embeddings.position_ids"] = torch.arange(positions)[None]
        converted["text_model.embeddings.token_type_ids"] = torch.zeros((1, positions), dtype=torch.long)
        load_weights(model, converted, UPSTREAM)
        _check_front_end(weights, config)
    # What torch and transformers raise on sizes that make no model, depending on the place.
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"Cannot read {path}: {reason:.500}") from error
    return model.eval(), checkpoint


def _check_front_end(weights: Mapping[str, torch.Tensor], config: ClapConfig) -> None:
    """Check that a checkpoint was trained on log-mels such as the feature extractor gives, which no shape tells."""
    key = "audio_branch.logmel_extractor.melW"
    # Of no use to a fused model, which stores them all the same.
    expected = torch.from_numpy(feature_extractor(config).mel_filters_slaney)
    # Half precision keeps three digits. A comparison with NaN is false.
    close = key in weights and weights[key].shape == expected.shape
    if not close or not (weights[key].double() - expected).abs().max() <= 2e-3 * expected.max():
        raise ValueError(
            f"the mel filters {key!r} are not those of 50 to 14000 Hz for windows of 1024 samples at 48 kHz. "
            "Checkpoints with another front end cannot be converted."
        )


def prove_clap(model: ClapModel, checkpoint: Checkpoint) -> Proof:
    """Compare a converted model with laion_clap's own, or with a plain reading of the weights, in float64.

    The inputs are fixed, random log-mels, of clips longer and not longer than 10 s, and random tokens, of texts of
    several lengths. The model is not changed.

    Raises:
        ValueError: the audio embeddings differ by more than 1e-9 or the text embeddings by more than 1e-6; says which.
    """
    audio: Any = model.config.audio_config
    text: Any = model.config.text_config
    generator = torch.Generator().manual_seed(0)
    frames = min(1001, audio.spec_size * (audio.spec_size // audio.num_mel_bins))
    shape = (3, 4 if audio.enable_fusion else 1, frames, audio.num_mel_bins)
    features = torch.randn(shape, generator=generator, dtype=torch.float64) * 15 - 30
    is_longer = torch.tensor([[True], [False], [True]])
    length = min(77, text.max_position_embeddings - PAD - 1)
    mask = (torch.arange(length) < torch.tensor([[length], [20], [3]])).long()
    ids = torch.randint(text.vocab_size, mask.shape, generator=generator).where(mask == 1, PAD)
    double = copy.deepcopy(model).double()
    # Of float64 the model has the nearest float32.
    weights = {key: value.float() if value.is_floating_point() else value for key, value in checkpoint.weights.items()}
    upstream, reference = _upstream(weights, model.config)
    with torch.no_grad():
        audio_embeds = double.get_audio_features(features, is_longer=is_longer).pooler_output
        text_embeds = double.get_text_features(ids, attention_mask=mask).pooler_output
        if upstream is None:
            expected_audio = audio_outputs(weights, features, is_longer)["projected"]
            outputs = text_outputs(weights, ids, mask, heads=text.num_attention_heads)
            expected_text = outputs["projected"]
        else:
            key = "mel_fusion" if audio.enable_fusion else "waveform"
            clips = [{key: clip, "longer": longer} for clip, longer in zip(features, is_longer, strict=True)]
            expected_audio = upstream.get_audio_embedding(clips)
            expected_text = upstream.get_text_embedding({"input_ids": ids, "attention_mask": mask})
    name = "audio"
    differences = prove({name: audio_embeds}, {name: expected_audio}, reference, bound=AUDIO_BOUND).differences
    name = "text"
    differences |= prove({name: text_embeds}, {name: expected_text}, reference, bound=TEXT_BOUND).differences
    return Proof(reference, differences, TEXT_BOUND)


def _upstream(weights: Mapping[str, torch.Tensor], config: ClapConfig) -> tuple[Any, str]:
    """Return laion_clap's own model with the weights, in float64 and fed log-mels, or `None`; and a name for either.

    RoBERTa is transformers' own in laion_clap too.
    """
    spec = importlib.util.find_spec("laion_clap")
    if spec is None or not spec.submodule_search_locations:
        return None, PLAIN
    audio: Any = config.audio_config
    if audio.patch_embeds_hidden_size not in MODELS:
        return None, f"{PLAIN} (laion_clap builds no HTSAT of width {audio.patch_embeds_hidden_size})"
    sizes = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings"
    roberta = {name: getattr(config.text_config, name) for name in (*sizes.split(), "layer_norm_eps", "pad_token_id")}
    # As laion_clap itself does; its own __init__ downloads tokenizers besides.
    folder = spec.submodule_search_locations[0]
    sys.path.append(folder)
    try:
        factory: Any = importlib.import_module("clap_module.factory")
        models: Any = importlib.import_module("clap_module.model")
        original = models.RobertaModel
        # Upstream downloads RoBERTa's weights only to overwrite them.
        models.RobertaModel = SimpleNamespace(
            from_pretrained=lambda _: RobertaModel(RobertaConfig(**roberta, type_vocab_size=1))
        )
        try:
            with torch.random.fork_rng(devices=[]):
                fusion = {"enable_fusion": True, "fusion_type": "aff_2d"} if audio.enable_fusion else {}
                clap, _ = factory.create_model(MODELS[audio.patch_embeds_hidden_size], "roberta", **fusion)
        finally:
            models.RobertaModel = original
        clap.load_state_dict({key: tensor for key, tensor in weights.items() if not key.endswith("position_ids")})
    # A package that is broken here, or a checkpoint of other depths than it builds.
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return None, f"{PLAIN} (laion_clap cannot be used: {reason:.200})"
    finally:
        sys.path.remove(folder)
    # Log-mels go in where upstream makes its own of a waveform.
    clap.audio_branch.spectrogram_extractor = clap.audio_branch.logmel_extractor = torch.nn.Identity()
    return clap.double().eval(), f"laion_clap {version('laion_clap')}"


if __name__ == "__main__":
    from cmcr_hf.cli import main

    sys.exit(main(["convert", "laion-clap", *sys.argv[1:]]))
