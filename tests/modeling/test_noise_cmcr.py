import torch

from cmcr_hf.modeling.noise_cmcr import CPU_SEED_ROWS as SEED_ROWS
from cmcr_hf.modeling.noise_cmcr import row_noise


def test_parts_of_a_batch_get_the_noise_of_the_whole():
    rows = 2 * SEED_ROWS + 44
    whole = row_noise(torch.zeros(rows, 6), (1, 2), "a")
    # One row, parts within a block of seeds and parts across its bounds.
    for first, count in ((0, 1), (rows - 1, 1), (10, 100), (200, 100), (250, 300), (SEED_ROWS, SEED_ROWS)):
        assert torch.equal(row_noise(torch.zeros(count, 6), (1, 2), "a", first), whole[first : first + count])


def test_another_seed_or_name_gives_other_noise():
    noise = row_noise(torch.zeros(SEED_ROWS, 6), (1, 2), "a")
    for seed, name in (((1, 3), "a"), ((1, 2, 0), "a"), ((12,), "a"), ((1, 2), "b")):
        assert (row_noise(torch.zeros(SEED_ROWS, 6), seed, name) != noise).all()


def test_the_noise_is_standard_normal_and_independent_from_row_to_row():
    noise = row_noise(torch.zeros(20 * SEED_ROWS, 50), (1, 2), "a").double()
    # Six standard errors of 256,000 draws.
    assert abs(noise.mean()) < 6 / 256_000**0.5
    assert abs(noise.var() - 1) < 6 * (2 / 256_000) ** 0.5
    blocks = noise.reshape(20, -1)
    correlations = torch.corrcoef(blocks) - torch.eye(20)
    assert correlations.abs().max() < 6 / blocks.shape[1] ** 0.5


def test_the_noise_has_the_dtype_of_the_embeddings_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    assert row_noise(torch.zeros(3, 6, dtype=torch.bfloat16), (1, 2), "a").dtype == torch.bfloat16
    assert torch.equal(torch.get_rng_state(), state)
