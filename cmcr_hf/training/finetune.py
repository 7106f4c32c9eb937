"""Fine-tune a CMCRModel on true pairs of images and audio (and texts) with `transformers.Trainer`.

Example, with a table whose rows belong together:

    python -m cmcr_hf.training.finetune --model runs/demo/model --pairs pairs.csv \\
        --image_column image --audio_column audio --text_column caption --output_dir runs/tuned

Projectors and the logit scale are trained; `--train_sources` trains the encoders too. File names in the table are
relative to its folder. Every option of `transformers.TrainingArguments` is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..durable import give_usual_permissions
from ..modeling.modeling_cmcr import CMCRModel
from ..modeling.processing_cmcr import CMCRProcessor
from .data import load_table
from .train import run_script, tuned


@dataclass
class FinetuningArguments(TrainingArguments):
    """`TrainingArguments` for contrastive fine-tuning on rows of files."""

    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 64
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "cosine"
    # BatchNorm and InfoNCE both want full batches.
    dataloader_drop_last: bool = True
    # The collator reads the files; the rows are no inputs of `forward` yet.
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False
    report_to: str = "none"


@dataclass
class PairArguments:
    """The model to start from and the pairs to train on."""

    model: str = field(metadata={"help": "CMCRModel to start from: folder or Hub id, with its processor."})
    pairs: str = field(metadata={"help": "Table of pairs: .csv, .tsv, .jsonl or .parquet."})
    image_column: str | None = field(default=None, metadata={"help": "Column of image files."})
    audio_column: str | None = field(default=None, metadata={"help": "Column of audio files."})
    text_column: str | None = field(default=None, metadata={"help": "Column of texts."})
    validation_pairs: str | None = field(
        default=None, metadata={"help": "Table of held-out pairs, for the evaluation loss."}
    )
    train_sources: bool = field(
        default=False, metadata={"help": "Train the source encoders too, not the projectors alone."}
    )


class PairDataset(Dataset[dict[str, Any]]):
    """Rows `{modality: file or text}` of a table of pairs."""

    def __init__(self, table: str, columns: dict[str, str]) -> None:
        if len(columns) < 2:
            raise ValueError(f"Expected at least two of image, audio and text columns, got {list(columns.values())}.")
        path = Path(table)
        cells = load_table(path)
        for column in columns.values():
            if column not in cells:
                raise ValueError(f"The table {path} has no column {column!r}, it has {', '.join(cells)}.")
        self.rows = []
        for index in range(len(next(iter(cells.values())))):
            row = {modality: cells[column][index] for modality, column in columns.items()}
            for modality, value in row.items():
                if not isinstance(value, str) or not value.strip():
                    raise ValueError(
                        f"Row {index + 1} of {path} has no {columns[modality]!r}. Fill the cell or drop the row: the "
                        "cells of a row belong together."
                    )
                if modality != "text":
                    row[modality] = path.parent / value
                    if not row[modality].is_file():
                        raise ValueError(f"Row {index + 1} of {path} names {row[modality]}, which is no file.")
            self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


@dataclass
class PairCollator:
    """Read and prepare the files of a batch."""

    processor: CMCRProcessor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        columns = {modality: [row[modality] for row in rows] for modality in rows[0]}
        images, audio, text = (columns.get(modality) for modality in ("image", "audio", "text"))
        return dict(self.processor(text=text, images=images, audio=audio))


def main(argv: list[str] | None = None) -> None:
    """Run the script: parse, load, train, save model and processor."""
    parser = HfArgumentParser(
        [PairArguments, FinetuningArguments],  # type: ignore[list-item]
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments, args = parser.parse_args_into_dataclasses(argv)
    columns = {modality: getattr(arguments, f"{modality}_column") for modality in ("image", "audio", "text")}
    columns = {modality: column for modality, column in columns.items() if column is not None}
    pairs = PairDataset(arguments.pairs, columns)
    held_out = None if arguments.validation_pairs is None else PairDataset(arguments.validation_pairs, columns)
    if len(pairs) < args.train_batch_size:
        raise ValueError(
            f"Expected at least one batch of {args.train_batch_size} pairs, got {len(pairs)}. "
            "Lower --per_device_train_batch_size."
        )
    if held_out is not None:
        args.per_device_eval_batch_size = min(args.per_device_eval_batch_size, len(held_out))
    model = CMCRModel.from_pretrained(arguments.model, dtype="float32", freeze_sources=not arguments.train_sources)
    processor = CMCRProcessor.from_pretrained(arguments.model)
    trainer = Trainer(
        model=model, args=args, data_collator=PairCollator(processor), train_dataset=pairs, eval_dataset=held_out
    )
    with tuned(args):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if held_out is not None:
            trainer.save_metrics("eval", trainer.evaluate())
    if arguments.train_sources:
        # They are no longer the sources that the connector has fingerprints of.
        model.record_fingerprints(processor)
    trainer.save_model(args.output_dir)
    processor.save_pretrained(args.output_dir)
    if args.should_save:
        for pattern in ("model*.safetensors", f"{PREFIX_CHECKPOINT_DIR}-*/model*.safetensors"):
            give_usual_permissions(Path(str(args.output_dir)).glob(pattern))


if __name__ == "__main__":
    run_script(main)
