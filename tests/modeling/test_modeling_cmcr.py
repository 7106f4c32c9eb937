import copy
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    ClapModel,
    CLIPConfig,
    CLIPModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    Trainer,
    TrainingArguments,
)

from cmcr_hf import CMCRConfig, CMCRConnector, CMCRModel
from cmcr_hf.modeling.modeling_cmcr import CMCRProjector, normalize, symmetric_info_nce

IDS = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 4, 2]])


def equal_weights(a, b):
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def small_connector(**fields):
    torch.manual_seed(0)
    return CMCRConnector(
        CMCRConfig(projectors={"clip": {"input_dim": 4}, "clap": {"input_dim": 6}}, projection_dim=8, **fields)
    )


def quadruple(rows=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = {"clip_text": 4, "clap_text": 6, "clip_image": 4, "clap_audio": 6}
    return {name: F.normalize(torch.randn(rows, width, generator=generator), dim=-1) for name, width in widths.items()}


@pytest.fixture(scope="module")
def model(tiny_clip, tiny_clap):
    torch.manual_seed(2)
    return CMCRModel.from_sources_pretrained(tiny_clip, tiny_clap, config={"projection_dim": 20})


@pytest.fixture(scope="module")
def full_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "full"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def connector_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "connector"
    model.connector.save_pretrained(folder)
    return folder


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.randn(3, 3, 32, 32, generator=generator),
        "input_features": torch.randn(3, 1, 126, 16, generator=generator),
        "input_ids": IDS,
    }


# Projectors


def test_the_two_layer_projector_is_the_one_of_the_official_clap_clip_head():
    torch.manual_seed(0)
    projector = CMCRProjector("linear-bn-relu-linear-bn", 4, 6, 5).eval()
    first, norm, _, second, last = projector.layers
    norm.running_mean.normal_()
    last.running_var.uniform_(0.5, 2)
    x = torch.randn(3, 4)

    def batch_norm(values, layer):
        return (values - layer.running_mean) / (layer.running_var + 1e-5).sqrt() * layer.weight + layer.bias

    hidden = batch_norm(x @ first.weight.T + first.bias, norm).clamp(min=0)
    expected = batch_norm(hidden @ second.weight.T + second.bias, last)
    torch.testing.assert_close(projector(x), expected)


def test_the_one_layer_projector_ends_in_relu():
    torch.manual_seed(0)
    output = CMCRProjector("linear-bn-relu", 4, 6).eval()(torch.randn(64, 4))
    assert output.min() == 0
    assert output.max() > 0


def test_the_identity_projector_has_no_weights_and_changes_nothing():
    projector = CMCRProjector("identity", 4, 4)
    x = torch.randn(3, 4)
    assert not list(projector.parameters())
    assert torch.equal(projector(x), x)


def test_projection_normalises_before_and_after():
    connector = small_connector().eval()
    x = torch.randn(5, 4)
    projected = connector.project(x, "clip")
    torch.testing.assert_close(projected.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(connector.project(7 * x, "clip"), projected)
    torch.testing.assert_close(projected, F.normalize(connector.projectors["clip"](F.normalize(x, dim=-1)), dim=-1))


# Objective


def test_the_contrastive_loss_is_the_mean_of_both_cross_entropies():
    a, b = F.normalize(torch.randn(5, 4), dim=-1), F.normalize(torch.randn(5, 4), dim=-1)
    logits = (a.double() @ b.double().T) / 0.05
    rows = -torch.stack([logits[i].log_softmax(0)[i] for i in range(5)]).mean()
    columns = -torch.stack([logits[:, i].log_softmax(0)[i] for i in range(5)]).mean()
    assert symmetric_info_nce(a, b, 1 / 0.05).item() == pytest.approx(((rows + columns) / 2).item(), rel=1e-5)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    connector = small_connector(overlap_temperature=0.2, leaf_temperature=0.3, intra_weight=0.7).eval()
    output = connector(quadruple())
    text_a, text_b, image, audio = (
        output.embeds[name] for name in ("clip_text", "clap_text", "clip_image", "clap_audio")
    )
    overlap = symmetric_info_nce(text_a, text_b, 5.0)
    leaf = symmetric_info_nce(image, audio, 1 / 0.3)
    intra = ((text_a - image).norm(dim=-1) + (text_b - audio).norm(dim=-1)).mean() / 2
    torch.testing.assert_close(output.loss_overlap, overlap)
    torch.testing.assert_close(output.loss_leaf, leaf)
    torch.testing.assert_close(output.loss_intra, intra)
    torch.testing.assert_close(output.loss, overlap + leaf + 0.7 * intra)


def test_the_gap_term_can_be_squared():
    plain = small_connector().eval()(quadruple())
    squared = small_connector(intra_squared=True).eval()(quadruple())
    text, image = plain.embeds["clip_text"], plain.embeds["clip_image"]
    clap_text, audio = plain.embeds["clap_text"], plain.embeds["clap_audio"]
    expected = ((text - image).square().sum(-1) + (clap_text - audio).square().sum(-1)).mean() / 2
    torch.testing.assert_close(squared.loss_intra, expected)


def test_identical_embeddings_give_finite_gradients():
    connector = small_connector(noise_norm=0)
    embeds = quadruple()
    embeds["clip_image"] = embeds["clip_text"]
    connector(embeds).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in connector.projectors.parameters())


