"""Kill a connection again and again, go on, and compare the end with that of a run that nothing disturbed.

Each time, `cmcr connect` goes on from the folder as it is before one of its stages, is killed within that stage, and
is run again, the same command. What is in the folder then has to be what the undisturbed run left, byte by byte. The
recipe is as small as one can be (two random encoders, a synthetic world of two concepts, three epochs), so a run takes
about a second, and every run is a fork of this process, which has imported everything.

Examples, in a checkout that is installed (`make test` does that):

    python tests/kill_stages.py --times 1000            a thousand kills at random instants, spread over the stages
    python tests/kill_stages.py --times 60 --stage save --stage train
    python tests/kill_stages.py --times 60 --signal INT     as by Ctrl-C; TERM: as a batch system ends a job
    python tests/kill_stages.py --boundaries 0          before and after every rename and sync that a run makes
    python tests/kill_stages.py --boundaries 20         at twenty of these instants

It ends with status 1 if a run ended otherwise, and keeps that run's folder. The table counts:

    kills       runs that were started to be killed, by the stage that was meant
    in stage    of these, those that were killed in that stage; the others were in the stage before or behind it
    finished    those that were done before the signal came
    identical   second runs that ended with the bytes of the undisturbed one
"""

from __future__ import annotations

import os

# Before any import that reads them: a fork of a process with other threads may wait for a lock forever.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import gc
import random
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from cmcr_hf import cli
from cmcr_hf.demo import world

START, END = "start", "end"
# A stage lies between two lines that `cmcr connect` reports.
STAGES = {
    "world": (START, "sources:"),
    "embed": ("sources:", "embed clap-audio:"),
    "aggregate": ("embed clap-audio:", "aggregate clap-audio:"),
    "train": ("aggregate clap-audio:", "train:"),
    "save": ("train:", "save:"),
    "evaluate": ("save:", END),
}
COMMAND = ["connect", "tiny.yaml", "--output", "out", "--device", "cpu"]
KILLED = 9
CONCEPTS = {name: world.CONCEPTS[name] for name in ("bee", "frog")}
# Its sources are two random encoders.
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "world": {"images": 2, "sounds": 2, "texts": 6, "test_images": 1, "test_sounds": 1},
    "text": [{"table": "texts.csv", "column": "text"}],
    "image": [{"folder": "images"}],
    "audio": [{"folder": "sounds"}],
    "connector": {"objective": "c-mcr", "projection_dim": 8},
    "train": {"epochs": 3, "batch_size": 6},
    "evaluate": {
        "image": {"folder": "test_images", "label": "parent"},
        "audio": {"folder": "test_sounds", "label": "parent"},
        "names": {"table": "names.csv", "column": "text"},
    },
}


@dataclass
class Outcome:
    """One kill: the stage that was meant, the one it fell into (None if the run was done), and what went wrong."""

    stage: str
    fell: str | None
    problem: str = ""


