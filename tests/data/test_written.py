"""Recall documents in training rows: their own templates, their share, what is scored."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ablate.config import DataConfig, WrittenConfig
from ablate.data.tokenizer import Tokenizer
from ablate.data.written import _KINDS, document, written_count, written_rows
from ablate.errors import UserError
from ablate.evaluate import recall

BYTE = Tokenizer("byte")


def data(**fields):
    return DataConfig(seq_len=512, recall=WrittenConfig(share=0.5, **fields))


@pytest.mark.parametrize("kind", _KINDS)
def test_answers_stand_in_the_text_before_them(kind):
    for row in range(20):
        pieces = document(0, row, 0, data(kinds=[kind]))
        so_far = ""
        answers = 0
        for text, answer in pieces:
            if answer:
                answers += 1
                assert text.strip() in so_far
                question = re.split(r"\n|\] ", so_far)[-1].removeprefix("So ").rstrip(" /")
                assert question in so_far[: -len(question)] or kind == "copying"
            so_far += text
        assert answers >= 1


@pytest.mark.parametrize("each", [0.25, 1.0, 2.5])
def test_every_entry_is_asked_before_any_is_asked_again(each):
    for row in range(20):
        pieces = document(0, row, 0, data(kinds=["phonebook"], entries=[8, 8], questions=each))
        answers = [text for text, answer in pieces if answer and any(map(str.isdigit, text))]
        assert len(answers) == round(8 * each)
        assert len(set(answers[:8])) == min(8, len(answers))


@pytest.mark.parametrize("kind", _KINDS)
def test_the_end_of_an_answer_is_scored(kind):
    """Or a model that knows the number goes on after it."""
    for row in range(20):
        pieces = document(0, row, 0, data(kinds=[kind]))
        for (before, question), (_, answer), (end, ends) in zip(
            pieces, pieces[1:], pieces[2:], strict=False
        ):
            if answer and not question and before:
                assert ends
                assert not any(map(str.isalnum, end))


def test_entries_are_as_often_few_as_many():
    sizes = [
        document(0, row, 0, data(kinds=["phonebook"], entries=[4, 99]))[0][0].count("\n") - 1
        for row in range(400)
    ]
    assert min(sizes) == 4
    assert 90 < max(sizes) <= 99
    assert 0.4 < np.mean(np.array(sizes) < 20) < 0.6


def test_templates_are_not_those_of_the_tasks():
    marks = [": ", "The pass key", "The number of", "What is"]
    text = "".join(t for row in range(200) for t, _ in document(0, row, 0, data()))
    # a colon only inside the brackets of pairs, never after a name
    assert not re.search(r"^[A-Z]\w+ [A-Z]\w+: \d", text, re.M)
    assert not any(mark in text for mark in marks[1:])
    tasks = recall.make("phonebook", entries=[5], items=5)
    assert all(re.search(r"^[A-Z]\w+ [A-Z]\w+: \d{10}$", d["prompt"], re.M) for d in tasks)


@pytest.mark.parametrize("scored", ["answers", "all"])
def test_rows(scored):
    config = data(scored=scored)
    tokens, targets, starts = written_rows(3, np.arange(6), config, BYTE)
    assert tokens.shape == targets.shape == starts.shape == (6, 512)
    again = written_rows(3, np.array([4]), config, BYTE)
    assert (again[0][0] == tokens[4]).all()
    assert not (written_rows(4, np.array([4]), config, BYTE)[0][0] == tokens[4]).all()
    kept = targets != -100
    assert (targets[:, :-1][kept[:, :-1]] == tokens[:, 1:][kept[:, :-1]]).all()
    assert 0.02 < kept.mean() < 0.6 if scored == "answers" else kept.all()
    for row, start in zip(tokens, starts, strict=True):
        assert (row[start] == BYTE.eos_id).all()
        assert set(np.flatnonzero(row == BYTE.eos_id)) == set(start)


def test_share_of_a_batch():
    assert written_count(data(), 8, 0) == 4
    with pytest.raises(UserError, match=r"data\.recall\.share=0\.5 of train\.batch_size=1"):
        written_count(DataConfig(recall=WrittenConfig(share=0.5)), 1, 0)
    with pytest.raises(UserError, match="leave no row of text"):
        written_count(data(), 8, 5)


def test_a_batch_has_its_rows(tmp_path):
    from ablate.data import TrainStream, prepare

    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"some plain text number {i}. " * 40)
    config = DataConfig(
        source="files",
        path=str(tmp_path),
        seq_len=64,
        val_share=0.2,
        workers=1,
        reset_documents=True,
        cache=str(tmp_path / "cache"),
        recall=WrittenConfig(share=0.25),
        mqar={"share": 0.25, "pairs": 2},
    )
    stream = TrainStream(prepare(config), config, batch_size=8, seed=0)
    assert stream.text_rows == 4
    batch = stream.batch(5)
    first = batch.tokens_BL[:, 0]
    whole = [bytes(r.tolist()).decode("latin1") for r in batch.tokens_BL % 256]
    assert sum("plain text" in text for text in whole) == 4
    assert (first == BYTE.eos_id).sum() >= 2
    assert (batch.tokens_BL == stream.batch(5).tokens_BL).all()
    assert not (batch.tokens_BL[-1] == stream.batch(6).tokens_BL[-1]).all()
    plain = config.model_copy(update={"recall": WrittenConfig()})
    text = TrainStream(prepare(plain), plain, batch_size=8, seed=0)
    assert text.text_rows == 6


@pytest.mark.parametrize(
    "fields", [{"kinds": []}, {"entries": [5]}, {"entries": [9, 3]}, {"entries": [0, 3]}]
)
def test_mistakes(fields):
    with pytest.raises(ValueError, match=r"recall\."):
        WrittenConfig(**fields)
