"""Connections that are killed or damaged, on full and read-only disks, and two at once. All data is synthetic."""

import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from cmcr_hf.cli import main
from cmcr_hf.demo import world

pytestmark = pytest.mark.usefixtures("quick_linear_map")

SCRIPT = Path(__file__).with_name("kill_stages.py")
ROOT = SCRIPT.parents[1]
spec = importlib.util.spec_from_file_location("kill_stages", SCRIPT)
kill_stages = importlib.util.module_from_spec(spec)
sys.modules["kill_stages"] = kill_stages
spec.loader.exec_module(kill_stages)
content = kill_stages.content

# Kills


def kill(*options):
    """Run the script that kills and return what it printed, with the reason for every failure."""
    command = [sys.executable, str(SCRIPT), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


def test_a_run_killed_at_a_sample_of_its_renames_and_syncs_ends_byte_identical():
    assert re.search(r"^all +8 +8 +0 +8$", kill("--boundaries", "8", "--seed", "1"), re.MULTILINE)


@pytest.mark.slow
def test_a_run_killed_at_any_of_its_renames_and_syncs_ends_byte_identical():
    kills = re.search(r"^all +(\d+) +(\d+) +0 +(\d+)$", kill("--boundaries", "0"), re.MULTILINE)
    assert int(kills[1]) > 300
    assert kills[1] == kills[2] == kills[3]


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["KILL", "INT", "TERM"])
def test_every_stage_killed_at_20_random_instants_ends_byte_identical(signal):
    printed = kill("--times", "120", "--signal", signal, "--seed", "0")
    for stage in kill_stages.STAGES:
        assert re.search(rf"^{stage} +20 .* 20$", printed, re.MULTILINE)


@pytest.mark.slow
def test_the_script_that_kills_explains_itself():
    assert "before and after every rename and sync" in kill("--help")


# The fixtures of the other faults


