"""Train a small encoder of an offline world contrastively, and measure what it learnt."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from ..durable import replacement, write_durably
from ..evaluation.retrieval import chance, label_retrieval
from .drawing import IMAGE_SIZE
from .world import stream

PROJECTION_DIM = 128
MAX_TOKENS = 40
_PEAK_LEARNING_RATE = 1e-3
_LARGEST_LOGIT_SCALE = 100.0

Augment = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]


@dataclass(frozen=True)
class CaptionedPictures:
    """What a small CLIP is trained on: pictures of named things in a colour, and what is said of them.

    Called as `draw(name, generator, colour=)` and `caption(name, generator, colour=)`.
    """

    colours: Mapping[str, Sequence[str]]
    draw: Callable[..., Image.Image]
    caption: Callable[..., str]

    @property
    def names(self) -> list[str]:
        return list(self.colours)


def picture_features(
    processor: Any, pictures: CaptionedPictures, seed: int, split: str, count: int
) -> tuple[torch.Tensor, list[str]]:
    """Return half-precision pixel values, `count` a name in the order of the names, and the body colours."""
    features = torch.empty(len(pictures.names) * count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float16)
    colours = []
    items = [(name, index) for name in pictures.names for index in range(count)]
    for row, (name, index) in enumerate(tqdm(items, desc=f"Drawing {split}", unit="picture")):
        random = stream(seed, split, name, index)
        colour = str(random.choice(pictures.colours[name]))
        features[row] = pixel_values(processor, pictures.draw(name, random, colour=colour))
        colours.append(colour)
    return features, colours


def pixel_values(processor: Any, picture: Image.Image) -> torch.Tensor:
    """Return what an encoder sees of a picture: `(3, 64, 64)`."""
    return processor(picture, return_tensors="pt")["pixel_values"][0]


def image_processor() -> CLIPImageProcessorPil:
    """Return the processor of the small encoders' pictures, which have its size already."""
    return CLIPImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False)


