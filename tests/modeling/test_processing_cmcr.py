import io
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    ClapFeatureExtractor,
    CLIPImageProcessorPil,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)
from transformers.dynamic_module_utils import get_imports

import cmcr_hf.modeling.processing_cmcr as processing
from cmcr_hf.modeling.configuration_cmcr import CMCRConfig
from cmcr_hf.modeling.modeling_cmcr import CMCRModel
from cmcr_hf.modeling.processing_cmcr import CMCRProcessor, load_audio, load_image

RATE = 8000  # of the tiny sources, whose window is one second
HOP = 64
FRAMES = RATE // HOP + 1
BOS, EOS, PAD = 1, 2, 0


@pytest.fixture(scope="module")
def processor(tiny_clip: Path, tiny_clap: Path) -> CMCRProcessor:
    return CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap)


@pytest.fixture(scope="module")
def fused(tiny_clip: Path, tiny_fused_clap: Path) -> CMCRProcessor:
    return CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_fused_clap)


@pytest.fixture(scope="module")
def siglip_folder(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SigLIP of 12 text positions, whose tokenizer names no length, as that of SigLIP 2 does not."""
    folder = tmp_path_factory.mktemp("sources") / "siglip"
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**text, "image_size": 16, "patch_size": 8}
    config = SiglipConfig(text_config={**text, "vocab_size": 40, "max_position_embeddings": 12}, vision_config=vision)
    SiglipModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip)
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip(siglip_folder: Path, tiny_clap: Path) -> CMCRProcessor:
    return CMCRProcessor.from_sources_pretrained(siglip_folder, tiny_clap)


def noise(samples: int, channels: int | None = None, seed: int = 0) -> np.ndarray:
    shape = samples if channels is None else (channels, samples)
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def encode_audio(samples: np.ndarray, rate: int = RATE, format: str = "WAV", subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def picture(height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode_image(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def rgb(image: Any) -> np.ndarray:
    return np.asarray(load_image(image))


def fused_mel(processor: CMCRProcessor, waveform: np.ndarray) -> np.ndarray:
    """Return the log-mel of the whole clip, `(frames, bins)`."""
    extractor = processor.feature_extractor
    return extractor._np_extract_fbank_features(waveform, extractor.mel_filters)


# Text


def test_a_missing_second_tokenizer_is_an_error_and_not_the_first_one(tiny_clip, tiny_clap, tmp_path):
    CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap).save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "clap_tokenizer")
    with pytest.raises(ValueError, match="has no folder 'clap_tokenizer'"):
        CMCRProcessor.from_pretrained(tmp_path)


def test_each_source_is_read_at_its_own_revision(tiny_clip, tiny_clap, monkeypatch):
    asked = {}

    def recording(original):
        def from_pretrained(name, *arguments, **options):
            asked.setdefault(Path(name).name, set()).add(options.get("revision"))
            return original(name, *arguments, **options)

        return from_pretrained

    for auto_class in (AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer):
        monkeypatch.setattr(auto_class, "from_pretrained", recording(auto_class.from_pretrained))
    CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap, revisions={"clip": "1234", "clap": "abcd"})
    assert asked == {"clip": {"1234"}, "clap": {"abcd"}}


def test_text_goes_through_the_tokenizer_of_clip_by_default(processor: CMCRProcessor) -> None:
    inputs = processor(text=["a dog barks", "sea"])
    assert inputs["input_ids"].tolist() == [[BOS, 4, 6, 11, EOS], [BOS, 9, EOS, PAD, PAD]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert torch.equal(processor(text=["a dog barks", "sea"], space="clip")["input_ids"], inputs["input_ids"])


def test_each_space_has_a_tokenizer_and_a_length_of_its_own(processor: CMCRProcessor) -> None:
    text = "dog " * 100
    assert processor(text=text)["input_ids"].tolist() == [[BOS, *[6] * 18, EOS]]
    assert processor(text=text, space="clap")["input_ids"].tolist() == [[BOS, *[6] * 28, EOS]]


def test_texts_of_clap_are_cut_to_77_tokens_where_its_tokenizer_allows_more(tiny_clip: Path, tiny_clap: Path) -> None:
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap)
    processor.clap_tokenizer.model_max_length = 512
    assert processor(text="dog " * 100, space="clap")["input_ids"].tolist() == [[BOS, *[6] * 75, EOS]]


def test_one_text_equals_a_list_of_one(processor: CMCRProcessor) -> None:
    assert torch.equal(processor(text="a dog")["input_ids"], processor(text=["a dog"])["input_ids"])


def test_an_empty_text_is_its_special_tokens(processor: CMCRProcessor) -> None:
    assert processor(text="")["input_ids"].tolist() == [[BOS, EOS]]


def test_siglip_pads_to_the_positions_of_its_text_tower(siglip: CMCRProcessor) -> None:
    assert siglip.clip_padding == "max_length"
    assert siglip(text="a dog")["input_ids"].tolist() == [[BOS, 4, 6, EOS, *[PAD] * 8]]
    assert siglip(text="dog " * 50)["input_ids"].tolist() == [[BOS, *[6] * 10, EOS]]


def test_siglip_attends_to_its_padding(siglip: CMCRProcessor) -> None:
    assert set(siglip(text="a dog")) == {"input_ids"}
    assert set(siglip(text="a dog", space="clap")) == {"input_ids", "attention_mask"}


def test_a_text_of_siglip_embeds_the_same_alone_and_in_a_batch(siglip: CMCRProcessor, siglip_folder: Path) -> None:
    model = SiglipModel.from_pretrained(siglip_folder).eval()
    with torch.no_grad():
        alone = model.get_text_features(**siglip(text="sea")).pooler_output
        batch = model.get_text_features(**siglip(text=["a small red dog barks", "sea"])).pooler_output
    assert torch.allclose(alone[0], batch[1], rtol=0, atol=1e-6)


def test_the_usual_call_of_hugging_face_processors_works(processor: CMCRProcessor, siglip: CMCRProcessor) -> None:
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "truncation": True}
    inputs = processor(text=["a dog", "sea"], images=Image.new("RGB", (8, 8)), **options)
    assert inputs["input_ids"].tolist() == [[BOS, 4, 6, EOS], [BOS, 9, EOS, PAD]]
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert siglip(text="a dog", **options)["input_ids"].shape == (1, 12)


@pytest.mark.parametrize(("space", "width"), [("clip", 20), ("clap", 30)])
def test_padding_to_the_length_of_the_source(processor: CMCRProcessor, space: str, width: int) -> None:
    inputs = processor(text="a dog", space=space, padding="max_length")
    assert inputs["input_ids"].tolist() == [[BOS, 4, 6, EOS, *[PAD] * (width - 4)]]
    assert inputs["attention_mask"].sum() == 4


@pytest.mark.parametrize("option", [{"padding": False}, {"padding": "do_not_pad"}, {"truncation": False}])
def test_padding_and_truncation_that_no_source_takes(processor: CMCRProcessor, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Expected {next(iter(option))}=True"):
        processor(text="a dog", **option)


def test_siglip_refuses_padding_to_the_longest_text(siglip: CMCRProcessor) -> None:
    with pytest.raises(ValueError, match="reads the last position"):
        siglip(text="a dog", padding="longest")


@pytest.mark.parametrize("text", [[], 5, b"a", ["a", None], {"a": 1}, [["a", "b"]]])
def test_text_that_is_no_text(processor: CMCRProcessor, text: Any) -> None:
    with pytest.raises(ValueError, match="Expected text as a string or a non-empty list of strings"):
        processor(text=text)


def test_text_that_no_file_can_hold(processor: CMCRProcessor) -> None:
    with pytest.raises(ValueError, match="Expected text that UTF-8 can encode"):
        processor(text=["a", "\ud800"])


def test_an_unknown_space(processor: CMCRProcessor) -> None:
    with pytest.raises(ValueError, match="got 'audio'"):
        processor(text="a", space="audio")


def test_nothing_to_prepare(processor: CMCRProcessor) -> None:
    with pytest.raises(ValueError, match="Expected at least one of text, images and audio"):
        processor()


# Images


@pytest.mark.parametrize("kind", ["path", "string", "bytes", "bytearray", "array", "tensor", "dict", "dict path"])
def test_every_form_of_an_image_gives_the_same_pixels(processor: CMCRProcessor, tmp_path: Path, kind: str) -> None:
    array = picture()
    image = Image.fromarray(array)
    path = tmp_path / "bild ü.png"
    path.write_bytes(encode_image(image))
    forms = {
        "path": path,
        "string": str(path),
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "array": array,
        "tensor": torch.from_numpy(array).permute(2, 0, 1),
        "dict": {"bytes": path.read_bytes(), "path": "elsewhere.png"},
        "dict path": {"bytes": None, "path": str(path)},
    }
    expected = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})(image)
    assert np.array_equal(processor(images=forms[kind])["pixel_values"].numpy(), expected["pixel_values"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_floats_in_0_to_1_are_pixels(dtype: type) -> None:
    array = picture()
    assert np.array_equal(rgb((array / 255).astype(dtype)), array)


def test_half_precision_tensors_are_pixels() -> None:
    image = torch.tensor([0.0, 1.0, 0.5]).bfloat16()[:, None, None].expand(3, 4, 5)
    assert rgb(image)[2, 3].tolist() == [0, 255, 128]


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 1), (1, 6, 7)])
def test_grey_arrays_become_three_equal_channels(shape: tuple[int, ...]) -> None:
    grey = picture(6, 7)[:, :, 0]
    assert np.array_equal(rgb(grey.reshape(shape)), np.stack([grey] * 3, axis=2))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (3, 5), (5, 3), (3, 3)])
def test_small_images_keep_their_axes(processor: CMCRProcessor, size: tuple[int, int]) -> None:
    array = picture(*size)
    assert np.array_equal(rgb(array), array)
    assert np.array_equal(rgb(torch.from_numpy(array).permute(2, 0, 1)), array)
    red = np.zeros_like(array)
    red[:, :, 0] = 255
    pixels = processor(images=Image.fromarray(red))["pixel_values"]
    expected = (np.array([1.0, 0.0, 0.0]) - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    assert np.allclose(pixels[0].mean(dim=(1, 2)).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 7, [7, 7, 7]),
        ("LA", (7, 0), [7, 7, 7]),
        ("1", 1, [255, 255, 255]),
        ("RGBA", (1, 2, 3, 0), [1, 2, 3]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("I;16", 0x8042, [0x80, 0x80, 0x80]),
    ],
)
def test_every_colour_mode_becomes_rgb(mode: str, colour: Any, expected: list[int]) -> None:
    assert rgb(Image.new(mode, (2, 3), colour))[2, 1].tolist() == expected


def test_a_palette_gives_its_colours() -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert rgb(encode_image(image))[1, 1].tolist() == [10, 20, 30]


def test_sixteen_bit_files_keep_their_greys() -> None:
    image = Image.fromarray(np.array([[0, 1000, 40000, 65535]], dtype=np.uint16))
    assert rgb(encode_image(image))[0, :, 1].tolist() == [0, 3, 156, 255]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"got pillow's mode '{mode}'"):
        load_image(Image.new(mode, (2, 2)))


def test_the_orientation_of_the_camera_is_applied() -> None:
    image = Image.fromarray(picture(2, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    assert np.array_equal(rgb(encode_image(image, exif=exif)), np.rot90(picture(2, 3), k=-1))


def test_a_datasets_column_is_a_batch(processor: CMCRProcessor) -> None:
    pictures = [encode_image(Image.fromarray(picture(seed + 9))) for seed in range(3)]
    clips = [encode_audio(noise(500, seed=seed)) for seed in range(3)]
    rows = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": item, "path": None} for item in pictures],
            "audio": [{"bytes": item, "path": None} for item in clips],
            "text": ["a", "dog", "cat"],
        }
    ).cast_column("image", datasets.Image())
    inputs = processor(text=rows["text"], images=rows["image"], audio=rows["audio"])
    expected = processor(text=["a", "dog", "cat"], images=pictures, audio=clips)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert len(inputs["pixel_values"]) == 3


@pytest.mark.parametrize(
    "image",
    [
        None,
        5,
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 3, 3), np.uint8),
        torch.zeros(2, 3, 4, 4),
        np.array(["a"]),
        ["a.png"],
    ],
    ids=["none", "number", "four channels", "empty", "batch", "text", "nested"],
)
def test_an_image_of_a_wrong_kind(processor: CMCRProcessor, image: Any) -> None:
    with pytest.raises(ValueError, match="Expected a PIL image, path, bytes or array"):
        processor(images=[image])


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (np.full((4, 4, 3), np.nan), "float64 from nan to nan"),
        (np.full((4, 4, 3), 255.0), "float64 from 255.0 to 255.0"),
        (np.full((4, 4, 3), -0.5), "float64 from -0.5 to -0.5"),
        (np.zeros((4, 4, 3), np.int64), "int64 from 0 to 0"),
        (np.zeros((4, 4, 3), bool), "bool"),
    ],
)
def test_an_image_of_a_wrong_range(processor: CMCRProcessor, image: np.ndarray, got: str) -> None:
    with pytest.raises(ValueError, match=f"uint8 in 0..255 or floats in 0..1, got {got}"):
        processor(images=image)


def test_no_images(processor: CMCRProcessor) -> None:
    with pytest.raises(ValueError, match="Expected at least one image"):
        processor(images=[])


# Files of both kinds


def truncated_jpeg() -> bytes:
    return encode_image(Image.fromarray(picture()), "JPEG")[:900]


@pytest.mark.parametrize("modality", ["images", "audio"])
@pytest.mark.parametrize(
    ("name", "reason"), [("missing.bin", "No such file"), (".", "Is a directory"), ("nul\0.bin", "null byte")]
)
def test_a_file_that_cannot_be_opened_is_named(
    processor: CMCRProcessor, tmp_path: Path, modality: str, name: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        processor(**{modality: str(tmp_path / name)})
    assert repr(str(tmp_path / name)) in str(caught.value)


@pytest.mark.parametrize(
    ("modality", "content", "reason"),
    [
        ("images", truncated_jpeg(), "truncated"),
        ("images", b"hello", "no image"),
        ("images", b"", "empty"),
        ("audio", b"hello", "Format not recognised"),
        ("audio", b"", "empty"),
        ("audio", encode_audio(noise(0)), "empty"),
        ("audio", encode_audio(noise(500))[:30], "damaged"),
        ("audio", encode_audio(noise(500))[:1000], "ends before the length that it declares"),
        ("audio", encode_audio(noise(5000), format="FLAC", subtype="PCM_16")[:4000], "damaged"),
        ("audio", encode_audio(noise(5000), format="MP3", subtype="MPEG_LAYER_III")[:1500], "ends before"),
        ("audio", encode_audio(np.array([0.0, np.nan, 0.5])), "NaN"),
        ("audio", encode_audio(np.array([[0.0, 0.0], [np.inf, -np.inf]])), "infinity"),
    ],
)
@pytest.mark.parametrize("form", ["path", "bytes", "datasets dict"])
def test_a_damaged_file_is_named(
    processor: CMCRProcessor, tmp_path: Path, modality: str, content: bytes, reason: str, form: str
) -> None:
    path = tmp_path / "item.bin"
    path.write_bytes(content)
    item = {"path": path, "bytes": content, "datasets dict": {"bytes": content, "path": str(path)}}[form]
    with pytest.raises(ValueError, match=reason) as caught:
        processor(**{modality: [item]})
    assert (str(path) in str(caught.value)) == (form != "bytes")
    assert " at 0x" not in str(caught.value)


def test_an_image_that_pillow_opened_lazily_is_named(processor: CMCRProcessor, tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(truncated_jpeg())
    with Image.open(path) as image, pytest.raises(ValueError, match="truncated") as caught:
        processor(images=image)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("modality", ["images", "audio"])
@pytest.mark.parametrize("url", ["http://example.org/a.wav", "HTTPS://example.org/a.jpg", "hf://datasets/a/b.png"])
def test_a_url_is_an_error_without_network(
    processor: CMCRProcessor, monkeypatch: pytest.MonkeyPatch, modality: str, url: str
) -> None:
    def connect(*args: Any) -> None:
        raise AssertionError("Expected no connection.")

    monkeypatch.setattr(socket, "socket", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    with pytest.raises(ValueError, match="as a local file, got the URL") as caught:
        processor(**{modality: url})
    assert url in str(caught.value)


@pytest.mark.parametrize("modality", ["images", "audio"])
@pytest.mark.parametrize("item", [{}, {"bytes": None, "path": None}, {"url": "a"}])
def test_a_dict_that_holds_nothing(processor: CMCRProcessor, modality: str, item: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got the keys"):
        processor(**{modality: [item]})


# Audio as a waveform


class Decoder:
    """What `datasets` gives for a row of an Audio column: torchcodec's decoder, of which two attributes are used."""

    sample_rate = 4000

    def __init__(self, data: np.ndarray) -> None:
        self.data = torch.from_numpy(data)

    def get_all_samples(self) -> "Decoder":
        return self


@pytest.mark.parametrize(
    "form", ["path", "string", "bytes", "array", "tensor", "dict", "dict path", "dict bytes", "decoder"]
)
def test_every_form_of_a_clip_gives_the_same_waveform(tmp_path: Path, form: str) -> None:
    samples = noise(3000)
    path = tmp_path / "ton ü.wav"
    path.write_bytes(encode_audio(samples, 4000))
    forms: dict[str, Any] = {
        "path": path,
        "string": str(path),
        "bytes": path.read_bytes(),
        "array": samples,
        "tensor": torch.from_numpy(samples),
        "dict": {"array": samples, "sampling_rate": 4000, "path": "elsewhere.wav"},
        "dict path": {"bytes": None, "path": str(path)},
        "dict bytes": {"bytes": path.read_bytes(), "path": None},
        "decoder": Decoder(samples[None]),
    }
    rate = 4000 if form in ("array", "tensor") else None
    assert np.array_equal(load_audio(forms[form], RATE, rate), soxr.resample(samples, 4000, RATE, quality="HQ"))


def test_a_file_knows_its_rate_better_than_the_call() -> None:
    assert len(load_audio(encode_audio(noise(4000), 4000), RATE, rate=16000)) == 8000


@pytest.mark.parametrize("rate", [4000, 11025, 16000, 22050, 44100, 48000, 96000, np.int64(16000), 16000.0])
def test_a_tone_of_any_rate_keeps_its_pitch_and_level(rate: Any) -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(int(rate)) / float(rate)).astype(np.float32)
    waveform = load_audio(tone, RATE, rate)
    assert waveform.dtype == np.float32
    assert abs(len(waveform) - RATE) <= 1
    expected = np.sin(2 * np.pi * 1000 * np.arange(len(waveform)) / RATE)
    assert np.abs(waveform - expected)[400:-400].max() < 1e-3


