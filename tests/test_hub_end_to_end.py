"""From a pushed folder to embeddings in clean processes with an empty cache, over HTTP, and offline afterwards."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file

from cmcr_hf import CMCRConfig, CMCRModel, CMCRProcessor, UlipModel
from cmcr_hf.conversion.hub import model_card
from tests.hub_server import READER, Fault, LocalHub
from tests.stranger import WITHOUT_THE_PACKAGE

pytestmark = pytest.mark.slow

FULL, CONNECTOR = "org/cmcr-clip-clap", "org/cmcr-clip-clap-connector"
TEXTS = ["a dog barks", "the sea"]

# Loads what the plan names, and writes the embeddings, or the error.
LOADER = """
import json, sys
import numpy as np, torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer

plan, out = json.loads(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
if plan["package"]:
    from cmcr_hf import CMCRModel as Model, CMCRProcessor as Processor
    trust = {}
else:
    from transformers import AutoModel as Model, AutoProcessor as Processor
    trust = {"trust_remote_code": True}
noise = np.random.default_rng(0)
pictures = list(noise.integers(0, 256, (2, 40, 50, 3), np.uint8))
sounds = list(noise.normal(0, 0.1, (2, 12000)).astype(np.float32))
tensors, errors = {}, {}
for name, (repository, arguments) in plan["loads"].items():
    try:
        model = Model.from_pretrained(repository, **arguments, **trust)
        processor = Processor.from_pretrained(repository, **arguments, **trust)
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}"
        continue
    with torch.no_grad():
        outputs = model(**processor(text=plan["texts"], images=pictures, audio=sounds, sampling_rate=8000))
    for modality in ("text", "image", "audio"):
        tensors[f"{name} {modality}"] = outputs[f"{modality}_embeds"].contiguous()
for name in plan["sentences"]:
    encoder = SentenceTransformer(name, device="cpu", trust_remote_code=True)
    tensors[f"sentences {name}"] = torch.from_numpy(encoder.encode(plan["texts"]))
save_file(tensors, f"{out}/embeds.safetensors")
with open(f"{out}/errors.json", "w") as file:
    json.dump(errors, file)
