import pytest
import torch

from benchmarks import floors, log_mel

TINY = ["--size", "64", "--rows", "100", "--mebibytes", "1", "--repeats", "1"]


def test_the_floors_are_rates_and_ours_have_their_share(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["what"]: row for row in floors.main(TINY)}
    assert all(row["rate"] > 0 for row in rows.values())
    assert {row["unit"] for row in rows.values()} == {"GFLOP/s", "GB/s", "MB/s", "items/s a core"}
    decoded = "JPEG 640 x 480 decoded by Pillow", "the same by `load_image`"
    assert rows[decoded[1]]["share"] == pytest.approx(rows[decoded[1]]["rate"] / rows[decoded[0]]["rate"])
    disk, store, sha256 = (
        rows[name]["rate"]
        for name in ("disk, a file written and synced", "store written and synced; floor: disk and sha256", "sha256")
    )
    share = rows["store written and synced; floor: disk and sha256"]["share"]
    assert share == pytest.approx(store * (1 / disk + 1 / sha256))
    assert "matrix product, bfloat16, 64 x 64 x 64" in capsys.readouterr().out


def test_the_products_put_torchs_settings_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    for run in floors.products(8).values():
        run()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_the_log_mel_is_held_against_the_extractors(capsys: pytest.CaptureFixture[str]) -> None:
    rows = log_mel.main(["--clips", "2", "--seconds", "1", "--repeats", "1"])
    plain, ours = rows
    assert (plain["ratio"], plain["error"]) == (1, 0)
    assert ours["error"] < 1e-4
    assert ours["ratio"] == pytest.approx(ours["rate"] / plain["rate"])
    assert "log_mel on the CPU, one thread" in capsys.readouterr().out
