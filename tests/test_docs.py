"""The pages under `docs/` run as they stand, against a local Hub."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import LocalHub

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str) -> list[tuple[str, str]]:
    """Return the language and the text of every code block of a page, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_walk_from_two_models_to_the_hub_runs_as_written(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    printed = ""
    with LocalHub() as hub:
        environment = hub.environment(tmp_path / "home")
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        for language, text in blocks("from_two_models_to_the_hub.md"):
            text = text.replace("ORG/", "org/")
            if language == "yaml":
                (work / "mine.yaml").write_text(text, encoding="utf-8")
                continue
            command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
            done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            printed += done.stdout
    assert "org/cmcr-mine" in hub.repositories
    assert "closed cascade" in printed
    # The dog's picture is the first of the two.
    assert printed.splitlines()[-1] == "0"
    assert (work / "runs/mine/report.html").is_file()
