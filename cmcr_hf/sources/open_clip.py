"""Models of open_clip as they are, as image-text sources: EVA, CoCa, MobileCLIP, ConvNeXt, ViTamin, SigLIP, ...

A source is named `open_clip:NAME/TAG`, such as `open_clip:ViT-B-32/laion2b_s34b_b79k`, or `open_clip:NAME/FILE` with
a file of weights in place of the tag.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from PIL import Image
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from ..modeling.feature_extraction_cmcr import extract_image
from ..modeling.sources_cmcr import SENTENCES, picture
from ..modeling.towers_cmcr import place_source, remove_other_towers
from .open_clip_names import check_activation, named_config, read_config
from .open_clip_processing import clip_tokenizer, hf_tokenizer, image_processor
from .upstream import import_upstream

PREFIX = "open_clip:"
# Of pixels around 1, between two ways of computing the same in float32.
MAX_PIXEL_DIFFERENCE = 1e-5


@strict
class OpenClipConfig(PreTrainedConfig):
    r"""Configuration of an [`OpenClipModel`], by which it is built again without names and network.

    Args:
        model_cfg, preprocess_cfg:
            What open_clip's files call so: the architecture, and how images are prepared.
        projection_dim:
            Width of the embeddings, the `embed_dim` of the architecture.
        context_length, pad_token_id:
            Every text is filled to this length with this token, as open_clip's tokenizer does.
        hf_text_config:
            Configuration of a text tower that is a model of transformers.
    """

    model_type = "open_clip"

    model_cfg: dict | None = None
    preprocess_cfg: dict | None = None
    projection_dim: int = 512
    context_length: int = 77
    pad_token_id: int | None = 0
    hf_text_config: dict | None = None

    def validate_architecture(self) -> None:
        """Check that the fields agree with each other (called by transformers at creation and at saving)."""
        super().validate_architecture()
        if self.projection_dim < 1 or self.context_length < 1:
            raise ValueError(
                f"projection_dim and context_length must be at least 1, got {self.projection_dim} and "
                f"{self.context_length}."
            )
        if self.model_cfg is not None and self.model_cfg.get("embed_dim") != self.projection_dim:
            raise ValueError(
                f"projection_dim must be the embed_dim of model_cfg, {self.model_cfg.get('embed_dim')}, got "
                f"{self.projection_dim}."
            )


class OpenClipModel(PreTrainedModel):
    """The image and text towers of an open_clip model, with the interface of a `CLIPModel`.

    Needs open_clip wherever it is built. A request for an attention implementation does not reach open_clip's layers.

    Args:
        original: a `CustomTextCLIP` or `CoCa` of open_clip to take the towers of; built anew where it is `None`.
    """

    config: OpenClipConfig
    config_class = OpenClipConfig
    base_model_prefix = "open_clip"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: OpenClipConfig, original: nn.Module | None = None):
        super().__init__(config)
        device = torch.empty(0).device
        if original is None:
            # While it builds, open_clip reads values of tensors, which there are none of on the meta device.
            with torch.device("cpu"):
                original = _build(config)
        self.visual: Any = original.get_submodule("visual").to(device)
        self.text: Any = original.get_submodule("text").to(device)
        self.logit_scale = nn.Parameter(original.get_parameter("logit_scale").detach().to(device))
        for module in self.modules():
            # Masks and position tables, which `from_pretrained` would leave empty: it builds models without values.
            module._non_persistent_buffers_set.clear()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep what open_clip initialises; a weight that a checkpoint lacks is an error."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load a model from the folder or Hub id that `save_pretrained` or `push_to_hub` wrote.

        Raises:
            ImportError: open_clip is not installed.
            ValueError: the checkpoint lacks weights.
        """
        loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(
                f"The checkpoint {str(name)!r} lacks {len(info['missing_keys'])} of the weights of an OpenClipModel, "
                f"e.g. {min(info['missing_keys'])!r}. Save it anew with save_pretrained."
            )
        return (model, info) if output_loading_info else model

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor) -> tuple | BaseModelOutputWithPooling:
        """Embed images `(images, 3, height, width)`: `.pooler_output` is `(images, projection_dim)`, of any norm."""
        return BaseModelOutputWithPooling(pooler_output=_pooled(self.visual(pixel_values)))

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple | BaseModelOutputWithPooling:
        """Embed texts: `.pooler_output` is `(texts, projection_dim)`, of any norm.

        Args:
            input_ids: `(texts, tokens)`; shorter ones than `context_length` are filled up as open_clip does.
            attention_mask: `(texts, tokens)`, 0 where a token is padding, whichever its id.

        Raises:
            ValueError: there are more tokens than `context_length`.
        """
        missing = self.config.context_length - input_ids.shape[1]
        if missing < 0:
            raise ValueError(
                f"Expected texts of at most {self.config.context_length} tokens, got {input_ids.shape[1]}. Prepare "
                "them with CMCRProcessor."
            )
        pad: Any = self.config.pad_token_id
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, pad)
        return BaseModelOutputWithPooling(pooler_output=_pooled(self.text(F.pad(input_ids, (0, missing), value=pad))))


