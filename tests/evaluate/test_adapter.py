"""The adapter against lm-eval's own `hf` model: item by item, on the same transformers model."""

from __future__ import annotations

import math

import pytest
import torch
import yaml

from ablate.data.made import Draw
from ablate.errors import UserError
from ablate.evaluate.recall import filler

ITEMS = 220


@pytest.fixture(scope="module")
def both(hf_folder):
    """(lm-eval's hf model, ours) over one transformers model of 256 positions, in float32."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ablate.evaluate.adapter import SubjectLM
    from ablate.evaluate.subjects import HFModel

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(hf_folder)
    theirs = HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(hf_folder),
        batch_size=7,
    )
    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    ours = SubjectLM(HFModel(model, tokenizer), batch_size=16, batch_tokens=2048, quiet=True)
    assert ours.max_length == theirs.max_length == 256
    return theirs, ours


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def texts(n, low, high, name):
    draw = Draw("adapter", name)
    return [" ".join(filler(draw) for _ in range(low + draw.below(high - low))) for _ in range(n)]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one[1] == other[1]
        assert math.isclose(one[0], other[0], rel_tol=2e-5, abs_tol=2e-4)


def test_loglikelihood(both):
    """Contexts that are empty, end in spaces, begin with the mark and do not fit; few shots;
    continuations that share a context, of one token and of many."""
    theirs, ours = both
    draw = Draw("loglikelihood")
    arguments = []
    for i, text in enumerate(texts(ITEMS // 4, 1, 9, "ll")):
        shots = "\n\n".join(f"{filler(draw)} {draw.word(2)}" for _ in range(i % 6))
        context = ["", f"{shots}\n\n{text}", f"{text}  ", f"<|endoftext|>{text}"][i % 4]
        for choice in (draw.word(1), draw.word(3), filler(draw), "7"):
            arguments.append((context, f" {choice}"))
    assert len(arguments) >= 200
    lengths = [len(ours.tok_encode(c)) for c, _ in arguments]
    assert max(lengths) > 256 > min(lengths)
    requests = instances("loglikelihood", arguments)
    same(ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True))


def test_greedy_continuations_are_seen_as_such(both):
    theirs, ours = both
    contexts = texts(20, 1, 3, "greedy")
    options = {"until": ["\0"], "max_gen_toks": 3}
    new = ours.generate_until(instances("generate_until", [(c, options) for c in contexts]))
    requests = instances("loglikelihood", list(zip(contexts, new, strict=True)))
    found = ours.loglikelihood(requests)
    same(found, theirs.loglikelihood(requests, disable_tqdm=True))
    assert any(greedy for _, greedy in found)


def test_loglikelihood_rolling(both):
    """Documents shorter than the window and many windows long."""
    theirs, ours = both
    requests = instances("loglikelihood_rolling", [(t,) for t in texts(ITEMS, 1, 25, "rolling")])
    sizes = [len(ours.tok_encode(r.args[0])) for r in requests]
    assert min(sizes) < 256 < 512 < max(sizes)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    for one, other in zip(ours.loglikelihood_rolling(requests), expected, strict=True):
        assert math.isclose(one, other, rel_tol=2e-5, abs_tol=1e-3)


def test_generate_until(both):
    """Ragged prompts, some cut on the left; several stop strings; two sets of options."""
    theirs, ours = both
    draw = Draw("generate")
    arguments = []
    for i, text in enumerate(texts(ITEMS, 1, 14, "generate")):
        options = {"until": ["\n", draw.one("aeiou")], "max_gen_toks": 12, "do_sample": False}
        arguments.append((text, options if i % 3 else {"until": ["."], "max_gen_toks": 7}))
    assert max(len(ours.tok_encode(c)) for c, _ in arguments) > 256
    requests = instances("generate_until", arguments)
    found = ours.generate_until(requests)
    assert found == theirs.generate_until(requests, disable_tqdm=True)
    assert len(set(found)) > 50


def test_a_task_with_shots_through_the_evaluator(both, tmp_path):
    """lm-eval's own task machinery over both, few-shot, accuracy and its normalised form."""
    import json

    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    draw = Draw("task")
    rows = [
        {"q": filler(draw), "choices": [draw.word(n) for n in (1, 2, 3)], "answer": draw.below(3)}
        for _ in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = {
        "task": "made",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True}
            for m in ("acc", "acc_norm")
        ],
    }
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(task))
    manager = TaskManager(include_path=[tmp_path], include_defaults=False)
    results = [
        simple_evaluate(
            model=lm,
            tasks=["made"],
            num_fewshot=5,
            task_manager=manager,
            bootstrap_iters=0,
        )
        for lm in both
    ]
    for metric in ("acc,none", "acc_norm,none"):
        assert results[0]["results"]["made"][metric] == results[1]["results"]["made"][metric]
    for one, other in zip(*(r["samples"]["made"] for r in results), strict=True):
        same([r[0] for r in one["resps"]], [r[0] for r in other["resps"]])


def test_our_model_scores_as_its_logits(tmp_path):
    from ablate.arch.spec import Architecture
    from ablate.data.tokenizer import Tokenizer
    from ablate.evaluate.adapter import SubjectLM
    from ablate.evaluate.subjects import OwnModel
    from ablate.model import LanguageModel

    options = {"mamba2": {"head_dim": 16, "d_state": 8}, "attention": {"head_dim": 16}}
    arch = Architecture("M-*-", d_model=32, vocab_size=320, init_std=0.3, options=options)
    model = LanguageModel(arch, seed=0).eval()
    subject = OwnModel(model, Tokenizer("byte"), max_length=64)
    lm = SubjectLM(subject, batch_size=3, quiet=True)
    arguments = [("some words", " more"), ("", "alone"), ("some words", " other"), ("x" * 90, "yz")]
    found = lm.loglikelihood(instances("loglikelihood", arguments))
    for (context, continuation), (value, _) in zip(arguments, found, strict=True):
        ids = [256, *(context + continuation).encode()][-65:]
        with torch.no_grad():
            log_p = model.logits(torch.tensor([ids[:-1]]))[0, :, :257].log_softmax(-1)
        n = len(continuation)
        expected = sum(float(log_p[-n + i, ids[len(ids) - n + i]]) for i in range(n))
        assert value == pytest.approx(expected, abs=1e-3)
    rolled = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("alone",)]))[0]
    assert rolled == pytest.approx(found[1][0], abs=1e-4)
    options = {"until": ["e"], "max_gen_toks": 9, "temperature": 0.0}
    texts_found = lm.generate_until(
        instances("generate_until", [("ab", options), ("abcd", options)])
    )
    assert all("e" not in text for text in texts_found)
    with pytest.raises(UserError, match="'top_k' is not supported"):
        lm.generate_until(instances("generate_until", [("ab", {"top_k": 3, "max_gen_toks": 2})]))
    # our positions do not end at the training length, so an answer as long as it is no mistake
    long = instances("generate_until", [("ab" * 60, {"max_gen_toks": 64, "until": []})])
    assert len(lm.generate_until(long)) == 1


def test_an_answer_that_no_room_is_left_for(both):
    with pytest.raises(UserError, match="max_gen_toks is 256"):
        both[1].generate_until(instances("generate_until", [("ab", {"max_gen_toks": 256})]))
