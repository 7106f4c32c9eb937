"""The pages under `docs/` run as they stand, against a local Hub."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig, RobertaModel

from tests.conversion.official_heads import clap_clip_heads, ex_heads, ulip_clip_heads
from tests.hub_server import LocalHub

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str) -> list[tuple[str, str]]:
    """Return the language and the text of every code block of a page, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run_block(language: str, text: str, work: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=600)


def environment_of(hub: LocalHub, home: Path) -> dict[str, str]:
    environment = hub.environment(home)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return environment


@pytest.mark.slow
def test_the_walk_from_two_models_to_the_hub_runs_as_written(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    printed = ""
    with LocalHub() as hub:
        environment = environment_of(hub, tmp_path / "home")
        for language, text in blocks("from_two_models_to_the_hub.md"):
            text = text.replace("ORG/", "org/")
            if language == "yaml":
                (work / "mine.yaml").write_text(text, encoding="utf-8")
                continue
            done = run_block(language, text, work, environment)
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            printed += done.stdout
    assert "org/cmcr-mine" in hub.repositories
    assert "closed cascade" in printed
    # The dog's picture is the first of the two.
    assert printed.splitlines()[-1] == "0"
    assert (work / "runs/mine/report.html").is_file()


def save_official_files(work: Path, golden: Path) -> None:
    """Write files of the released layouts and small sizes, with random weights, as the page names them."""
    laion = torch.load(golden / "laion_clap_small_fused.pt", weights_only=True)["state_dict"]
    # Without options, a text tower has the 12 heads of the released ones.
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 12, "intermediate_size": 32}
    text = RobertaModel(RobertaConfig(vocab_size=40, max_position_embeddings=80, type_vocab_size=1, **sizes))
    state = {key: value for key, value in laion.items() if not key.startswith(("module.text_",))}
    state |= {f"module.text_branch.{key}": value for key, value in text.state_dict().items()}
    transform = {"sequential.0": torch.nn.Linear(32, 32), "sequential.3": torch.nn.Linear(32, 32)}
    projection = {"0": torch.nn.Linear(24, 32), "2": torch.nn.Linear(32, 32)}
    for name, layers in {"text_transform": transform, "text_projection": projection}.items():
        for place, layer in layers.items():
            state |= {f"module.{name}.{place}.{key}": value for key, value in layer.state_dict().items()}
    torch.save({"epoch": 1, "name": "random", "state_dict": state}, work / "630k-fusion-best.pt")
    shutil.copy(golden / "ulip_small.pt", work / "pointbert_ULIP-2.pt")
    torch.save(clap_clip_heads({"Head_A": 32, "Head_B": 24}, 16), work / "clap_clip.pt")
    torch.save(ulip_clip_heads({"Head_A": 24, "Head_B": 32}, 16), work / "ulip_clip.pt")
    for space in ("clap", "ulip"):
        torch.save(ex_heads(32, 24), work / f"ex_{space}.pt")


@pytest.mark.slow
def test_the_walk_from_the_official_checkpoints_runs_as_written(tmp_path, shared, tiny_clip, tiny_clap):
    work = tmp_path / "work"
    work.mkdir()
    save_official_files(work, shared / "official/golden")
    (work / "assets").symlink_to(shared / "official")
    tokenizer = tmp_path / "roberta"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_clap / name, tokenizer)
    with LocalHub() as hub:
        hub.add("openai/clip-vit-base-patch32", tiny_clip)
        hub.add("FacebookAI/roberta-base", tokenizer)
        environment = environment_of(hub, tmp_path / "home")
        for language, text in blocks("official_checkpoints.md"):
            done = run_block(language, text.replace("ORG/", "org/"), work, environment)
            if "verify-official" in text:
                # The weights are random.
                assert done.returncode == 1 and "are off by more than 0.001" in done.stderr, done.stderr
                assert done.stdout.count("expected") == 12
                continue
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    pushed = hub.repositories["org/ex-mcr"]
    files = pushed.commits[pushed.head]
    assert {"config.json", "model.safetensors", "README.md", "conversion.json", "modeling_cmcr.py"} <= files.keys()
    assert b"/tmp" not in files["config.json"] and b'CMCRModel.from_pretrained("org/ex-mcr")' in files["README.md"]
