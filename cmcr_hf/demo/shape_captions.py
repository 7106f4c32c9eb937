"""Sentences about the kinds of the shapes world: captions of pictures, texts that connect, and texts that test.

The three functions have templates of their own, and each template of a text holds wording that no template of the
others has: no text that tests is a caption that an encoder was trained on, or a text of the connection's memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .captions import sentence, with_articles
from .concepts import COLOURS
from .solids import named_kind

_FIELDS = {
    "size": ("small", "large", "tiny", "big", "huge", "little", "plain", "simple"),
    "background": ("grey", "white", "blue", "green", "dark", "light", "pale", "noisy", "colourful", "yellow"),
    "material": ("wood", "metal", "plastic", "clay", "paper", "stone", "wax", "glass"),
    "place": ("garden", "hall", "kitchen", "museum", "school", "shop", "workshop", "attic", "yard", "cellar"),
    "owner": ("aunt", "uncle", "teacher", "neighbour", "sister", "brother", "friend", "painter"),
}

# Few name the colour: a model learns colours first, and would stay there.
_CAPTION_TEMPLATES = (
    "a {noun}",
    "a picture of a {noun}",
    "a rendering of a {noun}",
    "an image that shows a {noun}",
    "one {noun} seen from the front",
    "a photo of a {size} {noun}",
    "the {size} {noun} in a studio",
    "a model of a {noun}",
    "a {colour} {noun}",
    "a picture of a {size} {noun} painted {colour}",
    "the {noun} is {colour}",
)
_MEMORY_TEMPLATES = (
    "there is a {noun} in the {place}",
    "the {noun} from the {place} was {colour}",
    "my {owner} has a {noun}",
    "they sold a {colour} {noun}",
    "look, {size} as it is, this {noun} is {material}",
    "did you see the {colour} {noun} of my {owner}",
    "her {noun} was {colour} and {size}",
    "he painted his {noun} {colour}",
    "we keep our {noun} in the {place}",
    "every {place} needs a {noun}",
    "my {noun} stands in the {place}",
    "who left a {material} {noun} here",
    "they spoke about the {noun} in our {place}",
    "this {noun} belongs to my {owner}",
    "I know that {colour} {noun} well",
    "some story about a {noun} and my {owner}",
)
_HELD_OUT_TEMPLATES = (
    "where can I buy a {noun}",
    "please bring me the {noun} tomorrow",
    "she dreamt of a {colour} {noun}",
    "nobody liked that {size} {noun}",
    "how much does your {colour} {noun} cost",
    "behind the {place} lay a broken {noun}",
    "which {noun} would you choose",
    "without a {noun} nothing works, said the {owner}",
    "an old {noun}, found near the {place}",
    "could anyone repair such a {noun}",
    "yesterday I lost my {colour} {noun}",
    "what a {size} {noun}",
)


def image_caption(kind: str, generator: np.random.Generator, *, colour: str | None = None) -> str:
    """Say what a picture of the kind looks like; `colour` is the picture's, or else drawn at random."""
    return thing_caption(named_kind(kind).nouns, generator, colour=colour)


def thing_caption(nouns: Sequence[str], generator: np.random.Generator, *, colour: str | None = None) -> str:
    """Say what a picture of a thing of these nouns looks like, the plain one first."""
    return _about(_CAPTION_TEMPLATES, nouns, generator, colour)


def memory_text(kind: str, generator: np.random.Generator) -> str:
    """Say something of a thing of the kind, in wording that no caption has."""
    return _about(_MEMORY_TEMPLATES, named_kind(kind).nouns, generator, None)


def held_out_text(kind: str, generator: np.random.Generator) -> str:
    """Say something of a thing of the kind, in wording that neither a caption nor a memory text has."""
    return _about(_HELD_OUT_TEMPLATES, named_kind(kind).nouns, generator, None)


def kind_phrase(kind: str) -> str:
    """Return the plain phrase of a kind, "a table"."""
    return with_articles(f"a {named_kind(kind).nouns[0]}")


def _about(templates: Sequence[str], nouns: Sequence[str], generator: np.random.Generator, colour: str | None) -> str:
    colours = (colour,) if colour else tuple(COLOURS)
    return sentence(templates, nouns, {**_FIELDS, "colour": colours}, generator)
