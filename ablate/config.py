"""The typed config tree: every field a study can set, its type, its range and what it means.

Hydra composes YAML into a plain dict; `load` turns the dict into a `Config`, or raises `UserError`
with one sentence for the first field that is wrong. Nothing here imports torch; checks that need an
architecture or a corpus live in `study/trial.py`.

Fields marked `operational` change how a run is carried out, never what it computes, and stay out of
the key that names a run.
"""

from __future__ import annotations

import copy
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeGuard

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ablate.errors import UserError, did_you_mean


def operational(default: Any, description: str, **constraints: Any) -> Any:
    """A field that is left out of the run's key."""
    extra: Any = {"operational": True}
    return Field(default, description=description, json_schema_extra=extra, **constraints)


class Section(BaseModel):
    """A part of the tree: frozen, strict about types, closed to unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _whole_floats(cls, values: Any) -> Any:
        """`train.tokens=2e9` is a float to YAML and to Hydra, and an integer to everyone else."""
        if not isinstance(values, dict):
            return values
        whole = {
            name: int(value)
            for name, value in values.items()
            if isinstance(value, float)
            and value.is_integer()
            and name in cls.model_fields
            and _takes_int_only(cls.model_fields[name].annotation)
        }
        return {**values, **whole}


def _takes_int_only(annotation: Any) -> bool:
    kinds = {annotation, *typing.get_args(annotation)}
    return int in kinds and float not in kinds


class ArchConfig(Section):
    """Which layers, in which order, how wide.

    Options of a layer kind stand under the kind's name (`arch.mamba2.d_state`); they are checked
    against the kind's own dataclass in `ablate/layers/`, so a user's kind has its place here too.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    name: str | None = Field(None, description="a published architecture's name, for the report")
    pattern: str | None = Field(
        None, description="the whole pattern, such as 'M-x6.*-'; null: made from the fields below"
    )
    n_layers: int = Field(24, ge=1, le=1024, description="residual layers, when made")
    unit: str | None = Field(None, description="a unit repeated to n_layers, when made")
    attention_share: float = Field(0.08, ge=0, le=1, description="attention layers / all layers")
    mlp_share: float = Field(0.5, ge=0, le=1, description="MLP layers / all layers")
    placement: Literal["published", "even", "front", "middle", "back"] = Field(
        "published", description="where the attention layers go; published: the allocator's rule"
    )
    positions: list[int] | None = Field(
        None, description="0-based indices of the attention layers, instead of a share"
    )
    mixer_letter: str = Field("M", description="the layer that fills the rest")
    attention_letter: str = Field("*", description="the layer that attends")
    mlp_letter: str = Field("-", description="the MLP layer")
    d_model: int = Field(768, ge=8, description="width of the residual stream")
    vocab_size: int | None = Field(
        None, ge=2, description="rows of the embedding; null: the tokenizer's, rounded up to 64"
    )
    tie_embeddings: bool = Field(True, description="the output projection is the embedding")
    norm_eps: float = Field(1e-5, gt=0, lt=1, description="epsilon of every RMSNorm")
    init_std: float | None = Field(
        None, gt=0, lt=1, description="of initial weights; null: sqrt(2 / (5 d_model))"
    )
    overrides: dict[str, dict[str, Any]] = Field(
        {}, description="options of single layers: 0-based index: {option: value}"
    )
    layers: list[str] = Field([], description="modules that register further layer kinds")
    published: dict[str, float] = Field({}, description="published figures, shown by `cost`")

    @field_validator("overrides", mode="before")
    @classmethod
    def _indices(cls, overrides: Any) -> Any:
        """YAML writes an index as a number, JSON as text."""
        if not isinstance(overrides, dict):
            return overrides
        for index in overrides:
            if not str(index).isdecimal():
                raise ValueError(f"layers are named by their 0-based index, not by {index!r}")
        return {str(index): values for index, values in overrides.items()}

    @model_validator(mode="after")
    def _extras_are_options(self) -> ArchConfig:
        for name, value in (self.model_extra or {}).items():
            if not isinstance(value, dict):
                known = list(type(self).model_fields)
                raise ValueError(f"unknown field 'arch.{name}'{did_you_mean(name, known)}")
        return self

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """Options by layer kind name."""
        return dict(self.model_extra or {})


