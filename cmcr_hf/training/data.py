"""Read the items that a recipe names: texts, images and audio from folders, tables and data sets."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import resolve_revision

from .recipe import DataSpec


SUFFIXES = {
    "image": {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"},
    "audio": {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff"},
}


@dataclass
class Item:
    """One item: a key that names it, what the processor takes (text, path or data set cell), and its class, if any."""

    key: str
    value: Any
    label: str | None = None


class Items:
    """The items of one or more data entries, in a fixed order; iterating starts anew each time.

    Args:
        specs: data entries, one after the other.
        modality: `text`, `image` or `audio`.
        root: folder that relative paths of the entries are relative to.
    """

    def __init__(self, specs: Sequence[DataSpec], modality: str, root: Path) -> None:
        self.modality = modality
        self._parts = [_read(spec, modality, root) for spec in specs]

    @property
    def fingerprint(self) -> str:
        """Identify the items and their order: texts by content, files by relative path, size and change time, data sets by revision."""
        digest = hashlib.sha256(self.modality.encode())
        for part in self._parts:
            digest.update(part.fingerprint.encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        """Return the number of items, 0 where a streamed data set does not tell before its end."""
        lengths = [0 if isinstance(part, _Stream) else len(part.items) for part in self._parts]
        return sum(lengths) if all(lengths) else 0

    def __iter__(self) -> Iterator[Item]:
        return itertools.chain.from_iterable(self._parts)


@dataclass
class _Listed:
    items: list[Item]
    fingerprint: str

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)


class _Stream:
    """A data set that is read row by row, so that neither memory nor disk holds more than a shard."""

    def __init__(self, spec: DataSpec, modality: str, root: Path) -> None:
        if not spec.column:
            raise ValueError(f"The data set {spec.dataset!r} needs column: the name of its {modality} column.")
        try:
            import datasets
        except ImportError as error:
            raise ImportError('Data sets need the train extra: pip install "cmcr-hf[train]"') from error
        self._spec, self._modality = spec, modality
        self._columns = [spec.column] if isinstance(spec.column, str) else spec.column
        name = str(root / str(spec.dataset)) if (root / str(spec.dataset)).is_dir() else str(spec.dataset)
        try:
            rows = datasets.load_dataset(name, spec.config, split=spec.split, revision=spec.revision, streaming=True)
        except (OSError, ValueError, ConnectionError) as error:
            raise ValueError(
                f"Cannot open the data set {spec.dataset!r} (config {spec.config}, split {spec.split}): {error}. Check the id, the "
                "network and, for a gated set, that `hf auth login` was run by an account with access."
            ) from error
        known = rows.column_names
        if known is not None:
            wanted = [*self._columns, *([spec.label] if spec.label else []), *(spec.where or {})]
            missing = [column for column in wanted if column not in known]
            if missing:
                raise ValueError(f"The data set {spec.dataset!r} has no column {missing[0]!r}; it has {known}.")
        for column in self._columns:
            # Encoded bytes go to the processor, so that neither torchcodec nor a second decoder is needed.
            kind = (rows.features or {}).get(column)
            if isinstance(kind, (datasets.Image, datasets.Audio)):
                rows = rows.cast_column(column, type(kind)(decode=False))
        self._rows = rows
        described = {key: value for key, value in asdict(spec).items() if key not in ("licence", "note")}
        self.fingerprint = json.dumps([described, _dataset_version(name, spec.revision)])

    def __iter__(self) -> Iterator[Item]:
        spec = self._spec
        count = 0
        for index, row in enumerate(self._rows):
            if spec.where and any(str(row[column]) not in values for column, values in spec.where.items()):
                continue
            for column in self._columns:
                if spec.limit is not None and count >= spec.limit:
                    return
                value = row[column]
                if value is None:
                    continue
                if self._modality == "text":
                    value = _fill(spec, str(value))
                label = str(row[spec.label]) if spec.label else None
                yield Item(f"{spec.dataset}/{spec.split}/{index}/{column}", value, label)
                count += 1


def _dataset_version(name: str, revision: str | None) -> str:
    """Return the commit of a Hub data set, or a digest of a local one's files."""
    folder = Path(name)
    if not folder.is_dir():
        resolved = resolve_revision(name, revision, repo_type="dataset")
        return str(getattr(resolved, "resolved", resolved))
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    listing = [[path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns] for path, status in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _read(spec: DataSpec, modality: str, root: Path) -> _Listed | _Stream:
    if spec.dataset is not None:
        return _Stream(spec, modality, root)
    items = _read_folder(spec, modality, root) if spec.folder is not None else _read_table(spec, modality, root)
    if spec.limit is not None:
        items = items[: spec.limit]
    if not items:
        raise ValueError(f"There are no {modality} items in {root / str(spec.folder or spec.table)}. Check the path, pattern and where.")
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.key, item.label]).encode())
        if modality == "text":
            digest.update(item.value.encode())
            continue
        try:
            status = item.value.stat()
        except OSError as error:
            raise ValueError(f"Cannot read {modality} file {item.value}: {error.strerror}. Check the path.") from error
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return _Listed(items, digest.hexdigest())


