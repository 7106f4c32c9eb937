"""Packages that are optional, and the torchvision that they need."""

import sys
from pathlib import Path

import pytest
import torch

from cmcr_hf.sources import upstream
from cmcr_hf.sources.upstream import import_upstream, repair_torchvision


@pytest.fixture
def torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name in place of an installed one, which looks for operators that no other test declares."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(upstream, "_declared", [])
    monkeypatch.setattr(upstream, "OPERATORS", ("nms_of_a_test", "qnms_of_a_test"))
    (tmp_path / "torchvision").mkdir()
    path = tmp_path / "torchvision" / "__init__.py"
    yield path
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]


def test_a_torchvision_without_its_operators_becomes_importable(torchvision: Path) -> None:
    torchvision.write_text(
        "import torch\nfrom . import part\n"
        "torch.library.register_fake('torchvision::nms_of_a_test', lambda boxes, scores, threshold: boxes)\n"
        "ready = True"
    )
    (torchvision.parent / "part.py").touch()
    repair_torchvision()
    assert sys.modules["torchvision"].ready
    assert torch.ops.torchvision.qnms_of_a_test is not None
    # Once is enough.
    repair_torchvision()


def test_a_sound_torchvision_stays_as_it_is(torchvision: Path) -> None:
    torchvision.write_text("ready = True")
    repair_torchvision()
    assert sys.modules["torchvision"].ready
    assert upstream._declared == []


def test_a_torchvision_that_fails_for_another_reason_says_so(torchvision: Path) -> None:
    torchvision.write_text("raise RuntimeError('no such driver')")
    with pytest.raises(RuntimeError, match="no such driver"):
        repair_torchvision()
    assert upstream._declared == []


def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(ImportError, match=r'The package no_such_package .* pip install "cmcr-hf\[open-clip\]"'):
        import_upstream("no_such_package", "open-clip")
