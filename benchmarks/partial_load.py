"""Loading the towers of some modalities alone against loading the whole model: seconds and peak memory.

The weights are random, of the sizes of CLIP ViT-B/32 and CLAP HTSAT-tiny; each load is a process of its own. Loading
for the CPU maps a file, and reads a weight where it is first used: the columns tell the two apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import ClapConfig, ClapModel, CLIPConfig, CLIPModel
from transformers.utils import logging

from benchmarks.timing import machine
from cmcr_hf import CMCRModel

LOADS: list[tuple[str, tuple[str, ...] | None]] = [
    *(("full", modalities) for modalities in (None, ("audio", "image"), ("audio",), ("image",), ("text",))),
    *(("connector", modalities) for modalities in (None, ("audio", "image"))),
]
LOAD = r"""
import json, re, sys, time
from cmcr_hf import CMCRModel
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
folder, modalities = json.loads(sys.argv[1])

def peak():
    # Linux's own, since ru_maxrss starts at that of the process that starts this one.
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\s+(\d+) kB", file.read())[1])

before = peak()
start = time.perf_counter()
model = CMCRModel.from_pretrained(folder, modalities=modalities)
loaded, mapped = time.perf_counter() - start, peak()
for parameter in model.parameters():
    parameter.sum()
used = time.perf_counter() - start
print(json.dumps([sum(parameter.numel() for parameter in model.parameters()), loaded, used, before, mapped, peak()]))
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds, after one that fills the file cache")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        # The defaults of transformers are the two models' own sizes.
        CLIPModel(CLIPConfig()).save_pretrained(folder / "clip")
        ClapModel(ClapConfig()).save_pretrained(folder / "clap")
        model = CMCRModel.from_sources_pretrained(folder / "clip", folder / "clap")
        model.save_pretrained(folder / "full")
        model.connector.save_pretrained(folder / "connector")
        del model
        results: dict[tuple[str, tuple[str, ...] | None], list[list[float]]] = {}
        for turn in range(arguments.repeats + 1):
            for kind, modalities in LOADS:
                command = [sys.executable, "-c", LOAD, json.dumps([str(folder / kind), modalities])]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                if turn:
                    results.setdefault((kind, modalities), []).append(json.loads(done.stdout))
    print(
        "Loading a model of RANDOM weights at the sizes of CLIP ViT-B/32 and CLAP HTSAT-tiny, float32\n"
        f"{machine()}; median of {arguments.repeats} processes each, the files in the system's cache\n"
    )
    print(f"{'':<36}{'parameters':>12}{'seconds':>18}{'peak memory, MiB':>24}")
    columns = f"{'million':>12}{'load':>10}{'+ use':>8}{'imports':>10}{'load':>7}{'+ use':>7}"
    print(f"{'checkpoint':<12}{'modalities':<24}{columns}")
    for (kind, modalities), rows in results.items():
        parameters, loaded, used, *peaks = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            f"{kind:<12}{', '.join(modalities or ('not given: all',)):<24}{parameters / 1e6:>12.1f}{loaded:>10.2f}"
            f"{used:>8.2f}{peaks[0] / 1024:>10.0f}{peaks[1] / 1024:>7.0f}{peaks[2] / 1024:>7.0f}"
        )


if __name__ == "__main__":
    main()
