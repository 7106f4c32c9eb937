import pytest

from benchmarks import front_ends


@pytest.mark.slow
def test_the_tables_have_every_front_end_with_its_peer_and_its_floor(capsys: pytest.CaptureFixture[str]) -> None:
    front_ends.main(["--repeats", "1", "--clips", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert "SYNTHETIC" in lines[0]
    rows = {line[:44].strip(): line[44:].split() for line in lines}
    for name in ("log-mel, 25 s fused", "decode, mix down and resample 10 s, ogg", "decode and prepare a JPEG"):
        theirs, ours, ratio, floor, share = (float(column.rstrip("%")) for column in rows[name])
        assert ratio == pytest.approx(theirs / ours, rel=0.05)
        assert share / 100 == pytest.approx(floor / ours, rel=0.05, abs=0.01)
    assert len(rows["JPEGs, both"]) == len(rows["FLACs of 10 s, both"]) == 4
