"""Run every benchmark of speed: `python -m benchmarks`, or one: `python -m benchmarks.aggregation`."""

from __future__ import annotations

import argparse

from . import aggregation, point_clouds, training_step


def main() -> None:
    epilog = (
        "On their own, since they take longer: python -m benchmarks.partial_load (memory), "
        "python -m benchmarks.real_retrieval (quality on real data)."
    )
    argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, epilog=epilog).parse_args()
    for module in (aggregation, training_step, point_clouds):
        module.main([])
        print()


if __name__ == "__main__":
    main()
