"""Check that a model folder holds all that loading it from the Hub takes, and nothing that must not go there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from ..modeling import modeling_cmcr
from ..modeling.configuration_cmcr import SPACE_MODALITIES
from ..modeling.modeling_ulip import UlipModel
from ..modeling.processing_cmcr import CMCRProcessor
from ..output import CARD
from .hub import CONVERSION, SOURCES, conversion_section, is_local

logger = logging.get_logger(__name__)

# Of version control, caches and a run of Trainer, whose files of these names are pickles.
LEFT_OUT = [".git", ".git/*", ".cache/*", "*__pycache__/*", "checkpoint-*/*", "*.tmp", "training_args.bin"]
PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
MODELING = Path(modeling_cmcr.__file__).parent


def check_folder(folder: Path) -> None:
    """Check that a folder holds all that loading the model from the Hub takes.

    That is a configuration, weights of its model in safetensors files, the preprocessing of its kind, the code that
    the configuration names as this package has it, a card, and of a connector alone sources that others can fetch. A
    card without a licence is warned of. Pickles, and links to what lies elsewhere, are refused.

    Raises:
        ValueError: something is missing, damaged or must not be pushed; names it.
    """
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder {str(folder)!r} to push. Pass one that `cmcr connect` or a conversion wrote."
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = str(config["model_type"])
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} holds no model: it has no config.json. Pass a folder that save_pretrained wrote, such as "
            "OUTPUT/connector or OUTPUT/model of `cmcr connect`."
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is damaged, or names no model_type ({error!r}). Save the model anew."
        ) from error
    _check_kinds(folder)
    _check_weights(folder, config)
    missing = _check_code(folder, config)
    # Heads alone, as they are converted, have nothing to prepare; their processor comes with the sources.
    heads = not config.get("sources") and not any(config.get(f"{space}_config") for space in SPACE_MODALITIES)
    if kind == "cmcr" and heads:
        pass
    elif kind == "cmcr":
        try:
            CMCRProcessor.from_pretrained(folder)
        except (OSError, ValueError, TypeError, KeyError) as error:
            text = " ".join(str(error).split())
            raise ValueError(
                f"{folder} has no complete processor: {text} Save it there with CMCRProcessor.save_pretrained."
            ) from error
    else:
        # A ULIP has the parts of its towers alone.
        if (kind != "ulip" or config.get("vision_config")) and not any(
            (folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")
        ):
            missing.append("preprocessor_config.json")
        if (kind != "ulip" or config.get("text_config")) and not (folder / "tokenizer_config.json").is_file():
            missing.append("tokenizer_config.json")
    if missing:
        raise ValueError(f"{folder} is not complete: it has no {' and no '.join(missing)}. Save the model anew.")
    check_sources(config, str(folder))
    if not (folder / CARD).is_file():
        raise ValueError(
            f"{folder} has no model card. Write {folder / CARD} with a licence in its metadata, or let `cmcr connect` "
            "or the conversion write it."
        )
    _check_metadata(folder)


def _check_metadata(folder: Path) -> None:
    """Check what the Hub and its readers take of the card, the results and the record of a conversion."""
    for path in (*folder.glob(".eval_results/*.yaml"), *folder.glob(CONVERSION), folder / CARD):
        try:
            text = path.read_text(encoding="utf-8")
            if path.name == CONVERSION:
                conversion_section(json.loads(text))
            elif path.name == CARD:
                card = ModelCard(text)
            else:
                parse_eval_result_entries(yaml.safe_load(text))
        except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(f"The metadata of {path} cannot be read: {reason}. Correct it.") from error
    if not card.text.strip():
        raise ValueError(f"The model card {folder / CARD} is empty. Write what the model is, and its licence.")
    if not card.data.get("license"):
        logger.warning(f"{folder / CARD} names no licence. Add, for example, `license: apache-2.0` to its metadata.")


def _check_kinds(folder: Path) -> None:
    """Check that no file is a pickle, which runs code where it is loaded, or a link to what lies elsewhere."""
    for name, path in _paths(folder).items():
        if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(folder.resolve())):
            raise ValueError(
                f"{name} in {folder} is a link to {path.readlink()}, which is no file of the folder. Put the file "
                "itself in its place, or delete it."
            )
        if path.suffix in PICKLES:
            raise ValueError(
                f"{name} in {folder} is a pickle by its name, which runs code where it is loaded. Delete it, or move "
                "it elsewhere: the weights are in model.safetensors."
            )


def _check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that the headers of the weights name those of the configuration's model, in their shapes."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    found: dict[str, tuple[int, ...]] = {}
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            # Compares what the header says with the size of the file.
            with safe_open(folder / name, framework="np") as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no weights: {name} is missing. Save the model anew.") from error
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"The weights in {folder} are damaged: {error!r}. Save the model anew.") from error
    try:
        model = _empty_model(folder, config)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / 'config.json'} makes no model: {reason} Save the model anew.") from error
    if model is None:
        return
    weights = model.state_dict()
    # transformers saves some models by older names, such as a ViT, and reads both.
    both = [
        {name: tuple(weight.shape) for name, weight in named.items()}
        for named in (weights, revert_weight_conversion(model, weights))
    ]
    expected = min(both, key=lambda shapes: len(found.keys() ^ shapes.keys()))
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"The weights in {folder} are not those of its config.json: {name} is {found.get(name, 'missing')}, "
            f"expected {expected.get(name, 'none')} ({len(wrong)} differ). Save the model anew."
        )


def _empty_model(folder: Path, config: Mapping[str, Any]) -> PreTrainedModel | None:
    """Build the model of a configuration without values, `None` of a kind that is neither ours nor a source."""
    kind = config["model_type"]
    model_class: Any = None
    if kind == "cmcr":
        connector = config.get("architectures") == ["CMCRConnector"]
        model_class = modeling_cmcr.CMCRConnector if connector else modeling_cmcr.CMCRModel
    elif kind in SOURCES:
        model_class = UlipModel if kind == "ulip" else getattr(transformers, SOURCES[kind][1])
    if model_class is None:
        return None
    with torch.device("meta"):
        model: PreTrainedModel = model_class(model_class.config_class.from_pretrained(folder))
    return model


def _check_code(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the missing files of the code that a configuration names, with what they import.

    Raises:
        ValueError: a file is not that of this package.
    """
    named = [name for name in (config.get("auto_map") or {}).values() if isinstance(name, str) and "--" not in name]
    names = {f"{name.split('.')[0]}.py" for name in named}
    ours = {name for name in names if (MODELING / name).is_file()}
    imported = {Path(path).name for name in ours for path in get_relative_import_files(MODELING / name)}
    missing = sorted(name for name in names | imported if not (folder / name).is_file())
    for path in sorted(folder.glob("*.py")):
        if ours and (MODELING / path.name).is_file() and path.read_bytes() != (MODELING / path.name).read_bytes():
            raise ValueError(
                f"{path} is not the {path.name} of the installed cmcr_hf: it was changed, or saved by another "
                "version. Save the model anew."
            )
    return missing


def check_sources(config: Mapping[str, Any], name: str) -> None:
    """Check that others can fetch the sources that a connector alone records."""
    if config.get("architectures") != ["CMCRConnector"]:
        return
    for space, record in (config.get("sources") or {}).items():
        if is_local(record.get("id")):
            raise ValueError(
                f"The connector {name} finds its {space} source in {record.get('id')!r}, which nobody else has. "
                "Push the full model, or connect it with a source from the Hub."
            )


def folder_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder that are pushed, by their names in the repository."""
    return {name: path for name, path in _paths(folder).items() if path.is_file()}


def _paths(folder: Path) -> dict[str, Path]:
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {name: paths[name] for name in filter_repo_objects(paths, ignore_patterns=LEFT_OUT)}
