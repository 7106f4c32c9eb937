from pathlib import Path

import pytest

from cmcr_hf.modeling.processing_cmcr import CMCRProcessor


@pytest.fixture(scope="module")
def processor(tiny_clip: Path, tiny_clap: Path) -> CMCRProcessor:
    return CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap)


@pytest.fixture(scope="module")
def fused(tiny_clip: Path, tiny_fused_clap: Path) -> CMCRProcessor:
    return CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_fused_clap)
