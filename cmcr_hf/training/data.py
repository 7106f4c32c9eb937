"""Read the items that a recipe names: texts, images, audio and point clouds from folders, tables and data sets."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from .places import HUB_DATASETS, hub_commit, pinned_address
from .recipe import DataSpec

SUFFIXES = {
    "image": {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"},
    "audio": {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff"},
    "point_cloud": {".npy", ".npz", ".ply", ".off"},
}


@dataclass
class Item:
    """One item: a key that names it, what the processor takes (text, path or data set cell), and its class, if any."""

    key: str
    value: Any
    label: str | None = None


@dataclass(frozen=True)
class RemoteFile:
    """A file that is fetched when it is read, by whoever reads it, and where it lies."""

    path: str
    fetch: Callable[[], bytes]


@dataclass(frozen=True)
class Part:
    """Items that follow each other and can be read by themselves: a stretch of a list, or one file of a data set.

    Args:
        size: number of its items, None where only their end tells.
        read: gives its items from a place on, counted from 0.
    """

    number: int
    size: int | None
    read: Callable[[int], Iterator[Item]]


class Items:
    """The items of one or more data entries, in a fixed order; iterating starts anew each time.

    Args:
        specs: data entries, one after the other.
        modality: `text`, `image`, `audio` or `point_cloud`.
        root: folder that relative paths of the entries are relative to.
        strict: whether a file that is named but not there is an error at once, or an item that cannot be read.

    Raises:
        ValueError: a folder, file, column or data set is missing or unreadable, or has no items; the message names it.
    """

    def __init__(self, specs: Sequence[DataSpec], modality: str, root: Path, *, strict: bool = True) -> None:
        self.modality = modality
        self._parts = [_read(spec, modality, root, strict) for spec in specs]

    @property
    def fingerprint(self) -> str:
        """Identify the items, their classes and their order.

        Texts count by content, files by relative path, size and change time, data sets by revision.
        """
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

    def parts(self, rows: int) -> list[Part]:
        """Return the parts that make up the items: of lists, stretches of `rows`; of data sets, their files."""
        parts: list[Part] = []
        for entry in self._parts:
            if isinstance(entry, _Stream):
                parts += [Part(len(parts) + file, None, partial(entry.read, file)) for file in range(entry.files)]
            else:
                stretches = [entry.items[start : start + rows] for start in range(0, len(entry.items), rows)]
                first = len(parts)
                parts += [
                    Part(first + index, len(stretch), partial(_read_on, stretch))
                    for index, stretch in enumerate(stretches)
                ]
        return parts


def _read_on(items: list[Item], start: int) -> Iterator[Item]:
    return iter(items[start:])


@dataclass
class _Listed:
    items: list[Item]
    fingerprint: str

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)


class _RemoteFolder:
    """Files behind an fsspec address such as `hf://datasets/OWNER/NAME/FOLDER`, each fetched when it is read."""

    def __init__(self, spec: DataSpec, modality: str) -> None:
        import fsspec

        folder = str(spec.folder)
        _check_folder_options(spec, modality, folder)
        address = pinned_address(folder)
        try:
            self._files, base = fsspec.url_to_fs(address)
            found = self._files.glob(f"{base}/{spec.pattern or '**'}", detail=True)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"Cannot list {folder}: {error}. Check the address and the network.") from error
        self.items: list[Item] = []
        sizes = []
        for name, entry in sorted(found.items()):
            path = PurePosixPath(name).relative_to(base)
            if entry["type"] != "file" or not (spec.pattern or _is_usual(path, modality)):
                continue
            label = {None: None, "parent": PurePosixPath(name).parent.name, "stem": path.stem}[spec.label]
            file = RemoteFile(f"{folder}/{path.as_posix()}", partial(self._files.cat_file, name))
            self.items.append(Item(path.as_posix(), file, label))
            sizes.append(entry["size"])
        self.items = self.items[: spec.limit]
        if not self.items:
            raise ValueError(f"There are no {modality} items in {folder}. Check the address and the pattern.")
        keys = [[item.key, item.label, size] for item, size in zip(self.items, sizes, strict=False)]
        self.fingerprint = hashlib.sha256(json.dumps([address, keys]).encode()).hexdigest()

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
        self._wanted = [*self._columns, *([spec.label] if spec.label else []), *(spec.where or {})]
        name, revision, files, version = _pinned(spec, root)
        try:
            rows = datasets.load_dataset(
                name, spec.config, data_files=files, split=spec.split, revision=revision, streaming=True
            )
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a data set that is a script
            raise ValueError(
                f"Cannot open the data set {spec.dataset!r} (config {spec.config}, split {spec.split}): {error}. "
                "Check the id and the network, and for a gated set that `hf auth login` was run with access to it."
            ) from error
        features = rows.features or {}
        # Formats such as CSV tell their columns with the first row only.
        self._check_columns(rows.column_names or self._wanted)
        if rows.column_names:
            # A column that is not asked for would be decoded all the same.
            rows = rows.select_columns(list(dict.fromkeys(self._wanted)))
        for column in self._columns:
            # Encoded bytes go to the processor, so that neither torchcodec nor a second decoder is needed.
            if isinstance(features.get(column), (datasets.Image, datasets.Audio)):
                rows = rows.cast_column(column, type(features[column])(decode=False))
        self._rows = rows
        # A limit counts through all of them.
        self.files = 1 if spec.limit else max(rows.num_shards, 1)
        # Two data sets number their classes differently; names can be compared.
        self._classes = {
            name: feature.names for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)
        }
        described = {key: value for key, value in asdict(spec).items() if key not in ("licence", "note")}
        self.fingerprint = json.dumps([described, version])

    def _check_columns(self, known: Sequence[str]) -> None:
        for column in self._wanted:
            if column not in known:
                listed = ", ".join(known)
                raise ValueError(f"The data set {self._spec.dataset!r} has no column {column!r}, it has {listed}.")

    def _cell(self, row: dict[str, Any], column: str) -> Any:
        value = row[column]
        return self._classes[column][value] if column in self._classes and value is not None else value

    def __iter__(self) -> Iterator[Item]:
        empty = True
        for file in range(self.files):
            for item in self.read(file):
                empty = False
                yield item
        if empty:
            raise ValueError(
                f"There are no {self._modality} items in the data set {self._spec.dataset!r}. Check column and where."
            )

    def read(self, file: int, start: int = 0) -> Iterator[Item]:
        """Yield the items of one of its files, or of all where that is one, from a place on."""
        spec = self._spec
        rows = self._rows if self.files == 1 else self._rows.shard(num_shards=self.files, index=file)
        count = 0
        for index, row in enumerate(rows):
            self._check_columns(row)
            if spec.where and any(str(self._cell(row, column)) not in kept for column, kept in spec.where.items()):
                continue
            label = _label(self._cell(row, spec.label)) if spec.label else None
            for column in self._columns:
                value = self._cell(row, column)
                if _is_empty(value):
                    continue
                count += 1
                if count > start:
                    place = index if self.files == 1 else f"{file}-{index}"
                    key = f"{spec.dataset}/{spec.split}/{place}/{column}"
                    yield Item(key, _text(spec, value, key) if self._modality == "text" else _located(value), label)
                if count == spec.limit:
                    return


def _located(cell: Any) -> Any:
    """Name the file that a data set only names, on the Hub or in an archive: its URL is of no use to the processor."""
    path = cell.get("path") if isinstance(cell, dict) else None
    if path is None or "://" not in path or cell.get("bytes") is not None:
        return cell
    return RemoteFile(path, partial(_fetch, path))


def _fetch(path: str) -> bytes:
    import fsspec

    with fsspec.open(path) as file:
        data: bytes = file.read()
    return data


def _pinned(spec: DataSpec, root: Path) -> tuple[str, str | None, str | None, str]:
    """Return name, revision and files for `load_dataset`, all of one commit, and the version they are known by."""
    name, files = str(spec.dataset), spec.data_files
    folder = root / name
    if folder.is_dir():
        return str(folder), None, files, _files_digest(folder)
    if files is None or "/" in name:
        commit = hub_commit(name, spec.revision)
        return name, commit, files, str(commit)
    if not files.startswith(HUB_DATASETS):
        raise ValueError(
            f"Expected data_files of {name!r} as hf://datasets/OWNER/NAME/GLOB, got {files!r}. Name a folder of your "
            "own as dataset: FOLDER."
        )
    files = pinned_address(files)
    return name, None, files, files


def _files_digest(folder: Path) -> str:
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    listing = [[path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns] for path, status in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _read(spec: DataSpec, modality: str, root: Path, strict: bool) -> _Listed | _RemoteFolder | _Stream:
    if spec.template is not None and modality != "text":
        raise ValueError(f"A template goes with texts, not with {modality} items. Remove {spec.template!r}.")
    if spec.dataset is not None:
        return _Stream(spec, modality, root)
    if spec.folder is not None and "://" in spec.folder:
        return _RemoteFolder(spec, modality)
    if spec.folder is not None:
        items = _read_folder(spec, modality, root, strict)
    else:
        items = _read_table(spec, modality, root)
    if spec.limit is not None:
        items = items[: spec.limit]
    if not items:
        place = root / str(spec.folder or spec.table)
        raise ValueError(f"There are no {modality} items in {place}. Check the path, pattern, column and where.")
    digest = hashlib.sha256()
    for item in items:
        if modality == "text":
            content = item.value
        else:
            try:
                status = item.value.stat()
                content = [status.st_size, status.st_mtime_ns]
            except OSError as error:
                if strict:
                    raise ValueError(
                        f"Cannot read {modality} file {item.value}: {error.strerror}. Check the path."
                    ) from error
                content = None
        digest.update(json.dumps([item.key, item.label, content]).encode())
    return _Listed(items, digest.hexdigest())


def _read_folder(spec: DataSpec, modality: str, root: Path, strict: bool) -> list[Item]:
    folder = root / str(spec.folder)
    _check_folder_options(spec, modality, str(folder))
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}. Check the path and the data root.")
    paths = sorted(folder.glob(spec.pattern or "**/*"))
    if not spec.pattern:
        paths = [path for path in paths if _is_usual(path.relative_to(folder), modality)]
    broken = {path for path in paths if path.is_symlink() and not path.exists()}
    if broken and strict:
        raise ValueError(f"The link {min(broken)} leads to a file that is not there. Repair or remove it.")
    return [
        Item(
            path.relative_to(folder).as_posix(),
            path,
            {None: None, "parent": path.parent.name, "stem": path.stem}[spec.label],
        )
        for path in paths
        if path in broken or path.is_file()
    ]


def _check_folder_options(spec: DataSpec, modality: str, folder: str) -> None:
    if modality == "text":
        raise ValueError(f"Texts come from a table or a data set, not from the folder {folder}.")
    if spec.label not in (None, "parent", "stem"):
        raise ValueError(f"Files of a folder have the label 'parent' or 'stem', got {spec.label!r}.")
    if spec.pattern and Path(spec.pattern).is_absolute():
        raise ValueError(
            f"Expected a pattern below {folder}, got the absolute {spec.pattern!r}. Use one like '**/*.jpg'."
        )


def _is_usual(path: PurePath, modality: str) -> bool:
    # Dot files are no items of anybody's: macOS leaves a ._dog.jpg beside dog.jpg on other file systems.
    return path.suffix.lower() in SUFFIXES[modality] and not any(part.startswith(".") for part in path.parts)


def _read_table(spec: DataSpec, modality: str, root: Path) -> list[Item]:
    path = root / str(spec.table)
    columns = load_table(path)
    wanted = spec.column if isinstance(spec.column, list) else [spec.column or next(iter(columns))]
    for column in [*wanted, *([spec.label] if spec.label else []), *(spec.where or {})]:
        if column not in columns:
            raise ValueError(f"The table {path} has no column {column!r}, it has {', '.join(columns)}.")
    files = root / spec.files if spec.files else path.parent
    items = []
    for index in range(len(columns[wanted[0]])):
        if spec.where and any(str(columns[column][index]) not in kept for column, kept in spec.where.items()):
            continue
        label = _label(columns[spec.label][index]) if spec.label else None
        for column in wanted:
            value = columns[column][index]
            if _is_empty(value):
                continue
            key = f"{path.name}/{index}/{column}"
            if modality == "text":
                items.append(Item(key, _text(spec, value, key), label))
            elif isinstance(value, str):
                items.append(Item(value, files / value, label))
            else:
                raise ValueError(f"Expected a file name in {key}, got {value!r:.80}. Name another column.")
    return items


def _is_empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _label(cell: Any) -> str | None:
    return None if _is_empty(cell) else str(cell)


def _text(spec: DataSpec, cell: Any, key: str) -> str:
    if not isinstance(cell, (str, int, float)):
        raise ValueError(f"Expected a text in {key}, got {cell!r:.80}. Name a column that holds one text a row.")
    return str(cell) if spec.template is None else spec.template.replace("{}", str(cell))


def load_table(path: Path) -> dict[str, list[Any]]:
    """Read a table as columns of equal length, at least one."""
    readers = {
        ".txt": _read_lines,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
    }
    try:
        if path.suffix.lower() not in readers:
            raise ValueError(f"expected one of {', '.join(readers)}")
        columns = readers[path.suffix.lower()](path)
        if not columns:
            raise ValueError("it is empty")
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"Cannot read the table {path}: {reason}. Check the path and the data root.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The table {path} is not UTF-8. Save it as UTF-8.") from error
    except (
        ValueError,
        csv.Error,
    ) as error:  # JSONDecodeError and pyarrow's ArrowInvalid are ValueErrors
        raise ValueError(f"Cannot read the table {path}: {error}.") from error
    return columns


def _read_lines(path: Path) -> dict[str, list[Any]]:
    # Not splitlines, which also cuts at the line separators of Unicode inside a text.
    return {"text": path.read_text(encoding="utf-8-sig").split("\n")}


def _read_json(path: Path) -> dict[str, list[Any]]:
    document = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(document, (list, dict)) or not all(isinstance(text, str) for text in document):
        raise ValueError("expected a list of strings, or an object whose keys are the texts")
    return {"text": list(document)}


def _read_jsonl(path: Path) -> dict[str, list[Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not an object")
        rows.append(row)
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(itertools.chain.from_iterable(rows))}


def _read_csv(path: Path) -> dict[str, list[Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        # Strict: a quotation mark that is never closed would take the rest of the file for one cell. A .tsv has none.
        dialect: dict[str, Any] = {"strict": True}
        if path.suffix.lower() == ".tsv":
            dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        reader = csv.reader(file, **dialect)
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have one name in {', '.join(names)}")
        columns: dict[str, list[Any]] = {name: [] for name in names}
        try:
            for row in reader:
                # A blank line is the empty cell of a table of one column.
                cells = row or [""] * len(names)
                if len(cells) != len(names):
                    raise ValueError(f"expected {len(names)} cells, got {len(cells)}")
                for name, cell in zip(names, cells, strict=True):
                    columns[name].append(cell)
        except UnicodeDecodeError:
            raise  # The file is decoded in blocks, ahead of the line that is read.
        except (csv.Error, ValueError) as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error
    return columns


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError('Parquet tables need the train extra: pip install "cmcr-hf[train]"') from error
    columns: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    return columns
