import errno
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from cmcr_hf.durable import locked
from cmcr_hf.training.manifest import shard_names
from cmcr_hf.training.store import EmbeddingStore

ROWS, DIM, SHARD_ROWS = 7, 4, 3
EMBEDS = F.normalize(torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0)), dim=1)
KEYS = [f"folder/bild_{row}_ü.jpg" for row in range(ROWS)]
SOURCE = {"id": "openai/clip-vit-base-patch32", "revision": "abc", "config_hash": "def"}
DESCRIPTION: dict[str, Any] = {
    "space": "clip",
    "modality": "image",
    "source": SOURCE,
    "dim": DIM,
    "data_fingerprint": "fingerprint",
    "shard_rows": SHARD_ROWS,
}
FILES = [
    ".lock",
    "manifest.json",
    *(f"shard-0000{i}.{ending}" for i in range(3) for ending in ("keys.parquet", "safetensors")),
]


def write_store(folder: Path, batch: int = 2, **changes: Any) -> EmbeddingStore:
    """Embed the rows that are missing, as a run does that does not know whether it was killed before."""
    store = EmbeddingStore.create(folder, **{**DESCRIPTION, **changes})
    for start in range(store.rows, ROWS, batch):
        store.append(EMBEDS[start : start + batch], KEYS[start : start + batch])
    store.finish()
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a complete store of three shards."""
    write_store(tmp_path / "store")
    return tmp_path / "store"


def test_rows_and_keys_come_back_in_order(folder: Path) -> None:
    store = EmbeddingStore.open(folder)
    assert torch.equal(store.tensor(), EMBEDS)
    assert store.keys() == KEYS
    assert [len(shard) for shard in store.shards()] == [3, 3, 1]
    assert torch.equal(torch.cat(list(store.shards())), EMBEDS)


def test_opened_store_knows_its_description(folder: Path) -> None:
    store = EmbeddingStore.open(folder)
    assert (store.space, store.modality, store.source) == ("clip", "image", SOURCE)
    assert (store.dim, store.dtype, store.shard_rows, store.data_fingerprint) == (4, "float32", 3, "fingerprint")
    assert (store.rows, store.complete) == (7, True)


def test_files_are_readable_without_this_class(folder: Path) -> None:
    import pyarrow.parquet as pq

    assert sorted(contents(folder)) == FILES
    assert torch.equal(load_file(folder / "shard-00001.safetensors")["embeds"], EMBEDS[3:6])
    assert pq.read_table(folder / "shard-00001.keys.parquet").to_pydict() == {"key": KEYS[3:6]}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format_version"], manifest["complete"], manifest["rows"]) == (2, True, 7)
    assert [shard["rows"] for shard in manifest["shards"]] == [3, 3, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_stores_hold_the_rounded_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    write_store(tmp_path, dtype=name)
    assert EmbeddingStore.open(tmp_path).dtype == name
    assert torch.equal(EmbeddingStore.open(tmp_path).tensor(), EMBEDS.to(dtype))


def test_rows_are_counted_when_their_shard_is_written(tmp_path: Path) -> None:
    store = EmbeddingStore.create(tmp_path, **DESCRIPTION)
    store.append(EMBEDS[:2], KEYS[:2])
    assert store.rows == 0
    store.append(EMBEDS[2:], KEYS[2:])
    assert store.rows == 6
    assert not store.complete
    store.finish()
    assert store.rows == 7
    assert store.complete


def test_rows_given_to_append_may_be_overwritten_afterwards(tmp_path: Path) -> None:
    store = EmbeddingStore.create(tmp_path, **DESCRIPTION)
    batch = EMBEDS[:2].clone()
    store.append(batch, KEYS[:2])
    batch.zero_()
    store.finish()
    assert torch.equal(store.tensor(), EMBEDS[:2])


@pytest.mark.parametrize("batch", [1, 3, 5, 7])
def test_files_do_not_depend_on_the_batches(folder: Path, tmp_path: Path, batch: int) -> None:
    write_store(tmp_path / "other", batch=batch)
    assert contents(tmp_path / "other") == contents(folder)


def test_files_do_not_depend_on_the_order_of_the_source_fields(folder: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "other", source=dict(reversed(SOURCE.items())))
    assert contents(tmp_path / "other") == contents(folder)


class Killed(BaseException):
    """Stand for the end of a process: nothing in the library catches it."""


class WriteSteps:
    """Count the calls of os.fsync and os.replace, and kill the run before or after one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kill_at: int, before: bool) -> None:
        self.names: list[str] = []
        self.kill_at = kill_at
        self.before = before
        self.replace = os.replace
        monkeypatch.setattr(os, "fsync", self.on_fsync)
        monkeypatch.setattr(os, "replace", self.on_replace)

    def step(self, name: str, act: Callable[[], object], tear: Callable[[], object] = lambda: None) -> None:
        self.names.append(name)
        killed = len(self.names) - 1 == self.kill_at
        if killed and self.before:
            tear()
            raise Killed
        act()
        if killed:
            raise Killed

    def on_fsync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self.step("sync folder", lambda: None)
        else:
            # What is not synced yet may reach the disk in part.
            self.step("sync file", lambda: None, lambda: os.truncate(descriptor, status.st_size // 2))

    def on_replace(self, source: Path, target: Path) -> None:
        self.step("rename", lambda: self.replace(source, target))


STEPS = 33  # three for each of two manifests and, of three shards each, embeddings, keys and receipts


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kill_at", range(STEPS))
def test_run_killed_at_any_step_resumes_and_ends_byte_identical(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int, before: bool
) -> None:
    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        WriteSteps(patch, kill_at, before)
        with pytest.raises(Killed):
            write_store(killed)
    write_store(killed, batch=5)
    assert contents(killed) == contents(folder)


def test_run_killed_again_and_again_ends_byte_identical(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "killed"
    kills = 0
    while True:
        with monkeypatch.context() as patch:
            WriteSteps(patch, kill_at=9, before=False)
            try:
                write_store(killed)
                break
            except Killed:
                kills += 1
    assert kills > 1
    assert contents(killed) == contents(folder)


def test_every_file_is_synced_before_and_its_folder_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = WriteSteps(monkeypatch, kill_at=-1, before=False)
    write_store(tmp_path)
    assert steps.names == ["sync file", "rename", "sync folder"] * 11
    assert len(steps.names) == STEPS


def test_rows_of_a_failed_write_wait_for_the_next_append(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EmbeddingStore.create(tmp_path / "other", **DESCRIPTION)
    with monkeypatch.context() as patch:
        WriteSteps(patch, kill_at=4, before=True)
        with pytest.raises(Killed):
            store.append(EMBEDS[:4], KEYS[:4])
    store.append(EMBEDS[4:], KEYS[4:])
    store.finish()
    assert contents(tmp_path / "other") == contents(folder)


def test_leftover_temporary_files_are_removed(folder: Path, tmp_path: Path) -> None:
    other = EmbeddingStore.create(tmp_path / "other", **DESCRIPTION)
    for name in (".shard-00002.safetensors.tmp", ".shard-00002.keys.parquet.tmp", ".manifest.json.tmp"):
        (other.folder / name).write_bytes(b"torn")
    write_store(other.folder)
    assert contents(other.folder) == contents(folder)


def test_complete_store_is_left_as_it_is_by_another_run(folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    store = write_store(folder)
    assert (store.complete, store.rows) == (True, 7)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": "clap"}, "space is 'clip' there and 'clap' here"),
        ({"modality": "text"}, "modality is 'image' there and 'text' here"),
        ({"source": {**SOURCE, "revision": "xyz"}}, "'revision': 'xyz'"),
        ({"dim": 5, "dtype": "float16"}, "dim is 4 there and 5 here; dtype is 'float32' there and 'float16' here"),
        (
            {"data_fingerprint": "other"},
            r"the items have changed since \(.*data_fingerprint 'fingerprint' there and 'other' here\)",
        ),
        (
            {"data_fingerprint": "other", "dim": 5},
            "dim is 4 there and 5 here; data_fingerprint is 'fingerprint' there and 'other' here",
        ),
        ({"shard_rows": 4}, "shard_rows is 3 there and 4 here"),
    ],
)
def test_store_of_another_description_is_an_error_and_untouched(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    (folder / ".manifest.json.tmp").write_bytes(b"torn")
    before = contents(folder)
    with pytest.raises(ValueError, match=f"store holds other embeddings.*{message}.*delete this one"):
        EmbeddingStore.create(folder, **{**DESCRIPTION, **changes})
    assert contents(folder) == before


def test_hashes_are_cut_to_twelve_digits_in_a_refusal(tmp_path: Path) -> None:
    write_store(tmp_path, data_fingerprint="0123456789ab" + "c" * 52)
    with pytest.raises(ValueError, match="data_fingerprint '0123456789ab' there and 'ffffffffffff' here"):
        write_store(tmp_path, data_fingerprint="f" * 64)


def test_store_of_another_description_without_a_shard_is_replaced(folder: Path, tmp_path: Path) -> None:
    EmbeddingStore.create(tmp_path / "other", **{**DESCRIPTION, "data_fingerprint": "before"})
    (tmp_path / "other" / ".shard-00000.safetensors.tmp").write_bytes(b"torn")
    write_store(tmp_path / "other")
    assert contents(tmp_path / "other") == contents(folder)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "No space left on device. Free space and run again"),
        (errno.EROFS, "Read-only file system. Make it writable or use another folder"),
    ],
)
def test_disk_that_cannot_be_written_is_named_and_nothing_is_lost(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    store = EmbeddingStore.create(tmp_path / "other", **DESCRIPTION)
    store.append(EMBEDS[:3], KEYS[:3])

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=f"Cannot write to {tmp_path / 'other'}: {remedy}"):
            store.append(EMBEDS[3:], KEYS[3:])
    write_store(tmp_path / "other")
    assert contents(tmp_path / "other") == contents(folder)


def test_read_only_disk_is_named_before_a_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(OSError, match=r"Cannot write to .*store: Read-only file system"):
        EmbeddingStore.create(tmp_path / "store", **DESCRIPTION)


def test_other_write_errors_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error$"):
        EmbeddingStore.create(tmp_path / "store", **DESCRIPTION)


def test_folder_of_other_files_is_an_error_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"not empty and has no manifest\.json"):
        EmbeddingStore.create(tmp_path, **DESCRIPTION)
    assert contents(tmp_path) == {"thesis.txt": b"precious"}


