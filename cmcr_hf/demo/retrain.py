"""Train the small CLIP and CLAP of the offline world on its own picture-caption and sound-caption pairs.

Synthetic data throughout. The two models never see each other's data, start from different seeds and have different
tokenizers, so their spaces are unconnected, as those of published CLIP and CLAP weights are.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
)

from ..durable import clear_replacement, named_write_errors, replace_folder, temporary_path, write_durably
from ..evaluation.retrieval import chance, label_retrieval
from .captions import concept_phrase, image_caption, sound_caption
from .concepts import CONCEPTS
from .drawing import IMAGE_SIZE, draw
from .synthesis import SAMPLING_RATE, synthesise
from .world import distinct_texts, stream

logger = logging.getLogger(__name__)

PROJECTION_DIM = 128
_MAX_TOKENS = 40
_BATCH = 128
_PEAK_LEARNING_RATE = 1e-3
_LARGEST_LOGIT_SCALE = 100.0


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
    context = get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    with (
        reader,
        writer,
        _one_thread_each(),
        ProcessPoolExecutor(2, mp_context=context, initializer=_end_with_parent, initargs=(reader,)) as pool,
    ):
        try:
            clip = pool.submit(_train_clip, output / "clip", seed, pictures, clip_steps)
            clap = pool.submit(_train_clap, output / "clap", seed, sounds, clap_steps)
            minutes = {"clip": round(clip.result(), 1), "clap": round(clap.result(), 1)}
        except BaseException:
            # Ends the other one too, which would train on.
            writer.close()
            raise
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
    write_durably(output / "figures.json", (json.dumps(figures, indent=2) + "\n").encode())
    return figures


def _end_with_parent(reader: Connection) -> None:
    """Leave Ctrl-C to the parent process, and end when that ends, in whatever way, or closes its end of the pipe."""

    def wait() -> None:
        with suppress(EOFError, OSError):
            reader.recv_bytes()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Start processes within this context with one thread each: two on two cores do not wait for each other."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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
    pixels, _ = _picture_features(image_processor, seed, "figure_images", held_out)
    mels = _sound_features(feature_extractor, seed, "figure_sounds", held_out)
    labels = torch.arange(len(CONCEPTS)).repeat_interleave(held_out)
    phrases = [concept_phrase(concept) for concept in CONCEPTS]
    texts = [
        line for concept in CONCEPTS for line in distinct_texts(concept, held_out, seed=seed, split="figure_texts")
    ]
    with torch.inference_mode():
        images = _unit(torch.cat([clip.get_image_features(part.float()).pooler_output for part in pixels.split(256)]))
        audio = _unit(torch.cat([clap.get_audio_features(part.float()).pooler_output for part in mels.split(256)]))
        clip_phrases, clip_texts = (_embed_texts(clip, clip_tokenizer, lines) for lines in (phrases, texts))
        clap_phrases, clap_texts = (_embed_texts(clap, clap_tokenizer, lines) for lines in (phrases, texts))

    def accuracy(embeds: torch.Tensor, prompts: torch.Tensor) -> float:
        return round(float(((embeds @ prompts.T).argmax(dim=1) == labels).float().mean()), 4)

    unconnected = label_retrieval(audio @ images.T, labels, labels, ks=(1,))
    # Concepts are clusters, and clusters of unconnected spaces meet by luck: this is the luck of other meetings.
    relabellings = []
    for index in range(100):
        order = stream(seed, "figure_relabellings", "", index).permutation(len(CONCEPTS))
        matching = label_retrieval(audio @ images.T, labels, torch.from_numpy(order)[labels], ks=(1,))
        relabellings.append(matching["mAP"])
    expected = chance(labels, labels, ks=(1,))
    return {
        "concepts": len(CONCEPTS),
        "held_out_per_concept": held_out,
        "zero_shot_accuracy": {"clip": accuracy(images, clip_phrases), "clap": accuracy(audio, clap_phrases)},
        "text_accuracy": {"clip": accuracy(clip_texts, clip_phrases), "clap": accuracy(clap_texts, clap_phrases)},
        "unconnected_audio_to_image": {name: round(value, 4) for name, value in unconnected.items()},
        "relabelled_map": {
            "mean": round(float(np.mean(relabellings)), 4),
            "standard_deviation": round(float(np.std(relabellings)), 4),
        },
        "chance": {name: round(value, 4) for name, value in expected.items()},
        "bytes": {
            name: sum(path.stat().st_size for path in sorted((folder / name).iterdir())) for name in ("clip", "clap")
        },
    }


def _unit(embeds: torch.Tensor) -> torch.Tensor:
    return functional.normalize(embeds, dim=-1)


def _embed_texts(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    tokens = _tokenise(tokenizer, texts)
    return _unit(model.get_text_features(**tokens).pooler_output)


def _tokenise(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def _picture_features(processor: Any, seed: int, split: str, count: int) -> tuple[torch.Tensor, list[str]]:
    """Return half-precision pixel values, `count` a concept in the order of the concepts, and the body colours."""
    features = torch.empty(len(CONCEPTS) * count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float16)
    colours = []
    items = [(concept, index) for concept in CONCEPTS for index in range(count)]
    for row, (concept, index) in enumerate(tqdm(items, desc=f"Drawing {split}", unit="picture")):
        random = stream(seed, split, concept, index)
        colour = str(random.choice(CONCEPTS[concept].colours))
        picture = draw(concept, random, colour=colour)
        features[row] = processor(picture, return_tensors="pt")["pixel_values"][0]
        colours.append(colour)
    return features, colours


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


def _train_clip(folder: Path, seed: int, pictures: int, steps: int) -> float:
    start = time.perf_counter()
    random = stream(seed, "clip_training", "", 0)
    tokenizer = _clip_tokenizer(_corpus(image_caption, random))
    processor = CLIPImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False)
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": _MAX_TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            # The id 2 would make CLIP pool at the largest token id instead of at this token.
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "hidden_size": 112,
            "intermediate_size": 336,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        projection_dim=PROJECTION_DIM,
    )
    features, colours = _picture_features(processor, seed, "clip_training_images", pictures)

    def caption(row: int) -> str:
        return image_caption(list(CONCEPTS)[row // pictures], random, colour=colours[row])

    model = _initialised(CLIPModel, config, random)
    _train_contrastively(model, "pixel_values", features, caption, tokenizer, random, steps, "Training CLIP")
    _save(folder, model, tokenizer, processor)
    return (time.perf_counter() - start) / 60


def _train_clap(folder: Path, seed: int, sounds: int, steps: int) -> float:
    start = time.perf_counter()
    random = stream(seed, "clap_training", "", 0)
    tokenizer = _clap_tokenizer(_corpus(sound_caption, random))
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
            "max_position_embeddings": _MAX_TOKENS + tokenizer.pad_token_id + 1,
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

    model = _initialised(ClapModel, config, random)
    _train_contrastively(model, "input_features", features, caption, tokenizer, random, steps, "Training CLAP")
    _save(folder, model, tokenizer, extractor)
    return (time.perf_counter() - start) / 60


def _corpus(caption: Callable[[str, np.random.Generator], str], random: np.random.Generator) -> list[str]:
    return [caption(concept, random) for concept in CONCEPTS for _ in range(600)]


def _clip_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """Train byte-pair encoding of characters, with CLIP's specials and a mark at the start of a word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<|unknown|>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # CLIP's own mark, at the end of a word, would give the characters other ids at every run of the trainer.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<|unknown|>", "<|pad|>", "<|startoftext|>", "<|endoftext|>"],
            initial_alphabet=["\u2581", *(chr(code) for code in range(33, 127))],
            show_progress=False,
        ),
    )
    tokenizer.decoder = decoders.Metaspace()
    return _wrapped(tokenizer, "<|startoftext|>", "<|endoftext|>", "<|pad|>", "<|unknown|>")


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
    return _wrapped(tokenizer, "<s>", "</s>", "<pad>", "<unk>")


