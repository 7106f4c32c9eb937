# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""C-MCR models: frozen contrastive sources, one projector a space, and the losses that train the projectors.

Method: "Connecting Multi-modal Contrastive Representations", arXiv 2305.14381. The authors released inference code
only; the training here follows the paper. Layouts of the projectors: the official heads (MCR-PEFT/C-MCR, CC BY 4.0)
and those of "Extending Multi-modal Contrastive Representations", arXiv 2310.08884 (MCR-PEFT/Ex-MCR).
"""

import copy
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple, logging

from .configuration_cmcr import (
    DEEP_LAYOUTS,
    LEAF_MODALITIES,
    PROJECTOR_LAYOUTS,
    SPACE_MODALITIES,
    TEMPERATURES,
    CMCRConfig,
    source_embedding_dim,
)
from .losses_cmcr import matched_cross_entropy, symmetric_info_nce
from .noise_cmcr import row_noise
from .sources_cmcr import FINGERPRINT_ROWS, check_fingerprint, fingerprint, normalize, source_features
from .towers_cmcr import HUB_ARGUMENTS, build_source, load_source, source_id

logger = logging.get_logger(__name__)


@dataclass
class CMCRConnectorOutput(ModelOutput):
    """Output of [`CMCRConnector`].

    Args:
        loss: the objective, a scalar, when `return_loss`.
        embeds: `{"{space}_{modality}": (batch, projection_dim)}`, unit rows of the shared space.
        loss_overlap, loss_leaf, loss_intra: terms of the objective before weighting, scalars: between the spaces for
            the overlap and for the leaf modalities, and between the modalities of a space.
        loss_leaf_overlap, loss_overlap_leaf: those that `ex-mcr` has beside them, of the leaf modality of the space
            that is extended with the overlap of the base, and of its overlap with the leaf modality of the base.
    """

    loss: torch.Tensor | None = None
    embeds: dict[str, torch.Tensor] | None = None
    loss_overlap: torch.Tensor | None = None
    loss_leaf: torch.Tensor | None = None
    loss_leaf_overlap: torch.Tensor | None = None
    loss_overlap_leaf: torch.Tensor | None = None
    loss_intra: torch.Tensor | None = None


@dataclass
class CMCROutput(ModelOutput):
    """Output of [`CMCRModel`]. What was not given as input is `None`.

    Args:
        loss: mean symmetric InfoNCE over all pairs of given modalities, when `return_loss`.
        logits_per_image: `(images, texts)`, scaled cosines.
        logits_per_text: `(texts, images)`, `(texts, clips)` where no images are given, or else `(texts, clouds)`.
        logits_per_audio: `(clips, texts)`.
        logits_per_audio_image: `(clips, images)`.
        logits_per_point_cloud: `(clouds, texts)`.
        logits_per_point_cloud_image: `(clouds, images)`.
        image_embeds, text_embeds, audio_embeds, point_cloud_embeds: `(rows, projection_dim)`, unit rows of the shared
            space.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    logits_per_audio: torch.Tensor | None = None
    logits_per_audio_image: torch.Tensor | None = None
    logits_per_point_cloud: torch.Tensor | None = None
    logits_per_point_cloud_image: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    audio_embeds: torch.Tensor | None = None
    point_cloud_embeds: torch.Tensor | None = None