class MatchConfig(Section):
    """How the arms of a study are made equal; `ablate/arch/match.py` has the rule."""

    quantity: Literal["non_embedding_params", "train_flops", "decode_bytes", "state_bytes"] = Field(
        "non_embedding_params", description="what is equal in all arms, by the cost contract"
    )
    by: Literal["attention_inner", "mlp_width", "state", "layers"] | None = Field(
        None, description="what moves to make it so; null: nothing is matched"
    )
    target: float | str | None = Field(
        None, description="the figure, or the arm whose own figure it is; null: the first arm's"
    )
    tolerance: float = Field(0.01, gt=0, lt=1, description="relative distance that is allowed")
    force: bool = Field(False, description="run the nearest choice even beyond the tolerance")
    arms: Literal["matched", "both", "unmatched"] = Field(
        "both",
        description="both: arms as configured run beside, where that is beyond the tolerance",
    )
    certificate: dict[str, Any] | None = Field(
        None, description="filled in for each trial: what was changed, and how near it came"
    )

    @model_validator(mode="after")
    def _target(self) -> MatchConfig:
        if isinstance(self.target, int | float) and not 0 < self.target < float("inf"):
            raise ValueError(f"'target' must be a positive figure, got {self.target}")
        return self


class TokenizerConfig(Section):
    kind: Literal["byte", "bpe", "file"] = Field(
        "byte", description="bytes, a BPE trained on the corpus, or a file"
    )
    vocab_size: int = Field(16384, ge=260, le=1_000_000, description="entries of the trained BPE")
    path: str | None = Field(None, description="tokenizer.json, when kind is file")

    @model_validator(mode="after")
    def _path(self) -> TokenizerConfig:
        if (self.kind == "file") != (self.path is not None):
            raise ValueError(
                "'path' must be a tokenizer.json when kind is 'file', and null otherwise"
            )
        return self


class MQARConfig(Section):
    """Multi-query associative recall rows (Arora et al. 2023, arXiv 2312.04927)."""

    share: float = Field(0.0, ge=0, le=1, description="share of the rows of each training batch")
    pairs: int = Field(8, ge=1, description="key-value pairs in a row")
    length: int | None = Field(None, ge=4, description="tokens of a recall row; null: seq_len")
    queries: int | None = Field(None, ge=1, description="queries in a row; null: one per pair")


class WrittenConfig(Section):
    """Recall documents of made names and numbers among the text rows (`ablate/data/written.py`)."""

    share: float = Field(0.0, ge=0, le=1, description="share of the rows of each training batch")
    kinds: list[Literal["phonebook", "pairs", "needle", "copying"]] = Field(
        ["phonebook", "pairs", "needle", "copying"], description="kinds of documents, equally often"
    )
    entries: list[int] = Field(
        [4, 24], description="fewest and most entries of a document, log-uniform between"
    )
    questions: float = Field(
        2.0, gt=0, le=10, description="questions an entry: what makes recall appear early"
    )
    scored: Literal["all", "answers"] = Field(
        "answers", description="what the loss of these rows counts: all tokens, or answers alone"
    )

    @model_validator(mode="after")
    def _ranges(self) -> WrittenConfig:
        if not self.kinds:
            raise ValueError("'recall.kinds' is empty")
        if len(self.entries) != 2 or not 1 <= self.entries[0] <= self.entries[1] <= 1000:
            raise ValueError(
                f"'recall.entries' must be two numbers, 1 <= fewest <= most <= 1000, "
                f"got {self.entries}"
            )
        return self


class HubConfig(Section):
    name: str = Field("HuggingFaceFW/fineweb-edu", description="dataset on the Hugging Face hub")
    subset: str | None = Field("sample-10BT", description="its configuration")
    split: str = Field("train", description="its split")
    text_field: str = Field("text", description="the column that holds the text")
    revision: str | None = Field(None, description="commit of the dataset; null: the newest")


