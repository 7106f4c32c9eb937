"""Models of open_clip as sources, beside open_clip itself: small members of its families. All weights are random."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import RobertaConfig

from cmcr_hf import CMCRConfig, CMCRConnector, CMCRModel, CMCRProcessor
from cmcr_hf.connect import connect
from cmcr_hf.conversion.hub import public_name
from cmcr_hf.sources.open_clip import OpenClipConfig, OpenClipModel, load_model, load_parts
from cmcr_hf.sources.upstream import import_upstream
from cmcr_hf.training.embed import source_record
from cmcr_hf.training.recipe import DataSpec, Recipe, SourceSpec, TrainSpec
from tests.conftest import tiny_tokenizer
from tests.test_connect import write_data

from .conftest import Record

pytestmark = pytest.mark.slow

TEXT = {"width": 64, "heads": 2, "layers": 2}
SMALL_TEXT = {"context_length": 77, "vocab_size": 49408, **TEXT}
VIT = {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
# Changes to an architecture of open_clip, or a whole one, that make a small member of its family.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViT-B-32", {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}),
    "ViT-quickgelu": ("ViT-B-32-quickgelu", {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}),
    "ResNet": ("RN50", {"embed_dim": 24, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1]}, "text_cfg": TEXT}),
    "CoCa": (
        "coca_ViT-B-32",
        {
            "embed_dim": 64,
            "vision_cfg": VIT,
            "text_cfg": TEXT,
            "multimodal_cfg": {"width": 64, "heads": 2, "layers": 1},
        },
    ),
    "EVA": (
        "EVA02-B-16",
        {"vision_cfg": {"timm_model_name": "eva02_tiny_patch14_224"}, "text_cfg": TEXT},
    ),
    "MobileCLIP": ("MobileCLIP-S1", {"vision_cfg": {"timm_model_name": "fastvit_mci0"}, "text_cfg": TEXT}),
    "MobileCLIP2": ("MobileCLIP2-S0", {"text_cfg": TEXT}),
    "ConvNeXt": (
        "convnext_base",
        {"vision_cfg": {"timm_model_name": "convnext_atto", "image_size": 64}, "text_cfg": TEXT},
    ),
    "ViTamin": ("ViTamin-S", {"text_cfg": TEXT}),
    "SigLIP": ("ViT-B-16-SigLIP", {"text_cfg": {"vocab_size": 40, **TEXT}}),
    "RoBERTa": ("roberta-ViT-B-32", {"embed_dim": 24, "vision_cfg": VIT}),
}


@dataclass
class Member:
    """A small model of open_clip with random weights in a file, and its name as a source."""

    name: str
    file: Path
    model: Any
    preprocess: dict[str, Any]

    @property
    def source(self) -> str:
        return f"open_clip:{self.name}/{self.file}"


@pytest.fixture(scope="module")
def member(open_clip: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Member]:
    made: dict[str, Member] = {}

    def make(family: str) -> Member:
        if family not in made:
            base, changes = FAMILIES[family]
            folder = tmp_path_factory.mktemp(family)
            cfg = open_clip.get_model_config(base)
            for key, value in changes.items():
                cfg[key] = {**cfg[key], **value} if isinstance(value, dict) else value
            if family == "RoBERTa":
                tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
                roberta = RobertaConfig(**tower, vocab_size=40, max_position_embeddings=90, pad_token_id=0)
                roberta.save_pretrained(folder / "text")
                cfg["text_cfg"]["hf_model_name"] = str(folder / "text")
            if "hf_tokenizer_name" in cfg["text_cfg"]:
                tiny_tokenizer(77).save_pretrained(folder / "text")
                cfg["text_cfg"]["hf_tokenizer_name"] = str(folder / "text")
            name = f"small-{family}"
            (folder / f"{name}.json").write_text(json.dumps(cfg))
            open_clip.add_model_config(folder / f"{name}.json")
            torch.manual_seed(0)
            model = open_clip.create_model(name, pretrained_text=False).eval()
            with torch.no_grad():
                # Layer scales start near zero and statistics at the unit, which would hide whole layers.
                generator = torch.Generator().manual_seed(1)
                for key, tensor in model.state_dict().items():
                    if key.endswith(("gamma", "layer_scale", "running_var")) and tensor.is_floating_point():
                        tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            torch.save(model.state_dict(), folder / "weights.pt")
            preprocess = {key: value for key, value in model.visual.preprocess_cfg.items()}
            if family == "SigLIP":
                preprocess |= {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
            (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": preprocess}))
            made[family] = Member(name, folder / "weights.pt", model, preprocess)
        return made[family]

    return make


def picture(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width)
    small = Image.fromarray(random.integers(0, 256, (7, 9, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


# None whose crop lies half a pixel off, which transformers and torchvision round differently.
PICTURES = [picture(640, 480), picture(333, 500), picture(96, 64)]
TEXTS = ["a small red dog barks", "the sea", "A cat, and a bell: rings_loud!", "sound " * 100]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (F.normalize(found, dim=-1) - F.normalize(expected, dim=-1)).abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_source_gives_what_open_clip_gives(
    open_clip: ModuleType,
    member: Callable[[str], Member],
    record: Record,
    tiny_clap: Path,
    tmp_path: Path,
    family: str,
) -> None:
    made = member(family)
    model = CMCRModel.from_sources_pretrained(made.source, tiny_clap, config={"projection_dim": 8})
    processor = CMCRProcessor.from_sources_pretrained(made.source, tiny_clap)
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**made.preprocess), is_train=False
    )
    pixels = torch.stack([transform(image) for image in PICTURES])
    ids = open_clip.get_tokenizer(made.name)(TEXTS)

    images, texts = processor(images=PICTURES), processor(text=TEXTS)
    found = (images["pixel_values"] - pixels).abs().max().item()
    record(f"open_clip source, {family}", "pixels of three pictures", found, 1e-5)
    embeds = {
        "image": (model.clip.get_image_features(pixels), made.model.encode_image(pixels)),
        "text": (model.clip.get_text_features(**texts), made.model.encode_text(ids)),
    }
    for modality, (found, expected) in embeds.items():
        # The rows are not all alike, so that an embedding of the wrong input would show.
        assert difference(expected[:1], expected[1:2]) > 1e-3
        record(
            f"open_clip source, {family}", f"{modality} embeddings", difference(found.pooler_output, expected), 1e-5
        )

    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = CMCRModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    prepared = CMCRProcessor.from_pretrained(tmp_path / "model")
    for inputs in ({"images": PICTURES}, {"text": TEXTS}):
        for name, value in processor(**inputs).items():
            assert torch.equal(prepared(**inputs)[name], value)
    assert torch.equal(again.get_text_features(**texts).pooler_output, model.get_text_features(**texts).pooler_output)
    assert torch.equal(
        again.get_image_features(**images).pooler_output, model.get_image_features(**images).pooler_output
    )


def test_weights_come_from_the_file_and_not_from_the_initialisation(
    member: Callable[[str], Member], tmp_path: Path
) -> None:
    made = member("ViT")
    weights = torch.load(made.file, weights_only=True)
    weights["visual.proj"] = weights["visual.proj"].flip(0)
    torch.save(weights, tmp_path / "other.pt")
    model = load_model(f"open_clip:{made.name}/{tmp_path}/other.pt", ["image", "text"], {})
    assert torch.equal(model.visual.proj, weights["visual.proj"])


def test_the_towers_of_other_modalities_are_not_kept(
    member: Callable[[str], Member], tiny_clap: Path, tmp_path: Path
) -> None:
    source = member("CoCa").source
    whole = CMCRModel.from_sources_pretrained(source, tiny_clap, config={"projection_dim": 8})
    inputs = CMCRProcessor.from_sources_pretrained(source, tiny_clap)(images=PICTURES)
    whole.save_pretrained(tmp_path)
    part = CMCRModel.from_pretrained(tmp_path, modalities=["image"])
    assert {name for name, _ in part.clip.named_children()} == {"visual"}
    assert torch.equal(
        part.get_image_features(**inputs).pooler_output, whole.get_image_features(**inputs).pooler_output
    )
    alone = load_model(source, ["text"], {})
    assert {name for name, _ in alone.named_children()} == {"text"}


def test_a_connector_finds_its_source_by_name_and_knows_its_weights(
    member: Callable[[str], Member], tiny_clap: Path, tmp_path: Path
) -> None:
    made = member("MobileCLIP")
    model = CMCRModel.from_sources_pretrained(made.source, tiny_clap, config={"projection_dim": 8})
    processor = CMCRProcessor.from_sources_pretrained(made.source, tiny_clap)
    model.record_fingerprints(processor)
    model.connector.save_pretrained(tmp_path)
    assert CMCRConfig.from_pretrained(tmp_path).sources["clip"] == {"id": made.source, "revision": None}
    assert CMCRConnector.from_pretrained(tmp_path).config.clip_config.model_type == "open_clip"

    again = CMCRModel.from_pretrained(tmp_path)
    texts = processor(text=TEXTS)
    assert torch.equal(again.get_text_features(**texts).pooler_output, model.get_text_features(**texts).pooler_output)
    weights = torch.load(made.file, weights_only=True)
    weights["text.text_projection"] = weights["text.text_projection"].flip(0)
    torch.save(weights, tmp_path / "other.pt")
    other = f"open_clip:{made.name}/{tmp_path}/other.pt"
    with pytest.raises(ValueError, match=r"is not the clip source.*its text embeddings"):
        CMCRModel.from_sources_pretrained(other, tiny_clap, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("family", ["EVA", "CoCa", "RoBERTa"])
def test_a_saved_source_is_a_model_of_its_own(member: Callable[[str], Member], tmp_path: Path, family: str) -> None:
    model = load_model(member(family).source, ["image", "text"], {"dtype": torch.float32})
    ids = torch.randint(4, 18, (3, 9), generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    again = OpenClipModel.from_pretrained(tmp_path)
    assert isinstance(again.config, OpenClipConfig) and again.config.model_cfg == model.config.model_cfg
    assert torch.equal(again.get_text_features(ids).pooler_output, model.get_text_features(ids).pooler_output)
    half = OpenClipModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected, found = model.get_text_features(ids).pooler_output, half.get_text_features(ids).pooler_output
    assert found.dtype == torch.bfloat16
    assert F.cosine_similarity(found.float(), expected).min() > 0.99


def test_a_saved_source_that_lacks_a_weight_is_refused(member: Callable[[str], Member], tmp_path: Path) -> None:
    load_model(member("ViT").source, ["image", "text"], {}).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["visual.ln_pre.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 of the weights of an OpenClipModel, e\.g\. 'visual\.ln_pre\.weight'"
    ):
        OpenClipModel.from_pretrained(tmp_path)


def test_padding_of_any_id_and_length_is_without_effect(member: Callable[[str], Member]) -> None:
    for family in ("ViT", "CoCa", "MobileCLIP", "SigLIP"):
        model = load_model(member(family).source, ["text"], {})
        end = 39 if family == "SigLIP" else 49407
        ids = torch.tensor([[5, 7, 9, end, end, end], [5, 7, 9, 11, 13, end]])
        mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
        short = model.get_text_features(ids, mask).pooler_output[0]
        alone = model.get_text_features(ids[:1, :4], mask[:1, :4]).pooler_output[0]
        torch.testing.assert_close(short, alone, rtol=0, atol=2e-6)


def test_texts_that_are_too_long_are_refused(member: Callable[[str], Member]) -> None:
    model = load_model(member("ViT").source, ["text"], {})
    with pytest.raises(ValueError, match="at most 77 tokens, got 78"):
        model.get_text_features(torch.ones(1, 78, dtype=torch.long))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("open_clip:ViT-B-32/no_such_tag", r"knows no weights ViT-B-32/no_such_tag\. Expected one of \['openai'"),
        ("open_clip:no-such-model/openai", "knows no weights no-such-model/openai"),
        ("open_clip:ViT-B-32/openai", r"Use ViT-B-32-quickgelu/openai\."),
        ("open_clip:ViT-B-32", "Name the architecture and its weights"),
        ("open_clip:/openai", "Name the architecture and its weights"),
    ],
)
def test_a_name_that_open_clip_does_not_know_is_refused(
    open_clip: ModuleType, tiny_clap: Path, source: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CMCRModel.from_sources_pretrained(source, tiny_clap)
    with pytest.raises(ValueError, match=message):
        CMCRProcessor.from_sources_pretrained(source, tiny_clap)


def test_weights_of_another_architecture_are_refused(member: Callable[[str], Member]) -> None:
    source = f"open_clip:{member('ViT').name}/{member('ResNet').file}"
    with pytest.raises(ValueError, match="open_clip cannot load 'open_clip:small-ViT"):
        load_model(source, ["image", "text"], {})


def test_preprocessing_without_a_counterpart_is_refused(
    member: Callable[[str], Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = member("SigLIP")
    load_parts(made.source)
    upstream = import_upstream("open_clip", "open-clip")
    monkeypatch.setattr(upstream.transform.PreprocessCfg, "__post_init__", lambda self: setattr(self, "mean", 0.4))
    with pytest.raises(ValueError, match="open_clip gives other pixels"):
        load_parts(made.source)
    monkeypatch.undo()
    swapped = upstream.get_tokenizer(made.name)
    swapped.clean_fn = lambda text: text.replace("dog", "cat")
    swapped.clean_fn.__name__ = "_clean_canonicalize"
    monkeypatch.setattr(upstream, "get_tokenizer", lambda name: swapped)
    with pytest.raises(ValueError, match="reads 'a dog barks in the distance' as other tokens"):
        load_parts(made.source)


def test_a_recipe_connects_a_model_of_open_clip(
    member: Callable[[str], Member], tiny_clap: Path, tmp_path: Path
) -> None:
    source = member("ViT").source
    recipe = Recipe(
        name="small",
        sources={"clip": SourceSpec(source), "clap": SourceSpec(str(tiny_clap))},
        text=[DataSpec(table="texts.csv", column="text")],
        image=[DataSpec(folder="images")],
        audio=[DataSpec(folder="sounds")],
        connector={"projection_dim": 8},
        train=TrainSpec(epochs=2, batch_size=4),
    )
    folder = connect(recipe, tmp_path / "run", write_data(tmp_path / "data")).folder
    inputs = CMCRProcessor.from_pretrained(folder / "model")(text=TEXTS, images=PICTURES)
    whole, found = (CMCRModel.from_pretrained(folder / part)(**inputs) for part in ("model", "connector"))
    assert torch.equal(whole.text_embeds, found.text_embeds)
    assert torch.equal(whole.image_embeds, found.image_embeds)
    # The card names the architecture and the file, not where it lies.
    card = (folder / "connector" / "README.md").read_text()
    assert public_name(source) in card and source not in card


def test_other_weights_under_the_same_name_are_noticed_by_the_stores(
    member: Callable[[str], Member], tmp_path: Path
) -> None:
    made = member("ViT")
    model = load_model(made.source, ["text"], {})
    first = source_record(made.source, None, model)
    torch.save(torch.load(made.file, weights_only=True) | {"logit_scale": torch.tensor(1.0)}, tmp_path / "other.pt")
    other = source_record(f"open_clip:{made.name}/{tmp_path}/other.pt", None, model)
    assert first["revision"] != other["revision"]
