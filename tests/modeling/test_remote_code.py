import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import cmcr_hf.modeling.modeling_cmcr as modeling
from cmcr_hf import CMCRConfig, CMCRModel, CMCRProcessor
from cmcr_hf.modeling.clap_extraction_cmcr import CMCRFeatureExtractor
from cmcr_hf.output import save
from tests.stranger import WITHOUT_THE_PACKAGE

MODELING = Path(modeling.__file__).parent

# Loads the folders in a process that cannot import the package, saves what it loaded, and writes what it computed.
STRANGER = (
    WITHOUT_THE_PACKAGE
    + """
import json, sys
import numpy as np, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

folders, cloud_folders, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
texts, noise = ["a dog barks", "the sea"], np.random.default_rng(0)
pictures = list(noise.integers(0, 256, (2, 40, 50, 3), np.uint8))
sounds = list(noise.normal(0, 0.1, (2, 12000)).astype(np.float32))
report, tensors = {}, {}
for name, folder in folders.items():
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text=texts, images=pictures, audio=sounds, sampling_rate=8000)
    with torch.no_grad():
        outputs = model(**inputs)
        clap = model.get_text_features(**processor(text=texts, space="clap"), space="clap").pooler_output
    embeds = {"image": outputs.image_embeds, "text": outputs.text_embeds, "audio": outputs.audio_embeds, "clap": clap}
    tensors |= {f"{name}_{key}": value.contiguous() for key, value in embeds.items()}
    partial = AutoModel.from_pretrained(folder, trust_remote_code=True, modalities=["audio"])
    report[name] = {
        "classes": [type(thing).__name__ for thing in (config, model, processor, processor.feature_extractor)],
        "modules": [type(thing).__module__.split(".")[0] for thing in (config, model, processor)],
        "training": model.training,
        "towers": [part for part, _ in partial.clap.named_children()],
    }
    model.save_pretrained(f"{out}/{name}")
    processor.save_pretrained(f"{out}/{name}")
labels = ["dog", "sea"]
images = pipeline("zero-shot-image-classification", model=folders["full"], trust_remote_code=True)
audio = pipeline("zero-shot-audio-classification", model=folders["full"], trust_remote_code=True)
from PIL import Image
report["pipelines"] = [images(Image.fromarray(pictures[0]), labels), audio(sounds[0], candidate_labels=labels)]
cloud = np.random.default_rng(0).normal(size=(60, 3))
for name, folder in cloud_folders.items():
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    if name == "source":
        inputs = {"point_clouds": torch.from_numpy(cloud).float()[None]}
    else:
        inputs = AutoProcessor.from_pretrained(folder, trust_remote_code=True)(point_clouds=cloud)
    with torch.no_grad():
        tensors[f"clouds_{name}"] = model.get_point_cloud_features(**inputs).pooler_output
save_file(tensors, f"{out}/embeds.safetensors")
with open(f"{out}/report.json", "w") as file:
    json.dump(report, file)
"""
)


@pytest.fixture(scope="module")
def folders(tiny_clip, tiny_clap, tmp_path_factory):
    """A full model and a connector alone, each with its processor, as `save_pretrained` writes them."""
    torch.manual_seed(0)
    model = CMCRModel.from_sources_pretrained(tiny_clip, tiny_clap, config={"projection_dim": 8})
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap)
    model.record_fingerprints(processor)
    root = tmp_path_factory.mktemp("saved")
    for name, part in (("full", model), ("connector", model.connector)):
        part.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return {name: str(root / name) for name in ("full", "connector")}


@pytest.fixture(scope="module")
def cloud_folders(tiny_ulip_model, tiny_ulip, tmp_path_factory):
    """CLIP and ULIP with their connector, that connector alone, and the ULIP alone."""
    connector = tmp_path_factory.mktemp("saved") / "cloud-connector"
    CMCRModel.from_pretrained(tiny_ulip_model).connector.save_pretrained(connector)
    CMCRProcessor.from_pretrained(tiny_ulip_model).save_pretrained(connector)
    return {"full": str(tiny_ulip_model), "connector": str(connector), "source": str(tiny_ulip)}


