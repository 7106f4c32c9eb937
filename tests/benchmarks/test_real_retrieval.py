import csv
import io
import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from benchmarks import real_retrieval
from benchmarks.real.captions import SOUND_PHRASES, Captioner, image_phrases, words
from benchmarks.real.clip_vectors import roc_area, shows
from benchmarks.real.data import Items, is_held_back, read_images, read_sounds
from benchmarks.real.models import SmallAudioTextModel, SmallDualEncoderConfig, SmallImageTextModel
from benchmarks.real.sources import embed_items, embed_texts
from benchmarks.real.training import SourceTraining, train_source
from benchmarks.real.word_vectors import subword_tokenizer, token_vectors, word_tokenizer
from benchmarks.real_retrieval import HALVES
from cmcr_hf.evaluation.connection import retrieval_metrics
from cmcr_hf.training.train import run_script

CONCEPTS = {"dog": {"esc50": ["dog"]}, "bird": {"esc50": ["crow", "chirping_birds"]}}
SENTENCES = [
    *(f"a {size} dog barks near the {place}" for size in ("big", "small") for place in ("house", "road", "river")),
    *(f"a {size} bird sings in the {place}" for size in ("big", "small") for place in ("tree", "forest", "garden")),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up items and texts in the layout of the real data."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("images", "audio", "text"):
        (folder / name).mkdir()
    (folder / "concepts.json").write_text(json.dumps(CONCEPTS))
    picture = io.BytesIO()
    Image.new("RGB", (96, 64), (10, 200, 30)).save(picture, "JPEG")
    rows = [
        {"file": f"{label}_{number}.JPEG", "concept": concept, "label_text": label}
        for label, concept in (("poodle", "dog"), ("goose", "bird"), ("lemon", ""))
        for number in range(20)
    ]
    with zipfile.ZipFile(folder / "images/images_train.zip", "w") as archive:
        for row in rows:
            archive.writestr(row["file"], picture.getvalue())
    with (folder / "images/images_train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    np.savez(
        folder / "audio/esc50_logmel_folds1235.npz",
        X=np.arange(12 * 64 * 248, dtype=np.uint8).reshape(12, 64, 248),
        clip=np.array([f"clip-{number}" for number in range(12)]),
        fold=np.repeat(np.array([1, 2, 3, 5], dtype=np.uint8), 3),
        target=np.tile(np.array([0, 1, 2], dtype=np.uint8), 4),
        categories=np.array(["dog", "crow", "rain"]),
    )
    text = folder / "text"
    (text / "audiocaps_train.csv").write_text("caption\n" + "\n".join(SENTENCES[:6]) + "\n")
    (text / "clotho_train.csv").write_text(
        ",".join(f"caption_{number}" for number in range(1, 6)) + "\n" + ",".join(SENTENCES[6:11]) + "\n"
    )
    (text / "flickr8k_4500captions.json").write_text(json.dumps(SENTENCES[11:]))
    (text / "audioset_ontology.json").write_text(json.dumps([{"name": "Bark", "description": "The sound of a dog."}]))
    for name in ("audioset_labels", "fsd50k_labels", "vggsound_labels"):
        (text / f"{name}.json").write_text(json.dumps({"dog": 0, "bird": 1}))
    for name in ("imagenet_classes", "lvis_names"):
        (text / f"{name}.json").write_text(json.dumps(["poodle", "goose"]))
    return folder


def small(kind: type, **fields: object) -> SmallImageTextModel | SmallAudioTextModel:
    torch.manual_seed(0)
    return kind(SmallDualEncoderConfig(widths=[8, 8], vocab_size=30, word_dim=6, text_hidden_dim=12, **fields)).eval()


def test_the_held_back_images_are_a_fixed_fifth_of_the_names() -> None:
    names = [f"tin/n{number:08d}.JPEG" for number in range(2000)]
    assert [is_held_back(name) for name in names[:12]] == [*[False] * 4, True, True, *[False] * 6]
    assert 0.17 < sum(map(is_held_back, names)) / 2000 < 0.23


def test_no_image_is_both_for_training_and_held_back(data: Path) -> None:
    images = read_images(data)
    training, held_back = set(images.training.keys), set(images.held_back.keys)
    assert training.isdisjoint(held_back)
    assert len(training | held_back) == 60
    assert held_back == {key for key in training | held_back if is_held_back(key) and not key.startswith("lemon")}


def test_other_files_do_not_move_an_image_across_the_split(data: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/images_train.zip").symlink_to(data / "images/images_train.zip")
    lines = (data / "images/images_train.csv").read_text().splitlines()
    (tmp_path / "images/images_train.csv").write_text("\n".join([lines[0], *reversed(lines[11:31])]) + "\n")
    part, whole = read_images(tmp_path), read_images(data)
    assert part.held_back.keys
    assert set(part.held_back.keys) <= set(whole.held_back.keys)
    assert set(part.training.keys) <= set(whole.training.keys)


def test_sounds_are_split_by_fold(data: Path) -> None:
    sounds = read_sounds(data)
    assert sounds.training.keys == [f"clip-{number}" for number in range(9)]
    assert sounds.held_back.keys == ["clip-9", "clip-10", "clip-11"]
    assert sounds.held_back.concepts == ["dog", "bird", ""]


@pytest.mark.parametrize("kind", [SmallImageTextModel, SmallAudioTextModel])
@pytest.mark.parametrize("text_tower", ["bag-of-words", "attention"])
def test_a_source_keeps_its_embeddings_through_a_checkpoint(kind: type, text_tower: str, tmp_path: Path) -> None:
    channels, shape = (3, (64, 64)) if kind is SmallImageTextModel else (1, (64, 248))
    model = small(kind, channels=channels, text_tower=text_tower)
    values = torch.randint(256, (2, channels, *shape), generator=torch.Generator().manual_seed(0)).float()
    ids = torch.tensor([[3, 4, 5], [7, 0, 0]])
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    features = "get_image_features" if kind is SmallImageTextModel else "get_audio_features"
    with torch.no_grad():
        for name, inputs in ((features, values), ("get_text_features", ids)):
            before, after = getattr(model, name)(inputs).pooler_output, getattr(loaded, name)(inputs).pooler_output
            assert before.shape == (2, 128)
            assert torch.equal(before, after)


@pytest.mark.parametrize("text_tower", ["bag-of-words", "attention"])
def test_padding_does_not_change_a_text(text_tower: str) -> None:
    model = small(SmallImageTextModel, text_tower=text_tower)
    with torch.no_grad():
        alone = model.get_text_features(torch.tensor([[3, 4, 5]])).pooler_output
        padded = model.get_text_features(torch.tensor([[3, 4, 5, 0, 0]])).pooler_output
    assert torch.allclose(alone, padded, atol=1e-5)


def test_an_unknown_text_tower_is_refused() -> None:
    with pytest.raises(Exception, match="text_tower is 'lstm'"):
        SmallDualEncoderConfig(text_tower="lstm")


def test_a_source_learns_to_tell_its_classes_by_their_names() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(2).repeat(16)
    values = torch.randint(100, (32, 1, 64, 248), generator=generator, dtype=torch.uint8)
    values[classes == 1, :, :, ::2] += 150
    items = Items([str(row) for row in range(32)], values, classes, [""] * 32)
    tokenizer = word_tokenizer(SENTENCES, vocab_size=30)
    model = small(SmallAudioTextModel, channels=1, pad_token_id=tokenizer.pad_token_id)
    vectors = model.text_tower.embedding.weight.clone()
    captioner = Captioner([["a dog barks"], ["a bird sings"]], ["{}"], [])
    settings = SourceTraining(epochs=15, batch_size=8, learning_rate=2e-3, seed=0, mixup=0.3, text_steps=40)
    train_source(model, tokenizer, items, captioner, lambda values, _: values[..., :100], settings, name="test")
    scores = embed_items(model, values) @ embed_texts(model, tokenizer, ["a dog barks", "a bird sings"]).T
    assert (scores.argmax(dim=1) == classes).float().mean() > 0.9
    assert torch.equal(model.text_tower.embedding.weight, vectors)
    assert not model.training


def test_words_of_the_same_neighbours_have_near_vectors() -> None:
    tokenizer = word_tokenizer(SENTENCES, vocab_size=100)
    vectors = token_vectors(tokenizer, SENTENCES, dim=8, window=3, generator=torch.Generator().manual_seed(0))
    big, small, barks = (
        torch.nn.functional.normalize(vectors[tokenizer.convert_tokens_to_ids(word)], dim=0)
        for word in ("big", "small", "barks")
    )
    assert big @ small > big @ barks + 0.1
    assert not vectors[tokenizer.pad_token_id].any()


def test_the_towers_cut_a_text_differently() -> None:
    texts = [*SENTENCES, "unseenword"]
    assert word_tokenizer(SENTENCES, vocab_size=100).tokenize("dogbird") == ["[UNK]"]
    assert len(subword_tokenizer(texts, vocab_size=100).tokenize("dogbird")) > 1


def test_a_phrase_is_true_of_every_class_that_has_it() -> None:
    captioner = Captioner([["a bird"], ["a bird"], ["a dog"]], ["{} here"], [])
    texts, true_of = captioner.draw(random.Random(0))
    assert texts == ["a bird here", "a bird here", "a dog here"]
    assert true_of == [{0, 1}, {0, 1}, {2}]


def test_words_around_a_training_caption_are_of_no_class() -> None:
    captioner = Captioner([["a dog"], ["a bird"]], ["{}"], ["the dog runs", "rivers flow by fields"])
    assert captioner.fillers == [["rivers", "flow", "by", "fields"]]
    generator = random.Random(0)
    texts = [text for _ in range(20) for text in captioner.draw(generator)[0]]
    assert all(set(words(text)) <= {"a", "dog", "bird", "rivers", "flow", "by", "fields"} for text in texts)
    assert any(len(words(text)) > 2 for text in texts)


def test_an_image_is_called_by_its_label_and_its_concept() -> None:
    assert image_phrases("hog, pig", "pig") == ["hog", "pig", "pig", "pig"]
    assert image_phrases("lemon", "") == ["lemon"]


def test_every_class_of_the_real_sounds_has_phrases(shared: Path) -> None:
    assert {label.replace("_", " ") for label in read_sounds(shared / "data").labels} == set(SOUND_PHRASES)


def test_the_connecting_texts_need_no_item_and_no_label(data: Path, tmp_path: Path) -> None:
    for name in ("concepts.json", "text"):
        (tmp_path / name).symlink_to(data / name)
    sentences, about = real_retrieval.name_sentences(tmp_path)
    assert sentences[0] == about[0] == "dog"
    assert len(sentences) == 2 * len(real_retrieval.NAME_TEMPLATES)
    assert set(real_retrieval.real_texts(tmp_path)) == {*SENTENCES, "dog", "bird", "poodle", "goose"}


def unit_rows(rows: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)), dim=1)


