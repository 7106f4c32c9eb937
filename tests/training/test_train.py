import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import Trainer
from transformers.utils import logging

from cmcr_hf import CMCRConfig, CMCRConnector
from cmcr_hf.training.store import EmbeddingStore
from cmcr_hf.training.train import (
    ConnectionDataset,
    ConnectorTrainingArguments,
    fit_on_device,
    last_checkpoint,
    main,
    ordered_stores,
    run_script,
    train_connector,
)

NAMES = {"clip_text": 6, "clap_text": 4, "clip_image": 6, "clap_audio": 4}


def aligned_embeds(rows, *, noise=0.3):
    """Two linear views of the same hidden vectors: what a bridge can learn to connect."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 4, generator=generator)
    embeds = {}
    for name, width in NAMES.items():
        view = torch.randn(4, width, generator=torch.Generator().manual_seed(len(name.split("_")[0]) + width))
        embeds[name] = F.normalize(hidden @ view + noise * torch.randn(rows, width, generator=generator), dim=-1)
    return embeds


def small_config(**fields):
    spaces = {"clip": {"input_dim": 6}, "clap": {"input_dim": 4}}
    return CMCRConfig(projectors=spaces, projection_dim=8, overlap_temperature=0.1, leaf_temperature=0.1, **fields)


def arguments(folder, **changes):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "num_train_epochs": 4,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return ConnectorTrainingArguments(**{**defaults, **changes})


def equal_weights(a, b):
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_defaults_are_the_schedule_of_the_paper(tmp_path):
    args = ConnectorTrainingArguments(output_dir=str(tmp_path))
    assert (args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size) == (1e-3, 36, 4096)
    assert (args.lr_scheduler_type, args.warmup_steps, args.max_grad_norm) == ("cosine", 0, 0)
    assert args.optim.startswith("adamw_torch")


def test_the_optimizer_is_fused_and_steps_as_the_plain_one(tmp_path):
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path))
    assert kind is torch.optim.AdamW
    assert options["fused"] is True
    results = []
    for fused in (True, False):
        # The same gradients: those of a bias before BatchNorm are rounding errors, of which AdamW makes whole steps.
        generator = torch.Generator().manual_seed(0)
        weights = torch.nn.Parameter(torch.randn(100, generator=generator))
        optimizer = kind([weights], **{**options, "fused": fused})
        for _ in range(5):
            weights.grad = torch.randn(100, generator=generator)
            optimizer.step()
        results.append(weights.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_training_lowers_the_loss_and_connects_held_out_rows(tmp_path):
    _, history = train_connector(
        small_config(noise_norm=0.3),
        aligned_embeds(400),
        arguments(tmp_path, num_train_epochs=15, save_strategy="no"),
        validation_rows=40,
        log_lines=False,
    )
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    evaluation = next(entry for entry in history if "eval_loss" in entry)
    # One of 40 by chance.
    assert evaluation["eval_clip_text_to_clap_text_R@1"] > 0.2
    assert evaluation["eval_clip_image_to_clap_audio_R@5"] > 0.4


def test_every_log_holds_the_terms_of_the_loss(tmp_path):
    _, history = train_connector(
        small_config(intra_weight=0.5), aligned_embeds(48), arguments(tmp_path, save_strategy="no"), log_lines=False
    )
    entries = [entry for entry in history if "loss" in entry]
    assert len(entries) == 4
    for entry in entries:
        expected = entry["loss_overlap"] + entry["loss_leaf"] + 0.5 * entry["loss_intra"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_seed_decides_the_weights(tmp_path):
    runs = [
        train_connector(
            small_config(), aligned_embeds(48), arguments(tmp_path, seed=seed, save_strategy="no"), log_lines=False
        )[0]
        for seed in (3, 3, 4)
    ]
    assert equal_weights(runs[0], runs[1])
    assert not equal_weights(runs[0], runs[2])


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    embeds = aligned_embeds(80)
    whole, _ = train_connector(small_config(), embeds, arguments(tmp_path / "whole"), log_lines=False)
    # Every second step, so that checkpoints fall into the middle of an epoch of five steps.
    stepwise = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    train_connector(small_config(), embeds, arguments(tmp_path / "broken", **stepwise), log_lines=False)
    for step in (4, 10, 18):
        checkpoint = str(tmp_path / "broken" / f"checkpoint-{step}")
        resumed, _ = train_connector(
            small_config(),
            embeds,
            arguments(tmp_path / f"resumed-{step}", resume_from_checkpoint=checkpoint),
            log_lines=False,
        )
        assert equal_weights(resumed, whole), step


def test_accumulated_gradients_are_those_of_the_mean_of_the_micro_batch_losses(tmp_path):
    embeds = aligned_embeds(32)
    config = small_config(noise_norm=0)
    rate = 0.1
    args = arguments(
        tmp_path,
        max_steps=1,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=rate,
        lr_scheduler_type="constant",
        save_strategy="no",
        seed=5,
    )
    trained, _ = train_connector(config, embeds, args, log_lines=False)

    torch.manual_seed(5)
    expected = CMCRConnector(config).train()
    # The order of Trainer's sampler for this seed, read off a run of one batch each.
    seen = []
    original = ConnectionDataset.__getitems__
    ConnectionDataset.__getitems__ = lambda self, indices: seen.append(list(indices)) or original(self, indices)
    try:
        train_connector(config, embeds, args, log_lines=False)
    finally:
        ConnectionDataset.__getitems__ = original
    losses = [expected({name: rows[indices] for name, rows in embeds.items()}).loss for indices in seen[:2]]
    (sum(losses) / 2).backward()
    for name, parameter in expected.named_parameters():
        if parameter.grad is not None:
            updated = parameter - rate * parameter.grad
            torch.testing.assert_close(dict(trained.named_parameters())[name], updated, rtol=1e-4, atol=1e-6)


def test_fewer_rows_than_a_batch_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one batch of 16 training rows, got 8"):
        train_connector(small_config(), aligned_embeds(8), arguments(tmp_path))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("objective", ["c-mcr", "ex-mcr", "bridge-distillation"])
def test_a_row_that_is_not_finite_is_named_before_any_training(tmp_path, monkeypatch, objective, value):
    monkeypatch.setattr("cmcr_hf.training.train.FINITE_ROWS", 4)
    spaces = {"clip": {"input_dim": 6}, "clap": {"input_dim": 4}}
    embeds = {name: rows.half() for name, rows in aligned_embeds(48).items()}
    embeds["clap_audio"][5, 2] = value
    with pytest.raises(ValueError, match=r"^clap_audio row 5 is not finite\."):
        train_connector(CMCRConfig(objective=objective, projectors=spaces), embeds, arguments(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"^clap_audio row 5 of pool 1 is not finite\."):
        train_connector(small_config(), [aligned_embeds(48), embeds], arguments(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_large_finite_rows_of_half_precision_are_taken(tmp_path):
    embeds = {name: torch.full((48, dim), 6e4).half() for name, dim in NAMES.items()}
    train_connector(small_config(), embeds, arguments(tmp_path, max_steps=1, save_strategy="no"), log_lines=False)


@pytest.mark.parametrize("objective", ["c-mcr", "ex-mcr", "bridge-distillation"])
def test_projectors_that_are_all_the_identity_are_refused_for_training(tmp_path, objective):
    spaces = {space: {"input_dim": 6, "layout": "identity"} for space in ("clip", "clap")}
    config = CMCRConfig(objective=objective, projectors=spaces, projection_dim=6)
    with pytest.raises(ValueError, match=r"All projectors of clip and clap are the identity, .* nothing to train"):
        train_connector(config, {name: torch.randn(48, 6) for name in NAMES}, arguments(tmp_path))


def numbered(first, rows):
    """Embeddings whose first coordinate is the row's number among all pools."""
    return {name: torch.arange(first, first + rows)[:, None].float().expand(-1, dim) for name, dim in NAMES.items()}