@pytest.fixture(scope="module")
def stranger(folders, cloud_folders, tmp_path_factory):
    """What a process without the package made of the folders."""
    out = tmp_path_factory.mktemp("stranger")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {**clean, "HF_MODULES_CACHE": str(out / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", STRANGER, json.dumps(folders), json.dumps(cloud_folders), str(out)]
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def report(stranger):
    return json.loads((stranger / "report.json").read_text())


@pytest.mark.parametrize("kind", ["full", "connector"])
def test_the_auto_classes_load_a_folder_without_the_package(report, kind):
    assert report[kind]["classes"] == ["CMCRConfig", "CMCRModel", "CMCRProcessor", "CMCRFeatureExtractor"]
    assert report[kind]["modules"] == ["transformers_modules"] * 3
    assert report[kind]["training"] is False
    assert report[kind]["towers"] == ["audio_model", "audio_projection"]


@pytest.mark.parametrize("kind", ["full", "connector"])
def test_embeddings_without_the_package_are_bit_equal(stranger, folders, kind):
    embeds = load_file(stranger / "embeds.safetensors")
    model, processor = CMCRModel.from_pretrained(folders[kind]), CMCRProcessor.from_pretrained(folders[kind])
    texts, noise = ["a dog barks", "the sea"], np.random.default_rng(0)
    pictures = list(noise.integers(0, 256, (2, 40, 50, 3), np.uint8))
    sounds = list(noise.normal(0, 0.1, (2, 12000)).astype(np.float32))
    output = model(**processor(text=texts, images=pictures, audio=sounds, sampling_rate=8000))
    assert torch.equal(embeds[f"{kind}_image"], output.image_embeds)
    assert torch.equal(embeds[f"{kind}_text"], output.text_embeds)
    assert torch.equal(embeds[f"{kind}_audio"], output.audio_embeds)
    clap = model.get_text_features(**processor(text=texts, space="clap"), space="clap").pooler_output
    assert torch.equal(embeds[f"{kind}_clap"], clap)


def test_a_process_without_the_package_embeds_clouds(stranger, cloud_folders):
    model = CMCRModel.from_pretrained(cloud_folders["full"])
    inputs = CMCRProcessor.from_pretrained(cloud_folders["full"])(
        point_clouds=np.random.default_rng(0).normal(size=(60, 3))
    )
    with torch.no_grad():
        expected = model.get_point_cloud_features(**inputs).pooler_output
        source = model.ulip.get_point_cloud_features(**inputs).pooler_output
    found = load_file(stranger / "embeds.safetensors")
    assert torch.allclose(found["clouds_source"], source, rtol=0, atol=1e-6)
    for kind in ("full", "connector"):
        assert torch.allclose(found[f"clouds_{kind}"], expected, rtol=0, atol=1e-6)


def test_what_is_saved_without_the_package_is_what_was_loaded(stranger, folders):
    def digests(folder):
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    assert digests(stranger / "full") == digests(folders["full"])
    # The sources that it was loaded with make a full model of the connector.
    assert digests(stranger / "connector").keys() == digests(folders["connector"]).keys()


def test_pipelines_without_the_package_give_the_scores_of_the_model(report, folders):
    model, processor = CMCRModel.from_pretrained(folders["full"]), CMCRProcessor.from_pretrained(folders["full"])
    noise = np.random.default_rng(0)
    pictures, sounds = noise.integers(0, 256, (2, 40, 50, 3), np.uint8), noise.normal(0, 0.1, (2, 12000))
    labels = ["dog", "sea"]
    of_image, of_audio = ({row["label"]: row["score"] for row in rows} for rows in report["pipelines"])
    inputs = processor(images=pictures[0], text=[f"This is a photo of {label}." for label in labels])
    expected = model(**inputs).logits_per_image.softmax(dim=-1)[0]
    assert [of_image[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-6)
    inputs = processor(
        audio=sounds[0].astype(np.float32),
        sampling_rate=8000,
        text=[f"This is a sound of {label}." for label in labels],
    )
    expected = model(**inputs).logits_per_audio.softmax(dim=-1)[0]
    assert [of_audio[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("kind", ["full", "connector"])
def test_a_folder_carries_the_code_that_it_needs(folders, kind):
    entries = [MODELING / f"{name}_cmcr.py" for name in ("configuration", "modeling", "processing", "clap_extraction")]
    needed = {Path(path).name for entry in entries for path in [entry, *get_relative_import_files(entry)]}
    folder = Path(folders[kind])
    assert {path.name for path in folder.glob("*.py")} == needed
    assert all((folder / name).read_bytes() == (MODELING / name).read_bytes() for name in needed)


def test_the_code_needs_nothing_that_transformers_does_not_bring():
    paths = [MODELING / "processing_cmcr.py", *map(Path, get_relative_import_files(MODELING / "modeling_cmcr.py"))]
    imports = {name for path in [MODELING / "modeling_cmcr.py", *paths] for name in get_imports(path)}
    assert imports - set(sys.stdlib_module_names) <= {"huggingface_hub", "numpy", "torch", "transformers"}


@pytest.mark.parametrize("kind", ["full", "connector"])
@pytest.mark.parametrize("trust", [None, True])
def test_the_installed_package_comes_before_the_code_of_a_folder(folders, tmp_path, kind, trust, monkeypatch):
    # No prompt, and no import of the code, which fails here.
    folder = tmp_path / kind
    shutil.copytree(folders[kind], folder)
    for path in folder.glob("*.py"):
        path.write_text("raise RuntimeError('the code of the folder was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to trust the code"))
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is CMCRConfig
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=trust)) is CMCRModel
    assert type(AutoProcessor.from_pretrained(folder, trust_remote_code=trust)) is CMCRProcessor
    assert type(AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=trust)) is CMCRFeatureExtractor
    zero_shot = AutoModelForZeroShotImageClassification.from_pretrained(folder, trust_remote_code=trust)
    assert type(zero_shot) is CMCRModel


def test_the_folders_of_a_connection_carry_the_code(folders, tmp_path):
    model, processor = CMCRModel.from_pretrained(folders["full"]), CMCRProcessor.from_pretrained(folders["full"])
    save(model, processor, tmp_path)
    for name in ("connector", "model"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["auto_map"]["AutoModel"] == "modeling_cmcr.CMCRModel"
        processing = json.loads((tmp_path / name / "processor_config.json").read_text())
        assert processing["auto_map"]["AutoProcessor"] == "processing_cmcr.CMCRProcessor"
        assert (tmp_path / name / "modeling_cmcr.py").read_bytes() == (MODELING / "modeling_cmcr.py").read_bytes()


@pytest.mark.slow
def test_without_the_package_untrusted_code_is_not_run(folders, cloud_folders, tmp_path):
    code = STRANGER.replace("trust_remote_code=True", "trust_remote_code=False")
    command = [sys.executable, "-I", "-c", code, json.dumps(folders), json.dumps(cloud_folders), str(tmp_path)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr
    assert not (tmp_path / "report.json").exists()
