"""What a search service needs of a model: milliseconds a query, seconds until the first one, memory.

Random weights of the sizes of CLIP ViT-B/32, a fused CLAP HTSAT-tiny and ULIP-2's PointBERT, in float32. The peer is
the call of transformers that its documentation shows, with its processor, in the same process. Each start is a process
of its own, the files in the system's cache; a load maps a file, and reads a weight where it is first used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ClapModel, CLIPModel

from benchmarks.embedding import plain_steps
from benchmarks.report import format_table
from benchmarks.sources import (
    add_sources_option,
    captions,
    quiet_transformers,
    write_clips,
    write_clouds,
    write_images,
    write_sources,
)
from benchmarks.timing import machine, turns
from cmcr_hf import CMCRModel, CMCRProcessor, UlipModel
from cmcr_hf.training.embed import prepare

MODALITIES = ("text", "image", "audio", "point_cloud")
# Checkpoint, and the towers that are loaded of it.
STARTS: list[tuple[str, tuple[str, ...] | None]] = [
    *(("full", towers) for towers in (None, ("audio", "image"), ("text",), ("image",), ("audio",), ("point_cloud",))),
    ("connector", None),
    ("transformers", None),
]
START = r"""
import json, re, sys, time
start = time.perf_counter()
kind, folder, sources, modalities, queries = json.loads(sys.argv[1])

def memory(field):
    # Linux's own, since ru_maxrss starts at that of the process that starts this one.
    with open("/proc/self/status") as file:
        return int(re.search(field + r":\s+(\d+) kB", file.read())[1])

def forget_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

import torch
from transformers.utils import logging
if kind == "transformers":
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel, CLIPImageProcessorPil, CLIPModel
else:
    from cmcr_hf import CMCRModel, CMCRProcessor
logging.set_verbosity_error()
logging.disable_progress_bar()
imported, memory_imported = time.perf_counter() - start, memory("VmRSS")

