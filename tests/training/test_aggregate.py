import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cmcr_hf.cpu import float32_products, products_in
from cmcr_hf.training import aggregate as module
from cmcr_hf.training.aggregate import READ_BLOCKS, aggregate, rank_rows
from cmcr_hf.training.store import EmbeddingStore


def unit_rows(rows: int, dim: int, seed: int) -> torch.Tensor:
    """Return synthetic unit vectors about a common direction, so that many cosines are high and weights compete."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator) + torch.randn(dim, generator=generator), dim=1)


def dense(
    queries: torch.Tensor, memory: torch.Tensor, values: torch.Tensor | None = None, temperature: float = 0.01
) -> torch.Tensor:
    weights = torch.softmax(queries.double() @ memory.double().T / temperature, dim=1)
    return weights @ (memory if values is None else values).double()


def largest_difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    return (result.double() - expected.double()).abs().max().item()


@pytest.mark.parametrize(("query_block", "memory_block"), [(1, 1), (3, 7), (13, 97), (14, 98), (5, 96), (4096, 16384)])
def test_result_is_the_dense_softmax_for_any_block_sizes(query_block: int, memory_block: int) -> None:
    queries, memory = unit_rows(13, 64, 0), unit_rows(97, 64, 1)
    result = aggregate(queries, memory, query_block=query_block, memory_block=memory_block)
    assert result.dtype == torch.float32
    assert largest_difference(result, dense(queries, memory)) < 1e-6


def test_float64_inputs_are_computed_in_float64() -> None:
    queries, memory = unit_rows(13, 64, 0).double(), unit_rows(97, 64, 1).double()
    result = aggregate(queries, memory, temperature=0.001, query_block=5, memory_block=10)
    assert result.dtype == torch.float64
    assert largest_difference(result, dense(queries, memory, temperature=0.001)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    queries, memory = unit_rows(13, 64, 0).to(dtype), unit_rows(97, 64, 1).to(dtype)
    result = aggregate(queries, memory, query_block=5, memory_block=10)
    assert result.dtype == torch.float32
    assert largest_difference(result, dense(queries, memory)) < 1e-6


def test_autocast_does_not_change_the_result() -> None:
    queries, memory = unit_rows(13, 64, 0), unit_rows(97, 64, 1)
    expected = aggregate(queries, memory)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = aggregate(queries, memory)
    assert torch.equal(result, expected)


@given(
    rows=st.integers(1, 13),
    items=st.integers(1, 70),
    dim=st.integers(1, 9),
    width=st.integers(1, 5),
    exponent=st.floats(-3, 3),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    seed=st.integers(0, 2**32),
    ties=st.booleans(),
    rising=st.booleans(),
)
def test_any_shape_cut_and_temperature_gives_the_dense_softmax(
    rows: int,
    items: int,
    dim: int,
    width: int,
    exponent: float,
    cuts: list[int],
    seed: int,
    ties: bool,
    rising: bool,
) -> None:
    queries, memory, values = unit_rows(rows, dim, seed), unit_rows(items, dim, seed + 1), unit_rows(items, width, 2)
    if ties:
        memory[items // 2 :] = memory[0].clone()
    if rising:
        memory = memory[(memory @ queries[0]).argsort()]
    temperature = 10.0**exponent
    cuts = [min(cut, items // 5) for cut in cuts]
    lengths = [*cuts, items - sum(cuts)]
    arguments = {"temperature": temperature, "query_block": 5, "memory_block": 3}
    shards, value_shards = memory.split(lengths), values.split(lengths)
    expected = dense(queries, memory, values, temperature)
    # A weight errs by the rounding of its cosine over the temperature.
    limit = 1e-6 + 5e-7 / temperature
    assert largest_difference(aggregate(queries, shards, value_shards, **arguments), expected) < limit
    doubles = (queries.double(), [shard.double() for shard in shards], [shard.double() for shard in value_shards])
    assert largest_difference(aggregate(*doubles, **arguments), expected) < 1e-11


def test_shards_give_the_result_of_one_tensor() -> None:
    queries, memory, values = (
        unit_rows(n, dim, seed).double() for n, dim, seed in ((13, 16, 0), (97, 16, 1), (97, 8, 2))
    )
    rows = [40, 1, 0, 56]
    result = aggregate(queries, torch.split(memory, rows), iter(torch.split(values, rows)), memory_block=30)
    assert largest_difference(result, dense(queries, memory, values)) < 1e-12


def test_values_of_another_width_get_the_weights_of_the_memory() -> None:
    memory = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    values = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, -3.0]])
    # exp(1 / 0.5) : exp(0) = e^2 : 1
    first = torch.tensor(2.0).exp() / (torch.tensor(2.0).exp() + 1)
    result = aggregate(memory[:1], memory, values, temperature=0.5, memory_block=1)
    assert result[0].tolist() == pytest.approx([first.item(), 1 - first.item(), 8 * first.item() - 3], abs=1e-6)


def test_tiny_temperature_gives_the_nearest_neighbour() -> None:
    queries, memory = unit_rows(13, 64, 0), unit_rows(97, 64, 1)
    nearest = memory[(queries @ memory.T).argmax(dim=1)]
    assert largest_difference(aggregate(queries, memory, temperature=1e-7, memory_block=10), nearest) < 1e-6


def test_huge_temperature_gives_the_mean_of_the_memory() -> None:
    queries, memory = unit_rows(13, 64, 0), unit_rows(97, 64, 1)
    result = aggregate(queries, memory, temperature=1e6, memory_block=10)
    assert largest_difference(result, memory.mean(dim=0).expand(13, -1)) < 1e-6


@pytest.mark.parametrize("opposite_first", [True, False])
def test_opposite_rows_at_a_low_temperature_give_no_nan(opposite_first: bool) -> None:
    query = unit_rows(1, 64, 0)
    rows = [-query, -query, query] if opposite_first else [query, -query, -query]
    result = aggregate(query, torch.cat(rows), temperature=0.001, memory_block=1)
    assert largest_difference(result, query) < 1e-6


def test_memory_of_only_opposite_rows_is_averaged() -> None:
    query = unit_rows(1, 64, 0)
    result = aggregate(query, torch.cat([-query] * 5), temperature=0.001, memory_block=2)
    assert largest_difference(result, -query) < 1e-6


@given(
    rows=st.integers(1, 40),
    dim=st.integers(1, 9),
    temperature=st.floats(1e-3, 10.0),
    query_block=st.integers(1, 8),
    memory_block=st.integers(1, 50),
    seed=st.integers(0, 2**32),
)
def test_result_is_a_convex_combination_of_the_memory(
    rows: int, dim: int, temperature: float, query_block: int, memory_block: int, seed: int
) -> None:
    queries, memory = unit_rows(5, dim, seed).double(), unit_rows(rows, dim, seed + 1).double()
    average = partial(
        aggregate, queries, memory, temperature=temperature, query_block=query_block, memory_block=memory_block
    )
    weights = average(torch.eye(rows).double())
    assert (weights >= 0).all()
    assert largest_difference(weights.sum(dim=1), torch.ones(5)) < 1e-12
    assert largest_difference(average(), weights @ memory) < 1e-12


def test_normalize_scales_the_average_to_unit_norm() -> None:
    queries, memory = unit_rows(13, 64, 0), unit_rows(97, 64, 1)
    plain = aggregate(queries, memory, temperature=0.1)
    assert (plain.norm(dim=1) < 0.99).all()
    assert largest_difference(aggregate(queries, memory, temperature=0.1, normalize=True), F.normalize(plain)) < 1e-7


def test_inputs_are_unchanged_and_no_gradient_is_kept() -> None:
    queries, memory = unit_rows(13, 64, 0).requires_grad_(), unit_rows(97, 64, 1)
    before = queries.detach().clone(), memory.clone()
    assert not aggregate(queries, memory, memory_block=10).requires_grad
    assert torch.equal(queries, before[0])
    assert torch.equal(memory, before[1])


class LargestTensor(TorchDispatchMode):
    """Record the largest tensor, in elements, that an operation allocates rather than views."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_temporary_is_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    # Half precision, so that a copy of the whole memory in float32 would show, as the whole score matrix would.
    queries, memory = unit_rows(400, 8, 0), unit_rows(1000, 8, 1).half()
    float32_products()
    # What other threads do is not seen.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with LargestTensor() as largest:
        aggregate(queries, memory, query_block=100, memory_block=50)
    assert largest.elements == max(100 * 50, READ_BLOCKS * 50 * 8, 400 * 8)


