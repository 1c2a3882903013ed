"""Evaluation of a trial, of its folder afterwards, and of a transformers model."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

from ablate.config import EvaluateConfig, load
from ablate.errors import UserError
from ablate.evaluate import length, recall, suites
from ablate.evaluate.harness import TASKS, Skipped, _load, chance
from ablate.evaluate.local_data import NoLocalData, local_data
from ablate.evaluate.recall import first_answer
from ablate.evaluate.subjects import load as load_subject
from ablate.evaluate.trial import _judge_recall, check, command, evaluate, train_and_evaluate
from ablate.report.scores import tables
from ablate.run import RunFolder, read_json
from ablate.train.validation import uninformative


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """Rows as the benchmarks have them, of made words, in the layout of evaluate.local_data."""
    root = tmp_path_factory.mktemp("benchmarks")
    rng = random.Random(0)

    def words(n):
        return " ".join(rng.choice(["red", "green", "run", "walk", "one"]) for _ in range(n))

    def write(name, rows):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))

    piqa = [
        {"goal": words(4), "sol1": words(2), "sol2": words(3), "label": i % 2} for i in range(12)
    ]
    write("piqa/validation.jsonl", piqa)
    write("lambada_openai/test.jsonl", [{"text": f"{words(5)}\u2028{words(4)}"} for _ in range(5)])
    told = {"title": "Cats", "context": "The cat sat on a mat."}
    asked = [("Who sat?", ["the cat", "cat"]), ("Who stood?", []), ("On what?", ["a mat"])]
    squad = [
        {**told, "id": f"{i}", "question": q, "answers": {"text": a, "answer_start": [0] * len(a)}}
        for i, (q, a) in enumerate(4 * asked)
    ]
    write("squadv2/validation.jsonl", squad)
    for split, n in (("dev", 6), ("test", 2)):
        rows = [
            {
                "question": words(3),
                "subject": subject,
                "choices": [words(1), words(2), words(3), words(4)],
                "answer": i % 4,
            }
            for subject in _subjects()
            for i in range(n)
        ]
        write(f"mmlu/{split}.jsonl", rows)
    return root


def _subjects():
    from pathlib import Path

    import lm_eval
    import yaml

    folder = Path(lm_eval.__file__).parent / "tasks/mmlu/default"
    return [yaml.safe_load(p.read_text())["dataset_name"] for p in folder.glob("mmlu_*.yaml")]


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_folder):
    """A trained run folder whose trial evaluated recall, length and a benchmark."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text"
    text.mkdir()
    rng = random.Random(1)
    for i in range(40):
        words = [rng.choice(["red", "green", "run", "walk", "one"]) for _ in range(150)]
        (text / f"{i:02d}.txt").write_text(" ".join(words) + f" {i}\n")
    cfg = load(
        {
            "arch": {
                "pattern": "M-*-",
                "d_model": 16,
                "mamba2": {"d_state": 4, "head_dim": 8},
                "attention": {"head_dim": 8, "n_heads": 2},
            },
            "data": {
                "source": "files",
                "path": str(text),
                "seq_len": 64,
                "val_share": 0.2,
                "workers": 1,
                "allow_repeats": True,
                "cache": str(folder / "cache"),
            },
            "train": {"tokens": 4096, "batch_size": 4, "keep": "weights", "device": "cpu"},
            "evaluate": {
                "tokens": 400,
                "recall": ["phonebook"],
                "sizes": {"entries": [3, 4], "items": 3},
                "length": [1, 2, 4],
                "suites": ["piqa"],
                "local_data": str(data_folder),
            },
            "tracker": {"kind": "none"},
        }
    )
    place = RunFolder(folder / "key")
    result = train_and_evaluate(cfg, place)
    return place, result


def test_a_trial_evaluates_before_its_result(run):
    place, result = run
    assert set(result["evaluation"]) == {"phonebook", "length", "piqa-0shot"}
    assert result["seconds"]["evaluation"] > 0
    assert {"phonebook", "length", "piqa-0shot", "val_b"} <= set(place.evaluations())
    book = place.evaluation("phonebook")
    assert book["value"] == 0.0  # nothing was learnt in 16 steps
    assert book["verdict"] == "floor"
    assert set(book["cells"]) == {"entries=3", "entries=4"}
    assert book["fuzzy"]["wrong"] == 6
    items = book["items"]
    assert len(items["exact_match"]) == len(items["cluster"]) == 6
    piqa = place.evaluation("piqa-0shot")
    assert len(piqa["items"]["score"]) == 12
    assert piqa["value"] == pytest.approx(np.mean(piqa["items"]["score"]))


