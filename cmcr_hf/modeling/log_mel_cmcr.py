# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""The log-mel spectrogram of CLAP in torch, equal to that of [`ClapFeatureExtractor`], which loops over frames."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

# Frames computed at once: what is between the steps stays in the processor's cache, and a frame goes through kernels
# of one size, whatever the length of its clip.
BLOCK = 128
# Neighbouring filters in one product: of all of them, most weights are zero.
BAND = 16
# Of each extractor, what a call would otherwise compute anew.
_TABLES: WeakKeyDictionary[Any, tuple[Any, ...]] = WeakKeyDictionary()


def log_mel(waveform: torch.Tensor, extractor: Any) -> torch.Tensor:
    """Return the log-mel spectrogram in dB of a mono waveform, `(frames, mel bins)` float32 on its device.

    The transform is in float64, as the extractor's is: a pure tone lifts the silence around it by the rounding of
    float32. What follows adds positive numbers, for which float32 is enough. The frames are centred on every
    `hop_length`-th sample, the ends reflected; -100 dB is the floor.

    Args:
        waveform: `(samples,)`, at least half of `extractor.fft_window_size` and one more.
        extractor: a [`ClapFeatureExtractor`], whose filters for its kind of truncation are used.
    """
    size, hop, samples, device = extractor.fft_window_size, extractor.hop_length, len(waveform), waveform.device
    filters = extractor.mel_filters if extractor.truncation == "fusion" else extractor.mel_filters_slaney
    tables = _TABLES.get(extractor)
    if tables is None or tables[0] is not filters or tables[1] != device:
        window = torch.hann_window(size, dtype=torch.float64, device=device)
        tables = _TABLES[extractor] = (filters, device, window, *_bands(filters, device))
    _, _, window, low, high, bands = tables
    count = (samples - size % 2) // hop + 1
    mel = torch.empty(count, filters.shape[1], device=device)
    stretch = torch.zeros((BLOCK - 1) * hop + size, dtype=torch.float64, device=device)
    frames = torch.empty(BLOCK, size, dtype=torch.float64, device=device)
    squares = torch.empty(BLOCK, high - low, 2, device=device)
    sums = torch.empty(BLOCK, filters.shape[1], device=device)
    for first in range(0, count, BLOCK):
        some = min(BLOCK, count - first)
        start = first * hop - size // 2
        stop = start + (some - 1) * hop + size
        if start >= 0 and stop <= samples:
            stretch[: stop - start].copy_(waveform[start:stop])
        else:
            places = torch.arange(start, stop, device=device).abs_()
            stretch[: stop - start] = waveform[samples - 1 - (samples - 1 - places).abs_()]
        torch.mul(stretch.unfold(0, size, hop), window, out=frames)
        squares.copy_(torch.view_as_real(torch.fft.rfft(frames))[:, low:high]).square_()
        for parts, columns, weights in bands:
            torch.mm(squares.flatten(1)[:, parts], weights, out=sums[:, columns])
        mel[first : first + some].copy_(sums[:some])
    return mel.clamp_(min=1e-10).double().log10_().mul_(10).float()


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
