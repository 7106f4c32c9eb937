"""LAION-CLAP checkpoints as ClapModel, against arrays that the official code made."""

import importlib.util
import json
import sys
import zipfile
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ClapModel

from cmcr_hf.conversion import convert_laion_clap
from cmcr_hf.conversion.convert_laion_clap import (
    clap_config,
    convert_state_dict,
    feature_extractor,
    prove_clap,
    read_clap,
)
from cmcr_hf.conversion.plain_laion_clap import audio_outputs, text_outputs
from cmcr_hf.conversion.proof import PLAIN
from cmcr_hf.modeling.feature_extraction_cmcr import extract_audio

KINDS = ("fused", "unfused")
# Of the small RoBERTa that the golden files hold.
HEADS = 4
TABLE = "audio_branch.layers.0.blocks.0.attn.relative_position_bias_table"
TABLE_INDEX = "audio_branch.layers.0.blocks.0.attn.relative_position_index"
MEL_FILTERS = "audio_branch.logmel_extractor.melW"


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "official/golden"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def load(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def state(golden: Path, kind: str) -> dict[str, torch.Tensor]:
    """The upstream weights of a golden file, without `module.`."""
    content = torch.load(golden / f"laion_clap_small_{kind}.pt", weights_only=True)
    return {key.removeprefix("module."): tensor for key, tensor in content["state_dict"].items()}


def save(folder: Path, weights: dict[str, torch.Tensor], **parts: Any) -> Path:
    """A file as LAION's training writes it."""
    path = folder / "clap.pt"
    named = OrderedDict((f"module.{key}", tensor) for key, tensor in weights.items())
    torch.save({"epoch": 45, "name": "synthetic", "state_dict": named, **parts}, path)
    return path


def fused_mels(golden: Path) -> torch.Tensor:
    """Log-mels (3, 4, 1001, 64) of the clips tone, noise and chirp, of which noise is longer than 10 s."""
    mel = load(golden / "laion_clap_mel.npz")
    parts = [mel["mel_noise_full"][start : start + 1001] for start in mel["noise_chunk_starts"]]
    noise = torch.stack([mel["mel_noise_shrink"], *parts])
    return torch.stack([mel["mel_tone"].expand(4, -1, -1), noise, mel["mel_chirp"].expand(4, -1, -1)])


def waveforms() -> dict[str, np.ndarray]:
    """The clips of the golden arrays behind upstream's round trip through 16 bits."""
    time = np.arange(576000) / 48000
    tone = 0.5 * np.sin(2 * np.pi * 440 * time) + 0.3 * np.sin(2 * np.pi * 1234 * time + 1)
    tone = 32767 * (tone + 0.15 * np.sin(2 * np.pi * 7000 * time))[:48000]
    noise = np.random.RandomState(5).randint(-20000, 20001, size=576000)
    noise = (0.05 + 0.95 * np.exp(-4 * (time % 1.5))) * noise
    chirp = (0.6 * 32767 * np.sin(2 * np.pi * (100 * time + 595 * time**2)))[:480000]
    clips = {"tone": tone, "noise": noise, "chirp": chirp}
    samples = {name: np.rint(clip).astype(np.int16).astype(np.float32) / 32768 for name, clip in clips.items()}
    return {name: (np.trunc(clip * 32767) / 32767).astype(np.float32) for name, clip in samples.items()}


def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return (found.detach().double() - expected.double()).abs().max().item()


# Golden arrays


def audio_of_model(golden: Path, kind: str, mels: torch.Tensor, is_longer: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the converted model gives, in float64, by the names of the plain reading."""
    model = read_clap(golden / f"laion_clap_small_{kind}.pt", text_heads=HEADS)[0].double()
    given = mels.double()
    with torch.no_grad():
        audio = model.audio_model(given, is_longer=is_longer[:, None], output_hidden_states=True)
        projected = model.audio_projection(audio.pooler_output)
        embeds = model.get_audio_features(given, is_longer=is_longer[:, None]).pooler_output
    assert largest(embeds, torch.nn.functional.normalize(projected)) < 1e-12
    patches, *stages = (hidden.flatten(2).transpose(1, 2) for hidden in audio.hidden_states)
    outputs = {"patch_embed": patches, "pooled": audio.pooler_output, "projected": projected}
    return {**outputs, **{f"stage{stage}": hidden for stage, hidden in enumerate(stages)}}


def audio_of_weights(golden: Path, kind: str, mels: torch.Tensor, is_longer: torch.Tensor) -> dict[str, torch.Tensor]:
    return audio_outputs(state(golden, kind), mels, is_longer)


AUDIO = pytest.mark.parametrize("reader", [audio_of_model, audio_of_weights])


@AUDIO
def test_a_fused_audio_branch_gives_its_golden_values(golden, reader):
    io = load(golden / "laion_clap_small_fused_io.npz")
    outputs = reader(golden, "fused", fused_mels(golden), io["longer"])
    for name in ("pooled", "projected"):
        assert largest(outputs[name], io[f"f64_audio_{name}"]) < 1e-12, name
    # In float32, to whose rounding the stages, with values up to 30, are stored.
    assert largest(outputs["patch_embed"][1], io["audio_patch_embed_noise"]) < 3e-4
    for stage in range(4):
        assert largest(outputs[f"stage{stage}"], io[f"audio_stage{stage}"]) < 3e-4, stage
    if reader is audio_of_weights:
        assert largest(outputs["norm"], io["audio_norm"]) < 1e-4


@AUDIO
@pytest.mark.parametrize(
    ("name", "longer"),
    [
        ("audio", [False, True, False]),
        ("hf_style_longer0", [True, False, False]),
        ("none_longer", [False, False, False]),
    ],
)
def test_the_parts_of_those_clips_are_fused_in_that_are_longer(golden, reader, name, longer):
    io = load(golden / "laion_clap_small_fused_io.npz")
    projected = reader(golden, "fused", fused_mels(golden), torch.tensor(longer))["projected"]
    assert largest(torch.nn.functional.normalize(projected), io[f"{name}_embedding_norm"]) < 1e-6


@AUDIO
def test_an_unfused_audio_branch_gives_its_golden_values(golden, reader):
    io = load(golden / "laion_clap_small_unfused_io.npz")
    outputs = reader(golden, "unfused", io["logmel_full_tone"][None, None], torch.tensor([False]))
    for stage in range(4):
        assert largest(outputs[f"stage{stage}"], io[f"audio_stage{stage}"][:1]) < 3e-4, stage
    for name in ("pooled", "projected"):
        assert largest(outputs[name], io[f"audio_{name}"][:1]) < 2e-6, name


def text_of_model(golden: Path, kind: str, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the converted model gives, in float64, by the names of the plain reading."""
    model = read_clap(golden / f"laion_clap_small_{kind}.pt", text_heads=HEADS)[0].double()
    with torch.no_grad():
        text = model.text_model(ids, attention_mask=mask, output_hidden_states=True)
        projected = model.text_projection(text.pooler_output)
    outputs = {"pooled": text.pooler_output, "projected": projected, "embeddings": text.hidden_states[0]}
    return {**outputs, **{f"layer{layer}": hidden for layer, hidden in enumerate(text.hidden_states[1:])}}


def text_of_weights(golden: Path, kind: str, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return text_outputs(state(golden, kind), ids, mask, heads=HEADS)


# ClapModel takes the softmax in float32, whatever the weights have.
@pytest.mark.parametrize(("reader", "bound"), [(text_of_model, 3e-7), (text_of_weights, 1e-12)])
def test_a_text_branch_gives_its_golden_values(golden, kind, reader, bound):
    io = load(golden / f"laion_clap_small_{kind}_io.npz")
    outputs = reader(golden, kind, io["input_ids"], io["attention_mask"])
    assert largest(outputs["projected"], io["f64_text_projected"]) < bound
    assert largest(outputs["pooled"], io["text_pooled"]) < 3e-6
    for name in ("embeddings", "layer0", "layer1"):
        assert largest(outputs[name][1, :16], io[f"text_{name}_row1_first16"]) < 3e-6, name


def test_clips_become_their_golden_embeddings_by_the_feature_extractor(golden, kind):
    io = load(golden / f"laion_clap_small_{kind}_io.npz")
    model, _ = read_clap(golden / f"laion_clap_small_{kind}.pt", text_heads=HEADS)
    clips = waveforms()
    cases = [
        (clips["tone"], io["audio_embedding_norm"][0]),
        (clips["chirp"], io["audio_embedding_norm"][2]),
        (clips["chirp"][:177600], io["extra_embedding_norm"][0]),
    ]
    if kind == "fused":
        # Too long by less than a frame. Of a clip that is longer, upstream draws the parts; see the log-mels above.
        cases += [(clips["noise"][:480100], io["extra_embedding_norm"][1])]
    else:
        # As upstream drew them.
        starts = [int(io[name][-1]) for name in ("draws", "extra_draws")]
        expected = io["audio_embedding_norm"][1], io["extra_embedding_norm"][1]
        cases += [(clips["noise"][start:][:480000], row) for start, row in zip(starts, expected, strict=True)]
    extractor = feature_extractor(model.config)
    for clip, row in cases:
        features = {
            name: torch.from_numpy(value)[None] for name, value in extract_audio(clip, extractor, 48000).items()
        }
        assert features["input_features"].shape == (1, 4 if kind == "fused" else 1, 1001, 64)
        assert features["is_longer"].tolist() == [[False]]
        with torch.no_grad():
            embeds = model.get_audio_features(**features).pooler_output
        assert largest(embeds[0], row) < 1e-5


# Names and shapes


@pytest.mark.parametrize("name", ["tiny_fused", "tiny_unfused", "base_unfused"])
def test_the_keys_of_full_checkpoints_become_those_of_clap_models(golden, name):
    tables = {
        side: json.loads((golden / f"tables/{side}_htsat_{name}.json").read_text())["keys"]
        for side in ("laion", "hf_clap")
    }
    weights = {
        key.removeprefix("module."): torch.zeros(shape, dtype=getattr(torch, dtype))
        for key, (shape, dtype) in tables["laion"].items()
    }
    converted = {key: [list(tensor.shape), tensor.dtype] for key, tensor in convert_state_dict(weights).items()}
    expected = {key: [shape, getattr(torch, dtype)] for key, (shape, dtype) in tables["hf_clap"].items()}
    # What ClapModel computes itself and upstream does not store.
    computed = {
        f"text_model.embeddings.{name}": [[1, 514], torch.int64] for name in ("position_ids", "token_type_ids")
    }
    assert converted | computed == expected
    config = clap_config(weights)
    with torch.device("meta"):
        model = ClapModel(config)
    assert {key: [list(tensor.shape), tensor.dtype] for key, tensor in model.state_dict().items()} == expected
    assert (config.audio_config.num_attention_heads, config.text_config.num_attention_heads) == ([4, 8, 16, 32], 12)
    assert config.audio_config.depths == [2, 2, 12 if name == "base_unfused" else 6, 2]
    assert config.audio_config.hidden_size == (1024 if name == "base_unfused" else 768)
    assert (config.audio_config.spec_size, config.audio_config.window_size) == (256, 8)
    assert (config.text_config.layer_norm_eps, config.audio_config.layer_norm_eps) == (1e-5, 1e-5)
    assert config.audio_config.enable_fusion is (name == "tiny_fused")


def test_the_configuration_of_a_small_checkpoint_is_read_from_its_shapes(golden, kind):
    config = clap_config(state(golden, kind), text_heads=HEADS)
    audio, text = config.audio_config, config.text_config
    assert (audio.depths, audio.num_attention_heads) == ([2, 2, 2, 2], [2, 2, 4, 4])
    assert (audio.patch_embeds_hidden_size, audio.hidden_size, audio.mlp_ratio) == (8, 64, 4.0)
    assert (audio.spec_size, audio.window_size, audio.patch_size, audio.num_mel_bins) == (256, 8, 4, 64)
    assert (audio.enable_fusion, audio.fusion_type) == ((True, "aff_2d") if kind == "fused" else (False, None))
    assert (text.vocab_size, text.hidden_size, text.intermediate_size) == (100, 64, 128)
    assert (text.num_hidden_layers, text.num_attention_heads, text.max_position_embeddings) == (2, 4, 80)
    assert config.projection_dim == text.projection_dim == audio.projection_dim == 32


def test_the_feature_extractor_has_the_front_end_of_laion(golden, kind):
    extractor = feature_extractor(clap_config(state(golden, kind), text_heads=HEADS))
    assert extractor.truncation == ("fusion" if kind == "fused" else "rand_trunc")
    assert (extractor.sampling_rate, extractor.nb_max_samples, extractor.hop_length) == (48000, 480000, 480)
    assert (extractor.fft_window_size, extractor.feature_size, extractor.padding) == (1024, 64, "repeatpad")
    assert (extractor.frequency_min, extractor.frequency_max, extractor.top_db) == (50, 14000, None)
    assert largest(torch.from_numpy(extractor.mel_filters_slaney), state(golden, kind)[MEL_FILTERS]) < 1e-8


def test_queries_keys_and_values_are_cut_in_this_order(golden):
    weights = state(golden, "unfused")
    converted = convert_state_dict(weights)
    qkv = weights["audio_branch.layers.1.blocks.0.attn.qkv.weight"]
    prefix = "audio_model.audio_encoder.layers.1.blocks.0.attention.self."
    for row, name in enumerate(("query", "key", "value")):
        assert torch.equal(converted[f"{prefix}{name}.weight"], qkv[16 * row : 16 * (row + 1)])


# Files


def test_a_model_is_read_in_eval_mode_without_chance(golden, kind):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model, checkpoint = read_clap(golden / f"laion_clap_small_{kind}.pt", text_heads=HEADS)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(module.training for module in model.modules())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert torch.equal(model.logit_scale_t, checkpoint.weights["logit_scale_t"])


def test_a_converted_model_is_saved_and_loaded_again(golden, kind, tmp_path):
    model, _ = read_clap(golden / f"laion_clap_small_{kind}.pt", text_heads=HEADS)
    model.save_pretrained(tmp_path)
    loaded, report = ClapModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_a_file_with_the_state_of_its_training_is_read(golden, tmp_path, core):
    weights = state(golden, "unfused")
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    # As upstream's cosine schedule leaves it.
    optimizer.param_groups[0]["lr"] = np.float64(1e-4)
    path = save(tmp_path, weights, optimizer=optimizer.state_dict(), scaler={"scale": 65536.0, "_growth_tracker": 7})
    rename(path, core.encode())
    found = read_clap(path, text_heads=HEADS)[0].state_dict()
    expected = read_clap(golden / "laion_clap_small_unfused.pt", text_heads=HEADS)[0].state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def rename(path: Path, core: bytes) -> None:
    """Give numpy's modules in a file's pickle the names that another numpy gives them."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            if name.endswith("/data.pkl"):
                assert b"cnumpy.core.multiarray\nscalar\n" in data or b"cnumpy._core.multiarray\nscalar\n" in data
                data = data.replace(b"cnumpy._core", b"cnumpy.core").replace(b"cnumpy.core", b"c" + core)
            archive.writestr(name, data)


def test_nothing_of_numpy_is_called_for_a_file(golden, tmp_path):
    class Hostile:
        # numpy itself raises on this type, and takes memory for others.
        def __reduce__(self):
            return np.dtype, ("no such type",)

    class Scalar:
        def __reduce__(self):
            return np.float64(0).__reduce__()[0], (Hostile(),)

    read_clap(save(tmp_path, state(golden, "unfused"), optimizer=[Scalar()]), text_heads=HEADS)


def test_a_bare_state_dict_is_read_as_well(golden, tmp_path):
    weights = state(golden, "fused")
    del weights["text_branch.embeddings.position_ids"]
    torch.save(weights, tmp_path / "clap.pt")
    model, checkpoint = read_clap(tmp_path / "clap.pt", text_heads=HEADS)
    assert prove_clap(model, checkpoint).differences["audio"] < 1e-12


def test_weights_of_half_precision_give_the_same_within_it(golden, kind, tmp_path):
    weights = state(golden, kind)
    halves = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}
    model, checkpoint = read_clap(save(tmp_path, halves), text_heads=HEADS)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert max(prove_clap(model, checkpoint).differences.values()) < 3e-7
    io = load(golden / f"laion_clap_small_{kind}_io.npz")
    with torch.no_grad():
        embeds = model.get_text_features(io["input_ids"], attention_mask=io["attention_mask"]).pooler_output
    assert 1e-6 < largest(embeds, io["text_embedding_norm"]) < 5e-3


def test_a_file_that_was_cut_short_is_refused(golden, tmp_path):
    data = (golden / "laion_clap_small_fused.pt").read_bytes()
    (tmp_path / "clap.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"Cannot read .*clap\.pt: .*cut short"):
        read_clap(tmp_path / "clap.pt")


# Weights of something else


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_branch.extra.weight": torch.zeros(1)}, r"Unknown key 'audio_branch\.extra\.weight'"),
        ({"text_branch.shared.weight": torch.zeros(1)}, r"Unknown key 'text_branch\.shared\.weight'"),
        (
            {"audio_branch.patch_embed.fusion_model.local_att2.0.weight": torch.zeros(1)},
            r"Unknown key '.*local_att2\.0\.weight'",
        ),
        ({"logit_scale_a": None}, r"lacks weights, such as those that become 'logit_scale_a'"),
        ({"audio_branch.layers.3.blocks.1.mlp.fc2.bias": None}, r"lacks .*layers\.3\.blocks\.1\.output\.dense\.bias'"),
        ({TABLE: None}, r"Missing key '.*layers\.0\.blocks\.0\.attn\.relative_position_bias_table'"),
        ({"text_branch.pooler.dense.weight": None}, r"lacks .*'text_model\.pooler\.dense\.weight'"),
        ({"text_branch.pooler.dense.bias": torch.zeros(63)}, r"'text_model\.pooler\.dense\.bias': expected \[64\]"),
        ({"audio_branch.norm.weight": torch.zeros(())}, r"Misshapen key 'audio_branch\.norm\.weight'"),
        ({"audio_branch.layers.0.blocks.0.attn.qkv.bias": torch.zeros(25)}, r"Misshapen key '.*qkv\.bias'"),
        ({"text_branch.embeddings.token_type_embeddings.weight": torch.zeros(2, 64)}, r"got 2 types"),
        ({"audio_branch.patch_embed.proj.weight": torch.zeros(8, 4, 4, 4)}, r"patch_embed\.proj\.weight': expected"),
        (
            {"audio_branch.patch_embed.proj.weight": torch.zeros(0, 1, 0, 0)},
            r"Empty key '.*proj\.weight' of shape \[0, 1",
        ),
        ({"logit_scale_a": torch.zeros(0)}, r"Empty key 'logit_scale_a' of shape \[0\]"),
        (
            {"audio_branch.norm.bias": torch.full((64,), 1e300, dtype=torch.float64)},
            r"'audio_branch\.norm\.bias' are not finite in float32",
        ),
        (
            {"audio_branch.bn0.running_var": torch.full((64,), -0.5)},
            r"variances 'audio_branch\.bn0\.running_var' are below 0",
        ),
        ({"text_branch.embeddings.word_embeddings.weight": torch.zeros(1, 64)}, "Padding_idx"),
        (
            {"text_branch.encoder.layer.99999999.output.dense.bias": torch.zeros(1)},
            r"layers up to that of .*99999999.* are there",
        ),
        (
            {"audio_branch.layers.7.blocks.0.norm1.bias": torch.zeros(1)},
            r"layers up to that of .*layers.7.* are there",
        ),
        ({"audio_branch.bn0.weight": torch.full((64,), torch.nan)}, r"'audio_branch\.bn0\.weight' are not finite"),
        ({MEL_FILTERS: torch.zeros(769, 64)}, r"mel filters '.*melW' are not those of 50 to 14000 Hz"),
        ({MEL_FILTERS: torch.zeros(513, 64)}, r"mel filters"),
        ({MEL_FILTERS: torch.full((513, 64), torch.nan)}, r"mel filters"),
        ({MEL_FILTERS: None}, r"mel filters"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused_by_name(golden, tmp_path, change, message):
    weights = {key: tensor for key, tensor in {**state(golden, "fused"), **change}.items() if tensor is not None}
    path = save(tmp_path, weights)
    with pytest.raises(ValueError, match=rf"Cannot read .*clap\.pt: .*{message}"):
        read_clap(path, text_heads=HEADS)


def test_swapped_projections_of_unequal_widths_are_refused(golden, tmp_path):
    weights = state(golden, "unfused")
    # Wider than the audio branch, as the 1024 of HTSAT-base are wider than RoBERTa's 768.
    weights["text_projection.0.weight"] = torch.zeros(32, 48)
    with pytest.raises(ValueError, match=r"'text_projection\.linear1\.weight': expected \[32, 64\], got \[32, 48\]"):
        read_clap(save(tmp_path, weights), text_heads=HEADS)


def test_the_heads_of_another_text_branch_are_asked_for(golden):
    with pytest.raises(
        ValueError, match=r"multiple of its 12 attention heads, got 64.* as read_clap\(path, text_heads="
    ):
        read_clap(golden / "laion_clap_small_unfused.pt")
    with pytest.raises(ValueError, match="multiple of its 0 attention heads, got 64"):
        read_clap(golden / "laion_clap_small_unfused.pt", text_heads=0)


def test_a_checkpoint_whose_tensors_are_all_empty_is_refused(golden, tmp_path):
    weights = {key: tensor.new_zeros((0, *tensor.shape[1:])) for key, tensor in state(golden, "fused").items()}
    with pytest.raises(ValueError, match=r"Cannot read .*clap\.pt: Empty key"):
        read_clap(save(tmp_path, weights))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Cannot read .*none\.pt: there is no such file"):
        read_clap(tmp_path / "none.pt")


# Proof


@pytest.fixture
def without_laion_clap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_laion_clap.importlib.util, "find_spec", lambda name: None)


def test_a_converted_model_gives_what_a_plain_reading_gives(golden, kind, without_laion_clap):
    model, checkpoint = read_clap(golden / f"laion_clap_small_{kind}.pt", text_heads=HEADS)
    proof = prove_clap(model, checkpoint)
    assert (proof.reference, proof.bound) == (PLAIN, 1e-6)
    assert proof.differences["audio"] < 1e-12
    assert proof.differences["text"] < 3e-7
    assert model.logit_scale_a.dtype == torch.float32


def test_weights_of_double_precision_are_proven_as_the_float32_that_is_saved(golden, tmp_path, without_laion_clap):
    weights = state(golden, "unfused")
    for key in ("audio_projection.0.weight", "text_projection.0.weight"):
        # No float32 has these values.
        weights[key] = weights[key].double() * (1 + 2.0**-26)
    model, checkpoint = read_clap(save(tmp_path, weights), text_heads=HEADS)
    assert checkpoint.weights["audio_projection.0.weight"].dtype == torch.float64
    assert prove_clap(model, checkpoint).differences["audio"] < 1e-12


@pytest.mark.parametrize(
    "name",
    [
        "audio_model.audio_encoder.layers.1.blocks.1.attention.self.relative_position_bias_table",
        "audio_model.audio_encoder.patch_embed.fusion_model.local_att.4.running_mean",
        "audio_model.audio_encoder.batch_norm.running_var",
        "audio_projection.linear2.bias",
    ],
)
def test_another_audio_weight_is_noticed(golden, name, without_laion_clap):
    model, checkpoint = read_clap(golden / "laion_clap_small_fused.pt", text_heads=HEADS)
    model.state_dict()[name].view(-1)[1] += 0.01
    with pytest.raises(ValueError, match=r"its audio embeddings differ by .* expected at most 1e-09"):
        prove_clap(model, checkpoint)


def test_another_epsilon_of_the_text_branch_is_noticed(golden, without_laion_clap):
    model, checkpoint = read_clap(golden / "laion_clap_small_fused.pt", text_heads=HEADS)
    for module in model.text_model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-12
    with pytest.raises(ValueError, match="its text embeddings differ"):
        prove_clap(model, checkpoint)


def full_size(golden: Path, name: str) -> dict[str, torch.Tensor]:
    """Random weights of a released size, with the constants that upstream stores."""
    table = json.loads((golden / f"tables/laion_htsat_{name}.json").read_text())["keys"]
    small = state(golden, "unfused")
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, (shape, dtype) in table.items():
        key = key.removeprefix("module.")
        if key == MEL_FILTERS or key.endswith("relative_position_index"):
            tensor = small[MEL_FILTERS if key == MEL_FILTERS else TABLE_INDEX]
        elif dtype == "int64":
            tensor = torch.arange(np.prod(shape, dtype=int)).reshape(shape)
        elif key.endswith("attn_mask"):
            side = 8 * round(shape[0] ** 0.5)
            edges = (torch.arange(side) >= side - 8).long() + (torch.arange(side) >= side - 4)
            regions = (3 * edges[:, None] + edges).view(side // 8, 8, side // 8, 8).transpose(1, 2).reshape(-1, 64)
            tensor = -100.0 * (regions[:, None] != regions[:, :, None])
        elif len(shape) > 1:
            tensor = torch.randn(shape, generator=generator) / max(2, np.prod(shape[1:])) ** 0.5
        else:
            tensor = torch.rand(shape, generator=generator) + 0.5
        assert list(tensor.shape) == shape, key
        weights[key] = tensor
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_fused", "base_unfused"])
def test_random_weights_of_a_released_size_are_read_and_proven(golden, tmp_path, name):
    path = save(tmp_path, full_size(golden, name))
    model, checkpoint = read_clap(path)
    proof = prove_clap(model, checkpoint)
    installed = importlib.util.find_spec("laion_clap") is not None
    assert proof.reference == (f"laion_clap {version('laion_clap')}" if installed else PLAIN)
    assert proof.differences["audio"] < 1e-12
    assert proof.differences["text"] < 3e-7
    path.unlink()


@pytest.fixture
def broken_laion_clap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "laion_clap"
    (package / "clap_module").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "clap_module/__init__.py").write_text("raise ImportError('no torchvision here')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("laion_clap", "clap_module")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        ({8: "HTSAT-tiny"}, "laion_clap cannot be used: ImportError: no torchvision here"),
        ({96: "HTSAT-tiny"}, "laion_clap builds no HTSAT of width 8"),
    ],
)
def test_why_laion_clap_is_not_used_is_said_in_the_proof(golden, broken_laion_clap, monkeypatch, models, reason):
    monkeypatch.setattr(convert_laion_clap, "MODELS", models)
    model, checkpoint = read_clap(golden / "laion_clap_small_unfused.pt", text_heads=HEADS)
    path = list(sys.path)
    assert prove_clap(model, checkpoint).reference == f"{PLAIN} ({reason})"
    assert sys.path == path
