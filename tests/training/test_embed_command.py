"""`cmcr embed`: a store from a folder, a table and a data set, in bounded pieces, with the bad items listed."""

import io
import json
import os
import re
import sys
import tarfile

import fsspec
import pytest
import torch
from PIL import Image

from cmcr_hf.cli import main
from cmcr_hf.training.store import EmbeddingStore
from tests.hub_server import READER


def run(*arguments):
    return main(["embed", *map(str, arguments)])


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for row in range(5):
        Image.new("RGB", (20, 30), (40 * row, 0, 90)).save(folder / f"{row}.png")
    return folder


def test_a_folder_becomes_a_store_and_bad_files_are_listed(pictures, tiny_clip, tmp_path, capsys):
    (pictures / "2.png").write_bytes(b"no image")
    options = ["--source", tiny_clip, "--space", "clip", "--modality", "image", "--output", tmp_path / "store"]
    assert run("--data", pictures, *options, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert f"4 rows of 24 in {tmp_path / 'store'}, 1 unreadable, listed in" in printed
    assert printed.startswith("CPU: 1 threads, float32 products as ")
    # What the command sets ends with it.
    assert torch.get_float32_matmul_precision() == "highest"
    assert EmbeddingStore.open(tmp_path / "store").keys() == ["0.png", "1.png", "3.png", "4.png"]
    (reject,) = map(json.loads, (tmp_path / "store" / "rejects.jsonl").read_text().splitlines())
    assert reject["key"] == "2.png"


def test_strict_stops_at_a_bad_file(pictures, tiny_clip, tmp_path, capsys):
    (pictures / "2.png").write_bytes(b"no image")
    options = ["--source", tiny_clip, "--space", "clip", "--modality", "image", "--output", tmp_path / "store"]
    assert run("--data", pictures, *options, "--strict") == 1
    assert "2.png" in capsys.readouterr().err


def test_files_that_are_not_there_are_listed_too(pictures, tiny_clip, tmp_path, capsys):
    (pictures / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "files.csv").write_text("file\n0.png\nmissing.png\n1.png\n")
    options = ["--source", tiny_clip, "--space", "clip", "--modality", "image"]
    assert run("--data", pictures, *options, "--output", tmp_path / "folder") == 0
    assert run("--data", tmp_path / "files.csv", "--files", pictures, *options, "--output", tmp_path / "table") == 0
    assert EmbeddingStore.open(tmp_path / "folder").rows == 5
    assert EmbeddingStore.open(tmp_path / "table").keys() == ["0.png", "1.png"]
    assert "missing.png" in (tmp_path / "table" / "rejects.jsonl").read_text()
    assert run("--data", pictures, *options, "--output", tmp_path / "strict", "--strict") == 1
    assert "gone.png leads to a file that is not there" in capsys.readouterr().err


def test_a_mistyped_path_is_said_to_be_none(tiny_clip, tmp_path, capsys):
    options = ["--source", tiny_clip, "--space", "clip", "--modality", "image", "--output", tmp_path / "store"]
    assert run("--data", "nope", *options) == 1
    assert "There is no file or folder 'nope'" in capsys.readouterr().err


def test_a_table_of_texts_becomes_a_store(tiny_clap, tmp_path):
    (tmp_path / "texts.csv").write_text("id,caption\n1,a dog barks\n2,the sea\n3,a bell rings\n")
    options = ["--source", tiny_clap, "--space", "clap", "--modality", "text", "--output", tmp_path / "store"]
    options += ["--column", "caption", "--limit", 2, "--template", "the sound of {}"]
    assert run("--data", tmp_path / "texts.csv", *options) == 0
    store = EmbeddingStore.open(tmp_path / "store")
    assert (store.rows, store.dim, store.space, store.modality) == (2, 16, "clap", "text")


def test_a_table_and_its_pictures_behind_addresses_become_a_store(pictures, tiny_clip, tmp_path):
    files = fsspec.filesystem("memory")
    files.pipe_file("/photos/list.csv", b"file\n3.png\ngone.png\n0.png\n")
    for row in (0, 3):
        files.pipe_file(f"/photos/{row}.png", (pictures / f"{row}.png").read_bytes())
    options = ["--source", tiny_clip, "--space", "clip", "--modality", "image"]
    try:
        assert run("--data", "memory://photos/list.csv", *options, "--output", tmp_path / "there") == 0
    finally:
        files.rm("/photos", recursive=True)
    (pictures / "list.csv").write_text("file\n3.png\n0.png\n")
    assert run("--data", pictures / "list.csv", *options, "--output", tmp_path / "here") == 0
    there, here = (EmbeddingStore.open(tmp_path / name) for name in ("there", "here"))
    assert there.keys() == here.keys() == ["3.png", "0.png"]
    torch.testing.assert_close(there.tensor(), here.tensor(), atol=1e-6, rtol=0)
    assert "There is no file memory://photos/gone.png" in (tmp_path / "there" / "rejects.jsonl").read_text()


def test_webdataset_tars_become_a_store(pictures, tiny_clip, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for row in (2 * shard, 2 * shard + 1):
                data = (pictures / f"{row}.png").read_bytes()
                entry = tarfile.TarInfo(f"{row:04d}.png")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    options = ["--source", tiny_clip, "--space", "clip", "--modality", "image", "--column", "png"]
    assert run("--data", folder, *options, "--output", tmp_path / "tars") == 0
    assert run("--data", pictures, *options[:-2], "--output", tmp_path / "files") == 0
    tars, files = (EmbeddingStore.open(tmp_path / name).tensor() for name in ("tars", "files"))
    torch.testing.assert_close(tars, files[:4], atol=1e-6, rtol=0)


def test_another_precision_is_compared_with_float32(pictures, tiny_clip, tmp_path, capsys):
    options = ["--source", tiny_clip, "--space", "clip", "--modality", "image", "--output", tmp_path / "store"]
    assert run("--data", pictures, *options, "--dtype", "bfloat16") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("least cosine with float32, of the first 5 items: 0.99")


def test_a_source_that_lacks_the_modality_is_named(pictures, tiny_clap, tmp_path, capsys):
    options = ["--source", tiny_clap, "--space", "clap", "--modality", "image", "--output", tmp_path / "store"]
    assert run("--data", pictures, *options) == 1
    assert "is a ClapModel, which embeds no image" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def commits_of(hub):
    return [request for request in hub.requests if request.startswith("POST") and "/commit/" in request]


@pytest.mark.parametrize("share", ["0/1", "1/2"])
def test_the_process_that_completes_a_store_pushes_it(hub, pictures, tiny_clip, tmp_path, capsys, share):
    options = ["--source", tiny_clip, "--space", "clip", "--modality", "image", "--output", tmp_path / "store"]
    options += ["--data", pictures, "--push", "org/pictures", "--licence", "cc0-1.0", "--private"]
    assert run(*options, "--share", share) == 0
    repository = hub.repositories["datasets/org/pictures"]
    assert repository.hidden
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/datasets/org/pictures/commit/{repository.head}"
    assert b"license: cc0-1.0" in repository.files["README.md"]
    assert str(tiny_clip.parent).encode() not in repository.files["README.md"]
    # The others find it complete.
    assert len(commits_of(hub)) == 1
    assert run(*options, "--share", "2/3") == 0
    assert len(commits_of(hub)) == 1
    # And the first of them goes on where a push broke.
    del hub.repositories["datasets/org/pictures"]
    assert run(*options, "--share", "0/3") == 0
    assert torch.equal(
        EmbeddingStore.open("hf://datasets/org/pictures").tensor(), EmbeddingStore.open(tmp_path / "store").tensor()
    )


def test_a_push_that_cannot_be_is_refused_before_the_work(hub, pictures, tiny_clip, tmp_path, monkeypatch, capsys):
    options = ["--source", tiny_clip, "--space", "clip", "--modality", "image", "--output", tmp_path / "store"]
    options += ["--data", pictures]
    assert run(*options, "--push", "org/a b") == 1
    assert "Expected a repository as ORG/NAME" in capsys.readouterr().err
    assert run(*options, "--push", "org/pictures", "--licence", "My Own") == 1
    assert "Expected a licence of lower-case letters" in capsys.readouterr().err
    assert run(*options, "--private") == 1
    assert "Name the data set with --push ORG/NAME" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", READER)
    assert run(*options, "--push", "org/pictures") == 1
    assert "Your token may read alone" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_table_of_several_columns_wants_one_named(tiny_clap, tmp_path, capsys):
    (tmp_path / "texts.csv").write_text("id,caption\n1,a dog barks\n")
    options = ["--source", tiny_clap, "--space", "clap", "--modality", "text", "--output", tmp_path / "store"]
    assert run("--data", tmp_path / "texts.csv", *options) == 1
    assert "has several columns, id, caption. Name that of the items with --column" in capsys.readouterr().err


def test_a_store_within_its_data_set_is_refused(pictures, tiny_clip, tmp_path, capsys):
    options = ["--source", tiny_clip, "--space", "clip", "--modality", "image", "--column", "png"]
    assert run("--data", pictures, *options, "--output", pictures / "store") == 1
    assert "lies within the data set" in capsys.readouterr().err


def test_the_reason_is_named_where_nothing_is_readable_and_the_corrected_command_goes_on(
    pictures, tiny_clip, tmp_path, capsys
):
    (tmp_path / "files.csv").write_text("file\n0.png\n1.png\n")
    options = ["--source", tiny_clip, "--space", "clip", "--modality", "image", "--output", tmp_path / "store"]
    assert run("--data", tmp_path / "files.csv", *options) == 1
    said = capsys.readouterr().err
    assert "store holds no rows, of 2 items: Cannot" in said
    assert "No such file or directory" in said
    assert run("--data", tmp_path / "files.csv", "--files", pictures, *options) == 0
    names = {path.name for path in (tmp_path / "store").iterdir()}
    assert names == {"manifest.json", "shard-00000.safetensors", "shard-00000.keys.parquet"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_no_text_is_listed(pictures, tiny_clip, tmp_path):
    os.link(os.fsencode(pictures / "0.png"), os.fsencode(pictures) + b"/bad\xff.png")
    options = ["--source", tiny_clip, "--space", "clip", "--modality", "image", "--output", tmp_path / "store"]
    assert run("--data", pictures, *options) == 0
    assert EmbeddingStore.open(tmp_path / "store").rows == 5
    (reject,) = map(json.loads, (tmp_path / "store" / "rejects.jsonl").read_text().splitlines())
    assert reject["key"] == "bad\\udcff.png"
    assert "is not valid Unicode" in reject["reason"]


def test_an_archive_that_is_cut_off_is_named(pictures, tiny_clip, tmp_path, capsys):
    folder = tmp_path / "tars"
    folder.mkdir()
    for part in range(2):
        with tarfile.open(folder / f"photos-{part}.tar", "w") as archive:
            archive.add(pictures / f"{part}.png", f"{part}.png")
    whole = (folder / "photos-1.tar").read_bytes()
    (folder / "photos-1.tar").write_bytes(whole[:700])
    options = ["--source", tiny_clip, "--space", "clip", "--modality", "image", "--column", "png"]
    assert run("--data", folder, *options, "--output", tmp_path / "store") == 1
    said = capsys.readouterr().err
    assert re.search(r"Cannot read the data set .*tars' behind row 0 of file 2 of 2, .*Get that file again", said)
    (folder / "photos-1.tar").write_bytes(whole)
    assert run("--data", folder, *options, "--output", tmp_path / "whole") == 0


@pytest.mark.parametrize(("rank", "ranks"), [("2", None), ("x", "2"), ("", "2"), ("0", "0"), ("-1", "2"), ("5", "3")])
def test_an_environment_that_names_no_share_is_refused(
    pictures, tiny_clip, tmp_path, capsys, monkeypatch, rank, ranks
):
    monkeypatch.setenv("RANK", rank)
    if ranks is not None:
        monkeypatch.setenv("WORLD_SIZE", ranks)
    options = ["--source", tiny_clip, "--space", "clip", "--modality", "image", "--output", tmp_path / "store"]
    assert run("--data", pictures, *options) == 1
    assert "RANK/WORLD_SIZE in the environment: expected I/N with I from 0 to N - 1" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run("--data", pictures, *options) == 0


@pytest.mark.parametrize("output", ["s3://", "memory://store", "file://localhost/store"])
def test_an_address_that_leads_nowhere_is_refused(pictures, tiny_clip, tmp_path, capsys, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    options = ["--source", tiny_clip, "--space", "clip", "--modality", "image", "--output", output]
    assert run("--data", pictures, *options) == 1
    assert output in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
