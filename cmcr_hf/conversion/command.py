"""`cmcr convert`: from an upstream file to a folder that `from_pretrained` loads, with the proof of it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ClapProcessor, CLIPProcessor, PreTrainedModel

from cmcr_hf.conversion import convert_cmcr, convert_ex_mcr, convert_ulip
from cmcr_hf.conversion.checkpoint import Checkpoint
from cmcr_hf.conversion.hub import CONVERSION, check_licence, model_card, source_card
from cmcr_hf.conversion.proof import Proof
from cmcr_hf.conversion.push import check_target, push_folder
from cmcr_hf.durable import new_folder
from cmcr_hf.modeling.configuration_cmcr import SPACE_MODALITIES, CMCRConfig
from cmcr_hf.modeling.modeling_cmcr import CMCRConnector, CMCRModel
from cmcr_hf.modeling.processing_cmcr import CMCRProcessor, load_tokenizer
from cmcr_hf.output import CARD, check_writable

# Of the mean input of a projector's first BatchNorm with its running mean, both without the bias before it: with the
# released ulip_clip.pt, 0.92 and more for eight texts of its own source, 0.52 and more for any one text or image, and
# 0.14 at most through the other head.
FITTING = 0.35


@dataclass
class Converted:
    """A converted model with all that goes into its folder, and what came of comparing it with upstream."""

    model: PreTrainedModel
    checkpoints: Sequence[Checkpoint]
    proof: Proof
    parts: Sequence[Any] = ()


def convert(arguments: argparse.Namespace, report: Callable[[str], None]) -> None:
    """Convert what the options of a kind name, compare it with upstream, write the folder and push it.

    Raises:
        ValueError: a file is not what its kind says, the outputs differ by more than their bound, the output folder is
            in use, or the push was refused. Nothing is written before the outputs were compared.
    """
    output: Path = arguments.output
    check_writable(output)
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"The folder {output} is not empty. Name a new one as --output, or delete it.")
    check_licence(arguments.licence)
    if arguments.push is not None:
        # What is wrong with it is not to be found behind the work.
        check_target(arguments.push)
    # The folder takes its name in its parent.
    check_writable(Path(os.path.realpath(output)).parent)
    try:
        converted = READERS[arguments.kind](arguments, report)
    except ValueError as error:
        if any(str(path).rpartition("=")[2] in str(error) for path in arguments.checkpoint):
            raise
        raise ValueError(f"Cannot convert {', '.join(arguments.checkpoint)}: {error}") from error
    for checkpoint in converted.checkpoints:
        report(f"{checkpoint.path.name}: sha256 {checkpoint.sha256}")
    report(f"Largest differences of unit vectors from {converted.proof.reference}, at most {converted.proof.bound:g}:")
    for name, difference in converted.proof.differences.items():
        report(f"  {name}  {difference:.1e}")
    write(converted, arguments.kind, output, repo_id=arguments.push, licence=arguments.licence)
    report(f"Load it: {type(converted.model).__name__}.from_pretrained({str(output)!r})")
    if arguments.push is not None:
        report(f"Pushed: {push_folder(output, arguments.push)}")


def write(converted: Converted, kind: str, output: Path, *, repo_id: str | None, licence: str | None) -> None:
    """Write a converted model, its parts, its card and the record of the conversion, all or nothing."""
    conversion = {
        "kind": kind,
        "file": ", ".join(checkpoint.path.name for checkpoint in converted.checkpoints),
        "sha256": ", ".join(checkpoint.sha256 for checkpoint in converted.checkpoints),
        **asdict(converted.proof),
    }
    config: Any = converted.model.config
    name = repo_id or output.absolute().name
    if isinstance(config, CMCRConfig):
        card = model_card(config, repo_id=name, licences={}, licence=licence, conversion=conversion)
    else:
        card = source_card(config, repo_id=name, licence=licence, conversion=conversion)
    with new_folder(output) as folder:
        for part in (converted.model, *converted.parts):
            part.save_pretrained(folder)
        (folder / CARD).write_text(str(card), encoding="utf-8")
        (folder / CONVERSION).write_text(json.dumps(conversion, indent=2) + "\n", encoding="utf-8")


def _read_cmcr(arguments: argparse.Namespace, report: Callable[[str], None]) -> Converted:
    (path,) = arguments.checkpoint
    connector, checkpoint = convert_cmcr.read_connector(path)
    proof = convert_cmcr.prove_connector(connector, checkpoint)
    return _with_sources(Converted(connector, [checkpoint], proof), arguments, report)


def _read_ex_mcr(arguments: argparse.Namespace, report: Callable[[str], None]) -> Converted:
    paths: dict[str, str] = {}
    for given in arguments.checkpoint:
        named, separator, path = given.partition("=")
        if separator and named in ("clap", "ulip"):
            spaces = [named]
        else:
            # Both files have one layout, so their names are all that tells them.
            path = given
            spaces = [space for space in ("clap", "ulip") if space in Path(path).name.lower()]
        if len(spaces) != 1 or spaces[0] in paths:
            raise ValueError(
                f"Cannot tell the space of {given!r}, expected one file for CLAP and one for ULIP at most. Write "
                f"--checkpoint clap={path} or ulip={path}."
            )
        paths[spaces[0]] = path
    connector, checkpoints = convert_ex_mcr.read_connector(paths)
    if len({checkpoint.sha256 for checkpoint in checkpoints.values()}) < len(checkpoints):
        raise ValueError(
            f"The two files are the same, expected one for CLAP and one for ULIP: {', '.join(paths.values())}."
        )
    proof = convert_ex_mcr.prove_connector(connector, checkpoints)
    return _with_sources(Converted(connector, list(checkpoints.values()), proof), arguments, report)


def _with_sources(converted: Converted, arguments: argparse.Namespace, report: Callable[[str], None]) -> Converted:
    """Attach the sources that were named to converted heads, with fingerprints, where any were."""
    connector: Any = converted.model
    given = {space: getattr(arguments, space) for space in ("clip", "clap", "ulip")}
    given = {space: source for space, source in given.items() if source is not None}
    if not given and arguments.connector_only:
        raise ValueError("--connector-only names sources that a connector records. Name them, or leave it out.")
    if not given:
        return converted
    if set(given) != set(connector.config.spaces):
        raise ValueError(
            f"These heads connect {' and '.join(connector.config.spaces)}, got sources for {' and '.join(given)}. "
            f"Name {' and '.join(f'--{space}' for space in connector.config.spaces)}, or none for a connector alone."
        )
    model = CMCRModel.from_sources_pretrained(**given, connector=connector)
    processor = CMCRProcessor.from_sources_pretrained(**given)
    model.record_fingerprints(processor)
    check_fit(model.connector, report)
    converted.model = model.connector if arguments.connector_only else model
    converted.parts = [processor]
    return converted


@torch.no_grad()
def check_fit(connector: CMCRConnector, report: Callable[[str], None]) -> None:
    """Compare the statistics of the projectors with what the sources give for the fixed inputs of the fingerprints.

    A projector's first BatchNorm holds the mean of what its linear layer gave in training, so it tells its own source
    from another, where weights and names do not.

    Raises:
        ValueError: the embeddings of a space fit the projector of another one.
    """
    for space in connector.config.spaces:
        fits = {other: _fit(connector, space, other) for other in connector.config.spaces}
        best = max(fits, key=lambda other: fits[other])
        if best != space and fits[best] > FITTING:
            raise ValueError(
                f"The heads seem swapped: embeddings of the {space} source fit the statistics of the {best} projector "
                f"(correlation {fits[best]:.2f}), not those of its own ({fits[space]:.2f}). Pass the released file, "
                "and each source in its role."
            )
        if fits[space] > FITTING:
            report(f"The {space} source fits the statistics of its projector (correlation {fits[space]:.2f}).")
        elif fits[space] >= -1:
            report(
                f"WARNING: the {space} source does not fit the statistics of its projector (correlation "
                f"{fits[space]:.2f}, of the right source more than {FITTING}): the heads may be of another checkpoint."
            )


def _fit(connector: CMCRConnector, space: str, other: str) -> float:
    """Return the correlation of one projector's statistics with the embeddings of a source, -2 where it has none."""
    projector: Any = connector.projectors[other]
    found = [-2.0]
    for name in connector.config.fingerprints or []:
        of, _, modality = name.partition("_")
        rows = connector.get_buffer(f"fingerprint_{name}")
        if of != space or not projector.layers or rows.shape[1] != projector.layers[0].in_features:
            continue
        if projector.leaf_linear is not None and modality == SPACE_MODALITIES[other][0]:
            rows = projector.leaf_linear(rows)
        linear, norm = projector.layers[:2]
        mean = (rows @ linear.weight.T).mean(dim=0)
        correlation = torch.corrcoef(torch.stack([mean, norm.running_mean - linear.bias]))[0, 1]
        found.append(correlation.nan_to_num().item())
    return max(found)


