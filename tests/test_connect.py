import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from cmcr_hf import connect as walk
from cmcr_hf import output
from cmcr_hf.connect import connect
from cmcr_hf.conversion.push_store import push_store
from cmcr_hf.durable import locked
from cmcr_hf.evaluation.bootstrap import bootstrap_means
from cmcr_hf.evaluation.connection import baseline_values, connector_metrics
from cmcr_hf.evaluation.retrieval import label_values
from cmcr_hf.modeling.modeling_cmcr import CMCRConnector, CMCRModel
from cmcr_hf.modeling.processing_cmcr import CMCRProcessor
from cmcr_hf.output import write_json
from cmcr_hf.training import aggregate_stores
from cmcr_hf.training import embed as embedding
from cmcr_hf.training.recipe import DataSpec, EvaluateSpec, Recipe, SourceSpec, TrainSpec, load_recipe
from cmcr_hf.training.store import EmbeddingStore

pytestmark = pytest.mark.usefixtures("quick_linear_map")

KINDS = ("dog", "cat", "bell")


def write_data(root):
    """Random pictures, sounds and sentences of three classes: enough to walk a recipe, nothing to be learnt."""
    generator = np.random.default_rng(0)
    for split, count in (("", 3), ("test_", 2)):
        for kind in KINDS:
            images, sounds = root / f"{split}images" / kind, root / f"{split}sounds" / kind
            images.mkdir(parents=True)
            sounds.mkdir(parents=True)
            for row in range(count):
                pixels = generator.integers(0, 256, (9, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / f"{row}.png")
                soundfile.write(sounds / f"{row}.wav", generator.uniform(-0.5, 0.5, 2000), 8000)
    rows = [f"the {size} {kind} {verb}" for kind in KINDS for size in ("small", "red") for verb in ("barks", "rings")]
    (root / "texts.csv").write_text("text\n" + "\n".join(rows) + "\n")
    (root / "names.csv").write_text("text\n" + "\n".join(f"the sound of a {kind}" for kind in KINDS) + "\n")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def recipe(tiny_clip, tiny_clap):
    return Recipe(
        name="tiny",
        sources={"clip": SourceSpec(str(tiny_clip)), "clap": SourceSpec(str(tiny_clap))},
        text=[DataSpec(table="texts.csv", column="text")],
        image=[DataSpec(folder="images")],
        audio=[DataSpec(folder="sounds")],
        connector={"objective": "c-mcr", "projection_dim": 8},
        train=TrainSpec(epochs=3, batch_size=4),
        evaluate=EvaluateSpec(
            image=DataSpec(folder="test_images", label="parent"),
            audio=DataSpec(folder="test_sounds", label="parent"),
            names=DataSpec(table="names.csv", column="text"),
        ),
    )


@pytest.fixture(scope="module")
def finished(recipe, data, tmp_path_factory):
    """The whole walk, uninterrupted."""
    return connect(recipe, tmp_path_factory.mktemp("runs") / "whole", data)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished folder to change."""
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def fails(*arguments, **options):
    raise AssertionError("This stage is done and should not be entered again.")


def raises_once(monkeypatch, owner, name, call=0):
    """Stop the run, as a user would, in place of the `call`th call."""
    original, calls = getattr(owner, name), []

    def stopping(*arguments, **options):
        calls.append(name)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, stopping)


def test_both_folders_have_a_card_with_the_data_and_the_results(finished):
    for name in ("model", "connector"):
        card = (finished.folder / name / "README.md").read_text()
        assert "| texts.csv | the texts that connect | 12 | not stated |" in card
        assert "| epochs | 3 |" in card
        value = finished.table["C-MCR"]["audio_to_image"]["mAP"]
        assert f"{value:.3f}" in next(line for line in card.splitlines() if line.startswith("| C-MCR |"))


def test_the_walk_leaves_stores_pseudo_pairs_a_connector_a_model_and_the_metrics(finished):
    folder = finished.folder
    stores = {path.name: EmbeddingStore.open(path) for path in (folder / "stores").iterdir()}
    assert {name: (store.rows, store.dim) for name, store in stores.items()} == {
        "clip-text": (12, 24),
        "clap-text": (12, 16),
        "clip-image": (9, 24),
        "clap-audio": (9, 16),
        "evaluate-clip-image": (6, 24),
        "evaluate-clap-audio": (6, 16),
        "evaluate-clip-names": (3, 24),
        "evaluate-clap-names": (3, 16),
    }
    assert stores["clip-text"].keys() == stores["clap-text"].keys()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [".lock"]
    saved = json.loads((folder / "evaluation.json").read_text())
    assert saved == {"recipe": "tiny", "metrics": finished.table}


def test_pseudo_embeddings_are_the_soft_retrieval_of_equation_1(finished):
    embeds = finished.training_embeds("clap")["text"]
    memory = EmbeddingStore.open(finished.folder / "stores" / "clap-audio").tensor().double()
    texts = embeds["clap_text"].double()
    expected = torch.softmax(texts @ memory.T / 0.01, dim=1) @ memory
    expected = expected / expected.norm(dim=1, keepdim=True)
    assert list(embeds) == ["clip_text", "clap_text", "clip_image", "clap_audio"]
    torch.testing.assert_close(embeds["clap_audio"].double(), expected, atol=1e-5, rtol=0)


def test_the_table_measures_the_connector_that_was_saved(finished):
    connector = CMCRConnector.from_pretrained(finished.folder / "connector")
    assert finished.table["C-MCR"] == connector_metrics(connector, finished.sets)
    assert {"chance", "C-MCR"} < set(finished.table)
    assert finished.sets[0].query.labels == [kind for kind in sorted(KINDS) for _ in range(2)]


def test_the_weights_of_a_run_can_be_read_by_whom_its_configurations_can(finished):
    modes = {path.stat().st_mode for path in finished.folder.rglob("*") if path.is_file()}
    assert modes == {(finished.folder / "model" / "config.json").stat().st_mode}


def test_the_page_says_which_method_ranks_better_by_the_test_of_an_evaluation(finished):
    side = finished.sets[0].query
    projected = [
        finished.model.connector.project(part.embeds, part.space, part.modality)
        for part in (side, finished.sets[0].gallery)
    ]
    own = label_values((projected[0] @ projected[1].T).detach(), side.labels, finished.sets[0].gallery.labels, (1,))
    bridge = baseline_values(finished.sets)["one-way bridge"]["audio_to_image"]["mAP"]
    expected = bootstrap_means({"mAP": bridge - own["mAP"]})["mAP"]
    assert finished.differences["audio_to_image"]["one-way bridge"] == pytest.approx(expected)
    page = " ".join((finished.folder / "report.html").read_text().split()).replace("\N{MINUS SIGN}", "-")
    leads = re.findall(r"'s lead: ([-\d.]+) to ([-\d.]+), a 95 % interval", page)
    orders = re.findall(r"<strong>(above|below|level with)</strong> the best training-free", page)
    assert len(leads) == len(orders) == 2
    for (low, high), order in zip(leads, orders, strict=True):
        assert order == ("above" if high.startswith("-") else "level with" if low.startswith("-") else "below")


def test_model_and_connector_folders_load_and_embed_alike(finished, data):
    folder = finished.folder
    model = CMCRModel.from_pretrained(folder / "model")
    from_connector = CMCRModel.from_pretrained(folder / "connector")
    processor = CMCRProcessor.from_pretrained(folder / "model")
    inputs = processor(
        text=["the small dog barks"],
        images=[data / "images" / "dog" / "0.png"],
        audio=[data / "sounds" / "dog" / "0.wav"],
    )
    with torch.inference_mode():
        expected = finished.model(**inputs)
        for loaded in (model, from_connector):
            outputs = loaded(**inputs)
            for name in ("text_embeds", "image_embeds", "audio_embeds"):
                # Equal weights at other addresses in memory round differently.
                torch.testing.assert_close(outputs[name], expected[name], atol=1e-6, rtol=0)
    connector = CMCRConnector.from_pretrained(folder / "connector")
    audio = EmbeddingStore.open(folder / "stores" / "evaluate-clap-audio").tensor()
    assert equal(connector.state_dict(), finished.model.connector.state_dict())
    assert connector.project(audio, "clap").shape == (6, 8)


def test_a_second_run_does_nothing_again(recipe, data, finished, copy, monkeypatch):
    for owner, name in ((embedding, "encode_features"), (aggregate_stores, "aggregate"), (walk, "train_connector")):
        monkeypatch.setattr(owner, name, fails)
    monkeypatch.setattr(CMCRModel, "save_pretrained", fails)
    before, lines = content(copy), []
    again = connect(recipe, copy, data, report=lines.append)
    assert content(copy) == before
    assert again.table == finished.table
    assert sum("kept, in" in line for line in lines) == 2


def test_without_an_evaluate_section_there_is_no_table(recipe, data, copy):
    connection = connect(replace(recipe, evaluate=None), copy, data)
    assert connection.table is None
    assert connection.sets == []


# What is stopped, and in place of which of its calls.
STOPS = {
    "first text store": (embedding, "encode_features", 0),
    "audio store": (embedding, "encode_features", 3),
    "second aggregation": (aggregate_stores, "aggregate", 1),
    "before the training": (walk, "train_connector", 0),
    "training": (CMCRConnector, "forward", 4),
    "log of the training": (walk, "write_json", 1),
    "end of the training": (walk, "write_json", 2),
    "connector folder": (CMCRProcessor, "save_pretrained", 0),
    "model folder": (CMCRProcessor, "save_pretrained", 1),
    "evaluation store": (embedding, "encode_features", 5),
    "evaluation": (walk, "baseline_values", 0),
    "record of the saved folders": (output, "write_json", 1),
    "evaluation file": (walk, "write_json", 3),
    "page": (walk, "write_report", 0),
    "second card": (output, "_write_text", 7),
    "record of the cards": (output, "write_json", 2),
}


@pytest.mark.parametrize("place", STOPS)
def test_a_run_stopped_in_any_stage_ends_with_the_same_weights(recipe, data, finished, tmp_path, monkeypatch, place):
    with monkeypatch.context() as patch:
        raises_once(patch, *STOPS[place])
        with pytest.raises(KeyboardInterrupt):
            connect(recipe, tmp_path / "run", data)
    again = connect(recipe, tmp_path / "run", data)
    assert equal(weights(tmp_path / "run"), weights(finished.folder))
    assert again.table == finished.table


def test_a_stopped_training_goes_on_behind_its_last_checkpoint(recipe, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        raises_once(patch, CMCRConnector, "forward", 7)
        with pytest.raises(KeyboardInterrupt):
            connect(recipe, tmp_path / "run", data)
    steps, forward = [], CMCRConnector.forward
    monkeypatch.setattr(CMCRConnector, "forward", lambda *given, **more: steps.append(1) or forward(*given, **more))
    connect(recipe, tmp_path / "run", data)
    # Three epochs of three steps, of which the first two epochs are saved.
    assert len(steps) == 3


def test_a_checkpoint_that_was_cut_off_is_passed_over(recipe, data, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        raises_once(patch, CMCRConnector, "forward", 7)
        with pytest.raises(KeyboardInterrupt):
            connect(recipe, tmp_path / "run", data)
    checkpoints = sorted((tmp_path / "run" / "train").glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-3", "checkpoint-6"]
    # Trainer writes the state last, and in place.
    state = checkpoints[1] / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    shutil.copytree(checkpoints[0], checkpoints[0].with_name("checkpoint-9"))
    (checkpoints[0].with_name("checkpoint-9") / "trainer_state.json").unlink()
    connect(recipe, tmp_path / "run", data)
    assert equal(weights(tmp_path / "run"), weights(finished.folder))


def test_a_run_killed_while_it_wrote_its_first_state_goes_on(recipe, data, tmp_path, finished, copy):
    shutil.rmtree(copy / "train")
    (copy / "train").mkdir()
    (copy / "train" / f".{walk.STAGE}.tmp").write_text("{")
    connect(recipe, copy, data)
    assert equal(weights(copy), weights(finished.folder))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": TrainSpec(epochs=2, batch_size=4)}, r"copy/train holds a training run with other train\.epochs\."),
        (
            {"connector": {"objective": "c-mcr", "projection_dim": 6}},
            r"train holds a training run with other connector\.projection_dim",
        ),
        ({"aggregate_temperature": 0.1}, "pseudo/clip-image holds other embeddings"),
        (
            {"text": [DataSpec(table="texts.csv", limit=8)]},
            "stores/clip-text holds other embeddings: .*data_fingerprint",
        ),
    ],
)
def test_a_changed_recipe_is_refused_and_nothing_is_lost(recipe, data, copy, changes, expected):
    before = content(copy)
    with pytest.raises(ValueError, match=expected):
        connect(replace(recipe, **changes), copy, data)
    assert content(copy) == before


@pytest.mark.parametrize("name", ["images/dog/0.png", "test_sounds/cat/1.wav"])
def test_changed_data_is_refused_and_nothing_is_lost(recipe, data, copy, tmp_path, name):
    changed = Path(shutil.copytree(data, tmp_path / "changed", copy_function=shutil.copy2))
    (changed / name).write_bytes((changed / name).read_bytes() + b"0")
    before = content(copy)
    with pytest.raises(ValueError, match=r"holds other embeddings: .*data_fingerprint"):
        connect(recipe, copy, changed)
    assert content(copy) == before


def test_a_changed_source_is_refused(recipe, data, copy, tiny_clip, tmp_path):
    other = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    model = load_file(other / "model.safetensors")
    model["logit_scale"] += 1
    save_file(model, other / "model.safetensors", metadata={"format": "pt"})
    sources = {**recipe.sources, "clip": SourceSpec(str(other))}
    with pytest.raises(ValueError, match="stores/clip-text holds other embeddings: source is"):
        connect(replace(recipe, sources=sources), copy, data)


def test_a_deleted_part_is_made_again(recipe, data, finished, copy):
    (copy / "model" / "model.safetensors").unlink()
    shutil.rmtree(copy / "connector")
    connect(recipe, copy, data)
    assert equal(weights(copy), weights(finished.folder))
    assert (copy / "connector" / "config.json").is_file()


def test_a_train_folder_of_somebody_else_is_left_alone(recipe, data, copy):
    shutil.rmtree(copy / "train")
    (copy / "train").mkdir()
    (copy / "train" / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="copy/train is not empty and holds no training run"):
        connect(recipe, copy, data)
    assert content(copy / "train") == {"diary.txt": b"mine"}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"image": DataSpec(folder="absent", label="parent")}, "There is no folder .*absent"),
        ({"image": DataSpec(folder="test_images/dog", label="parent")}, "The class 'bell', one of 2 such, has audio"),
        ({"names": DataSpec(table="names.csv", column="phrase")}, "names.csv has no column 'phrase'"),
    ],
)
def test_wrong_evaluation_data_is_found_before_anything_is_computed(
    recipe, data, tmp_path, monkeypatch, spec, expected
):
    monkeypatch.setattr(CMCRModel, "from_sources_pretrained", fails)
    with pytest.raises(ValueError, match=expected):
        connect(replace(recipe, evaluate=replace(recipe.evaluate, **spec)), tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_evaluation_items_without_a_class_are_named(recipe, data, tmp_path):
    root = Path(shutil.copytree(data, tmp_path / "data"))
    (root / "sounds.csv").write_text("file,kind\ntest_sounds/dog/0.wav,dog\ntest_sounds/cat/0.wav,\n")
    audio = DataSpec(table="sounds.csv", column="file", label="kind")
    with pytest.raises(ValueError, match=r"The item 'test_sounds/cat/0.wav' of evaluate.audio has no class"):
        connect(replace(recipe, evaluate=replace(recipe.evaluate, audio=audio)), tmp_path / "run", root)


def test_classes_are_read_once_and_belong_to_the_embedded_items(recipe, data, tmp_path, monkeypatch):
    specs = []

    class Counted(walk.Items):
        def __init__(self, entries, modality, root):
            specs.extend((modality, entry.folder or entry.table) for entry in entries)
            super().__init__(entries, modality, root)

    monkeypatch.setattr(walk, "Items", Counted)
    monkeypatch.setattr(walk, "train_connector", fails)
    with pytest.raises(AssertionError):
        connect(recipe, tmp_path / "run", data)
    assert len(specs) == len(set(specs)) == 6


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": TrainSpec(batch_size=64)}, r"train.batch_size is 64, expected at most the 12 training rows"),
        (
            {"train": TrainSpec(batch_size=4, validation_rows=9)},
            r"train.batch_size is 4, expected at most the 3 training rows \(12 texts less 9 of train.validation_rows",
        ),
        ({"train": TrainSpec(batch_size=4, validation_rows=99)}, "expected at most the 0 training rows"),
        ({"train": TrainSpec(batch_size=1)}, "train.batch_size is 1, expected at least 2"),
        ({"train": TrainSpec(batch_size=4, seed=2**32)}, "train.seed is 4294967296, expected less than"),
        (
            {"connector": {"objective": "clip"}},
            "connector.objective is 'clip', expected 'c-mcr' or 'ex-mcr' or 'bridge-distillation'",
        ),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_computed(
    recipe, data, tmp_path, monkeypatch, changes, expected
):
    monkeypatch.setattr(CMCRModel, "from_sources_pretrained", fails)
    with pytest.raises(ValueError, match=expected):
        connect(replace(recipe, **changes), tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_too_few_streamed_texts_are_refused_before_the_training(recipe, data, tmp_path, monkeypatch):
    # A streamed data set does not tell its length.
    monkeypatch.setattr(walk.Items, "__len__", lambda items: 0)
    monkeypatch.setattr(walk, "train_connector", fails)
    with pytest.raises(ValueError, match=r"train.batch_size is 64, expected at most the 12 training rows"):
        connect(replace(recipe, train=TrainSpec(batch_size=64)), tmp_path / "run", data)
    assert not (tmp_path / "run" / "train").exists()


def test_a_training_that_never_began_gives_way_to_a_corrected_recipe(recipe, data, tmp_path, monkeypatch, finished):
    with monkeypatch.context() as patch:
        raises_once(patch, walk, "train_connector")
        with pytest.raises(KeyboardInterrupt):
            connect(replace(recipe, train=TrainSpec(epochs=3, batch_size=4, seed=7)), tmp_path / "run", data)
    assert [path.name for path in (tmp_path / "run" / "train").iterdir()] == [walk.STAGE]
    connect(recipe, tmp_path / "run", data)
    assert equal(weights(tmp_path / "run"), weights(finished.folder))


def test_a_training_with_a_checkpoint_does_not_give_way(recipe, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        raises_once(patch, CMCRConnector, "forward", 4)
        with pytest.raises(KeyboardInterrupt):
            connect(recipe, tmp_path / "run", data)
    with pytest.raises(ValueError, match=r"holds a training run with other train\.seed"):
        connect(replace(recipe, train=replace(recipe.train, seed=7)), tmp_path / "run", data)
    assert (tmp_path / "run" / "train" / "checkpoint-3").is_dir()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"connector": {"objective": "c-mcr", "overlap_temperature": -1.0}},
            "connector of the recipe 'tiny' is not valid: .*must be positive",
        ),
        ({"connector": {"projectors": {"clip": {"layout": "deep"}}}}, "connector of the recipe 'tiny' is not valid"),
    ],
)
def test_a_wrong_connector_section_is_refused(recipe, data, tmp_path, changes, expected):
    with pytest.raises(ValueError, match=expected):
        connect(replace(recipe, **changes), tmp_path / "run", data)


def test_swapped_sources_are_refused_before_anything_is_embedded(recipe, data, tmp_path):
    swapped = {"clip": recipe.sources["clap"], "clap": recipe.sources["clip"]}
    with pytest.raises(ValueError, match=r"The clip source .*is a ClapModel, which .*embed.* image"):
        connect(replace(recipe, sources=swapped), tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_a_connector_refuses_sources_with_other_weights_under_the_same_name(recipe, data, tmp_path, tiny_clip):
    clip = tmp_path / "clip"
    shutil.copytree(tiny_clip, clip)
    mine = replace(recipe, sources={**recipe.sources, "clip": replace(recipe.sources["clip"], id=str(clip))})
    connect(mine, tmp_path / "run", data)
    assert CMCRModel.from_pretrained(tmp_path / "run/connector").config.fingerprints
    tensors = load_file(clip / "model.safetensors")
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"].flip(0)
    save_file(tensors, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not the clip source that the connector was trained on: its image"):
        CMCRModel.from_pretrained(tmp_path / "run/connector")
    # Its own weights are in the full model.
    assert CMCRModel.from_pretrained(tmp_path / "run/model").config.fingerprints


def test_a_source_folder_that_is_not_there_is_named(recipe, data, tmp_path):
    sources = {**recipe.sources, "clap": SourceSpec("../encoders/clap")}
    with pytest.raises(ValueError, match=r"There is no folder '../encoders/clap' for sources.clap"):
        connect(replace(recipe, sources=sources), tmp_path / "run", data)


def test_damaged_source_weights_are_named(recipe, data, tmp_path, tiny_clip):
    broken = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:100])
    sources = {**recipe.sources, "clip": SourceSpec(str(broken))}
    with pytest.raises(ValueError, match=r"The weights of a source .*clip.* are damaged"):
        connect(replace(recipe, sources=sources), tmp_path / "run", data)


def test_the_global_random_state_does_not_decide_the_weights(recipe, data, finished, copy):
    shutil.rmtree(copy / "train")
    torch.manual_seed(12345)
    connect(recipe, copy, data)
    assert equal(weights(copy), weights(finished.folder))


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "metrics.json"
    write_json(path, {"value": 0.5})
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert json.loads(path.read_text()) == {"value": 0.5}


@pytest.mark.parametrize("name", ["model", "connector"])
def test_folders_of_somebody_else_are_refused_before_anything_is_embedded(recipe, data, tmp_path, monkeypatch, name):
    monkeypatch.setattr(CMCRModel, "from_sources_pretrained", fails)
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / name / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=rf"run/{name} would be replaced, but no saved.json beside it"):
        connect(recipe, tmp_path / "run", data)
    assert content(tmp_path / "run") == {f"{name}/thesis.txt": b"mine"}


def test_files_of_somebody_else_outlive_a_folder_that_is_saved_again(recipe, data, copy):
    (copy / "model" / "notes").mkdir()
    (copy / "model" / "notes" / "a.txt").write_text("mine")
    (copy / "model" / "config.json").unlink()
    connect(recipe, copy, data)
    assert (copy / "model" / "notes" / "a.txt").read_text() == "mine"
    assert (copy / "model" / "config.json").is_file()


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(b""), cut, Path.unlink], ids=["empty", "cut", "gone"]
)
@pytest.mark.parametrize(
    "name", ["model/model.safetensors", "model/config.json", "model/tokenizer.json", "connector/model.safetensors"]
)
def test_a_damaged_file_of_a_saved_folder_is_written_again(recipe, data, finished, copy, name, damage):
    damage(copy / name)
    lines = []
    connect(recipe, copy, data, report=lines.append)
    assert (copy / name).read_bytes() == (finished.folder / name).read_bytes()
    assert not any(line.startswith("save: kept") for line in lines)


def test_an_edited_card_is_kept_and_said_to_be(recipe, data, finished, copy):
    (copy / "model" / "README.md").write_text("my card")
    lines = []
    connect(replace(recipe, licence="mit"), copy, data, report=lines.append)
    assert (copy / "model" / "README.md").read_text() == "my card"
    assert "license: mit" in (copy / "connector" / "README.md").read_text()
    assert [line for line in lines if line.startswith("card: ")] == [
        f"card: kept the edited {copy / 'model' / 'README.md'}"
    ]


def test_the_card_names_the_command_it_is_given_and_no_absolute_path(recipe, data, copy):
    moved = replace(recipe, image=[DataSpec(folder=str(data / "images"))], evaluate=None)
    assert "cmcr connect" not in (copy / "model" / "README.md").read_text()
    shutil.rmtree(copy)
    connect(replace(moved, evaluate=recipe.evaluate), copy, data, command="cmcr connect mine.yaml")
    card = (copy / "model" / "README.md").read_text()
    assert "cmcr connect mine.yaml\n" in card
    assert "| images | image memory |" in card
    assert str(data) not in card


def test_only_an_unchanged_recipe_of_the_package_is_named_as_the_command():
    demo = load_recipe("demo")
    assert walk._command(demo) == "cmcr connect demo"
    assert walk._command(replace(demo, aggregate_temperature=0.5)) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 5}', '{"key": {"stores": 1}}'])
def test_a_damaged_state_of_the_training_is_named(recipe, data, copy, text):
    (copy / "train" / walk.STAGE).write_text(text)
    with pytest.raises(
        ValueError, match=r"train/stage.json is damaged: .*\. Delete the folder .*/train and run again"
    ):
        connect(recipe, copy, data)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"connector": "", "files": 5}'])
def test_a_damaged_record_of_the_saved_folders_is_named_and_its_remedy_works(recipe, data, finished, copy, text):
    (copy / output.SAVED).write_text(text)
    with pytest.raises(ValueError, match=r"saved.json is damaged: .* Delete it and the folders connector and model"):
        connect(recipe, copy, data)
    (copy / output.SAVED).unlink()
    for name in output.PARTS:
        shutil.rmtree(copy / name)
    connect(recipe, copy, data)
    assert equal(weights(copy), weights(finished.folder))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.safetensors", ""),
        ("config.json", ""),
        ("config.json", "[]"),
        ("config.json", '{"projectors": 5}'),
        ("config.json", '{"model_type": "cmcr", "overlap_temperature": -1}'),
    ],
)
def test_a_damaged_trained_connector_is_named_and_its_remedy_works(recipe, data, finished, copy, name, text):
    (copy / "train" / "connector" / name).write_text(text)
    with pytest.raises(ValueError, match=r"train/connector is damaged: .* Delete the folder .*/train and run again"):
        connect(recipe, copy, data)
    shutil.rmtree(copy / "train")
    connect(recipe, copy, data)
    assert equal(weights(copy), weights(finished.folder))


def test_a_damaged_world_is_named(recipe, data, tmp_path):
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "world.json").write_text("{")
    with pytest.raises(ValueError, match=r"world.json is damaged: .* Delete the folder .*/world and run again"):
        connect(replace(recipe, world={"images": 1}), tmp_path, data)


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_that_is_a_file_is_named(recipe, data, tmp_path, output):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"/file is a file, expected a folder"):
        connect(recipe, tmp_path / output, data)


def test_an_output_that_cannot_be_written_is_named(recipe, data, tmp_path, monkeypatch):
    monkeypatch.setattr(output.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=f"The folder {tmp_path} cannot be written"):
        connect(recipe, tmp_path / "run" / "below", data)


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_ends(recipe, data, copy):
    with locked(copy), pytest.raises(ValueError, match=f"another run is using {copy}"):
        connect(recipe, copy, data)
    connect(recipe, copy, data)


def test_the_page_has_the_terms_of_the_loss_and_the_test_data(finished):
    html = (finished.folder / "report.html").read_text(encoding="utf-8")
    for term in ("loss", "loss_overlap", "loss_leaf", "loss_intra"):
        assert f">{term}</code>" in html
    assert '<th scope="row">test_sounds</th><td>clips to test with</td><td>6</td>' in html
    assert html.count("data:audio/mpeg;base64,") == 6


def test_the_same_run_writes_the_same_page(recipe, data, copy):
    before = (copy / "report.html").read_bytes()
    connect(recipe, copy, data)
    assert (copy / "report.html").read_bytes() == before


def test_metrics_of_a_former_run_do_not_outlive_the_evaluate_section(recipe, data, copy):
    connect(replace(recipe, evaluate=None), copy, data)
    assert not (copy / "evaluation.json").exists()
    assert not (copy / "report.html").exists()
    assert "No evaluation is recorded" in (copy / "model" / "README.md").read_text()


@pytest.mark.parametrize("text", ['{"mine": 1}', "[1]", "5", "notes"])
def test_an_evaluation_file_of_somebody_else_is_left_alone(recipe, data, copy, text):
    (copy / "evaluation.json").write_text(text)
    connect(replace(recipe, evaluate=None), copy, data)
    assert (copy / "evaluation.json").read_text() == text


# Stores in place of items


@pytest.fixture
def published(hub, finished):
    """The embeddings of the finished walk as data sets of the Hub, by name."""
    addresses = {}
    for name in ("clip-text", "clap-text", "clip-image", "clap-audio"):
        push_store(finished.folder / "stores" / name, f"org/{name}")
        addresses[name] = f"hf://datasets/org/{name}"
    return addresses


def with_stores(recipe, addresses):
    """The recipe with stores alone, which measures nothing."""
    return replace(
        recipe,
        text=[DataSpec(stores={"clip": addresses["clip-text"], "clap": addresses["clap-text"]}, licence="cc0-1.0")],
        image=[DataSpec(stores={"clip": addresses["clip-image"]})],
        audio=[DataSpec(stores={"clap": addresses["clap-audio"]})],
        evaluate=None,
    )


def local_stores(finished):
    return {path.name: str(path) for path in (finished.folder / "stores").iterdir()}


def test_stores_on_the_hub_connect_as_the_items_do(published, finished, recipe, tmp_path, hub):
    (tmp_path / "nothing").mkdir()
    lines = []
    connection = connect(with_stores(recipe, published), tmp_path / "run", tmp_path / "nothing", report=lines.append)
    weights_of = [folder / "connector" / "model.safetensors" for folder in (connection.folder, finished.folder)]
    assert equal(*({name: part for name, part in load_file(path).items()} for path in weights_of))
    there, here = connection.training_embeds("clap")["text"], finished.training_embeds("clap")["text"]
    assert list(there) == list(here)
    assert equal(there, here)
    assert not (connection.folder / "stores").exists()
    head = hub.repositories["datasets/org/clip-text"].head
    assert f"clip-text: given, 12 rows of 24 in hf://datasets/org/clip-text@{head}" in lines
    card = ModelCard.load(connection.folder / "connector" / "README.md")
    assert card.data.datasets == ["org/clip-text", "org/clap-text", "org/clip-image", "org/clap-audio"]
    row = "| hf://datasets/org/clap-text | the texts that connect, embedded by the CLAP source | 12 | cc0-1.0 |"
    assert row in card.text


def test_what_has_no_store_is_embedded_from_the_items(finished, recipe, data, tmp_path):
    stores = local_stores(finished)
    given = replace(
        recipe,
        text=[DataSpec(table="texts.csv", column="text", stores={"clap": stores["clap-text"]})],
        audio=[DataSpec(stores={"clap": stores["clap-audio"]})],
        evaluate=None,
    )
    connection = connect(given, tmp_path / "run", data)
    assert sorted(path.name for path in (connection.folder / "stores").iterdir()) == ["clip-image", "clip-text"]
    assert equal(connection.training_embeds("clap")["text"], finished.training_embeds("clap")["text"])


def test_items_that_are_not_those_of_the_store_are_named_before_any_work(finished, recipe, data, tmp_path):
    spec = DataSpec(table="names.csv", column="text", stores={"clap": local_stores(finished)["clap-text"]})
    with pytest.raises(ValueError, match=r"Row 0 of .*clap-text is 'texts\.csv/0/text', and of the items 'names\.csv"):
        connect(replace(recipe, text=[spec]), tmp_path / "run", data)
    spec = replace(spec, table="texts.csv", limit=5)
    with pytest.raises(ValueError, match=r"clap-text has 12 rows, and the items 5\. Embed the same items"):
        connect(replace(recipe, text=[spec]), tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def restate(store, folder, **changes):
    """Copy a store with another manifest."""
    folder = Path(shutil.copytree(store, folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["source"] |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": "0" * 40, "config_hash": "0" * 64}, r"it has the config_hash 000000000000 and not"),
        ({"revision": "0" * 64}, r"it has the revision 000000000000 and not"),
        ({"id": "org/other", "revision": "0" * 40}, r"it has the id 'other' and not 'clip'\. Name 'org/other' at rev"),
    ],
)
def test_a_store_of_another_source_is_refused_before_any_work(finished, recipe, data, tmp_path, changes, message):
    stores = local_stores(finished)
    image = restate(stores["clip-image"], tmp_path / "images", **changes)
    given = replace(recipe, image=[DataSpec(stores={"clip": image})])
    with pytest.raises(ValueError, match=rf"The store .*images was not made by the clip source 'clip': {message}"):
        connect(given, tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"id": "org/clip", "revision": "0" * 40}, {"config_hash": "0" * 64}])
def test_a_store_of_the_same_weights_is_taken_under_another_name_or_configuration(
    finished, recipe, data, tmp_path, changes
):
    stores = local_stores(finished)
    image = restate(stores["clip-image"], tmp_path / "images", **changes)
    given = replace(recipe, image=[DataSpec(stores={"clip": image})], evaluate=None)
    found = connect(given, tmp_path / "run", data).training_embeds("clap")
    assert equal(found["text"], finished.training_embeds("clap")["text"])


def test_a_store_of_another_modality_or_of_other_items_is_refused(finished, recipe, data, tmp_path):
    stores = local_stores(finished)
    given = replace(recipe, image=[DataSpec(stores={"clip": stores["clip-text"]})])
    with pytest.raises(ValueError, match=r"clip-text holds text in the space of clip, expected image in that of clip"):
        connect(given, tmp_path / "run", data)
    store = EmbeddingStore.open(stores["clap-text"])
    description = {"space": "clap", "modality": "text", "source": store.source, "dim": 16, "data_fingerprint": "d"}
    other = EmbeddingStore.create(tmp_path / "other", **description)
    other.append(store.tensor(), [*store.keys()[:-1], "another"])
    other.finish()
    given = replace(recipe, text=[DataSpec(stores={"clip": stores["clip-text"], "clap": str(tmp_path / "other")})])
    with pytest.raises(ValueError, match=r"Row 11 of .*clip-text is 'texts.csv/11/text', and of .*other 'another'"):
        connect(given, tmp_path / "run", data)


def test_bridge_distillation_trains_on_the_memories_themselves(recipe, data, tmp_path):
    distilling = replace(recipe, connector={"projection_dim": 8, "objective": "bridge-distillation"})
    done = connect(distilling, tmp_path / "run", data)
    assert not (done.folder / "pseudo").exists()
    embeds = done.training_embeds("clap")["text"]
    rows = {name: len(part) for name, part in embeds.items()}
    assert rows == {"clip_text": 12, "clap_text": 12, "clip_image": 9, "clap_audio": 9}
    assert "bridge distillation" in done.table
    history = json.loads((done.folder / "train" / "log.json").read_text())["history"]
    assert len(history) == 3
    assert history[0]["loss_leaf"] == pytest.approx(history[0]["loss"], rel=1e-3)
    config = CMCRConnector.from_pretrained(done.folder / "connector").config
    assert set(config.posterior_temperatures) == {"clip", "clap"}
    assert config.posterior_temperatures == done.model.config.posterior_temperatures
    card = (done.folder / "connector" / "README.md").read_text()
    assert "| objective | bridge-distillation |" in card
    clip, clap = (f"{config.posterior_temperatures[space]:.4g}" for space in ("clip", "clap"))
    assert f"| temperatures of the posteriors | clip = {clip}, clap = {clap} |" in card
    assert "trained by bridge distillation" in card
    assert "pools" not in card.split("| objective |")[1].split("| epochs |")[0]
    again = connect(distilling, done.folder, data)
    assert (done.folder / "connector" / "README.md").read_text() == card
    assert equal(weights(done.folder), again.model.state_dict())
    assert again.model.config.posterior_temperatures == config.posterior_temperatures


def test_another_objective_is_refused_before_anything_is_computed(recipe, data, copy):
    before = content(copy)
    with pytest.raises(ValueError, match=r"train holds a training run with other connector\.objective, "):
        connect(replace(recipe, connector={"objective": "bridge-distillation", "projection_dim": 8}), copy, data)
    assert content(copy) == before


def test_a_run_of_the_time_before_other_objectives_is_kept(recipe, data, copy, capsys):
    stage = copy / "train" / walk.STAGE
    document = json.loads(stage.read_text())
    del document["key"]["connector"]["objective"]
    stage.write_text(json.dumps(document))
    lines = []
    connect(recipe, copy, data, report=lines.append)
    assert any(line.startswith("train: kept") for line in lines)


def test_a_run_of_the_time_before_targets_were_relative_is_not_continued_with_those(recipe, data, tmp_path):
    distilling = replace(recipe, connector={"projection_dim": 8, "objective": "bridge-distillation"}, evaluate=None)
    connect(distilling, tmp_path / "run", data)
    stage = tmp_path / "run" / "train" / walk.STAGE
    document = json.loads(stage.read_text())
    assert document["key"]["connector"].pop("target_lift") == 1
    stage.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"holds a training run with other connector\.target_lift"):
        connect(distilling, tmp_path / "run", data)
    lines = []
    before = replace(distilling, connector={**distilling.connector, "target_lift": 0})
    connect(before, tmp_path / "run", data, report=lines.append)
    assert any(line.startswith("train: kept") for line in lines)


def test_bridge_distillation_goes_on_where_it_was_stopped(recipe, data, tmp_path, monkeypatch):
    distilling = replace(recipe, connector={"projection_dim": 8, "objective": "bridge-distillation"}, evaluate=None)
    whole = connect(distilling, tmp_path / "whole", data)
    with monkeypatch.context() as patched:
        raises_once(patched, CMCRConnector, "save_pretrained", call=1)
        with pytest.raises(KeyboardInterrupt):
            connect(distilling, tmp_path / "stopped", data)
    assert equal(weights(whole.folder), weights(connect(distilling, tmp_path / "stopped", data).folder))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (TrainSpec(batch_size=10), "at most the 9 training rows (9 images or clips less 0"),
        (TrainSpec(batch_size=4, validation_rows=2), "no item of a memory has a partner to be found"),
    ],
)
def test_a_schedule_that_no_distillation_can_follow_is_refused_before_any_work(
    recipe, data, tmp_path, monkeypatch, train, message
):
    monkeypatch.setattr(walk, "_load_sources", fails)
    distilling = replace(recipe, connector={"objective": "bridge-distillation"}, train=train)
    with pytest.raises(ValueError, match=re.escape(message)):
        connect(distilling, tmp_path / "run", data)


def test_pools_of_rows_that_belong_together_are_refused_where_none_do(recipe):
    with pytest.raises(ValueError, match="expected none for bridge-distillation, which pairs no rows"):
        replace(recipe, connector={"objective": "bridge-distillation"}, pools=["text", "image"])
