# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""C-MCR configuration: which spaces are connected, through what, and how."""

import math
import os

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_ulip import UlipConfig

# What a source model of each role can embed at most, and the leaf modality that is left when the overlap is taken out.
# A ULIP point cloud is always the leaf: its text and image towers are there for the sake of the clouds.
SPACE_MODALITIES = {
    "clip": ("image", "text"),
    "clap": ("audio", "text"),
    "ulip": ("point_cloud", "image", "text"),
}
LEAF_MODALITIES = {
    ("clip", "text"): "image",
    ("clip", "image"): "text",
    ("clap", "text"): "audio",
    ("ulip", "text"): "point_cloud",
    ("ulip", "image"): "point_cloud",
}
# What the Auto classes of a process without this package load from a saved folder, by the code beside the weights. A
# connector alone is loaded as the model that it makes with the sources it records.
AUTO_MAP = {
    "AutoConfig": "configuration_cmcr.CMCRConfig",
    "AutoModel": "modeling_cmcr.CMCRModel",
    "AutoModelForZeroShotImageClassification": "modeling_cmcr.CMCRModel",
}
PROJECTOR_LAYOUTS = ("linear-bn-relu-linear-bn", "linear-bn-relu", "ex-mcr", "identity")
# Those with a hidden layer.
DEEP_LAYOUTS = ("linear-bn-relu-linear-bn", "ex-mcr")
# What an objective trains with where a configuration does not say: the temperatures of its paper, or, of C-MCR, which
# leaves them open, that of its aggregation, which is also what CLIP itself converged to.
TEMPERATURES = {"c-mcr": 0.01, "ex-mcr": 0.05, "bridge-distillation": 0.2}
# The norm of the noise likewise: the paper's, and a fraction of it for items that are real and need no completion.
NOISE_NORM, NOISE_NORMS = 1.4310835, {"bridge-distillation": 0.35}


def source_embedding_dim(config: PreTrainedConfig) -> int | None:
    """Return the width of what a source model's `get_*_features` give, `None` where its configuration is silent."""
    if getattr(config, "projection_dim", None):
        return config.projection_dim  # CLIP, CLAP and their relatives
    text_config = getattr(config, "text_config", None)
    for field in ("projection_size", "hidden_size"):  # SigLIP and SigLIP 2 project into the text tower's width
        if getattr(text_config, field, None):
            return getattr(text_config, field)
    return None


