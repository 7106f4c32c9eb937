import gc
import os

# Before any import that reads them: offline, one missing file is an error at once and not minutes of retries.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Before transformers, which cannot be imported beside a torchvision that this has yet to repair.
import cmcr_hf  # noqa: F401

# isort: split
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
)

from cmcr_hf import CMCRModel, CMCRProcessor, UlipConfig, UlipModel
from cmcr_hf.evaluation import connection
from tests.hub_server import WRITER, LocalHub
from tests.simulated_gpu import SimulatedGpu, simulated_gpu

# The models under test are so small that a second thread costs more in handing over than it computes.
torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--simulated-gpu", action="store_true", help="run everything as on a GPU, the CPU computing")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("simulated_gpu"):
        for item in items:
            if "cpu_alone" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="of the CPU alone"))


def pytest_collection_finish() -> None:
    # What was imported stays. Each Trainer begins with a full collection, which need not go through all of it.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _everything_on_a_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    with simulated_gpu() if request.config.getoption("simulated_gpu") else nullcontext():
        yield


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    """A simulated GPU, which the test has to name as the device or to leave to the default."""
    with simulated_gpu() as gpu:
        yield gpu


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """The Hub of this process, on the loopback address and with an empty cache."""
    with LocalHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        # That of transformers keeps the address that it first had.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        huggingface_hub.HfFileSystem.clear_instance_cache()
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.HfFileSystem.clear_instance_cache()
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def quick_linear_map() -> Iterator[None]:
    """The linear map of the tables, trained for a few steps only, for modules that do not ask how good it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "linear_map", partial(connection.linear_map, steps=5))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with the official files and the real data, or skip the test where there is none.

    The folder lies beside the checkout; the environment variable CMCR_SHARED names another one.
    """
    named = os.environ.get("CMCR_SHARED")
    folder = Path(named) if named else ROOT.parent / "shared"
    if folder.is_dir():
        return folder
    if named:
        pytest.fail(f"Expected CMCR_SHARED to name a folder, got {named!r}. Correct it or unset it.")
    pytest.skip("No folder `shared` beside the checkout: set CMCR_SHARED to the one that holds official/ and data/.")


# Tiny random sources: they test behaviour, no quality is claimed of them.
CLIP_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "vocab_size": 40,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "image_size": 32,
    "patch_size": 16,
}
CLAP_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "vocab_size": 40,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-5,
}
CLAP_AUDIO = {
    "spec_size": 64,
    "window_size": 4,
    "num_mel_bins": 16,
    "patch_embeds_hidden_size": 8,
    "hidden_size": 16,
    "depths": [1, 1],
    "num_attention_heads": [1, 2],
}


def tiny_tokenizer(length: int) -> PreTrainedTokenizerFast:
    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *["a", "the", "dog", "cat", "bell", "sea", "train", "barks", "rings", "small", "red", "loud", "sound", "of"],
    ]
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=length, **specials)


def save_tiny_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=24)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tiny_tokenizer(20).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of width 24 with image processor and tokenizer."""
    return save_tiny_clip(tmp_path_factory.mktemp("sources") / "clip")


def save_tiny_clap(folder: Path, *, fused: bool) -> Path:
    torch.manual_seed(1)
    audio = {**CLAP_AUDIO, "enable_fusion": fused}
    ClapModel(ClapConfig(text_config=CLAP_TEXT, audio_config=audio, projection_dim=16)).save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=8000,
        max_length_s=1,
        fft_window_size=256,
        hop_length=64,
        frequency_max=4000,
        truncation="fusion" if fused else "rand_trunc",
    ).save_pretrained(folder)
    tiny_tokenizer(30).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random unfused CLAP of width 16 with feature extractor (8 kHz, windows of 1 s) and tokenizer."""
    return save_tiny_clap(tmp_path_factory.mktemp("sources") / "clap", fused=False)


@pytest.fixture(scope="session")
def tiny_fused_clap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, fused."""
    return save_tiny_clap(tmp_path_factory.mktemp("sources") / "clap-fused", fused=True)


@pytest.fixture(scope="session")
def tiny_model(tiny_clip: Path, tiny_clap: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both sources with a random connector of width 8, and their processor."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    CMCRModel.from_sources_pretrained(tiny_clip, tiny_clap, config={"projection_dim": 8}).save_pretrained(folder)
    CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap).save_pretrained(folder)
    return folder


ULIP_POINT = {
    "num_groups": 16,
    "group_size": 8,
    "group_hidden_size": 16,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def save_tiny_ulip(folder: Path, *, text: bool = False) -> Path:
    torch.manual_seed(2)
    config = UlipConfig(
        point_config=ULIP_POINT,
        vision_config=CLIP_VISION,
        text_config={**CLIP_TEXT, "hidden_act": "quick_gelu"} if text else None,
        projection_dim=12,
    )
    UlipModel(config).save_pretrained(folder)
    # Other means than CLIP's, so that a picture that goes through the wrong one is noticed.
    CLIPImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    if text:
        tiny_tokenizer(20).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_ulip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ULIP of width 12 with an image tower and its image processor, without a text tower."""
    return save_tiny_ulip(tmp_path_factory.mktemp("sources") / "ulip")


@pytest.fixture(scope="session")
def tiny_text_ulip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a text tower and tokenizer."""
    return save_tiny_ulip(tmp_path_factory.mktemp("sources") / "ulip-text", text=True)


@pytest.fixture(scope="session")
def tiny_ulip_model(tiny_clip: Path, tiny_ulip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP and ULIP with a random connector of width 8, fingerprints, and their processor."""
    folder = tmp_path_factory.mktemp("models") / "tiny-ulip"
    torch.manual_seed(0)
    model = CMCRModel.from_sources_pretrained(tiny_clip, ulip=tiny_ulip, config={"projection_dim": 8})
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, ulip=tiny_ulip)
    model.record_fingerprints(processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
