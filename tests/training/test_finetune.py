import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from cmcr_hf import CMCRModel, CMCRProcessor
from cmcr_hf.modeling.sources_cmcr import fingerprint
from cmcr_hf.training.finetune import PairDataset, main


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    generator = np.random.default_rng(0)
    lines = ["image,audio,caption"]
    for index in range(8):
        Image.fromarray(generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        soundfile.write(folder / f"{index}.wav", generator.normal(0, 0.1, 4000), 8000)
        lines.append(f"{index}.png,{index}.wav,a dog barks")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def run(tiny_model, pairs, output, *extra):
    options = {
        "--model": str(tiny_model),
        "--pairs": str(pairs),
        "--image_column": "image",
        "--audio_column": "audio",
        "--output_dir": str(output),
        "--per_device_train_batch_size": "4",
        "--max_steps": "2",
        "--learning_rate": "0.01",
        "--save_strategy": "no",
    }
    main([part for pair in options.items() for part in pair] + ["--disable_tqdm", "True", "--use_cpu", *extra])


def changed_parts(before, after):
    first, second = CMCRModel.from_pretrained(before).state_dict(), CMCRModel.from_pretrained(after).state_dict()
    kept = {name for name in first if name in second and torch.equal(first[name], second[name])}
    return {name.split(".")[0] for name in {*first, *second} - kept}


def test_finetuning_changes_the_projectors_alone(tiny_model, pairs, tmp_path):
    run(tiny_model, pairs, tmp_path / "out")
    assert changed_parts(tiny_model, tmp_path / "out") == {"connector"}
    processor = CMCRProcessor.from_pretrained(tmp_path / "out")
    assert processor(text="a dog")["input_ids"].shape == (1, 4)


def test_finetuning_reaches_the_sources_on_request(tiny_model, pairs, tmp_path):
    run(tiny_model, pairs, tmp_path / "out", "--train_sources", "--text_column", "caption")
    assert changed_parts(tiny_model, tmp_path / "out") == {"clap", "clip", "connector"}
    model = CMCRModel.from_pretrained(tmp_path / "out")
    processor = CMCRProcessor.from_pretrained(tmp_path / "out")
    tuned = fingerprint(model.clip, processor, "clip", "image")
    torch.testing.assert_close(model.connector.fingerprint_clip_image, tuned)


def test_the_saved_model_and_its_checkpoints_can_be_read_by_whom_their_configurations_can(tiny_model, pairs, tmp_path):
    run(tiny_model, pairs, tmp_path / "out", "--save_strategy", "steps", "--save_steps", "2")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    modes = {path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "out" / "config.json").stat().st_mode}


def test_held_out_pairs_give_an_evaluation_loss(tiny_model, pairs, tmp_path):
    run(tiny_model, pairs, tmp_path / "out", "--validation_pairs", str(pairs))
    assert '"eval_loss"' in (tmp_path / "out" / "eval_results.json").read_text()


def test_fewer_pairs_than_a_batch_are_an_error(tiny_model, pairs, tmp_path):
    with pytest.raises(ValueError, match="at least one batch of 9 pairs, got 8"):
        run(tiny_model, pairs, tmp_path / "out", "--per_device_train_batch_size", "9")


@pytest.mark.parametrize(
    ("old", "new", "message"), [("3.wav", "", r"Row 4 .* has no 'audio'"), ("5.png", "no.png", "no file")]
)
def test_an_incomplete_row_is_named(tiny_model, pairs, tmp_path, old, new, message):
    table = pairs.with_name("holes.csv")
    table.write_text(pairs.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        run(tiny_model, table, tmp_path / "out")


def test_blank_cells_in_different_rows_do_not_shift_the_pairs(pairs):
    table = pairs.with_name("shifted.csv")
    table.write_text(pairs.read_text().replace("\n2.png", "\n").replace("6.wav", ""))
    with pytest.raises(ValueError, match=r"Row 3 .* has no 'image'"):
        PairDataset(str(table), {"image": "image", "audio": "audio"})


def test_a_missing_column_is_named(pairs):
    with pytest.raises(ValueError, match="has no column 'sound', it has image, audio, caption"):
        PairDataset(str(pairs), {"image": "image", "audio": "sound"})