def test_noise_turns_an_embedding_by_the_angle_of_the_paper_at_any_width():
    for width in (512, 128):
        connector = CMCRConnector(CMCRConfig(projectors={"clip": {"input_dim": width}, "clap": {"input_dim": width}}))
        torch.manual_seed(0)
        clean = F.normalize(torch.randn(2000, width), dim=-1)
        noisy = connector.train()._complete(clean, "clip_text")
        cosine = F.cosine_similarity(clean, noisy).mean().item()
        assert cosine == pytest.approx(1 / math.sqrt(1 + 0.004 * 512), abs=0.01)


def test_seeded_noise_is_a_function_of_the_seed_and_the_name_of_the_embeddings():
    connector = small_connector(noise_norm=0.5).train()
    same = quadruple()["clip_text"]

    def embeds(*seed):
        return connector({"clip_text": same, "clip_image": same}, return_loss=False, noise_seed=seed).embeds

    first = embeds(1, 2, 3)
    state = torch.get_rng_state()
    for name, rows in embeds(1, 2, 3).items():
        assert torch.equal(rows, first[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert (first["clip_text"] != first["clip_image"]).all()
    assert (first["clip_text"] != embeds(1, 2, 4)["clip_text"]).all()


@pytest.mark.cpu_alone
def test_a_compiled_connector_is_not_compiled_anew_for_every_seed():
    torch.compiler.reset()
    connector, graphs = small_connector(noise_norm=0.5).train(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(connector, backend=backend)
    made = []
    for step in range(6):
        torch.testing.assert_close(
            compiled(quadruple(), noise_seed=(0, step, 0)).loss, connector(quadruple(), noise_seed=(0, step, 0)).loss
        )
        made.append(len(graphs))
    assert made[2] == made[5] > 0


def test_there_is_noise_in_training_mode_alone():
    connector = small_connector()
    torch.manual_seed(0)
    first = connector.train()(quadruple()).loss
    second = connector(quadruple()).loss
    assert first != second
    connector.eval()
    assert connector(quadruple()).loss == connector(quadruple()).loss


def test_a_missing_embedding_of_the_bridge_is_named():
    embeds = quadruple()
    del embeds["clap_audio"]
    with pytest.raises(ValueError, match=r"\['clap_audio'\] are not among"):
        small_connector()(embeds)


def test_embeddings_of_an_unknown_space_are_refused():
    with pytest.raises(ValueError, match="got 'sound_text'"):
        small_connector()({"sound_text": torch.randn(2, 4)})


def test_an_objective_of_a_later_version_projects_but_does_not_train():
    connector = small_connector(objective="later")
    assert connector.eval()(quadruple(), return_loss=False).embeds["clip_text"].shape == (16, 8)
    with pytest.raises(ValueError, match="Cannot train the objective 'later': this version knows c-mcr, ex-mcr"):
        connector(quadruple())


def extension(**fields):
    torch.manual_seed(0)
    projectors = {"clip": {"input_dim": 4}, "clap": {"input_dim": 6}}
    return CMCRConnector(CMCRConfig(**{"projectors": projectors, "objective": "ex-mcr", **fields}))


def cross_entropy_both_ways(a, b, temperature):
    logits = a.double() @ b.double().T / temperature
    rows = torch.arange(len(a))
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2


def test_the_loss_of_ex_mcr_is_that_of_its_paper_on_noisy_vectors():
    connector = extension(intra_weight=0.7, leaf_temperature=0.3, noise_norm=0.5).train()
    embeds, projector = quadruple(), connector.projectors["clap"]
    with torch.no_grad():
        projector.leaf_linear.weight.normal_()
        projector.leaf_linear.bias.normal_()
    torch.manual_seed(5)
    # Drawn in the order of the embeddings; a base vector is noisy too, and no more than scaled behind that.
    noisy = {
        name: F.normalize(rows + 0.5 * rows.shape[1] ** -0.5 * torch.randn_like(rows), dim=-1)
        for name, rows in embeds.items()
    }
    linear = noisy["clap_audio"] @ projector.leaf_linear.weight.T + projector.leaf_linear.bias
    text = F.normalize(projector.layers(noisy["clap_text"]), dim=-1)
    audio = F.normalize(projector.layers(linear), dim=-1)
    expected = {
        "loss_overlap": cross_entropy_both_ways(text, noisy["clip_text"], 0.05),
        "loss_leaf": cross_entropy_both_ways(audio, noisy["clip_image"], 0.3),
        "loss_leaf_overlap": cross_entropy_both_ways(audio, noisy["clip_text"], 0.05),
        "loss_overlap_leaf": cross_entropy_both_ways(text, noisy["clip_image"], 0.3),
    }
    expected["loss"] = sum(expected.values()) / 4
    expected["loss_intra"] = (linear - noisy["clap_text"]).norm(dim=-1).mean().double() / 2
    expected["loss"] = expected["loss"] + 0.7 * expected["loss_intra"]
    torch.manual_seed(5)
    output = connector(embeds)
    for name, value in expected.items():
        torch.testing.assert_close(output[name].double(), value, rtol=1e-5, atol=1e-6)


def test_ex_mcr_closes_the_gap_before_the_mlps_or_behind_a_projector_without_a_linear_map():
    squared = extension(intra_squared=True).eval()(quadruple())
    audio, text = quadruple()["clap_audio"], quadruple()["clap_text"]
    # The linear map starts as the identity.
    torch.testing.assert_close(squared.loss_intra, (audio - text).square().sum(-1).mean() / 2)
    plain = extension(projectors={"clip": {"input_dim": 4}, "clap": {"input_dim": 6, "layout": "linear-bn-relu"}})
    output = plain.eval()(quadruple())
    gap = output.embeds["clap_audio"] - output.embeds["clap_text"]
    torch.testing.assert_close(output.loss_intra, gap.norm(dim=-1).mean() / 2)


def test_a_base_space_keeps_every_bit():
    rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(extension().project(rows, "clip", "image"), F.normalize(rows, dim=-1))


# Features


def test_features_are_the_projected_unit_features_of_the_sources(model, inputs, tiny_clip, tiny_clap):
    clip, clap = CLIPModel.from_pretrained(tiny_clip), ClapModel.from_pretrained(tiny_clap)
    image = clip.get_image_features(inputs["pixel_values"]).pooler_output
    audio = clap.get_audio_features(inputs["input_features"]).pooler_output
    text = clap.get_text_features(IDS).pooler_output
    torch.testing.assert_close(
        model.get_image_features(inputs["pixel_values"]).pooler_output, model.connector.project(image, "clip")
    )
    torch.testing.assert_close(
        model.get_audio_features(inputs["input_features"]).pooler_output, model.connector.project(audio, "clap")
    )
    torch.testing.assert_close(
        model.get_text_features(IDS, space="clap").pooler_output, model.connector.project(text, "clap")
    )


def test_text_goes_through_the_default_space_of_the_configuration(model):
    default = model.get_text_features(IDS).pooler_output
    assert torch.equal(default, model.get_text_features(IDS, space="clip").pooler_output)
    assert not torch.allclose(default, model.get_text_features(IDS, space="clap").pooler_output)


def test_features_come_as_a_tuple_on_request(model):
    output = model.get_text_features(IDS, return_dict=False)
    assert isinstance(output, tuple)
    assert torch.equal(output[1], model.get_text_features(IDS).pooler_output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_unit_vectors_near_those_of_float32(full_folder, model, inputs, dtype):
    half = CMCRModel.from_pretrained(full_folder, dtype=dtype)
    output, expected = half(**inputs), model(**inputs)
    for name in ("image_embeds", "text_embeds", "audio_embeds"):
        assert output[name].dtype == dtype
        torch.testing.assert_close(output[name].float().norm(dim=-1), torch.ones(3), atol=1e-2, rtol=0)
        assert F.cosine_similarity(output[name].float(), expected[name]).min() > 0.98


def test_a_device_map_places_the_whole_model(full_folder, model, inputs):
    placed = CMCRModel.from_pretrained(full_folder, device_map={"": "cpu"})
    assert torch.equal(placed(**inputs).image_embeds, model(**inputs).image_embeds)
    assert equal_weights(CMCRModel.from_pretrained(full_folder, device_map="auto"), model)


def test_the_attention_asked_for_reaches_every_source_that_has_it(full_folder, connector_folder):
    for folder in (full_folder, connector_folder):
        for attention in ("sdpa", "eager"):
            loaded = CMCRModel.from_pretrained(folder, attn_implementation=attention)
            assert loaded.clip.vision_model.config._attn_implementation == attention
            assert loaded.clip.text_model.config._attn_implementation == attention
            assert loaded.clap.config._attn_implementation == "eager"  # ClapModel has no SDPA


def test_sources_use_sdpa_by_default(model):
    assert model.clip.vision_model.config._attn_implementation == "sdpa"


def test_siglip_and_an_unequal_width_connect(tmp_path, tiny_clap):
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 40,
    }
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 8}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    SiglipModel(
        SiglipConfig(text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 16})
    ).save_pretrained(tmp_path / "siglip")
    model = CMCRModel.from_sources_pretrained(tmp_path / "siglip", tiny_clap, config={"projection_dim": 12})
    assert [projector["input_dim"] for projector in model.config.projectors.values()] == [32, 16]
    output = model(pixel_values=torch.randn(2, 3, 32, 32), input_ids=torch.ones(2, 8, dtype=torch.long))
    assert output.logits_per_image.shape == (2, 2)
    with pytest.raises(ValueError, match="Expected texts padded to 8 tokens, as a siglip reads the last one, got 3"):
        model.get_text_features(torch.ones(2, 3, dtype=torch.long))
    assert model.get_text_features(torch.ones(2, 3, dtype=torch.long), space="clap").pooler_output.shape == (2, 12)
    model.save_pretrained(tmp_path / "saved")
    assert equal_weights(CMCRModel.from_pretrained(tmp_path / "saved"), model)


def test_siglip2_takes_its_mask_and_shapes(tmp_path, tiny_clap):
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 40,
    }
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 8}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = Siglip2Config(text_config=text, vision_config={**vision, "num_patches": 16, "patch_size": 4})
    Siglip2Model(config).save_pretrained(tmp_path)
    model = CMCRModel.from_sources_pretrained(tmp_path, tiny_clap)
    output = model(
        pixel_values=torch.randn(2, 16, 48),
        pixel_attention_mask=torch.ones(2, 16, dtype=torch.long),
        spatial_shapes=torch.tensor([[4, 4], [2, 8]]),
        return_loss=False,
    )
    torch.testing.assert_close(output.image_embeds.norm(dim=-1), torch.ones(2))


