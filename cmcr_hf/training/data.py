"""Read the items that a recipe names: texts, images, audio and point clouds from folders, tables and data sets."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any

from .places import HUB_DATASETS, RemotePlace, hub_commit, is_address, named_network_errors, pinned_address
from .recipe import DataSpec

SUFFIXES = {
    "image": {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"},
    "audio": {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff"},
    "point_cloud": {".npy", ".npz", ".ply", ".off"},
}
# A table is held in memory as a whole, and what an address stands for may be of any size.
MAX_TABLE_BYTES = 2**32


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

    def read(self) -> dict[str, Any]:
        """Return the file as the processor takes it."""
        return {"path": self.path, "bytes": self.fetch()}


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
        self._parts: list[_Listed | _Stream | _Made | _Chosen] = [
            _read(spec, modality, root, strict) for spec in specs
        ]

    @classmethod
    def listed(
        cls,
        modality: str,
        names: Sequence[str],
        folder: Path | None = None,
        *,
        keys: Sequence[str] | None = None,
        labels: Sequence[str | None] | None = None,
    ) -> Items:
        """Return the items that a list names: texts, or files by their paths below a folder.

        Args:
            keys: of the items; by default the names of files, the places of texts.
            labels: classes of the items, where they have any.

        Raises:
            ValueError: there are none, or a file is not there.
        """
        given = keys or (names if folder else [f"{row:06}" for row in range(len(names))])
        entry = _Listed(list(given), list(names), list(labels or []), folder)
        if not entry:
            raise ValueError(f"There are no {modality} items in the list. Name at least one.")
        entry.fingerprint = _fingerprint(entry, modality, strict=True)
        items = cls([], modality, Path())
        items._parts = [entry]
        return items

    @classmethod
    def made(cls, modality: str, items: Sequence[Item], version: str) -> Items:
        """Return items that are made of local files when they are read, such as the rows of an archive.

        Args:
            items: each with a path, or a [`RemoteFile`] that names the file it is made of.
            version: of how they are made, which counts as the size and the change time of the files do.
        """
        digest = hashlib.sha256(version.encode())
        for item in items:
            status = os.stat(item.value.path if isinstance(item.value, RemoteFile) else item.value)
            digest.update(json.dumps([item.key, item.label, status.st_size, status.st_mtime_ns]).encode())
        made = cls([], modality, Path())
        made._parts = [_Made(items, digest.hexdigest())]
        return made

    @property
    def fingerprint(self) -> str:
        """Identify the items, their classes and their order.

        Texts count by content, files by relative path, size and change time (those that a table names behind an
        address by that alone), data sets by revision.
        """
        digest = hashlib.sha256(self.modality.encode())
        for part in self._parts:
            digest.update(part.fingerprint.encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        """Return the number of items, 0 where a streamed data set does not tell before its end."""
        lengths = [0 if isinstance(part, _Stream) else len(part) for part in self._parts]
        return sum(lengths) if all(lengths) else 0

    def __iter__(self) -> Iterator[Item]:
        return itertools.chain.from_iterable(self._parts)

    def pick(self, rows: Collection[int]) -> dict[int, Item]:
        """Return some items by their places, reading no further than the last."""
        ahead = itertools.islice(self, max(rows, default=-1) + 1)
        return {row: item for row, item in enumerate(ahead) if row in rows}

    def at(self, rows: Sequence[int]) -> Items:
        """Return the items at some places alone, in their order."""
        chosen = Items([], self.modality, Path())
        chosen._parts = [_Chosen(self, sorted(rows))]
        return chosen

    def parts(self, rows: int) -> list[Part]:
        """Return the parts that make up the items: of lists, stretches of `rows`; of data sets, their files."""
        parts: list[Part] = []
        for entry in self._parts:
            if isinstance(entry, _Stream):
                parts += [Part(len(parts) + file, None, partial(entry.read, file)) for file in range(entry.files)]
            else:
                for first in range(0, len(entry), rows):
                    stop = min(first + rows, len(entry))
                    parts.append(Part(len(parts), stop - first, partial(entry.read, first, stop)))
        return parts


@dataclass
class _Listed:
    """Items that are known by name: millions of them fit in memory, since what stands for one is made when it is read.

    Args:
        names: texts, or names of files in `folder`.
        labels: empty where there are none.
    """

    keys: list[str]
    names: list[str]
    labels: list[str | None]
    folder: Path | RemotePlace | None
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Item]:
        return self.read(0, len(self))

    def read(self, first: int, stop: int, start: int = 0) -> Iterator[Item]:
        """Yield the items of a stretch, from a place in it on."""
        for row in range(first + start, min(stop, len(self))):
            yield Item(self.keys[row], self._value(self.names[row]), self.labels[row] if self.labels else None)

    def _value(self, name: str) -> Any:
        if isinstance(self.folder, RemotePlace):
            return RemoteFile(f"{self.folder}/{name}", partial(_fetch_named, self.folder, name))
        return name if self.folder is None else self.folder / name

    def cut(self, limit: int | None) -> None:
        """Keep so many of the items, from the start."""
        if limit is not None:
            self.keys, self.names, self.labels = self.keys[:limit], self.names[:limit], self.labels[:limit]


@dataclass
class _Made:
    """Items that the caller makes."""

    items: Sequence[Item]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def read(self, first: int, stop: int, start: int = 0) -> Iterator[Item]:
        """Yield the items of a stretch, from a place in it on."""
        return iter(self.items[first + start : stop])


@dataclass
class _Chosen:
    """Some of other items, by their places."""

    items: Items
    rows: list[int]

    @property
    def fingerprint(self) -> str:
        return json.dumps([self.items.fingerprint, self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Item]:
        wanted = set(self.rows)
        return (item for row, item in enumerate(self.items) if row in wanted)

    def read(self, first: int, stop: int, start: int = 0) -> Iterator[Item]:
        """Yield the items of a stretch, from a place in it on."""
        return itertools.islice(self, first + start, stop)


def _list_address(spec: DataSpec, modality: str) -> _Listed:
    """List files behind an address such as `hf://datasets/OWNER/NAME/FOLDER`, each fetched when it is read."""
    import fsspec

    folder = str(spec.folder)
    _check_folder_options(spec, modality, folder)
    address = pinned_address(folder)
    try:
        with named_network_errors(folder):
            files, base = fsspec.url_to_fs(address)
            found = files.glob(f"{base}/{spec.pattern or '**'}", detail=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot list {folder}: {error}") from error
    listed = _Listed([], [], [], RemotePlace(address))
    sizes = []
    for name, entry in sorted(found.items()):
        key = PurePosixPath(name).relative_to(base).as_posix()
        if entry["type"] != "file" or not (spec.pattern or _is_usual(key, modality)):
            continue
        listed.keys.append(key)
        if spec.label:
            listed.labels.append(_file_label(spec.label, PurePosixPath(name)))
        sizes.append(entry["size"])
    listed.names = listed.keys
    listed.cut(spec.limit)
    if not listed:
        raise ValueError(f"There are no {modality} items in {folder}. Check the address and the pattern.")
    labels = listed.labels or itertools.repeat(None)
    keys = [list(described) for described in zip(listed.keys, labels, sizes, strict=False)]
    listed.fingerprint = hashlib.sha256(json.dumps([address, keys]).encode()).hexdigest()
    return listed


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
        described = {key: value for key, value in asdict(spec).items() if key not in ("licence", "note", "stores")}
        self.fingerprint = json.dumps([described, version])

    def _check_columns(self, known: Iterable[str]) -> None:
        for column in self._wanted:
            if column not in known:
                listed = ", ".join(known)
                raise ValueError(f"The data set {self._spec.dataset!r} has no column {column!r}, it has {listed}.")

    def _cell(self, row: dict[str, Any], column: str) -> Any:
        value = row[column]
        if column not in self._classes or value is None:
            return value
        # The rows of a split whose classes are kept secret have -1.
        return self._classes[column][value] if value >= 0 else None

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
        for index, row in enumerate(self._named(rows, file)):
            self._check_columns(row)
            if spec.where and any(str(self._cell(row, column)) not in kept for column, kept in spec.where.items()):
                continue
            label = _label(self._cell(row, spec.label)) if spec.label else None
            place = index if self.files == 1 else f"{file}-{index}"
            for name, value in self._values(row):
                if _is_empty(value):
                    continue
                count += 1
                if count > start:
                    key = f"{spec.dataset}/{spec.split}/{place}/{name}"
                    yield Item(key, _text(spec, value, key) if self._modality == "text" else _located(value), label)
                if count == spec.limit:
                    return

    def _values(self, row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield the cells of a row, of a list of texts each one."""
        for column in self._columns:
            cell = self._cell(row, column)
            if self._modality == "text" and isinstance(cell, list):
                yield from ((f"{column}/{place}", text) for place, text in enumerate(cell))
            else:
                yield column, cell

    def _named(self, rows: Iterable[dict[str, Any]], file: int) -> Iterator[dict[str, Any]]:
        """Yield rows, and name the file in what the many readers behind `datasets` raise of a damaged one."""
        place, index = iter(rows), 0
        while True:
            try:
                row = next(place)
            except StopIteration:
                return
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise (OSError if isinstance(error, OSError) else ValueError)(
                    f"Cannot read the data set {self._spec.dataset!r} behind row {index} of file {file + 1} of "
                    f"{self.files}, in the order of their names: {reason}. Get that file again, or remove it."
                ) from error
            yield row
            index += 1


