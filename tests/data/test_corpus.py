from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from ablate.config import DataConfig
from ablate.data import corpus
from ablate.data.corpus import documents, fingerprint, read_chunks, sources
from ablate.errors import UserError
from tests.data.conftest import data_config, make_documents, write_jsonl


def texts_of(source: corpus.Source) -> list[str]:
    return [
        text for chunk in read_chunks(source.files) for text, _ in documents(chunk, source.lenient)
    ]


def test_stdlib_is_found_without_site_packages_and_in_a_stable_order() -> None:
    source = sources(DataConfig())["text"]
    names = [str(file) for file in source.files]
    assert any(name.endswith("/json/decoder.py") for name in names)
    assert not any("site-packages" in name or "_sysconfigdata" in name for name in names)
    assert source.files == sources(DataConfig())["text"].files
    assert len(names) > 300


def test_a_folder_is_read_recursively_in_order_with_every_kind(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "c.txt").write_text("text")
    (folder / "b" / "x.md").write_text("# mark")
    (folder / ".git" / "no.txt").write_text("hidden")
    (folder / "no.csv").write_text("other")
    write_jsonl(folder / "a.jsonl", ["one", "two"])
    write_jsonl(folder / "d.jsonl.zst", ["three", "snow ☃"])
    source = sources(data_config(tmp_path, source="files", path=str(folder)))["text"]
    assert texts_of(source) == ["one", "two", "# mark", "text", "three", "snow ☃"]


def test_capitals_are_read_and_other_kinds_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    config = data_config(tmp_path, source="files", path=str(folder))
    plain = sources(config)["text"]
    assert plain.left_out == ()
    before = fingerprint(plain, tmp_path / "cache")
    for name in ("b.txt.gz", "c.txt.gz", "d.parquet", "README", ".hidden.gz"):
        (folder / name).write_bytes(b"x")
    os.mkfifo(folder / "pipe.txt")  # read, it would wait for ever
    source = sources(config)["text"]
    assert source.files == plain.files
    assert fingerprint(source, tmp_path / "cache") == before
    assert source.left_out == (
        f"5 files of other kinds are left out of '{folder}' "
        "(.gz 2, .parquet 1, pipes and the like 1, without a suffix 1)",
    )
    (folder / "B.TXT").write_text("two")
    write_jsonl(folder / "c.JSONL", ["three"])
    write_jsonl(folder / "d.jsonl.zst", ["four"]).rename(folder / "d.Jsonl.Zst")
    assert texts_of(sources(config)["text"]) == ["two", "one", "three", "four"]


def test_a_list_and_a_glob_keep_their_order(tmp_path: Path) -> None:
    for name in ("1", "2", "3"):
        (tmp_path / f"{name}.txt").write_text(name)
    path = [str(tmp_path / "3.txt"), str(tmp_path / "[12].txt")]
    source = sources(data_config(tmp_path, source="files", path=path))["text"]
    assert texts_of(source) == ["3", "1", "2"]


def test_chunks_cut_jsonl_at_line_ends_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 256)
    texts = [*make_documents(50, words=3), "long " * 300, "last"]
    plain = write_jsonl(tmp_path / "a.jsonl", texts)
    packed = write_jsonl(tmp_path / "a.jsonl.zst", texts)
    assert corpus.text_bytes([packed]) == 3 * packed.stat().st_size
    two_frames = tmp_path / "b.jsonl.zst"
    two_frames.write_bytes(packed.read_bytes() * 2)
    for file, want in ((plain, texts), (packed, texts), (two_frames, texts * 2)):
        chunks = list(read_chunks([file]))
        assert len(chunks) > 3 or file != plain
        assert [text for chunk in chunks for text, _ in documents(chunk)] == want
        assert sum(chunk.disk_bytes for chunk in chunks) == file.stat().st_size


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        (b'{"text": "a"}\n\n{"text": 3}\n', "line 3"),
        (b'{"text": "a"}\n["text"]\n', "line 2"),
        (b'{"text": "a"}\n{"text": "b"', "line 2"),
        (b'{"text": "\xff"}\n', "line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"bad.jsonl.*{words}"):
        list(documents(next(read_chunks([path]))))


def test_line_numbers_count_over_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 64)
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "abcdefgh"}\n' * 40 + "{}\n" + '{"text": "abcdefgh"}\n' * 40)
    chunks = list(read_chunks([path]))
    assert len(chunks) > 3
    with pytest.raises(UserError, match="line 41 "):
        [list(documents(chunk)) for chunk in chunks]


