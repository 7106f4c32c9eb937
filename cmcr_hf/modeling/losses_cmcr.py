# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""The contrastive losses: of aligned rows, in blocks of logits and over several ranks, and of soft targets."""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

# Up to so many logits (512 MiB in float32) are kept for the gradient; beyond, they are computed anew.
KEPT_LOGITS = 2**27
# Blocks of a CPU stay in its cache; a GPU wants large products.
CPU_BLOCK_ROWS = 512
BLOCK_ROWS = 4096


def symmetric_info_nce(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | float, group: Any = None
) -> torch.Tensor:
    """Return the mean of both directions' cross entropies between aligned unit rows (equation 4).

    The logits are computed in blocks, and those of large batches anew for the gradient: memory grows with the rows,
    not with their square.

    Args:
        a, b: `(batch, dim)`, row i of one belongs to row i of the other, all other rows are negatives.
        scale: inverse temperature.
        group: process group of ranks that call this with as many rows each. The rows of the others are negatives too,
            and the result is the loss of the rank's own rows: its mean over the ranks is the loss of all rows, and the
            mean of the parameters' gradients, which DistributedDataParallel takes, is the gradient of that.

    Raises:
        ValueError: the rows of `a` and `b` are not as many.
    """
    if a.shape != b.shape:
        raise ValueError(f"Expected aligned rows of one width, got {tuple(a.shape)} and {tuple(b.shape)}.")
    # Filled on the device: a number that is copied there would make the host wait.
    scale = scale.to(a) if isinstance(scale, torch.Tensor) else a.new_full((), scale)
    return _InfoNCE.apply(a, b, scale, group)


def matched_cross_entropy(
    a: torch.Tensor, b: torch.Tensor, matches: torch.Tensor, scale: float, power: float, lift: float = 0.0
) -> torch.Tensor:
    """Return the mean of both directions' cross entropies between unit rows and how well they match.

    The targets of a row of `a` are `(matches / mean ** lift) ** power` divided by their sum, where the mean is that of
    the matches of each row of `b`; those of a row of `b` likewise. A match of 0 is no target at any lift; a row that
    matches nothing has all targets alike. With the identity as matches this is `symmetric_info_nce`.

    Args:
        a, b: `(n, dim)` and `(m, dim)`, in no common order.
        matches: `(n, m)`, 0 or more.
        scale: inverse temperature of the cosines.
        lift: 0 takes matches as they are, 1 how many times better than the mean they are.
    """
    # A power of small probabilities would underflow, not so the softmax of its logarithm.
    tiny = torch.finfo(matches.dtype).tiny
    evidence = matches.clamp_min(tiny).log()
    # Else 0, over the mean of a row that matches nothing, would be as good as any match of average lift.
    none = matches < tiny
    with torch.autocast(a.device.type, enabled=False):
        logits = scale * (a @ b.T)
        losses = []
        for dim in (1, 0):
            # But for a constant, which the softmax divides by.
            common = evidence.logsumexp(1 - dim, keepdim=True)
            lifted = power * (evidence - lift * common)
            targets = lifted.masked_fill(none, torch.finfo(lifted.dtype).min).softmax(dim)
            losses.append(-(targets * logits.log_softmax(dim)).sum(dim).mean())
    return (losses[0] + losses[1]) / 2


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, group: Any) -> torch.Tensor:
        device = a.device.type
        # As autocast does: products in its dtype, exponentials in the dtype of the rows.
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
        with torch.autocast(device, enabled=False):
            ctx.group, ctx.first = group, 0 if group is None else dist.get_rank(group) * len(a)
            scaled, everyone = (a * scale).to(low), gather(b, group).to(low)
            row_lse, positives = a.new_empty(len(a)), a.new_empty(len(a))
            peak, total = a.new_full((len(everyone),), -torch.inf), a.new_zeros(len(everyone))
            keep = any(ctx.needs_input_grad) and len(a) * len(everyone) <= KEPT_LOGITS
            kept: list[torch.Tensor] = []
            for block in _blocks(a):
                logits = (scaled[block] @ everyone.T).to(a.dtype)
                positives[block] = logits.diagonal(ctx.first + block.start)
                row_lse[block] = logits.logsumexp(dim=1)
                higher = torch.maximum(peak, logits.amax(dim=0))
                total = total * (peak - higher).exp() + (logits - higher).exp_().sum(dim=0)
                peak = higher
                if keep:
                    kept.append(logits)
            column_lse = gather((peak + total.log())[None], group).logsumexp(dim=0)
            ctx.save_for_backward(a, scale, scaled, everyone, row_lse, column_lse, *kept)
            return (row_lse + column_lse[ctx.first : ctx.first + len(a)] - 2 * positives).mean() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, scale, scaled, everyone, row_lse, column_lse, *kept = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            grad_a, grad_everyone = torch.empty_like(a), a.new_zeros(everyone.shape)
            for index, block in enumerate(_blocks(a)):
                logits = kept[index] if kept else (scaled[block] @ everyone.T).to(a.dtype)
                slope = (logits - row_lse[block, None]).exp_()
                slope += (logits - column_lse).exp_()
                slope.diagonal(ctx.first + block.start).sub_(2)
                slope = slope.to(scaled.dtype)
                grad_a[block] = slope @ everyone
                grad_everyone += slope.T @ scaled[block]
            factor = grad / (2 * len(a))
            if ctx.group is not None:
                dist.all_reduce(grad_everyone, group=ctx.group)
            grad_b = grad_everyone[ctx.first : ctx.first + len(a)] * factor
            grad_scale = (a * grad_a).sum() * factor
            return grad_a.mul_(factor * scale), grad_b, grad_scale, None


def _blocks(rows: torch.Tensor) -> list[slice]:
    size = CPU_BLOCK_ROWS if rows.device.type == "cpu" else BLOCK_ROWS
    return [slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]


def gather(rows: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the rows of all ranks of a process group in the order of the ranks, without a gradient."""
    if group is None:
        return rows
    everyone = rows.new_empty(dist.get_world_size(group), *rows.shape)
    dist.all_gather(list(everyone), rows.contiguous(), group=group)
    return everyone.flatten(0, 1)
