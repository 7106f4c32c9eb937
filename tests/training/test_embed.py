import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pyarrow import parquet
from transformers import CLIPModel

from cmcr_hf.modeling.modeling_cmcr import CMCRModel
from cmcr_hf.modeling.processing_cmcr import CMCRProcessor
from cmcr_hf.training import embed as embedding
from cmcr_hf.training.data import Item, Items
from cmcr_hf.training.embed import embed, encode_features, encode_items, source_record
from cmcr_hf.training.recipe import DataSpec
from cmcr_hf.training.store import EmbeddingStore

TEXTS = [f"the {first} {second}" for first in ("dog", "cat", "bell", "sea") for second in ("barks", "rings", "loud")][
    :11
]
RECORD = {"id": "tiny", "revision": "main", "config_hash": "0"}


@pytest.fixture(scope="module")
def clip(tiny_clip):
    return CLIPModel.from_pretrained(tiny_clip)


@pytest.fixture(scope="module")
def processor(tiny_clip, tiny_clap):
    return CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap)


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return Items([DataSpec(table="texts.txt")], "text", tmp_path)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(embedding, "SHARD_ROWS", {"text": 4, "image": 4, "audio": 4})


def run(source, processor, items, folder, **changes):
    options = {"space": "clip", "record": RECORD, "dim": 24, "batch_size": 2, "progress": False, **changes}
    return embed(source, processor, items, folder, **options)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fail_at(monkeypatch, call):
    """Raise in place of the `call`th batch, counted from 0."""
    calls = []
    original = encode_features

    def failing(source, modality, inputs):
        calls.append(len(next(iter(inputs.values()))))
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return original(source, modality, inputs)

    monkeypatch.setattr(embedding, "encode_features", failing)
    return calls


def test_embeddings_are_the_normalised_features_of_the_source(clip, processor, texts, tmp_path):
    store = run(clip, processor, texts, tmp_path / "store")
    inputs = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        features = clip.get_text_features(**inputs).pooler_output
    torch.testing.assert_close(store.tensor(), F.normalize(features, dim=-1), atol=1e-6, rtol=0)
    assert store.keys() == [f"texts.txt/{row}/text" for row in range(11)]
    assert (store.space, store.modality, store.source) == ("clip", "text", RECORD)


def test_embeddings_do_not_depend_on_the_batch_size(clip, processor, texts, tmp_path):
    one = run(clip, processor, texts, tmp_path / "one", batch_size=1).tensor()
    for batch_size in (3, 64):
        other = run(clip, processor, texts, tmp_path / str(batch_size), batch_size=batch_size).tensor()
        assert (one - other).abs().max() < 1e-6


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_end_with_their_shard(clip, processor, texts, tmp_path, small_shards, monkeypatch, batch_size):
    sizes = fail_at(monkeypatch, -2)
    run(clip, processor, texts, tmp_path / "store", batch_size=batch_size)
    assert sizes == {2: [2, 2, 2, 2, 2, 1], 3: [3, 1, 3, 1, 3]}[batch_size]


@pytest.mark.parametrize("batch", range(6))
def test_a_run_stopped_at_any_batch_goes_on_to_the_same_bytes(
    clip, processor, texts, tmp_path, small_shards, monkeypatch, batch
):
    run(clip, processor, texts, tmp_path / "whole")
    with monkeypatch.context() as patch:
        fail_at(patch, batch)
        with pytest.raises(KeyboardInterrupt):
            run(clip, processor, texts, tmp_path / "stopped")
    calls = fail_at(monkeypatch, -2)
    run(clip, processor, texts, tmp_path / "stopped")
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    # What lies in whole shards is not computed again: two batches make one.
    assert len(calls) == 6 - batch // 2 * 2