def test_length_scores_the_same_targets(run):
    place, _ = run
    content = place.evaluation("length")
    assert list(content["by_multiple"]) == ["1", "2", "4"]
    assert content["scored_tokens"] == 32
    assert content["by_position"]["last"][-1] == 64
    subject = load_subject(str(place.path), device="cpu")
    from ablate.data import prepare

    tree = load(place.config())
    documents = length.split_documents(prepare(tree.data).splits["val_b"])
    kept = [d for d in documents if len(d) >= 257]
    assert content["documents"] == len(kept)
    for multiple in (1, 4):
        ids = torch.from_numpy(kept[0][257 - multiple * 64 - 1 : 257].astype(np.int64))
        with torch.no_grad():
            log_p = subject.model.logits(ids[None, :-1])[0, :, :257].log_softmax(-1)
        expected = -log_p[torch.arange(multiple * 64), ids[1:]][-32:].mean()
        found = content["items"][str(multiple)][0]
        assert found == pytest.approx(float(expected), abs=1e-4)


def ask(*words):
    console = Console(file=io.StringIO(), width=160)
    code = command(list(words), tables, console)
    return code, console.file.getvalue()


def test_a_finished_folder_is_evaluated_again(run, data_folder):
    place, result = run
    code, said = ask(
        str(place.path), "recall=[passkey]", "suites=[lambada_openai,piqa@3,race]", "length=[]",
        "sizes={lengths: [200], items: 9, passkey: {depths: 2, items: 1}}",
        f"local_data={data_folder}", "device=cpu",
    )  # fmt: skip
    assert code == 0
    assert place.evaluation("passkey")["cells"]["length=200"]["items"] == 2
    assert "passkey" in said
    assert {"passkey", "lambada_openai-0shot", "piqa-3shot"} <= set(place.evaluations())
    assert "race-0shot" not in place.evaluations()
    assert place.evaluation("piqa-3shot")["notes"] == [
        "piqa: no training split here, shots come from validation"
    ]
    assert place.result() == result


def test_scores_that_others_replace_are_kept_aside(run, capsys):
    place, _ = run
    words = [str(place.path), "recall=[copying]", "length=[]", "suites=[]", "device=cpu"]
    before = []
    for items in (4, 4, 2):
        code, said = ask(*words, f"sizes={{words: [3], items: {items}}}")
        assert code == 0
        before.append(place.evaluation("copying"))
    assert "scores of copying so far are kept as" in said
    kept = list((place.path / "evaluation" / "earlier").glob("copying*"))
    assert [read_json(path) for path in kept] == [before[0]]  # equal ones are not kept twice
    assert len(place.evaluation("copying")["items"]["cell"]) == 2
    assert place.evaluations().count("copying") == 1


def test_squad_scores_each_document_without_a_script_of_the_hub(run, data_folder, monkeypatch):
    answers = ["The cat.", "A dog", "mat, or so"]

    def generate(self, requests, **_):
        return [answers[int(r.doc["id"]) % 3] for r in requests]

    monkeypatch.setattr("ablate.evaluate.adapter.SubjectLM.generate_until", generate)
    place, _ = run
    code, said = ask(
        str(place.path), "recall=[]", "length=[]", "suites=[squadv2]",
        f"local_data={data_folder}", "device=cpu",
    )  # fmt: skip
    assert code == 0
    content = place.evaluation("squadv2-0shot")
    assert content["items"]["score"] == pytest.approx(4 * [1.0, 0.0, 0.5])
    assert content["value"] == pytest.approx(0.5)
    assert content["metrics"]["exact,none"] == pytest.approx(1 / 3)
    assert len(set(content["items"]["cluster"])) == 1  # one text
    assert "50.00" in said


def test_a_task_whose_answers_do_not_fit_costs_itself_alone(run, data_folder, monkeypatch, capsys):
    def refuse(self, requests, **_):
        raise UserError("max_gen_toks is 256, not less than the model's 64")

    monkeypatch.setattr("ablate.evaluate.adapter.SubjectLM.generate_until", refuse)
    code, said = ask(
        str(run[0].path), "recall=[]", "length=[]", "suites=[squadv2,piqa]",
        f"local_data={data_folder}", "device=cpu",
    )  # fmt: skip
    assert code == 0
    assert "squadv2: skipped, max_gen_toks is 256" in capsys.readouterr().out
    assert "piqa" in said


