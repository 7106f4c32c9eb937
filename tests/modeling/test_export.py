"""`torch.compile` of the model and of its features. Export to ONNX: tests/conversion/test_export_onnx.py."""

import shutil

import pytest
import torch
from transformers import AutoModel

from cmcr_hf import CMCRModel, CMCRProcessor

IDS = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 4, 2]])


@pytest.fixture
def model(tiny_model):
    torch.compiler.reset()
    return CMCRModel.from_pretrained(tiny_model)


def inputs(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(rows, 3, 32, 32, generator=generator),
        "input_features": torch.randn(rows, 1, 126, 16, generator=generator),
        "input_ids": IDS[:rows],
    }


def assert_close(found, expected):
    for name in ("image_embeds", "text_embeds", "audio_embeds", "logits_per_image", "logits_per_audio_image", "loss"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_numbers_for_any_number_of_rows(model):
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for rows in (3, 2):
            assert_close(compiled(**inputs(rows)), model(**inputs(rows)))


@pytest.mark.cpu_alone
@pytest.mark.parametrize("modality", ["image", "text", "audio"])
def test_compiled_features_are_one_graph(model, modality):
    given = {"image": inputs()["pixel_values"], "text": IDS, "audio": inputs()["input_features"]}[modality]
    features = getattr(model, f"get_{modality}_features")
    compiled = torch.compile(features, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = features(given).pooler_output
        torch.testing.assert_close(compiled(given).pooler_output, expected, atol=1e-5, rtol=0)


def test_a_compiled_model_takes_a_subset_of_modalities(model):
    compiled = torch.compile(model, backend="aot_eager")
    given = {name: value for name, value in inputs().items() if name != "input_ids"}
    with torch.no_grad():
        output = compiled(**given)
        assert output.text_embeds is None
        expected = model(**given).logits_per_audio_image
        torch.testing.assert_close(output.logits_per_audio_image, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_compiled_fused_model_gives_the_same_numbers(tiny_clip, tiny_fused_clap):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = CMCRModel.from_sources_pretrained(tiny_clip, tiny_fused_clap, config={"projection_dim": 8})
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_fused_clap)
    generator = torch.Generator().manual_seed(0)
    compiled = torch.compile(model.get_audio_features, backend="aot_eager")
    for lengths in ([4000, 20000], [20000, 20000], [4000, 4000]):
        clips = [torch.randn(length, generator=generator) / 10 for length in lengths]
        features = processor(audio=clips, sampling_rate=8000)
        with torch.no_grad():
            expected = model.get_audio_features(**features).pooler_output
            torch.testing.assert_close(compiled(**features).pooler_output, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_gradients_of_a_compiled_model_reach_the_connector_alone(model):
    compiled = torch.compile(model.train(), backend="aot_eager")
    compiled(**inputs()).loss.backward()
    with_gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradients == {f"connector.{name}" for name, _ in model.connector.named_parameters()}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++: install g++")
def test_inductor_gives_the_same_numbers(tiny_model):
    torch.compiler.reset()
    model = AutoModel.from_pretrained(tiny_model)
    compiled = torch.compile(model)
    with torch.no_grad():
        assert_close(compiled(**inputs()), model(**inputs()))
