"""Stores behind addresses: in the memory of this process, and in S3 as a local server speaks it."""

import os
import re
import socket

import fsspec
import pytest
import torch
import torch.nn.functional as F

from cmcr_hf.training.manifest import MANIFEST
from cmcr_hf.training.places import LocalPlace, RemotePlace, place
from cmcr_hf.training.store import EmbeddingStore

EMBEDS = F.normalize(torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), dim=1)
KEYS = [f"bild_{row}_ü.jpg" for row in range(7)]
DESCRIPTION = {
    "space": "clip",
    "modality": "image",
    "source": {"id": "a", "revision": "b", "config_hash": "c"},
    "dim": 4,
    "data_fingerprint": "d",
    "shard_rows": 3,
}


def write_store(folder, stop=7):
    store = EmbeddingStore.create(folder, **DESCRIPTION)
    store.append(EMBEDS[store.rows : stop], KEYS[store.rows : stop])
    return store


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cmcr_hf" / "stores"


@pytest.fixture(scope="module")
def s3():
    """A bucket of a server on this machine; what the clients are told of it ends with the module."""
    pytest.importorskip("s3fs", reason="needs s3fs: the extra test-s3")
    server_module = pytest.importorskip("moto.server", reason="needs moto: the extra test-s3")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    told = {
        "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(params=["memory", "s3"])
def address(request):
    root = request.getfixturevalue("s3") if request.param == "s3" else "memory://"
    return f"{root}/{re.sub(r'[^a-z]', '-', request.node.name)}"


def test_a_path_is_a_folder_and_an_address_is_none(tmp_path):
    assert place(tmp_path).folder == tmp_path
    assert place(f"file://{tmp_path}").folder == tmp_path
    assert isinstance(place("memory://store"), RemotePlace)
    assert isinstance(place("store"), LocalPlace)


def test_a_finished_store_keeps_no_leftovers_but_those_of_processes_that_may_still_write(tmp_path):
    host = socket.gethostname()
    old, new, alive = ".shard-00000.json.elsewhere.7.tmp", ".shard-00000.json.elsewhere.8.tmp", os.getppid()
    names = [f".manifest.json.{host}.{os.getpid()}.tmp", f".manifest.json.{host}.{alive}.tmp", old, new, ".odd.tmp"]
    write_store(tmp_path, stop=3)
    for name in names:
        (tmp_path / name).write_bytes(b"torn")
    os.utime(tmp_path / old, (0, 0))
    write_store(tmp_path).finish()
    assert [name for name in names if (tmp_path / name).exists()] == [names[1], new]


def test_an_address_of_no_file_system_is_named():
    with pytest.raises(ValueError, match=r"Cannot open nowhere://store: .*nowhere"):
        place("nowhere://store")


def test_a_store_behind_an_address_is_that_of_a_folder(address, tmp_path):
    write_store(address).finish()
    write_store(tmp_path / "store").finish()
    there = fsspec.url_to_fs(address)
    names = {path.name for path in (tmp_path / "store").iterdir()} - {".lock"}
    assert {name.rsplit("/", 1)[-1] for name in there[0].ls(there[1], detail=False)} == names
    for name in names:
        assert there[0].cat_file(f"{there[1]}/{name}") == (tmp_path / "store" / name).read_bytes()
    store = EmbeddingStore.open(address)
    assert torch.equal(store.tensor(), EMBEDS)
    assert store.keys() == KEYS
    assert store.folder == address
    assert store.digest == EmbeddingStore.open(tmp_path / "store").digest


def test_a_run_goes_on_behind_its_last_shard(address, tmp_path):
    write_store(address, stop=5)
    store = EmbeddingStore.create(address, **DESCRIPTION)
    assert (store.rows, store.complete) == (3, False)
    with pytest.raises(ValueError, match="incomplete, it holds 3 rows so far"):
        EmbeddingStore.open(address)
    write_store(address).finish()
    assert torch.equal(EmbeddingStore.open(address).tensor(), EMBEDS)


def test_a_store_of_another_description_and_other_files_are_left_alone(address):
    write_store(address).finish()
    with pytest.raises(ValueError, match="holds other embeddings: dim is 4 there and 5 here"):
        EmbeddingStore.create(address, **{**DESCRIPTION, "dim": 5})
    files, base = fsspec.url_to_fs(f"{address}-thesis")
    files.pipe_file(f"{base}/thesis.txt", b"precious")
    with pytest.raises(ValueError, match=r"is not empty and has no manifest\.json"):
        EmbeddingStore.create(f"{address}-thesis", **DESCRIPTION)


def test_what_is_read_is_fetched_once_and_mapped_from_the_cache(address, cache, monkeypatch):
    write_store(address).finish()
    store = EmbeddingStore.open(address)
    assert not cache.exists()
    assert torch.equal(store.tensor(), EMBEDS)
    assert len(list(cache.rglob("*.safetensors"))) == 3
    again = EmbeddingStore.open(address)
    monkeypatch.setattr(again.place._files, "get_file", lambda *names: pytest.fail(f"{names} is fetched again"))
    assert torch.equal(again.tensor(), EMBEDS)


@pytest.mark.parametrize("damage", ["there", "cache"])
def test_what_was_damaged_is_not_read(address, cache, damage):
    write_store(address).finish()
    if damage == "there":
        files, base = fsspec.url_to_fs(address)
        files.pipe_file(f"{base}/shard-00001.safetensors", files.cat_file(f"{base}/shard-00000.safetensors"))
        with pytest.raises(ValueError, match=r"shard-00001\.safetensors does not have the sha256 of the manifest"):
            EmbeddingStore.open(address).tensor()
        assert len(list(cache.rglob("*.safetensors"))) == 1
        return
    EmbeddingStore.open(address).tensor()
    for copy in cache.rglob("*.safetensors"):
        copy.write_bytes(copy.read_bytes()[:-1])
    # A copy is only a copy: it is fetched anew.
    assert torch.equal(EmbeddingStore.open(address).tensor(), EMBEDS)


def test_a_manifest_names_no_file_outside(address, cache):
    write_store(address).finish()
    files, base = fsspec.url_to_fs(address)
    content = files.cat_file(f"{base}/{MANIFEST}").decode()
    digest = EmbeddingStore.open(address)._shards[0].sha256
    files.pipe_file(f"{base}/{MANIFEST}", content.replace(digest, "../../../secret").encode())
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .*has the sha256 '../../../secret'"):
        EmbeddingStore.open(address)


def test_a_shard_that_is_gone_is_named(address):
    write_store(address).finish()
    files, base = fsspec.url_to_fs(address)
    files.rm_file(f"{base}/shard-00001.keys.parquet")
    with pytest.raises(ValueError, match=r"shard-00001\.keys\.parquet is missing"):
        EmbeddingStore.open(address)


def test_an_address_without_a_store_is_named(address):
    with pytest.raises(ValueError, match=rf"{address} has no manifest\.json, expected a folder of embeddings"):
        EmbeddingStore.open(address)


def test_a_server_that_is_not_there_is_named(s3):
    files = fsspec.filesystem(
        "s3",
        endpoint_url="http://127.0.0.1:9",
        config_kwargs={"retries": {"max_attempts": 0}, "connect_timeout": 1},
        skip_instance_cache=True,
    )
    there = place("s3://bucket/store")
    there._files = files
    with pytest.raises(
        OSError, match=r"Cannot reach s3://bucket/store: .*Check the address, the access and the network"
    ):
        there.names()


def test_a_folder_of_files_in_a_bucket_is_embedded_into_a_store_there(s3, tiny_clip, tmp_path):
    from PIL import Image

    from cmcr_hf.cli import main

    files = fsspec.filesystem("s3")
    for row in range(5):
        Image.new("RGB", (20, 30), (40 * row, 0, 90)).save(tmp_path / f"{row}.png")
        files.pipe_file(
            f"bucket/photos/{row}.png", (tmp_path / f"{row}.png").read_bytes() if row != 2 else b"no image"
        )
    command = ["embed", "--source", str(tiny_clip), "--space", "clip", "--modality", "image", "--device", "cpu"]
    assert main([*command, "--data", f"{s3}/photos", "--output", f"{s3}/stores/photos"]) == 0
    there = EmbeddingStore.open(f"{s3}/stores/photos")
    assert there.keys() == ["0.png", "1.png", "3.png", "4.png"]
    assert b"s3://bucket/photos/2.png" in there.place.read("rejects.jsonl")
    (tmp_path / "2.png").unlink()
    assert main([*command, "--data", str(tmp_path), "--output", str(tmp_path / "store")]) == 0
    torch.testing.assert_close(there.tensor(), EmbeddingStore.open(tmp_path / "store").tensor(), atol=1e-6, rtol=0)
