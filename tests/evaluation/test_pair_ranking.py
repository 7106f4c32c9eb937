from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from cmcr_hf.cli import main
from cmcr_hf.evaluation import pair_ranking
from cmcr_hf.evaluation.baselines import BRIDGE_TEMPERATURE, POSTERIOR_TEMPERATURE, TRAINING_FREE, inner_scorer
from cmcr_hf.evaluation.bootstrap import _draws
from cmcr_hf.evaluation.pair_ranking import (
    MEAN,
    Ranked,
    compare_with_bridges,
    measure_rankings,
    posterior_temperatures,
    ranking_cases,
)
from cmcr_hf.evaluation.pairs import PairedSet
from cmcr_hf.evaluation.retrieval import chance, label_retrieval, pair_retrieval, pair_values
from cmcr_hf.modeling.configuration_cmcr import CMCRConfig, source_embedding_dim
from cmcr_hf.modeling.modeling_cmcr import CMCRModel
from cmcr_hf.modeling.towers_cmcr import load_source
from cmcr_hf.training import embed as embedding
from cmcr_hf.training.data import Items
from cmcr_hf.training.embed import source_record
from cmcr_hf.training.posteriors import choose_temperatures
from cmcr_hf.training.store import EmbeddingStore
from tests.media import RATE, encode_audio, encode_image, noise, peak_growth, picture

COLUMNS = ("--columns", "image=picture", "audio=clip")


def texts(count: int) -> Items:
    return Items.listed("text", [f"text {row}" for row in range(count)])


def captioned(items: int, captions: int) -> PairedSet:
    """A set of items with so many captions each, the items being texts too."""
    pairs = [(row, row * captions + place) for row in range(items) for place in range(captions)]
    return PairedSet("set", (texts(items), texts(items * captions)), torch.tensor(pairs))


def unit(rows: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)), dim=1)


def scorers(first: torch.Tensor, second: torch.Tensor):
    return {"model": (inner_scorer(first, second), inner_scorer(second, first))}


def test_rankings_in_blocks_are_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    data, first, second = captioned(12, 3), unit(12, 0), unit(36, 1)
    monkeypatch.setattr(pair_ranking, "_SCORED", 200)
    monkeypatch.setattr(pair_ranking, "_RANKED", 80)
    found = measure_rankings(data, scorers(first, second), resamples=20)
    # Both directions of texts have one name, so the second one is seen.
    metrics = found.metrics["model"]["text_to_text"]
    expected = pair_retrieval(second @ first.T, data.gold(1))
    assert [metrics[name] for name in ("R@1", "R@5", "R@10")] == pytest.approx(
        [expected[name] for name in ("R@1", "R@5", "R@10")]
    )
    assert metrics["median rank"] == expected["median_rank"]
    low, high = found.intervals["model"]["text_to_text"]["R@5"]
    assert low <= metrics["R@5"] <= high


def test_chance_is_what_random_embeddings_give_on_average() -> None:
    data = captioned(15, 2)
    values = [
        measure_rankings(data, scorers(unit(15, seed), unit(30, 100 + seed)), resamples=0).metrics
        for seed in range(60)
    ]
    for name in ("R@1", "R@5", "R@10", "mAP"):
        mean = sum(found["model"]["text_to_text"][name] for found in values) / len(values)
        assert mean == pytest.approx(values[0]["chance"]["text_to_text"][name], abs=0.03)


def test_classes_are_measured_beside_the_pairs() -> None:
    labels = ["dog", "cat", "dog"] * 4
    members = torch.tensor([[label == "cat", label == "dog"] for label in labels])
    pairs = torch.arange(12)[:, None].expand(-1, 2).contiguous()
    data = PairedSet("set", (texts(12), texts(12)), pairs, (members, members), ["cat", "dog"])
    first, second = unit(12, 0), unit(12, 1)
    found = measure_rankings(data, scorers(first, second), resamples=0)
    expected = label_retrieval(second @ first.T, labels, labels)
    assert found.metrics["model"]["text_to_text, by class"] == pytest.approx(expected)
    by_class = PairedSet("set", (texts(12), texts(12)), None, (members, members), ["cat", "dog"])
    alone = measure_rankings(by_class, scorers(first, second), resamples=0)
    assert alone.metrics["model"]["text_to_text"] == pytest.approx(expected)
    assert MEAN not in alone.metrics["model"]


def with_rivals(data: PairedSet, **noise: float) -> Ranked:
    """Rank copies of one set of rows, each with so much noise: the more, the worse."""
    second = unit(data.sizes[1], 3)
    found = {}
    for row, (name, size) in enumerate(noise.items()):
        first = normalize(second + size * unit(data.sizes[0], 10 + row), dim=1)
        found |= {name.replace("_", " "): scorers(first, second)["model"]}
    return measure_rankings(data, found, resamples=200, progress=False)


