"""Train a C-MCR connector on stored embeddings with `transformers.Trainer`.

Example, after `cmcr connect` or `aggregate` wrote the four row-aligned stores:

    python -m cmcr_hf.training.train \\
        --stores runs/demo/stores/clip-text runs/demo/stores/clap-text \\
        runs/demo/pseudo/clip-image runs/demo/pseudo/clap-audio \\
        --output_dir runs/mine --num_train_epochs 36 --per_device_train_batch_size 512

`--objective ex-mcr` leaves CLIP as it is and trains the other projector alone. Stores of several pools, the four of
each of the same items, are shuffled together. `--objective bridge-distillation` takes the two memories themselves in
place of pseudo stores: the native pair is the bank that tells which of their items match, none of which are paired.

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
from ..durable import give_usual_permissions, locked, named_write_errors, verify_checksums
from ..evaluation.retrieval import pair_retrieval
from ..modeling.configuration_cmcr import LEAF_MODALITIES, CMCRConfig
from ..modeling.modeling_cmcr import CMCRConnector
from .callbacks import ChecksumsCallback, DivergenceCallback, LossTermsCallback, NoiseCallback, TrainingBar
from .distillation import check_unpaired, unpaired_data
from .distributed import join_ranks, one_batch_of_all_ranks
from .posterior_files import remove_posteriors
from .recipe import OBJECTIVES_OF
from .store import EmbeddingStore, check_same_keys

# R@k over more rows than the paper's largest test set only costs memory: the similarity matrix is square.
MAX_METRIC_ROWS = 5000
# Folder below the output of what bridge distillation computes before it trains, for a run that goes on: whoever has
# saved the connector removes it.
POSTERIORS = "posteriors"
# So many rows are summed at a time, in float32, whatever their dtype.
FINITE_ROWS = 65536


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
            "any order: native overlap pair and pseudo leaf pair; several pools are told apart by their items."
        }
    )
    validation_rows: int = field(default=0, metadata={"help": "Rows held out for the evaluation loss and R@k."})
    connector_config: str | None = field(
        default=None,
        metadata={"help": "Folder or file of a CMCRConfig; else the options below, which may not differ from it."},
    )
    objective: str | None = field(
        default=None,
        metadata={"help": f"What to train: c-mcr, ex-mcr or bridge-distillation (default: {CMCRConfig.objective})."},
    )
    projection_dim: int | None = field(
        default=None, metadata={"help": "Width of the shared space (default: 512; ex-mcr: that of CLIP)."}
    )
    layout: str | None = field(
        default=None,
        metadata={
            "help": "Layout of the projectors, ex-mcr: of the one that is trained (default: "
            "linear-bn-relu-linear-bn, ex-mcr)."
        },
    )
    noise_norm: float | None = field(
        default=None,
        metadata={"help": "Norm of the noise; 0: none (default: 1.43, bridge-distillation: 0.35)."},
    )
    overlap_temperature: float | None = field(
        default=None,
        metadata={"help": "InfoNCE temperature of the native pairs (tau 2; default: 0.01, ex-mcr: 0.05)."},
    )
    leaf_temperature: float | None = field(
        default=None,
        metadata={
            "help": "InfoNCE temperature of the pseudo pairs (tau 3; default: 0.01, ex-mcr: 0.05), or "
            "that of the distilled cosines (0.2)."
        },
    )
    intra_weight: float | None = field(
        default=None,
        metadata={"help": f"Weight of the modality gap term (lambda; default: {CMCRConfig.intra_weight})."},
    )
    resume_from_last_checkpoint: bool = field(
        default=False,
        metadata={"help": "Go on behind the last whole checkpoint of the output folder, where it has one."},
    )


Embeds = dict[str, torch.Tensor]


class ConnectionDataset(Dataset[dict[str, Any]]):
    """Row-aligned embeddings `{"{space}_{modality}": (rows, dim)}` that are indexed a whole batch at a time.

    Args:
        pools: such embeddings, or several of them of the same names, whose rows count on from pool to pool.
        device: to hold the embeddings on, in the dtype they have.
    """

    def __init__(self, pools: Embeds | Sequence[Embeds], device: torch.device | str = "cpu") -> None:
        self.pools = [pools] if isinstance(pools, dict) else list(pools)
        for embeds in self.pools:
            rows = {name: len(tensor) for name, tensor in embeds.items()}
            if len(set(rows.values())) != 1:
                raise ValueError(
                    f"Expected stores of the same items, row by row, got {rows} rows. Embed the same items in each."
                )
            if embeds.keys() != self.pools[0].keys():
                raise ValueError(
                    f"Expected pools of the same embeddings, got {list(embeds)} beside {[*self.pools[0]]}."
                )
        self.pools = [{name: tensor.to(device) for name, tensor in embeds.items()} for embeds in self.pools]
        rows_of = torch.tensor([len(next(iter(embeds.values()))) for embeds in self.pools])
        self._stops = rows_of.cumsum(0)
        self._starts = self._stops - rows_of

    def __len__(self) -> int:
        return int(self._stops[-1])

    @property
    def nbytes(self) -> int:
        """The bytes of all embeddings."""
        return sum(tensor.nbytes for embeds in self.pools for tensor in embeds.values())

    def select(self, rows: torch.Tensor) -> ConnectionDataset:
        """Return a data set of some rows, those of the first pool first."""
        return ConnectionDataset(
            [{name: tensor[own] for name, tensor in embeds.items()} for embeds, _, own in self._by_pool(rows)]
        )

    def to(self, device: torch.device | str) -> ConnectionDataset:
        """Return the data set with its embeddings on a device."""
        return ConnectionDataset(self.pools, device)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        # One gather a batch and pool in place of thousands of single rows and their collation.
        parts = list(self._by_pool(torch.as_tensor(indices)))
        places = torch.cat([places for _, places, _ in parts])
        device = next(iter(self.pools[0].values())).device
        batch = {}
        for name in self.pools[0]:
            rows = [embeds[name][_rows_on(own, device)].float() for embeds, _, own in parts]
            # Back in the order of the indices, which the noise of a row and its rank depend on.
            batch[name] = rows[0] if len(rows) == 1 else torch.cat(rows)[_rows_on(places.argsort(), device)]
        return {"embeds": batch}

    def _by_pool(self, rows: torch.Tensor) -> Iterator[tuple[Embeds, torch.Tensor, torch.Tensor]]:
        """Yield the pools that rows lie in, with the places of these among all of them, and their rows in the pool."""
        pool_of = torch.bucketize(rows, self._stops, right=True)
        for number, embeds in enumerate(self.pools):
            places = (pool_of == number).nonzero().flatten()
            if len(places):
                yield embeds, places, rows[places] - self._starts[number]


def _rows_on(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return row numbers on a device: by way of pinned memory, or the host would wait for the step before."""
    return (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)


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
    embeds: Embeds | Sequence[Embeds],
    args: TrainingArguments,
    *,
    validation_rows: int = 0,
    log_lines: bool = True,
) -> tuple[CMCRConnector, list[dict[str, Any]]]:
    """Train a fresh connector on row-aligned embeddings; return it, in eval mode on the CPU, with Trainer's log.

    Of `bridge-distillation`, `posteriors/` in the output folder serves a run that goes on: call [`remove_posteriors`]
    once the connector is saved.

    Args:
        embeds: `{"{space}_{modality}": (rows, dim)}`, the native pair first, then the pseudo pair; or several such
            pools, which are shuffled together. For `bridge-distillation` the native pair, and both memories, of as
            many rows as they have (see [`unpaired_data`]).
        args: `seed` decides the initial weights, the order and the noise; `resume_from_checkpoint` goes on with a run.
            Ranks of `torchrun` train as one would with a batch of `per_device_train_batch_size` times their number.
        validation_rows: rows of a fixed permutation that are held out and evaluated at the end.
        log_lines: print a line a log; without, there is the progress bar alone (none under `disable_tqdm`).

    Raises:
        ValueError: nothing to train, embeddings that are not finite or not aligned, fewer rows than one batch, a batch
            of one, or a loss or weights that are not finite.
    """
    if all(projector["layout"] == "identity" for projector in (config.projectors or {}).values()):
        raise ValueError(
            f"All projectors of {' and '.join(config.spaces)} are the identity, expected one at least of another "
            "layout: there is nothing to train."
        )
    _check_finite([embeds] if isinstance(embeds, dict) else embeds)
    training: Any = None
    held_out: Any = None
    if config.objective == "bridge-distillation":
        # Their matches are hours of work with large memories: what is wrong is told before.
        unpaired = _unpaired(embeds, args, validation_rows)
        rows = check_unpaired(config, unpaired)
    else:
        training = ConnectionDataset(embeds)
        rows = len(training)
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
    if rows - validation_rows < batch_size:
        raise ValueError(
            f"Expected at least one batch of {batch_size} training rows, got {rows - validation_rows}. Use more "
            "items or a smaller batch (per_device_train_batch_size; train.batch_size in a recipe)."
        )
    if training is None:
        folder = Path(str(args.output_dir)) / POSTERIORS
        with locked(folder):
            training = unpaired_data(config, unpaired, folder, args.device, progress=not args.disable_tqdm)
            return _fit(config, training, None, args, log_lines)
    if validation_rows:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
        training, held_out = training.select(order[validation_rows:]), training.select(order[:validation_rows])
    if held_out is not None:
        # Equal batches, since the last of unequal ones would be dropped.
        if len(held_out) < args.world_size:
            raise ValueError(
                f"validation_rows is {len(held_out)}, expected 0 or at least one a process, of which "
                f"there are {args.world_size}."
            )
        batches = math.ceil(len(held_out) / (args.per_device_eval_batch_size * args.world_size))
        args.per_device_eval_batch_size = len(held_out) // (batches * args.world_size)
    return _fit(config, training, held_out, args, log_lines)