def _located(cell: Any) -> Any:
    """Name the file that a data set only names, on the Hub or in an archive: its URL is of no use to the processor."""
    path = cell.get("path") if isinstance(cell, dict) else None
    if path is None or "://" not in path or cell.get("bytes") is not None:
        return cell
    return RemoteFile(path, partial(_fetch, path))


def _fetch(path: str) -> bytes:
    import fsspec

    with named_network_errors(path), fsspec.open(path) as file:
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


def _read(spec: DataSpec, modality: str, root: Path, strict: bool) -> _Listed | _Stream:
    if spec.template is not None and modality != "text":
        raise ValueError(f"A template goes with texts, not with {modality} items. Remove {spec.template!r}.")
    if spec.dataset is not None:
        return _Stream(spec, modality, root)
    if spec.folder is not None and is_address(spec.folder):
        return _list_address(spec, modality)
    listed = (
        _list_folder(spec, modality, root, strict) if spec.folder is not None else _list_table(spec, modality, root)
    )
    listed.cut(spec.limit)
    if not listed:
        place = _below(root, str(spec.folder or spec.table))
        raise ValueError(f"There are no {modality} items in {place}. Check the path, pattern, column and where.")
    listed.fingerprint = _fingerprint(listed, modality, strict)
    return listed


def _fingerprint(listed: _Listed, modality: str, strict: bool) -> str:
    digest = hashlib.sha256()
    # Without a Path for each: pathlib interns the parts of their names, in a table that does not shrink.
    for key, name, label in zip(listed.keys, listed.names, listed.labels or itertools.repeat(None), strict=False):
        content: Any = name
        if isinstance(listed.folder, Path):
            path = os.path.join(listed.folder, name)
            try:
                status = os.stat(path)
                content = [status.st_size, status.st_mtime_ns]
            except OSError as error:
                if strict:
                    raise ValueError(
                        f"Cannot read {modality} file {path}: {error.strerror}. Check the path."
                    ) from error
                content = None
        elif listed.folder is not None:
            content = f"{listed.folder}/{name}"
        digest.update(json.dumps([key, label, content]).encode())
    return digest.hexdigest()


