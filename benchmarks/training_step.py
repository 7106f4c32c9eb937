"""A training step of the connector under `Trainer` against the same step in a bare loop, and the contrastive loss,
which computes large batches in blocks of logits, against the plain one."""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.nn.functional as F
from transformers.utils import logging

from benchmarks.timing import alternate, machine
from cmcr_hf import CMCRConfig, CMCRConnector
from cmcr_hf.modeling.losses_cmcr import symmetric_info_nce
from cmcr_hf.training.train import ConnectionDataset, ConnectorTrainingArguments, train_connector


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096, help="rows a step")
    parser.add_argument("--dim", type=int, default=512, help="width of both sources")
    parser.add_argument("--steps", type=int, default=8, help="steps a run")
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds")
    parser.add_argument("--project", type=int, metavar="STEPS", help="hours of so many steps (the paper's: 20500)")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    batch, steps = arguments.batch, arguments.steps
    generator = torch.Generator().manual_seed(0)
    embeds = {
        name: F.normalize(torch.randn(4 * batch, arguments.dim, generator=generator), dim=-1)
        for name in ("clip_text", "clap_text", "clip_image", "clap_audio")
    }
    config = CMCRConfig(projectors={space: {"input_dim": arguments.dim} for space in ("clip", "clap")})

    def bare_loop() -> None:
        torch.manual_seed(0)
        connector = CMCRConnector(config).train()
        optimizer = torch.optim.AdamW(connector.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
        data = ConnectionDataset(embeds)
        for _ in range(steps):
            rows = torch.randint(len(data), (batch,)).tolist()
            connector(**data.__getitems__(rows)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:

        def trainer() -> None:
            args = ConnectorTrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch,
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            )
            train_connector(config, embeds, args, log_lines=False)

        seconds = alternate({"bare loop": bare_loop, "Trainer": trainer}, arguments.repeats)
    losses = {"plain loss": plain_info_nce, "symmetric_info_nce": symmetric_info_nce}
    texts = [embeds[name][:batch].requires_grad_() for name in ("clip_text", "clap_text")]
    loss_seconds = alternate(
        {name: lambda loss=loss: loss(*texts, 100.0).backward() for name, loss in losses.items()}, arguments.repeats
    )
    print(
        f"Training, {steps} steps of {batch} x {arguments.dim}, two projectors, two InfoNCE, float32, random vectors"
    )
    print(machine())
    for name, value in seconds.items():
        print(f"{name:18} {1e3 * value / steps:8.1f} ms a step {value / seconds['bare loop']:7.2f} x")
    for name, value in loss_seconds.items():
        print(f"{name:18} {1e3 * value:8.1f} ms with its gradient {value / loss_seconds['plain loss']:7.2f} x")
    if arguments.project:
        hours = seconds["Trainer"] / steps * arguments.project / 3600
        print(f"projected from the {steps} measured: {arguments.project} steps under Trainer take {hours:.1f} h")


def plain_info_nce(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    logits = a @ b.T * scale
    targets = torch.arange(len(logits))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


if __name__ == "__main__":
    main()
