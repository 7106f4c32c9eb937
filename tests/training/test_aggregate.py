from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cmcr_hf.training.aggregate import aggregate


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
    assert torch.equal(aggregate(queries, memory, temperature=1e-7, memory_block=10), nearest)


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


def test_no_temporary_is_larger_than_a_block() -> None:
    # Half precision, so that a copy of the whole memory in float32 would show, as the whole score matrix would.
    queries, memory = unit_rows(40, 8, 0), unit_rows(1000, 8, 1).half()
    with LargestTensor() as largest:
        aggregate(queries, memory, query_block=10, memory_block=50)
    assert largest.elements == 10 * 50


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


def test_integer_tensor_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"queries hold a torch\.int64"):
        aggregate(torch.ones(2, 8, dtype=torch.int64), unit_rows(5, 8, 1))
