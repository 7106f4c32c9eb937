"""A training step of the connector under `Trainer` against the same step in a bare loop and against its matrix
products, and the contrastive loss in blocks of logits against the plain one."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from benchmarks.timing import alternate, machine
from cmcr_hf import CMCRConfig, CMCRConnector
from cmcr_hf.cpu import float32_products, products_in, tuned_cpu
from cmcr_hf.modeling.losses_cmcr import symmetric_info_nce
from cmcr_hf.training import train
from cmcr_hf.training.train import ConnectionDataset, ConnectorTrainingArguments, train_connector

NAMES = ("clip_text", "clap_text", "clip_image", "clap_audio")
# The paper's: 36 epochs of 2.3 M rows in batches of 4096.
SCHEDULE_ROWS, SCHEDULE_STEPS = 2_300_000, 20_500
# Steps that are not counted: the allocator and the choice of kernels settle in them.
WARM_STEPS = 2


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096, help="rows a step")
    parser.add_argument("--dim", type=int, default=512, help="width of both sources and of the shared space")
    parser.add_argument("--steps", type=int, default=6, help="counted steps a turn; with --project, of the one run")
    parser.add_argument("--repeats", type=int, default=2, help="counted rounds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--project",
        action="store_true",
        help=f"one run of --steps, 500 say, and what {SCHEDULE_STEPS} of them, the paper's schedule, would take",
    )
    parser.add_argument("--rows", type=int, help="rows of --project; else 2.3 M on cuda, 65,536 on cpu")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    print(f"Training, steps of {arguments.batch} x {arguments.dim}, two projectors, two InfoNCE, random unit vectors")
    print(machine() if arguments.device == "cpu" else f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if arguments.project:
        _project(arguments)
        return
    precisions = {"float32": ("ieee", False), "bfloat16 autocast": ("ieee", True)}
    if arguments.device == "cpu":
        with tuned_cpu() as line:
            # The memory that malloc keeps, it keeps from then on; the products are set below.
            print(line)
        chosen = float32_products()
        precisions = {f"float32 as {name!r}": (name, False) for name in dict.fromkeys(["ieee", chosen])}
        precisions["bfloat16 autocast"] = (chosen, True)
    for name, (precision, autocast) in precisions.items():
        with products_in(precision):
            _compare(name, autocast, arguments)


def _compare(name: str, autocast: bool, arguments: argparse.Namespace) -> None:
    """Print the table of one precision."""
    batch, steps = arguments.batch, arguments.steps
    embeds = _random_embeds((WARM_STEPS + steps + 1) * batch, arguments.dim, arguments.device)
    context = torch.autocast(arguments.device, torch.bfloat16, enabled=autocast)
    step_seconds: dict[str, list[float]] = {"bare loop": [], "Trainer": []}

    def bare_loop() -> None:
        with _clock(arguments.device) as clock:
            _bare_loop(embeds, batch, WARM_STEPS + steps, context, clock)
        step_seconds["bare loop"].append(clock.seconds_a_step())

    def trainer() -> None:
        with _clock(arguments.device) as clock:
            _trainer(embeds, batch, WARM_STEPS + steps, arguments.device, autocast)
        step_seconds["Trainer"].append(clock.seconds_a_step())

    texts = [embeds[text][:batch].clone().requires_grad_() for text in NAMES[:2]]

    def loss(function: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with context:
                value = function(*texts, 100.0)
            value.backward()
            _wait(arguments.device)

        return run

    products = _products(embeds, batch, torch.bfloat16 if autocast else torch.float32)

    def floor() -> None:
        products()
        _wait(arguments.device)

    others = alternate(
        {
            "bare loop": bare_loop,
            "Trainer": trainer,
            "matrix products": floor,
            "plain loss": loss(plain_info_nce),
            "loss in blocks": loss(symmetric_info_nce),
        },
        arguments.repeats,
    )
    # The first round is not counted.
    seconds = {contender: statistics.median(values[1:]) for contender, values in step_seconds.items()}
    bare, ours, least = seconds["bare loop"], seconds["Trainer"], others["matrix products"]
    print(name)
    print(f"  bare loop        {1e3 * bare:9.1f} ms a step")
    print(f"  Trainer          {1e3 * ours:9.1f} ms a step {ours / bare:6.2f} x, {1e3 * (ours - bare):+.1f} ms")
    print(f"  matrix products  {1e3 * least:9.1f} ms, {least / ours:.0%} of the step under Trainer")
    plain, blocks = others["plain loss"], others["loss in blocks"]
    print(f"  plain loss       {1e3 * plain:9.1f} ms with its gradient")
    print(f"  loss in blocks   {1e3 * blocks:9.1f} ms with its gradient {blocks / plain:6.2f} x")


def _project(arguments: argparse.Namespace) -> None:
    """Run the steps of a schedule under Trainer and print how long all of them would take."""
    rows = arguments.rows or (SCHEDULE_ROWS if arguments.device == "cuda" else 65_536)
    embeds = _random_embeds(rows, arguments.dim, arguments.device)
    total = WARM_STEPS + arguments.steps
    tuned = tuned_cpu() if arguments.device == "cpu" else nullcontext("CUDA: float32 as 'ieee'")
    with tuned as line, _clock(arguments.device) as clock:
        print(line)
        start = time.perf_counter()
        _trainer(embeds, arguments.batch, total, arguments.device, autocast=False, log=True)
        _wait(arguments.device)
        whole = time.perf_counter() - start
    step = clock.seconds_a_step()
    size = sum(tensor.nbytes for tensor in embeds.values()) / 2**30
    less = "" if rows >= SCHEDULE_ROWS else f", fewer than the schedule's {SCHEDULE_ROWS:,}"
    print(f"data set of {rows:,} rows{less}, {size:.1f} GiB, held on {arguments.device}; {total} steps: {whole:.1f} s")
    print(f"{1e3 * step:.2f} ms a step, data, logs and ends of epochs included, over {arguments.steps} steps")
    projected = step * SCHEDULE_STEPS
    print(
        f"projected, not measured: {SCHEDULE_STEPS:,} steps take {projected / 60:.1f} min ({projected / 3600:.2f} h)"
    )


def _random_embeds(rows: int, dim: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    embeds = {}
    for name in NAMES:
        embeds[name] = torch.randn(rows, dim, generator=generator, device=device)
        embeds[name] /= embeds[name].norm(dim=-1, keepdim=True)
    return embeds


def _config(embeds: dict[str, Tensor]) -> CMCRConfig:
    dim = embeds["clip_text"].shape[1]
    return CMCRConfig(projection_dim=dim, projectors={space: {"input_dim": dim} for space in ("clip", "clap")})


def _bare_loop(embeds: dict[str, Tensor], batch: int, steps: int, context: Any, clock: Clock) -> None:
    data = ConnectionDataset(embeds, embeds["clip_text"].device)
    connector = CMCRConnector(_config(embeds)).train().to(embeds["clip_text"].device)
    optimizer = torch.optim.AdamW(connector.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    for _ in range(steps):
        inputs = data.__getitems__(torch.randint(len(data), (batch,)).tolist())
        with context:
            loss = connector(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _trainer(
    embeds: dict[str, Tensor], batch: int, steps: int, device: str, autocast: bool, log: bool = False
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = ConnectorTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            save_strategy="no",
            logging_strategy="epoch" if log else "no",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            bf16=autocast,
        )
        # On a GPU the rows are there already, and would count twice.
        with patch.object(train, "fit_on_device", lambda embeds, args: device == "cuda"):
            train_connector(_config(embeds), embeds, args, log_lines=False)


class Clock:
    """The instants at which batches are taken: on a GPU in its own order of work, which nobody waits for."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.instants: list[Any] = []

    def tick(self) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.instants.append(event)
        else:
            self.instants.append(time.perf_counter())

    def seconds_a_step(self) -> float:
        """Return the mean over all steps but the first ones, which warm up."""
        counted = self.instants[WARM_STEPS:]
        if self.device == "cuda":
            torch.cuda.synchronize()
            total = counted[0].elapsed_time(counted[-1]) / 1e3
        else:
            total = counted[-1] - counted[0]
        return total / (len(counted) - 1)


