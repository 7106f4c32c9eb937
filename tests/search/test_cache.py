import hashlib
import os
import time

import numpy as np
import pytest

from cmcr_hf.search import cache
from cmcr_hf.search.cache import FileDigests, VectorCache, batches


def key(number):
    return bytes([number]) * 32


def vectors(*numbers):
    """One vector of width 3 for each number, which is its first element."""
    return [(key(number), np.array([number, 0, 1], np.float32)) for number in numbers]


def shards(folder):
    return sorted(folder.glob("shard-*.safetensors"))


def test_vectors_are_there_for_the_next_process(tmp_path):
    VectorCache(tmp_path / "new").add(vectors(3, 1))
    found = VectorCache(tmp_path / "new")
    assert key(3) in found and key(2) not in found
    assert found.vector(key(1)).tolist() == [1, 0, 1]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [shards(tmp_path / "new")[0].name]


def test_scores_are_inner_products_in_the_order_of_the_rows(tmp_path):
    found = VectorCache(tmp_path)
    for numbers in ([3, 1], [7], [5]):
        found.add(vectors(*numbers))
    scores = found.scores(np.array([2, 0, 1], np.float32))
    assert {number: scores[found.row(key(number))] for number in (1, 3, 5, 7)} == {1: 3, 3: 7, 5: 11, 7: 15}
    again = VectorCache(tmp_path)
    assert again.scores(np.array([2, 0, 1], np.float32))[again.row(key(5))] == 11


def test_many_small_files_become_one_and_keep_every_vector(tmp_path):
    found = VectorCache(tmp_path)
    for number in range(cache.MAX_SMALL_SHARDS + 1):
        found.add(vectors(number))
    found.merge()
    assert len(shards(tmp_path)) == 1
    for reader in (found, VectorCache(tmp_path)):
        assert [reader.vector(key(number))[0] for number in range(9)] == list(range(9))


def test_full_files_are_left_alone_by_a_merge(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_ROWS", 4)
    found = VectorCache(tmp_path)
    found.add(vectors(50, 51, 52, 53))
    (full,) = shards(tmp_path)
    before = full.stat().st_ino
    for number in range(9):
        found.add(vectors(number))
    found.merge()
    assert full.stat().st_ino == before
    assert sorted(len(rows) for rows in found._shards.values()) == [1, 4, 4, 4]
    assert found.vector(key(52))[0] == 52 and found.vector(key(8))[0] == 8


def test_a_merge_drops_what_is_not_wanted_once_it_is_the_larger_part(tmp_path):
    found = VectorCache(tmp_path)
    found.add(vectors(1, 2, 3, 4))
    found.merge({key(1), key(2)})
    assert key(4) in found
    found.merge({key(3)})
    assert key(3) in found and key(4) not in found
    assert found.vector(key(3)).tolist() == [3, 0, 1]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: b"", "it is cut off"),
        (lambda data: data[:20], "it is cut off"),
        (lambda data: data[:-5], "its size is not the one it declares"),
        (lambda data: data.replace(b'"F32"', b'"I32"'), "its size is not the one it declares"),
        (lambda data: data.replace(b'"keys"', b'"kids"'), "'keys'"),
        (lambda data: data[:8] + b"[" * len(data[8:]), "is damaged"),
        (lambda data: data.replace(b"[2,3]", b"[3,2]").replace(b"[2,32]", b"[2,32]"), "its size"),
    ],
    ids=["empty", "header", "rows", "type", "name", "no JSON", "shape"],
)
def test_a_damaged_file_is_removed_with_a_warning_and_the_rest_stays(tmp_path, damage, told):
    found = VectorCache(tmp_path)
    found.add(vectors(1, 2))
    (path,) = shards(tmp_path)
    found.add(vectors(9))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=told):
        found = VectorCache(tmp_path)
    assert key(9) in found and key(1) not in found
    assert not path.exists()


def test_a_file_of_another_width_is_removed_with_a_warning(tmp_path):
    VectorCache(tmp_path).add([(key(1), np.ones(4, np.float32))])
    other = VectorCache(tmp_path / "other")
    other.add(vectors(2))
    (path,) = shards(tmp_path / "other")
    path.rename(tmp_path / "shard-zzzz.safetensors")
    with pytest.warns(UserWarning, match="its vectors are of width 3"):
        found = VectorCache(tmp_path)
    assert key(1) in found and key(2) not in found


