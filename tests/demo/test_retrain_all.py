from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from cmcr_hf.demo import retrain_all as module
from cmcr_hf.demo.captions import concept_phrase
from cmcr_hf.demo.retrain_all import drawn_or_rendered, measure, retrain_all
from cmcr_hf.demo.sounding_solids import BUILDERS, sample_cloud
from cmcr_hf.modeling.modeling_ulip import UlipModel

SHIPPED = Path(module.__file__).parent / "encoders" / "all"
TRUTH = torch.arange(len(BUILDERS)).repeat_interleave(6)


def pictures(name: str) -> torch.Tensor:
    processor = AutoImageProcessor.from_pretrained(SHIPPED / name, backend="pil")
    drawn = [drawn_or_rendered(concept, np.random.default_rng([5, row])) for concept in BUILDERS for row in range(6)]
    values: torch.Tensor = processor(drawn, return_tensors="pt")["pixel_values"]
    return values


def test_the_shipped_clip_names_new_pictures() -> None:
    model = AutoModel.from_pretrained(SHIPPED / "clip", dtype=torch.float32)
    phrases = [concept_phrase(concept) for concept in BUILDERS]
    tokens = AutoTokenizer.from_pretrained(SHIPPED / "clip")(phrases, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(pixel_values=pictures("clip"), **tokens).logits_per_image
    # A guess is right for one of twelve.
    assert (logits.argmax(dim=1) == TRUTH).float().mean() > 0.6


def test_the_shipped_ulip_finds_new_pictures_for_new_clouds() -> None:
    model = UlipModel.from_pretrained(SHIPPED / "ulip", dtype=torch.float32)
    clouds = np.stack(
        [sample_cloud(concept, np.random.default_rng([6, row])) for concept in BUILDERS for row in range(6)]
    )
    with torch.inference_mode():
        logits = model(torch.from_numpy(clouds), pictures("ulip")).logits_per_point_cloud_image
    assert (TRUTH[logits.argmax(dim=1)] == TRUTH).float().mean() > 0.75


def test_the_shipped_encoders_are_float16_and_within_three_megabytes() -> None:
    for name in ("clip", "ulip"):
        weights = load_file(SHIPPED / name / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 3_000_000


@pytest.mark.slow
def test_the_recorded_figures_are_those_of_the_shipped_weights() -> None:
    recorded = json.loads((SHIPPED / "figures.json").read_text(encoding="utf-8"))
    measured = measure(SHIPPED, seed=recorded["seed"], held_out=recorded["held_out_per_concept"])
    for task in (
        *("zero_shot_accuracy", "text_accuracy", "cloud_to_image", "image_to_cloud"),
        *("unconnected_cloud_to_image", "chance"),
    ):
        assert measured[task] == pytest.approx(recorded[task], abs=0.005)


@pytest.mark.slow
def test_a_short_retraining_writes_both_encoders_and_their_figures(tmp_path: Path) -> None:
    small = {"pictures": 12, "pairs": 12, "clip_steps": 12, "image_steps": 12, "point_steps": 12, "held_out": 4}
    figures = retrain_all(tmp_path, seed=3, **small)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "figures.json", "ulip"]
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8")) == figures
    for name in ("clip", "ulip"):
        assert all(
            torch.isfinite(tensor).all() for tensor in load_file(tmp_path / name / "model.safetensors").values()
        )
