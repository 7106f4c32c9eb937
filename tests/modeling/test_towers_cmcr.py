import json
from pathlib import Path

import pytest
import torch

from cmcr_hf import CMCRModel, CMCRProcessor
from cmcr_hf.modeling.towers_cmcr import source_id


def test_a_connector_with_sources_from_relative_folders_loads_from_any_folder(
    tiny_clip: Path, tiny_clap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/clip").symlink_to(tiny_clip)
    (tmp_path / "models/clap").symlink_to(tiny_clap)
    monkeypatch.chdir(tmp_path)
    sources = {"clip": "models/clip", "clap": "models/clap"}
    model = CMCRModel.from_sources_pretrained(**sources, config={"projection_dim": 8})
    model.record_fingerprints(CMCRProcessor.from_sources_pretrained(**sources))
    model.connector.save_pretrained("out")
    config = json.loads(Path("out/config.json").read_text())
    assert {space: record["id"] for space, record in config["sources"].items()} == {
        space: str(tmp_path / name) for space, name in sources.items()
    }
    assert config["clip_config"]["_name_or_path"] == str(tmp_path / "models/clip")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = CMCRModel.from_pretrained("../out")
    assert torch.equal(again.clap.text_projection.linear1.weight, model.clap.text_projection.linear1.weight)


def test_a_source_whose_towers_are_not_loaded_is_recorded_with_its_absolute_path(
    tiny_clip: Path, tiny_clap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/clip").symlink_to(tiny_clip)
    monkeypatch.chdir(tmp_path)
    model = CMCRModel.from_sources_pretrained(
        "models/clip", tiny_clap, config={"projection_dim": 8}, modalities=["audio"]
    )
    assert model.config.sources["clip"]["id"] == str(tmp_path / "models/clip")


def test_files_are_known_by_absolute_paths_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("clap.pt", "openai"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert source_id(Path("clap.pt")) == str(tmp_path / "clap.pt")
    assert source_id("open_clip:ViT-B-32/clap.pt") == f"open_clip:ViT-B-32/{tmp_path}/clap.pt"
    for name in ("org/clip", "absent.pt", "open_clip:ViT-B-32/openai", "open_clip:ViT-B-32/absent.pt", ""):
        assert source_id(name) == name