def test_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(ValueError, match="store is a file"):
        EmbeddingStore.create(tmp_path / "store", **DESCRIPTION)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": ""}, "space is ''"),
        ({"dim": 0}, "dim is 0"),
        ({"shard_rows": True}, "shard_rows is True"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of float32, float16, bfloat16"),
        ({"source": {"id": "a"}}, "expected the strings id, revision, config_hash"),
        ({"source": {**SOURCE, "revision": None}}, "expected the strings id, revision, config_hash"),
    ],
)
def test_wrong_description_is_an_error_and_creates_nothing(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingStore.create(tmp_path / "store", **{**DESCRIPTION, **changes})
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (torch.tensor([1.001, 0.0, 0.0, 0.0]), "1 of 2 .* row 1 of norm 1.001 .*bild_1"),
        (torch.zeros(DIM), "norm 0 "),
        (torch.tensor([float("nan"), 0.0, 0.0, 0.0]), "norm nan"),
        (torch.tensor([float("inf"), 0.0, 0.0, 0.0]), "norm inf"),
    ],
)
def test_rows_that_are_no_unit_vectors_are_refused_whole(tmp_path: Path, row: torch.Tensor, message: str) -> None:
    store = EmbeddingStore.create(tmp_path, **DESCRIPTION)
    with pytest.raises(ValueError, match=message):
        store.append(torch.stack([EMBEDS[0], row]), KEYS[:2])
    store.append(EMBEDS[1:2], KEYS[1:2])
    store.finish()
    assert store.keys() == KEYS[1:2]


