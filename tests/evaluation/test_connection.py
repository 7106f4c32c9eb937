import pytest
import torch
import torch.nn.functional as F

from cmcr_hf.evaluation.connection import (
    RetrievalSet,
    baseline_metrics,
    chance_metrics,
    check_classes,
    connector_metrics,
    format_table,
    mean_and_spread,
    retrieval_metrics,
)
from cmcr_hf.modeling.configuration_cmcr import CMCRConfig
from cmcr_hf.modeling.modeling_cmcr import CMCRConnector

AUDIO_LABELS = ["dog", "cat", "dog"]
IMAGE_LABELS = ["dog", "cat"]


def metrics(value, *names):
    return {direction: dict.fromkeys(names, value) for direction in ("audio_to_image", "image_to_audio")}


def test_both_directions_of_a_hand_made_example():
    # Clips 0 and 1 rank their image first, clip 2 (dog) ranks the cat first.
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    result = retrieval_metrics(scores, scores.T, AUDIO_LABELS, IMAGE_LABELS)
    assert result["audio_to_image"] == pytest.approx({"P@1": 2 / 3, "mAP": (1 + 1 + 1 / 2) / 3})
    # The dog image ranks clips 0, 2, 1; the cat image ranks clips 1, 2, 0.
    assert result["image_to_audio"] == pytest.approx({"P@1": 1.0, "mAP": 1.0})


def test_each_direction_has_its_own_scores():
    right = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    result = retrieval_metrics(right, -right.T, AUDIO_LABELS, IMAGE_LABELS)
    assert result["audio_to_image"]["P@1"] == 1
    assert result["image_to_audio"]["P@1"] == 0


def test_precision_at_ten_needs_ten_items_on_both_sides():
    labels = ["dog", "cat"] * 5
    scores = torch.eye(10)
    assert list(retrieval_metrics(scores, scores.T, labels, labels)["audio_to_image"]) == ["P@1", "P@10", "mAP"]
    assert list(retrieval_metrics(scores[:, :9], scores[:, :9].T, labels, labels[:9])["audio_to_image"]) == [
        "P@1",
        "mAP",
    ]


def test_chance_is_the_share_of_the_class_on_the_other_side():
    chance = chance_metrics(AUDIO_LABELS, IMAGE_LABELS)
    assert chance["audio_to_image"]["P@1"] == pytest.approx(1 / 2)
    assert chance["image_to_audio"]["P@1"] == pytest.approx((2 / 3 + 1 / 3) / 2)


@pytest.mark.parametrize(
    ("audio", "image", "expected"),
    [
        (["dog", "cow", "bee"], ["dog"], "The class 'bee', one of 2 such, has audio items but no image"),
        (["dog"], ["dog", "cat"], "The class 'cat', one of 1 such, has image items but no audio"),
    ],
)
def test_a_class_that_one_side_lacks_is_named(audio, image, expected):
    scores = torch.zeros(len(audio), len(image))
    for call in (check_classes, chance_metrics, lambda *labels: retrieval_metrics(scores, scores.T, *labels)):
        with pytest.raises(ValueError, match=expected):
            call(audio, image)


@pytest.fixture
def items():
    generator = torch.Generator().manual_seed(0)

    def rows(count, width):
        return F.normalize(torch.randn(count, width, generator=generator), dim=-1)

    return RetrievalSet(rows(3, 4), rows(2, 6), AUDIO_LABELS, IMAGE_LABELS, rows(5, 4), rows(5, 6))


def test_a_connector_is_measured_by_the_cosine_of_its_projections(items):
    torch.manual_seed(0)
    config = CMCRConfig(projectors={"clip": {"input_dim": 6}, "clap": {"input_dim": 4}}, projection_dim=8)
    connector = CMCRConnector(config).eval()
    with torch.no_grad():
        audio = F.normalize(connector.projectors["clap"](items.audio), dim=-1)
        image = F.normalize(connector.projectors["clip"](items.image), dim=-1)
    scores = audio @ image.T
    assert connector_metrics(connector, items) == retrieval_metrics(scores, scores.T, AUDIO_LABELS, IMAGE_LABELS)


def test_an_identity_connector_of_aligned_spaces_retrieves_everything():
    config = CMCRConfig(
        projectors={space: {"layout": "identity", "input_dim": 2} for space in ("clip", "clap")}, projection_dim=2
    )
    rows = torch.eye(2)
    items = RetrievalSet(rows[[0, 1, 0]], rows, AUDIO_LABELS, IMAGE_LABELS, rows, rows)
    result = connector_metrics(CMCRConnector(config).eval(), items)
    assert result == {
        "audio_to_image": {"P@1": 1.0, "mAP": 1.0},
        "image_to_audio": {"P@1": 1.0, "mAP": 1.0},
    }


def test_the_closed_cascade_is_measured_where_class_names_are_given(items):
    without = baseline_metrics(items)
    items.names_clap, items.names_clip = items.text_clap[:2], items.text_clip[:2]
    names = list(baseline_metrics(items))
    assert names[0] == "chance"
    assert len(names) == len(without) + 1
    assert without["chance"] == chance_metrics(AUDIO_LABELS, IMAGE_LABELS)


def test_mean_and_spread_over_runs():
    mean, spread = mean_and_spread([metrics(0.2, "P@1"), metrics(0.6, "P@1")])
    assert mean["audio_to_image"]["P@1"] == pytest.approx(0.4)
    assert spread["image_to_audio"]["P@1"] == pytest.approx(0.08**0.5)


def test_a_single_run_has_no_spread():
    mean, spread = mean_and_spread([metrics(0.2, "P@1")])
    assert mean["audio_to_image"]["P@1"] == pytest.approx(0.2)
    assert spread["audio_to_image"]["P@1"] == 0


def test_the_table_lines_up_its_columns():
    table = {"chance": metrics(0.05, "P@1", "P@10", "mAP"), "C-MCR, 3 seeds": metrics(0.5, "P@1", "P@10", "mAP")}
    spread = {"C-MCR, 3 seeds": metrics(0.0125, "P@1", "P@10", "mAP")}
    assert format_table(table, spread) == "\n".join(
        [
            "                audio -> image                            image -> audio",
            "                P@1           P@10          mAP           P@1           P@10          mAP",
            "chance          0.050         0.050         0.050         0.050         0.050         0.050",
            "C-MCR, 3 seeds  0.500 ±0.013  0.500 ±0.013  0.500 ±0.013  0.500 ±0.013  0.500 ±0.013  0.500 ±0.013",
        ]
    )


def test_titles_stand_over_narrow_columns_too():
    table = format_table({"model": metrics(0.5, "P@1", "mAP")})
    assert table == "\n".join(
        [
            "       audio -> image  image -> audio",
            "       P@1    mAP      P@1    mAP",
            "model  0.500  0.500    0.500  0.500",
        ]
    )
