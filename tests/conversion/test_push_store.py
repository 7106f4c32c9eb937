"""Stores of embeddings as data sets of the Hub: pushed with the real client, and read from there."""

import json

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import DatasetCard, constants
from pyarrow import parquet

from cmcr_hf.cli import main
from cmcr_hf.conversion.push_store import FOLDER_IN_TEXT, push_store
from cmcr_hf.training.store import EmbeddingStore
from tests.hub_server import READER, Fault

NAME = "org/photos-clip"
PAGE = f"datasets/{NAME}"
ADDRESS = f"hf://datasets/{NAME}"
EMBEDS = F.normalize(torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), dim=1)
KEYS = [f"a/{row}.png" for row in range(7)]
SOURCE = {"id": "openai/clip", "revision": "ab" * 20, "config_hash": "c"}


def write_store(folder, keys=KEYS, source=SOURCE, rejects=()):
    store = EmbeddingStore.create(
        folder, space="clip", modality="image", source=source, dim=4, data_fingerprint="d", shard_rows=3
    )
    for first in range(0, 7, 3):
        rows, part = EMBEDS[first : first + 3], keys[first : first + 3]
        store.write((first // 3,), rows, part, rejects=rejects if first == 6 else ())
    assert store.complete_if_whole(3)
    return store


@pytest.fixture
def folder(tmp_path):
    write_store(tmp_path / "photos")
    return tmp_path / "photos"


def files(hub):
    return hub.repositories[PAGE].files


def test_a_store_is_pushed_in_one_commit_after_all_else_and_opened_from_there(hub, folder):
    (folder / ".lock").touch()
    (folder / "notes.txt").write_text("of nobody else's concern")
    commit = push_store(folder, NAME)
    assert hub.repositories[PAGE].messages == ["initial", "Push 7 embeddings"]
    assert commit.oid == hub.repositories[PAGE].head
    assert hub.requests[-1] == f"POST /api/{PAGE}/commit/main"
    shards = [name for name in sorted(path.name for path in folder.iterdir()) if name.startswith("shard-")]
    assert sorted(files(hub)) == [".gitattributes", "README.md", "manifest.json", *shards]
    assert all(files(hub)[name] == (folder / name).read_bytes() for name in ("manifest.json", *shards))
    store = EmbeddingStore.open(ADDRESS)
    assert torch.equal(store.tensor(), EMBEDS)
    assert store.keys() == KEYS
    assert store.folder == f"{ADDRESS}@{commit.oid}"
    assert store.digest == EmbeddingStore.open(folder).digest


def test_the_command_tells_a_store_from_a_model(hub, folder, capsys):
    assert main(["push", str(folder), NAME, "--private", "--licence", "cc-by-4.0"]) == 0
    assert hub.repositories[PAGE].hidden
    assert capsys.readouterr().out.strip() == f"{hub.url}/{PAGE}/commit/{hub.repositories[PAGE].head}"
    (folder / "config.json").write_text("{}")
    assert main(["push", str(folder), NAME]) == 1
    assert "no model_type" in capsys.readouterr().err


def test_the_card_says_what_the_rows_are_and_shows_the_viewer_their_keys(hub, folder):
    push_store(folder, NAME, licence="cc-by-4.0")
    card = DatasetCard(files(hub)["README.md"].decode())
    assert card.data.license == "cc-by-4.0"
    assert card.data.to_dict()["configs"] == [{"config_name": "keys", "data_files": "*.keys.parquet"}]
    for line in (
        f"# {NAME}",
        "| source | openai/clip |",
        f"| revision of the source | {'ab' * 20} |",
        "| rows | 7 |",
        "| dimensions | 4 |",
        "| type | float32 |",
        "| licence | cc-by-4.0 |",
        f'store = EmbeddingStore.open("{ADDRESS}")',
        f"  - stores: {{clip: {ADDRESS}}}",
    ):
        assert f"\n{line}\n" in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    scope = {}
    exec(code, scope)
    assert torch.equal(scope["embeds"], EMBEDS)


def test_a_source_that_was_a_folder_is_said_to_be_one(hub, tmp_path):
    write_store(tmp_path / "photos", source={**SOURCE, "id": "clip", "revision": "0" * 64})
    push_store(tmp_path / "photos", NAME)
    text = files(hub)["README.md"].decode()
    assert "| source | clip, the name of a folder or file of the publisher: it says nothing" in text
    assert "| sha256 of the source's files | 0000" in text


def test_an_unknown_licence_is_refused_before_anything_else(hub, folder):
    with pytest.raises(ValueError, match=r"Expected a licence of .*'CC BY'"):
        push_store(folder, NAME, licence="CC BY")
    assert hub.requests == []


def test_what_paths_tell_of_a_machine_is_not_pushed(hub, tmp_path):
    keys = [f"/srv/me/my photos/{kind}/{row}.png" for row, kind in enumerate("aaabbcc")]
    reject = {"key": "/srv/me/my photos/d/9.png", "reason": "Cannot read image /srv/me/my photos/d/9.png: truncated"}
    source = {**SOURCE, "id": "/srv/me/weights/630k.pt", "revision": "0" * 64}
    write_store(tmp_path / "photos", keys, source, [reject])
    push_store(tmp_path / "photos", NAME)
    assert b"me/" not in b"".join(content for name, content in files(hub).items() if not name.endswith("tensors"))
    store = EmbeddingStore.open(ADDRESS)
    assert store.keys() == ["a/0.png", "a/1.png", "a/2.png", "b/3.png", "b/4.png", "c/5.png", "c/6.png"]
    assert torch.equal(store.tensor(), EMBEDS)
    assert store.source["id"] == "630k.pt"
    assert json.loads(files(hub)["rejects.jsonl"]) == {
        "key": "d/9.png",
        "reason": "Cannot read image 9.png: truncated",
    }
    # The store itself is as it was.
    assert EmbeddingStore.open(tmp_path / "photos").keys() == keys


def test_keys_from_all_over_a_machine_keep_their_last_folder(hub, tmp_path):
    keys = ["/srv/me/a/0.png", "/data/b/1.png", *KEYS[2:]]
    write_store(tmp_path / "photos", keys)
    push_store(tmp_path / "photos", NAME)
    assert EmbeddingStore.open(ADDRESS).keys() == ["a/0.png", "b/1.png", *KEYS[2:]]


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("'/srv/me/x y/a.png' is no image", "'a.png' is no image"),
        ("C:\\Users\\me\\a.png: truncated", "a.png: truncated"),
        ("file:///srv/me/a.png", "a.png"),
        ("s3://bucket/photos/a.png and/or photos/a.png", "s3://bucket/photos/a.png and/or photos/a.png"),
    ],
)
def test_folders_are_cut_from_a_sentence(text, public):
    assert FOLDER_IN_TEXT.sub("", text) == public


