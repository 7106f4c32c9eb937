import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from cmcr_hf.training import posteriors as module
from cmcr_hf.training.posteriors import choose_temperatures, matches, posteriors


def unit_rows(rows, dim=8, seed=0):
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def whole(items, bank, temperature):
    return (items @ bank.T / temperature).softmax(dim=1)


def dense(part):
    return part.rest[:, None].expand(-1, part.bank).scatter(1, part.texts.long(), part.weights)


def test_the_kept_weights_are_those_of_the_softmax_over_the_whole_bank(monkeypatch):
    items, bank = unit_rows(7), unit_rows(50, seed=1)
    expected = whole(items, bank, 0.2)
    for blocks in ((256, 65536), (3, 11)):
        monkeypatch.setattr(module, "BLOCKS", blocks)
        part = posteriors(items, bank, temperature=0.2, top=6)
        largest, texts = expected.topk(6, dim=1)
        torch.testing.assert_close(part.weights, largest)
        assert torch.equal(part.texts.long(), texts)
        torch.testing.assert_close(dense(part).sum(dim=1), torch.ones(7))
        assert part.kept == pytest.approx(largest.sum(dim=1).mean().item())


def test_matches_are_exact_where_all_weights_are_kept():
    a, b = unit_rows(5), unit_rows(9, seed=1)
    bank_a, bank_b = unit_rows(30, seed=2), unit_rows(30, seed=3)
    there, back = posteriors(a, bank_a, temperature=0.1), posteriors(b, bank_b, temperature=0.2)
    assert not there.cut_off.any()
    torch.testing.assert_close(matches(there, back), whole(a, bank_a, 0.1) @ whole(b, bank_b, 0.2).T)


@pytest.mark.parametrize("top", [1, 5, 20])
def test_matches_of_cut_posteriors_err_by_no_more_than_their_cut_offs(top):
    a, b = unit_rows(5), unit_rows(9, seed=1)
    bank_a, bank_b = unit_rows(30, seed=2), unit_rows(30, seed=3)
    there, back = (posteriors(*part, temperature=0.1, top=top) for part in ((a, bank_a), (b, bank_b)))
    found = matches(there, back)
    torch.testing.assert_close(found, dense(there) @ dense(back).T)
    error = (found - whole(a, bank_a, 0.1) @ whole(b, bank_b, 0.1).T).abs()
    assert (error <= there.cut_off[:, None] + back.cut_off + 1e-7).all()
    assert error.max() > 1e-7


def test_rows_are_chosen_in_any_order_and_more_than_once():
    part = posteriors(unit_rows(6), unit_rows(20, seed=1), temperature=0.1, top=4)
    rows = torch.tensor([5, 0, 5])
    everything = matches(part, part)
    torch.testing.assert_close(matches(part[rows], part), everything[rows])


def test_the_temperatures_are_a_function_of_the_spread_and_not_of_the_scale_of_the_cosines():
    """Adding a constant direction, as the cone of CLIP does, shrinks all differences of cosines alike."""
    bank, items = unit_rows(60, seed=2), unit_rows(80, seed=3)

    def in_a_cone(rows):
        return F.normalize(torch.cat([rows, torch.full((len(rows), 1), 3.0)], dim=1), dim=1)

    plain = choose_temperatures(bank, items, bank, items)
    narrow = choose_temperatures(in_a_cone(bank), in_a_cone(items), bank, items)
    assert narrow[0] == pytest.approx(plain[0] / 10, rel=1e-3)
    assert narrow[1] == pytest.approx(plain[1], rel=1e-3)


def test_no_temperature_is_chosen_for_texts_that_are_all_the_same():
    bank, items = unit_rows(60, seed=2), unit_rows(80, seed=3)
    with pytest.raises(ValueError, match="Expected texts that items tell apart, got cosines of the spreads"):
        choose_temperatures(bank, items, bank[:1].expand(60, -1), items)


def test_the_temperatures_that_are_chosen_match_items_of_the_same_hidden_thing():
    """Two views of hidden vectors: the items of either side are others, and the texts tell what is alike."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(6, width, generator=generator) for width in (16, 12)]

    def seen(hidden, view):
        return F.normalize(hidden @ view + torch.randn(len(hidden), view.shape[1], generator=generator), dim=1)

    texts = torch.randn(300, 6, generator=generator)
    banks = [seen(texts, view) for view in views]
    memories = [seen(torch.randn(400, 6, generator=generator), view) for view in views]
    things = torch.randn(100, 6, generator=generator)
    queries = [seen(things, view) for view in views]

    def found(temperatures):
        parts = [posteriors(*part, temperature=t) for *part, t in zip(queries, banks, temperatures, strict=True)]
        scores = matches(*parts)
        return (scores > scores.diagonal()[:, None]).sum(dim=1).float().mean().item()

    chosen = choose_temperatures(banks[0], memories[0], banks[1], memories[1])
    ranks = {factor: found([factor * t for t in chosen]) for factor in (0.1, 1.0, 10.0)}
    assert ranks[1.0] < 20
    assert ranks[1.0] < min(ranks[0.1], ranks[10.0]) + 1


@pytest.mark.parametrize("texts", [200_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_bank_is_read_in_bounded_memory(texts):
    """A bank of a million texts takes no more than its weights that are kept."""
    # As for the command, whose package imports nothing that is not used.
    code = f"""
import sys
sys.argv = ["cmcr"]
import resource, torch
from cmcr_hf.training.posteriors import matches, posteriors
torch.set_num_threads(1)
bank = torch.nn.functional.normalize(torch.randn({texts}, 4), dim=1)
items = torch.nn.functional.normalize(torch.randn(600, 4), dim=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
part = posteriors(items, bank, temperature=0.1, top=64)
scores = matches(part, part)
assert scores.shape == (600, 600)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # All cosines, 600 x 200,000, would take 458 MiB, those of a million five times as much, and torch copies them.
    assert int(done.stdout) < 350, done.stdout
