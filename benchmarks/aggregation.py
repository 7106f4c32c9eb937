"""Semantic consistency over a whole memory: `aggregate` against torch's attention and against the dense equation."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from benchmarks.timing import alternate, machine
from cmcr_hf.training.aggregate import aggregate


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--queries", type=int, default=4096, help="texts")
    parser.add_argument("--memory", type=int, default=32768, help="items of the memory")
    parser.add_argument("--dim", type=int, default=512, help="width of the space")
    parser.add_argument("--temperature", type=float, default=0.01, help="tau 1")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds")
    arguments = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(0)

    def unit_rows(rows: int) -> torch.Tensor:
        return F.normalize(torch.randn(rows, arguments.dim, generator=generator), dim=-1)

    queries, memory, temperature = unit_rows(arguments.queries), unit_rows(arguments.memory), arguments.temperature
    contenders = {
        "aggregate": lambda: aggregate(queries, memory, temperature=temperature),
        "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(
            queries[None, None], memory[None, None], memory[None, None], scale=1 / temperature
        )[0, 0],
        "dense softmax": lambda: (queries @ memory.T / temperature).softmax(dim=-1) @ memory,
        "the two matrix products alone": lambda: (queries @ memory.T) @ memory,
    }
    exact = (queries[:256].double() @ memory.double().T / temperature).softmax(dim=-1) @ memory.double()
    errors = {name: (run()[:256] - exact).abs().max().item() for name, run in contenders.items()}
    seconds = alternate(contenders, arguments.repeats)
    operations = 4 * arguments.queries * arguments.memory * arguments.dim

    size = f"{arguments.queries} texts x {arguments.memory} items x {arguments.dim}"
    print(f"Aggregation, {size}, float32, random unit vectors")
    print(machine())
    print(f"{'':32} {'seconds':>8} {'GFLOP/s':>8} {'of products':>12} {'largest error':>14}")
    floor = seconds["the two matrix products alone"]
    for name, value in seconds.items():
        error = "" if name.startswith("the two") else f"{errors[name]:.1e}"
        print(f"{name:32} {value:8.3f} {operations / value / 1e9:8.0f} {floor / value:12.0%} {error:>14}")


if __name__ == "__main__":
    main()