def test_two_processes_add_and_merge_without_losing_a_vector(tmp_path):
    first, second = VectorCache(tmp_path), VectorCache(tmp_path)
    for number in range(10):
        first.add(vectors(number))
        second.add(vectors(number if number < 5 else number + 20))
    first.merge()
    second.merge()
    found = VectorCache(tmp_path)
    assert all(found.vector(key(number))[0] == number for number in [*range(10), *range(25, 30)])


def test_a_file_that_vanishes_while_the_cache_is_read_is_looked_for_again(tmp_path, monkeypatch):
    VectorCache(tmp_path).add(vectors(1))
    whole, calls = cache._map_shard, []

    def vanishing(path):
        calls.append(path)
        if len(calls) == 1:
            raise FileNotFoundError(path)
        return whole(path)

    monkeypatch.setattr(cache, "_map_shard", vanishing)
    assert key(1) in VectorCache(tmp_path)


def test_a_kill_while_a_file_is_written_leaves_no_half_of_it(tmp_path, monkeypatch):
    found = VectorCache(tmp_path)
    found.add(vectors(1))

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            found.add(vectors(2))
    found = VectorCache(tmp_path)
    assert key(1) in found and key(2) not in found


def test_leftovers_of_killed_processes_are_removed_when_they_are_old(tmp_path):
    fresh, old = tmp_path / ".shard-a.safetensors.1f.tmp", tmp_path / "shard-b.safetensors.2f"
    for path in (fresh, old, tmp_path / ".shard-c.safetensors.3f.tmp"):
        path.write_bytes(b"half")
    for path in (old, tmp_path / ".shard-c.safetensors.3f.tmp"):
        os.utime(path, (time.time() - 7200,) * 2)
    VectorCache(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [fresh.name]


def test_an_unchanged_file_is_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "dog.wav"
    path.write_bytes(b"bark")
    digests = FileDigests(tmp_path / "files.json")
    expected = digests.digest("dog", path, path.stat())
    assert expected == hashlib.sha256(b"bark").hexdigest()
    digests.save()
    monkeypatch.setattr(cache, "sha256", lambda path: pytest.fail("read again"))
    assert FileDigests(tmp_path / "files.json").digest("dog", path, path.stat()) == expected


def test_a_file_whose_time_was_set_back_is_read_again(tmp_path):
    path = tmp_path / "dog.wav"
    path.write_bytes(b"bark")
    digests = FileDigests(tmp_path / "files.json")
    before, status = digests.digest("dog", path, path.stat()), path.stat()
    path.write_bytes(b"woof")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digests.digest("dog", path, path.stat()) != before


def test_a_remark_holds_until_the_file_changes(tmp_path):
    path = tmp_path / "dog.wav"
    path.write_bytes(b"bark")
    digests = FileDigests(tmp_path / "files.json")
    digests.digest("dog", path, path.stat())
    digests.set_remark("dog", "no sound")
    digests.save()
    digests = FileDigests(tmp_path / "files.json")
    digests.digest("dog", path, path.stat())
    assert digests.remark("dog") == "no sound"
    path.write_bytes(b"louder")
    digests.digest("dog", path, path.stat())
    assert digests.remark("dog") is None


def test_forgotten_are_the_files_that_were_not_asked_for(tmp_path):
    path = tmp_path / "dog.wav"
    path.write_bytes(b"bark")
    digests = FileDigests(tmp_path / "files.json")
    for name in ("a", "b"):
        digests.digest(name, path, path.stat())
    digests.save()
    digests = FileDigests(tmp_path / "files.json")
    digests.digest("b", path, path.stat())
    digests.save(forget=True)
    assert list(FileDigests(tmp_path / "files.json")._entries) == ["b"]


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": 5}', b"\xff"])
def test_a_damaged_record_of_files_starts_anew_with_a_warning(tmp_path, content):
    (tmp_path / "files.json").write_bytes(content)
    with pytest.warns(UserWarning, match="files.json is damaged"):
        digests = FileDigests(tmp_path / "files.json")
    path = tmp_path / "dog.wav"
    path.write_bytes(b"bark")
    digests.digest("dog", path, path.stat())
    digests.save()
    assert list(FileDigests(tmp_path / "files.json")._entries) == ["dog"]


def test_nothing_is_written_where_nothing_changed(tmp_path):
    FileDigests(tmp_path / "new" / "files.json").save()
    VectorCache(tmp_path / "new").add([])
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        VectorCache(tmp_path / "file" / "folder").add(vectors(1))


def test_batches_end_with_a_shorter_one():
    assert list(batches("abcde", 2)) == ["ab", "cd", "e"]
