"""Options that several commands have, and what their values stand for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="items embedded at once (default: %(default)s)"
    )


def add_embedding_options(parser: argparse.ArgumentParser) -> None:
    add_batch_size(parser)
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def add_publishing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--private", action="store_true", help="create the repository private")
    parser.add_argument(
        "--licence", metavar="ID", help="of the embeddings, for the card, as the Hub names it (default: not stated)"
    )


def read_share(text: str) -> tuple[int, int]:
    own, _, shares = text.partition("/")
    if not (own.isdecimal() and shares.isdecimal() and int(own) < int(shares)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got {text!r}")
    return int(own), int(shares)


def positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def not_negative(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {value}")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from error


def usable_device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    # A torch without CUDA raises AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"Cannot use the device {name!r}: {error}. Pass --device cpu.") from error
    return name


@contextmanager
def tuned(device: str, *, quiet: bool = False) -> Iterator[None]:
    if device != "cpu":
        yield
        return
    from .cpu import tuned_cpu

    with tuned_cpu() as line:
        if not quiet:
            print(line, flush=True)
        yield