def test_a_damaged_or_incomplete_store_is_not_pushed(hub, folder, tmp_path):
    path = folder / "shard-00001.keys.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"shard-00001\.keys\.parquet does not have the sha256"):
        push_store(folder, NAME)
    EmbeddingStore.create(
        tmp_path / "begun", space="clip", modality="image", source=SOURCE, dim=4, data_fingerprint="d"
    )
    with pytest.raises(ValueError, match="is incomplete"):
        push_store(tmp_path / "begun", NAME)
    assert hub.repositories == {}


def test_a_data_set_of_something_else_is_left_alone(hub, folder, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "data.csv").write_text("text\n")
    hub.add(PAGE, tmp_path / "raw")
    with pytest.raises(ValueError, match=rf"{PAGE} holds other files and no store"):
        push_store(folder, NAME)
    assert list(files(hub)) == ["data.csv"]


def test_a_store_takes_the_place_of_a_former_one_and_other_files_stay(hub, folder, tmp_path):
    push_store(folder, NAME)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "notes.md").write_text("kept")
    hub.add(PAGE, tmp_path / "more")
    store = EmbeddingStore.create(
        tmp_path / "other", space="clip", modality="image", source=SOURCE, dim=4, data_fingerprint="e"
    )
    store.append(EMBEDS[:2], KEYS[:2])
    store.finish()
    push_store(tmp_path / "other", NAME)
    names = sorted(name for name in files(hub) if not name.startswith("."))
    assert names == [
        "README.md",
        "manifest.json",
        "notes.md",
        "shard-00000.keys.parquet",
        "shard-00000.safetensors",
    ]
    assert EmbeddingStore.open(ADDRESS).rows == 2


