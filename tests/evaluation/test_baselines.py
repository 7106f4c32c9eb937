from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import normalize

from cmcr_hf.evaluation import baselines
from cmcr_hf.evaluation.baselines import (
    baseline_scorers,
    baseline_scores,
    cca_maps,
    closed_cascade,
    derange_by_name,
    linear_map,
    one_way_bridge,
    posterior_matching,
    procrustes_map,
    ridge_map,
    two_hop_scores,
    two_way_bridge,
    unconnected,
)
from cmcr_hf.evaluation.retrieval import chance, label_retrieval

CLASSES, WIDTH = 12, 32
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Method = Callable[..., torch.Tensor]


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def rotation(width: int, seed: int) -> torch.Tensor:
    square = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    orthogonal: torch.Tensor = torch.linalg.qr(square)[0]
    return orthogonal


@pytest.fixture
def four() -> Four:
    """Audio, texts in both spaces and images: unrelated random rows of widths 10 and 14."""
    return unit(9, 10, 0), unit(50, 10, 1), unit(50, 14, 2), unit(7, 14, 3)


class World:
    """A synthetic pair of spaces: one latent space, rotated at random into each; the texts are seen in both."""

    def __init__(self, rotated: bool = True) -> None:
        generator = torch.Generator().manual_seed(4)
        centres = normalize(torch.randn(CLASSES, WIDTH, generator=generator), dim=-1)

        def rows_around_centres(count: int) -> tuple[torch.Tensor, torch.Tensor]:
            labels = torch.arange(CLASSES).repeat_interleave(count)
            noise = 0.08 * torch.randn(len(labels), WIDTH, generator=generator)
            return normalize(centres[labels] + noise, dim=-1), labels

        to_audio, to_image = (rotation(WIDTH, 5), rotation(WIDTH, 6)) if rotated else (torch.eye(WIDTH),) * 2
        audio, self.audio_labels = rows_around_centres(6)
        image, self.image_labels = rows_around_centres(15)
        texts, text_labels = rows_around_centres(20)
        self.audio, self.image = audio @ to_audio, image @ to_image
        self.text_a, self.text_b = texts @ to_audio, texts @ to_image
        self.names_a, self.names_b = centres @ to_audio, centres @ to_image
        self.text_names = [f"class {label}" for label in text_labels.tolist()]
        self.chance = chance(self.audio_labels, self.image_labels)["mAP"]

    def scores(self, text_b: torch.Tensor) -> dict[str, tuple[float, float]]:
        """mAP of every baseline, audio to image and image to audio."""
        scores = baseline_scores(self.audio, self.image, self.text_a, text_b, self.names_a, self.names_b)
        return {
            name: (
                label_retrieval(a2i, self.audio_labels, self.image_labels)["mAP"],
                label_retrieval(i2a, self.image_labels, self.audio_labels)["mAP"],
            )
            for name, (a2i, i2a) in scores.items()
        }


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def softmax64(queries: torch.Tensor, texts: torch.Tensor, temperature: float) -> torch.Tensor:
    weights = (queries.double() @ texts.double().T / temperature).exp()
    return weights / weights.sum(1, keepdim=True)


def bridge64(
    a: torch.Tensor, text_a: torch.Tensor, text_b: torch.Tensor, b: torch.Tensor, temperature: float
) -> torch.Tensor:
    carried = softmax64(a, text_a, temperature) @ text_b.double()
    return normalize(carried, dim=1) @ b.double().T


def test_unconnected_is_the_cosine() -> None:
    a, b = unit(3, 8, 0), unit(4, 8, 1)
    expected = [[sum(x * y for x, y in zip(one, other, strict=True)) for other in b.tolist()] for one in a.tolist()]
    torch.testing.assert_close(unconnected(a, b), torch.tensor(expected))


def test_unconnected_spaces_of_different_widths_are_an_error() -> None:
    with pytest.raises(ValueError, match="Got widths 8 and 9"):
        unconnected(unit(3, 8, 0), unit(4, 9, 1))