def _read_folder(spec: DataSpec, modality: str, root: Path) -> list[Item]:
    folder = root / str(spec.folder)
    if modality == "text":
        raise ValueError(f"Texts come from a table or a data set, not from the folder {folder}.")
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}. Correct the path, or name the data root with --data.")
    if spec.label not in (None, "parent", "stem"):
        raise ValueError(f"Files of a folder have the label 'parent' or 'stem', got {spec.label!r}.")
    paths = sorted(folder.glob(spec.pattern or "**/*"))
    if not spec.pattern:
        paths = [path for path in paths if path.suffix.lower() in SUFFIXES[modality]]
    return [
        Item(path.relative_to(folder).as_posix(), path, {None: None, "parent": path.parent.name, "stem": path.stem}[spec.label])
        for path in paths
        if path.is_file()
    ]


def _read_table(spec: DataSpec, modality: str, root: Path) -> list[Item]:
    path = root / str(spec.table)
    columns = _load_table(path)
    wanted = spec.column if isinstance(spec.column, list) else [spec.column or next(iter(columns))]
    for column in [*wanted, *([spec.label] if spec.label else []), *(spec.where or {})]:
        if column not in columns:
            raise ValueError(f"The table {path} has no column {column!r}; it has {list(columns)}.")
    files = root / spec.files if spec.files else path.parent
    items = []
    for index in range(len(columns[wanted[0]])):
        if spec.where and any(str(columns[column][index]) not in values for column, values in spec.where.items()):
            continue
        label = str(columns[spec.label][index]) if spec.label else None
        for column in wanted:
            value = columns[column][index]
            if value is None or value == "":
                continue
            if modality == "text":
                items.append(Item(f"{path.name}/{index}/{column}", _fill(spec, str(value)), label))
            else:
                items.append(Item(str(value), files / str(value), label))
    return items


def _fill(spec: DataSpec, text: str) -> str:
    return text if spec.template is None else spec.template.replace("{}", text)


def _load_table(path: Path) -> dict[str, list[Any]]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".txt":
            return {"text": path.read_text(encoding="utf-8").splitlines()}
        if suffix == ".json":
            document = json.loads(path.read_text(encoding="utf-8"))
            texts = list(document)
            if not isinstance(document, (list, dict)) or not all(isinstance(text, str) for text in texts):
                raise ValueError("expected a list of strings, or an object whose keys are the texts")
            return {"text": texts}
        try:
            import pyarrow
            from pyarrow import csv, parquet
            from pyarrow import json as jsonl
        except ImportError as error:
            raise ImportError('Tables need the train extra: pip install "cmcr-hf[train]"') from error
        if suffix in (".csv", ".tsv"):
            delimiter = "\t" if suffix == ".tsv" else ","
            options = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
            # Strings throughout: a caption column full of numbers is still captions.
            names = csv.open_csv(path, parse_options=options).schema.names
            table = csv.read_csv(
                path,
                parse_options=options,
                convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string())),
            )
        elif suffix in (".jsonl", ".ndjson"):
            table = jsonl.read_json(path)
        elif suffix == ".parquet":
            table = parquet.read_table(path)
        else:
            raise ValueError("expected .csv, .tsv, .jsonl, .parquet, .txt or .json")
    except OSError as error:
        raise ValueError(f"Cannot read the table {path}: {error.strerror or error}. Correct the path, or name the data root with --data.") from error
    except ValueError as error:  # json.JSONDecodeError, UnicodeDecodeError and pyarrow.ArrowInvalid are ValueErrors
        raise ValueError(f"Cannot read the table {path}: {error}.") from error
    columns: dict[str, list[Any]] = table.to_pydict()
    return columns