def test_a_run_may_go_on_with_another_batch_size(clip, processor, texts, tmp_path, small_shards, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(clip, processor, texts, tmp_path / "store")
    rows = run(clip, processor, texts, tmp_path / "store", batch_size=64).tensor()
    whole = run(clip, processor, texts, tmp_path / "whole", batch_size=64).tensor()
    assert (rows - whole).abs().max() < 1e-6


def test_a_complete_store_is_returned_without_computing(clip, processor, texts, tmp_path, monkeypatch):
    run(clip, processor, texts, tmp_path / "store")
    fail_at(monkeypatch, 0)
    assert run(clip, processor, texts, tmp_path / "store", batch_size=5).rows == 11


@pytest.mark.parametrize("changes", [{"record": {**RECORD, "revision": "other"}}, {"space": "clap"}])
def test_a_store_of_another_source_is_refused_and_kept(clip, processor, texts, tmp_path, changes):
    run(clip, processor, texts, tmp_path / "store")
    before = content(tmp_path / "store")
    with pytest.raises(ValueError, match=r"store holds other embeddings: (source|space) is"):
        run(clip, processor, texts, tmp_path / "store", **changes)
    assert content(tmp_path / "store") == before


def test_a_store_of_other_data_is_refused_and_kept(clip, processor, texts, tmp_path):
    run(clip, processor, texts, tmp_path / "store")
    before = content(tmp_path / "store")
    (tmp_path / "texts.txt").write_text("the dog rings")
    with pytest.raises(ValueError, match=r"store holds other embeddings: the items have changed since \("):
        run(clip, processor, Items([DataSpec(table="texts.txt")], "text", tmp_path), tmp_path / "store")
    assert content(tmp_path / "store") == before


def test_the_mode_of_the_source_is_restored_and_dropout_is_off(processor, texts, tmp_path, tiny_clip):
    source = CLIPModel.from_pretrained(tiny_clip).train()
    for module in source.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    first = run(source, processor, texts, tmp_path / "first").tensor()
    assert source.training
    assert torch.equal(first, run(source.eval(), processor, texts, tmp_path / "second").tensor())
    assert not source.training


def write_images(folder, count=3):
    folder.mkdir()
    for row in range(count):
        Image.new("RGB", (9, 8), (80 * row, 0, 0)).save(folder / f"{row}.png")


@pytest.mark.parametrize(("modality", "rows"), [("text", 8192), ("image", 1024)])
def test_an_interruption_costs_less_where_a_row_costs_more(clip, processor, texts, tmp_path, modality, rows):
    write_images(tmp_path / "images")
    items = {"text": texts, "image": Items([DataSpec(folder="images")], "image", tmp_path)}
    assert run(clip, processor, items[modality], tmp_path / "store").shard_rows == rows


def test_a_first_attempt_that_wrote_no_shard_does_not_block_the_repaired_items(clip, processor, tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png"):
        run(clip, processor, Items([DataSpec(folder="images")], "image", tmp_path), tmp_path / "store")
    (tmp_path / "images" / "1.png").unlink()
    store = run(clip, processor, Items([DataSpec(folder="images")], "image", tmp_path), tmp_path / "store")
    assert store.keys() == ["0.png", "2.png"]


def test_an_unreadable_file_is_named(clip, processor, tmp_path):
    write_images(tmp_path / "images")
    data = (tmp_path / "images" / "1.png").read_bytes()
    (tmp_path / "images" / "1.png").write_bytes(data[: len(data) // 2])
    items = Items([DataSpec(folder="images")], "image", tmp_path)
    with pytest.raises(ValueError, match=r"Cannot read image .*images/1.png.* \(item '1.png'\)"):
        run(clip, processor, items, tmp_path / "store", batch_size=32)


def test_an_unreadable_cell_of_a_data_set_is_named_by_its_row(clip, processor, tmp_path, monkeypatch):
    write_images(tmp_path / "images")
    items = Items([DataSpec(folder="images")], "image", tmp_path)
    # The cells of a data set are bytes, which have no name of their own.
    cells = [
        Item(f"set/train/{row}/image", b"no image" if row == 2 else item.value.read_bytes())
        for row, item in enumerate(items)
    ]
    monkeypatch.setattr(items._parts[0], "read", lambda first, stop, start=0: iter(cells[first + start : stop]))
    with pytest.raises(ValueError, match=r"Cannot read the image.* \(item 'set/train/2/image'\)"):
        run(clip, processor, items, tmp_path / "store", batch_size=32)


def damaged(folder, count, bad):
    """Write images of which some are none."""
    write_images(folder, count)
    for row in bad:
        (folder / f"{row}.png").write_bytes(b"no image")
    return Items([DataSpec(folder=folder.name)], "image", folder.parent)


@pytest.mark.parametrize("bad", [[1], [0, 3], [4, 5], [0, 1, 2, 3], [9], [3, 4, 5, 6, 7, 8, 9]])
@pytest.mark.parametrize("batch_size", [3, 4])
def test_unreadable_items_are_left_out_and_listed(clip, processor, tmp_path, small_shards, bad, batch_size):
    items = damaged(tmp_path / "images", 10, bad)
    store = run(clip, processor, items, tmp_path / "store", batch_size=batch_size, strict=False)
    good = [f"{row}.png" for row in range(10) if row not in bad]
    assert (store.keys(), store.rows, store.skipped) == (good, len(good), len(bad))
    rejects = [json.loads(line) for line in (tmp_path / "store" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["key"] for reject in rejects] == [f"{row}.png" for row in bad]
    assert all("Cannot read image" in reject["reason"] for reject in rejects)
    # The rest is what it is without the bad ones.
    for row in bad:
        (tmp_path / "images" / f"{row}.png").unlink()
    whole = run(clip, processor, Items([DataSpec(folder="images")], "image", tmp_path), tmp_path / "whole")
    torch.testing.assert_close(EmbeddingStore.open(store.folder).tensor(), whole.tensor(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch", range(4))
def test_a_run_that_leaves_items_out_goes_on_to_the_same_bytes(
    clip, processor, tmp_path, small_shards, monkeypatch, batch
):
    items = damaged(tmp_path / "images", 10, [1, 2, 6, 8])
    run(clip, processor, items, tmp_path / "whole", strict=False)
    with monkeypatch.context() as patch:
        fail_at(patch, batch)
        with pytest.raises(KeyboardInterrupt):
            run(clip, processor, items, tmp_path / "stopped", strict=False)
    run(clip, processor, items, tmp_path / "stopped", strict=False)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_one_of_several_shares_embeds_what_the_others_do_not_come_to(
    clip, processor, tmp_path, small_shards, monkeypatch, rank
):
    items = damaged(tmp_path / "images", 18, [1, 2, 6])
    run(clip, processor, items, tmp_path / "whole", strict=False)
    orders = []
    original = embedding._prepare_group

    def noted(processor, modality, space, group, *, strict):
        orders.append(group.number[0])
        return original(processor, modality, space, group, strict=strict)

    monkeypatch.setattr(embedding, "_prepare_group", noted)
    options = {"strict": False, "batch_size": 4, "workers": 1}
    store = run(clip, processor, items, tmp_path / "shared", share=(rank, 3), **options)
    assert store.complete
    # Its own, of five shards, and those of the others from the end.
    assert orders == {0: [0, 3, 4, 2, 1], 1: [1, 4, 3, 2, 0], 2: [2, 4, 3, 1, 0]}[rank]
    assert content(tmp_path / "shared").keys() == content(tmp_path / "whole").keys()
    torch.testing.assert_close(store.tensor(), EmbeddingStore.open(tmp_path / "whole").tensor(), atol=1e-6, rtol=0)
    assert store.keys() == EmbeddingStore.open(tmp_path / "whole").keys()


def test_shares_that_others_have_embedded_are_not_embedded_again(clip, processor, tmp_path, small_shards, monkeypatch):
    items = damaged(tmp_path / "images", 18, [])
    run(clip, processor, items, tmp_path / "whole")
    with monkeypatch.context() as patch:
        fail_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run(clip, processor, items, tmp_path / "shared", share=(1, 2), workers=1)
    there = [path.name for path in sorted((tmp_path / "shared").glob("shard-*.json"))]
    assert there == ["shard-00001.json", "shard-00003.json"]
    calls = fail_at(monkeypatch, -2)
    # Another number of shares, one of which finds all of it.
    assert run(clip, processor, items, tmp_path / "shared", share=(2, 4)).complete
    assert len(calls) == 9 - 4
    assert content(tmp_path / "shared") == content(tmp_path / "whole")
    assert run(clip, processor, items, tmp_path / "shared", share=(0, 4)).complete
    assert len(calls) == 9 - 4


def test_a_data_set_of_several_files_is_shared_and_goes_on_within_a_file(
    clip, processor, tmp_path, small_shards, monkeypatch
):
    texts = pa.array([f"the dog {row}" for row in range(25)])
    (tmp_path / "set").mkdir()
    for file, (start, stop) in enumerate([(0, 10), (10, 11), (11, 19), (19, 25)]):
        parquet.write_table(pa.table({"text": texts[start:stop]}), tmp_path / "set" / f"train-{file}.parquet")
    items = Items([DataSpec(dataset="set", column="text")], "text", tmp_path)
    whole = run(clip, processor, items, tmp_path / "whole", progress=True)
    # Of a full file, its last shard is the last.
    assert [len(shard) for shard in whole.shards()] == [4, 4, 2, 1, 4, 4, 4, 2]
    assert whole.keys()[10:12] == ["set/train/1-0/text", "set/train/2-0/text"]
    for kill in range(12):
        folder = tmp_path / str(kill)
        with monkeypatch.context() as patch:
            fail_at(patch, kill)
            with pytest.raises(KeyboardInterrupt):
                run(clip, processor, items, folder, share=(1, 2))
        assert run(clip, processor, items, folder, share=(0, 2)).complete
        assert content(folder) == content(tmp_path / "whole")


def test_processes_that_share_a_folder_and_are_killed_end_with_the_bytes_of_one(
    clip, processor, tmp_path, small_shards
):
    items = damaged(tmp_path / "images", 41, [3, 17])
    torch.set_num_threads(1)
    run(clip, processor, items, tmp_path / "whole", strict=False, workers=1)

    def start(rank, ranks, killed_at=None):
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            if killed_at is not None:
                original, calls = embedding.encode_features, itertools.count()

                def killing(source, modality, inputs):
                    if next(calls) == killed_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(source, modality, inputs)

                embedding.encode_features = killing
            run(clip, processor, items, tmp_path / "shared", strict=False, workers=1, share=(rank, ranks))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def end(children):
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    assert end([start(0, 2, killed_at=7), start(1, 2, killed_at=4)]) == [-signal.SIGKILL] * 2
    assert not (tmp_path / "shared" / "rejects.jsonl").exists()
    assert end([start(rank, 3) for rank in range(3)]) == [0] * 3
    assert content(tmp_path / "shared") == content(tmp_path / "whole")


def test_items_that_are_all_unreadable_are_an_error(clip, processor, tmp_path, small_shards):
    with pytest.raises(ValueError, match="store holds no rows"):
        run(clip, processor, damaged(tmp_path / "images", 5, range(5)), tmp_path / "store", strict=False)


def test_texts_of_similar_length_are_embedded_together_and_stay_in_order(clip, processor, tmp_path, monkeypatch):
    texts = ["the dog", "the small red dog barks", "a", "the sea of the loud bell rings", "a cat", "the train"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    shapes = []
    original = encode_features
    monkeypatch.setattr(
        embedding,
        "encode_features",
        lambda source, modality, inputs: (
            shapes.append(inputs["input_ids"].shape) or original(source, modality, inputs)
        ),
    )
    items = Items([DataSpec(table="texts.txt")], "text", tmp_path)
    store = run(clip, processor, items, tmp_path / "store", batch_size=2)
    # 18 tokens at most, of texts of 3, 4, 4, 4, 7 and 9.
    assert [tuple(shape) for shape in shapes] == [(4, 4), (2, 9)]
    for row, text in enumerate(texts):
        alone = original(clip, "text", processor(text=text))
        torch.testing.assert_close(store.tensor()[row], alone[0], atol=1e-6, rtol=0)
    assert store.keys() == [f"texts.txt/{row}/text" for row in range(6)]


@pytest.mark.parametrize("workers", [1, 3])
def test_items_stay_in_order_however_many_threads_read_them(clip, processor, tmp_path, monkeypatch, workers):
    write_images(tmp_path / "images", 9)
    items = Items([DataSpec(folder="images")], "image", tmp_path)
    prepare = embedding.prepare

    def slow_at_first(processor, modality, values, space=None):
        time.sleep(0.05 if values[0].name == "0.png" else 0)
        return prepare(processor, modality, values, space)

    monkeypatch.setattr(embedding, "prepare", slow_at_first)
    store = run(clip, processor, items, tmp_path / "store", batch_size=1, workers=workers)
    monkeypatch.undo()
    expected = encode_features(clip, "image", processor(images=[item.value for item in items]))
    torch.testing.assert_close(store.tensor(), expected, atol=1e-6, rtol=0)


def test_a_connected_model_encodes_items_as_it_does_in_one_batch(tiny_clip, tiny_clap, processor, tmp_path):
    write_images(tmp_path / "images", 5)
    torch.manual_seed(0)
    model = CMCRModel.from_sources_pretrained(tiny_clip, tiny_clap, config={"projection_dim": 8})
    items = Items([DataSpec(folder="images")], "image", tmp_path)
    rows = encode_items(model, processor, items, batch_size=2, progress=False)
    with torch.inference_mode():
        whole = model.get_image_features(**processor(images=[item.value for item in items])).pooler_output
    assert rows.shape == (5, 8)
    torch.testing.assert_close(rows, whole, atol=1e-6, rtol=0)


def test_a_source_is_known_by_its_weights_and_configuration_wherever_it_lies(clip, tiny_clip, tmp_path):
    record = source_record(str(tiny_clip), None, clip)
    shutil.copytree(tiny_clip, tmp_path / "clip")
    moved = source_record(str(tmp_path / "clip"), None, CLIPModel.from_pretrained(tmp_path / "clip"))
    assert moved == record
    assert record["id"] == "clip"


def test_other_weights_in_the_same_folder_are_another_source(clip, tiny_clip, tmp_path):
    before = source_record(str(tiny_clip), None, clip)
    other = CLIPModel(clip.config)
    other.save_pretrained(tmp_path / "clip", max_shard_size="20KB")
    assert not (tmp_path / "clip" / "model.safetensors").exists()
    sharded = source_record(str(tmp_path / "clip"), None, other)
    with torch.no_grad():
        other.logit_scale.add_(1)
    other.save_pretrained(tmp_path / "clip", max_shard_size="20KB")
    changed = source_record(str(tmp_path / "clip"), None, other)
    assert len({record["revision"] for record in (before, sharded, changed)}) == 3


def test_another_tokenizer_in_the_same_folder_is_another_source(clip, tiny_clip, tmp_path):
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    vocabulary = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(vocabulary.replace('"dog"', '"cow"'))
    assert source_record(str(folder), None, clip)["revision"] != source_record(str(tiny_clip), None, clip)["revision"]


def test_weights_of_another_package_are_known_by_what_their_file_holds(tiny_clip, tmp_path):
    clip, file = CLIPModel.from_pretrained(tiny_clip), tmp_path / "weights.pt"
    for name in (str(file), f"open_clip:ViT-B-32/{file}"):
        revisions = set()
        for content in (b"one", b"two"):
            file.write_bytes(content)
            revisions.add(source_record(name, None, clip)["revision"])
        assert len(revisions) == 2
    assert source_record("open_clip:ViT-B-32/openai", None, clip)["revision"] == "main"


def test_another_precision_or_configuration_is_another_source(clip, tiny_clip):
    single = source_record("some/clip", "abc", clip)
    assert (single["id"], single["revision"]) == ("some/clip", "abc")
    half = source_record("some/clip", "abc", CLIPModel.from_pretrained(tiny_clip).to(torch.bfloat16))
    assert half["config_hash"] != single["config_hash"]


MEASURED = """
import resource, sys
from pathlib import Path
from transformers import CLIPModel
from cmcr_hf.modeling.processing_cmcr import CMCRProcessor
from cmcr_hf.training import embed as embedding
from cmcr_hf.training.data import Items
from cmcr_hf.training.recipe import DataSpec

source, pictures, store = sys.argv[1:]
embedding.SHARD_ROWS = {"image": 64}
model, processor = CLIPModel.from_pretrained(source), CMCRProcessor.from_sources_pretrained(source)
items = Items([DataSpec(folder=pictures)], "image", Path())
record = {"id": "tiny", "revision": "main", "config_hash": "0"}
embedding.embed(model, processor, items, store, space="clip", record=record, dim=24, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_items(tiny_clip, tmp_path):
    # 36 MB each, once decoded; three batches keep all threads busy.
    Image.new("RGB", (4000, 3000), (80, 0, 0)).save(tmp_path / "0.jpg")
    peaks = {}
    for count in (96, 320):
        folder = tmp_path / str(count)
        folder.mkdir()
        for row in range(count):
            os.link(tmp_path / "0.jpg", folder / f"{row:03d}.jpg")
        command = [sys.executable, "-c", MEASURED, tiny_clip, folder, tmp_path / f"store-{count}"]
        environment = {**os.environ, "PYTHONPATH": str(Path(embedding.__file__).parents[2])}
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=True)
        peaks[count] = int(done.stdout) / 1024
    # MiB; all of the larger set would be 11 GB, and its features alone 1 GB at a source's usual size.
    assert peaks[320] < peaks[96] + 100
    assert peaks[320] < 1200
