"""The heads of Ex-MCR as a connector, against arrays that the official code made."""

import numpy as np
import pytest
import torch

from cmcr_hf import CMCRConnector
from cmcr_hf.conversion.convert_ex_mcr import plain_head, prove_connector, read_connector
from tests.conversion.official_heads import ex_heads


@pytest.fixture(params=[64, 512])
def official(request, shared):
    """The heads of one size, read for both leaf spaces, and what the official code gives with them."""
    path = shared / f"official/golden/ex_clap_{request.param}.pt"
    with np.load(shared / f"official/golden/heads_{request.param}_io.npz", allow_pickle=False) as golden:
        arrays = {name: torch.from_numpy(golden[name]) for name in golden.files}
    connector, checkpoints = read_connector({"clap": path, "ulip": path})
    return connector, checkpoints, arrays


def assert_golden(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_leaf_modalities_go_through_both_heads(official):
    connector, _, golden = official
    for space, modality in (("clap", "audio"), ("ulip", "point_cloud")):
        assert_golden(connector.project(golden["x"], space, modality), golden["ex_final_renorm"])


@torch.no_grad()
def test_the_other_modalities_go_through_the_second_head_alone(official):
    connector, _, golden = official
    for space, modality in (("clap", "text"), ("ulip", "image"), ("ulip", "text")):
        assert_golden(connector.project(golden["x"], space, modality), golden["ex_Head2_only"])


@torch.no_grad()
def test_the_base_space_stays_as_it_is(official):
    connector, _, golden = official
    assert connector.config.projectors["clip"]["layout"] == "identity"
    assert_golden(connector.project(golden["x"], "clip", "text"), golden["x"])


def test_the_plain_reading_gives_the_golden_values(official):
    _, checkpoints, golden = official
    weights = checkpoints["clap"].weights
    for leaf, name in ((True, "ex_Head2"), (False, "ex_Head2_only")):
        found = torch.nn.functional.normalize(plain_head(golden["x"], weights, leaf=leaf), dim=-1)
        assert_golden(found, golden[name])


def test_the_proof_covers_every_modality(official):
    connector, checkpoints, _ = official
    proof = prove_connector(connector, checkpoints)
    assert list(proof.differences) == [
        "clip",
        "clap audio",
        "clap text",
        "ulip point_cloud",
        "ulip image",
        "ulip text",
    ]
    assert max(proof.differences.values()) < 5e-7


def test_one_head_makes_a_model_of_two_spaces(shared, tmp_path):
    connector, _ = read_connector({"ulip": shared / "official/golden/ex_clap_64.pt"})
    assert connector.config.spaces == ["clip", "ulip"]
    assert connector.config.bridges == [["clip", "ulip", "image"]]
    connector.save_pretrained(tmp_path)
    again = CMCRConnector.from_pretrained(tmp_path)
    assert again.config.objective == "ex-mcr"
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.project(rows, "ulip", "image"), connector.project(rows, "ulip", "image"))


def test_a_projector_of_this_layout_asks_for_the_modality(tmp_path):
    torch.save(ex_heads(4), tmp_path / "ex_clap.pt")
    connector, _ = read_connector({"clap": tmp_path / "ex_clap.pt"})
    with pytest.raises(
        ValueError, match=r"Expected the modality of the embeddings, one of .*'audio', 'text'.* got None"
    ):
        connector.project(torch.zeros(1, 4), "clap")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Head3.weight": torch.zeros(1)}, "Unknown key 'Head3.weight'"),
        ({"Head1.bias": None}, r"lacks weights, such as those that become 'projectors\.clap\.leaf_linear\.bias'"),
        ({"Head1.weight": None}, r"Missing key 'Head1\.weight'"),
        ({"Head2.mlp2.net1.0.bias": torch.zeros(3)}, r"Misshapen .*'projectors\.clap\.layers\.5\.bias'"),
    ],
)
def test_other_weights_are_refused_by_the_name_of_the_key(tmp_path, changes, reason):
    state = {key: value for key, value in {**ex_heads(4), **changes}.items() if value is not None}
    torch.save(state, tmp_path / "ex_clap.pt")
    with pytest.raises(ValueError, match=rf"Cannot convert .*ex_clap\.pt: {reason}|Cannot convert .*{reason}"):
        read_connector({"clap": tmp_path / "ex_clap.pt"})


def test_heads_into_spaces_of_different_widths_are_refused(tmp_path):
    torch.save(ex_heads(4), tmp_path / "ex_clap.pt")
    torch.save(ex_heads(6), tmp_path / "ex_ulip.pt")
    with pytest.raises(ValueError, match=r"Expected heads into one space, got widths \[4, 6\]"):
        read_connector({"clap": tmp_path / "ex_clap.pt", "ulip": tmp_path / "ex_ulip.pt"})


def test_a_fresh_projector_of_this_layout_starts_with_the_identity(tmp_path):
    torch.save(ex_heads(4), tmp_path / "ex_clap.pt")
    config = read_connector({"clap": tmp_path / "ex_clap.pt"})[0].config
    fresh = CMCRConnector(config).projectors["clap"]
    assert torch.equal(fresh.leaf_linear.weight, torch.eye(4))
    assert not fresh.leaf_linear.bias.any()
    # Of Xavier's range, but not of that which other projectors start in.
    limit = (6 / (4 + 8)) ** 0.5
    assert 0.5 < fresh.layers[0].weight.abs().max() <= limit
