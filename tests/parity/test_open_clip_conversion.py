"""Converted open_clip models beside open_clip itself: every member of the family that is converted, random weights."""

import csv
import html
import importlib
import importlib.util
import json
import re
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from cmcr_hf.conversion import convert_open_clip
from cmcr_hf.conversion.convert_open_clip import clip_config, read_clip, read_named_clip, tokenizer
from cmcr_hf.conversion.prove_open_clip import plain_embeddings, prove_clip
from cmcr_hf.modeling.feature_extraction_cmcr import extract_image
from cmcr_hf.sources.open_clip_processing import image_processor
from cmcr_hf.sources.upstream import import_upstream

from .conftest import Record

pytestmark = pytest.mark.slow


def family() -> list[str]:
    """Return open_clip's own models that the converter takes, by what it says of their configurations."""
    if importlib.util.find_spec("open_clip") is None:
        return ["ViT-B-32"]
    open_clip = import_upstream("open_clip", "open-clip")
    names = []
    for name in open_clip.list_models():
        try:
            convert_open_clip._check_architecture(open_clip.get_model_config(name))
        except ValueError:
            continue
        # ResNets, whose layers are a list.
        if isinstance(open_clip.get_model_config(name)["vision_cfg"].get("layers"), int):
            names.append(name)
    return names


FAMILY = family()


def test_the_family_is_that_of_openais_and_laions_vits(open_clip: ModuleType) -> None:
    assert {"ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-plus-240", "ViT-L-14-336"} < set(FAMILY)
    assert {"ViT-H-14", "ViT-g-14", "ViT-bigG-14", "ViT-e-14"} < set(FAMILY)
    others = {"RN50", "ViT-M-16-alt", "ViT-H-14-CLIPA", "ViT-H-14-worldwide", "coca_ViT-B-32", "ViT-B-16-SigLIP"}
    assert not others & set(FAMILY)


@pytest.mark.parametrize("name", FAMILY)
def test_the_weights_of_every_member_at_full_size_tell_its_configuration(open_clip: ModuleType, name: str) -> None:
    cfg = open_clip.get_model_config(name)
    with torch.device("meta"):
        weights = open_clip.CLIP(**cfg).state_dict()
        config = clip_config(weights, activation="quick_gelu" if cfg.get("quick_gelu") else "gelu")
        model = CLIPModel(config)
    sizes = sorted(tensor.numel() for key, tensor in weights.items() if "in_proj" not in key)
    own = {key: tensor.numel() for key, tensor in model.state_dict().items()}
    assert sorted(size for key, size in own.items() if not re.search(r"[qkv]_proj", key)) == sizes
    assert sum(own.values()) == sum(tensor.numel() for tensor in weights.values())
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    assert config.vision_config.num_attention_heads == vision["width"] // vision.get("head_width", 64)
    assert config.text_config.num_attention_heads == text["heads"]
    assert config.vision_config.image_size == vision["image_size"]


def saved(open_clip: ModuleType, folder: Path, name: str, cfg: dict[str, Any]) -> tuple[Path, Any]:
    torch.manual_seed(0)
    model = open_clip.CLIP(**cfg).eval()
    with torch.no_grad():
        # Norms and biases start at one and zero, which would hide a wrong one.
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 and "embedding" not in key:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    path = folder / f"{name}.pt"
    state = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"epoch": 1, "name": name, "state_dict": state}, path)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}))
    return path, model


@pytest.mark.parametrize("name", FAMILY)
def test_every_member_gives_what_open_clip_gives_with_two_layers(
    open_clip: ModuleType, record: Record, tmp_path: Path, name: str
) -> None:
    cfg = open_clip.get_model_config(name)
    cfg["vision_cfg"] |= {"layers": 2, "image_size": 2 * cfg["vision_cfg"]["patch_size"]}
    cfg["text_cfg"] |= {"layers": 2, "vocab_size": 300}
    path, _ = saved(open_clip, tmp_path, name, cfg)
    model, checkpoint = read_clip(path)
    assert model.config.text_config.hidden_act == ("quick_gelu" if cfg.get("quick_gelu") else "gelu")
    proof = prove_clip(model, checkpoint)
    assert proof.reference == f"open_clip_torch {open_clip.__version__}"
    for modality, difference in proof.differences.items():
        record(f"open_clip conversion, {name} of two layers", f"{modality} embeddings", difference, 2e-6)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16"])
