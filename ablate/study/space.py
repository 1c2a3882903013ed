"""Which trials a study has: grid × arms × seeds, or what a search proposes.

Every cell is resolved and checked before anything runs, so one bad cell stops the study by name.
Cells that come to the same run (two shares that give one pattern) are one cell with two labels.
Where arms are matched (`match.by`) a cell's architecture is made equal to the target here, and the
arm as configured, the unmatched swap, becomes a cell of its own where `match.arms` asks for it.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ablate import config
from ablate.arch import match as matching
from ablate.arch.certificate import Certificate
from ablate.errors import UserError, did_you_mean
from ablate.layers.registry import by_name
from ablate.study import trial as trial_module
from ablate.study import tune as rates
from ablate.study.folder import tuning_name
from ablate.study.trial import Trial

_TUNING = {f"study.tune.{name}" for name in config.TuneConfig.model_fields} - {"study.tune.points"}
_SHARES = {"arch.attention_share": "attention_of_layers", "arch.mlp_share": "mlp_of_layers"}


@dataclass(frozen=True)
class Cell:
    """One trial of a study and what it stands for.

    arm: the label that trials differing only in the seed share; factors: dotted field -> value;
    also: labels of other arms that turned out to be the same run; stage: whether it looks for its
    arm's learning rate or gives the figures that arms are compared by.
    """

    arm: str
    factors: dict[str, Any]
    seed: int
    trial: Trial
    also: tuple[str, ...] = ()
    stage: Literal["tune", "confirm"] = "confirm"

    @property
    def name(self) -> str:
        """The arm, and the learning rate that is tried for it."""
        return self.arm if self.stage == "confirm" else tuning_name(self.arm, self.rate)

    @property
    def rate(self) -> float:
        return self.trial.config.train.lr

    @property
    def key(self) -> str:
        return self.trial.key

    @property
    def certificate(self) -> Certificate | None:
        """How its architecture was matched; None for one as configured."""
        plain = self.trial.config.match.certificate
        return None if plain is None else Certificate(**plain)


@dataclass(frozen=True)
class _Goal:
    """What the arms are matched to, and where the figure is from."""

    target: float
    reference: str


def cells(tree: Mapping[str, Any]) -> list[Cell]:
    """All cells of a grid or of arms, seed by seed; empty for a search, which makes its own.

    Raises UserError, naming the cell, when any of them cannot be run.
    """
    base = full(tree)
    cfg = config.load(base)
    fields = factor_names(cfg)
    _check_fields([name for name in fields if name != "match.arms"])
    seeds = cfg.study.seeds or [cfg.seed]
    make = functools.partial(_cell, base, fields)
    if cfg.study.search:
        _check_search(cfg, make)
        return []
    combinations = list(_combinations(cfg))
    goal = _goal(cfg, functools.partial(make, seed=seeds[0]), dict(combinations))
    found: dict[str, Cell] = {}
    keys = []
    for seed, (label, changes) in itertools.product(seeds, combinations):
        made = [make(label, changes, seed, goal)]
        keys.append(({**changes, "seed": seed}, made[0].key))
        certificate = made[0].certificate
        if certificate is not None and cfg.match.arms == "both" and certificate.needed:
            swap = {**changes, "match.arms": "unmatched"}
            made.append(make(f"{label}, unmatched", swap, seed))
        for cell in made:
            first = found.setdefault(cell.key, cell)
            if cell.arm not in (first.arm, *first.also):
                found[cell.key] = replace(first, also=(*first.also, cell.arm))
    _check_effects(cfg.study.grid, keys)
    _check_axis(cfg.study.x, found.values())
    names = Counter((cell.arm, cell.seed) for cell in found.values())
    (label, seed), count = names.most_common(1)[0]
    if count > 1:  # a report would take them for more runs of one arm
        raise UserError(
            f"{count} different arms are called '{label}', which shows six digits: give values "
            "that are further apart, or study.arms, which have names"
        )
    return list(found.values())


def _check_axis(x: str | None, cells: Iterable[Cell]) -> None:
    """UserError where `study.x` is a field of no cell."""
    if x is None or any(_has(cell.trial.tree, x) or x in cell.factors for cell in cells):
        return
    known = [name for name, _, _ in config.fields()]
    raise UserError(f"study.x is '{x}', which is no field{did_you_mean(x, known)}")


def _has(tree: Mapping[str, Any], dotted: str) -> bool:
    *parents, leaf = dotted.split(".")
    node = config.get(tree, ".".join(parents)) if parents else tree
    return isinstance(node, Mapping) and leaf in node


def _check_effects(
    grid: Mapping[str, Sequence[Any]], keys: Sequence[tuple[dict[str, Any], str]]
) -> None:
    """UserError where a field of the grid changes no run. keys: of each cell's changes."""
    for name, values in grid.items():
        others: dict[str, set[str]] = {}
        for changes, key in keys:
            rest = repr({k: v for k, v in changes.items() if k != name})
            others.setdefault(rest, set()).add(key)
        if len(values) > 1 and all(len(runs) == 1 for runs in others.values()):
            raise UserError(
                f"study.grid.{name}: {', '.join(map(_text, values))} give the same run in every "
                "arm; vary what the layers of an arm heed, or leave it out"
            )


