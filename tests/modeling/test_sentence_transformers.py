import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from cmcr_hf import CMCRModel, CMCRProcessor

sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")

RATE = 8000  # of the tiny source
TEXTS = ["a dog barks", "the sea", "a loud bell rings"]


def pictures():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40 + row, 50, 3), np.uint8)) for row in range(3)]


def clips():
    generator = np.random.default_rng(0)
    # Shorter than a window, and longer.
    return [generator.normal(0, 0.1, length).astype(np.float32) for length in (3000, RATE, 20000)]


@pytest.fixture(scope="module")
def encoder(tiny_model):
    return sentence_transformers.SentenceTransformer(str(tiny_model), device="cpu")


@pytest.fixture(scope="module")
def model(tiny_model):
    return CMCRModel.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def processor(tiny_model):
    return CMCRProcessor.from_pretrained(tiny_model)


def assert_embeds(found, expected):
    # It sorts by length, so its batches are others.
    np.testing.assert_allclose(found, expected.detach(), atol=1e-6)


def test_encode_embeds_texts(encoder, model, processor):
    expected = model.get_text_features(**processor(text=TEXTS)).pooler_output
    assert_embeds(encoder.encode(TEXTS), expected)
    assert_embeds(encoder.encode(TEXTS[1]), expected[1])


def test_encode_embeds_images_and_their_paths(encoder, model, processor, tmp_path):
    for row, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{row}.png")
    expected = model.get_image_features(**processor(images=pictures())).pooler_output
    assert_embeds(encoder.encode(pictures()), expected)
    assert_embeds(encoder.encode([str(tmp_path / f"{row}.png") for row in range(3)]), expected)


def test_encode_embeds_audio_and_its_paths(encoder, model, processor, tmp_path):
    for row, clip in enumerate(clips()):
        soundfile.write(tmp_path / f"{row}.wav", clip, RATE, subtype="FLOAT")
    expected = model.get_audio_features(**processor(audio=clips(), sampling_rate=RATE)).pooler_output
    assert_embeds(encoder.encode([{"array": clip, "sampling_rate": RATE} for clip in clips()]), expected)
    assert_embeds(encoder.encode([str(tmp_path / f"{row}.wav") for row in range(3)]), expected)


def test_encode_resamples_audio(encoder, model, processor):
    expected = model.get_audio_features(**processor(audio=clips(), sampling_rate=16000)).pooler_output
    assert_embeds(encoder.encode([{"array": clip, "sampling_rate": 16000} for clip in clips()]), expected)


def test_audio_without_a_rate_is_an_error(encoder):
    with pytest.raises(ValueError, match="no sampling rate of its own"):
        encoder.encode(clips())


def test_similarity_is_that_of_the_shared_space(encoder, model, processor):
    sounds = encoder.encode([{"array": clip, "sampling_rate": RATE} for clip in clips()])
    output = model(**processor(images=pictures(), audio=clips(), sampling_rate=RATE))
    expected = output.audio_embeds @ output.image_embeds.T
    assert torch.allclose(encoder.similarity(sounds, encoder.encode(pictures())), expected, atol=1e-6)


def test_an_encoder_saves_a_model_that_loads_again(encoder, model, tmp_path):
    encoder.save_pretrained(str(tmp_path))
    again = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert np.array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
