"""Pipelines of transformers and columns of `datasets`, straight on a saved folder."""

import logging

import datasets
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import pipeline
from transformers.utils import is_torchvision_available as has_torchvision

from cmcr_hf import CMCRModel, CMCRProcessor
from cmcr_hf.modeling.clap_extraction_cmcr import CMCRFeatureExtractor

LABELS = ["dog", "loud bell", "sea"]
RATE = 8000  # of the tiny source, whose window is one second


@pytest.fixture(scope="module", params=["unfused", "fused", "fused connector alone"])
def folder(request, tiny_model, tiny_clip, tiny_fused_clap, tmp_path_factory):
    if request.param == "unfused":
        return tiny_model
    folder = tmp_path_factory.mktemp("models") / "fused"
    torch.manual_seed(0)
    model = CMCRModel.from_sources_pretrained(tiny_clip, tiny_fused_clap, config={"projection_dim": 8})
    (model if request.param == "fused" else model.connector).save_pretrained(folder)
    CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_fused_clap).save_pretrained(folder)
    return folder


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8))


def noise(samples, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def image_pipeline(folder):
    # By itself the pipeline takes the backend of torchvision where that is installed, which resizes otherwise.
    given = {"image_processor": CMCRProcessor.from_pretrained(folder).image_processor} if has_torchvision() else {}
    return pipeline("zero-shot-image-classification", model=str(folder), **given)


def scores(rows):
    return [row["score"] for row in sorted(rows, key=lambda row: LABELS.index(row["label"]))]


# Pipelines


def test_the_image_pipeline_gives_the_scores_of_the_model(folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    classify = image_pipeline(folder)
    assert not [record for record in caplog.records if "not supported" in record.message]
    picture().save(tmp_path / "picture.png")
    model, processor = CMCRModel.from_pretrained(folder), CMCRProcessor.from_pretrained(folder)
    inputs = processor(images=picture(), text=[f"a {label}" for label in LABELS])
    expected = model(**inputs).logits_per_image.softmax(dim=-1)[0].tolist()
    for image in (picture(), str(tmp_path / "picture.png")):
        rows = classify(image, candidate_labels=LABELS, hypothesis_template="a {}")
        assert scores(rows) == pytest.approx(expected, abs=1e-6)
        assert rows[0]["label"] == LABELS[expected.index(max(expected))]


@pytest.mark.parametrize("samples", [3000, RATE, 20000], ids=["short", "one window", "long"])
def test_the_audio_pipeline_gives_the_scores_of_the_model(folder, samples):
    classify = pipeline("zero-shot-audio-classification", model=str(folder))
    model, processor = CMCRModel.from_pretrained(folder), CMCRProcessor.from_pretrained(folder)
    inputs = processor(audio=noise(samples), sampling_rate=RATE, text=[f"a {label}" for label in LABELS])
    expected = model(**inputs).logits_per_audio.softmax(dim=-1)[0].tolist()
    # A random crop would not come out the same twice.
    for _ in range(2):
        rows = classify(noise(samples), candidate_labels=LABELS, hypothesis_template="a {}")
        assert scores(rows) == pytest.approx(expected, abs=1e-6)


def test_the_pipelines_take_lists(folder):
    images = image_pipeline(folder)
    audio = pipeline("zero-shot-audio-classification", model=str(folder))
    pictures, clips = [picture(0), picture(1)], [noise(5000, 0), noise(12000, 1)]
    for classify, items in ((images, pictures), (audio, clips)):
        together = classify(items, candidate_labels=LABELS)
        assert [scores(rows) for rows in together] == [
            pytest.approx(scores(classify(item, candidate_labels=LABELS)), abs=1e-6) for item in items
        ]


# The extractor that the audio pipeline calls


def test_the_extractor_alone_gives_the_features_of_the_processor(folder):
    processor = CMCRProcessor.from_pretrained(folder)
    clips = [noise(3000, 0), noise(RATE, 1), noise(30000, 2)]
    expected = processor(audio=clips, sampling_rate=RATE)
    for given in (clips, [clip.tolist() for clip in clips], [clip.astype(np.float64) for clip in clips]):
        found = processor.feature_extractor(given, sampling_rate=RATE, return_tensors="pt")
        assert torch.equal(found["input_features"], expected["input_features"])
        assert torch.equal(found["is_longer"], expected["is_longer"])
    one = processor.feature_extractor(clips[2], return_tensors="np")
    assert np.array_equal(one["input_features"][0], expected["input_features"][2])
    rows = processor.feature_extractor(np.stack([clips[0], clips[0]]), return_tensors="pt", padding=True)
    assert torch.equal(rows["input_features"], expected["input_features"][[0, 0]])


def test_the_extractor_alone_resamples(folder):
    processor = CMCRProcessor.from_pretrained(folder)
    expected = processor(audio=noise(20000), sampling_rate=16000)["input_features"]
    found = processor.feature_extractor(noise(20000), sampling_rate=16000, return_tensors="pt")["input_features"]
    assert torch.equal(found, expected)


def test_a_saved_extractor_comes_back(folder):
    extractor = CMCRProcessor.from_pretrained(folder).feature_extractor
    assert type(extractor) is CMCRFeatureExtractor
    assert extractor.truncation == ("fusion" if "fused" in str(folder) else "rand_trunc")
    assert extractor.sampling_rate == RATE


# datasets


@pytest.fixture
def files(tmp_path):
    for row in range(3):
        picture(row).save(tmp_path / f"{row}.png")
        soundfile.write(tmp_path / f"{row}.wav", noise(4000 + 6000 * row, row), RATE, subtype="FLOAT")
    return tmp_path


@pytest.fixture
def rows(files):
    columns = {
        "image": [str(files / f"{row}.png") for row in range(3)],
        "audio": [str(files / f"{row}.wav") for row in range(3)],
    }
    table = datasets.Dataset.from_dict(columns)
    return table.cast_column("image", datasets.Image()).cast_column("audio", datasets.Audio(decode=False))


@pytest.fixture
def expected(tiny_model):
    processor = CMCRProcessor.from_pretrained(tiny_model)
    clips = [noise(4000 + 6000 * row, row) for row in range(3)]
    return processor(images=[picture(row) for row in range(3)], audio=clips, sampling_rate=RATE)


def assert_equal_inputs(found, expected):
    assert torch.equal(torch.as_tensor(found["pixel_values"]), expected["pixel_values"])
    assert torch.equal(torch.as_tensor(found["input_features"]), expected["input_features"])


def test_columns_of_images_and_audio_go_straight_in(rows, expected, tiny_model):
    processor = CMCRProcessor.from_pretrained(tiny_model)
    assert_equal_inputs(processor(images=rows["image"], audio=rows["audio"]), expected)
    assert_equal_inputs(processor(images=rows[:]["image"], audio=rows[:]["audio"]), expected)
    one = processor(images=rows[1]["image"], audio=rows[1]["audio"])
    assert torch.equal(one["input_features"][0], expected["input_features"][1])


def test_columns_that_hold_the_files_go_straight_in(files, expected, tiny_model):
    columns = {
        kind: [{"bytes": (files / f"{row}.{suffix}").read_bytes(), "path": None} for row in range(3)]
        for kind, suffix in (("image", "png"), ("audio", "wav"))
    }
    table = datasets.Dataset.from_dict(columns)
    table = table.cast_column("image", datasets.Image(decode=False))
    table = table.cast_column("audio", datasets.Audio(decode=False))
    assert table[0]["audio"]["path"] is None
    processor = CMCRProcessor.from_pretrained(tiny_model)
    assert_equal_inputs(processor(images=table["image"], audio=table["audio"]), expected)


class Decoder:
    """What `datasets` gives for an Audio column, torchcodec's decoder, by the method and attributes that are used."""

    def __init__(self, samples):
        self.samples = samples

    def get_all_samples(self):
        return type("AudioSamples", (), {"data": torch.from_numpy(self.samples)[None], "sample_rate": RATE})


def test_decoded_audio_goes_straight_in(expected, tiny_model):
    processor = CMCRProcessor.from_pretrained(tiny_model)
    clips = [noise(4000 + 6000 * row, row) for row in range(3)]
    for decoded in ([Decoder(clip) for clip in clips], [{"array": clip, "sampling_rate": RATE} for clip in clips]):
        assert torch.equal(processor(audio=decoded)["input_features"], expected["input_features"])


def test_a_batched_map_prepares_a_data_set(rows, expected, tiny_model):
    processor = CMCRProcessor.from_pretrained(tiny_model)

    def prepare(batch):
        return processor(images=batch["image"], audio=batch["audio"])

    mapped = rows.map(prepare, batched=True, batch_size=2, remove_columns=rows.column_names).with_format("torch")
    assert_equal_inputs(mapped[:], expected)
    output = CMCRModel.from_pretrained(tiny_model)(**mapped[:])
    assert output.logits_per_audio_image.shape == (3, 3)