class CMCRProjector(nn.Module):
    """Map one source space into the shared space: `(rows, input_dim)` to `(rows, projection_dim)`, not normalised.

    With the layout `ex-mcr`, embeddings of the leaf modality go through a linear map first, which starts as the
    identity and closes the gap between the leaf and the other modalities of its space.
    """

    def __init__(self, layout: str, input_dim: int, projection_dim: int, hidden_dim: int | None = None):
        super().__init__()
        layers: list[nn.Module] = []
        if layout in DEEP_LAYOUTS:
            hidden_dim = hidden_dim or 2 * projection_dim
            for width in (input_dim, projection_dim)[: 2 if layout == "ex-mcr" else 1]:
                layers += [nn.Linear(width, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU()]
                layers += [nn.Linear(hidden_dim, projection_dim), nn.BatchNorm1d(projection_dim)]
        elif layout == "linear-bn-relu":
            layers = [nn.Linear(input_dim, projection_dim), nn.BatchNorm1d(projection_dim), nn.ReLU()]
        elif layout != "identity":
            raise ValueError(f"Unknown projector layout {layout!r}: expected one of {PROJECTOR_LAYOUTS}.")
        self.leaf_linear = nn.Linear(input_dim, input_dim) if layout == "ex-mcr" else None
        self.layers = nn.Sequential(*layers)

    def forward(self, embeds: torch.Tensor, leaf: bool = False) -> torch.Tensor:
        """Map embeddings; `leaf` says that they are of the leaf modality, which matters to the layout `ex-mcr`."""
        if leaf and self.leaf_linear is not None:
            embeds = self.leaf_linear(embeds)
        return self.layers(embeds)


class CMCRPreTrainedModel(PreTrainedModel):
    config: CMCRConfig
    config_class = CMCRConfig
    # On both classes: a connector's keys then find their place in a full model, and the other way round.
    base_model_prefix = "connector"
    # The losses are means over the batch, so Trainer averages them over gradient accumulation.
    accepts_loss_kwargs = False
    # The sources have the attention layers; both classes share the configuration that carries the choice to them.
    _supports_sdpa = True
    _no_split_modules = ["CMCRConnector"]  # noqa: RUF012

    def __init__(self, config: CMCRConfig):
        super().__init__(config)
        # What Trainer puts into the metadata of the card that it writes itself.
        self.model_tags = ["c-mcr", "cmcr_hf"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):
            # The initialisation torch gives to Linear, which the official heads were trained from.
            init.kaiming_uniform_(module.weight, a=5**0.5)
            bound = module.in_features**-0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, CMCRConnector):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            projector: Any
            for projector in module.projectors.values():
                if projector.leaf_linear is not None:
                    # As the official heads of Ex-MCR start.
                    init.eye_(projector.leaf_linear.weight)
                    init.zeros_(projector.leaf_linear.bias)
                    for linear in (layer for layer in projector.layers if isinstance(layer, nn.Linear)):
                        init.xavier_uniform_(linear.weight)
        else:
            super()._init_weights(module)

    @classmethod
    def _load_checked(cls, name, *args, output_loading_info=False, **kwargs):
        # transformers only warns when a parameter is missing from the checkpoint, and leaves it random.
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"The checkpoint {str(name)!r} lacks {len(missing)} of the weights of a {cls.__name__}, e.g. "
                f"{missing[0]!r}. Load a folder written by save_pretrained of this class or of CMCRModel."
            )
        return (model, info) if output_loading_info else model

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        processor: Any = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ):
        """Push the model with its code, its processor and a card to the Hub in one commit, and return that.

        A card that the repository has is kept, and so is what else is there, but for weights of former pushes. To push
        a folder with the card of its connection, use the command `cmcr push`.

        Args:
            processor: the [`CMCRProcessor`] of the model; without it, the repository needs one from elsewhere.
            private: create the repository private; a public one of that name is refused.
            revision: branch to push to, made from the main one where it is missing.
            tags: further tags for the metadata of the card.

        Raises:
            ImportError: the package is not installed: the code beside the weights makes no cards.
            ValueError: the repository is public and was to be private, or a source of a connector is a folder.
            OSError: the Hub cannot be reached or refuses; says why and what to do.
        """
        try:
            # The one place where the code of the model asks for the rest of the package, which makes the cards.
            from cmcr_hf.conversion.push import push_model
        except ImportError as error:
            raise ImportError(
                "Pushing takes the package cmcr_hf. Install it (pip install cmcr-hf), or call save_pretrained and "
                "run `hf upload`."
            ) from error
        return push_model(
            self,
            repo_id,
            processor=processor,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            max_shard_size=max_shard_size,
            tags=tags,
        )


# Every saved folder carries the code of the model, so that it loads where this package is not installed.
CMCRPreTrainedModel.register_for_auto_class("AutoModel")


