"""A CMCRModel with a ULIP source: point clouds, the towers that a ULIP may lack, and a processor without audio."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from cmcr_hf import CMCRConfig, CMCRConnector, CMCRModel, CMCRProcessor, UlipConfig, UlipModel
from cmcr_hf.conversion.convert_cmcr import read_connector
from cmcr_hf.conversion.convert_openshape import read_record

TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37}
IDS = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])


@pytest.fixture(scope="module")
def model(tiny_ulip_model):
    return CMCRModel.from_pretrained(tiny_ulip_model)


@pytest.fixture(scope="module")
def processor(tiny_ulip_model):
    return CMCRProcessor.from_pretrained(tiny_ulip_model)


@pytest.fixture(scope="module")
def clouds():
    generator = np.random.default_rng(0)
    return [generator.normal(size=(points, 3)).astype(np.float32) for points in (60, 40)]


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)


def test_clip_and_ulip_are_connected_through_images(model):
    assert model.config.bridges == [["clip", "ulip", "image"]]
    assert model.config.default_spaces == {"text": "clip", "image": "clip", "point_cloud": "ulip"}
    assert model.config.embedded_modalities == ["image", "text", "point_cloud"]


def test_a_cloud_embedding_is_the_projected_embedding_of_the_source(model, processor, clouds):
    inputs = processor(point_clouds=clouds)
    with torch.no_grad():
        embeds = model.get_point_cloud_features(**inputs).pooler_output
        source = model.ulip.get_point_cloud_features(**inputs).pooler_output
        expected = model.connector.project(source, "ulip")
    assert torch.equal(embeds, expected)
    assert torch.allclose(embeds.norm(dim=1), torch.ones(2), atol=1e-6)


def test_a_cloud_is_embedded_alike_alone_and_in_a_padded_batch(model, processor, clouds):
    with torch.no_grad():
        both = model.get_point_cloud_features(**processor(point_clouds=clouds)).pooler_output
        alone = model.get_point_cloud_features(**processor(point_clouds=clouds[1])).pooler_output
    assert torch.allclose(both[1:], alone, atol=1e-6)


def test_images_of_the_ulip_space_go_through_its_own_processor_and_tower(model, processor, picture):
    own, clip = processor(images=picture, space="ulip"), processor(images=picture)
    assert not torch.equal(own["pixel_values"], clip["pixel_values"])
    with torch.no_grad():
        embeds = model.get_image_features(**own, space="ulip").pooler_output
        expected = model.connector.project(model.ulip.get_image_features(**own).pooler_output, "ulip")
    assert torch.equal(embeds, expected)


def test_forward_compares_clouds_with_texts_and_images(model, processor, clouds, picture):
    inputs = processor(text=["a dog", "the sea"], images=[picture] * 2, point_clouds=clouds)
    with torch.no_grad():
        output = model(**inputs)
    scale = model.connector.logit_scale.exp()
    assert torch.allclose(output.logits_per_point_cloud, scale * output.point_cloud_embeds @ output.text_embeds.T)
    assert torch.allclose(
        output.logits_per_point_cloud_image, scale * output.point_cloud_embeds @ output.image_embeds.T
    )
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    assert output.loss.isfinite()


def test_without_images_the_text_logits_are_those_of_the_clouds(model, processor, clouds):
    with torch.no_grad():
        output = model(**processor(text=["a dog", "the sea"], point_clouds=clouds))
    assert torch.equal(output.logits_per_text, output.logits_per_point_cloud.T)


def test_a_ulip_without_a_text_tower_embeds_no_text(model, processor):
    with pytest.raises(ValueError, match=r"one of \['clip'\], got 'ulip'"):
        model.get_text_features(IDS, space="ulip")
    with pytest.raises(ValueError, match=r"one of \['clip'\], got space='ulip'"):
        processor(text="a dog", space="ulip")


def test_a_ulip_with_a_text_tower_embeds_text(tiny_clip, tiny_text_ulip):
    model = CMCRModel.from_sources_pretrained(tiny_clip, ulip=tiny_text_ulip, config={"projection_dim": 8})
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, ulip=tiny_text_ulip)
    inputs = processor(text=["a dog", "the small sea"], space="ulip")
    with torch.no_grad():
        embeds = model.get_text_features(**inputs, space="ulip").pooler_output
        expected = model.connector.project(model.ulip.get_text_features(**inputs).pooler_output, "ulip")
    assert torch.equal(embeds, expected)


def test_full_and_connector_only_round_trips_give_the_same_clouds(model, processor, clouds, tmp_path):
    inputs = processor(point_clouds=clouds)
    with torch.no_grad():
        expected = model.get_point_cloud_features(**inputs).pooler_output
    model.save_pretrained(tmp_path / "full")
    model.connector.save_pretrained(tmp_path / "connector")
    for folder in ("full", "connector"):
        loaded = CMCRModel.from_pretrained(tmp_path / folder)
        with torch.no_grad():
            assert torch.equal(loaded.get_point_cloud_features(**inputs).pooler_output, expected)
    assert CMCRConnector.from_pretrained(tmp_path / "full").config.spaces == ["clip", "ulip"]


def test_only_the_point_encoder_is_built_when_it_alone_is_asked_for(tiny_ulip_model, processor, clouds):
    partial = CMCRModel.from_pretrained(tiny_ulip_model, modalities=["point_cloud"])
    assert not hasattr(partial, "clip")
    assert not hasattr(partial.ulip, "vision_model") and not hasattr(partial.ulip, "vision_projection")
    whole = CMCRModel.from_pretrained(tiny_ulip_model)
    inputs = processor(point_clouds=clouds)
    with torch.no_grad():
        expected = whole.get_point_cloud_features(**inputs).pooler_output
        assert torch.equal(partial.get_point_cloud_features(**inputs).pooler_output, expected)


def test_another_point_encoder_than_the_recorded_one_is_refused(model, tiny_clip, tiny_ulip, tmp_path):
    model.connector.save_pretrained(tmp_path / "connector")
    other = UlipModel.from_pretrained(tiny_ulip)
    with torch.no_grad():
        other.point_projection.weight.neg_()
    other.save_pretrained(tmp_path / "ulip")
    (tmp_path / "ulip/preprocessor_config.json").write_bytes((tiny_ulip / "preprocessor_config.json").read_bytes())
    with pytest.raises(
        ValueError, match=r"is not the ulip source .* its point_cloud embeddings .* cosine of -1\.0000"
    ):
        CMCRModel.from_sources_pretrained(tiny_clip, ulip=tmp_path / "ulip", connector=tmp_path / "connector")


def test_a_full_checkpoint_without_the_point_encoder_is_refused(tiny_ulip_model, tmp_path):
    for path in tiny_ulip_model.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tiny_ulip_model / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("ulip.point_model.layers.1.")}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \d+ of the weights of a CMCRModel, e.g. 'ulip.point_model"):
        CMCRModel.from_pretrained(tmp_path)


def test_a_processor_without_audio_survives_saving_and_loading(processor, picture, clouds, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = CMCRProcessor.from_pretrained(tmp_path)
    assert loaded.feature_extractor is None and loaded.clap_tokenizer is None and loaded.ulip_tokenizer is None
    items = {"text": ["a dog"], "images": [picture], "point_clouds": clouds}
    for space in (None, "ulip"):
        given = {name: value for name, value in items.items() if space is None or name != "text"}
        before, after = processor(**given, space=space), loaded(**given, space=space)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []


def test_a_processor_of_all_three_spaces_survives_saving_and_loading(tiny_clip, tiny_clap, tiny_text_ulip, tmp_path):
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap, ulip=tiny_text_ulip)
    processor.save_pretrained(tmp_path)
    loaded = CMCRProcessor.from_pretrained(tmp_path)
    for space in ("clip", "clap", "ulip"):
        before, after = processor(text="a small dog", space=space), loaded(text="a small dog", space=space)
        assert torch.equal(before["input_ids"], after["input_ids"])
    waveform = np.zeros(800, np.float32)
    for items in ({"audio": waveform, "sampling_rate": 8000}, {"images": np.zeros((9, 9, 3), np.uint8)}):
        before, after = processor(**items), loaded(**items)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["clap_tokenizer", "ulip_tokenizer"]


def test_all_three_spaces_make_one_model(tiny_clip, tiny_clap, tiny_ulip):
    model = CMCRModel.from_sources_pretrained(tiny_clip, tiny_clap, ulip=tiny_ulip, config={"projection_dim": 8})
    assert model.config.bridges == [["clip", "clap", "text"], ["clip", "ulip", "image"]]
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap, ulip=tiny_ulip)
    cloud = np.random.default_rng(0).normal(size=(50, 3))
    with torch.no_grad():
        output = model(**processor(audio=np.ones(900, np.float32), sampling_rate=8000, point_clouds=cloud))
    assert output.audio_embeds.shape == output.point_cloud_embeds.shape == (1, 8)


def test_audio_without_a_source_for_it_is_refused(processor):
    with pytest.raises(ValueError, match=r"Expected a space that embeds audio, one of \[\]"):
        processor(audio=np.zeros(8), sampling_rate=8000)


def test_point_cloud_options_survive_saving_and_loading(tiny_clip, tiny_ulip, tmp_path):
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, ulip=tiny_ulip)
    processor.normalize_point_clouds, processor.max_points = True, 30
    processor.save_pretrained(tmp_path)
    loaded = CMCRProcessor.from_pretrained(tmp_path)
    cloud = 5 + np.random.default_rng(0).normal(size=(50, 3))
    inputs = loaded(point_clouds=cloud)
    assert inputs["num_points"].tolist() == [30]
    assert inputs["point_clouds"].norm(dim=-1).max() == pytest.approx(1, abs=1e-6)


def test_a_cloud_smaller_than_a_group_is_named(processor, tmp_path):
    np.save(tmp_path / "small.npy", np.zeros((7, 3)))
    with pytest.raises(ValueError, match=r"small\.npy' with at least 8 points, as many as a group .* got 7"):
        processor(point_clouds=[np.zeros((8, 3)), tmp_path / "small.npy"])


def test_the_options_of_a_processor_do_not_change_what_a_source_is_known_by(model, tiny_clip, tiny_ulip, tmp_path):
    model.connector.save_pretrained(tmp_path)
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, ulip=tiny_ulip)
    processor.normalize_point_clouds, processor.max_points = True, 100
    again = CMCRModel.from_sources_pretrained(tiny_clip, ulip=tiny_ulip, connector=tmp_path, processor=processor)
    assert again.config.fingerprints == model.config.fingerprints


def test_a_source_in_another_role_is_refused(tiny_clip, tiny_ulip):
    with pytest.raises(ValueError, match="The clip source is a UlipModel, which cannot embed image and text"):
        CMCRModel.from_sources_pretrained(tiny_ulip, ulip=tiny_ulip)
    with pytest.raises(ValueError, match="The ulip source is a CLIPModel, which cannot embed point_cloud"):
        CMCRModel.from_sources_pretrained(tiny_clip, ulip=tiny_clip)
    with pytest.raises(ValueError, match="Expected a UlipModel as ulip=, got a clip in"):
        CMCRProcessor.from_sources_pretrained(tiny_clip, ulip=tiny_clip)
    with pytest.raises(ValueError, match="Expected an image-text model as clip=, got a ulip in"):
        CMCRProcessor.from_sources_pretrained(tiny_ulip, ulip=tiny_ulip)


def test_colours_are_asked_for_where_the_source_takes_them(tiny_clip, tiny_ulip, tmp_path):
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, ulip=tiny_ulip)
    processor.point_channels = 6
    with pytest.raises(ValueError, match="colour"):
        processor(point_clouds=np.zeros((50, 3)))


def test_a_list_of_coordinates_is_no_list_of_clouds(processor):
    with pytest.raises(ValueError, match=r"Pass np.asarray\(points\)"):
        processor(point_clouds=[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])


def test_clouds_of_a_three_dimensional_array_are_a_batch(processor):
    batch = np.random.default_rng(0).normal(size=(3, 20, 3)).astype(np.float32)
    assert torch.equal(processor(point_clouds=batch)["point_clouds"], torch.from_numpy(batch))


def test_training_leaves_the_frozen_point_encoder_as_it_is(tiny_ulip_model, processor, clouds):
    model = CMCRModel.from_pretrained(tiny_ulip_model).train()
    before = {name: tensor.clone() for name, tensor in model.ulip.state_dict().items()}
    inputs = processor(text=["a dog", "the sea"], point_clouds=clouds)
    optimizer = torch.optim.SGD([part for part in model.parameters() if part.requires_grad], lr=0.1)
    model(**inputs).loss.backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.ulip.state_dict().items())
    assert model.connector.projectors["ulip"].layers[0].weight.grad.abs().max() > 0


def test_the_towers_of_a_ulip_decide_on_its_modalities():
    def config(**towers):
        return CMCRConfig(ulip_config=UlipConfig(projection_dim=8, **towers), projectors={"ulip": {}})

    assert config().modalities_of("ulip") == ("point_cloud",)
    assert config(vision_config={}).modalities_of("ulip") == ("point_cloud", "image")
    assert config(vision_config={}, text_config={}).modalities_of("ulip") == ("point_cloud", "image", "text")
    assert CMCRConfig(projectors={"ulip": {"input_dim": 8}}).modalities_of("ulip") == ("point_cloud", "image", "text")


def test_the_released_connector_runs_on_the_released_clouds(shared):
    # The point encoder has the released size and random weights, which are not at hand: its cosines mean nothing.
    torch.manual_seed(0)
    ulip = UlipModel(UlipConfig()).eval()
    clip = CLIPModel(CLIPConfig(text_config=TOWER, vision_config=TOWER, projection_dim=512)).eval()
    connector, _ = read_connector(shared / "official/ulip_clip.pt")
    model = CMCRModel.from_sources_pretrained(clip, ulip=ulip, connector=connector)
    clouds = [read_record(shared / "official" / f"{name}.npy") for name in ("toilet", "BBQ", "train")]
    inputs = CMCRProcessor(point_channels=3)(point_clouds=clouds)
    assert inputs["point_clouds"].shape == (3, 10_000, 3)
    with torch.no_grad():
        embeds = model.get_point_cloud_features(**inputs).pooler_output
        again = model.get_point_cloud_features(**inputs).pooler_output
        rows = ulip.get_point_cloud_features(**inputs).pooler_output
        head = torch.load(shared / "official/ulip_clip.pt", weights_only=True)
        # Head_B by hand: Linear, BatchNorm, ReLU between two normalisations.
        hidden = F.linear(F.normalize(rows), head["Head_B.net.0.weight"], head["Head_B.net.0.bias"])
        mean, variance = head["Head_B.net.1.running_mean"], head["Head_B.net.1.running_var"]
        hidden = (hidden - mean) / (variance + 1e-5).sqrt() * head["Head_B.net.1.weight"] + head["Head_B.net.1.bias"]
    assert torch.equal(embeds, again)
    assert torch.allclose(embeds, F.normalize(hidden.relu()), atol=1e-5)
