import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

import cmcr_hf.modeling.image_loading_cmcr as image_loading
from cmcr_hf.modeling.feature_extraction_cmcr import extract_image, extract_images
from cmcr_hf.modeling.image_loading_cmcr import load_image
from cmcr_hf.modeling.processing_cmcr import CMCRProcessor
from tests.media import encode_audio, encode_image, noise, peak_growth, picture


def rgb(image: Any) -> np.ndarray:
    return np.asarray(load_image(image))


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
        ("I;16B", 0x8042, [0x80, 0x80, 0x80]),
        ("RGBa", (1, 2, 3, 255), [1, 2, 3]),
        ("RGBX", (1, 2, 3, 0), [1, 2, 3]),
        ("HSV", (0, 255, 255), [255, 0, 0]),
        ("YCbCr", (255, 128, 128), [255, 255, 255]),
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


@pytest.mark.parametrize("mode", ["I", "F", "La"])
def test_pixels_without_a_range_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"got pillow's mode '{mode}'"):
        load_image(Image.new(mode, (2, 2)))


@pytest.mark.parametrize("transparency", [0, b"\0\x80\xff"])
def test_a_palette_with_transparency_gives_its_colours_without_a_warning(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rgb(encode_image(image, transparency=transparency))[1, 1].tolist() == [10, 20, 30]


def test_a_jpeg_of_inverted_cmyk_keeps_its_colours() -> None:
    # As Adobe's programs do, pillow writes the inverse, and says so in an Adobe marker.
    data = encode_image(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    assert np.abs(rgb(data)[4, 4].astype(int) - [255, 0, 0]).max() <= 2


def test_a_colour_profile_is_not_applied() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert np.array_equal(rgb(encode_image(Image.fromarray(picture()), icc_profile=profile)), picture())


# What each orientation of EXIF asks a viewer to do.
ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored.swapaxes(0, 1), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_orientation_of_the_camera_is_applied_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = load_image(encode_image(Image.fromarray(picture(2, 3)), exif=exif))
    assert np.array_equal(np.asarray(upright), ORIENTATIONS[orientation](picture(2, 3)))
    assert np.array_equal(rgb(upright), np.asarray(upright))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0junk",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x09",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",
    ],
    ids=["no tiff", "cut off", "orientation 99"],
)
def test_an_image_whose_exif_is_damaged_is_shown_as_stored(exif: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(rgb(encode_image(Image.fromarray(picture(2, 3)), exif=exif)), picture(2, 3))


@pytest.mark.parametrize("format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_animations_and_documents_the_first_frame_counts(format: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode_image(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert rgb(data)[1, 1].tolist() == [255, 0, 0]


def test_the_content_decides_on_the_format(tmp_path: Path) -> None:
    path = tmp_path / "named.jpg"
    path.write_bytes(encode_image(Image.fromarray(picture())))
    assert np.array_equal(rgb(path), picture())


def test_a_postscript_program_is_not_run() -> None:
    with pytest.raises(ValueError, match="got a PostScript program"):
        load_image(encode_image(Image.fromarray(picture()), "EPS"))


def test_an_image_of_pillow_is_left_as_it_was() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encode_image(Image.fromarray(picture(2, 3)), exif=exif)))
    load_image(image).putpixel((0, 0), (0, 0, 0))
    assert image.getexif()[0x0112] == 6
    assert np.array_equal(np.asarray(image), picture(2, 3))


# Sizes


def declared(side: int) -> bytes:
    """A PNG whose header says `side` x `side` pixels."""
    data = encode_image(Image.new("1", (1, 1)))
    header = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize("side", [9460, 20_000])
def test_too_many_pixels_are_refused_with_the_remedy_and_without_a_warning(tmp_path: Path, side: int) -> None:
    (tmp_path / "map.png").write_bytes(declared(side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"map\.png' with 1 to 89478485 pixels, got") as caught:
            load_image(tmp_path / "map.png")
    assert "baseline JPEG" in str(caught.value)
    assert (f"{side} x {side}" if side < 10_000 else f"{side**2} pixels") in str(caught.value)


@pytest.mark.parametrize("image", [Image.new("1", (9460, 9460)), Image.new("L", (0, 5))], ids=["large", "empty"])
def test_the_limit_holds_for_images_of_pillow(image: Image.Image) -> None:
    with pytest.raises(ValueError, match=f"got {image.width} x {image.height}"):
        load_image(image)


def test_the_limit_holds_for_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_loading, "MAX_PIXELS", 1999)
    with pytest.raises(ValueError, match="got 50 x 40"):
        load_image(picture())


@pytest.mark.parametrize(("limit", "size"), [(5120, (80, 64)), (5119, (40, 32)), (1279, (20, 16)), (319, (10, 8))])
def test_a_jpeg_above_the_limit_is_decoded_at_a_fraction(
    monkeypatch: pytest.MonkeyPatch, limit: int, size: tuple[int, int]
) -> None:
    smooth = Image.fromarray(picture(6, 8)).resize((80, 64), Image.Resampling.BICUBIC)
    monkeypatch.setattr(image_loading, "MAX_PIXELS", limit)
    loaded = load_image(encode_image(smooth, "JPEG", quality=95))
    assert loaded.size == size
    assert np.abs(np.asarray(loaded).mean((0, 1)) - np.asarray(smooth).mean((0, 1))).max() < 2


