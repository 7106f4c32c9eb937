import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import ablations
from benchmarks.ablation.conclusions import conclusions
from benchmarks.ablation.page import draw, write_ablations
from benchmarks.ablation.results import Table, format_results
from benchmarks.ablation.runs import Run, Schedule, Study, Texts, measure, train_and_measure, training_rows
from benchmarks.ablation.variants import FULL, NULL, OBJECTIVES, PARTS, Variant, variants
from cmcr_hf.evaluation.connection import RetrievalSet, Side, connector_metrics
from cmcr_hf.modeling.modeling_cmcr import CMCRConnector
from cmcr_hf.training.store import EmbeddingStore

LEAVES = ("image", "audio")


def unit_rows(rows: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)), dim=1)


def make_study(large: int = 12) -> Study:
    first, second = unit_rows(large, 0), unit_rows(large, 1)
    about = [f"thing {row // 3}" for row in range(large)]
    kinds = ["labels" if row % 2 else "captions" for row in range(large)]
    query = Side("clap", "audio", unit_rows(16, 4), list("abcd" * 4))
    gallery = Side("clip", "image", unit_rows(20, 5), list("abcd" * 5))
    items = RetrievalSet(query, gallery, second, first, unit_rows(4, 6), unit_rows(4, 7))
    texts = {"texts": Texts(first, second, about, kinds, Schedule(batch_size=6, steps=2))}
    memories = (unit_rows(30, 2), unit_rows(24, 3))
    return Study(("clip", "clap"), "text", texts, memories, items, Schedule(batch_size=8, steps=2))


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study()


def all_variants() -> list[Variant]:
    return variants(("labels", "captions"), "text", LEAVES)


def test_every_variant_has_a_row_of_its_own_and_changes_something() -> None:
    found = all_variants()
    assert len({variant.name for variant in found}) == len(found)
    settings = {repr(replace(variant, name="", group="", against="", dear=False)) for variant in found}
    assert len(settings) == len(found)