def test_no_queries_give_an_empty_result() -> None:
    assert aggregate(torch.empty(0, 8), unit_rows(5, 8, 0), torch.ones(5, 3)).shape == (0, 3)


def test_progress_is_shown_on_request_only(capsys: pytest.CaptureFixture[str]) -> None:
    queries, memory = unit_rows(4, 8, 0), unit_rows(5, 8, 1)
    aggregate(queries, memory)
    assert capsys.readouterr().err == ""
    aggregate(queries, memory, progress=True)
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize("memory", [torch.empty(0, 8), [], [torch.empty(0, 8), torch.empty(0, 8)]])
def test_empty_memory_is_an_error(memory: torch.Tensor | list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="memory is empty"):
        aggregate(unit_rows(2, 8, 0), memory)


def test_widths_that_differ_are_an_error() -> None:
    with pytest.raises(ValueError, match="width 8 and memory 9"):
        aggregate(unit_rows(2, 8, 0), unit_rows(5, 9, 1))
    with pytest.raises(ValueError, match=r"memory hold a .* shape \(5, 9\)"):
        aggregate(unit_rows(2, 8, 0), [unit_rows(5, 8, 1), unit_rows(5, 9, 1)])


def test_values_that_are_not_row_aligned_are_an_error() -> None:
    memory, values = unit_rows(5, 8, 0), unit_rows(5, 8, 1)
    with pytest.raises(ValueError, match="a shard of 5 rows and values of 4"):
        aggregate(memory, memory, values[:4])
    with pytest.raises(ValueError, match="a shard of 2 rows and values of 3"):
        aggregate(memory, torch.split(memory, [2, 3]), torch.split(values, [3, 2]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["queries", "memory", "values"])
def test_numbers_that_are_not_finite_are_an_error(name: str, bad: float) -> None:
    tensors = {"queries": unit_rows(3, 8, 0), "memory": unit_rows(5, 8, 1), "values": unit_rows(5, 8, 2)}
    tensors[name][-1, 3] = bad
    with pytest.raises(ValueError, match=f"{name} hold NaN or infinity"):
        aggregate(tensors["queries"], tensors["memory"], tensors["values"], memory_block=2)


@pytest.mark.parametrize("temperature", [0.0, -0.01, float("nan")])
def test_temperature_that_is_not_positive_is_an_error(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature is"):
        aggregate(unit_rows(2, 8, 0), unit_rows(5, 8, 1), temperature=temperature)


def test_scores_that_overflow_are_an_error() -> None:
    with pytest.raises(ValueError, match="overflow at temperature 1e-42"):
        aggregate(unit_rows(2, 8, 0), unit_rows(5, 8, 1), temperature=1e-42)


def test_block_size_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="query_block is 0"):
        aggregate(unit_rows(2, 8, 0), unit_rows(5, 8, 1), query_block=0)


def test_shards_of_other_dtypes_are_an_error() -> None:
    shards = [unit_rows(5, 8, 1), unit_rows(5, 8, 2).double()]
    with pytest.raises(ValueError, match=r"memory hold a torch\.float64 tensor .* one width and dtype"):
        aggregate(unit_rows(2, 8, 0), shards)


def test_a_missing_shard_of_values_is_an_error() -> None:
    memory = unit_rows(5, 8, 1)
    with pytest.raises(ValueError, match="different numbers of shards"):
        aggregate(memory, memory.split(3), [memory[:3]])


def test_dtype_that_is_not_bfloat16_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch\.float16"):
        aggregate(unit_rows(2, 8, 0), unit_rows(5, 8, 1), dtype=torch.float16)


def test_integer_tensor_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"queries hold a torch\.int64"):
        aggregate(torch.ones(2, 8, dtype=torch.int64), unit_rows(5, 8, 1))