class Walk:
    """The undisturbed run: what it left, what was there before each stage, and how long stages take."""

    def __init__(self, folder: Path, save_sources: Callable[[Path], object]) -> None:
        self.folder = folder
        self.base = folder / "base"
        self.base.mkdir(parents=True)
        world.CONCEPTS = CONCEPTS
        # Beside the runs: a folder of weights is recorded by its path.
        save_sources(folder / "sources")
        sources = {space: str(folder / "sources" / space) for space in ("clip", "clap")}
        (self.base / "tiny.yaml").write_text(yaml.safe_dump({**RECIPE, "sources": sources}))
        whole = self.place("whole")
        (folder / "before-world").mkdir()
        starts = {start: stage for stage, (start, _) in STAGES.items()}

        def keep(line: str) -> None:
            if line in starts and line != START:
                shutil.copytree(whole / "out", folder / f"before-{starts[line]}")

        # In this process, so that its forks find everything imported.
        if status := run(whole, keep):
            raise RuntimeError(f"The undisturbed run ended with status {status}: see {whole / 'stderr'}.")
        # Trainer collects garbage: a fork would copy, page by page, what all those imports made.
        gc.collect()
        gc.freeze()
        self.expected = content(whole / "out")
        self.seconds: dict[str, float] = {}

    def place(self, name: str, stage: str | None = None) -> Path:
        """Return a new folder to run in, as it is before a stage; the same paths in each, relative to it."""
        place = self.folder / name
        shutil.copytree(self.base, place)
        if stage is not None:
            shutil.copytree(self.folder / f"before-{stage}", place / "out")
        return place

    def measure(self, stage: str) -> None:
        """Measure how long a stage takes when nothing disturbs it."""
        place = self.place("measured", stage)
        child = Child(place)
        start = child.wait_for(STAGES[stage][0])
        end = child.wait_for(STAGES[stage][1])
        child.join()
        shutil.rmtree(place)
        if start is None or end is None:
            raise RuntimeError(f"A run from the stage {stage} did not report it.")
        self.seconds[stage] = end - start

    def problem(self, place: Path) -> str:
        """Run the command again and say what is not as the undisturbed run left it; empty if nothing."""
        child = Child(place)
        status = child.join()
        if status:
            return f"the second run ended with status {status}: {(place / 'stderr').read_text()[-2000:]}"
        found = content(place / "out")
        differing = sorted(name for name in {*found, *self.expected} if found.get(name) != self.expected.get(name))
        return f"other bytes in {', '.join(differing)}" if differing else ""


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(place: Path, trace: Callable[[str], None]) -> int:
    """Run the command in a folder and return its status; the starts of the lines it reports go to `trace`."""
    before, streams, connect = os.getcwd(), (sys.stdout, sys.stderr), cli._connect

    def begin(arguments: argparse.Namespace) -> None:
        # Only now is the command ready to be stopped by a signal.
        trace(START)
        connect(arguments)
        trace(END)

    def tell(*values: object, **options: Any) -> None:
        print(*values, **options)
        if "file" not in options:
            trace(str(values[0]).splitlines()[0].split(":")[0] + ":")

    os.chdir(place)
    cli._connect, cli.print = begin, tell  # type: ignore[attr-defined]
    try:
        with open("stdout", "w") as sys.stdout, open("stderr", "w") as sys.stderr:
            return cli.main(COMMAND)
    finally:
        os.chdir(before)
        sys.stdout, sys.stderr = streams
        cli._connect = connect
        del cli.print  # type: ignore[attr-defined]


