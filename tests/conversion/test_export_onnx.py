import sys

import numpy as np
import pytest
import torch

from cmcr_hf import CMCRModel, CMCRProcessor
from cmcr_hf.conversion import export_onnx as export

onnxruntime = pytest.importorskip("onnxruntime", reason='ONNX is tested with: pip install "cmcr-hf[onnx]"')
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def fused_model(tiny_clip, tiny_fused_clap, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "fused"
    torch.manual_seed(0)
    model = CMCRModel.from_sources_pretrained(tiny_clip, tiny_fused_clap, config={"projection_dim": 8})
    # Statistics of training: fresh ones would hide a BatchNorm in the wrong mode.
    for projector in model.connector.projectors.values():
        projector.layers[1].running_mean.normal_()
    model.save_pretrained(folder)
    CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_fused_clap).save_pretrained(folder)
    return folder


def run(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return names, session.run(["embeds"], {name: inputs[name].numpy() for name in names})[0]


def test_an_exported_image_tower_takes_any_number_of_images(tiny_model, tmp_path):
    path = tmp_path / "image.onnx"
    assert export.main([str(tiny_model), "--modality", "image", "--output", str(path)]) == 0
    model, processor = CMCRModel.from_pretrained(tiny_model), CMCRProcessor.from_pretrained(tiny_model)
    for rows in (1, 7):
        inputs = processor(images=list(np.random.default_rng(rows).integers(0, 256, (rows, 40, 50, 3), np.uint8)))
        names, embeds = run(path, inputs)
        assert names == ["pixel_values"]
        np.testing.assert_allclose(embeds, model.get_image_features(**inputs).pooler_output.detach(), atol=1e-5)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.parametrize("space", ["clip", "clap"])
def test_an_exported_text_tower_takes_texts_of_any_length(tiny_model, tmp_path, space):
    path = tmp_path / "text.onnx"
    model, processor = CMCRModel.from_pretrained(tiny_model), CMCRProcessor.from_pretrained(tiny_model)
    assert export.export_onnx(model, processor, "text", path, space) <= export.MAX_DIFFERENCE
    for texts in (["the sea"], ["a dog barks", "a", "a loud train barks and the small red bell rings"]):
        inputs = processor(text=texts, space=space)
        names, embeds = run(path, inputs)
        assert names == ["input_ids", "attention_mask"]
        expected = model.get_text_features(**inputs, space=space).pooler_output.detach()
        np.testing.assert_allclose(embeds, expected, atol=1e-5)


@pytest.mark.slow
def test_an_exported_audio_tower_has_no_input_that_it_does_not_use(tiny_model, tmp_path):
    path = tmp_path / "audio.onnx"
    model, processor = CMCRModel.from_pretrained(tiny_model), CMCRProcessor.from_pretrained(tiny_model)
    export.export_onnx(model, processor, "audio", path)
    inputs = processor(audio=list(np.random.default_rng(0).normal(0, 0.1, (5, 12000))), sampling_rate=8000)
    names, embeds = run(path, inputs)
    assert names == ["input_features"]
    np.testing.assert_allclose(embeds, model.get_audio_features(**inputs).pooler_output.detach(), atol=1e-5)


@pytest.mark.slow
def test_an_exported_fused_audio_tower_fuses_the_long_clips_alone(fused_model, tmp_path):
    path = tmp_path / "audio.onnx"
    model, processor = CMCRModel.from_pretrained(fused_model), CMCRProcessor.from_pretrained(fused_model)
    embedding = model.clap.audio_model.audio_encoder.patch_embed
    export.export_onnx(model, processor, "audio", path)
    assert model.clap.audio_model.audio_encoder.patch_embed is embedding
    noise = np.random.default_rng(0).normal(0, 0.1, 30000)
    for lengths in ([4000], [30000], [4000, 30000, 9000, 500], [20000, 20001, 20002]):
        inputs = processor(audio=[noise[:length] for length in lengths], sampling_rate=8000)
        names, embeds = run(path, inputs)
        assert names == ["input_features", "is_longer"]
        np.testing.assert_allclose(embeds, model.get_audio_features(**inputs).pooler_output.detach(), atol=1e-5)
    inputs["is_longer"][:] = False
    assert not np.allclose(run(path, inputs)[1], embeds, atol=1e-4)


@pytest.mark.slow
def test_a_file_that_differs_is_not_written(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_DIFFERENCE", -1.0)
    model, processor = CMCRModel.from_pretrained(tiny_model), CMCRProcessor.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match=r"embeddings differ by .* from torch's, expected at most -1\.0"):
        export.export_onnx(model, processor, "image", tmp_path / "image.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_of_the_output_is_named(tiny_model, tmp_path, capsys):
    command = [str(tiny_model), "--modality", "image", "--output", str(tmp_path / "absent" / "image.onnx")]
    assert export.main(command) == 1
    assert "There is no folder" in capsys.readouterr().err


def test_missing_tools_are_named_with_the_remedy(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    command = [str(tiny_model), "--modality", "image", "--output", str(tmp_path / "image.onnx")]
    assert export.main(command) == 1
    assert 'pip install "cmcr-hf[onnx]"' in capsys.readouterr().err
