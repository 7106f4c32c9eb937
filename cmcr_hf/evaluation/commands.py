"""The command `cmcr evaluate`: a function a task, and the options and the frame that all tasks share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli_options import add_embedding_options, not_negative, positive, tuned, usable_device

if TYPE_CHECKING:
    from ..modeling.configuration_cmcr import CMCRConfig
    from .embedding import EvaluatedModel
    from .result import EvaluationResult


# Fewer have no 95 % between them, more only take time.
RESAMPLES = (20, 100_000)


def add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure a model on data of your own or on a benchmark",
        description="Embed data with a model and measure a task: a table with intervals, result.json with what is "
        "needed to run it again, and report.html with the best and the worst cases. Each task has options of its own: "
        "cmcr evaluate TASK --help.",
        epilog="Example: cmcr evaluate retrieval --model runs/demo/model --images photos --audio sounds --label stem",
    )
    # Which take the frame from here.
    from .classification_commands import add_classification
    from .localization_commands import add_localization, add_recognition
    from .retrieval_commands import add_retrieval

    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    add_retrieval(tasks)
    add_classification(tasks)
    add_localization(tasks)
    add_recognition(tasks)


def add_shared_options(parser: argparse.ArgumentParser, task: str) -> None:
    """Add the options of every task; the output folder is `runs/evaluate/TASK` unless another is named."""
    parser.add_argument("--model", required=True, help="CMCRModel: folder or Hub id")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/evaluate") / task,
        metavar="DIR",
        help="folder of result.json, report.html and the embeddings, which a second run reads (default: %(default)s)",
    )
    parser.add_argument(
        "--bootstrap",
        type=_resamples,
        default=1000,
        metavar="N",
        help=f"resamples of the 95 %% intervals, {RESAMPLES[0]} to {RESAMPLES[1]:,}, or 0 for none (default: "
        "%(default)s)",
    )
    parser.add_argument("--seed", type=not_negative, default=0, help="of the resamples (default: %(default)s)")
    parser.add_argument("--limit", type=positive, help="take so many items at most, from the start")
    add_embedding_options(parser)


@contextmanager
def evaluated_model(
    arguments: argparse.Namespace, *modalities: str, check: Callable[[CMCRConfig], object] | None = None
) -> Iterator[EvaluatedModel]:
    """Load the model of a command with the towers of some modalities, and keep other runs out of the output folder.

    Args:
        check: what raises if the model does not go with the data, before its weights are loaded.

    Raises:
        ValueError: the folder cannot be written or is in use, or the model or the device is not there.
    """
    from ..durable import locked
    from ..output import check_writable
    from .embedding import EvaluatedModel, load_config

    check_writable(arguments.output)
    _check_ours(arguments.output)
    device = usable_device(arguments.device)
    if check is not None:
        check(load_config(arguments.model, modalities))
    with locked(arguments.output), tuned(device, quiet=True):
        yield EvaluatedModel(
            arguments.model,
            arguments.output,
            modalities=modalities,
            device=device,
            batch_size=arguments.batch_size,
        )


def run_settings(arguments: argparse.Namespace, resampled: str, **more: Any) -> dict[str, Any]:
    """Return the settings of a command for its result (see [`settings`])."""
    from .result import settings

    return settings(
        arguments.words,
        seed=arguments.seed,
        resamples=arguments.bootstrap,
        resampled=resampled,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        **more,
    )


def _resamples(value: str) -> int:
    number = not_negative(value)
    if number and not RESAMPLES[0] <= number <= RESAMPLES[1]:
        raise argparse.ArgumentTypeError(f"{number} is neither 0 nor {RESAMPLES[0]} to {RESAMPLES[1]}")
    return number


def _check_ours(folder: Path) -> None:
    """Refuse a folder whose result or page somebody else wrote, before any work."""
    from ..pages.page import is_ours
    from .result import PAGE, RESULT

    result, page = folder / RESULT, folder / PAGE
    theirs = None
    if page.exists() and not is_ours(page):
        theirs = page
    if result.exists():
        try:
            document = json.loads(result.read_text(encoding="utf-8"))
            ours = isinstance(document, dict) and {"task", "model", "settings"} <= document.keys()
        except (OSError, ValueError):
            ours = False
        theirs = theirs if ours else result
    if theirs is not None:
        raise ValueError(f"{theirs} was not written by an evaluation and would be lost. Name another --output.")


def _told_of_parts(arguments: argparse.Namespace, result: EvaluationResult) -> EvaluationResult:
    """Return a result that says where its data is not whole, and has then nothing published beside it."""
    from .result import CHANCE, left_out

    notes = []
    left, other = left_out(result.data), result.data.get("part")
    if not (left or arguments.limit or other) and result.published:
        other = result.published[0].other_size(result.data["items"])
    if left:
        notes.append(f"Left out: {left}.")
    part = bool(left or arguments.limit or other)
    if other and result.published:
        notes.append(f"This is {other}, which published numbers are not of, so none stand here.")
    elif part and result.published:
        notes.append("Published numbers are of the whole data set, so none stand here.")
    values = [value for group in result.metrics.get(CHANCE, {}).values() for value in group.values()]
    if values and min(values) >= 1:
        notes.append("Chance is 1: what is left has one answer, so these numbers say nothing.")
    data = {**result.data, "part": other}
    return replace(result, data=data, notes=[*result.notes, *notes], published=() if part else result.published)


def finish(arguments: argparse.Namespace, result: EvaluationResult) -> None:
    """Print a result and write it into the output folder."""
    result = _told_of_parts(arguments, result)
    result.write(arguments.output)
    print(result.format())
    print(f"\n{arguments.output / 'result.json'} and {arguments.output / 'report.html'} are written.")
