from pathlib import Path

import pytest
import torch
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

from cmcr_hf.evaluation import proposals


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random object detector with its image processor."""
    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 48],
        patch_size=16,
        num_detection_tokens=5,
        num_labels=3,
    )
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 48}).save_pretrained(folder)
    return folder


@pytest.fixture
def few_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of 3 boxes, so that a test takes no longer than that."""
    monkeypatch.setattr(proposals, "SIDES", (1, 0.5001))
    monkeypatch.setattr(proposals, "MAX_ASPECT", 1)
