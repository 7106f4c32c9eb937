import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cmcr_hf.cli import main
from cmcr_hf.training import aggregate_stores as module
from cmcr_hf.training.aggregate_stores import aggregate_stores
from cmcr_hf.training.store import EmbeddingStore


def random_store(
    folder: Path, rows: int, dim: int, shard_rows: int, modality: str = "text", space: str = "clip"
) -> EmbeddingStore:
    store = EmbeddingStore.create(
        folder,
        space=space,
        modality=modality,
        source={"id": "random", "revision": "0", "config_hash": "0"},
        dim=dim,
        data_fingerprint="random",
        shard_rows=shard_rows,
    )
    store.append(
        F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows))),
        [f"row {row}" for row in range(rows)],
    )
    store.finish()
    return EmbeddingStore.open(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[EmbeddingStore, EmbeddingStore]:
    # Two query blocks a shard.
    monkeypatch.setattr(module, "PSEUDO_SHARD_ROWS", 1024)
    return random_store(tmp_path / "queries", 3300, 8, 700), random_store(tmp_path / "memory", 30, 8, 7, "image")


def test_every_query_has_the_average_of_the_memory_and_its_own_key(
    tmp_path: Path, stores: tuple[EmbeddingStore, EmbeddingStore]
) -> None:
    queries, memory = stores
    aggregate_stores(queries, memory, tmp_path / "pseudo", temperature=0.1)
    pseudo = EmbeddingStore.open(tmp_path / "pseudo")
    assert (pseudo.space, pseudo.modality, pseudo.rows) == ("clip", "image", 3300)
    assert pseudo.keys() == queries.keys()
    weights = torch.softmax(queries.tensor().double() @ memory.tensor().double().T / 0.1, dim=1)
    expected = F.normalize(weights @ memory.tensor().double())
    torch.testing.assert_close(pseudo.tensor().double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("shards", "walks"), [(1, 4), (3, 2), (10, 1)])
def test_a_larger_budget_walks_the_memory_less_often_to_the_same_bytes(
    tmp_path: Path,
    stores: tuple[EmbeddingStore, EmbeddingStore],
    monkeypatch: pytest.MonkeyPatch,
    shards: int,
    walks: int,
) -> None:
    aggregate_stores(*stores, tmp_path / "one", budget=0)
    calls = []
    aggregate = module.aggregate
    monkeypatch.setattr(module, "aggregate", lambda *a, **b: calls.append(len(a[0])) or aggregate(*a, **b))
    aggregate_stores(*stores, tmp_path / "other", budget=shards * 1024 * 16 * 4)
    assert len(calls) == walks
    assert content(tmp_path / "other") == content(tmp_path / "one")


def test_an_interrupted_run_goes_on_behind_its_last_walk_to_the_same_bytes(
    tmp_path: Path, stores: tuple[EmbeddingStore, EmbeddingStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    aggregate_stores(*stores, tmp_path / "whole", budget=0)
    aggregate, calls = module.aggregate, []

    def stopping(*arguments: object, **options: object) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return aggregate(*arguments, **options)

    monkeypatch.setattr(module, "aggregate", stopping)
    with pytest.raises(KeyboardInterrupt):
        aggregate_stores(*stores, tmp_path / "stopped", budget=0)
    aggregate_stores(*stores, tmp_path / "stopped", budget=0)
    assert len(calls) == 5
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    aggregate_stores(*stores, tmp_path / "stopped")
    assert len(calls) == 5


def test_values_of_another_space_are_averaged_under_the_weights_of_the_memory(
    tmp_path: Path, stores: tuple[EmbeddingStore, EmbeddingStore]
) -> None:
    queries, memory = stores
    values = random_store(tmp_path / "values", 30, 6, 7, space="clap")
    aggregate_stores(queries, memory, tmp_path / "pseudo", values=values, temperature=0.1)
    pseudo = EmbeddingStore.open(tmp_path / "pseudo")
    assert (pseudo.space, pseudo.modality, pseudo.dim) == ("clap", "text", 6)
    weights = torch.softmax(queries.tensor().double() @ memory.tensor().double().T / 0.1, dim=1)
    expected = F.normalize(weights @ values.tensor().double())
    # The average of some is short.
    torch.testing.assert_close(pseudo.tensor().double(), expected, atol=5e-6, rtol=0)


def test_values_may_be_cut_otherwise_than_the_memory(
    tmp_path: Path, stores: tuple[EmbeddingStore, EmbeddingStore]
) -> None:
    one, other = (random_store(tmp_path / str(rows), 30, 6, rows, space="clap") for rows in (7, 11))
    for values, name in ((one, "alike"), (other, "otherwise")):
        aggregate_stores(*stores, tmp_path / name, values=values, temperature=0.1, budget=0)
    found, expected = (EmbeddingStore.open(tmp_path / name).tensor() for name in ("otherwise", "alike"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("damage", [b"", b"{}", None])
def test_a_shard_whose_receipt_is_damaged_is_written_again(
    tmp_path: Path,
    stores: tuple[EmbeddingStore, EmbeddingStore],
    monkeypatch: pytest.MonkeyPatch,
    damage: bytes | None,
) -> None:
    aggregate_stores(*stores, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingStore, "complete_if_whole", lambda store, shards, alone: True)
        aggregate_stores(*stores, tmp_path / "damaged")
    receipt = tmp_path / "damaged" / "shard-00002.json"
    receipt.write_bytes((tmp_path / "damaged" / "shard-00001.json").read_bytes() if damage is None else damage)
    assert aggregate_stores(*stores, tmp_path / "damaged").complete
    assert content(tmp_path / "damaged") == content(tmp_path / "whole")


def test_stores_that_do_not_fit_together_are_an_error(
    tmp_path: Path, stores: tuple[EmbeddingStore, EmbeddingStore]
) -> None:
    queries, memory = stores
    other = random_store(tmp_path / "other", 20, 8, 7, space="clap")
    with pytest.raises(ValueError, match="expected one space: embed both with one source"):
        aggregate_stores(queries, other, tmp_path / "pseudo")
    with pytest.raises(ValueError, match="hold other items, or in another order"):
        aggregate_stores(queries, memory, tmp_path / "pseudo", values=other)
    assert not (tmp_path / "pseudo").exists()


def command(tmp_path: Path, output: str) -> list[str]:
    return [
        "aggregate",
        *("--queries", str(tmp_path / "queries"), "--memory", str(tmp_path / "memory")),
        *("--output", str(tmp_path / output), "--device", "cpu"),
    ]


def test_the_command_writes_the_store_and_says_so(
    tmp_path: Path, stores: tuple[EmbeddingStore, EmbeddingStore], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, "pseudo")) == 0
    assert f"3300 rows over 30 in {tmp_path / 'pseudo'}" in capsys.readouterr().out
    aggregate_stores(*stores, tmp_path / "called")
    assert content(tmp_path / "pseudo") == content(tmp_path / "called")
    assert main([*command(tmp_path, "pseudo"), "--temperature", "0.1"]) == 1
    assert "holds other embeddings" in capsys.readouterr().err


@pytest.mark.parametrize("shards", [1, 3])
def test_shares_write_the_bytes_of_one_process(
    tmp_path: Path, stores: tuple[EmbeddingStore, EmbeddingStore], monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    aggregate_stores(*stores, tmp_path / "one")
    aggregate, rows = module.aggregate, []

    def noted(queries: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        rows.append(len(queries))
        if rows[-1] == 1024 and len(rows) == 2:
            raise KeyboardInterrupt
        return aggregate(queries, *arguments, **options)

    monkeypatch.setattr(module, "aggregate", noted)
    options = {"budget": shards * 1024 * 16 * 4}
    if shards == 1:
        # Stopped in its second shard; another process does the rest of it.
        with pytest.raises(KeyboardInterrupt):
            aggregate_stores(*stores, tmp_path / "two", share=(0, 2), **options)
    assert aggregate_stores(*stores, tmp_path / "two", share=(1, 2), **options).complete
    assert rows == {1: [1024, 1024, 1024, 228, 1024], 3: [1024 + 228, 2048]}[shards]
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert aggregate_stores(*stores, tmp_path / "two", share=(0, 2)).complete
    assert len(rows) == {1: 5, 3: 2}[shards]


@pytest.mark.slow
def test_ranks_of_torchrun_write_the_bytes_of_one_process(
    tmp_path: Path, stores: tuple[EmbeddingStore, EmbeddingStore]
) -> None:
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command_line = [*launched, "-m", "cmcr_hf.cli", *command(tmp_path, "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(module.__file__).parents[2])}
    done = subprocess.run(command_line, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert len(re.findall("share . of 2: (?:3300 rows over 30|aggregated)", done.stdout)) == 2
    assert main(command(tmp_path, "one")) == 0
    found, whole = (EmbeddingStore.open(tmp_path / name) for name in ("two", "one"))
    assert torch.equal(found.tensor(), whole.tensor())
    assert found.keys() == whole.keys()
