"""From command-line words to one plain config dict, by Hydra.

`conf/` holds the groups, `sweeps/` the questions; both stand beside the package in a checkout and
inside it in a wheel. A `sweeps/` (or `conf/`) in the working directory is found too and wins.
Hydra only composes: it changes no directory, writes no folder and configures no logging.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ablate.config import is_number, unreadable
from ablate.errors import UserError, did_you_mean

_PACKAGE = Path(__file__).resolve().parent
GROUPS = (
    *("arch", "layer", "match", "data", "train", "evaluate", "study", "tracker"),
    *("scale", "sweep"),
)


def shipped(name: str) -> Path:
    """`conf` or `sweeps` as shipped: beside the package in a checkout, inside it in a wheel."""
    inside = _PACKAGE / "_data" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


_OPEN = ("study.grid=", "study.arms=", "study.search=", "arch.overrides=", "evaluate.sizes=")

# What sweep and scale files may compute from other fields, as ${name:a,b}.
_RESOLVERS: dict[str, Callable[..., float]] = {
    "div": lambda a, b: a // b,
    "times": lambda a, b: a * b,
    "up": lambda a, b: -(-a // b) * b,  # rounded up to a multiple
    "some": lambda share, n: max(share, 1 / n),  # a share of n layers, one layer at least
    "index": lambda n, share: round(share * (n - 1)),  # position in a stack of n layers
    # d_model scaled, to a multiple that Mamba-2's heads (head_dim of 2 * d_model) divide
    "width": lambda d, factor, head_dim: max(1, round(2 * d * factor / head_dim)) * head_dim // 2,
}


def _numbers_only(resolver: Callable[..., float]) -> Callable[..., Any]:
    """Computes with numbers; anything else is passed on, for the typed config to refuse by name."""

    def resolve(*args: Any) -> Any:
        numbers = all(map(is_number, args))
        if numbers:  # data.seq_len=1e3 is a whole number, here too
            args = tuple(int(a) if float(a).is_integer() else a for a in args)
        try:
            return resolver(*args) if numbers else args[0]
        except ZeroDivisionError:
            return args[0]

    return resolve


@dataclass(frozen=True)
class Composed:
    """A composed config: the plain tree, and which choice each group had."""

    tree: dict[str, Any]
    choices: dict[str, str]
    notes: list[str]


def compose(overrides: Sequence[str]) -> Composed:
    """Compose `conf/config.yaml` with override words; `UserError` for a word that is wrong."""
    for word in overrides:
        _check_word(word)
    # The keys of these are the user's own: setting one adds to what the sweep has.
    words = [f"++{w}" if w.startswith(_OPEN) else w for w in overrides]
    notes = []
    scales = [w for w in words if w.startswith("scale=")]
    auto = scales[-1:] in ([], ["scale=auto"])
    if auto:  # a user's own config.yaml may name another; `auto` has no field that a scale sets
        # and a sweep, which names no scale, may ask for such a field
        named = {w: re.split("[@=]", w.lstrip("+~"))[0] for w in words}
        groups = [w for w, group in named.items() if group in GROUPS and group != "sweep"]
        auto = _compose(groups)[1].get("scale") == "auto"
    if auto:
        scale, why = _scale_of_this_machine()
        words = [w for w in words if not w.startswith("scale=")] + [f"scale={scale}"]
        notes.append(f"scale auto: {scale} ({why})")
    tree, choices = _compose(words)
    sweeps, study = _sweeps_of(words), tree["study"]
    given = any(w.lstrip("+").startswith("study.name=") for w in words)
    if len(sweeps) == 1 and isinstance(study, dict) and study["name"] == "single" and not given:
        study["name"] = sweeps[0]  # of a question that names none; `single` is what no study is
    by_word = any(w.startswith(("match=", "match.by=")) for w in words)
    arms_by_word = any(w.startswith("match.arms=") for w in words)
    match = tree.get("match")
    if (
        by_word
        and not arms_by_word
        and isinstance(match, dict)
        and match.get("arms") == "unmatched"
    ):
        match["arms"] = "both"  # a scale that matches nothing does so where nobody asks for it
    _check_effect(words, tree)
    return Composed(tree, choices, notes)


# What has no meaning beside a field that is given: the first that is wins.
_MADE = ("attention_share", "mlp_share", "placement", "mixer_letter", "attention_letter")
_UNUSED = {
    "pattern": ("n_layers", *_MADE, "mlp_letter"),
    "unit": (*_MADE, "mlp_letter"),
    "positions": ("attention_share", "placement"),
}


def _check_effect(words: Sequence[str], tree: dict[str, Any]) -> None:
    """UserError for a word that sets what nothing reads: its author expects it to change what is
    trained."""
    set_by = {w.lstrip("+").partition("=")[0]: w.lstrip("+") for w in words}
    arch, match = (tree.get(name) for name in ("arch", "match"))
    if isinstance(arch, dict):
        given = next((name for name in _UNUSED if arch.get(name) is not None), "")
        for name in _UNUSED.get(given, ()):
            if word := set_by.get(f"arch.{name}"):
                raise UserError(
                    f"{word} changes nothing beside arch.{given}, which is {arch[given]!r}; leave "
                    f"it out, or give arch.{given}=null"
                )
    if isinstance(match, dict) and match.get("by") is None:
        for name in ("quantity", "target", "tolerance", "force"):
            if word := set_by.get(f"match.{name}"):
                raise UserError(
                    f"{word} changes nothing while match.by is null; leave it out, or say what "
                    "moves to make arms equal, such as match=mlp_width"
                )


def register_sweeps(words: Sequence[str]) -> None:
    """Make every sweep YAML a choice of the group `sweep`; the user's own shadow the shipped.

    UserError for one that cannot be a choice and that words ask for: a draft stops nothing else.
    """
    folders = (shipped("sweeps"), Path.cwd() / "sweeps")
    paths = [path for folder in folders for path in _yaml_files(folder)]
    wrong = _register(tuple((path, path.stat().st_mtime_ns) for path in paths))
    for name in _sweeps_of(words):
        if name in wrong:
            raise UserError(wrong[name])


@functools.lru_cache(maxsize=1)
def _register(files: tuple[tuple[Path, int], ...]) -> dict[str, str]:
    """What is wrong with files, by name. They come with their times of modification: done again
    when any is another."""
    wrong: dict[str, str] = {}
    store = ConfigStore.instance()
    store.repo.pop("sweep", None)  # what was a sweep before may be none now
    for path in {path.stem: path for path, _ in files}.values():
        try:
            node = OmegaConf.load(path)
        except Exception as error:  # a YAML error names its own line
            reason = " ".join(str(error).split())
            wrong[path.stem] = f"sweep file {path.name} is not valid YAML: {reason}"
            continue
        if not isinstance(node, DictConfig):
            wrong[path.stem] = (
                f"sweep file {path.name} is a list; it must be names with values, "
                f"such as 'study: {{name: {path.stem}}}'"
            )
            continue
        store.store(group="sweep", name=path.stem, node=node, package="_global_")
    return wrong


def _yaml_files(folder: Path) -> list[Path]:
    """Of a folder, without what editors and systems leave there: names that begin with a dot, links
    to nothing."""
    return [p for p in sorted(folder.glob("*.yaml")) if p.name[0] != "." and p.is_file()]


def choices_of(group: str) -> list[str]:
    """What a config group can be."""
    own = Path.cwd() / ("sweeps" if group == "sweep" else f"conf/{group}")
    base = shipped("sweeps") if group == "sweep" else shipped("conf") / group
    return sorted({p.stem for folder in (base, own) for p in _yaml_files(folder)} - {"base"})


def _sweeps_of(words: Sequence[str]) -> list[str]:
    """The sweeps that words ask for."""
    values = [w.partition("=")[2] for w in words if re.match(r"\+{0,2}sweep(@[^=]*)?=", w)]
    return [name.strip(" '\"") for value in values for name in value.strip("[]").split(",")]


def own_conf() -> list[str]:
    """The word that has Hydra look for choices in ./conf too, where there is one."""
    own = Path.cwd() / "conf"
    if not own.is_dir() or own.resolve() == shipped("conf").resolve():
        return []
    quoted = str(own).replace('"', '\\"')  # the grammar takes few letters without quotes
    return [f'hydra.searchpath=["file://{quoted}"]']


def _compose(words: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    register_sweeps(words)
    for name, resolver in _RESOLVERS.items():
        OmegaConf.register_new_resolver(name, _numbers_only(resolver), replace=True)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(shipped("conf")), version_base="1.3"):
            overrides = [*own_conf(), *words]
            cfg = hydra_compose("config", overrides=overrides, return_hydra_config=True)
            choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
            OmegaConf.set_struct(cfg, False)
            del cfg["hydra"]
            tree = OmegaConf.to_container(cfg, resolve=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_of_defaults(words) or _sentence(error, words)) from None
    assert isinstance(tree, dict)
    assert isinstance(choices, dict)
    return (
        {str(k): v for k, v in tree.items()},
        {str(k): str(v) for k, v in choices.items() if not str(k).startswith("hydra/")},
    )


def _scale_of_this_machine() -> tuple[str, str]:
    import torch

    if torch.cuda.is_available():
        return "14m", torch.cuda.get_device_name(0)
    return "cpu", "no CUDA GPU here"


def _check_word(word: str) -> None:
    if re.fullmatch(r"[+~]{0,2}[A-Za-z_][\w./@*-]*(=.*)?", word, re.DOTALL) is None:
        raise UserError(f"'{word}' is not understood: settings are written name=value")
    name = word.lstrip("+~").split("=")[0]
    if "=" not in word and not word.startswith("~"):
        raise UserError(f"'{word}' has no value: settings are written name=value")
    if name == "sweep" and not word.startswith("+"):
        raise UserError(f"'{word}' needs a plus sign: +{word}")
    value = word.partition("=")[2]
    plain = r"[+-]?[\d._]+(e[+-]?\d+)?|true|false|null|"
    parts = [part.strip() for part in value.strip("[]").split(",")] if "=" in word else []
    if name in GROUPS and any(re.fullmatch(plain, part) for part in parts):
        known = ", ".join(choices_of(name))
        raise UserError(f"{name} is '{value}', and must be one of {known}: fields are {name}.…=")


def _sentence(error: Exception, words: list[str]) -> str:
    """Hydra's message, told as one sentence about the user's own words."""
    text = str(error)
    cause = f"{text}\n{error.__cause__ or ''}"
    missing = re.search(r"Could not find '([\w/]+)/([^'/]+)'", cause)
    if missing:
        group, choice = missing[1], missing[2]
        known = choices_of(group)
        if not known:
            return f"{group}={choice}: there is no such group"
        return (
            f"{group}={choice}: there is no such choice{did_you_mean(choice, known)}; "
            f"there are {', '.join(known)}"
        )
    unknown = re.search(r"Could not override '([^']+)'", cause) or re.search(
        r"Could not append to config\. An item is already at '([^']+)'", cause
    )
    if unknown:
        name = unknown[1]
        if "already at" in cause:
            return f"'+{name}' is there already: write {name}=… without the plus sign"
        return f"unknown field '{name}'{_meant(name)}"
    group = re.search(r"Could not override '([^']+)'\.\s*No match in the defaults list", cause)
    if group:
        return f"unknown group '{group[1]}'{did_you_mean(group[1], GROUPS)}"
    if re.search(r"(Lexer|Parser|mismatched|extraneous|no viable|token recognition)", cause):
        for word in words:
            if word in cause or not _readable(word):
                return f"'{word}' {unreadable(error)}"
    unfit = re.search(r"Error merging override [+~]*([\w.]+)=(.*)", cause)
    if unfit:
        return f"{unfit[1]} is '{unfit[2]}', and must be {{…}}, names with values"
    return " ".join(text.split())


def _of_defaults(words: list[str]) -> str | None:
    """What is wrong with the `defaults` of a sweep that words ask for: it fails without the others.

    Hydra looks for what they name among the sweeps unless told otherwise.
    """
    for name in _sweeps_of(words):
        stored = ConfigStore.instance().repo.get("sweep", {}).get(f"{name}.yaml")
        own = [f"+sweep={name}"]
        if stored is None or "defaults" not in stored.node or words == own:
            continue
        try:
            _compose(own)
        except UserError as error:
            reason = str(error).partition(". Config search path")[0]
            if not re.search(
                "Could not|Multiple values|there is no such group|[Dd]efaults", reason
            ):
                continue  # it fails for another reason
            return (
                f"sweep file {name}.yaml: its 'defaults' cannot be used ({reason}); "
                "the choice of another group is written as '- override /data: files'"
            )
    return None


def each_of(word: str) -> list[str]:
    """The words that one word of Hydra's multirun, such as a=1,2, stands for."""
    try:
        override = OverridesParser.create().parse_override(word)
        if override.is_sweep_override():
            name = override.get_key_element()
            return [f"{name}={value}" for value in override.sweep_string_iterator()]
    except HydraException:
        pass  # told by `compose`
    return [word]


def _readable(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _meant(name: str) -> str:
    """` (did you mean 'a.x' or 'b.x'?)`: the fields whose last part is closest to that of name, or
    the one of its own group."""
    from ablate import config

    paths = {d.rsplit(".", n)[0] for d, _, _ in config.fields() for n in range(d.count(".") + 1)}
    last = {path: path.rsplit(".", 1)[-1] for path in sorted(paths)}
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], set(last.values()), n=1)
    meant = [path for path, part in last.items() if part in close]
    group = name.rpartition(".")[0]
    meant = [path for path in meant if path.rpartition(".")[0] == group] or meant
    shown = " or ".join(f"'{path}'" for path in meant[:3])
    return f" (did you mean {shown}?)" if meant else ""