def test_the_rows_of_a_batch_come_in_the_order_of_its_indices_from_whatever_pool():
    data = ConnectionDataset([numbered(0, 5), numbered(5, 3), numbered(8, 4)])
    assert len(data) == 12
    assert data.nbytes == 12 * 4 * sum(NAMES.values())
    for indices in ([7, 0, 11, 4, 8, 5], [6, 5], [0]):
        for rows in data.__getitems__(indices)["embeds"].values():
            assert rows[:, 0].tolist() == indices
    selected = data.select(torch.tensor([11, 2, 5, 9, 0]))
    assert selected.__getitems__(range(5))["embeds"]["clip_text"][:, 0].tolist() == [2, 0, 5, 11, 9]


def test_pools_of_other_embeddings_are_refused():
    pools = [numbered(0, 5), {name: rows for name, rows in numbered(5, 3).items() if name != "clip_text"}]
    with pytest.raises(ValueError, match=r"Expected pools of the same embeddings, got \['clap_text'"):
        ConnectionDataset(pools)


def test_pools_are_trained_on_as_their_rows_in_one(tmp_path):
    embeds = aligned_embeds(80)
    pools = [{name: rows[part] for name, rows in embeds.items()} for part in (slice(0, 30), slice(30, 80))]
    runs = [
        train_connector(
            small_config(), data, arguments(tmp_path, save_strategy="no"), log_lines=False, validation_rows=16
        )
        for data in (embeds, [embeds], pools)
    ]
    assert equal_weights(runs[0][0], runs[1][0])
    # Held-out rows are taken pool by pool, so the rows of a batch are others.
    assert not equal_weights(runs[0][0], runs[2][0])
    assert runs[2][1][-1]["eval_loss"] == pytest.approx(runs[0][1][-1]["eval_loss"], rel=0.2)


