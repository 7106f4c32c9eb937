"""What open_clip's names and files say of a model."""

import json
from pathlib import Path

import pytest

from cmcr_hf.sources import open_clip_names
from cmcr_hf.sources.open_clip_names import check_activation, named_config, read_config


def test_weights_without_a_configuration_beside_them_have_none(tmp_path: Path) -> None:
    assert read_config(tmp_path / "weights.pt") is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"model_cfg": 3}', '{"model_cfg": {"vision_cfg": 1}}', "[" * 99999]
)
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"Cannot read .*open_clip_config\.json"):
        read_config(tmp_path / "weights.pt")


def test_a_configuration_of_any_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": {}, "text_cfg": {}}}))
    assert read_config(tmp_path / "weights.pt") == {
        "model_cfg": {"vision_cfg": {}, "text_cfg": {}},
        "preprocess_cfg": {},
    }
    monkeypatch.setattr(open_clip_names, "MAX_CONFIG_BYTES", 10)
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        read_config(tmp_path / "weights.pt")


def write(folder: Path, preprocess: str, image_size: str = "32") -> Path:
    model = f'{{"vision_cfg": {{"image_size": {image_size}}}, "text_cfg": {{}}}}'
    (folder / "open_clip_config.json").write_text(f'{{"model_cfg": {model}, "preprocess_cfg": {preprocess}}}')
    return folder / "weights.pt"


NO_SIZES = ['"32"', "0", "-32", "32.0", "true", "5000", "1e999", "[]", "[32]", "[3, 32, 32]", '[32, "32"]', "{}"]
NO_MEANS = [
    "[]",
    "[0.5]",
    "[0, 0, 0, 0]",
    "[NaN, 0, 0]",
    "[Infinity, 0, 0]",
    "[0, 0, 1.5]",
    "[0, 0, [1]]",
    '"0.5"',
    "{}",
]
NO_STDS = ["[0.5, 0.5, 0]", "[0.5, -0.5, 0.5]", "0", "[true, true, true]", "[1e-45, 1, 1]", "[null, 1, 1]"]
NO_NAMES = ["3", "[]", "{}", "false", '["bicubic"]']


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *(("size", value, "is not one or two whole numbers from 1 to 4096") for value in NO_SIZES),
        ("size", "64", r"size=64 is not the model's vision_cfg\.image_size=32"),
        ("size", "[32, 64]", "is not the model's"),
        *(("mean", value, r"preprocess_cfg\.mean=.* is not three numbers from 0 to 1") for value in NO_MEANS),
        *(("std", value, r"preprocess_cfg\.std=.* is not three numbers from 0\.001 to 1") for value in NO_STDS),
        *(("interpolation", value, r"preprocess_cfg\.interpolation=.* is no name") for value in NO_NAMES),
        ("resize_mode", "3", r"resize_mode=3 is no name"),
        ("mode", "3", r"mode=3 is no name"),
    ],
)
def test_a_malformed_preprocessing_is_refused_with_its_file(
    tmp_path: Path, key: str, value: str, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"Cannot read .*open_clip_config\.json: .*{message}"):
        read_config(write(tmp_path, f'{{"{key}": {value}}}'))


def test_a_preprocessing_in_any_form_of_open_clip_is_read(tmp_path: Path) -> None:
    for preprocess, image_size in (
        ('{"size": [32, 32], "mean": [0, 0.5, 1], "std": [1, 1.0, 0.5]}', "32"),
        ('{"size": 32, "mean": 0.5, "std": 0.5}', "[32, 32]"),
        ('{"interpolation": "bicubic", "resize_mode": "squash", "mode": "RGB", "fill_color": 0}', "32"),
    ):
        found = read_config(write(tmp_path, preprocess, image_size))
        assert found is not None and found["preprocess_cfg"] == json.loads(preprocess)


def test_what_is_null_in_a_preprocessing_is_not_said(tmp_path: Path) -> None:
    found = read_config(write(tmp_path, '{"size": null, "mean": null, "interpolation": null, "std": 1}'))
    assert found is not None and found["preprocess_cfg"] == {"std": 1}


def test_without_open_clip_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "cmcr-hf\[open-clip\]"'):
        named_config("ViT-B-32", "laion2b_s34b_b79k")


def test_weights_of_the_other_activation_are_refused_with_the_name_to_use() -> None:
    check_activation("ViT-B-32-quickgelu", "openai", {"quick_gelu": True}, {"quick_gelu": True})
    with pytest.raises(ValueError, match=r"Use ViT-B-32-quickgelu/openai\."):
        check_activation("ViT-B-32", "openai", {}, {"quick_gelu": True})
    with pytest.raises(ValueError, match=r"Use ViT-B-32/laion2b\."):
        check_activation("ViT-B-32-quickgelu", "laion2b", {"quick_gelu": True}, {})