class DataConfig(Section):
    source: Literal["stdlib", "files", "hub"] = Field(
        "stdlib", description="where the text comes from"
    )
    path: str | list[str] | None = Field(
        None, description="folder, file or list, when source is files"
    )
    hub: HubConfig = HubConfig()
    val_a_path: str | list[str] | None = Field(
        None, description="given validation A, instead of a split"
    )
    val_b_path: str | list[str] | None = Field(
        None, description="given validation B, instead of a split"
    )
    val_share: float = Field(0.03, gt=0, lt=0.5, description="share of documents in A, and in B")
    max_bytes: int | None = Field(
        None, ge=10_000, description="stop reading the text after so many bytes"
    )
    tokenizer: TokenizerConfig = TokenizerConfig()
    seq_len: int = Field(2048, ge=8, description="tokens a row")
    reset_documents: bool = Field(False, description="layers do not see across documents in a row")
    allow_repeats: bool = Field(False, description="more than four epochs over the text")
    mqar: MQARConfig = MQARConfig()
    recall: WrittenConfig = WrittenConfig()
    cache: str = operational("~/.cache/ablate", "folder of tokenised text")
    workers: int | None = operational(None, "processes that tokenise; null: one per core", ge=1)

    @model_validator(mode="after")
    def _cross(self) -> DataConfig:
        if self.source == "files" and self.path is None:
            raise ValueError("data.path is missing: data=files needs data.path=FOLDER_OR_FILE")
        if self.source != "files" and self.path is not None:
            raise ValueError(
                f"data.path is given, but data.source is '{self.source}': add data=files"
            )
        if self.val_a_path is not None and self.val_a_path == self.val_b_path:
            raise ValueError(
                f"'val_a_path' and 'val_b_path' are both {self.val_a_path!r}: decisions are made "
                "on A, so B must be another text"
            )
        length = self.mqar.length or self.seq_len
        if self.mqar.share and length > self.seq_len:
            raise ValueError(f"'mqar.length' is {length}, longer than seq_len {self.seq_len}")
        return self


class TrainConfig(Section):
    tokens: int | None = Field(None, ge=1, description="budget in tokens")
    flops: float | None = Field(None, gt=0, description="budget in training FLOPs (contract)")
    seconds: float | None = Field(None, gt=0, description="budget in seconds of training")
    batch_size: int = Field(
        16, ge=1, le=1_000_000, description="rows an optimiser step, over all micro-batches"
    )
    micro_batch: int | Literal["auto"] | None = operational(
        None,
        "rows a forward pass and device; null: all; auto: on a GPU the fewest within 3% of the "
        "best speed",
    )
    lr: float = Field(3e-3, gt=0, le=10, description="peak learning rate")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after the warm-up"
    )
    warmup: float = Field(0.02, ge=0, lt=1, description="share of the budget")
    decay: float = Field(0.2, gt=0, le=1, description="share of the budget that wsd decays over")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final over peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's, on matrices only")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second moment decay")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    clip: float = Field(1.0, gt=0, description="norm that gradients are clipped to")
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log-partition")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 on a GPU, fp32 on a CPU"
    )
    deterministic: bool = Field(True, description="bitwise equal reruns on the same hardware")
    branch_from: str | None = Field(None, description="run folder of a wsd trunk to anneal from")
    branch_at: int | None = Field(
        None, ge=1, description="trunk step to branch at; null: its last kept one"
    )
    device: Literal["auto", "cpu", "cuda"] = operational("auto", "where to train")
    compile: bool | None = operational(None, "torch.compile, once a layer kind; null: on a GPU")
    capture: bool | None = operational(None, "a training step as one CUDA graph; null: on a GPU")
    activation_checkpointing: bool = operational(
        False, "layers run again in the backward pass, for memory"
    )
    devices: int = operational(1, "GPUs of one trial (on a CPU: processes)", ge=1)
    threads: int = operational(1, "CPU threads of one trial", ge=1)
    log_every: int = operational(10, "steps between metric lines", ge=1)
    eval_every: int | None = operational(
        None, "steps between validations on A; null: five in all", ge=1
    )
    checkpoint_seconds: float = operational(60.0, "seconds between checkpoints", gt=0)
    checkpoint_steps: list[int] = operational(
        [], "steps whose checkpoints are kept, to branch from"
    )
    keep: Literal["none", "weights", "all"] = operational("none", "what stays of the checkpoint")

    @field_validator("micro_batch")
    @classmethod
    def _rows(cls, rows: int | str | None) -> int | str | None:
        if isinstance(rows, int) and rows < 1:
            raise ValueError(f"'micro_batch' must be 1 or more, or 'auto', got {rows}")
        return rows

    @model_validator(mode="after")
    def _budget(self) -> TrainConfig:
        given = [n for n in ("tokens", "flops", "seconds") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                "exactly one budget of 'tokens', 'flops' and 'seconds' must be given, "
                f"got {' and '.join(given) or 'none'}"
            )
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"'warmup' {self.warmup} and 'decay' {self.decay} must add up to at most 1"
            )
        if self.checkpoint_steps and self.keep != "all":
            raise ValueError("'checkpoint_steps' needs 'keep' to be 'all'")
        if min(self.checkpoint_steps, default=1) < 1:
            raise ValueError(f"'checkpoint_steps' must be 1 or more, got {self.checkpoint_steps}")
        if self.branch_at is not None and self.branch_from is None:
            raise ValueError("'branch_at' needs 'branch_from', the run folder of the trunk")
        if self.branch_from is not None and (self.schedule != "wsd" or self.seconds is not None):
            raise ValueError(
                "'branch_from' needs schedule 'wsd' and a budget in tokens or FLOPs, "
                "which counts the trunk's part"
            )
        return self