class CMCRConnector(CMCRPreTrainedModel):
    """The trained part of C-MCR alone: the projectors and their objective, on embeddings of the source spaces.

    Example:
        >>> projectors = {"clip": {"input_dim": 4}, "clap": {"input_dim": 6}}
        >>> connector = CMCRConnector(CMCRConfig(projection_dim=8, projectors=projectors))
        >>> connector.eval().project(torch.randn(2, 4), "clip").shape
        torch.Size([2, 8])
    """

    _keys_to_ignore_on_load_unexpected = [r"^(clip|clap|ulip)\."]  # noqa: RUF012
    # Of ranks that hold a part of the batch each, as many rows on each: set while they train together.
    process_group: Any = None

    def __init__(self, config: CMCRConfig):
        super().__init__(config)
        self.projectors = nn.ModuleDict(
            {
                space: CMCRProjector(**projector, projection_dim=config.projection_dim)  # type: ignore[arg-type]
                for space, projector in (config.projectors or {}).items()
            }
        )
        # For the logits of CMCRModel; the temperatures of the objective are fixed numbers of the configuration.
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        for name in config.fingerprints or []:
            space, modality = name.split("_", 1)
            rows, width = FINGERPRINT_ROWS[modality], (config.projectors or {})[space]["input_dim"]
            self.register_buffer(f"fingerprint_{name}", torch.zeros(rows, width))
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load the connector of a connector-only checkpoint or of a full model, from a folder or the Hub.

        Raises:
            ValueError: the checkpoint lacks a projector's weights.
        """
        return cls._load_checked(pretrained_model_name_or_path, *args, **kwargs)

    def project(self, embeds: torch.Tensor, space: str, modality: str | None = None) -> torch.Tensor:
        """Project embeddings of one source: `(rows, input_dim)`, of any norm, to `(rows, projection_dim)` unit rows.

        L2 before and after the projector, as the official inference does; once where that is the identity, so that a
        base space keeps every bit.

        Args:
            modality: of the embeddings; a projector of the layout `ex-mcr` needs it, the others do not.
        """
        projector = self.projectors[space]
        if projector.leaf_linear is not None and modality not in SPACE_MODALITIES[space]:
            raise ValueError(
                f"Expected the modality of the embeddings, one of {list(SPACE_MODALITIES[space])}, got {modality!r}: "
                f"the {space} projector treats the leaf modality in its own way. Pass modality=."
            )
        if not projector.layers:
            return normalize(embeds)
        dtype = next(projector.parameters()).dtype
        # The first of a space's modalities is the one that no other space has.
        return normalize(projector(normalize(embeds).to(dtype), leaf=modality == SPACE_MODALITIES[space][0]))

    def forward(
        self,
        embeds: dict[str, torch.Tensor],
        return_loss: bool = True,
        return_dict: bool | None = None,
        noise_seed: tuple[int, ...] | None = None,
        matches: torch.Tensor | None = None,
    ) -> CMCRConnectorOutput:
        """Project embeddings, aligned ones unless it is `bridge-distillation`, and score them with the objective.

        Args:
            embeds: `{"{space}_{modality}": (batch, input_dim)}`. For CLIP-CLAP through text: `clip_text` and
                `clap_text` of the same texts, and their pseudo embeddings `clip_image` and `clap_audio` (semantic
                consistency, equation 1), row by row; native and pseudo ones in other roles in a pool that is centred
                on another modality. In training mode noise is added to each (semantic completion). For
                `bridge-distillation`: real items of both leaf modalities, in no common order.
            noise_seed: makes the noise a function of these numbers, the name of the embeddings and the row's place in
                the batch, of all ranks of `process_group` in their order; else torch's global generator draws it.
            matches: for the loss of `bridge-distillation`: how well the items of the bridge's first space (rows) and
                of its second (columns) match.
        """
        distilled = self.config.objective == "bridge-distillation" and (return_loss or matches is not None)
        if distilled:
            matches = self._check_unpaired(embeds, matches)
            if self.training and self.config.mix_items:
                embeds, matches = self._mix(embeds, matches, noise_seed)
        completed, projected = {}, {}
        for name, source_embeds in embeds.items():
            space, _, modality = name.partition("_")
            if space not in self.projectors:
                raise ValueError(
                    f"Expected embeddings named space_modality with a space of {list(self.projectors)}, got {name!r}."
                )
            completed[name] = self._complete(source_embeds, name, noise_seed)
            projected[name] = self.project(completed[name], space, modality)
        output = CMCRConnectorOutput(embeds=projected)
        if return_loss:
            objective, bridges = self.config.objective, self.config.bridges or []
            if objective == "c-mcr":
                terms = [self._c_mcr_terms(bridge, projected) for bridge in bridges]
            elif objective == "ex-mcr":
                terms = [self._ex_mcr_terms(bridge, completed, projected) for bridge in bridges]
            elif distilled and matches is not None:
                terms = [self._distillation_terms(bridge, projected, matches) for bridge in bridges]
            else:
                raise ValueError(
                    f"Cannot train the objective {objective!r}: this version knows {', '.join(TEMPERATURES)}."
                )
            for name in terms[0]:
                output[name] = torch.stack([term[name] for term in terms]).mean()
        return output

    def _complete(self, embeds: torch.Tensor, name: str, noise_seed: tuple[int, ...] | None = None) -> torch.Tensor:
        """Add the noise of semantic completion in training mode (equation 2)."""
        if not self.training or self.config.noise_norm == 0:
            return embeds
        if noise_seed is None:
            noise = torch.randn_like(embeds)
        else:
            rank = 0 if self.process_group is None else dist.get_rank(self.process_group)
            noise = row_noise(embeds, noise_seed, name, rank * len(embeds))
        return normalize(embeds) + self.config.noise_norm * embeds.shape[-1] ** -0.5 * noise

    def _check_unpaired(self, embeds: dict[str, torch.Tensor], matches: torch.Tensor | None) -> torch.Tensor:
        """Return the matches, if they are there and those of the embeddings of both leaf modalities."""
        names = _leaves_of((self.config.bridges or [])[0])
        if matches is None or embeds.keys() != set(names):
            raise ValueError(
                f"Expected the embeddings {names} and their matches, got {list(embeds)} "
                f"{'without' if matches is None else 'and'} matches."
            )
        shape = tuple(len(embeds[name]) for name in names)
        if matches.shape != shape:
            raise ValueError(
                f"Expected matches of the shape {shape}, {names[0]} by {names[1]}, got {tuple(matches.shape)}."
            )
        return matches

    def _mix(
        self, embeds: dict[str, torch.Tensor], matches: torch.Tensor, noise_seed: tuple[int, ...] | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Interpolate every item with the one before it in the batch, and their matches alike."""
        mixed = {}
        for dim, name in enumerate(_leaves_of((self.config.bridges or [])[0])):
            rows = normalize(embeds[name])
            if noise_seed is None:
                share = torch.rand_like(rows[:, :1])
            else:
                # Normal numbers become even ones by their distribution function.
                share = torch.special.ndtr(row_noise(rows[:, :1], noise_seed, f"{name} share"))
            mixed[name] = torch.lerp(rows, rows.roll(1, 0), share)
            matches = torch.lerp(matches, matches.roll(1, dim), share if dim == 0 else share.T)
        return mixed, matches

    def _distillation_terms(
        self, bridge: list[str], projected: dict[str, torch.Tensor], matches: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return how far the cosines of unpaired items are from what the overlap modality says of them."""
        leaf_a, leaf_b = (projected[name].float() for name in _leaves_of(bridge))
        scale = 1 / self.config.leaf_temperature  # type: ignore[operator]
        power, lift = self.config.target_power, self.config.target_lift
        loss = matched_cross_entropy(leaf_a, leaf_b, matches.float(), scale, power, lift)
        return {"loss": loss, "loss_leaf": loss}

    def _c_mcr_terms(self, bridge: list[str], projected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the objective of C-MCR and its terms (equations 4 to 6)."""
        overlap_a, overlap_b, leaf_a, leaf_b = _of_bridge(bridge, projected)
        terms = {
            "loss_overlap": self._info_nce(overlap_a, overlap_b, self.config.overlap_temperature),
            "loss_leaf": self._info_nce(leaf_a, leaf_b, self.config.leaf_temperature),
            # The mean over both spaces' rows is 1/2 mean_i (d_a + d_b) of equation 5.
            "loss_intra": self._distance(torch.cat([overlap_a - leaf_a, overlap_b - leaf_b])),
        }
        loss = terms["loss_overlap"] + terms["loss_leaf"] + self.config.intra_weight * terms["loss_intra"]
        return {"loss": loss, **terms}

    def _ex_mcr_terms(
        self, bridge: list[str], completed: dict[str, torch.Tensor], projected: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the objective of Ex-MCR and its terms: dense alignment, and the gap that the linear map closes."""
        base_overlap, overlap, base_leaf, leaf = _of_bridge(bridge, projected)
        tau_overlap, tau_leaf = self.config.overlap_temperature, self.config.leaf_temperature
        terms = {
            "loss_overlap": self._info_nce(overlap, base_overlap, tau_overlap),
            "loss_leaf": self._info_nce(leaf, base_leaf, tau_leaf),
            "loss_leaf_overlap": self._info_nce(leaf, base_overlap, tau_overlap),
            "loss_overlap_leaf": self._info_nce(overlap, base_leaf, tau_leaf),
        }
        dense = torch.stack([*terms.values()]).mean()
        linear: Any = self.projectors[bridge[1]].leaf_linear
        if linear is not None:
            # Before the MLPs: the linear map alone is to close the gap of its space.
            _, overlap, _, leaf = _of_bridge(bridge, completed)
            overlap, leaf = normalize(overlap), linear(normalize(leaf).to(linear.weight.dtype)).float()
        terms["loss_intra"] = self._distance(leaf - overlap) / 2
        return {"loss": dense + self.config.intra_weight * terms["loss_intra"], **terms}

    def _info_nce(self, a: torch.Tensor, b: torch.Tensor, temperature: Any) -> torch.Tensor:
        return symmetric_info_nce(a, b, 1 / temperature, self.process_group)

    def _distance(self, difference: torch.Tensor) -> torch.Tensor:
        """Return the mean Euclidean norm of the rows, or that of its square."""
        distances = difference.square().sum(dim=-1)
        if not self.config.intra_squared:
            # The root's slope is infinite at 0, which two identical vectors reach.
            distances = distances.clamp_min(1e-12).sqrt()
        return distances.mean()


def _of_bridge(bridge: list[str], embeds: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the embeddings of a bridge in float32: the overlap in both spaces, then the leaf modality of each."""
    names = [f"{space}_{bridge[2]}" for space in bridge[:2]] + _leaves_of(bridge)
    missing = [name for name in names if name not in embeds]
    if missing:
        raise ValueError(f"The bridge {bridge} needs the embeddings {names}; {missing} are not among {list(embeds)}.")
    return [embeds[name].float() for name in names]


def _leaves_of(bridge: list[str]) -> list[str]:
    return [f"{space}_{LEAF_MODALITIES[space, bridge[2]]}" for space in bridge[:2]]


class CMCRModel(CMCRPreTrainedModel):
    """Frozen source encoders and a connector: every modality of every source in one shared space.

    Example:
        >>> model = CMCRModel.from_pretrained("my-org/cmcr-clip-clap")
        >>> processor = CMCRProcessor.from_pretrained("my-org/cmcr-clip-clap")
        >>> audio = model.get_audio_features(**processor(audio="dog.wav")).pooler_output
        >>> image = model.get_image_features(**processor(images=["dog.jpg", "sea.jpg"])).pooler_output
        >>> (audio @ image.T).argmax()
    """

    # Without point clouds, of which transformers knows nothing.
    input_modalities = ["image", "text", "audio"]  # noqa: RUF012

    def __init__(
        self,
        config: CMCRConfig,
        sources: dict[str, PreTrainedModel] | None = None,
        modalities: Collection[str] | None = None,
    ):
        super().__init__(config)
        self.modalities = _select_modalities(config.embedded_modalities, modalities)
        unused = []
        for space in config.spaces:
            if not set(self.modalities) & set(config.modalities_of(space)):
                unused.append(rf"^{space}\.")
                continue
            source_config = config.source_config(space)
            if source_config is None:
                raise ValueError(
                    f"The configuration has no {space}_config, so there is no source to build. Use CMCRConnector for "
                    "projectors alone, or CMCRModel.from_sources_pretrained."
                )
            source = (sources or {}).get(space)
            source = build_source(source_config, self.modalities) if source is None else source
            setattr(self, space, source)
            # One object, so that what is set on either (the attention, say) holds for both.
            setattr(config, f"{space}_config", source.config)
        self.connector = CMCRConnector(config)
        for module in [part for source in (sources or {}).values() for part in source.modules()]:
            # What `from_pretrained` marks; of a source that was made in another way, `post_init` draws new weights.
            module._is_hf_initialized = True  # type: ignore[assignment]
        self.post_init()
        # A connector passes over the sources of a full checkpoint; the full model does not.
        inherited = set(CMCRConnector._keys_to_ignore_on_load_unexpected)
        ignored = set(self._keys_to_ignore_on_load_unexpected or ()) - inherited
        self._keys_to_ignore_on_load_unexpected = ignored.union(unused)
        self.train(self.training)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save the model whole: sources, connector and the code that loads them.

        Raises:
            ValueError: the model was loaded without some of its towers, which the folder would lack.
        """
        missing = [
            f"{space} {modality}"
            for space in self.config.spaces
            for modality in self.config.modalities_of(space)
            if modality not in self.modalities
        ]
        if missing:
            raise ValueError(
                f"The model was loaded with modalities={self.modalities}, so a saved one would lack its "
                f"{', '.join(missing)} towers. Load it without modalities= to save it, or save its connector: "
                "model.connector.save_pretrained."
            )
        return super().save_pretrained(save_directory, *args, **kwargs)

    def train(self, mode: bool = True):
        """Set the mode of the connector; frozen sources stay in eval mode and without gradients.

        `from_pretrained` gives every parameter its gradient back, and BatchNorm moves its running statistics in
        training mode even without gradients; both end here, since `from_pretrained` and `Trainer` call it.
        """
        super().train(mode)
        if self.config.freeze_sources:
            for source in self.sources.values():
                source.requires_grad_(False).eval()
        return self

    @property
    def sources(self) -> dict[str, PreTrainedModel]:
        """The loaded source models by space."""
        return {space: getattr(self, space) for space in self.config.spaces if hasattr(self, space)}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, modalities: Collection[str] | None = None, **kwargs
    ):
        """Load a full checkpoint, or a connector-only one together with the sources that it records.

        Args:
            modalities: of `image`, `text`, `audio` and `point_cloud`, those to load the towers of, all where it is
                `None`. The other towers are not built, and of safetensors files not read; using one, or saving the
                model, is an error. `text` means the text towers of all sources.

        Raises:
            ValueError: a projector's or a source's weights are missing, a connector-only checkpoint records no
            sources, or no source has a modality asked for.
        """
        name = str(pretrained_model_name_or_path)
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            hub = {key: kwargs[key] for key in (*HUB_ARGUMENTS, "revision", "subfolder") if key in kwargs}
            config = CMCRConfig.from_pretrained(config or pretrained_model_name_or_path, **hub)
        if config.architectures != ["CMCRConnector"]:
            return cls._load_checked(pretrained_model_name_or_path, *args, modalities=modalities, **kwargs)
        missing = [space for space in config.spaces if space not in (config.sources or {})]
        if missing:
            raise ValueError(
                f"{name!r} is a connector that records no {' and no '.join(missing)} source. Name them: "
                f"CMCRModel.from_sources_pretrained({', '.join(f'{space}=...' for space in config.spaces)}, "
                f"connector={name!r})."
            )
        connector = CMCRConnector.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return cls.from_sources_pretrained(
            **{space: config.sources[space]["id"] for space in config.spaces},
            revisions={space: config.sources[space].get("revision") for space in config.spaces},
            connector=connector,
            modalities=modalities,
            **{
                key: kwargs[key]
                for key in (*HUB_ARGUMENTS, "dtype", "device_map", "attn_implementation")
                if key in kwargs
            },
        )

    @classmethod
    def from_sources_pretrained(
        cls,
        clip: str | os.PathLike | PreTrainedModel | None = None,
        clap: str | os.PathLike | PreTrainedModel | None = None,
        connector: "str | os.PathLike | CMCRConnector | None" = None,
        *,
        ulip: str | os.PathLike | PreTrainedModel | None = None,
        config: dict | None = None,
        revisions: dict[str, str | None] | None = None,
        processor: Any = None,
        modalities: Collection[str] | None = None,
        **kwargs,
    ) -> "CMCRModel":
        """Build a model from pretrained sources, with a trained connector or a fresh one (random, to be trained).

        Args:
            clip: an image-text model: Hub id, folder, or a loaded model (of which no origin is recorded). Or
                `open_clip:NAME/TAG`, a model of open_clip by its names, or with a file in place of the tag.
            clap: an audio-text model, likewise; or a LAION-CLAP checkpoint, `FILE.pt`, converted while it is read.
            connector: a [`CMCRConnector`], its folder or Hub id; `None` makes a fresh one.
            ulip: a [`UlipModel`], likewise a Hub id, folder or loaded model.
            config: fields of [`CMCRConfig`] for a fresh connector, e.g. `{"projection_dim": 256}`.
            revisions: `{space: revision}` of sources on the Hub.
            modalities: those to load the towers of, as for `from_pretrained`; a source given as a model stays whole.
            processor: the [`CMCRProcessor`] of the sources, which the check of the connector's fingerprints needs
                where a source is a loaded model; read from the sources where they are ids or folders.
            **kwargs: for the sources' `from_pretrained`: `dtype` (default and `"auto"`: the connector's, float32 for
                a fresh one), `device_map`, `attn_implementation`, `token`, ...

        Raises:
            ValueError: the sources are not those of the connector: a space, a width or a fingerprint differs.
            OSError: a source cannot be loaded.
        """
        given = {
            space: source for space, source in (("clip", clip), ("clap", clap), ("ulip", ulip)) if source is not None
        }
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        trained: CMCRConnector | None = (
            CMCRConnector.from_pretrained(connector, **hub) if isinstance(connector, (str, os.PathLike)) else connector
        )
        expected = list(given) if trained is None else trained.config.spaces
        if not given or set(given) != set(expected):
            raise ValueError(
                f"Expected the sources {expected or ['clip', 'clap']}, got {list(given)}. Pass clip= (image-text), "
                "clap= (audio-text) and ulip= (point clouds) accordingly."
            )
        able = [modality for space in expected for modality in SPACE_MODALITIES[space]]
        selected = _select_modalities(able, modalities)
        if trained is not None:
            config = {name: getattr(trained.config, name) for name in CMCRConfig.__annotations__}

        # A checkpoint in half precision would else cut the trained projectors to its own.
        if kwargs.get("dtype") in (None, "auto"):
            kwargs["dtype"] = torch.float32 if trained is None else trained.dtype
        models: dict[str, PreTrainedModel] = {}
        records: dict[str, dict[str, str | None]] = {}
        for space, source in given.items():
            if isinstance(source, PreTrainedModel):
                models[space] = source
                continue
            if not set(selected) & set(SPACE_MODALITIES[space]):
                records[space] = {"id": source_id(source), "revision": (revisions or {}).get(space)}
                continue
            try:
                models[space], records[space] = load_source(source, (revisions or {}).get(space), selected, kwargs)
            except OSError as error:
                reason = " ".join(str(error).split())
                raise OSError(
                    f"Cannot load the {space} source {os.fspath(source)!r}. Pass its folder or Hub id as {space}= to "
                    f"CMCRModel.from_sources_pretrained. ({reason})"
                ) from error
        for space, source in models.items():
            missing = [m for m in SPACE_MODALITIES[space] if not hasattr(source, f"get_{m}_features")]
            if space != "ulip" and source.config.model_type == "ulip":
                # It has methods even for towers that it lacks, and is there for its clouds.
                missing = list(SPACE_MODALITIES[space])
            if missing:
                raise ValueError(
                    f"The {space} source is a {type(source).__name__}, which cannot embed {' and '.join(missing)} in "
                    "this role. Pass an image-text model as clip=, an audio-text model as clap= and a UlipModel as "
                    "ulip=."
                )
        # Copies, since a composite configuration resets the attention of its parts.
        configs = {f"{space}_config": copy.deepcopy(source.config) for space, source in models.items()}
        model_config = CMCRConfig(**{**(config or {}), **configs, "sources": records or None})

        for space, source in models.items():
            input_dim, width = (model_config.projectors or {})[space]["input_dim"], source_embedding_dim(source.config)
            if width is not None and input_dim != width:
                raise ValueError(
                    f"The connector expects {space} embeddings of width {input_dim}, the source gives {width}. Pass "
                    f"the {space} source that the connector was trained on."
                )
        model = cls(model_config, sources=models, modalities=modalities)
        if trained is not None:
            model.connector.load_state_dict(trained.state_dict())
        first = next(iter(models.values()))
        model.connector.to(device=first.device, dtype=first.dtype)  # type: ignore[call-arg]
        if trained is not None and model_config.fingerprints:
            ids = {space: os.fspath(name) for space, name in given.items() if not isinstance(name, PreTrainedModel)}
            if processor is None and len(ids) == len(given):
                # Imported here, since it is of no use to those who load a full checkpoint.
                from .processing_cmcr import CMCRProcessor

                processor = CMCRProcessor.from_sources_pretrained(**ids, revisions=revisions, **hub)
            model._check_fingerprints(processor, ids)
        return model.eval()

    def record_fingerprints(self, processor: Any) -> None:
        """Store in the connector what each source gives for eight sentences, a picture, a tone and a point cloud.

        A connector checkpoint carries them, and sources that give something else are refused when they are attached.

        Args:
            processor: the [`CMCRProcessor`] of the sources.
        """
        self.config.fingerprints = [
            f"{space}_{modality}" for space in self.config.spaces for modality in self.config.modalities_of(space)
        ]
        for name in self.config.fingerprints:
            space, modality = name.split("_", 1)
            embeds = fingerprint(self._source(space, modality), processor, space, modality)
            self.connector.register_buffer(f"fingerprint_{name}", embeds.to(self.connector.logit_scale))

    def _check_fingerprints(self, processor: Any, names: dict[str, str]) -> None:
        if processor is None:
            logger.warning(
                "A source is given as a loaded model: whether it is that of the connector is not checked. Pass "
                "processor= to check it."
            )
            return
        for name in self.config.fingerprints or []:
            space, modality = name.split("_", 1)
            if modality not in self.modalities:
                continue
            recorded = self.connector.get_buffer(f"fingerprint_{name}")
            found = fingerprint(self.sources[space], processor, space, modality)
            name = repr(names[space]) if space in names else "The model given"
            check_fingerprint(found, recorded, space, modality, name, self.sources[space].dtype)

    def _source(self, space: str, modality: str) -> PreTrainedModel:
        if modality not in self.modalities:
            raise ValueError(
                f"The model was loaded with modalities={self.modalities}, without the {modality} tower of {space}. "
                f"Load it with {modality!r} among its modalities."
            )
        return self.sources[space]

    def _embed(self, modality: str, space: str | None, inputs: dict) -> BaseModelOutputWithPooling:
        space = self.config.space_of(modality, space)
        outputs = source_features(self._source(space, modality), modality, inputs)
        outputs.pooler_output = self.connector.project(outputs.pooler_output, space, modality)
        return outputs

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        space: str | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling:
        """Embed texts: `.pooler_output` is `(texts, projection_dim)`, unit rows of the shared space.

        Args:
            input_ids: from the tokenizer of the same space: `processor(text=..., space=space)`.
            space: the source to go through; `config.default_spaces["text"]` where it is `None`.

        Raises:
            ValueError: the texts of a SigLIP are not padded to its length.
        """
        source_config = self.config.source_config(self.config.space_of("text", space))
        if source_config is not None and source_config.model_type in ("siglip", "siglip2"):
            length = source_config.get_text_config().max_position_embeddings
            if input_ids.shape[1] < length:
                raise ValueError(
                    f"Expected texts padded to {length} tokens, as a {source_config.model_type} reads the last one, "
                    f"got {input_ids.shape[1]}. Prepare them with CMCRProcessor, or with padding='max_length'."
                )
        return self._embed("text", space, {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs})

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, space: str | None = None, **kwargs
    ) -> tuple | BaseModelOutputWithPooling:
        """Embed images: `.pooler_output` is `(images, projection_dim)`, unit rows of the shared space.

        Args:
            pixel_values: `(images, channels, height, width)`, or what the source's own image processor gives.
            space: the source whose image processor prepared the images; `config.default_spaces["image"]` where it is
                `None`.
            **kwargs: further inputs of the source, such as SigLIP 2's `pixel_attention_mask` and `spatial_shapes`.
        """
        return self._embed("image", space, {"pixel_values": pixel_values, **kwargs})

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.Tensor,
        is_longer: torch.Tensor | None = None,
        space: str | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling:
        """Embed audio clips: `.pooler_output` is `(clips, projection_dim)`, unit rows of the shared space.

        Args:
            input_features: `(clips, channels, frames, mel bins)` log-mel spectrograms, as [`CMCRProcessor`] makes
            them.
            is_longer: `(clips, 1)` bool, whether a clip exceeds the window of a fused CLAP, which needs it.
        """
        return self._embed("audio", space, {"input_features": input_features, "is_longer": is_longer, **kwargs})

    @can_return_tuple
    def get_point_cloud_features(
        self,
        point_clouds: torch.Tensor,
        num_points: torch.Tensor | None = None,
        space: str | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling:
        """Embed point clouds: `.pooler_output` is `(clouds, projection_dim)`, unit rows of the shared space.

        Args:
            point_clouds: `(clouds, points, channels)`, as [`CMCRProcessor`] makes them.
            num_points: `(clouds,)`, how many points of each cloud count; the rest is padding without effect.
            **kwargs: `seed` of the farthest point sampling (see [`UlipModel.get_point_cloud_features`]).
        """
        return self._embed("point_cloud", space, {"point_clouds": point_clouds, "num_points": num_points, **kwargs})

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        is_longer: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        point_clouds: torch.Tensor | None = None,
        num_points: torch.Tensor | None = None,
        text_space: str | None = None,
        return_loss: bool = True,
        return_dict: bool | None = None,
    ) -> tuple | CMCROutput:
        """Embed any subset of modalities and compare those given.

        Args:
            text_space: the space whose tokenizer made `input_ids`; the default one where it is `None`.
            return_loss: contrastive loss for fine-tuning on true pairs: row i of every given modality belongs
                together. With unequal row counts, or one modality alone, there is none: `None` in eval mode, an error
                in training mode.
        """
        embeds = {}
        if pixel_values is not None:
            inputs = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
            embeds["image"] = self.get_image_features(pixel_values, **inputs).pooler_output
        if input_ids is not None:
            embeds["text"] = self.get_text_features(input_ids, attention_mask, space=text_space).pooler_output
        if input_features is not None:
            embeds["audio"] = self.get_audio_features(input_features, is_longer).pooler_output
        if point_clouds is not None:
            embeds["point_cloud"] = self.get_point_cloud_features(point_clouds, num_points).pooler_output
        if not embeds:
            raise ValueError("Expected at least one of input_ids, pixel_values, input_features and point_clouds.")

        scale = self.connector.logit_scale.exp()
        output = CMCROutput(**{f"{modality}_embeds": rows for modality, rows in embeds.items()})
        # Nearest relatives first: the others leave `logits_per_text` as it is.
        for name, modality, other in (
            ("logits_per_image", "image", "text"),
            ("logits_per_audio", "audio", "text"),
            ("logits_per_point_cloud", "point_cloud", "text"),
            ("logits_per_audio_image", "audio", "image"),
            ("logits_per_point_cloud_image", "point_cloud", "image"),
        ):
            if modality in embeds and other in embeds:
                logits = scale * embeds[modality] @ embeds[other].T
                setattr(output, name, logits)
                if other == "text" and output.logits_per_text is None:
                    output.logits_per_text = logits.T
        if return_loss:
            output.loss = self._paired_loss(list(embeds.values()), scale)
        return output if return_dict or (return_dict is None and self.config.return_dict) else output.to_tuple()

    def _paired_loss(self, embeds: list[torch.Tensor], scale: torch.Tensor) -> torch.Tensor | None:
        rows = [len(rows) for rows in embeds]
        if len(embeds) < 2 or len(set(rows)) > 1:
            if self.training:
                raise ValueError(f"Training needs row-aligned pairs of at least two modalities, got {rows} rows.")
            return None
        pairs = [(a, b) for i, a in enumerate(embeds) for b in embeds[i + 1 :]]
        return torch.stack([symmetric_info_nce(a.float(), b.float(), scale.float()) for a, b in pairs]).mean()


def _select_modalities(able: Collection[str], modalities: Collection[str] | None) -> list[str]:
    """Return the modalities to load the towers of: those asked for, else all that the spaces have."""
    able = list(dict.fromkeys(able))
    if modalities is None:
        return able
    named = isinstance(modalities, Collection) and not isinstance(modalities, str)
    if not named or not modalities or not set(modalities) <= set(able):
        raise ValueError(f"Expected modalities as a list of some of {able}, got {modalities!r}.")
    return list(modalities)


__all__ = ["CMCRConnector", "CMCRConnectorOutput", "CMCRModel", "CMCROutput", "CMCRPreTrainedModel", "CMCRProjector"]
