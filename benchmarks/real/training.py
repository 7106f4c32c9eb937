"""Train a small source model on items and on captions made from their labels."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from .captions import Captioner
from .data import Items
from .models import ItemTower, SmallDualEncoder

TRAINING_SIZE = 48
TRAINING_COLUMNS = 148
WEIGHT_DECAY = 0.05
TEXT_BATCH = 512
TEXT_LEARNING_RATE = 2e-3

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class SourceTraining:
    """Schedule of one source model: AdamW with a linear warm-up and a cosine decay to zero.

    Args:
        epochs, batch_size, learning_rate: of the items.
        mixup: largest share that a second item may have in an item.
        text_steps: of the text tower, which are cheap.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    mixup: float = 0.0
    text_steps: int = 2000


def train_source(
    model: SmallDualEncoder,
    tokenizer: PreTrainedTokenizerFast,
    items: Items,
    captioner: Captioner,
    augment: Augment,
    settings: SourceTraining,
    *,
    name: str,
    line: int = 0,
) -> None:
    """Train a model in place: its items by their classes, then its texts to meet them; it ends in eval mode.

    Contrastive towers that both start from nothing learn little in minutes. So the item tower first learns to tell the
    classes apart, and stays as it is while the text tower is trained contrastively (LiT, Zhai et al., 2022).
    """
    with torch.random.fork_rng(devices=[]):
        # Dropout has no generator of its own.
        torch.manual_seed(settings.seed)
        _train_items(model, items, len(captioner.phrases), augment, settings, name, line)
        _train_texts(model, tokenizer, items, captioner, settings, name, line)
    model.eval()


def _train_items(
    model: SmallDualEncoder,
    items: Items,
    classes: int,
    augment: Augment,
    settings: SourceTraining,
    name: str,
    line: int,
) -> None:
    """Train the item tower by the cosines of its embeddings with a vector a class, which is dropped afterwards."""
    generator = torch.Generator().manual_seed(settings.seed)
    tower = model.item_tower.train()
    tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    head = torch.nn.Linear(model.config.projection_dim, classes, bias=False)
    batches = len(items.keys) // settings.batch_size
    scale = torch.nn.Parameter(torch.tensor(2.5))
    steps = _Steps([*tower.parameters(), *head.parameters(), scale], settings.learning_rate, settings.epochs * batches)
    with tqdm(total=settings.epochs * batches, desc=f"{name}, items", unit="step", position=line) as bar:
        for _ in range(settings.epochs):
            order = torch.randperm(len(items.keys), generator=generator)
            for rows in order[: batches * settings.batch_size].view(batches, -1):
                values = augment(items.values[rows].float(), generator)
                target = F.one_hot(items.classes[rows], classes).float()
                if settings.mixup:
                    values, target = _mixup(values, target, settings.mixup, generator)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    embeds = tower(values)
                cosines = F.normalize(embeds.float(), dim=1) @ F.normalize(head.weight, dim=1).T
                loss = F.cross_entropy(scale.exp() * cosines, target, label_smoothing=0.1)
                steps.take(loss)
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    tower.eval()
    _recentre(tower, items)


