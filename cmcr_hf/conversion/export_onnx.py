"""Export one tower of a model, with its projector, to ONNX: `python -m cmcr_hf.conversion.export_onnx --help`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..modeling.modeling_cmcr import CMCRModel
from ..modeling.processing_cmcr import CMCRProcessor

# Between torch and onnxruntime, on unit vectors.
MAX_DIFFERENCE = 1e-4


class _Tower(nn.Module):
    def __init__(self, model: CMCRModel, modality: str, space: str, names: list[str]):
        super().__init__()
        self.model, self.modality, self.space, self.names = model, modality, space, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        features = getattr(self.model, f"get_{self.modality}_features")
        embeds: torch.Tensor = features(**dict(zip(self.names, inputs, strict=True)), space=self.space).pooler_output
        return embeds


class _EveryClipFused(nn.Module):
    """The patch embedding of a fused CLAP with both ways computed for every clip, as an export cannot branch."""

    def __init__(self, patch_embed: nn.Module):
        super().__init__()
        self.patch_embed = patch_embed

    def forward(self, hidden_states: torch.Tensor, is_longer_idx: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(hidden_states.shape[0])
        # Not `any`, which onnxruntime leaves undefined for no index.
        longer = (rows[:, None] == is_longer_idx[None]).sum(dim=1) > 0
        fused, plain = (self.patch_embed(hidden_states, chosen) for chosen in (rows, rows[:0]))
        return torch.where(longer[:, None, None], fused, plain)


def export_onnx(
    model: CMCRModel, processor: CMCRProcessor, modality: str, output: str | os.PathLike, space: str | None = None
) -> float:
    """Write the tower of a modality and its projector as an ONNX file, and check it in onnxruntime.

    The inputs are named as the processor names them, with any number of rows and, where the tower takes it, any text
    length; the output `embeds` is `(rows, projection_dim)`, unit vectors of the shared space.

    Args:
        model: in float32, on the CPU; it is not changed.
        modality: `image`, `text` or `audio`.
        space: whose text tower, as for `get_text_features`.

    Returns:
        The largest difference between torch's and onnxruntime's embeddings of other inputs than those of the export.

    Raises:
        ValueError: the difference exceeds 1e-4, in which case no file is written, or the model lacks the tower.
        ImportError: onnx, onnxscript or onnxruntime is missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise ImportError(f'The export needs {error.name}: pip install "cmcr-hf[onnx]"') from error
    space = model.config.space_of(modality, space)
    output = Path(output)
    if not output.parent.is_dir():
        raise ValueError(f"There is no folder {str(output.parent)!r} for the output {output.name!r}. Make it first.")
    given, other = (_inputs(processor, modality, space, rows) for rows in (2, 3))
    encoder: Any = getattr(getattr(model.sources[space], "audio_model", None), "audio_encoder", None)
    fused = modality == "audio" and getattr(encoder, "enable_fusion", False)
    if not fused:
        # Of no use to an unfused CLAP.
        for inputs in (given, other):
            inputs.pop("is_longer", None)
    names = list(given)
    tower = _Tower(model, modality, space, names).eval()
    with torch.no_grad():
        expected = tower(*other.values()).numpy()
    # What differs between two batches is what may differ between any two.
    dims = [torch.export.Dim(name, min=1) for name in ("batch", "length")]
    shapes = [
        {
            axis: dims[axis]
            for axis, (a, b) in enumerate(zip(given[name].shape, other[name].shape, strict=True))
            if a != b
        }
        for name in names
    ]
    patch_embed: Any = encoder.patch_embed if fused else None
    try:
        if fused:
            encoder.patch_embed = _EveryClipFused(patch_embed)
        arguments: dict[str, Any] = {"args": tuple(given.values()), "dynamic_shapes": (tuple(shapes),)}
        # A fused CLAP asks for `len` of a tensor, at which a trace would fix the number of rows.
        traced = torch.export.export(tower, **arguments, strict=True) if fused else tower
        program: Any = torch.onnx.export(
            traced, **arguments, input_names=names, output_names=["embeds"], dynamo=True, verbose=False
        )
    finally:
        if fused:
            encoder.patch_embed = patch_embed
    # In a folder of its own, as weights above 2 GB go into a second file that the first one names.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        written = Path(folder) / output.name
        program.save(written)
        session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
        found = session.run(["embeds"], {name: other[name].numpy() for name in names})[0]
        difference = float(np.abs(found - expected).max())
        # A comparison with NaN is false.
        if not difference <= MAX_DIFFERENCE:
            raise ValueError(
                f"onnxruntime's {modality} embeddings differ by {difference:.1e} from torch's, expected at most "
                f"{MAX_DIFFERENCE}. Export with other versions of torch or onnxruntime."
            )
        for path in sorted(Path(folder).iterdir(), reverse=True):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(output.parent / path.name)
    return difference


def _inputs(processor: CMCRProcessor, modality: str, space: str, rows: int) -> dict[str, torch.Tensor]:
    """Prepare synthetic inputs: noise, every second clip of it longer than a window, or words of growing number."""
    generator = np.random.default_rng(rows)
    if modality == "text":
        return dict(processor(text=["a" + " dog" * row * rows for row in range(rows)], space=space))
    if modality == "image":
        return dict(processor(images=list(generator.integers(0, 256, (rows, 96, 128, 3), np.uint8))))
    rate = processor.feature_extractor.sampling_rate
    window = getattr(processor.feature_extractor, "nb_max_samples", 10 * rate)
    clips = [generator.normal(0, 0.1, window // 2 + row % 2 * 2 * window) for row in range(rows)]
    return dict(processor(audio=clips, sampling_rate=rate))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 1 after one line on what is wrong and what to do."""
    parser = argparse.ArgumentParser(
        prog="python -m cmcr_hf.conversion.export_onnx",
        description="Export one tower of a model, with its projector, to ONNX and compare it with torch.",
        epilog='The tools come with: pip install "cmcr-hf[onnx]"',
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a model with its processor")
    parser.add_argument("--modality", required=True, choices=["image", "text", "audio"], help="which tower")
    parser.add_argument("--space", choices=["clip", "clap"], help="whose text tower (default: the model's default)")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the ONNX file to write")
    arguments = parser.parse_args(argv)
    # What the exporter says of its own optional parts is of no use here.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    try:
        model: Any = CMCRModel.from_pretrained(arguments.model, modalities=[arguments.modality], dtype=torch.float32)
        processor = CMCRProcessor.from_pretrained(arguments.model)
        difference = export_onnx(model, processor, arguments.modality, arguments.output, arguments.space)
    except (ValueError, ImportError, OSError) as error:
        print(f"export_onnx: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: the embeddings differ from torch's by {difference:.1e} at most.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
