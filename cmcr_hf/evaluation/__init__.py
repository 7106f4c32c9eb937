"""Evaluation of connected spaces: tasks, their metrics with intervals, and the baselines a connector has to beat."""

import importlib
from typing import TYPE_CHECKING, Any

# With the first use, as in the package itself: `cmcr evaluate --help` imports no torch.
if TYPE_CHECKING:
    from .baselines import (
        baseline_scores,
        cca_maps,
        closed_cascade,
        derange_by_name,
        linear_map,
        one_way_bridge,
        posterior_matching,
        procrustes_map,
        ridge_map,
        two_hop_scores,
        two_way_bridge,
        unconnected,
    )
    from .bootstrap import bootstrap_means, bootstrap_statistic
    from .embedding import EvaluatedModel
    from .localization import Localizer, measure_localization
    from .recognition import measure_recognition, recognition_metrics
    from .result import Case, EvaluationResult, Published, Shown
    from .retrieval import chance, label_retrieval, pair_retrieval


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("baselines", "bootstrap", "embedding", "result", "retrieval", "localization", "recognition"):
            part = importlib.import_module(f".{module}", __name__)
            if hasattr(part, name):
                return getattr(part, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Case",
    "EvaluatedModel",
    "EvaluationResult",
    "Localizer",
    "Published",
    "Shown",
    "baseline_scores",
    "bootstrap_means",
    "bootstrap_statistic",
    "cca_maps",
    "chance",
    "closed_cascade",
    "derange_by_name",
    "label_retrieval",
    "linear_map",
    "measure_localization",
    "measure_recognition",
    "one_way_bridge",
    "pair_retrieval",
    "posterior_matching",
    "procrustes_map",
    "recognition_metrics",
    "ridge_map",
    "two_hop_scores",
    "two_way_bridge",
    "unconnected",
]
