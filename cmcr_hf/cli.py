"""The `cmcr` command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from transformers.utils import logging

from .training.recipe import DataSpec, load_recipe, recipe_names


def main(argv: list[str] | None = None) -> int:
    """Run a `cmcr` command and return its exit status: 0, or 1 after one line that says what is wrong and what to do."""
    parser = argparse.ArgumentParser(
        prog="cmcr",
        description="Connect pretrained contrastive spaces through the modality they share (C-MCR, arXiv 2305.14381).",
        epilog="Start with `cmcr demo`: offline, a few minutes. Then `cmcr connect --help`.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_connect(commands)
    _add_evaluate(commands)
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        arguments.run(arguments)
    except (ValueError, ImportError, OSError) as error:
        print(f"cmcr {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ncmcr {arguments.command}: stopped. What was written is kept; run the same command to go on.", file=sys.stderr)
        return 130
    return 0


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="connect two small spaces offline and report what came of it",
        description="Write a synthetic world of pictures, sounds and sentences, connect a small CLIP and a small CLAP by sentences "
        "alone, and measure retrieval between pictures and sounds against chance, training-free bridges and a null.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for everything (default: %(default)s)")
    parser.add_argument("--seeds", type=_positive, default=3, help="connectors averaged in the C-MCR row (default: %(default)s)")
    parser.add_argument(
        "--derangements", type=_not_negative, default=20, help="connectors averaged in the null row (default: %(default)s)"
    )
    parser.add_argument(
        "--retrain",
        type=Path,
        nargs="?",
        const=Path("runs/encoders"),
        metavar="FOLDER",
        help="instead, train the two small encoders anew into FOLDER (default: %(const)s), as the shipped ones were",
    )
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    if arguments.retrain is not None:
        from .demo.retrain import retrain

        print(json.dumps(retrain(arguments.retrain), indent=2))
        return
    from .demo.run import run_demo

    run_demo(arguments.output, seeds=arguments.seeds, derangements=arguments.derangements)


def _add_connect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "connect",
        help="connect two spaces as a recipe says: embed, aggregate, train, assemble, evaluate, save",
        description="Walk a recipe from raw data to a model folder. Stages that are done and still valid are skipped, so the same "
        "command goes on after an interruption.",
        epilog=f"Recipes of the package: {', '.join(recipe_names())}. A recipe is a YAML file; copy one and edit it. "
        "Example: cmcr connect my-recipe.yaml --data ~/data --output runs/mine",
    )
    parser.add_argument("recipe", help="name of a recipe of the package, or a path to a YAML file")
    parser.add_argument(
        "--data", type=Path, help="folder that the recipe's relative paths start from (default: the recipe's folder, or here)"
    )
    parser.add_argument("--output", type=Path, help="folder for everything (default: runs/NAME)")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--batch-size", type=_positive, default=32, help="items embedded at once (default: %(default)s)")
    parser.set_defaults(run=_connect)


def _connect(arguments: argparse.Namespace) -> None:
    import torch

    from .connect import connect
    from .evaluation.connection import format_table

    recipe = load_recipe(arguments.recipe)
    folder = arguments.output or Path("runs") / recipe.name
    data = arguments.data
    if data is None and recipe.world is not None:
        from .demo.world import write_world

        data = write_world(folder / "world", **recipe.world)
    if data is None:
        beside = Path(arguments.recipe)
        data = beside.parent if beside.is_file() else Path()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    connection = connect(recipe, folder, data, device=device, batch_size=arguments.batch_size, report=print)
    if connection.table is not None:
        print(format_table(connection.table))


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure retrieval between a folder of images and a folder of audio",
        description="Embed two folders with a model and measure class-level retrieval in both directions. An item's class is the "
        "name of its folder, or its own name where pairs share it (dog.jpg and dog.wav).",
        epilog="Example: cmcr evaluate --model runs/demo/model --images photos --audio sounds --label stem",
    )
    parser.add_argument("--model", required=True, help="CMCRModel: folder or Hub id")
    parser.add_argument("--images", type=Path, required=True, help="folder of images, subfolders included")
    parser.add_argument("--audio", type=Path, required=True, help="folder of audio files, subfolders included")
    parser.add_argument(
        "--label", choices=("parent", "stem"), default="parent", help="class of a file (default: %(default)s, its folder's name)"
    )
    parser.add_argument("--batch-size", type=_positive, default=32, help="items embedded at once (default: %(default)s)")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--output", type=Path, help="also write the metrics to this JSON file")
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    import torch

    from .connect import write_json
    from .evaluation.connection import chance_metrics, format_table, retrieval_metrics
    from .modeling.modeling_cmcr import CMCRModel
    from .modeling.processing_cmcr import CMCRProcessor
    from .training.data import Items
    from .training.embed import encode_items

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sides = {"image": arguments.images, "audio": arguments.audio}
    items = {
        modality: Items([DataSpec(folder=str(folder), label=arguments.label)], modality, Path())
        for modality, folder in sides.items()
    }
    model = CMCRModel.from_pretrained(arguments.model, dtype=torch.float32).to(device)
    processor = CMCRProcessor.from_pretrained(arguments.model)
    embeds = {
        modality: encode_items(model, processor, part, batch_size=arguments.batch_size) for modality, part in items.items()
    }
    labels = {modality: [str(item.label) for item in part] for modality, part in items.items()}
    scores = embeds["audio"] @ embeds["image"].T
    table = {
        "chance": chance_metrics(labels["audio"], labels["image"]),
        "model": retrieval_metrics(scores, scores.T, labels["audio"], labels["image"]),
    }
    print(f"{len(labels['audio'])} clips, {len(labels['image'])} images, {len(set(labels['audio']))} classes")
    print(format_table(table))
    if arguments.output is not None:
        write_json(arguments.output, {"model": arguments.model, "metrics": table})


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
