from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from cmcr_hf.demo.apart import train_apart


@pytest.fixture(autouse=True)
def _started_by_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    # As these processes are, which then import what a job needs and no more: here, neither torch nor transformers.
    monkeypatch.setattr("sys.argv", ["cmcr"])


def test_jobs_run_in_processes_of_their_own_with_one_thread_and_the_environment_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    code = "import os, pathlib; pathlib.Path(r'{}').write_text(os.environ['OMP_NUM_THREADS'] + ' ' + str(os.getpid()))"
    jobs = {name: (exec, code.format(tmp_path / name)) for name in ("first", "second")}
    assert set(train_apart(**jobs)) == {"first", "second"}
    threads, processes = zip(*((tmp_path / name).read_text().split() for name in jobs), strict=True)
    assert threads == ("1", "1") and os.environ["OMP_NUM_THREADS"] == "7"
    assert len({*processes, str(os.getpid())}) == 3


def test_a_job_that_fails_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match="invalid literal"):
        train_apart(sleeps=(time.sleep, 600), fails=(int, "no number"))
    assert time.monotonic() - start < 60


def test_a_process_of_the_command_imports_what_its_job_needs_and_no_more(tmp_path: Path) -> None:
    code = "import pathlib, sys; pathlib.Path(r'{}').write_text(str({{'torch', 'transformers'}} & set(sys.modules)))"
    train_apart(job=(exec, code.format(tmp_path / "heavy")))
    assert (tmp_path / "heavy").read_text() == "set()"