def check_words(words: Sequence[str], cells: Sequence[Cell], study: config.StudyConfig) -> None:
    """UserError where a word of the command line sets what no cell heeds. A search has no cells:
    its layers are not known before."""
    used = {letter for cell in cells for letter in cell.trial.architecture.letters}
    for word in words if cells else ():
        name = word.lstrip("+~").partition("=")[0]
        if study.seeds and name == "seed":
            raise UserError(
                f"'{word}' changes no run: study.seeds is {study.seeds}; give study.seeds=[…]"
            )
        if not study.tune.points and name in _TUNING:
            raise UserError(f"'{word}' changes no run: study.tune.points is 0; give five or more")
        option = re.match(r"[+~]*arch\.(\w+)\.", word)
        kind = by_name(option[1]) if option else None
        if kind is not None and kind.letter not in used:
            raise UserError(
                f"'{word}' changes no run: no arm has a layer '{kind.letter}', which "
                f"arch.{kind.name} is of; there are {', '.join(sorted(used))}"
            )


def _goal(
    cfg: config.Config, make: Callable[..., Cell], named: dict[str, dict[str, Any]]
) -> _Goal | None:
    """The target of `match`, from the arm that has it where it is not a figure.

    make: the cell of a label and its changes; named: the changes of every arm.
    """
    match = cfg.match
    if not _matches(match) or isinstance(match.target, int | float):
        return _stated_goal(match)
    if len(named) == 1:
        raise UserError(
            "match.target must be a figure where a study has one arm: it would be matched with "
            "itself"
        )
    reference = match.target or next(iter(named))
    if reference not in named:  # an arm is also called by the share that came out
        named = {make(label, changes).arm: changes for label, changes in named.items()}
    if reference not in named:
        raise UserError(
            f"match.target is '{reference}', but no arm is called so"
            f"{did_you_mean(reference, named)}; there are {', '.join(map(repr, named))}"
        )
    cell = make(reference, named[reference])
    trial = cell.trial
    target = matching.figures(trial.architecture, trial.config.data.seq_len)[match.quantity]
    if not target > 0:
        raise UserError(f"match.target: the arm '{cell.arm}' has no {match.quantity} to match")
    return _Goal(target, f"'{cell.arm}'")


def _matches(match: config.MatchConfig) -> bool:
    return match.by is not None and match.arms != "unmatched"


def _stated_goal(match: config.MatchConfig) -> _Goal | None:
    """The goal where `match.target` is a figure; None where it is none, or nothing is matched."""
    if _matches(match) and isinstance(match.target, int | float):
        return _Goal(match.target, "match.target")
    return None


def _match(trial: Trial, goal: _Goal) -> dict[str, Any]:
    """The tree of a trial, with its architecture matched."""
    cfg = trial.config
    changes, certificate = matching.solve(
        cfg.arch,
        trial.architecture,
        cfg.match,
        seq_len=cfg.data.seq_len,
        target=goal.target,
        reference=goal.reference,
    )
    return config.override(
        trial.tree,
        {
            **{f"arch.{name}": value for name, value in changes.items()},
            "match.certificate": certificate.plain(),
            "match.arms": "matched",
        },
    )