@pytest.mark.parametrize("order", ["random", "rising", "falling"])
def test_bfloat16_keeps_the_direction(order: str) -> None:
    queries, memory = unit_rows(40, 512, 0), unit_rows(3000, 512, 1)
    if order != "random":
        memory = memory[(memory @ queries.mean(dim=0)).argsort(descending=order == "falling")]
    result = aggregate(queries, memory, dtype=torch.bfloat16, memory_block=200)
    assert result.dtype == torch.float32
    assert F.cosine_similarity(result.double(), dense(queries, memory)).min() > 0.999
    assert (result.norm(dim=1) / dense(queries, memory).norm(dim=1) - 1).abs().max() < 0.01


def test_bfloat16_errs_less_than_rounded_scores_do() -> None:
    queries, memory = unit_rows(40, 512, 0), unit_rows(3000, 512, 1)
    expected = dense(queries, memory)
    rounded = torch.softmax((queries.bfloat16() @ memory.bfloat16().T).double() / 0.01, dim=1) @ memory.double()
    turns = [
        1 - F.cosine_similarity(result.double(), expected).min().item()
        for result in (aggregate(queries, memory, dtype=torch.bfloat16), rounded)
    ]
    assert turns[0] < turns[1] / 2


def store_of(embeds: torch.Tensor, folder: Path, shard_rows: int) -> EmbeddingStore:
    source = {"id": "random", "revision": "0", "config_hash": "0"}
    store = EmbeddingStore.create(
        folder,
        space="clip",
        modality="image",
        source=source,
        dim=embeds.shape[1],
        data_fingerprint="random",
        shard_rows=shard_rows,
    )
    store.append(embeds, [str(row) for row in range(len(embeds))])
    store.finish()
    return EmbeddingStore.open(folder)


