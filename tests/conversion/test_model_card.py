from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, parse_eval_result_entries
from transformers import ClapConfig, CLIPConfig, PreTrainedConfig, SiglipConfig, ViTConfig

from cmcr_hf import CMCRConfig, UlipConfig
from cmcr_hf.conversion.hub import EVAL_RESULTS, is_local, model_card, public_name, source_card, write_eval_results

TEMPLATE = Path(__file__).parents[2] / "cmcr_hf" / "conversion" / "MODEL_CARD.md"

CLIP = {"space": "clip", "id": "toy/clip", "revision": "0a1b2c", "licence": "MIT"}
CLAP = {"space": "clap", "id": "toy/clap", "revision": None, "licence": None}
ULIP = {"space": "ulip", "id": "toy/ulip", "revision": "3d4e5f", "licence": "BSD-3-Clause"}

NAMES = {"repo_id": "toy/cmcr", "quoted": '"toy/cmcr"'}

OPTIONAL: dict[str, Any] = {
    "training_data": [{"name": "toy captions", "role": "overlap texts", "rows": 1200, "licence": "CC0"}],
    "training": {
        "objective": "c-mcr",
        "temperatures": {"tau1": 0.01, "tau2": 0.05},
        "noise_variance": 0.004,
        "epochs": 36,
        "seed": None,
    },
    "results": [{"data": "toy pairs", "mAP": 0.25, "P@10": None}, {"data": "toy clips", "mAP": 0.5, "P@10": 0.75}],
    "evaluation_command": "cmcr evaluate toy",
    "synthetic_note": "every picture and sound is drawn by a program.",
}

# Figures made up for the layout.
CONVERSION: dict[str, Any] = {
    "kind": "official heads",
    "file": "clap_clip.pt",
    "sha256": "0123abcd" * 8,
    "reference": "a plain reading of the original layout",
    "differences": {"audio embeddings": 4.125e-07, "text embeddings": 0.0},
    "bound": 1e-06,
}
CONVERSION_SECTION = """| upstream | |
|---|---|
| kind | official heads |
| file | `clap_clip.pt` |
| sha256 | `0123abcd0123abcd0123abcd0123abcd0123abcd0123abcd0123abcd0123abcd` |
| reference | a plain reading of the original layout |

The same inputs through the reference and through this model differ by at most 1e-06:

| output | largest difference |
|---|---|
| audio embeddings | 4.13e-07 |
| text embeddings | 0 |"""


def render(sources: list[dict[str, str | None]], **variables: Any) -> ModelCard:
    data = ModelCardData(license="apache-2.0", library_name="cmcr_hf", tags=["toy"])
    return ModelCard.from_template(data, template_path=str(TEMPLATE), **NAMES, sources=sources, **variables)


def test_the_card_of_a_configuration_names_its_sources_without_their_folders(tmp_path: Path) -> None:
    config = CMCRConfig(
        sources={"clip": {"id": "toy/clip", "revision": "0a1b2c"}, "clap": {"id": str(tmp_path / "my-clap")}}
    )
    card = model_card(config, repo_id="toy/cmcr", licences={"clip": "MIT"}, licence="apache-2.0")
    assert "| clip | toy/clip | 0a1b2c | MIT |" in card.text
    assert "| clap | my-clap | not recorded | not stated |" in card.text
    assert str(tmp_path) not in card.text
    assert card.data.base_model == ["toy/clip"]


@pytest.mark.parametrize(
    ("objective", "said", "cited"),
    [
        ("c-mcr", "after C-MCR ([arXiv 2305.14381](https://arxiv.org/abs/2305.14381)).", 1),
        ("ex-mcr", "after Ex-MCR ([arXiv 2310.08884](https://arxiv.org/abs/2310.08884)).", 2),
        ("bridge-distillation", "trained by bridge distillation.", 1),
    ],
)
def test_the_card_says_and_cites_what_the_projectors_were_trained_for(objective: str, said: str, cited: int) -> None:
    card = model_card(CMCRConfig(objective=objective), repo_id="toy/cmcr", licences={})
    assert said in card.text
    assert card.text.count("@inproceedings{") == cited
    assert card.data.tags[:2] == (["c-mcr", "cmcr_hf"] if objective == "c-mcr" else ["c-mcr", objective])


@pytest.mark.parametrize(
    ("source", "local", "name"),
    [
        ("org/clip", False, "org/clip"),
        ("gpt2", False, "gpt2"),
        ("/a/b/models/clap", True, "clap"),
        ("../models/clap", True, "clap"),
        ("/a/b/clap.pt", True, "clap.pt"),
        ("clap.pt", True, "clap.pt"),
        ("open_clip:ViT-B-32/openai", False, "open_clip:ViT-B-32/openai"),
        ("open_clip:ViT-B-32//a/b/clip.bin", True, "open_clip:ViT-B-32/clip.bin"),
    ],
)
def test_what_is_local_is_told_by_its_name_and_named_without_its_folder(source: str, local: bool, name: str) -> None:
    assert (is_local(source), public_name(source)) == (local, name)


