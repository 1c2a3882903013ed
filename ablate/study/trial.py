"""One trial: a config that has been checked as a whole, its architecture, and its run's key.

`config.load` checks fields one by one; here is the one place for what must fit together. All of it
is checked before anything is computed or written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ablate import config
from ablate.arch import match as matching
from ablate.arch.cost import Cost
from ablate.arch.spec import Architecture
from ablate.config import Config, DataConfig
from ablate.data import model_vocab
from ablate.data.corpus import sources
from ablate.data.recall import check_recall
from ablate.data.stream import row_counts
from ablate.data.tokenizer import Tokenizer
from ablate.data.tokenizer import load as load_tokenizer
from ablate.errors import UserError
from ablate.evaluate.trial import check as check_evaluation
from ablate.layers.registry import KINDS, own_modules
from ablate.run import RunFolder
from ablate.train import checkpoint
from ablate.train.budget import Budget


@dataclass(frozen=True)
class Trial:
    """A run that can be carried out.

    key: name of its run folder; tree: the resolved config as plain data, enough to run it again;
    warnings: sentences about what is allowed but probably not meant.
    """

    key: str
    config: Config
    tree: dict[str, Any]
    architecture: Architecture
    warnings: tuple[str, ...] = ()

    @functools.cached_property
    def cost(self) -> Cost:
        """At the training length."""
        return self.architecture.cost(self.config.data.seq_len)

    @property
    def step_tokens(self) -> int:
        return self.config.train.batch_size * self.config.data.seq_len

    @property
    def steps(self) -> int | None:
        """Of the whole run; None for a budget in seconds, where they are not known before."""
        return Budget.of(self.config.train, self.step_tokens, self.cost.train_flops).steps

    @property
    def tokens(self) -> float:
        """Of the whole run; NaN for a budget in seconds."""
        return math.nan if self.steps is None else float(self.steps * self.step_tokens)

    @property
    def flops(self) -> float:
        """Training FLOPs of the whole run by the cost contract; NaN for a budget in seconds."""
        return self.tokens * self.cost.train_flops


def resolve(tree: Mapping[str, Any]) -> Trial:
    """Check a composed config as a whole; UserError names the field that cannot be."""
    cfg = config.load(tree)
    warnings: list[str] = []
    _check_data(cfg)
    architecture = Architecture.from_config(cfg.arch, vocabulary(cfg))
    _check_layers(architecture)
    matching.check(cfg.match, architecture, cfg.data.seq_len)
    _check_recall(cfg)
    _check_evaluation(
        cfg.evaluate.model_dump_json(), cfg.data.model_dump_json(include={"tokenizer"})
    )
    _check_windows(cfg, architecture, warnings)
    _check_train(cfg, warnings)
    if cfg.train.branch_from is not None:
        _check_trunk(cfg, architecture)
    single = cfg.study.model_dump(include={"name", "question", "finding", "folder"})
    resolved = {**cfg.model_dump(mode="json"), "study": single}
    trial = Trial(key(cfg, architecture), cfg, resolved, architecture, tuple(warnings))
    step = max(cfg.train.checkpoint_steps, default=0)
    if trial.steps is not None and step > trial.steps:
        raise UserError(
            f"train.checkpoint_steps has {step}, which the run does not come to: it ends after "
            f"{trial.steps} steps"
        )
    return trial


def _check_layers(architecture: Architecture) -> None:
    """Layers of the user's own can be made, and are as large as they say: a plan and a match of
    sizes go by what they say."""
    modules = own_modules(architecture.letters)
    if not modules:
        return
    from ablate.model import LanguageModel

    try:
        with torch.device("meta"):
            LanguageModel(architecture, seed=None)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"arch.layers: a layer of {' and '.join(modules)} cannot be made "
            f"({type(error).__name__}: {error})"
        ) from error


def key(cfg: Config, architecture: Architecture) -> str:
    """First 16 hex digits of the SHA-256 of what decides a run's figures, the seed included.

    The architecture enters as what was made of it: two shares that give one pattern are one run.
    """
    science = config.science(cfg)
    science["arch"] = architecture.canonical()
    if modules := own_modules(architecture.letters):
        science["arch"]["modules"] = modules  # another one may have its letters, names and options
    if cfg.train.branch_from is not None:
        science["train"]["branch_from"] = Path(cfg.train.branch_from).name  # its key; it may move
    text = json.dumps(science, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def vocabulary(cfg: Config) -> int:
    """Rows of the embedding: the tokenizer's ids rounded up, unless `arch.vocab_size` says more."""
    ids = token_ids(cfg.data)
    if cfg.arch.vocab_size is None:
        return model_vocab(ids)
    if cfg.arch.vocab_size < ids:
        raise UserError(
            f"arch.vocab_size is {cfg.arch.vocab_size}, less than the {ids} ids of data.tokenizer"
        )
    return cfg.arch.vocab_size


def token_ids(data: DataConfig) -> int:
    """Ids of a tokenizer; of a BPE that is still to be trained, those that were asked for."""
    if data.tokenizer.kind == "bpe":
        return data.tokenizer.vocab_size
    if data.tokenizer.kind == "byte":
        return Tokenizer("byte").vocab_size
    return _file_vocabulary(data.tokenizer.model_dump_json())