"""


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as hub:
        yield hub


def save(part, processor, folder):
    part.save_pretrained(folder)
    processor.save_pretrained(folder)
    card = model_card(
        part.config, repo_id=folder.name, licences={}, licence="apache-2.0", synthetic_note="random weights."
    )
    (folder / "README.md").write_text(str(card), encoding="utf-8")


@pytest.fixture(scope="module")
def folders(hub, tiny_clip, tiny_clap, tmp_path_factory):
    """A full model and its connector, whose sources are on the Hub."""
    root = tmp_path_factory.mktemp("end-to-end")
    torch.manual_seed(0)
    model = CMCRModel.from_sources_pretrained(tiny_clip, tiny_clap, config={"projection_dim": 8})
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap)
    model.record_fingerprints(processor)
    model.config.sources = {
        "clip": {"id": "org/clip", "revision": hub.add("org/clip", tiny_clip)},
        "clap": {"id": "org/clap", "revision": hub.add("org/clap", tiny_clap)},
    }
    for name, part in (("full", model), ("connector", model.connector)):
        save(part, processor, root / name)
    return root


def run(code, *arguments, environment, check=True):
    command = [sys.executable, "-I", "-c", code, *arguments]
    home = environment["HF_HOME"]
    Path(home).mkdir(exist_ok=True)
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def load_clean(environment, out, *, package, loads, sentences=()):
    """Return embeddings and errors of a process of its own, with the cache that its environment names."""
    out.mkdir()
    plan = {"package": package, "loads": loads, "sentences": list(sentences), "texts": TEXTS}
    code = LOADER if package else WITHOUT_THE_PACKAGE + LOADER
    run(code, json.dumps(plan), str(out), environment=environment)
    return load_file(out / "embeds.safetensors"), json.loads((out / "errors.json").read_text())


def push(environment, *arguments):
    code = "import sys; from cmcr_hf.cli import main; sys.exit(main(sys.argv[1:]))"
    return run(code, "push", *map(str, arguments), environment=environment, check=False)


@pytest.fixture(scope="module")
def pushed(hub, folders, tmp_path_factory):
    """The folders, pushed by the command, and a branch with another connector, a tag, and both in subfolders."""
    environment = hub.environment(tmp_path_factory.mktemp("pusher") / "home")
    for name, folder in ((FULL, folders / "full"), (CONNECTOR, folders / "connector")):
        done = push(environment, folder, name)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{hub.url}/{name}/commit/{hub.repositories[name].head}\n"
    code = shutil.copytree(
        folders / "full", folders / "code", ignore=lambda _, names: [n for n in names if n[-3:] != ".py"]
    )
    shutil.copytree(folders / "full", folders / "other")
    other = CMCRModel.from_pretrained(folders / "other")
    torch.manual_seed(1)
    other.connector.load_state_dict(
        {
            name: torch.randn_like(value) if value.ndim == 2 else value
            for name, value in other.connector.state_dict().items()
            if not name.startswith("fingerprint")
        },
        strict=False,
    )
    other.save_pretrained(folders / "other")
    assert push(environment, folders / "other", FULL, "--revision", "other").returncode == 0
    hub.repositories[FULL].tags["v1"] = hub.repositories[FULL].head
    for part in ("full", "connector"):
        hub.add("org/several", folders / part, under=f"{part}/")
    # transformers looks for code at the top of a repository, wherever the weights are.
    hub.add("org/several", code)
    return folders


LOADS = {
    "full": (FULL, {}),
    "connector": (CONNECTOR, {}),
    "tag": (FULL, {"revision": "v1"}),
    "branch": (FULL, {"revision": "other"}),
    "subfolder": ("org/several", {"subfolder": "full"}),
    "connector in a subfolder": ("org/several", {"subfolder": "connector"}),
}


@pytest.fixture(scope="module", params=[True, False], ids=["package", "stranger"])
def loaded(request, hub, pushed, tmp_path_factory):
    """What a clean process with an empty cache makes of all, and once more offline, with the cache it filled."""
    root = tmp_path_factory.mktemp("loaded")
    environment = hub.environment(root / "home")
    plan = {"package": request.param, "loads": LOADS, "sentences": [FULL, CONNECTOR]}
    online = load_clean(environment, root / "online", **plan)
    asked = len(hub.requests)
    away = {**environment, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    offline = load_clean(away, root / "offline", **plan)
    assert len(hub.requests) == asked
    return online, offline


@pytest.fixture(scope="module")
def expected(pushed):
    noise = np.random.default_rng(0)
    pictures = list(noise.integers(0, 256, (2, 40, 50, 3), np.uint8))
    sounds = list(noise.normal(0, 0.1, (2, 12000)).astype(np.float32))
    embeds = {}
    for name in ("full", "other"):
        model, processor = CMCRModel.from_pretrained(pushed / name), CMCRProcessor.from_pretrained(pushed / name)
        with torch.no_grad():
            outputs = model(**processor(text=TEXTS, images=pictures, audio=sounds, sampling_rate=8000))
        embeds[name] = {modality: outputs[f"{modality}_embeds"] for modality in ("text", "image", "audio")}
    return embeds


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("way", ["online", "offline"])
def test_embeddings_from_the_hub_are_those_of_the_local_model_bit_for_bit(loaded, expected, name, way):
    embeds, errors = loaded[way == "offline"]
    assert name not in errors, errors[name]
    for modality, rows in expected["other" if name == "branch" else "full"].items():
        assert torch.equal(embeds[f"{name} {modality}"], rows), modality


@pytest.mark.parametrize("name", [FULL, CONNECTOR])
@pytest.mark.parametrize("way", ["online", "offline"])
def test_sentence_transformers_encodes_with_the_model_of_the_hub(loaded, expected, name, way):
    embeds, _ = loaded[way == "offline"]
    assert torch.allclose(embeds[f"sentences {name}"], expected["full"]["text"], atol=1e-6)


def test_the_branch_has_other_embeddings(expected):
    assert not torch.allclose(expected["full"]["text"], expected["other"]["text"], atol=0.1)


def test_hf_download_fetches_the_files_that_were_pushed(hub, pushed, tmp_path):
    command = [shutil.which("hf", path=str(Path(sys.executable).parent)), "download", FULL, "--local-dir", "files"]
    environment = hub.environment(tmp_path / "home")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "files" / ".cache")
    found = {
        path.relative_to(tmp_path / "files").as_posix(): path.read_bytes()
        for path in tmp_path.glob("files/**/*")
        if path.is_file()
    }
    assert found == hub.repositories[FULL].files
    assert found["model.safetensors"] == (pushed / "full" / "model.safetensors").read_bytes()


def test_a_download_that_is_cut_goes_on_where_it_was(hub, pushed, expected, tmp_path):
    path = rf"GET /{FULL}/resolve/\w+/model.safetensors"
    hub.faults = [Fault(path, after=100_000)]
    embeds, errors = load_clean(
        hub.environment(tmp_path / "home"), tmp_path / "out", package=True, loads={"full": (FULL, {})}
    )
    assert not errors
    assert [fault.times for fault in hub.faults] == [0]
    assert torch.equal(embeds["full audio"], expected["full"]["audio"])


def test_sources_that_cannot_be_had_or_are_others_are_one_clear_error_each(hub, pushed, tmp_path, tiny_clip):
    sources = CMCRConfig.from_pretrained(pushed / "connector").sources

    def add(name, **records):
        folder = Path(shutil.copytree(pushed / "connector", tmp_path / name))
        config = json.loads((folder / "config.json").read_text())
        config["sources"] = {space: {**sources[space], **records.get(space, {})} for space in sources}
        (folder / "config.json").write_text(json.dumps(config))
        hub.add(f"org/{name}", folder)
        return f"org/{name}"

    hub.add("org/gated-clip", tiny_clip)
    hub.repositories["org/gated-clip"].gated = True
    hub.add("org/hidden-clip", tiny_clip)
    hub.repositories["org/hidden-clip"].hidden = True
    changed = Path(shutil.copytree(tiny_clip, tmp_path / "changed-clip"))
    model = CMCRModel.from_pretrained(pushed / "full").clip
    with torch.no_grad():
        model.text_projection.weight.add_(
            torch.randn(model.text_projection.weight.shape, generator=torch.Generator().manual_seed(0))
        )
    model.save_pretrained(changed)
    hub.add("org/changed-clip", changed)
    reader, nobody = {"token": READER}, {"token": False}
    loads = {
        "absent": (add("absent", clip={"id": "org/no-clip"}), {}),
        "absent, to nobody": (add("absent-2", clip={"id": "org/no-clip"}), nobody),
        "gated": (add("gated", clip={"id": "org/gated-clip", "revision": None}), reader),
        "gated, to nobody": (add("gated-2", clip={"id": "org/gated-clip", "revision": None}), nobody),
        "hidden": (add("hidden", clip={"id": "org/hidden-clip", "revision": None}), reader),
        "revision": (add("revision", clap={"revision": "f" * 40}), {}),
        "changed": (add("changed", clip={"id": "org/changed-clip", "revision": None}), {}),
        "connector": ("org/no-connector", {}),
    }
    embeds, errors = load_clean(hub.environment(tmp_path / "home"), tmp_path / "out", package=True, loads=loads)
    assert embeds == {}
    (tmp_path / "errors.txt").write_text("\n\n".join(f"{k}\n{v}" for k, v in errors.items()))
    print(json.dumps(errors, indent=1))
    for name, message in {
        "absent": "OSError: Cannot load the clip source 'org/no-clip'",
        "absent, to nobody": "OSError: Cannot load the clip source 'org/no-clip'",
        "gated": "OSError: Cannot load the clip source 'org/gated-clip'",
        "gated, to nobody": "OSError: Cannot load the clip source 'org/gated-clip'",
        "hidden": "OSError: Cannot load the clip source 'org/hidden-clip'",
        "revision": "OSError: Cannot load the clap source 'org/clap'",
        "changed": "ValueError: 'org/changed-clip' is not the clip source that the connector was trained on",
        "connector": "OSError: org/no-connector is not a local folder",
    }.items():
        assert errors[name].startswith(message), errors[name]


def test_a_push_by_nobody_is_one_line(hub, folders, tmp_path):
    environment = hub.environment(tmp_path / "home")
    del environment["HF_TOKEN"]
    done = push(environment, folders / "full", "org/never")
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(
        "cmcr push: The Hub takes you for nobody, or your token for none (401). Run `hf auth login`"
    )
    assert "org/never" not in hub.repositories


def test_a_source_is_pushed_and_loaded_without_the_package(hub, tiny_ulip, tmp_path):
    folder = Path(shutil.copytree(tiny_ulip, tmp_path / "ulip"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# ulip\n")
    environment = hub.environment(tmp_path / "home")
    assert push(environment, folder, "org/ulip").returncode == 0
    code = f"""{WITHOUT_THE_PACKAGE}