def tuning(cfg: config.Config, arms: Sequence[Cell]) -> list[Cell]:
    """The first stage of a study whose arms, at their own learning rate, are `cells`."""
    tune = cfg.study.tune
    _check_tuning(cfg, arms)
    one = {cell.arm: cell for cell in arms}.values()
    return [
        _at_rate(cell, rate, seed, "tune")
        for seed in tune.seeds
        for cell in one
        for rate in rates.grid(cell.rate, tune.points, tune.octaves)
    ]


def confirming(arms: Sequence[Cell], chosen: Mapping[str, float]) -> list[Cell]:
    """The second stage: every cell at the learning rate that was chosen for its arm."""
    return [_at_rate(cell, chosen[cell.arm], cell.seed, "confirm") for cell in arms]


def place(cell: Cell, x: str | None) -> float | None:
    """Where a cell's arm stands on the axis of the study: `x`, or else its first factor."""
    value = config.get(cell.trial.tree, x) if x else next(iter(cell.factors.values()), None)
    return float(value) if config.is_number(value) else None


def _check_tuning(cfg: config.Config, arms: Sequence[Cell]) -> None:
    tune = cfg.study.tune
    if not cfg.study.seeds and cfg.seed in tune.seeds:
        raise UserError(
            f"study.tune.seeds has {cfg.seed}, which is `seed`: figures need fresh seeds"
        )
    for cell in arms:
        for rate in rates.grid(cell.rate, tune.points, tune.octaves):
            if rate > 10:
                raise UserError(
                    f"study.tune.points {tune.points} with study.tune.octaves {tune.octaves:g} "
                    f"tries the learning rate {rate:.3g} for '{cell.arm}'; the most is 10"
                )
    if tune.smooth != "none":
        places = {cell.arm: place(cell, cfg.study.x) for cell in arms}
        least = 4 if tune.smooth == "quadratic" else 3
        wrong = next((arm for arm, x in places.items() if x is None), None)
        if wrong is not None:
            raise UserError(
                f"study.tune.smooth is '{tune.smooth}', but the factor of arm '{wrong}' is no "
                "number; give study.x a numeric field, or study.tune.smooth=none"
            )
        if len(set(places.values())) < least:
            raise UserError(
                f"study.tune.smooth is '{tune.smooth}', which needs {least} different values of "
                f"the factor, got {len(set(places.values()))}"
            )


def _at_rate(cell: Cell, rate: float, seed: int, stage: Literal["tune", "confirm"]) -> Cell:
    tree = config.override(cell.trial.tree, {"train.lr": rate, "seed": seed})
    factors = {**cell.factors, "train.lr": rate} if stage == "tune" else cell.factors
    trial = trial_module.resolve(tree)
    return replace(cell, factors=factors, seed=seed, trial=trial, stage=stage)


