from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import growth


def test_a_slope_is_the_power_of_the_rows() -> None:
    assert growth.slope({rows: 3e-4 * rows**1.5 for rows in (10, 40, 160)}) == pytest.approx(1.5)


@pytest.mark.parametrize("stage", growth.LARGEST)
def test_every_stage_is_measured_at_every_size(stage: str, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--scale", "1e-9", "--sizes", "2", "--repeats", "1"]
    *rows, summary = growth.main(["--only", stage, *sizes, "--sources", str(sources)])
    assert [(row["stage"], row["rows"]) for row in rows] == [(stage, 2), (stage, 4)]
    assert summary["slope"] == pytest.approx(growth.slope({row["rows"]: row["seconds"] for row in rows}))


def test_the_plot_names_every_stage_within_its_frame(tmp_path: Path) -> None:
    # All end at one point, where their names would cover each other.
    measured = {stage: {100: 0.5, 1000: 5.0} for stage in growth.LARGEST}
    (tmp_path / "plot.svg").write_text(growth.draw(measured, "a <machine>"))
    root = ElementTree.parse(tmp_path / "plot.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    texts = {text.text: text for text in root.iter(f"{space}text")}
    assert "a <machine>" in texts
    heights = sorted(float(texts[f"{stage}, slope 1.00"].get("y")) for stage in growth.LARGEST)
    assert min(later - former for former, later in pairwise(heights)) > 35.9
    assert 0 < heights[0] < heights[-1] < float(root.get("height"))
    assert len(list(root.iter(f"{space}circle"))) == 2 * len(growth.LARGEST)