@pytest.mark.parametrize(("dtype", "norm"), [("float32", 1.00005), ("float16", 1.001), ("bfloat16", 1.01)])
def test_norm_may_be_off_by_the_rounding_of_the_dtype(tmp_path: Path, dtype: str, norm: float) -> None:
    store = EmbeddingStore.create(tmp_path, **{**DESCRIPTION, "dtype": dtype})
    row = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    store.append(row * norm, ["inside"])
    with pytest.raises(ValueError, match="unit vectors"):
        store.append(row * (1 + 4 * (norm - 1)), ["outside"])


def test_embeddings_normalised_in_half_precision_fit_a_store_of_that_dtype(tmp_path: Path) -> None:
    rows = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        store = EmbeddingStore.create(tmp_path / name, **{**DESCRIPTION, "dim": 512, "dtype": name})
        embeds = F.normalize(rows.to(dtype), dim=1)
        store.append(embeds, [str(row) for row in range(200)])
        store.finish()
        assert torch.equal(store.tensor(), embeds)


@pytest.mark.parametrize("shape", [(2, 5), (4,), (1, 2, 4)])
def test_embeds_of_another_shape_are_an_error(tmp_path: Path, shape: tuple[int, ...]) -> None:
    store = EmbeddingStore.create(tmp_path, **DESCRIPTION)
    with pytest.raises(ValueError, match=r"expected \(n, 4\)"):
        store.append(torch.ones(shape), KEYS[:2])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["a"], "Got 1 keys for 2 embeddings"),
        (["a", 7], "Key 7 is a int, expected a string"),
        (["a", "b\udcff"], "is not valid Unicode"),
    ],
)
def test_wrong_keys_are_an_error(tmp_path: Path, keys: list[Any], message: str) -> None:
    store = EmbeddingStore.create(tmp_path, **DESCRIPTION)
    with pytest.raises(ValueError, match=message):
        store.append(EMBEDS[:2], keys)