# Forward


def test_logits_are_scaled_cosines_of_the_embeddings(model, inputs):
    output = model(**inputs)
    image, text, audio = output.image_embeds, output.text_embeds, output.audio_embeds
    torch.testing.assert_close(output.logits_per_image, 10 * image @ text.T)
    torch.testing.assert_close(output.logits_per_text, output.logits_per_image.T)
    torch.testing.assert_close(output.logits_per_audio, 10 * audio @ text.T)
    torch.testing.assert_close(output.logits_per_audio_image, 10 * audio @ image.T)


def test_any_subset_of_modalities_is_embedded(model, inputs):
    output = model(input_features=inputs["input_features"], input_ids=IDS)
    assert output.image_embeds is None and output.logits_per_image is None
    torch.testing.assert_close(output.logits_per_text, output.logits_per_audio.T)
    alone = model(pixel_values=inputs["pixel_values"])
    assert alone.loss is None and alone.image_embeds.shape == (3, 20)


def test_nothing_to_embed_is_an_error(model):
    with pytest.raises(ValueError, match="at least one of input_ids"):
        model()


def test_the_paired_loss_averages_over_the_pairs_of_modalities(model, inputs):
    output = model(**inputs)
    pairs = [("image_embeds", "text_embeds"), ("image_embeds", "audio_embeds"), ("text_embeds", "audio_embeds")]
    expected = torch.stack([symmetric_info_nce(output[a], output[b], 10.0) for a, b in pairs]).mean()
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)


