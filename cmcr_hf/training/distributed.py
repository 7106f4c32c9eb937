"""Several ranks that train one connector on a part of the batch each, as one rank trains it on the whole batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainingArguments

from ..modeling.modeling_cmcr import CMCRConnector, CMCRProjector


def join_ranks(args: TrainingArguments) -> None:
    """Let the processes that torchrun starts on one node find each other, and not those before a restart.

    torchrun keeps one store for all of its starts (torch 2.13), in which processes that start again may read the
    addresses of those before them. Here every start has keys of its own. Nodes count their starts apart, so several
    are left to torch.
    """
    environment = os.environ
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and environment.get("GROUP_WORLD_SIZE") == "1"
    if not shared or environment.get("WORLD_SIZE") == "1" or args.ddp_backend is not None or dist.is_initialized():
        return
    if not args.use_cpu and not torch.cuda.is_available():
        return
    timeout = timedelta(seconds=args.ddp_timeout)
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), timeout=timeout)
    dist.init_process_group(
        "gloo" if args.use_cpu else "nccl",
        timeout=timeout,
        store=dist.PrefixStore(f"start {environment['TORCHELASTIC_RESTART_COUNT']}", store),
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
    )


@contextmanager
def one_batch_of_all_ranks(connector: CMCRConnector) -> Iterator[None]:
    """Let a connector take its negatives, its noise and the statistics of BatchNorm from the rows of all ranks.

    The rows of the global batch are those of the ranks in their order, as many on each. Does nothing where there is
    one rank. Afterwards the connector has its plain layers again, with what they learned.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    connector.process_group = dist.group.WORLD
    _replace_batch_norms(connector, lambda width: SynchronizedBatchNorm1d(width, dist.group.WORLD))
    try:
        yield
    finally:
        connector.process_group = None
        _replace_batch_norms(connector, nn.BatchNorm1d)


class SynchronizedBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm of `(rows, width)` over the rows of all ranks, as many on each; in eval mode the plain one.

    On any device: `torch.nn.SyncBatchNorm` has no form for the CPU.
    """

    def __init__(self, width: int, group: Any) -> None:
        super().__init__(width)
        self.group = group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(input)
        rows = input.float()
        count = len(rows) * dist.get_world_size(self.group)
        mean = _SumOverRanks.apply(rows.sum(dim=0), self.group) / count
        centred = rows - mean
        # Of the centred rows, since the mean of squares less the square of the mean loses the digits of both.
        variance = _SumOverRanks.apply(centred.square().sum(dim=0), self.group) / count
        with torch.no_grad():
            momentum: Any = self.momentum
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            self.running_mean.lerp_(mean, momentum)  # type: ignore[union-attr]
            self.running_var.lerp_(variance * count / (count - 1), momentum)  # type: ignore[union-attr]
        normal = centred * (variance + self.eps).rsqrt()
        return (normal * self.weight + self.bias).to(input.dtype)


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks. Every rank's loss depends on it, so its gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _replace_batch_norms(connector: CMCRConnector, new: Callable[[int], nn.BatchNorm1d]) -> None:
    projectors: list[CMCRProjector] = list(connector.projectors.values())  # type: ignore[arg-type]
    for projector in projectors:
        for index, layer in enumerate(projector.layers):
            if isinstance(layer, nn.BatchNorm1d):
                other = new(layer.num_features).train(layer.training)
                other.eps, other.momentum = layer.eps, layer.momentum
                # The tensors themselves, on whatever device they are.
                other._parameters, other._buffers = layer._parameters, layer._buffers
                projector.layers[index] = other
