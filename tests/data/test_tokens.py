from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ablate.config import DataConfig
from ablate.data import corpus, tokens, worker
from ablate.data.tokens import SPLITS, Split, prepare
from ablate.errors import UserError
from tests.data.conftest import data_config, make_documents, write_jsonl


def documents_of(split: Split) -> list[str]:
    """The split's texts, checking that an end-of-text stands where the offsets say."""
    offsets = split.doc_offsets
    assert (split.tokens[offsets] == 256).all()
    assert offsets[-1] == split.n_tokens == len(split.tokens) - 1
    texts = [
        bytes(split.tokens[a + 1 : b].astype(np.uint8)).decode()
        for a, b in itertools.pairwise(offsets)
    ]
    assert [len(text.encode()) for text in texts] == split.doc_bytes.tolist()
    return texts


def test_every_document_is_in_one_split_by_its_content(data: DataConfig, texts: list[str]) -> None:
    splits = {name: documents_of(split) for name, split in prepare(data).splits.items()}
    assert sorted(itertools.chain(*splits.values())) == sorted(texts)
    assert splits["train"] == [text for text in texts if text in set(splits["train"])]
    assert all(8 <= len(splits[name]) <= 36 for name in ("val_a", "val_b"))
    for name in ("val_a", "val_b"):  # a random order: a first part of it is a fair sample
        hashes = [corpus.document_hash(text.encode()) for text in splits[name]]
        assert hashes == sorted(hashes)


def test_duplicates_land_on_the_same_side(tmp_path: Path) -> None:
    texts = make_documents(100)
    path = write_jsonl(tmp_path / "t.jsonl", texts + texts[::-1])
    splits = prepare(data_config(tmp_path, source="files", path=str(path))).splits
    sides = [set(documents_of(split)) for split in splits.values()]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 100


def test_reopening_reads_no_text_and_a_changed_text_is_another_token_set(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(data)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_build", lambda *_: pytest.fail("built again"))
        again = prepare(data)
    assert again.fingerprint == first.fingerprint
    assert (again.splits["train"].tokens == first.splits["train"].tokens).all()
    with Path(str(data.path)).open("a") as file:
        file.write('{"text": "one more"}\n')
    assert prepare(data).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "change",
    [{"val_share": 0.2}, {"max_bytes": 20_000}, {"tokenizer": {"kind": "bpe", "vocab_size": 300}}],
)
def test_what_changes_the_tokens_changes_the_name(
    tmp_path: Path, data: DataConfig, change: dict[str, object]
) -> None:
    other = data_config(tmp_path, source="files", path=data.path, **change)
    assert prepare(other).fingerprint != prepare(data).fingerprint


def test_what_does_not_change_the_tokens_does_not(tmp_path: Path, data: DataConfig) -> None:
    other = data_config(tmp_path, source="files", path=data.path, seq_len=8, reset_documents=True)
    assert prepare(other).folder == prepare(data).folder


@pytest.mark.parametrize("file", ["train.bin", "val_b.offsets.npy", "meta.json"])
@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
def test_a_damaged_cache_is_built_again_and_says_so(
    data: DataConfig, file: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare(data)
    want = {name: split.tokens.copy() for name, split in first.splits.items()}
    path = first.folder / file
    raw = path.read_bytes()
    if how == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "flip":
        middle = len(raw) // 2
        path.write_bytes(raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :])
    else:
        path.unlink()
    capsys.readouterr()
    again = prepare(data)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "damaged" in said
    for name in SPLITS:
        assert (again.splits[name].tokens == want[name]).all()