def test_unequal_row_counts_have_no_loss_in_eval_and_are_an_error_in_training(model, inputs):
    inputs["input_ids"] = IDS[:2]
    assert model(**inputs).loss is None
    # A copy, since BatchNorm's statistics move in training mode.
    with pytest.raises(ValueError, match=r"row-aligned pairs .* got \[3, 2, 3\] rows"):
        copy.deepcopy(model).train()(**inputs)


# Freezing


def test_frozen_sources_have_no_gradients_after_loading(full_folder):
    loaded = CMCRModel.from_pretrained(full_folder)
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trainable == {f"connector.{name}" for name, _ in loaded.connector.named_parameters()}


def test_training_mode_reaches_the_connector_alone(full_folder):
    loaded = CMCRModel.from_pretrained(full_folder).train()
    assert loaded.connector.training
    assert not any(module.training for source in loaded.sources.values() for module in source.modules())


def test_unfrozen_sources_train(full_folder):
    loaded = CMCRModel.from_pretrained(full_folder, freeze_sources=False).train()
    assert loaded.clap.audio_model.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


class PairRows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {
            "pixel_values": torch.randn(3, 32, 32, generator=generator),
            "input_features": torch.randn(1, 126, 16, generator=generator),
        }


def test_three_trainer_steps_change_the_connector_alone(full_folder, tmp_path):
    loaded = CMCRModel.from_pretrained(full_folder)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=loaded, args=args, train_dataset=PairRows()).train()
    changed = {name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("connector.") for name in changed)
    assert "connector.logit_scale" in changed
    # BatchNorm inside CLAP's audio tower would move in training mode even without gradients.
    assert "clap.audio_model.audio_encoder.batch_norm.running_mean" in before


