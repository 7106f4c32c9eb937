"""Callbacks of `transformers.Trainer` for the training of a connector."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..durable import write_checksums
from ..modeling.modeling_cmcr import CMCRConnector


class LossTermsCallback(TrainerCallback):
    """Log the terms of the objective beside its loss, as means over the training steps since the last log."""

    def __init__(self, connector: CMCRConnector) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0
        connector.register_forward_hook(self._record)

    def _record(self, connector: torch.nn.Module, inputs: Any, output: Any) -> None:
        if connector.training:
            for name in (name for name in output if name.startswith("loss_")):
                self._sums[name] = self._sums.get(name, 0) + output[name].detach()
            self._steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self._steps and logs is not None and "loss" in logs:
            means = torch.stack([*self._sums.values()]) / self._steps
            if args.world_size > 1:
                dist.all_reduce(means)
                means /= args.world_size
            terms = dict(zip(self._sums, means.tolist(), strict=True))
            logs.update(terms)
            state.log_history[-1].update(terms)
            self._sums, self._steps = {}, 0


class NoiseCallback(TrainerCallback):
    """Seed the noise of a batch with the seed of the run, its step and its place among the step's batches.

    So a run that goes on draws what an unbroken one does, and several ranks what one does.
    """

    def __init__(self, connector: CMCRConnector) -> None:
        self._seed = (0, 0, 0)
        connector.register_forward_pre_hook(self._pass, with_kwargs=True)

    @torch.compiler.disable
    def _pass(self, connector: torch.nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return inputs, {**options, "noise_seed": self._seed}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seed = (args.seed, state.global_step, 0)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seed, step, batch = self._seed
        self._seed = (seed, step, batch + 1)


class DivergenceCallback(TrainerCallback):
    """Stop a run at the first log with a loss or weights that are not finite: by default before they are saved."""

    def __init__(self, connector: CMCRConnector) -> None:
        self._connector = connector

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        spoilt = [name for name in ("loss", "train_loss") if not math.isfinite((logs or {}).get(name, 0.0))]
        # The last step may spoil the weights behind a finite loss. One question, since a GPU stops for each.
        weights = self._connector.state_dict()
        finite = torch.stack([tensor.isfinite().all() for tensor in weights.values()]).tolist()
        spoilt += [name for name, fine in zip(weights, finite, strict=True) if not fine]
        if spoilt:
            raise ValueError(
                f"The training diverged at step {state.global_step} of {state.max_steps}: {spoilt[0]} is not finite. "
                f"Lower the learning rate (it is {args.learning_rate:g}), and check noise_norm, the temperatures and "
                "intra_weight."
            )


class ChecksumsCallback(TrainerCallback):
    """Make every checkpoint durable and record the sha256 of its files, so that a cut or damaged one is noticed."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            # Every rank writes the state of its own generators into the folder.
            dist.barrier()
        if state.is_world_process_zero:
            write_checksums(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))


class TrainingBar(ProgressCallback):
    """The progress bar of Trainer without its lines of logs."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass
