import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel

from cmcr_hf.modeling.modeling_cmcr import CMCRModel
from cmcr_hf.modeling.processing_cmcr import CMCRProcessor
from cmcr_hf.training import embed as embedding
from cmcr_hf.training.data import Items
from cmcr_hf.training.embed import embed, encode, encode_items, source_record
from cmcr_hf.training.recipe import DataSpec

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
    original = encode

    def failing(*arguments):
        calls.append(len(arguments[-1]))
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(embedding, "encode", failing)
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
    for row, item in enumerate(items):
        item.key, item.value = f"set/train/{row}/image", b"no image" if row == 2 else item.value.read_bytes()
    with pytest.raises(ValueError, match=r"Cannot read the image.* \(item 'set/train/2/image'\)"):
        run(clip, processor, items, tmp_path / "store", batch_size=32)


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


def test_another_precision_or_configuration_is_another_source(clip, tiny_clip):
    single = source_record("some/clip", "abc", clip)
    assert (single["id"], single["revision"]) == ("some/clip", "abc")
    half = source_record("some/clip", "abc", CLIPModel.from_pretrained(tiny_clip).to(torch.bfloat16))
    assert half["config_hash"] != single["config_hash"]