def test_a_build_that_was_killed_leaves_nothing_that_is_taken_for_whole(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tokens.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(data)
    assert prepare(data).splits["train"].n_docs > 100


def test_text_that_changes_while_it_is_read_is_refused(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = corpus.read_chunks

    def meddle(files: tuple[Path, ...]) -> object:
        yield from real(files)
        with files[0].open("a") as file:
            file.write('{"text": "late"}\n')

    monkeypatch.setattr(corpus, "read_chunks", meddle)
    with pytest.raises(UserError, match="changed while"):
        prepare(data)


def test_processes_give_the_same_as_one(
    tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = prepare(data)
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(tokens, "_PARALLEL_BYTES", 0)
    two = prepare(data.model_copy(update={"cache": str(tmp_path / "other"), "workers": 2}))
    assert two.fingerprint == one.fingerprint
    for name in SPLITS:
        assert (one.folder / f"{name}.bin").read_bytes() == (
            two.folder / f"{name}.bin"
        ).read_bytes()


def test_a_process_hands_its_mistake_on_and_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.jsonl"
    write_jsonl(path, make_documents(50))
    with path.open("a") as file:
        file.write("no json\n")
    started = []
    real = worker._start
    monkeypatch.setattr(worker, "_start", lambda *a: started.append(real(*a)) or started[-1])
    monkeypatch.setattr(tokens, "_PARALLEL_BYTES", 0)
    with pytest.raises(UserError, match="line 51 "):
        prepare(data_config(tmp_path, source="files", path=str(path), workers=2))
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_two_processes_at_once_build_once(data: DataConfig) -> None:
    code = (
        "import sys, json; from ablate.config import DataConfig; from ablate.data import prepare;"
        "from ablate.data import tokens; real = tokens._build;"
        "tokens._build = lambda *a: (print('built'), real(*a));"
        "prepare(DataConfig.model_validate(json.loads(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, json.dumps(data.model_dump())]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert "".join(outputs).count("built") == 1


def test_max_bytes_stops_after_the_document_that_reaches_it(
    tmp_path: Path, texts: list[str], data: DataConfig
) -> None:
    limited = data_config(tmp_path, source="files", path=data.path, max_bytes=20_000)
    found = set(itertools.chain(*map(documents_of, prepare(limited).splits.values())))
    assert found == set(texts[: len(found)])
    sizes = [len(text.encode()) for text in texts[: len(found)]]
    assert sum(sizes[:-1]) < 20_000 <= sum(sizes)


def test_given_validation_files_are_the_validation_and_leave_the_training_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, held = make_documents(100), make_documents(20, seed=1)
    text = write_jsonl(tmp_path / "t.jsonl", texts + held[:5])
    val = write_jsonl(tmp_path / "v.jsonl", held)
    data = data_config(tmp_path, source="files", path=str(text), val_a_path=str(val))
    token_set = prepare(data)
    splits = {name: set(documents_of(split)) for name, split in token_set.splits.items()}
    assert splits["val_a"] == set(held)
    assert splits["train"] | splits["val_b"] == set(texts)
    assert 3 <= len(splits["val_b"]) <= 25
    assert token_set.meta["dropped_documents"] == 5
    assert "left out 5 documents" in capsys.readouterr().err
    other = tmp_path / f"other-{val.name}"
    other.write_bytes(val.read_bytes())
    both = data_config(
        tmp_path,
        source="files",
        path=str(text),
        val_a_path=str(val),
        val_b_path=str(other),
    )
    splits = {name: set(documents_of(split)) for name, split in prepare(both).splits.items()}
    assert splits == {"train": set(texts), "val_a": set(held), "val_b": set(held)}


def test_a_split_without_documents_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a single document")
    data = data_config(tmp_path, source="files", path=str(tmp_path / "one.txt"))
    told = r"data.path.*validation.*a .txt file is one.*data.val_a_path"
    with pytest.raises(UserError, match=told):
        prepare(data)
    assert not list((tmp_path / "cache" / "tokens").glob("*/meta.json"))


def test_large_vocabularies_take_four_bytes(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens.Tokenizer, "dtype", np.uint32)
    token_set = prepare(data)
    assert token_set.splits["train"].tokens.dtype == np.uint32
    documents_of(token_set.splits["train"])


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, data: DataConfig) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache"):
        prepare(data.model_copy(update={"cache": str(tmp_path / "file" / "cache")}))


@pytest.mark.parametrize("most", [100, 6000])  # bytes that a file may have
def test_a_full_disk_names_the_file_and_the_field(
    tmp_path: Path, data: DataConfig, most: int
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))  # refused as by a full disk
    try:
        with pytest.raises(UserError, match=r"data\.cache: .*/\w+\.bin cannot be written \(File"):
            prepare(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]


def test_a_disk_that_is_full_at_the_end_names_the_file_and_the_field(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: object, array: np.ndarray) -> None:
        raise OSError(f"{array.size} requested and 0 written")  # as NumPy says it, without a number

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"data\.cache: .*offsets\.npy cannot be written \(\d+ req"):
        prepare(data)


def test_files_left_out_are_told_where_the_text_is_built_or_asked_for(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    write_jsonl(folder / "t.jsonl", texts)
    (folder / "t.parquet").write_bytes(b"x")
    config = data_config(tmp_path, source="files", path=str(folder))
    line = f"1 file of another kind is left out of '{folder}' (.parquet 1)\n"
    for tell, told in ((False, line), (False, ""), (True, line)):
        prepare(config, tell=tell)
        assert capsys.readouterr().err == told


def test_head_counts_whole_documents() -> None:
    split = Split("s", np.zeros(31, np.uint16), np.array([0, 10, 20, 30]), np.array([9, 9, 9]))
    assert [split.head(n) for n in (None, 1, 10, 19, 20, 29, 30, 99)] == [3, 1, 1, 1, 2, 2, 3, 3]


def test_the_bar_goes_to_stderr_only(data: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(data, progress=True)
    assert capsys.readouterr().out == ""
