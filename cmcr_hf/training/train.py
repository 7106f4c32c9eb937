"""Train a C-MCR connector on stored embeddings with `transformers.Trainer`.

Example, after `cmcr connect` or `aggregate` wrote the four row-aligned stores:

    python -m cmcr_hf.training.train \\
        --stores runs/demo/stores/clip-text runs/demo/stores/clap-text \\
        runs/demo/pseudo/clip-image runs/demo/pseudo/clap-audio \\
        --output_dir runs/mine --num_train_epochs 36 --per_device_train_batch_size 512

Every option of `transformers.TrainingArguments` is there, with the paper's values as defaults: AdamW, learning rate
1e-3 with cosine decay, batch 4096, 36 epochs. `--resume_from_checkpoint DIR` ends with the weights of an unbroken run,
and so does `--resume_from_last_checkpoint`, which finds it in the output folder.

Several processes train as one does on the batch of all of them, on GPUs or on CPUs (`--use_cpu`), and start again
behind the last checkpoint when one of them is killed:

    torchrun --standalone --nproc_per_node 4 --max-restarts 1 \\
        -m cmcr_hf.training.train --resume_from_last_checkpoint True --per_device_train_batch_size 1024 ...

On several nodes, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: processes that start again may else read the addresses of
those before them, and fail (torch 2.13). `accelerate launch --multi_gpu --num_processes 4 -m cmcr_hf.training.train`
does the same, on CPUs too with `--use_cpu` behind the name of the script; its own `--cpu` starts one process
(accelerate 1.15).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    HfArgumentParser,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ..cpu import tuned_cpu
from ..durable import verify_checksums
from ..evaluation.retrieval import pair_retrieval
from ..modeling.configuration_cmcr import LEAF_MODALITIES, CMCRConfig
from ..modeling.modeling_cmcr import CMCRConnector
from .callbacks import ChecksumsCallback, DivergenceCallback, LossTermsCallback, NoiseCallback, TrainingBar
from .distributed import join_ranks, one_batch_of_all_ranks
from .store import EmbeddingStore, check_same_keys

# R@k over more rows than the paper's largest test set only costs memory: the similarity matrix is square.
MAX_METRIC_ROWS = 5000


@dataclass
class ConnectorTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the schedule of C-MCR (arXiv 2305.14381, details from Ex-MCR, arXiv 2310.08884)."""

    per_device_train_batch_size: int = 4096
    per_device_eval_batch_size: int = 4096
    num_train_epochs: float = 36.0
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    # The paper names no gradient clipping, which TrainingArguments would do at 1.
    max_grad_norm: float = 0.0
    # BatchNorm and InfoNCE both want full batches.
    dataloader_drop_last: bool = True
    # The data set makes whole batches itself; its dictionary is not the signature of `forward`.
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False
    # Its statistics are those of all ranks already.
    ddp_broadcast_buffers: bool | None = False
    logging_strategy: str = "epoch"
    # A loss that is not finite is shown, not left out of the mean.
    logging_nan_inf_filter: bool = False
    # None, the default of TrainingArguments, hides the bar wherever warnings are hidden.
    disable_tqdm: bool | None = False
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    report_to: str = "none"

    def __post_init__(self) -> None:
        join_ranks(self)
        super().__post_init__()


@dataclass
class ConnectorArguments:
    """What to train on and how the connector looks."""

    stores: list[str] = field(
        metadata={
            "help": "Embedding stores of row-aligned items, folders or addresses such as hf://datasets/ORG/NAME, in "
            "any order: native overlap pair and pseudo leaf pair."
        }
    )
    validation_rows: int = field(default=0, metadata={"help": "Rows held out for the evaluation loss and R@k."})
    connector_config: str | None = field(
        default=None, metadata={"help": "Folder or file of a CMCRConfig; else the options below."}
    )
    projection_dim: int = field(default=512, metadata={"help": "Width of the shared space."})
    layout: str = field(default="linear-bn-relu-linear-bn", metadata={"help": "Layout of both projectors."})
    noise_norm: float = field(
        default=CMCRConfig.noise_norm, metadata={"help": "Norm of the semantic completion noise; 0: none."}
    )
    overlap_temperature: float = field(
        default=0.01, metadata={"help": "InfoNCE temperature of the native pairs (tau 2)."}
    )
    leaf_temperature: float = field(
        default=0.01, metadata={"help": "InfoNCE temperature of the pseudo pairs (tau 3)."}
    )
    intra_weight: float = field(default=0.1, metadata={"help": "Weight of the modality gap term (lambda)."})
    resume_from_last_checkpoint: bool = field(
        default=False,
        metadata={"help": "Go on behind the last whole checkpoint of the output folder, where it has one."},
    )


