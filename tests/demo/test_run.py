import json
from dataclasses import replace

import pytest

from cmcr_hf import CMCRModel
from cmcr_hf.cli import main
from cmcr_hf.demo import run
from cmcr_hf.training.recipe import load_recipe


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    """The demonstration with its shipped encoders in a world of a fifth of the size."""
    recipe = load_recipe("demo")
    world = {"images": 12, "sounds": 12, "texts": 60, "test_images": 6, "test_sounds": 6}
    small = replace(recipe, world=world, train=replace(recipe.train, epochs=8, batch_size=256))
    folder = tmp_path_factory.mktemp("demo")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_recipe", lambda name: small)
        table, spread = run.run_demo(folder, seeds=2, derangements=2, report=lines.append)
    return folder, table, spread, "\n".join(lines)


def test_text_alone_connects_the_two_worlds_far_above_chance_and_null(small_demo):
    _, table, _, _ = small_demo
    for direction in ("audio_to_image", "image_to_audio"):
        connected = table["C-MCR, 2 seeds"][direction]["mAP"]
        assert connected > 0.6
        for other in ("chance", "unconnected", "null, 2 derangements"):
            assert table[other][direction]["mAP"] < connected / 2, other


def test_every_baseline_stands_beside_the_connection(small_demo):
    _, table, spread, _ = small_demo
    assert list(table) == [
        "chance",
        "unconnected",
        "ridge",
        "procrustes",
        "linear map",
        "one-way bridge",
        "two-way bridge",
        "posterior matching",
        "closed cascade",
        "C-MCR, 2 seeds",
        "null, 2 derangements",
    ]
    assert set(spread) == {"C-MCR, 2 seeds", "null, 2 derangements"}
    assert spread["C-MCR, 2 seeds"]["audio_to_image"]["mAP"] > 0


def test_the_report_says_that_the_data_is_synthetic_and_where_the_model_is(small_demo):
    folder, table, _, report = small_demo
    assert "SYNTHETIC" in report
    assert f'CMCRModel.from_pretrained("{folder / "model"}")' in report
    assert f"Look at it: {folder / 'report.html'}" in report
    written = json.loads((folder / "demo.json").read_text())
    assert written["synthetic"] is True
    assert written["mean"] == table


def test_the_page_of_the_demo_shows_seeds_null_sounds_and_pictures(small_demo):
    html = (small_demo[0] / "report.html").read_text(encoding="utf-8")
    assert "Everything on this page is synthetic" in html
    assert "cmcr demo --seeds 2 --derangements 2" in html
    value = small_demo[1]["null, 2 derangements"]["audio_to_image"]["mAP"]
    assert f"The null reaches {value:.3f} ±" in html
    assert html.count("data:audio/mpeg;base64,") == 12
    assert html.count("data:image/jpeg;base64,") == 60
    assert len(html) < 3_000_000


def test_the_model_of_the_demo_loads(small_demo):
    model = CMCRModel.from_pretrained(small_demo[0] / "model")
    assert model.config.projection_dim == 128
    assert model.dtype.is_floating_point and model.dtype.itemsize == 4


def test_retraining_takes_its_folder_and_seed_from_the_command_line(monkeypatch, tmp_path, capsys):
    asked = {}
    monkeypatch.setattr(
        "cmcr_hf.demo.retrain.retrain", lambda output, seed: asked.update(output=output, seed=seed) or {"seed": seed}
    )
    assert main(["demo", "--retrain", str(tmp_path), "--seed", "7"]) == 0
    assert asked == {"output": tmp_path, "seed": 7}
    assert json.loads(capsys.readouterr().out) == {"seed": 7}


def test_the_null_of_two_bridges_sends_no_concept_to_one_place_twice():
    recipe = load_recipe("all")
    names = [f"concept {row // 3}" for row in range(36)]
    concepts = {modality: names for modality in recipe.modalities}
    for draw in range(5):
        orders = run._derangements(recipe, concepts, draw)
        assert {space: list(pools) for space, pools in orders.items()} == {
            bridge.space: list(bridge.pools) for bridge in recipe.bridges
        }
        sent = {
            space: {(names[row], names[partner]) for row, partner in enumerate(order.tolist())}
            for space, pools in orders.items()
            for order in pools.values()
        }
        assert all(one != other for pairs in sent.values() for one, other in pairs)
        assert not sent["clap"] & sent["ulip"]
        for pools in orders.values():
            # One map of the concepts for all pools of a bridge.
            assert len({tuple(order.tolist()) for order in pools.values()}) == 1


@pytest.mark.slow
def test_sounds_and_clouds_meet_in_the_space_of_clip_far_above_chance_and_null(tmp_path):
    recipe = load_recipe("all")
    counts = {"images": 20, "sounds": 20, "clouds": 20, "texts": 40}
    tests = {f"test_{name}": 6 for name in counts}
    small = replace(recipe, world=counts | tests, train=replace(recipe.train, epochs=20, batch_size=256))
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_recipe", lambda name: small)
        table, _ = run.run_demo(tmp_path, "all", seeds=1, derangements=1, report=lines.append)
    for direction in ("audio_to_point_cloud", "point_cloud_to_audio"):
        connected = table["Ex-MCR, 1 seeds"][direction]["mAP"]
        assert connected > 0.6
        for other in ("chance", "unconnected", "null, 1 derangements"):
            assert table[other][direction]["mAP"] < connected / 2, other
    assert "by way of CLIP" in "\n".join(lines)
    assert "cmcr demo --world all --seeds 1 --derangements 1" in (tmp_path / "report.html").read_text(encoding="utf-8")
