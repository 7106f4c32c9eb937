"""Small synthetic clips and pictures, as arrays and as encoded files."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

RATE = 8000  # Hz, of the tiny CLAP sources


def noise(samples: int, channels: int | None = None, seed: int = 0) -> np.ndarray:
    shape = samples if channels is None else (channels, samples)
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def chord(samples: int, seed: int = 0) -> np.ndarray:
    """Three tones, which even a random model tells from those of another seed better than noise."""
    random = np.random.default_rng(seed)
    tones = [np.sin(2 * np.pi * pitch * np.arange(samples) / RATE) for pitch in random.uniform(100, 3500, 3)]
    return (random.uniform(0.1, 0.3, 3) @ tones).astype(np.float32)


def encode_audio(samples: np.ndarray, rate: int = RATE, format: str = "WAV", subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def picture(height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def patchwork(height: int = 40, width: int = 56, seed: int = 0) -> Image.Image:
    """Twelve colours, which even a random model tells from those of another seed better than noise."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


def cloud(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.normal(size=(64, 3)) * random.uniform(0.2, 1, 3)).astype(np.float32)


def encode_image(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def peak_growth(code: str, *arguments: object) -> int:
    """Return by how many bytes the peak memory of a process grows when `run()` of `code` is called in it."""
    script = (
        "import sys, re, pathlib\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
        f"{code}\nbefore = peak()\nrun(*sys.argv[1:])\nprint((peak() - before) * 1024)"
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
