import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from cmcr_hf import CMCRModel, CMCRProcessor
from cmcr_hf.durable import WriteError
from cmcr_hf.output import save, write_cards


@pytest.fixture(scope="module")
def parts(tiny_model):
    """A random model and its processor."""
    return CMCRModel.from_pretrained(tiny_model), CMCRProcessor.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "run"
    folder.mkdir()
    assert save(*parts, folder) is False
    write_cards(folder, "the card", print)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_weights_can_be_read_by_whom_the_configuration_can(saved):
    modes = [(saved / "model" / name).stat().st_mode for name in ("model.safetensors", "config.json")]
    assert modes[0] == modes[1]


def test_a_full_disk_leaves_the_saved_folders_and_nothing_half_written(parts, copy, monkeypatch):
    (copy / "model" / "config.json").unlink()
    before = content(copy)

    def fill_disk(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(parts[1]), "save_pretrained", fill_disk)
    with pytest.raises(WriteError, match="No space left on device"):
        save(*parts, copy)
    after = content(copy)
    # Which says meanwhile that a run saved the folders.
    assert before.pop("saved.json") != after.pop("saved.json")
    assert after == before
    assert sorted(path.name for path in copy.iterdir()) == ["connector", "model", "saved.json"]


class Killed(BaseException):
    """Stand for the end of a process: nothing in the library catches it."""


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kill_at", range(4))
def test_what_others_put_into_a_saved_folder_outlives_a_kill_between_the_renames(
    parts, saved, copy, monkeypatch, kill_at, before
):
    (copy / "model" / "notes.txt").write_text("mine")
    (copy / "connector" / "README.md").write_text("my card")
    (copy / "model" / "config.json").unlink()
    rename, renames = os.rename, []

    def renaming(*paths):
        renames.append(paths)
        if len(renames) - 1 == kill_at and before:
            raise Killed
        rename(*paths)
        if len(renames) - 1 == kill_at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", renaming)
        with pytest.raises(Killed):
            save(*parts, copy)
    save(*parts, copy)
    lines = []
    write_cards(copy, "the card", lines.append)
    found = content(copy)
    assert found.pop("model/notes.txt") == b"mine"
    assert found.pop("connector/README.md") == b"my card"
    assert lines == [f"card: kept the edited {copy / 'connector' / 'README.md'}"]
    expected = content(saved)
    del expected["connector/README.md"]
    # The record does not know the edited card for one of ours.
    record, whole = json.loads(found.pop("saved.json")), json.loads(expected.pop("saved.json"))
    assert record["files"] == whole["files"]
    assert found == expected