class Child:
    """A fork of this process that runs the command in a folder, prepared by a function that runs in it first."""

    def __init__(self, place: Path, prepare: Callable[[], None] = lambda: None) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = KILLED
            try:
                os.close(reader)
                # The default, which this process may have changed for itself.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                prepare()

                status = run(place, lambda line: os.write(writer, f"{time.monotonic()} {line}\n".encode()) and None)
            except BaseException:
                (place / "traceback").write_text(traceback.format_exc())
                status = 70
            finally:
                os._exit(status)
        os.close(writer)
        self._lines = os.fdopen(reader)
        self.reported: dict[str, float] = {}

    def wait_for(self, name: str) -> float | None:
        """Wait until a line is reported and return the time of it; None if the run ends without it."""
        while name not in self.reported and (line := self._lines.readline()):
            instant, _, reported = line.strip().partition(" ")
            self.reported[reported] = float(instant)
        return self.reported.get(name)

    def join(self, limit: float = 120.0) -> int:
        """Wait for the end and return the status, negative where a signal ended the run."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.wait_for(END)
                self._lines.close()
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._lines.close()
        raise RuntimeError(f"A run did not end within {limit:g} s.")

    def stage(self) -> str | None:
        """Return the stage in which the run ended; None if it was done."""
        if END in self.reported:
            return None
        return [stage for stage, (start, _) in STAGES.items() if start in self.reported][-1]


def kill_at_random(walk: Walk, name: str, stage: str, seed: int, number: signal.Signals) -> Outcome:
    """Kill a run at a random instant of a stage, go on, and compare."""
    place = walk.place(name, stage)
    kept = content(place / "out")
    child = Child(place)
    child.wait_for(STAGES[stage][0])
    # A little longer than it took, since another run may take longer.
    time.sleep(random.Random(f"{seed} {name}").uniform(0, 1.1 * walk.seconds[stage]))
    os.kill(child.pid, number)
    status = child.join()
    outcome = Outcome(stage, child.stage())
    outcome.problem = _lost(place, kept) or _unclean(place, status, number) or walk.problem(place)
    return _cleared(place, outcome)


def kill_at_boundary(walk: Walk, name: str, index: int, before: bool) -> Outcome:
    """Kill a run from its beginning before or behind the `index`th rename or sync, go on, and compare."""
    place = walk.place(name, "world")
    child = Child(place, lambda: on_boundaries(lambda count, act, tear: _killed(count == index, before, act, tear)))
    child.join()
    fell = child.stage()
    outcome = Outcome(fell or "evaluate", fell)
    if fell is None:
        outcome.problem = f"the run ended before its boundary {index}"
    outcome.problem = outcome.problem or walk.problem(place)
    return _cleared(place, outcome)


def _killed(here: bool, before: bool, act: Callable[[], None], tear: Callable[[], None]) -> None:
    if here and before:
        tear()
        os._exit(KILLED)
    act()
    if here:
        os._exit(KILLED)


def on_boundaries(step: Callable[[int, Callable[[], None], Callable[[], None]], None]) -> None:
    """Call `step(count, act, tear)` in place of every rename and sync; `tear` loses what is not synced."""
    count = iter(range(10**9))
    renames = {name: getattr(os, name) for name in ("rename", "replace")}

    def renaming(name: str) -> Callable[..., None]:
        return lambda *paths: step(next(count), lambda: renames[name](*paths), lambda: None)

    def sync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        path = f"/proc/self/fd/{descriptor}"
        # What is not synced yet may reach the disk in part.
        tear = (lambda: None) if stat.S_ISDIR(status.st_mode) else (lambda: os.truncate(path, status.st_size // 2))
        step(next(count), lambda: None, tear)

    for name in renames:
        setattr(os, name, renaming(name))
    os.fsync = sync  # type: ignore[assignment]


def count_boundaries(walk: Walk) -> int:
    """Count the renames and syncs of an undisturbed run."""
    place = walk.place("counted", "world")
    counted = place / "count"

    def note(count: int, act: Callable[[], None], tear: Callable[[], None]) -> None:
        act()
        counted.write_text(str(count + 1))

    if status := Child(place, lambda: on_boundaries(note)).join():
        raise RuntimeError(f"The run that counts the boundaries ended with status {status}.")
    total = int(counted.read_text())
    shutil.rmtree(place)
    return total


def _lost(place: Path, kept: dict[str, bytes]) -> str:
    """Say which finished embeddings or weights a kill took away; empty if none."""
    found = content(place / "out")
    final = re.compile(r"world/|(stores|pseudo)/|train/connector/")
    lost = [name for name, data in kept.items() if final.match(name) and found.get(name) != data]
    return f"the kill lost {', '.join(lost)}" if lost else ""


def _unclean(place: Path, status: int, number: signal.Signals) -> str:
    """Say what a run that could tell its user something did not; empty for SIGKILL and where it was done."""
    if number == signal.SIGKILL or status == 0:
        return ""
    errors = (place / "stderr").read_text()
    if status != 130 or "Traceback" in errors or not errors.endswith("stopped. Run the same command to go on.\n"):
        return f"{number.name} ended the run with status {status} and {errors[-2000:]!r}"
    return ""


def _cleared(place: Path, outcome: Outcome) -> Outcome:
    if outcome.problem:
        outcome.problem += f" (in {place})"
    else:
        shutil.rmtree(place)
    return outcome


def save_tiny_sources(folder: Path) -> None:
    """Save the two random encoders of the tests."""
    # tests/ is where a script in it finds its modules first.
    from conftest import save_tiny_clap, save_tiny_clip

    save_tiny_clip(folder / "clip")
    save_tiny_clap(folder / "clap", fused=False)


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the table that the help describes."""
    outcomes = list(outcomes)
    kills = Counter(outcome.stage for outcome in outcomes)
    inside = Counter(outcome.stage for outcome in outcomes if outcome.fell == outcome.stage)
    finished = Counter(outcome.stage for outcome in outcomes if outcome.fell is None)
    identical = Counter(outcome.stage for outcome in outcomes if not outcome.problem)
    lines = [f"{'stage':<12}{'kills':>8}{'in stage':>10}{'finished':>10}{'identical':>11}"]
    for stage in (*(stage for stage in STAGES if kills[stage]), "all"):
        counts = (part.total() if stage == "all" else part[stage] for part in (kills, inside, finished, identical))
        lines.append("{:<12}{:>8}{:>10}{:>10}{:>11}".format(stage, *counts))
    return "\n".join(lines)


