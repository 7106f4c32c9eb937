"""What holds for every image, clip and text: features of one shape, finite, of the item alone; else a ValueError."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from cmcr_hf.modeling.processing_cmcr import CMCRProcessor
from tests.media import RATE, encode_audio, encode_image

# The first example loads lazily, so no deadline.
some = settings(deadline=None, max_examples=25)

MODES = [
    "1",
    "CMYK",
    "F",
    "HSV",
    "I",
    "I;16",
    "I;16B",
    "L",
    "LA",
    "LAB",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "RGBa",
]
FILES = {"PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"], "TIFF": ["1", "L", "CMYK", "RGB"], "JPEG": ["L", "RGB"]}
SHAPES = {"pixel_values": (3, 32, 32), "input_features": (1, 126, 16), "is_longer": (1,)}


def prepared(processor: CMCRProcessor, **inputs: Any) -> dict[str, torch.Tensor] | None:
    """Return what the processor makes of its inputs, which is fixed in shape and finite, or `None` for an error."""
    try:
        outputs = processor(**inputs)
    except ValueError:
        return None
    for name, value in outputs.items():
        shape = (4, *SHAPES[name][1:]) if name == "input_features" and value.shape[1] == 4 else SHAPES.get(name)
        assert shape is None or tuple(value.shape[1:]) == shape
        assert torch.isfinite(value).all()
    return dict(outputs)


def assert_equal(one: dict[str, torch.Tensor] | None, other: dict[str, torch.Tensor] | None) -> None:
    assert one is not None
    assert other is not None
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def drawn(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """Return an image of random bytes."""
    size = len(Image.new(mode, (width, height)).tobytes())
    return Image.frombytes(mode, (width, height), np.random.default_rng(seed).bytes(size))


sizes = st.integers(1, 70) | st.integers(1, 1500)


@some
@given(st.sampled_from(MODES), sizes, sizes, st.integers(0, 9))
def test_an_image_of_any_mode_and_size(
    processor: CMCRProcessor, mode: str, width: int, height: int, seed: int
) -> None:
    features = prepared(processor, images=drawn(mode, width, height, seed))
    assert (features is None) == (mode in ("F", "I", "La"))


@some
@given(
    st.sampled_from([(format, mode) for format, modes in FILES.items() for mode in modes]),
    sizes,
    sizes,
    st.integers(0, 9),
)
def test_an_image_is_the_same_as_file_bytes_and_array(
    processor: CMCRProcessor,
    tmp_path_factory: pytest.TempPathFactory,
    kind: tuple[str, str],
    width: int,
    height: int,
    seed: int,
) -> None:
    format, mode = kind
    data = encode_image(drawn(mode, width, height, seed), format)
    path = tmp_path_factory.getbasetemp() / "image"
    path.write_bytes(data)
    expected = prepared(processor, images=data)
    assert_equal(prepared(processor, images=path), expected)
    if mode == "RGB" and format == "PNG":
        assert_equal(prepared(processor, images=np.asarray(drawn(mode, width, height, seed))), expected)


@some
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.sampled_from(["uint8", "uint16", "int64", "float16", "float32", "float64", "bool", "complex64", "object"]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.booleans(),
)
def test_an_array_of_any_shape_and_type_is_an_image_or_an_error(
    processor: CMCRProcessor, shape: list[int], dtype: str, value: float, as_tensor: bool
) -> None:
    with np.errstate(all="ignore"):
        array = np.full(shape, value).astype(dtype)
    tensor = as_tensor and dtype not in ("object", "uint16")
    features = prepared(processor, images=[torch.from_numpy(array) if tensor else array])
    if features is not None:
        assert dtype == "uint8" or 0 <= array.min() <= array.max() <= 1


rates = st.sampled_from([100, 3000, RATE, 11025, 44100, 48000, 192_000, 10_000_000])
dtypes = st.sampled_from(["int8", "uint8", "int16", "uint16", "int32", "float16", "float32", "float64"])


def sound(samples: int, channels: int, dtype: str, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if dtype.startswith("float"):
        return generator.uniform(-1, 1, (samples, channels)).astype(dtype)
    limits = np.iinfo(dtype)
    return generator.integers(limits.min, limits.max, (samples, channels), dtype=dtype, endpoint=True)


lengths = st.integers(1, 300) | st.integers(1, 90_000)


@some
@given(lengths, st.integers(1, 8), rates, dtypes, st.booleans(), st.integers(0, 9))
def test_a_clip_of_any_length_rate_channels_and_type(
    processor: CMCRProcessor,
    fused: CMCRProcessor,
    samples: int,
    channels: int,
    rate: int,
    dtype: str,
    first: bool,
    seed: int,
) -> None:
    array = sound(samples, channels, dtype, seed)
    samples = len(array) if rate > 1000 else min(samples, 3000)  # a longer one at a low rate is hours of samples
    array = array[:samples]
    for prepare, longer_from in ((processor, RATE + 1), (fused, RATE + 64)):
        features = prepared(prepare, audio=array.T if first else array, sampling_rate=rate)
        assert features is not None
        clip_samples = max(array.shape)
        assert features["is_longer"].item() == (int(clip_samples * RATE / rate + 0.5) >= longer_from)


@some
@given(lengths, st.integers(1, 3), rates, st.sampled_from(["WAV", "FLAC"]), st.integers(0, 9))
def test_a_clip_is_the_same_as_file_bytes_and_array(
    processor: CMCRProcessor,
    fused: CMCRProcessor,
    tmp_path_factory: pytest.TempPathFactory,
    samples: int,
    channels: int,
    rate: int,
    format: str,
    seed: int,
) -> None:
    rate = min(rate, 192_000)
    array = sound(max(samples if rate > 1000 else min(samples, 3000), channels + 1), channels, "int16", seed)
    data = encode_audio(array, rate, format, "PCM_16")
    path = tmp_path_factory.getbasetemp() / "clip"
    path.write_bytes(data)
    for prepare in (processor, fused):
        expected = prepared(prepare, audio=data)
        assert_equal(prepared(prepare, audio=path), expected)
        assert_equal(prepared(prepare, audio=array, sampling_rate=rate), expected)


@some
@given(st.lists(st.tuples(st.integers(1, 20_000), sizes, sizes), min_size=1, max_size=4), st.integers(0, 9))
def test_an_item_alone_is_the_item_of_any_batch(
    fused: CMCRProcessor, items: list[tuple[int, int, int]], seed: int
) -> None:
    clips = [sound(samples, 1, "float32", seed) for samples, _, _ in items]
    images = [drawn("RGB", width, height, seed) for _, width, height in items]
    batch = prepared(fused, audio=clips, images=images, sampling_rate=RATE)
    assert batch is not None
    for row, (clip, image) in enumerate(zip(clips, images, strict=True)):
        alone = prepared(fused, audio=clip, images=image, sampling_rate=RATE)
        assert_equal(alone, {name: value[row : row + 1] for name, value in batch.items()})


words = st.sampled_from(
    ["a", "dog", "barks", "</s>", "<s>", "<pad>", " ", "\n", "\0", "\u202e", "👩", "狗", "e\u0301"]
)
# With surrogates, which no file holds.
texts = st.lists(words | st.text(alphabet=st.characters(), max_size=9), max_size=50).map("".join)


@some
@given(st.lists(texts, min_size=1, max_size=4), st.sampled_from(["clip", "clap"]))
def test_any_texts_give_ids_that_begin_and_end_once(processor: CMCRProcessor, texts: list[str], space: str) -> None:
    inputs = prepared(processor, text=texts, space=space)
    if inputs is None:
        assert any("\ud800" <= letter <= "\udfff" for letter in itertools.chain(*texts))
        return
    for row, text in enumerate(texts):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        assert ids[0] == 1
        assert ids[-1] == 2
        assert not {0, 1, 2} & set(ids[1:-1])
        alone = processor(text=text, space=space)["input_ids"]
        assert alone[0].tolist() == ids


@some
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_texts_without_special_tokens_are_those_of_the_tokenizer(
    processor: CMCRProcessor, tiny_clip: Path, texts: list[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip)
    plain = [text.replace("<", "").replace(">", "") for text in texts]
    expected = tokenizer(plain, padding=True, truncation=True, return_tensors="pt")
    assert torch.equal(processor(text=plain)["input_ids"], expected["input_ids"])


PICTURE = drawn("RGB", 20, 30, 0)
INTACT = {
    **{format: encode_image(PICTURE, format) for format in ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")},
    **{
        format: encode_audio(sound(3000, 2, "int16", 0), RATE, format, subtype)
        for format, subtype in [("AIFF", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("WAV", "PCM_16")]
    },
}


@settings(some, max_examples=200)
@given(
    st.sampled_from(sorted(INTACT)),
    st.lists(st.tuples(st.integers(0, 200) | st.integers(0, 10**5), st.integers(0, 255)), max_size=8),
    st.floats(0, 1) | st.just(1.0),
)
def test_a_damaged_file_is_read_or_an_error(
    processor: CMCRProcessor, format: str, changes: list[tuple[int, int]], kept: float
) -> None:
    data = bytearray(INTACT[format])
    for place, value in changes:
        data[place % len(data)] = value
    del data[int(kept * len(data)) :]
    features = prepared(processor, **{"audio" if format in ("AIFF", "FLAC", "OGG", "WAV") else "images": bytes(data)})
    if not changes and kept == 1:
        assert features is not None