RecallTask = Literal[
    "phonebook",
    "phonebook_reversed",
    "passkey",
    "needle",
    "needle_multivalue",
    "mqar_text",
    "induction",
    "copying",
]


class EvaluateConfig(Section):
    tokens: int | None = Field(
        2_000_000, ge=1, description="validation tokens, of A and of B; null: all"
    )
    mqar_rows: int = Field(0, ge=0, description="held-out recall rows to score; 0: no recall score")
    mqar_pairs: list[int] | None = Field(None, description="pairs to score; null: data.mqar.pairs")
    # What follows is run on the trained weights: asking for more never trains again.
    suites: list[str] = operational([], "suites or tasks of lm-eval: small, btlm, piqa@5, …")
    recall: list[RecallTask] = operational([], "recall tasks made offline")
    sizes: dict[str, Any] = operational({}, "sizes of recall tasks: entries, lengths, items, …")
    length: list[int] = operational(
        [], "multiples of the training length to score the same targets at"
    )
    long_documents: str | None = operational(
        None, "folder or file of long documents for `length`; null: those of validation B"
    )
    local_data: str | None = operational(
        None, "folder of <task>/<split>.jsonl; null: the Hugging Face hub"
    )
    limit: int | None = operational(None, "documents of each benchmark; null: all", ge=1)
    batch_tokens: int = operational(16384, "tokens of a batch that is evaluated", ge=256)

    @model_validator(mode="after")
    def _length(self) -> EvaluateConfig:
        if any(multiple < 1 for multiple in self.length):
            raise ValueError(f"'length' must be multiples of 1 or more, got {self.length}")
        if min(self.mqar_pairs or [1]) < 1:
            raise ValueError(f"'mqar_pairs' must be numbers of 1 or more, got {self.mqar_pairs}")
        if self.mqar_pairs and not self.mqar_rows:
            raise ValueError(
                f"'mqar_pairs' is {self.mqar_pairs}, of which nothing is scored: 'mqar_rows' is 0"
            )
        return self


class SearchDimension(Section):
    low: float | None = Field(None, description="lower end")
    high: float | None = Field(None, description="upper end")
    log: bool = Field(False, description="sample the logarithm")
    step: float | None = Field(None, gt=0, description="grid of the values")
    integer: bool = Field(False, description="whole numbers")
    choices: list[Any] | None = Field(None, description="a list to choose from, instead of a range")

    @model_validator(mode="after")
    def _form(self) -> SearchDimension:
        if self.choices is not None:
            if self.low is not None or self.high is not None or not self.choices:
                raise ValueError("a dimension has either 'choices' (not empty) or 'low' and 'high'")
        elif self.low is None or self.high is None or not self.low < self.high:
            raise ValueError("a dimension needs 'low' < 'high', or 'choices'")
        elif self.log and self.low <= 0:
            raise ValueError("a logarithmic dimension needs 'low' above 0")
        return self


class TuneConfig(Section):
    """The first of two stages: learning rates of each arm on validation A, the best one fitted."""

    points: int = Field(
        0,
        ge=0,
        le=101,
        description="rates an arm, around its own train.lr; 0: one shared rate, not tuned",
    )
    octaves: float = Field(
        1.0, gt=0, le=3, description="distance between neighbouring rates, in doublings"
    )
    seeds: list[int] = Field([1000], description="seeds of this stage, none of study.seeds")
    smooth: Literal["none", "linear", "quadratic"] = Field(
        "none", description="the optimum's logarithm as a function of study.x over arms"
    )

    @model_validator(mode="after")
    def _cross(self) -> TuneConfig:
        if 0 < self.points < 5:
            raise ValueError(
                f"'points' must be 0 or at least 5, which a fitted optimum needs, got {self.points}"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"'seeds' must be distinct and not negative, got {self.seeds}")
        return self