def test_appending_to_a_complete_store_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="complete with 7 rows"):
        write_store(folder).append(EMBEDS[:1], KEYS[:1])


def test_finishing_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no rows"):
        EmbeddingStore.create(tmp_path, **DESCRIPTION).finish()


def test_last_shard_may_be_full(tmp_path: Path) -> None:
    store = EmbeddingStore.create(tmp_path, **DESCRIPTION)
    store.append(EMBEDS[:6], KEYS[:6])
    store.finish()
    assert [len(shard) for shard in EmbeddingStore.open(tmp_path).shards()] == [3, 3]


def test_opening_what_is_no_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent has no manifest\.json"):
        EmbeddingStore.open(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        EmbeddingStore.open(tmp_path)


def test_opening_an_incomplete_store_is_an_error(tmp_path: Path) -> None:
    EmbeddingStore.create(tmp_path, **DESCRIPTION).append(EMBEDS[:4], KEYS[:4])
    with pytest.raises(ValueError, match="incomplete, it holds 3 rows"):
        EmbeddingStore.open(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("enter", [EmbeddingStore.open, write_store])
def test_truncated_manifest_is_an_error(folder: Path, kept: float, enter: Callable[[Path], object]) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: int(kept * len(text))])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .*delete"):
        enter(folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest.pop("dim"),
        lambda manifest: manifest.update(dim="4"),
        lambda manifest: manifest.update(complete=1),
        lambda manifest: manifest.update(rows=8),
        lambda manifest: manifest.update(shards=[], rows=0),
        lambda manifest: manifest.update(complete=False),
        lambda manifest: manifest["shards"][0].update(rows=2),
        lambda manifest: manifest["shards"][2].update(rows=4),
        lambda manifest: manifest["shards"][2].update(rows="1"),
        lambda manifest: manifest["shards"][0].pop("sha256"),
        lambda manifest: manifest["shards"][0].update(file="../secret.safetensors"),
        lambda manifest: manifest["shards"].reverse(),
        lambda manifest: manifest.update(shards=["shard-00000"]),
    ],
)
def test_contradictory_manifest_is_an_error(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    edit_manifest(folder, edit)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        EmbeddingStore.open(folder)


def test_manifest_of_another_format_version_is_an_error(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(format_version=1))
    with pytest.raises(ValueError, match="format_version 1, expected 2"):
        EmbeddingStore.open(folder)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00001.keys.parquet"])
@pytest.mark.parametrize("enter", [EmbeddingStore.open, write_store])
def test_missing_file_is_named_when_opening(folder: Path, name: str, enter: Callable[[Path], object]) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} .*delete"):
        enter(folder)


