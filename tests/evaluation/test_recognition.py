import numpy as np
import pytest

from cmcr_hf.evaluation.recognition import recognition_curve, recognition_metrics


def plain_metrics(confidence: np.ndarray, sounding: np.ndarray, located: np.ndarray) -> dict[str, float]:
    """The definitions, one threshold after the other, with SLAVC's counts."""
    points = []
    for threshold in sorted(set(confidence.tolist()), reverse=True):
        true = false = lost = 0
        for value, sounds, found in zip(confidence, sounding, located, strict=True):
            if value >= threshold:
                true, false = (true + 1, false) if sounds and found else (true, false + 1)
            elif sounds:
                lost += 1
        points.append((true / (true + false), true / (true + lost) if true + lost else 1.0))
    area, before = 0.0, 0.0
    for place, (_, recall) in enumerate(points):
        area += (recall - before) * max(precision for precision, _ in points[place:])
        before = recall
    return {"AP": area, "max-F1": max(2 * p * r / (p + r) if p + r else 0.0 for p, r in points)}


def draw(pairs: int, levels: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    # Few levels make many ties.
    confidence = random.integers(0, levels, pairs) / levels
    sounding = random.random(pairs) < 0.5
    sounding[0] = True
    return confidence, sounding, random.random(pairs) < 0.4


@pytest.mark.parametrize(("pairs", "levels"), [(1, 5), (2, 1), (40, 3), (60, 10), (60, 10_000)])
def test_both_forms_are_those_of_a_plain_recomputation(pairs: int, levels: int) -> None:
    for seed in range(5):
        confidence, sounding, located = draw(pairs, levels, seed)
        for found in (located, np.ones(pairs, bool), np.zeros(pairs, bool)):
            expected = plain_metrics(confidence, sounding, found)
            assert recognition_metrics(confidence, sounding, found) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("pairs", "levels"), [(40, 3), (200, 50), (200, 10_000)])
def test_the_recognition_alone_is_that_of_scikit_learn(pairs: int, levels: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    confidence, sounding, _ = draw(pairs, levels, seed=7)
    precision, recall, _ = metrics.precision_recall_curve(sounding, confidence)
    found = recognition_metrics(confidence, sounding)
    # From recall 1 to 0: the largest precision at a recall or above it.
    area = -(np.diff(recall) * np.maximum.accumulate(precision)[:-1]).sum()
    assert found["AP"] == pytest.approx(area, abs=1e-9)
    assert found["AP"] >= metrics.average_precision_score(sounding, confidence) - 1e-9
    assert found["max-F1"] == pytest.approx(
        max(metrics.f1_score(sounding, confidence >= threshold) for threshold in set(confidence)), abs=1e-9
    )
    # The same curve, but for the point without any accepted pair, which scikit-learn adds.
    mine = recognition_curve(confidence, sounding)
    assert mine[0][::-1] == pytest.approx(precision[:-1][-len(mine[0]) :], abs=1e-9)


def test_a_perfect_ranking_and_pairs_that_all_sound_give_one() -> None:
    sounding = np.array([True, True, False, False])
    assert recognition_metrics(np.array([4.0, 3, 2, 1]), sounding) == {"AP": 1, "max-F1": 1}
    assert recognition_metrics(np.array([1.0, 2, 2]), np.ones(3, bool)) == {"AP": 1, "max-F1": 1}


def test_one_confidence_for_all_gives_the_share_of_pairs_that_sound() -> None:
    metrics = recognition_metrics(np.zeros(4), np.array([True, False, False, False]))
    assert metrics == pytest.approx({"AP": 0.25, "max-F1": 2 * 0.25 / 1.25})


def test_what_sounds_and_is_not_located_counts_as_wrong() -> None:
    confidence, sounding = np.array([3.0, 2, 1]), np.array([True, True, False])
    metrics = recognition_metrics(confidence, sounding, np.array([False, True, True]))
    # Precision 0, 1/2, 1/3 at recall 0, 1, 1.
    assert metrics == pytest.approx({"AP": 0.5, "max-F1": 2 / 3})
    assert recognition_metrics(confidence, sounding, np.zeros(3, bool)) == {"AP": 0, "max-F1": 0}


def test_without_a_pair_that_sounds_there_is_no_metric() -> None:
    assert all(np.isnan(value) for value in recognition_metrics(np.zeros(3), np.zeros(3, bool)).values())


def test_confidences_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 of them not finite"):
        recognition_metrics(np.array([0, np.nan, -np.inf]), np.ones(3, bool))
    with pytest.raises(ValueError, match="Got 0 confidences"):
        recognition_metrics(np.array([]), np.array([], bool))
