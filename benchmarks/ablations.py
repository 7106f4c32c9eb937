"""Which part of the method earns what? Every part is taken out, every setting turned, one at a time.

On real data, with two small sources that are trained on it (see benchmarks.real_retrieval, whose cache this shares):

    python -m benchmarks.ablations --data ../shared/data --output runs/ablations

or on stores of `cmcr embed`, of any two spaces, such as the real CLIP and CLAP: the overlap items in both spaces, both
memories, and test items whose class is the folder that they lie in, or stands in a table:

    python -m benchmarks.ablations --stores stores/clip-text stores/clap-text stores/clip-image stores/clap-audio \\
        --test test/clip-image test/clap-audio --labels labels.csv --output runs/ablations

Each connector trains from several seeds, which all variants share: what a part earns is the mean of the differences to
the full method of the same seed. It is called an effect where the 95 % interval of that mean (Student's t) leaves zero
out. The test items are the same throughout, so the intervals say nothing of other items. Connectors are kept below
--cache, and a run that was stopped goes on behind the last of them.

Written to --output: `ablations.json`, the plot `ablations.svg` and the page `ablations.html`.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers.utils import logging

from benchmarks.ablation.page import write_ablations
from benchmarks.ablation.results import Table, format_results
from benchmarks.ablation.runs import Run, Schedule, Study, Texts, measure
from benchmarks.ablation.variants import NULL, Variant, variants
from benchmarks.real.data import check_data, read_texts
from benchmarks.real_retrieval import DISTILLATION, SCHEDULES, SOURCES, TITLES, prepare
from benchmarks.timing import machine
from cmcr_hf.evaluation.baselines import cca_maps, posterior_matching
from cmcr_hf.evaluation.connection import Metrics, RetrievalSet, Side, baseline_metrics, check_classes
from cmcr_hf.modeling.configuration_cmcr import LEAF_MODALITIES
from cmcr_hf.output import write_json
from cmcr_hf.training.store import EmbeddingStore, check_same_keys
from cmcr_hf.training.train import run_script

# Rows above which only the most telling variants are measured, unless --all asks for all.
LARGE = 2000
NULL_DRAWS = 20


def study_of_data(data: Path, cache: Path) -> tuple[Study, dict[str, float]]:
    """Train the small sources, or find them in the cache, and return what is studied and their zero-shot accuracy."""
    check_data(data)
    found = prepare(data, cache, SOURCES)
    read = read_texts(data)
    kinds = {
        text: kind for kind, texts in _kinds(read.sound_captions, read.image_captions, read.labels) for text in texts
    }
    sets = {}
    for name, title in TITLES.items():
        part, schedule = getattr(found, name), SCHEDULES[name]
        steps = schedule.epochs * (len(part.about) // schedule.batch_size)
        kind = [kinds[text] for text in part.about] if name == "captions" else [""] * len(part.about)
        sets[title] = Texts(part.clip, part.clap, part.about, kind, Schedule(schedule.batch_size, steps))
    memories = (found.image_memory, found.audio_memory)
    steps = DISTILLATION.epochs * (max(map(len, memories)) // DISTILLATION.batch_size)
    distillation = Schedule(DISTILLATION.batch_size, steps)
    return Study(("clip", "clap"), "text", sets, memories, found.items, distillation), found.zero_shot


def _kinds(sounds: list[str], images: list[str], labels: list[str]) -> list[tuple[str, list[str]]]:
    # In the order in which a text of several kinds is of the first.
    return [("labels", labels), ("image captions", images), ("sound captions", sounds)]


def study_of_stores(stores: Sequence[str], test: Sequence[str], labels: Path | None, schedule: Schedule) -> Study:
    """Open stores and check that they are of two spaces, their shared modality and their leaves.

    Raises:
        ValueError: a store is missing or does not belong to the others, or a test item has no class.
    """
    opened = {(store.space, store.modality): store for store in map(EmbeddingStore.open, stores)}
    spaces = sorted({space for space, _ in opened}, key=("clip", "clap", "ulip").index)
    shared = [modality for _, modality in opened if all((space, modality) in opened for space in spaces)]
    if len(opened) != 4 or len(spaces) != 2 or not shared or (spaces[0], shared[0]) not in LEAF_MODALITIES:
        given = ", ".join(f"{space} {modality}" for space, modality in opened)
        raise ValueError(
            f"Expected the stores of one modality in two spaces and of the other modality of each, got {given}. Name, "
            "for example, clip-text, clap-text, clip-image and clap-audio under --stores."
        )
    overlap = shared[0]
    leaves = [LEAF_MODALITIES[space, overlap] for space in spaces]
    wanted = list(zip(spaces, leaves, strict=True))
    tested = {(store.space, store.modality): store for store in map(EmbeddingStore.open, test)}
    for place, found in (("--stores", opened), ("--test", tested)):
        for space, leaf in wanted:
            if (space, leaf) not in found:
                raise ValueError(f"There is no store of {space} {leaf} under {place}. Embed those items and name it.")
    native = [opened[space, overlap] for space in spaces]
    keys = native[0].keys()
    for bank, (space, leaf) in zip(native, wanted, strict=True):
        for store in (opened[space, leaf], tested[space, leaf]):
            if store.source != bank.source:
                raise ValueError(
                    f"{store.folder} comes from another source than {bank.folder}. Embed all of {space} with one."
                )
        if opened[space, leaf].keys() == keys:
            raise ValueError(
                f"{opened[space, leaf].folder} holds the {overlap} items, as pseudo embeddings do, expected a memory "
                f"of {leaf} items. Name the store that they were made from."
            )
    if len(keys) < schedule.batch_size:
        raise ValueError(
            f"{native[0].folder} holds {len(keys)} rows, expected at least one batch of {schedule.batch_size}. Lower "
            "--batch-size, or embed more."
        )
    check_same_keys(*((str(store.folder), store.keys()) for store in native))
    classes = _read_labels(labels) if labels is not None else None
    sides = []
    for space, leaf in wanted:
        store = tested[space, leaf]
        keys_of = store.keys()
        names = [_class_of(key, classes) for key in keys_of]
        sides.append(Side(space, leaf, store.tensor().float(), names))
    check_classes(sides[1].labels, sides[0].labels, (leaves[1], leaves[0]))
    if len(set(sides[0].labels)) < 2:
        raise ValueError(
            f"All test items are of the class {sides[0].labels[0]!r}, expected at least two. Name their classes in "
            "--labels, or give each class a folder of its own."
        )
    first, second = (store.tensor().float() for store in native)
    # What an item is about, of which the null takes another, if the table says it of all.
    about = [classes[key] for key in keys] if classes and all(key in classes for key in keys) else keys
    texts = Texts(first, second, about, [""] * len(keys), schedule)
    items = RetrievalSet(sides[1], sides[0], second, first)
    image, other = (opened[part].tensor().float() for part in wanted)
    title = f"{len(keys)} {overlap}s"
    # Half as many steps, which are dearer, and enough on the data that the objective was made on.
    batch_size = min(schedule.batch_size, max(len(image), len(other)))
    distillation = Schedule(batch_size, max(1, schedule.steps // 2))
    return Study((spaces[0], spaces[1]), overlap, {title: texts}, (image, other), items, distillation)


def _read_labels(path: Path) -> dict[str, str]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"key", "label"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} has the columns {reader.fieldnames}, expected key and label. Add a header line.")
        found: dict[str, str] = {}
        for row in reader:
            if not (row["label"] or "").strip() or found.setdefault(row["key"], row["label"]) != row["label"]:
                raise ValueError(f"The item {row['key']!r} of {path} has no label, or two. Give it one.")
        return found


def _class_of(key: str, classes: dict[str, str] | None) -> str:
    if classes is None:
        return Path(key).parent.name
    if key not in classes:
        raise ValueError(f"The test item {key!r} has no line in --labels. Add it, or leave --labels out.")
    return classes[key]


def planned(
    study: Study, seeds: int, null_draws: int, everything: bool, titles: Sequence[str] | None = None
) -> list[Run]:
    """Return the runs, those of the smallest set first, and the first seed of every variant before the second of any.

    So a run that is stopped has a table.

    Args:
        titles: of the sets that are wanted, all by default.
    """
    runs = []
    for title, texts in sorted(study.texts.items(), key=lambda entry: len(entry[1].about)):
        if titles is not None and title not in titles:
            continue
        kinds = tuple(dict.fromkeys(kind for kind in texts.kinds if kind))
        large = len(texts.about) > LARGE and not everything
        able = [
            variant
            for variant in variants(kinds, study.overlap, study.leaves)
            if _fits(study, texts, variant) and (variant.dear or not large)
        ]
        draws = min(null_draws, seeds) if large else null_draws
        for seed in range(max(seeds, draws)):
            runs += [
                Run(title, variant, seed) for variant in able if seed < (draws if variant.name == NULL else seeds)
            ]
    return runs


def _fits(study: Study, texts: Texts, variant: Variant) -> bool:
    """Return whether the rows that a variant trains on fill a batch."""
    native = sum(kind == variant.texts for kind in texts.kinds) if variant.texts else len(texts.kinds)
    rows = {study.overlap: native * variant.share, **dict(zip(study.leaves, map(len, study.memories), strict=True))}
    if variant.distils:
        return max(map(len, study.memories)) >= study.distillation.batch_size
    return sum(rows[pool] for pool in variant.pools or (study.overlap,)) >= texts.schedule.batch_size * variant.batch


def training_free(study: Study, title: str) -> dict[str, Metrics]:
    """Return the metrics of every way to connect the spaces by the same texts without a connector."""
    texts = study.texts[title]
    items = replace(study.items, query_bank=texts.second, gallery_bank=texts.first)
    table = baseline_metrics([items])
    of_query, of_gallery = cca_maps(texts.second, texts.first)
    scores = normalize(items.query.embeds @ of_query, dim=1) @ normalize(items.gallery.embeds @ of_gallery, dim=1).T
    table["cca"] = items.metrics(scores, scores.T)
    if items.query_names is not None and items.gallery_names is not None:
        scores = posterior_matching(items.query.embeds, items.query_names, items.gallery_names, items.gallery.embeds)
        table["closed PM"] = items.metrics(scores, scores.T)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--data", type=Path, help="folder with concepts.json, images, audio and text")
    given.add_argument("--stores", nargs=4, metavar="STORE", help="overlap items in both spaces, and both memories")
    parser.add_argument("--test", nargs=2, metavar="STORE", help="with --stores: test items of both memories' kinds")
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="CSV",
        help="classes of the test items (columns key and label), and of the texts, if the null is to know them",
    )
    parser.add_argument("--batch-size", type=int, default=4096, help="with --stores (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="with --stores (default: %(default)s)")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/real_retrieval"), help="sources and connectors (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/ablations"), help="table, plot and page (default: %(default)s)"
    )
    parser.add_argument(
        "--texts",
        nargs="+",
        choices=TITLES,
        default=list(TITLES),
        help="with --data: texts that connect (default: all)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="connectors a variant (default: %(default)s)")
    parser.add_argument(
        "--null",
        type=int,
        default=NULL_DRAWS,
        help=f"deranged connectors, no more than --seeds on more than {LARGE} texts (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="connectors at once, a core each (default: %(default)s)"
    )
    parser.add_argument("--all", action="store_true", help=f"all variants, also on more than {LARGE} texts")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="train in autocast: faster where the CPU multiplies bfloat16; figures move by less than 0.001",
    )
    arguments = parser.parse_args(argv)
    if (arguments.stores is None) != (arguments.test is None):
        parser.error("--stores and --test go together")
    if arguments.seeds < 2 or arguments.null < 0:
        parser.error("expected at least 2 seeds, which the spread takes, and no negative --null")
    if min(arguments.workers, arguments.steps, arguments.batch_size - 1) < 1:
        parser.error("expected at least 1 worker, 1 step and batches of 2")
    logging.set_verbosity_error()
    zero_shot: dict[str, float] = {}
    if arguments.data is not None:
        study, zero_shot = study_of_data(arguments.data, arguments.cache)
    else:
        schedule = Schedule(arguments.batch_size, arguments.steps)
        study = study_of_stores(arguments.stores, arguments.test, arguments.labels, schedule)
    titles = [TITLES[name] for name in arguments.texts] if arguments.data is not None else list(study.texts)
    free = {title: training_free(study, title) for title in titles}
    runs = planned(study, arguments.seeds, arguments.null, arguments.all, titles)
    found: dict[tuple[str, Variant], list[Metrics]] = defaultdict(list)
    measured = measure(study, runs, arguments.cache / "ablations", workers=arguments.workers, bf16=arguments.bf16)
    for run, metrics in tqdm(measured, desc="connectors", total=len(runs), unit="run"):
        found[run.texts, run.variant].append(metrics)
    tables = [
        Table(
            title,
            free[title],
            {variant: metrics for (texts, variant), metrics in found.items() if texts == title},
            asdict(study.texts[title].schedule),
            asdict(study.distillation),
            len(study.texts[title].about),
        )
        for title in titles
    ]
    items = study.items
    caption = (
        f"{len(items.query.labels)} {items.query.modality} and {len(items.gallery.labels)} {items.gallery.modality} "
        f"items of {len(set(items.query.labels))} classes, {arguments.seeds} seeds. {machine()}"
    )
    print(f"\n{caption}\n")
    for table in tables:
        print(format_results(table), end="\n\n")
    document = {
        "caption": caption,
        "real_data": arguments.data is not None,
        "zero_shot": zero_shot,
        "seeds": arguments.seeds,
        "null_draws": arguments.null,
        "bf16": arguments.bf16,
        "tables": [table.document() for table in tables],
    }
    write_json(arguments.output / "ablations.json", document)
    for path in write_ablations(arguments.output, tables, caption, zero_shot):
        print(path)


if __name__ == "__main__":
    run_script(main)
