"""Upstream files are read as tensors, whatever else is in them, and bad ones end in one line."""

import argparse
import hashlib
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cmcr_hf.conversion.checkpoint import convert_keys, count, load_weights, read_checkpoint, width

MAX_BYTES = 2**20
WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def read(path, **options):
    return read_checkpoint(path, max_bytes=MAX_BYTES, **options)


def refused(path, reason, **options):
    with pytest.raises(ValueError, match=rf"Cannot read .*{path.name}: .*{reason}"):
        read(path, **options)


def assert_weights(found):
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)


def test_weights_come_from_a_state_dict_a_container_or_safetensors(tmp_path):
    prefixed = {f"module.{key}": value for key, value in WEIGHTS.items()}
    torch.save(WEIGHTS, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "state_dict": prefixed, "optimizer": {"lr": 0.1}}, tmp_path / "container.pt")
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    for name in ("plain.pt", "container.pt", "weights.safetensors"):
        checkpoint = read(tmp_path / name)
        assert_weights(checkpoint.weights)
        assert checkpoint.path == tmp_path / name


def test_the_sha256_is_that_of_the_file(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    found = read(tmp_path / "weights.safetensors").sha256
    assert found == hashlib.sha256((tmp_path / "weights.safetensors").read_bytes()).hexdigest()


def test_a_prefix_that_only_some_keys_have_stays(tmp_path):
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "weights.pt")
    assert list(read(tmp_path / "weights.pt").weights) == ["module.a", "b"]


class Hostile:
    def __init__(self, action):
        self.action = action

    def __reduce__(self):
        return self.action


def test_a_pickle_with_code_is_refused_by_the_name_of_the_code_and_not_run(tmp_path):
    for action, name in (
        ((os.system, (f"touch {tmp_path}/ran",)), "posix.system"),
        ((eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",)), "__builtin__.eval"),
        # Allowed by torch, but memory of any size.
        ((bytearray, (10,)), "__builtin__.bytearray"),
    ):
        for content in ({"a.weight": Hostile(action)}, {"state_dict": WEIGHTS, "optimizer": Hostile(action)}):
            torch.save(content, tmp_path / "weights.pt")
            refused(tmp_path / "weights.pt", f"names '{name}'")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_names_code_by_its_stack_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.pt", "w") as archive:
        archive.writestr("weights/data.pkl", b"\x80\x04\x8c\x05posix\x8c\x06system\x93.")
    refused(tmp_path / "weights.pt", r"names 'posix\.system'")


def test_what_stands_beside_the_weights_of_released_files_is_passed_over(tmp_path):
    beside = {"args": argparse.Namespace(model="toy"), "best": np.float64(0.5), "names": ["a", ("b", 1.5, None)]}
    torch.save(
        {"state_dict": WEIGHTS, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, **beside}, tmp_path / "w.pt"
    )
    assert_weights(read(tmp_path / "w.pt").weights)


def test_a_damaged_file_is_refused(tmp_path):
    torch.save(WEIGHTS, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    path = tmp_path / "weights.pt"
    for data in (b"", b"PK\x03\x04", b"\x80\x02." * 9, pickle.dumps({}), whole[:100], whole[:-30], b"\0" * 5000):
        path.write_bytes(data)
        refused(path, "")
    save_file(WEIGHTS, tmp_path / "whole.safetensors")
    for data in (b"", b"\xff" * 100, (tmp_path / "whole.safetensors").read_bytes()[:-4]):
        (tmp_path / "cut.safetensors").write_bytes(data)
        refused(tmp_path / "cut.safetensors", "")


def test_a_bit_that_flips_anywhere_in_a_file_ends_in_one_line_or_in_tensors(tmp_path):
    torch.save(WEIGHTS, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(whole), 60):
        data = bytearray(whole)
        data[place] ^= 1 << int(generator.integers(8))
        (tmp_path / "flipped.pt").write_bytes(data)
        try:
            assert read(tmp_path / "flipped.pt").weights
        except ValueError as error:
            assert str(error).startswith(f"Cannot read {tmp_path / 'flipped.pt'}: ")


def test_a_file_before_torch_1_6_is_told_from_a_damaged_one(tmp_path):
    torch.save(WEIGHTS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(
        tmp_path / "old.pt",
        "no archive of torch.save. Save files of torch before 1.6 anew|what a failed download leaves",
    )


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"a": torch.zeros(100)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for entry in whole.infolist():
            content = bytes(10**7) if entry.filename.endswith("data/0") else whole.read(entry)
            bomb.writestr(entry.filename, content, zipfile.ZIP_DEFLATED)
    refused(tmp_path / "bomb.pt", "its archive is compressed")


def rewritten(source, target, change):
    """Copy an archive of torch.save, entry by entry, as `change(name, content)` gives them: a list of pairs."""
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w") as archive:
        for entry in whole.infolist():
            for name, content in change(entry.filename, whole.read(entry)):
                archive.writestr(name, content)
    return target


def test_what_torch_would_read_in_place_of_the_checked_pickle_is_not_read(tmp_path):
    torch.save(WEIGHTS, tmp_path / "whole.pt")
    hostile = pickle.dumps(Hostile((os.system, (f"touch {tmp_path}/ran",))), protocol=2)

    def with_twin(name, content):
        # torch finds records whatever their case.
        twin = [(name.upper(), hostile)] if name.endswith("data.pkl") else []
        return [*twin, (name, content)]

    assert_weights(read(rewritten(tmp_path / "whole.pt", tmp_path / "twin.pt", with_twin)).weights)
    assert not (tmp_path / "ran").exists()


def test_nested_keys_take_neither_time_nor_the_stack(tmp_path):
    nested = b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s."
    torch.save(WEIGHTS, tmp_path / "whole.pt")
    path = rewritten(
        tmp_path / "whole.pt",
        tmp_path / "deep.pt",
        lambda name, content: [(name, nested if name.endswith("data.pkl") else content)],
    )
    refused(path, "its pickle is damaged .keys that are no texts")


def test_a_record_that_is_too_short_or_missing_is_named(tmp_path):
    torch.save(WEIGHTS, tmp_path / "whole.pt")
    short = rewritten(
        tmp_path / "whole.pt",
        tmp_path / "short.pt",
        lambda name, content: [(name, content[:8] if name.endswith("data/0") else content)],
    )
    refused(short, "the record 'whole/data/0' of 'a.weight' is too short")
    missing = rewritten(
        tmp_path / "whole.pt",
        tmp_path / "missing.pt",
        lambda name, content: [] if name.endswith("data/1") else [(name, content)],
    )
    refused(missing, "the tensor 'a.bias' has no record 'whole/data/1'")


def test_a_flipped_bit_in_the_numbers_is_noticed(tmp_path):
    torch.save({"a": torch.full((4,), 0.5)}, tmp_path / "flipped.pt")
    data = (tmp_path / "flipped.pt").read_bytes()
    place = data.index(torch.full((4,), 0.5).numpy().tobytes())
    (tmp_path / "flipped.pt").write_bytes(data[:place] + b"\x01" + data[place + 1 :])
    refused(tmp_path / "flipped.pt", "it is damaged .Bad CRC-32")


def test_parts_views_and_shared_storages_are_read_as_torch_reads_them(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    state = {"whole": whole, "part": whole[1:3, ::2], "turned": whole.T, "again": whole, "none": whole[:0]}
    state |= {"scalar": torch.tensor(3), "half": whole.half(), "flags": whole > 5}
    state["parameter"] = torch.nn.Parameter(whole * 2)
    torch.save(state, tmp_path / "weights.pt")
    found = read(tmp_path / "weights.pt").weights
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) and found[key].dtype == state[key].dtype for key in state)


def test_tensors_that_claim_more_than_the_bound_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(2**40)}, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", r"claim 4398046511104 bytes, expected at most 1048576")


def test_a_file_over_the_bound_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2**19)}, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", "expected at most 1048576")


