from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cmcr_hf.demo import shape_captions
from cmcr_hf.demo.shape_captions import held_out_text, image_caption, kind_phrase, memory_text
from cmcr_hf.demo.solids import KINDS

Say = Callable[[str, np.random.Generator], str]
SAYINGS = (image_caption, memory_text, held_out_text)


def sentences(say: Say, kind: str, count: int = 400) -> list[str]:
    generator = np.random.default_rng(0)
    return [say(kind, generator) for _ in range(count)]


@pytest.mark.parametrize("say", SAYINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_sentence_says_a_noun_of_its_kind_and_no_template_field(say: Say, kind: str) -> None:
    said = sentences(say, kind)
    assert all("{" not in line and any(noun in line for noun in KINDS[kind].nouns) for line in said)
    assert all(any(noun in line for line in said) for noun in KINDS[kind].nouns)


@pytest.mark.parametrize("kind", KINDS)
def test_no_sentence_is_one_of_another_purpose(kind: str) -> None:
    captions, memory, held_out = (set(sentences(say, kind, 1500)) for say in SAYINGS)
    assert not captions & memory and not captions & held_out and not memory & held_out


def test_no_template_gives_what_one_of_another_purpose_gives() -> None:
    # A template's fixed words; equal sentences need templates of which one's words could fill the other's.
    groups = [
        [{word.strip(",") for word in template.split() if "{" not in word} for template in templates]
        for templates in (
            shape_captions._CAPTION_TEMPLATES,
            shape_captions._MEMORY_TEMPLATES,
            shape_captions._HELD_OUT_TEMPLATES,
        )
    ]
    for later, earlier in ((1, 0), (2, 0), (2, 1)):
        for words in groups[later]:
            assert all(not words <= other for other in groups[earlier]), words


def test_a_picture_s_colour_is_the_only_one_of_its_caption() -> None:
    generator = np.random.default_rng(0)
    said = [image_caption("table", generator, colour="purple") for _ in range(200)]
    assert sum("purple" in caption for caption in said) > 30
    assert not any("orange" in caption or "pink" in caption for caption in said)


def test_articles_agree_with_the_next_word() -> None:
    said = " | ".join(sentences(image_caption, "aeroplane", 1000))
    assert "an aeroplane" in said and "an orange" in said
    assert "a aeroplane" not in said and "a orange" not in said


def test_names_are_plain_phrases() -> None:
    assert (kind_phrase("table"), kind_phrase("aeroplane")) == ("a table", "an aeroplane")
    assert len({kind_phrase(kind) for kind in KINDS}) == len(KINDS)


def test_an_unknown_kind_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="'unicorn'"):
        memory_text("unicorn", np.random.default_rng(0))