def test_ex_mcr_trains_the_projector_of_the_leaf_space_alone(tmp_path):
    spaces = {"clip": {"input_dim": 6}, "clap": {"input_dim": 4}}
    config = CMCRConfig(projectors=spaces, objective="ex-mcr", noise_norm=0.3)
    args = arguments(tmp_path, save_strategy="no", num_train_epochs=15)
    connector, history = train_connector(config, aligned_embeds(400), args, validation_rows=40, log_lines=False)
    entries = [entry for entry in history if "loss" in entry]
    names = ("loss_overlap", "loss_leaf", "loss_leaf_overlap", "loss_overlap_leaf")
    for entry in entries:
        expected = sum(entry[name] for name in names) / 4 + 0.1 * entry["loss_intra"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)
    assert entries[-1]["loss"] < 0.8 * entries[0]["loss"]
    assert {name.split(".")[1] for name in connector.state_dict() if "." in name} == {"clap"}
    # One of 40 by chance.
    assert history[-1]["eval_clip_image_to_clap_audio_R@1"] > 0.1


@pytest.mark.parametrize("validation_rows", [8, 9, -1])
def test_holding_out_every_row_is_an_error(tmp_path, validation_rows):
    with pytest.raises(ValueError, match=f"validation_rows is {validation_rows}, .* fewer than the 8 rows"):
        train_connector(small_config(), aligned_embeds(8), arguments(tmp_path), validation_rows=validation_rows)


