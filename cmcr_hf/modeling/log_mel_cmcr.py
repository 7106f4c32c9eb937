# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""The log-mel spectrogram of CLAP in torch, equal to that of [`ClapFeatureExtractor`], which loops over frames."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

# Frames computed at once: what is between the steps stays in the processor's cache, and a frame goes through kernels
# of one size, whatever the length of its clip.
BLOCK = 256
# The same of frames that are transformed anew: mostly few or none.
FEW = 64
# Neighbouring filters in one product: of all of them, most weights are zero.
BAND = 16
# By how much rounding in float32 moves small amplitudes of the spectrum at most, as a share of the frame's norm:
# mostly by 1e-7, but where a pure tone is mirrored, at half the rate less its frequency, by ten times as much.
ROUNDING = 2e-6
# By how many dB a transform in float32 may move a value of the log-mel.
TOLERANCE = 0.02
FLOOR = 1e-10
# Of each extractor, what a call would otherwise compute anew.
_TABLES: WeakKeyDictionary[Any, tuple[Any, ...]] = WeakKeyDictionary()


def log_mel(waveform: torch.Tensor, extractor: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the log-mel spectrogram in dB of a mono waveform, `(frames, mel bins)` float32 on its device.

    The extractor transforms in float64. In float32, a frame is transformed in half the time, but what is loud in it
    lifts its silence by the rounding: a pure tone, the bins around it by several dB. So a frame in which that could
    move a bin by more than `TOLERANCE` is transformed in float64, by what the frame itself holds. What follows the
    transform adds positive numbers, for which float32 is enough. The frames are centred on every `hop_length`-th
    sample, the ends reflected; -100 dB is the floor.

    Args:
        waveform: `(samples,)`, at least half of `extractor.fft_window_size` and one more.
        extractor: a [`ClapFeatureExtractor`], whose filters for its kind of truncation are used.
        dtype: of the transform; `torch.float64` equals the extractor to a hundred-thousandth of a dB, at twice the
            cost.
    """
    size, hop, device = extractor.fft_window_size, extractor.hop_length, waveform.device
    filters = extractor.mel_filters if extractor.truncation == "fusion" else extractor.mel_filters_slaney
    tables = _TABLES.get(extractor)
    if tables is None or tables[0] is not filters or tables[1] != device:
        window = torch.hann_window(size, dtype=torch.float64, device=device)
        widths = torch.from_numpy(filters.sum(axis=0)).to(device, torch.float32).sqrt_()
        tables = _TABLES[extractor] = (filters, device, window, window.float(), widths, _bands(filters, device))
    _, _, window, short_window, widths, bands = tables
    reach, last = size // 2, len(waveform) - 1
    ends = waveform[1 : reach + 1].flip(0), waveform[last - reach : last].flip(0)
    frames = torch.cat((ends[0], waveform, ends[1])).unfold(0, size, hop)
    if dtype == torch.float64:
        mel, _ = _mel(frames, window, bands, len(widths))
    else:
        mel, norms = _mel(frames, short_window, bands, len(widths))
        rows = _doubtful(mel, norms, widths)
        if len(rows):
            mel.index_copy_(0, rows, _mel(frames, window, bands, len(widths), rows)[0])
    return mel.clamp_(min=FLOOR).to(dtype).log10_().mul_(10).float()


def _mel(
    frames: torch.Tensor, window: torch.Tensor, bands: Any, bins: int, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mel powers, `(frames, bins)` float32, of frames or of the given rows of them.

    The transform is in the type of the window. So are the norms of the windowed frames, which come second; for given
    rows they are left open.
    """
    low, high, products = bands
    count, dtype, device = len(frames) if rows is None else len(rows), window.dtype, window.device
    size = BLOCK if rows is None else FEW
    mel = torch.empty(count, bins, device=device)
    norms = torch.empty(count, dtype=dtype, device=device)
    block = torch.zeros(size, len(window), dtype=dtype, device=device)
    squares = torch.empty(size, high - low, 2, device=device)
    flat = squares.flatten(1)
    sums = torch.empty(size, bins, device=device)
    parts = [(flat[:, part], weights, sums[:, columns]) for part, columns, weights in products]
    for first in range(0, count, size):
        some = min(size, count - first)
        stop = first + some
        piece = frames[first:stop] if rows is None else frames.index_select(0, rows[first:stop])
        torch.mul(piece, window, out=block[:some])
        if rows is None:
            torch.linalg.vector_norm(block[:some], dim=1, out=norms[first:stop])
        squares.copy_(torch.view_as_real(torch.fft.rfft(block))[:, low:high]).square_()
        for part, weights, out in parts:
            torch.mm(part, weights, out=out)
        mel[first:stop].copy_(sums[:some])
    return mel, norms


def _doubtful(mel: torch.Tensor, norms: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Return the rows in which rounding in float32 could move a mel power above the floor by over `TOLERANCE`.

    Where amplitudes are off by `d` at most, the root of the power in a filter whose weights add up to `w` is, by the
    triangle inequality, off by `d sqrt(w)` at most. A power that stays below the floor with that is no matter.
    """
    least = ROUNDING / (10 ** (TOLERANCE / 20) - 1)
    is_low = mel < norms.square()[:, None] * (least * widths).square()
    if not is_low.any():
        return is_low.new_empty(0, dtype=torch.long)
    roots = mel.sqrt()
    return (is_low & (roots + norms[:, None] * (ROUNDING * widths) > FLOOR**0.5)).any(1).nonzero()[:, 0]


def _bands(filters: np.ndarray, device: torch.device) -> tuple[int, int, list[tuple[slice, slice, torch.Tensor]]]:
    """Cut mel filters, `(frequencies, filters)`, into the products that they consist of.

    Returns:
        The first frequency that a filter uses and the one behind the last; and for each `BAND` of filters, where among
        those the real and imaginary parts of theirs lie, its columns, and its weights of both parts.
    """
    frequencies, columns = np.nonzero(filters)
    low, high = int(frequencies[0]), int(frequencies[-1]) + 1
    bands = []
    for first in range(0, filters.shape[1], BAND):
        # Filters narrower than a frequency are empty.
        rows = frequencies[columns // BAND == first // BAND]
        start, stop = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (low, low)
        band = filters[start:stop, first : first + BAND]
        weights = torch.from_numpy(band.repeat(2, axis=0)).to(device, torch.float32)
        bands.append((slice(2 * (start - low), 2 * (stop - low)), slice(first, first + band.shape[1]), weights))
    return low, high, bands
