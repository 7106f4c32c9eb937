# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""CLAP's feature extractor without chance, for what calls it past the processor, such as the pipelines."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import BatchFeature, ClapFeatureExtractor

from .feature_extraction_cmcr import extract_audio


class CMCRFeatureExtractor(ClapFeatureExtractor):
    """A [`ClapFeatureExtractor`] that gives for a clip, alone or in any batch, the features that the processor gives.

    The base crops long clips at random, and calls a random clip of each batch of short ones longer than it is.
    """

    def __call__(  # type: ignore[override]
        self,
        raw_speech: Any,
        truncation: str | None = None,
        padding: bool | str | None = None,
        max_length: int | None = None,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Return `input_features` and `is_longer` of one mono clip, or of a list or `(clips, samples)` array of them.

        Args:
            truncation, padding, max_length: a `max_length`, or another of the two than the extractor's own, asks for
                what the base does with it.
            sampling_rate: of the clips in Hz, which are resampled where it is another than the extractor's own; its
                own where it is `None`.
        """
        if max_length or truncation not in (None, self.truncation) or padding not in (None, True, self.padding):
            return super().__call__(raw_speech, truncation, padding, max_length, sampling_rate, return_tensors)
        clips = raw_speech if np.ndim(raw_speech[0]) else [raw_speech]
        rate = sampling_rate or self.sampling_rate
        features = [extract_audio(np.asarray(clip, np.float32), self, rate) for clip in clips]
        stacked = {name: np.stack([feature[name] for feature in features]) for name in features[0]}
        return BatchFeature(stacked, tensor_type=return_tensors)


CMCRFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")

__all__ = ["CMCRFeatureExtractor"]