import torch
from safetensors.torch import save_file
from transformers import AutoModel
torch.set_num_threads(1)
model = AutoModel.from_pretrained("org/ulip", trust_remote_code=True)
with torch.no_grad():
    clouds = torch.rand(2, 40, 3, generator=torch.Generator().manual_seed(0))
    save_file({{"clouds": model.get_point_cloud_features(clouds).pooler_output}}, "embeds.safetensors")
"""
    run(code, environment=environment)
    clouds = torch.rand(2, 40, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = UlipModel.from_pretrained(tiny_ulip).get_point_cloud_features(clouds).pooler_output
    assert torch.equal(load_file(tmp_path / "home" / "embeds.safetensors")["clouds"], expected)


def test_a_connector_with_a_ulip_is_loaded_without_the_package_and_without_a_question(
    hub, tiny_clip, tiny_text_ulip, tmp_path
):
    sources = {"clip": tiny_clip, "ulip": tiny_text_ulip}
    model = CMCRModel.from_sources_pretrained(**sources, config={"projection_dim": 8})
    processor = CMCRProcessor.from_sources_pretrained(**sources)
    model.record_fingerprints(processor)
    model.config.sources = {
        space: {"id": f"toy/{space}", "revision": hub.add(f"toy/{space}", folder)} for space, folder in sources.items()
    }
    save(model.connector, processor, tmp_path / "connector")
    hub.add("toy/connector", tmp_path / "connector")
    code = f"""{WITHOUT_THE_PACKAGE}
