import re

import pytest

from benchmarks import training_step

SMALL = ["--batch", "8", "--dim", "4", "--steps", "3"]


def test_every_precision_has_the_step_its_floor_and_the_losses(capsys: pytest.CaptureFixture[str]) -> None:
    training_step.main([*SMALL, "--repeats", "1"])
    out = capsys.readouterr().out
    tables = re.split(r"^(float32 as '\w+'|bfloat16 autocast)\n", out, flags=re.MULTILINE)
    assert tables[1] == "float32 as 'ieee'"
    assert tables[-2] == "bfloat16 autocast"
    for table in tables[2::2]:
        names = re.findall(r"^  (\S.*?)  +[\d.]+ ms", table, flags=re.MULTILINE)
        assert names == ["bare loop", "Trainer", "matrix products", "plain loss", "loss in blocks"]
        bare, ours = (float(re.search(rf"{name} +([\d.]+) ms", table)[1]) for name in ("bare loop", "Trainer"))
        ratio, over = re.search(r"([\d.]+) x, ([+-][\d.]+) ms", table).groups()
        assert float(ratio) == pytest.approx(ours / bare, rel=0.2)
        assert float(over) == pytest.approx(ours - bare, abs=0.11)


def test_a_projection_says_what_was_measured_and_multiplies_it(capsys: pytest.CaptureFixture[str]) -> None:
    training_step.main([*SMALL, "--project", "--rows", "40"])
    out = capsys.readouterr().out
    assert "data set of 40 rows, fewer than the schedule's 2,300,000" in out
    step = float(re.search(r"([\d.]+) ms a step, .* over 3 steps", out)[1])
    minutes = float(re.search(r"projected, not measured: 20,500 steps take ([\d.]+) min", out)[1])
    assert minutes == pytest.approx(step * 20_500 / 60_000, abs=0.05 + 0.01 * 20_500 / 60_000)
