"""The commands that make stores of embeddings: `cmcr embed` and `cmcr aggregate`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..cli_options import add_batch_size, add_publishing_options, positive, read_share, tuned, usable_device


def _add_sharing_options(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument(
        "--share",
        type=read_share,
        metavar="I/N",
        help=f"{verb} the share I (from 0) of N processes (default: what torchrun or accelerate launch say, else 0/1)",
    )


def _shared(arguments: argparse.Namespace) -> tuple[tuple[int, int], str]:
    """Return the share and the device that are asked for, or that a launcher gives the process."""
    import torch

    share, device = arguments.share, arguments.device
    if share is None and "RANK" in os.environ:
        try:
            share = read_share(f"{os.environ['RANK']}/{os.environ.get('WORLD_SIZE', '')}")
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"RANK/WORLD_SIZE in the environment: {error}. Correct or unset them.") from error
    local = os.environ.get("LOCAL_RANK", "")
    if device is None and local.isdecimal() and torch.cuda.is_available():
        device = f"cuda:{int(local) % torch.cuda.device_count()}"
    return share or (0, 1), usable_device(device)


def _check_output(output: str) -> None:
    from ..output import check_writable
    from .places import is_address, place

    if output.startswith("memory:"):
        raise ValueError(f"What is written to {output} ends with the command. Name a folder or another address.")
    place(output)
    if not is_address(output):
        check_writable(Path(output))


def add_embed(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "embed",
        help="embed a data set with a source, of any size, into a store",
        description="Embed texts, images, audio or point clouds with a CLIP, CLAP or ULIP into a folder of unit "
        "vectors in shards, which `python -m cmcr_hf.training.train` reads. Memory is bounded for any data set; a "
        "run that was stopped goes on. Items that cannot be read are left out and listed in rejects.jsonl.",
        epilog="""examples:
  cmcr embed --source openai/clip-vit-base-patch32 --space clip --modality image --data photos --output stores/photos
  torchrun --nproc_per_node 8 --max-restarts 3 -m cmcr_hf.cli embed ...      a process for each GPU of a machine
  cmcr embed --share 3/16 --output s3://bucket/stores/photos ...             one of 16 jobs, on any machines

Processes that share a data set need nothing but the same --output: each embeds its share, then what the others have
not come to, and the last one completes the store. Any of them may be stopped and started again, with another number
of shares too. With one --batch-size for all, the bytes are those of a single process.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source",
        required=True,
        metavar="MODEL",
        help="the source: a folder, a Hub id, open_clip:NAME/TAG, or a LAION-CLAP FILE.pt",
    )
    parser.add_argument("--space", required=True, choices=("clip", "clap", "ulip"), help="its role")
    parser.add_argument(
        "--modality", required=True, choices=("text", "image", "audio", "point_cloud"), help="what to embed"
    )
    parser.add_argument(
        "--data",
        required=True,
        help="a folder of files; a table (.csv, .tsv, .jsonl, .parquet, .txt, .json); the address of either, such as "
        "hf://datasets/OWNER/NAME/FOLDER; or a data set, its Hub id or, with --column, its folder (of WebDataset tars "
        "too)",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder of the store, or an address such as s3://BUCKET/FOLDER"
    )
    parser.add_argument(
        "--column",
        action="append",
        help="column of a table or data set, of WebDataset tars the suffix of its files (jpg); or several of them",
    )
    parser.add_argument("--split", default="train", help="of a data set (default: %(default)s)")
    parser.add_argument("--config", help="of a data set")
    parser.add_argument("--pattern", help="glob below a folder (default: all files of the usual formats)")
    parser.add_argument("--files", help="folder or address of a table's files (default: the table's own)")
    parser.add_argument("--template", help='text around each text, such as "a photo of a {}"')
    parser.add_argument("--limit", type=positive, help="take so many items at most")
    parser.add_argument("--revision", help="of the source on the Hub")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision of the model; of another than %(default)s, the cosine with it is reported (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--workers", type=positive, help="threads that read and prepare (default: all processors but one, 16 at most)"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first item that cannot be read")
    parser.add_argument(
        "--push", metavar="ORG/NAME", help="also publish the complete store on the Hub as a data set, in one commit"
    )
    add_publishing_options(parser)
    add_batch_size(parser)
    _add_sharing_options(parser, "embed")
    parser.set_defaults(run=_embed)


