import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel

from benchmarks import embedding
from benchmarks.embedding import Contender, plain_steps, read_items
from benchmarks.sources import write_captions, write_images
from cmcr_hf import CMCRProcessor
from cmcr_hf.training.embed import encode_features


class Here:
    """A worker without a process of its own."""

    def __init__(self, name: str, kind: str, folder: Path, sources: Path, device: str) -> None:
        self.contender = Contender(name, kind, folder, sources, device)

    def ask(self, what: str) -> Any:
        return None if what == "ready" else getattr(self.contender, what)()

    def close(self) -> None:
        pass


@pytest.mark.parametrize("kind", ["text", "image", "audio"])
def test_a_table_has_every_way_with_its_ratio_and_the_share_of_its_bound(
    kind: str, sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedding, "Worker", Here)
    monkeypatch.setattr(embedding.importlib.util, "find_spec", lambda name: None)
    sizes = ["--texts", "6", "--images", "3", "--clips", "2", "--repeats", "1"]
    rows = embedding.main(["--only", kind, *sizes, "--sources", str(sources)])
    names = ["plain transformers, float32", "embed, float32", "embed, float32 as `cmcr embed` sets it"]
    assert [row["what"] for row in rows if "padded" not in row["what"]] == [
        *names,
        "embed, bfloat16, as `cmcr embed` sets it",
    ]
    assert rows[0]["ratio"] == 1
    assert "share" not in rows[0]
    for row in rows[-3:]:
        assert row["share"] == row["rate"] / embedding.bound(row, "cpu")
    out = capsys.readouterr().out
    assert f"Skipped, not installed: {embedding.OFFICIAL[kind]}." in out
    assert ("padded to 77" in out) == (kind == "text")


@pytest.mark.parametrize("images", [3, 40])
def test_the_models_time_is_an_items_however_many_make_a_batch(
    images: int, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "image", images)
    contender = Contender("float32", "image", tmp_path, sources, "cpu")
    clock = [0.0]

    def encode(model: Any, modality: str, inputs: Any) -> torch.Tensor:
        clock[0] += 0.002 * len(inputs["pixel_values"])
        return torch.zeros(0)

    monkeypatch.setattr(embedding, "encode_features", encode)
    monkeypatch.setattr(embedding.time, "perf_counter", lambda: clock[0])
    assert contender.parts() == {"decode": 0, "features": 0, "model": pytest.approx(2 * torch.get_num_threads())}


def test_the_bound_counts_every_core_and_on_a_gpu_its_slower_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(embedding.os, "cpu_count", lambda: 4)
    assert embedding.bound({"decode": 1.0, "features": 4.0, "model": 15.0}, "cpu") == 100
    assert embedding.bound({"decode": 1.0, "features": 3.0, "model": 0.5}, "cuda") == 1000
    assert embedding.bound({"decode": 1.0, "features": 3.0, "model": 2.0}, "cuda") == 500


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_plain_loop_makes_the_embeddings_that_ours_does(kind: str, sources: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "image", 5)
    write_captions(tmp_path / embedding.CAPTIONS, 5)
    values = read_items(tmp_path, kind)
    model = CLIPModel.from_pretrained(sources / "clip").eval()
    processor = CMCRProcessor.from_sources_pretrained(clip=sources / "clip")
    prepared = processor(text=values, space="clip") if kind == "text" else processor(images=values)
    with torch.inference_mode():
        plain = plain_steps(model, sources / "clip", kind)(values)
    assert torch.allclose(F.normalize(plain, dim=-1), encode_features(model, kind, prepared), atol=1e-6)


def test_a_worker_answers_each_question_with_a_line(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "image", 2)
    monkeypatch.setattr(embedding.sys, "stdin", ["turn\n", "parts\n"])
    embedding.work(["float32", "image", str(tmp_path), str(sources), "cpu"])
    ready, turn, parts = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready == "ready"
    assert turn > 0
    assert set(parts) == {"decode", "features", "model"}


@pytest.mark.slow
def test_contenders_take_turns_in_processes_of_their_own(sources: Path) -> None:
    arguments = ["--only", "image", "--images", "4", "--repeats", "2", "--sources", str(sources)]
    rows = embedding.main(arguments)
    assert [len(row["seconds"]) for row in rows] == [2] * len(rows)


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_that_names_it(sources: Path, tmp_path: Path) -> None:
    worker = embedding.Worker("float32", "image", tmp_path / "nowhere", sources, "cpu")
    with pytest.raises(RuntimeError, match="ended with status 1"):
        worker.ask("ready")