def _fit(
    config: CMCRConfig, training: Any, held_out: Any, args: TrainingArguments, log_lines: bool
) -> tuple[CMCRConnector, list[dict[str, Any]]]:
    if fit_on_device(training.nbytes + (0 if held_out is None else held_out.nbytes), args):
        training = training.to(args.device)
        held_out = None if held_out is None else held_out.to(args.device)
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


def _check_finite(pools: Sequence[Embeds]) -> None:
    """Check that there is no row that would spoil the weights, which tell only at the end of an epoch."""
    for number, embeds in enumerate(pools):
        for name, rows in embeds.items():
            for start, part in zip(range(0, len(rows), FINITE_ROWS), rows.split(FINITE_ROWS), strict=False):
                if part.sum(dtype=torch.float32).isfinite():
                    continue
                for row in (~part.isfinite().all(dim=1)).nonzero().flatten().tolist():
                    place = f" of pool {number}" if len(pools) > 1 else ""
                    raise ValueError(f"{name} row {start + row}{place} is not finite. Embed it anew, or leave it out.")


def _unpaired(embeds: Embeds | Sequence[Embeds], args: TrainingArguments, validation_rows: int) -> Embeds:
    pools = [embeds] if isinstance(embeds, dict) else list(embeds)
    if len(pools) != 1:
        raise ValueError(f"bridge-distillation takes one bank and two memories, got {len(pools)} pools. Join them.")
    if validation_rows:
        raise ValueError(
            f"validation_rows is {validation_rows}, expected 0 for bridge-distillation: no item of a memory has a "
            "partner to be found. Evaluate the connector on items with classes."
        )
    if args.world_size > 1:
        raise ValueError(
            f"bridge-distillation trains in one process, got {args.world_size}: the matches of a batch are those of "
            "all of its rows. Start one process; its projectors are small."
        )
    return pools[0]


