import base64
import errno
import io
import os

import jinja2
import numpy as np
import pytest
import soundfile
from PIL import Image

from cmcr_hf.durable import WriteError
from cmcr_hf.pages.page import PAGE_RATE, picture_uri, remove_page, render, sound_uri, write_page


def content(uri, kind):
    head, _, body = uri.partition(",")
    assert head == f"data:{kind};base64"
    return io.BytesIO(base64.b64decode(body))


def test_a_page_forbids_every_request():
    page = render("page.html.jinja", {})
    policy = page.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"


def test_a_name_that_the_context_lacks_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="recipe"):
        render("report.html.jinja", {})


def test_a_thumbnail_is_the_square_in_the_middle():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    thumbnail = Image.open(content(picture_uri(image, 32), "image/jpeg"))
    assert thumbnail.size == (32, 32)
    assert np.abs(np.asarray(thumbnail, dtype=int) - (0, 0, 255)).max() < 8


def test_a_sound_is_cut_mixed_down_and_keeps_its_pitch(tmp_path):
    time = np.arange(3 * 44100) / 44100
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "tone.wav", np.stack([tone, tone], 1), 44100)
    waveform, rate = soundfile.read(content(sound_uri(tmp_path / "tone.wav", seconds=1), "audio/mpeg"))
    assert rate == PAGE_RATE and waveform.ndim == 1
    # MP3 pads to whole frames.
    assert 1 <= len(waveform) / rate < 1.2
    assert np.abs(np.fft.rfft(waveform[:rate])).argmax() == pytest.approx(440, abs=1)


def test_media_are_the_same_bytes_every_time(tmp_path):
    soundfile.write(tmp_path / "noise.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 8000), 8000)
    assert sound_uri(tmp_path / "noise.wav") == sound_uri(tmp_path / "noise.wav")
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    assert picture_uri(image) == picture_uri(image)


def test_a_page_that_the_disk_has_no_room_for_leaves_nothing_of_itself(tmp_path, monkeypatch):
    def fill_disk(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fill_disk)
    with pytest.raises(WriteError, match="No space left on device"):
        write_page(tmp_path / "report.html", "<html></html>")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encode", [picture_uri, sound_uri])
def test_an_unreadable_file_is_named(tmp_path, encode):
    (tmp_path / "broken.bin").write_bytes(b"neither picture nor sound")
    with pytest.raises(ValueError, match=r"broken\.bin"):
        encode(tmp_path / "broken.bin")


def test_a_libsndfile_without_mp3_is_named(tmp_path, monkeypatch):
    def unsupported(*arguments, **options):
        raise soundfile.LibsndfileError(1)

    soundfile.write(tmp_path / "tone.wav", np.full(800, 0.1), 8000)
    monkeypatch.setattr(soundfile, "write", unsupported)
    with pytest.raises(ImportError, match="Cannot write MP3"):
        sound_uri(tmp_path / "tone.wav")


def test_a_page_is_written_whole_in_a_new_folder(tmp_path):
    write_page(tmp_path / "new" / "page.html", "<p>é</p>")
    assert (tmp_path / "new" / "page.html").read_bytes() == "<p>é</p>".encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_a_file_name_that_is_not_utf_8_does_not_stop_the_page(tmp_path):
    write_page(tmp_path / "page.html", "<p>\udcff.wav</p>")
    assert (tmp_path / "page.html").read_text() == "<p>?.wav</p>"


def test_a_page_of_ours_is_removed_and_no_other(tmp_path):
    write_page(tmp_path / "ours.html", render("page.html.jinja", {}))
    (tmp_path / "theirs.html").write_text("<!doctype html><title>mine</title>")
    for name in ("ours.html", "theirs.html", "missing.html"):
        remove_page(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.html"]
