"""Search a folder with a connected model: images, audio and lines of text by any of them, from an index that is kept.

Neither torch nor transformers is imported before something has to be embedded, so that a search whose query and files
are known answers at once.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..durable import cache_folder, sha256
from ..training.data import SUFFIXES, load_table
from .cache import FileDigests, VectorCache, batches
from .embedder import Embedder

# What a kill may lose at most, in items; an interruption loses the batch at hand.
FLUSH_ROWS = 256
MAX_TEXT_BYTES = 16 * 2**20
SEARCHED_SUFFIXES = {**SUFFIXES, "text": {".txt"}}


@dataclass(frozen=True)
class Hit:
    """One thing found: the cosine of the query and an image, a clip, or a line (from 1) of a text file."""

    score: float
    modality: str
    path: Path
    line: int | None = None
    text: str | None = None


@dataclass(frozen=True)
class Answer:
    """What was found for a query: the hits of each modality, best first, among `searched` items in `seconds`.

    The time is that of the search alone, without the embedding of the query.
    """

    query: str
    modality: str
    hits: dict[str, list[Hit]]
    searched: int
    seconds: float


class _Item(NamedTuple):
    path: Path
    value: str
    key: bytes
    line: int | None = None


class SearchIndex:
    """The files of a folder, subfolders included, as vectors of a model, kept on disk and brought up to date.

    Items are image and audio files of the usual formats and, where asked for, the lines of `.txt` files. Hidden files
    and folders and linked folders are passed over. Vectors are known by content: what is renamed or copied is not
    embedded again, and neither is a query that was asked before. An index belongs to one model, by the content of its
    files. Several processes may use one index at a time.

    Args:
        model: folder or Hub id of a `CMCRModel`. Of the Hub, the commit that is in the local cache, else the newest.
        folder: what to search.
        modalities: what to embed and find, of `image`, `audio`, `point_cloud` and `text` (default: all files, as far
            as the model embeds them).
        cache: folder of the indexes (default: `cmcr_hf/search` in `$XDG_CACHE_HOME` or `~/.cache`).
        batch_size: items embedded at once.
        device: of the model (default: cuda where there is one).

    Raises:
        ValueError: there is no such folder or model, or the model does not embed a modality.

    Example:
        >>> index = SearchIndex("runs/demo/model", "runs/demo/world/test_sounds")
        >>> index.update()
        >>> index.search("runs/demo/world/test_images/dog/0000.png").hits["audio"][0].path
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        folder: str | os.PathLike[str],
        *,
        modalities: Sequence[str] | None = None,
        cache: str | os.PathLike[str] | None = None,
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"There is no folder {self.folder}. Check the path.")
        root = cache_folder("search") if cache is None else Path(cache)
        if root.exists() and not root.is_dir():
            raise ValueError(f"{root} is a file, expected a folder for the indexes. Name another one.")
        self._embedder = Embedder(os.fspath(model), FileDigests(root / "models.json"), device)
        place = root / self._embedder.digest[:20]
        self._asked = VectorCache(place / "queries")
        place /= hashlib.sha256(os.fsencode(self.folder.resolve())).hexdigest()[:20]
        wanted = [name for name in self._embedder.modalities if name != "text"]
        self._parts: dict[str, _Part] = {}
        for modality in wanted if modalities is None else modalities:
            self._embedder.check(modality)
            self._parts[modality] = _Part(modality, self.folder, place / modality, self._embedder, batch_size)
        # What could not be embedded, and why.
        self.skipped: dict[Path, str] = {}

    def __len__(self) -> int:
        return sum(self.counts.values())

    @property
    def counts(self) -> dict[str, int]:
        """The number of items of each modality."""
        return {modality: len(part.items) for modality, part in self._parts.items()}

    def update(self, *, progress: bool = True) -> None:
        """Take up what the folder holds now: embed what is new, forget what is gone, list in `skipped` what fails.

        Raises:
            ValueError: there is nothing to search, or the model cannot be loaded.
        """
        self.skipped.clear()
        paths = _walk(self.folder, self.skipped)
        for part in self._parts.values():
            part.update(paths, self.skipped, progress)
        if not len(self):
            reason = next((f" ({reason})" for reason in self.skipped.values()), "")
            suffixes = ", ".join(suffix for modality in self._parts for suffix in sorted(SEARCHED_SUFFIXES[modality]))
            raise ValueError(
                f"There is nothing to search in {self.folder}{reason}. Name a folder with readable files of the "
                f"formats {suffixes}."
            )

    def search(self, query: str | os.PathLike[str], *, top: int = 10) -> Answer:
        """Find what is nearest to a query by cosine; equal ones are in the order of their paths.

        Each modality has a ranking of its own: a model leaves a gap between them, so that an image which hardly fits
        may be nearer to an image than the sound which fits best.

        Args:
            query: path of an image, audio or point cloud file, by its suffix, else a text. A file of the folder does
                not find itself.
            top: hits of each modality.

        Raises:
            ValueError: the query cannot be read, or the model does not embed its modality.
        """
        modality, value = read_query(query)
        vector = self._vector(modality, value)
        start = time.perf_counter()
        own = None if modality == "text" else Path(value).resolve()
        # What the query is not comes first.
        order = sorted(self._parts, key=lambda name: name == modality)
        hits = {name: self._parts[name].nearest(vector, top, own) for name in order if self._parts[name].items}
        return Answer(str(query), modality, hits, len(self), time.perf_counter() - start)

    def _vector(self, modality: str, value: str) -> np.ndarray:
        key = _key(modality, _text_digest(value) if modality == "text" else sha256(Path(value)))
        known = [part.vectors for part in self._parts.values() if part.modality == modality]
        for vectors in (*known, self._asked):
            if key in vectors:
                return vectors.vector(key)
        (vector,), (reason,) = self._embedder.embed(modality, [value])
        if vector is None:
            raise ValueError(reason)
        self._asked.add([(key, vector)])
        self._asked.merge()
        return vector


