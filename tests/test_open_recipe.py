"""The recipe on open Hub data, run on a local stand-in: folders of the data sets' names, columns and layouts."""

import io
from dataclasses import replace

import datasets
import numpy as np
import pytest
import soundfile
from PIL import Image

from cmcr_hf import CMCRModel
from cmcr_hf.connect import connect
from cmcr_hf.connection_card import _hub_data_set
from cmcr_hf.training.recipe import SourceSpec, load_recipe
from cmcr_hf.training.store import EmbeddingStore


def encoded_image(generator):
    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(buffer, format="JPEG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_stand_in(root):
    generator = np.random.default_rng(0)
    captions = root / "d0rj" / "audiocaps" / "data"
    captions.mkdir(parents=True)
    table = {
        "audiocap_id": [1, 2, 3],
        "youtube_id": ["a", "b", "c"],
        "caption": ["a dog barks", "the sea", "a bell rings"],
    }
    datasets.Dataset.from_dict(table).to_parquet(captions / "train-00000-of-00001.parquet")
    for part in ("0", "1"):
        folder = root / "common-canvas/commoncatalog-cc-by" / part / "least_dim_range=256-512/aspect_ratio_bucket=1-1"
        folder.mkdir(parents=True)
        rows = {
            "jpg": [encoded_image(generator) for _ in range(4)],
            "blip2_caption": [f"the small red dog {part}", "a bell", "the train", "a cat"],
            "photoid": [1, 2, 3, 4],
        }
        photographs = datasets.Dataset.from_dict(rows).cast_column("jpg", datasets.Image())
        photographs.to_parquet(folder / "part-00000.parquet")
    clips = root / "Fhrozen" / "FSD50k" / "clips" / "dev"
    clips.mkdir(parents=True)
    for name in range(5):
        soundfile.write(clips / f"{name}.wav", generator.uniform(-0.5, 0.5, 30_000), 44_100)


@pytest.fixture
def stand_in(tmp_path, tiny_clip, tiny_clap, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_stand_in(tmp_path / "hub")
    recipe = load_recipe("clip-clap-open")
    recipe.sources = {"clip": SourceSpec(str(tiny_clip)), "clap": SourceSpec(str(tiny_clap))}
    recipe.connector = {"projection_dim": 8}
    recipe.train = replace(recipe.train, epochs=1, batch_size=4, validation_rows=0)
    [audio] = recipe.audio
    recipe.audio = [replace(audio, folder=audio.folder.replace("hf://datasets", f"file://{tmp_path / 'hub'}"))]
    return recipe, tmp_path


def test_the_open_recipe_runs_on_data_of_its_layout(stand_in):
    recipe, folder = stand_in
    connect(recipe, folder / "run", folder / "hub")
    rows = {
        name: EmbeddingStore.open(folder / "run" / "stores" / name).rows
        for name in ("clip-text", "clip-image", "clap-audio")
    }
    assert rows == {"clip-text": 3 + 4, "clip-image": 4, "clap-audio": 5}
    keys = EmbeddingStore.open(folder / "run" / "stores" / "clip-text").keys()
    assert keys[0] == "d0rj/audiocaps/train/0/caption"
    assert CMCRModel.from_pretrained(folder / "run" / "model").config.projection_dim == 8


def test_captions_and_images_of_the_open_recipe_come_from_different_parts():
    recipe = load_recipe("clip-clap-open")
    captions = {spec.data_files for spec in recipe.text if spec.dataset == recipe.image[0].dataset}
    assert captions
    assert recipe.image[0].data_files not in captions


def test_data_sets_of_the_hub_are_told_from_folders_of_that_name(tmp_path):
    recipe = load_recipe("clip-clap-open")
    specs = [*recipe.text, *recipe.image, *recipe.audio]
    named = {"d0rj/audiocaps", "common-canvas/commoncatalog-cc-by", "Fhrozen/FSD50k"}
    assert {_hub_data_set(spec, tmp_path) for spec in specs} == named
    (tmp_path / "d0rj" / "audiocaps").mkdir(parents=True)
    assert {_hub_data_set(spec, tmp_path) for spec in specs} == {None, *named} - {"d0rj/audiocaps"}