def test_a_batch_of_one_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="batch size is 1, expected at least 2: BatchNorm"):
        train_connector(small_config(), aligned_embeds(8), arguments(tmp_path, per_device_train_batch_size=1))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "at step 3 of 12: loss is not finite"),
        ({"logging_strategy": "no", "save_strategy": "no"}, "at step 12 of 12: train_loss is not finite"),
        # One step: the loss is that of the first weights.
        ({"max_steps": 1, "weight_decay": 1e3}, "at step 1 of 1: projectors.* is not finite"),
    ],
)
def test_a_training_that_diverges_is_an_error_and_saves_nothing(tmp_path, changes, expected):
    args = arguments(tmp_path / "run", learning_rate=1e38, lr_scheduler_type="constant", **changes)
    with pytest.raises(ValueError, match=rf"diverged {expected}. Lower the learning rate \(it is 1e\+38\)"):
        train_connector(small_config(), aligned_embeds(48), args, log_lines=False)
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize(("disabled", "shown"), [({}, True), ({"disable_tqdm": True}, False)])
def test_the_progress_bar_is_there_where_warnings_are_hidden(tmp_path, capsys, disabled, shown):
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        args = ConnectorTrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=16,
            num_train_epochs=2,
            save_strategy="no",
            use_cpu=True,
            **disabled,
        )
        train_connector(small_config(), aligned_embeds(48), args, log_lines=False)
    finally:
        logging.set_verbosity(before)
    assert ("6/6" in capsys.readouterr().err) == shown


def test_stores_that_are_not_aligned_are_refused():
    embeds = aligned_embeds(8)
    embeds["clap_text"] = embeds["clap_text"][:7]
    with pytest.raises(ValueError, match=r"row by row, got .*'clap_text': 7"):
        ConnectionDataset(embeds)


def test_evaluation_leaves_no_row_out_when_it_takes_several_batches(tmp_path):
    _, history = train_connector(
        small_config(),
        aligned_embeds(70),
        arguments(tmp_path, per_device_eval_batch_size=16, save_strategy="no"),
        validation_rows=40,
        log_lines=False,
    )
    evaluation = next(entry for entry in history if "eval_loss" in entry)
    # R@1 is a multiple of one over the number of rows that were ranked: 39 of 40, in three equal batches.
    share = evaluation["eval_clip_text_to_clap_text_R@1"] * 39
    assert math.isclose(share, round(share), abs_tol=1e-6)


def save_stores(folder, embeds, sources=None, keys=""):
    paths = []
    for name, rows in embeds.items():
        space, modality = name.split("_")
        store = EmbeddingStore.create(
            folder / name,
            space=space,
            modality=modality,
            source={"id": (sources or {}).get(name, "tiny"), "revision": "abc", "config_hash": "0"},
            dim=rows.shape[1],
            data_fingerprint="0",
        )
        store.append(rows, [f"{keys}{index}" for index in range(len(rows))])
        store.finish()
        paths.append(str(folder / name))
    return paths


def test_stores_of_other_items_are_refused(tmp_path):
    paths = save_stores(tmp_path, aligned_embeds(8))
    other = EmbeddingStore.open(paths[-1])
    described = {"space": other.space, "modality": other.modality, "source": other.source, "dim": other.dim}
    renamed = EmbeddingStore.create(tmp_path / "other", data_fingerprint="1", **described)
    renamed.append(other.tensor(), ["0", "1", "2", "another", *map(str, range(4, 8))])
    renamed.finish()
    stores = [EmbeddingStore.open(path) for path in (*paths[:-1], tmp_path / "other")]
    with pytest.raises(ValueError, match=r"Row 3 of .*clip_text is '3', and of .*other 'another'"):
        ordered_stores(stores, small_config())


def test_the_script_trains_from_stores_and_saves_a_connector(tmp_path, capsys):
    stores = save_stores(tmp_path, aligned_embeds(64))
    options = {
        "--output_dir": str(tmp_path / "out"),
        "--per_device_train_batch_size": "16",
        "--num_train_epochs": "2",
        "--projection_dim": "8",
        "--layout": "linear-bn-relu",
        "--validation_rows": "10",
    }
    flags = [part for pair in options.items() for part in pair]
    main(["--stores", *stores, *flags, "--disable_tqdm", "True", "--use_cpu"])
    connector = CMCRConnector.from_pretrained(tmp_path / "out")
    assert connector.config.projectors["clap"] == {"layout": "linear-bn-relu", "input_dim": 4}
    output = capsys.readouterr().out
    assert "eval_loss" in json.loads(output[output.rindex("{\n") :])