class _Part:
    """The items of one modality in a folder."""

    def __init__(self, modality: str, folder: Path, place: Path, embedder: Embedder, batch_size: int) -> None:
        self.modality = modality
        self.vectors = VectorCache(place)
        self.items: list[_Item] = []
        self._folder, self._embedder, self._batch_size = folder, embedder, batch_size
        self._digests = place / "files.json"
        self._rows = np.zeros(0, np.int64)

    def update(self, paths: Sequence[Path], skipped: dict[Path, str], progress: bool) -> None:
        digests = FileDigests(self._digests)
        items: list[_Item] = []
        for path in paths:
            if path.suffix.lower() in SEARCHED_SUFFIXES[self.modality]:
                try:
                    items += self._found(path, digests)
                except OSError as error:
                    skipped[path] = _unreadable(path, error)
                except ValueError as error:
                    skipped[path] = str(error)
        # An empty folder may be one whose disk is not mounted: it keeps its vectors.
        digests.save(forget=bool(items))
        new = list({item.key: item for item in items if item.key not in self.vectors}.values())
        if new:
            self._embed(new, items, digests, skipped, progress)
        if items:
            self.vectors.merge({item.key for item in items})
        self.items = [item for item in items if item.key in self.vectors]
        self._rows = np.array([self.vectors.row(item.key) for item in self.items], np.int64)

    def nearest(self, vector: np.ndarray, top: int, own: Path | None) -> list[Hit]:
        scores = self.vectors.scores(vector)[self._rows]
        # One more, for the query itself.
        count = min(top + 1, len(scores))
        # Those that share the last place come along, so that their order decides and not the partition's.
        found = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
        best = found[np.argsort(-scores[found], kind="stable")[:count]]
        hits = [self._hit(self.items[index], float(scores[index])) for index in best]
        return [hit for hit in hits if own is None or hit.path.resolve() != own][:top]

    def _hit(self, item: _Item, score: float) -> Hit:
        return Hit(score, self.modality, item.path, item.line, item.value if self.modality == "text" else None)

    def _found(self, path: Path, digests: FileDigests) -> list[_Item]:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return []
        if self.modality == "text":
            return _lines(path, status.st_size)
        name = path.relative_to(self._folder).as_posix()
        digest = digests.digest(name, path, status)
        if remark := digests.remark(name):
            raise ValueError(remark)
        return [_Item(path, str(path), _key(self.modality, digest))]

    def _embed(
        self,
        new: Sequence[_Item],
        items: Sequence[_Item],
        digests: FileDigests,
        skipped: dict[Path, str],
        progress: bool,
    ) -> None:
        from tqdm.auto import tqdm

        waiting: list[tuple[bytes, np.ndarray]] = []
        refused: dict[bytes, tuple[str, str]] = {}
        try:
            with tqdm(total=len(new), desc=self.modality, unit="item", disable=not progress) as bar:
                for batch in batches(new, self._batch_size):
                    vectors, reasons = self._embedder.embed(self.modality, [item.value for item in batch])
                    for item, vector, reason in zip(batch, vectors, reasons, strict=True):
                        if vector is not None:
                            waiting.append((item.key, vector))
                        elif reason is not None:
                            refused[item.key] = (item.value, reason)
                    if len(waiting) >= FLUSH_ROWS:
                        self.vectors.add(waiting)
                        waiting = []
                    bar.update(len(batch))
        finally:
            self.vectors.add(waiting)
            for item in items:
                if item.key in refused:
                    # Of files with one content, one was read.
                    value, reason = refused[item.key]
                    skipped[item.path] = reason.replace(value, item.value)
                    name = item.path.relative_to(self._folder).as_posix()
                    digests.set_remark(name, skipped[item.path])
            digests.save()