class StudyConfig(Section):
    name: str = Field(
        "single",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        max_length=100,
        description="folder under runs/",
    )
    question: str = Field("", description="what the study asks, in a sentence")
    finding: str | None = Field(None, description="id of the published finding that it tests")
    folder: str = operational("runs", "where studies live")
    grid: dict[str, list[Any]] = Field(
        {}, description="dotted field: values; all combinations are run"
    )
    arms: dict[str, dict[str, Any]] = Field(
        {}, description="label: dotted fields; instead of or times a grid"
    )
    search: dict[str, SearchDimension] = Field(
        {}, description="dotted field: range; Optuna samples it"
    )
    sampler: Literal["tpe", "random"] = Field("tpe", description="how a search samples")
    n_trials: int | None = Field(None, ge=1, description="trials of a search")
    seeds: list[int] = Field(
        [], description="paired seeds; every cell runs with each; empty: [seed]"
    )
    tune: TuneConfig = Field(TuneConfig(), description="learning rates, before what is compared")
    margin: float | None = Field(
        None, gt=0, description="nats a token; arms that differ by less are called equivalent"
    )
    x: str | None = Field(
        None, description="field on the report's horizontal axis; null: the first factor"
    )
    prune: bool = Field(False, description="stop unpromising trials of a search early")
    workers: int | None = operational(
        None, "trials at a time; null: one per train.devices GPUs or cores' worth", ge=1
    )
    retry: Literal["none", "failed"] = operational("none", "failed: run failed trials again")
    deadline: float | None = operational(
        None, "minutes; no trial is started that cannot end in time", gt=0
    )
    storage: str | None = operational(
        None, "Optuna storage URL; null: a journal file in the study's folder"
    )

    @model_validator(mode="after")
    def _cross(self) -> StudyConfig:
        if self.search and self.n_trials is None:
            raise ValueError("'n_trials' must be given with 'search'")
        if self.n_trials is not None and not self.search:
            raise ValueError("'n_trials' is of a 'search', and there is none")
        if self.prune and not self.search:
            raise ValueError("'prune' is of a 'search', and there is none")
        if self.search and (self.grid or self.arms):
            raise ValueError("'search' stands alone, without 'grid' and 'arms'")
        if self.tune.points:
            if self.search:
                raise ValueError("'tune' needs 'grid' or 'arms': a 'search' has no arms to tune")
            arms = [name for changes in self.arms.values() for name in changes]
            if "train.lr" in {*self.grid, *arms}:
                raise ValueError("'train.lr' is a factor and tuned by 'tune.points': leave one")
            both = set(self.seeds) & set(self.tune.seeds)
            if both:
                raise ValueError(
                    f"'tune.seeds' and 'seeds' share {sorted(both)}: figures need fresh seeds"
                )
        for name, values in self.grid.items():
            if not values:
                raise ValueError(f"'grid.{name}' has no values, so it matches nothing")
        if len(set(self.seeds)) != len(self.seeds) or any(s < 0 for s in self.seeds):
            raise ValueError(f"'seeds' must be distinct and not negative, got {self.seeds}")
        return self


class TrackerConfig(Section):
    """A mirror of the metrics in Weights & Biases.

    WANDB_MODE=disabled in the environment turns it off whatever stands here; else `mode` counts,
    where it is not null, then WANDB_MODE, and a mirror of which neither says anything is offline.
    """

    kind: Literal["none", "wandb"] = Field(
        "wandb", description="mirror of the metrics; never needed"
    )
    mode: Literal["offline", "online"] | None = Field(
        None, description="online needs a W&B login; null: WANDB_MODE, or else offline"
    )
    project: str = Field("ablate", description="W&B project")
    entity: str | None = Field(None, description="W&B team or user")