class ConnectionDataset(Dataset[dict[str, Any]]):
    """Row-aligned embeddings `{"{space}_{modality}": (rows, dim)}` that are indexed a whole batch at a time.

    Args:
        device: to hold the embeddings on, in the dtype they have.
    """

    def __init__(self, embeds: dict[str, torch.Tensor], device: torch.device | str = "cpu") -> None:
        rows = {name: len(tensor) for name, tensor in embeds.items()}
        if len(set(rows.values())) != 1:
            raise ValueError(
                f"Expected stores of the same items, row by row, got {rows} rows. Embed the same items in each."
            )
        self.embeds = {name: tensor.to(device) for name, tensor in embeds.items()}

    def __len__(self) -> int:
        return len(next(iter(self.embeds.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        # One gather a batch in place of thousands of single rows and their collation.
        device = next(iter(self.embeds.values())).device
        rows = torch.as_tensor(indices)
        if device.type == "cuda":
            # From pinned memory, or the host would wait for the step before.
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=True)
        return {"embeds": {name: tensor[rows].float() for name, tensor in self.embeds.items()}}


def keep_batch(batch: Any) -> dict[str, Any]:
    """Collate what `ConnectionDataset` has batched already."""
    return dict(batch)


def last_checkpoint(folder: Path) -> str | None:
    """Return the last checkpoint that is as it was written, and remove later ones, which are of no use."""
    while folder.is_dir() and (checkpoint := get_last_checkpoint(str(folder))) is not None:
        try:
            verify_checksums(Path(checkpoint))
            return checkpoint
        except ValueError:
            shutil.rmtree(checkpoint)
    return None


def retrieval_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return R@1 and R@5 between the two spaces' projections of held-out rows, for the native and the pseudo pairs."""
    embeds: Any = prediction.predictions
    embeds = embeds[0] if isinstance(embeds, tuple) else embeds
    rows = {name: torch.as_tensor(array[:MAX_METRIC_ROWS]) for name, array in embeds.items()}
    (a, b), (c, d) = list(rows)[:2], list(rows)[2:4]
    metrics = {}
    for first, second in ((a, b), (c, d)):
        ks = tuple(k for k in (1, 5) if k <= len(rows[first]))
        scores = pair_retrieval(rows[first] @ rows[second].T, ks=ks)
        metrics.update({f"{first}_to_{second}_{name}": scores[name] for name in scores if name.startswith("R@")})
    return metrics


def train_connector(
    config: CMCRConfig,
    embeds: dict[str, torch.Tensor],
    args: TrainingArguments,
    *,
    validation_rows: int = 0,
    log_lines: bool = True,
) -> tuple[CMCRConnector, list[dict[str, Any]]]:
    """Train a fresh connector on row-aligned embeddings; return it, in eval mode on the CPU, with Trainer's log.

    Args:
        embeds: `{"{space}_{modality}": (rows, dim)}`, the native pair first, then the pseudo pair.
        args: `seed` decides the initial weights, the order and the noise; `resume_from_checkpoint` goes on with a run.
            Ranks of `torchrun` train as one would with a batch of `per_device_train_batch_size` times their number.
        validation_rows: rows of a fixed permutation that are held out and evaluated at the end.
        log_lines: print a line a log; without, there is the progress bar alone (none under `disable_tqdm`).

    Raises:
        ValueError: fewer rows than one batch, a batch of one, stores that are not aligned, or a loss or weights that
            are not finite.
    """
    rows = len(next(iter(embeds.values())))
    if not 0 <= validation_rows < rows:
        raise ValueError(f"validation_rows is {validation_rows}, expected 0 or more and fewer than the {rows} rows.")
    if args.n_gpu > 1:
        # DataParallel would give every GPU negatives and statistics of its own: several take torchrun.
        args._n_gpu = 1
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != args.world_size:
        raise ValueError(
            f"{started} processes were started, expected {args.world_size} on {args.device.type}: each would train "
            "alone. Pass --use_cpu, where there is no GPU for them."
        )
    batch_size = args.per_device_train_batch_size * args.world_size
    if batch_size < 2:
        raise ValueError(
            f"The batch size is {batch_size}, expected at least 2: BatchNorm and InfoNCE "
            "compare the rows of a batch. Raise per_device_train_batch_size (train.batch_size in a recipe)."
        )
    training, held_out = ConnectionDataset(embeds), None
    if validation_rows:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
        training, held_out = (
            ConnectionDataset({name: tensor[part] for name, tensor in embeds.items()})
            for part in (order[validation_rows:], order[:validation_rows])
        )
    if len(training) < batch_size:
        raise ValueError(
            f"Expected at least one batch of {batch_size} training rows, got {len(training)}. Use more "
            "texts or a smaller batch (per_device_train_batch_size; train.batch_size in a recipe)."
        )
    if held_out is not None:
        # Equal batches, since the last of unequal ones would be dropped.
        if len(held_out) < args.world_size:
            raise ValueError(
                f"validation_rows is {len(held_out)}, expected 0 or at least one a process, of which "
                f"there are {args.world_size}."
            )
        batches = math.ceil(len(held_out) / (args.per_device_eval_batch_size * args.world_size))
        args.per_device_eval_batch_size = len(held_out) // (batches * args.world_size)
    if fit_on_device(embeds, args):
        training = ConnectionDataset(training.embeds, args.device)
        held_out = held_out and ConnectionDataset(held_out.embeds, args.device)
    # Trainer saves its arguments with every checkpoint: those of a run that goes on are to be the same.
    checkpoint, args.resume_from_checkpoint = args.resume_from_checkpoint, None
    set_seed(args.seed)
    connector = CMCRConnector(config)
    trainer = Trainer(
        model=connector,
        args=args,
        data_collator=keep_batch,
        train_dataset=training,
        eval_dataset=held_out,
        compute_metrics=retrieval_metrics,
        callbacks=[
            NoiseCallback(connector),
            LossTermsCallback(connector),
            DivergenceCallback(connector),
            ChecksumsCallback(),
        ],
    )
    if not log_lines:
        trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        if not args.disable_tqdm:
            trainer.add_callback(TrainingBar)
    with _closed_bars(trainer), one_batch_of_all_ranks(connector):
        trainer.train(resume_from_checkpoint=checkpoint)
        if held_out is not None:
            trainer.evaluate()
    return connector.cpu().eval(), trainer.state.log_history


def fit_on_device(embeds: dict[str, torch.Tensor], args: TrainingArguments) -> bool:
    """Say whether the embeddings take less than half of a GPU's free memory, and this process makes the batches."""
    if args.device.type != "cuda" or args.dataloader_num_workers or args.dataloader_pin_memory:
        return False
    free, _ = torch.cuda.mem_get_info(args.device)
    return sum(tensor.nbytes for tensor in embeds.values()) < free / 2


@contextmanager
def _closed_bars(trainer: Trainer) -> Iterator[None]:
    """Close the bars of a run that ends early: they would be drawn again behind the line that says why."""
    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                for bar in (callback.training_bar, callback.prediction_bar):
                    if bar is not None:
                        bar.close()


def ordered_stores(stores: Sequence[EmbeddingStore], config: CMCRConfig) -> dict[str, EmbeddingStore]:
    """Return stores as `{"{space}_{modality}": store}`: of each bridge the native pair first, then the pseudo pair.

    Raises:
        ValueError: a store is missing, there twice, of another space or width, of other items than the others, or of
            another source than its space.
    """
    wanted = []
    for space_a, space_b, overlap in config.bridges or []:
        wanted += [(space_a, overlap), (space_b, overlap)]
        wanted += [(space, LEAF_MODALITIES[space, overlap]) for space in (space_a, space_b)]
    names = [f"{space}_{modality}" for space, modality in wanted]
    given = [f"{store.space}_{store.modality}" for store in stores]
    if not names or sorted(given) != sorted(set(names)):
        expected = ", ".join(dict.fromkeys(names)) or "those of two spaces that a bridge connects"
        raise ValueError(f"Expected one store each of {expected}, got {', '.join(given)}. Correct --stores.")
    by_name = dict(zip(given, stores, strict=True))
    sources: dict[str, dict[str, str]] = {}
    for store in stores:
        width = (config.projectors or {})[store.space]["input_dim"]
        if store.dim != width:
            raise ValueError(
                f"{store.folder} holds rows of width {store.dim}, expected {width} for {store.space}. Embed them with "
                "the source of the others, or correct the connector's configuration."
            )
        if sources.setdefault(store.space, store.source) != store.source:
            raise ValueError(
                f"{store.folder} comes from another source than the other store of {store.space}. Embed both with one."
            )
    keys = stores[0].keys()
    for store in stores[1:]:
        check_same_keys((str(stores[0].folder), keys), (str(store.folder), store.keys()))
    return {name: by_name[name] for name in dict.fromkeys(names)}


@contextmanager
def tuned(args: TrainingArguments) -> Iterator[None]:
    """Make a CPU faster for the time of a script, as [`tuned_cpu`] says in a line of the first process."""
    if args.device.type != "cpu":
        yield
        return
    with tuned_cpu() as line:
        if args.should_log:
            print(line, flush=True)
        yield


def main(argv: list[str] | None = None) -> None:
    """Run the script: parse, open the stores, train, save."""
    parser = HfArgumentParser(
        [ConnectorArguments, ConnectorTrainingArguments],  # type: ignore[list-item]
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments, args = parser.parse_args_into_dataclasses(argv)
    stores = [EmbeddingStore.open(folder) for folder in arguments.stores]
    try:
        if arguments.connector_config is not None:
            config = CMCRConfig.from_pretrained(arguments.connector_config)
        else:
            options = ("projection_dim", "noise_norm", "overlap_temperature", "leaf_temperature", "intra_weight")
            config = CMCRConfig(
                projectors={store.space: {"layout": arguments.layout, "input_dim": store.dim} for store in stores},
                **{name: getattr(arguments, name) for name in options},
            )
    except StrictDataclassError as error:
        raise ValueError(f"The connector's configuration is not valid: {error.__cause__ or error}") from error
    ordered = ordered_stores(stores, config)
    sources = {store.space: {name: store.source[name] for name in ("id", "revision")} for store in stores}
    # The name of a local folder does not tell where it lies; a Hub id, which has one slash, is found anywhere.
    if all(source["id"].count("/") == 1 for source in sources.values()):
        config.sources = sources
    embeds = {name: store.tensor() for name, store in ordered.items()}
    if arguments.resume_from_last_checkpoint:
        if args.resume_from_checkpoint is not None:
            raise ValueError(
                f"Got resume_from_checkpoint {args.resume_from_checkpoint!r} and resume_from_last_checkpoint. Give "
                "one of them."
            )
        # The first process removes what is damaged before the others look.
        with args.main_process_first(local=False):
            args.resume_from_checkpoint = last_checkpoint(Path(args.output_dir))
    with tuned(args):
        connector, history = train_connector(config, embeds, args, validation_rows=arguments.validation_rows)
    if args.should_save:
        connector.save_pretrained(args.output_dir)
        metrics = {name: value for name, value in history[-1].items() if name.startswith("eval_")}
        if metrics:
            print(json.dumps(metrics, indent=2))
    if args.world_size > 1:
        dist.destroy_process_group()


def run_script(main: Callable[[], None]) -> None:
    """Call `main` and end with one line on standard error and exit status 1 where it finds a plain mistake."""
    try:
        main()
    except (ValueError, ImportError, OSError) as error:
        # One line, also of the paragraphs that some libraries raise.
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    run_script(main)