import builtins
def ask(prompt):
    raise RuntimeError(f"asked: {{prompt}}")
builtins.input = ask
from transformers import AutoModel
print(AutoModel.from_pretrained("toy/connector", trust_remote_code=True).config.sources["ulip"]["id"])
"""
    assert run(code, environment=hub.environment(tmp_path / "home")).stdout.endswith("toy/ulip\n")


def test_push_to_hub_needs_the_package_and_says_so(hub, pushed, tmp_path):
    code = (
        WITHOUT_THE_PACKAGE
        + f"""
from transformers import AutoModel
model = AutoModel.from_pretrained({str(pushed / "full")!r}, trust_remote_code=True)
try:
    model.push_to_hub("org/never")
except ImportError as error:
    print(error)
"""
    )
    done = run(code, environment=hub.environment(tmp_path / "home"))
    assert "Pushing takes the package cmcr_hf. Install it (pip install cmcr-hf)" in done.stdout
    assert "org/never" not in hub.repositories


COMMANDS = """
import json, sys
import torch
from cmcr_hf.cli import main
from cmcr_hf.training.train import main as train
torch.set_num_threads(1)
for command in json.loads(sys.argv[1]):
    if command[0] == "train":
        train(command[1:])
    elif main(command):
        sys.exit(1)