def test_truncated_shard_is_named_when_opening(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors cannot be read"):
        EmbeddingStore.open(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"embeds": EMBEDS[:2]}, r"holds F32 \[2, 4\], expected F32 \[3, 4\]"),
        ({"embeds": EMBEDS[:4].T.contiguous()[:3, :3]}, r"holds F32 \[3, 3\], expected F32 \[3, 4\]"),
        ({"embeds": EMBEDS[:3].half()}, r"holds F16 \[3, 4\], expected F32 \[3, 4\]"),
        ({"other": EMBEDS[:3]}, "cannot be read"),
    ],
)
def test_shard_that_disagrees_with_the_manifest_is_named_when_opening(
    folder: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "shard-00000.safetensors")
    with pytest.raises(ValueError, match=rf"shard-00000\.safetensors {message}"):
        EmbeddingStore.open(folder)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00001.keys.parquet"])
def test_verify_names_the_file_with_a_flipped_bit(folder: Path, name: str) -> None:
    EmbeddingStore.open(folder).verify()
    flip_a_bit(folder / name)
    store = EmbeddingStore.open(folder)
    with pytest.raises(ValueError, match=f"{name} does not have the sha256 of the manifest: delete"):
        store.verify()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20 if path.suffix == ".safetensors" else 20] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: path.write_bytes(b"PAR1"), lambda path: swap(path)])
def test_damaged_keys_are_named_when_they_are_read(folder: Path, damage: Callable[[Path], object]) -> None:
    damage(folder / "shard-00001.keys.parquet")
    store = EmbeddingStore.open(folder)
    assert torch.equal(store.tensor(), EMBEDS)
    with pytest.raises(
        ValueError, match=r"shard-0000.\.keys\.parquet does not have the sha256 of the manifest: delete"
    ):
        store.keys()


def swap(path: Path) -> None:
    """Swap the second file of a kind with the first."""
    first = path.with_name(path.name.replace("1", "0"))
    content = first.read_bytes()
    first.write_bytes(path.read_bytes())
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_a_bit, swap])
@pytest.mark.parametrize("read", [EmbeddingStore.tensor, lambda store: list(store.shards())])
def test_a_damaged_shard_is_named_when_it_is_read(
    folder: Path, damage: Callable[[Path], object], read: Callable[[EmbeddingStore], object]
) -> None:
    damage(folder / "shard-00001.safetensors")
    store = EmbeddingStore.open(folder)
    assert store.keys() == KEYS
    with pytest.raises(ValueError, match=r"shard-0000.\.safetensors does not have the sha256 of the manifest: delete"):
        read(store)


def test_a_run_does_not_go_on_from_a_damaged_shard(tmp_path: Path) -> None:
    EmbeddingStore.create(tmp_path, **DESCRIPTION).append(EMBEDS[:4], KEYS[:4])
    flip_a_bit(tmp_path / "shard-00000.safetensors")
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors does not have the sha256"):
        EmbeddingStore.create(tmp_path, **DESCRIPTION)


def test_what_is_read_again_is_not_hashed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EmbeddingStore.open(folder)
    first = store.tensor()
    monkeypatch.setattr("cmcr_hf.training.places.sha256", lambda path: pytest.fail(f"{path} is hashed again"))
    assert torch.equal(store.tensor(), first)


def test_a_second_writer_is_refused_and_the_first_goes_on(folder: Path, tmp_path: Path) -> None:
    first, second = (EmbeddingStore.create(tmp_path / "other", **DESCRIPTION) for _ in range(2))
    first.append(EMBEDS[:4], KEYS[:4])
    with pytest.raises(ValueError, match=r"other was changed by another process since this one opened it\. Let one"):
        second.append(EMBEDS[:4], KEYS[:4])
    first.append(EMBEDS[4:], KEYS[4:])
    first.finish()
    assert contents(tmp_path / "other") == contents(folder)