def _read_laion_clap(arguments: argparse.Namespace, report: Callable[[str], None]) -> Converted:
    from cmcr_hf.conversion.convert_laion_clap import feature_extractor, prove_clap, read_clap

    model, checkpoint = read_clap(arguments.checkpoint[0])
    text: Any = model.config.text_config
    tokenizer = _tokenizer(arguments.tokenizer, text.vocab_size)
    proof = prove_clap(model, checkpoint)
    return Converted(model, [checkpoint], proof, [ClapProcessor(feature_extractor(model.config), tokenizer)])


def _read_open_clip(arguments: argparse.Namespace, report: Callable[[str], None]) -> Converted:
    from cmcr_hf.conversion.convert_open_clip import read_clip, read_named_clip, tokenizer
    from cmcr_hf.conversion.prove_open_clip import prove_clip
    from cmcr_hf.sources.open_clip_names import named_config, read_config
    from cmcr_hf.sources.open_clip_processing import image_processor

    (given,) = arguments.checkpoint
    name, _, tag = given.partition("/")
    # Tags of open_clip have neither folders nor endings, so that a missing file is not taken for one.
    if Path(given).exists() or not name or not tag or "/" in tag or Path(given).suffix[1:2].isalpha():
        model, checkpoint = read_clip(given, activation=arguments.activation)
        config = read_config(given)
    elif arguments.activation is not None:
        raise ValueError(f"The activation of {given!r} is known. Leave out --activation, or name a file.")
    else:
        model, checkpoint = read_named_clip(name, tag)
        config = named_config(name, tag)
    vision: Any = model.config.vision_config
    text: Any = model.config.text_config
    preprocess = {"size": vision.image_size, **((config or {}).get("preprocess_cfg") or {})}
    sizes = {"vocab_size": text.vocab_size, "context_length": text.max_position_embeddings}
    parts = CLIPProcessor(image_processor(preprocess), tokenizer(arguments.tokenizer, **sizes))
    return Converted(model, [checkpoint], prove_clip(model, checkpoint), [parts])