@contextmanager
def _clock(device: str) -> Iterator[Clock]:
    """Note the instant of every step's forward pass and of the end."""
    clock = Clock(device)
    forward = CMCRConnector.forward

    def timed(self: CMCRConnector, *given: Any, **options: Any) -> Any:
        clock.tick()
        return forward(self, *given, **options)

    with patch.object(CMCRConnector, "forward", timed):
        yield clock


def _products(embeds: dict[str, Tensor], batch: int, dtype: torch.dtype) -> Callable[[], None]:
    """Return the products of a step alone, with those of its gradients: projectors and logits."""
    rows = embeds["clip_text"][:batch].to(dtype)
    dim = rows.shape[1]
    wide = rows.repeat(1, 2)
    first, second = rows.new_ones(2 * dim, dim), rows.new_ones(dim, 2 * dim)

    @torch.no_grad()
    def run() -> None:
        for _ in NAMES:
            rows @ first.T
            wide @ second.T
            rows.T @ wide
            rows @ second
            wide.T @ rows
        for _ in range(2):
            logits = rows @ rows.T
            logits @ rows
            logits.T @ rows

    return run


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def plain_info_nce(a: Tensor, b: Tensor, scale: float) -> Tensor:
    logits = a @ b.T * scale
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


if __name__ == "__main__":
    main()
