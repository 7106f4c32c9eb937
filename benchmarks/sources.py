"""What benchmarks embed, and with what: SYNTHETIC items of common sizes, sources with RANDOM weights of real sizes.

Speed depends on neither. `--sources FOLDER` puts other sources in place of the random ones.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from cmcr_hf import UlipConfig, UlipModel

# Different files of a kind; more are links to them.
DISTINCT = 16
SPECIALS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def add_sources_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sources", type=Path, help="folder of the sources clip, clap and ulip (default: random ones of real size)"
    )


def quiet_transformers() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def captions(number: int) -> list[str]:
    """Make up captions whose lengths are spread as those of AudioCaps and CC3M are: 4 to 40 words, mostly 7 to 15."""
    generator = np.random.default_rng(0)
    consonants, vowels = list("bdfgklmnprst"), list("aeiou")
    words = ["".join(generator.choice(consonants) + generator.choice(vowels) for _ in range(3)) for _ in range(2000)]
    lengths = np.exp(generator.normal(np.log(10), 0.4, number)).round().clip(4, 40).astype(int)
    return [" ".join(generator.choice(words, length)) for length in lengths]


def write_captions(path: Path, number: int) -> list[str]:
    texts = captions(number)
    path.write_text("\n".join(texts), encoding="utf-8")
    return texts


def write_images(folder: Path, number: int) -> list[Path]:
    """Write JPEGs of 640 x 480."""
    generator = np.random.default_rng(0)

    def write(path: Path) -> None:
        coarse = Image.fromarray(generator.integers(0, 256, (30, 40, 3), np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=85)

    return _write(folder, number, ".jpg", write)


def write_clips(folder: Path, number: int, seconds: int) -> list[Path]:
    """Write FLACs of 44.1 kHz stereo."""
    generator = np.random.default_rng(0)

    def write(path: Path) -> None:
        steps = generator.normal(0, 0.05, (seconds * 44100, 2))
        smooth = np.cumsum(steps, axis=0) * np.exp(-np.arange(len(steps)) % 4410 / 2000)[:, None]
        soundfile.write(path, (smooth / np.abs(smooth).max()).astype(np.float32), 44100)

    return _write(folder, number, ".flac", write)


def write_clouds(folder: Path, number: int) -> list[Path]:
    """Write clouds of 10,000 points as `.npy`."""
    generator = np.random.default_rng(0)
    return _write(folder, number, ".npy", lambda path: np.save(path, generator.normal(size=(10_000, 3)).astype("f4")))


def _write(folder: Path, number: int, suffix: str, write: Callable[[Path], object]) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{index:05d}{suffix}" for index in range(number)]
    for index, path in enumerate(paths):
        if index < DISTINCT:
            write(path)
        else:
            os.link(paths[index % DISTINCT], path)
    return paths


def write_sources(folder: Path, spaces: tuple[str, ...] = ("clip", "clap")) -> Path:
    """Write models of the sizes of CLIP ViT-B/32, a fused CLAP HTSAT-tiny and ULIP-2's PointBERT, and what reads."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    # The defaults of transformers are the models' own sizes.
    if "clip" in spaces:
        CLIPModel(CLIPConfig(text_config=ids)).save_pretrained(folder / "clip")
        CLIPImageProcessorPil().save_pretrained(folder / "clip")
        tokenizer.save_pretrained(folder / "clip")
    if "clap" in spaces:
        ClapModel(ClapConfig(text_config=ids, audio_config={"enable_fusion": True})).save_pretrained(folder / "clap")
        ClapFeatureExtractor(truncation="fusion", frequency_min=50).save_pretrained(folder / "clap")
        tokenizer.save_pretrained(folder / "clap")
    if "ulip" in spaces:
        UlipModel(UlipConfig()).save_pretrained(folder / "ulip")
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(models.BPE(unk_token=SPECIALS["unk_token"]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    names = list(SPECIALS.values())
    model.train_from_iterator(
        captions(2000), trainers.BpeTrainer(vocab_size=4000, special_tokens=names, show_progress=False)
    )
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, names.index(name)) for name in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=77, **SPECIALS)
