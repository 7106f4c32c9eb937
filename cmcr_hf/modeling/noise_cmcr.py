# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""The noise of semantic completion as a function of a seed and of the row."""

import hashlib

import torch

# One seed for so many rows: a generator of each row's own would cost more than the draws.
SEED_ROWS = 256


# A compiled graph of its own for every seed would be compiled at every step.
@torch.compiler.disable
def row_noise(embeds: torch.Tensor, seed: tuple[int, ...], name: str, first: int = 0) -> torch.Tensor:
    """Draw standard normal noise like `embeds`, `(rows, dim)`, for the rows of a batch from row `first` on.

    What a row gets depends on `seed`, `name`, its place in the batch, the width, the dtype and the kind of device, and
    not on the rows that are drawn with it: ranks that hold a part of the batch each draw what one does that holds all.
    """
    start, stop = first // SEED_ROWS, -(-(first + len(embeds)) // SEED_ROWS)
    noise = embeds.new_empty(stop - start, SEED_ROWS, embeds.shape[-1])
    generator = torch.Generator(embeds.device)
    for index, block in enumerate(noise, start):
        digest = hashlib.blake2b(f"{tuple(seed)} {name} {index}".encode(), digest_size=8).digest()
        block.normal_(generator=generator.manual_seed(int.from_bytes(digest)))
    offset = first - start * SEED_ROWS
    return noise.flatten(0, 1)[offset : offset + len(embeds)]
