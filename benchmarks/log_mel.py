"""CLAP's log-mel spectrogram: ours in torch, on the CPU and on a GPU, against transformers' extractor.

Noise of 48 kHz; the floor on a GPU is the copy of the samples to it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import ClapFeatureExtractor

from benchmarks.report import format_table
from benchmarks.timing import alternate, machine
from cmcr_hf.modeling.log_mel_cmcr import log_mel

COLUMNS = {
    "what": ("", ""),
    "rate": ("clips/s", ",.1f"),
    "ratio": ("x transformers", ".2f"),
    "error": ("max dB", ".1e"),
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--clips", type=int, default=16, help="clips a round")
    parser.add_argument("--seconds", type=int, default=10, help="length of a clip")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args(argv)
    generator = np.random.default_rng(0)
    extractor = ClapFeatureExtractor(
        truncation="fusion", frequency_min=50, max_length_s=arguments.seconds, padding="repeatpad"
    )
    size = arguments.seconds * extractor.sampling_rate
    clips = [generator.normal(0, 0.1, size).astype(np.float32) for _ in range(arguments.clips)]
    tensors = [torch.from_numpy(clip) for clip in clips]

    def plain() -> list[torch.Tensor]:
        filters = extractor.mel_filters
        return [torch.from_numpy(extractor._np_extract_fbank_features(clip, filters)) for clip in clips]

    def ours(device: str) -> list[torch.Tensor]:
        return [log_mel(tensor.to(device), extractor).cpu() for tensor in tensors]

    contenders: dict[str, Callable[[], list[torch.Tensor]]] = {
        "ClapFeatureExtractor, one core": plain,
        "log_mel on the CPU, one thread": lambda: _one_thread(lambda: ours("cpu")),
    }
    if arguments.device == "cuda":
        contenders["log_mel on the GPU, samples there and spectrogram back"] = lambda: ours("cuda")
        contenders["floor: the samples to the GPU"] = lambda: [tensor.to("cuda").cpu()[:1] for tensor in tensors]
    exact = plain()
    seconds = alternate(contenders, arguments.repeats)
    slowest = seconds["ClapFeatureExtractor, one core"]
    rows = []
    for name, run in contenders.items():
        row = {"what": name, "rate": arguments.clips / seconds[name], "ratio": slowest / seconds[name]}
        if not name.startswith("floor"):
            row["error"] = max((a - b).abs().max().item() for a, b in zip(run(), exact, strict=True))
        rows.append(row)
    print(f"Log-mel of {arguments.clips} clips of {arguments.seconds} s at 48 kHz\n{machine(arguments.device)}\n")
    print(format_table(rows, COLUMNS))
    return rows


def _one_thread(run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run()
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
