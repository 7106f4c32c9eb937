from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sources(tiny_clip: Path, tiny_clap: Path, tiny_ulip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `--sources`, with tiny ones."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for name, source in (("clip", tiny_clip), ("clap", tiny_clap), ("ulip", tiny_ulip)):
        (folder / name).symlink_to(source)
    return folder