def read_query(query: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the modality of a query, and its path or text.

    Raises:
        ValueError: it is empty, a missing file, or a file of another format; no such path is taken for a text.
    """
    text = os.fspath(query).strip()
    path = os.path.expanduser(text)
    suffix = os.path.splitext(path)[1].lower()
    if not text:
        raise ValueError(
            "Expected a query, got an empty one. Pass a text, or the path of an image, audio or cloud file."
        )
    for modality, suffixes in SUFFIXES.items():
        if suffix in suffixes:
            if not os.path.isfile(path):
                raise ValueError(f"There is no file {path!r}. Check the path, or end a text without {suffix}.")
            return modality, path
    if suffix and os.path.isfile(path):
        formats = ", ".join(sorted(set().union(*SUFFIXES.values())))
        raise ValueError(f"Expected {path!r} in one of the formats {formats}. Convert it, or pass a text itself.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The query {text!r} is not valid Unicode. Pass it as UTF-8.") from error
    return "text", text


def _walk(folder: Path, skipped: dict[Path, str]) -> list[Path]:
    """Return the files below a folder, sorted; folders that cannot be read join `skipped`."""

    def note(error: OSError) -> None:
        skipped[Path(error.filename)] = _unreadable(error.filename, error)

    paths = []
    for root, folders, names in os.walk(folder, onerror=note):
        # Of files such as macOS leaves them beside others, too: ._dog.jpg is no picture.
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(paths, key=str)


def _lines(path: Path, size: int) -> list[_Item]:
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"{path} has {size} bytes, expected at most {MAX_TEXT_BYTES} of texts. Split it.")
    # An empty file would be a table without a column.
    lines = load_table(path)["text"] if size else []
    texts = [(number, text) for number, line in enumerate(lines, start=1) if (text := line.strip())]
    return [_Item(path, text, _key("text", _text_digest(text)), number) for number, text in texts]


def _unreadable(path: str | os.PathLike[str], error: OSError) -> str:
    return f"Cannot read {os.fspath(path)}: {error.strerror}."


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _key(modality: str, digest: str) -> bytes:
    """Return the key of a vector: what is embedded, and as what."""
    return hashlib.sha256(f"{modality} {digest}".encode()).digest()
