from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ablate.config import DataConfig
from ablate.data import tokenizer as tok
from ablate.data.corpus import sources
from ablate.data.tokenizer import Tokenizer
from ablate.errors import UserError
from tests.data.conftest import data_config, make_documents, write_jsonl


def load(data: DataConfig) -> Tokenizer:
    return tok.load(data, sources(data)["text"])


def bpe(tmp_path: Path, **fields: object) -> DataConfig:
    path = tmp_path / "text.jsonl"
    if not path.exists():
        write_jsonl(path, make_documents(100))
    return data_config(
        tmp_path,
        source="files",
        path=str(path),
        tokenizer={"kind": "bpe", "vocab_size": 300},
        **fields,
    )


TEXT = "naïve ☃ 12345 +3.14\n\tx <|endoftext|> \x00"


def test_bytes() -> None:
    tokenizer = Tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.decode([*TEXT.encode(), 256]) == TEXT
    (ids,) = tokenizer.encode_documents([TEXT], [TEXT.encode()])
    assert ids.tolist() == list(TEXT.encode())


def test_bpe_round_trips_splits_digits_and_reads_no_special_token_in_a_text(
    tmp_path: Path,
) -> None:
    tokenizer = load(bpe(tmp_path))
    assert tokenizer.vocab_size == 300
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.eos_id not in ids
    assert len(ids) < len(TEXT.encode())
    for number in ("12345", " 345 345"):
        pieces = [tokenizer.decode([i]) for i in tokenizer.encode(number)]
        assert all(sum(c.isdigit() for c in piece) <= 1 for piece in pieces)
    (batch,) = tokenizer.encode_documents([TEXT], [TEXT.encode()])
    assert batch.tolist() == ids


def test_bpe_is_trained_once_and_again_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = load(bpe(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(tok, "_train", lambda *_: pytest.fail("trained again"))
        assert load(bpe(tmp_path)).fingerprint == first.fingerprint
    (path,) = (tmp_path / "cache" / "tokenizers").glob("*.json")
    path.write_text(path.read_text()[:1000])
    capsys.readouterr()
    assert load(bpe(tmp_path)).fingerprint == first.fingerprint
    assert "damaged" in capsys.readouterr().err


def test_bpe_sees_at_most_the_sample_a_share_of_each_file_and_no_validation_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    for i in range(4):
        write_jsonl(folder / f"{i}.jsonl", make_documents(100, seed=i))
    data = data_config(tmp_path, source="files", path=str(folder))
    monkeypatch.setattr(tok, "SAMPLE_BYTES", 20_000)
    stats: dict[str, int] = {}
    sample = list(tok._sample(data, sources(data)["text"], stats))
    assert 20_000 <= stats["bytes"] < 21_000
    by_file = [sum(len(t) for t in sample if t.startswith(f"{i}-")) for i in range(4)]
    assert min(by_file) > 3000
    assert all(tok.side(data, tok.document_hash(t.encode())) == "train" for t in sample)
    monkeypatch.setattr(tok, "SAMPLE_BYTES", 10**9)
    whole = list(tok._sample(data, sources(data)["text"], stats))
    assert 280 < len(whole) < 360  # of 400, less a tenth in A and a tenth in B


def given(tmp_path: Path, special: str | None) -> DataConfig:
    path = tmp_path / "tokenizer.json"
    definition = json.loads(str(load(bpe(tmp_path)).definition))
    if special is None:
        definition["added_tokens"] = []
    else:
        definition["added_tokens"][0]["content"] = special
        vocab = definition["model"]["vocab"]
        vocab[special] = vocab.pop("<|endoftext|>")
    path.write_text(json.dumps(definition))
    return data_config(
        tmp_path,
        source="files",
        path=str(tmp_path / "text.jsonl"),
        tokenizer={"kind": "file", "path": str(path)},
    )


@pytest.mark.parametrize("special", ["<|endoftext|>", "</s>", "<|end_of_text|>"])
def test_a_given_tokenizer_finds_its_end_of_text(tmp_path: Path, special: str) -> None:
    tokenizer = load(given(tmp_path, special))
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (0, 300)
    assert 0 not in tokenizer.encode(f"a{special}b")


def test_a_given_tokenizer_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.tokenizer.path.*no end-of-text"):
        load(given(tmp_path, None))
    data = given(tmp_path, "</s>")
    path = Path(str(data.tokenizer.path))
    path.write_text("{}")
    with pytest.raises(UserError, match=r"data.tokenizer.path.*not a tokenizer.json"):
        load(data)
    os.unlink(path)
    with pytest.raises(UserError, match=r"data.tokenizer.path.*No such file"):
        load(data)