def test_the_saved_connector_and_its_checkpoints_can_be_read_by_whom_their_configurations_can(tmp_path):
    stores = save_stores(tmp_path, aligned_embeds(32))
    run_main(tmp_path / "out", stores, "--save_strategy", "epoch")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    modes = {path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "out" / "config.json").stat().st_mode}


def run_main(folder, stores, *flags, projection_dim=8):
    """Run the script on small batches; return the connector it saved."""
    quick = ["--per_device_train_batch_size", "16", "--num_train_epochs", "1"]
    quick += ["--projection_dim", str(projection_dim)] if projection_dim else []
    quick += ["--disable_tqdm", "True", "--use_cpu", "--save_strategy", "no", "--output_dir", str(folder)]
    main(["--stores", *stores, *quick, *flags])
    return CMCRConnector.from_pretrained(folder)


def test_stores_may_come_in_any_order(tmp_path, capsys):
    stores = save_stores(tmp_path, aligned_embeds(64))
    reports, connectors = [], []
    for order in ((0, 1, 2, 3), (3, 0, 2, 1)):
        given = [stores[index] for index in order]
        connectors.append(run_main(tmp_path / "out", given, "--validation_rows", "10"))
        output = capsys.readouterr().out
        report = json.loads(output[output.rindex("{\n") :])
        reports.append({name: value for name, value in report.items() if "R@" in name})
    assert equal_weights(*connectors)
    assert reports[0] == reports[1]
    pairs = {name.rsplit("_", 1)[0] for name in reports[0]}
    assert pairs == {"eval_clip_text_to_clap_text", "eval_clip_image_to_clap_audio"}


@pytest.mark.parametrize(
    ("chosen", "given"),
    [
        ([0, 1, 2], "clip_text, clap_text, clip_image"),
        ([0, 1, 2, 3, 0], "clip_text, clap_text, clip_image, clap_audio, clip_text"),
    ],
)
def test_a_missing_or_repeated_store_is_an_error_before_any_training(tmp_path, chosen, given):
    stores = save_stores(tmp_path, aligned_embeds(64))
    expected = "Expected one store each of clip_text, clap_text, clip_image, clap_audio, got"
    with pytest.raises(ValueError, match=f"{expected} {given}\\. Correct --stores"):
        run_main(tmp_path / "out", [stores[index] for index in chosen])
    assert not (tmp_path / "out").exists()


def test_the_script_extends_clip_on_stores_of_several_pools(tmp_path, capsys):
    stores = save_stores(tmp_path / "text", aligned_embeds(64))
    for store in save_stores(tmp_path / "audio", aligned_embeds(32), keys="sound"):
        stores.insert(1, store)
    connector = run_main(tmp_path / "out", stores, "--objective", "ex-mcr", projection_dim=None)
    assert connector.config.projectors["clip"] == {"layout": "identity", "input_dim": 6}
    assert connector.config.projectors["clap"] == {"layout": "ex-mcr", "input_dim": 4, "hidden_dim": 12}
    assert connector.config.overlap_temperature == 0.05
    # 96 rows are six batches of 16.
    assert "'loss_leaf_overlap'" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"Expected one store each of clip_text, .*, got clip_text, clap_text"):
        run_main(tmp_path / "out", stores[:-1], "--objective", "ex-mcr", projection_dim=None)


def test_stores_of_one_space_alone_are_an_error(tmp_path):
    stores = save_stores(tmp_path, aligned_embeds(64))
    with pytest.raises(ValueError, match=r"two spaces that a bridge connects, got clip_text, clip_image\."):
        run_main(tmp_path / "out", [stores[0], stores[2]])


def test_a_store_of_another_space_is_an_error(tmp_path):
    stores = save_stores(tmp_path, {**aligned_embeds(64), "imagebind_text": aligned_embeds(64)["clip_text"]})
    with pytest.raises(ValueError, match=r"configuration is not valid: Unknown space 'imagebind'"):
        run_main(tmp_path / "out", stores)


