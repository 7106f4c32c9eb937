import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError

from cmcr_hf import CMCRConfig, CMCRConnector
from cmcr_hf.durable import WriteError, locked
from cmcr_hf.training import posterior_files
from cmcr_hf.training.distillation import UnpairedDataset, check_unpaired, unpaired_data
from cmcr_hf.training.posteriors import choose_temperatures, matches, posteriors, top_weights
from cmcr_hf.training.store import EmbeddingStore
from cmcr_hf.training.train import ConnectorTrainingArguments, main, train_connector

VIEWS = {"clip": 8, "clap": 6}
ROWS = {"clip_image": 40, "clap_audio": 24, "clip_text": 60, "clap_text": 60}


def unpaired_embeds(names=("clip_text", "clap_text", "clip_image", "clap_audio")):
    """Two views of hidden things of five kinds: the texts are the same in both, the items of either side others."""
    embeds = {}
    for name in names:
        space, modality = name.split("_")
        generator = torch.Generator().manual_seed(len(modality))
        kinds = torch.eye(5)[torch.arange(ROWS[name]) % 5]
        view = torch.randn(5, VIEWS[space], generator=torch.Generator().manual_seed(VIEWS[space]))
        noise = torch.randn(ROWS[name], VIEWS[space], generator=generator)
        embeds[name] = F.normalize(kinds @ view + 0.2 * noise, dim=1)
    return embeds


def small_config(**fields):
    projectors = {space: {"input_dim": width} for space, width in VIEWS.items()}
    return CMCRConfig(objective="bridge-distillation", projectors=projectors, projection_dim=8, **fields)


def arguments(folder, **changes):
    defaults = {"per_device_train_batch_size": 20, "num_train_epochs": 3, "disable_tqdm": True, "use_cpu": True}
    return ConnectorTrainingArguments(output_dir=str(folder), **{**defaults, **changes})


def test_a_batch_holds_items_of_both_memories_and_their_matches_through_the_bank(tmp_path):
    embeds = unpaired_embeds()
    config = small_config(posterior_temperatures={"clip": 0.1, "clap": 0.2})
    data = unpaired_data(config, embeds, tmp_path, progress=False)
    assert len(data) == 40
    batch = data.__getitems__([39, 0, 24])
    assert torch.equal(batch["embeds"]["clip_image"], embeds["clip_image"][[39, 0, 24]])
    # The smaller memory has come round once before row 24.
    assert torch.equal(batch["embeds"]["clap_audio"], embeds["clap_audio"][[15, 0, 0]])
    told = [
        (batch["embeds"][name] @ embeds[bank].T / temperature).softmax(dim=1)
        for name, bank, temperature in (("clip_image", "clip_text", 0.1), ("clap_audio", "clap_text", 0.2))
    ]
    torch.testing.assert_close(batch["matches"], told[0] @ told[1].T)


def test_an_epoch_shows_the_items_of_the_smaller_memory_equally_often():
    embeds = {name: torch.arange(rows)[:, None].float() for name, rows in (("clip_image", 48), ("clap_audio", 12))}
    bank = F.normalize(torch.randn(5, 1, generator=torch.Generator().manual_seed(0)), dim=1)
    data = UnpairedDataset(embeds, [posteriors(rows, bank, temperature=1.0) for rows in embeds.values()])
    shown = data.__getitems__(torch.randperm(48, generator=torch.Generator().manual_seed(0)).tolist())["embeds"]
    assert shown["clip_image"].flatten().sort().values.tolist() == list(range(48))
    assert shown["clap_audio"].flatten().long().bincount().tolist() == [4] * 12


def test_the_temperatures_that_were_chosen_stand_in_the_configuration(tmp_path):
    embeds, config = unpaired_embeds(), small_config()
    unpaired_data(config, embeds, tmp_path, progress=False)
    expected = choose_temperatures(*(embeds[name] for name in ("clip_text", "clip_image", "clap_text", "clap_audio")))
    assert config.posterior_temperatures == dict(zip(("clip", "clap"), expected, strict=True))
    config.posterior_temperatures = {"clip": 0.3, "clap": 0.4}
    unpaired_data(config, embeds, tmp_path, progress=False)
    assert config.posterior_temperatures == {"clip": 0.3, "clap": 0.4}


def test_images_are_the_bank_between_texts_and_point_clouds(tmp_path):
    embeds = unpaired_embeds()
    names = {
        "clip_image": embeds["clip_text"],
        "ulip_image": embeds["clap_text"],
        "clip_text": embeds["clip_image"],
        "ulip_point_cloud": embeds["clap_audio"],
    }
    config = CMCRConfig(
        objective="bridge-distillation", projectors={"clip": {"input_dim": 8}, "ulip": {"input_dim": 6}}
    )
    data = unpaired_data(config, names, tmp_path, progress=False)
    assert list(data.items) == ["clip_text", "ulip_point_cloud"]
    temperatures = config.posterior_temperatures
    told = [
        posteriors(embeds["clip_image"], embeds["clip_text"], temperature=temperatures["clip"]),
        posteriors(embeds["clap_audio"][:40], embeds["clap_text"], temperature=temperatures["ulip"]),
    ]
    batch = data.__getitems__(range(24))
    torch.testing.assert_close(batch["matches"], matches(told[0], told[1])[:24])


