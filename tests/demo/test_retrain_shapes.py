from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from cmcr_hf.demo import retrain_shapes as module
from cmcr_hf.demo.retrain_shapes import measure, retrain_shapes
from cmcr_hf.demo.shape_captions import kind_phrase
from cmcr_hf.demo.solids import KINDS, render, sample_cloud
from cmcr_hf.modeling.modeling_ulip import UlipModel

SHIPPED = Path(module.__file__).parent / "encoders" / "shapes"
TRUTH = torch.arange(len(KINDS)).repeat_interleave(4)


def pictures(name: str) -> torch.Tensor:
    processor = AutoImageProcessor.from_pretrained(SHIPPED / name, backend="pil")
    drawn = [render(kind, np.random.default_rng([5, index])) for kind in KINDS for index in range(4)]
    return processor(drawn, return_tensors="pt")["pixel_values"]


def test_the_shipped_clip_names_new_pictures() -> None:
    model = AutoModel.from_pretrained(SHIPPED / "clip", dtype=torch.float32)
    phrases = [kind_phrase(kind) for kind in KINDS]
    tokens = AutoTokenizer.from_pretrained(SHIPPED / "clip")(phrases, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(pixel_values=pictures("clip"), **tokens).logits_per_image
    # A guess is right for one of eighteen.
    assert (logits.argmax(dim=1) == TRUTH).float().mean() > 0.8


def test_the_shipped_ulip_finds_new_pictures_for_new_clouds() -> None:
    model = UlipModel.from_pretrained(SHIPPED / "ulip", dtype=torch.float32)
    clouds = np.stack([sample_cloud(kind, np.random.default_rng([6, index])) for kind in KINDS for index in range(4)])
    with torch.inference_mode():
        logits = model(torch.from_numpy(clouds), pictures("ulip")).logits_per_point_cloud_image
        fewer = model.get_point_cloud_features(torch.from_numpy(clouds[:, :200])).pooler_output
    assert (TRUTH[logits.argmax(dim=1)] == TRUTH).float().mean() > 0.8
    assert torch.isfinite(fewer).all()


def test_the_shipped_encoders_are_float16_and_within_three_megabytes() -> None:
    for name in ("clip", "ulip"):
        weights = load_file(SHIPPED / name / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 3_000_000


@pytest.mark.slow
def test_the_recorded_figures_are_those_of_the_shipped_weights() -> None:
    recorded = json.loads((SHIPPED / "figures.json").read_text(encoding="utf-8"))
    measured = measure(SHIPPED, seed=recorded["seed"], held_out=recorded["held_out_per_kind"])
    for task in (
        "zero_shot_accuracy",
        "text_accuracy",
        "cloud_to_image",
        "image_to_cloud",
        "unconnected_cloud_to_image",
        "unconnected_image_to_cloud",
        "chance",
    ):
        assert measured[task] == pytest.approx(recorded[task], abs=0.005)
    for direction, spread in recorded["relabelled_map"].items():
        assert measured["relabelled_map"][direction] == pytest.approx(spread, abs=0.005)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("encoders")
    return folder, retrain_shapes(
        folder, seed=3, pictures=12, pairs=12, clip_steps=12, image_steps=12, point_steps=12, held_out=4
    )


@pytest.mark.slow
def test_a_short_retraining_writes_both_encoders_and_their_figures(small: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = small
    assert sorted(path.name for path in folder.iterdir()) == ["clip", "figures.json", "ulip"]
    assert json.loads((folder / "figures.json").read_text(encoding="utf-8")) == figures
    assert figures["kinds"] == len(KINDS)
    for name in ("clip", "ulip"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / name / "model.safetensors").values())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_files(small: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    retrain_shapes(tmp_path, seed=3, pictures=12, pairs=12, clip_steps=12, image_steps=12, point_steps=12, held_out=4)
    for path in small[0].rglob("*.*"):
        if path.name != "figures.json":
            assert path.read_bytes() == (tmp_path / path.relative_to(small[0])).read_bytes()