def _read_ulip(arguments: argparse.Namespace, report: Callable[[str], None]) -> Converted:
    model, checkpoint = convert_ulip.read_ulip(arguments.checkpoint[0])
    parts: list[Any] = []
    if model.config.vision_config is not None:
        parts.append(convert_ulip.image_processor(model))
    text: Any = model.config.text_config
    if text is not None:
        tokenizer = _tokenizer(arguments.tokenizer, text.vocab_size)
        tokenizer.model_max_length = text.max_position_embeddings
        parts.append(tokenizer)
    return Converted(model, [checkpoint], convert_ulip.prove_ulip(model, checkpoint), parts)


def _tokenizer(source: str, vocab_size: int) -> Any:
    """Load a tokenizer from the Hub or a folder; ValueError where it is empty or larger than the vocabulary."""
    try:
        tokenizer = load_tokenizer(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Cannot load the tokenizer {source!r}: {error} Name a folder or Hub id that has it as --tokenizer."
        ) from error
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer {source!r} has {len(tokenizer)} tokens, the model knows {vocab_size}. Name the model's "
            "own as --tokenizer."
        )
    return tokenizer


READERS: dict[str, Callable[[argparse.Namespace, Callable[[str], None]], Converted]] = {
    "cmcr": _read_cmcr,
    "ex-mcr": _read_ex_mcr,
    "laion-clap": _read_laion_clap,
    "open-clip": _read_open_clip,
    "ulip": _read_ulip,
}