def _pooled(output: Any) -> torch.FloatTensor:
    """Return the embeddings of a tower, which gives its tokens beside them where it was built to."""
    pooled: torch.FloatTensor = output[0] if isinstance(output, tuple) else output
    return pooled


def _build(config: OpenClipConfig) -> nn.Module:
    open_clip = import_upstream("open_clip", "open-clip")
    if config.model_cfg is None:
        raise ValueError(
            "The configuration has no model_cfg. Load a model with CMCRModel.from_sources_pretrained("
            f"clip='{PREFIX}NAME/TAG')."
        )
    # CoCa's two towers alone: its decoder writes captions.
    cfg = {key: value for key, value in config.model_cfg.items() if key not in ("multimodal_cfg", "custom_text")}
    text = {**cfg["text_cfg"], "hf_model_pretrained": False}
    vision = {**cfg["vision_cfg"], "timm_model_pretrained": False}
    with tempfile.TemporaryDirectory() as folder:
        if config.hf_text_config is not None:
            # open_clip knows the text towers of transformers by name alone, or by a folder in place of it.
            AutoConfig.for_model(**config.hf_text_config).save_pretrained(folder)
            text["hf_model_name"] = folder
        built: nn.Module = open_clip.CustomTextCLIP(**{**cfg, "text_cfg": text, "vision_cfg": vision})
    return built


def _split(source: str | os.PathLike) -> tuple[str, str]:
    """Return the name of the architecture and the tag or file of a source."""
    name, _, weights = os.fspath(source).removeprefix(PREFIX).partition("/")
    if not name or not weights:
        raise ValueError(
            f"Expected a source such as 'open_clip:ViT-B-32/laion2b_s34b_b79k', got {os.fspath(source)!r}. Name the "
            "architecture and its weights, a tag or a file."
        )
    return name, weights


def _describe(source: str | os.PathLike) -> dict[str, Any]:
    """Return `model_cfg` and the whole `preprocess_cfg` of a source.

    Raises:
        ValueError: open_clip knows no such architecture, or neither a tag nor a file of that name.
    """
    open_clip = import_upstream("open_clip", "open-clip")
    name, weights = _split(source)
    # open_clip takes a tag before a file of that name.
    if not open_clip.get_pretrained_cfg(name, weights) and os.path.isfile(weights):
        model = open_clip.get_model_config(name)
        if model is None:
            raise ValueError(
                f"open_clip {open_clip.__version__} knows no architecture {name!r}. Use one of its list_models()."
            )
        preprocess = {"size": model["vision_cfg"].get("image_size", 224)}
        beside = read_config(weights)
        if beside is not None:
            check_activation(name, weights, model, beside["model_cfg"])
            preprocess |= beside["preprocess_cfg"]
    else:
        found = named_config(name, weights)
        model, preprocess = found["model_cfg"], found["preprocess_cfg"]
    transform = open_clip.transform
    whole = transform.merge_preprocess_dict(transform.PreprocessCfg(), preprocess)
    # As they are in a file, lists and all.
    described: dict[str, Any] = json.loads(json.dumps({"model_cfg": model, "preprocess_cfg": whole}))
    return described