def test_a_writer_is_refused_while_another_process_writes(tmp_path: Path) -> None:
    store = EmbeddingStore.create(tmp_path, **DESCRIPTION)
    with locked(tmp_path), pytest.raises(ValueError, match=f"another run is using {tmp_path}"):
        store.append(EMBEDS[:4], KEYS[:4])
    store.append(EMBEDS[4:], KEYS[4:])
    store.finish()
    assert torch.equal(EmbeddingStore.open(tmp_path).tensor(), EMBEDS)


def test_a_run_does_not_write_into_the_store_of_another_that_took_its_folder(tmp_path: Path) -> None:
    first = EmbeddingStore.create(tmp_path, **DESCRIPTION)
    second = EmbeddingStore.create(tmp_path, **{**DESCRIPTION, "data_fingerprint": "other"})
    second.append(EMBEDS[:2], KEYS[:2])
    second.finish()
    before = contents(tmp_path)
    for act in (
        lambda: first.write((0,), EMBEDS[:2], KEYS[:2]),
        lambda: first.complete_if_whole(1),
        lambda: first.append(EMBEDS[:4], KEYS[:4]),
    ):
        with pytest.raises(ValueError, match="was changed by another process since this one opened it"):
            act()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", [(7,), (1, 0), (0, 5)])
def test_a_receipt_that_is_damaged_or_of_another_shard_is_as_none(tmp_path: Path, number: tuple[int, ...]) -> None:
    store = EmbeddingStore.create(tmp_path, **DESCRIPTION)
    for part in range(2):
        store.write((part,), EMBEDS[3 * part : 3 * part + 3], KEYS[3 * part : 3 * part + 3])
    content = (tmp_path / "shard-00001.json").read_bytes()
    (tmp_path / "shard-00001.json").write_bytes(content[:20])
    (tmp_path / shard_names(number)[2]).write_bytes(content)
    assert [receipt.number for receipt in store.receipts()] == [(0,)]
    assert not store.complete_if_whole(2)
    store.write((1,), EMBEDS[3:6], KEYS[3:6])
    assert store.complete_if_whole(2)
    assert torch.equal(EmbeddingStore.open(tmp_path).tensor(), EMBEDS[:6])


def test_a_store_that_was_deleted_under_its_writer_is_named(tmp_path: Path) -> None:
    store = EmbeddingStore.create(tmp_path / "store", **DESCRIPTION)
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(ValueError, match="store was changed by another process"):
        store.append(EMBEDS[:4], KEYS[:4])


def test_a_complete_store_is_read_where_nothing_can_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmcr_hf.training.places.locked", lambda folder: pytest.fail("A reader takes no lock."))
    assert torch.equal(write_store(folder).tensor(), EMBEDS)


def test_digest_depends_on_embeddings_and_keys_alone(folder: Path, tmp_path: Path) -> None:
    digest = EmbeddingStore.open(folder).digest
    assert len(digest) == 64
    assert write_store(tmp_path / "same", space="clap").digest == digest
    other = EmbeddingStore.create(tmp_path / "other", **DESCRIPTION)
    other.append(EMBEDS, [*KEYS[:-1], "other"])
    other.finish()
    assert other.digest != digest


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the memory map of the process from /proc")
def test_single_shard_is_memory_mapped_without_a_copy(tmp_path: Path) -> None:
    write_store(tmp_path, shard_rows=ROWS)
    embeds = EmbeddingStore.open(tmp_path).tensor()
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= embeds.data_ptr() < end:
            mapped.append(line.split()[-1])
    assert mapped == [str(tmp_path / "shard-00000.safetensors")]
    assert torch.equal(embeds, EMBEDS)


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    write_store(tmp_path, shard_rows=ROWS)
    EmbeddingStore.open(tmp_path).tensor().zero_()
    assert torch.equal(EmbeddingStore.open(tmp_path).tensor(), EMBEDS)


def test_missing_pyarrow_is_reported_before_anything_is_embedded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "cmcr-hf\[train\]"'):
        EmbeddingStore.create(tmp_path / "new", **DESCRIPTION)
    assert not (tmp_path / "new").exists()
    assert torch.equal(EmbeddingStore.open(folder).tensor(), EMBEDS)
