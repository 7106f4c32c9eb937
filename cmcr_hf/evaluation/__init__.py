"""Evaluation of connected spaces: retrieval metrics and the baselines that a connector has to beat."""

from cmcr_hf.evaluation.baselines import (
    baseline_scores,
    cca_maps,
    closed_cascade,
    derange_by_name,
    one_way_bridge,
    posterior_matching,
    procrustes_map,
    ridge_map,
    two_way_bridge,
    unconnected,
)
from cmcr_hf.evaluation.retrieval import chance, label_retrieval, pair_retrieval

__all__ = [
    "baseline_scores",
    "cca_maps",
    "chance",
    "closed_cascade",
    "derange_by_name",
    "label_retrieval",
    "one_way_bridge",
    "pair_retrieval",
    "posterior_matching",
    "procrustes_map",
    "ridge_map",
    "two_way_bridge",
    "unconnected",
]
