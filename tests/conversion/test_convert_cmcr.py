"""The released heads as a connector, against arrays that the official code made."""

import pickle

import numpy as np
import pytest
import torch

from cmcr_hf.conversion.convert_cmcr import convert_state_dict, read_connector


def heads(width=4, hidden=6):
    """Random tensors of the layout of `clap_clip.pt`."""
    torch.manual_seed(0)
    state = {}
    for head in ("Head_A", "Head_B"):
        for net, (inner, outer) in {"net1": (width, hidden), "net2": (hidden, width)}.items():
            layers = torch.nn.Sequential(torch.nn.Linear(inner, outer), torch.nn.BatchNorm1d(outer))
            state |= {f"{head}.{net}.{key}": value for key, value in layers.state_dict().items()}
    return state


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
    assert (config.projection_dim, config.projectors["clap"]["hidden_dim"]) == (4, 6)
    assert torch.equal(weights["projectors.clip.layers.3.weight"], state["Head_B.net2.0.weight"])
    assert torch.equal(weights["projectors.clap.layers.1.running_mean"], state["Head_A.net1.1.running_mean"])
    assert len(weights) == len(state) == 28


def test_an_unknown_key_is_named():
    with pytest.raises(ValueError, match=r"Unknown key 'Head_A\.net3\.0\.weight'"):
        convert_state_dict({**heads(), "Head_A.net3.0.weight": torch.zeros(1)})


def test_a_missing_key_is_named(tmp_path):
    state = heads()
    del state["Head_B.net2.1.running_var"]
    torch.save(state, tmp_path / "clap_clip.pt")
    with pytest.raises(ValueError, match=r"clap_clip\.pt as heads .*projectors\.clip\.layers\.4\.running_var"):
        read_connector(tmp_path / "clap_clip.pt")


def test_a_misshapen_tensor_is_named(tmp_path):
    torch.save({**heads(), "Head_B.net2.1.weight": torch.zeros(3)}, tmp_path / "clap_clip.pt")
    with pytest.raises(ValueError, match=r"projectors\.clip\.layers\.4\.weight"):
        read_connector(tmp_path / "clap_clip.pt")


class Hostile:
    def __reduce__(self):
        return print, ("this must not be printed",)


@pytest.mark.parametrize("content", [{"Head_A.net.0.weight": Hostile()}, Hostile(), {"Head_A.net.0.weight": 3}, {}])
def test_what_is_no_file_of_tensors_is_refused(tmp_path, capsys, content):
    torch.save(content, tmp_path / "heads.pt")
    with pytest.raises(ValueError, match=r"Cannot read .*heads\.pt as heads of C-MCR"):
        read_connector(tmp_path / "heads.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02." * 9, pickle.dumps({})])
def test_a_damaged_file_is_refused(tmp_path, data):
    (tmp_path / "heads.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"Cannot read .*heads\.pt as heads of C-MCR"):
        read_connector(tmp_path / "heads.pt")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Cannot read .*none\.pt as heads of C-MCR: .*No such file"):
        read_connector(tmp_path / "none.pt")
