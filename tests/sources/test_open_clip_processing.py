"""open_clip's preprocessing in parts of transformers."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cmcr_hf.sources.open_clip_processing import clip_tokenizer, hf_tokenizer, image_processor
from tests.conftest import tiny_tokenizer

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))


def pixels(**preprocess: Any) -> np.ndarray:
    return image_processor(preprocess)(PICTURE, return_tensors="np")["pixel_values"][0]


def by_hand(picture: Image.Image, mean: float, std: float) -> np.ndarray:
    return ((np.asarray(picture, np.float32) / 255 - mean) / std).transpose(2, 0, 1)


def test_shortest_resizes_the_short_side_and_crops_the_middle() -> None:
    found = pixels(size=20, resize_mode="shortest", interpolation="bicubic", mean=[0.5] * 3, std=[0.25] * 3)
    resized = PICTURE.resize((33, 20), Image.Resampling.BICUBIC).crop((6, 0, 26, 20))
    np.testing.assert_allclose(found, by_hand(resized, 0.5, 0.25), atol=1e-5)


def test_squash_resizes_both_sides() -> None:
    found = pixels(size=[16, 24], resize_mode="squash", interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    resized = PICTURE.resize((24, 16), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(found, by_hand(resized, 0, 1), atol=1e-5)


def test_what_is_not_said_is_openais() -> None:
    processor = image_processor({})
    assert processor.size["shortest_edge"] == 224 and processor.resample == Image.Resampling.BICUBIC
    assert list(processor.image_mean) == [0.48145466, 0.4578275, 0.40821073]


@pytest.mark.parametrize(
    "preprocess",
    [
        {"resize_mode": "longest"},
        {"size": [16, 24]},
        {"interpolation": "nearest"},
        {"mode": "L"},
    ],
)
def test_preprocessing_of_another_kind_is_refused(preprocess: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Cannot prepare .* Use another model\."):
        image_processor(preprocess)


def _clean_lower(text: str) -> str:
    return " ".join(text.split()).lower()


def simple_tokenizer(**changes: Any) -> Any:
    """What a `SimpleTokenizer` of open_clip holds, with a vocabulary of three letters and two merges."""
    tokens = ["a", "b", "c", "a</w>", "b</w>", "c</w>", "ab</w>", "cab</w>", "<start_of_text>", "<end_of_text>"]
    content = {
        "encoder": {token: number for number, token in enumerate(tokens)},
        "bpe_ranks": {("c", "ab</w>"): 1, ("a", "b</w>"): 0},
        "all_special_ids": [8, 9],
        "sot_token_id": 8,
        "eot_token_id": 9,
        "context_length": 6,
        "clean_fn": _clean_lower,
        "reduction_fn": None,
    }
    return SimpleNamespace(**{**content, **changes})


def test_the_vocabulary_merges_and_length_of_open_clip_are_kept(tmp_path: Any) -> None:
    tokenizer = clip_tokenizer(simple_tokenizer())
    texts = ["Cab  ab", "b a", "a a a a a a a"]
    expected = [[8, 7, 6, 9], [8, 4, 3, 9], [8, 3, 3, 3, 3, 9]]
    assert tokenizer(texts, truncation=True)["input_ids"] == expected
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(texts, truncation=True)["input_ids"] == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"reduction_fn": len},
        {"clean_fn": len},
        {"all_special_ids": [7, 8, 9]},
    ],
)
def test_a_tokenizer_with_ways_of_its_own_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Expected a tokenizer of open_clip .* Use another model\."):
        clip_tokenizer(simple_tokenizer(**changes))


def wrapped(cleaning: str, **changes: Any) -> Any:
    """What an `HFTokenizer` of open_clip holds."""

    def clean(text: str) -> str:
        raise AssertionError("the cleaning is part of the tokenizer")

    clean.__name__ = f"_clean_{cleaning}"
    content = {"tokenizer": tiny_tokenizer(30), "clean_fn": clean, "context_length": 7}
    return SimpleNamespace(**{**content, "tokenizer_mode": "", "strip_sep_token": False, **changes})


@pytest.mark.parametrize(
    ("cleaning", "text", "same"),
    [
        ("whitespace", "  a \t\n dog\u00a0barks ", "a dog barks"),
        ("lower", " A  DOG", "a dog"),
        ("canonicalize", "A_dog's, (LOUD) bell: [rings]!", "a <unk> loud bell rings"),
    ],
)
def test_the_cleaning_is_part_of_the_tokenizer(tmp_path: Any, cleaning: str, text: str, same: str) -> None:
    tokenizer = hf_tokenizer(wrapped(cleaning))
    expected = tiny_tokenizer(30)(same.replace("<unk>", "dogs"))["input_ids"]
    assert tokenizer(text)["input_ids"] == expected
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, PreTrainedTokenizerFast)
    assert (again(text)["input_ids"], again.model_max_length) == (expected, 7)


def test_the_whitespace_cleaning_keeps_capitals() -> None:
    tokenizer = hf_tokenizer(wrapped("whitespace"))
    assert tokenizer("Dog")["input_ids"] == [1, 3, 2]


def test_every_mark_of_punctuation_is_removed_and_no_letter() -> None:
    tokenizer = hf_tokenizer(wrapped("canonicalize"))
    for mark in "!\"#$%&'()*+,-./:;<=>?@[\\]^`{|}~":
        assert tokenizer(f"do{mark}g")["input_ids"] == [1, 6, 2], mark
    assert tokenizer("do_g")["input_ids"] == [1, 3, 3, 2]


@pytest.mark.parametrize(
    "changes", [{"tokenizer_mode": "clips"}, {"strip_sep_token": True}, {"tokenizer": SimpleNamespace()}]
)
def test_a_tokenizer_whose_ids_are_changed_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Cannot use the tokenizer .* Use another model\."):
        hf_tokenizer(wrapped("whitespace", **changes))


def test_an_unknown_cleaning_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown cleaning 'shuffle'"):
        hf_tokenizer(wrapped("shuffle"))
