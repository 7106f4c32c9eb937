"""Live comparisons with the upstream packages, in the environment of `make test-parity`. All weights are random.

Where a package is missing its tests are skipped. What they measure is printed at the end and, where the environment
variable CMCR_PARITY_FIGURES names a folder, kept there as a file of the day.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cmcr_hf.sources.upstream import import_upstream

FIGURES: list[dict] = []
PACKAGES = (
    "laion_clap",
    "numpy",
    "open_clip_torch",
    "pillow",
    "timm",
    "tokenizers",
    "torch",
    "torchvision",
    "transformers",
)

Record = Callable[[str, str, float, float], None]


@pytest.fixture(scope="session")
def open_clip() -> ModuleType:
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed: make test-parity")
    return import_upstream("open_clip", "open-clip")


@pytest.fixture(scope="session")
def record() -> Record:
    """Keep a largest difference and check it: `record(kind, what, difference, bound)`."""

    def keep(kind: str, what: str, difference: float, bound: float) -> None:
        FIGURES.append({"kind": kind, "what": what, "largest_difference": difference, "bound": bound})
        # A comparison with NaN is false.
        assert difference <= bound, f"{kind}, {what}: {difference:.2g} is more than {bound:g}"

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    if not FIGURES:
        return
    terminalreporter.section("largest differences, random weights")
    for figure in FIGURES:
        line = (
            f"{figure['largest_difference']:8.1e}  at most {figure['bound']:7.0e}  {figure['kind']}: {figure['what']}"
        )
        terminalreporter.write_line(line)
    folder = os.environ.get("CMCR_PARITY_FIGURES")
    # What failed is no result to keep.
    if not folder or exitstatus != pytest.ExitCode.OK:
        return
    day = datetime.now(UTC).date().isoformat()
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    content = {
        "date": day,
        "weights": "random, seeded",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES if name in installed},
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, float32",
        "figures": FIGURES,
    }
    for path in Path(folder).glob("figures-*.json"):
        path.unlink()
    target = Path(folder) / f"figures-{day}.json"
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    terminalreporter.write_line(f"kept in {target}")
