from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmcr_hf.evaluation.proposals import Detector, grid_boxes, propose
from cmcr_hf.evaluation.regions import Regions, cut_square


def test_the_grid_begins_with_the_whole_picture_and_covers_it_on_every_scale() -> None:
    boxes = grid_boxes()
    assert boxes.shape == (111, 4)
    assert boxes[0].tolist() == [0, 0, 1, 1]
    assert len(np.unique(boxes.round(6), axis=0)) == 111
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() == pytest.approx(1 / 3)
    assert (sides.max(axis=1) / sides.min(axis=1)).max() == pytest.approx(2)
    for width, height in np.unique(sides.round(6), axis=0):
        kind = boxes[(np.abs(sides - [width, height]) < 1e-5).all(axis=1)]
        assert kind.min(axis=0)[:2].tolist() == [0, 0]
        assert kind.max(axis=0)[2:] == pytest.approx([1, 1])
        for axis, side in ((0, width), (1, height)):
            assert np.diff(np.unique(kind[:, axis])).max(initial=0) <= side / 2 + 1e-6


def test_a_detector_proposes_boxes_within_the_picture_and_then_the_whole(detector: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    boxes = Detector(str(detector)).boxes(pixels)
    # Five queries of a random detector lie on each other.
    assert 2 <= len(boxes) <= 6
    assert boxes[-1].tolist() == [0, 0, 1, 1]
    assert ((boxes[:, :2] >= 0) & (boxes[:, :2] < boxes[:, 2:]) & (boxes[:, 2:] <= 1)).all()
    assert Detector(str(detector)).boxes(Image.fromarray(pixels)).tolist() == boxes.tolist()


def test_what_is_no_detector_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    for name in (tiny_clip, tmp_path / "nothing"):
        with pytest.raises(ValueError, match=r"Cannot load the detector.*such as facebook/detr-resnet-50"):
            Detector(str(name))


class CountingDetector:
    """What proposes one box for every picture, and counts them."""

    def __init__(self, name: str) -> None:
        self.record = {"id": name}
        self.seen: list[int] = []

    def boxes(self, image: Image.Image) -> np.ndarray:
        self.seen.append(image.width)
        return np.array([[0.1, 0.2, 1 / 3, len(self.seen) / 7]])


def test_proposals_are_kept_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    names, widths = ["a.png", "b.png", "c.png"], [8, 9, 10]
    for name, width in zip(names, widths, strict=True):
        Image.new("RGB", (width, 8)).save(tmp_path / name)
    kept = tmp_path / "kept" / "proposals.jsonl"

    def run(name: str, pictures: list[str]) -> tuple[list[int], list[Any]]:
        detector: Any = CountingDetector(name)
        boxes = propose(detector, pictures, tmp_path, kept, progress=False)
        return detector.seen, [found.tolist() for found in boxes]

    seen, boxes = run("one", names)
    assert seen == widths
    content = kept.read_text()
    assert run("one", names) == ([], boxes)
    # Whole lines and a part of one.
    kept.write_text(content[: content.rindex("[[") + 4])
    assert run("one", names)[0] == [10]
    assert len(kept.read_text().splitlines()) == 4
    assert run("other", names)[0] == widths
    assert run("other", names[:2])[0] == widths[:2]
    (tmp_path / "b.png").write_bytes(b"no picture")
    for again in (widths[::2], []):
        seen, boxes = run("other", names)
        assert seen == again and [len(found) for found in boxes] == [1, 0, 1]


def test_a_region_is_squeezed_into_a_square_of_its_area() -> None:
    picture = Image.new("RGB", (80, 20), "white")
    picture.paste("black", (40, 0, 80, 20))
    assert cut_square(picture, np.array([0, 0, 1, 1])).size == (40, 40)
    left = cut_square(picture, np.array([0, 0, 0.5, 1]))
    assert left.size == (28, 28)
    assert np.asarray(left).min() == 255
    # Both ends of a long picture are there.
    whole = np.asarray(cut_square(picture, np.array([0, 0, 1, 1])))
    assert (whole[:, 0].min(), whole[:, -1].max()) == (255, 0)


def test_a_region_without_area_is_a_pixel() -> None:
    picture = Image.new("RGB", (10, 10))
    for box in ([0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], [0, 0, 0, 0]):
        assert cut_square(picture, np.array(box)).size == (1, 1)


def test_regions_are_read_from_any_place_on(tmp_path: Path) -> None:
    names = ["a.png", "b.png", "c.png"]
    for shade, name in enumerate(names):
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / name)
    whole = np.array([[0.0, 0.0, 1.0, 1.0]])
    regions = Regions(names, tmp_path, [np.repeat(whole, 3, axis=0), whole, np.repeat(whole, 2, axis=0)])
    every = [(item.key, item.value.getpixel((0, 0))[0]) for item in regions]
    assert every == [("a.png 0", 0), ("a.png 1", 0), ("a.png 2", 0), ("b.png 0", 1), ("c.png 0", 2), ("c.png 1", 2)]
    assert (len(regions), regions.starts) == (6, [0, 3, 4, 6])
    parts = regions.parts(4)
    assert [(part.number, part.size) for part in parts] == [(0, 4), (1, 2)]
    for part in parts:
        for start in range(part.size or 0):
            keys = [item.key for item in part.read(start)]
            assert keys == [key for key, _ in every[4 * part.number + start :][: (part.size or 0) - start]]
    other = Regions(names, tmp_path, [np.repeat(whole, 3, axis=0), whole, np.repeat(whole / 2, 2, axis=0)])
    assert other.fingerprint != regions.fingerprint