def test_mmlu_in_three_forms(run, data_folder, capsys):
    place, _ = run
    code, _ = ask(
        str(place.path), "recall=[]", "length=[]", "suites=[mmlu,race]", "limit=1",
        f"local_data={data_folder}", "device=cpu",
    )  # fmt: skip
    assert code == 0
    assert "race: skipped, no " in capsys.readouterr().out
    forms = {n: place.evaluation(f"{n}-5shot") for n in ("mmlu", "mmlu_text", "mmlu_continuation")}
    assert all(len(form["items"]["id"]) == 57 for form in forms.values())
    found = [form["items"]["loglikelihoods"][0] for form in forms.values()]
    assert len({tuple(f) for f in found}) == 3


def test_weights_are_evaluated_without_the_text_they_were_trained_on(run, tmp_path):
    """Their tokenizer was made from it, and another text would make another one."""
    tree = run[0].config()
    text, cache = tmp_path / "text", tmp_path / "cache"
    shutil.copytree(tree["data"]["path"], text)
    tree["data"] |= {"path": str(text), "cache": str(cache)}
    tree["data"]["tokenizer"] = {"kind": "bpe", "vocab_size": 290}
    tree["train"]["tokens"] = 256
    tree["evaluate"] = {"tokens": 400}
    place = RunFolder(tmp_path / "key")
    train_and_evaluate(load(tree), place)
    shutil.rmtree(text)
    shutil.rmtree(cache)
    words = ["recall=[phonebook]", "sizes={entries: [3], items: 2}", "device=cpu"]
    assert ask(str(place.path), *words)[0] == 0
    with pytest.raises(UserError, match=r"data\.path"):
        command([str(place.path), "length=[1]", "recall=[]"], tables)

    kept = place.path / "tokenizer.json"
    whole = kept.read_text()
    kept.write_text(whole[:100])
    with pytest.raises(UserError, match=r"its tokenizer\.json cannot be read"):
        command([str(place.path), *words], tables)
    other = json.loads(whole)
    first = other["added_tokens"][0]
    other["added_tokens"] += [{**first, "id": 300 + i, "content": f"<{i}>"} for i in range(60)]
    kept.write_text(json.dumps(other))
    with pytest.raises(UserError, match="do not fit its config and tokenizer: embedding is"):
        command([str(place.path), *words], tables)
    kept.write_text(whole)
    weights = place.checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match="its weights cannot be read"):
        command([str(place.path), *words], tables)


def test_a_transformers_model_and_its_length(hf_folder, tmp_path):
    """Recall beyond what it reads is said to be cut, loss beyond its positions refused."""
    sizes = "sizes={entries: [3, 40], items: 2, lengths: [120], depths: 1}"
    code, said = ask(str(hf_folder), "recall=[phonebook,passkey]", sizes, f"out={tmp_path}")
    assert code == 0
    assert "longer than the model reads: phonebook entries=40\n" in said
    kept = json.loads((tmp_path / "evaluation" / "phonebook.json").read_text())["cells"]
    assert [kept[f"entries={n}"]["cut"] for n in (3, 40)] == [0, 2]
    code, said = ask(str(hf_folder), "recall=[phonebook]", sizes, "max_length=100")
    assert "longer than the model reads: phonebook entries=3, phonebook entries=40\n" in said
    text = tmp_path / "long.txt"
    text.write_text("some words of a text " * 200)
    words = ["recall=[]", f"long_documents={text}", "max_length=64"]
    code, said = ask(str(hf_folder), "length=[1,2,4]", *words)
    assert code == 0
    assert "256" in said
    with pytest.raises(UserError, match="8 times 64 tokens are more than the 256 positions"):
        command([str(hf_folder), "length=[8]", *words], tables)
    with pytest.raises(UserError, match="max_length is 512, but the model has 256 positions"):
        command([str(hf_folder), "max_length=512"], tables)


