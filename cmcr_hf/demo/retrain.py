"""Train the small CLIP and CLAP of the offline world on its own picture-caption and sound-caption pairs.

Synthetic data throughout. The two models never see each other's data, start from different seeds and have different
tokenizers, so their spaces are unconnected, as those of published CLIP and CLAP weights are.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    PreTrainedTokenizerFast,
)

from .apart import train_apart
from .captions import concept_phrase, image_caption, sound_caption
from .concepts import CONCEPTS
from .drawing import draw
from .pretraining import (
    MAX_TOKENS,
    PROJECTION_DIM,
    CaptionedPictures,
    accuracy,
    class_chance,
    class_retrieval,
    corpus,
    embed_texts,
    folder_bytes,
    initialised,
    picture_features,
    relabelled_map,
    save,
    train_clip,
    train_on_captions,
    unit,
    wrapped,
    write_figures,
)
from .synthesis import SAMPLING_RATE, synthesise
from .world import distinct_texts, stream

logger = logging.getLogger(__name__)

_BATCH = 128

_PICTURES = CaptionedPictures({name: concept.colours for name, concept in CONCEPTS.items()}, draw, image_caption)


def retrain(
    output: Path,
    *,
    seed: int = 0,
    pictures: int = 800,
    sounds: int = 800,
    clip_steps: int = 1000,
    clap_steps: int = 1200,
    held_out: int = 50,
) -> dict[str, Any]:
    """Train both encoders and write them to `output/clip` and `output/clap`, with `output/figures.json`.

    `pictures`, `sounds` and `held_out` are counts for each concept, the last one of each kind for the figures. The
    weights are float16; the figures are of the written weights, loaded back as float32. Training items, figure items
    and the files of a world come from different random streams. The result is the same for the same seed on one
    machine. Each encoder trains in a process of its own with one thread. A run that is stopped leaves what is in
    `output` as it was, but for an encoder that is done; the next one begins anew.

    Returns the content of `figures.json`.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    minutes = train_apart(
        clip=(_train_clip, output / "clip", seed, pictures, clip_steps),
        clap=(_train_clap, output / "clap", seed, sounds, clap_steps),
    )
    figures = {
        "data": "trained on synthetic data",
        "seed": seed,
        "pictures_per_concept": pictures,
        "sounds_per_concept": sounds,
        "clip_steps": clip_steps,
        "clap_steps": clap_steps,
        "batch": _BATCH,
        "minutes": minutes,
        **measure(output, seed=seed, held_out=held_out),
    }
    write_figures(output, figures)
    return figures


def measure(folder: Path, *, seed: int = 0, held_out: int = 50) -> dict[str, Any]:
    """Measure the encoders in `folder/clip` and `folder/clap` on items that no training has seen.

    `zero_shot_accuracy` compares each picture or sound with the plain phrases of the concepts; `text_accuracy` does so
    for the texts of a world, in each text tower. `unconnected_audio_to_image` ranks CLIP's pictures by the cosine with
    CLAP's sounds, without any connection: `chance` is the expectation of a random order and `relabelled_map` the same
    ranking over 100 random matchings of the concepts, within whose spread an unconnected one is to lie.
    """
    clip = AutoModel.from_pretrained(folder / "clip", dtype=torch.float32)
    clap = AutoModel.from_pretrained(folder / "clap", dtype=torch.float32)
    clip_tokenizer = AutoTokenizer.from_pretrained(folder / "clip")
    clap_tokenizer = AutoTokenizer.from_pretrained(folder / "clap")
    image_processor = AutoImageProcessor.from_pretrained(folder / "clip", backend="pil")
    feature_extractor = AutoFeatureExtractor.from_pretrained(folder / "clap")
    pixels, _ = picture_features(image_processor, _PICTURES, seed, "figure_images", held_out)
    mels = _sound_features(feature_extractor, seed, "figure_sounds", held_out)
    labels = torch.arange(len(CONCEPTS)).repeat_interleave(held_out)
    phrases = [concept_phrase(concept) for concept in CONCEPTS]
    texts = [
        line for concept in CONCEPTS for line in distinct_texts(concept, held_out, seed=seed, split="figure_texts")
    ]
    with torch.inference_mode():
        images = unit(torch.cat([clip.get_image_features(part.float()).pooler_output for part in pixels.split(256)]))
        audio = unit(torch.cat([clap.get_audio_features(part.float()).pooler_output for part in mels.split(256)]))
        clip_phrases, clip_texts = (embed_texts(clip, clip_tokenizer, lines) for lines in (phrases, texts))
        clap_phrases, clap_texts = (embed_texts(clap, clap_tokenizer, lines) for lines in (phrases, texts))
    return {
        "concepts": len(CONCEPTS),
        "held_out_per_concept": held_out,
        "zero_shot_accuracy": {
            "clip": accuracy(images, clip_phrases, labels),
            "clap": accuracy(audio, clap_phrases, labels),
        },
        "text_accuracy": {
            "clip": accuracy(clip_texts, clip_phrases, labels),
            "clap": accuracy(clap_texts, clap_phrases, labels),
        },
        "unconnected_audio_to_image": class_retrieval(audio, images, labels),
        "relabelled_map": relabelled_map(audio, images, labels, seed),
        "chance": class_chance(labels),
        "bytes": folder_bytes(folder, "clip", "clap"),
    }


