import base64
import io
import itertools

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from cmcr_hf.pages import charts

LABELS = ["cat", "dog", "bell", "dog", "sea", "sea"]
CLASSES = ["bell", "cat", "dog", "sea"]
BOTH = {"query": LABELS, "gallery": LABELS}
SAME = torch.tensor([[a == b for b in LABELS] for a in LABELS])
HISTORY = [
    {"step": step, "loss": 4.0 / step, "loss_overlap": 2.0 / step, "loss_leaf": 1.9 / step, "loss_intra": 1.0 / step}
    for step in (1, 2, 4)
]


@pytest.fixture
def rows():
    """Random unit rows of both modalities: there is nothing to be found."""
    generator = torch.Generator().manual_seed(0)
    return {modality: normalize(torch.randn(6, 16, generator=generator), dim=-1) for modality in ("query", "gallery")}


def test_the_heat_map_holds_the_mean_cosine_of_every_pair_of_classes(rows):
    heat = charts.heat_map(rows, BOTH, CLASSES)
    cosine = rows["query"] @ rows["gallery"].T
    assert len(heat["cells"]) == 16
    for cell in heat["cells"]:
        sounds = torch.tensor([label == cell["query"] for label in LABELS])
        pictures = torch.tensor([label == cell["gallery"] for label in LABELS])
        assert cell["value"] == pytest.approx(cosine[sounds][:, pictures].mean().item(), abs=1e-6)
    assert heat["own"] == sum(cell["own"] and cell["nearest"] for cell in heat["cells"])
    assert heat["own"] + len(heat["lost"]) == 4


def test_of_many_classes_the_heat_map_is_a_picture_with_a_light_diagonal():
    labels = [f"class {index:02d}" for index in range(60)]
    rows = {"query": torch.eye(60), "gallery": torch.eye(60)}
    heat = charts.heat_map(rows, {"query": labels, "gallery": labels}, labels)
    assert (heat["own"], heat["lost"], heat["cells"]) == (60, [], [])
    picture = Image.open(io.BytesIO(base64.b64decode(heat["pixels"].partition(",")[2])))
    assert picture.size == (60, 60)
    assert picture.getpixel((7, 7)) == charts._colour(1)
    assert picture.getpixel((7, 8)) == charts._colour(0)


def test_on_its_own_scale_a_shrunken_and_shifted_copy_meets_every_class(rows):
    sounds = 0.1 * rows["gallery"] + 3
    _, (_, after) = charts.maps(rows, {"query": sounds, "gallery": rows["gallery"]}, BOTH, CLASSES)
    for entry in after["classes"]:
        assert entry["middles"]["query"] == pytest.approx(entry["middles"]["gallery"], abs=0.11)
    # On one scale, the shift is nearly all that varies.
    (_, after), _ = charts.maps(rows, {"query": sounds, "gallery": rows["gallery"]}, BOTH, CLASSES)
    assert after["share"] > 0.95
    assert all(abs(entry["middles"]["query"][0] - entry["middles"]["gallery"][0]) > 300 for entry in after["classes"])


def test_the_gap_is_that_of_all_items(rows):
    before, after = charts.gap(rows, rows, BOTH, CLASSES)
    assert before | {"when": "after"} == after
    cosine = rows["query"] @ rows["gallery"].T
    assert before["same"] == pytest.approx(cosine[SAME].mean().item(), abs=1e-6)
    assert before["other"] == pytest.approx(cosine[~SAME].mean().item(), abs=1e-6)
    assert before["distance"] == pytest.approx(
        (rows["query"].mean(0) - rows["gallery"].mean(0)).norm().item(), abs=1e-6
    )


def test_the_scale_runs_from_its_first_colour_to_its_last():
    assert charts._colour(0) == (0x44, 0x01, 0x54)
    assert charts._colour(1) == (0xFD, 0xE7, 0x25)
    assert charts._colour(0.5) == ((0x27 + 0x1F + 1) // 2, (0x7F + 0xA1) // 2, (0x8E + 0x87) // 2)


def test_the_plane_is_that_of_the_largest_variance_with_a_fixed_sign():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 5, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 9.0, 0.1, -4.0, 0.2])
    rows -= rows.mean(0)
    axes = charts._axes(rows)
    assert axes.abs()[1, 0] > 0.99 and axes.abs()[3, 1] > 0.99
    assert axes[1, 0] > 0 and axes[3, 1] > 0
    torch.testing.assert_close(charts._axes(-rows), axes)


def test_names_in_a_map_cover_neither_each_other_nor_a_middle():
    entries = [
        {"name": f"class {index}", "middles": {"gallery": (100.0 + 5 * index, 100.0)}, "label": None}
        for index in range(20)
    ]
    charts._place_names(entries)
    labels = [entry["label"] for entry in entries if entry["label"]]
    assert 1 <= len(labels) < 20
    boxes = [(label["x"], label["y"], len(label["text"]) * 7) for label in labels]
    for (x, y, width), (left, baseline, other) in itertools.combinations(boxes, 2):
        assert abs(y - baseline) > 10 or x + width < left or left + other < x


def test_the_curves_show_every_term_from_zero():
    curves = charts.curves(HISTORY)
    assert [curve["name"] for curve in curves] == ["loss", "loss_overlap", "loss_leaf", "loss_intra"]
    assert curves[0]["top"] == 5 and curves[1]["top"] == 2
    # The last of three steps ends at the right, at 1.0 of 5.0.
    assert curves[0]["spots"][-1] == (336.0, 124.0)
    assert curves[0]["spots"][0][0] == pytest.approx(46 + 290 / 4, abs=0.1)


def test_a_long_log_is_thinned_and_keeps_its_end():
    (curve,) = charts.curves([{"step": step, "loss": 1.0} for step in range(1, 10_001)])
    assert len(curve["spots"]) <= charts.CURVE_POINTS + 1
    assert curve["last"] == (10_000, 1.0)