def test_a_torchscript_archive_is_named_as_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "traced.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("traced/data.pkl", pickle.dumps({}))
        archive.writestr("traced/constants.pkl", pickle.dumps(()))
        archive.writestr("traced/code/__torch__.py", "class Module(Module): pass\n" * 100)
    refused(tmp_path / "traced.pt", "TorchScript archive, which holds code")


@pytest.mark.parametrize(
    "content", [[], {}, 3, {"a": 3}, {"a": torch.zeros(2).to_sparse()}, {"state_dict": {}}, {"state_dict": [1]}]
)
def test_a_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", "")


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path):
    refused(tmp_path / "none.pt", "no such file. Check the path")
    refused(tmp_path, "it is no file")
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", "it is no file")


def test_keys_are_renamed_dropped_and_cut_in_three_by_the_table():
    state = {"x.0.qkv": torch.arange(6), "x.1.w": torch.ones(1).half(), "gone": torch.full((1,), torch.nan)}
    table = {r"x\.(\d)\.qkv": r"y.\1.{q,k,v}", r"x\.(\d)\.w": r"z.\1", "gone": None}
    converted = convert_keys(state, table, "a toy")
    assert list(converted) == ["y.0.q", "y.0.k", "y.0.v", "z.1"]
    assert converted["y.0.k"].tolist() == [2, 3]
    assert converted["z.1"].dtype == torch.float32


def test_a_key_that_no_pattern_matches_whole_is_named():
    with pytest.raises(ValueError, match="Unknown key 'ab': expected a toy"):
        convert_keys({"ab": torch.zeros(1)}, {"a": "b"}, "a toy")


def test_a_key_that_cannot_be_cut_in_three_is_named():
    with pytest.raises(ValueError, match=r"Misshapen key 'a' of shape \[4\]: expected 3 equal parts"):
        convert_keys({"a": torch.zeros(4)}, {"a": "{q,k,v}"}, "a toy")


def test_weights_are_loaded_whole_or_not_at_all():
    model = torch.nn.Linear(3, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for weights, reason in (
        ({"weight": torch.zeros(2, 3)}, "lacks weights, such as those that become 'bias'. Pass a toy, whole"),
        ({**before, "more": torch.zeros(1)}, "of another architecture, such as those that become 'more'"),
        ({**before, "weight": torch.zeros(3, 2)}, r"become 'weight': expected \[2, 3\], got \[3, 2\]"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_weights(model, weights, "a toy")
        assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    load_weights(model, {"weight": WEIGHTS["a.weight"], "bias": WEIGHTS["a.bias"]}, "a toy")
    assert torch.equal(model.weight, WEIGHTS["a.weight"])


def test_sizes_and_numbers_of_layers_are_read_from_the_weights():
    weights = {"x.0.w": torch.zeros(2, 3), "x.1.w": torch.zeros(1), "y": torch.zeros(()), "far.9": torch.zeros(1)}
    assert (width(weights, "x.0.w"), width(weights, "x.0.w", 1)) == (2, 3)
    assert (count(weights, r"x\.(\d+)\."), count(weights, r"z\.(\d+)\.")) == (2, 0)
    with pytest.raises(ValueError, match=r"layers up to that of 'far\.9', 1 are there"):
        count(weights, r"far\.(\d+)")
    with pytest.raises(ValueError, match="Missing key 'z'"):
        width(weights, "z")
    with pytest.raises(ValueError, match="Misshapen key 'y'"):
        width(weights, "y")
