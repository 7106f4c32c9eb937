import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)
from transformers.dynamic_module_utils import get_imports

import cmcr_hf.modeling.processing_cmcr as processing
from cmcr_hf.modeling.clap_extraction_cmcr import CMCRFeatureExtractor
from cmcr_hf.modeling.configuration_cmcr import CMCRConfig
from cmcr_hf.modeling.processing_cmcr import CMCRProcessor
from tests.media import RATE, encode_audio, encode_image, noise, picture

BOS, EOS, PAD = 1, 2, 0


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


ORDINARY = [
    "a dog barks",
    "",
    "  ",
    "Ein Hund\tbellt\n",
    "狗叫",
    "كلب ينبح",
    "\u202e\u05e9\u05dc\u05d5\u05dd",
    "👩\u200d👩\u200d👧 e\u0301",
    "a\0b\x07",
    "<b>",
]


def byte_tokenizer(space: str) -> CLIPTokenizer | RobertaTokenizer:
    """A tokenizer as CLIP's or CLAP's, whose words are bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if space == "clip":
        words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=20)
    words = ["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"]
    return RobertaTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=30)


@pytest.fixture(scope="module")
def bytewise(tiny_clip: Path, tiny_clap: Path) -> CMCRProcessor:
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap)
    processor.tokenizer, processor.clap_tokenizer = byte_tokenizer("clip"), byte_tokenizer("clap")
    return processor


@pytest.mark.parametrize("space", ["clip", "clap"])
def test_ordinary_texts_are_those_of_the_tokenizer(bytewise: CMCRProcessor, space: str) -> None:
    inputs = bytewise(text=ORDINARY, space=space)
    length = {"clip": 20, "clap": 30}[space]
    expected = byte_tokenizer(space)(ORDINARY, padding=True, truncation=True, max_length=length, return_tensors="pt")
    assert set(inputs) == set(expected)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("space", "text", "end"), [("clip", "a <|endoftext|> b", "<|endoftext|>"), ("clap", "a </s> b<pad>", "</s>")]
)
def test_a_special_token_that_a_text_spells_is_no_special_token(
    bytewise: CMCRProcessor, space: str, text: str, end: str
) -> None:
    tokenizer = byte_tokenizer(space)
    ids = bytewise(text=text, space=space)["input_ids"][0].tolist()
    assert tokenizer.convert_tokens_to_ids(end) in tokenizer(text)["input_ids"][1:-1]
    assert not set(ids[1:-1]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")


def test_a_vocabulary_that_holds_special_tokens_as_words_does_not_take_them(processor: CMCRProcessor) -> None:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in "▁ab")]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=3))
    unigram.normalizer = normalizers.NFKC()
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram, model_max_length=20, **specials)
    prepare = CMCRProcessor(
        processor.image_processor, processor.feature_extractor, tokenizer, processor.clap_tokenizer
    )
    assert prepare(text=["ab", "c"])["input_ids"].tolist() == [[5, 6], [3, 1]]
    for text in ("a</s>b", "a\uff1c/s\uff1eb"):
        with pytest.raises(ValueError, match=r"Expected text without any of .*</s>"):
            prepare(text=["ab", text])


def test_of_each_text_256_characters_a_token_are_read(processor: CMCRProcessor) -> None:
    blanks = " " * (256 * 20 - 3)
    assert processor(text=[blanks + "dog dog", "dog " * 10**6])["input_ids"].tolist() == [
        [BOS, 6, EOS, *[PAD] * 17],
        [BOS, *[6] * 18, EOS],
    ]


def test_a_set_of_texts_has_no_order(processor: CMCRProcessor) -> None:
    with pytest.raises(ValueError, match="Expected text as a string or a non-empty list of strings"):
        processor(text={"a", "dog"})


def test_texts_may_come_from_a_generator(processor: CMCRProcessor) -> None:
    assert processor(text=(word for word in ["sea", "dog"]))["input_ids"].tolist() == [[BOS, 9, EOS], [BOS, 6, EOS]]


def test_text_that_no_file_can_hold(processor: CMCRProcessor) -> None:
    with pytest.raises(ValueError, match="Expected text that UTF-8 can encode"):
        processor(text=["a", "\ud800"])


def test_an_unknown_space(processor: CMCRProcessor) -> None:
    with pytest.raises(ValueError, match="got space='audio'"):
        processor(text="a", space="audio")


def test_nothing_to_prepare(processor: CMCRProcessor) -> None:
    with pytest.raises(ValueError, match="Expected at least one of text, images, audio and point_clouds"):
        processor()


# Files of both kinds


def truncated_jpeg() -> bytes:
    return encode_image(Image.fromarray(picture()), "JPEG")[:900]


@pytest.mark.parametrize("modality", ["images", "audio"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing.bin", "No such file"), (".", "Is a directory"), ("nul\0.bin", "null (byte|character)")],
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
        ("images", b"<!DOCTYPE html><title>404</title>", "no image"),
        ("images", b"\xff\xd8\xff\xe0", "damaged"),
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
    # Encoded bytes would be names, and differ from process to process.
    ids=range(14),
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
def test_a_pipe_is_an_error_and_no_wait(processor: CMCRProcessor, tmp_path: Path, modality: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="it is a pipe or device") as caught:
        processor(**{modality: tmp_path / "pipe"})
    assert "pipe'" in str(caught.value)


@pytest.mark.parametrize("modality", ["images", "audio"])
def test_content_in_place_of_a_path_is_an_error_of_bounded_length(processor: CMCRProcessor, modality: str) -> None:
    with pytest.raises(ValueError, match="File name too long") as caught:
        processor(**{modality: "data:image/png;base64," + "A" * 10**6})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("modality", ["images", "audio"])
@pytest.mark.parametrize("item", [(number for number in [1, 2]), object(), {1, 2}], ids=["generator", "object", "set"])
def test_an_item_that_is_nothing_of_the_kind(processor: CMCRProcessor, modality: str, item: Any) -> None:
    with pytest.raises(ValueError, match=f"got {type(item).__name__}"):
        processor(**{modality: [item]}, sampling_rate=RATE)


@pytest.mark.parametrize("modality", ["images", "audio"])
def test_rows_of_unequal_length_are_an_error(processor: CMCRProcessor, modality: str) -> None:
    with pytest.raises(ValueError, match="Expected an array of equal rows"):
        processor(**{modality: [[[0.1, 0.2], [0.3]]]}, sampling_rate=RATE)


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
    assert type(loaded.feature_extractor) is CMCRFeatureExtractor
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


def test_the_second_image_processor_is_of_the_pil_backend_too(
    processor: CMCRProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OfTorchvision(CLIPImageProcessorPil):
        pass

    monkeypatch.setattr("transformers.CLIPImageProcessor", OfTorchvision, raising=False)
    CMCRProcessor(ulip_image_processor=CLIPImageProcessorPil(size={"shortest_edge": 24})).save_pretrained(tmp_path)
    loaded = CMCRProcessor.from_pretrained(tmp_path).ulip_image_processor
    assert type(loaded) is CLIPImageProcessorPil
    assert loaded.size == {"shortest_edge": 24}


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


@pytest.mark.parametrize(
    "path", sorted(Path(processing.__file__).parent.glob("*_cmcr.py")), ids=lambda path: path.stem
)
def test_the_files_travel_with_torch_transformers_and_numpy_alone(path: Path) -> None:
    assert set(get_imports(path)) - set(sys.stdlib_module_names) <= {
        "huggingface_hub",
        "numpy",
        "torch",
        "transformers",
    }
