"""Real recordings, pictures and captions through the whole path. The sources are random: no quality is claimed."""

import csv
import json
import zipfile

import numpy as np
import pytest
import soundfile
import soxr
import torch
import yaml
from PIL import Image
from transformers import ClapFeatureExtractor

from cmcr_hf import CMCRModel, CMCRProcessor
from cmcr_hf.cli import main
from cmcr_hf.modeling.audio_loading_cmcr import load_audio
from cmcr_hf.modeling.feature_extraction_cmcr import extract_audio
from cmcr_hf.modeling.image_loading_cmcr import load_image
from cmcr_hf.training.store import EmbeddingStore

# ESC-10's folders, by the concept that shared/data/concepts.json gives to the same sounds.
CONCEPTS = {
    "dog_bark": "dog",
    "rooster": "rooster",
    "sea_waves": "sea",
    "helicopter": "helicopter",
    "clock_tick": "clock",
}


def unpack(shared, target, *, per_class):
    """Lay out real clips and pictures as folders by concept: `audio/dog/*.ogg`, `images/dog/*.jpg`."""
    counts: dict[str, int] = {}
    with zipfile.ZipFile(shared / "data" / "audio" / "esc10_ogg_folds1235.zip") as archive:
        for name in archive.namelist():
            concept = CONCEPTS.get(name.split("/")[0])
            if concept is None or not name.endswith(".ogg") or counts.get(concept, 0) == per_class:
                continue
            counts[concept] = counts.get(concept, 0) + 1
            path = target / "audio" / concept / name.split("/")[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))
    counts = {}
    with (
        zipfile.ZipFile(shared / "data" / "images" / "images_train.zip") as archive,
        (shared / "data" / "images" / "images_train.csv").open(newline="") as table,
    ):
        for row in csv.DictReader(table):
            concept = row["concept"]
            if concept not in CONCEPTS.values() or counts.get(concept, 0) == per_class:
                continue
            counts[concept] = counts.get(concept, 0) + 1
            path = target / "images" / concept / row["file"].replace("/", "_")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(row["file"]))
    return target


def test_the_official_triples_go_from_files_to_embeddings(shared, tiny_model):
    official = shared / "official"
    names = ["toilet", "BBQ", "train"]
    model, processor = CMCRModel.from_pretrained(tiny_model), CMCRProcessor.from_pretrained(tiny_model)
    images = [official / f"{name}.jpeg" for name in names]
    clips = [official / f"{name}.wav" for name in names]
    with torch.no_grad():
        output = model(**processor(text=["a dog", "the sea", "a train"], images=images, audio=clips))
        alone = model(**processor(audio=clips[1])).audio_embeds
    assert output.logits_per_audio_image.shape == (3, 3)
    for embeds in (output.image_embeds, output.audio_embeds):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))
        assert not torch.allclose(embeds[0], embeds[1], atol=1e-4)
    torch.testing.assert_close(output.audio_embeds[1:2], alone, atol=1e-6, rtol=0)


def test_ordinary_files_are_what_pillow_soundfile_and_soxr_make_of_them(shared, tmp_path):
    data = unpack(shared, tmp_path, per_class=3)
    pictures, clips = sorted(data.glob("images/*/*")), sorted(data.glob("audio/*/*"))
    assert len(pictures) == len(clips) == 15
    for path in pictures:
        with Image.open(path) as expected:
            assert np.array_equal(np.asarray(load_image(path)), np.asarray(expected.convert("RGB")))
    for path in clips:
        samples, rate = soundfile.read(path, dtype="float32")
        assert np.array_equal(load_audio(path, 8000), soxr.resample(samples, rate, 8000, quality="HQ"))


def test_a_recording_of_minutes_gives_what_its_whole_log_mel_gives(shared, tmp_path, tiny_fused_clap):
    clips = sorted(unpack(shared, tmp_path, per_class=5).glob("audio/*/*"))
    recording = np.concatenate([load_audio(path, 8000) for path in clips])
    assert len(recording) > 8000 * 100
    soundfile.write(tmp_path / "recording.flac", recording, 8000, subtype="PCM_24")
    extractor = ClapFeatureExtractor.from_pretrained(tiny_fused_clap)
    features = extract_audio(tmp_path / "recording.flac", extractor)["input_features"]
    whole = extractor(recording, sampling_rate=8000, max_length=len(recording), return_tensors="pt")["input_features"]
    shrunk = torch.nn.functional.interpolate(whole[:, :1], features.shape[1:], mode="bilinear", align_corners=False)
    # The file rounds to 24 bits.
    assert np.median(np.abs(features[0] - shrunk[0, 0].numpy())) < 1e-3
    size, rest = divmod(whole.shape[2] - features.shape[1] + 1, 3)
    middle = size + (rest > 0) + (size + (rest > 1) - 1) // 2
    chunk = whole[0, 0, middle : middle + features.shape[1]].numpy()
    assert np.median(np.abs(features[2] - chunk)) < 1e-3