def test_stores_of_one_space_from_two_sources_are_an_error(tmp_path):
    stores = save_stores(tmp_path, aligned_embeds(64), {"clip_image": "other"})
    with pytest.raises(ValueError, match="clip_image comes from another source than the other store of clip"):
        run_main(tmp_path / "out", stores)


def test_a_store_of_another_width_than_the_configuration_is_an_error(tmp_path):
    stores = save_stores(tmp_path, aligned_embeds(64))
    CMCRConfig(projectors={"clip": {"input_dim": 5}, "clap": {"input_dim": 4}}).save_pretrained(tmp_path / "config")
    with pytest.raises(ValueError, match="clip_text holds rows of width 6, expected 5 for clip"):
        run_main(tmp_path / "out", stores, "--connector_config", str(tmp_path / "config"), projection_dim=None)


def test_the_connector_records_sources_on_the_hub(tmp_path):
    ids = {name: {"clip": "some/clip", "clap": "some/clap"}[name.split("_")[0]] for name in NAMES}
    connector = run_main(tmp_path / "out", save_stores(tmp_path, aligned_embeds(64), ids))
    assert connector.config.sources == {
        "clip": {"id": "some/clip", "revision": "abc"},
        "clap": {"id": "some/clap", "revision": "abc"},
    }


def test_the_connector_records_no_sources_where_one_is_a_folder(tmp_path):
    ids = {"clip_text": "some/clip", "clip_image": "some/clip"}
    assert run_main(tmp_path / "out", save_stores(tmp_path, aligned_embeds(64), ids)).config.sources is None


@pytest.mark.parametrize("kind", [ValueError, ImportError, OSError])
def test_a_plain_mistake_ends_a_script_with_one_line_and_status_1(kind):
    def fail():
        raise kind("first line\n  second line")

    with pytest.raises(SystemExit) as stopped:
        run_script(fail)
    # Python prints a string on standard error and exits with 1.
    assert stopped.value.code == "error: first line second line"


def test_a_mistake_in_the_program_keeps_its_traceback():
    def fail():
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        run_script(fail)


