"""Recall documents: deterministic, solvable from the text alone, and lm-eval tasks for anyone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ablate.evaluate
from ablate.errors import UserError
from ablate.evaluate import recall

TASKS = Path(ablate.evaluate.__file__).parent / "tasks"
SMALL = {
    "phonebook": {"entries": [4, 9], "items": 6},
    "phonebook_reversed": {"entries": [4, 9], "items": 6},
    "passkey": {"lengths": [300, 600], "depths": 3, "items": 2},
    "needle": {"lengths": [700], "depths": 3, "items": 2},
    "mqar_text": {"pairs": [3, 6], "lengths": [250], "items": 3, "queries": 2},
    "induction": {"lengths": [100, 200], "items": 4},
    "copying": {"words": [3, 6], "items": 4},
}


def solve(task: str, prompt: str) -> str:
    """The answer, by reading the prompt as a person would."""
    if task.startswith("phonebook"):
        name = prompt.rsplit("\n", 1)[1].rstrip(":")
        return re.search(rf"^{name}: (\d+)$", prompt, re.M)[1]
    if task == "passkey":
        return re.search(r"The pass key is (\d+)\.", prompt)[1]
    if task == "needle":
        key = re.search(r"What (?:is|are) the numbers? of (\w+)\?", prompt)[1]
        return ", ".join(re.findall(rf"numbers? of {key} is (\d+)\.", prompt))
    if task == "copying":
        return prompt.split("\n")[0].split(" ", 1)[1]
    words = prompt.split()
    return words[words.index(words[-1]) + 1]


@pytest.mark.parametrize(
    ("task", "sizes"),
    [
        ("phonebook", {"entries": [10**9]}),
        ("phonebook", {"items": 10**9}),
        ("needle", {"keys": 10**6}),
        ("mqar_text", {"pairs": [10**6], "lengths": [10**6]}),
    ],
)
def test_sizes_that_no_memory_holds_are_refused(task, sizes):
    with pytest.raises(UserError, match=r"1 to 1000000|too large"):
        recall.check(task, "byte", sizes)


@pytest.mark.parametrize("task", recall.DEFAULTS)
def test_documents_hold_their_answer_and_depend_on_the_seed_alone(task):
    one = recall.make(task, tokenizer="byte", **SMALL[task])
    assert one == recall.make(task, tokenizer="byte", **SMALL[task])
    other = recall.make(task, tokenizer="byte", seed=1, **SMALL[task])
    assert not {d["prompt"] for d in one} & {d["prompt"] for d in other}
    assert len({d["prompt"] for d in one}) == len(one)
    for d in one:
        assert solve(task, d["prompt"]) == d["target"]
        assert recall.score(d, f" {d['target']}\nmore")["exact_match"] == 1.0
        assert recall.score(d, " x")["exact_match"] == 0.0
        assert d["tokens"] == len(d["prompt"])
        assert d["target"] not in d["others"]


@pytest.mark.parametrize("task", ["passkey", "needle", "mqar_text"])
def test_length_is_tokens_and_never_more(task):
    for d in recall.make(task, tokenizer="byte", **SMALL[task]):
        length = d["x"] if task != "mqar_text" else 250
        assert length - 130 < d["tokens"] <= length


def test_depth_is_where_the_needle_is():
    for d in recall.make("passkey", tokenizer="byte", lengths=[3000], depths=5, items=3):
        at = d["prompt"].index("The pass key is") / d["prompt"].rindex("\n\n")
        assert at == pytest.approx(d["depth"], abs=0.06)


def test_several_values_in_any_order():
    d = recall.make("needle", lengths=[1000], depths=1, items=1, values=3)[0]
    numbers = d["target"].split(", ")
    assert solve("needle", d["prompt"]).split(", ").sort() == numbers.sort()
    assert recall.score(d, " " + ", ".join(reversed(numbers)) + ".")["exact_match"] == 1.0
    half = recall.score(d, f" {numbers[1]}, 00000")
    assert (half["exact_match"], half["recalled"]) == (0.0, pytest.approx(1 / 3))


def test_digit_accuracy_by_place():
    d = recall.make("phonebook", entries=[3], items=1)[0]
    wrong = str((int(d["target"][0]) + 1) % 10) + d["target"][1:]
    scores = recall.score(d, f" {wrong}\n")
    assert scores["digit_1"] == 0.0
    assert scores["digit_10"] == 1.0
    assert scores["digit_accuracy"] == pytest.approx(0.9)
    assert recall.score(d, f" {d['target']}7")["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("task", "sizes", "named"),
    [
        ("phonebook", {"entries": [2]}, "entries is 2"),
        ("phonebook", {"entries": 20}, "entries is 20"),
        ("passkey", {"items": 0}, "items is 0"),
        ("mqar_text", {"pairs": [64], "lengths": [100]}, "length 100"),
        ("passkey", {"seed": -1}, "seed is -1"),
        ("induction", {"lengths": [9]}, "no room for three words"),
        ("passkey", {"lengths": [7]}, "length 7 has no room for a number and the question"),
        ("needle", {"lengths": [60]}, "length 60 has no room for 8 numbers"),
        ("induction", {"lengths": [7]}, "no room for three words"),
    ],
)
def test_mistakes_are_one_sentence(task, sizes, named):
    with pytest.raises(UserError, match=named):
        recall.make(task, **sizes)


def test_merged_digits_are_refused_unless_asked_for(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    inner.train_from_iterator(["0123456789 9988776655"] * 9, trainer)
    path = tmp_path / "tokenizer.json"
    inner.save(str(path))
    with pytest.raises(UserError, match="merges digits"):
        recall.make("phonebook", tokenizer=str(path), entries=[3], items=1)
    assert recall.make("phonebook", tokenizer=str(path), digit_tokens="any", entries=[3], items=1)


def test_a_dataset_is_made_without_pickling(monkeypatch):
    import datasets

    sizes = {"lengths": [400], "depths": 2, "items": 1}
    documents = recall.make("needle", seed=3, tokenizer="byte", **sizes)
    wanted = datasets.Dataset.from_list(documents)

    def unpicklable(*_):
        raise AssertionError("pickled")

    monkeypatch.setattr(datasets.fingerprint.Hasher, "update", unpicklable)
    made = [
        recall.dataset("needle", seed=seed, tokenizer="byte", **sizes)["test"] for seed in (3, 3, 4)
    ]
    assert made[0].features == wanted.features
    assert made[0].to_list() == wanted.to_list() == documents
    assert made[0]._fingerprint == made[1]._fingerprint != made[2]._fingerprint


def test_lm_eval_alone_runs_the_tasks_on_a_transformers_model(hf_folder, tmp_path):
    """The README's line, as a user types it."""
    sizes = {"entries": [3, 5], "items": 4, "lengths": [150], "depths": 2}
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"),
        *("--model_args", f"pretrained={hf_folder}", "--batch_size", "8"),
        *("--include_path", str(TASKS), "--tasks", "phonebook,passkey"),
        *("--metadata", json.dumps(sizes), "--output_path", str(tmp_path), "--log_samples"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline})
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]
    assert {"exact_match@entries=3,none", "digit_10,none"} <= set(results["phonebook"])
    assert (
        results["passkey"]["exact_match@length=150,none"] == results["passkey"]["exact_match,none"]
    )
    lines = next(tmp_path.rglob("samples_phonebook_*.jsonl")).read_text().splitlines()
    assert len(lines) == 8