def _sound_features(extractor: Any, seed: int, split: str, count: int) -> torch.Tensor:
    """Return half-precision log-mel features, `count` a concept in the order of the concepts."""
    frames = extractor.nb_max_samples // extractor.hop_length + 1
    features = torch.empty(len(CONCEPTS) * count, 1, frames, extractor.feature_size, dtype=torch.float16)
    items = [(concept, index) for concept in CONCEPTS for index in range(count)]
    for row, (concept, index) in enumerate(tqdm(items, desc=f"Synthesising {split}", unit="sound")):
        samples = synthesise(concept, stream(seed, split, concept, index))
        # One clip at a time, as a batch would in some modes mark a random clip as longer.
        inputs = extractor(samples, sampling_rate=SAMPLING_RATE, return_tensors="pt")
        features[row] = inputs["input_features"][0]
    return features


def _train_clip(folder: Path, seed: int, pictures: int, steps: int) -> None:
    random = stream(seed, "clip_training", "", 0)
    train_clip(
        folder,
        _PICTURES,
        random,
        seed=seed,
        split="clip_training_images",
        count=pictures,
        steps=steps,
        batch=_BATCH,
        text_hidden_size=96,
        vision_hidden_size=112,
    )


def _train_clap(folder: Path, seed: int, sounds: int, steps: int) -> None:
    random = stream(seed, "clap_training", "", 0)
    tokenizer = _clap_tokenizer(corpus(list(CONCEPTS), sound_caption, random))
    extractor = ClapFeatureExtractor(
        feature_size=32,
        sampling_rate=SAMPLING_RATE,
        hop_length=256,
        max_length_s=2,
        fft_window_size=1024,
        frequency_min=50,
        frequency_max=SAMPLING_RATE // 2,
        truncation="rand_trunc",
        padding="repeatpad",
    )
    config = ClapConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            # RoBERTa counts positions from one after the padding id.
            "max_position_embeddings": MAX_TOKENS + tokenizer.pad_token_id + 1,
            "layer_norm_eps": 1e-5,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        audio_config={
            "num_mel_bins": 32,
            "spec_size": 64,
            "window_size": 8,
            "patch_size": 4,
            "patch_stride": [4, 4],
            "patch_embeds_hidden_size": 48,
            "hidden_size": 96,
            "depths": [2, 2],
            "num_attention_heads": [2, 4],
            "num_hidden_layers": 2,
            "num_classes": len(CONCEPTS),
            "mlp_ratio": 3.0,
            "hidden_dropout_prob": 0.0,
            "enable_fusion": False,
        },
        projection_dim=PROJECTION_DIM,
    )
    features = _sound_features(extractor, seed, "clap_training_sounds", sounds)

    def caption(row: int) -> str:
        return sound_caption(list(CONCEPTS)[row // sounds], random)

    model = initialised(ClapModel, config, random)
    train_on_captions(
        model, "input_features", features, caption, tokenizer, random, steps, "Training CLAP", batch=_BATCH
    )
    save(folder, model, tokenizer, extractor)


def _clap_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """Train byte-level byte-pair encoding with RoBERTa's specials and ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=760,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, "<s>", "</s>", "<pad>", "<unk>")


def main(arguments: list[str] | None = None) -> None:
    """Run the retraining from the command line."""
    parser = argparse.ArgumentParser(description="Train the small encoders of the offline world on synthetic data.")
    parser.add_argument("--output", type=Path, required=True, help="folder for clip/, clap/ and figures.json")
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        help="of data, weights and order (default: %(default)s, that of the shipped ones)",
    )
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logger.info("%s", json.dumps(retrain(parsed.output, seed=parsed.seed), indent=2))


if __name__ == "__main__":
    main()