def random_embeddings() -> real_retrieval.Embeddings:
    texts = real_retrieval.TextSet(unit_rows(12, 0), unit_rows(12, 1), [name for name in "abcd" for _ in range(3)])
    audio = real_retrieval.Side("clap", "audio", unit_rows(16, 4), list("aabbccdd" * 2))
    image = real_retrieval.Side("clip", "image", unit_rows(20, 5), list("aabbccdd" * 2 + "aabb"))
    items = real_retrieval.RetrievalSet(audio, image, texts.clap, texts.clip, unit_rows(4, 6), unit_rows(4, 7))
    return real_retrieval.Embeddings(
        unit_rows(30, 2),
        unit_rows(30, 3),
        texts,
        texts,
        items,
        {"clip": 0.6, "clap": 0.7},
        {name: (list(range(start, 16, 2)), list(range(start, 20, 2))) for start, name in enumerate(HALVES)},
    )


def test_a_connector_trains_on_texts_and_unlabelled_memories_alone() -> None:
    embeddings = random_embeddings()
    data = real_retrieval.connection_data(embeddings, embeddings.names)
    assert {name: tuple(rows.shape) for name, rows in data.items()} == dict.fromkeys(
        ("clip_text", "clap_text", "clip_image", "clap_audio"), (12, 16)
    )
    embeddings.items = None
    embeddings.zero_shot = {}
    again = real_retrieval.connection_data(embeddings, embeddings.names)
    assert all(torch.equal(data[name], again[name]) for name in data)