def test_no_bar_is_left_open_by_a_run_that_ends_early(tmp_path, monkeypatch):
    bars = []

    class Recorded(tqdm):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            bars.append(self)

    def stop(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.trainer_callback.tqdm", Recorded)
    monkeypatch.setattr(CMCRConnector, "forward", stop)
    for log_lines in (True, False):
        with pytest.raises(KeyboardInterrupt):
            train_connector(
                small_config(), aligned_embeds(48), arguments(tmp_path, disable_tqdm=False), log_lines=log_lines
            )
    # What is closed is not drawn again when the process ends.
    assert len(bars) == 2
    assert all(bar.disable for bar in bars)


def test_every_checkpoint_is_recorded_by_its_checksums_and_a_damaged_one_is_passed_over(tmp_path):
    train_connector(small_config(), aligned_embeds(48), arguments(tmp_path), log_lines=False)
    checkpoints = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert [path.name for path in checkpoints] == ["checkpoint-9", "checkpoint-12"]
    assert last_checkpoint(tmp_path) == str(checkpoints[1])
    weights = checkpoints[1] / "optimizer.pt"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert last_checkpoint(tmp_path) == str(checkpoints[0])
    (checkpoints[0] / "sha256.json").unlink()
    assert last_checkpoint(tmp_path) is None
    assert not any(path.exists() for path in checkpoints)


def test_checkpoints_of_a_run_that_goes_on_are_those_of_an_unbroken_one(tmp_path, monkeypatch):
    def content(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    # The arguments that Trainer saves have the folder in them.
    monkeypatch.chdir(tmp_path / "whole")
    train_connector(small_config(), aligned_embeds(48), arguments("out"), log_lines=False)
    monkeypatch.chdir(tmp_path / "stopped")
    forward, calls = CMCRConnector.forward, []

    def stopping(*given, **options):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return forward(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(CMCRConnector, "forward", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_connector(small_config(), aligned_embeds(48), arguments("out"), log_lines=False)
    resumed = arguments("out", resume_from_checkpoint=last_checkpoint(Path("out")))
    train_connector(small_config(), aligned_embeds(48), resumed, log_lines=False)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_the_noise_of_a_step_depends_on_the_seed_the_step_and_the_micro_batch_alone(tmp_path, monkeypatch):
    def noise_seeds(**changes):
        seeds = []
        forward = CMCRConnector.forward

        def recording(self, *given, noise_seed=None, **options):
            seeds.append(noise_seed)
            return forward(self, *given, noise_seed=noise_seed, **options)

        with monkeypatch.context() as patch:
            patch.setattr(CMCRConnector, "forward", recording)
            args = arguments(tmp_path, **{"save_strategy": "no", "seed": 7, **changes})
            train_connector(small_config(), aligned_embeds(48), args, log_lines=False)
        return seeds

    assert noise_seeds(num_train_epochs=2) == [(7, step, 0) for step in range(6)]
    # Three batches an epoch: the last step of an epoch has one.
    expected = [(7, 0, 0), (7, 0, 1), (7, 1, 0), (7, 2, 0), (7, 2, 1), (7, 3, 0)]
    assert noise_seeds(num_train_epochs=2, gradient_accumulation_steps=2) == expected


def test_a_data_set_on_a_device_gives_the_batches_of_one_on_the_cpu():
    embeds = {name: rows.half() for name, rows in aligned_embeds(8).items()}
    there = ConnectionDataset(embeds, "meta").__getitems__([5, 1])
    here = ConnectionDataset(embeds).__getitems__([5, 1])
    for name, rows in here["embeds"].items():
        assert torch.equal(rows, embeds[name][[5, 1]].float())
        assert there["embeds"][name].device.type == "meta"
        assert (there["embeds"][name].shape, there["embeds"][name].dtype) == (rows.shape, torch.float32)


def test_the_script_goes_on_behind_the_last_whole_checkpoint(tmp_path, monkeypatch):
    stores = save_stores(tmp_path, aligned_embeds(64))
    flags = ["--num_train_epochs", "3", "--save_strategy", "epoch", "--resume_from_last_checkpoint", "True"]
    # Nothing to go on with: the folder is not there yet.
    whole = run_main(tmp_path / "out", stores, *flags)
    last = tmp_path / "out" / "checkpoint-12"
    (last / "optimizer.pt").write_bytes(b"cut")
    calls, forward = [], CMCRConnector.forward
    monkeypatch.setattr(
        CMCRConnector, "forward", lambda *given, **options: calls.append(1) or forward(*given, **options)
    )
    assert equal_weights(run_main(tmp_path / "out", stores, *flags), whole)
    # One epoch of four batches, behind the second.
    assert len(calls) == 4
    with pytest.raises(ValueError, match="'here' and resume_from_last_checkpoint"):
        run_main(tmp_path / "out", stores, *flags, "--resume_from_checkpoint", "here")


def test_embeddings_go_to_a_gpu_that_has_twice_their_memory_free(monkeypatch):
    def fit(device="cuda", workers=0, pinned=False):
        args = SimpleNamespace(
            device=torch.device(device), dataloader_num_workers=workers, dataloader_pin_memory=pinned
        )
        return fit_on_device(ConnectionDataset({"a": torch.zeros(100), "b": torch.zeros(100).half()}).nbytes, args)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1202, 10**6))
    assert fit()
    # Other processes cannot make batches of a GPU's tensors, nor can these be pinned.
    assert not any([fit("cpu"), fit(workers=1), fit(pinned=True)])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1200, 10**6))
    assert not fit()


def test_one_process_trains_on_one_gpu(tmp_path):
    args = arguments(tmp_path, max_steps=1, save_strategy="no")
    args._n_gpu = 2
    _, history = train_connector(small_config(), aligned_embeds(48), args, log_lines=False)
    assert args.n_gpu == 1
    # Three batches of 16, which two GPUs of 16 would make one.
    assert history[-1]["epoch"] == pytest.approx(1 / 3)
