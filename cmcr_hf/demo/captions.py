"""Sentences about the concepts: captions of pictures, captions of sounds, and texts that belong to neither.

The three functions have templates of their own, and each template of a text holds wording that no caption has. So a
text that bridges the two spaces is never a copy of a caption that an encoder was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from .concepts import named_concept

_SIZES = ("small", "large", "tiny", "big", "simple", "plain", "bright", "round")
_BACKGROUNDS = ("grey", "white", "blue", "green", "dark", "light", "pale", "noisy", "colourful", "yellow")
_MANNERS = ("loudly", "softly", "twice", "slowly", "quickly", "again and again", "without a pause", "faintly")
_PLACES = (
    "in the distance",
    "nearby",
    "outside",
    "across the street",
    "behind the house",
    "in the morning",
    "at night",
    "over some hiss",
)
_NEIGHBOURS = ("door", "garden", "window", "market", "school", "river", "bridge", "kitchen", "hill", "old wall")

_IMAGE_TEMPLATES = (
    "a {noun}",
    "a picture of a {noun}",
    "a {colour} {noun}",
    "a {size} {colour} {noun}",
    "a {colour} {noun} on a {background} background",
    "a {size} {colour} {noun} on a {background} background",
    "a drawing of a {colour} {noun}",
    "a picture of a {size} {noun} painted {colour}",
    "the {noun} is {colour}",
    "a {noun} coloured {colour} among a few shapes",
    "an image that shows a {colour} {noun}",
    "one {colour} {noun} seen against {background}",
    "a cartoon of a {size} {noun} in {colour}",
    "a blurry photo of a {colour} {noun}",
    "the {size} {noun}, {colour} on {background}",
    "a {noun} drawn in {colour}",
)
_SOUND_TEMPLATES = (
    "a {noun}",
    "the sound of a {noun}",
    "a {noun} {verb}",
    "a {noun} {verb} {manner}",
    "a {noun} {verb} {place}",
    "a {noun} {verb} {manner} {place}",
    "the {noise} of a {noun}",
    "a recording of a {noun} that {verb}",
    "someone recorded a {noun} {place}",
    "we hear a {noun} {place}",
    "{noise} of a {noun} {place}",
    "a short clip of the {noise} of a {noun}",
    "{place} a {noun} {verb}",
    "the noise of a {noun}, {manner}",
    "{manner} a {noun} {verb}",
    "the {noun} {verb} {manner}",
)
_TEXT_TEMPLATES = (
    "there is a {noun} near the {neighbour}",
    "the {noun} near the {neighbour}",
    "the {noun} by the {neighbour} is {colour}",
    "my {noun} is {size}",
    "they have a {colour} {noun}",
    "look at this {size} {noun} by the {neighbour}",
    "did you see the {colour} {noun} near the {neighbour}",
    "her {noun} was {colour} and {size}",
    "he painted the {noun} {colour}",
    "listen to that {noun} near the {neighbour}",
    "do you hear how the {noun} {verb}",
    "every day this {noun} {verb} {manner}",
    "my {noun} {verb} {place}",
    "{noise}, that must be a {noun}",
    "they spoke about the {noise} of that {noun}",
    "his {noun} {verb} {manner} by the {neighbour}",
    "I know this {noun} well",
    "a story about a {noun} and a {neighbour}",
    "where is the {noun} from the {neighbour}",
    "she asked for a {noun}",
    "two friends talk of a {noun}",
    "what a {size} {noun} this is",
    "nobody liked the {colour} {noun} that {verb}",
    "the {colour} {noun} {verb} {place} as they sleep",
)


def image_caption(concept: str, generator: np.random.Generator, *, colour: str | None = None) -> str:
    """Say what a picture of the concept looks like; `colour` is the picture's, or else drawn at random."""
    return _sentence(_IMAGE_TEMPLATES, concept, generator, colour)


def sound_caption(concept: str, generator: np.random.Generator) -> str:
    """Say what a recording of the concept sounds like."""
    return _sentence(_SOUND_TEMPLATES, concept, generator, None)


def text(concept: str, generator: np.random.Generator) -> str:
    """Say something of the concept: its look, its sound or neither, in wording that no caption has."""
    return _sentence(_TEXT_TEMPLATES, concept, generator, None)


def concept_phrase(concept: str) -> str:
    """Return the plain phrase of a concept, "a bell"."""
    return with_articles(f"a {named_concept(concept).nouns[0]}")


def _sentence(templates: Sequence[str], concept: str, generator: np.random.Generator, colour: str | None) -> str:
    words = named_concept(concept)
    fields = {
        "verb": words.verbs,
        "noise": words.noises,
        "colour": (colour,) if colour else words.colours,
        "size": _SIZES,
        "background": _BACKGROUNDS,
        "manner": _MANNERS,
        "place": _PLACES,
        "neighbour": _NEIGHBOURS,
    }
    return sentence(templates, words.nouns, fields, generator)


def sentence(
    templates: Sequence[str],
    nouns: Sequence[str],
    fields: Mapping[str, Sequence[str]],
    generator: np.random.Generator,
) -> str:
    """Fill a random template with a noun and a random word of each other field, and set its articles.

    The plain noun, the first one, is said half of the time, so that text towers know it best.
    """

    def pick(choices: Sequence[str]) -> str:
        return choices[int(generator.integers(len(choices)))]

    noun = nouns[0] if generator.random() < 0.5 else pick(nouns)
    template = pick(templates)
    return with_articles(template.format(noun=noun, **{name: pick(choices) for name, choices in fields.items()}))


def with_articles(words: str) -> str:
    """Set "an" for "a" in front of a vowel."""
    return re.sub(r"\b(a) (?=[aeio])", "an ", words)
