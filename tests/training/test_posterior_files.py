import json

import pytest
import torch
import torch.nn.functional as F

from cmcr_hf.durable import WriteError
from cmcr_hf.training import posterior_files as module
from cmcr_hf.training.posterior_files import stored_posteriors
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
    assert json.loads((tmp_path / "a" / "record.json").read_text())["rows"] == 8
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


@pytest.mark.parametrize("damage", ["record", "shape", "short", "missing"])
def test_what_is_damaged_is_computed_anew(tmp_path, computed, damage):
    stored(tmp_path / "a")
    path = tmp_path / "a" / ("weights" if damage in ("short", "missing") else "record.json")
    if damage == "missing":
        path.unlink()
    elif damage == "shape":
        path.write_text("[1]")
    else:
        path.write_bytes(path.read_bytes()[:-5])
    computed.clear()
    assert_equal(stored(tmp_path / "a"), expected())
    assert sum(computed) == 23


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module._Writer, "append", full)
    with pytest.raises(WriteError, match=f"Cannot write to {tmp_path / 'a'}: No space left on device. Free space"):
        stored(tmp_path / "a")
