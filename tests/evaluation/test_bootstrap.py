from __future__ import annotations

import pytest
import torch

from cmcr_hf.evaluation import bootstrap as module
from cmcr_hf.evaluation.bootstrap import bootstrap_means, bootstrap_means_of_sides, bootstrap_statistic


def numbers(count: int = 200) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def mean_of(values: torch.Tensor):
    return lambda rows: {"x": values[rows].mean().item()}


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = numbers(2000)
    low, high = bootstrap_means({"x": values}, resamples=4000, seed=1)["x"]
    error = values.std().item() / 2000**0.5
    assert low == pytest.approx(values.mean().item() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean().item() + 1.96 * error, abs=0.1 * error)


@pytest.mark.parametrize("groups", [None, torch.arange(200) // 7])
def test_the_fast_path_for_means_draws_what_the_general_one_draws(groups: torch.Tensor | None) -> None:
    values = numbers()
    fast = bootstrap_means({"x": values}, resamples=50, seed=5, groups=groups)
    slow = bootstrap_statistic(mean_of(values), 200 if groups is None else groups, resamples=50, seed=5)
    assert fast["x"] == pytest.approx(slow["x"], abs=1e-12)


def test_the_draws_depend_on_the_seed_alone_and_not_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = numbers()
    first = bootstrap_means({"x": values}, resamples=100, seed=1)
    assert bootstrap_means({"x": values}, resamples=100, seed=2) != first
    monkeypatch.setattr(module, "_BLOCK", 200)
    assert bootstrap_means({"x": values}, resamples=100, seed=1)["x"] == pytest.approx(first["x"])


def test_rows_of_a_group_are_drawn_together() -> None:
    # Five copies of each of 40 numbers tell no more than the 40 do.
    values = numbers(40)
    alone = bootstrap_means({"x": values}, resamples=200)
    copies = bootstrap_means({"x": values.repeat_interleave(5)}, resamples=200, groups=torch.arange(200) // 5)
    assert copies["x"] == pytest.approx(alone["x"])
    low, high = bootstrap_means({"x": values.repeat_interleave(5)}, resamples=200)["x"]
    assert high - low < 0.6 * (copies["x"][1] - copies["x"][0])


def test_the_mean_of_sides_draws_a_group_on_all_sides_at_once() -> None:
    values = numbers(40)
    one = bootstrap_means({"x": values}, resamples=200)
    # What one side gains, the other one loses.
    sides = [({"x": values}, None), ({"x": -values.repeat_interleave(3)}, torch.arange(120) // 3)]
    assert bootstrap_means_of_sides(sides, resamples=200)["x"] == pytest.approx((0, 0), abs=1e-12)
    same = [({"x": values}, None), ({"x": values.repeat_interleave(3)}, torch.arange(120) // 3)]
    assert bootstrap_means_of_sides(same, resamples=200)["x"] == pytest.approx(one["x"])
    with pytest.raises(ValueError, match=r"Got \[40, 41\] groups, expected as many of every side"):
        bootstrap_means_of_sides([({"x": values}, None), ({"x": numbers(41)}, None)])


def test_long_draws_show_their_progress(capsys: pytest.CaptureFixture[str]) -> None:
    bootstrap_statistic(mean_of(numbers()), 200, resamples=20)
    assert capsys.readouterr().err == ""
    bootstrap_statistic(mean_of(numbers()), 200, resamples=20, progress=True)
    assert "resampled: 100%" in capsys.readouterr().err


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert bootstrap_means({"x": torch.ones(7)}, resamples=20) == {"x": (1.0, 1.0)}


def test_no_resamples_give_no_intervals() -> None:
    assert bootstrap_means({"x": torch.ones(7)}, resamples=0) == {}
    assert bootstrap_statistic(mean_of(numbers()), 200, resamples=0) == {}


def test_draws_that_leave_a_metric_undefined_are_passed_over() -> None:
    # Of two rows, a quarter of the draws lack the second.
    def statistic(rows: torch.Tensor) -> dict[str, float]:
        return {"x": 1.0 if (rows == 1).any() else float("nan")}

    assert bootstrap_statistic(statistic, 2, resamples=40) == {"x": (1.0, 1.0)}
    with pytest.raises(ValueError, match="x is undefined in 40 of 40 draws"):
        bootstrap_statistic(lambda rows: {"x": float("nan")}, 2, resamples=40)


@pytest.mark.parametrize(
    "values", [{"x": torch.ones(3), "y": torch.ones(4)}, {"x": torch.empty(0)}, {"x": torch.tensor([1, torch.inf])}]
)
def test_values_that_are_none_are_refused(values: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="expected as many finite ones"):
        bootstrap_means(values)


@pytest.mark.parametrize("groups", [torch.tensor([0, 2, 2]), torch.tensor([0, 1]), torch.tensor([0.0, 1, 1])])
def test_groups_with_gaps_are_refused(groups: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="Got groups of shape"):
        bootstrap_means({"x": torch.ones(3)}, groups=groups)