def test_a_bridge_ranks_better_only_where_the_interval_of_the_difference_excludes_0() -> None:
    data = captioned(60, 1)
    (worse,) = compare_with_bridges(with_rivals(data, posterior_matching=0.2, one_way_bridge=2, ridge=0, model=2))
    assert "text → text, posterior matching ranks better (posterior matching 1.000, the model 0." in worse
    (better,) = compare_with_bridges(with_rivals(data, posterior_matching=2, model=0.2))
    assert "text → text, the model ranks better" in better
    # By plain means one of them always is ahead.
    same = with_rivals(data, posterior_matching=1.5, model=1.5)
    means = [same.metrics[name]["text_to_text"]["mAP"] for name in ("posterior matching", "model")]
    low, high = same.ahead["text_to_text"]["posterior matching"]
    assert means[0] != means[1] and low < means[0] - means[1] < high and low < 0 < high
    assert "text → text, no difference can be told" in compare_with_bridges(same)[0]
    # Of the same queries, which differ more than the methods do.
    own, rival = (same.intervals[name]["text_to_text"]["mAP"] for name in ("model", "posterior matching"))
    assert high - low < (own[1] - own[0]) + (rival[1] - rival[0])
    assert compare_with_bridges(with_rivals(data, ridge=0, model=2)) == []
    without = replace(same, ahead={"text_to_text": {"posterior matching": None}})
    assert compare_with_bridges(without)[0].startswith("Without resamples, no difference can be told")


def test_the_mean_of_both_directions_has_an_interval_over_what_hangs_together() -> None:
    data, first, second = captioned(12, 3), unit(12, 0), unit(36, 1)
    found = measure_rankings(data, scorers(first, second), resamples=300, seed=4, progress=False)
    scores = first @ second.T
    values = [pair_values(scores, data.gold(0), (1,))["R@1"], pair_values(scores.T, data.gold(1), (1,))["R@1"]]
    drawn = torch.cat(list(_draws(12, 300, 4)))
    # Of an item drawn, all of its captions, so that the mean over captions is that over the items' means.
    expected = [(values[0][rows].mean() + values[1].reshape(12, 3).mean(1)[rows].mean()).item() / 2 for rows in drawn]
    low, high = found.intervals["model"][MEAN]["R@1"]
    assert [low, high] == pytest.approx(np.quantile(expected, [0.025, 0.975]).tolist())
    assert low <= found.metrics["model"][MEAN]["R@1"] <= high
    assert set(found.intervals["model"][MEAN]) == set(found.metrics["model"][MEAN])
    assert found.notes == [] and found.intervals["chance"] == {}


def test_the_mean_has_no_interval_where_most_pairs_hang_together() -> None:
    # One text belongs to all items but two.
    pairs = torch.tensor([*([row, 0] for row in range(8)), [8, 1], [9, 2]])
    data = PairedSet("set", (texts(10), texts(3)), pairs)
    found = measure_rankings(data, scorers(unit(10, 0), unit(3, 1)), resamples=20, progress=False)
    assert MEAN in found.metrics["model"] and MEAN not in found.intervals["model"]
    assert "mean of both directions has no interval, since more than half of the pairs" in found.notes[0]


def test_items_without_a_class_are_measured_as_pairs_alone() -> None:
    labels = ["dog", "cat", None, "dog", "cat", None]
    members = torch.tensor([[label == "cat", label == "dog"] for label in labels])
    pairs = torch.arange(6)[:, None].expand(-1, 2).contiguous()
    data = PairedSet("set", (texts(6), texts(6)), pairs, (members, members), ["cat", "dog"])
    first, second = unit(6, 0), unit(6, 1)
    found = measure_rankings(data, scorers(first, second), resamples=20, progress=False)
    kept, own = [0, 1, 3, 4], ["dog", "cat", "dog", "cat"]
    expected = label_retrieval(second[kept] @ first[kept].T, own, own, (1,))
    assert found.metrics["model"]["text_to_text, by class"] == pytest.approx(expected)
    assert found.metrics["chance"]["text_to_text, by class"] == pytest.approx(chance(own, own, (1,)))
    assert "R@5" in found.metrics["model"]["text_to_text"]
    assert data.notes() == [
        "Measured by class without 2 texts and 2 texts, which have no class that the other side has."
    ]


def test_the_rank_of_a_case_is_the_mean_over_its_ties() -> None:
    data = captioned(9, 1)
    best, _ = ranking_cases(data, lambda rows: torch.zeros(9, 9)[rows], torch.linspace(1, 0, 9))
    assert best[0].note == "its average precision; the first right one is at rank 5 of 9"
    two = replace(data, pairs=torch.tensor([[row, row] for row in range(9)] + [[0, 1]]))
    best, _ = ranking_cases(two, lambda rows: torch.zeros(9, 9)[rows], torch.linspace(1, 0, 9))
    # (9 + 1) / (2 + 1), as the median rank counts it.
    assert best[0].note == "its average precision; the first right one is at rank 3.3 of 9"
    assert pair_values(torch.zeros(1, 9), torch.tensor([[0, 1]]), ())["rank"].item() == pytest.approx(10 / 3)


def test_long_rankings_and_resamples_show_their_progress(capsys: pytest.CaptureFixture[str]) -> None:
    data, rows = captioned(12, 1), unit(12, 0)
    measure_rankings(data, scorers(rows, rows), resamples=20)
    assert "ranked: 100%" in (shown := capsys.readouterr().err) and "24/24" in shown and "resampled: 100%" in shown
    measure_rankings(data, scorers(rows, rows), resamples=20, progress=False)
    assert capsys.readouterr().err == ""


