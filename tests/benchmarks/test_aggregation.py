import pytest

from benchmarks import aggregation


def test_the_table_has_every_way_with_its_share_of_the_peak_and_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    aggregation.main(["--queries", "40", "--memory", "300", "--dim", "64", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    rows = {name: line[44:].split() for line in lines for name in [line[:44].strip()]}
    assert {"torch attention, float32 as 'ieee'", "dense softmax, float32 as 'bf16'"} < set(rows)
    assert "100%" in [columns[2] for name, columns in rows.items() if name.startswith("products, float32")]
    for name in ("aggregate, float32 as 'ieee'", "aggregate, float32, memory on disk"):
        assert float(rows[name][3]) < 5e-6
    assert float(rows["aggregate, bfloat16"][4]) < 1e-3


def test_a_score_matrix_too_large_for_memory_is_skipped_and_said_to_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregation, "MOST_SCORES", 1000)
    aggregation.main(["--queries", "40", "--memory", "300", "--dim", "64", "--repeats", "1"])
    out = capsys.readouterr().out
    assert "Skipped, more than 1000 scores: dense softmax." in out
    assert "dense softmax, float32" not in out


def test_the_whole_of_the_paper_is_projected_from_a_tenth_with_its_cosine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregation, "PAPER", (400, (300, 500)))
    aggregation.main(["--project", "--dim", "64"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:3]] == ["40 texts x 300 x 64", "40 texts x 500 x 64"]
    assert all(0.999 < float(line.split()[-1]) <= 1 for line in lines[1:3])
    assert lines[3].startswith("projected, 400 texts x (300 + 500): ")
