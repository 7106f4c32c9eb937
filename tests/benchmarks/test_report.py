import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks import report


def test_a_table_is_aligned_and_leaves_missing_cells_empty() -> None:
    columns = {"what": ("name", ""), "rate": ("items/s", ".1f"), "share": ("share", ".0%")}
    rows = [{"what": "one", "rate": 12345.678, "share": 0.5}, {"what": "another", "rate": 1, "share": None}]
    assert report.format_table(rows, columns).splitlines() == [
        "name     items/s  share",
        "one      12345.7    50%",
        "another      1.0",
    ]


def test_what_a_benchmark_prints_and_returns_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> list[dict[str, int]]:
        print("a table\nof two lines")
        return [{"rate": len(argv)}]

    monkeypatch.setitem(sys.modules, "benchmarks.stand_in", SimpleNamespace(main=main))
    table = report.measure("stand_in", ["--size", "a b"])
    assert table["command"] == "python -m benchmarks.stand_in --size 'a b'"
    assert table["rows"] == [{"rate": 2}]
    assert table["lines"] == capsys.readouterr().out.splitlines() == ["a table", "of two lines"]


@pytest.mark.parametrize(
    "error", [subprocess.CalledProcessError(3, "python"), subprocess.TimeoutExpired("python", 5.0)]
)
def test_a_table_that_fails_is_an_entry_with_the_reason(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(report.subprocess, "run", run)
    table = report.measure_apart("floors", ["--rows", "3"], timeout=5)
    reasons = {subprocess.CalledProcessError: "ended with status 3", subprocess.TimeoutExpired: "stopped after 5 s"}
    assert table["error"] == reasons[type(error)]
    assert table["command"] == "python -m benchmarks.floors --rows 3"


def test_the_list_says_what_each_benchmark_is(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-2]] == [*command.TABLES, *command.APART]
    assert all(len(line.split()) > 5 for line in lines[:-2])


def test_every_benchmark_is_in_the_list() -> None:
    folder = Path(command.__file__).parent
    found = {path.stem for path in folder.glob("*.py") if '\nif __name__ == "__main__":' in path.read_text()}
    assert found - {"__main__", "report"} == {*command.TABLES, *command.APART}


def test_all_tables_run_in_order_and_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def measure_apart(name: str, options: list[str]) -> dict[str, object]:
        calls.append((name, options))
        return {"table": name, "seconds": 1.0} | ({"error": "ended with status 1"} if name == "service" else {})

    monkeypatch.setattr(command, "measure_apart", measure_apart)
    with pytest.raises(SystemExit, match="error: These tables failed: service"):
        command.main(["--output", str(tmp_path)])
    assert [name for name, _ in calls] == list(command.TABLES)
    assert dict(calls)["growth"] == ["--output", str(tmp_path / "growth.svg")]
    assert {path.stem for path in tmp_path.iterdir()} == set(command.TABLES)
    assert json.loads((tmp_path / "floors.json").read_text())["table"] == "floors"
    assert "s in all" in capsys.readouterr().out
    command.main(["--only", "floors"])
    assert calls[-1] == ("floors", [])


@pytest.mark.slow
def test_a_benchmark_in_a_process_of_its_own_shows_and_returns_its_table(capfd: pytest.CaptureFixture[str]) -> None:
    table = report.measure_apart("log_mel", ["--clips", "1", "--seconds", "1", "--repeats", "1"])
    assert table["lines"] == capfd.readouterr().out.splitlines()
    assert table["rows"][0]["ratio"] == 1