def test_the_best_and_the_worst_cases_show_what_is_right() -> None:
    data = captioned(30, 1)
    second = unit(30, 3)
    # The first query finds its own, the last one finds it last.
    first = second.clone()
    first[29] = -second[29]
    found = measure_rankings(data, scorers(first, second), resamples=0)
    precision = torch.diagonal(first @ second.T).double() / 2 + 0.5
    best, worst = ranking_cases(data, inner_scorer(first, second), precision)
    assert found.metrics["model"]["text_to_text"]["R@1"] < 1
    assert [best[0].found[0].right, best[0].found[0].value] == [True, best[0].query.value]
    assert worst[0].query.value == "text 29"
    assert [item.right for item in worst[0].found] == [False, False, False, False, True]


# The command


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three pictures, sounds and clouds, with texts, as a table."""
    rows = ["picture,clip,cloud,caption,other,kind"]
    for row, kind in enumerate(("dog", "cat", "bell")):
        image = Image.fromarray(picture() // (row + 1))
        (tmp_path / f"{kind}.png").write_bytes(encode_image(image))
        (tmp_path / f"{kind}.wav").write_bytes(encode_audio(noise(RATE // 4, seed=row)))
        points = np.random.default_rng(row).normal(size=(64, 3)) * (1, row + 1, 1)
        np.save(tmp_path / f"{kind}.npy", points.astype(np.float32))
        rows.append(f"{kind}.png,{kind}.wav,{kind}.npy,a {kind},the sound of a {kind},{kind}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    bank = [f"a {kind} {verb}" for kind in ("small dog", "loud dog", "cat", "bell") for verb in ("barks", "rings")]
    (tmp_path / "bank.txt").write_text("\n".join(bank))
    return tmp_path


def run(model: Path, data: Path, *columns: str, more: tuple[str, ...] = ()) -> dict:
    arguments = ["evaluate", "retrieval", "--model", str(model), "--data", str(data / "pairs.csv"), "--device", "cpu"]
    arguments += ["--output", str(data / "out"), "--bootstrap", "50", *more, "--columns", *columns]
    assert main(arguments) == 0
    return json.loads((data / "out" / "result.json").read_text())


def run_data_set(tiny_model: Path, tmp_path: Path, images: list[bytes]) -> dict:
    """Evaluate a data set of three pictures, the first with two captions."""
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": image, "path": None} for image in images]
    rows = {"picture": cells, "captions": [["a dog", "a small dog"], ["a cat"], ["a bell"]]}
    features = datasets.Features({"picture": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    arguments = ["evaluate", "retrieval", "--model", str(tiny_model), "--data", str(tmp_path / "set")]
    arguments += ["--columns", "image=picture", "text=captions", "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(arguments) == 0
    return json.loads((tmp_path / "out" / "result.json").read_text())


@pytest.mark.parametrize(
    ("columns", "direction"),
    [
        (("audio=clip", "image=picture"), "audio_to_image"),
        (("audio=clip", "text=caption", "text=other"), "audio_to_text"),
        (("image=picture", "text=caption"), "image_to_text"),
    ],
)
def test_audio_image_and_text_are_ranked_for_each_other(
    tiny_model: Path, data: Path, columns: tuple[str, ...], direction: str
) -> None:
    result = run(tiny_model, data, *columns)
    there = result["metrics"]["model"][direction]
    assert set(there) == {"R@1", "mAP", "median rank"} | ({"R@5"} if "text=other" in columns else set())
    assert 0 <= there["mAP"] <= 1
    assert len(result["intervals"]["model"][direction]["R@1"]) == 2
    assert result["metrics"]["chance"][direction]["R@1"] == pytest.approx(1 / 3)
    assert result["data"]["items"] == {
        {"audio": "clips", "image": "images"}[columns[0].split("=")[0]]: 3,
        {"image": "images", "text": "texts"}[columns[1].split("=")[0]]: 6 if "text=other" in columns else 3,
    }


@pytest.mark.parametrize("columns", [("point_cloud=cloud", "image=picture"), ("point_cloud=cloud", "text=caption")])
def test_point_clouds_are_ranked_for_images_and_texts(
    tiny_ulip_model: Path, data: Path, columns: tuple[str, ...]
) -> None:
    result = run(tiny_ulip_model, data, *columns)
    assert result["title"].startswith("3D-")
    assert set(result["metrics"]["model"]) == {
        "point_cloud_to_" + columns[1].split("=")[0],
        columns[1].split("=")[0] + "_to_point_cloud",
        MEAN,
    }


def test_a_data_set_of_pictures_and_lists_of_captions_is_ranked_and_shown(tiny_model: Path, tmp_path: Path) -> None:
    images = [encode_image(Image.fromarray(picture() // (row + 1))) for row in range(3)]
    result = run_data_set(tiny_model, tmp_path, images)
    assert result["data"]["items"] == {"images": 3, "texts": 4}
    assert result["metrics"]["chance"]["image_to_text"]["R@1"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 3
    assert "cannot be read" not in page
    assert str(tmp_path) not in page


def test_with_a_bank_the_baselines_stand_beside_the_model(
    tiny_model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = ("audio=clip", "image=picture", "class=kind")
    result = run(tiny_model, data, *columns, more=("--bank", str(data / "bank.txt")))
    fitted, bridges = {"ridge", "procrustes", "linear map"}, set(TRAINING_FREE)
    assert set(result["metrics"]) == {"chance", *fitted, *bridges, "closed cascade", "model"}
    assert "audio_to_image, by class" in result["metrics"]["posterior matching"]
    chosen, told = result["notes"]
    assert told.startswith("The model beside what needs no training, but the bank at every query, by mAP: audio → ")
    assert result["settings"]["bridge_temperature"] == BRIDGE_TEMPERATURE
    assert result["settings"]["text_space"] is None and result["model"]["device"] == "cpu"
    temperatures = result["settings"]["posterior_temperatures"]
    assert set(temperatures) == {"clap", "clip"} and all(0 < value < 1 for value in temperatures.values())
    told = " and ".join(f"{temperatures[space]:.3g} in {space}" for space in ("clap", "clip"))
    assert chosen == (
        f"Posterior matching takes the temperatures {told}, chosen from the bank and the items of both sides, without "
        "a look at pairs or classes."
    )
    out = capsys.readouterr().out
    assert "posterior matching" in out
    assert str(data) not in (data / "out" / "result.json").read_text()


def test_temperatures_are_those_of_the_training_else_chosen_without_pairs_else_the_constants() -> None:
    bank, sides, config = (unit(60, 0), unit(60, 1)), (unit(20, 2), unit(20, 3)), CMCRConfig()
    config.posterior_temperatures = {"clip": 0.02, "clap": 0.1}
    assert posterior_temperatures(config, ["clap", "clip"], bank, sides) == (
        (0.1, 0.02),
        "Posterior matching takes the temperatures 0.1 in clap and 0.02 in clip, with which the model was trained.",
    )
    config.posterior_temperatures = None
    chosen = choose_temperatures(bank[0], sides[0], bank[1], sides[1])
    assert posterior_temperatures(config, ["clap", "clip"], bank, sides)[0] == chosen
    # In which order the items come says what belongs together, and changes nothing.
    shuffled = (sides[0].flip(0), sides[1])
    assert posterior_temperatures(config, ["clap", "clip"], bank, shuffled)[0] == chosen
    alike = bank[1][:1].expand(60, -1)
    for few in ((bank[0][:3], bank[1][:3]), (bank[0], alike)):
        found, note = posterior_temperatures(config, ["clap", "clip"], few, sides)
        assert found == (POSTERIOR_TEMPERATURE, POSTERIOR_TEMPERATURE)
        assert "the usual ones of small encoders, since the bank is too small or too uniform" in note


def test_stores_of_a_bank_give_what_the_bank_gives(
    tiny_model: Path, data: Path, tiny_clip: Path, tiny_clap: Path
) -> None:
    columns = ("audio=clip", "image=picture")
    expected = run(tiny_model, data, *columns, more=("--bank", str(data / "bank.txt")))
    for space, source in (("clip", tiny_clip), ("clap", tiny_clap)):
        command = ["embed", "--source", str(source), "--space", space, "--modality", "text", "--device", "cpu"]
        assert main([*command, "--data", str(data / "bank.txt"), "--output", str(data / space)]) == 0
    stores = ("--bank", f"clip={data / 'clip'}", f"clap={data / 'clap'}")
    found = run(tiny_model, data, *columns, more=stores)
    assert found["metrics"] == expected["metrics"]
    assert str(data) not in json.dumps(found)


def test_the_stores_that_an_evaluation_has_kept_serve_as_the_bank_of_another(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = ("audio=clip", "image=picture")
    expected = run(tiny_model, data, *columns, more=("--bank", str(data / "bank.txt")))
    kept = {space: next((data / "out" / "stores").glob(f"{space}-text-*")) for space in ("clip", "clap")}
    stores = ("--bank", *(f"{space}={shutil.move(path, tmp_path / space)}" for space, path in kept.items()))
    assert run(tiny_model, data, *columns, more=stores)["metrics"] == expected["metrics"]
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.startswith("clip.text_model") and name.endswith("fc1.weight"))
    save_file({**weights, name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    arguments = ["evaluate", "retrieval", "--model", str(other), "--data", str(data / "pairs.csv"), "--device", "cpu"]
    arguments += ["--columns", *columns, "--output", str(data / "other"), *stores]
    assert main(arguments) == 1
    assert "was not made by the clip source 'clip'" in capsys.readouterr().err


def test_a_bank_in_one_space_alone_is_refused(
    tiny_model: Path, data: Path, tiny_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["embed", "--source", str(tiny_clip), "--space", "clip", "--modality", "text", "--device", "cpu"]
    assert main([*command, "--data", str(data / "bank.txt"), "--output", str(data / "clip")]) == 0
    arguments = ["evaluate", "retrieval", "--model", str(tiny_model), "--data", str(data / "pairs.csv")]
    arguments += ["--columns", "image=picture", "audio=clip", "--bank", f"clip={data / 'clip'}"]
    assert main([*arguments, "--output", str(data / "out"), "--device", "cpu"]) == 1
    assert "Expected a store of the bank in clap, 16 wide, got none" in capsys.readouterr().err


@pytest.mark.parametrize("bank", ["a dog", "a dog\n" * 5, "a dog\n" * 5 + "a cat"])
def test_a_bank_that_cannot_tell_items_apart_gives_no_verdict(tiny_model: Path, data: Path, bank: str) -> None:
    (data / "bank.txt").write_text(bank)
    result = run(tiny_model, data, "audio=clip", "image=picture", more=("--bank", str(data / "bank.txt")))
    notes = " ".join(result["notes"])
    assert ("The bank has one text, or several that a source cannot tell apart" in notes) == ("cat" not in bank)
    assert ("The model beside what needs no training" in notes) == ("cat" in bank)
    assert "posterior matching" in result["metrics"]


@pytest.fixture
def write_bank(tmp_path: Path, tiny_clip: Path, tiny_clap: Path) -> Callable[..., str]:
    """What writes a store of random rows that says of itself that a source of the tiny model made it, or else."""

    def write(space: str, **changes: object) -> str:
        source = {"clip": tiny_clip, "clap": tiny_clap}[space]
        model, record = load_source(str(source), None, ["text"], {"dtype": torch.float32})
        described = {"modality": "text", "source": source_record(str(record["id"]), None, model), **changes}
        dim = source_embedding_dim(model.config)
        store = EmbeddingStore.create(
            tmp_path / "banks" / f"{space}-{len(list(tmp_path.glob('banks/*')))}",
            space=space,
            dim=dim,
            data_fingerprint="a bank",
            **described,
        )
        store.append(normalize(torch.randn(8, dim), dim=1), [str(row) for row in range(8)])
        store.finish()
        return f"{space}={store.folder}"

    return write


OTHER = {"id": "someone/else", "revision": "0" * 40, "config_hash": "0" * 64}


@pytest.mark.parametrize(
    ("clip", "clap", "expected"),
    [
        ({}, {}, None),
        ({"source": OTHER}, {}, "was not made by the clip source 'clip': it has the id 'else' and not 'clip'"),
        ({}, {"source": OTHER}, "was not made by the clap source 'clap': it has the id 'else' and not 'clap'"),
        ({"modality": "image"}, {}, "hold image in clip and text in clap, expected one that both sources embed: text"),
        ({"modality": "image"}, {"modality": "image"}, "hold image in clip and image in clap, expected one that both"),
    ],
)
def test_stores_of_a_bank_are_of_one_modality_and_of_the_sources_of_the_model(
    tiny_model: Path,
    data: Path,
    write_bank: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    clip: dict,
    clap: dict,
    expected: str | None,
) -> None:
    stores = (write_bank("clip", **clip), write_bank("clap", **clap))
    arguments = ["evaluate", "retrieval", "--model", str(tiny_model), "--data", str(data / "pairs.csv"), "--device"]
    arguments += ["cpu", "--bootstrap", "0", *COLUMNS, "--output", str(data / "out"), "--bank", *stores]
    assert main(arguments) == (0 if expected is None else 1)
    assert (expected or "") in capsys.readouterr().err
    # Nothing was embedded before.
    assert (data / "out" / "stores").exists() == (expected is None)


def test_sides_of_one_space_need_no_bank(tiny_model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "retrieval", "--model", str(tiny_model), "--data", str(data / "pairs.csv")]
    arguments += ["--columns", "image=picture", "text=caption", "--bank", str(data / "bank.txt")]
    assert main([*arguments, "--output", str(data / "out"), "--device", "cpu"]) == 1
    assert "Both sides lie in the clip space" in capsys.readouterr().err


@pytest.mark.parametrize(("items", "best", "worst"), [(3, 3, 0), (7, 7, 0), (11, 8, 3), (20, 8, 8)])
def test_no_case_is_among_the_best_and_the_worst(items: int, best: int, worst: int) -> None:
    data, rows = captioned(items, 1), unit(items, 0)
    found = ranking_cases(data, inner_scorer(rows, rows), torch.rand(items))
    assert [len(cases) for cases in found] == [best, worst]
    assert len({case.query.value for cases in found for case in cases}) == best + worst


def test_cases_are_of_several_classes_where_there_are_several() -> None:
    data, rows = captioned(40, 1), unit(40, 0)
    labels = ["dog"] * 10 + [f"kind {row}" for row in range(20)] + ["cat"] * 10
    names = sorted(set(labels))
    members = torch.tensor([[label == name for name in names] for label in labels])
    data = replace(data, classes=(members, members), class_names=names)
    # Dogs are best and cats worst, which would fill the page alone.
    best, worst = ranking_cases(data, inner_scorer(rows, rows), torch.linspace(1, 0, 40))
    for cases, kind in ((best, "dog"), (worst, "cat")):
        assert [case.query.label for case in cases][:3].count(kind) == 2
        assert len({case.query.label for case in cases}) == 7
        assert sorted((case.score for case in cases), reverse=cases is best) == [case.score for case in cases]


def test_texts_are_compared_in_the_source_of_the_other_side_too(tiny_model: Path, data: Path) -> None:
    result = run(tiny_model, data, "audio=clip", "text=caption")
    assert list(result["metrics"]) == ["chance", "clap alone", "model"]
    within = run(tiny_model, data, "image=picture", "text=caption")
    assert list(within["metrics"]) == ["chance", "clip alone", "model"]
    # The space that the texts went through, whether or not it was named.
    assert result["settings"]["text_space"] == within["settings"]["text_space"] == "clip"
    named = run(tiny_model, data, "audio=clip", "text=caption", more=("--text-space", "clap"))
    assert named["settings"]["text_space"] == "clap"


def test_without_a_bank_a_report_says_what_would_stand_in_it(tiny_model: Path, data: Path) -> None:
    said = "connect clap and clip without training stand here with --bank FILE: texts, which both embed."
    assert said in " ".join(run(tiny_model, data, "audio=clip", "image=picture")["notes"])
    # Of one space, no bank connects anything.
    assert "--bank" not in " ".join(run(tiny_model, data, "text=caption", "image=picture")["notes"])


@pytest.fixture
def benchmark(data: Path) -> Path:
    """Three pairs as AudioCaps, as VGG-SS, as Flickr-SoundNet and as COCO."""
    for name in ("audio", "frames", "val2017", "annotations"):
        (data / name).mkdir()
    for kind in ("dog", "cat", "bell"):
        (data / "audio" / f"{kind}.wav").write_bytes((data / f"{kind}.wav").read_bytes())
        for folder in ("frames", "val2017"):
            (data / folder / f"{kind}.png").write_bytes((data / f"{kind}.png").read_bytes())
    rows = [f"{row},{kind},0,a {kind}" for row, kind in enumerate(("dog", "cat", "bell"))]
    for split in ("test", "val"):
        (data / f"{split}.csv").write_text("\n".join(["audiocap_id,youtube_id,start_time,caption", *rows]))
    (data / "vggss.json").write_text(json.dumps([{"file": kind, "class": kind} for kind in ("dog", "cat", "bell")]))
    (data / "flickr_test.csv").write_text("dog\ncat\nbell")
    images = [{"id": row, "file_name": f"{kind}.png"} for row, kind in enumerate(("dog", "cat", "bell"))]
    captions = [{"image_id": row, "caption": "a thing"} for row in range(3)]
    official = {"images": images, "annotations": captions}
    (data / "annotations" / "captions_val2017.json").write_text(json.dumps(official))
    sentences = [{"raw": "a thing"}]
    karpathy = [
        {"filepath": "val2017", "filename": f"{kind}.png", "split": split, "sentences": sentences}
        for kind, split in (("dog", "test"), ("cat", "test"), ("bell", "val"), ("dog", "val"))
    ]
    (data / "karpathy.json").write_text(json.dumps({"images": karpathy}))
    return data


@pytest.mark.parametrize(
    ("layout", "more", "part"),
    [
        ("audiocaps", (), "3 clips in place of 975"),
        ("audiocaps", ("--split", "test"), "3 clips in place of 975"),
        ("audiocaps", ("--split", "val"), "the split val"),
        ("vgg-ss", (), "3 clips in place of 5,000 or 5,158"),
        ("vgg-ss", ("--list", "{}/flickr_test.csv"), "the list flickr_test.csv"),
        ("flickr-soundnet", (), "3 clips in place of 5,000"),
        ("flickr-soundnet", ("--list", "{}/flickr_test.csv"), "3 clips in place of 5,000"),
        ("karpathy", (), "2 images in place of 5,000"),
        ("karpathy", ("--split", "val"), "the split val"),
        ("coco", (), "the official captions, not a split of Karpathy"),
    ],
)
def test_published_numbers_do_not_stand_beside_another_split_list_or_size(
    tiny_model: Path, benchmark: Path, layout: str, more: tuple[str, ...], part: str
) -> None:
    if layout == "karpathy":
        (benchmark / "karpathy.json").rename(benchmark / "dataset_coco.json")
        layout = "coco"
    arguments = ["evaluate", "retrieval", "--model", str(tiny_model), "--data", str(benchmark), "--device", "cpu"]
    more = tuple(word.format(benchmark) for word in more)
    assert main([*arguments, "--output", str(benchmark / "out"), "--bootstrap", "0", "--layout", layout, *more]) == 0
    result = json.loads((benchmark / "out" / "result.json").read_text())
    assert result["data"]["part"] == part
    assert result["published"] == []
    assert f"This is {part}, which published numbers are not of, so none stand here." in result["notes"]
    assert str(benchmark) not in json.dumps(result)


@pytest.mark.parametrize("layout", ["audiocaps", "vgg-ss", "flickr-soundnet", "coco"])
def test_published_numbers_stand_beside_the_whole_of_what_they_are_of(
    tiny_model: Path, benchmark: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    (benchmark / "karpathy.json").rename(benchmark / "dataset_coco.json")
    size = {"images": [2]} if layout == "coco" else {"clips": [3]}
    whole = [replace(entry, of=size) for entry in pair_ranking.PUBLISHED[layout]]
    monkeypatch.setitem(pair_ranking.PUBLISHED, layout, whole)
    arguments = ["evaluate", "retrieval", "--model", str(tiny_model), "--data", str(benchmark), "--device", "cpu"]
    assert main([*arguments, "--output", str(benchmark / "out"), "--bootstrap", "0", "--layout", layout]) == 0
    result = json.loads((benchmark / "out" / "result.json").read_text())
    assert [entry["model"] for entry in result["published"]] == [entry.model for entry in whole]
    assert result["data"]["part"] is None


def test_a_second_run_embeds_nothing_and_another_table_does(
    tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = ("audio=clip", "image=picture")
    first = run(tiny_model, data, *columns)
    embedded = []
    before = embedding.encode_features
    monkeypatch.setattr(embedding, "encode_features", lambda *all: embedded.append(all) or before(*all))
    assert run(tiny_model, data, *columns)["metrics"] == first["metrics"]
    assert not embedded
    lines = (data / "pairs.csv").read_text().split("\n")
    (data / "pairs.csv").write_text("\n".join(lines[:3]))
    assert run(tiny_model, data, *columns)["data"]["items"] == {"clips": 2, "images": 2}
    assert embedded


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--layout", "ave", "--columns", "image=a"), "--columns goes with --layout pairs, got ave"),
        (("--columns", "picture"), "Expected --columns KIND=COLUMN, got 'picture'"),
        ((*COLUMNS, "--split", "test"), "--split goes with a data set, and {}/pairs.csv is a table. Leave it out."),
        ((*COLUMNS, "--config", "foo"), "--config goes with a data set, and {}/pairs.csv is a table. Leave it out."),
        (("--columns", "image=a", "--files", "b"), "--files goes with a table, and {} is a data set. Leave it out."),
        (("--images", "photos"), "Expected --data, or --images and --audio"),
        (("--layout", "coco"), "cocodataset.org/#download"),
        (("--layout", "coco", "--split", "val"), "has no dataset_coco.json, whose split 'val' is"),
        ((*COLUMNS, "--label", "stem"), "--label goes with --images and --audio, got --data"),
        ((*COLUMNS, "--text-space", "clap"), "--text-space says which source embeds the texts of the data, which has"),
        ((*COLUMNS, "--bank-column", "text"), "--bank-column goes with --bank"),
        ((*COLUMNS, "--bank", "some/nope.txt"), "There is no file or folder 'some/nope.txt'. Name the bank: texts in"),
        ((*COLUMNS, "--bank", "nope"), "There is no file or folder 'nope'. Name the bank: texts in"),
        ((*COLUMNS, "--bank", "/some/nope"), "There is no file or folder '/some/nope'. Name the bank: texts in"),
        ((*COLUMNS, "--bank", "clip=a", "clap=b", "--bank-column", "text"), "with a table or a data set, got stores"),
    ],
)
def test_what_does_not_go_together_is_said_before_the_model_is_loaded(
    data: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], expected: str
) -> None:
    table = data / "pairs.csv" if "image=picture" in more else data
    arguments = ["evaluate", "retrieval", "--model", "no/model", "--data", str(table), "--output", str(data / "out")]
    assert main([*arguments, *more]) == 1
    assert expected.format(data) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("split", "test"), ("layout", "vgg-ss"), ("columns", "image=a"), ("files", "a"), ("config", "a"), ("list", "a")],
)
def test_folders_of_pictures_and_sounds_refuse_the_options_of_data(
    data: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    arguments = ["evaluate", "retrieval", "--model", "no/model", "--images", str(data), "--audio", str(data)]
    assert main([*arguments, "--output", str(data / "out"), f"--{option}", value]) == 1
    assert f"--{option} goes with --data, got --images and --audio. Leave it out." in capsys.readouterr().err


def test_a_bank_of_what_a_source_does_not_embed_is_refused(
    tiny_model: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(CMCRModel, "from_pretrained", lambda *_, **__: loaded.append(1))
    (data / "photos").mkdir()
    (data / "dog.png").rename(data / "photos" / "dog.png")
    (data / "pairs.csv").write_text("picture,clip\ncat.png,cat.wav\nbell.png,bell.wav")
    arguments = ["evaluate", "retrieval", "--model", str(tiny_model), "--data", str(data / "pairs.csv")]
    arguments += ["--columns", "image=picture", "audio=clip", "--bank", str(data / "photos")]
    assert main([*arguments, "--output", str(data / "out"), "--device", "cpu"]) == 1
    assert "The clap source embeds audio and text, but the bank has image items" in capsys.readouterr().err
    assert not loaded and not (data / "out").exists()


def test_what_is_missing_or_cannot_be_read_is_left_out_and_listed(
    tiny_model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "cat.wav").write_bytes(b"no sound")
    with (data / "pairs.csv").open("a") as table:
        table.write("\ndog.png,gone.wav,dog.npy,a dog,a sound,dog\nbell.png,dog.wav,dog.npy,a bell,a sound,bell")
    result = run(
        tiny_model, data, "audio=clip", "image=picture", "class=kind", more=("--bank", str(data / "bank.txt"))
    )
    assert result["data"]["missing"] == ["gone.wav"] and result["data"]["unreadable"] == ["cat.wav"]
    # The picture of the cat had that sound alone.
    assert result["data"]["items"] == {"clips": 2, "images": 2, "classes": 2}
    assert {case["query"]["name"] for case in result["best"]} == {"dog.wav", "bell.wav"}
    said = "Left out: 1 item (no such file, for example gone.wav), 1 item (cannot be read, for example cat.wav)."
    assert said in result["notes"] and said in capsys.readouterr().out
    again = run(tiny_model, data, "audio=clip", "image=picture", "class=kind", more=("--bank", str(data / "bank.txt")))
    assert again["metrics"] == result["metrics"]
    for kind in ("dog", "bell"):
        (data / f"{kind}.wav").write_bytes(b"no sound")
    arguments = ["evaluate", "retrieval", "--model", str(tiny_model), "--data", str(data / "pairs.csv"), "--device"]
    arguments += ["cpu", "--output", str(data / "out"), "--columns", "audio=clip", "text=caption"]
    assert main(arguments) == 1
    assert "holds no rows, of 3 items: " in capsys.readouterr().err


def test_items_that_can_be_read_are_ranked_as_if_there_were_no_others(tiny_model: Path, data: Path) -> None:
    columns = ("image=picture", "audio=clip")
    header, dog, cat, bell = (data / "pairs.csv").read_text().split("\n")
    (data / "pairs.csv").write_text("\n".join([header, dog, bell]))
    expected = run(tiny_model, data, *columns)
    (data / "cat.png").write_bytes(b"no picture")
    (data / "pairs.csv").write_text("\n".join([header, dog, cat, bell]))
    found = run(tiny_model, data, *columns)
    assert found["data"]["unreadable"] == ["cat.png"]
    for direction, metrics in expected["metrics"]["model"].items():
        assert found["metrics"]["model"][direction] == pytest.approx(metrics)


def test_rows_of_a_data_set_with_an_empty_cell_are_passed_over_and_counted_as_those_of_a_table(
    tiny_model: Path, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    captions = ["a dog", "  ", "a cat", None, "a bell", "a train"]
    images = [encode_image(Image.fromarray(picture() // (row + 1))) for row in range(5)]
    features = datasets.Features({"picture": datasets.Image(), "caption": datasets.Value("string")})
    cells = [*({"bytes": image, "path": None} for image in images), None]
    (tmp_path / "set").mkdir()
    rows = datasets.Dataset.from_dict({"picture": cells, "caption": captions}, features=features)
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    lines = []
    for row, caption in enumerate(captions):
        if row < len(images):
            (tmp_path / f"{row}.png").write_bytes(images[row])
        lines.append({"picture": f"{row}.png" if row < len(images) else None, "caption": caption})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = []
    for name, *more in (("pairs.jsonl",), ("set",), ("set", "--limit", "2")):
        arguments = ["evaluate", "retrieval", "--model", str(tiny_model), "--data", str(tmp_path / name), *more]
        arguments += ["--columns", "image=picture", "text=caption", "--output", str(tmp_path / "out")]
        assert main([*arguments, "--device", "cpu"]) == 0
        found.append(json.loads((tmp_path / "out" / "result.json").read_text()))
    table, data_set, limited = found
    assert data_set["data"]["items"] == table["data"]["items"] == {"images": 3, "texts": 3}
    assert data_set["data"]["empty"] == table["data"]["empty"] == 3
    assert "Left out: 3 rows (an empty cell)." in data_set["notes"]
    assert data_set["metrics"]["model"] == table["metrics"]["model"]
    # Of the first two pictures, the second has no caption; those behind them are not looked at.
    assert limited["data"]["items"] == {"images": 1, "texts": 1}


def test_a_picture_in_a_data_set_that_cannot_be_read_goes_with_its_captions(tiny_model: Path, tmp_path: Path) -> None:
    images = [encode_image(Image.fromarray(picture() // (row + 1))) for row in range(2)]
    result = run_data_set(tiny_model, tmp_path, [images[0], b"no picture", images[1]])
    assert result["data"]["unreadable"] == ["set/train/1/picture"]
    assert result["data"]["items"] == {"images": 2, "texts": 3}
    assert result["metrics"]["chance"]["image_to_text"]["R@1"] == pytest.approx((2 / 3 + 1 / 3) / 2)


@pytest.mark.slow
def test_a_large_matrix_of_scores_is_never_whole_in_memory() -> None:
    growth = peak_growth(
        """
import torch
from torch.nn.functional import normalize
from cmcr_hf.evaluation.baselines import inner_scorer
from cmcr_hf.evaluation.pair_ranking import measure_rankings
from cmcr_hf.evaluation.pairs import PairedSet
from cmcr_hf.training.data import Items
torch.set_num_threads(1)
items, captions = 5000, 5
sides = [Items.listed("text", [str(row) for row in range(count)]) for count in (items, items * captions)]
pairs = torch.stack([torch.arange(items * captions) // captions, torch.arange(items * captions)], 1)
data = PairedSet("large", tuple(sides), pairs)
first, second = (normalize(torch.randn(len(side), 8), dim=1) for side in sides)
def run():
    measure_rankings(data, {"model": (inner_scorer(first, second), inner_scorer(second, first))}, resamples=0)
"""
    )
    # Whole, the scores of one direction alone are 500 MB.
    assert growth < 400e6
