import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from cmcr_hf import CMCRModel, CMCRProcessor
from cmcr_hf.cli import main
from cmcr_hf.search import Answer, Hit, SearchIndex, read_query
from cmcr_hf.search import index as search
from cmcr_hf.search.cache import FileDigests
from cmcr_hf.search.embedder import Embedder
from cmcr_hf.search.results import answer_record, format_answer, printable, write_search_page

ROOT = Path(__file__).parents[2]


def picture(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def sound(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, 2000), 8000)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three random pictures and sounds each, and a text file of two lines."""
    folder = tmp_path / "files"
    for seed, kind in enumerate(("bell", "cat", "dog")):
        picture(folder / "photos" / f"{kind}.png", seed)
        sound(folder / "sounds" / f"{kind}.wav", seed)
    (folder / "notes.txt").write_text("the dog barks\n\nthe bell rings\n")
    return folder


@pytest.fixture
def embedded(monkeypatch):
    """The names of the files, and the texts, that were embedded since."""
    names = []
    embed = Embedder.embed

    def record(self, modality, values):
        names.extend(os.path.basename(value) for value in values)
        return embed(self, modality, values)

    monkeypatch.setattr(Embedder, "embed", record)
    return names


@pytest.fixture
def index(tiny_model, folder, tmp_path):
    def make(model=tiny_model, folder=folder, **options):
        made = SearchIndex(model, folder, cache=tmp_path / "cache", device="cpu", **options)
        made.update(progress=False)
        return made

    return make


def names(answer, modality):
    return [hit.path.name for hit in answer.hits[modality]]


def test_hits_have_the_cosines_that_the_model_gives(index, tiny_model, folder):
    answer = index().search(folder / "photos" / "dog.png")
    model = CMCRModel.from_pretrained(tiny_model)
    processor = CMCRProcessor.from_pretrained(tiny_model)
    paths = [str(folder / "sounds" / f"{kind}.wav") for kind in ("bell", "cat", "dog")]
    with torch.inference_mode():
        image = model.get_image_features(**processor(images=str(folder / "photos" / "dog.png"))).pooler_output
        audio = model.get_audio_features(**processor(audio=paths)).pooler_output
    cosines = dict(zip(("bell.wav", "cat.wav", "dog.wav"), (audio @ image[0]).tolist(), strict=True))
    assert names(answer, "audio") == sorted(cosines, key=lambda name: -cosines[name])
    assert [hit.score for hit in answer.hits["audio"]] == pytest.approx(
        sorted(cosines.values(), reverse=True), abs=1e-5
    )


def test_each_modality_has_a_ranking_of_its_own_and_that_of_the_query_comes_last(index, folder):
    everything = index(modalities=["image", "audio", "text"])
    assert everything.counts == {"image": 3, "audio": 3, "text": 2}
    assert list(everything.search("the dog").hits) == ["image", "audio", "text"]
    answer = everything.search(folder / "photos" / "dog.png", top=2)
    assert list(answer.hits) == ["audio", "text", "image"]
    assert [len(hits) for hits in answer.hits.values()] == [2, 2, 2]
    assert (answer.modality, answer.searched) == ("image", 8)


def test_texts_are_searched_only_where_they_are_asked_for(index):
    assert index().counts == {"image": 3, "audio": 3}
    answer = index(modalities=["text"]).search("the dog barks")
    assert list(answer.hits) == ["text"]
    best = answer.hits["text"][0]
    assert (best.path.name, best.line, best.text) == ("notes.txt", 1, "the dog barks")
    assert best.score == pytest.approx(1, abs=1e-5)
    assert answer.hits["text"][1].line == 3


def test_a_file_of_the_folder_does_not_find_itself_but_its_copy(index, folder):
    shutil.copy(folder / "photos" / "dog.png", folder / "photos" / "copy.png")
    answer = index().search(folder / "photos" / "dog.png", top=3)
    assert sorted(names(answer, "image")) == ["bell.png", "cat.png", "copy.png"]
    assert names(answer, "image")[0] == "copy.png"
    assert answer.hits["image"][0].score == pytest.approx(1, abs=1e-5)


def test_equal_scores_are_in_the_order_of_their_paths(index, folder):
    for name in ("z.png", "a.png", "m.png"):
        shutil.copy(folder / "photos" / "dog.png", folder / name)
    for top in (1, 2, 4, 10):
        found = [hit.path for hit in index().search("the dog", top=top).hits["image"]]
        scores = [hit.score for hit in index().search("the dog", top=10).hits["image"]]
        assert len(set(scores)) == 3
        tied = [path.relative_to(folder).as_posix() for path in found if path.name not in ("bell.png", "cat.png")]
        assert tied == ["a.png", "m.png", "photos/dog.png", "z.png"][: len(tied)]
        assert len(found) == min(top, 6)


def test_what_is_known_is_not_embedded_again(index, folder, embedded):
    index().search(folder / "photos" / "dog.png")
    assert sorted(embedded) == sorted(
        f"{kind}.{suffix}" for kind in ("bell", "cat", "dog") for suffix in ("png", "wav")
    )
    embedded.clear()
    index().search(folder / "photos" / "dog.png")
    assert embedded == []


def test_a_query_is_embedded_once(index, embedded, tmp_path):
    query = picture(tmp_path / "query.png", 9)
    first = index()
    embedded.clear()
    before = [first.search(query), first.search("the dog")]
    assert embedded == ["query.png", "the dog"]
    embedded.clear()
    after = [index().search(query), index().search(" the dog ")]
    assert embedded == []
    assert [answer.hits for answer in after] == [answer.hits for answer in before]


def test_what_is_new_or_changed_is_embedded_and_what_is_moved_is_not(index, folder, embedded):
    index()
    embedded.clear()
    (folder / "photos" / "cat.png").rename(folder / "moved.png")
    shutil.copy(folder / "photos" / "dog.png", folder / "copy.png")
    picture(folder / "photos" / "bell.png", 77)
    sound(folder / "new.wav", 78)
    (folder / "sounds" / "dog.wav").unlink()
    changed = index()
    assert sorted(embedded) == ["bell.png", "new.wav"]
    answer = changed.search("the dog")
    assert sorted(names(answer, "image")) == ["bell.png", "copy.png", "dog.png", "moved.png"]
    assert sorted(names(answer, "audio")) == ["bell.wav", "cat.wav", "new.wav"]


def test_a_moved_folder_is_another_index(index, folder, embedded):
    index()
    embedded.clear()
    shutil.copytree(folder, folder.with_name("other"))
    assert len(index(folder=folder.with_name("other"))) == 6
    assert len(embedded) == 6


def test_a_folder_that_is_empty_for_a_while_keeps_its_vectors(index, folder, embedded):
    index()
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()
    with pytest.raises(ValueError, match="There is nothing to search in"):
        index()
    folder.rmdir()
    folder.with_name("elsewhere").rename(folder)
    embedded.clear()
    index()
    assert embedded == []


def test_hidden_files_linked_folders_and_other_formats_are_passed_over(index, folder):
    for name in (".hidden.png", "._dog.png", ".cache/dog.png"):
        picture(folder / name, 5)
    (folder / "loop").symlink_to(folder)
    (folder / "link.png").symlink_to(folder / "photos" / "dog.png")
    (folder / "table.csv").write_text("a,b")
    os.mkfifo(folder / "pipe.wav")
    found = index()
    assert sorted(names(found.search("the dog"), "image")) == ["bell.png", "cat.png", "dog.png", "link.png"]
    assert found.counts["audio"] == 3
    assert found.skipped == {}


def test_an_unreadable_file_is_named_and_not_tried_again_until_it_changes(index, folder, embedded):
    (folder / "bad.png").write_text("no picture")
    (folder / "same.png").write_text("no picture")
    (folder / "gone.wav").symlink_to(folder / "nowhere")
    found = index()
    assert len(found) == 6
    assert sorted(path.name for path in found.skipped) == ["bad.png", "gone.wav", "same.png"]
    assert "bad.png': it is empty, no image" in found.skipped[folder / "bad.png"]
    assert "same.png': it is empty, no image" in found.skipped[folder / "same.png"]
    assert found.skipped[folder / "gone.wav"].endswith("gone.wav: No such file or directory.")
    embedded.clear()
    assert index().skipped == found.skipped
    assert embedded == []
    picture(folder / "bad.png", 8)
    assert sorted(path.name for path in index().skipped) == ["gone.wav", "same.png"]
    assert embedded == ["bad.png"]


def test_a_text_file_that_is_not_utf_8_or_too_large_is_skipped(index, folder, monkeypatch):
    monkeypatch.setattr(search, "MAX_TEXT_BYTES", 100)
    (folder / "latin.txt").write_bytes("ein Bär".encode("latin-1"))
    (folder / "large.txt").write_text("a dog\n" * 20)
    (folder / "empty.txt").write_text("")
    found = index(modalities=["text"])
    assert found.counts == {"text": 2}
    assert "is not UTF-8" in found.skipped[folder / "latin.txt"]
    assert "has 120 bytes, expected at most 100" in found.skipped[folder / "large.txt"]
    assert len(found.skipped) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_update_goes_on_where_it_was(index, monkeypatch, embedded, error):
    embed = Embedder.embed

    def stopped(self, modality, values):
        if len(embedded) == 3:
            raise error
        return embed(self, modality, values)

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "embed", stopped)
        with pytest.raises(error):
            index(batch_size=2)
    assert sorted(embedded) == ["bell.png", "cat.png", "dog.png"]
    embedded.clear()
    assert len(index(batch_size=2)) == 6
    assert sorted(embedded) == ["bell.wav", "cat.wav", "dog.wav"]


def test_vectors_are_written_while_a_long_update_runs(index, monkeypatch, tmp_path):
    monkeypatch.setattr(search, "FLUSH_ROWS", 2)
    written = []
    add = search.VectorCache.add
    monkeypatch.setattr(
        search.VectorCache, "add", lambda self, vectors: (written.append(len(vectors)), add(self, vectors))
    )
    index(batch_size=1)
    assert written == [2, 1, 2, 1]


def test_a_damaged_index_is_rebuilt(index, tmp_path, embedded):
    before = index().search("the dog").hits
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-7])
    embedded.clear()
    with pytest.warns(UserWarning, match="is damaged"):
        after = index().search("the dog").hits
    assert len(embedded) == 7
    assert after == before


def test_an_index_belongs_to_one_model_by_the_content_of_its_files(index, tiny_model, tmp_path, embedded):
    index()
    embedded.clear()
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    (copy / "README.md").write_text("A card, which decides nothing.")
    index(model=copy)
    assert embedded == []
    model = CMCRModel.from_pretrained(copy)
    with torch.no_grad():
        model.connector.projectors["clip"].layers[0].weight.mul_(-1)
    model.save_pretrained(copy)
    changed = index(model=copy)
    assert len(embedded) == 6
    assert changed.search("the dog").hits != index().search("the dog").hits


def test_a_connector_alone_is_told_by_its_sources_too(tiny_clip, tiny_clap, tmp_path):
    clip = shutil.copytree(tiny_clip, tmp_path / "clip")
    model = CMCRModel.from_sources_pretrained(str(clip), str(tiny_clap), config={"projection_dim": 8})
    model.connector.save_pretrained(tmp_path / "connector")

    def digest():
        return Embedder(str(tmp_path / "connector"), FileDigests(tmp_path / "digests.json")).digest

    before = digest()
    assert digest() == before
    (clip / "tokenizer_config.json").write_text("{}")
    assert digest() != before


def test_a_model_of_the_hub_is_that_of_the_commit_in_the_local_cache(tiny_model, tmp_path, monkeypatch):
    commits = [shutil.copytree(tiny_model, tmp_path / commit) / "config.json" for commit in ("aaaa", "bbbb")]
    asked = []

    def load(name, *, revision, **options):
        asked.append((name, revision))
        return model

    model = CMCRModel.from_pretrained(tiny_model)
    digests = []
    for path in commits:
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file, path=path: str(path))
        embedder = Embedder("some/model", FileDigests(tmp_path / "digests.json"), "cpu")
        digests.append(embedder.digest)
    monkeypatch.setattr(CMCRModel, "from_pretrained", load)
    processor = CMCRProcessor.from_pretrained(tiny_model)
    monkeypatch.setattr(
        CMCRProcessor, "from_pretrained", lambda name, *, revision: (asked.append((name, revision)), processor)[1]
    )
    vectors, reasons = embedder.embed("text", ["the dog"])
    assert asked == [("some/model", "bbbb")] * 2
    assert len(set(digests)) == 2
    assert np.linalg.norm(vectors[0]) == pytest.approx(1, abs=1e-5) and reasons == [None]


def test_only_the_towers_that_are_used_are_loaded(index, folder, monkeypatch):
    loaded = []
    load = CMCRModel.from_pretrained
    monkeypatch.setattr(
        CMCRModel,
        "from_pretrained",
        lambda *args, modalities, **options: (
            loaded.append(modalities),
            load(*args, modalities=modalities, **options),
        )[1],
    )
    shutil.rmtree(folder / "photos")
    found = index()
    assert loaded == [["audio"]]
    found.search("the dog")
    found.search("the bell")
    assert loaded == [["audio"], ["text"]]


def test_point_clouds_are_found_and_find(index, tiny_ulip_model, tmp_path):
    for seed, kind in enumerate(("chair", "mug")):
        cloud = np.random.default_rng(seed).normal(size=(50, 3)).astype(np.float32)
        picture(tmp_path / "things" / f"{kind}.png", seed)
        np.save(tmp_path / "things" / f"{kind}.npy", cloud)
    made = index(tiny_ulip_model, tmp_path / "things")
    assert made.counts == {"image": 2, "point_cloud": 2}
    model, processor = CMCRModel.from_pretrained(tiny_ulip_model), CMCRProcessor.from_pretrained(tiny_ulip_model)
    with torch.inference_mode():
        clouds = [tmp_path / "things" / f"{kind}.npy" for kind in ("chair", "mug")]
        rows = model.get_point_cloud_features(**processor(point_clouds=clouds)).pooler_output
        text = model.get_text_features(**processor(text="a dog")).pooler_output[0]
    found = {hit.path.name: hit.score for hit in made.search("a dog").hits["point_cloud"]}
    for path, score in zip(clouds, (rows @ text).tolist(), strict=True):
        assert found[path.name] == pytest.approx(score, abs=1e-5)
    assert names(made.search(clouds[0]), "point_cloud") == ["mug.npy"]
    page = tmp_path / "page.html"
    write_search_page(page, made, [made.search(clouds[0])])
    assert page.read_text().count("data:image/jpeg") == 1 + 2 + 1


def test_a_model_without_a_modality_searches_the_others(index, tiny_model, tmp_path, folder):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config["default_spaces"]["audio"]
    (model / "config.json").write_text(json.dumps(config))
    found = index(model=model)
    assert found.counts == {"image": 3}
    with pytest.raises(ValueError, match="embeds image and text, not audio"):
        found.search(folder / "sounds" / "dog.wav")
    with pytest.raises(ValueError, match="embeds image and text, not audio"):
        index(model=model, modalities=["audio"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"folder": "absent"}, "There is no folder absent"),
        ({"model": "absent/a/b"}, "Cannot load the model 'absent/a/b'.*cmcr connect"),
        ({"model": "absent/model"}, "Cannot load the model 'absent/model'.*cmcr connect"),
        ({"model": str(ROOT / "tests")}, r"Cannot read .*config.json.*cmcr connect"),
        ({"modalities": ["video"]}, "embeds image and audio and text, not video"),
    ],
)
def test_what_is_missing_is_named(index, options, told):
    with pytest.raises(ValueError, match=told):
        index(**options)


def test_another_model_is_refused_by_its_kind(index, tiny_clip):
    with pytest.raises(ValueError, match=r"Expected a CMCRModel in .*, got a clip"):
        index(model=tiny_clip)


def test_damaged_weights_are_named(index, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"Cannot load the model .*cmcr connect"):
        index(model=model)


def test_a_folder_with_nothing_readable_says_why(index, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "bad.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"nothing to search in .*bad.png.*formats .*\.jpg.*\.wav"):
        index(folder=folder)


def test_a_query_is_a_file_by_its_suffix_and_else_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "Dog.PNG", 1)
    sound(tmp_path / "dog.wav", 1)
    (tmp_path / "dog").write_text("")
    assert read_query("Dog.PNG") == ("image", "Dog.PNG")
    assert read_query(tmp_path / "dog.wav") == ("audio", str(tmp_path / "dog.wav"))
    assert read_query("dog") == ("text", "dog")
    assert read_query(" a dog. It barks, e.g. at night ") == ("text", "a dog. It barks, e.g. at night")
    assert read_query("a" * 5000 + ".x") == ("text", "a" * 5000 + ".x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_query("~/dog.wav") == ("audio", str(tmp_path / "dog.wav"))


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("missing.jpg", r"There is no file 'missing.jpg'.*without \.jpg"),
        ("  ", "Expected a query, got an empty one"),
        ("notes.pdf", "Expected 'notes.pdf' in one of the formats .aif"),
        ("\udcff", "not valid Unicode"),
    ],
)
def test_a_query_that_cannot_be_meant_is_refused(tmp_path, monkeypatch, query, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.pdf").write_text("x")
    with pytest.raises(ValueError, match=told):
        read_query(query)


def test_an_unreadable_query_is_refused_by_name(index, tmp_path):
    (tmp_path / "bad.wav").write_text("no sound")
    with pytest.raises(ValueError, match=r"Cannot read audio .*bad.wav"):
        index().search(tmp_path / "bad.wav")


def test_a_table_names_rank_cosine_modality_and_path_and_steers_no_terminal():
    hits = {
        "audio": [Hit(0.51234, "audio", Path("a\x1b[31m.wav")), Hit(-0.2, "audio", Path("b.wav"))],
        "text": [Hit(0.4, "text", Path("n.txt"), 12, "a dog\u202e")],
    }
    lines = format_answer(Answer("dog\n.png", "image", hits, 1234, 0.0015)).splitlines()
    assert lines == [
        "",
        "dog\\n.png (image)",
        "   1   0.512  audio  a\\x1b[31m.wav",
        "   2  -0.200  audio  b.wav",
        "   1   0.400  text   n.txt:12: a dog\\u202e",
        "searched 1,234 items in 1.5 ms",
    ]
    assert printable("Hände \udcff 犬") == "Hände \\udcff 犬"


def test_a_record_holds_names_that_are_not_utf_8():
    hits = {"audio": [Hit(0.5, "audio", Path("b\udcff.wav"))]}
    record = json.loads(json.dumps(answer_record(Answer("q", "text", hits, 1, 0.1))).encode())
    assert record == {
        "query": "q",
        "modality": "text",
        "hits": {
            "audio": [
                {"rank": 1, "score": 0.5, "modality": "audio", "path": "b\\udcff.wav", "line": None, "text": None}
            ]
        },
    }


# cmcr search


@pytest.fixture
def command(tiny_model, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return lambda *arguments: main(["search", "--model", str(tiny_model), str(folder), *arguments])


def test_the_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["search", "--help"])
    assert stopped.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in ("default: all files but .txt", "default: 10", "default: 32", "~/.cache", "Example: cmcr search"):
        assert text in out


def test_the_command_prints_a_table_for_each_query(command, folder, capsys, tmp_path):
    assert command("--query", str(folder / "photos" / "dog.png"), "--query", "the bell", "--top", "2") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"3 images, 3 clips in {folder}"
    assert out[2] == f"{folder / 'photos' / 'dog.png'} (image)"
    assert [line.split()[0::2] for line in out[3:7]] == [
        ["1", "audio"],
        ["2", "audio"],
        ["1", "image"],
        ["2", "image"],
    ]
    assert out[9] == "the bell (text)"
    assert out[7].startswith("searched 6 items in ") and out[7].endswith(" ms")
    assert (tmp_path / "xdg" / "cmcr_hf" / "search" / "models.json").is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "photos", "sounds"]


def test_the_command_asks_for_queries_where_none_is_given(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("the dog\n\nmissing.wav\nthe bell"))
    assert command("--only", "audio", "--top", "1") == 1
    captured = capsys.readouterr()
    assert [line for line in captured.out.splitlines() if line.endswith("(text)")] == [
        "the dog (text)",
        "the bell (text)",
    ]
    assert "cmcr search: There is no file 'missing.wav'" in captured.err
    assert "1 of 3 queries were not answered" in captured.err


def test_typed_queries_that_are_all_answered_end_well(command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the dog\nthe bell\n"))
    assert command("--only", "audio", "--top", "1") == 0


def test_the_command_writes_json_and_a_page_that_holds_all_it_shows(command, folder, tmp_path, capsys):
    (folder / "notes.txt").write_text("the <b>dog</b>\n")
    page, output = tmp_path / "new" / "page.html", tmp_path / "hits.json"
    query = str(folder / "photos" / "dog.png")
    only = [part for name in ("image", "audio", "text") for part in ("--only", name)]
    assert (
        command("--query", query, *only, "--html", str(page), "--output", str(output), "--index", str(tmp_path)) == 0
    )
    written = json.loads(output.read_text())
    assert written["folder"] == str(folder)
    hits = written["answers"][0]["hits"]
    assert {name: [hit["rank"] for hit in found] for name, found in hits.items()} == {
        "audio": [1, 2, 3],
        "text": [1],
        "image": [1, 2],
    }
    text = page.read_text()
    assert text.count('src="data:image/jpeg;base64,') == 3
    assert text.count('src="data:audio/mpeg;base64,') == 3
    assert "the &lt;b&gt;dog&lt;/b&gt;" in text and "<b>dog" not in text
    assert "http:" not in text and "https:" not in text


def test_the_command_names_the_first_files_that_it_skips_and_counts_the_rest(command, folder, capsys):
    for number in range(7):
        (folder / f"bad{number}.png").write_text(f"no picture {number}")
    assert command("--query", "the dog") == 0
    skipped = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 6
    assert "bad0.png" in skipped[0] and "bad4.png" in skipped[4]
    assert skipped[5] == "skipped: 2 more"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--query", "missing.jpg"], "There is no file 'missing.jpg'"),
        (["--query", "x", "--output", "."], ". is a folder, expected a file for --output"),
        (["--query", "x", "--html", "."], ". is a folder, expected a file for --html"),
        (["--query", "x", "--device", "tpu"], "Cannot use the device 'tpu'"),
    ],
)
def test_the_command_fails_with_one_line_before_anything_is_embedded(command, capsys, embedded, arguments, told):
    assert command(*arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"cmcr search: {told}") and err.count("\n") == 1
    assert embedded == []


def test_a_damaged_index_is_told_in_one_line(command, tmp_path, capsys):
    assert command("--query", "the dog") == 0
    (tmp_path / "xdg" / "cmcr_hf" / "search" / "models.json").write_text("{")
    capsys.readouterr()
    assert command("--query", "the dog") == 0
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("cmcr search: ") and "models.json is damaged" in err[0]


def run_command(tmp_path, *arguments):
    """Run the command as its script does, in a process of its own; report the heavy modules that it imported."""
    script = tmp_path / "cmcr"
    script.write_text(
        "import sys\nfrom cmcr_hf.cli import main\nstatus = main()\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])\nsys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_search_that_is_known_imports_neither_torch_nor_transformers(tiny_model, folder, tmp_path):
    arguments = ["search", "--model", str(tiny_model), str(folder), "--query", "the dog", "--query"]
    arguments += [str(folder / "photos" / "dog.png")]
    first, second = run_command(tmp_path, *arguments), run_command(tmp_path, *arguments)
    assert first[-1] == "['torch', 'transformers']"
    assert second[-1] == "[]"
    times = [line for line in first if line.startswith("searched")]
    assert len(times) == 2
    assert [line for line in second[:-1] if not line.startswith("searched")] == [
        line for line in first[:-1] if not line.startswith("searched")
    ]


def test_the_help_of_the_command_imports_neither_torch_nor_transformers(tmp_path):
    code = (
        "import sys; sys.argv = ['cmcr']; import cmcr_hf.cli; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.slow
def test_the_names_of_the_package_come_with_their_first_use_in_the_command_too():
    code = (
        "import sys; sys.argv = ['cmcr']; import cmcr_hf; from transformers import AutoConfig; "
        "from cmcr_hf import CMCRConfig; print(type(AutoConfig.for_model('cmcr')) is CMCRConfig); "
        "print(hasattr(cmcr_hf, 'x'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\nFalse\n", done.stderr
