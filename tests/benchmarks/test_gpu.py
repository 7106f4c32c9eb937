import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import embedding, gpu, report
from tests.benchmarks.test_embedding import Here


def test_without_a_gpu_it_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        gpu.main(["--output", str(tmp_path / "gpu.json")])
    # Python prints a text that is an exit's code, and ends with status 1.
    remedy = "Run this on a machine with one, or with --rehearse on the CPU."
    assert error.value.code == f"error: There is no CUDA device here. {remedy}"
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_table_can_be_rehearsed_on_a_cpu(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "Worker", Here)
    monkeypatch.setattr(gpu, "measure_apart", lambda name, argv, timeout: report.measure(name, argv))
    names = list(gpu.NAMES)
    arguments = [option for name in names for option in ("--only", name)]
    gpu.main(["--rehearse", "--output", str(tmp_path / "gpu.json"), "--sources", str(sources), *arguments])
    tables = json.loads((tmp_path / "gpu.json").read_text())["tables"]
    assert [table["table"] for table in tables] == [name for name, _, tiny in gpu.TABLES if tiny]
    assert all(table["lines"] for table in tables)


def test_a_table_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def measure_apart(name: str, argv: list[str], timeout: float) -> dict[str, Any]:
        asked.append((name, argv[-2:], timeout <= 60))
        return {"table": name} | ({"error": "stopped after 1 s"} if name == "aggregation" else {})

    monkeypatch.setattr(gpu, "measure_apart", measure_apart)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda device: f"a machine with {device}")
    with pytest.raises(SystemExit, match="error: These tables failed: aggregation"):
        gpu.main(["--output", str(tmp_path / "gpu.json"), "--minutes", "1"])
    assert asked == [(name, ["--device", "cuda"], True) for name, *_ in gpu.TABLES]
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["machine"] == "a machine with cuda"
    assert len(document["tables"]) == len(gpu.TABLES)