def section(card: ModelCard, title: str) -> str:
    return card.text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0].strip()


def test_metadata_comes_back_from_the_rendered_card() -> None:
    data = render([CLIP, CLAP], **OPTIONAL).data
    assert (data.license, data.library_name, data.tags) == ("apache-2.0", "cmcr_hf", ["toy"])


def test_every_source_is_a_row_with_its_revision_and_licence() -> None:
    assert section(render([CLIP, CLAP]), "Source encoders").splitlines()[2:] == [
        "| clip | toy/clip | 0a1b2c | MIT |",
        "| clap | toy/clap | not recorded | not stated |",
    ]


def test_training_settings_are_rows_and_unset_ones_are_left_out() -> None:
    assert section(render([CLIP, CLAP], **OPTIONAL), "How it was connected").splitlines()[2:6] == [
        "| objective | c-mcr |",
        "| temperatures | tau1 = 0.01, tau2 = 0.05 |",
        "| noise variance | 0.004 |",
        "| epochs | 36 |",
    ]


def test_results_are_a_table_followed_by_the_command_that_made_them() -> None:
    assert section(render([CLIP, CLAP], **OPTIONAL), "Evaluation") == (
        "| data | mAP | P@10 |\n|---|---|---|\n| toy pairs | 0.25 |  |\n| toy clips | 0.5 | 0.75 |\n\n"
        "Made with:\n\n```sh\ncmcr evaluate toy\n```"
    )


def test_training_data_appears_with_its_licence_in_both_tables() -> None:
    card = render([CLIP, CLAP], **OPTIONAL)
    assert "| toy captions | overlap texts | 1200 | CC0 |" in section(card, "Training data")
    assert "| toy captions | CC0 |" in section(card, "Licence of every part")


def test_synthetic_note_is_a_limit_only_when_given() -> None:
    assert "- Synthetic: every picture and sound" in section(render([CLIP, CLAP], **OPTIONAL), "Limits")
    assert "ynthetic" not in render([CLIP, CLAP]).text


def test_missing_parts_are_named_as_missing() -> None:
    card = render([CLIP, CLAP])
    assert section(card, "Training data") == "Not recorded."
    assert section(card, "How it was connected") == "Not recorded."
    assert section(card, "Evaluation") == "No evaluation is recorded."