def test_stores_are_read_as_memory_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries, memory, values = unit_rows(13, 16, 0), unit_rows(97, 16, 1), unit_rows(97, 8, 2)
    stores = store_of(memory, tmp_path / "memory", 40), store_of(values, tmp_path / "values", 40)
    result = aggregate(queries, *stores, temperature=0.1, memory_block=4, progress=True)
    assert largest_difference(result, dense(queries, memory, values, temperature=0.1)) < 1e-6
    assert "97/97" in capsys.readouterr().err


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    memory = unit_rows(97, 16, 1)
    store = store_of(memory, tmp_path, 40)
    path = tmp_path / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors does not have the sha256"):
        aggregate(unit_rows(2, 16, 0), store)


def test_the_memory_is_read_once_and_no_further_than_needed() -> None:
    read = []

    def shards() -> Iterator[torch.Tensor]:
        for number in range(10):
            read.append(number)
            shard = unit_rows(8, 8, number)
            if number == 2:
                shard[0, 0] = torch.nan
            yield shard

    with pytest.raises(ValueError, match="memory hold NaN"):
        aggregate(unit_rows(30, 8, 0), shards(), query_block=4, memory_block=1)
    assert read == [0, 1, 2]


def test_values_side_by_side_share_one_softmax() -> None:
    audio, claps, clips = unit_rows(6, 16, 0), unit_rows(50, 16, 1), unit_rows(50, 12, 2)
    pairs = zip(claps.split(20), clips.split(20), strict=True)
    both = aggregate(audio, claps.split(20), (torch.cat(pair, dim=1) for pair in pairs))
    assert largest_difference(both[:, :16], dense(audio, claps)) < 1e-6
    assert largest_difference(both[:, 16:], dense(audio, claps, clips)) < 1e-6


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_ranks_together_give_the_bits_of_one_call(dtype: torch.dtype | None) -> None:
    queries, memory = unit_rows(53, 64, 0), unit_rows(97, 64, 1)
    run = partial(aggregate, memory=memory, dtype=dtype, query_block=4, memory_block=10)
    whole = run(queries)
    assert torch.equal(run(queries.clone()), whole)
    for world_size in (1, 2, 3, 20):
        parts = [rank_rows(53, 8, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([run(queries[part.start : part.stop]) for part in parts]), whole)


@pytest.fixture
def three_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_number_of_cores_changes_no_bit(
    dtype: torch.dtype | None, three_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, memory = unit_rows(53, 64, 0), unit_rows(97, 64, 1)
    run = partial(aggregate, queries, memory, dtype=dtype, query_block=4, memory_block=10)
    several = run()
    # Each of the threads used one, and this one still has all.
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    assert torch.equal(several, run())


def test_what_the_calling_thread_is_in_holds_on_all_cores(three_cores: None) -> None:
    queries, memory = unit_rows(53, 64, 0).requires_grad_(), unit_rows(97, 64, 1)
    expected = aggregate(queries, memory, query_block=4)
    with torch.inference_mode():
        result = aggregate(queries, memory, query_block=4)
    assert result.is_inference()
    assert not expected.requires_grad
    assert torch.equal(result, expected)


def test_an_error_on_one_core_is_raised(three_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "_add_block", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        aggregate(unit_rows(53, 64, 0), unit_rows(97, 64, 1), query_block=4)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("temperature", [1e-7, 0.001, 0.01, 1.0])
def test_the_steps_of_a_device_give_the_dense_softmax(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_add_block", module._add_block_unread)
    queries, memory = unit_rows(13, 64, 0), unit_rows(97, 64, 1)
    memory = memory[(memory @ queries[0]).argsort()]
    result = aggregate(queries, memory, temperature=temperature, query_block=5, memory_block=10)
    limit = 1e-6 + 5e-7 / temperature
    assert largest_difference(result, dense(queries, memory, temperature=temperature)) < limit


@pytest.mark.parametrize("order", ["random", "rising", "falling"])
def test_the_steps_of_a_device_keep_the_direction_in_bfloat16(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_add_block", module._add_block_unread)
    queries, memory = unit_rows(40, 512, 0), unit_rows(3000, 512, 1)
    if order != "random":
        memory = memory[(memory @ queries.mean(dim=0)).argsort(descending=order == "falling")]
    result = aggregate(queries, memory, dtype=torch.bfloat16, memory_block=200)
    assert F.cosine_similarity(result.double(), dense(queries, memory)).min() > 0.999


class Reads(TorchDispatchMode):
    """Record the operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket._qualified_op_name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::item"):
            self.names.add(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("step", "reads"), [("_add_block_unread", set()), ("_add_block", {"aten::nonzero"})])
def test_the_steps_of_a_device_are_never_waited_for(step: str, reads: set[str]) -> None:
    state = torch.zeros(5, 1), torch.zeros(5, 1), torch.zeros(5, 8)
    memory = unit_rows(30, 8, 1)
    with Reads() as found:
        for number, keys in enumerate(memory.split(10)):
            getattr(module, step)(unit_rows(5, 8, 0) * 100, keys, keys, state, torch.empty(50), number == 0)
    assert found.names == reads


def test_the_address_of_the_memory_does_not_change_a_bit() -> None:
    queries, memory = unit_rows(53, 61, 0), unit_rows(97, 61, 1)
    elsewhere = torch.empty(memory.numel() + 1)[1:].view_as(memory).copy_(memory)
    assert torch.equal(aggregate(queries, elsewhere), aggregate(queries, memory))


@given(rows=st.integers(0, 100), block=st.integers(1, 30), world_size=st.integers(1, 12))
def test_ranks_share_out_all_rows_in_whole_blocks(rows: int, block: int, world_size: int) -> None:
    parts = [rank_rows(rows, block, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [row for part in parts for row in part] == list(range(rows))
    assert all(part.start % block == 0 for part in parts if part)
    blocks = [-(-len(part) // block) for part in parts]
    assert max(blocks) - min(blocks) <= 1


def test_one_process_has_all_rows() -> None:
    assert rank_rows(10, 4) == range(10)


def test_a_process_of_a_group_has_the_rows_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    assert rank_rows(10, 4) == range(4, 8)


@pytest.mark.parametrize("named", [{"rank": 0}, {"world_size": 2}, {"rank": 2, "world_size": 2}, {"rows": -1}])
def test_a_rank_that_is_not_one_of_the_group_is_an_error(named: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        rank_rows(**{"rows": 10, "block": 4, **named})


def test_the_settings_of_float32_products_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = torch.backends.mkldnn.matmul
    seen = []
    before = setting.fp32_precision

    def shards() -> Iterator[torch.Tensor]:
        yield unit_rows(5, 8, 1)
        seen.append(setting.fp32_precision)
        yield torch.full((5, 8), torch.nan)

    try:
        setting.fp32_precision = "tf32"
        with pytest.raises(ValueError, match="NaN"):
            aggregate(unit_rows(2, 8, 0), shards())
        assert setting.fp32_precision == "tf32"
        assert seen == [float32_products()]
    finally:
        setting.fp32_precision = before


def test_a_processor_that_rounds_to_bfloat16_multiplies_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.Tensor.__matmul__

    def rounding(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float32 and torch.backends.mkldnn.matmul.fp32_precision == "bf16":
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return matmul(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert float32_products.__wrapped__() == "ieee"


def test_float32_products_err_as_little_as_they_say() -> None:
    left, right = unit_rows(100, 256, 0), unit_rows(700, 256, 1)
    with products_in(float32_products()):
        error = largest_difference(left @ right.T, left.double() @ right.double().T)
    assert error < 1e-6


MEASURE = """
import resource, sys, torch
from cmcr_hf.training.aggregate import aggregate
from cmcr_hf.training.store import EmbeddingStore
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
queries = torch.nn.functional.normalize(torch.randn(8, 1024, generator=torch.Generator().manual_seed(0)), dim=1)
aggregate(queries, queries)
before = peak()
aggregate(queries, EmbeddingStore.open(sys.argv[1]), memory_block=128)
print(peak() - before)
"""


@pytest.mark.slow
def test_a_memory_larger_than_the_ceiling_is_streamed(tmp_path: Path) -> None:
    # 256 MiB in 32 shards of 8; three stretches of 4 MiB and two mapped shards are in memory at once.
    embeds = F.normalize(torch.randn(65536, 1024, generator=torch.Generator().manual_seed(0)), dim=1)
    store_of(embeds, tmp_path, 2048)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 80