def test_a_push_that_breaks_leaves_the_data_set_as_it_was_and_says_how_to_go_on(hub, folder):
    hub.faults.append(Fault(f"POST /api/{PAGE}/commit/main", status=403))
    with pytest.raises(OSError, match=rf"may not write to {PAGE} .*To go on, run `cmcr push .*photos {NAME}`"):
        push_store(folder, NAME)
    assert hub.repositories[PAGE].messages == ["initial"]


def test_a_store_is_pinned_and_fetched_once_and_is_there_without_network(hub, folder, monkeypatch):
    first = push_store(folder, NAME).oid
    store = EmbeddingStore.open(ADDRESS)
    hub.add(PAGE, folder, under="later/")
    assert torch.equal(store.tensor(), EMBEDS)
    assert store.keys() == KEYS
    fetched = len(hub.requests)
    pinned = EmbeddingStore.open(f"{ADDRESS}@{first}")
    assert torch.equal(pinned.tensor(), EMBEDS)
    # The commit is looked up, the files are not.
    assert all("resolve" not in request for request in hub.requests[fetched:])
    later = EmbeddingStore.open(f"{ADDRESS}/later")
    assert torch.equal(later.tensor(), EMBEDS)
    assert later.keys() == KEYS
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for address in (f"{ADDRESS}/later", f"{ADDRESS}@{first}"):
        again = EmbeddingStore.open(address)
        assert torch.equal(again.tensor(), EMBEDS)
        assert again.keys() == KEYS


def test_what_is_not_here_is_named_without_network(hub, folder, monkeypatch):
    push_store(folder, NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=rf"{ADDRESS}/manifest\.json is not on this machine, and the Hub"):
        EmbeddingStore.open(ADDRESS)


def test_a_damaged_shard_is_named_and_a_damaged_copy_fetched_anew(hub, folder):
    push_store(folder, NAME)
    store = EmbeddingStore.open(ADDRESS)
    copy = store.place.path("shard-00001.safetensors", "")
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    assert torch.equal(store.tensor(), EMBEDS)
    changed = {**files(hub), "shard-00001.safetensors": b"damaged"}
    commit = hub.repositories[PAGE].commit(changed)
    with pytest.raises(
        ValueError, match=rf"{commit}/shard-00001\.safetensors does not have the sha256 .* another rev"
    ):
        EmbeddingStore.open(ADDRESS).tensor()
    del changed["shard-00001.safetensors"]
    hub.repositories[PAGE].commit(changed)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors cannot be read \(there is no hf://"):
        EmbeddingStore.open(ADDRESS).tensor()


def test_a_data_set_that_is_absent_gated_or_no_store_is_named(hub, folder, monkeypatch):
    with pytest.raises(OSError, match=rf"There is no {PAGE} that your token may see \(404\)"):
        EmbeddingStore.open(ADDRESS)
    push_store(folder, NAME)
    with pytest.raises(OSError, match=rf"{PAGE} has no such branch"):
        EmbeddingStore.open(f"{ADDRESS}@nowhere")
    with pytest.raises(ValueError, match=rf"{NAME}@\w+/nowhere has no manifest\.json, expected a folder"):
        EmbeddingStore.open(f"{ADDRESS}/nowhere")
    hub.repositories[PAGE].gated = True
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(OSError, match=rf"{PAGE} is gated, and not for you\. Ask for access at {hub.url}/{PAGE}"):
        EmbeddingStore.open(ADDRESS)


def test_keys_on_the_hub_are_a_table_of_one_column(hub, folder):
    push_store(folder, NAME)
    path = EmbeddingStore.open(ADDRESS).place.path("shard-00000.keys.parquet", "")
    assert parquet.read_table(path).to_pydict() == {"key": KEYS[:3]}