def test_evaluate_measures_folders_of_real_files(shared, tiny_model, tmp_path, capsys):
    data = unpack(shared, tmp_path, per_class=3)
    sides = ["--images", str(data / "images"), "--audio", str(data / "audio"), "--output", str(tmp_path / "result")]
    assert main(["evaluate", "retrieval", "--model", str(tiny_model), *sides]) == 0
    assert "15 clips, 15 images, 5 classes" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "result" / "result.json").read_text())["metrics"]
    assert metrics["chance"]["audio_to_image"]["P@1"] == pytest.approx(0.2)
    assert 0 <= metrics["model"]["image_to_audio"]["mAP"] <= 1


def test_evaluate_pairs_the_official_triples_by_their_names(shared, tiny_model, tmp_path, capsys):
    official = str(shared / "official")
    arguments = [
        "evaluate",
        "retrieval",
        "--model",
        str(tiny_model),
        "--images",
        official,
        "--audio",
        official,
        "--label",
        "stem",
        "--output",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    assert "3 clips, 3 images, 3 classes" in capsys.readouterr().out


def real_recipe(shared, data, tiny_clip, tiny_clap, *, texts):
    return {
        "name": "real",
        "sources": {"clip": str(tiny_clip), "clap": str(tiny_clap)},
        "text": [
            {"table": str(shared / "data/text/audiocaps_train.csv"), "column": "caption", "limit": texts},
            {
                "table": str(shared / "data/text/clotho_train.csv"),
                "column": ["caption_1", "caption_2"],
                "limit": texts,
            },
            {"table": str(shared / "data/text/flickr8k_4500captions.json"), "limit": texts},
            {"table": str(shared / "data/text/audioset_labels.json"), "template": "the sound of {}"},
        ],
        "image": [{"folder": str(data / "images")}],
        "audio": [{"folder": str(data / "audio")}],
        "connector": {"objective": "c-mcr", "projection_dim": 16},
        "train": {"epochs": 2, "batch_size": 128, "validation_rows": 50},
        "evaluate": {
            "image": {"folder": str(data / "images"), "label": "parent"},
            "audio": {"folder": str(data / "audio"), "label": "parent"},
        },
    }


def test_a_recipe_of_real_captions_pictures_and_clips_ends_in_a_model(shared, tmp_path, tiny_clip, tiny_clap, capsys):
    data = unpack(shared, tmp_path / "data", per_class=2)
    recipe = tmp_path / "real.yaml"
    recipe.write_text(yaml.safe_dump(real_recipe(shared, data, tiny_clip, tiny_clap, texts=40)))
    assert main(["connect", str(recipe), "--output", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert "posterior matching" in capsys.readouterr().out
    model = CMCRModel.from_pretrained(tmp_path / "run" / "model")
    processor = CMCRProcessor.from_pretrained(tmp_path / "run" / "model")
    image = next((data / "images" / "sea").iterdir())
    assert model.get_image_features(**processor(images=image)).pooler_output.shape == (1, 16)


@pytest.mark.slow
def test_all_real_clips_and_pictures_connect(shared, tmp_path, tiny_clip, tiny_clap):
    data = unpack(shared, tmp_path / "data", per_class=32)
    for name in ("audio/esc10_ogg_folds1235.zip", "images/images_train.zip"):
        with zipfile.ZipFile(shared / "data" / name) as archive:
            archive.extractall(tmp_path / name.split("/")[0])
    recipe = real_recipe(shared, data, tiny_clip, tiny_clap, texts=2000)
    recipe["audio"] = [{"folder": str(tmp_path / "audio")}]
    table = str(shared / "data" / "images" / "images_train.csv")
    recipe["image"] = [{"table": table, "column": "file", "files": str(tmp_path / "images")}]
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["connect", str(tmp_path / "real.yaml"), "--output", str(tmp_path / "run"), "--device", "cpu"]) == 0
    stores = tmp_path / "run" / "stores"
    assert EmbeddingStore.open(stores / "clap-audio").rows == 320
    assert EmbeddingStore.open(stores / "clip-image").rows == 14_843
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]["C-MCR"]