def test_a_table_has_every_row_and_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    schedules = dict.fromkeys(real_retrieval.SCHEDULES, real_retrieval.Schedule(batch_size=6, epochs=1))
    monkeypatch.setattr(real_retrieval, "SCHEDULES", schedules)
    monkeypatch.setattr(real_retrieval, "DISTILLATION", schedules["names"])
    embeddings = random_embeddings()
    parts = real_retrieval.experiment(embeddings, ["names", "captions"], seeds=1, derangements=1, workers=1)
    assert list(parts) == ["all", "first half", "second half"]
    # Of every second item of each side.
    items = embeddings.items
    scores = items.query.embeds[::2] @ items.gallery.embeds[::2].T
    expected = retrieval_metrics(scores, scores.T, items.query.labels[::2], items.gallery.labels[::2])
    assert parts["first half"][0]["unconnected"] == expected
    table, spread = parts["all"]
    trained = ["C-MCR, 17 names", "C-MCR, captions", "bridge distillation, 17 names", "bridge distillation, captions"]
    trained += ["null, 17 names", "null of bridge distillation, 17 names"]
    assert list(table)[-7:] == ["closed PM", *trained]
    assert spread == {}
    assert {"chance", "unconnected", "ridge", "procrustes", "one-way bridge", "two-way bridge"} < set(table)
    # The same texts under the same seeds: only the pairing tells the null from the connector.
    for name in ("C-MCR", "bridge distillation"):
        assert table[f"{name}, 17 names"] == table[f"{name}, captions"]
    assert table["null, 17 names"] != table["C-MCR, 17 names"]
    assert table["null of bridge distillation, 17 names"] != table["bridge distillation, 17 names"]
    assert table["bridge distillation, 17 names"] != table["C-MCR, 17 names"]
    found = real_retrieval.targets(table, embeddings.zero_shot)
    assert len(found) == 21
    assert str(found[0]).endswith("floor 0.55: met, expected 0.65: met, stretch 0.75: NOT met")


