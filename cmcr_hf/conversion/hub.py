"""What goes to the Hub beside the weights: the model card, made from `MODEL_CARD.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..modeling.configuration_cmcr import CMCRConfig


def model_card(
    config: CMCRConfig,
    *,
    repo_id: str,
    licences: Mapping[str, str | None],
    licence: str | None = None,
    training_data: Sequence[Mapping[str, Any]] = (),
    training: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    evaluation_command: str | None = None,
    synthetic_note: str | None = None,
) -> ModelCard:
    """Render the card of a connected model. What is not given is said to be missing, not left out in silence.

    Args:
        repo_id: name of the model on the Hub, or of its folder.
        licences: licence of each source by space.
        licence: licence of the projectors, one of the Hub's identifiers such as `apache-2.0`.
        training_data: rows of `name`, `role`, `rows`, `licence`.
        training: settings by name; those that are `None` are left out.
        results: rows with the same keys, the columns of the table.
        evaluation_command: the command that made the results.
        synthetic_note: what of data, sources or results is synthetic.
    """
    sources = []
    for space in config.spaces:
        record = (config.sources or {}).get(space) or {}
        identity = record.get("id", "not recorded")
        # A folder's path says something of a machine, not of a model.
        name = Path(identity).name if Path(identity).is_dir() else identity
        sources.append(
            {"space": space, "id": name, "revision": record.get("revision"), "licence": licences.get(space)}
        )
    on_the_hub = [str(source["id"]) for source in sources if str(source["id"]).count("/") == 1]
    data = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["c-mcr", "cmcr_hf", *config.spaces],
        base_model=on_the_hub or None,
    )
    with as_file(files("cmcr_hf") / "conversion" / "MODEL_CARD.md") as template:
        card: ModelCard = ModelCard.from_template(
            data,
            template_path=str(template),
            repo_id=repo_id,
            sources=sources,
            training_data=list(training_data),
            training=dict(training or {}),
            results=list(results),
            evaluation_command=evaluation_command,
            synthetic_note=synthetic_note,
        )
    return card
