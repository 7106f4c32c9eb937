from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cmcr_hf.demo import captions
from cmcr_hf.demo.captions import concept_phrase, image_caption, sound_caption, text
from cmcr_hf.demo.concepts import CONCEPTS

Say = Callable[[str, np.random.Generator], str]


def sentences(say: Say, concept: str, count: int = 400) -> list[str]:
    generator = np.random.default_rng(0)
    return [say(concept, generator) for _ in range(count)]


@pytest.mark.parametrize("say", [image_caption, sound_caption, text])
@pytest.mark.parametrize("concept", CONCEPTS)
def test_every_sentence_says_a_noun_of_its_concept_and_no_template_field(say: Say, concept: str) -> None:
    for sentence in sentences(say, concept):
        assert any(noun in sentence for noun in CONCEPTS[concept].nouns), sentence
        assert "{" not in sentence


@pytest.mark.parametrize("say", [image_caption, sound_caption, text])
def test_every_synonym_is_said(say: Say) -> None:
    said = " | ".join(sentences(say, "siren"))
    assert all(noun in said for noun in CONCEPTS["siren"].nouns)


@pytest.mark.parametrize("concept", CONCEPTS)
def test_no_text_is_a_caption(concept: str) -> None:
    said = set(sentences(image_caption, concept, 1500)) | set(sentences(sound_caption, concept, 1500))
    assert not said & set(sentences(text, concept, 1500))


def test_no_text_template_gives_what_a_caption_template_gives() -> None:
    # A template's fixed words in order; equal sentences need templates of which one's words could fill the other's.
    fixed = [set(template.split()) for template in (*captions._IMAGE_TEMPLATES, *captions._SOUND_TEMPLATES)]
    for template in captions._TEXT_TEMPLATES:
        words = {word for word in template.split() if "{" not in word}
        assert all(not words <= {word for word in other if "{" not in word} for other in fixed), template


def test_a_picture_s_colour_is_the_only_one_of_its_caption() -> None:
    generator = np.random.default_rng(0)
    said = [image_caption("bell", generator, colour="purple") for _ in range(200)]
    assert sum("purple" in caption for caption in said) > 100
    assert not any("orange" in caption or "pink" in caption for caption in said)


def test_articles_agree_with_the_next_word() -> None:
    said = " | ".join(sentences(image_caption, "car", 1000) + sentences(sound_caption, "guitar", 1000))
    assert "an automobile" in said and "an acoustic guitar" in said and "an orange" in said
    assert "a automobile" not in said and "a acoustic" not in said and "a orange" not in said


def test_names_are_plain_phrases() -> None:
    assert concept_phrase("bell") == "a bell"
    assert concept_phrase("rain") == "a rain cloud"
    assert len({concept_phrase(concept) for concept in CONCEPTS}) == len(CONCEPTS) == 18


def test_an_unknown_concept_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="'unicorn'"):
        text("unicorn", np.random.default_rng(0))
