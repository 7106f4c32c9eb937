"""Semantic consistency over a whole memory: `aggregate` against the two products that it consists of and its peers."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import alternate, machine
from cmcr_hf.cpu import float32_products, products_in
from cmcr_hf.training import aggregate as module
from cmcr_hf.training.aggregate import aggregate
from cmcr_hf.training.store import EmbeddingStore

# Scores of the whole matrix at once: 2 ** 28 are 1 GiB in float32.
MOST_SCORES = 2**28
NEIGHBOURS = 128
# Texts, and the memories that they are aggregated over: images and clips.
PAPER = 2_300_000, (1_300_000, 1_800_000)
# Rows of queries and of memory whose product is fastest.
PRODUCT_BLOCKS = {"cpu": (1024, 4096), "cuda": (8192, 16384)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--queries", type=int, default=4096, help="texts")
    parser.add_argument("--memory", type=int, default=32768, help="items of the memory")
    parser.add_argument("--dim", type=int, default=512, help="width of the space")
    parser.add_argument("--temperature", type=float, default=0.01, help="tau 1")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--project",
        action="store_true",
        help="instead, aggregate a tenth of the paper's texts in bfloat16 over its memories, held by the host, and "
        "project the whole (half an hour at 660 GFLOP/s)",
    )
    arguments = parser.parse_args(argv)
    unit_rows = partial(_unit_rows, dim=arguments.dim, generator=torch.Generator().manual_seed(0))
    if arguments.project:
        _project(unit_rows, arguments.temperature, arguments.device)
        return
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
        for dtype in sorted({of for of, _ in rows.values()})
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


def _unit_rows(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=-1)


def _project(unit_rows: Callable[[int], Tensor], temperature: float, device: str) -> None:
    """Measure a tenth of the texts over both memories, and state what all would take and the least cosine of some."""
    texts, memories = PAPER
    seconds = 0.0
    print(machine() if device == "cpu" else torch.cuda.get_device_name())
    for size in memories:
        queries = unit_rows(texts // 10).to(device)
        shards = [unit_rows(min(65536, size - start)) for start in range(0, size, 65536)]
        run = partial(aggregate, memory=shards, temperature=temperature)
        run(queries[:10], dtype=torch.bfloat16)
        start = time.perf_counter()
        # Its last step reads the result, so it ends when the device does.
        result = run(queries, dtype=torch.bfloat16)
        took = time.perf_counter() - start
        seconds += took
        exact = run(queries[:256].double())
        cosine = F.cosine_similarity(result[:256].double(), exact).min().item()
        print(f"{len(queries)} texts x {size} x {queries.shape[1]}: {took:.1f} s, least cosine of 256 {cosine:.6f}")
    print(f"projected, {texts} texts x ({' + '.join(map(str, memories))}): {10 * seconds:.0f} s")


def _contenders(
    queries: Tensor, memory: Tensor, store: EmbeddingStore, temperature: float
) -> dict[str, tuple[str, Callable[[], Tensor | None]]]:
    """Return what is timed by name: the type whose fastest products are its peak, and a function that runs it."""
    is_cuda = queries.device.type == "cuda"
    precisions = ["ieee", "tf32"] if is_cuda else ["ieee", "bf16"]
    rows: dict[str, tuple[str, Callable[[], Tensor | None]]] = {}

    def add(name: str, run: Callable[[], Tensor | None], dtype: str = "float32", precision: str = "ieee") -> None:
        def timed() -> Tensor | None:
            with torch.no_grad(), products_in(*(("ieee", precision) if is_cuda else (precision,))):
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
        setting = partial(products_in, *(("ieee", precision) if is_cuda else (precision,)))
        with patch.object(module, "products_in", lambda _: setting()):
            return aggregate(queries, memory, temperature=temperature)

    def kind(precision: str) -> str:
        # What costs digits is compared with what costs as many.
        return "tf32" if precision == "tf32" else "float32"

    for precision in precisions:
        name = f"products, float32 as {precision!r}"
        add(name, lambda: _products(queries, memory), kind(precision), precision)
    halves = queries.bfloat16(), memory.bfloat16()
    add("products, bfloat16", lambda: _products(*halves), "bfloat16")
    fits = len(queries) * len(memory) <= MOST_SCORES
    if not fits:
        print(f"Skipped, more than {MOST_SCORES} scores: dense softmax.")
    for precision in precisions:
        if fits:
            name = f"dense softmax, float32 as {precision!r}"
            add(name, lambda: dense(queries, memory), kind(precision), precision)
        name = f"torch attention, float32 as {precision!r}"
        add(name, lambda: attention(queries, memory), kind(precision), precision)
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
        add(f"aggregate, float32 as {precision!r}", partial(aggregated, precision), kind(precision))
    add("aggregate, float32, memory on disk", lambda: aggregate(queries, store, temperature=temperature))
    in_bfloat16 = partial(aggregate, queries, temperature=temperature, dtype=torch.bfloat16)
    add("aggregate, bfloat16", lambda: in_bfloat16(memory), "bfloat16")
    add("aggregate, bfloat16, memory on disk", lambda: in_bfloat16(store), "bfloat16")
    if is_cuda:
        step = torch.compile(module._add_block_unread)

        def with_compiled_steps() -> Tensor:
            with patch.object(module, "_add_block_unread", step):
                return in_bfloat16(memory)

        add("aggregate, bfloat16, steps compiled", with_compiled_steps, "bfloat16")
    return rows


def _products(queries: Tensor, memory: Tensor) -> None:
    """Multiply as much as an aggregation does and keep nothing, in blocks of the size that suits products."""
    rows, columns = PRODUCT_BLOCKS[queries.device.type]
    for block in queries.split(rows):
        for keys in memory.split(columns):
            (block @ keys.T) @ keys


def _nearest(index: object, queries: Tensor, memory: Tensor, temperature: float) -> Tensor:
    scores, rows = index.search(queries.numpy(), NEIGHBOURS)  # type: ignore[attr-defined]
    weights = (torch.from_numpy(scores) / temperature).softmax(dim=-1)
    parts = zip(weights.split(512), torch.from_numpy(rows).split(512), strict=True)
    return torch.cat([torch.einsum("nk,nkd->nd", part, memory[nearest]) for part, nearest in parts])


if __name__ == "__main__":
    main()
