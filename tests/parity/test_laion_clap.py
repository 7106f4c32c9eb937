"""Converted LAION-CLAP models beside laion_clap itself, at the sizes of the released files. All weights are random."""

import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import ClapModel, RobertaConfig, RobertaModel

from cmcr_hf.conversion.checkpoint import Checkpoint
from cmcr_hf.conversion.convert_laion_clap import feature_extractor, prove_clap, read_clap
from cmcr_hf.modeling.clap_extraction_cmcr import CMCRFeatureExtractor
from cmcr_hf.modeling.feature_extraction_cmcr import extract_audio

from .conftest import Record

pytestmark = pytest.mark.slow

KINDS = {
    "HTSAT-tiny, fused": ("HTSAT-tiny", True),
    "HTSAT-tiny, unfused": ("HTSAT-tiny", False),
    "HTSAT-base, unfused": ("HTSAT-base", False),
}


@pytest.fixture(scope="module")
def laion_clap() -> Iterator[ModuleType]:
    if importlib.util.find_spec("laion_clap") is None:
        pytest.skip("laion_clap is not installed: make test-parity")
    with pytest.MonkeyPatch.context() as patch:
        # On import the package loads tokenizers by name, and for every model RoBERTa's weights, which it then
        # overwrites. No test here needs either: texts are token ids, and weights are random.
        for name in ("BertTokenizer", "RobertaTokenizer", "BartTokenizer"):
            patch.setattr(getattr(transformers, name), "from_pretrained", lambda *_: None)
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
        patch.setattr(RobertaModel, "from_pretrained", lambda *_: RobertaModel(config))
        yield importlib.import_module("laion_clap")


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, laion_clap: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any, ClapModel, Checkpoint]:
    """A kind, a model of upstream, and what becomes of its checkpoint in the form of the released ones."""
    name, fused = KINDS[request.param]
    torch.manual_seed(0)
    module = laion_clap.CLAP_Module(enable_fusion=fused, amodel=name, device="cpu")
    # Norms start at one and zero and statistics at the unit, which would hide a wrong one.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for key, buffer in module.model.named_buffers():
            if key.endswith("running_mean"):
                buffer.copy_((-30 if ".bn0." in key else 0) + torch.randn(buffer.shape, generator=generator))
            elif key.endswith("running_var"):
                buffer.copy_((300 if ".bn0." in key else 1) * (0.5 + torch.rand(buffer.shape, generator=generator)))
    state = {f"module.{key}": tensor for key, tensor in module.model.state_dict().items()}
    path = tmp_path_factory.mktemp("laion") / "checkpoint.pt"
    torch.save({"epoch": 1, "name": "random", "state_dict": state, "optimizer": {}}, path)
    model, checkpoint = read_clap(path)
    return request.param, module, model, checkpoint


def test_the_proof_is_laion_claps_own(
    pair: tuple[str, Any, ClapModel, Checkpoint], laion_clap: ModuleType, record: Record
) -> None:
    kind, _, model, checkpoint = pair
    proof = prove_clap(model, checkpoint)
    assert proof.reference == "laion_clap 1.1.7"
    for modality, difference in proof.differences.items():
        record(f"laion_clap conversion, {kind}, float64", f"{modality} embeddings", difference, proof.bound)


@torch.no_grad()
def test_texts_have_the_embeddings_of_laion_clap(pair: tuple[str, Any, ClapModel, Checkpoint], record: Record) -> None:
    kind, module, model, _ = pair
    generator = torch.Generator().manual_seed(2)
    ids, mask = torch.ones(4, 77, dtype=torch.long), torch.zeros(4, 77, dtype=torch.long)
    for row, length in enumerate((3, 10, 40, 77)):
        ids[row, :length] = torch.randint(4, 50265, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1], mask[row, :length] = 0, 2, 1
    module.model.eval()
    expected = module.model.get_text_embedding({"input_ids": ids, "attention_mask": mask})
    found = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    record(f"laion_clap conversion, {kind}, float32", "text embeddings", difference(found, expected), 1e-6)


@torch.no_grad()
def test_clips_have_the_embeddings_of_laion_clap(
    pair: tuple[str, Any, ClapModel, Checkpoint], record: Record, laion_clap: ModuleType
) -> None:
    kind, module, model, _ = pair
    data = importlib.import_module("laion_clap.training.data")
    clips = [data.int16_to_float32(data.float32_to_int16(clip)) for clip in waveforms()]
    expected = torch.from_numpy(module.get_audio_embedding_from_data(clips))
    extractor = CMCRFeatureExtractor.from_dict(feature_extractor(model.config).to_dict())
    features = [extract_audio(clip, extractor, 48000) for clip in clips]
    inputs = {name: torch.from_numpy(np.stack([feature[name] for feature in features])) for name in features[0]}
    found = model.get_audio_features(**inputs).pooler_output
    assert difference(expected[:1], expected[1:2]) > 1e-3
    record(f"laion_clap conversion, {kind}, float32", "embeddings of clips", difference(found, expected), 2e-6)


def waveforms() -> list[np.ndarray]:
    """Noise with a swelling tone in it, of 1, 4.4 and 10 s at 48 kHz: none is cut, which upstream does at random."""
    random = np.random.default_rng(0)
    clips = []
    for seconds, pitch in ((1.0, 440), (4.4, 1200), (10.0, 90)):
        time = np.arange(int(48000 * seconds)) / 48000
        tone = 0.4 * np.sin(2 * np.pi * pitch * time) * np.sin(np.pi * time / seconds)
        clips.append((tone + 0.05 * random.standard_normal(len(time))).astype(np.float32))
    return clips


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (F.normalize(found, dim=-1) - F.normalize(expected, dim=-1)).abs().max().item()