def full(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A composed tree with every field written out, as plain data."""
    return config.load(tree).model_dump(mode="json")


def factor_names(cfg: config.Config) -> list[str]:
    """Dotted fields in which the study's trials differ, seeds apart."""
    study = cfg.study
    names = [*study.grid, *itertools.chain.from_iterable(study.arms.values()), *study.search]
    if cfg.match.by is not None and cfg.match.arms == "both" and not study.search:
        names.append("match.arms")
    return list(dict.fromkeys(names))


def proposed(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> list[Cell]:
    """The cells of one proposal of a search: one a seed."""
    base = full(tree)
    cfg = config.load(base)
    goal = _search_goal(cfg)
    seeds = cfg.study.seeds or [cfg.seed]
    return [_cell(base, list(changes), _label(changes), changes, seed, goal) for seed in seeds]


def _search_goal(cfg: config.Config) -> _Goal | None:
    goal = _stated_goal(cfg.match)
    if goal is None and _matches(cfg.match):
        raise UserError("match.target must be a figure with study.search: there is no first arm")
    return goal


def _check_search(cfg: config.Config, make: Callable[..., Cell]) -> None:
    """UserError unless both ends (or all choices) of every dimension can be run."""
    seed = (cfg.study.seeds or [cfg.seed])[0]
    goal = _search_goal(cfg)
    for name, dim in cfg.study.search.items():
        if dim.integer and any(v is not None and v != int(v) for v in (dim.low, dim.high)):
            raise UserError(f"study.search.{name}: 'low' and 'high' of whole numbers must be whole")
        if dim.log and dim.step is not None:
            raise UserError(f"study.search.{name}: 'log' and 'step' cannot be combined")
        if dim.step is not None and dim.integer and dim.step != int(dim.step):
            raise UserError(
                f"study.search.{name}: 'step' of whole numbers must be whole, got {dim.step:g}"
            )
        if dim.step is not None and dim.step > (dim.high or 0) - (dim.low or 0):
            raise UserError(
                f"study.search.{name}: 'step' {dim.step:g} leads out of the range from "
                f"{dim.low:g} to {dim.high:g}"
            )
        cast = int if dim.integer else float
        ends = dim.choices if dim.choices is not None else [cast(dim.low or 0), cast(dim.high or 0)]
        for value in ends:
            make(_label({name: value}), {name: value}, seed, goal)
        if dim.integer or dim.low is None or dim.high is None:
            continue
        between = dim.low + (dim.step or 0.382 * (dim.high - dim.low))
        try:
            make(_label({name: between}), {name: between}, seed, goal)
        except UserError as error:
            if "valid integer" in str(error):  # else a proposal like it is passed over
                raise UserError(
                    f"study.search.{name} draws fractions, which the field does not take: "
                    "give it integer: true"
                ) from None


def _cell(
    base: dict[str, Any],
    fields: Sequence[str],
    label: str,
    changes: Mapping[str, Any],
    seed: int,
    goal: _Goal | None = None,
) -> Cell:
    """`base` with the changes and the seed, matched to the goal; fields: those of its factors."""
    try:
        tree = config.override(_with_options(base, changes), {**changes, "seed": seed})
        trial = trial_module.resolve(tree)
        if goal is not None:
            trial = trial_module.resolve(_match(trial, goal))
    except UserError as error:
        if not changes:
            raise
        raise UserError(f"cell '{label}': {error}") from None
    factors = {name: config.get(trial.tree, name) for name in fields}
    return Cell(_realised(label, changes, trial), factors, seed, trial)


def _realised(label: str, changes: Mapping[str, Any], trial: Trial) -> str:
    """A label with the shares that came out: of 24 layers, 0.17 asked for is 4, 0.167."""
    shares = trial.architecture.shares()
    for name, share in _SHARES.items():
        if changes.get(name) is not None:
            short = name.partition(".")[2]
            asked = f"{short}={_text(changes[name])}"
            label = label.replace(asked, f"{short}={shares[share]:.3g}")
    return label


def _with_options(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which layer options that are to be changed exist, even if left at their default."""
    arch = dict(base["arch"])
    for name in changes:
        match name.split("."):
            case ["arch", kind, option] if kind not in config.ArchConfig.model_fields:
                arch[kind] = {option: None, **arch.get(kind, {})}
    return {**base, "arch": arch}


def _combinations(cfg: config.Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """(label, changes) of every arm combined with every point of the grid."""
    study = cfg.study
    arms = study.arms or {"": {}}
    for arm, arm_changes in arms.items():
        for values in itertools.product(*study.grid.values()):
            point = dict(zip(study.grid, values, strict=True))
            both = set(arm_changes) & set(point)
            if both:
                raise UserError(
                    f"'{min(both)}' is in study.grid and in study.arms.{arm}: leave one"
                )
            label = ", ".join(part for part in (arm, _label(point)) if part)
            yield label or cfg.arch.name or study.name, {**arm_changes, **point}


def _check_fields(names: Sequence[str]) -> None:
    for name in names:
        if name == "seed":
            raise UserError("'seed' cannot be a factor of a study: give study.seeds instead")
        if name.split(".")[0] in ("study", "tracker", "match"):
            raise UserError(f"'{name}' cannot be a factor of a study: it is one thing for all arms")


def _label(changes: Mapping[str, Any]) -> str:
    """`attention_share=0.25, mlp_share=0`, with as much of a name as tells it from the others."""
    parts = []
    for name, value in changes.items():
        pieces = name.split(".")
        short = next(
            tail
            for n in range(1, len(pieces) + 1)
            for tail in [".".join(pieces[-n:])]
            if sum(other == tail or other.endswith(f".{tail}") for other in changes) == 1
        )
        parts.append(f"{short}={_text(value)}")
    return ", ".join(parts)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ",".join(_text(v) for v in value) + "]"
    return str(value)