"""


def test_stores_are_published_by_one_and_connected_by_others_without_the_items(hub, tiny_clip, tiny_clap, tmp_path):
    author, other = tmp_path / "author", tmp_path / "other"
    for kind in ("images", "sounds"):
        (author / kind).mkdir(parents=True)
    noise = np.random.default_rng(0)
    for row in range(5):
        pixels = noise.integers(0, 256, (9, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(author / "images" / f"{row}.png")
        soundfile.write(author / "sounds" / f"{row}.wav", noise.uniform(-0.5, 0.5, 2000), 8000)
    (author / "texts.csv").write_text("text\n" + "".join(f"the {kind} barks\n" for kind in ("dog", "cat", "sea") * 4))
    sources = {"clip": "org/clip", "clap": "org/clap"}
    hub.add("org/clip", tiny_clip)
    hub.add("org/clap", tiny_clap)
    items = {"clip-text": "texts.csv", "clap-text": "texts.csv", "clip-image": "images", "clap-audio": "sounds"}
    recipe = """
name: tiny
sources: {{clip: org/clip, clap: org/clap}}
connector: {{objective: c-mcr, projection_dim: 8}}
train: {{epochs: 2, batch_size: 4}}
text: [{text}]
image: [{image}]
audio: [{audio}]
"""
    (author / "recipe.yaml").write_text(
        recipe.format(text="{table: texts.csv}", image="{folder: images}", audio="{folder: sounds}")
    )
    other.mkdir()
    addresses = {name: f"hf://datasets/org/tiny-{name}" for name in items}
    (other / "recipe.yaml").write_text(
        recipe.format(
            text=f"{{stores: {{clip: {addresses['clip-text']}, clap: {addresses['clap-text']}}}}}",
            image=f"{{stores: {{clip: {addresses['clip-image']}}}}}",
            audio=f"{{stores: {{clap: {addresses['clap-audio']}}}}}",
        )
    )
    commands = []
    for name, data in items.items():
        space, modality = name.split("-")
        command = ["embed", "--source", sources[space], "--space", space, "--modality", modality]
        command += ["--data", str(author / data), "--output", str(author / "stores" / name)]
        commands.append([*command, "--push", f"org/tiny-{name}"])
    commands.append(["connect", str(author / "recipe.yaml"), "--output", str(author / "run")])
    run(COMMANDS, json.dumps(commands), environment=hub.environment(tmp_path / "author-home"))

    environment = hub.environment(tmp_path / "home") | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    connecting = ["connect", str(other / "recipe.yaml"), "--output", str(other / "run")]
    run(COMMANDS, json.dumps([connecting]), environment=environment)
    expected = load_file(author / "run" / "connector" / "model.safetensors")
    found = load_file(other / "run" / "connector" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    # What was read is there without network: the sources, the stores and, by address, the training alone.
    asked = len(hub.requests)
    stores = [addresses["clip-text"], addresses["clap-text"]]
    stores += [str(other / "run" / "pseudo" / name) for name in ("clip-image", "clap-audio")]
    flags = ["--output_dir", str(other / "train"), "--num_train_epochs", "1", "--per_device_train_batch_size", "4"]
    commands = [[*connecting[:-1], str(other / "again")], ["train", "--stores", *stores, *flags, "--use_cpu"]]
    run(COMMANDS, json.dumps(commands), environment=environment | {"HF_HUB_OFFLINE": "1"})
    again = load_file(other / "again" / "connector" / "model.safetensors")
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert (other / "train" / "model.safetensors").is_file()
    assert len(hub.requests) == asked