def test_a_member_of_full_size_gives_what_open_clip_gives(
    open_clip: ModuleType, record: Record, tmp_path: Path, name: str
) -> None:
    path, original = saved(open_clip, tmp_path, name, open_clip.get_model_config(name))
    model, checkpoint = read_clip(path)
    for modality, difference in prove_clip(model, checkpoint).differences.items():
        record(f"open_clip conversion, {name} of full size", f"{modality} embeddings", difference, 2e-6)
    # What upstream's preprocessing gives, through each model whole.
    texts = ["a photo of a cat", "two dogs, one of them asleep", "a " * 100]
    ids = tokenizer(vocab_size=49408, context_length=77)(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = model.get_text_features(**ids).pooler_output
        expected = original.encode_text(open_clip.get_tokenizer(name)(texts))
    difference = (torch.nn.functional.normalize(found) - torch.nn.functional.normalize(expected)).abs().max().item()
    record(f"open_clip conversion, {name} of full size", "embeddings of sentences", difference, 2e-6)


@torch.no_grad()
def test_the_plain_reading_gives_what_open_clip_gives(open_clip: ModuleType, record: Record, tmp_path: Path) -> None:
    cfg = open_clip.get_model_config("ViT-S-32-alt")
    path, original = saved(open_clip, tmp_path, "plain", cfg)
    model, checkpoint = read_clip(path)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 224, 224, generator=generator)
    ids = torch.randint(0, 49408, (2, 77), generator=generator)
    plain = plain_embeddings(pixels, ids, checkpoint.weights, model.config)
    for modality, expected in (("image", original.encode_image(pixels)), ("text", original.encode_text(ids))):
        difference = (plain[modality] - expected).abs().max() / expected.norm(dim=-1).min()
        record("plain reading of a file of open_clip", f"{modality} embeddings", difference.item(), 2e-6)


