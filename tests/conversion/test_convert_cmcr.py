"""The released heads as a connector, against arrays that the official code made."""

import numpy as np
import pytest
import torch

from cmcr_hf.conversion.convert_cmcr import convert_state_dict, plain_head, prove_connector, read_connector
from tests.conversion.official_heads import clap_clip_heads


def heads():
    return clap_clip_heads({"Head_A": 4, "Head_B": 4}, 4)


def test_the_real_ulip_clip_heads_give_their_golden_values(shared):
    connector = read_connector(shared / "official/ulip_clip.pt")[0].double()
    with np.load(shared / "official/golden/ulip_clip_real_io.npz", allow_pickle=False) as golden:
        rows = torch.from_numpy(golden["x64"])
        for head, space in {"Head_A": "clip", "Head_B": "ulip"}.items():
            # `project` normalises in float32.
            expected = torch.from_numpy(golden[f"f64_{head}_norm"])
            torch.testing.assert_close(connector.project(rows, space), expected, rtol=0, atol=1e-6)


def test_heads_of_the_clap_clip_layout_give_their_golden_values(shared):
    connector, _ = read_connector(shared / "official/golden/clap_clip_512.pt")
    with np.load(shared / "official/golden/heads_512_io.npz", allow_pickle=False) as golden:
        rows = torch.from_numpy(golden["x"])
        for head, space in {"Head_A": "clap", "Head_B": "clip"}.items():
            expected = torch.from_numpy(golden[f"cmcr_{head}_norm"])
            torch.testing.assert_close(connector.project(rows, space), expected, rtol=0, atol=1e-6)


def test_clip_is_the_second_head_beside_clap():
    state = heads()
    config, weights = convert_state_dict(state)
    assert config.spaces == ["clip", "clap"]
    assert (config.projection_dim, config.projectors["clap"]["hidden_dim"]) == (4, 8)
    assert torch.equal(weights["projectors.clip.layers.3.weight"], state["Head_B.net2.0.weight"])
    assert torch.equal(weights["projectors.clap.layers.1.running_mean"], state["Head_A.net1.1.running_mean"])
    assert len(weights) == len(state) == 28


def test_the_plain_reading_of_both_layouts_gives_the_golden_values(shared):
    for name, arrays, prefix in (
        ("official/ulip_clip.pt", "ulip_clip_real_io", ""),
        ("official/golden/clap_clip_512.pt", "heads_512_io", "cmcr_"),
    ):
        weights = torch.load(shared / name, weights_only=True)
        with np.load(shared / f"official/golden/{arrays}.npz", allow_pickle=False) as golden:
            for head in ("Head_A", "Head_B"):
                expected = torch.from_numpy(golden[prefix + head])
                found = plain_head(torch.from_numpy(golden["x"]), weights, head)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_proof_of_the_real_ulip_clip_heads_is_within_its_bound(shared):
    connector, checkpoint = read_connector(shared / "official/ulip_clip.pt")
    assert checkpoint.sha256.startswith("f82569f2")
    proof = prove_connector(connector, checkpoint)
    assert (proof.reference, proof.bound) == ("a plain reading of the original layout", 1e-6)
    assert set(proof.differences) == {"clip", "ulip"} and max(proof.differences.values()) < 2e-7


def test_one_altered_weight_breaks_the_proof(tmp_path):
    torch.save(heads(), tmp_path / "clap_clip.pt")
    connector, checkpoint = read_connector(tmp_path / "clap_clip.pt")
    assert max(prove_connector(connector, checkpoint).differences.values()) < 1e-6
    with torch.no_grad():
        connector.projectors["clap"].layers[3].weight[0, 0] += 0.01
    with pytest.raises(ValueError, match=r"its clap embeddings differ by .* Nothing was written"):
        prove_connector(connector, checkpoint)


def test_heads_in_half_precision_become_float32_of_the_same_values(tmp_path):
    state = {key: value.half() if value.is_floating_point() else value for key, value in heads().items()}
    torch.save(state, tmp_path / "clap_clip.pt")
    connector, checkpoint = read_connector(tmp_path / "clap_clip.pt")
    weight = connector.projectors["clip"].layers[0].weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight.half(), state["Head_B.net1.0.weight"])
    assert max(prove_connector(connector, checkpoint).differences.values()) < 1e-6


def changed(**changes):
    state = {**heads(), **changes}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (changed(**{"Head_A.net3.0.weight": torch.zeros(1)}), r"Unknown key 'Head_A\.net3\.0\.weight'"),
        (changed(**{"Head_B.net2.1.running_var": None}), r"lacks weights, .*projectors\.clip\.layers\.4\.running_var"),
        (changed(**{"Head_A.net2.0.weight": None}), r"lacks weights, .*projectors\.clap\.layers\.3\.weight"),
        (changed(**{"Head_B.net2.0.weight": None}), r"Missing key 'Head_B\.net2\.0\.weight'"),
        (changed(**{"Head_B.net2.1.weight": torch.zeros(3)}), r"Misshapen .*projectors\.clip\.layers\.4\.weight"),
        (changed(**{"Head_A.net1.0.weight": torch.zeros(6)}), r"Misshapen key 'Head_A\.net1\.0\.weight'"),
        (changed(**{"Head_A.net1.0.bias": torch.full((6,), torch.nan)}), r"'Head_A\.net1\.0\.bias' are not finite"),
        ({"layers.0.weight": torch.zeros(2, 2)}, r"Expected the heads of C-MCR, .*layers\.0\.weight"),
    ],
)
def test_other_weights_are_refused_by_the_name_of_the_key(tmp_path, state, reason):
    torch.save(state, tmp_path / "clap_clip.pt")
    with pytest.raises(ValueError, match=rf"Cannot convert .*clap_clip\.pt: .*{reason}"):
        read_connector(tmp_path / "clap_clip.pt")