def test_text_that_is_not_utf8_is_an_error_for_a_user_and_skipped_in_the_stdlib(
    tmp_path: Path,
) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "ok.txt").write_text("naïve")
    chunk = next(read_chunks([tmp_path / "latin.txt", tmp_path / "ok.txt"]))
    with pytest.raises(UserError, match=r"latin.txt.*not UTF-8"):
        list(documents(chunk))
    assert [text for text, _ in documents(chunk, lenient=True)] == ["naïve"]


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x\\ud800y"}\n')
    assert list(documents(next(read_chunks([path])))) == [("x?y", b"x?y")]


def test_a_cut_zst_file_is_an_error_not_a_shorter_corpus(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    raw = json.dumps({"text": os.urandom(200_000).hex()}).encode()
    whole = zstandard.compress(raw)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"not a whole \.zst"):
        list(read_chunks([path]))
    path.write_bytes(b"not zst at all, whatever its name")
    with pytest.raises(UserError, match=r"not a whole \.zst"):
        list(read_chunks([path]))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("missing", "no file or folder"),
        ("empty", "holds no"),
        ("a.csv", "not one of the kinds"),
        ([], "empty list"),
    ],
)
def test_bad_paths_are_named(tmp_path: Path, path: str | list[str], words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("x")
    full = str(tmp_path / path) if isinstance(path, str) else path
    with pytest.raises(UserError, match=f"data.path.*{words}"):
        sources(data_config(tmp_path, source="files", path=full))
    good = tmp_path / "good.txt"
    good.write_text("x")
    with pytest.raises(UserError, match=f"data.val_a_path.*{words}"):
        sources(data_config(tmp_path, source="files", path=str(good), val_a_path=full))


def test_given_validation_files_are_not_training_files(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    for name in ("train", "val"):
        (folder / f"{name}.txt").write_text(name)
    data = data_config(
        tmp_path, source="files", path=str(folder), val_a_path=str(folder / "val.txt")
    )
    found = sources(data)
    assert texts_of(found["text"]) == ["train"]
    assert texts_of(found["val_a"]) == ["val"]


class TestFingerprint:
    def source(self, folder: Path) -> corpus.Source:
        return corpus.Source("t", tuple(sorted(folder.iterdir())))

    def folder(self, path: Path) -> Path:
        path.mkdir()
        for i in range(3):
            (path / f"{i}.txt").write_text(f"content {i}")
            os.utime(path / f"{i}.txt", (1, 1))
        return path

    def test_depends_on_content_not_on_the_place(self, tmp_path: Path) -> None:
        one, two = self.folder(tmp_path / "one"), self.folder(tmp_path / "two")
        cache = tmp_path / "cache"
        first = fingerprint(self.source(one), cache)
        assert fingerprint(self.source(two), cache) == first
        (two / "1.txt").write_text("content x")
        assert fingerprint(self.source(two), cache) != first

    def test_the_index_is_used_and_still_right(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, cache = self.folder(tmp_path / "t"), tmp_path / "cache"
        now = time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda: now + 10_000_000_000)
        first = fingerprint(self.source(folder), cache)
        with monkeypatch.context() as patch:
            patch.setattr(
                corpus.hashlib, "file_digest", lambda *_: pytest.fail("a file is hashed again")
            )
            assert fingerprint(self.source(folder), cache) == first
        # same size, and the modification time put back: the change time tells
        (folder / "1.txt").write_text("content 7")
        os.utime(folder / "1.txt", (1, 1))
        assert fingerprint(self.source(folder), cache) != first

    def test_a_file_changed_just_now_is_not_remembered(self, tmp_path: Path) -> None:
        folder, cache = self.folder(tmp_path / "t"), tmp_path / "cache"
        fingerprint(self.source(folder), cache)
        assert not (cache / "files").exists()


def test_the_package_of_the_workers_imports_no_torch() -> None:
    code = "import sys, ablate.data.worker; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
