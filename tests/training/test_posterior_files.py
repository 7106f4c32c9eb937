import json

import pytest
import torch
import torch.nn.functional as F

from cmcr_hf.durable import WriteError
from cmcr_hf.training import posterior_files as module
from cmcr_hf.training.posterior_files import remove_posteriors, stored_posteriors
from cmcr_hf.training.posteriors import posteriors, top_weights


def unit_rows(rows, dim=8, seed=0):
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


ITEMS, BANK = unit_rows(23), unit_rows(40, seed=1)


def stored(folder, items=ITEMS, bank=BANK, temperature=0.1, top=6):
    return stored_posteriors(folder, items, bank, temperature=temperature, top=top, progress=False)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCKS", (4, 65536))
    monkeypatch.setattr(module, "ROWS_A_RECORD", 8)


@pytest.fixture
def computed(monkeypatch):
    """The rows of every block that is computed."""
    rows = []
    monkeypatch.setattr(
        module, "top_weights", lambda items, *rest: rows.append(len(items)) or top_weights(items, *rest)
    )
    return rows


def assert_equal(found, expected):
    for name in ("texts", "weights", "rest"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    assert found.bank == expected.bank


def expected(temperature=0.1, top=6):
    parts = [posteriors(rows, BANK, temperature=temperature, top=top) for rows in ITEMS.split(4)]
    joined = posteriors(ITEMS, BANK, temperature=temperature, top=top)
    joined.texts, joined.weights = torch.cat([p.texts for p in parts]), torch.cat([p.weights for p in parts])
    joined.rest = torch.cat([p.rest for p in parts])
    return joined


@pytest.mark.parametrize("top", [6, 100])
def test_what_is_stored_is_what_is_computed_in_memory(tmp_path, top):
    assert_equal(stored(tmp_path / "clip_image", top=top), expected(top=top))


def test_half_precision_items_are_stored_as_their_float32_posteriors(tmp_path):
    found = stored(tmp_path / "a", items=ITEMS.bfloat16(), bank=BANK.bfloat16())
    whole = posteriors(ITEMS.bfloat16(), BANK.bfloat16(), temperature=0.1, top=6)
    torch.testing.assert_close(found.weights, whole.weights)


def test_a_run_that_is_stopped_goes_on_behind_its_last_record(tmp_path, computed, monkeypatch):
    def stop_at_the_fourth(items, *rest):
        computed.append(len(items))
        if len(computed) == 4:
            raise KeyboardInterrupt
        return top_weights(items, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(module, "top_weights", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            stored(tmp_path / "a")
    # Twelve rows were written, of which the record vouches for eight.
    assert [part["rows"] for part in json.loads((tmp_path / "a.json").read_text())["parts"]] == [8]
    computed.clear()
    assert_equal(stored(tmp_path / "a"), expected())
    assert computed == [4, 4, 4, 3]
    computed.clear()
    assert_equal(stored(tmp_path / "a"), expected())
    assert not computed


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0.2}, {"top": 5}, {"items": unit_rows(23, seed=5)}, {"bank": unit_rows(40, seed=5)}],
    ids=lambda change: next(iter(change)),
)
def test_posteriors_of_something_else_are_replaced(tmp_path, computed, change):
    stored(tmp_path / "a", **change)
    computed.clear()
    assert_equal(stored(tmp_path / "a"), expected())
    assert sum(computed) == 23


def damage_record(path):
    path.with_suffix(".json").write_text('{"key"')


def damage_parts(path):
    record = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**record, "parts": [{"rows": -5}, 3]}))


def damage_keys(path):
    path.with_suffix(".json").write_text("[1]")


def cut(path):
    path.write_bytes(path.read_bytes()[:4])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [damage_record, damage_parts, damage_keys, cut, zero, remove])
@pytest.mark.parametrize("name", ["a.texts", "a.weights"])
def test_what_is_damaged_is_computed_anew(tmp_path, computed, damage, name):
    stored(tmp_path / "a")
    damage(tmp_path / name)
    computed.clear()
    assert_equal(stored(tmp_path / "a"), expected())
    assert sum(computed) == 23


def test_what_lies_before_the_damage_is_kept(tmp_path, computed):
    stored(tmp_path / "a")
    content = bytearray((tmp_path / "a.weights").read_bytes())
    content[10 * 6 * 4] ^= 1
    (tmp_path / "a.weights").write_bytes(content)
    computed.clear()
    assert_equal(stored(tmp_path / "a"), expected())
    assert sum(computed) == 23 - 8


def test_files_of_somebody_else_stay(tmp_path):
    folder = tmp_path / "posteriors"
    folder.mkdir()
    for name in ("clip_image", "clap_audio"):
        stored(folder / name)
    (folder / "notes.txt").write_text("mine")
    (folder / "notes.json").write_text("mine")
    remove_posteriors(folder)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "notes.json", "notes.txt"]
    for name in ("notes.txt", "notes.json"):
        (folder / name).unlink()
    stored(folder / "clip_image")
    remove_posteriors(folder)
    assert not folder.exists()
    remove_posteriors(folder)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module._Writer, "append", full)
    with pytest.raises(WriteError, match=f"Cannot write to {tmp_path}: No space left on device. Free space"):
        stored(tmp_path / "a")