def _wrapped(tokenizer: Tokenizer, bos: str, eos: str, pad: str, unk: str) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (bos, eos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        model_max_length=_MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def _initialised(model_class: Any, config: Any, random: np.random.Generator) -> Any:
    # transformers draws initial weights from the global generator, which is given back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random.integers(2**31)))
        return model_class(config)


def _train_contrastively(
    model: Any,
    input_name: str,
    features: torch.Tensor,
    caption: Callable[[int], str],
    tokenizer: PreTrainedTokenizerFast,
    random: np.random.Generator,
    steps: int,
    description: str,
) -> None:
    """Train with the symmetric InfoNCE loss; each step draws its captions afresh.

    Captions of one concept are negatives of each other, except where two captions of a batch are the same sentence.
    """
    scales = [parameter for name, parameter in model.named_parameters() if "logit_scale" in name]
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    undecayed = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": undecayed, "weight_decay": 0.0}],
        lr=_PEAK_LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=_PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    batch = min(_BATCH, len(features))
    order = np.empty(0, dtype=np.int64)
    model.train()
    with torch.random.fork_rng(devices=[]), tqdm(range(steps), desc=description, unit="step") as progress:
        torch.manual_seed(int(random.integers(2**31)))
        for _ in progress:
            if order.size < batch:
                order = random.permutation(len(features))
            rows, order = order[:batch], order[batch:]
            captions = [caption(int(row)) for row in rows]
            inputs = {input_name: features[torch.from_numpy(rows)].float(), **_tokenise(tokenizer, captions)}
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = model(**inputs)
            per_text = outputs.logits_per_text.float()
            per_item = (outputs.logits_per_image if "pixel" in input_name else outputs.logits_per_audio).float()
            loss = (_info_nce(per_item, captions) + _info_nce(per_text, captions)) / 2
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for scale in scales:
                    scale.clamp_(max=float(np.log(_LARGEST_LOGIT_SCALE)))
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def _info_nce(logits: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Return the mean cross-entropy of the diagonal, without the other columns of the same sentence."""
    sentences = {line: number for number, line in enumerate(dict.fromkeys(captions))}
    numbers = torch.tensor([sentences[line] for line in captions])
    same = (numbers[:, None] == numbers) & ~torch.eye(len(captions), dtype=torch.bool)
    return functional.cross_entropy(logits.masked_fill(same, float("-inf")), torch.arange(len(captions)))


def _save(folder: Path, model: Any, tokenizer: Any, processor: Any) -> None:
    """Write the parts under a temporary name first, so that the folder is whole or as it was."""
    new = temporary_path(folder)
    clear_replacement(folder)
    with named_write_errors(folder.parent):
        for part in (model.half(), tokenizer, processor):
            part.save_pretrained(new)
        replace_folder(folder)


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