def test_missing_data_is_one_clear_error(tmp_path: Path) -> None:
    arguments = ["--data", str(tmp_path / "nowhere"), "--cache", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as error:
        run_script(lambda: real_retrieval.main(arguments))
    message = str(error.value.code)
    assert message.startswith(f"error: There is no file {tmp_path / 'nowhere' / 'concepts.json'}.")
    assert "--data" in message
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_command_measures_real_data_and_takes_its_sources_from_the_cache(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--data",
        str(shared / "data"),
        "--cache",
        str(tmp_path / "cache"),
        "--output",
        str(tmp_path / "t.json"),
    ]
    arguments += [
        "--image-epochs",
        "1",
        "--audio-epochs",
        "1",
        "--seeds",
        "1",
        "--derangements",
        "0",
        "--texts",
        "names",
    ]
    real_retrieval.main(arguments)
    first = json.loads((tmp_path / "t.json").read_text())
    weights = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(weights) == 11
    real_retrieval.main(arguments)
    second = json.loads((tmp_path / "t.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == weights
    assert second["mean"] == first["mean"]
    for way, metrics in first["mean"]["unconnected"].items():
        assert metrics["mAP"] < first["mean"]["chance"][way]["mAP"] + 0.05
    assert "C-MCR, 17 names" in capsys.readouterr().out


def test_a_caption_shows_what_a_whole_word_of_it_names() -> None:
    captions = ["A Dog runs .", "two dogs", "a hotdog stand", "the sea , with a dog"]
    assert shows(captions, "dog dogs puppy").tolist() == [True, True, False, True]


def test_the_area_under_the_roc_curve_is_the_share_of_pairs_in_order() -> None:
    positive = torch.tensor([True, False, True, False])
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 4.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0], [3.0, 2.0, 1.0, 0.0]])
    assert roc_area(scores, positive).tolist() == [1.0, 0.0, 0.5, 0.75]


def test_a_distilling_connector_trains_on_the_memories_and_its_null_on_other_texts(tmp_path: Path) -> None:
    items = {name: F.normalize(torch.randn(600, 128), dim=1) for name in ("memory/clip_image", "memory/clap_audio")}
    items |= {name: F.normalize(torch.randn(4, 128), dim=1) for name in ("audio", "image")}
    save_file(items, tmp_path / "items.safetensors")
    names = ("clip_text", "clap_text", "clip_image", "clap_audio")
    save_file({name: F.normalize(torch.randn(6, 128), dim=1) for name in names}, tmp_path / "names.safetensors")
    words = {
        "audio": ["dog", "bird"] * 2,
        "image": ["dog", "bird"] * 2,
        "names": ["dog", "bird", "cat"] * 2,
        "halves": {},
    }
    (tmp_path / "words.json").write_text(json.dumps(words))
    seen: list[dict[str, torch.Tensor]] = []

    def stop(config: object, embeds: dict[str, torch.Tensor], *arguments: object, **options: object) -> None:
        seen.append(embeds)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(real_retrieval, "train_connector", stop)
        for deranged in (False, True):
            run = real_retrieval.Run("names", 0, deranged, "bridge-distillation")
            with pytest.raises(KeyboardInterrupt):
                real_retrieval.connect(run, tmp_path)
    plain, null = seen
    assert {name: len(rows) for name, rows in plain.items()} == {
        "clip_text": 6,
        "clap_text": 6,
        "clip_image": 600,
        "clap_audio": 600,
    }
    assert [name for name in plain if not torch.equal(plain[name], null[name])] == ["clap_text"]
