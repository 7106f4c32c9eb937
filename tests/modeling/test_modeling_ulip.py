"""The point encoder and towers of ULIP against arrays that the official code made, and what clouds may not change."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies

from cmcr_hf.conversion.convert_ulip import read_ulip
from cmcr_hf.modeling import grouping_ulip
from cmcr_hf.modeling.configuration_ulip import UlipConfig
from cmcr_hf.modeling.modeling_ulip import UlipModel

POINT = {
    "num_groups": 16,
    "group_size": 8,
    "group_hidden_size": 32,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "layer_norm_eps": 1e-6,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "vocab_size": 64,
    "hidden_act": "quick_gelu",
    "bos_token_id": 62,
    "eos_token_id": 63,
    "pad_token_id": 0,
}


def config(**changes):
    return UlipConfig(
        **{"point_config": POINT, "vision_config": VISION, "text_config": TEXT, "projection_dim": 32} | changes
    )


@pytest.fixture(scope="module")
def official(shared):
    fields = {"point_config": POINT, "vision_config": VISION, "text_config": TEXT}
    return read_ulip(shared / "official/golden/ulip_small.pt", fields)[0]


@pytest.fixture(scope="module")
def golden(shared):
    arrays = {}
    for name in ("pointbert_small_io", "ulip_small_io"):
        arrays |= dict(np.load(shared / f"official/golden/{name}.npz", allow_pickle=False))
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture
def from_first_point(monkeypatch):
    """Start the sampling at the first point given, as in the golden arrays."""
    group, sample = grouping_ulip._group_cloud, grouping_ulip._sampled

    def grouped(points, *arguments):
        first = int((grouping_ulip._sorted_by_coordinates(points) == 0).argmax())
        monkeypatch.setattr(grouping_ulip, "_sampled", lambda places, number, _: sample(places, number, first))
        return group(points, *arguments)

    monkeypatch.setattr(grouping_ulip, "_group_cloud", grouped)


@pytest.fixture
def random_model():
    torch.manual_seed(0)
    return UlipModel(config(vision_config=None, text_config=None)).eval()


def assert_golden(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_point_encoder_gives_the_golden_values_at_every_depth(official, golden, from_first_point):
    taken = {}
    point = official.point_model
    hooks = [
        point.group_encoder.register_forward_hook(lambda module, inputs, output: taken.update(tokens=output)),
        point.reduce_dim.register_forward_hook(lambda module, inputs, output: taken.update(reduced=output)),
        point.position2.register_forward_hook(lambda module, inputs, output: taken.update(positions=output)),
        *(
            layer.register_forward_hook(
                lambda module, inputs, output, i=i: taken.update({f"in{i}": inputs[0], f"out{i}": output})
            )
            for i, layer in enumerate(point.layers)
        ),
    ]
    features = point(golden["points"])
    embedding = official.get_point_cloud_features(golden["points"]).pooler_output
    for hook in hooks:
        hook.remove()
    assert_golden(taken["tokens"].unflatten(0, (2, 16)), golden["group_tokens"])
    assert_golden(taken["reduced"], golden["reduced_tokens"])
    assert_golden(taken["positions"], golden["pos"])
    for layer in range(2):
        assert_golden(taken[f"in{layer}"], golden[f"block{layer}_in"])
        assert_golden(taken[f"out{layer}"], golden[f"block{layer}_out"])
    assert_golden(features.last_hidden_state, golden["norm_out"])
    assert_golden(features.pooler_output, golden["features"])
    assert_golden(embedding, golden["embedding"])


def test_centres_and_groups_are_the_golden_ones(golden, from_first_point):
    centers, groups = grouping_ulip.group_points(golden["points"], 16, 8)
    assert torch.equal(centers, golden["center"])
    expected = golden["neighborhood"]
    # The official search gives the points of a group in no order.
    for found, wanted in zip(groups.flatten(0, 1), expected.flatten(0, 1), strict=True):
        assert torch.equal(found[np.lexsort(found.numpy().T)], wanted[np.lexsort(wanted.numpy().T)])


@torch.no_grad()
def test_the_image_and_text_towers_give_the_golden_values(official, golden):
    image = official.get_image_features(golden["image"])
    assert_golden(image.last_hidden_state, golden["vision_norm"])
    assert_golden(image.pooler_output, golden["image_embed"])
    text = official.get_text_features(golden["text"])
    assert_golden(text.last_hidden_state, golden["text_ln_final"])
    assert_golden(text.pooler_output, golden["text_embed"])


def test_the_released_size_has_the_parameters_of_the_released_point_encoder():
    with torch.device("meta"):
        model = UlipModel(UlipConfig())
    assert sum(parameter.numel() for parameter in model.point_model.parameters()) == 21_858_816


@torch.no_grad()
def test_the_order_of_the_points_changes_nothing(random_model):
    cloud = torch.randn(1, 300, 3)
    first = random_model.get_point_cloud_features(cloud).pooler_output
    again = random_model.get_point_cloud_features(cloud[:, torch.randperm(300)]).pooler_output
    assert torch.equal(first, again)


@torch.no_grad()
def test_padding_has_no_effect(random_model):
    short, long = torch.randn(1, 60, 3), torch.randn(1, 100, 3)
    padded = torch.cat([torch.cat([short, torch.full((1, 40, 3), 9.0)], dim=1), long])
    together = random_model.get_point_cloud_features(padded, num_points=torch.tensor([60, 100])).pooler_output
    alone = torch.cat([random_model.get_point_cloud_features(cloud).pooler_output for cloud in (short, long)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_seed_starts_elsewhere_and_repeats(random_model):
    cloud = torch.randn(1, 300, 3)
    embeds = [random_model.get_point_cloud_features(cloud, seed=seed).pooler_output for seed in (None, 1, 1, 2)]
    assert torch.equal(embeds[1], embeds[2])
    assert not torch.equal(embeds[0], embeds[1]) and not torch.equal(embeds[1], embeds[3])


def test_farthest_points_and_neighbours_are_those_of_a_plain_search():
    cloud = torch.rand(1, 700, 3, generator=torch.Generator().manual_seed(3))
    centers, groups = grouping_ulip.group_points(cloud, 20, 8)
    points = cloud[0][np.lexsort(cloud[0].numpy().T[::-1])]
    nearest, chosen = torch.full((700,), torch.inf), 0
    for center, group in zip(centers[0], groups[0], strict=True):
        assert torch.equal(center, points[chosen])
        distance = (points - center).square().sum(dim=1)
        expected = points[distance.argsort()[:8]] - center
        assert torch.equal(group[np.lexsort(group.numpy().T)], expected[np.lexsort(expected.numpy().T)])
        nearest = torch.minimum(nearest, distance)
        chosen = int(nearest.argmax())


@given(
    seed=strategies.integers(0, 2**32 - 1),
    points=strategies.integers(8, 300),
    steps=strategies.sampled_from([2, 5, 1000, None]),
    spread=strategies.sampled_from([1.0, 1e-3, 30.0]),
    start=strategies.sampled_from([None, 3]),
)
@settings(max_examples=60)
def test_every_device_samples_the_same_groups_and_ties_go_by_coordinates(seed, points, steps, spread, start):
    generator = np.random.default_rng(seed)
    clouds = generator.normal(size=(2, points, 4)).astype(np.float32) * np.float32(spread)
    if steps is not None:
        # On a grid, many points are equally far, and some are equal.
        clouds = np.rint(clouds * steps / (3 * spread)).astype(np.float32)
    num_points = torch.tensor([points, 8 + int(generator.integers(0, points - 7))])
    tensor = torch.from_numpy(clouds)
    on_cpu = grouping_ulip.group_points(tensor, 12, 8, num_points=num_points, seed=start)
    padding = torch.arange(points) >= num_points[:, None]
    elsewhere = grouping_ulip._group_clouds(tensor, 12, 8, padding if padding.any() else None, start)
    for one, other in zip(on_cpu, elsewhere, strict=True):
        assert torch.equal(one, other)


def test_a_dense_and_a_lonely_part_of_a_cloud_are_searched_exactly():
    generator = np.random.default_rng(0)
    cloud = np.concatenate([generator.normal(0, 1e-3, (2000, 3)), generator.uniform(-50, 50, (40, 3))])
    cloud = torch.from_numpy(cloud.astype(np.float32))[None]
    centers, groups = grouping_ulip.group_points(cloud, 64, 32)
    for center, group in zip(centers[0], groups[0], strict=True):
        distance = (cloud[0] - center).square()
        nearest = (distance[:, 0] + distance[:, 1] + distance[:, 2]).sort().values[:32]
        found = group.square()
        assert torch.equal((found[:, 0] + found[:, 1] + found[:, 2]).sort().values, nearest)


def test_padding_may_hold_anything():
    clouds = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0))
    num_points = torch.tensor([60, 40])
    padding = torch.arange(60) >= num_points[:, None]
    spoilt = clouds.masked_fill(padding[..., None], torch.nan)
    expected = grouping_ulip.group_points(clouds, 12, 8, num_points=num_points)
    found = grouping_ulip.group_points(spoilt, 12, 8, num_points=num_points)
    elsewhere = grouping_ulip._group_clouds(spoilt, 12, 8, padding, None)
    for one, other, third in zip(expected, found, elsewhere, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_points_that_are_not_finite_are_refused(value):
    clouds = torch.zeros(1, 40, 3)
    clouds[0, 3, 1] = value
    for group in (grouping_ulip.group_points, lambda *given: grouping_ulip._group_clouds(*given, None, None)):
        with pytest.raises(ValueError, match="Expected finite points, got NaN or infinity"):
            group(clouds, 12, 8)


@pytest.mark.parametrize(
    "num_points", [[40], torch.tensor([40.0]), torch.tensor([40, 40]), torch.tensor([41]), torch.tensor(40)]
)
def test_other_numbers_of_points_are_refused(num_points):
    with pytest.raises(ValueError, match="Expected num_points as whole numbers up to 40, one for each of 1 clouds"):
        grouping_ulip.group_points(torch.zeros(1, 40, 3), 12, 8, num_points=num_points)


def test_a_cloud_smaller_than_a_group_is_refused(random_model):
    with pytest.raises(ValueError, match="at least 8 points a cloud, the size of a group, got 7"):
        random_model.get_point_cloud_features(torch.randn(1, 7, 3))


def test_a_cloud_of_fewer_points_than_groups_is_embedded(random_model):
    embeds = random_model.get_point_cloud_features(torch.randn(1, 8, 3)).pooler_output
    assert embeds.isfinite().all()


@pytest.mark.parametrize("shape", [(300, 3), (1, 300, 2), (1, 300, 6)])
def test_another_shape_of_cloud_is_refused(random_model, shape):
    with pytest.raises(ValueError, match=r"Expected point clouds \(clouds, points, 3\)"):
        random_model.get_point_cloud_features(torch.randn(shape))


def test_colours_go_through_the_group_encoder_and_not_through_the_sampling():
    torch.manual_seed(0)
    model = UlipModel(config(point_config=POINT | {"input_channels": 6}, vision_config=None, text_config=None)).eval()
    cloud = torch.randn(1, 100, 6)
    other = cloud.clone()
    other[..., 3:] = 0
    first, second = (grouping_ulip.group_points(clouds, 16, 8) for clouds in (cloud, other))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1][..., :3], second[1][..., :3])
    with torch.no_grad():
        embeds = [model.get_point_cloud_features(clouds).pooler_output for clouds in (cloud, other)]
    assert not torch.allclose(*embeds)


def test_a_missing_tower_is_named(random_model):
    with pytest.raises(ValueError, match="no image tower"):
        random_model.get_image_features(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no text tower"):
        random_model.get_text_features(torch.zeros(1, 4, dtype=torch.long))


@torch.no_grad()
def test_a_saved_model_comes_back_bit_equal(official, golden, tmp_path):
    official.save_pretrained(tmp_path)
    loaded = UlipModel.from_pretrained(tmp_path)
    assert loaded.config.point_config.num_groups == 16
    for name, tensor in official.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_stochastic_depth_acts_in_training_alone():
    torch.manual_seed(0)
    model = UlipModel(config(point_config=POINT | {"drop_path_rate": 0.9}, vision_config=None, text_config=None))
    cloud = torch.randn(4, 100, 3)
    with torch.no_grad():
        assert not torch.equal(*(model.train().get_point_cloud_features(cloud).pooler_output for _ in range(2)))
        assert torch.equal(*(model.eval().get_point_cloud_features(cloud).pooler_output for _ in range(2)))


def test_half_precision_samples_the_same_groups(random_model):
    cloud = torch.randn(1, 300, 3)
    with torch.no_grad():
        full = random_model.get_point_cloud_features(cloud).pooler_output
        half = random_model.to(torch.bfloat16).get_point_cloud_features(cloud).pooler_output.float()
    assert torch.nn.functional.cosine_similarity(full, half).min() > 0.999


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"input_channels": 2}, "input_channels must be at least 3"),
        ({"num_attention_heads": 5}, "must be a multiple"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"group_size": 0}, "group_size must be at least 1"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(changes, expected):
    with pytest.raises(Exception, match=expected):
        config(point_config=POINT | changes)