def test_transformers_models_that_cannot_be_loaded(hf_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def damaged(name, file, content):
        folder = tmp_path / name
        shutil.copytree(hf_folder, folder)
        (folder / file).write_text(content)
        return str(folder)

    config = json.loads((hf_folder / "config.json").read_text())
    classes = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    own = damaged(
        "own", "config.json", json.dumps({**config, "model_type": "mine", "auto_map": classes})
    )
    code = [
        "from transformers import GPT2Config, GPT2LMHeadModel",
        "class MineConfig(GPT2Config):",
        "    model_type = 'mine'",
        "class Mine(GPT2LMHeadModel):",
        "    config_class = MineConfig",
    ]
    (tmp_path / "own" / "mine.py").write_text("\n".join(code))
    for target, named in (
        ("nobody/nothing", r"cannot be loaded \(HF_HUB_OFFLINE is set\)"),
        (damaged("weights", "model.safetensors", "no weights"), "weights' cannot be loaded"),
        (damaged("config", "config.json", "{"), "config' cannot be loaded"),
        (damaged("kind", "config.json", '{"model_type": "nothing"}'), "kind' cannot be loaded"),
        (damaged("tokens", "tokenizer.json", "{"), "tokens' cannot be loaded"),
        (own, "remote_code=true would run"),
    ):
        with pytest.raises(UserError, match=named) as raised:
            command([target, "recall=[induction]"], tables)
        assert "\n" not in str(raised.value)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    assert load_subject(own, device="cpu", remote_code=True).positions == 256


def test_a_passkey_found_every_time_is_at_no_floor():
    items = [{"target": "12345", "others": []}] * 20
    assert chance("passkey", items) == 0.0
    assert chance("needle", [{"target": "1", "others": ["2", "3", "4"]}]) == 0.25
    assert chance("needle_multivalue", [{"target": "1, 2", "others": ["3", "4"]}]) == 1 / 6


def test_a_transformers_model_from_a_folder(hf_folder, tmp_path):
    code, said = ask(
        str(hf_folder), "recall=[phonebook]", "sizes={entries: [3], items: 2}", f"out={tmp_path}"
    )
    assert code == 0
    assert "entries=3" in said
    content = json.loads((tmp_path / "evaluation" / "phonebook.json").read_text())
    assert content["cells"]["entries=3"]["items"] == 2


def test_a_run_folder_that_cannot_be_written_is_told_first(run, tmp_path, monkeypatch):
    place, _ = run
    shutil.copytree(place.path, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    (tmp_path / "run" / "evaluation").write_text("in the way")
    monkeypatch.setattr("ablate.evaluate.trial.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"cannot write to '.*run' \(File exists\)"):
        command([str(tmp_path / "run"), "recall=[induction]"], tables)


def test_weights_that_were_not_kept(run, tmp_path):
    place, _ = run
    other = RunFolder(tmp_path / "other")
    other.create(place.config())
    with pytest.raises(UserError, match=r"'.*other' has not finished, .* out=FOLDER keeps"):
        command([str(other.path)], tables)
    with pytest.raises(UserError, match=r"train\.keep=weights"):
        command([str(other.path), f"out={tmp_path / 'scores'}"], tables)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "needs a run folder"),
        (["x", "recal=[]"], "did you mean 'recall'"),
        (["x", "recall=[phonebok]"], "phonebok"),
        (["x", "suites=[smal]"], "did you mean 'small'"),
        (["x", "suites=[piqa@many]"], "piqa@many"),
        (["x", "sizes={entrie: 3}"], "did you mean 'entries'"),
        (["x", "sizes={needle: {item: 3}}"], "did you mean 'items'"),
        (["x", "sizes={needle: 3}"], "'needle' is a task"),
        (["x", "length=[0]"], "length"),
        (["x", "limit=0"], "limit"),
        (["x", "local_data=/nowhere"], "/nowhere"),
        (["x", "long_documents=/nowhere"], "/nowhere"),
        (["x", "device=tpu"], "tpu"),
        (["x", "max_length=1"], "max_length is 1; it must be a whole number"),
        (["x", "remote_code=maybe"], "it must be true or false"),
        (["x", "out=/proc/nowhere"], "cannot write to '/proc/nowhere'"),
        (["x", "out=[a]"], "it must be a folder"),
        (["x", "limit"], "has no value"),
        (["x", "recall=["], "'recall=\\[' cannot be read as name=value"),
        (["x", "sizes={needle:{item:3}}"], "did you mean 'items'"),  # as it is written elsewhere
    ],
)
def test_mistakes_are_one_sentence(words, named):
    with pytest.raises(UserError, match=named) as raised:
        command(words, tables)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_no_model(run, tmp_path):
    with pytest.raises(UserError, match="neither a run folder"):
        load_subject(str(tmp_path))
    with pytest.raises(UserError, match="there is no folder 'runs/study/key'"):
        load_subject("runs/study/key")
    study = run[0].path.parent
    with pytest.raises(UserError, match=r"is a study's folder: give one of its runs, .*/key"):
        load_subject(str(study))


