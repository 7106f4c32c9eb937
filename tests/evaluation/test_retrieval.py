from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise, permutations
from math import comb

import pytest
import torch

from cmcr_hf.evaluation import retrieval
from cmcr_hf.evaluation.retrieval import _recall, chance, label_retrieval, pair_retrieval


def rank_metrics(relevant: list[bool], ks: tuple[int, ...]) -> dict[str, float]:
    """Precision at k and average precision of one ranked list."""
    found, precisions = 0, []
    for rank, hit in enumerate(relevant, start=1):
        if hit:
            found += 1
            precisions.append(found / rank)
    return {f"P@{k}": sum(relevant[:k]) / k for k in ks} | {"mAP": sum(precisions) / len(precisions)}


def averaged_over_tie_orders(
    scores: list[list[float]], query_labels: list[str], gallery_labels: list[str], ks: tuple[int, ...]
) -> dict[str, float]:
    """Mean metrics over every order of the gallery that the scores allow, by enumeration."""
    names = [f"P@{k}" for k in ks] + ["mAP"]
    means = dict.fromkeys(names, 0.0)
    for row, label in zip(scores, query_labels, strict=True):
        orders = [
            order
            for order in permutations(range(len(row)))
            if all(row[left] >= row[right] for left, right in pairwise(order))
        ]
        for order in orders:
            metrics = rank_metrics([gallery_labels[item] == label for item in order], ks)
            for name in names:
                means[name] += metrics[name] / len(orders) / len(scores)
    return means


