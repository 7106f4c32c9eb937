import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from cmcr_hf.modeling import losses_cmcr as losses
from cmcr_hf.modeling.losses_cmcr import matched_cross_entropy, symmetric_info_nce


@pytest.fixture(params=["kept", "anew"])
def blocks(request, monkeypatch):
    """Blocks of three rows, whose logits are kept for the gradient or computed anew."""
    monkeypatch.setattr(losses, "CPU_BLOCK_ROWS", 3)
    if request.param == "anew":
        monkeypatch.setattr(losses, "KEPT_LOGITS", 0)


def unit_rows(rows, dim, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    a, b = F.normalize(torch.randn(2, rows, dim, generator=generator, dtype=dtype), dim=-1)
    return a.requires_grad_(), b.requires_grad_()


def plain(a, b, scale):
    logits = a @ b.T * scale
    targets = torch.arange(len(logits))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def gradients(loss, *inputs):
    return loss, *torch.autograd.grad(3 * loss, inputs)


@pytest.mark.parametrize("kept", [0, 2500**2])
def test_the_loss_in_blocks_and_its_gradients_are_those_of_the_plain_one_in_float32(monkeypatch, kept):
    monkeypatch.setattr(losses, "KEPT_LOGITS", kept)
    a, b = unit_rows(2500, 16)
    scale = torch.tensor(100.0, requires_grad=True)
    for found, expected in zip(
        gradients(symmetric_info_nce(a, b, scale), a, b, scale),
        gradients(plain(a, b, scale), a, b, scale),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)


# As many rows as a block, fewer, a whole number of blocks, and one left over.
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7])
def test_any_number_of_rows_gives_the_plain_loss_in_float64(blocks, rows):
    a, b = unit_rows(rows, 5, dtype=torch.float64)
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    for found, expected in zip(
        gradients(symmetric_info_nce(a, b, scale), a, b, scale),
        gradients(plain(a, b, scale), a, b, scale),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_gradients_are_those_of_finite_differences(blocks):
    a, b = unit_rows(7, 5, dtype=torch.float64)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(symmetric_info_nce, (a, b, scale))
    assert torch.autograd.gradcheck(lambda a, b: symmetric_info_nce(a, b, 5.0), (a, b))


def test_logits_beyond_the_range_of_exponentials_give_a_finite_loss(blocks):
    a, b = unit_rows(7, 5)
    found = gradients(symmetric_info_nce(a, b, 1e4), a, b)
    for value, expected in zip(found, gradients(plain(a, b, 1e4), a, b), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-3)
    assert found[0] > 1e3


def test_autocast_multiplies_in_bfloat16_in_both_directions(blocks):
    a, b = unit_rows(7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = symmetric_info_nce(a, b, 10.0)
    assert loss.dtype == torch.float32
    exact = gradients(plain(a, b, 10.0), a, b)
    for value, expected in zip(gradients(loss, a, b), exact, strict=True):
        assert not torch.equal(value, expected)
        torch.testing.assert_close(value, expected, rtol=0.05, atol=0.05)


def test_rows_that_are_not_as_many_are_an_error():
    with pytest.raises(ValueError, match=r"aligned rows of one width, got \(3, 4\) and \(2, 4\)"):
        symmetric_info_nce(torch.zeros(3, 4), torch.zeros(2, 4), 1.0)


PEAK = """
import importlib.util, resource, sys, torch
spec = importlib.util.spec_from_file_location("losses", sys.argv[1])
losses = importlib.util.module_from_spec(spec)
spec.loader.exec_module(losses)

losses.KEPT_LOGITS = 2**24

def run(rows):
    a, b = torch.randn(2, rows, 16).requires_grad_().unbind()
    losses.symmetric_info_nce(a, b, 1.0).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = run(64)
print((run(8192) - before) * 1024)
"""


def test_a_large_batch_takes_less_memory_than_one_copy_of_its_logits():
    command = [sys.executable, "-c", PEAK, losses.__file__]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak < 150e6 < 8192**2 * 4


# A whole step of two projectors on a batch whose logits would take 8 GiB, and their gradients as much.
STEP = """
import resource, torch
import torch.nn.functional as F
from cmcr_hf import CMCRConfig, CMCRConnector

embeds = {name: F.normalize(torch.randn(32768, 512), dim=-1)
          for name in ("clip_text", "clap_text", "clip_image", "clap_audio")}
connector = CMCRConnector(CMCRConfig(projectors={"clip": {"input_dim": 512}, "clap": {"input_dim": 512}})).train()
optimizer = torch.optim.AdamW(connector.parameters(), fused=True)
loss = connector(embeds, noise_seed=(0, 0, 0)).loss
loss.backward()
optimizer.step()
assert loss.isfinite() and connector.projectors["clip"].layers[0].weight.grad.abs().max() > 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_a_training_step_of_32768_rows_takes_a_quarter_of_24_gib():
    done = subprocess.run([sys.executable, "-c", STEP], check=True, capture_output=True, text=True)
    peak = int(done.stdout)
    print(f"{peak / 2**30:.2f} GiB")
    assert peak < 6 * 2**30


def test_the_loss_of_matches_is_the_cross_entropy_with_their_powers_by_row_and_by_column():
    a, b = unit_rows(5, 4, dtype=torch.float64)
    b = b[:3]
    matches = torch.rand(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    powers, logits = matches**3, a @ b.T / 0.2
    rows, columns = powers / powers.sum(dim=1, keepdim=True), powers / powers.sum(dim=0)
    expected = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns.T)) / 2
    for found, value in zip(
        gradients(matched_cross_entropy(a, b, matches, 5.0, 3), a, b), gradients(expected, a, b), strict=True
    ):
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12)


def test_the_lift_of_matches_is_from_the_mean_of_what_a_row_matches():
    a, b = unit_rows(5, 4, dtype=torch.float64)
    b = b[:3]
    matches = torch.rand(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = a @ b.T / 0.2
    # Half of it: the square root of the mean.
    rows = (matches / matches.mean(dim=0).sqrt()) ** 3
    columns = (matches / matches.mean(dim=1, keepdim=True).sqrt()) ** 3
    rows, columns = rows / rows.sum(dim=1, keepdim=True), columns / columns.sum(dim=0)
    expected = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns.T)) / 2
    torch.testing.assert_close(matched_cross_entropy(a, b, matches, 5.0, 3, 0.5), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("lift", [0.0, 1.0])
def test_what_does_not_match_at_all_is_no_target_at_any_lift(lift):
    a, b = unit_rows(5, 4)
    matches = torch.rand(5, 5, generator=torch.Generator().manual_seed(1))
    matches[:, 2:] = 0
    whole = matched_cross_entropy(a, b, matches, 5.0, 3, lift)
    logits = a @ b.T * 5
    rows, columns = (matches[:, :2] / matches[:, :2].mean(dim=0) ** lift) ** 3, torch.full((5, 5), 0.2)
    rows = F.pad(rows / rows.sum(dim=1, keepdim=True), (0, 3))
    columns[:, :2] = (matches[:, :2] / matches[:, :2].sum(dim=1, keepdim=True) ** lift) ** 3
    columns = columns / columns.sum(dim=0)
    expected = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns.T)) / 2
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("lift", [0.0, 1.0])
def test_the_targets_of_what_matches_nothing_are_all_alike_and_its_gradient_is_finite(lift):
    a, b = unit_rows(4, 5)
    a.requires_grad_()
    loss = matched_cross_entropy(a, b, torch.zeros(4, 4), 5.0, 3, lift)
    alike = torch.full((4, 4), 0.25)
    logits = a @ b.T * 5
    torch.testing.assert_close(loss, (F.cross_entropy(logits, alike) + F.cross_entropy(logits.T, alike)) / 2)
    loss.backward()
    assert a.grad.isfinite().all()


def test_the_loss_of_matches_of_one_each_is_that_of_aligned_rows():
    a, b = unit_rows(6, 5)
    torch.testing.assert_close(matched_cross_entropy(a, b, torch.eye(6), 20.0, 3), symmetric_info_nce(a, b, 20.0))


def test_matches_whose_power_underflows_still_tell_which_is_larger():
    a, b = unit_rows(2, 5)
    tiny = torch.tensor([[2e-20, 1e-20], [1e-20, 2e-20]])
    expected = matched_cross_entropy(a, b, tiny * 1e20, 5.0, 3)
    torch.testing.assert_close(matched_cross_entropy(a, b, tiny, 5.0, 3), expected)