@pytest.fixture(scope="module")
def project(tiny_clip, tiny_clap, tmp_path_factory):
    """A recipe with a synthetic world of two concepts and random encoders, and the folder of its undisturbed run."""
    folder = tmp_path_factory.mktemp("project")
    sources = {"clip": str(tiny_clip), "clap": str(tiny_clap)}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**kill_stages.RECIPE, "sources": sources}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(world, "CONCEPTS", kill_stages.CONCEPTS)
        assert main(["connect", "tiny.yaml", "--output", "out", "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def run(project, monkeypatch, capsys):
    """Return a function that runs the recipe in a folder, as the undisturbed run did, and returns its complaint."""
    monkeypatch.setattr(world, "CONCEPTS", kill_stages.CONCEPTS)

    def running(folder, **changes):
        # The paths that a run records are relative to where it runs.
        monkeypatch.chdir(folder)
        recipe = yaml.safe_load((project / "tiny.yaml").read_text())
        (folder / "tiny.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
        status = main(["connect", "tiny.yaml", "--output", "out", "--device", "cpu"])
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        if status == 0:
            return ""
        assert status == 1
        last = errors.splitlines()[-1]
        assert last.startswith("cmcr connect: ")
        return last

    return running


@pytest.fixture
def whole(project):
    return content(project / "out")


@pytest.fixture
def place(project, tmp_path):
    """A folder with a copy of the undisturbed run, to be damaged."""
    shutil.copytree(project / "out", tmp_path / "out")
    return tmp_path


# Damage


def flip(path):
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(first, second):
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def forget_training(out):
    """Have the stores read again: what is trained from them is gone."""
    shutil.rmtree(out / "train")


SHARD, KEYS = "shard-00000.safetensors", "shard-00000.keys.parquet"
# What is done to the folder, what the complaint names, and the folder that it says to delete.
DAMAGES = {
    "flipped bit of a text store": (
        lambda out: flip(out / "stores/clip-text" / SHARD),
        f"out/stores/clip-text/{SHARD} does not have the sha256 of the manifest",
        "stores/clip-text",
    ),
    "flipped bit of a pseudo store": (
        lambda out: (forget_training(out), flip(out / "pseudo/clap-audio" / SHARD)),
        f"out/pseudo/clap-audio/{SHARD} does not have the sha256 of the manifest",
        "pseudo/clap-audio",
    ),
    "flipped bit of a memory": (
        lambda out: (shutil.rmtree(out / "pseudo/clip-image"), flip(out / "stores/clip-image" / SHARD)),
        f"out/stores/clip-image/{SHARD} does not have the sha256 of the manifest",
        "stores/clip-image",
    ),
    "flipped bit of an evaluation store": (
        lambda out: flip(out / "stores/evaluate-clap-audio" / SHARD),
        f"out/stores/evaluate-clap-audio/{SHARD} does not have the sha256 of the manifest",
        "stores/evaluate-clap-audio",
    ),
    "shard that is cut off": (
        lambda out: cut(out / "stores/clap-audio" / SHARD),
        f"out/stores/clap-audio/{SHARD} cannot be read",
        "stores/clap-audio",
    ),
    "shard that is gone": (
        lambda out: (out / "stores/clip-image" / SHARD).unlink(),
        f"out/stores/clip-image/{SHARD} is missing",
        "stores/clip-image",
    ),
    "keys that are gone": (
        lambda out: (out / "stores/clip-text" / KEYS).unlink(),
        f"out/stores/clip-text/{KEYS} is missing",
        "stores/clip-text",
    ),
    "swapped shards": (
        lambda out: (
            forget_training(out),
            swap(out / "stores/clip-text" / SHARD, out / "pseudo/clip-image" / SHARD),
        ),
        f"out/stores/clip-text/{SHARD} does not have the sha256 of the manifest",
        "stores/clip-text",
    ),
    "manifest that is cut off": (
        lambda out: cut(out / "stores/clap-text/manifest.json"),
        "out/stores/clap-text/manifest.json is damaged",
        "stores/clap-text",
    ),
    "store of another model": (
        lambda out: (
            shutil.rmtree(out / "stores/clip-text"),
            shutil.copytree(out / "stores/clap-text", out / "stores/clip-text"),
        ),
        "out/stores/clip-text holds other embeddings: space is 'clap' there and 'clip' here",
        "stores/clip-text",
    ),
    "store of other data": (
        lambda out: (
            shutil.rmtree(out / "stores/clip-image"),
            shutil.copytree(out / "stores/evaluate-clip-image", out / "stores/clip-image"),
        ),
        "out/stores/clip-image holds other embeddings: the items have changed",
        "stores/clip-image",
    ),
    "state of the training": (
        lambda out: cut(out / "train/stage.json"),
        "out/train/stage.json is damaged",
        "train",
    ),
    "flipped bit of the trained connector": (
        lambda out: flip(out / "train/connector/model.safetensors"),
        "model.safetensors does not have the sha256 that sha256.json records",
        "train",
    ),
    "trained connector that is gone": (
        lambda out: shutil.rmtree(out / "train/connector"),
        "out/train/connector is damaged",
        "train",
    ),
    "record of the saved folders": (
        lambda out: cut(out / "saved.json"),
        "out/saved.json is damaged",
        None,
    ),
    "marker of the world": (
        lambda out: cut(out / "world/world.json"),
        "out/world/world.json is damaged",
        "world",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_nothing_is_touched_and_the_remedy_ends_byte_identical(place, run, whole, damage):
    act, expected, remedy = DAMAGES[damage]
    out = place / "out"
    act(out)
    before = content(out)
    complaint = run(place)
    assert expected in complaint
    after = content(out)
    assert {name for name in before if after.get(name) != before[name]} <= {"saved.json", "evaluation.json"}
    if remedy is None:
        assert "Delete it and the folders connector and model beside it and run again." in complaint
        (out / "saved.json").unlink()
        shutil.rmtree(out / "connector")
        shutil.rmtree(out / "model")
    else:
        assert re.search(rf"[Dd]elete (the folder )?out/{remedy} and run|delete this one", complaint)
        shutil.rmtree(out / remedy)
    while complaint := run(place):
        # What was swapped has another end.
        shutil.rmtree(place / re.search(r"delete (\S+) and run", complaint)[1])
    assert content(out) == whole


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, flip) for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")),
        ("optimizer.pt", cut),
        ("trainer_state.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_byte_identical(place, run, whole, name, damage):
    out = place / "out"
    shutil.rmtree(out / "train" / "connector")
    (out / "train" / "log.json").unlink()
    state = out / "train" / "stage.json"
    state.write_text(state.read_text().replace('"complete": true', '"complete": false'))
    last = max((out / "train").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    damage(last / name)
    assert run(place) == ""
    assert content(out) == whole


def test_an_edited_recipe_is_refused_and_the_former_one_goes_on(place, run, whole):
    before = content(place / "out")
    assert "holds a training run with other train.epochs" in run(place, train={"epochs": 4, "batch_size": 6})
    assert "holds other embeddings" in run(place, text=[{"table": "texts.csv", "column": "text", "limit": 9}])
    assert content(place / "out") == before
    assert run(place) == ""
    assert content(place / "out") == whole


# Full and read-only disks


@pytest.fixture
def disk(tmp_path):
    """Mount a small file system in memory; return its folder and a function that mounts it with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        again = ["-o", f"remount,{options}"] if os.path.ismount(folder) else ["-o", options]
        command = ["mount", "-t", "tmpfs", *again, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, text=True)

    if not shutil.which("mount") or (done := mount("size=64m")).returncode:
        reason = done.stderr.strip() if shutil.which("mount") else "there is no mount command"
        pytest.skip(f"A small file system cannot be mounted here: {reason}.")
    yield folder, mount
    os.chdir(tmp_path)
    subprocess.run(["umount", str(folder)], check=True)


def shares(count):
    """Return shares of the room that a whole run takes, at which the disk is full, from a fixed seed."""
    return sorted(round(random.Random(f"full disk {row}").uniform(0.01, 0.99), 3) for row in range(count))


def check_full_disk(disk, run, whole, share):
    folder, mount = disk
    room = sum(-(-len(data) // 4096) * 4096 for data in whole.values())
    mount(f"size={int(share * room) // 1024}k")
    complaint = run(folder)
    kept = content(folder / "out")
    assert "Cannot write to out" in complaint
    assert "No space left on device. Free space and run again: what is written is kept." in complaint
    final = [name for name in kept if re.match(r"(world|stores|pseudo)/.*(png|wav|safetensors)$", name)]
    assert all(kept[name] == whole[name] for name in final if "/." not in name)
    mount("size=64m")
    assert run(folder) == ""
    assert content(folder / "out") == whole


@pytest.mark.parametrize("share", [0.02, 0.3, 0.55, 0.8])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(disk, run, whole, share):
    check_full_disk(disk, run, whole, share)


@pytest.mark.slow
@pytest.mark.parametrize("share", shares(30))
def test_a_disk_that_is_full_at_any_time_is_named_and_the_run_goes_on(disk, run, whole, share):
    check_full_disk(disk, run, whole, share)


@pytest.mark.parametrize("line", ["sources", "embed clap-audio", "aggregate clap-audio", "train", "save"])
def test_a_disk_that_becomes_read_only_is_named_and_the_run_goes_on(disk, run, whole, line):
    folder, mount = disk

    def report(*values, **options):
        print(*values, **options)
        if str(values[0]).startswith(f"{line}:"):
            assert mount("ro,size=64m").returncode == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cmcr_hf.cli.print", report, raising=False)
        # Its file is open for writing, which would keep the disk as it is.
        patch.setattr("cmcr_hf.connect.locked", nullcontext)
        complaint = run(folder)
    assert re.search(r"Cannot write to out\S*: Read-only file system\. Make it writable or use another", complaint)
    mount("rw,size=64m")
    assert run(folder) == ""
    assert content(folder / "out") == whole


# Two runs


def test_of_two_runs_at_the_same_instant_exactly_one_goes_on(project, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(world, "CONCEPTS", kill_stages.CONCEPTS)
    refused = 0
    # The second may come, on a busy machine, when the first has done all: it then has nothing to do.
    for attempt in range(5):
        out = tmp_path / str(attempt) / "out"
        out.mkdir(parents=True)
        places = [out.with_name(name) for name in ("first", "second")]
        for place in places:
            place.mkdir()
            (place / "out").symlink_to(out)
            shutil.copy(project / "tiny.yaml", place)
        instant = time.monotonic() + 0.2

        def wait(instant=instant):
            while time.monotonic() < instant:
                pass

        children = [kill_stages.Child(place, wait) for place in places]
        statuses = [child.join() for child in children]
        assert 0 in statuses
        assert content(out) == whole
        for place, status in zip(places, statuses, strict=True):
            if status:
                assert "cmcr connect: another run is using out. Wait for its end" in (place / "stderr").read_text()
                refused += 1
        if refused:
            return
    pytest.fail("No run met another one in five attempts.")
