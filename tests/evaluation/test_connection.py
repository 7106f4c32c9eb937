import pytest
import torch
import torch.nn.functional as F

from cmcr_hf.evaluation.connection import (
    CLASSIFICATION,
    RetrievalSet,
    Side,
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

    query, gallery = rows(3, 4), rows(2, 6)
    return RetrievalSet(
        Side("clap", "audio", query, AUDIO_LABELS),
        Side("clip", "image", gallery, IMAGE_LABELS),
        rows(5, 4),
        rows(5, 6),
    )


def test_a_connector_is_measured_by_the_cosine_of_its_projections(items):
    torch.manual_seed(0)
    config = CMCRConfig(projectors={"clip": {"input_dim": 6}, "clap": {"input_dim": 4}}, projection_dim=8)
    connector = CMCRConnector(config).eval()
    with torch.no_grad():
        audio = F.normalize(connector.projectors["clap"](items.query.embeds), dim=-1)
        image = F.normalize(connector.projectors["clip"](items.gallery.embeds), dim=-1)
    scores = audio @ image.T
    assert connector_metrics(connector, [items]) == retrieval_metrics(scores, scores.T, AUDIO_LABELS, IMAGE_LABELS)


def test_an_identity_connector_of_aligned_spaces_retrieves_everything():
    config = CMCRConfig(
        projectors={space: {"layout": "identity", "input_dim": 2} for space in ("clip", "clap")}, projection_dim=2
    )
    rows = torch.eye(2)
    query, gallery = Side("clap", "audio", rows[[0, 1, 0]], AUDIO_LABELS), Side("clip", "image", rows, IMAGE_LABELS)
    result = connector_metrics(CMCRConnector(config).eval(), [RetrievalSet(query, gallery, rows, rows)])
    assert result == {
        "audio_to_image": {"P@1": 1.0, "mAP": 1.0},
        "image_to_audio": {"P@1": 1.0, "mAP": 1.0},
    }


def test_the_closed_cascade_is_measured_where_class_names_are_given(items):
    without = baseline_metrics([items])
    items.query_names, items.gallery_names = items.query_bank[:2], items.gallery_bank[:2]
    names = list(baseline_metrics([items]))
    assert names[0] == "chance"
    assert len(names) == len(without) + 1
    assert without["chance"] == chance_metrics(AUDIO_LABELS, IMAGE_LABELS)


def test_a_gallery_of_names_is_measured_by_whether_the_right_one_comes_first():
    config = CMCRConfig(
        projectors={space: {"layout": "identity", "input_dim": 3} for space in ("clip", "ulip")}, projection_dim=3
    )
    names = torch.eye(3)
    # The first is nearest to its own name, the second to its own but for one, the third to the others.
    clouds = F.normalize(torch.tensor([[1.0, 0.1, 0.2], [0.2, 0.5, 1.0], [1.0, 0.5, 0.1]]), dim=-1)
    query = Side("ulip", "point_cloud", clouds, ["ball", "box", "cone"])
    items = RetrievalSet(
        query, Side("clip", "text", names, ["ball", "box", "cone"]), torch.eye(3), torch.eye(3), classify=True
    )
    result = connector_metrics(CMCRConnector(config).eval(), [items])
    assert result == {CLASSIFICATION: pytest.approx({"top-1": 1 / 3, "top-3": 1.0})}
    assert baseline_metrics([items])["chance"] == {CLASSIFICATION: pytest.approx({"top-1": 1 / 3, "top-3": 1.0})}


def test_sets_of_one_query_are_measured_side_by_side(items):
    text = Side("clip", "text", items.gallery.embeds, IMAGE_LABELS)
    table = baseline_metrics([items, RetrievalSet(items.query, text, items.query_bank, items.gallery_bank)])
    ways = ["audio_to_image", "image_to_audio", "audio_to_text", "text_to_audio"]
    assert all(list(metrics) == ways for metrics in table.values())
    assert table["ridge"]["audio_to_text"] == table["ridge"]["audio_to_image"]


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
