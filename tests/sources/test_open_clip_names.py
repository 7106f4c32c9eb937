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