def _embed(arguments: argparse.Namespace) -> None:
    import torch

    from ..conversion.hub import check_licence
    from ..conversion.push import check_target
    from ..conversion.push_store import push_store
    from .embed_command import data_entry, embed_data

    _check_output(arguments.output)
    if arguments.push is not None:
        # What is wrong with it is not to be found behind the work.
        check_licence(arguments.licence)
        check_target(arguments.push)
    elif arguments.private or arguments.licence:
        raise ValueError("--private and --licence are of what is pushed. Name the data set with --push ORG/NAME.")
    names = ("column", "split", "config", "pattern", "files", "template", "limit")
    # The defaults of an entry are those of what it is made of: a folder has no split.
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) not in (None, "train")}
    share, device = _shared(arguments)
    with tuned(device, quiet=share[0] > 0):
        store = embed_data(
            arguments.source,
            arguments.space,
            arguments.modality,
            data_entry(arguments.data, arguments.modality, **given),
            arguments.output,
            revision=arguments.revision,
            dtype=getattr(torch, arguments.dtype),
            device=device,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            strict=arguments.strict,
            share=share,
        )
    # One of several processes, also where a run comes to a store that was complete before.
    if arguments.push and (store.completed_here or (store.found_complete and share[0] == 0)):
        commit = push_store(
            arguments.output, arguments.push, private=arguments.private or None, licence=arguments.licence
        )
        print(commit.commit_url)


def add_aggregate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "aggregate",
        help="give every row of a store the softmax average of a memory: semantic consistency",
        description="Write a store of pseudo embeddings: for each query, the average of the whole memory, exact, with "
        "the weights softmax(cosine / temperature), normalised. A run that was stopped goes on.",
        epilog="""examples:
  cmcr aggregate --queries stores/clip-text --memory stores/clip-image --output pseudo/clip-image
  torchrun --nproc_per_node 8 -m cmcr_hf.cli aggregate ...      a share of the queries for each GPU of a machine
  cmcr aggregate --share 3/16 ...                               one of 16 jobs, on any machines""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, text in (
        ("queries", "store of the overlap modality, such as texts"),
        ("memory", "store of a leaf modality in the same space, such as images"),
        ("values", "store of the items of the memory in another space, averaged in its place"),
        ("output", "folder of the store that is written"),
    ):
        parser.add_argument(f"--{name}", required=name != "values", metavar="DIR", help=text)
    parser.add_argument("--temperature", type=float, default=0.01, help="of the softmax (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the products; bfloat16 is about twice as fast, at a cosine of .999 (default: %(default)s)",
    )
    _add_sharing_options(parser, "aggregate")
    parser.set_defaults(run=_aggregate)


def _aggregate(arguments: argparse.Namespace) -> None:
    import torch

    from .aggregate_stores import aggregate_stores
    from .store import EmbeddingStore

    _check_output(arguments.output)
    share, device = _shared(arguments)
    queries, memory = (EmbeddingStore.open(folder) for folder in (arguments.queries, arguments.memory))
    store = aggregate_stores(
        queries,
        memory,
        arguments.output,
        values=None if arguments.values is None else EmbeddingStore.open(arguments.values),
        temperature=arguments.temperature,
        dtype=torch.bfloat16 if arguments.dtype == "bfloat16" else None,
        device=device,
        share=share,
    )
    own = f"share {share[0]} of {share[1]}: " if share[1] > 1 else ""
    done = f"{store.rows} rows over {memory.rows} in {store.folder}"
    print(own + (done if store.complete else "aggregated; others are still at theirs"))