def _below(root: Path, name: str) -> Path | str:
    """Return the path of what an entry names, or its address."""
    return name if is_address(name) else root / name


def _list_folder(spec: DataSpec, modality: str, root: Path, strict: bool) -> _Listed:
    folder = root / str(spec.folder)
    _check_folder_options(spec, modality, str(folder))
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}. Check the path and the data root.")
    keys, broken = [], []
    for key in _names_below(folder, spec.pattern):
        if not spec.pattern and not _is_usual(key, modality):
            continue
        path = os.path.join(folder, key)
        if os.path.islink(path) and not os.path.exists(path):
            broken.append(path)
        elif not os.path.isfile(path):
            continue
        keys.append(key)
    if broken and strict:
        raise ValueError(f"The link {min(broken)} leads to a file that is not there. Repair or remove it.")
    # In the order of the paths: a folder's files beside each other.
    keys.sort(key=lambda key: key.replace("/", "\0"))
    labels: list[str | None] = [_file_label(spec.label, folder / key) for key in keys] if spec.label else []
    return _Listed(keys, keys, labels, folder)


def _names_below(folder: Path, pattern: str | None) -> Iterator[str]:
    if pattern:
        for path in folder.glob(pattern):
            yield path.relative_to(folder).as_posix()
        return
    for parent, _, names in os.walk(folder):
        below = Path(parent).relative_to(folder).as_posix()
        for name in names:
            yield name if below == "." else f"{below}/{name}"