class Config(Section):
    """One study: what is shared by its trials, and what differs between them."""

    arch: ArchConfig = ArchConfig()
    match: MatchConfig = operational(MatchConfig(), "how arms are made equal, told by `arch` then")
    data: DataConfig = DataConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    study: StudyConfig = operational(StudyConfig(), "how the trials are made and run")
    tracker: TrackerConfig = operational(TrackerConfig(), "where metrics are mirrored")
    seed: int = Field(0, ge=0, lt=2**31, description="initial weights, data order, recall rows")


def load(tree: Mapping[str, Any]) -> Config:
    """A validated `Config`; `UserError` names the first field that is wrong."""
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        raise UserError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    """One sentence out of pydantic's first complaint."""
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"] if not str(part).endswith("]") and part not in _TYPES]
    field = ".".join(loc)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        parent = Config.model_fields
        section: Any = Config
        for part in loc[:-1]:
            section = _section_of(section.model_fields[part].annotation) if part in parent else None
            parent = section.model_fields if section else {}
        return f"unknown field '{field}'{did_you_mean(loc[-1], parent)}"
    if first["type"] == "missing":
        return f"field '{field}' is missing"
    if first["type"] == "value_error":
        named = not field or f"{field}." in message
        return message if named else f"{field}: {message}"
    # Where several types are allowed, each of them has its complaint.
    rest = [
        e["msg"] for e in error.errors()[1:] if e["loc"][: len(loc)] == first["loc"][: len(loc)]
    ]
    message = " or ".join([message, *(m.removeprefix("Input should be ") for m in rest)])
    return f"field '{field}' is {first['input']!r}: {message[0].lower()}{message[1:]}"


_TYPES = {"str", "int", "float", "bool", "none", "list", "dict", "function-after"}


def _section_of(annotation: Any) -> type[Section] | None:
    """The Section class in an annotation such as `X | None`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next((s for a in typing.get_args(annotation) if (s := _section_of(a))), None)
    return None


def fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Every leaf as (dotted name, pydantic field, operational or not)."""
    for name, info in section.model_fields.items():
        is_operational = bool(
            isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("operational")
        )
        inner = _section_of(info.annotation)
        if inner is None:
            yield prefix + name, info, is_operational
        else:
            for dotted, leaf, leaf_operational in fields(inner, f"{prefix}{name}."):
                yield dotted, leaf, is_operational or leaf_operational


def science(config: Config) -> dict[str, Any]:
    """The config without its operational fields, as plain data (nested dict)."""
    tree = config.model_dump(mode="json")
    for dotted, _, is_operational in fields():
        if is_operational:
            *parents, leaf = dotted.split(".")
            node: Any = tree
            for part in parents:
                node = node.get(part, {})
            node.pop(leaf, None)
    return {name: section for name, section in tree.items() if section != {}}


def value_of(word: str) -> Any:
    """The value of a `name=value` word, by the grammar of overrides or as JSON or YAML; `UserError`
    if it has none."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word).value()
    except HydraException as error:
        try:
            return yaml.safe_load(word.partition("=")[2])
        except yaml.YAMLError:
            raise UserError(f"'{word}' {unreadable(error)}") from None


def unreadable(error: Exception) -> str:
    """What to tell of a word that the grammar does not take, after the word."""
    reason = str(error).splitlines()[0].rstrip(".")
    return (
        f"cannot be read as name=value ({reason}); "
        "put quotes within the word around a value with brackets, commas, spaces, ~ or letters "
        "beyond a to z, as in 'data.path=\"my texts\"'"
    )


def override(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a plain config dict with dotted fields set; `UserError` for an unknown field."""
    result: dict[str, Any] = copy.deepcopy(dict(tree))
    for dotted, value in changes.items():
        *parents, leaf = dotted.split(".")
        node: Any = result
        for depth, part in enumerate(parents):
            if not isinstance(node.get(part), dict):
                where = ".".join(parents[: depth + 1])
                raise UserError(f"unknown field '{where}' in '{dotted}'{did_you_mean(part, node)}")
            node = node[part]
        if leaf not in node:
            raise UserError(f"unknown field '{dotted}'{did_you_mean(leaf, node)}")
        node[leaf] = copy.deepcopy(value)
    return result


def get(tree: Mapping[str, Any], dotted: str) -> Any:
    """The value of a dotted field of a plain config dict, or None where it is not there."""
    node: Any = tree
    for part in dotted.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a plain value is a number, which Python's booleans are too."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict under dotted names; an empty dict is a leaf."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