def load_model(source: str | os.PathLike, modalities: Collection[str], arguments: Mapping[str, Any]) -> OpenClipModel:
    """Load the towers of `modalities` of a source with open_clip, from its cache where the weights are there.

    Args:
        source: `open_clip:NAME/TAG` or `open_clip:NAME/FILE`.
        arguments: those of `from_pretrained`, of which `dtype`, `cache_dir`, and as `device_map` one device, count.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: open_clip knows no such model, or its weights cannot be downloaded or are of another architecture.
    """
    open_clip = import_upstream("open_clip", "open-clip")
    described = _describe(source)
    name, weights = _split(source)
    try:
        original = open_clip.create_model(
            name,
            pretrained=weights,
            force_custom_text=True,
            force_preprocess_cfg=described["preprocess_cfg"],
            cache_dir=arguments.get("cache_dir"),
        )
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"open_clip cannot load {os.fspath(source)!r}: {error!s:.500}") from error
    text_cfg = described["model_cfg"]["text_cfg"]
    tokenizer = open_clip.get_tokenizer(name)
    config = OpenClipConfig(
        model_cfg=described["model_cfg"],
        preprocess_cfg=described["preprocess_cfg"],
        projection_dim=described["model_cfg"]["embed_dim"],
        context_length=tokenizer.context_length,
        pad_token_id=_pad_token_id(tokenizer),
        hf_text_config=original.text.config.to_dict() if text_cfg.get("hf_model_name") else None,
    )
    model = OpenClipModel(config, original)
    remove_other_towers(model, modalities)
    placed: OpenClipModel = place_source(model, arguments)
    return placed


def load_parts(source: str | os.PathLike) -> dict[str, Any]:
    """Return image processor and tokenizer of a source, as the parts of a [`CMCRProcessor`].

    They are parts of transformers, which are saved and loaded without open_clip. They are compared with open_clip's
    own on eight sentences and a picture.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: open_clip knows no such model, or its preprocessing has no counterpart; names what differs.
    """
    open_clip = import_upstream("open_clip", "open-clip")
    described = _describe(source)
    upstream = open_clip.get_tokenizer(_split(source)[0])
    tokenizer = clip_tokenizer(upstream) if isinstance(upstream, open_clip.SimpleTokenizer) else hf_tokenizer(upstream)
    processor = image_processor(described["preprocess_cfg"])
    _check_parts(os.fspath(source), described["preprocess_cfg"], upstream, tokenizer, processor)
    return {"image_processor": processor, "tokenizer": tokenizer}


def _pad_token_id(tokenizer: Any) -> int:
    """Return the token that open_clip's tokenizer fills texts with."""
    inner = getattr(tokenizer, "tokenizer", None)
    return 0 if inner is None else int(inner.pad_token_id)


def _check_parts(source: str, preprocess: Mapping[str, Any], upstream: Any, tokenizer: Any, processor: Any) -> None:
    expected = upstream(list(SENTENCES))
    found = tokenizer(list(SENTENCES), padding="max_length", truncation=True, return_tensors="pt")
    ids = found["input_ids"].masked_fill(found["attention_mask"] == 0, _pad_token_id(upstream))
    if not torch.equal(ids, expected):
        row = int((ids != expected).any(dim=1).nonzero()[0])
        raise ValueError(
            f"The tokenizer of {source!r} has no counterpart here: open_clip reads {SENTENCES[row]!r} as other "
            "tokens. Use another model."
        )
    transform = import_upstream("open_clip", "open-clip").transform
    image = Image.fromarray(picture())
    wanted = transform.image_transform_v2(transform.PreprocessCfg(**preprocess), is_train=False)(image).numpy()
    pixels = extract_image(image, processor)["pixel_values"]
    if pixels.shape != wanted.shape or not np.abs(pixels - wanted).max() <= MAX_PIXEL_DIFFERENCE:
        raise ValueError(
            f"The image preprocessing of {source!r}, {dict(preprocess)}, has no counterpart here: open_clip gives "
            "other pixels for the same picture. Use another model."
        )


__all__ = ["OpenClipConfig", "OpenClipModel", "load_model", "load_parts"]