def test_the_rate_of_a_torch_formatted_row_is_a_tensor() -> None:
    samples = noise(100)
    row = {"array": torch.from_numpy(samples), "sampling_rate": torch.tensor(RATE)}
    assert np.array_equal(load_audio(row, RATE), samples)


@pytest.mark.parametrize("channels", [1, 2, 8])
@pytest.mark.parametrize("layout", ["channels first", "channels last", "file"])
def test_channels_are_averaged_in_every_layout(channels: int, layout: str) -> None:
    samples = noise(300, channels)
    forms = {"channels first": samples, "channels last": samples.T, "file": encode_audio(samples.T)}
    assert np.allclose(load_audio(forms[layout], RATE, RATE), samples.mean(axis=0), atol=1e-7)


def test_a_stereo_array_is_one_clip(processor: CMCRProcessor) -> None:
    assert len(processor(audio=noise(300, 2), sampling_rate=RATE)["input_features"]) == 1


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", ">i2"])
def test_integers_are_scaled_by_the_range_of_their_type(dtype: str) -> None:
    limits = np.iinfo(np.dtype(dtype))
    middle = (int(limits.max) + int(limits.min) + 1) // 2
    quarter = (int(limits.max) - middle + 1) // 4
    samples = np.array([limits.min, middle - quarter, middle, middle + quarter, limits.max]).astype(dtype)
    expected = [-1, -0.25, 0, 0.25, 1 - 1 / (4 * quarter)]
    assert load_audio(samples, RATE, RATE) == pytest.approx(expected, abs=1e-6)
    if dtype != ">i2":
        assert load_audio(torch.from_numpy(samples), RATE, RATE) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("convert", [torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.double])
