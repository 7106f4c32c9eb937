"""Run the trainings of an offline world side by side, each in a process of its own.

Nothing heavy is imported here: such a process of the `cmcr` command watches its parent before it imports what it
trains.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any


def train_apart(**jobs: tuple[Any, ...]) -> dict[str, float]:
    """Run (function, argument, ...) jobs in a process of its own each, with one thread; return the minutes by name.

    The processes end with this one, in whatever way that ends, and all of them where one fails.
    """
    context = get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    with (
        reader,
        writer,
        _one_thread_each(),
        ProcessPoolExecutor(
            len(jobs),
            mp_context=context,
            initializer=_end_with_parent,
            initargs=(reader,),
            max_tasks_per_child=1,
        ) as pool,
    ):
        try:
            futures = {name: pool.submit(_minutes, *job) for name, job in jobs.items()}
            for future in as_completed(futures.values()):
                future.result()
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            # Ends the others too, which would train on.
            writer.close()
            raise


def _minutes(function: Callable[..., None], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return round((time.perf_counter() - start) / 60, 1)


def _end_with_parent(reader: Connection) -> None:
    """Leave Ctrl-C to the parent process, and end when that ends, in whatever way, or closes its end of the pipe."""

    def watch() -> None:
        with suppress(EOFError, OSError):
            reader.recv_bytes()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Start processes within this context with one thread each: two on two cores do not wait for each other."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
