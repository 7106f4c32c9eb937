import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import warnings
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Return what git tracks or would track, links included, or skip the test outside a git checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"The files of the project are listed by git, which gave: {error}")
    return sorted({Path(name) for name in listed.split("\0") if name and os.path.lexists(ROOT / name)})


def build(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out), str(source)]
    subprocess.run(command, cwd=out, capture_output=True, check=True)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def test_wheel_built_from_the_sdist_equals_the_wheel_built_from_the_checkout(
    sdist: Path, wheel: Path, tmp_path: Path
) -> None:
    command = [
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(sdist),
    ]
    subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, check=True)
    (rebuilt,) = tmp_path.iterdir()
    assert rebuilt.name == wheel.name
    assert rebuilt.read_bytes() == wheel.read_bytes()


def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path, tracked: list[Path]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"cmcr_hf-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"cmcr_hf", info}
    packed = {name for name in names if name.startswith("cmcr_hf/")}
    assert packed == {path.as_posix() for path in tracked if path.parts[0] == "cmcr_hf"}
    assert {"cmcr_hf/__init__.py", "cmcr_hf/py.typed", "cmcr_hf/conversion/MODEL_CARD.md"} <= packed
    assert f"{info}/licenses/LICENSE" in names


def test_wheel_holds_the_text_of_the_model_card(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("cmcr_hf/conversion/MODEL_CARD.md") == (ROOT / "MODEL_CARD.md").read_bytes()


@pytest.fixture(scope="module")
def imported(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Import the wheel in a fresh environment away from the checkout; return that and what was printed."""
    tmp_path = tmp_path_factory.mktemp("imported")
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    install = ["-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, *install], cwd=tmp_path, capture_output=True, check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")

    code = (
        "import torch; print(torch.get_float32_matmul_precision()); "
        "import cmcr_hf, cmcr_hf.training.embed, importlib.metadata as m; print(cmcr_hf.__file__); "
        "print(m.version('cmcr-hf')); "
        "print(m.entry_points(group='console_scripts', name='cmcr')['cmcr'].load().__module__); "
        "print(torch.get_float32_matmul_precision())"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return environment, done.stdout.splitlines()


def test_wheel_imports_in_a_fresh_environment_away_from_the_checkout(imported: tuple[Path, list[str]]) -> None:
    environment, (_, *printed, _) = imported
    (packages,) = environment.glob("lib/python*/site-packages")
    assert printed == [str(packages / "cmcr_hf" / "__init__.py"), PROJECT["version"], "cmcr_hf.cli"]
    assert (environment / "bin" / "cmcr").is_file()


def test_importing_the_package_changes_no_setting_of_torch(imported: tuple[Path, list[str]]) -> None:
    _, (before, *_, after) = imported
    assert after == before == "highest"


@pytest.mark.slow
def test_wheel_works_with_the_dependencies_it_declares_and_no_more(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    install = ["-m", "pip", "install", "-c", str(ROOT / "constraints.txt"), "torch", str(wheel)]
    subprocess.run([python, *install], cwd=tmp_path, capture_output=True, check=True)
    subprocess.run([python, "-m", "pip", "check"], cwd=tmp_path, capture_output=True, check=True)
    helped = subprocess.run([environment / "bin" / "cmcr", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    assert helped.stdout.startswith("usage: cmcr")


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("modeling", "cmcr_hf/modeling"),
        ("conversion", "cmcr_hf/conversion"),
        ("cmcr_hf/conversion/MODEL_CARD.md", "../../MODEL_CARD.md"),
    ],
)
def test_link_is_relative_and_leads_somewhere(link: str, target: str) -> None:
    assert os.readlink(ROOT / link) == target
    assert (ROOT / link).exists()


def test_sdist_leaves_out_the_links_at_the_top(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames()}
    assert {"cmcr_hf", "MODEL_CARD.md", "LICENSE", "pyproject.toml"} <= tops
    assert not {"modeling", "conversion"} & tops


@pytest.mark.parametrize(
    "pattern",
    [
        rb"(?<![\w.~}])/(?:home|root|work|farm|tmp|opt|mnt|media|Users)/[A-Za-z]",
        rb"pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|deb\.debian\.org|download\.pytorch\.org",
    ],
    ids=["path of one machine", "registry host"],
)
def test_no_file_names_a_place_of_its_own(pattern: bytes, tracked: list[Path]) -> None:
    files = [path for path in tracked if (ROOT / path).is_file() and not (ROOT / path).is_symlink()]
    texts = {str(path): content for path in files if b"\0" not in (content := (ROOT / path).read_bytes())}
    assert {name: match[0] for name, text in texts.items() if (match := re.search(pattern, text))} == {}


def test_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert citation["version"] == newest[1] == PROJECT["version"]


def test_installed_version_is_that_of_the_checkout() -> None:
    try:
        installed = importlib.metadata.version("cmcr-hf")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("cmcr-hf is not installed here: `make test` installs it.")
    assert installed == PROJECT["version"]


def test_constraints_pin_every_direct_dependency_within_its_floor() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = [Requirement(text) for text in [*PROJECT["dependencies"], *extras["train"], *extras["dev"]]]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    own = {canonicalize_name(PROJECT["name"])}
    for requirement in wanted:
        if canonicalize_name(requirement.name) not in own:
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), str(requirement)


def test_a_warning_from_our_own_modules_is_an_error_here() -> None:
    with pytest.raises(UserWarning, match="ours"):
        warnings.warn_explicit("ours", UserWarning, "x.py", 1, module="cmcr_hf.training.store")


def test_a_warning_from_another_package_is_no_error_here() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn_explicit("theirs", UserWarning, "x.py", 1, module="cmcr_hf_neighbour")
    assert [str(warning.message) for warning in caught] == ["theirs"]