def test_floats_of_any_width_are_samples(convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
    samples = torch.tensor([0.5, -0.25, 0.125])
    assert load_audio(convert(samples), RATE, RATE).tolist() == samples.tolist()


@pytest.mark.parametrize("order", [slice(None, None, -1), slice(None, None, 2)])
def test_strided_views_equal_their_copies(order: slice) -> None:
    samples = noise(400)[order]
    assert np.array_equal(load_audio(samples, RATE, 16000), load_audio(samples.copy(), RATE, 16000))


def test_an_array_is_left_as_it_was(processor: CMCRProcessor) -> None:
    samples = noise(300, 2)
    before = samples.copy()
    processor(audio=samples, sampling_rate=16000)
    assert np.array_equal(samples, before)


@pytest.mark.parametrize("rate", [RATE, 4000, 96000])
def test_a_clip_of_one_sample_is_a_clip(processor: CMCRProcessor, rate: int) -> None:
    features = processor(audio=np.array([0.5], np.float32), sampling_rate=rate)["input_features"]
    assert features.shape == (1, 1, FRAMES, 16)
    assert torch.isfinite(features).all()


def test_a_wave_that_a_pipe_wrote_without_a_length_is_read() -> None:
    data = bytearray(encode_audio(noise(500), subtype="PCM_16"))
    for start in (4, data.index(b"data") + 4):
        data[start : start + 4] = b"\xff\xff\xff\xff"
    assert len(load_audio(bytes(data), RATE)) == 500


def test_a_header_that_declares_more_than_memory_holds_is_an_error() -> None:
    data = bytearray(encode_audio(noise(500), format="FLAC", subtype="PCM_16"))
    data[21] |= 0x0F  # the highest bits of the count of samples
    with pytest.raises(ValueError, match="Cannot read the audio"):
        load_audio(bytes(data), RATE)


@given(st.lists(st.floats(width=32), max_size=40), st.sampled_from([RATE, 3000, 44100]), st.integers(1, 3))
def test_any_floats_give_finite_samples_or_an_error(values: list[float], rate: int, channels: int) -> None:
    samples = np.tile(np.array(values, np.float32), (channels, 1))
    try:
        waveform = load_audio(samples, RATE, rate)
    except ValueError as error:
        assert not values or not np.abs(values).max() < 1e10, error
    else:
        assert np.abs(values).max() < 1e10
        assert len(waveform) > 0
        assert np.isfinite(waveform).all()


def test_the_loudest_samples_that_are_taken_give_finite_features(fused: CMCRProcessor) -> None:
    features = fused(audio=np.full(20000, 9e9, np.float32), sampling_rate=RATE)["input_features"]
    assert torch.isfinite(features).all()


def test_samples_that_overflow_are_an_error_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for samples in (np.array([1e300, 0.0]), np.full((3, 2), 3e38, np.float32), np.array([[np.inf], [-np.inf]])):
            with pytest.raises(ValueError, match="infinity"):
                load_audio(samples, RATE, RATE)


@pytest.mark.parametrize(
    "audio",
    [
        None,
        np.array(["a"]),
        np.ones(5, bool),
        np.ones(5, complex),
        np.ones((2, 2, 2)),
        np.array([0.5, None]),
        torch.ones(1, 2, 3),
    ],
    ids=["none", "text", "bool", "complex", "three axes", "none among numbers", "batch"],
)
def test_audio_of_a_wrong_kind(processor: CMCRProcessor, audio: Any) -> None:
    with pytest.raises(ValueError, match="Expected audio as a path, bytes or numeric array"):
        processor(audio=[audio], sampling_rate=RATE)


def test_whole_numbers_without_a_range_are_refused(processor: CMCRProcessor) -> None:
    with pytest.raises(ValueError, match="8, 16 or 32 bits, got int64"):
        processor(audio=np.array([100, -200]), sampling_rate=RATE)


@pytest.mark.parametrize("audio", [[0.1, 0.2], [1, 2]])
def test_a_list_of_numbers_is_no_batch(processor: CMCRProcessor, audio: list[float]) -> None:
    with pytest.raises(ValueError, match="got a list of numbers"):
        processor(audio=audio, sampling_rate=RATE)


def test_no_clips(processor: CMCRProcessor) -> None:
    with pytest.raises(ValueError, match="Expected at least one audio clip"):
        processor(audio=[], sampling_rate=RATE)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 2), (0, 0)])
