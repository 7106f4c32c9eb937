"""The official demonstration, on its real inputs with random tiny models, which its published output does not fit."""

import copy

import pytest
import torch

from cmcr_hf import CMCRConnector, CMCRModel, CMCRProcessor
from cmcr_hf.cli import main
from cmcr_hf.conversion import official_demo
from cmcr_hf.conversion.convert_ex_mcr import convert_state_dicts
from cmcr_hf.conversion.official_demo import EXPECTED, verify
from tests.conversion.official_heads import ex_heads


@pytest.fixture(scope="module")
def inputs(shared):
    return shared / "official"


@pytest.fixture(scope="module")
def model(tiny_clip, tiny_clap):
    torch.manual_seed(3)
    return CMCRModel.from_sources_pretrained(tiny_clip, tiny_clap, config={"projection_dim": 8})


@pytest.fixture(scope="module")
def processor(tiny_clip, tiny_clap):
    return CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap)


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("official") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def published(model, processor, inputs, monkeypatch):
    """Take what the tiny model gives for the published output, to the four digits that are printed."""
    found = verify(model, processor, inputs)
    matrices = {(c.rows, c.columns): tuple(tuple(round(v, 4) for v in row) for row in c.found.tolist()) for c in found}
    monkeypatch.setitem(official_demo.EXPECTED, ("clip clap", "c-mcr"), matrices)


def test_every_published_row_sums_to_one():
    rows = [row for matrices in EXPECTED.values() for matrix in matrices.values() for row in matrix]
    assert len(rows) == 3 * 12
    assert all(sum(row) == pytest.approx(1, abs=2.1e-4) for row in rows)


def test_the_matrices_are_softmaxes_of_ten_times_the_cosines(model, processor, inputs):
    comparison = {(c.rows, c.columns): c for c in verify(model, processor, inputs)}["audio", "text"]
    audio = [inputs / f"{thing}.wav" for thing in ("toilet", "BBQ", "train")]
    with torch.no_grad():
        audio = model.get_audio_features(**processor(audio=audio)).pooler_output
        text = model.get_text_features(**processor(text=["a toilet", "BBQ", "a train"])).pooler_output
    expected = (10 * audio @ text.T).softmax(dim=-1)
    torch.testing.assert_close(comparison.found, expected, rtol=0, atol=1e-6)
    assert torch.equal(comparison.off, (comparison.found - comparison.expected).abs())


def test_a_model_that_gives_the_published_output_passes(folder, inputs, published, capsys):
    assert main(["verify-official", str(folder), "--inputs", str(inputs)]) == 0
    printed = capsys.readouterr().out
    assert "No entry is off by more than 0.001." in printed
    assert printed.count("expected") == 3 and "audio x image" in printed


def test_one_altered_weight_is_an_error(folder, model, processor, inputs, published, tmp_path, capsys):
    altered = copy.deepcopy(model)
    with torch.no_grad():
        altered.connector.projectors["clap"].layers[3].weight[0, 0] += 0.5
    altered.save_pretrained(tmp_path / "altered")
    processor.save_pretrained(tmp_path / "altered")
    assert main(["verify-official", str(folder), str(tmp_path / "altered"), "--inputs", str(inputs)]) == 1
    error = capsys.readouterr().err
    assert "of 27 entries of" in error and "altered are off by more than 0.001" in error
    assert str(folder) not in error


def test_weights_that_are_not_finite_are_an_error(model, processor, inputs, published, tmp_path):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.connector.projectors["clip"].layers[0].weight[0, 0] = torch.nan
    broken.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert main(["verify-official", str(tmp_path), "--inputs", str(inputs)]) == 1


def test_ex_mcr_is_compared_in_six_matrices_and_clouds_with_many_starts(
    tiny_clip, tiny_clap, tiny_ulip, inputs, monkeypatch
):
    # The tiny CLIP is 24 wide, which is the shared space; the leaf spaces are brought to that width.
    config, _ = convert_state_dicts({"clap": ex_heads(24), "ulip": ex_heads(24)})
    for space, width in (("clap", 16), ("ulip", 12)):
        config.projectors[space]["input_dim"] = width
    monkeypatch.setattr(official_demo, "STARTS", 3)
    torch.manual_seed(0)
    connector = CMCRConnector(config)
    model = CMCRModel.from_sources_pretrained(tiny_clip, tiny_clap, connector, ulip=tiny_ulip)
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap, ulip=tiny_ulip)
    found = {(c.rows, c.columns): c for c in verify(model, processor, inputs)}
    assert list(found) == list(EXPECTED["clip clap ulip", "ex-mcr"])
    cloud, plain = found["point_cloud", "image"], found["image", "text"]
    assert torch.equal(plain.off, (plain.found - plain.expected).abs())
    # Another start gives another vector, so that some entries are nearer than those of the first one.
    distances = (cloud.found - cloud.expected).abs()
    assert (cloud.off <= distances).all() and (cloud.off < distances).any()


def test_a_model_of_no_official_demo_is_refused(model, processor, inputs):
    other = copy.copy(model.config)
    other.objective = "ex-mcr"
    with pytest.raises(
        ValueError, match=r"The official demos connect .*clip clap \(c-mcr\).*got a model of clip clap"
    ):
        official_demo.demo_expected(other)


def test_a_folder_without_the_inputs_is_named(folder, tmp_path, capsys):
    assert main(["verify-official", str(folder), "--inputs", str(tmp_path)]) == 1
    assert f"{tmp_path}" in capsys.readouterr().err
