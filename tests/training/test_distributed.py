"""Ranks are processes on this machine, without a network. All data is synthetic."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cmcr_hf import CMCRConfig, CMCRConnector
from cmcr_hf.training.distributed import one_batch_of_all_ranks

spec = importlib.util.spec_from_file_location("test_train", Path(__file__).with_name("test_train.py"))
test_train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test_train)
SCRIPT = Path(__file__).with_name("train_in_ranks.py")
ROOT = SCRIPT.parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# It is not needed on one node.
ENVIRONMENT.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", None)
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.name: [torch.load(file) for file in sorted(path.glob("*.pt"))] for path in folder.iterdir()}


def test_the_gradients_of_the_loss_over_two_ranks_are_those_of_all_rows(runs):
    (whole,), parts = runs["loss-1"], runs["loss-2"]
    mean = torch.stack([part["loss"] for part in parts]).mean()
    torch.testing.assert_close(mean, whole["loss"], rtol=1e-12, atol=0)
    assert parts[0]["loss"] != parts[1]["loss"]
    # What DistributedDataParallel makes of them is the mean over the ranks, of which a row's gradient is half.
    torch.testing.assert_close(sum(part["scale"] for part in parts) / 2, whole["scale"], rtol=1e-10, atol=1e-15)
    for side in ("a", "b"):
        found = torch.cat([part[side] for part in parts]) / 2
        torch.testing.assert_close(found, whole[side], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["", "-accumulating", "-ex-mcr"])
def test_two_ranks_train_as_one_with_the_batch_of_both(runs, kind):
    (one,), (first, second) = runs[f"one{kind}"], runs[f"two{kind}"]
    assert len(one["gradients"]) == 3
    assert one["gradients"][0]["projectors.clap.layers.0.weight"].abs().max() > 1e-3
    for run in (first, second):
        for found, expected in zip(run["gradients"], one["gradients"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run["weights"], one["weights"], rtol=1e-5, atol=1e-5)


def test_every_rank_ends_with_the_same_weights_in_the_plain_layers(runs):
    first, second = runs["two"]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert first["weights"].keys() == runs["one"][0]["weights"].keys()
    assert first["layers"] == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]


def test_two_ranks_log_and_evaluate_as_one(runs):
    (one,), (two, _) = runs["one"], runs["two"]
    names = {"loss", "loss_overlap", "loss_intra", "eval_loss", "eval_clip_text_to_clap_text_R@1"}
    assert names <= {name for entry in one["history"] for name in entry}
    for found, expected in zip(two["history"], one["history"], strict=True):
        assert found.keys() == expected.keys()
        for name in expected:
            if "loss" in name or "R@" in name:
                assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_a_connector_of_one_process_keeps_its_layers():
    connector = CMCRConnector(CMCRConfig(projectors={"clip": {"input_dim": 4}, "clap": {"input_dim": 6}}))
    layers = list(connector.projectors["clip"].layers)
    with one_batch_of_all_ranks(connector):
        assert connector.process_group is None
        assert all(a is b for a, b in zip(connector.projectors["clip"].layers, layers, strict=True))
    assert type(layers[1]) is nn.BatchNorm1d


# The training script, in which the second of two ranks is killed at the eighth of twelve steps, at the first start.
KILLED = """
import os, signal
from cmcr_hf.training import train

class Killed(train.NoiseCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], state.global_step) == ("1", "0", 7):
            os.kill(os.getpid(), signal.SIGKILL)
        super().on_step_begin(args, state, control, **kwargs)

train.NoiseCallback = Killed
train.run_script(train.main)
"""


def train_and_kill(folder, *launch):
    """Run the script under torchrun and kill its second process; return the finished one."""
    (folder / "killed.py").write_text(KILLED)
    return train_in_two([*TORCHRUN, *launch, str(folder / "killed.py")], folder)


def train_in_two(command, folder):
    """Write stores and train on them with a batch of 8 in each of the two processes that a command starts."""
    stores = test_train.save_stores(folder, test_train.aligned_embeds(64))
    command = [sys.executable, "-m", *command, "--stores", *stores, "--output_dir", str(folder / "out")]
    command += ["--per_device_train_batch_size", "8", "--num_train_epochs", "3", "--projection_dim", "8"]
    command += ["--optim", "sgd", "--learning_rate", "0.1", "--overlap_temperature", "0.1", "--use_cpu"]
    command += ["--leaf_temperature", "0.1", "--resume_from_last_checkpoint", "True", "--disable_tqdm", "True"]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def train_in_one(folder):
    """Return the weights and the log of one process with the batch of both."""
    args = test_train.arguments(folder, num_train_epochs=3, optim="sgd", learning_rate=0.1, save_strategy="no")
    embeds = test_train.aligned_embeds(64)
    connector, history = test_train.train_connector(test_train.small_config(), embeds, args, log_lines=False)
    return connector.state_dict(), history


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# `--multi_gpu` is its name for several processes; `--cpu` would start one.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]


@pytest.mark.slow
@pytest.mark.parametrize("launch", [TORCHRUN, ACCELERATE])
def test_the_script_in_two_processes_trains_as_in_one(tmp_path, launch):
    done = train_in_two([*launch, "-m", "cmcr_hf.training.train"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    weights, history = train_in_one(tmp_path / "one")
    found = CMCRConnector.from_pretrained(tmp_path / "out").state_dict()
    torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-5)
    losses = [float(loss) for loss in re.findall(r"\{'loss': '?([\d.]+)", done.stdout)]
    # Printed with four digits.
    assert losses == pytest.approx([entry["loss"] for entry in history if "loss" in entry], rel=1e-3)


def test_processes_that_would_each_train_alone_are_an_error(tmp_path, monkeypatch):
    args = test_train.arguments(tmp_path)
    # What they see of each other where Trainer finds no device for several.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started, expected 1 on cpu: .* Pass --use_cpu"):
        test_train.train_connector(test_train.small_config(), test_train.aligned_embeds(64), args)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_its_name_and_without_a_result(tmp_path):
    done = train_and_kill(tmp_path)
    assert done.returncode == 1
    assert re.search(r"local_rank: 1 .*SIGKILL|Signal 9 \(SIGKILL\) received by PID", done.stderr, re.DOTALL)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_run_whose_killed_rank_starts_again_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    done = train_and_kill(tmp_path, "--max-restarts=1")
    assert done.returncode == 0, done.stderr[-3000:]
    found = CMCRConnector.from_pretrained(tmp_path / "out").state_dict()
    # It went on: the steps before the checkpoint are not logged again.
    assert len(re.findall(r"'epoch': '?1(?:\.0)?'?\b", done.stdout)) == 1
    torch.testing.assert_close(found, train_in_one(tmp_path / "one")[0], rtol=1e-5, atol=1e-5)