def test_an_array_without_samples(processor: CMCRProcessor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="the audio is empty"):
        processor(audio=np.zeros(shape, np.float32), sampling_rate=RATE)


@pytest.mark.parametrize("audio", [noise(10), torch.ones(10), {"array": noise(10)}], ids=["array", "tensor", "dict"])
def test_an_array_needs_a_rate(processor: CMCRProcessor, audio: Any) -> None:
    with pytest.raises(ValueError, match="Pass sampling_rate="):
        processor(audio=audio)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), True, np.True_, "8000", [8000], 1, 1e12])
def test_a_rate_that_is_none(processor: CMCRProcessor, rate: Any) -> None:
    with pytest.raises(ValueError, match="Expected a sampling rate from 100 to 10000000 Hz"):
        processor(audio=noise(10), sampling_rate=rate)


# Audio features


@pytest.mark.parametrize("samples", [1, 100, 3000, 7999, RATE])
@pytest.mark.parametrize("mode", ["fused", "unfused"])
def test_clips_within_the_window_equal_those_of_the_extractor(
    processor: CMCRProcessor, fused: CMCRProcessor, samples: int, mode: str
) -> None:
    prepare = fused if mode == "fused" else processor
    clip = noise(samples)
    inputs = prepare(audio=clip, sampling_rate=RATE)
    expected = prepare.feature_extractor(clip, sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert torch.equal(inputs["input_features"], expected)
    assert inputs["is_longer"].tolist() == [[False]]


@pytest.mark.parametrize("samples", [RATE + 1, RATE + HOP - 1])
def test_a_fused_clip_less_than_a_hop_over_the_window_equals_that_of_the_extractor(
    fused: CMCRProcessor, samples: int
) -> None:
    clip = noise(samples)
    inputs = fused(audio=clip, sampling_rate=RATE)
    expected = fused.feature_extractor(clip, sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert torch.equal(inputs["input_features"], expected)
    assert inputs["is_longer"].tolist() == [[False]]


# With 1, 2 and 3 hops over the window there are as few possible starts as thirds, or fewer.
@pytest.mark.parametrize(
    ("samples", "starts"),
    [(RATE + HOP, [0, 1, 0]), (RATE + 2 * HOP, [0, 1, 2]), (RATE + 3 * HOP, [0, 2, 3]), (20000, [31, 94, 156])],
)
def test_a_long_fused_clip_gives_its_whole_and_the_middle_of_each_third(
    fused: CMCRProcessor, samples: int, starts: list[int]
) -> None:
    clip = noise(samples)
    inputs = fused(audio=clip, sampling_rate=RATE)
    mel = torch.from_numpy(np.ascontiguousarray(fused_mel(fused, clip)))
    shrunk = torch.nn.functional.interpolate(mel[None, None], (FRAMES, 16), mode="bilinear", align_corners=False)
    assert torch.equal(inputs["input_features"][0, 0], shrunk[0, 0])
    for channel, start in zip(inputs["input_features"][0, 1:], starts, strict=True):
        assert torch.equal(channel, mel[start : start + FRAMES])
    assert inputs["is_longer"].tolist() == [[True]]


def test_the_extractor_could_have_drawn_those_starts(fused: CMCRProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = noise(20000)
    monkeypatch.setattr(np.random, "choice", lambda starts: starts[(len(starts) - 1) // 2])
    # transformers shrinks to 64 bins, whatever their number; the chunks are the rest.
    theirs = []
    monkeypatch.setattr(np, "stack", lambda channels, axis: theirs.extend(channels) or np.zeros(1))
    fused.feature_extractor._random_mel_fusion(fused_mel(fused, clip), 20000 // HOP + 1, FRAMES)
    monkeypatch.undo()
    ours = fused(audio=clip, sampling_rate=RATE)["input_features"][0].numpy()
    assert all(np.array_equal(ours[i], theirs[i]) for i in (1, 2, 3))


@pytest.mark.parametrize(("samples", "start"), [(RATE + 1, 0), (RATE + 2, 1), (20000, 6000)])
def test_a_long_unfused_clip_gives_the_window_in_its_middle(
    processor: CMCRProcessor, samples: int, start: int
) -> None:
    clip = noise(samples)
    inputs = processor(audio=clip, sampling_rate=RATE)
    middle = processor(audio=clip[start : start + RATE], sampling_rate=RATE)
    assert torch.equal(inputs["input_features"], middle["input_features"])
    assert inputs["is_longer"].tolist() == [[True]]


@pytest.mark.parametrize("mode", ["fused", "unfused"])
def test_an_item_is_bit_equal_alone_and_in_a_batch(processor: CMCRProcessor, fused: CMCRProcessor, mode: str) -> None:
    prepare = fused if mode == "fused" else processor
    clips = [noise(samples, seed=samples) for samples in (20000, 500, RATE, 9000)]
    images = [picture(20, 30), picture(64, 32), picture(32, 32), picture(1, 1)]
    batch = prepare(audio=clips, images=images, sampling_rate=RATE)
    for row, (clip, image) in enumerate(zip(clips, images, strict=True)):
        alone = prepare(audio=clip, images=image, sampling_rate=RATE)
        assert all(torch.equal(alone[name][0], batch[name][row]) for name in batch)


@pytest.mark.parametrize("mode", ["fused", "unfused"])
def test_preparing_twice_gives_the_same_whatever_was_drawn(
    processor: CMCRProcessor, fused: CMCRProcessor, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = fused if mode == "fused" else processor
    clips = [noise(20000), noise(500)]
    first = prepare(audio=clips, sampling_rate=RATE)
    state = np.random.get_state()
    try:
        for seed in range(3):
            np.random.seed(seed)
            again = prepare(audio=clips, sampling_rate=RATE)
            assert all(torch.equal(first[name], again[name]) for name in first)
    finally:
        np.random.set_state(state)


def test_is_longer_follows_from_the_clip_and_not_from_the_batch(fused: CMCRProcessor) -> None:
    clips = [noise(samples) for samples in (500, RATE, RATE + HOP - 1, RATE + HOP, 20000)]
    assert fused(audio=clips, sampling_rate=RATE)["is_longer"].tolist() == [[False]] * 3 + [[True]] * 2
    assert fused(audio=clips[:2], sampling_rate=RATE)["is_longer"].tolist() == [[False]] * 2


def test_length_is_measured_at_the_rate_of_the_extractor(fused: CMCRProcessor) -> None:
    assert fused(audio=noise(15000), sampling_rate=16000)["is_longer"].tolist() == [[False]]
    assert fused(audio=noise(15000), sampling_rate=RATE)["is_longer"].tolist() == [[True]]


def test_embeddings_of_a_fused_model_do_not_depend_on_the_batch(
    fused: CMCRProcessor, tiny_clip: Path, tiny_fused_clap: Path
) -> None:
    model = CMCRModel.from_sources_pretrained(
        clip=tiny_clip, clap=tiny_fused_clap, config={"projection_dim": 8}
    ).eval()
    clips = [noise(samples, seed=samples) for samples in (500, 20000, RATE, 9000, 3000)]
    with torch.no_grad():
        batch = model.get_audio_features(**fused(audio=clips, sampling_rate=RATE)).pooler_output
        short = model.get_audio_features(**fused(audio=clips[::2], sampling_rate=RATE)).pooler_output
        alone = [model.get_audio_features(**fused(audio=clip, sampling_rate=RATE)).pooler_output[0] for clip in clips]
    assert (batch - torch.stack(alone)).abs().max() < 1e-6
    assert (batch[::2] - short).abs().max() < 1e-6
    assert (batch[0] - batch[2]).abs().max() > 1e-4  # they are different clips


def test_arrays_come_back_as_asked_for(processor: CMCRProcessor) -> None:
    clip, image = noise(500), picture()
    inputs = processor(text="a dog", audio=clip, images=image, sampling_rate=RATE, return_tensors="np")
    assert {name: (value.dtype.name, value.shape) for name, value in inputs.items()} == {
        "input_ids": ("int64", (1, 4)),
        "attention_mask": ("int64", (1, 4)),
        "pixel_values": ("float32", (1, 3, 32, 32)),
        "input_features": ("float32", (1, 1, FRAMES, 16)),
        "is_longer": ("bool", (1, 1)),
    }
    assert set(processor.model_input_names) >= set(inputs)


def test_real_recordings_and_pictures_are_prepared_alike_from_path_and_bytes(
    shared: Path, processor: CMCRProcessor
) -> None:
    clip, image = shared / "official" / "BBQ.wav", shared / "official" / "BBQ.jpeg"
    from_path = processor(audio=clip, images=image)
    from_bytes = processor(audio=clip.read_bytes(), images=image.read_bytes())
    assert all(torch.equal(from_path[name], from_bytes[name]) for name in from_path)
    samples, rate = soundfile.read(clip, dtype="float32", always_2d=True)
    as_array = processor(audio=samples, sampling_rate=rate)
    assert torch.equal(as_array["input_features"], from_path["input_features"])


# Saving, loading and travelling


@pytest.mark.parametrize("load", [CMCRProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_a_saved_processor_comes_back_whole(
    siglip_folder: Path, tiny_fused_clap: Path, tmp_path: Path, load: Callable[..., Any]
) -> None:
    import cmcr_hf  # noqa: F401  (it registers the classes)

    processor = CMCRProcessor.from_sources_pretrained(siglip_folder, tiny_fused_clap)
    processor.clap_max_length = 9
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(CMCRConfig().to_json_string())
    loaded = load(tmp_path)
    assert type(loaded) is CMCRProcessor
    assert (loaded.clip_padding, loaded.clap_max_length) == ("max_length", 9)
    assert (loaded.tokenizer.model_max_length, loaded.clap_tokenizer.model_max_length) == (12, 30)
    assert type(loaded.image_processor) is SiglipImageProcessorPil
    assert type(loaded.feature_extractor) is ClapFeatureExtractor
    assert loaded.feature_extractor.truncation == "fusion"
    items = {"text": ["dog " * 30, "sea"], "images": picture(), "audio": noise(20000), "sampling_rate": RATE}
    for space in ("clip", "clap"):
        before, after = processor(**items, space=space), loaded(**items, space=space)
        assert set(before) == set(after)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_saved_files_do_not_depend_on_what_was_prepared(tiny_clip: Path, tiny_clap: Path, tmp_path: Path) -> None:
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap)
    processor.save_pretrained(tmp_path / "before")
    for space in ("clip", "clap"):
        processor(text=["a dog", "sea"], space=space)
    processor.save_pretrained(tmp_path / "after")
    before = {path.relative_to(tmp_path / "before"): path for path in (tmp_path / "before").rglob("*.*")}
    assert Path("clap_tokenizer/tokenizer.json") in before
    for name, path in before.items():
        assert (tmp_path / "after" / name).read_bytes() == path.read_bytes(), name


def test_a_loaded_processor_asks_for_the_pil_backend(
    processor: CMCRProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorder:
        @staticmethod
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            loaded.append((AutoImageProcessor.from_pretrained(*args, **kwargs), kwargs["backend"]))
            return loaded[-1][0]

    loaded: list[tuple[Any, str]] = []
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr(processing, "AutoImageProcessor", Recorder)
    image_processor = CMCRProcessor.from_pretrained(tmp_path).image_processor
    assert [backend for _, backend in loaded] == ["pil"]
    assert image_processor is loaded[0][0]


def test_a_loaded_processor_keeps_the_pil_backend_beside_torchvision(processor: CMCRProcessor, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    processor.save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is not CLIPImageProcessorPil
    assert type(CMCRProcessor.from_pretrained(tmp_path).image_processor) is CLIPImageProcessorPil


def test_a_length_given_when_loading_replaces_the_saved_one(processor: CMCRProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    assert CMCRProcessor.from_pretrained(tmp_path, clap_max_length=5)(text="dog " * 9, space="clap")[
        "input_ids"
    ].tolist() == [[BOS, 6, 6, 6, EOS]]


def test_an_unknown_padding_is_an_error(processor: CMCRProcessor) -> None:
    parts = (processor.image_processor, processor.feature_extractor, processor.tokenizer, processor.clap_tokenizer)
    with pytest.raises(ValueError, match="got 'left'"):
        CMCRProcessor(*parts, clip_padding="left")


def test_a_source_without_a_vocabulary_is_named(tiny_clip: Path, tiny_clap: Path, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((tiny_clip / name).read_bytes())
    with pytest.raises(ValueError, match="vocabulary file is missing") as caught:
        CMCRProcessor.from_sources_pretrained(tmp_path, tiny_clap)
    assert str(tmp_path) in str(caught.value)


def test_the_file_travels_with_torch_transformers_and_numpy_alone() -> None:
    imports = set(get_imports(processing.__file__))
    standard = {"__future__", "collections", "io", "numbers", "os", "re", "typing"}
    assert imports - standard == {"numpy", "torch", "transformers"}