if kind == "transformers":
    import soundfile, soxr
    from PIL import Image
    clip, clap = CLIPModel.from_pretrained(sources + "/clip"), ClapModel.from_pretrained(sources + "/clap")
    tokenizer = AutoTokenizer.from_pretrained(sources + "/clip")
    processor = CLIPImageProcessorPil.from_pretrained(sources + "/clip")
    extractor = ClapFeatureExtractor.from_pretrained(sources + "/clap")
    parameters = [*clip.parameters(), *clap.parameters()]
    queries.pop("point_cloud", None)

    def embed(modality, query):
        if modality == "text":
            return clip.get_text_features(**tokenizer([query], padding=True, truncation=True, return_tensors="pt"))
        if modality == "image":
            return clip.get_image_features(**processor([Image.open(query)], return_tensors="pt"))
        samples, rate = soundfile.read(query, dtype="float32")
        clips = [soxr.resample(samples.mean(axis=1), rate, extractor.sampling_rate)]
        inputs = extractor(clips, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return clap.get_audio_features(**inputs)
else:
    from cmcr_hf.training.embed import prepare
    model = CMCRModel.from_pretrained(folder, modalities=modalities)
    processor = CMCRProcessor.from_pretrained(folder)
    parameters = list(model.parameters())

    def embed(modality, query):
        inputs = prepare(processor, modality, [query])
        return getattr(model, "get_" + modality + "_features")(**inputs)

loaded, memory_loaded = time.perf_counter() - start, memory("VmRSS")
with torch.inference_mode():
    first = {}
    for modality, query in queries.items():
        embed(modality, query)
        first.setdefault("seconds", time.perf_counter() - start)
    for parameter in parameters:
        parameter.sum()
    memory_used = memory("VmRSS")
    forget_peak()
    for modality, query in queries.items():
        embed(modality, query)
print(json.dumps({
    "parameters": sum(parameter.numel() for parameter in parameters) / 1e6,
    "import": imported,
    "load": loaded - imported,
    "query": first["seconds"] - loaded,
    "total": first["seconds"],
    "memory_imports": memory_imported / 1024,
    "memory_load": memory_loaded / 1024,
    "memory_used": memory_used / 1024,
    "memory_query": (memory("VmHWM") - memory_used) / 1024,
}))
"""
LATENCY = {
    "what": ("ms a query, alone", ""),
    "p50": ("p50", ".1f"),
    "p95": ("p95", ".1f"),
    "plain_p50": ("transformers p50", ".1f"),
    "plain_p95": ("p95", ".1f"),
    "ratio": ("x as fast", ".2f"),
    "model": ("model alone", ".1f"),
    "share": ("of our time", ".0%"),
}
COLD = {
    "what": ("seconds until the first answer", ""),
    "parameters": ("M parameters", ".0f"),
    "import": ("import", ".2f"),
    "load": ("load", ".2f"),
    "query": ("query", ".2f"),
    "total": ("total", ".2f"),
    "memory_imports": ("MiB: imports", ".0f"),
    "memory_load": ("load", ".0f"),
    "memory_used": ("in use", ".0f"),
    "memory_query": ("+ a query", ".0f"),
}
SEARCH = {"what": ("seconds of a whole command", ""), "seconds": ("seconds", ".2f")}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", choices=("latency", "start", "search"), action="append", help="measure these alone")
    parser.add_argument("--queries", type=int, default=40, help="counted queries of each modality")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each start")
    add_sources_option(parser)
    arguments = parser.parse_args(argv)
    quiet_transformers()
    wanted = arguments.only or ["latency", "start", "search"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sources = arguments.sources or write_sources(folder / "sources", ("clip", "clap", "ulip"))
        queries: dict[str, list[Any]] = {
            "text": captions(arguments.queries),
            "image": write_images(folder / "images", arguments.queries),
            "audio": write_clips(folder / "clips", arguments.queries, 10),
            "point_cloud": write_clouds(folder / "clouds", arguments.queries),
        }
        _save_models(folder, sources)
        print(f"A search service, RANDOM weights, float32\n{machine()}")
        if "latency" in wanted:
            found = _latency(folder / "full", sources, queries)
            print(f"\n{format_table(found, LATENCY)}", flush=True)
            rows += found
        if "start" in wanted:
            found = _starts(folder, sources, queries, arguments.repeats)
            print(f"\n{format_table(found, COLD)}", flush=True)
            rows += found
        if "search" in wanted:
            found = _search(folder, arguments.repeats)
            print(f"\n{format_table(found, SEARCH)}", flush=True)
            rows += found
    return rows


def _save_models(folder: Path, sources: Path) -> None:
    places = {space: sources / space for space in ("clip", "clap", "ulip")}
    model = CMCRModel.from_sources_pretrained(**places)
    processor = CMCRProcessor.from_sources_pretrained(**places)
    model.save_pretrained(folder / "full")
    model.connector.save_pretrained(folder / "connector")
    for name in ("full", "connector"):
        processor.save_pretrained(folder / name)


@torch.inference_mode()
def _latency(folder: Path, sources: Path, queries: dict[str, list[Any]]) -> list[dict[str, Any]]:
    model, processor = CMCRModel.from_pretrained(folder), CMCRProcessor.from_pretrained(folder)
    clip, clap = CLIPModel.from_pretrained(sources / "clip"), ClapModel.from_pretrained(sources / "clap")
    plain = {
        "text": plain_steps(clip, sources / "clip", "text"),
        "image": plain_steps(clip, sources / "clip", "image"),
        "audio": plain_steps(clap, sources / "clap", "audio"),
        "point_cloud": _plain_clouds(UlipModel.from_pretrained(sources / "ulip")),
    }
    rows = []
    for modality in MODALITIES:
        encode = getattr(model, f"get_{modality}_features")
        prepared = [prepare(processor, modality, [value]) for value in queries[modality]]

        def whole(value: Any, modality: str = modality, encode: Callable[..., Any] = encode) -> object:
            return encode(**prepare(processor, modality, [value]))

        seconds = turns(
            {
                "ours": _one_by_one(queries[modality], whole),
                "plain": _one_by_one(queries[modality], lambda value, modality=modality: plain[modality]([value])),
                "model": _one_by_one(prepared, lambda inputs, encode=encode: encode(**inputs)),
            },
            len(prepared),
        )
        middle = {name: 1000 * float(np.percentile(values, 50)) for name, values in seconds.items()}
        high = {name: 1000 * float(np.percentile(values, 95)) for name, values in seconds.items()}
        rows.append(
            {
                "what": TITLES[modality],
                "p50": middle["ours"],
                "p95": high["ours"],
                "plain_p50": middle["plain"],
                "plain_p95": high["plain"],
                "ratio": middle["plain"] / middle["ours"],
                "model": middle["model"],
                "share": middle["model"] / middle["ours"],
            }
        )
    return rows


TITLES = {
    "text": "text",
    "image": "image, 640 x 480 JPEG",
    "audio": "audio, 10 s FLAC",
    "point_cloud": "point cloud, 10,000 points (peer: its UlipModel)",
}


def _one_by_one(values: list[Any], call: Callable[[Any], object]) -> Callable[[], object]:
    """Return a function that calls `call` with the next value each time, with the first again after the last."""
    state = {"next": 0}

    def run() -> object:
        value = values[state["next"] % len(values)]
        state["next"] += 1
        return call(value)

    return run


def _plain_clouds(model: UlipModel) -> Callable[[list[Path]], torch.Tensor]:
    """Return the least that embeds a cloud: transformers has no model that does."""
    return lambda paths: model.get_point_cloud_features(torch.from_numpy(np.load(paths[0]))[None]).pooler_output


def _starts(folder: Path, sources: Path, queries: dict[str, list[Any]], repeats: int) -> list[dict[str, Any]]:
    found: dict[tuple[str, tuple[str, ...] | None], list[dict[str, float]]] = {start: [] for start in STARTS}
    for _ in range(repeats):
        for kind, modalities in STARTS:
            asked = {modality: str(queries[modality][0]) for modality in modalities or MODALITIES}
            argument = json.dumps([kind, str(folder / kind), str(sources), modalities, asked])
            command = [sys.executable, "-c", START, argument]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[kind, modalities].append(json.loads(done.stdout))
    names = {
        "full": "whole model",
        "connector": "connector and its sources",
        "transformers": "transformers: CLIP, CLAP",
    }
    rows = []
    for (kind, modalities), runs in found.items():
        row: dict[str, Any] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        rows.append({"what": ", ".join(modalities) if modalities else names[kind], **row})
    return rows


def _search(folder: Path, repeats: int) -> list[dict[str, Any]]:
    # As the script `cmcr` does it, whose name spares a known search the import of transformers.
    script = "import sys; sys.argv[0] = 'cmcr'; from cmcr_hf.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "search", str(folder / "images"), "--model", str(folder / "full")]
    command += ["--index", str(folder / "index"), "--only", "image"]

    def seconds(command: list[str]) -> float:
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command} ended with status {done.returncode}: {done.stderr}")
        return time.perf_counter() - start

    first = seconds([*command, "--query", "a dog"])
    runs: dict[str, list[float]] = {}
    for turn in range(repeats):
        for name, run in {
            "cmcr search, a new text": [*command, "--query", f"a dog of {turn + 2} colours"],
            "cmcr search, a text asked before": [*command, "--query", "a dog"],
            "python -c 'import torch, transformers'": [sys.executable, "-c", "import torch, transformers"],
            "python -c pass": [sys.executable, "-c", "pass"],
        }.items():
            runs.setdefault(name, []).append(seconds(run))
    number = len(list((folder / "images").iterdir()))
    rows = [{"what": f"cmcr search, the first time: {number} images embedded", "seconds": first}]
    return rows + [{"what": name, "seconds": statistics.median(values)} for name, values in runs.items()]


if __name__ == "__main__":
    main()
