import numpy as np
import pytest

from cmcr_hf.evaluation.boxes import (
    MAP_SIZE,
    above_middle,
    box_map,
    consensus_iou,
    consensus_map,
    hot_half,
    iou_values,
    region_ious,
    suppress_overlaps,
)


def plain_map(boxes: list[tuple[float, ...]], consensus: int) -> list[list[float]]:
    """What the official code computes, pixel by pixel."""
    corners = [[int(MAP_SIZE * min(max(part, 0), 1)) for part in box] for box in boxes]
    return [
        [min(sum(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in corners) / consensus, 1) for x in range(MAP_SIZE)]
        for y in range(MAP_SIZE)
    ]


def plain_ciou(located: np.ndarray, truth: list[list[float]]) -> float:
    hit = true = wrong = 0.0
    for row, values in zip(located.tolist(), truth, strict=True):
        for is_located, value in zip(row, values, strict=True):
            true += value
            hit += value if is_located else 0
            wrong += 1 if is_located and value == 0 else 0
    return hit / (true + wrong)


@pytest.mark.parametrize("consensus", [1, 2])
def test_cious_of_random_boxes_are_those_of_a_plain_recomputation(consensus: int) -> None:
    draw = np.random.default_rng(0)
    for annotators in (1, 2, 3):
        corners = np.sort(draw.uniform(-0.2, 1.2, (annotators, 2, 2)), axis=1)
        boxes = [tuple(box) for box in corners.reshape(annotators, 4).tolist()]
        truth = plain_map(boxes, consensus)
        assert consensus_map(boxes, consensus).tolist() == truth
        located = draw.random((MAP_SIZE, MAP_SIZE)) < 0.5
        assert consensus_iou(located, consensus_map(boxes, consensus)) == pytest.approx(
            plain_ciou(located, truth), abs=1e-9
        )


def test_two_of_three_annotators_make_a_pixel_certain() -> None:
    half, whole = (0, 0, 0.5, 1), (0, 0, 1, 1)
    agreed = consensus_map([half, half, whole], 2)
    assert agreed[0, 0] == 1
    assert agreed[0, MAP_SIZE - 1] == 0.5
    assert consensus_iou(box_map(half), agreed) == pytest.approx(1 / 1.5)
    assert consensus_iou(box_map(whole), agreed) == 1


def test_boxes_of_one_annotator_are_united() -> None:
    assert consensus_map([(0, 0, 1, 0.5), (0, 0.25, 1, 0.75)]).sum() == MAP_SIZE**2 * 0.75


def test_a_box_outside_of_the_picture_is_cut_and_one_without_area_is_nothing() -> None:
    assert box_map((-1, -1, 0.5, 2)).sum() == MAP_SIZE**2 / 2
    assert not box_map((0.26875, 1.0, 0.753125, 1.0)).any()
    # Corners in the wrong order, such as width and height taken for corners.
    assert not box_map((0.5, 0.5, 0.25, 0.25)).any()


def test_nothing_true_or_nothing_located_gives_zero() -> None:
    nothing, everything = np.zeros((MAP_SIZE, MAP_SIZE), bool), np.ones((MAP_SIZE, MAP_SIZE), bool)
    assert consensus_iou(everything, consensus_map([])) == 0
    assert consensus_iou(nothing, consensus_map([(0, 0, 1, 1)])) == 0
    assert consensus_iou(nothing, consensus_map([])) == 0


@pytest.mark.parametrize("count", [1, 7, 400])
def test_the_area_is_that_of_scikit_learn(count: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    # Levels themselves are among the values.
    ious = np.concatenate([np.random.default_rng(1).random(count), [0, 1, 0.5, 0.05 * 3]])
    levels = [0.05 * step for step in range(21)]
    rates = [np.sum(ious >= 0.05 * step) / len(ious) for step in range(21)]
    values = iou_values(ious)
    assert values["AUC"].mean() == pytest.approx(metrics.auc(levels, rates), abs=1e-9)
    assert values["cIoU@0.5"].mean() == pytest.approx(rates[10], abs=1e-9)


def test_the_area_runs_from_nothing_but_the_first_level_to_one() -> None:
    assert iou_values(np.array([[0.0, 1.0]]))["AUC"].tolist() == [[pytest.approx(0.025), pytest.approx(1)]]


def test_the_cious_of_boxes_at_once_are_those_of_each() -> None:
    draw = np.random.default_rng(3)
    boxes = np.concatenate([draw.uniform(-0.3, 1.3, (40, 4)), [[0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5]]])
    for truth in (consensus_map([(0.1, 0.2, 0.7, 0.9), (0.5, 0.5, 1, 1)], 2), consensus_map([])):
        each = [consensus_iou(box_map(tuple(box)), truth) for box in boxes]
        assert region_ious(boxes, truth) == pytest.approx(np.array(each), abs=1e-9)


def test_half_of_a_map_is_located_and_all_of_a_constant_one() -> None:
    heat = np.arange(16.0).reshape(4, 4) ** 2
    assert hot_half(heat).tolist() == (heat >= 64).tolist()
    assert hot_half(np.zeros((4, 4))).all()
    # Pixels that tie with the last of the half are there.
    assert hot_half(np.array([[0.0, 1, 1, 1]])).sum() == 3


def test_above_the_middle_are_pixels_nearer_to_the_hottest() -> None:
    heat = np.arange(16.0).reshape(4, 4) ** 2
    assert above_middle(heat).tolist() == (heat >= 112.5).tolist()
    assert above_middle(np.ones((4, 4))).all()


def test_boxes_that_overlap_a_better_one_are_left_out() -> None:
    boxes = np.array([[0, 0, 1, 1], [0, 0, 1, 0.9], [0, 0, 1, 0.5], [0, 0, 1, 0.5], [2, 2, 3, 3]], float)
    assert suppress_overlaps(boxes) == [0, 2, 4]
    assert suppress_overlaps(boxes[:0]) == []