# Saving and loading


def test_a_full_checkpoint_loads_bit_equal(full_folder, model, inputs):
    loaded = CMCRModel.from_pretrained(full_folder)
    assert equal_weights(loaded, model)
    assert not loaded.training
    assert torch.equal(loaded(**inputs).audio_embeds, model(**inputs).audio_embeds)


def test_sources_keep_their_weights(model, tiny_clip, tiny_clap):
    assert equal_weights(model.clip, CLIPModel.from_pretrained(tiny_clip))
    assert equal_weights(model.clap, ClapModel.from_pretrained(tiny_clap))


def test_a_connector_checkpoint_finds_the_sources_that_it_records(connector_folder, model):
    loaded = CMCRModel.from_pretrained(connector_folder)
    assert equal_weights(loaded, model)
    assert not any(parameter.requires_grad for parameter in loaded.clip.parameters())
    assert (connector_folder / "model.safetensors").stat().st_size < 100_000


def test_a_connector_loads_from_a_full_checkpoint_and_from_its_own(full_folder, connector_folder, model):
    for folder in (full_folder, connector_folder):
        assert equal_weights(CMCRConnector.from_pretrained(folder), model.connector)


def test_auto_model_loads_both_kinds_of_checkpoint(full_folder, connector_folder, model):
    for folder in (full_folder, connector_folder):
        loaded = AutoModel.from_pretrained(folder)
        assert type(loaded) is CMCRModel
        assert equal_weights(loaded, model)