@strict
class CMCRConfig(PreTrainedConfig):
    r"""Configuration of a [`CMCRModel`] or a [`CMCRConnector`].

    Args:
        clip_config, clap_config, ulip_config:
            Configurations of the frozen source models, each optional. `clip_config` may be any image-text model of
            transformers with `get_image_features` and `get_text_features` (CLIP, SigLIP, SigLIP 2), `clap_config` any
            audio-text one, `ulip_config` a [`UlipConfig`], whose image and text towers are optional. The keys name
            the roles, which the checkpoints, projectors and bridges share.
        sources:
            Where each source came from: `{space: {"id": hub id or absolute path, "revision": commit}}`. A
            connector-only checkpoint finds its sources by it.
        fingerprints:
            Names `{space}_{modality}` of the embeddings of fixed inputs that the connector carries of its sources. A
            source that is attached later must give the same (see [`CMCRModel.record_fingerprints`]).
        projectors:
            One entry a space: `{"layout": str, "input_dim": int, "hidden_dim": int}`. Layouts:
            `linear-bn-relu-linear-bn` (the heads of the official `clap_clip.pt`), `linear-bn-relu` (those of
            `ulip_clip.pt`), `ex-mcr` (those of Ex-MCR: a linear map of the leaf modality, then two MLPs of the first
            layout for all modalities), `identity` (the space is the shared one). Missing fields are filled in: the
            first layout, under `ex-mcr` those of that name with the base as `identity`; the source's own width; twice
            `projection_dim`, which is 512-1024-512 at the official sizes.
        projection_dim:
            Width of the shared space: 512 by default, under `ex-mcr` that of the base space.
        bridges:
            `[space, space, overlap modality]` each. Defaults to the pairs at hand: CLIP-CLAP through text, CLIP-ULIP
            through images. Under `ex-mcr` the first space is the base, which the second is extended into.
        objective:
            Name of the training objective: `c-mcr` (equations 1 to 6 of arXiv 2305.14381), `ex-mcr` (arXiv
            2310.08884), which leaves the base space as it is and trains the projectors of the others alone, or
            `bridge-distillation` (ours: docs/bridge_distillation.md), which teaches the projectors which real,
            unpaired items of both memories the overlap modality says the same of.
        overlap_temperature, leaf_temperature:
            Temperatures of the InfoNCE terms. `c-mcr`: tau_2 for the native pairs and tau_3 for the pseudo pairs, 0.01
            by default. `ex-mcr`: of the terms that compare with the overlap modality and with the leaf modality of
            the base space; its paper has one temperature for all, 0.05. `bridge-distillation`: the latter alone, 0.2,
            of the cosines that meet the targets: flatter than InfoNCE's, since the targets are.
        target_power:
            Of `bridge-distillation`: its targets are the rows, and the columns, of this power of the probability that
            two items draw the same text. 2 to 5 train equally well.
        target_lift:
            Of `bridge-distillation`, from 0 to 1: how far targets are relative to what an item matches on average. At
            0 what counts is the probability that two items draw the same text, at 1 how many times the mean over the
            batch that is: what matches everything alike is then no better a target than any other.
        mix_items:
            Of `bridge-distillation`: whether each item is interpolated with another of the batch, and its targets
            with those of the other. It helps where texts are few, and costs nothing.
        posterior_temperatures:
            Of `bridge-distillation`: `{space: temperature}` of the posteriors over the texts. The training fills in
            what it chose where they are not given (see `cmcr_hf.training.posteriors.choose_temperatures`).
        posterior_top:
            Of `bridge-distillation`: texts whose weight is kept exactly for every item; the rest is spread evenly.
        intra_weight:
            Weight lambda of the term that closes the modality gap inside a space. 0.1 in Ex-MCR, by the same group,
            where it is that of the extended space alone, behind the linear map and before the MLPs.
        intra_squared:
            Whether that term squares the distance. The paper's figure reads as a plain Euclidean norm, hence `False`.
        noise_norm:
            Expected norm of the Gaussian noise (semantic completion) relative to a unit embedding; the variance of a
            coordinate is `noise_norm ** 2 / width`. The default is the paper's variance of 0.004 at 512 dimensions,
            and the same *angle* (cosine 0.57 with the clean vector) at any other width. 0 switches the noise off. It
            is added to all four embeddings of a row, those of the base space of `ex-mcr` too.
            `bridge-distillation` has 0.35 (cosine 0.94): its items are real, so that there is nothing to complete.
        default_spaces:
            `{modality: space}`: the space that `get_text_features` and its like use when none is named. Text and
            images default to CLIP, which has seen the most of both.
        freeze_sources:
            Keep the sources without gradients and in eval mode, whatever `train()` says. `False` fine-tunes them too.
        logit_scale_init_value:
            Natural logarithm of the initial logit scale. Default ln 10: the official demo shows `softmax(10 *
            cosine)`.
    """

    model_type = "cmcr"
    sub_configs_defaults = {  # noqa: RUF012  (the class attribute that transformers reads)
        "clip_config": SubConfigSpec(config_class=AutoConfig, model_type="clip", optional=True),
        "clap_config": SubConfigSpec(config_class=AutoConfig, model_type="clap", optional=True),
        "ulip_config": SubConfigSpec(config_class=UlipConfig, model_type="ulip", optional=True),
    }
    # Scalars of the training step: Trainer would try to concatenate them over evaluation batches.
    keys_to_ignore_at_inference = [  # noqa: RUF012
        *("loss_overlap", "loss_leaf", "loss_leaf_overlap", "loss_overlap_leaf", "loss_intra"),
    ]

    clip_config: PreTrainedConfig | dict | None = None
    clap_config: PreTrainedConfig | dict | None = None
    ulip_config: PreTrainedConfig | dict | None = None
    sources: dict | None = None
    fingerprints: list | None = None
    projectors: dict | None = None  # filled in at creation, as is what is None below
    projection_dim: int | None = None
    bridges: list | None = None
    objective: str = "c-mcr"
    overlap_temperature: float | int | None = None
    leaf_temperature: float | int | None = None
    target_power: float | int = 3
    target_lift: float | int = 1
    mix_items: bool = True
    posterior_temperatures: dict[str, float | int] | None = None
    posterior_top: int = 1024
    intra_weight: float | int = 0.1
    intra_squared: bool = False
    noise_norm: float | int | None = None
    default_spaces: dict | None = None
    freeze_sources: bool = True
    logit_scale_init_value: float | int = 2.3025851

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        given = self.projectors or {}
        for space, projector in given.items():
            if not isinstance(projector, dict):
                raise ValueError(
                    f"Expected the {space} projector as {{'layout': ..., 'hidden_dim': ...}}, got {projector!r}."
                )
        spaces = [space for space in SPACE_MODALITIES if space in given or self.source_config(space) is not None]
        if not spaces and not given:
            # What `CMCRConfig()` means, which transformers itself asks for when it compares a configuration to its
            # defaults.
            spaces = ["clip", "clap"]
        if self.bridges is None:
            self.bridges = [
                bridge
                for bridge in (["clip", "clap", "text"], ["clip", "ulip", "image"])
                if bridge[0] in spaces and bridge[1] in spaces
            ]
        temperature = TEMPERATURES.get(self.objective, TEMPERATURES["c-mcr"])
        self.overlap_temperature = temperature if self.overlap_temperature is None else self.overlap_temperature
        self.leaf_temperature = temperature if self.leaf_temperature is None else self.leaf_temperature
        if self.noise_norm is None:
            self.noise_norm = NOISE_NORMS.get(self.objective, NOISE_NORM)
        if self.projection_dim is None:
            bases = [space for space in spaces if self._is_base(space)]
            self.projection_dim = self._input_dim(bases[0], given.get(bases[0]) or {}) if bases else 512
        self.projectors = {
            **{space: self._complete_projector(space, given.get(space) or {}) for space in spaces},
            **{space: given[space] for space in given if space not in spaces},
        }
        preferred = {"text": "clip", "image": "clip", "audio": "clap", "point_cloud": "ulip"}
        defaults = {}
        for modality, favourite in preferred.items():
            able = [space for space in spaces if modality in self.modalities_of(space)]
            if able:
                defaults[modality] = favourite if favourite in able else able[0]
        self.default_spaces = {**defaults, **(self.default_spaces or {})}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Save the configuration and its code to a folder, with the map by which the Auto classes find the code."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _complete_projector(self, space: str, given: dict) -> dict:
        extended = "identity" if self._is_base(space) else "ex-mcr"
        layout = extended if self.objective == "ex-mcr" else PROJECTOR_LAYOUTS[0]
        projector = {"layout": layout, **given, "input_dim": self._input_dim(space, given)}
        if projector["layout"] in DEEP_LAYOUTS:
            projector.setdefault("hidden_dim", 2 * self.projection_dim)  # type: ignore[operator]
        return projector

    def _input_dim(self, space: str, given: dict) -> int:
        source = self.source_config(space)
        input_dim = given.get("input_dim") or (512 if source is None else source_embedding_dim(source))
        if input_dim is None:
            raise ValueError(
                f"Cannot tell the embedding width of a {type(source).__name__}. State it: "
                f"projectors={{{space!r}: {{'input_dim': WIDTH}}}}."
            )
        return input_dim

    def _is_base(self, space: str) -> bool:
        """Say whether the others are extended into this space, which stays as it is."""
        return self.objective == "ex-mcr" and any(bridge[0] == space for bridge in self.bridges or [])

    def source_config(self, space: str) -> PreTrainedConfig | None:
        """Return the configuration of the source model in this role, or `None` where it is not given."""
        return getattr(self, f"{space}_config", None)

    @property
    def spaces(self) -> list[str]:
        """The connected spaces, in the order `clip`, `clap`, `ulip`."""
        return list(self.projectors or {})

    def modalities_of(self, space: str) -> tuple[str, ...]:
        """Return what a space's source embeds: those of its role, but for the towers that a ULIP does without."""
        source = self.source_config(space)
        towers = {"image": "vision_config", "text": "text_config"} if space == "ulip" and source is not None else {}
        return tuple(
            modality
            for modality in SPACE_MODALITIES[space]
            if modality not in towers or getattr(source, towers[modality]) is not None
        )

    @property
    def embedded_modalities(self) -> list[str]:
        """All that the connected spaces embed."""
        return list(dict.fromkeys(modality for space in self.spaces for modality in self.modalities_of(space)))

    def space_of(self, modality: str, space: str | None = None) -> str:
        """Return the space through which a modality is embedded: the one asked for, else the default one.

        Raises:
            ValueError: no connected space has this modality, or the one asked for has not.
        """
        able = [name for name in self.spaces if modality in self.modalities_of(name)]
        space = space or (self.default_spaces or {}).get(modality)
        if space not in able:
            raise ValueError(
                f"Expected a space that embeds {modality}, one of {able}, got {space!r}. Pass space= accordingly, or "
                "build the model with a source that has this modality."
            )
        return space

    def validate_architecture(self):
        """Check that the fields agree with each other (called by transformers at creation and at saving)."""
        super().validate_architecture()
        _check_dim("projection_dim", self.projection_dim)
        for space, projector in self.projectors.items():
            if space not in SPACE_MODALITIES:
                raise ValueError(f"Unknown space {space!r} in projectors: expected one of {list(SPACE_MODALITIES)}.")
            unknown = set(projector) - {"layout", "input_dim", "hidden_dim"}
            if unknown:
                raise ValueError(f"Unknown fields {sorted(unknown)} in the {space} projector.")
            for field in ("input_dim", "hidden_dim"):
                _check_dim(f"{field} of the {space} projector", projector.get(field, 1))
            if projector["layout"] not in PROJECTOR_LAYOUTS:
                raise ValueError(
                    f"Unknown layout {projector['layout']!r} of the {space} projector: expected one of "
                    f"{PROJECTOR_LAYOUTS}."
                )
            if projector["layout"] == "identity" and projector["input_dim"] != self.projection_dim:
                raise ValueError(
                    f"The {space} projector is the identity, so projection_dim must equal its width "
                    f"{projector['input_dim']}, got {self.projection_dim}."
                )
        for name in self.fingerprints or []:
            space, _, modality = str(name).partition("_")
            if space not in self.projectors or modality not in SPACE_MODALITIES[space]:
                raise ValueError(f"Expected fingerprints named space_modality, such as 'clip_text', got {name!r}.")
        for bridge in self.bridges:
            if len(bridge) != 3 or any((space, bridge[2]) not in LEAF_MODALITIES for space in bridge[:2]):
                raise ValueError(f"Expected a bridge as [space, space, overlap modality], got {bridge}.")
            if bridge[0] not in self.projectors or bridge[1] not in self.projectors:
                raise ValueError(f"The bridge {bridge} names a space without a projector; there are {self.spaces}.")
            if self._is_base(bridge[0]) and self.projectors[bridge[0]]["layout"] != "identity":
                raise ValueError(
                    f"Expected the layout 'identity' of the {bridge[0]} projector, since ex-mcr leaves the base space "
                    f"as it is, got {self.projectors[bridge[0]]['layout']!r}. Leave it out, or train c-mcr."
                )
        for modality, space in self.default_spaces.items():
            if space not in self.projectors or modality not in SPACE_MODALITIES[space]:
                raise ValueError(f"The default space of {modality} cannot be {space!r}.")
        positive = {name: getattr(self, name) for name in ("overlap_temperature", "leaf_temperature", "target_power")}
        for space, temperature in (self.posterior_temperatures or {}).items():
            if (
                space not in self.projectors
                or isinstance(temperature, bool)
                or not isinstance(temperature, int | float)
            ):
                raise ValueError(
                    f"Expected posterior_temperatures as {{space: number}} of {self.spaces}, got "
                    f"{self.posterior_temperatures!r}."
                )
            positive[f"posterior_temperatures.{space}"] = temperature
        for name, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        _check_dim("posterior_top", self.posterior_top)
        if self.objective == "bridge-distillation" and len(self.bridges) != 1:
            raise ValueError(
                f"bridge-distillation connects two spaces, expected one bridge, got {self.bridges}. Train each pair "
                "on its own, or several spaces with ex-mcr."
            )
        if self.objective == "bridge-distillation" and self.posterior_temperatures is not None:
            missing = [space for space in self.bridges[0][:2] if space not in self.posterior_temperatures]
            if missing:
                raise ValueError(
                    f"posterior_temperatures lack {' and '.join(missing)}, expected those of both spaces of the "
                    f"bridge, got {self.posterior_temperatures!r}. Name both, or none: the training chooses them."
                )
        if not 0 <= self.target_lift <= 1:
            raise ValueError(f"target_lift must be from 0 to 1, got {self.target_lift}.")
        for name in ("intra_weight", "noise_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must not be negative, and finite, got {getattr(self, name)}.")


CMCRConfig.register_for_auto_class("AutoConfig")

# A projector wider than this would ask for more memory than any machine has.
MAX_DIM = 65536


def _check_dim(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_DIM:
        raise ValueError(f"{name} must be a whole number from 1 to {MAX_DIM}, got {value!r}.")


__all__ = ["CMCRConfig"]