def test_caches_are_made_for_few_shapes(run, monkeypatch):
    """On a GPU each is captured, which takes longer than most batches."""
    from lm_eval.api.instance import Instance

    from ablate.evaluate import subjects
    from ablate.evaluate.adapter import SubjectLM

    made = []

    class Counted(subjects.Decoder):
        def __init__(self, model, batch, room, **options):
            made.append((batch, room))
            super().__init__(model, batch, room, **options)

    monkeypatch.setattr(subjects, "Decoder", Counted)
    subject = load_subject(str(run[0].path), device="cpu")
    lm = SubjectLM(subject, batch_tokens=4096, quiet=True)
    options = {"until": ["\n"], "max_gen_toks": 2, "do_sample": False}
    lm.max_length = 1 << 20
    requests = [Instance("generate_until", {}, ("x" * (9 * i), options), i) for i in range(1, 120)]
    assert len(lm.generate_until(requests)) == 119
    assert len(made) <= 5
    assert all(batch * room <= 4 * 4096 for batch, room in made)


def test_an_interrupt_stops_within_a_task(run):
    subject = load_subject(str(run[0].path), device="cpu")
    options = EvaluateConfig(
        recall=["phonebook"], sizes={"entries": [3], "items": 9}, batch_tokens=256
    )
    calls = []

    def between():
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(
            subject,
            options,
            write=lambda *a: None,
            documents=list,
            training_length=64,
            between=between,
        )
    assert len(calls) == 4


def test_a_sampled_answer_repeats(run):
    subject = load_subject(str(run[0].path), device="cpu")
    options = {"do_sample": True, "temperature": 1.0}
    first = subject.generate([[256, 97]], 12, ["\0"], options)
    assert first == subject.generate([[256, 97]], 12, ["\0"], options)


def test_mistakes_in_a_study_come_before_compute(tmp_path):
    with pytest.raises(UserError, match="did you mean 'small'"):
        check(EvaluateConfig(suites=["smal"]))


def test_every_suite_has_known_tasks():
    for name, entries in suites.SUITES.items():
        for entry in entries:
            assert suites.entries_of(name)
            for percent in suites.published(name, entry).values():
                assert 0 < percent < 100
    assert len(suites.SUITES["btlm"]) == 10
    assert len(suites.SUITES["oute"]) == 14
    assert len(suites.SUITES["empirical12"]) == 12
    assert suites.published("oute", suites.SUITES["oute"][0]) == {
        "Lite-Oute-2 250M": 26.88,
        "Lite-Oute-2 250M Instruct": 26.71,
    }


ROW = {"goal": "run", "sol1": "red", "sol2": "green", "label": 0}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, r"piqa: skipped, no .*piqa/<split>\.jsonl in evaluate\.local_data"),
        ("", "piqa: skipped, there are no rows in "),
        (f"{json.dumps(ROW)}\n\n{{not json\n", r"line 3 of .*validation\.jsonl is not JSON"),
        (f"{json.dumps(ROW)}\n[1]\n", r"line 2 of .* is not a JSON object"),
        (f"{json.dumps(ROW)}\n{json.dumps({'goal': 'x'})}\n", "line 2 of .* lacks the field"),
        (json.dumps({"goal": "run"}), r"lm-eval cannot use its data in .* \(ValueError: "),
        (b"(\xb5/\xfd", r"cannot be read \(.* is not a whole \.zst file"),
    ],
)
def test_data_that_is_missing_empty_or_damaged_is_one_line(run, tmp_path, capsys, text, named):
    (tmp_path / "piqa").mkdir()
    file = tmp_path / "piqa" / f"validation.jsonl{'.zst' if isinstance(text, bytes) else ''}"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, said = ask(
        str(run[0].path), "recall=[]", "length=[]", "suites=[piqa]", f"local_data={tmp_path}"
    )
    assert code == 1
    assert "every task was skipped" in said
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert re.search(named, lines[0]), lines[0]