def train_clip(
    folder: Path,
    pictures: CaptionedPictures,
    random: np.random.Generator,
    *,
    seed: int,
    split: str,
    count: int,
    steps: int,
    batch: int,
    text_hidden_size: int,
    vision_hidden_size: int,
    augment: Augment | None = None,
) -> None:
    """Train a small CLIP on `count` pictures a name of the streams `split`, and write it with its processors."""
    tokenizer = clip_tokenizer(corpus(pictures.names, pictures.caption, random))
    processor = image_processor()
    config = CLIPConfig(
        text_config=text_config(tokenizer, text_hidden_size),
        vision_config=vision_config(vision_hidden_size),
        projection_dim=PROJECTION_DIM,
    )
    features, colours = picture_features(processor, pictures, seed, split, count)

    def caption(row: int) -> str:
        return pictures.caption(pictures.names[row // count], random, colour=colours[row])

    model = initialised(CLIPModel, config, random)
    train_on_captions(
        model,
        "pixel_values",
        features,
        caption,
        tokenizer,
        random,
        steps,
        "Training CLIP",
        batch=batch,
        augment=augment,
    )
    save(folder, model, tokenizer, processor)


def text_config(tokenizer: PreTrainedTokenizerFast, hidden_size: int) -> dict[str, Any]:
    """Return the configuration of a small text tower of CLIP's."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        # The id 2 would make CLIP pool at the largest token id instead of at this token.
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def vision_config(hidden_size: int) -> dict[str, Any]:
    """Return the configuration of a small image tower, a ViT."""
    return {
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }


def shifted_or_mirrored(pixels: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Move each picture `(pictures, 3, side, side)` by up to an eighth of its side, and mirror half of them."""
    count, channels, side, _ = pixels.shape
    reach = side // 8
    padded = functional.pad(pixels, (reach, reach, reach, reach), mode="replicate")
    down, right = torch.from_numpy(random.integers(0, 2 * reach + 1, (2, count, 1)))
    rows, columns = down + torch.arange(side), right + torch.arange(side)
    mirrored = torch.from_numpy(random.random(count) < 0.5)
    columns[mirrored] = columns[mirrored].flip(1)
    picture, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[picture, channel, rows[:, None, :, None], columns[:, None, None, :]]


def corpus(
    names: Sequence[str], caption: Callable[[str, np.random.Generator], str], random: np.random.Generator
) -> list[str]:
    """Return captions that a tokenizer learns from: 600 a name."""
    return [caption(name, random) for name in names for _ in range(600)]


def clip_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
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
    return wrapped(tokenizer, "<|startoftext|>", "<|endoftext|>", "<|pad|>", "<|unknown|>")


def wrapped(tokenizer: Tokenizer, bos: str, eos: str, pad: str, unk: str) -> PreTrainedTokenizerFast:
    """Set a beginning and an end around every text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (bos, eos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def initialised(model_class: Any, config: Any, random: np.random.Generator) -> Any:
    """Build a model whose random weights the generator decides."""
    # transformers draws initial weights from the global generator, which is given back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random.integers(2**31)))
        return model_class(config)


def train_on_captions(
    model: Any,
    input_name: str,
    features: torch.Tensor,
    caption: Callable[[int], str],
    tokenizer: PreTrainedTokenizerFast,
    random: np.random.Generator,
    steps: int,
    description: str,
    *,
    batch: int,
    augment: Augment | None = None,
) -> None:
    """Train contrastively on features and captions of them; each step draws its captions afresh."""

    def logits(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        captions = [caption(int(row)) for row in rows]
        items = features[torch.from_numpy(rows)].float()
        if augment is not None:
            items = augment(items, random)
        outputs = model(**{input_name: items, **tokenise(tokenizer, captions)})
        per_item = outputs.logits_per_image if "pixel" in input_name else outputs.logits_per_audio
        return per_item, outputs.logits_per_text, captions

    train_contrastively(model, len(features), logits, random, steps, description, batch=batch)


def train_contrastively(
    model: Any,
    count: int,
    logits: Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor, list[str]]],
    random: np.random.Generator,
    steps: int,
    description: str,
    *,
    batch: int,
) -> None:
    """Train what is not frozen with the symmetric InfoNCE loss on `count` pairs.

    Pairs of one concept are negatives of each other, except where two of a batch are the same sentence.

    Args:
        logits: gives for the numbers of a batch's pairs the scaled cosines of first with second parts, those of
            second with first parts, and the sentences, or whatever tells one pair from another.
    """
    scales = [parameter for name, parameter in model.named_parameters() if "logit_scale" in name]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    undecayed = [parameter for parameter in trained if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": undecayed, "weight_decay": 0.0}],
        lr=_PEAK_LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=_PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    batch = min(batch, count)
    order = np.empty(0, dtype=np.int64)
    model.train()
    with torch.random.fork_rng(devices=[]), tqdm(range(steps), desc=description, unit="step") as progress:
        torch.manual_seed(int(random.integers(2**31)))
        for _ in progress:
            if order.size < batch:
                order = random.permutation(count)
            rows, order = order[:batch], order[batch:]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                forward, backward, sentences = logits(rows)
            loss = (_info_nce(forward.float(), sentences) + _info_nce(backward.float(), sentences)) / 2
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


def save(folder: Path, model: Any, *processors: Any) -> None:
    """Write a model as float16, and its processors, so that the folder is whole or as it was."""
    with replacement(folder) as new:
        for part in (model.half(), *processors):
            part.save_pretrained(new)
        # What comes with this package needs no copy of its code.
        for path in new.glob("*.py"):
            path.unlink()
        config = json.loads((new / "config.json").read_text(encoding="utf-8"))
        config.pop("auto_map", None)
        (new / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_figures(output: Path, figures: dict[str, Any]) -> None:
    """Write `figures.json` beside the encoders."""
    write_durably(output / "figures.json", (json.dumps(figures, indent=2) + "\n").encode())


def unit(embeds: torch.Tensor) -> torch.Tensor:
    """Return unit rows."""
    return functional.normalize(embeds, dim=-1)


def embed_texts(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Return the unit embeddings of texts."""
    return unit(model.get_text_features(**tokenise(tokenizer, texts)).pooler_output)


def tokenise(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    """Return a model's inputs for texts."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def accuracy(embeds: torch.Tensor, prompts: torch.Tensor, labels: torch.Tensor) -> float:
    """Return how many of the embeddings are nearest to the prompt of their label."""
    return round(float(((embeds @ prompts.T).argmax(dim=1) == labels).float().mean()), 4)


def class_retrieval(queries: torch.Tensor, gallery: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return P@1 and mAP among classes by the cosine of unit rows; both sides have these labels."""
    return _rounded(label_retrieval(queries @ gallery.T, labels, labels, ks=(1,)))


def relabelled_map(queries: torch.Tensor, gallery: torch.Tensor, labels: torch.Tensor, seed: int) -> dict[str, float]:
    """Return mean and deviation of the mAP over 100 random matchings of the classes of queries and gallery.

    Classes are clusters, and clusters of unconnected spaces meet by luck: this is the luck of other meetings.
    """
    maps = []
    for index in range(100):
        order = stream(seed, "figure_relabellings", "", index).permutation(int(labels.max()) + 1)
        maps.append(label_retrieval(queries @ gallery.T, labels, torch.from_numpy(order)[labels], ks=(1,))["mAP"])
    return _rounded({"mean": float(np.mean(maps)), "standard_deviation": float(np.std(maps))})


def class_chance(labels: torch.Tensor) -> dict[str, float]:
    """Return what `class_retrieval` gives a random order."""
    return _rounded(chance(labels, labels, ks=(1,)))


def folder_bytes(folder: Path, *names: str) -> dict[str, int]:
    """Return the bytes of the files of each encoder in a folder."""
    return {name: sum(path.stat().st_size for path in sorted((folder / name).iterdir())) for name in names}


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}
