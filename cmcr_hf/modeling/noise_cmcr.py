# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""The noise of semantic completion as a function of a seed and of the row."""

import hashlib

import torch

# One seed for so many rows: a generator of each row's own would cost more than the draws. Every block of them is a
# start of its own on a GPU, where drawing rows of which a rank has no use costs nothing.
CPU_SEED_ROWS = 256
SEED_ROWS = 1024


# A compiled graph of its own for every seed would be compiled at every step.
@torch.compiler.disable
def row_noise(embeds: torch.Tensor, seed: tuple[int, ...], name: str, first: int = 0) -> torch.Tensor:
    """Draw standard normal noise like `embeds`, `(rows, dim)`, for the rows of a batch from row `first` on.

    What a row gets depends on `seed`, `name`, its place in the batch, the width, the dtype and the kind of device, and
    not on the rows that are drawn with it: ranks that hold a part of the batch each draw what one does that holds all.
    """
    rows = CPU_SEED_ROWS if embeds.device.type == "cpu" else SEED_ROWS
    start, stop = first // rows, -(-(first + len(embeds)) // rows)
    noise = embeds.new_empty(stop - start, rows, embeds.shape[-1])
    generator = torch.Generator(embeds.device)
    for index, block in enumerate(noise, start):
        digest = hashlib.blake2b(f"{tuple(seed)} {name} {index}".encode(), digest_size=8).digest()
        block.normal_(generator=generator.manual_seed(int.from_bytes(digest)))
    offset = first - start * rows
    return noise.flatten(0, 1)[offset : offset + len(embeds)]
