"""Semantic consistency over a whole memory: `aggregate` against the two products that it consists of and its peers."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import alternate, machine
from cmcr_hf.cpu import float32_products, products_in
from cmcr_hf.training.aggregate import aggregate
from cmcr_hf.training.store import EmbeddingStore

# Scores of the whole matrix at once: 2 ** 28 are 1 GiB in float32.
MOST_SCORES = 2**28
NEIGHBOURS = 128


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--queries", type=int, default=4096, help="texts")
    parser.add_argument("--memory", type=int, default=32768, help="items of the memory")
    parser.add_argument("--dim", type=int, default=512, help="width of the space")
    parser.add_argument("--temperature", type=float, default=0.01, help="tau 1")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(0)

    def unit_rows(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, arguments.dim, generator=generator), dim=-1)

    queries, memory = unit_rows(arguments.queries), unit_rows(arguments.memory)
    sample = queries[:256].double()
    exact = (sample @ memory.double().T / arguments.temperature).softmax(dim=-1) @ memory.double()
    size = f"{arguments.queries} texts x {arguments.memory} items x {arguments.dim}"
    print(f"Aggregation, {size}, random unit vectors, temperature {arguments.temperature}")
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"float32 as {float32_products()!r}"
    print(f"{machine()}, {name}")
    with tempfile.TemporaryDirectory() as folder:
        store = EmbeddingStore.create(
            folder,
            space="clip",
            modality="image",
            source={"id": "random", "revision": "0", "config_hash": "0"},
            dim=arguments.dim,
            data_fingerprint="random",
        )
        store.append(memory, [""] * len(memory))
        store.finish()
        rows = _contenders(queries.to(arguments.device), memory.to(arguments.device), store, arguments.temperature)
        found = {name: run() for name, (_, run) in rows.items()}
        seconds = alternate({name: run for name, (_, run) in rows.items()}, arguments.repeats)

    operations = 4 * arguments.queries * arguments.memory * arguments.dim
    peaks = {
        dtype: min(seconds[name] for name, (of, _) in rows.items() if of == dtype and name.startswith("products"))
        for dtype in ("float32", "bfloat16")
    }
    print(f"{'':44} {'seconds':>8} {'GFLOP/s':>8} {'of peak':>8} {'max error':>10} {'1 - min cos':>12}")
    for name, (dtype, _) in rows.items():
        errors = ""
        result = found[name]
        if result is not None:
            result = result[: len(exact)].double().cpu()
            distance = 1 - F.cosine_similarity(result, exact).min().item()
            errors = f"{(result - exact).abs().max().item():10.1e} {distance:12.1e}"
        share = peaks[dtype] / seconds[name]
        print(f"{name:44} {seconds[name]:8.3f} {operations / seconds[name] / 1e9:8.0f} {share:8.0%} {errors}")


def _contenders(
    queries: Tensor, memory: Tensor, store: EmbeddingStore, temperature: float
) -> dict[str, tuple[str, Callable[[], Tensor | None]]]:
    """Return what is timed by name: the type whose fastest products are its peak, and a function that runs it."""
    is_cuda = queries.device.type == "cuda"
    precisions = ["ieee"] if is_cuda else ["ieee", "bf16"]
    rows: dict[str, tuple[str, Callable[[], Tensor | None]]] = {}

    def add(name: str, run: Callable[[], Tensor | None], dtype: str = "float32", precision: str = "ieee") -> None:
        def timed() -> Tensor | None:
            with torch.no_grad(), products_in(precision):
                result = run()
            if is_cuda:
                torch.cuda.synchronize()
            return result

        rows[name] = (dtype, timed)

    def attention(queries: Tensor, memory: Tensor) -> Tensor:
        keys = memory[None, None]
        return F.scaled_dot_product_attention(queries[None, None], keys, keys, scale=1 / temperature)[0, 0]

    def dense(queries: Tensor, memory: Tensor) -> Tensor:
        return (queries @ memory.T / temperature).softmax(dim=-1) @ memory

    def aggregated(precision: str) -> Tensor:
        with patch("cmcr_hf.training.aggregate.float32_products", lambda: precision):
            return aggregate(queries, memory, temperature=temperature)

    for precision in precisions:
        add(f"products, float32 as {precision!r}", lambda: _products(queries, memory), precision=precision)
    halves = queries.bfloat16(), memory.bfloat16()
    add("products, bfloat16", lambda: _products(*halves), "bfloat16")
    fits = len(queries) * len(memory) <= MOST_SCORES
    if not fits:
        print(f"Skipped, more than {MOST_SCORES} scores: dense softmax.")
    for precision in precisions:
        if fits:
            add(f"dense softmax, float32 as {precision!r}", lambda: dense(queries, memory), precision=precision)
        add(f"torch attention, float32 as {precision!r}", lambda: attention(queries, memory), precision=precision)
    add("torch attention, bfloat16", lambda: attention(*halves), "bfloat16")
    if is_cuda and fits:
        compiled = torch.compile(dense)
        add("dense softmax compiled, float32", lambda: compiled(queries, memory))
        add("dense softmax compiled, bfloat16", lambda: compiled(*halves), "bfloat16")
    try:
        import faiss
    except ImportError:
        print("Skipped, not installed: faiss.")
    else:
        if not is_cuda:
            faiss.omp_set_num_threads(torch.get_num_threads())
            index = faiss.IndexFlatIP(memory.shape[1])
            index.add(memory.numpy())
            name = f"faiss, {NEIGHBOURS} nearest of all, float32"
            add(name, lambda: _nearest(index, queries, memory, temperature))
    for precision in precisions:
        add(f"aggregate, float32 as {precision!r}", lambda precision=precision: aggregated(precision))
    add("aggregate, float32, memory on disk", lambda: aggregate(queries, store, temperature=temperature))
    half = torch.bfloat16
    add("aggregate, bfloat16", lambda: aggregate(queries, memory, temperature=temperature, dtype=half), "bfloat16")
    return rows


def _products(queries: Tensor, memory: Tensor) -> None:
    """Multiply as much as an aggregation does and keep nothing, in blocks of the size that suits a CPU's products."""
    for block in queries.split(1024):
        for keys in memory.split(4096):
            (block @ keys.T) @ keys


def _nearest(index: object, queries: Tensor, memory: Tensor, temperature: float) -> Tensor:
    scores, rows = index.search(queries.numpy(), NEIGHBOURS)  # type: ignore[attr-defined]
    weights = (torch.from_numpy(scores) / temperature).softmax(dim=-1)
    parts = zip(weights.split(512), torch.from_numpy(rows).split(512), strict=True)
    return torch.cat([torch.einsum("nk,nkd->nd", part, memory[nearest]) for part, nearest in parts])


if __name__ == "__main__":
    main()
