"""Small folders in the layouts of the localisation data sets, their sounds and pictures synthetic."""

import json
from collections.abc import Iterable
from pathlib import Path

from tests.media import RATE, chord, encode_audio, patchwork


def write_media(folder: Path, pictures: Iterable[str], sounds: Iterable[str]) -> None:
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    (folder / "audio").mkdir(exist_ok=True)
    # None like another that is there.
    first = len(list((folder / "frames").iterdir()))
    for row, name in enumerate(pictures, first):
        patchwork(seed=row).save(folder / "frames" / f"{name}.jpg")
    for row, name in enumerate(sounds, first):
        (folder / "audio" / f"{name}.wav").write_bytes(encode_audio(chord(RATE // 4, seed=row)))


VGG_SS = {
    "zpWuikVorYg_000032": [[0.4, 0.25, 0.6, 0.75]],
    "ORaz32CQ29k_000130": [[0.12, 0.17, 0.6, 0.85], [0.76, 0.27, 0.98, 0.56]],
    # Boxes out of the picture and without area, as in the release.
    "-d1KR2BSfHM_000065": [[-0.05, 0.1, 0.7, 1.2]],
    "M1P1xla8rg0_000000": [[0.26875, 1.0, 0.753125, 1.0]],
}


def write_vgg_ss(folder: Path) -> Path:
    write_media(folder, VGG_SS, VGG_SS)
    entries = [{"file": name, "class": f"class {row % 2}", "bbox": VGG_SS[name]} for row, name in enumerate(VGG_SS)]
    (folder / "vggss.json").write_text(json.dumps(entries))
    return folder


def write_extended_vgg_ss(folder: Path) -> Path:
    write_vgg_ss(folder)
    silent = ["9PmzQI8ZYpg_000147", "dYQ-nXyfhho_000007", "vfIylWPACmg_000008"]
    write_media(folder, silent, silent)
    rows = ["video,audio,label", *(f"{name},{name},non-sounding" for name in silent)]
    (folder / "vggss_test_plus_silent.csv").write_text("\n".join(rows))
    return folder


FLICKR = {
    "10000130166": [[32, 32, 128, 256], [32, 32, 128, 224], [0, 0, 256, 256]],
    "10007936344": [[0, 0, 64, 64], [64, 0, 128, 64], [0, 0, 128, 64]],
    "10008553263": [[100, 100, 200, 200], [120, 100, 220, 200], [110, 90, 210, 190]],
}


def annotation(boxes: list[list[int]]) -> str:
    names = ("xmin", "ymin", "xmax", "ymax")
    parts = [
        f"<annotator><bbox><id>{row}</id>"
        + "".join(f"<{name}>{value}</{name}>" for name, value in zip(names, box, strict=False))
        + "</bbox></annotator>"
        for row, box in enumerate(boxes)
    ]
    return f"<annotation>{''.join(parts)}</annotation>"


def write_flickr_soundnet(folder: Path) -> Path:
    write_media(folder, FLICKR, FLICKR)
    (folder / "Annotations").mkdir()
    for name, boxes in FLICKR.items():
        (folder / "Annotations" / f"{name}.xml").write_text(annotation(boxes))
    # Annotated for training, so not in the list of the test.
    (folder / "Annotations" / "999.xml").write_text(annotation([[0, 0, 256, 256]]))
    (folder / "flickr_test.csv").write_text("\n".join(f"{name},{row}" for row, name in enumerate(FLICKR)))
    return folder


def write_extended_flickr_soundnet(folder: Path) -> Path:
    write_flickr_soundnet(folder)
    names = list(FLICKR)
    rows = [f"{name},{other},non-sounding" for name, other in zip(names, names[1:] + names[:1], strict=True)]
    (folder / "flickr_test_plus_silent.csv").write_text("\n".join(["video,audio,label", *rows]))
    return folder


MUSIC = {
    "9XoXQXCVUQY_000_00000": ("saxophone", [0.43, 0.14, 0.14, 0.77]),
    "9XoXQXCVUQY_000_00007": ("saxophone", [0.43, 0.15, 0.13, 0.77]),
    "9XoXQXCVUQY_001_00030": ("saxophone", [0.25, 0.5, 0.5, 0.25]),
    "-_-TDDxoaAc_000_00000": ("cello", [0.33, 0.12, 0.23, 0.85]),
}


def write_music(folder: Path) -> Path:
    write_media(folder, MUSIC, dict.fromkeys(name.rpartition("_")[0] for name in MUSIC))
    entries = [{"file": name, "class": label, "bbox": box} for name, (label, box) in MUSIC.items()]
    (folder / "music_solo.json").write_text(json.dumps(entries))
    return folder