def test_training_brings_unpaired_items_of_a_kind_together(tmp_path):
    embeds = unpaired_embeds()
    connector, history = train_connector(
        small_config(), embeds, arguments(tmp_path, num_train_epochs=40, learning_rate=0.01), log_lines=False
    )
    scores = connector.project(embeds["clap_audio"], "clap") @ connector.project(embeds["clip_image"], "clip").T
    found = scores.argmax(dim=1) % 5 == torch.arange(24) % 5
    assert found.float().mean() > 0.9
    assert history[0]["loss"] == pytest.approx(history[0]["loss_leaf"], rel=1e-3)


def test_the_same_seed_trains_the_same_weights_and_a_run_that_goes_on_ends_with_them(tmp_path):
    def trained(folder, **changes):
        return train_connector(small_config(), unpaired_embeds(), arguments(tmp_path / folder, **changes))[0]

    whole = trained("whole").state_dict()
    again = trained("again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4")).state_dict()
    other = trained("other", seed=1).state_dict()
    assert all(torch.equal(weights, again[name]) for name, weights in whole.items())
    assert not torch.equal(whole["projectors.clip.layers.0.weight"], other["projectors.clip.layers.0.weight"])


def test_what_cannot_train_is_refused_with_what_to_do(tmp_path):
    embeds = unpaired_embeds()
    with pytest.raises(ValueError, match=r"needs the embeddings \['clap_audio'\]"):
        check_unpaired(small_config(), unpaired_embeds(("clip_text", "clap_text", "clip_image")))
    with pytest.raises(ValueError, match="the same text items in both spaces, at least 4 of them, got 60 and 59"):
        check_unpaired(small_config(), {**embeds, "clap_text": embeds["clap_text"][1:]})
    with pytest.raises(ValueError, match="no item of a memory has a partner"):
        train_connector(small_config(), embeds, arguments(tmp_path), validation_rows=4)
    with pytest.raises(ValueError, match="takes one bank and two memories, got 2 pools"):
        train_connector(small_config(), [embeds, embeds], arguments(tmp_path))
    bridges = [["clip", "clap", "text"], ["clip", "clap", "text"]]
    with pytest.raises(StrictDataclassError, match="expected one bridge"):
        CMCRConfig(objective="bridge-distillation", bridges=bridges)


def test_a_bank_of_one_text_is_refused_whatever_the_temperatures(tmp_path):
    embeds = unpaired_embeds()
    constant = embeds["clip_text"][:1].expand(60, -1) + 1e-8 * torch.arange(60)[:, None]
    for fields in ({}, {"posterior_temperatures": {"clip": 0.1, "clap": 0.1}}):
        with pytest.raises(ValueError, match="All 60 rows of clip_text are the same, expected a bank of text items"):
            train_connector(small_config(**fields), {**embeds, "clip_text": constant}, arguments(tmp_path))
    assert not list(tmp_path.iterdir())


