"""A transformers model small enough to score in milliseconds, with a tokenizer of its own."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """A folder with a randomly initialised GPT-2 of two layers and a BPE with single digits."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from ablate.data.made import Draw
    from ablate.evaluate.recall import filler

    folder = tmp_path_factory.mktemp("hf")
    draw = Draw("tests")
    texts = [" ".join(filler(draw) for _ in range(20)) for _ in range(50)]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,  # logits that differ, so that the order of choices is no accident
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
