"""The `cmcr` command."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .cli_options import (
    add_embedding_options,
    add_publishing_options,
    not_negative,
    positive,
    tuned,
    usable_device,
)
from .evaluation.commands import add_evaluate
from .training.recipe import SourceSpec, load_recipe, recipe_names
from .training.store_commands import add_aggregate, add_embed


def main(argv: list[str] | None = None) -> int:
    """Run a `cmcr` command and return its exit status: 0, or 1 after one line on what is wrong and what to do."""
    parser = argparse.ArgumentParser(
        prog="cmcr",
        description="Connect pretrained contrastive spaces through the modality they share (C-MCR, arXiv 2305.14381).",
        epilog="Start with `cmcr demo`: offline, a few minutes. Then `cmcr connect --help`.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    add_embed(commands)
    add_aggregate(commands)
    _add_connect(commands)
    add_evaluate(commands)
    _add_search(commands)
    _add_push(commands)
    _add_convert(commands)
    _add_verify_official(commands)
    arguments = parser.parse_args(argv)
    # Of the results that say how they were made.
    arguments.words = sys.argv[1:] if argv is None else argv
    # What ends a job is told how to go on, as the user at the keyboard is.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if arguments.run is not _search:
            _start_transformers()
        arguments.run(arguments)
    except (ValueError, ImportError, OSError, RuntimeError, SafetensorError) as error:
        # One line, also of the paragraphs that some libraries raise.
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"cmcr {arguments.command}: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ncmcr {arguments.command}: stopped. Run the same command to go on.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _start_transformers() -> None:
    """Import transformers, register our classes with it, and have it show neither progress nor remarks."""
    from transformers.utils import logging

    from . import public  # noqa: F401

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="connect two small spaces offline and report what came of it",
        description="Write a synthetic world and connect a small CLIP in it: with a small CLAP by sentences alone "
        "(world sounds), with a small ULIP by pictures alone (world shapes), or with both, each extended into a CLIP "
        "that stays as it is (world all). Then measure retrieval between what no training paired, pictures and "
        "sounds, texts and point clouds, or sounds and point clouds, against chance, training-free bridges and a "
        "null.",
    )
    parser.add_argument(
        "--world", choices=("sounds", "shapes", "all"), default="sounds", help="what to connect (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for everything (default: runs/demo, runs/WORLD for another world)"
    )
    parser.add_argument(
        "--seeds", type=positive, default=3, help="connectors averaged in the trained row (default: %(default)s)"
    )
    parser.add_argument(
        "--derangements",
        type=not_negative,
        default=20,
        help="connectors averaged in the null row (default: %(default)s)",
    )
    parser.add_argument(
        "--retrain",
        type=Path,
        nargs="?",
        const=Path("runs/encoders"),
        metavar="FOLDER",
        help="instead, train the world's two small encoders anew into FOLDER (default: %(const)s), as the shipped "
        "ones were",
    )
    parser.add_argument(
        "--seed", type=not_negative, default=1, help="of --retrain (default: %(default)s, that of the shipped ones)"
    )
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    if arguments.retrain is not None:
        from .demo.retrain import retrain
        from .demo.retrain_all import retrain_all
        from .demo.retrain_shapes import retrain_shapes

        arguments.output = arguments.retrain
        train: dict[str, Callable[..., dict[str, Any]]] = {
            "sounds": retrain,
            "shapes": retrain_shapes,
            "all": retrain_all,
        }
        print(json.dumps(train[arguments.world](arguments.retrain, seed=arguments.seed), indent=2))
        return
    from .demo.run import RECIPES, run_demo
    from .output import check_output

    recipe = RECIPES[arguments.world]
    arguments.output = arguments.output or Path("runs") / recipe
    check_output(arguments.output, load_recipe(recipe))
    run_demo(arguments.output, arguments.world, seeds=arguments.seeds, derangements=arguments.derangements)


def _add_connect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "connect",
        help="connect spaces as a recipe says: embed, aggregate, train, save, evaluate",
        description="Walk a recipe from raw data to a model folder. Stages that are done and still valid are skipped, "
        "so the same command goes on after an interruption.",
        epilog=f"Recipes of the package: {', '.join(recipe_names())}. A recipe is a YAML file; copy one and edit it. "
        "Example: cmcr connect my-recipe.yaml --data ~/data --output runs/mine",
    )
    parser.add_argument("recipe", help="name of a recipe of the package, or a path to a YAML file")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder that the recipe's relative paths start from (default: the recipe's folder, or here)",
    )
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="SPACE=MODEL",
        help="another source than the recipe's, a folder or Hub id: --source ulip=models/ulip2; give it several times "
        "for several",
    )
    parser.add_argument("--output", type=Path, help="folder for everything (default: runs/NAME)")
    add_embedding_options(parser)
    parser.set_defaults(run=_connect)


def _connect(arguments: argparse.Namespace) -> None:
    from .connect import connect
    from .evaluation.connection import format_table
    from .evaluation.result import shown
    from .output import check_output

    recipe = load_recipe(arguments.recipe)
    words = ["cmcr", "connect", shown(arguments.recipe)]
    for source in arguments.source:
        space, _, model = source.partition("=")
        if space not in recipe.sources or not model:
            raise ValueError(
                f"Expected --source SPACE=MODEL with a space of {list(recipe.sources)}, got {source!r}. Write, for "
                f"example, --source {next(iter(recipe.sources))}=FOLDER."
            )
        recipe.sources[space] = SourceSpec(model)
        words += ["--source", f"{space}={shown(model)}"]
    folder = arguments.output = arguments.output or Path("runs") / recipe.name
    # Before the world, which is written into the same folder.
    check_output(folder, recipe)
    data = arguments.data
    if data is not None:
        words += ["--data", shown(data)]
    if data is None and recipe.world is not None:
        from .demo.run import write_recipe_world

        data = write_recipe_world(recipe, folder / "world")
    if data is None:
        beside = Path(arguments.recipe)
        data = beside.parent if beside.is_file() else Path()
    device = usable_device(arguments.device)
    with tuned(device):
        connection = connect(
            recipe,
            folder,
            data,
            device=device,
            batch_size=arguments.batch_size,
            report=print,
            command=shlex.join(words),
        )
    if connection.table is not None:
        print(format_table(connection.table))


def _check_output_file(option: str, path: Path | None) -> None:
    from .output import check_writable

    if path is not None:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, expected a file for {option}. Name a file in it.")
        check_writable(path.parent)


def _add_search(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "search",
        help="find the sound for a photo, or anything for anything, in a folder",
        description="Find the files of a folder, or the lines of its .txt files, that are nearest to a query: a text, "
        "or the path of an image, audio or point cloud file. What is embedded is kept in an index outside the folder.",
        epilog="Example: cmcr search --model runs/demo/model --query photo.jpg --only audio sounds",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what to search, subfolders included")
    parser.add_argument("--model", required=True, help="CMCRModel: folder or Hub id")
    parser.add_argument(
        "--query",
        action="append",
        help="a text or the path of an image, audio or point cloud file; give it several times for several "
        "(default: ask, line by line, until the input ends)",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=("image", "audio", "point_cloud", "text"),
        help="what to find, where text means the lines of .txt files; give it several times for several "
        "(default: all files but .txt)",
    )
    parser.add_argument(
        "--top", type=positive, default=10, help="hits of each modality for each query (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="also write the hits to this JSON file")
    parser.add_argument("--html", type=Path, help="also write a page that shows pictures and plays sounds")
    parser.add_argument(
        "--index", type=Path, help="folder of the indexes (default: cmcr_hf/search in $XDG_CACHE_HOME or ~/.cache)"
    )
    add_embedding_options(parser)
    parser.set_defaults(run=_search)


def _search(arguments: argparse.Namespace) -> None:
    from .output import write_json
    from .search import SearchIndex, read_query
    from .search.results import (
        answer_record,
        format_answer,
        format_index,
        format_skipped,
        printable,
        write_search_page,
    )

    _check_output_file("--output", arguments.output)
    _check_output_file("--html", arguments.html)
    for query in arguments.query or []:
        # Before the folder is embedded, which may take long.
        read_query(query)
    # What transformers reads when it is imported, which may never be.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    answers, failed = [], 0
    with warnings.catch_warnings():
        warnings.filterwarnings("always", module=r"cmcr_hf\.")
        warnings.showwarning = lambda message, *_: print(f"cmcr search: {printable(message)}", file=sys.stderr)
        index = SearchIndex(
            arguments.model,
            arguments.folder,
            modalities=arguments.only,
            cache=arguments.index,
            batch_size=arguments.batch_size,
            device=None if arguments.device is None else usable_device(arguments.device),
        )
        index.update()
        for line in format_skipped(index):
            print(line, file=sys.stderr)
        print(format_index(index))
        for query in arguments.query or _typed():
            try:
                answer = index.search(query, top=arguments.top)
            except ValueError as error:
                if arguments.query:
                    raise
                print(f"cmcr search: {printable(error)}", file=sys.stderr)
                failed += 1
                continue
            print(format_answer(answer))
            answers.append(answer)
    if arguments.output is not None:
        document = {"model": arguments.model, "folder": str(arguments.folder)}
        write_json(arguments.output, {**document, "answers": [answer_record(answer) for answer in answers]})
    if arguments.html is not None:
        write_search_page(arguments.html, index, answers)
    if failed and not sys.stdin.isatty():
        raise ValueError(f"{failed} of {failed + len(answers)} queries were not answered, for the reasons above.")


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from .conversion.options import add_kinds

    parser = commands.add_parser(
        "convert",
        help="turn an official checkpoint into a model that from_pretrained loads",
        description="Turn a released file of this family into a folder that from_pretrained loads. The outputs of the "
        "two are compared before anything is written, and the largest difference and the file's sha256 go into the "
        "model card. Weights alone are read of a file: a pickle that names anything else is refused.",
        epilog="Example: cmcr convert cmcr --checkpoint ulip_clip.pt --output models/cmcr-clip-ulip",
    )
    add_kinds(parser)
    parser.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    from .conversion.command import convert

    convert(arguments, print)


def _add_verify_official(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "verify-official",
        help="rerun the demo of the official C-MCR and Ex-MCR with converted weights",
        description="Embed the three examples of the official repositories and print softmax(10 * cosine) between "
        "their modalities beside what their READMEs print. Ends with an error where an entry is off by more than "
        "0.001. The official code samples point clouds from a random start, so that an entry of theirs counts as "
        "right that any of 16 starts gives.",
        epilog="Convert the weights first: cmcr convert laion-clap, cmcr convert ulip, then cmcr convert cmcr with "
        "--clip openai/clip-vit-base-patch32 and the two as --clap or --ulip. Example: cmcr verify-official "
        "models/cmcr-clip-clap --inputs C-MCR/assets",
    )
    parser.add_argument("model", nargs="+", metavar="MODEL", help="converted full models: folders or Hub ids")
    parser.add_argument(
        "--inputs", type=Path, required=True, metavar="DIR", help="the folder `assets` of MCR-PEFT/C-MCR or Ex-MCR"
    )
    parser.set_defaults(run=_verify_official)


def _verify_official(arguments: argparse.Namespace) -> None:
    from .conversion.official_demo import BOUND, format_comparisons, verify
    from .evaluation.embedding import load_model

    wrong = []
    for name in arguments.model:
        model, processor = load_model(name)
        comparisons = verify(model, processor, arguments.inputs)
        print(f"{name}\n\n{format_comparisons(comparisons)}\n")
        # A comparison with NaN is false.
        count = sum(int((~(comparison.off <= BOUND)).sum()) for comparison in comparisons)
        if count:
            wrong.append(f"{count} of {9 * len(comparisons)} entries of {name}")
    if wrong:
        raise ValueError(f"{', '.join(wrong)} are off by more than {BOUND}. See the matrices above.")
    print(f"No entry is off by more than {BOUND}.")


def _typed() -> Iterator[str]:
    """Yield the lines of the standard input, which a person is asked for."""
    prompt = "\nquery> " if sys.stdin.isatty() else ""
    with suppress(EOFError):
        while True:
            if line := input(prompt).strip():
                yield line


def _add_push(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "push",
        help="put a model folder or a store of embeddings on the Hub, in one commit",
        description="Check that a model folder is complete, card included, and make a repository of the Hub hold it "
        "and nothing else, in one commit. A repository that is missing is created. Pushing the connector alone takes "
        "sources that are on the Hub; the full model carries its own. A store of `cmcr embed` becomes a data set, "
        "with which others connect its space without the raw data. Log in first: hf auth login",
        epilog="Examples: cmcr push runs/mine/connector ORG/cmcr-mine, cmcr push stores/photos ORG/photos-clip",
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="what to push, such as OUTPUT/connector, or the address of a store"
    )
    parser.add_argument("repo_id", metavar="ORG/NAME", help="repository of the Hub, or its NAME in your own namespace")
    add_publishing_options(parser)
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    parser.set_defaults(run=_push)


def _push(arguments: argparse.Namespace) -> None:
    from .conversion.push import push_folder
    from .conversion.push_store import is_store, push_store

    options = {"private": arguments.private or None, "revision": arguments.revision}
    if is_store(arguments.folder):
        commit = push_store(arguments.folder, arguments.repo_id, licence=arguments.licence, **options)
    elif arguments.licence is not None:
        raise ValueError(f"The licence of the model in {arguments.folder} stands in its card. Leave --licence out.")
    else:
        commit = push_folder(arguments.folder, arguments.repo_id, **options)
    print(commit.commit_url)


if __name__ == "__main__":
    sys.exit(main())