def test_data_of_ours_that_cannot_be_made(monkeypatch):
    def fails(*_, **__):
        raise pickle.PicklingError("Can't pickle it")

    monkeypatch.setattr(recall, "make", fails)
    with pytest.raises(Skipped) as caught:
        _load(TASKS, "phonebook", "phonebook", metadata={"tokenizer": "byte"})
    assert str(caught.value) == (
        "phonebook: skipped, its data could not be made (PicklingError: Can't pickle it)"
    )


def test_local_data_is_read_without_pickling(data_folder, monkeypatch):
    import datasets

    rows = [json.loads(r) for r in (data_folder / "mmlu/dev.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["subject"] == "virology"]
    wanted = datasets.Dataset.from_list(rows)

    def unpicklable(*_):
        raise AssertionError("pickled")

    monkeypatch.setattr(datasets.fingerprint.Hasher, "update", unpicklable)
    with local_data(data_folder):
        found = datasets.load_dataset("cais/mmlu", "virology")["dev"]
    assert found.features == wanted.features
    assert found.to_list() == wanted.to_list() == rows


def test_a_part_of_a_benchmark_that_has_no_rows(tmp_path):
    import datasets

    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "test.jsonl").write_text(json.dumps({"subject": "law"}) + "\n")
    with local_data(tmp_path), pytest.raises(NoLocalData, match="with subject 'virology'"):
        datasets.load_dataset("cais/mmlu", "virology")
    (tmp_path / "blimp").mkdir()
    (tmp_path / "blimp" / "train.jsonl").write_text(json.dumps({"uid": "law"}) + "\n")
    with local_data(tmp_path), pytest.raises(NoLocalData, match="have no field 'UID'"):
        datasets.load_dataset("nyu-mll/blimp", "virology")


def test_a_task_is_prepared_in_no_time(run, data_folder, monkeypatch):
    """lm-eval compiles a template for each document; under ours each is compiled once."""
    from lm_eval.utils import env

    made = []
    compiled = type(env).from_string

    def counted(self, source, *rest):
        made.append(source)
        return compiled(self, source, *rest)

    monkeypatch.setattr(type(env), "from_string", counted)
    ask(str(run[0].path), "recall=[]", "length=[]", "suites=[piqa]", f"local_data={data_folder}")
    assert 0 < len(made) == len(set(made))
    env.from_string("a"), env.from_string("a")
    assert made[-2:] == ["a", "a"]


def test_floor_and_ceiling():
    assert uninformative(0.0, 100, 0.0) == "floor"
    assert uninformative(0.12, 50, 0.1) == "floor"
    assert uninformative(0.5, 50, 0.1) is None
    assert uninformative(1.0, 50, 0.1) == "ceiling"
    assert uninformative(0.9, 500, 0.1) is None


@pytest.mark.parametrize(
    ("responses", "verdict"),
    [
        ([" 5472982825"] * 30 + [" 1"] * 10, None),
        ([" 547298282537298"] * 30 + [" 1"] * 10, "unended"),
        ([" 5472982825.\n12"] * 40, "ceiling"),
        ([" 6472982825"] * 40, "floor"),
    ],
)
def test_right_numbers_that_go_on_are_told_apart(responses, verdict):
    """A model that knows the number and does not stop is not one that knows nothing."""
    target = "5472982825"
    hits = [float(first_answer(r, target) == target) for r in responses]
    cell = {"x": 3, "items": 40, "cut": 0, "exact_match": sum(hits) / 40}
    items = {"cell": ["entries=3"] * 40, "response": responses, "target": [target] * 40}
    items["others"] = [["1111111111", "2222222222"]] * 40
    content = {"cells": {"entries=3": cell}, "items": items, "chance": 0.0}
    _judge_recall(content)
    assert content["verdict"] == verdict


def test_the_verb_runs_what_is_named_and_not_what_the_trial_ran(run, tmp_path):
    place, _ = run
    said = Console(file=io.StringIO(), width=120)
    words = [str(place.path), "recall=[induction]", 'sizes={"lengths":[64],"items":2}']
    assert command([*words, f"out={tmp_path / 'out'}", "device=cpu"], tables, said) == 0
    assert set(RunFolder(tmp_path / "out").evaluations()) == {"induction"}