def test_one_way_bridge_matches_the_dense_reference(four: Four) -> None:
    expected = bridge64(*four, 0.05).float()
    torch.testing.assert_close(one_way_bridge(*four, temperature=0.05), expected, atol=1e-5, rtol=0)


def test_two_way_bridge_is_the_plain_mean_of_both_directions(four: Four) -> None:
    a, text_a, text_b, b = four
    expected = (bridge64(a, text_a, text_b, b, 0.05) + bridge64(b, text_b, text_a, a, 0.05).T) / 2
    torch.testing.assert_close(two_way_bridge(*four, temperature=0.05), expected.float(), atol=1e-5, rtol=0)


def test_posterior_matching_matches_the_dense_reference(four: Four) -> None:
    a, text_a, text_b, b = four
    expected = softmax64(a, text_a, 0.08) @ softmax64(b, text_b, 0.08).T
    torch.testing.assert_close(posterior_matching(*four, temperature=0.08), expected.float(), atol=1e-6, rtol=1e-4)


def test_one_text_matches_every_item_with_probability_one(four: Four) -> None:
    a, text_a, text_b, b = four
    torch.testing.assert_close(posterior_matching(a, text_a[:1], text_b[:1], b), torch.ones(9, 7))


@pytest.mark.parametrize("method", [one_way_bridge, two_way_bridge, posterior_matching])
def test_blocks_do_not_change_the_scores(method: Method, four: Four, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = method(*four, temperature=0.05)
    # 500 bytes hold two rows of 50 texts, and seven texts of 16 items.
    monkeypatch.setattr(baselines, "_BLOCK_BYTES", 500)
    torch.testing.assert_close(method(*four, temperature=0.05), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", [one_way_bridge, two_way_bridge, posterior_matching])
def test_a_low_temperature_stays_finite(method: Method, four: Four) -> None:
    scores = method(*four, temperature=1e-4)
    assert scores.isfinite().all()
    assert scores.abs().max() <= 1 + 1e-4


def test_a_low_temperature_bridge_takes_the_nearest_text(four: Four) -> None:
    torch.testing.assert_close(one_way_bridge(*four, temperature=1e-5), closed_cascade(*four), atol=1e-5, rtol=0)


def test_inputs_are_left_as_they_are(four: Four) -> None:
    before = [rows.clone() for rows in four]
    for method in (one_way_bridge, two_way_bridge, posterior_matching, closed_cascade):
        method(*four)
    assert all(torch.equal(rows, copy) for rows, copy in zip(four, before, strict=True))


def test_scores_keep_no_graph_of_inputs_that_require_gradients(four: Four) -> None:
    a, text_a, text_b, b = four
    a.requires_grad_()
    for method in (one_way_bridge, two_way_bridge, posterior_matching, closed_cascade):
        assert not method(a, text_a, text_b, b).requires_grad


def test_half_precision_is_computed_in_float32(four: Four) -> None:
    halves = [rows.bfloat16() for rows in four]
    assert torch.equal(posterior_matching(*halves), posterior_matching(*[half.float() for half in halves]))


@pytest.mark.parametrize("method", [one_way_bridge, two_way_bridge, posterior_matching])
@pytest.mark.parametrize("temperature", [0.0, -0.1, float("nan")])
def test_a_temperature_is_positive(method: Method, temperature: float, four: Four) -> None:
    with pytest.raises(ValueError, match="pass temperature= above 0"):
        method(*four, temperature=temperature)


def test_rows_that_are_not_unit_are_an_error(four: Four) -> None:
    a, text_a, text_b, b = four
    with pytest.raises(ValueError, match="Got text_b with a row of norm 2, expected unit rows"):
        one_way_bridge(a, text_a, 2 * text_b, b)


def test_nan_rows_are_an_error(four: Four) -> None:
    a, text_a, text_b, b = four
    with pytest.raises(ValueError, match="Got b with a row of norm nan"):
        posterior_matching(a, text_a, text_b, torch.full_like(b, float("nan")))


def test_texts_of_different_counts_are_an_error(four: Four) -> None:
    a, text_a, text_b, b = four
    with pytest.raises(ValueError, match="Got 50 texts in space A and 49 in space B"):
        one_way_bridge(a, text_a, text_b[:49], b)


def test_swapped_spaces_are_an_error(four: Four) -> None:
    a, text_a, text_b, b = four
    with pytest.raises(ValueError, match="Got a of width 10 and its texts of width 14"):
        one_way_bridge(a, text_b, text_a, b)


def test_closed_cascade_scores_with_the_vector_of_the_nearest_name() -> None:
    a = normalize(torch.tensor([[0.1, 1.0], [1.0, 0.2]]), dim=-1)
    names_b = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    scores = closed_cascade(a, torch.eye(2), names_b, torch.eye(3))
    assert torch.equal(scores, torch.tensor([[0.0, 0.0, 1.0], [0.6, 0.8, 0.0]]))


def test_ridge_matches_least_squares_on_rows_augmented_by_the_penalty(four: Four) -> None:
    _, text_a, text_b, _ = four
    augmented = torch.cat([text_a.double() / 50**0.5, (0.3 / 10) ** 0.5 * torch.eye(10, dtype=torch.float64)])
    targets = torch.cat([text_b.double() / 50**0.5, torch.zeros(10, 14, dtype=torch.float64)])
    expected = torch.linalg.lstsq(augmented, targets).solution.float()
    torch.testing.assert_close(ridge_map(text_a, text_b, ridge=0.3), expected, atol=1e-5, rtol=0)


def test_ridge_does_not_depend_on_the_size_of_the_bank(four: Four) -> None:
    _, text_a, text_b, _ = four
    torch.testing.assert_close(ridge_map(text_a.repeat(3, 1), text_b.repeat(3, 1)), ridge_map(text_a, text_b))


def test_ridge_must_be_positive(four: Four) -> None:
    with pytest.raises(ValueError, match="pass ridge= above 0"):
        ridge_map(four[1], four[2], ridge=0.0)


def test_procrustes_recovers_a_rotation() -> None:
    texts, turn = unit(60, 10, 0), rotation(10, 1)
    torch.testing.assert_close(procrustes_map(texts, texts @ turn), turn, atol=1e-5, rtol=0)


@pytest.mark.parametrize("widths", [(10, 14), (14, 10)])
def test_procrustes_beats_other_semi_orthogonal_maps(widths: tuple[int, int]) -> None:
    text_a, text_b = unit(60, widths[0], 0), unit(60, widths[1], 1)
    fitted = procrustes_map(text_a, text_b)
    narrow = fitted @ fitted.T if widths[0] < widths[1] else fitted.T @ fitted
    torch.testing.assert_close(narrow, torch.eye(10), atol=1e-5, rtol=0)
    best = ((text_a @ fitted) * text_b).sum()
    for seed in range(2, 22):
        other = rotation(max(widths), seed)[: widths[0], : widths[1]]
        assert ((text_a @ other) * text_b).sum() < best


@pytest.mark.parametrize("fit", [ridge_map, procrustes_map])
def test_blocks_do_not_change_the_fitted_map(fit: Method, four: Four, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(four[1], four[2])
    monkeypatch.setattr(baselines, "_BLOCK_BYTES", 1000)
    torch.testing.assert_close(fit(four[1], four[2]), whole, atol=1e-6, rtol=0)


def test_text_bridges_rotated_spaces_in_both_directions(world: World) -> None:
    scores = world.scores(world.text_b)
    assert max(scores.pop("unconnected")) < world.chance + 0.1
    assert set(scores) == {
        "ridge",
        "procrustes",
        "linear map",
        "one-way bridge",
        "two-way bridge",
        "posterior matching",
        "closed cascade",
    }
    for name, both_directions in scores.items():
        assert min(both_directions) > 0.95, name


def test_a_deranged_bank_leaves_every_open_baseline_near_chance(world: World) -> None:
    index = derange_by_name(world.text_names, torch.Generator().manual_seed(0))
    scores = world.scores(world.text_b[index])
    for name in ("ridge", "procrustes", "one-way bridge", "two-way bridge", "posterior matching"):
        assert max(scores[name]) < world.chance + 0.1, name


def test_spaces_that_are_already_one_are_found_by_the_unconnected_baseline() -> None:
    world = World(rotated=False)
    assert min(world.scores(world.text_b)["unconnected"]) > 0.95


def test_each_direction_of_the_one_way_bridge_starts_from_its_queries(four: Four) -> None:
    a, text_a, text_b, b = four
    a2i, i2a = baseline_scores(a, b, text_a, text_b)["one-way bridge"]
    assert torch.equal(a2i, one_way_bridge(a, text_a, text_b, b))
    assert torch.equal(i2a, one_way_bridge(b, text_b, text_a, a))
    assert not torch.allclose(i2a, a2i.T, atol=1e-2)


def test_posterior_matching_takes_a_temperature_for_each_space(four: Four) -> None:
    a, text_a, text_b, b = four
    matched = posterior_matching(*four, temperature=(0.05, 0.2))
    expected = softmax64(a, text_a, 0.05) @ softmax64(b, text_b, 0.2).T
    torch.testing.assert_close(matched, expected.float(), atol=1e-6, rtol=1e-4)
    scorers = baseline_scorers(a, b, text_a, text_b, posterior_temperatures=(0.05, 0.2))
    there, back = scorers["posterior matching"]
    torch.testing.assert_close(there(slice(2, 5)), matched[2:5])
    torch.testing.assert_close(back(slice(1, 4)), matched.T[1:4])
    with pytest.raises(ValueError, match="temperature=-1"):
        posterior_matching(*four, temperature=(0.05, -1))


def test_scorers_of_posterior_matching_sum_over_the_texts_once_whatever_the_blocks(
    four: Four, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, text_a, text_b, b = four
    expected = posterior_matching(*four, temperature=(0.05, 0.2))
    summed = []
    before = baselines._log_partition
    monkeypatch.setattr(baselines, "_log_partition", lambda *all: summed.append(len(all[0])) or before(*all))
    there, back = baseline_scorers(a, b, text_a, text_b, posterior_temperatures=(0.05, 0.2))["posterior matching"]
    found = torch.cat([there(slice(row, row + 2)) for row in range(0, len(a), 2)])
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-5)
    torch.testing.assert_close(torch.cat([back(slice(row, row + 1)) for row in range(len(b))]), expected.T)
    # Each side as a whole, for both directions.
    assert summed == [len(a), len(b)]


@pytest.mark.parametrize(("texts", "sizes"), [(40, {16}), (33, {16}), (10, {10})])
def test_no_batch_of_the_linear_map_has_a_text_twice(
    monkeypatch: pytest.MonkeyPatch, texts: int, sizes: set[int]
) -> None:
    batches = []
    before = baselines.symmetric_info_nce
    monkeypatch.setattr(baselines, "symmetric_info_nce", lambda a, b, scale: batches.append(b) or before(a, b, scale))
    linear_map(unit(texts, 4, 0), unit(texts, 6, 1), steps=30, batch=16)
    assert {len(batch) for batch in batches} == sizes
    assert all(len(batch.unique(dim=0)) == len(batch) for batch in batches)
    # And none is left out for good.
    assert len(torch.cat(batches).unique(dim=0)) == texts


def test_report_scores_are_those_of_the_single_functions(four: Four) -> None:
    a, text_a, text_b, b = four
    scores = baseline_scores(a, b, text_a, text_b, temperature=0.1)
    two_way = two_way_bridge(*four, temperature=0.1)
    matched = posterior_matching(*four, temperature=0.1)
    for name, expected in (("two-way bridge", two_way), ("posterior matching", matched)):
        torch.testing.assert_close(scores[name][0], expected)
        torch.testing.assert_close(scores[name][1], expected.T)
    ridge = normalize(b @ ridge_map(text_b, text_a), dim=-1) @ a.T
    torch.testing.assert_close(scores["ridge"][1], ridge)


def test_the_linear_map_finds_the_rotation_and_leaves_the_global_generator_alone(world: World) -> None:
    state = torch.get_rng_state()
    layer = linear_map(world.text_a, world.text_b)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    again = linear_map(world.text_a, world.text_b)
    assert torch.equal(layer.weight, again.weight)
    assert not torch.equal(layer.weight, linear_map(world.text_a, world.text_b, seed=1).weight)
    found = (normalize(layer(world.text_a), dim=1) * world.text_b).sum(1).mean()
    # Unrelated rotations: 0 on average.
    assert found > 0.5


def test_over_two_hops_every_baseline_goes_through_the_space_between(four: Four) -> None:
    a, *first, _ = four
    second, b = (unit(40, 14, 4), unit(40, 12, 5)), unit(7, 12, 6)
    names, between = unit(3, 10, 7), unit(3, 14, 8)
    scores = two_hop_scores(a, (first[0], first[1]), second, b, names, between)
    carried = normalize(softmax64(a, first[0], 0.03) @ first[1].double(), dim=1).float()
    there, back = scores["one-way bridge"]
    torch.testing.assert_close(there, bridge64(carried, *second, b, 0.03).float(), atol=1e-5, rtol=0)
    carried_back = normalize(softmax64(b, second[1], 0.03) @ second[0].double(), dim=1).float()
    torch.testing.assert_close(back, bridge64(carried_back, first[1], first[0], a, 0.03).float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores["two-way bridge"][0], (there + back.T) / 2)
    mapped = normalize(a @ ridge_map(first[0], first[1]), dim=1) @ ridge_map(*second)
    torch.testing.assert_close(scores["ridge"][0], normalize(mapped, dim=1) @ b.T)
    matched = posterior_matching(carried, *second, b)
    torch.testing.assert_close(scores["posterior matching"][0], matched, atol=1e-5, rtol=1e-4)
    named = between[(a @ names.T).argmax(1)]
    torch.testing.assert_close(scores["closed cascade"][0], one_way_bridge(named, *second, b))
    assert {name: (len(there), len(back)) for name, (there, back) in scores.items()} == dict.fromkeys(scores, (9, 7))
    assert set(two_hop_scores(a, (first[0], first[1]), second, b)) == set(scores) - {"closed cascade"}


def test_spaces_of_different_widths_without_names_leave_two_baselines_out(four: Four) -> None:
    a, text_a, text_b, b = four
    names = {"ridge", "procrustes", "linear map", "one-way bridge", "two-way bridge", "posterior matching"}
    assert set(baseline_scores(a, b, text_a, text_b)) == names


def test_names_in_one_space_only_are_an_error(four: Four) -> None:
    a, text_a, text_b, b = four
    with pytest.raises(ValueError, match="class names in one space only"):
        baseline_scores(a, b, text_a, text_b, text_a[:3])


NAMES = ["dog"] * 5 + ["cat"] * 2 + ["rain"] * 9 + ["bell"] + ["dog"] * 2


def test_no_row_keeps_its_own_name() -> None:
    for seed in range(50):
        index = derange_by_name(NAMES, torch.Generator().manual_seed(seed))
        assert all(NAMES[partner] != name for name, partner in zip(NAMES, index.tolist(), strict=True))


def test_rows_of_one_name_meet_rows_of_one_other_name() -> None:
    index = derange_by_name(NAMES, torch.Generator().manual_seed(0)).tolist()
    targets = {name: {NAMES[index[row]] for row in range(len(NAMES)) if NAMES[row] == name} for name in set(NAMES)}
    assert all(len(target) == 1 for target in targets.values())
    assert set.union(*targets.values()) == set(NAMES)


def test_partner_rows_are_used_evenly() -> None:
    for seed in range(20):
        index = derange_by_name(NAMES, torch.Generator().manual_seed(seed)).tolist()
        for name in set(NAMES):
            used = Counter(index[row] for row in range(len(NAMES)) if NAMES[row] == name)
            partners = NAMES.count(NAMES[next(iter(used))])
            counts = [*used.values(), *[0] * (partners - len(used))]
            assert max(counts) - min(counts) <= 1


def test_the_generator_decides_the_derangement() -> None:
    first, again, other = (derange_by_name(NAMES, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_derangements_of_names_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = Counter(tuple(derange_by_name(["a", "b", "c", "d"], generator).tolist()) for _ in range(1800))
    # Four names have 9 derangements: 200 draws each, with a standard deviation of 13.3.
    assert len(draws) == 9
    assert all(140 < count < 260 for count in draws.values())


def test_two_names_are_swapped() -> None:
    assert derange_by_name(["a", "b"], torch.Generator().manual_seed(0)).tolist() == [1, 0]


@pytest.mark.parametrize("names", [[], ["dog"] * 4])
def test_fewer_than_two_names_cannot_be_deranged(names: list[str]) -> None:
    with pytest.raises(ValueError, match="expected at least 2"):
        derange_by_name(names, torch.Generator())


def test_procrustes_leaves_out_what_the_texts_do_not_span() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0][:, :3]
    texts = normalize(torch.randn(50, 3, generator=generator, dtype=torch.float64) @ basis.T, dim=-1)
    disturbed = normalize(texts + 1e-9 * torch.randn(50, 8, generator=generator, dtype=torch.float64), dim=-1)
    fitted = procrustes_map(texts, texts)
    torch.testing.assert_close(fitted, basis @ basis.T)
    torch.testing.assert_close(procrustes_map(disturbed, disturbed), fitted, atol=1e-6, rtol=0)


def test_cca_finds_what_two_turned_spaces_share() -> None:
    # The first 3 of 8 axes are shared, the others are each space's own.
    shared, own_a, own_b = unit(400, 3, 0), unit(400, 5, 1), unit(400, 5, 2)
    text_a, text_b = (normalize(torch.cat([shared, own], dim=1), dim=1) for own in (own_a, own_b))
    text_b = text_b @ rotation(8, 3)
    to_a, to_b = cca_maps(text_a, text_b)
    assert to_a.shape == to_b.shape == (8, 8)
    a, b = normalize(text_a @ to_a, dim=1), normalize(text_b @ to_b, dim=1)
    assert ((a @ b.T).argmax(dim=1) == torch.arange(400)).float().mean() > 0.2
    assert ((text_a @ text_b.T).argmax(dim=1) == torch.arange(400)).float().mean() < 0.05


def test_cca_makes_axes_of_the_texts_uncorrelated_and_orders_them_by_correlation() -> None:
    text_a, text_b = unit(300, 6, 0), normalize(unit(300, 4, 1) + unit(300, 6, 0)[:, :4], dim=1)
    to_a, to_b = cca_maps(text_a, text_b, ridge=1e-9)
    a, b = (text_a @ to_a).double(), (text_b @ to_b).double()
    assert a.shape == b.shape == (300, 4)
    correlations = (a.T @ a / 300).diagonal()
    assert (correlations.diff() < 1e-6).all() and correlations[0] < 1
    # Each axis is scaled by the root of its correlation on both sides.
    for moment, expected in ((a.T @ a, correlations), (b.T @ b, correlations), (a.T @ b, correlations.square())):
        torch.testing.assert_close(moment / 300, expected.diag(), atol=1e-5, rtol=0)