def test_weights_by_open_clips_names_are_read_from_its_cache(
    open_clip: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = saved(open_clip, tmp_path, "named", open_clip.get_model_config("ViT-S-32-alt"))
    known = {"file": str(path), "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-S-32-alt", {"of_a_test": known})
    model, checkpoint = read_named_clip("ViT-S-32-alt", "of_a_test")
    assert checkpoint.path == path
    assert torch.equal(model.visual_projection.weight, original.visual.proj.T)
    found = convert_open_clip.named_config("ViT-S-32-alt", "of_a_test")
    assert found["preprocess_cfg"] == {
        "size": 224,
        "mean": (0.1, 0.2, 0.3),
        "std": (1.0, 1.0, 1.0),
        "resize_mode": "squash",
    }


# Preprocessing


def sentences(shared: Path) -> list[str]:
    with open(shared / "data" / "text" / "audiocaps_val.csv", encoding="utf-8") as file:
        return [row["caption"] for row in csv.DictReader(file)]


def test_texts_become_the_ids_of_open_clip(open_clip: ModuleType, record: Record, shared: Path) -> None:
    ftfy = importlib.import_module("ftfy")
    names = [f(name) for name in open_clip.IMAGENET_CLASSNAMES for f in open_clip.OPENAI_IMAGENET_TEMPLATES[:2]]
    odd = [
        *("", "  ", "don't we'll I'D", "1234.5% (of 3)", "_under_score_ !!", "#hash @at http://a.b/c?d=e&f"),
        *("caf\u00e9 Stra\u00dfe", "\u65e5\u672c\u8a9e", "emoji \U0001f600", "a\u00a0b\u2003c\td", "a\u2014c\u2026"),
        *("word " * 200, "x" * 500),
    ]
    texts = [*sentences(shared), *names, *odd]
    sound = [text for text in texts if html.unescape(ftfy.fix_text(text)) == text]
    assert len(texts) - 3 < len(sound) and len(sound) > 4000
    record("open_clip tokenizer", f"share of {len(sound)} texts with other ids", differing(open_clip, sound), 0)


REPAIRED = [
    *("it\u2019s", "\u201ccurly\u201d", "AT&amp;T", "\ufb01ne", "\uff26ull", "s\u00c3\u00a9ance"),
    "<start_of_text> a",
]


@pytest.mark.parametrize("text", REPAIRED)
def test_texts_that_open_clip_repairs_or_takes_for_its_marks_have_other_ids(open_clip: ModuleType, text: str) -> None:
    assert differing(open_clip, [text]) == 1


def differing(open_clip: ModuleType, texts: list[str]) -> float:
    """Return the share of texts whose ids are not those of open_clip, padding aside."""
    found = tokenizer(vocab_size=49408, context_length=77)(
        texts, padding="max_length", truncation=True, return_tensors="pt"
    )
    ids = found["input_ids"].masked_fill(found["attention_mask"] == 0, 0)
    return (ids != open_clip.get_tokenizer("ViT-B-32")(texts)).any(dim=1).float().mean().item()


def transform(open_clip: ModuleType, **preprocess: Any) -> Any:
    cfg = open_clip.transform.PreprocessCfg(**preprocess)
    return open_clip.transform.image_transform_v2(cfg, is_train=False)


MODES = [
    ("shortest", "bicubic", 224),
    ("shortest", "bilinear", 256),
    ("squash", "bicubic", 224),
    ("squash", "bilinear", 336),
]


@pytest.mark.parametrize(("mode", "interpolation", "size"), MODES)
def test_real_images_become_the_pixels_of_open_clip(
    open_clip: ModuleType, record: Record, shared: Path, mode: str, interpolation: str, size: int
) -> None:
    pictures = [Image.open(path).convert("RGB") for path in sorted((shared / "official").glob("*.jpeg"))]
    with zipfile.ZipFile(shared / "data" / "images" / "images_train.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith((".jpg", ".jpeg", ".png")))[:40]
        pictures += [Image.open(archive.open(name)).convert("RGB") for name in names]
    assert len(pictures) > 20
    compare(open_clip, record, "real images", pictures, mode, interpolation, size)


@pytest.mark.parametrize(("mode", "interpolation", "size"), MODES)
def test_images_of_odd_shapes_become_the_pixels_of_open_clip(
    open_clip: ModuleType, record: Record, mode: str, interpolation: str, size: int
) -> None:
    random = np.random.default_rng(0)
    # None more than 32 times as long as wide, of which the processor takes the middle.
    shapes = [(1, 1), (13, 400), (400, 14), (223, 224), (225, 224), *random.integers(20, 700, (40, 2)).tolist()]
    pictures = [Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)) for width, height in shapes]
    compare(open_clip, record, "images of odd shapes", pictures, mode, interpolation, size)


def compare(
    open_clip: ModuleType,
    record: Record,
    what: str,
    pictures: list[Image.Image],
    mode: str,
    interpolation: str,
    size: int,
) -> None:
    preprocess = {"size": size, "resize_mode": mode, "interpolation": interpolation}
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**preprocess), is_train=False)
    differences, shifted = [], 0
    for picture in pictures:
        ours = extract_image(picture, image_processor(preprocess))["pixel_values"]
        theirs = transform(picture).numpy()
        # transformers crops at half the excess rounded down, torchvision at the nearest even number to a half.
        excess = int(size * max(picture.size) / min(picture.size)) - size
        if mode == "shortest" and excess % 4 == 3:
            shifted += 1
            right, down = int(picture.width > picture.height), int(picture.height > picture.width)
            ours, theirs = ours[:, down:, right:], theirs[:, : size - down, : size - right]
        differences.append(float(np.abs(ours - theirs).max()))
    aside = f", {shifted} of them one pixel aside" if shifted else ""
    kind = f"open_clip image processor, {mode}, {interpolation}, {size}"
    record(kind, f"pixels of {len(pictures)} {what}{aside}", max(differences), 1e-5)
