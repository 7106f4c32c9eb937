"""Sampling and grouping of point clouds against a plain loop of the reference algorithm, and the point encoder against
its own matrix products.

Synthetic clouds (thick shells, the same each time) and random weights of the released size: speed depends on neither.
The reference is what PointBERT's published code computes in plain torch: one step a centre over all points, then the
distances of all points by a matrix product and `topk`.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from benchmarks.timing import alternate, machine
from cmcr_hf import UlipConfig, UlipModel
from cmcr_hf.modeling.grouping_ulip import group_points

POINTS, GROUPS, SIZE = 10_000, 512, 32


def shells(clouds: int) -> torch.Tensor:
    """Return synthetic clouds, `(clouds, POINTS, 3)`: points around a sphere, within a tenth of its radius."""
    generator = torch.Generator().manual_seed(0)
    points = F.normalize(torch.randn(clouds, POINTS, 3, generator=generator), dim=-1)
    return points * (1 + 0.1 * torch.randn(clouds, POINTS, 1, generator=generator))


def reference(clouds: torch.Tensor) -> torch.Tensor:
    """Group clouds as the reference algorithm does, from the first point of each."""
    rows = torch.arange(len(clouds))
    nearest = torch.full(clouds.shape[:2], 1e10)
    chosen = torch.zeros(len(clouds), GROUPS, dtype=torch.long)
    farthest = torch.zeros(len(clouds), dtype=torch.long)
    for step in range(GROUPS):
        chosen[:, step] = farthest
        distance = (clouds - clouds[rows, farthest][:, None]).square().sum(dim=-1)
        nearest = torch.minimum(nearest, distance)
        farthest = nearest.argmax(dim=-1)
    centers = clouds[rows[:, None], chosen]
    distances = centers.square().sum(-1)[..., None] + clouds.square().sum(-1)[:, None]
    distances -= 2 * centers @ clouds.transpose(1, 2)
    neighbours = distances.topk(SIZE, largest=False, sorted=False).indices
    return clouds[rows[:, None, None], neighbours] - centers[:, :, None]


def products(model: UlipModel, clouds: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Return the matrix products of the point encoder: how often each is computed, and its two factors."""
    config = model.point_model.config
    points, tokens, width = clouds * GROUPS * SIZE, clouds * (GROUPS + 1), config.hidden_size
    head, rows = width // config.num_attention_heads, clouds * config.num_attention_heads
    layers = config.num_hidden_layers
    shapes = [
        (1, (points, 3), (3, 128)),
        (1, (points, 128), (128, 256)),
        (1, (points, 256), (256, 512)),
        (1, (clouds * GROUPS, 256), (256, 512)),
        (1, (points, 512), (512, config.group_hidden_size)),
        (1, (clouds * GROUPS, config.group_hidden_size), (config.group_hidden_size, width)),
        (1, (clouds * GROUPS, 128), (128, width)),
        (layers, (tokens, width), (width, 3 * width)),
        (layers, (tokens, width), (width, width)),
        (layers, (tokens, width), (width, config.intermediate_size)),
        (layers, (tokens, config.intermediate_size), (config.intermediate_size, width)),
        (layers, (rows, GROUPS + 1, head), (rows, head, GROUPS + 1)),
        (layers, (rows, GROUPS + 1, GROUPS + 1), (rows, GROUPS + 1, head)),
    ]
    return [(times, torch.randn(first), torch.randn(second)) for times, first, second in shapes]


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--clouds", type=int, default=8, help="clouds a batch")
    parser.add_argument("--repeats", type=int, default=7, help="counted rounds")
    arguments = parser.parse_args(argv)
    clouds = shells(arguments.clouds)
    torch.manual_seed(0)
    model = UlipModel(UlipConfig()).eval()
    factors = products(model, arguments.clouds)

    def multiply() -> None:
        for times, first, second in factors:
            for _ in range(times):
                torch.matmul(first, second)

    seconds = alternate(
        {
            "ours": lambda: group_points(clouds, GROUPS, SIZE),
            "reference": lambda: reference(clouds),
            "one": lambda: group_points(clouds[:1], GROUPS, SIZE),
            "encoder": lambda: model.get_point_cloud_features(clouds),
            "products": multiply,
        },
        arguments.repeats,
    )
    each = {name: 1e3 * value / (1 if name == "one" else arguments.clouds) for name, value in seconds.items()}
    network = each["encoder"] - each["ours"]
    print(f"{POINTS:,} points, {GROUPS} x {SIZE} groups, {arguments.clouds} clouds; {machine()}; ms a cloud, medians")
    print(f"sampling and grouping              {each['ours']:7.1f}")
    print(f"  of a single cloud                {each['one']:7.1f}")
    ratio = each["reference"] / each["ours"]
    print(f"plain loop of the reference        {each['reference']:7.1f}   {ratio:.1f} x ours")
    print(f"network behind it                  {network:7.1f}")
    print(f"its matrix products alone          {each['products']:7.1f}   network {network / each['products']:.2f} x")
    print(f"whole encoder                      {each['encoder']:7.1f}   {each['encoder'] / each['products']:.2f} x")


if __name__ == "__main__":
    main()