_walk: Walk


def _outcome(task: tuple[Any, ...]) -> Outcome:
    kind, *arguments = task
    try:
        return (kill_at_random if kind == "random" else kill_at_boundary)(_walk, *arguments)
    except RuntimeError as error:
        return Outcome(arguments[1] if kind == "random" else "evaluate", None, f"{arguments[0]}: {error}")


def main(argv: list[str] | None = None) -> int:
    """Kill, report, and return 1 if a run ended otherwise than the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=60, help="kills at random instants (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default: %(default)s)")
    parser.add_argument(
        "--stage", action="append", choices=list(STAGES), help="kill in this stage alone; may be given again"
    )
    parser.add_argument(
        "--signal", choices=("KILL", "INT", "TERM"), default="KILL", help="what to send (default: %(default)s)"
    )
    parser.add_argument(
        "--boundaries", type=int, metavar="N", help="instead, kill at N of the renames and syncs of a run; 0: at all"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time (default: %(default)s)")
    parser.add_argument(
        "--folder",
        type=Path,
        help="work below this folder (default: the system's one in memory, or for temporary files)",
    )
    arguments = parser.parse_args(argv)
    # The monitor of the bars is a thread. Their lock is one of all forks, which a kill may leave locked.
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    start = time.perf_counter()
    memory = Path("/dev/shm")
    parent = arguments.folder or (memory if memory.is_dir() else None)
    folder = Path(tempfile.mkdtemp(prefix="kill-stages-", dir=parent))
    global _walk
    _walk = Walk(folder, save_tiny_sources)
    if arguments.boundaries is not None:
        total = count_boundaries(_walk)
        instants = [(index, before) for index in range(total) for before in (True, False)]
        if arguments.boundaries:
            instants = sorted(random.Random(arguments.seed).sample(instants, arguments.boundaries))
        tasks = [("boundary", f"kill-{index}-{before}", index, before) for index, before in instants]
    else:
        stages = arguments.stage or list(STAGES)
        for stage in stages:
            _walk.measure(stage)
        number = signal.Signals[f"SIG{arguments.signal}"]
        tasks = [
            ("random", f"kill-{index}", stages[index % len(stages)], arguments.seed, number)
            for index in range(arguments.times)
        ]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("fork")) as pool:
        outcomes = list(tqdm(pool.map(_outcome, tasks), total=len(tasks), unit="kill"))
    print(table(outcomes))
    failures = [outcome for outcome in outcomes if outcome.problem]
    for outcome in failures:
        print(f"{outcome.stage}, seed {arguments.seed}: {outcome.problem}")
    print(f"{len(failures)} failures in {time.perf_counter() - start:.0f} s")
    if not failures:
        shutil.rmtree(folder)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