def test_a_jpeg_in_several_scans_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = encode_image(Image.fromarray(picture()), "JPEG")
    start = baseline.index(b"\xff\xda\0\x0c\x03")
    separate = baseline[:start] + b"\xff\xda\0\x08\x01" + baseline[start + 5 : start + 7] + baseline[start + 11 :]
    monkeypatch.setattr(image_loading, "MAX_PIXELS", 1999)
    assert load_image(baseline).size == (25, 20)
    for data in (encode_image(Image.fromarray(picture()), "JPEG", progressive=True), separate):
        with pytest.raises(ValueError, match="got 50 x 40"):
            load_image(data)


def test_an_image_file_of_more_bytes_than_any_image_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_image(Image.fromarray(picture()))
    monkeypatch.setattr(image_loading, "MAX_BYTES", len(data))
    load_image(data)
    with pytest.raises(ValueError, match=f"at most {len(data)} bytes, got {len(data) + 1}"):
        load_image(data + b"\0")


@pytest.mark.parametrize("size", [(31, 992), (992, 31), (2, 64)])
def test_long_images_are_those_of_the_image_processor(processor: CMCRProcessor, size: tuple[int, int]) -> None:
    expected = processor.image_processor(Image.fromarray(picture(*size)), return_tensors="np")["pixel_values"]
    assert np.array_equal(processor(images=picture(*size), return_tensors="np")["pixel_values"], expected)


PROCESSORS = {
    "CLIP": CLIPImageProcessorPil(),
    "SigLIP": SiglipImageProcessorPil(size={"height": 96, "width": 64}),
    "bilinear, other mean": CLIPImageProcessorPil(resample=2, image_mean=0.25, image_std=0.5, rescale_factor=1 / 127),
    "no normalise": CLIPImageProcessorPil(do_normalize=False),
    "no rescale": CLIPImageProcessorPil(do_rescale=False),
    "no resize": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 20, "width": 31}),
    "no crop": CLIPImageProcessorPil(do_center_crop=False, size={"height": 50, "width": 77}),
    "crop that pads": CLIPImageProcessorPil(crop_size={"height": 300, "width": 300}),
    "longest edge": CLIPImageProcessorPil(size={"shortest_edge": 60, "longest_edge": 80}, do_center_crop=False),
    "bytes": CLIPImageProcessorPil(do_rescale=False, do_normalize=False),
}


@pytest.mark.parametrize("size", [(40, 50), (225, 224), (37, 411), (333, 641)])
@pytest.mark.parametrize("name", list(PROCESSORS))
def test_pixels_are_bit_equal_to_those_of_the_image_processor(name: str, size: tuple[int, int]) -> None:
    image, processor = Image.fromarray(picture(*size)), PROCESSORS[name]
    expected = processor(image, return_tensors="np")["pixel_values"]
    found = extract_images([image, image.rotate(180)], processor)["pixel_values"]
    assert found.dtype == expected.dtype
    assert np.array_equal(found[:1], expected)
    assert np.array_equal(found[1:], processor(image.rotate(180), return_tensors="np")["pixel_values"])


def test_an_image_processor_with_steps_of_its_own_is_called() -> None:
    class Brighter(CLIPImageProcessorPil):
        def normalize(self, image: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
            return image + image.mean()

    image = Image.fromarray(picture())
    expected = Brighter()(image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(extract_image(image, Brighter())["pixel_values"], expected)
    assert not np.array_equal(extract_image(image, CLIPImageProcessorPil())["pixel_values"], expected)


class TorchvisionLike(CLIPImageProcessorPil):
    """Calls and results of a processor of the torchvision backend, which lacks here."""

    backend = "torchvision"
    batches: ClassVar[list[int]] = []

    def __call__(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> Any:
        assert return_tensors == "pt"
        self.batches.append(len(images))
        features = super().__call__(images, return_tensors=return_tensors, **kwargs)
        return features.__class__({"pixel_values": features["pixel_values"] + 1})


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_an_image_processor_of_torchvision_is_given_all_images_at_once(kind: str) -> None:
    images = [picture(), picture(64, 32)]
    theirs = TorchvisionLike()
    theirs.batches.clear()
    found = CMCRProcessor(image_processor=theirs)(images=images, return_tensors=kind)["pixel_values"]
    expected = CMCRProcessor(image_processor=CLIPImageProcessorPil())(images=images)["pixel_values"] + 1
    assert theirs.batches == [2]
    assert isinstance(found, torch.Tensor if kind == "pt" else np.ndarray)
    assert torch.equal(torch.as_tensor(found), expected)


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (3, 5001)])
def test_of_a_strip_the_middle_counts(processor: CMCRProcessor, size: tuple[int, int]) -> None:
    array = picture(*size)
    height, width = (min(side, 32 * min(size)) for side in size)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    expected = processor(images=array[top : top + height, left : left + width])["pixel_values"]
    assert torch.equal(processor(images=array)["pixel_values"], expected)


def test_a_strip_is_given_whole_to_a_processor_that_crops_nothing() -> None:
    siglip = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    expected = siglip(Image.fromarray(picture(1, 1000)), return_tensors="np")["pixel_values"][0]
    assert np.array_equal(extract_image(picture(1, 1000), siglip)["pixel_values"], expected)


@pytest.mark.slow
def test_the_memory_that_a_large_jpeg_takes_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(encode_image(Image.new("L", (12_000, 12_000)), "JPEG"))
    load = "from cmcr_hf.modeling.image_loading_cmcr import load_image as run"
    # Decoded at its size, it is 144 MB, and 576 MB as RGB.
    assert peak_growth(load, tmp_path / "large.jpg") < 300e6


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