def _train_texts(
    model: SmallDualEncoder,
    tokenizer: PreTrainedTokenizerFast,
    items: Items,
    captioner: Captioner,
    settings: SourceTraining,
    name: str,
    line: int,
) -> None:
    """Train the text tower on the finished embeddings of the items, its word vectors apart.

    Each step embeds a caption of every class. The loss is the symmetric cross entropy of the scaled cosines; the
    target of an item is shared by all captions that are true of it, that of a caption by all items it is true of.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    sentences = random.Random(settings.seed)
    with torch.no_grad():
        embeds = torch.cat([F.normalize(model.item_tower(part.float()), dim=1) for part in items.values.split(256)])
    tower = model.text_tower.train()
    tower.embedding.weight.requires_grad_(False)
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    steps = _Steps([*trained, model.logit_scale], TEXT_LEARNING_RATE, settings.text_steps)
    for _ in tqdm(range(settings.text_steps), desc=f"{name}, texts", unit="step", position=line):
        rows = torch.randint(len(embeds), (TEXT_BATCH,), generator=generator)
        texts, true_of = captioner.draw(sentences)
        truth = torch.zeros(len(captioner.phrases), len(texts))
        for column, classes in enumerate(true_of):
            truth[list(classes), column] = 1.0
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]
        logits = model.logit_scale.exp().clamp(max=100) * embeds[rows] @ F.normalize(tower(inputs), dim=1).T
        target = truth[items.classes[rows]]
        steps.take((_soft_cross_entropy(logits, target) + _soft_cross_entropy(logits.T, target.T)) / 2)


class _Steps:
    """AdamW with decay on matrices alone, gradients of norm 1 at most, and a schedule."""

    def __init__(self, parameters: list[torch.nn.Parameter], learning_rate: float, steps: int) -> None:
        self._parameters = parameters
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=learning_rate,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: _share_of_peak(step, steps))

    def take(self, loss: torch.Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()


def _share_of_peak(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def _soft_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of the rows that have a target, each target scaled to sum to 1."""
    mass = target.sum(dim=1, keepdim=True)
    rows = mass[:, 0] > 0
    return -((target / mass.clamp(min=1e-6)) * logits.log_softmax(dim=1)).sum(dim=1)[rows].mean()


def _mixup(
    values: torch.Tensor, target: torch.Tensor, largest: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    share = 1 - largest * torch.rand(len(values), generator=generator)
    partner = torch.randperm(len(values), generator=generator)
    target = share[:, None] * target + (1 - share[:, None]) * target[partner]
    share = share.view(-1, *[1] * (values.ndim - 1))
    return share * values + (1 - share) * values[partner], target


@torch.no_grad()
def _recentre(tower: ItemTower, items: Items) -> None:
    """Set the centre of the items to their mean as they are, without the cuts and covers of the training."""
    tower.centre.reset_running_stats()
    tower.centre.momentum = None  # the mean of all batches
    tower.centre.train()
    for values in items.values.split(256):
        tower(values.float())
    tower.centre.eval()


def augment_images(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip, crop, scale and turn the colours: `(n, 3, 64, 64)` float, 0..255, to `(n, 3, 48, 48)`.

    The smaller size halves the cost, and shows objects as large as the whole image does (Touvron et al., 2019).
    """
    count = len(values)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    scale = uniform(0.6, 1.0)
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0] = (
        scale * uniform(0.9, 1.1) * (torch.rand(count, generator=generator) < 0.5).float().mul(2).sub(1)
    )
    transform[:, 1, 1] = scale * uniform(0.9, 1.1)
    transform[:, 0, 2] = (1 - scale) * uniform(-1, 1)
    transform[:, 1, 2] = (1 - scale) * uniform(-1, 1)
    grid = F.affine_grid(transform, [*values.shape[:2], TRAINING_SIZE, TRAINING_SIZE], align_corners=False)
    values = F.grid_sample(values, grid, padding_mode="reflection", align_corners=False)
    gain, offset = uniform(0.7, 1.3)[:, None, None, None], uniform(-25, 25)[:, None, None, None]
    grey = values.mean(dim=1, keepdim=True)
    saturation = uniform(0.5, 1.5)[:, None, None, None]
    return ((grey + saturation * (values - grey)) * gain + offset).clamp(0, 255)


def augment_sounds(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cut 3 s out, shift level and pitch, cover bands and a span: `(n, 1, 64, 248)` to `(n, 1, 64, 148)`, 0..255."""
    bands, columns = values.shape[2], TRAINING_COLUMNS
    draws = torch.rand(len(values), 10, generator=generator)
    crops = torch.empty(len(values), 1, bands, columns)
    for crop, item, draw in zip(crops, values, draws.tolist(), strict=True):
        # A clip is rolled as a ring, so that its end is followed by its beginning.
        crop.copy_(item.roll((int(draw[0] * values.shape[3]), round(draw[1] * 4 - 2)), dims=(2, 1))[..., :columns])
        crop.add_(40 * draw[2] - 20)
        for first, size in ((3, 4), (5, 6)):
            height = int(draw[size] * 10)
            start = int(draw[first] * (bands - height))
            crop[:, start : start + height] = 0
        width = int(draw[8] * 30)
        start = int(draw[7] * (columns - width))
        crop[:, :, start : start + width] = 0
    return crops.clamp(0, 255)
