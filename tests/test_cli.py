import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from transformers.utils import logging

from cmcr_hf.cli import main
from cmcr_hf.modeling.modeling_cmcr import CMCRModel
from cmcr_hf.modeling.processing_cmcr import CMCRProcessor

pytestmark = pytest.mark.usefixtures("quick_linear_map")

KINDS = ("bell", "cat", "dog")


@pytest.fixture(autouse=True)
def verbosity():
    """Give transformers back the loudness that the command takes from it."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model(tiny_clip, tiny_clap, tmp_path_factory):
    """A model of random sources and random projectors, as `cmcr connect` lays it out."""
    folder = tmp_path_factory.mktemp("output")
    torch.manual_seed(0)
    made = CMCRModel.from_sources_pretrained(str(tiny_clip), str(tiny_clap), config={"projection_dim": 8})
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap)
    for name, part in (("model", made), ("connector", made.connector)):
        part.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder / "model"


@pytest.fixture
def data(tmp_path):
    """A picture and a sound each of three classes, random, named by their class: photos/dog.jpg and sounds/dog.wav."""
    generator = np.random.default_rng(0)
    for folder in ("photos", "sounds"):
        (tmp_path / folder).mkdir()
    for kind in KINDS:
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
            tmp_path / "photos" / f"{kind}.jpg"
        )
        soundfile.write(tmp_path / "sounds" / f"{kind}.wav", generator.uniform(-0.5, 0.5, 2000), 8000)
    return tmp_path


def evaluate(model, data, *more):
    paths = ["--images", str(data / "photos"), "--audio", str(data / "sounds"), "--output", str(data / "out")]
    return main(["evaluate", "retrieval", "--model", str(model), *paths, "--device", "cpu", *more])


def complaint(capsys):
    """Return what a failed command says about it: its last line on stderr, alone and without a traceback."""
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("cmcr ")]
    assert len(lines) == 1
    # Behind it nothing, before it at most progress bars.
    assert captured.err.endswith(lines[0] + "\n")
    return lines[0]


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for command in ("demo", "connect", "evaluate"):
        assert command in out
    assert "Start with `cmcr demo`" in out


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("demo", ["--output", "default: runs/demo", "default: 3", "default: 20", "default: runs/encoders"]),
        ("connect", ["default: runs/NAME", "default: 32", "default: cuda where there is one", "clip-clap", "demo"]),
        (
            "evaluate retrieval",
            ["default: parent", "default: 32", "--model", "--model runs/demo/model"],
        ),
        (
            "evaluate classification",
            [
                "--layout esc-50",
                "default: 32",
                "default: runs/evaluate/classification",
                "64 for point clouds",
                "default: all five",
            ],
        ),
    ],
)
def test_the_help_of_every_command_names_its_defaults(capsys, command, expected):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in expected:
        assert text in out


def test_the_help_of_evaluate_comes_without_torch():
    code = (
        "import sys; sys.argv = ['cmcr']\n"
        "from cmcr_hf.cli import main\n"
        "try: main(['evaluate', 'retrieval', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["conect"], "invalid choice: 'conect'"),
        (["evaluate", "retrieval", "--images", "photos"], "the following arguments are required: --model"),
        (["evaluate"], "the following arguments are required: TASK"),
        (["connect", "demo", "--batch-size", "0"], "expected at least 1, got 0"),
        (["demo", "--derangements", "-1"], "expected 0 or more, got -1"),
        (["demo", "--seeds", "three"], "argument --seeds: expected a whole number, got 'three'"),
        (["connect", "demo", "--batch-size", "abc"], "argument --batch-size: expected a whole number, got 'abc'"),
    ],
)
def test_wrong_arguments_end_with_status_2(capsys, arguments, expected):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


# cmcr connect


@pytest.fixture
def recipe(data, tiny_clip, tiny_clap):
    """A recipe file beside its data."""
    (data / "texts.txt").write_text("\n".join(f"the {kind} {verb}" for kind in KINDS for verb in ("barks", "rings")))
    content = {
        "name": "tiny",
        "sources": {"clip": str(tiny_clip), "clap": str(tiny_clap)},
        "text": [{"table": "texts.txt"}],
        "image": [{"folder": "photos"}],
        "audio": [{"folder": "sounds"}],
        "connector": {"projection_dim": 8},
        "train": {"epochs": 1, "batch_size": 3},
        "evaluate": {"image": {"folder": "photos", "label": "stem"}, "audio": {"folder": "sounds", "label": "stem"}},
    }
    path = data / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_connect_walks_a_recipe_with_the_data_beside_it(recipe, tmp_path, capsys, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert main(["connect", str(recipe), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for stage in ("sources: ", "embed clip-text: 6 rows of 24", "embed clap-audio: 3 rows of ", "train: "):
        assert stage in out
    assert "bridge distillation" in out
    assert (tmp_path / "work" / "runs" / "tiny" / "model" / "config.json").is_file()


def test_connect_takes_the_data_from_another_folder(recipe, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = shutil.move(recipe, elsewhere)
    assert main(["connect", str(moved), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert f"Cannot read the table {elsewhere / 'texts.txt'}: No such file" in complaint(capsys)
    arguments = ["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["connect", str(moved), *arguments]) == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent", "cmcr connect: There is no recipe 'absent'. Use one of the package (all, clip-clap, "),
        ("absent.yaml", "cmcr connect: Cannot read the recipe absent.yaml: No such file or directory."),
    ],
)
def test_connect_names_a_recipe_that_is_not_there(capsys, name, expected):
    assert main(["connect", name]) == 1
    assert expected in complaint(capsys)


def test_connect_says_what_is_wrong_with_a_recipe_in_one_line(recipe, capsys):
    recipe.write_text("name: [broken")
    assert main(["connect", str(recipe)]) == 1
    assert "is not valid YAML" in complaint(capsys)


def test_connect_names_a_source_that_is_no_model(recipe, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    content = yaml.safe_load(recipe.read_text())
    content["sources"]["clap"] = "nothing"
    recipe.write_text(yaml.safe_dump(content))
    assert main(["connect", str(recipe), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert str(tmp_path / "nothing") in complaint(capsys)


def test_connect_stopped_by_the_user_says_how_to_go_on(recipe, tmp_path, capsys, monkeypatch):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("cmcr_hf.connect.train_connector", stopped)
    assert main(["connect", str(recipe), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 130
    assert "Run the same command to go on." in complaint(capsys)


@pytest.mark.parametrize("absolute", [False, True])
def test_the_card_has_the_command_as_it_was_given_without_absolute_paths(recipe, tmp_path, monkeypatch, absolute):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    recipe.rename(tmp_path / "recipes" / "my tiny.yaml")
    root = tmp_path if absolute else Path()
    arguments = ["connect", str(root / "recipes" / "my tiny.yaml"), "--data", str(root), "--output", "out"]
    assert main([*arguments, "--device", "cpu"]) == 0
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    expected = f"'my tiny.yaml' --data {tmp_path.name}" if absolute else "'recipes/my tiny.yaml' --data ."
    assert f"cmcr connect {expected}\n" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4160 vs 4052"),
    ],
    ids=["system", "safetensors", "torch", "torch at the end of a file"],
)
def test_connect_names_the_folder_whose_disk_is_full(recipe, tmp_path, capsys, monkeypatch, error):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr("cmcr_hf.connect.train_connector", full)
    assert main(["connect", str(recipe), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert f"Cannot write to {tmp_path / 'out'}: No space left on device. Free space and" in complaint(capsys)


def test_an_error_of_torch_is_one_line(recipe, tmp_path, capsys, monkeypatch):
    def wrong(*arguments, **options):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("cmcr_hf.connect.train_connector", wrong)
    assert main(["connect", str(recipe), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert complaint(capsys) == "cmcr connect: out of memory"


def test_a_second_process_on_one_output_folder_is_refused(recipe, tmp_path, capsys):
    code = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""
    output = tmp_path / "out"
    output.mkdir()
    first = [sys.executable, "-c", code, str(output / ".lock")]
    arguments = ["connect", str(recipe), "--output", str(output), "--device", "cpu"]
    with subprocess.Popen(first, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        assert main(arguments) == 1
        assert f"cmcr connect: another run is using {output}" in complaint(capsys)
        process.kill()
    assert main(arguments) == 0


@pytest.mark.parametrize("command", [["demo"], ["connect", "demo"]])
def test_an_output_that_is_a_file_is_named_before_the_world_is_written(tmp_path, capsys, command):
    (tmp_path / "file").write_text("mine")
    assert main([*command, "--output", str(tmp_path / "file")]) == 1
    assert f"{tmp_path / 'file'} is a file, expected a folder" in complaint(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# cmcr evaluate


@pytest.mark.parametrize(
    ("output", "expected"), [("note", "note is a file, expected a folder"), ("note/out", "note is a file")]
)
def test_evaluate_refuses_an_output_it_cannot_write_before_it_loads_the_model(data, capsys, output, expected):
    (data / "note").write_text("mine")
    assert evaluate("no/model", data, "--label", "stem", "--output", str(data / output)) == 1
    assert expected in complaint(capsys)


@pytest.mark.parametrize("part", ["model", "connector"])
def test_evaluate_measures_two_folders_whose_files_pair_by_name(model, data, capsys, part):
    assert evaluate(model.with_name(part), data, "--label", "stem") == 0
    out = capsys.readouterr().out
    assert out.startswith("audio-image retrieval by class: 3 clips, 3 images, 3 classes\n")
    saved = json.loads((data / "out" / "result.json").read_text())
    assert saved["model"]["name"] == part
    assert saved["metrics"]["chance"]["audio_to_image"]["P@1"] == pytest.approx(1 / 3)

    connected, processor = CMCRModel.from_pretrained(model), CMCRProcessor.from_pretrained(model)
    with torch.inference_mode():
        images = connected.get_image_features(**processor(images=[data / "photos" / f"{kind}.jpg" for kind in KINDS]))
        audio = connected.get_audio_features(**processor(audio=[data / "sounds" / f"{kind}.wav" for kind in KINDS]))
    scores = audio.pooler_output @ images.pooler_output.T
    hits = (scores.argmax(1) == torch.arange(3)).double().mean().item()
    assert saved["metrics"]["model"]["audio_to_image"]["P@1"] == pytest.approx(hits)
    assert re.search(rf"^model +{hits:.3f}", out, re.MULTILINE)


def test_evaluate_takes_the_folder_of_a_file_as_its_class_by_default(model, data, capsys):
    for name, suffix in (("photos", "jpg"), ("sounds", "wav")):
        for kind in KINDS:
            (data / name / kind).mkdir()
            (data / name / f"{kind}.{suffix}").rename(data / name / kind / f"0.{suffix}")
    assert evaluate(model, data) == 0
    assert "3 classes" in capsys.readouterr().out


def test_evaluate_does_not_depend_on_the_batch_size(model, data):
    for size in ("1", "3"):
        assert evaluate(model, data, "--label", "stem", "--batch-size", size, "--output", str(data / size)) == 0
    one, three = (json.loads((data / size / "result.json").read_text()) for size in ("1", "3"))
    assert one["metrics"] == three["metrics"]


@pytest.mark.parametrize("folder", ["photos", "sounds"])
def test_evaluate_names_a_folder_that_is_not_there(model, data, capsys, folder):
    (data / folder).rename(data / "away")
    assert evaluate(model, data) == 1
    assert f"cmcr evaluate: There is no folder {data / folder}." in complaint(capsys)


def test_evaluate_names_a_folder_without_files_of_its_kind(model, data, capsys):
    shutil.rmtree(data / "sounds")
    (data / "sounds").mkdir()
    (data / "sounds" / "notes.txt").write_text("")
    assert evaluate(model, data) == 1
    assert f"There are no audio items in {data / 'sounds'}" in complaint(capsys)


def test_evaluate_leaves_a_truncated_picture_out_and_names_it(model, data, capsys):
    path = data / "photos" / "dog.jpg"
    path.write_bytes(path.read_bytes()[:200])
    assert evaluate(model, data, "--label", "stem") == 0
    out = capsys.readouterr().out
    # The sound of the dog has nothing to be found, and so is left out with it.
    assert out.startswith("audio-image retrieval by class: 2 clips, 2 images, 2 classes\n")
    assert "Left out: 1 item (cannot be read, for example dog.jpg)." in out


def test_evaluate_names_a_damaged_sound_where_all_are(model, data, capsys):
    for path in (data / "sounds").iterdir():
        path.write_bytes(b"RIFF of nothing")
    assert evaluate(model, data, "--label", "stem") == 1
    assert f"of 3 items: Cannot read audio '{data / 'sounds'}" in complaint(capsys)


def test_evaluate_names_a_class_without_a_counterpart_before_it_loads_the_model(data, capsys):
    (data / "photos" / "dog.jpg").rename(data / "photos" / "cow.jpg")
    assert evaluate("no/model", data, "--label", "stem") == 1
    assert "The class 'dog', one of 1 such, has audio items but no image" in complaint(capsys)


def wrong_model(kind, folder, model, clip):
    """Return a path or an id that is no CMCRModel, or none any more."""
    if kind == "absent":
        return folder / "absent"
    if kind == "hub id":
        return "nobody/nothing"
    if kind == "clip":
        return clip
    if kind == "file":
        return model / "config.json"
    if kind == "empty":
        (folder / "empty").mkdir()
        return folder / "empty"
    changed = Path(shutil.copytree(model, folder / "changed"))
    weights = changed / "model.safetensors"
    if kind == "no weights":
        weights.unlink()
    elif kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "broken configuration":
        (changed / "config.json").write_text("{")
    elif kind == "other sizes":
        config = json.loads((changed / "config.json").read_text())
        config["projectors"]["clip"]["hidden_dim"] = 5
        (changed / "config.json").write_text(json.dumps(config))
    elif kind == "impossible configuration":
        config = json.loads((changed / "config.json").read_text())
        config["overlap_temperature"] = -1.0
        (changed / "config.json").write_text(json.dumps(config))
    elif kind == "no processor":
        (changed / "processor_config.json").unlink()
    return changed


@pytest.mark.parametrize(
    "kind",
    [
        "absent",
        "hub id",
        "clip",
        "file",
        "empty",
        "no weights",
        "truncated weights",
        "broken configuration",
        "other sizes",
        "impossible configuration",
        "no processor",
    ],
)
def test_evaluate_says_in_one_line_that_a_model_is_none(model, data, tiny_clip, capsys, kind):
    name = wrong_model(kind, data, model, tiny_clip)
    assert evaluate(name, data, "--label", "stem") == 1
    line = complaint(capsys)
    assert str(name) in line
    assert "Pass a folder that `cmcr connect` wrote" in line


def test_evaluate_names_a_device_that_is_not_there(model, data, capsys):
    assert evaluate(model, data, "--label", "stem", "--device", "gpu") == 1
    assert "Cannot use the device 'gpu'" in complaint(capsys)