def _file_label(label: str, path: PurePath) -> str:
    # Interned: the files of a class share theirs.
    return sys.intern(path.parent.name if label == "parent" else path.stem)


def _check_folder_options(spec: DataSpec, modality: str, folder: str) -> None:
    if modality == "text":
        raise ValueError(f"Texts come from a table or a data set, not from the folder {folder}.")
    if spec.label not in (None, "parent", "stem"):
        raise ValueError(f"Files of a folder have the label 'parent' or 'stem', got {spec.label!r}.")
    if spec.pattern and Path(spec.pattern).is_absolute():
        raise ValueError(
            f"Expected a pattern below {folder}, got the absolute {spec.pattern!r}. Use one like '**/*.jpg'."
        )


def _is_usual(key: str, modality: str) -> bool:
    # Dot files are no items of anybody's: macOS leaves a ._dog.jpg beside dog.jpg on other file systems.
    return os.path.splitext(key)[1].lower() in SUFFIXES[modality] and "/." not in f"/{key}"


def _list_table(spec: DataSpec, modality: str, root: Path) -> _Listed:
    path = _below(root, str(spec.table))
    parent, name = pinned_address(path).rsplit("/", 1) if isinstance(path, str) else (path.parent, path.name)
    columns = load_table(f"{parent}/{name}" if isinstance(path, str) else path)
    wanted = spec.column if isinstance(spec.column, list) else [spec.column or next(iter(columns))]
    for column in [*wanted, *([spec.label] if spec.label else []), *(spec.where or {})]:
        if column not in columns:
            raise ValueError(f"The table {path} has no column {column!r}, it has {', '.join(columns)}.")
    listed = _Listed([], [], [], None)
    if modality != "text":
        listed.names = listed.keys
        files = _below(root, spec.files) if spec.files else parent
        listed.folder = RemotePlace(pinned_address(files)) if isinstance(files, str) else files
    for index in range(len(columns[wanted[0]])):
        if spec.where and any(str(columns[column][index]) not in kept for column, kept in spec.where.items()):
            continue
        for column in wanted:
            value = columns[column][index]
            if _is_empty(value):
                continue
            key = f"{name}/{index}/{column}"
            if modality == "text":
                listed.names.append(_text(spec, value, key))
                listed.keys.append(key)
            elif isinstance(value, str):
                listed.keys.append(value)
            else:
                raise ValueError(
                    f"Expected a file name in {key}, got {value!r:.80}. Name another column, or, where the items "
                    "themselves are in the table, pass its folder as a data set."
                )
            if spec.label:
                listed.labels.append(_label(columns[spec.label][index]))
    return listed


