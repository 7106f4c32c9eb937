"""Train both source models side by side and load them: a space of images and texts, a space of sounds and texts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from .captions import IMAGE_TEMPLATES, SOUND_PHRASES, SOUND_TEMPLATES, Captioner, image_phrases
from .data import read_images, read_sounds, read_texts
from .models import SmallAudioTextModel, SmallDualEncoder, SmallDualEncoderConfig, SmallImageTextModel
from .training import SourceTraining, augment_images, augment_sounds, train_source
from .word_vectors import subword_tokenizer, token_vectors, word_tokenizer

# Folders of the two models, and the classes that load them.
WORD_DIM = 192
SOURCES = {"clip": SmallImageTextModel, "clap": SmallAudioTextModel}


def train_sources(data: Path, folder: Path, settings: dict[str, SourceTraining]) -> None:
    """Train the models that `folder` lacks, each in a process of its own with one thread, and save them there."""
    missing = [space for space in SOURCES if not (folder / space).is_dir()]
    if not missing:
        return
    before = os.environ.get("OMP_NUM_THREADS")
    # Two processes of one thread do not wait for each other, as the threads of one process do.
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with ProcessPoolExecutor(len(missing), mp_context=get_context("spawn")) as pool:
            trainings = [pool.submit(_train, space, data, folder, settings[space]) for space in missing]
            for training in trainings:
                training.result()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _train(space: str, data: Path, folder: Path, settings: SourceTraining) -> None:
    torch.set_num_threads(1)
    train = {"clip": _train_image_text, "clap": _train_audio_text}[space]
    model, tokenizer = train(data, settings)
    temporary = folder / f".{space}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    temporary.rename(folder / space)


def _train_image_text(data: Path, settings: SourceTraining) -> tuple[SmallDualEncoder, PreTrainedTokenizerFast]:
    images, texts = read_images(data), read_texts(data)
    phrases = [image_phrases(*names) for names in zip(images.labels, images.class_concepts, strict=True)]
    corpus = [*texts.sound_captions, *texts.image_captions, *texts.labels, *texts.sentences, *chain(*phrases)]
    tokenizer = word_tokenizer(corpus, vocab_size=10_000)
    vectors = token_vectors(tokenizer, corpus, dim=WORD_DIM, window=5, generator=_generator(settings))
    config = SmallDualEncoderConfig(channels=3, text_tower="bag-of-words")
    model = _initialised(SmallImageTextModel, config, vectors, settings.seed)
    captioner = Captioner(phrases, IMAGE_TEMPLATES, texts.image_captions)
    train_source(model, tokenizer, images.training, captioner, augment_images, settings, name="image-text", line=0)
    return model, tokenizer


def _train_audio_text(data: Path, settings: SourceTraining) -> tuple[SmallDualEncoder, PreTrainedTokenizerFast]:
    sounds, texts = read_sounds(data), read_texts(data)
    phrases = [SOUND_PHRASES[label].split("|") for label in sounds.labels]
    corpus = [*texts.sound_captions, *texts.labels, *texts.sentences, *texts.image_captions, *chain(*phrases)]
    tokenizer = subword_tokenizer(corpus, vocab_size=6_000)
    vectors = token_vectors(tokenizer, corpus, dim=WORD_DIM, window=8, generator=_generator(settings))
    config = SmallDualEncoderConfig(channels=1, stem_stride=(2, 4), mean=110.0, std=60.0, text_tower="attention")
    model = _initialised(SmallAudioTextModel, config, vectors, settings.seed)
    captioner = Captioner(phrases, SOUND_TEMPLATES, texts.sound_captions)
    train_source(model, tokenizer, sounds.training, captioner, augment_sounds, settings, name="audio-text", line=1)
    return model, tokenizer


def _generator(settings: SourceTraining) -> torch.Generator:
    return torch.Generator().manual_seed(settings.seed)


def _initialised(
    kind: type[SmallDualEncoder], config: SmallDualEncoderConfig, vectors: torch.Tensor, seed: int
) -> SmallDualEncoder:
    """Build a model of random weights on top of word vectors."""
    config.vocab_size, config.word_dim = vectors.shape
    with torch.random.fork_rng(devices=[]):
        # PreTrainedModel draws its weights from the global generator.
        torch.manual_seed(seed)
        model = kind(config)
    with torch.no_grad():
        model.text_tower.embedding.weight.copy_(vectors)
    return model


def load_source(folder: Path, space: str) -> tuple[SmallDualEncoder, PreTrainedTokenizerFast]:
    """Load a trained model, in eval mode, and its tokenizer."""
    model = SOURCES[space].from_pretrained(folder / space)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder / space)


@torch.inference_mode()
def embed_items(model: SmallDualEncoder, values: torch.Tensor) -> torch.Tensor:
    """Embed images or log-mels, uint8: `(n, projection_dim)` float32 unit rows."""
    features = getattr(model, f"get_{model.item_modality}_features")
    return F.normalize(torch.cat([features(part.float()).pooler_output for part in values.split(128)]), dim=1)


@torch.inference_mode()
def embed_texts(model: SmallDualEncoder, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """Embed texts: `(n, projection_dim)` float32 unit rows."""
    embeds: list[torch.Tensor] = []
    for start in range(0, len(texts), 512):
        part = tokenizer(list(texts[start : start + 512]), padding=True, truncation=True, return_tensors="pt")
        embeds.append(model.get_text_features(part["input_ids"])["pooler_output"])
    return F.normalize(torch.cat(embeds), dim=1)
