from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoTokenizer

from cmcr_hf.demo import retrain as module
from cmcr_hf.demo.captions import concept_phrase
from cmcr_hf.demo.concepts import CONCEPTS
from cmcr_hf.demo.drawing import draw
from cmcr_hf.demo.retrain import main, measure, retrain
from cmcr_hf.demo.synthesis import synthesise

SHIPPED = Path(module.__file__).parent / "encoders"


def test_the_two_tokenizers_are_different_and_end_each_sentence_once() -> None:
    clip, clap = (AutoTokenizer.from_pretrained(SHIPPED / name) for name in ("clip", "clap"))
    for tokenizer in (clip, clap):
        ids = tokenizer("A red bell rings")["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.eos_token_id) == 1
        assert ids == tokenizer("a RED bell rings")["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a red bell rings"
    assert (clap.bos_token_id, clap.pad_token_id, clap.eos_token_id) == (0, 1, 2)
    assert clip.eos_token_id != 2
    assert clip.get_vocab() != clap.get_vocab()


def named_as(name: str, features: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each item's scores for the phrases of all concepts, from a batch and from its first item alone."""
    model = AutoModel.from_pretrained(SHIPPED / name, dtype=torch.float32)
    phrases = [concept_phrase(concept) for concept in CONCEPTS]
    tokens = AutoTokenizer.from_pretrained(SHIPPED / name)(phrases, padding=True, return_tensors="pt")
    with torch.inference_mode():
        together = model(**features, **tokens)
        alone = model(**{key: value[:1] for key, value in features.items()}, **tokens)
    key = "logits_per_image" if name == "clip" else "logits_per_audio"
    return together[key], alone[key]


def test_the_shipped_clip_names_new_pictures() -> None:
    processor = AutoImageProcessor.from_pretrained(SHIPPED / "clip", backend="pil")
    pictures = [draw(concept, np.random.default_rng([5, index])) for concept in CONCEPTS for index in range(4)]
    logits, alone = named_as("clip", dict(processor(pictures, return_tensors="pt")))
    truth = torch.arange(len(CONCEPTS)).repeat_interleave(4)
    # A guess is right for one of eighteen.
    assert (logits.argmax(dim=1) == truth).float().mean() > 0.75
    assert torch.allclose(logits[:1], alone, atol=1e-3)


def test_the_shipped_clap_names_new_sounds() -> None:
    extractor = AutoFeatureExtractor.from_pretrained(SHIPPED / "clap")
    sounds = [synthesise(concept, np.random.default_rng([5, index])) for concept in CONCEPTS for index in range(2)]
    features = [extractor(sound, sampling_rate=16000, return_tensors="pt")["input_features"] for sound in sounds]
    logits, alone = named_as("clap", {"input_features": torch.cat(features)})
    truth = torch.arange(len(CONCEPTS)).repeat_interleave(2)
    assert (logits.argmax(dim=1) == truth).float().mean() > 0.9
    assert torch.allclose(logits[:1], alone, atol=1e-3)


def test_the_shipped_encoders_are_float16_and_within_four_megabytes() -> None:
    for name in ("clip", "clap"):
        weights = load_file(SHIPPED / name / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}
    files = [path for name in ("clip", "clap") for path in (SHIPPED / name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 4_000_000


@pytest.mark.slow
def test_the_recorded_figures_are_those_of_the_shipped_weights() -> None:
    recorded = json.loads((SHIPPED / "figures.json").read_text(encoding="utf-8"))
    measured = measure(SHIPPED, seed=recorded["seed"], held_out=recorded["held_out_per_concept"])
    for task in ("zero_shot_accuracy", "text_accuracy", "unconnected_audio_to_image", "relabelled_map", "chance"):
        assert measured[task] == pytest.approx(recorded[task], abs=0.005)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("encoders")
    return folder, retrain(folder, seed=3, pictures=12, sounds=12, clip_steps=12, clap_steps=12, held_out=4)


@pytest.mark.slow
def test_a_short_retraining_writes_both_encoders_and_their_figures(small: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = small
    assert sorted(path.name for path in folder.iterdir()) == ["clap", "clip", "figures.json"]
    assert json.loads((folder / "figures.json").read_text(encoding="utf-8")) == figures
    assert figures["concepts"] == len(CONCEPTS)
    for name in ("clip", "clap"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / name / "model.safetensors").values())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_files(small: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    retrain(tmp_path, seed=3, pictures=12, sounds=12, clip_steps=12, clap_steps=12, held_out=4)
    for name in ("clip", "clap"):
        for file in ("model.safetensors", "tokenizer.json"):
            assert (small[0] / name / file).read_bytes() == (tmp_path / name / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_retraining_leaves_no_process_behind_and_the_folder_as_it_was(tmp_path: Path, number: int) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text("former", encoding="utf-8")
    command = [sys.executable, "-m", "cmcr_hf.cli", "demo", "--retrain", str(tmp_path)]

    def hear_interrupts() -> None:
        # A job in the background of a shell ignores them, and so would its processes.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=hear_interrupts
    ) as process:
        assert process.stderr is not None
        seen = b""
        while b"Drawing" not in seen or b"Synthesising" not in seen:
            seen += os.read(process.stderr.fileno(), 4096)
        # A terminal sends it to the whole group, anybody else to the one process.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        # The processes that train hold this end open as long as they live.
        _, errors = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    assert b"Traceback" not in errors
    assert number == signal.SIGKILL or b"stopped" in errors
    assert (tmp_path / "clip" / "config.json").read_text(encoding="utf-8") == "former"
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_help_names_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--seed" in capsys.readouterr().out