def test_too_few_rows_for_a_batch_are_told_before_the_posteriors_are_computed(tmp_path):
    with pytest.raises(ValueError, match="at least one batch of 50 training rows, got 40"):
        train_connector(small_config(), unpaired_embeds(), arguments(tmp_path, per_device_train_batch_size=50))
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_computes_no_posteriors_anew(tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr(posterior_files, "top_weights", lambda *args: computed.append(1) or top_weights(*args))

    def fail(*args, **kwargs):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr("cmcr_hf.training.train.Trainer.train", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            train_connector(small_config(), unpaired_embeds(), arguments(tmp_path / "run"))
    assert len(computed) == 2
    assert {path.stem for path in (tmp_path / "run" / "posteriors").glob("cl*")} == {"clip_image", "clap_audio"}
    connector, _ = train_connector(small_config(), unpaired_embeds(), arguments(tmp_path / "run"))
    assert len(computed) == 2
    whole, _ = train_connector(small_config(), unpaired_embeds(), arguments(tmp_path / "whole"))
    assert all(torch.equal(weights, whole.state_dict()[name]) for name, weights in connector.state_dict().items())


def test_two_runs_do_not_share_a_folder(tmp_path):
    args = arguments(tmp_path)
    with locked(tmp_path / "posteriors"), pytest.raises(ValueError, match=r"another run is using .*posteriors\."):
        train_connector(small_config(), unpaired_embeds(), args)


def test_several_ranks_are_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setattr(ConnectorTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="bridge-distillation trains in one process, got 2"):
        train_connector(small_config(), unpaired_embeds(), args)


def save_stores(folder, embeds, keys=None):
    """Save stores whose rows have the keys of their modality, or of the one that is named; return their folders."""
    folders = []
    for name, rows in embeds.items():
        space, modality = name.split("_")
        store = EmbeddingStore.create(
            folder / name,
            space=space,
            modality=modality,
            source={"id": f"org/{space}", "revision": "main", "config_hash": "0"},
            dim=rows.shape[1],
            data_fingerprint=name,
        )
        store.append(rows, [f"{keys or modality}-{row}" for row in range(len(rows))])
        store.finish()
        folders.append(str(folder / name))
    return folders


def run_main(folder, stores, *options):
    options += ("--num_train_epochs", "1", "--per_device_train_batch_size", "20", "--disable_tqdm", "True")
    main(["--stores", *stores, "--output_dir", str(folder), "--use_cpu", *options])


def test_the_script_trains_on_two_memories_of_unlike_rows(tmp_path):
    stores = save_stores(tmp_path, unpaired_embeds())
    run_main(tmp_path / "run", stores, "--objective", "bridge-distillation")
    config = CMCRConnector.from_pretrained(tmp_path / "run").config
    assert config.objective == "bridge-distillation"
    assert (config.noise_norm, config.leaf_temperature) == (0.35, 0.2)
    assert set(config.posterior_temperatures) == {"clip", "clap"}
    # Of use to a run that goes on alone.
    assert not (tmp_path / "run" / "posteriors").exists()


def test_a_file_in_the_way_of_the_posteriors_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "posteriors").write_text("mine")
    stores = save_stores(tmp_path, unpaired_embeds())
    with pytest.raises(WriteError, match=r"Cannot write to .*posteriors: File exists\. Move that file away"):
        run_main(tmp_path / "run", stores, "--objective", "bridge-distillation")
    assert (tmp_path / "run" / "posteriors").read_text() == "mine"


def test_pseudo_embeddings_are_no_memories(tmp_path):
    embeds = unpaired_embeds()
    stores = save_stores(tmp_path, embeds)
    pseudo = {"clap_audio": embeds["clap_text"]}
    stores[-1:] = save_stores(tmp_path / "pseudo", pseudo, keys="text")
    with pytest.raises(ValueError, match=r"clap_audio and .*clip_text hold the same items, .* Name the store"):
        run_main(tmp_path / "run", stores, "--objective", "bridge-distillation")


def test_memories_without_the_objective_are_pointed_to_it(tmp_path):
    stores = save_stores(tmp_path, unpaired_embeds())
    with pytest.raises(ValueError, match=r"Row 0 of .*clip_text .* unpaired items: --objective bridge-distillation\."):
        run_main(tmp_path / "run", stores)


def test_a_store_given_twice_is_listed_with_all_others(tmp_path):
    stores = save_stores(tmp_path, unpaired_embeds())
    given = "got clip_text, clap_text, clip_image, clap_audio, clip_image"
    with pytest.raises(ValueError, match=f"Expected one store each of .*, {given}"):
        run_main(tmp_path / "run", [*stores, stores[2]], "--objective", "bridge-distillation")


@pytest.mark.parametrize(
    "options", [("--overlap_temperature", "0.3"), ("--intra_weight", "5"), ("--intra_weight", "0.1")]
)
def test_options_of_another_objective_are_refused(tmp_path, options):
    stores = save_stores(tmp_path, unpaired_embeds())
    with pytest.raises(ValueError, match=f"{options[0]} goes with c-mcr and ex-mcr, not with bridge-distillation"):
        run_main(tmp_path / "run", stores, "--objective", "bridge-distillation", *options)


@pytest.mark.parametrize(
    ("options", "there"),
    [
        (("--objective", "c-mcr"), "bridge-distillation"),
        (("--projection_dim", "16"), "8"),
        (("--noise_norm", "0.5"), "0.35"),
        (("--layout", "linear-bn-relu"), "linear-bn-relu-linear-bn"),
    ],
)
def test_options_that_differ_from_the_configuration_are_refused(tmp_path, options, there):
    stores = save_stores(tmp_path, unpaired_embeds())
    small_config().save_pretrained(tmp_path / "config")
    given = ("--connector_config", str(tmp_path / "config"))
    with pytest.raises(ValueError, match=f"{options[0]} is {options[1]}, and {there} in --connector_config, which"):
        run_main(tmp_path / "run", stores, *given, *options)
    agreeing = ("--objective", "bridge-distillation", "--projection_dim", "8", "--layout", "linear-bn-relu-linear-bn")
    run_main(tmp_path / "run", stores, *given, *agreeing)
    assert CMCRConnector.from_pretrained(tmp_path / "run").config.noise_norm == 0.35