def test_saving_again_writes_the_same_bytes(full_folder, tmp_path):
    CMCRModel.from_pretrained(full_folder).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (full_folder / "model.safetensors").read_bytes()


def copy_without(folder, target, prefix):
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if not k.startswith(prefix)}, target / "model.safetensors", {"format": "pt"}
    )
    return target


@pytest.mark.parametrize(
    "prefix", ["connector.projectors.clap.", "clip.vision_model.", "clap.audio_model.audio_encoder.batch_norm"]
)
def test_missing_weights_of_a_full_checkpoint_are_an_error(full_folder, tmp_path, prefix):
    folder = copy_without(full_folder, tmp_path / "broken", prefix)
    with pytest.raises(ValueError, match=f"lacks .* of the weights of a CMCRModel, e.g. '{prefix}"):
        CMCRModel.from_pretrained(folder)


def test_a_missing_projector_of_a_connector_checkpoint_is_an_error(connector_folder, tmp_path):
    folder = copy_without(connector_folder, tmp_path / "broken", "projectors.clip")
    for model_class in (CMCRConnector, CMCRModel):
        with pytest.raises(ValueError, match=r"lacks .* of the weights of a CMCRConnector"):
            model_class.from_pretrained(folder)


def test_a_connector_without_recorded_sources_says_how_to_name_them(tmp_path, tiny_clip, tiny_clap):
    connector = CMCRConnector(
        CMCRConfig(projectors={"clip": {"input_dim": 24}, "clap": {"input_dim": 16}}, projection_dim=8)
    )
    connector.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"from_sources_pretrained\(clip=\.\.\., clap=\.\.\., connector="):
        CMCRModel.from_pretrained(tmp_path)
    model = CMCRModel.from_sources_pretrained(tiny_clip, tiny_clap, connector=tmp_path)
    assert equal_weights(model.connector, connector)
    assert model.config.sources["clip"]["id"] == str(tiny_clip)


