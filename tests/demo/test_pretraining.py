from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cmcr_hf.demo import pretraining as module
from cmcr_hf.demo.pretraining import (
    accuracy,
    class_chance,
    class_retrieval,
    folder_bytes,
    relabelled_map,
    shifted_or_mirrored,
    train_contrastively,
    unit,
)


def test_info_nce_is_the_cross_entropy_without_the_same_sentence() -> None:
    logits = torch.tensor([[2.0, 9.0, 0.0], [9.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    expected = torch.tensor(
        [
            torch.tensor([2.0, 0.0]).logsumexp(0) - 2.0,
            torch.tensor([1.0, 0.0]).logsumexp(0) - 1.0,
            logits[2].logsumexp(0) - 3.0,
        ]
    ).mean()
    assert module._info_nce(logits, ["a bee", "a bee", "a dog"]).item() == pytest.approx(expected.item())


def test_contrastive_training_brings_pairs_together_the_same_way_for_the_same_generator() -> None:
    first = unit(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))
    second = first[:, [1, 0, 3, 2, 5, 4]]
    start = 0.01 * torch.randn(6, 6, generator=torch.Generator().manual_seed(1))

    def trained() -> tuple[torch.Tensor, list[int]]:
        model = torch.nn.utils.skip_init(torch.nn.Linear, 6, 6, bias=False)
        model.weight.data.copy_(start)
        seen = []

        def logits(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
            seen.extend(rows.tolist())
            per_first = 20 * unit(model(first[rows])) @ second[rows].T
            return per_first, per_first.T, [str(row) for row in rows]

        train_contrastively(model, 40, logits, np.random.default_rng(0), 200, "Training", batch=128)
        with torch.no_grad():
            return model(first) @ second.T, seen

    assert (unit(first @ start.T) @ second.T).argmax(dim=1).eq(torch.arange(40)).float().mean() < 0.2
    state = torch.get_rng_state()
    scores, seen = trained()
    assert torch.equal(torch.get_rng_state(), state)
    assert (scores.argmax(dim=1) == torch.arange(40)).float().mean() > 0.9
    # A pass goes through all pairs.
    assert sorted(seen[:40]) == list(range(40))
    assert torch.equal(trained()[0], scores)


def test_a_frozen_part_is_left_as_it_is() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[0].requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    rows = torch.eye(4)

    def logits(numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        per_row = model(rows[numbers]) @ rows[numbers].T
        return per_row, per_row.T, [str(number) for number in numbers]

    train_contrastively(model, 4, logits, np.random.default_rng(0), 5, "Training", batch=4)
    changed = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert changed == [False, False, True, True]


def test_an_augmented_picture_is_the_picture_moved_a_little_and_perhaps_mirrored() -> None:
    side = 64
    pixels = torch.zeros(200, 3, side, side)
    pixels[:, 1, 30, 20] = 1.0
    moved = shifted_or_mirrored(pixels, np.random.default_rng(0))
    assert moved.shape == pixels.shape and torch.equal(moved.sum(dim=(1, 2, 3)), torch.ones(200))
    _, channels, rows, columns = moved.nonzero(as_tuple=True)
    assert channels.unique().tolist() == [1]
    assert (rows.min(), rows.max()) == (30 - 8, 30 + 8)
    plain, mirrored = columns[columns < 32], columns[columns >= 32]
    assert (plain.min(), plain.max()) == (20 - 8, 20 + 8)
    assert (mirrored.min(), mirrored.max()) == (43 - 8, 43 + 8)
    assert 70 < len(plain) < 130
    assert torch.equal(moved, shifted_or_mirrored(pixels, np.random.default_rng(0)))


def test_figures_of_perfect_and_of_relabelled_classes() -> None:
    rows = torch.eye(4).repeat_interleave(5, dim=0)
    labels = torch.arange(4).repeat_interleave(5)
    assert class_retrieval(rows, rows, labels) == {"P@1": 1.0, "mAP": 1.0}
    assert accuracy(rows, torch.eye(4)[[0, 1, 3, 2]], labels) == 0.5
    assert class_chance(labels)["P@1"] == 0.25
    luck = relabelled_map(rows, rows, labels, seed=0)
    # One class in four meets itself on the average.
    assert luck["mean"] == pytest.approx(class_chance(labels)["mAP"], abs=0.15)
    assert luck["standard_deviation"] > 0.1
    assert unit(torch.tensor([[3.0, 4.0]])).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]


def test_bytes_are_those_of_each_folder(tmp_path: Path) -> None:
    for name, size in (("clip", 3), ("ulip", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_bytes(b"x" * size)
    assert folder_bytes(tmp_path, "clip", "ulip") == {"clip": 3, "ulip": 5}
