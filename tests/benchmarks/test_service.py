from pathlib import Path

import pytest

from benchmarks import service


def test_every_tower_has_its_latency_beside_a_peers(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = service.main(["--only", "latency", "--queries", "2", "--sources", str(sources)])
    assert [row["what"].split(",")[0] for row in rows] == ["text", "image", "audio", "point cloud"]
    for row in rows:
        assert 0 < row["p50"] <= row["p95"]
        assert row["ratio"] == row["plain_p50"] / row["p50"]
        assert row["share"] == row["model"] / row["p50"]
    assert "ms a query, alone" in capsys.readouterr().out


def test_queries_come_in_turn_and_again_after_the_last() -> None:
    seen: list[str] = []
    run = service._one_by_one(["a", "b"], seen.append)
    for _ in range(3):
        run()
    assert seen == ["a", "b", "a"]


@pytest.mark.slow
def test_a_start_is_measured_from_the_import_to_the_first_answer(sources: Path) -> None:
    rows = service.main(["--only", "start", "--queries", "1", "--repeats", "1", "--sources", str(sources)])
    names = ["whole model", "audio, image", "text", "image", "audio", "point_cloud", "connector and its sources"]
    assert [row["what"] for row in rows] == [*names, "transformers: CLIP, CLAP"]
    for row in rows:
        assert row["total"] == pytest.approx(row["import"] + row["load"] + row["query"])
        assert 0 < row["memory_imports"] <= row["memory_used"]
    assert rows[1]["parameters"] < rows[0]["parameters"]


@pytest.mark.slow
def test_a_search_that_was_asked_before_needs_no_model(sources: Path) -> None:
    rows = service.main(["--only", "search", "--queries", "2", "--repeats", "1", "--sources", str(sources)])
    seconds = {row["what"]: row["seconds"] for row in rows}
    assert seconds["cmcr search, a text asked before"] < seconds["cmcr search, a new text"]
