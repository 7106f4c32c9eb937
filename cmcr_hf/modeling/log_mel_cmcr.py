# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""The log-mel spectrogram of CLAP in torch, equal to that of [`ClapFeatureExtractor`], which loops over frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# Frames computed at once: what is between the steps stays in the processor's cache, and a frame goes through kernels
# of one size, whatever the length of its clip.
BLOCK = 128


def log_mel(waveform: torch.Tensor, extractor: Any) -> torch.Tensor:
    """Return the log-mel spectrogram in dB of a mono waveform, `(frames, mel bins)` float32 on its device.

    Computed in float64, as the extractor does: a pure tone lifts the silence around it by the rounding of float32. The
    frames are centred on every `hop_length`-th sample, the ends reflected; -100 dB is the floor.

    Args:
        waveform: `(samples,)`, at least half of `extractor.fft_window_size` and one more.
        extractor: a [`ClapFeatureExtractor`], whose filters for its kind of truncation are used.
    """
    size, hop = extractor.fft_window_size, extractor.hop_length
    filters = extractor.mel_filters if extractor.truncation == "fusion" else extractor.mel_filters_slaney
    used = np.flatnonzero(filters.any(axis=1))
    low, high = int(used[0]), int(used[-1]) + 1
    device = waveform.device
    weights = torch.from_numpy(filters[low:high]).to(device, torch.float64)
    window = torch.hann_window(size, dtype=torch.float64, device=device)
    padded = torch.nn.functional.pad(waveform.double()[None], (size // 2, size // 2), mode="reflect")[0]
    frames = padded.unfold(0, size, hop)
    mel = torch.empty(len(frames), weights.shape[1], device=device)
    block = torch.zeros(BLOCK, size, dtype=torch.float64, device=device)
    for start in range(0, len(frames), BLOCK):
        part = frames[start : start + BLOCK]
        torch.mul(part, window, out=block[: len(part)])
        spectrum = torch.view_as_real(torch.fft.rfft(block)[:, low:high])
        power = spectrum.square_().sum(dim=-1)
        mel[start : start + len(part)] = (power @ weights)[: len(part)].clamp_(min=1e-10).log10_().mul_(10)
    return mel