@functools.cache
def _file_vocabulary(tokenizer: str) -> int:
    data = DataConfig(tokenizer=config.TokenizerConfig.model_validate_json(tokenizer))
    return load_tokenizer(data, None).vocab_size  # type: ignore[arg-type]  # reads no text


@functools.cache
def _find_sources(data: str) -> None:
    sources(DataConfig.model_validate_json(data))


def _check_data(cfg: Config) -> None:
    if cfg.data.source != "hub":  # which would download; `prepare` does, and says what it misses
        fields = {"source", "path", "val_a_path", "val_b_path"}
        _find_sources(cfg.data.model_dump_json(include=fields))


@functools.cache
def _check_evaluation(evaluate: str, data: str) -> None:
    check_evaluation(
        config.EvaluateConfig.model_validate_json(evaluate),
        config.DataConfig.model_validate_json(data),
    )


def _check_recall(cfg: Config) -> None:
    mqar, ids = cfg.data.mqar, token_ids(cfg.data)
    length = mqar.length or cfg.data.seq_len
    if row_counts(cfg.data, cfg.train.batch_size).mqar:
        check_recall(mqar.pairs, length, mqar.queries, ids)
    if not cfg.evaluate.mqar_rows:
        return
    for pairs in cfg.evaluate.mqar_pairs or [mqar.pairs]:
        try:
            check_recall(pairs, length, None, ids)
        except UserError as error:
            asked = "evaluate.mqar_pairs=" if cfg.evaluate.mqar_pairs else "data.mqar.pairs="
            raise UserError(str(error).replace("data.mqar.pairs=", asked)) from None


def _check_windows(cfg: Config, architecture: Architecture, warnings: list[str]) -> None:
    length = cfg.data.seq_len
    layers = zip(architecture.letters, architecture.layer_options, strict=True)
    windows = {(KINDS[letter].name, getattr(options, "window", None)) for letter, options in layers}
    for name, window in sorted((n, w) for n, w in windows if w is not None):
        if window > length:
            raise UserError(
                f"arch.{name}.window is {window}, longer than data.seq_len {length}: it would "
                f"be full attention; give at most {length}"
            )
        if length < 2 * window:
            warnings.append(
                f"data.seq_len {length} is less than twice arch.{name}.window {window}: most "
                "tokens never lose sight of another"
            )


def _check_train(cfg: Config, warnings: list[str]) -> None:
    train = cfg.train
    if train.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "train.device is 'cuda', but there is no CUDA GPU here; give 'auto' or 'cpu'"
        )
    rows, share = train.batch_size, "train.batch_size"
    if train.devices > 1:
        if rows % train.devices:
            raise UserError(
                f"train.devices is {train.devices}, which does not divide train.batch_size {rows}"
            )
        rows, share = rows // train.devices, "a device's share of train.batch_size,"
        there = torch.cuda.device_count()
        if train.device != "cpu" and 0 < there < train.devices:
            raise UserError(f"train.devices is {train.devices}, but there are {there} GPUs here")
    if isinstance(train.micro_batch, int):
        if train.micro_batch > rows:
            raise UserError(f"train.micro_batch is {train.micro_batch}, more than {share} {rows}")
        if rows % train.micro_batch:
            raise UserError(
                f"train.micro_batch is {train.micro_batch}, which does not divide {share} {rows}"
            )
    step = train.batch_size * cfg.data.seq_len
    if train.tokens is not None and train.tokens < step:
        warnings.append(
            f"train.tokens {train.tokens} is less than one step of {step} tokens, and rounded up"
        )
    if train.seconds is not None and train.deterministic:
        warnings.append(
            "train.seconds is a budget in time: how many steps fit differs from run to run"
        )


def _check_trunk(cfg: Config, architecture: Architecture) -> None:
    name = str(cfg.train.branch_from)
    trunk = RunFolder(Path(name).expanduser())
    tree = trunk.config()
    if tree is None:
        raise UserError(f"train.branch_from '{name}' is not a run folder: it has no config.yaml")
    steps = checkpoint.steps(trunk.checkpoint)
    if not steps:
        raise UserError(
            f"train.branch_from '{name}' has no checkpoint; run the trunk with train.keep=all, or "
            "with the steps to branch at in train.checkpoint_steps"
        )
    if cfg.train.branch_at is not None and cfg.train.branch_at not in steps:
        raise UserError(
            f"train.branch_at is {cfg.train.branch_at}, but train.branch_from has checkpoints of "
            f"steps {', '.join(map(str, steps))}"
        )
    other = config.load(tree)
    if Architecture.from_config(other.arch, vocabulary(other)) != architecture:
        raise UserError(f"train.branch_from '{name}' is a trunk of another architecture")
    from ablate.train.loop import check_branch  # with torch, which a plan can do without

    check_branch(other, cfg)
    step = cfg.train.branch_at if cfg.train.branch_at is not None else max(steps)
    tokens = step * cfg.train.batch_size * cfg.data.seq_len
    if cfg.train.tokens is not None and cfg.train.tokens <= tokens:
        raise UserError(
            f"train.tokens is {cfg.train.tokens}, which counts the trunk's part and must be more "
            f"than the {tokens} tokens of the {step} steps before train.branch_at"
        )