@pytest.mark.parametrize("variant", [one for one in all_variants()[1:] if one.share == 1], ids=lambda one: one.name)
def test_every_variant_trains_another_connector(
    variant: Variant, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def remember(connector: CMCRConnector, sets: list[RetrievalSet]) -> dict[str, dict[str, float]]:
        trained.append(connector.project(sets[0].query.embeds, "clap", "audio"))
        return connector_metrics(connector, sets)

    monkeypatch.setattr("benchmarks.ablation.runs.connector_metrics", remember)
    metrics, _ = (train_and_measure(Run("texts", one, 0), study) for one in (variant, all_variants()[0]))
    assert set(metrics) == {"audio_to_image", "image_to_audio"}
    assert 0 < metrics["audio_to_image"]["mAP"] < 1
    assert trained[0].shape != trained[1].shape or not torch.allclose(*trained, atol=1e-6)


def test_without_pseudo_pairs_the_memories_do_not_matter(study: Study) -> None:
    variant = next(one for one in all_variants() if one.name.startswith("without pseudo pairs"))
    others = replace(study, memories=(unit_rows(30, 8), unit_rows(24, 9)))
    assert train_and_measure(Run("texts", variant, 0), study) == train_and_measure(Run("texts", variant, 0), others)


def test_a_variant_that_has_fewer_texts_than_a_batch_is_left_out(study: Study) -> None:
    runs = ablations.planned(study, 1, 0, everything=True)
    assert "10% of the texts" not in {run.variant.name for run in runs}
    assert "labels alone" in {run.variant.name for run in runs}


def test_a_variant_whose_memories_are_smaller_than_a_batch_is_left_out(study: Study) -> None:
    texts = {"texts": replace(study.texts["texts"], schedule=Schedule(batch_size=12, steps=2))}
    small = replace(study, texts=texts, memories=(unit_rows(10, 2), unit_rows(7, 3)))
    names = {run.variant.name for run in ablations.planned(small, 1, 0, everything=True)}
    assert {FULL, "centred on all three modalities", "bridge distillation"} <= names
    assert not {"centred on image alone", "centred on audio alone"} & names
    assert not any(
        run.variant.distils
        for run in ablations.planned(
            replace(small, distillation=Schedule(batch_size=11, steps=2)), 1, 0, everything=True
        )
    )


def test_large_sets_take_the_most_telling_variants_unless_all_are_asked_for() -> None:
    study = make_study(ablations.LARGE + 2)
    few, many = (ablations.planned(study, 2, 5, everything=all_of_them) for all_of_them in (False, True))
    assert [sum(run.variant.name == NULL for run in runs) for runs in (few, many)] == [2, 5]
    assert {run.variant.name for run in few} < {run.variant.name for run in many}
    assert all(run.variant.dear for run in few)
    # The first seed of every variant comes before the second of any.
    assert [run.seed for run in few] == sorted(run.seed for run in few)


def test_the_parts_that_a_variant_takes_away_are_away(study: Study) -> None:
    by_name = {variant.name: variant for variant in all_variants()}
    full = training_rows(Run("texts", by_name[FULL], 0), study)
    nearest = training_rows(Run("texts", by_name["nearest item, not the soft mean of the memory"], 0), study)
    best = (full["clip_text"] @ study.memories[0].T).argmax(dim=1)
    assert torch.equal(nearest["clip_image"], study.memories[0][best])
    assert torch.equal(nearest["clip_text"], full["clip_text"])
    kind = training_rows(Run("texts", by_name["labels alone"], 0), study)
    assert torch.equal(kind["clap_text"], full["clap_text"][1::2])


def test_pools_centred_on_a_leaf_have_its_items_and_the_texts_of_the_same_weights(study: Study) -> None:
    by_name = {variant.name: variant for variant in all_variants()}
    rows = training_rows(Run("texts", by_name["centred on audio alone"], 0), study)
    texts, audio = study.texts["texts"], study.memories[1]
    assert torch.equal(rows["clap_audio"], audio)
    weights = (audio @ texts.second.T / 0.01).softmax(dim=1)
    for name, part in (("clap_text", texts.second), ("clip_text", texts.first)):
        expected = torch.nn.functional.normalize(weights @ part, dim=1)
        assert torch.allclose(rows[name], expected, atol=1e-5)
    three = training_rows(Run("texts", by_name["centred on all three modalities"], 0), study)
    assert {len(part) for part in three.values()} == {12 + 30 + 24}


def test_the_null_breaks_the_pairing_of_the_spaces_alone(study: Study) -> None:
    full, null = (
        training_rows(Run("texts", variant, 0), study) for variant in all_variants() if variant.name in (FULL, NULL)
    )
    assert torch.equal(full["clip_text"], null["clip_text"])
    moved = (null["clap_text"] @ full["clap_text"].T).argmax(dim=1)
    about = study.texts["texts"].about
    assert all(about[row] != about[other] for row, other in enumerate(moved.tolist()))
    assert torch.equal(null["clap_audio"], full["clap_audio"][moved])


def test_what_was_measured_once_is_not_measured_again(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [Run("texts", variant, seed) for variant in all_variants()[:2] for seed in range(2)]
    first = [metrics for _, metrics in measure(study, runs, tmp_path, workers=1)]
    monkeypatch.setattr("benchmarks.ablation.runs.train_and_measure", None)
    assert [metrics for _, metrics in measure(study, runs, tmp_path, workers=1)] == first
    assert first[0] != first[1]
    other = replace(study, memories=(study.memories[1], study.memories[0]))
    with pytest.raises(TypeError):
        list(measure(other, runs, tmp_path, workers=1))


def table_of(differences: dict[str, list[float]]) -> Table:
    def metrics(value: float) -> dict[str, dict[str, float]]:
        return {way: {"P@10": value, "mAP": value} for way in ("audio_to_image", "image_to_audio")}

    base = [0.4, 0.41, 0.39]
    runs = {Variant(FULL, ""): [metrics(value) for value in base]}
    for name, change in differences.items():
        runs[Variant(name, PARTS)] = [metrics(value + one) for value, one in zip(base, change, strict=True)]
    free = {"chance": metrics(0.1), "posterior matching": metrics(0.5), "closed cascade": metrics(0.45)}
    return Table("texts", free, runs, {"batch_size": 6, "steps": 2}, {"batch_size": 8, "steps": 1}, 12)


def test_an_effect_is_against_what_a_variant_names() -> None:
    table = table_of({"other": [0.1, 0.1, 0.1]})
    changed = Variant("changed", "", against="other")
    table.runs[changed] = table.full
    assert table.effect(changed).mean == pytest.approx(-0.1)


def test_an_effect_is_the_mean_difference_of_the_same_seeds_with_its_interval() -> None:
    table = table_of({"without noise": [-0.2, -0.22, -0.18], "without gap": [0.01, -0.01, 0.0]})
    large, none = (table.effect(variant) for variant in list(table.runs)[1:])
    assert large.mean == pytest.approx(-0.2)
    # Student's t of 2 degrees of freedom, 4.303, times the standard error of (-0.2, -0.22, -0.18).
    assert large.half_width == pytest.approx(4.303 * 0.02 / 3**0.5)
    assert (large.verdict, none.verdict) == ("loses", "none")
    shown = format_results(table)
    assert "-0.200 ±0.050  loses" in shown
    assert "2 steps of 6 rows; bridge distillation 1 steps of 8 items of either memory:" in shown


def test_the_sentences_say_what_the_figures_do() -> None:
    table = table_of({"without noise": [-0.2, -0.22, -0.18], "without gap": [0.01, -0.01, 0.0]})
    found = conclusions([table])
    parts = found["What each part of the method earns"]
    assert parts[0].startswith("Without noise: mean mAP -0.200") and "as the paper says, the part helps" in parts[0]
    assert "no difference can be told here" in parts[1]
    assert "posterior matching (0.500)" in found["Against ways without a connector"][0]
    assert "Which objective" not in found


def test_what_cannot_be_told_apart_is_not_called_better() -> None:
    table = table_of({})
    table.runs[Variant("Other", OBJECTIVES)] = table.full
    free = table.free["posterior matching"]
    table.free["one-way bridge"] = {way: dict.fromkeys(part, 0.401) for way, part in free.items()}
    found = conclusions([table])
    assert "no difference can be told between Other (0.400) and C-MCR" in found["Which objective"][0]
    against = found["Against ways without a connector"][0]
    assert "It loses to" in against and "posterior matching (0.500)" in against
    assert "No difference can be told from one-way bridge (0.401)." in against


def test_the_page_and_the_plot_name_every_variant(tmp_path: Path) -> None:
    table = table_of({"without noise": [-0.2, -0.22, -0.18], "a & b": [0.0, 0.02, 0.01]})
    plot, page = write_ablations(tmp_path, [table], "caption <1>", {"clip": 0.6})
    for text in (plot.read_text(), page.read_text()):
        assert "without noise" in text and "a &amp; b" in text and "caption &lt;1&gt;" in text
    assert draw([table], "x").count("<circle") == 1  # the other is beyond the border, an arrow


def make_store(
    folder: Path, space: str, modality: str, keys: list[str], seed: int, identity: str = "org/model"
) -> str:
    source = {"id": identity, "revision": "main", "config_hash": "0" * 64}
    store = EmbeddingStore.create(
        folder, space=space, modality=modality, source=source, dim=16, data_fingerprint="0" * 64
    )
    store.append(unit_rows(len(keys), seed), keys)
    store.finish()
    return str(folder)


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, list[str]]:
    words, items = [f"text {row}" for row in range(12)], [f"{'ab'[row % 2]}/{row}" for row in range(8)]
    made = [("clip", "text", words), ("clap", "text", words), ("clip", "image", items), ("clap", "audio", items)]
    paths = [
        make_store(tmp_path / f"{space}-{kind}", space, kind, keys, row)
        for row, (space, kind, keys) in enumerate(made)
    ]
    test = [make_store(tmp_path / f"test-{space}", space, kind, items, 7) for space, kind, _ in made[2:]]
    return {"stores": paths, "test": test}


def test_the_command_takes_any_two_spaces_as_stores(
    stores: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = all_variants()[:2]
    monkeypatch.setattr(ablations, "variants", lambda *_: few)
    output = tmp_path / "out"
    options = ["--batch-size", "4", "--steps", "2", "--seeds", "2", "--null", "0", "--workers", "1"]
    places = ["--cache", str(tmp_path / "cache"), "--output", str(output)]
    ablations.main(["--stores", *stores["stores"], "--test", *stores["test"], *options, *places])
    document = json.loads((output / "ablations.json").read_text())
    assert [row["runs"] for row in document["tables"][0]["connectors"]] == [2, 2]
    assert document["real_data"] is False
    assert (output / "ablations.svg").is_file() and (output / "ablations.html").is_file()
    assert "without the noise of semantic completion" in capsys.readouterr().out


def test_stores_that_do_not_belong_together_are_refused(stores: dict[str, list[str]], tmp_path: Path) -> None:
    schedule = Schedule(4, 2)
    with pytest.raises(ValueError, match="Expected the stores of one modality in two spaces"):
        ablations.study_of_stores([*stores["stores"][:2], *stores["stores"][:2]], stores["test"], None, schedule)
    with pytest.raises(ValueError, match="no store of clap audio under --test"):
        ablations.study_of_stores(stores["stores"], stores["test"][:1], None, schedule)
    with pytest.raises(ValueError, match="clip-text holds 12 rows, expected at least one batch of 13"):
        ablations.study_of_stores(stores["stores"], stores["test"], None, Schedule(13, 2))
    items = [f"{'ab'[row % 2]}/{row}" for row in range(8)]
    foreign = make_store(tmp_path / "foreign", "clip", "image", items, 7, "org/other")
    with pytest.raises(ValueError, match=r"foreign comes from another source than .*clip-text"):
        ablations.study_of_stores(stores["stores"], [foreign, stores["test"][1]], None, schedule)
    pseudo = make_store(tmp_path / "pseudo", "clap", "audio", [f"text {row}" for row in range(12)], 7)
    with pytest.raises(ValueError, match="pseudo holds the text items, as pseudo embeddings do"):
        ablations.study_of_stores([*stores["stores"][:3], pseudo], stores["test"], None, schedule)
    labels = tmp_path / "labels.csv"
    for lines, expected in (
        ([f"{key},a" for key in items], "All test items are of the class 'a'"),
        (["a/0,"], "'a/0' of .* has no label, or two"),
        (["a/0,a", "a/0,b"], "'a/0' of .* has no label, or two"),
    ):
        labels.write_text("\n".join(["key,label", *lines]) + "\n")
        with pytest.raises(ValueError, match=expected):
            ablations.study_of_stores(stores["stores"], stores["test"], labels, schedule)
    labels.write_text("key,label\na/0,a\n")
    with pytest.raises(ValueError, match="has no line in --labels"):
        ablations.study_of_stores(stores["stores"], stores["test"], labels, schedule)


def test_the_null_of_stores_takes_texts_of_another_label_where_all_have_one(
    stores: dict[str, list[str]], tmp_path: Path
) -> None:
    labels = tmp_path / "labels.csv"
    lines = [f"{'ab'[row % 2]}/{row},{'ab'[row % 2]}" for row in range(8)]
    labels.write_text("\n".join(["key,label", *lines]) + "\n")
    given = (stores["stores"], stores["test"], labels, Schedule(4, 2))
    (texts,) = ablations.study_of_stores(*given).texts.values()
    assert texts.about == [f"text {row}" for row in range(12)]
    lines += [f"text {row},{'ab'[row // 6]}" for row in range(12)]
    labels.write_text("\n".join(["key,label", *lines]) + "\n")
    (texts,) = ablations.study_of_stores(*given).texts.values()
    assert texts.about == ["a"] * 6 + ["b"] * 6
