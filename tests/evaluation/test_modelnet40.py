import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from cmcr_hf.evaluation.labelled import LabelledSet
from cmcr_hf.evaluation.modelnet40 import CLASSES, TEMPLATES, load_modelnet40
from cmcr_hf.modeling.point_cloud_loading_cmcr import load_point_cloud


def clouds_of(data: LabelledSet) -> Iterator[np.ndarray]:
    """Read the clouds one by one."""
    return (load_point_cloud(item.value.fetch()) for item in data.items)


def test_there_are_forty_classes_in_the_order_of_the_alphabet() -> None:
    assert len(set(CLASSES)) == 40
    assert list(CLASSES) == sorted(CLASSES)
    assert (CLASSES[0], CLASSES[15], CLASSES[39]) == ("airplane", "flower_pot", "xbox")


def test_there_are_sixty_four_different_templates() -> None:
    assert len(set(TEMPLATES)) == len(TEMPLATES) == 64
    assert all(template.count("{}") == 1 for template in TEMPLATES)
    assert TEMPLATES[0] == "a point cloud of one {}."
    assert "the {} as a mesh." in TEMPLATES


# The layout of meshes


def mesh(height: float, first: str = "OFF\n") -> str:
    """A box of 2 x 1 on the ground of x and y, as high as wanted in z, around (5, 5, 5)."""
    corners = [(x + 5, y + 5, z + 5) for x in (-1, 1) for y in (-0.5, 0.5) for z in (-height / 2, height / 2)]
    faces = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    rows = [f"{first}{len(corners)} {len(faces)} 0", *(" ".join(map(str, corner)) for corner in corners)]
    return "\n".join([*rows, *("4 " + " ".join(map(str, face)) for face in faces), ""])


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mesh a class and split, two airplanes to test, of which one has the first line that some files have."""
    folder = tmp_path_factory.mktemp("ModelNet40")
    for index, name in enumerate(CLASSES):
        for split in ("train", "test"):
            (folder / name / split).mkdir(parents=True)
            (folder / name / split / f"{name}_0001.off").write_text(mesh(1 + index))
    (folder / "airplane" / "test" / "airplane_0002.off").write_text(mesh(6, first="OFF"))
    (folder / "airplane" / "test" / ".DS_Store").write_bytes(b"\0")
    return folder


def test_meshes_are_listed_by_class_and_name(meshes: Path) -> None:
    split = load_modelnet40(meshes, max_points=8)
    assert len(split.items) == 41
    assert split.labels == [[0], *([label] for label in range(40))]
    assert split.words[CLASSES.index("night_stand")] == ["night stand"]
    assert [item.key for item in islice(split.items, 3)] == [
        "airplane/test/airplane_0001.off",
        "airplane/test/airplane_0002.off",
        "bathtub/test/bathtub_0001.off",
    ]
    assert len(load_modelnet40(str(meshes), "train").items) == 40
    assert load_modelnet40(meshes, limit=2).labels == [[0], [0]]


def test_meshes_become_centred_clouds_with_y_up(meshes: Path) -> None:
    for cloud in clouds_of(load_modelnet40(meshes)):
        assert cloud.shape == (10_000, 3)
        assert cloud.dtype == np.float32
        assert np.abs(cloud.mean(axis=0)).max() < 1e-6
        assert np.linalg.norm(cloud, axis=1).max() == pytest.approx(1, abs=1e-6)
    # The second airplane is 2 wide, 1 deep and 6 high.
    cloud = next(islice(clouds_of(load_modelnet40(meshes)), 1, None))
    assert np.ptp(cloud, axis=0) / np.ptp(cloud[:, 0]) == pytest.approx(np.array([1, 3, 0.5]), rel=0.01)


def test_turning_a_mesh_upright_does_not_mirror_it(meshes: Path) -> None:
    path = meshes / "airplane" / "test" / "airplane_0001.off"
    cloud = next(clouds_of(load_modelnet40(meshes, max_points=50)))
    upright = load_point_cloud(path, max_points=50, normalize=True)
    rotation = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])
    assert np.linalg.det(rotation) == pytest.approx(1)
    assert np.array_equal(cloud, upright @ rotation.T.astype(np.float32))


def test_the_seed_and_the_number_of_points_reach_the_meshes(meshes: Path) -> None:
    splits = [load_modelnet40(meshes, max_points=20, seed=seed) for seed in (0, 0, 1)]
    assert splits[0].items.fingerprint == splits[1].items.fingerprint != splits[2].items.fingerprint
    first = [next(clouds_of(split)) for split in splits]
    assert first[0].shape == (20, 3)
    assert np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], first[2])


def test_files_are_read_one_by_one(meshes: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / name / "test").mkdir(parents=True)
        (tmp_path / name / "test" / "1.off").write_text(mesh(1) if name == "airplane" else "damaged")
    clouds = clouds_of(load_modelnet40(tmp_path))
    assert next(clouds).shape == (10_000, 3)
    with pytest.raises(ValueError, match=r"bathtub/test/1\.off"):
        next(clouds)


def test_a_split_may_be_read_again(meshes: Path) -> None:
    split = load_modelnet40(meshes, max_points=5)
    first, second = (list(clouds_of(split)) for _ in range(2))
    assert np.array_equal(first, second)


def test_a_folder_without_the_data_set_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.off file of 40 classes, such as 'airplane'") as caught:
        load_modelnet40(tmp_path)
    assert "modelnet40_ply_hdf5_2048.zip" in str(caught.value)
    assert "ModelNet40.zip (modelnet.cs.princeton.edu)" in str(caught.value)


def test_a_class_that_is_missing_is_named(meshes: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        if name != "sofa":
            (tmp_path / name).symlink_to(meshes / name)
    with pytest.raises(ValueError, match="of 1 classes, such as 'sofa'"):
        load_modelnet40(tmp_path)


def test_an_unknown_split_is_an_error(meshes: Path) -> None:
    with pytest.raises(ValueError, match="'train' or 'test' of ModelNet40, got 'validation'"):
        load_modelnet40(meshes, "validation")


# The layout of clouds


def write_h5(path: Path, data: np.ndarray, label: np.ndarray) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=data, compression="gzip")
        file.create_dataset("label", data=label, compression="gzip")


CLOUDS = np.random.default_rng(0).random((75, 30, 3), dtype=np.float32) * [1, 2, 3] + 4
LABELS = np.arange(75) % 40


@pytest.fixture
def clouds(tmp_path: Path) -> Path:
    """The test split in two files, the first of more rows than are read at once."""
    (tmp_path / "shape_names.txt").write_text("\n".join(CLASSES) + "\n")
    names = [f"data/modelnet40_ply_hdf5_2048/ply_data_test{number}.h5" for number in (0, 1)]
    (tmp_path / "test_files.txt").write_text("\n".join(names) + "\n")
    write_h5(tmp_path / "ply_data_test0.h5", CLOUDS[:70], LABELS[:70, None].astype(np.uint8))
    write_h5(tmp_path / "ply_data_test1.h5", CLOUDS[70:], LABELS[70:, None].astype(np.uint8))
    return tmp_path


def test_clouds_of_h5_files_are_listed_in_their_order(clouds: Path) -> None:
    split = load_modelnet40(clouds)
    assert len(split.items) == 75
    assert split.labels == [[label] for label in LABELS.tolist()]
    keys = [item.key for item in split.items]
    assert len(set(keys)) == 75
    assert keys[69:72] == ["ply_data_test0/0069", "ply_data_test1/0000", "ply_data_test1/0001"]


def test_clouds_of_h5_files_are_centred_and_scaled(clouds: Path) -> None:
    for cloud, source in zip(clouds_of(load_modelnet40(clouds)), CLOUDS, strict=True):
        assert np.array_equal(cloud, load_point_cloud(source, normalize=True))
        assert np.linalg.norm(cloud, axis=1).max() == pytest.approx(1, abs=1e-6)


def test_a_larger_cloud_is_thinned_out(clouds: Path) -> None:
    cloud = next(clouds_of(load_modelnet40(clouds, max_points=10, seed=3)))
    assert np.array_equal(cloud, load_point_cloud(CLOUDS[0], max_points=10, normalize=True, seed=3))


def test_one_row_of_labels_is_enough(clouds: Path) -> None:
    write_h5(clouds / "ply_data_test1.h5", CLOUDS[:2], np.array([39, 0]))
    assert load_modelnet40(clouds).labels[70:] == [[39], [0]]


@pytest.mark.parametrize(
    ("data", "label", "message"),
    [
        (CLOUDS[:2], np.array([0, 40]), "labels other than 0 to 39"),
        (CLOUDS[:2], np.array([0, -1]), "labels other than 0 to 39"),
        (CLOUDS[:2], np.array([0.0, 1.0]), "labels other than 0 to 39"),
        (CLOUDS[:2], np.array([0]), r"data of shape \(2, 30, 3\) and label of shape \(1,\)"),
        (CLOUDS[:2, :, :2], np.array([0, 1]), r"data of shape \(2, 30, 2\)"),
        (CLOUDS[0], np.arange(30), r"data of shape \(30, 3\)"),
    ],
)
def test_h5_files_of_another_kind_are_refused(clouds: Path, data: np.ndarray, label: np.ndarray, message: str) -> None:
    write_h5(clouds / "ply_data_test1.h5", data, label)
    with pytest.raises(ValueError, match=rf"ply_data_test1\.h5, got {message}"):
        load_modelnet40(clouds)


def test_a_file_that_declares_too_much_is_refused_before_it_is_read(clouds: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(clouds / "ply_data_test1.h5", "w") as file:
        file.create_dataset("data", (2, 10**9, 3), np.float32, chunks=(1, 1000, 3))
        file.create_dataset("label", data=np.array([0, 1]))
    with pytest.raises(ValueError, match=r"data of shape \(2, 1000000000, 3\)"):
        load_modelnet40(clouds)


def test_a_cloud_that_is_not_finite_is_named(clouds: Path) -> None:
    data = CLOUDS[:2].copy()
    data[1, 3, 2] = np.nan
    write_h5(clouds / "ply_data_test1.h5", data, np.array([0, 1]))
    with pytest.raises(ValueError, match=r"Row 1 of .*ply_data_test1\.h5: Expected finite coordinates"):
        list(clouds_of(load_modelnet40(clouds)))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("ply_data_test1.h5", lambda path: path.unlink(), r"There is no file .*ply_data_test1\.h5, which .* Unpack"),
        ("test_files.txt", lambda path: path.unlink(), r"test_files\.txt.*has to hold shape_names\.txt"),
        ("test_files.txt", lambda path: path.write_bytes(b"\xff\xfe"), r"Cannot read .*test_files\.txt"),
        (
            "shape_names.txt",
            lambda path: path.write_text("airplane\nsofa\n"),
            r"shape_names\.txt.*\['airplane', 'sofa'\]",
        ),
    ],
)
def test_a_damaged_folder_is_named(clouds: Path, name: str, damage: Callable[[Path], object], message: str) -> None:
    damage(clouds / name)
    with pytest.raises(ValueError, match=message):
        load_modelnet40(clouds)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:900], "truncated file"),
        (lambda content: content[:-1], "truncated file"),
        (lambda content: b"text", "file signature not found"),
        (lambda content: b"", "file signature not found"),
        (lambda content: bytes(64) + content[64:], "file signature not found"),
        (lambda content: content[:96] + bytes(64) + content[160:], "Unable to"),
        (lambda content: content.replace(b"label", b"lapel"), "object 'label' doesn't exist"),
    ],
)
def test_an_h5_file_that_is_damaged_cut_off_or_none_is_named_with_the_remedy(
    clouds: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    path = clouds / "ply_data_test1.h5"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="it is damaged, cut off or no HDF5 with data and label ") as caught:
        load_modelnet40(clouds)
    told = str(caught.value)
    assert reason in told and "\n" not in told
    assert told.startswith(f"Cannot read {path}: ")
    assert told.endswith(" Unpack modelnet40_ply_hdf5_2048.zip anew.")


def test_a_cloud_whose_bytes_are_damaged_is_an_unreadable_item(clouds: Path) -> None:
    path = clouds / "ply_data_test1.h5"
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "r") as file:
        place = file["data"].id.get_chunk_info(0).byte_offset
    content = path.read_bytes()
    path.write_bytes(content[:place] + bytes(20) + content[place + 20 :])
    items = list(load_modelnet40(clouds).items)
    assert load_point_cloud(items[0].value.fetch()).shape == (30, 3)
    with pytest.raises(ValueError, match=r"Cannot read .*ply_data_test1\.h5: it is damaged"):
        items[70].value.fetch()


def test_without_h5py_the_install_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shape_names.txt").write_text("\n".join(CLASSES))
    (tmp_path / "test_files.txt").write_text("ply_data_test0.h5\n")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'pip install "cmcr-hf\[3d\]"'):
        load_modelnet40(tmp_path)
