"""`cmcr convert` on files of the released layouts: the folder, the card, the proof, and what stops it."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cmcr_hf import CMCRConfig, CMCRConnector, CMCRModel, CMCRProcessor, UlipModel
from cmcr_hf.cli import main
from cmcr_hf.conversion import convert_cmcr, convert_ulip
from cmcr_hf.conversion.command import check_fit
from tests.conversion.official_heads import clap_clip_heads, ex_heads


@pytest.fixture
def heads(tmp_path):
    """Random heads for the tiny CLAP (width 16) and the tiny CLIP (width 24)."""
    torch.save(clap_clip_heads({"Head_A": 16, "Head_B": 24}, 10), tmp_path / "clap_clip.pt")
    return tmp_path / "clap_clip.pt"


def run(*arguments):
    return main(["convert", *map(str, arguments)])


def test_heads_alone_become_a_connector_with_its_card_and_proof(heads, tmp_path, capsys):
    out = tmp_path / "connector"
    assert run("cmcr", "--checkpoint", heads, "--output", out) == 0
    record = json.loads((out / "conversion.json").read_text())
    printed, card = capsys.readouterr().out, (out / "README.md").read_text()
    assert record["kind"] == "cmcr" and record["file"] == "clap_clip.pt"
    assert max(record["differences"].values()) < record["bound"] == 1e-6
    assert record["sha256"] in printed and record["sha256"] in card
    assert "a plain reading of the original layout" in printed and "license: cc-by-4.0" in card
    assert str(tmp_path) not in card
    expected, _ = convert_cmcr.read_connector(heads)
    found = CMCRConnector.from_pretrained(out)
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.project(rows, "clap"), expected.project(rows, "clap"))


def test_heads_with_their_sources_become_a_full_model_with_fingerprints(heads, tiny_clip, tiny_clap, tmp_path, capsys):
    out = tmp_path / "model"
    sources = ["--clip", tiny_clip, "--clap", tiny_clap]
    assert run("cmcr", "--checkpoint", heads, "--output", out, *sources) == 0, capsys.readouterr().err
    # Random heads fit no source.
    assert capsys.readouterr().out.count("WARNING: the cl") == 2
    model, processor = CMCRModel.from_pretrained(out), CMCRProcessor.from_pretrained(out)
    assert model.config.fingerprints == ["clip_image", "clip_text", "clap_audio", "clap_text"]
    inputs = processor(text=["a dog barks"], space="clap")
    expected, _ = convert_cmcr.read_connector(heads)
    rows = CMCRModel.from_sources_pretrained(tiny_clip, tiny_clap).clap.get_text_features(**inputs).pooler_output
    found = model.get_text_features(**inputs, space="clap").pooler_output
    torch.testing.assert_close(found, expected.project(rows, "clap"), rtol=0, atol=1e-6)


def test_heads_can_name_their_sources_without_holding_them(heads, tiny_clip, tiny_clap, tmp_path):
    out = tmp_path / "connector"
    sources = ["--clip", tiny_clip, "--clap", tiny_clap, "--connector-only"]
    assert run("cmcr", "--checkpoint", heads, "--output", out, *sources) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["CMCRConnector"]
    assert config["sources"]["clap"]["id"] == str(tiny_clap)
    # Found by the record, and checked by the fingerprints.
    assert CMCRModel.from_pretrained(out).get_text_features(torch.ones(1, 2, dtype=torch.long)) is not None


def connector_of(means: dict[str, str]) -> CMCRConnector:
    """Return heads of two spaces of one width; the statistics of each are those of the source that `means` names."""
    torch.manual_seed(0)
    projectors = {space: {"input_dim": 24} for space in ("clip", "clap")}
    config = CMCRConfig(projectors=projectors, projection_dim=64, fingerprints=["clip_text", "clap_text"])
    connector = CMCRConnector(config)
    with torch.no_grad():
        for space in projectors:
            rows = connector.get_buffer(f"fingerprint_{space}_text")
            rows.copy_(torch.nn.functional.normalize(torch.randn(24) + 0.3 * torch.randn(8, 24), dim=-1))
        for space, source in means.items():
            linear, norm = connector.projectors[space].layers[:2]
            norm.running_mean.copy_(linear(connector.get_buffer(f"fingerprint_{source}_text")).mean(dim=0))
    return connector


def test_sources_that_fit_the_statistics_of_their_heads_are_reported():
    lines = []
    check_fit(connector_of({"clip": "clip", "clap": "clap"}), lines.append)
    assert lines == [
        f"The {s} source fits the statistics of its projector (correlation 1.00)." for s in ("clip", "clap")
    ]


def test_swapped_heads_are_refused_by_their_statistics():
    with pytest.raises(ValueError, match=r"The heads seem swapped: .* clip source fit .* clap projector .*1\.00"):
        check_fit(connector_of({"clip": "clap", "clap": "clip"}), print)


def test_a_source_that_fits_no_head_is_warned_of():
    lines = []
    check_fit(connector_of({"clip": "clip"}), lines.append)
    assert lines[0].startswith("The clip source fits") and lines[1].startswith("WARNING: the clap source does not fit")


def test_the_real_heads_fit_real_vectors_of_clip_and_swapped_ones_do_not(shared):
    connector, _ = convert_cmcr.read_connector(shared / "official/ulip_clip.pt")
    connector.config.fingerprints = ["clip_text"]
    rows = torch.from_numpy(np.load(shared / "data/embeddings/detic_coco_clip_a+cname.npy", allow_pickle=False))[:8]
    connector.register_buffer("fingerprint_clip_text", torch.nn.functional.normalize(rows.float(), dim=-1))
    lines = []
    check_fit(connector, lines.append)
    assert "correlation 0.9" in lines[0]
    projectors = connector.projectors
    projectors["clip"], projectors["ulip"] = projectors["ulip"], projectors["clip"]
    with pytest.raises(ValueError, match="The heads seem swapped"):
        check_fit(connector, lines.append)


def test_ex_mcr_tells_the_spaces_of_its_files_by_their_names(tmp_path, capsys):
    head = ex_heads(8)
    for name in ("ex_clap.pt", "ex_ulip.pt", "other.pt"):
        torch.save(head, tmp_path / name)
    assert (
        run("ex-mcr", "--checkpoint", tmp_path / "ex_clap.pt", tmp_path / "ex_ulip.pt", "--output", tmp_path / "a")
        == 0
    )
    assert CMCRConnector.from_pretrained(tmp_path / "a").config.spaces == ["clip", "clap", "ulip"]
    assert "license" not in (tmp_path / "a" / "README.md").read_text().split("---")[1]
    assert run("ex-mcr", "--checkpoint", f"ulip={tmp_path / 'other.pt'}", "--output", tmp_path / "b") == 0
    assert CMCRConnector.from_pretrained(tmp_path / "b").config.spaces == ["clip", "ulip"]
    for files in (["other.pt"], ["ex_clap.pt", "ex_clap.pt"]):
        assert run("ex-mcr", "--checkpoint", *(tmp_path / name for name in files), "--output", tmp_path / "c") == 1
        assert "Cannot tell the space of" in capsys.readouterr().err


def test_ex_mcr_takes_paths_with_an_equals_sign_and_no_file_twice(tmp_path, capsys):
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    torch.save(ex_heads(8), folder / "ex_clap.pt")
    assert run("ex-mcr", "--checkpoint", folder / "ex_clap.pt", "--output", tmp_path / "a") == 0
    assert run("ex-mcr", "--checkpoint", f"clap={folder / 'ex_clap.pt'}", "--output", tmp_path / "b") == 0
    given = [f"{space}={folder / 'ex_clap.pt'}" for space in ("clap", "ulip")]
    assert run("ex-mcr", "--checkpoint", *given, "--output", tmp_path / "c") == 1
    assert "The two files are the same" in capsys.readouterr().err


def test_a_file_of_another_kind_is_named_as_what_it_is(heads, shared, tmp_path, capsys):
    for kind, path, right in (
        ("laion-clap", heads, "cmcr"),
        ("laion-clap", shared / "official/golden/ulip_small.pt", "ulip"),
        ("ulip", shared / "official/golden/laion_clap_small_fused.pt", "laion-clap"),
        ("ex-mcr", f"clap={heads}", "cmcr"),
    ):
        assert run(kind, "--checkpoint", path, "--output", tmp_path / "out") == 1
        assert f"It looks like a file for `cmcr convert {right}`" in capsys.readouterr().err


def test_a_link_to_an_empty_folder_stays_one(heads, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert run("cmcr", "--checkpoint", heads, "--output", tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "model.safetensors").is_file()


def test_of_two_conversions_into_one_folder_one_is_told(heads, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    save = CMCRConnector.save_pretrained

    def after_another(self, folder, **options):
        out.mkdir(exist_ok=True)
        (out / "of another run").write_text("whole")
        save(self, folder, **options)

    monkeypatch.setattr(CMCRConnector, "save_pretrained", after_another)
    assert run("cmcr", "--checkpoint", heads, "--output", out) == 1
    assert f"{out} was filled by another run meanwhile" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["of another run"]
    assert {path.name for path in tmp_path.iterdir()} == {"clap_clip.pt", "out"}


def test_connector_only_asks_for_sources(heads, tmp_path, capsys):
    assert run("cmcr", "--checkpoint", heads, "--output", tmp_path / "out", "--connector-only") == 1
    assert "--connector-only names sources" in capsys.readouterr().err


def ulip_weights(shared):
    fields = {
        "point_config": {"num_groups": 16, "group_size": 8, "num_attention_heads": 4},
        "vision_config": {"num_attention_heads": 4},
        "text_config": {"num_attention_heads": 4},
    }
    return functools.partial(convert_ulip.read_ulip, fields=fields)


def test_a_ulip_container_becomes_a_model_with_its_preprocessing(shared, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_ulip, "read_ulip", ulip_weights(shared))
    out = tmp_path / "ulip"
    source = shared / "official/golden/ulip_small.pt"
    assert (
        run("ulip", "--checkpoint", source, "--output", out, "--tokenizer", tiny_clip, "--licence", "bsd-3-clause")
        == 0
    )
    model, processor = UlipModel.from_pretrained(out), CMCRProcessor.from_sources_pretrained(ulip=out)
    assert processor.ulip_tokenizer.model_max_length == 16
    inputs = processor(text=["a dog"], point_clouds=np.random.default_rng(0).normal(size=(1, 64, 3)), space="ulip")
    with torch.no_grad():
        assert model(point_clouds=inputs["point_clouds"], input_ids=inputs["input_ids"]).point_cloud_embeds.shape == (
            1,
            32,
        )
    card = (out / "README.md").read_text()
    assert "license: bsd-3-clause" in card and "ulip_small.pt" in card


def test_a_folder_that_is_in_use_is_left_alone(heads, tmp_path, capsys):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert run("cmcr", "--checkpoint", heads, "--output", out) == 1
    assert f"The folder {out} is not empty" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_conversion_that_differs_from_upstream_writes_nothing(heads, tmp_path, capsys, monkeypatch):
    plain = convert_cmcr.plain_head
    monkeypatch.setattr(convert_cmcr, "plain_head", lambda *arguments: plain(*arguments) + 0.01)
    assert run("cmcr", "--checkpoint", heads, "--output", tmp_path / "out") == 1
    assert "Nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [["--clip"], ["--clip", "--ulip"]])
def test_sources_of_other_spaces_than_the_heads_are_refused(heads, tiny_clip, tmp_path, capsys, given):
    sources = [part for name in given for part in (name, tiny_clip)]
    assert run("cmcr", "--checkpoint", heads, "--output", tmp_path / "out", *sources) == 1
    assert "These heads connect clip and clap, got sources for clip" in capsys.readouterr().err


def test_a_missing_tokenizer_is_an_error_with_the_option_that_names_one(shared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert_ulip, "read_ulip", ulip_weights(shared))
    arguments = ["--output", tmp_path / "out", "--tokenizer", tmp_path]
    assert run("ulip", "--checkpoint", shared / "official/golden/ulip_small.pt", *arguments) == 1
    assert "as --tokenizer" in capsys.readouterr().err


def test_the_scripts_at_the_top_of_the_checkout_teach_their_options():
    root = Path(convert_cmcr.__file__).parents[2]
    command = [sys.executable, "conversion/convert_cmcr.py", "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--checkpoint FILE" in done.stdout and "clap_clip.pt" in done.stdout