def _fetch_named(folder: RemotePlace, name: str) -> bytes:
    try:
        return folder.read(name)
    except FileNotFoundError as error:
        # A bad item, where what breaks the connection is none.
        raise ValueError(f"There is no file {folder}/{name}. Check the table and its files.") from error


def _is_empty(cell: Any) -> bool:
    # Tables of pandas have NaN where there is nothing.
    return (
        cell is None or (isinstance(cell, float) and math.isnan(cell)) or (isinstance(cell, str) and not cell.strip())
    )


def _label(cell: Any) -> str | None:
    return None if _is_empty(cell) else sys.intern(str(cell))


def _text(spec: DataSpec, cell: Any, key: str) -> str:
    if not isinstance(cell, (str, int, float)):
        raise ValueError(f"Expected a text in {key}, got {cell!r:.80}. Name a column that holds one text a row.")
    return str(cell) if spec.template is None else spec.template.replace("{}", str(cell))


def is_table(name: str) -> bool:
    """Return whether a file is a table by its name."""
    return PurePosixPath(name).suffix.lower() in _READERS


def load_table(path: Path | str) -> dict[str, list[Any]]:
    """Read a table, a file or what an address of fsspec names, as columns of equal length, at least one."""
    suffix = PurePath(path).suffix.lower()
    try:
        if suffix not in _READERS:
            raise ValueError(f"expected one of {', '.join(_READERS)}")
        with _open_table(path) as file:
            columns = _READERS[suffix](file)
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


def _open_table(path: Path | str) -> IO[bytes]:
    if not is_address(path):
        return Path(path).open("rb")
    folder, name = os.fspath(path).rsplit("/", 1)
    there = RemotePlace(folder)
    size = there.size(name)
    if size is None or size > MAX_TABLE_BYTES:
        raise ValueError(
            f"it has {'an unknown number of' if size is None else size} bytes, expected at most {MAX_TABLE_BYTES} in "
            "memory: read it as a data set, which is streamed"
        )
    return io.BytesIO(there.read(name))


def _decoded(file: IO[bytes]) -> str:
    with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
        return text.read()


def _read_lines(file: IO[bytes]) -> dict[str, list[Any]]:
    # Not splitlines, which also cuts at the line separators of Unicode inside a text.
    return {"text": _decoded(file).split("\n")}


def _read_json(file: IO[bytes]) -> dict[str, list[Any]]:
    document = json.loads(_decoded(file))
    if not isinstance(document, (list, dict)) or not all(isinstance(text, str) for text in document):
        raise ValueError("expected a list of strings, or an object whose keys are the texts")
    return {"text": list(document)}


def _read_jsonl(file: IO[bytes]) -> dict[str, list[Any]]:
    rows = []
    for number, line in enumerate(_decoded(file).split("\n"), start=1):
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


def _read_csv(file: IO[bytes], **dialect: Any) -> dict[str, list[Any]]:
    with io.TextIOWrapper(file, newline="", encoding="utf-8-sig") as text:
        reader = csv.reader(text, **dialect)
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


def _read_parquet(file: IO[bytes]) -> dict[str, list[Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError('Parquet tables need the train extra: pip install "cmcr-hf[train]"') from error
    columns: dict[str, list[Any]] = parquet.read_table(file).to_pydict()
    return columns


_READERS: dict[str, Callable[[IO[bytes]], dict[str, list[Any]]]] = {
    ".txt": _read_lines,
    ".json": _read_json,
    # Strict: a quotation mark that is never closed would take the rest of the file for one cell. A .tsv has none.
    ".csv": partial(_read_csv, strict=True),
    ".tsv": partial(_read_csv, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
