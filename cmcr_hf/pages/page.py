"""HTML pages in one file: templates, and pictures and sounds as data. A page loads nothing from anywhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import soundfile

from ..durable import write_durably
from ..modeling.audio_loading_cmcr import load_audio
from ..modeling.image_loading_cmcr import load_image
from ..modeling.point_cloud_loading_cmcr import load_point_cloud
from .clouds import draw_cloud

# In the head of every page: tells it from somebody else's.
GENERATOR = "cmcr_hf"
# Hz; the highest that keeps the small format of MP3 (MPEG-2) which every browser plays.
PAGE_RATE = 24_000

_LOADER = jinja2.PackageLoader("cmcr_hf.pages")
_templates = jinja2.Environment(
    loader=_LOADER,
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, context: Mapping[str, Any], folder: Path | None = None) -> str:
    """Fill a template of `pages/templates`, such as `report.html.jinja`; every string of the context is escaped.

    Pages extend `page.html.jinja`, which has the blocks `title`, `style` and `main`. The same context gives the same
    text; a name that the context lacks is an error.

    Args:
        folder: with templates of its own, which may extend ours.
    """
    templates = _templates
    if folder is not None:
        templates = _templates.overlay(loader=jinja2.ChoiceLoader([jinja2.FileSystemLoader(folder), _LOADER]))
    return templates.get_template(template).render(generator=GENERATOR, **context)


def picture_uri(image: Any, size: int = 128) -> str:
    """Return a thumbnail as the data URI of a JPEG: the square in the image's middle, `size` pixels wide.

    Args:
        image: whatever [`load_image`] takes: path, bytes, PIL image, array or `datasets` dict.

    Raises:
        ValueError: the image cannot be read.
    """
    from PIL import Image, ImageOps

    thumbnail = ImageOps.fit(load_image(image), (size, size), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    thumbnail.save(file, "JPEG", quality=80)
    return data_uri("image/jpeg", file.getvalue())


def cloud_uri(cloud: Any, size: int = 128) -> str:
    """Return a point cloud, drawn `size` pixels wide, as the data URI of a JPEG.

    Args:
        cloud: whatever [`load_point_cloud`] takes.

    Raises:
        ValueError: the cloud cannot be read.
    """
    return picture_uri(draw_cloud(load_point_cloud(cloud), size), size)


def sound_uri(audio: Any, seconds: float = 5.0) -> str:
    """Return the beginning of a clip as the data URI of a mono MP3, about 7 kB a second.

    Args:
        audio: path, bytes or `datasets` dict, as [`load_audio`] takes them.
        seconds: what is longer is cut here.

    Raises:
        ValueError: the clip cannot be read.
        ImportError: the libsndfile that is installed cannot write MP3.
    """
    waveform = load_audio(audio, PAGE_RATE)[: round(seconds * PAGE_RATE)]
    file = io.BytesIO()
    try:
        # Not OGG, whose writer draws a random serial number: a page is to be the same, byte by byte, on a rerun.
        soundfile.write(file, waveform.clip(-1, 1), PAGE_RATE, format="MP3")
    except (soundfile.LibsndfileError, ValueError) as error:
        raise ImportError(
            f"Cannot write MP3: {error}. Install soundfile from its wheel, which has libsndfile 1.1 or newer."
        ) from error
    return data_uri("audio/mpeg", file.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """Return the content of a file as a data URI of a media type such as `image/png`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def write_page(path: Path, html: str) -> None:
    """Write a page whole or not at all, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The bytes of a file's name need not be UTF-8.
    write_durably(path, html.encode("utf-8", "replace"))


def remove_page(path: Path) -> None:
    """Remove a page that a former run wrote; a file of somebody else stays."""
    if path.is_file() and is_ours(path):
        path.unlink()


def is_ours(path: Path) -> bool:
    """Say whether a file is a page that a run wrote."""
    with path.open("rb") as file:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(1024)