def fit_on_device(nbytes: int, args: TrainingArguments) -> bool:
    """Say whether embeddings take less than half of a GPU's free memory, and this process makes the batches."""
    if args.device.type != "cuda" or args.dataloader_num_workers or args.dataloader_pin_memory:
        return False
    free, _ = torch.cuda.mem_get_info(args.device)
    return nbytes < free / 2


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


def pools_of(stores: Sequence[EmbeddingStore], objective: str) -> list[list[EmbeddingStore]]:
    """Return the stores of each pool: all of them, or, where one embedding is there twice, those of the same items.

    Those of `bridge-distillation` are of other items each, and no pools.
    """
    if objective == "bridge-distillation" or len({(store.space, store.modality) for store in stores}) == len(stores):
        return [list(stores)]
    pools: dict[tuple[str, ...], list[EmbeddingStore]] = {}
    for store in stores:
        pools.setdefault(tuple(store.keys()), []).append(store)
    return list(pools.values())


def ordered_stores(stores: Sequence[EmbeddingStore], config: CMCRConfig) -> dict[str, EmbeddingStore]:
    """Return stores as `{"{space}_{modality}": store}`: of each bridge the native pair first, then the pseudo pair.

    Raises:
        ValueError: a store is missing, there twice, of another space or width, of other items than the others, or of
            another source than its space; or, of `bridge-distillation`, a memory is one of pseudo embeddings.
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
    aligned = [by_name[name] for name in dict.fromkeys(names)]
    distilled = config.objective == "bridge-distillation"
    bank, keys = aligned[0], aligned[0].keys()
    for place, store in enumerate(aligned[1:], 1):
        if distilled and place > 1:
            # The memories have rows of their own, and pseudo embeddings those of the bank.
            if store.rows == bank.rows and store.keys() == keys:
                raise ValueError(
                    f"{store.folder} and {bank.folder} hold the same items, as pseudo embeddings do, expected a "
                    f"memory of real {store.modality} items. Name the store that they were made from, or train c-mcr."
                )
            continue
        try:
            check_same_keys((str(bank.folder), keys), (str(store.folder), store.keys()))
        except ValueError as error:
            if place == 1 or len(aligned) > 4:
                raise
            raise ValueError(
                f"{error} Or train on memories of unpaired items: --objective bridge-distillation."
            ) from error
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


def _check_agreement(config: CMCRConfig, given: dict[str, Any], layout: str | None) -> None:
    """Check that the options beside a configuration say what it says."""
    wanted: dict[str, Any] = {name: (value, getattr(config, name)) for name, value in given.items()}
    if layout is not None:
        # Of ex-mcr, the base stays as it is.
        fixed = {bridge[0] for bridge in config.bridges or []} if config.objective == "ex-mcr" else set()
        found = {projector["layout"] for space, projector in (config.projectors or {}).items() if space not in fixed}
        wanted["layout"] = (layout, layout if found == {layout} else " and ".join(sorted(found)))
    for name, (asked, there) in wanted.items():
        if asked != there:
            raise ValueError(
                f"--{name} is {asked}, and {there} in --connector_config, which decides. Remove the option, or change "
                "the configuration."
            )


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
        options = ["objective", "projection_dim", "noise_norm", "intra_weight"]
        options += ["overlap_temperature", "leaf_temperature"]
        given = {name: value for name in options if (value := getattr(arguments, name)) is not None}
        if arguments.connector_config is not None:
            config = CMCRConfig.from_pretrained(arguments.connector_config)
            _check_agreement(config, given, arguments.layout)
        else:
            layout = {} if arguments.layout is None else {"layout": arguments.layout}
            # Of ex-mcr, CLIP is the base, which stays as it is.
            fixed = ("clip",) if arguments.objective == "ex-mcr" else ()
            config = CMCRConfig(
                projectors={
                    store.space: {"input_dim": store.dim, **({} if store.space in fixed else layout)}
                    for store in stores
                },
                **given,
            )
    except StrictDataclassError as error:
        raise ValueError(f"The connector's configuration is not valid: {error.__cause__ or error}") from error
    for name, objectives in OBJECTIVES_OF.items():
        if name in given and config.objective not in objectives:
            raise ValueError(
                f"--{name} goes with {' and '.join(objectives)}, not with {config.objective}. Name one of them as "
                "--objective, or remove it."
            )
    pools = [ordered_stores(pool, config) for pool in pools_of(stores, config.objective)]
    sources = {store.space: {name: store.source[name] for name in ("id", "revision")} for store in stores}
    # The name of a local folder does not tell where it lies; a Hub id, which has one slash, is found anywhere.
    if all(source["id"].count("/") == 1 for source in sources.values()):
        config.sources = sources
    embeds = [{name: store.tensor() for name, store in pool.items()} for pool in pools]
    if arguments.resume_from_last_checkpoint:
        if args.resume_from_checkpoint is not None:
            raise ValueError(
                f"Got resume_from_checkpoint {args.resume_from_checkpoint!r} and resume_from_last_checkpoint. Give "
                "one of them."
            )
        # The first process removes what is damaged before the others look.
        with args.main_process_first(local=False):
            args.resume_from_checkpoint = last_checkpoint(Path(args.output_dir))
    output = Path(str(args.output_dir))
    with named_write_errors(output):
        with tuned(args):
            connector, history = train_connector(config, embeds, args, validation_rows=arguments.validation_rows)
        if args.should_save:
            connector.save_pretrained(output)
            give_usual_permissions(output.glob("model*.safetensors"))
            remove_posteriors(output / POSTERIORS)
    if args.should_save:
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
