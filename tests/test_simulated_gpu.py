"""The rules of the simulated GPU, and the main paths on it: `--simulated-gpu` runs the other tests there too."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import ClapFeatureExtractor

from cmcr_hf import CMCRModel, CMCRProcessor, cli
from cmcr_hf.modeling.log_mel_cmcr import log_mel
from cmcr_hf.training import aggregate as aggregation
from cmcr_hf.training import train
from cmcr_hf.training.aggregate import aggregate
from cmcr_hf.training.store import EmbeddingStore
from tests.simulated_gpu import SimulatedGpu
from tests.training import test_distillation, test_train


def unit_rows(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), dim=-1)


# The simulation


def test_tensors_of_two_devices_do_not_meet(gpu: SimulatedGpu) -> None:
    here = torch.ones(3, 4)
    there = here.to("cuda")
    assert (here.device.type, there.device.type, (there + 1)[0].device.type) == ("cpu", "cuda", "cuda")
    for meet in (lambda: here + there, lambda: here[there[0].long()], lambda: torch.cat([here, there])):
        with pytest.raises(RuntimeError, match="same device"):
            meet()
    assert torch.equal((there * torch.tensor(2.0)).cpu(), here * 2)
    assert there[torch.tensor([0, 2])].is_cuda
    assert here.copy_(there).device.type == "cpu"


def test_a_tensor_stays_on_the_gpu_when_others_are_set_to_its_storage(gpu: SimulatedGpu) -> None:
    there = torch.ones(3, device="cuda")
    assert torch.empty(0).set_(there.untyped_storage()).is_cuda
    assert there.is_cuda


def test_what_is_on_the_gpu_is_no_array_and_is_not_pinned(gpu: SimulatedGpu) -> None:
    there = torch.ones(3, device="cuda")
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(there)
    with pytest.raises(RuntimeError, match="pinned"):
        there.pin_memory()
    assert np.array_equal(there.cpu().numpy(), np.ones(3, np.float32))


def test_a_generator_draws_on_its_own_device(gpu: SimulatedGpu) -> None:
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    assert torch.randn(3, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).is_cuda


def test_gradients_lie_where_their_weights_do(gpu: SimulatedGpu) -> None:
    layer = torch.nn.Linear(4, 2).to("cuda")
    with pytest.raises(RuntimeError, match="same device"):
        layer(torch.ones(3, 4))
    layer(torch.ones(3, 4, device="cuda")).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_cuda


def test_what_was_copied_within_a_stream_is_there_once_it_is_waited_for(gpu: SimulatedGpu) -> None:
    pinned, stream = torch.ones(3).pin_memory(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        there = pinned.to("cuda", non_blocking=True)
    assert there.isnan().all()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(there.cpu(), torch.ones(3))


# What runs there


def test_every_tower_of_a_fused_model_gives_what_it_gives_on_the_cpu(
    gpu: SimulatedGpu, tiny_clip: Path, tiny_fused_clap: Path
) -> None:
    model = CMCRModel.from_sources_pretrained(tiny_clip, tiny_fused_clap, config={"projection_dim": 8}).eval()
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_fused_clap)
    generator = np.random.default_rng(0)
    inputs = processor(
        images=list(generator.integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)),
        audio=[generator.normal(0, 0.1, samples).astype(np.float32) for samples in (8000, 30000)],
        sampling_rate=8000,
        text=["a dog barks", "the sea"],
    )
    with torch.no_grad():
        expected = model(**inputs, return_loss=True)
        found = model.to("cuda")(**inputs.to("cuda"), return_loss=True)
    assert {"loss", "image_embeds", "text_embeds", "audio_embeds"} <= found.keys()
    for name, value in found.items():
        assert value.is_cuda, name
        torch.testing.assert_close(value.cpu(), expected[name], atol=1e-5, rtol=0)


def test_a_point_cloud_gives_what_it_gives_on_the_cpu(gpu: SimulatedGpu, tiny_ulip_model: Path) -> None:
    model, processor = (part.from_pretrained(tiny_ulip_model) for part in (CMCRModel, CMCRProcessor))
    generator = np.random.default_rng(0)
    inputs = processor(point_clouds=[generator.normal(size=(points, 3)) for points in (60, 200)])
    with torch.no_grad():
        expected = model.get_point_cloud_features(**inputs).pooler_output
        found = model.to("cuda").get_point_cloud_features(**inputs.to("cuda")).pooler_output
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=0)


def test_a_log_mel_is_computed_where_its_samples_are(gpu: SimulatedGpu) -> None:
    extractor = ClapFeatureExtractor(truncation="rand_trunc")
    # Silence behind a tone: frames that are transformed anew, in float64.
    samples = torch.zeros(24000)
    samples[:9000] = torch.sin(torch.arange(9000) * 0.5)
    found = log_mel(samples.to("cuda"), extractor)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), log_mel(samples, extractor), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_aggregation_waits_for_every_block_of_the_memory(gpu: SimulatedGpu, dtype: torch.dtype | None) -> None:
    queries, memory, values = unit_rows(30, 16), unit_rows(900, 16), unit_rows(900, 8)
    found = aggregate(
        queries.to("cuda"), memory.split(500), values.split(500), temperature=0.05, dtype=dtype, memory_block=32
    )
    assert aggregation.READ_BLOCKS * 32 < 900
    assert found.is_cuda
    expected = aggregate(queries, memory, values, temperature=0.05)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-6 if dtype is None else 1e-2, rtol=0)


def test_nan_in_the_memory_is_told_at_the_end(gpu: SimulatedGpu) -> None:
    memory = unit_rows(50, 16)
    memory[20, 3] = torch.nan
    with pytest.raises(ValueError, match="memory or values hold NaN"):
        aggregate(unit_rows(5, 16).to("cuda"), memory)


@pytest.mark.parametrize(
    ("shared", "embeds"),
    [(test_train, test_train.aligned_embeds(48)), (test_distillation, test_distillation.unpaired_embeds())],
    ids=["c-mcr", "bridge-distillation"],
)
def test_training_is_the_same_whether_or_not_the_data_fits_on_the_gpu(
    shared, embeds, gpu, tmp_path, monkeypatch
) -> None:
    connectors = []
    for fits in (True, False):
        monkeypatch.setattr(train, "fit_on_device", lambda nbytes, args, fits=fits: fits)
        args = shared.arguments(tmp_path / f"fits {fits}", use_cpu=False, save_strategy="no")
        assert args.device.type == "cuda"
        before = gpu.operations
        connector, _ = train.train_connector(shared.small_config(), embeds, args, log_lines=False)
        assert gpu.operations > before
        connectors.append(connector)
    assert test_train.equal_weights(*connectors)


def test_the_commands_choose_the_gpu_and_embed_as_the_cpu_does(
    gpu: SimulatedGpu, tiny_clap: Path, tmp_path: Path
) -> None:
    table = tmp_path / "texts.csv"
    table.write_text("text\na dog barks\nthe sea\na bell rings\n")
    options = ["--source", str(tiny_clap), "--space", "clap", "--modality", "text", "--data", str(table)]
    stores = {}
    for name, device in (("there", []), ("here", ["--device", "cpu"])):
        before = gpu.operations
        assert cli.main(["embed", *options, "--column", "text", "--output", str(tmp_path / name), *device]) == 0
        assert (gpu.operations > before) == (name == "there")
        stores[name] = EmbeddingStore.open(tmp_path / name).tensor()
    torch.testing.assert_close(stores["there"], stores["here"], atol=1e-5, rtol=0)
