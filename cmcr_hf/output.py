"""The output folder of a connection: what in it is ours, kept whole, locked, and never somebody else's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .durable import replacement, sha256, write_durably

if TYPE_CHECKING:
    import torch

    from .modeling.modeling_cmcr import CMCRConnector, CMCRModel
    from .modeling.processing_cmcr import CMCRProcessor
    from .training.recipe import Recipe

# Files of ours, which tell the folder from somebody else's.
STAGE = "stage.json"
SAVED = "saved.json"
CARD = "README.md"
# The folders that are replaced as a whole.
PARTS = ("connector", "model")


def check_output(folder: Path, recipe: Recipe) -> None:
    """Check, without a change on disk, that a recipe may use an output folder; ValueError names what is in the way."""
    check_writable(folder)
    saved = read_saved(folder)
    for name in PARTS:
        part = folder / name
        if part.exists() and (not part.is_dir() or (not saved and any(part.iterdir()))):
            raise ValueError(
                f"{part} would be replaced, but no {SAVED} beside it says that it was saved by a run. Use another "
                "output folder, or move it away."
            )
    world = folder / "world"
    if recipe.world is not None and (world / "world.json").is_file():
        try:
            json.loads((world / "world.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise damaged(world / "world.json", error, f"Delete the folder {world}") from error


def check_writable(folder: Path) -> None:
    """Check that a folder can be written, or made where it is missing; ValueError names what is in the way."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is a file, expected a folder. Use another output path.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(
            f"The folder {nearest} cannot be written. Change its permissions, or use another output path."
        )


def damaged(path: Path, error: Exception, remedy: str) -> ValueError:
    return ValueError(
        f"{path} is damaged: {' '.join(str(error).split()) or type(error).__name__}. {remedy} and run again."
    )


def read_saved(folder: Path) -> dict[str, Any]:
    """Return what the last run recorded of the folders it saved, empty where none did."""
    path = folder / SAVED
    if not path.is_file():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict) or "connector" not in saved:
            raise ValueError("it is no record of a saved model")
        return {**saved, "files": dict(saved.get("files", {})), "cards": dict(saved.get("cards", {}))}
    except (ValueError, TypeError) as error:
        remedy = f"Delete it and the folders {' and '.join(PARTS)} beside it"
        raise damaged(path, error, remedy) from error


def save(model: CMCRModel, processor: CMCRProcessor, folder: Path) -> bool:
    """Write the full model and the connector alone, each under a temporary name first; keep what is up to date.

    Returns True if both folders hold, byte by byte, what was written before; files of others in them stay.
    """
    key = {
        "connector": connector_digest(model.connector),
        "sources": model.config.sources,
        "fingerprints": model.config.fingerprints,
    }
    state, saved = folder / SAVED, read_saved(folder)
    files = saved.get("files", {})
    same = files and all(saved.get(name) == value for name, value in key.items())
    if same and all(_sha256(folder / name) == digest for name, digest in files.items()):
        return True
    # Marks the folders as saved by a run, for one that goes on where this one is stopped between them.
    write_json(state, {**saved, "connector": None})
    written: dict[str, str | None] = {}
    for name, part in zip(PARTS, (model.connector, model), strict=True):
        with replacement(folder / name) as temporary:
            part.save_pretrained(temporary)
            processor.save_pretrained(temporary)
            paths = sorted(path for path in temporary.rglob("*") if path.is_file())
            written |= {f"{name}/{path.relative_to(temporary).as_posix()}": _sha256(path) for path in paths}
            if (folder / name).exists():
                card = f"{name}/{CARD}"
                edited = _sha256(folder / card) != saved.get("cards", {}).get(name)
                _copy_others(folder / name, temporary, {*files} if edited else {*files, card})
    write_json(state, {**key, "files": written, "cards": {}})
    return False


def connector_digest(connector: CMCRConnector) -> str:
    """Return the sha256 of a connector's trained weights in hexadecimal."""
    state = connector.state_dict()
    # Of another machine or number of threads, a fingerprint differs in its last bits.
    return weights_digest({name: tensor for name, tensor in state.items() if not name.startswith("fingerprint_")})


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of the names and contents of tensors in hexadecimal."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        # As bytes, since numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _copy_others(part: Path, temporary: Path, ours: set[str]) -> None:
    """Copy the files of a saved folder that no run wrote, so that they outlive its replacement."""
    for path in part.rglob("*"):
        target = temporary / path.relative_to(part)
        if path.is_file() and path.relative_to(part.parent).as_posix() not in ours and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)


def _sha256(path: Path) -> str | None:
    """Return the sha256 of a file in hexadecimal, None where there is none."""
    return sha256(path) if path.is_file() else None


def write_cards(folder: Path, card: str, report: Callable[[str], None]) -> None:
    """Write the card into both folders, except over one that was edited since a run wrote it."""
    saved, digest = read_saved(folder), hashlib.sha256(card.encode()).hexdigest()
    cards = {}
    for name in PARTS:
        path = folder / name / CARD
        found = _sha256(path)
        cards[name] = saved["cards"].get(name)
        # The new card itself is there where a run was stopped before it recorded that.
        if found not in (None, digest, cards[name]):
            report(f"card: kept the edited {path}")
            continue
        if found != digest:
            _write_text(path, card)
        cards[name] = digest
    if cards != saved["cards"]:
        write_json(folder / SAVED, {**saved, "cards": cards})


def remove_evaluation(path: Path) -> None:
    """Remove the metrics of a former run, which are not those of this one; a file of somebody else stays."""
    ours = False
    with suppress(FileNotFoundError, ValueError, TypeError):
        ours = set(json.loads(path.read_text(encoding="utf-8"))) == {"recipe", "metrics"}
    if ours:
        path.unlink()


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_text(path, json.dumps(document, indent=2, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    write_durably(path, text.encode())