def test_converted_projectors_are_not_called_trained() -> None:
    card = model_card(CMCRConfig(), repo_id="toy/cmcr", licences={}, conversion=CONVERSION)
    assert section(card, "How it was connected") == (
        "The projectors were converted from an upstream file (see Conversion), not trained by this project."
    )
    assert section(card, "Training data") == "That of the upstream release; nothing was trained here."
    assert section(card, "Conversion") == CONVERSION_SECTION


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"differences": {"text embeddings": 2e-6}}, r"text embeddings .* differ .* by 2e-06, expected at most 1e-06"),
        ({"differences": {"text embeddings": float("nan")}}, "differ from the reference by nan"),
        ({"differences": {}}, "Expected a conversion with the keys"),
        ({"sha": "0"}, "Expected a conversion with the keys"),
    ],
    ids=["beyond the bound", "nan", "nothing compared", "another key"],
)
def test_a_conversion_that_is_not_proven_gets_no_card(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source_card(ClapConfig(), repo_id="toy/clap", licence="cc0-1.0", conversion=CONVERSION | change)


def test_the_metadata_names_tasks_and_data_sets_that_the_hub_knows() -> None:
    rows = [{"name": "a", "dataset": "toy/texts"}, {"name": "folder"}, {"name": "b", "dataset": "toy/texts"}]
    data = model_card(CMCRConfig(), repo_id="toy/cmcr", licences={}, training_data=rows).data
    assert (data.library_name, data.pipeline_tag, data.datasets) == (
        "transformers",
        "feature-extraction",
        ["toy/texts"],
    )
    assert data.tags == ["c-mcr", "cmcr_hf", "clip", "clap"]


def test_the_card_of_heads_alone_says_once_that_they_come_without_source_encoders() -> None:
    card = model_card(CMCRConfig(), repo_id="toy/heads", licences={}, licence="cc-by-4.0")
    assert section(card, "Source encoders") == "Not part of this repository."
    assert section(card, "Licence of every part").splitlines()[3:5] == [
        "| projectors | cc-by-4.0 |",
        "| source encoders | not part of this repository |",
    ]
    assert "not recorded" not in card.text
    sources = {space: {"id": f"toy/{space}"} for space in ("clip", "clap")}
    whole = model_card(CMCRConfig(sources=sources), repo_id="toy/cmcr", licences={})
    assert whole.data.tags == ["c-mcr", "cmcr_hf", "clip", "clap", "zero-shot-image-classification"]


@pytest.mark.parametrize("licence", ["foo licence", "MIT", "", "cc by"])
def test_a_licence_that_the_hub_does_not_know_is_refused(licence: str) -> None:
    message = f"got '{licence}'. Name the licence as the Hub does, such as apache-2.0"
    with pytest.raises(ValueError, match=message):
        model_card(CMCRConfig(), repo_id="toy/cmcr", licences={}, licence=licence)
    with pytest.raises(ValueError, match=message):
        source_card(ClapConfig(), repo_id="toy/clap", licence=licence, conversion=CONVERSION)


@pytest.mark.parametrize(
    ("config", "model_class", "arxiv", "pipeline"),
    [
        (CLIPConfig(), "CLIPModel", "2103.00020", "zero-shot-image-classification"),
        (SiglipConfig(), "SiglipModel", "2303.15343", "zero-shot-image-classification"),
        (ClapConfig(), "ClapModel", "2211.06687", "feature-extraction"),
        (UlipConfig(), "UlipModel", "2305.08275", "feature-extraction"),
        (UlipConfig(vision_config={}, text_config={}), "UlipModel", "2305.08275", "feature-extraction"),
    ],
    ids=["clip", "siglip", "clap", "ulip", "ulip with towers"],
)
def test_the_card_of_a_converted_source_names_file_class_and_paper(
    config: PreTrainedConfig, model_class: str, arxiv: str, pipeline: str
) -> None:
    card = source_card(config, repo_id="toy/source", licence="cc0-1.0", conversion=CONVERSION)
    assert section(card, "Conversion") == CONVERSION_SECTION
    assert f"arXiv:{arxiv}" in section(card, "Citation")
    assert "| weights | cc0-1.0 |" in section(card, "Licence of every part")
    assert (card.data.license, card.data.pipeline_tag) == ("cc0-1.0", pipeline)
    code = section(card, "Usage").split("```python\n")[1].split("```")[0]
    compile(code, "usage", "exec")
    assert f'{model_class}.from_pretrained("toy/source")' in code
    for leftover in ("None", "Undefined", "{{", "{%", "{#", "\n\n\n", " \n"):
        assert leftover not in card.content


def test_a_model_that_is_no_source_gets_no_card() -> None:
    with pytest.raises(ValueError, match=r"one of .*'clap'.*, got 'vit'"):
        source_card(ViTConfig(), repo_id="toy/vit", licence=None, conversion=CONVERSION)


def test_results_on_a_data_set_of_the_hub_are_read_back_by_its_client(tmp_path: Path) -> None:
    row = {"dataset": "toy/pairs", "task": "retrieval", "metric": "mAP", "value": 0.25, "revision": "0a1b"}
    path = write_eval_results(tmp_path, [row, {**row, "metric": "R@1", "value": 0.5, "date": "2026-01-31"}])
    assert path == tmp_path / EVAL_RESULTS
    first, second = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (first.dataset_id, first.task_id, first.value, first.notes) == ("toy/pairs", "retrieval", 0.25, "mAP")
    assert (first.dataset_revision, first.date) == ("0a1b", None)
    assert (second.value, second.notes, second.date) == (0.5, "R@1", "2026-01-31")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dataset": "my-sounds"}, "OWNER/NAME, got 'my-sounds'"), ({"value": float("nan")}, "mAP on toy/pairs is nan")],
)
def test_results_that_the_hub_cannot_place_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_eval_results(
            tmp_path, [{"dataset": "toy/pairs", "task": "retrieval", "metric": "mAP", "value": 0.25} | change]
        )


@pytest.mark.parametrize(
    "variables", [{}, OPTIONAL, {"conversion": CONVERSION_SECTION}], ids=["bare", "full", "converted"]
)
def test_rendered_card_holds_no_template_leftovers(variables: dict[str, Any]) -> None:
    text = render([CLIP, CLAP, ULIP], **variables).content
    for leftover in ("None", "Undefined", "{{", "{%", "{#", "\n\n\n", " \n"):
        assert leftover not in text


@pytest.mark.parametrize(
    ("sources", "methods", "product"),
    [
        ([CLIP, CLAP], ["text", "image", "audio"], "audio @ image.T"),
        ([CLIP, ULIP], ["text", "image", "point_cloud"], "cloud @ image.T"),
        ([CLIP, CLAP, ULIP], ["text", "image", "audio", "point_cloud"], "audio @ image.T"),
    ],
    ids=["clip-clap", "clip-ulip", "all"],
)
def test_usage_is_python_that_calls_what_the_spaces_offer(
    sources: list[dict[str, str | None]], methods: list[str], product: str
) -> None:
    code = section(render(sources), "Usage").removeprefix("```python\n").removesuffix("```")
    compile(code, "usage", "exec")
    offered = [name for name in ("text", "image", "audio", "point_cloud") if f"model.get_{name}_features(" in code]
    assert offered == methods
    assert f"print({product})" in code
    assert 'from_pretrained("toy/cmcr")' in code


def test_card_says_that_training_code_is_a_reimplementation_and_cites_the_paper() -> None:
    text = render([CLIP, CLAP]).text
    assert "upstream released inference code only; the C-MCR code and heads are under CC BY 4.0" in text
    assert "title     = {Connecting Multi-modal Contrastive Representations}" in text
