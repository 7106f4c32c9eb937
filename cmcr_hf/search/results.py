"""Show what a search found: as a table, as JSON, as a page with pictures and players."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .index import Answer, SearchIndex

COUNTED = {"image": "images", "audio": "clips", "point_cloud": "point clouds", "text": "lines of text"}
# As many of the files that cannot be searched are named.
SHOWN_SKIPPED = 5
TEXT_WIDTH = 100
# Pixels, as in the style of the page.
PICTURE_SIZE = 192


def format_index(index: SearchIndex) -> str:
    """Say in a line what is in an index."""
    counts = [f"{count:,} {COUNTED[modality]}" for modality, count in index.counts.items() if count]
    return f"{', '.join(counts)} in {printable(index.folder)}"


def format_skipped(index: SearchIndex) -> list[str]:
    """Say in a line each why the first files that cannot be searched are not, and how many more there are."""
    reasons = [reason for _, reason in sorted(index.skipped.items())]
    lines = [f"skipped: {printable(reason)}" for reason in reasons[:SHOWN_SKIPPED]]
    return [*lines, f"skipped: {len(reasons) - SHOWN_SKIPPED:,} more"] if len(reasons) > SHOWN_SKIPPED else lines


def format_answer(answer: Answer) -> str:
    """Return the hits of a query as a table: rank, cosine, modality, and path, with the line of a text behind it."""
    lines = [f"\n{printable(answer.query)} ({answer.modality})"]
    for hits in answer.hits.values():
        for rank, hit in enumerate(hits, start=1):
            text = "" if hit.text is None else f":{hit.line}: {printable(hit.text)[:TEXT_WIDTH]}"
            lines.append(f"{rank:4}  {hit.score:6.3f}  {hit.modality:5}  {printable(hit.path)}{text}")
    return "\n".join([*lines, f"searched {answer.searched:,} items in {1000 * answer.seconds:.1f} ms"])


def printable(text: object) -> str:
    """Escape what could steer a terminal, which the name of a file may hold."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def answer_record(answer: Answer) -> dict[str, Any]:
    """Return an answer for JSON, bytes of paths that are not UTF-8 as escape sequences."""
    hits = {
        modality: [
            {**asdict(hit), "path": _valid(hit.path), "score": round(hit.score, 6), "rank": rank}
            for rank, hit in enumerate(found, start=1)
        ]
        for modality, found in answer.hits.items()
    }
    return {"query": _valid(answer.query), "modality": answer.modality, "hits": hits}


def _valid(text: str | Path) -> str:
    return str(text).encode(errors="backslashreplace").decode()


def write_search_page(path: Path, index: SearchIndex, answers: Sequence[Answer]) -> None:
    """Write the answers as one HTML file that holds its pictures, and the beginnings of its sounds.

    Raises:
        ValueError: a file that was found is no longer readable.
    """
    from ..pages.page import cloud_uri, picture_uri, render, sound_uri, write_page

    def uri(modality: str, file: Path) -> str | None:
        if modality == "text":
            return None
        if modality == "audio":
            return sound_uri(file)
        return (picture_uri if modality == "image" else cloud_uri)(file, PICTURE_SIZE)

    shown = [
        {
            "query": _valid(answer.query),
            "modality": answer.modality,
            "uri": uri(answer.modality, Path(answer.query).expanduser()),
            "hits": {
                modality: [
                    {
                        "score": f"{hit.score:.3f}",
                        "modality": modality,
                        "name": _valid(hit.path.relative_to(index.folder).as_posix()),
                        "line": hit.line,
                        "text": hit.text,
                        "uri": uri(modality, hit.path),
                    }
                    for hit in hits
                ]
                for modality, hits in answer.hits.items()
            },
        }
        for answer in answers
    ]
    context = {"folder": _valid(index.folder), "contents": format_index(index), "answers": shown}
    write_page(path, render("search.html.jinja", context))