def test_a_recorded_source_that_cannot_be_had_is_an_error(connector_folder, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(connector_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["sources"]["clap"]["id"] = "org/absent"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="org/absent"):
        CMCRModel.from_pretrained(folder)


def test_a_source_of_another_width_is_refused(tiny_clip, tiny_clap):
    connector = CMCRConnector(CMCRConfig(projectors={"clip": {"input_dim": 512}, "clap": {"input_dim": 16}}))
    with pytest.raises(ValueError, match="expects clip embeddings of width 512"):
        CMCRModel.from_sources_pretrained(tiny_clip, tiny_clap, connector=connector)


def test_a_model_needs_a_source(tiny_clip):
    with pytest.raises(ValueError, match=r"Expected the sources \['clip', 'clap'\], got \[\]"):
        CMCRModel.from_sources_pretrained()
    with pytest.raises(ValueError, match="has no clip_config"):
        CMCRModel(CMCRConfig())


def test_a_source_that_the_connector_connects_cannot_be_left_out(connector_folder, tiny_clip):
    # It would be built with random weights.
    with pytest.raises(ValueError, match=r"Expected the sources \['clip', 'clap'\], got \['clip'\]"):
        CMCRModel.from_sources_pretrained(tiny_clip, connector=connector_folder)


def test_sources_in_the_wrong_roles_are_refused(tiny_clip, tiny_clap):
    with pytest.raises(ValueError, match="The clip source is a ClapModel, which cannot embed image"):
        CMCRModel.from_sources_pretrained(clip=tiny_clap, clap=tiny_clip)


@pytest.mark.parametrize("arguments", [{}, {"dtype": "auto"}])  # the second is what a pipeline passes
def test_sources_in_half_precision_do_not_cut_a_trained_connector(
    model, connector_folder, tiny_clip, tmp_path, arguments
):
    half, folder = tmp_path / "half", tmp_path / "connector"
    CLIPModel.from_pretrained(tiny_clip, dtype=torch.float16).save_pretrained(half)
    shutil.copytree(connector_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["sources"]["clip"]["id"] = str(half)
    (folder / "config.json").write_text(json.dumps(config))
    loaded = CMCRModel.from_pretrained(folder, **arguments)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert equal_weights(loaded.connector, model.connector)


def test_loaded_models_are_taken_as_sources_without_a_record(tiny_clip, tiny_clap):
    clip = CLIPModel.from_pretrained(tiny_clip)
    model = CMCRModel.from_sources_pretrained(clip, tiny_clap)
    assert model.clip is clip
    assert set(model.config.sources) == {"clap"}


def test_a_model_of_one_space_alone_embeds_its_modalities(tiny_clap, tmp_path):
    model = CMCRModel.from_sources_pretrained(clap=tiny_clap)
    assert model.get_text_features(IDS).pooler_output.shape == (3, 512)
    model.save_pretrained(tmp_path)
    assert equal_weights(CMCRModel.from_pretrained(tmp_path), model)


def test_normalising_keeps_the_dtype_and_zero_rows_finite():
    rows = normalize(torch.zeros(1, 4, dtype=torch.bfloat16))
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, torch.zeros(1, 4, dtype=torch.bfloat16))


def test_a_source_that_is_given_as_a_model_keeps_its_weights(tiny_clip):
    # Made by hand, where `from_pretrained` marks what it loads.
    clip = CLIPModel(CLIPConfig.from_pretrained(tiny_clip))
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    model = CMCRModel.from_sources_pretrained(clip, config={"projection_dim": 8})
    assert all(torch.equal(value, before[name]) for name, value in model.clip.state_dict().items())


# More than two spaces


@pytest.fixture(scope="module")
def extended(tiny_clip, tiny_clap, tiny_ulip, tmp_path_factory):
    """CLIP, and CLAP and ULIP extended into it: before and after it was saved and loaded."""
    torch.manual_seed(0)
    model = CMCRModel.from_sources_pretrained(tiny_clip, tiny_clap, ulip=tiny_ulip, config={"objective": "ex-mcr"})
    folder = tmp_path_factory.mktemp("saved") / "extended"
    model.save_pretrained(folder)
    return model, CMCRModel.from_pretrained(folder)


def in_memory_of_its_own(model):
    """Copy the weights: those that a file is mapped to may lie at addresses where products round differently."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


@torch.no_grad()
def test_the_base_space_of_three_is_that_of_its_source_to_the_last_bit(extended, tiny_clip, inputs):
    clip = in_memory_of_its_own(CLIPModel.from_pretrained(tiny_clip))
    images = F.normalize(clip.get_image_features(inputs["pixel_values"]).pooler_output, dim=-1)
    texts = F.normalize(clip.get_text_features(IDS).pooler_output, dim=-1)
    for model in map(in_memory_of_its_own, extended):
        assert model.config.projectors["clip"] == {"layout": "identity", "input_dim": 24}
        assert torch.equal(model.get_image_features(inputs["pixel_values"]).pooler_output, images)
        assert torch.equal(model.get_text_features(IDS).pooler_output, texts)
        output = model(pixel_values=inputs["pixel_values"], input_ids=IDS)
        assert torch.equal(output.logits_per_image, model.connector.logit_scale.exp() * images @ texts.T)


@torch.no_grad()
def test_three_spaces_share_one_and_survive_saving(extended, inputs):
    clouds = torch.randn(3, 40, 3, generator=torch.Generator().manual_seed(1))
    for model in extended:
        assert model.config.spaces == ["clip", "clap", "ulip"]
        assert model.config.bridges == [["clip", "clap", "text"], ["clip", "ulip", "image"]]
        output = model(**inputs, point_clouds=clouds)
        assert output.audio_embeds.shape == output.point_cloud_embeds.shape == output.image_embeds.shape == (3, 24)
    before, after = (model(**inputs, point_clouds=clouds) for model in extended)
    assert torch.equal(before.point_cloud_embeds, after.point_cloud_embeds)
    assert torch.equal(before.audio_embeds, after.audio_embeds)


def distilling_connector(**fields):
    projectors = {"clip": {"input_dim": 6}, "clap": {"input_dim": 4}}
    config = CMCRConfig(objective="bridge-distillation", projectors=projectors, projection_dim=8, **fields)
    return CMCRConnector(config)


def test_the_distillation_loss_compares_all_items_of_both_memories_with_their_matches():
    connector = distilling_connector().eval()
    embeds = {"clip_image": torch.randn(5, 6), "clap_audio": torch.randn(7, 4)}
    matches = torch.rand(5, 7)
    output = connector(embeds, matches=matches)
    image, audio = connector.project(embeds["clip_image"], "clip"), connector.project(embeds["clap_audio"], "clap")
    logits = image @ audio.T / 0.2
    # Of an image, how much better than the mean image each sound matches it; of a sound likewise.
    there, back = ((matches / matches.mean(dim=dim, keepdim=True)) ** 3 for dim in (0, 1))
    expected = F.cross_entropy(logits, there / there.sum(dim=1, keepdim=True))
    expected = (expected + F.cross_entropy(logits.T, (back / back.sum(dim=0)).T)) / 2
    torch.testing.assert_close(output.loss, expected)
    assert output.loss_leaf == output.loss
    connector.config.target_lift = 0
    powers = matches**3
    expected = F.cross_entropy(logits, powers / powers.sum(dim=1, keepdim=True))
    expected = (expected + F.cross_entropy(logits.T, (powers / powers.sum(dim=0)).T)) / 2
    torch.testing.assert_close(connector(embeds, matches=matches).loss, expected)
    with pytest.raises(ValueError, match="without matches"):
        connector(embeds)


@pytest.mark.parametrize("training", [True, False])
def test_items_without_their_partners_or_matches_are_refused_in_either_mode(training):
    connector = distilling_connector().train(training)
    embeds = {"clip_image": torch.randn(5, 6), "clap_audio": torch.randn(7, 4)}
    with pytest.raises(
        ValueError, match=r"\['clip_image', 'clap_audio'\] and their matches, got \['clip_image'\] and"
    ):
        connector({"clip_image": embeds["clip_image"]}, matches=torch.rand(5, 7))
    for shape in ((7, 5), (5, 1), (5,)):
        with pytest.raises(ValueError, match=r"matches of the shape \(5, 7\), clip_image by clap_audio, got \("):
            connector(embeds, matches=torch.rand(shape))
    # Without a loss, any embeddings are projected.
    assert list(connector({"clap_text": torch.randn(2, 4)}, return_loss=False).embeds) == ["clap_text"]


def test_items_and_their_matches_are_mixed_alike():
    """With one-hot items of a bilinear match, what is mixed matches as the mixtures do."""
    connector = distilling_connector(noise_norm=0)
    table = torch.rand(6, 4)
    embeds = {"clip_image": torch.eye(6), "clap_audio": torch.eye(4)}
    mixed, matches = connector._mix(embeds, table, (0, 1))
    torch.testing.assert_close(matches, mixed["clip_image"] @ table @ mixed["clap_audio"].T)
    torch.testing.assert_close(mixed["clip_image"].sum(dim=1), torch.ones(6))
    assert (mixed["clip_image"] > 0.01).sum() > 6
    again, _ = connector._mix(embeds, table, (0, 1))
    other, _ = connector._mix(embeds, table, (0, 2))
    assert torch.equal(mixed["clip_image"], again["clip_image"])
    assert not torch.equal(mixed["clip_image"], other["clip_image"])


def test_items_are_mixed_in_training_alone_and_only_where_asked():
    embeds = {"clip_image": torch.randn(5, 6), "clap_audio": torch.randn(5, 4)}
    matches = torch.rand(5, 5)
    plain = distilling_connector(mix_items=False, noise_norm=0).train()
    assert plain(embeds, matches=matches).loss == plain(embeds, matches=matches).loss
    mixing = distilling_connector(noise_norm=0).train()
    assert mixing(embeds, matches=matches).loss != mixing(embeds, matches=matches).loss
    mixing.eval()
    assert mixing(embeds, matches=matches).loss == mixing(embeds, matches=matches).loss