def test_distinct_scores_match_a_loop_over_ranked_lists() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(15, 40, generator=generator)
    gallery_labels = ["dog", "cat", "rain", "bell"] * 10
    query_labels = ["rain", "dog", "bell"] * 5
    expected = dict.fromkeys(["P@1", "P@10", "mAP"], 0.0)
    for row, label in zip(scores.tolist(), query_labels, strict=True):
        order = sorted(range(40), key=lambda item: -row[item])
        for name, value in rank_metrics([gallery_labels[item] == label for item in order], (1, 10)).items():
            expected[name] += value / 15
    assert label_retrieval(scores, query_labels, gallery_labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_tied_scores_match_the_mean_over_every_order_of_the_ties(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (6, 6), generator=generator).float()
    query_labels = ["a", "b", "c", "a", "b", "c"]
    gallery_labels = ["a", "b", "b", "c", "a", "b"]
    expected = averaged_over_tie_orders(scores.tolist(), query_labels, gallery_labels, (1, 2, 5))
    assert label_retrieval(scores, query_labels, gallery_labels, ks=(1, 2, 5)) == pytest.approx(expected, abs=1e-12)


def test_constant_scores_give_chance() -> None:
    gallery_labels = torch.tensor([0] * 3 + [1] * 40 + [2] * 7)
    query_labels = torch.tensor([0, 0, 1, 2])
    constant = label_retrieval(torch.full((4, 50), 0.5), query_labels, gallery_labels)
    assert constant == pytest.approx(chance(query_labels, gallery_labels), abs=1e-12)
    assert constant["P@1"] == pytest.approx((3 + 3 + 40 + 7) / 50 / 4)


def test_storage_order_of_tied_items_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(4, (5, 30), generator=generator).float()
    gallery_labels = torch.arange(30) % 5
    shuffled = torch.randperm(30, generator=generator)
    metrics = label_retrieval(scores, torch.arange(5), gallery_labels)
    assert label_retrieval(scores[:, shuffled], torch.arange(5), gallery_labels[shuffled]) == pytest.approx(metrics)


def test_perfect_and_reversed_scores_hit_the_ends() -> None:
    labels = ["a"] * 2 + ["b"] * 6
    match = torch.tensor([[float(one == other) for other in labels] for one in labels])
    assert label_retrieval(match, labels, labels, ks=(1, 2)) == {"P@1": 1.0, "P@2": 1.0, "mAP": 1.0}
    # The worst place of r relevant items of n is the last r ranks.
    worst = {r: sum(found / (8 - r + found) for found in range(1, r + 1)) / r for r in (2, 6)}
    reversed_metrics = label_retrieval(-match, labels, labels, ks=(1, 2))
    assert reversed_metrics["P@2"] == 0.0
    assert reversed_metrics["mAP"] == pytest.approx((2 * worst[2] + 6 * worst[6]) / 8)


def test_one_class_is_always_relevant() -> None:
    scores = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    metrics = label_retrieval(scores, ["dog"] * 3, ["dog"] * 12)
    assert metrics == pytest.approx({"P@1": 1.0, "P@10": 1.0, "mAP": 1.0})
    assert chance(["dog"] * 3, ["dog"] * 12) == pytest.approx(metrics)


def test_a_gallery_of_one_item_has_a_value() -> None:
    assert label_retrieval(torch.zeros(1, 1), ["dog"], ["dog"], ks=(1,)) == {"P@1": 1.0, "mAP": 1.0}
    assert chance(["dog"], ["dog"], ks=(1,)) == pytest.approx({"P@1": 1.0, "mAP": 1.0})


def test_infinite_scores_are_ranked_at_the_ends() -> None:
    scores = torch.tensor([[0.0, math.inf, -math.inf, 1.0]])
    metrics = label_retrieval(scores, ["b"], ["a", "a", "b", "a"], ks=(1,))
    assert metrics == {"P@1": 0.0, "mAP": 0.25}


def test_blocks_of_queries_do_not_change_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randint(6, (17, 20), generator=torch.Generator().manual_seed(3)).float()
    labels, gallery_labels = torch.arange(17) % 4, torch.arange(20) % 4
    whole = label_retrieval(scores, labels, gallery_labels)
    monkeypatch.setattr(retrieval, "_BLOCK_ELEMENTS", 60)
    assert label_retrieval(scores, labels, gallery_labels) == pytest.approx(whole, abs=1e-12)


def test_strings_and_integers_name_the_same_classes() -> None:
    scores = torch.randn(4, 12, generator=torch.Generator().manual_seed(4))
    by_number = label_retrieval(scores, torch.tensor([7, 7, 3, 5]), torch.tensor([3, 5, 7] * 4))
    assert label_retrieval(scores, ["c", "c", "a", "b"], ["a", "b", "c"] * 4) == by_number


def test_bfloat16_scores_are_ranked_as_their_exact_values() -> None:
    scores = torch.randn(5, 30, generator=torch.Generator().manual_seed(5)).bfloat16()
    labels, gallery_labels = torch.arange(5), torch.arange(30) % 5
    exact = label_retrieval(scores.double(), labels, gallery_labels)
    assert label_retrieval(scores, labels, gallery_labels) == exact


def test_chance_matches_random_rankings() -> None:
    generator = torch.Generator().manual_seed(6)
    gallery_labels = torch.tensor([0] * 2 + [1] * 5 + [2] * 13)
    query_labels = torch.tensor([0, 1, 2, 2])
    rounds = 1500
    scores = torch.rand(rounds * 4, 20, generator=generator)
    simulated = label_retrieval(scores, query_labels.repeat(rounds), gallery_labels)
    # The standard error of each mean is at most 0.5 / sqrt(6000) = 0.0065.
    assert chance(query_labels, gallery_labels) == pytest.approx(simulated, abs=0.02)


def test_chance_matches_every_permutation() -> None:
    gallery_labels = ["a", "a", "b", "b", "b", "c"]
    expected = averaged_over_tie_orders([[0.0] * 6] * 3, ["a", "b", "c"], gallery_labels, (1, 3))
    assert chance(["a", "b", "c"], gallery_labels, ks=(1, 3)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("measure", [chance, lambda *labels: label_retrieval(torch.zeros(2, 12), *labels)])
def test_a_query_without_relevant_items_is_named(measure: Callable[[list[str], list[str]], object]) -> None:
    with pytest.raises(ValueError, match="query label 'whale'"):
        measure(["dog", "whale"], ["dog"] * 12)


def test_labels_of_different_kinds_are_an_error() -> None:
    with pytest.raises(ValueError, match="same kind"):
        label_retrieval(torch.zeros(2, 12), torch.tensor([1, 2]), ["1", "2"] * 6)


def test_one_string_is_not_a_list_of_labels() -> None:
    with pytest.raises(ValueError, match="wrap it in a list"):
        label_retrieval(torch.zeros(3, 12), "dog", ["d"] * 12)


@pytest.mark.parametrize("labels", [torch.tensor(1), torch.ones(2), torch.ones(2, 1, dtype=torch.long)])
def test_label_tensors_are_flat_integers(labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="flat integer tensor"):
        label_retrieval(torch.zeros(2, 12), labels, torch.ones(12, dtype=torch.long))


def test_scores_must_fit_the_labels() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 12\), expected \(3, 12\)"):
        label_retrieval(torch.zeros(2, 12), ["dog"] * 3, ["dog"] * 12)


def test_nan_scores_are_an_error_in_both_metrics() -> None:
    scores = torch.zeros(12, 12)
    scores[3, 4] = math.nan
    with pytest.raises(ValueError, match="NaN scores in 1 rows, first row 3"):
        label_retrieval(scores, ["dog"] * 12, ["dog"] * 12)
    with pytest.raises(ValueError, match="NaN scores in 1 rows, first row 3"):
        pair_retrieval(scores)


def test_empty_scores_and_labels_are_errors() -> None:
    with pytest.raises(ValueError, match="pass a filled matrix"):
        pair_retrieval(torch.zeros(0, 5))
    with pytest.raises(ValueError, match="Got no query labels"):
        chance([], ["dog"] * 12)


@pytest.mark.parametrize("k", [0, 6])
def test_a_cut_off_outside_the_gallery_is_an_error(k: int) -> None:
    with pytest.raises(ValueError, match=f"cut-off k={k}, expected 1 to 5"):
        pair_retrieval(torch.zeros(5, 5), ks=(1, k))


def test_pairs_match_a_loop_over_ranks() -> None:
    generator = torch.Generator().manual_seed(7)
    scores = torch.randn(21, 30, generator=generator)
    gold = torch.randint(30, (21,), generator=generator)
    ranks = []
    for row, column in zip(scores.tolist(), gold.tolist(), strict=True):
        ranks.append(1 + sorted(row, reverse=True).index(row[column]))
    expected = {f"R@{k}": sum(rank <= k for rank in ranks) / 21 for k in (1, 5, 10)}
    assert pair_retrieval(scores, gold) == pytest.approx(expected | {"median_rank": sorted(ranks)[10]})


def test_ties_of_a_pair_match_the_mean_over_every_order() -> None:
    scores = torch.randint(3, (4, 6), generator=torch.Generator().manual_seed(8)).float()
    gold = torch.tensor([5, 0, 2, 2])
    recall, mean_ranks = 0.0, []
    for row, column in zip(scores.tolist(), gold.tolist(), strict=True):
        ranks = [
            1 + order.index(column)
            for order in permutations(range(6))
            if all(row[left] >= row[right] for left, right in pairwise(order))
        ]
        recall += sum(rank <= 2 for rank in ranks) / len(ranks) / 4
        mean_ranks.append(sum(ranks) / len(ranks))
    mean_ranks.sort()
    metrics = pair_retrieval(scores, gold, ks=(2,))
    assert metrics == pytest.approx({"R@2": recall, "median_rank": (mean_ranks[1] + mean_ranks[2]) / 2})


def test_constant_pair_scores_give_chance() -> None:
    metrics = pair_retrieval(torch.ones(40, 40))
    assert metrics == pytest.approx({"R@1": 1 / 40, "R@5": 5 / 40, "R@10": 10 / 40, "median_rank": 20.5})


def test_the_diagonal_is_the_default_pairing() -> None:
    scores = torch.eye(12)
    assert pair_retrieval(scores) == {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0, "median_rank": 1.0}
    assert pair_retrieval(scores.roll(1, 1))["R@1"] == 0.0


def test_an_unpaired_matrix_wants_gold_columns() -> None:
    with pytest.raises(ValueError, match="pass gold="):
        pair_retrieval(torch.zeros(12, 13))


@pytest.mark.parametrize("gold", [torch.tensor([0, 12]), torch.tensor([-1, 3])])
def test_gold_columns_lie_inside_the_matrix(gold: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected 0 to 11"):
        pair_retrieval(torch.zeros(2, 12), gold)


@pytest.mark.parametrize("gold", [torch.zeros(2), torch.zeros(3, dtype=torch.long), torch.ones(2, dtype=torch.bool)])
def test_gold_is_one_integer_a_row(gold: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one true column"):
        pair_retrieval(torch.zeros(2, 12), gold)


def several(rows: int, columns: int, most: int, seed: int) -> torch.Tensor:
    """True columns of every row, between one and `most` of them, filled up with -1."""
    generator = torch.Generator().manual_seed(seed)
    gold = torch.stack([torch.randperm(columns, generator=generator)[:most] for _ in range(rows)])
    counts = torch.randint(1, most + 1, (rows, 1), generator=generator)
    return gold.masked_fill(torch.arange(most) >= counts, -1)


def test_several_true_columns_match_the_mean_over_every_order_of_the_ties() -> None:
    scores = torch.randint(3, (5, 6), generator=torch.Generator().manual_seed(9)).float()
    gold = torch.cat([several(4, 6, 3, seed=1), torch.tensor([[0, 1, 5]])])
    scores[4] = 1.0
    values = retrieval.pair_values(scores, gold, (1, 2, 4))
    for index, (row, columns) in enumerate(zip(scores.tolist(), gold.tolist(), strict=True)):
        true = {column for column in columns if column >= 0}
        orders = [
            [column in true for column in order]
            for order in permutations(range(6))
            if all(row[left] >= row[right] for left, right in pairwise(order))
        ]
        for k in (1, 2, 4):
            recall = sum(any(order[:k]) for order in orders) / len(orders)
            assert values[f"R@{k}"][index].item() == pytest.approx(recall, abs=1e-12)
        precision = sum(rank_metrics(order, ())["mAP"] for order in orders) / len(orders)
        assert values["mAP"][index].item() == pytest.approx(precision, abs=1e-12)
        rank = sum(1 + order.index(True) for order in orders) / len(orders)
        assert values["rank"][index].item() == pytest.approx(rank, abs=1e-12)


def test_one_true_column_in_a_wider_gold_is_that_alone() -> None:
    scores = torch.randint(4, (30, 20), generator=torch.Generator().manual_seed(2)).float()
    gold = torch.randint(20, (30,), generator=torch.Generator().manual_seed(3))
    wide = torch.stack([torch.full((30,), -1), gold], 1)
    assert pair_retrieval(scores, wide) == pytest.approx(pair_retrieval(scores, gold), abs=1e-12)


@pytest.mark.parametrize("size", [12, 25_000, 10_000_000])
@pytest.mark.parametrize(("k", "found"), [(1, 1), (5, 2), (10, 5), (10, 12), (3, 7), (12, 5)])
def test_recall_is_exact_in_galleries_of_any_size(size: int, k: int, found: int) -> None:
    exact = 1 - Fraction(comb(size - found, k), comb(size, k))
    zero = torch.zeros(2, dtype=torch.float64)
    # Behind two items, the tie group has two places fewer.
    value = _recall(k + 2, zero + 2, zero + size, zero + found)[0].item()
    assert abs(Fraction(value) - exact) <= exact * Fraction(1, 10**13)


def test_a_true_column_of_minus_infinity_is_last_and_not_missing() -> None:
    scores = torch.tensor([[1.0, -torch.inf, 0.5]])
    values = retrieval.pair_values(scores, torch.tensor([[1, -1]]), (1, 2, 3))
    assert values["rank"].item() == 3
    assert values["mAP"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "gold", [torch.tensor([[0, 0], [1, -1]]), torch.tensor([[0, 12], [1, -1]]), torch.tensor([[-1, -1], [1, 2]])]
)
def test_true_columns_are_inside_the_matrix_and_no_two_are_one(gold: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="at least one column and none twice"):
        pair_retrieval(torch.zeros(2, 12), gold)


def adversarial(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Scores without ties, since those are where scikit-learn takes another convention, but hard to tell apart."""
    generator = torch.Generator().manual_seed(4)
    order = torch.stack([torch.randperm(columns, generator=generator) for _ in range(rows)]).double()
    return {
        "random": torch.randn(rows, columns, generator=generator, dtype=torch.float64),
        "neighbours in floating point": 1 + order * 2.0**-52,
        "of very different sizes": (order - columns / 2) * 10.0 ** (order - columns / 2).clamp(-30, 30),
        "near zero": (order - columns / 2) * 5e-324,
    }


@pytest.mark.parametrize("kind", list(adversarial(1, 2)))
def test_average_precision_and_recall_are_those_of_scikit_learn(kind: str) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, gold = adversarial(40, 50)[kind], several(40, 50, 5, seed=5)
    relevant = torch.zeros(40, 51).scatter_(1, gold.masked_fill(gold < 0, 50), 1)[:, :50]
    ranks = scores.argsort(1).argsort(1).numpy()
    expected = [metrics.average_precision_score(own, row) for own, row in zip(relevant, ranks, strict=True)]
    values = retrieval.pair_values(scores, gold, (1, 5, 10))
    assert values["mAP"].tolist() == pytest.approx(expected, abs=1e-9)
    # Of one true label, top-k accuracy is recall at k.
    single = retrieval.pair_values(scores, gold[:, :1], (1, 5, 10))
    for k in (1, 5, 10):
        accuracy = metrics.top_k_accuracy_score(gold[:, 0], ranks, k=k, labels=range(50))
        assert single[f"R@{k}"].mean().item() == pytest.approx(accuracy, abs=1e-9)
    labelled = retrieval.relevance_values(scores, relevant.bool(), (1, 10))
    assert labelled["mAP"].tolist() == pytest.approx(expected, abs=1e-9)


def test_the_first_place_is_that_of_scikit_learns_coverage() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    # Coverage counts down to the last true label, which is the first one from below.
    scores, gold = adversarial(30, 40)["random"], several(30, 40, 1, seed=6)
    truth = torch.zeros(30, 40).scatter_(1, gold, 1).numpy()
    values = retrieval.pair_values(scores, gold, (1,))
    assert values["rank"].mean().item() == pytest.approx(metrics.coverage_error(truth, scores.numpy()), abs=1e-9)
    # Ranking average precision takes the worst order of ties, so none are here.
    expected = metrics.label_ranking_average_precision_score(truth, scores.numpy())
    assert values["mAP"].mean().item() == pytest.approx(expected, abs=1e-9)


def test_chance_of_several_true_columns_is_the_mean_over_all_orders() -> None:
    chance_of = retrieval.pair_chance(torch.tensor([2, 3]), 5, (1, 2))
    for index, count in enumerate((2, 3)):
        orders = list(permutations([True] * count + [False] * (5 - count)))
        for k in (1, 2):
            expected = sum(any(order[:k]) for order in orders) / len(orders)
            assert chance_of[f"R@{k}"][index].item() == pytest.approx(expected)
        precision = sum(rank_metrics(list(order), ())["mAP"] for order in orders) / len(orders)
        assert chance_of["mAP"][index].item() == pytest.approx(precision)
        rank = sum(1 + order.index(True) for order in orders) / len(orders)
        assert chance_of["rank"][index].item() == pytest.approx(rank)
