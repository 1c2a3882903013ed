"""The command line: `python -m ablate [VERB] [name=value …]`, thin over the library.

The verb is taken before Hydra composes. A user's mistake ends with exit code 2 and one sentence;
a study with failed trials with 1; an interrupted one with 130.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ablate.errors import UserError, did_you_mean

USAGE = """\
usage: python -m ablate [VERB] [name=value ...] [+sweep=NAME]

Decide how a hybrid language model should be built: train small models that differ in one thing,
and read what the difference does to loss and recall.

  run       (default) run a study; the same command again continues it
  plan      what would run, how long it takes, and what it could decide
  prepare   find, tokenise and cache the text; trains nothing
  cost      layers, parameters, FLOPs and state bytes of an architecture
  status    FOLDER...      states of the trials of a study
  report    FOLDER...      tables, plots and one page from run folders
  evaluate  RUN_FOLDER     recall, benchmarks and loss over length of a trained model
  rerun     RUN_FOLDER     train one trial again and compare its losses
  import    EXPORT...      run folders of a study that was exported, to go on with it
  bench     data | kernels | train | decode   speed of the loader, kernels, training, decoding

  python -m ablate +sweep=attn_ratio             what share of the layers should be attention?
  python -m ablate +sweep=attn_ratio scale=14m   the same question, larger
  python -m ablate cost arch=samba_421m
  python -m ablate arch.pattern=M-x2.*- train.lr=2e-3

`python -m ablate VERB --help` tells more. Every field: ablate/config.py and conf/.
"""

HELP = {
    "run": """\
usage: python -m ablate [run] [+sweep=NAME] [name=value ...]

Runs every trial of the study and writes runs/<study>/. Press Ctrl-C to stop: what is finished
stays, what runs is checkpointed, and the same command continues. Nothing finished runs twice.

  +sweep=NAME           the question: {sweeps}
  scale=NAME            depth, width, tokens and batch: {scales}
  data=NAME             the text: {data}   (data=files data.path=FOLDER_OR_FILE)
  arch=NAME             a published architecture, or hybrid
  study.seeds=[0,1,2]   paired seeds          study.workers=2     trials at a time
  match=mlp_width       arms made equal in size by what may move (conf/match)
  study.tune.points=5   first a stage that tunes each arm's learning rate
  study.retry=failed    run failed ones again study.folder=DIR    instead of runs/
  tracker=none          no W&B mirror (default: W&B offline, or as WANDB_MODE says)
  -m a=1,2 b=3,4        Hydra's own multirun, one plain trial a job
""",
    "plan": """\
usage: python -m ablate plan [+sweep=NAME] [calibrate=true] [hours=N] [gpu=NAME] [name=value ...]

Prints every trial that `run` with the same words would train: pattern, parameters, FLOPs, bytes of
state and memory, seconds with the source of the estimate, the certificate of each matched arm, the
total of each stage, epochs over the text, and the smallest difference that seeds detect, with the
source of the noise. Writes no run folder.

  calibrate=true   train 20 steps of each arm here to know its speed and memory; otherwise from
                   earlier runs on this hardware, or else from the cost contract
  hours=24         what so many GPU-hours could decide
  gpu=H100         plan for a GPU that is not here
""",
    "prepare": """\
usage: python -m ablate prepare [+sweep=NAME] [name=value ...]

Finds the text, trains or loads the tokenizer, writes the token shards to the cache (data.cache),
and prints tokens and bytes of each split. `run` does the same first; this does it beforehand.
""",
    "cost": """\
usage: python -m ablate cost [arch=NAME] [name=value ...]

Prints an architecture's layers with parameters, FLOPs a token, and the bytes of state a decoder
keeps, at several lengths, beside the published figure where there is one.
Published architectures: {archs}
""",
    "status": """\
usage: python -m ablate status FOLDER...

Prints the state of every trial in a study's folder (runs/NAME) and the cause of each failure.
""",
    "report": """\
usage: python -m ablate report FOLDER... [export=DIR]

Writes FOLDER/report/: index.html (one page, everything inside), plots as PNG and SVG, tables as
CSV, Parquet and Markdown. Works on an unfinished study and says what is missing.

  export=DIR   write DIR/<name of FOLDER>/ first: a small folder of frames that can be committed,
               without checkpoints, machine paths and host names, and report on that. `report` reads
               such a folder as it reads run folders.
""",
    "rerun": """\
usage: python -m ablate rerun RUN_FOLDER [times=5]

Trains a finished trial again from its own config.yaml, in a temporary folder, and compares the
losses. Exit code 0 when they agree within the stated tolerance, 1 when not. The tolerance is zero
where train.deterministic is true and all else is equal; where it is false, the spread of five
reruns. Comparisons are kept in RUN_FOLDER/evaluation/rerun.json.
""",
    "import": """\
usage: python -m ablate import EXPORT... [study.folder=DIR]

Makes runs/<name>/ from a study that `report export=DIR` wrote (analysis/results/attn_ratio), with
the configs, figures, curves and scores of its finished trials, without weights. The study's command
(in EXPORT/README.md) then trains what is missing beside them: more seeds, arms or points of a grid.
`rerun` trains one of them again. What is there already stays.

  study.folder=DIR   instead of runs/
""",
    "evaluate": """\
usage: python -m ablate evaluate RUN_FOLDER | MODEL [name=value ...]

Evaluates trained weights (train.keep=weights keeps them), or a transformers model from a folder
or the hub. Writes RUN_FOLDER/evaluation/: a file a task, with items. Without recall, suites and
length: what the run's config asks for, or every recall task but needle_multivalue.

  recall=[phonebook,needle]  phonebook, phonebook_reversed, passkey, needle, needle_multivalue,
                             mqar_text, induction, copying
  sizes="{{entries: [10, 20], lengths: [1024], items: 50}}"
  suites=[small,piqa@5]      small, mamba7b, btlm, oute, empirical12, mmlu, or single tasks
  local_data=FOLDER          <task>/<split>.jsonl instead of the hub
  length=[1,2,4]             loss on the same tokens at multiples of the training length
  long_documents=FILE        limit=100        device=cpu       out=FOLDER
  max_length=8192            tokens that a transformers model reads; what is longer is cut
  remote_code=true           run the code that comes with a transformers model (default: never)
""",
    "bench": """\
usage: python -m ablate bench data | kernels | train [NAME...] | decode NAME...

data     tokens a second that the loader delivers, against ten times the fastest planned step
kernels  our kernels beside every installed peer, on a GPU
train    tokens a second, MFU, memory, seconds to the first step and kernel time of named models,
         beside installed peers, on a GPU unless train.device=cpu is given
decode   tokens a second and bytes of state against context, architectures side by side, on a GPU
         unless --device cpu is given
""",
}

# Hydra's own flags; a command with one of them goes to Hydra's own main function.
_HYDRA_FLAGS = {"-m", "--multirun", "-c", "--cfg", "-p", "--package", "-i", "--info", "--resolve"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(args)
    except UserError as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ablate: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `ablate cost | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno is None:
            raise
        # a full or read-only disk, a file where a folder should be: what was trained stays
        where = f"'{error.filename}': " if error.filename else ""
        print(f"ablate: {where}{error.strerror}", file=sys.stderr)
        return 1


def _main(args: list[str]) -> int:
    verb = "run"
    if args and not args[0].startswith(("-", "+", "~")) and "=" not in args[0]:
        verb = args.pop(0)
        if verb not in _VERBS:
            raise UserError(
                f"'{verb}' is not a verb{did_you_mean(verb, _VERBS)}; there are {', '.join(_VERBS)}"
            )
    helps = any(a in ("-h", "--help", "--hydra-help") for a in args)
    if helps and not (verb == "bench" and args[0] in _BENCHES):  # which have options of their own
        print(_help(verb if verb != "run" or "run" in sys.argv[1:2] else None), end="")
        return 0
    if "--version" in args:
        from importlib.metadata import version

        print(version("ablate-hybrids"))
        return 0
    return _VERBS[verb](args)


def _help(verb: str | None) -> str:
    from ablate.compose import choices_of

    if verb is None:
        return USAGE
    names = {"sweeps": "sweep", "scales": "scale", "data": "data", "archs": "arch"}
    return HELP[verb].format(**{k: ", ".join(choices_of(g)) for k, g in names.items()})


def _run(args: list[str]) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun is not needed: one process runs the study, and starts those of a trial itself.
        if os.environ["RANK"] != "0":
            return 0
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    if any(a.split("=")[0] in _HYDRA_FLAGS for a in args):
        return _hydra_multirun(args)
    from ablate.compose import compose
    from ablate.report.page import write_report
    from ablate.run import find_runs
    from ablate.study.show import plain_console
    from ablate.study.supervisor import run_study

    for word in args:
        name = word.partition("=")[0]
        if word in _VERBS:
            raise UserError(f"'{word}' comes first: python -m ablate {word} …")
        if name in _OF_PLAN:
            raise UserError(f"'{name}' is a word of plan: python -m ablate plan {word} …")
    composed = compose(args)
    for note in composed.notes:
        print(note)
    outcome = run_study(composed.tree, words=args)
    if any(find_runs(outcome.folder)):
        page = write_report(outcome.folder, console=plain_console())
        print(f"report: {page}")
    elif outcome.exit_code == 1:
        why = "study.deadline left no time for one" if outcome.unfinished else "none can be run"
        print(f"no trial has begun: {why}", file=sys.stderr)
    if outcome.exit_code == 130:
        print("stopped; the same command continues where it left off")
    return outcome.exit_code


def _hydra_multirun(args: list[str]) -> int:
    """Hydra's own main function, for -m and --cfg: every job is one plain trial."""
    import hydra
    from omegaconf import DictConfig, OmegaConf

    from ablate.compose import compose, each_of, own_conf, register_sweeps, shipped
    from ablate.config import load
    from ablate.study.supervisor import run_study

    choices = [each_of(a) for a in args if "=" in a and not a.startswith("-")]
    first = [values[0] for values in choices]
    composed = compose(first)
    load(composed.tree)  # mistakes in one sentence, before the first job
    for i, values in enumerate(choices):
        for value in values[1:]:
            load(compose([*first[:i], value, *first[i + 1 :]]).tree)
    register_sweeps(args)
    codes = [0]

    @hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name="config")
    def job(cfg: DictConfig) -> float | None:
        tree = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(tree, dict)
        outcome = run_study({str(k): v for k, v in tree.items()})
        codes.append(outcome.exit_code)
        if outcome.exit_code == 130:
            raise KeyboardInterrupt  # the jobs after it too
        return outcome.exit_code

    # Hydra itself knows nothing of a scale that the machine chooses.
    scale = composed.choices["scale"]
    words = [re.sub(r"\bauto\b", scale, a) if a.startswith("scale=") else a for a in args]
    own = any(a.partition("=")[0] in ("-cn", "--config-name") for a in args)  # it may have no scale
    if not own and not any(a.startswith("scale=") for a in words):
        words.append(f"scale={scale}")
    if not any(a.startswith("hydra.searchpath=") for a in args):
        words += own_conf()
    sys.argv = ["ablate", *words]
    job()
    return max(codes)


def _plan(args: list[str]) -> int:
    from ablate.compose import compose
    from ablate.report.plan import plan

    own, words = {}, []
    for word in args:
        name, _, value = word.partition("=")
        if name in _OF_PLAN:
            own[name] = value
        else:
            words.append(word)
    calibrate = own.get("calibrate", "false").lower()
    if calibrate not in ("true", "false"):
        raise UserError(f"calibrate is '{own['calibrate']}'; give true or false")
    try:
        hours = float(own["hours"]) if "hours" in own else None
    except ValueError:
        hours = -1.0
    if hours is not None and not 0 < hours < float("inf"):
        raise UserError(f"hours is '{own['hours']}'; give a positive number of GPU-hours")
    if "gpu" in own and calibrate == "true":
        raise UserError(
            "calibrate=true measures this machine, and gpu plans for another: leave one"
        )
    composed = compose(words)
    for note in composed.notes:
        print(note)
    plan(
        composed.tree,
        calibrate=calibrate == "true",
        hours=hours,
        gpu=own.get("gpu"),
        words=words,
    )
    return 0


def _prepare(args: list[str]) -> int:
    from ablate.compose import compose
    from ablate.study.prepare import prepare

    prepare(compose(args).tree)
    return 0


def _cost(args: list[str]) -> int:
    from ablate.compose import compose
    from ablate.study.prepare import cost

    cost(compose(args).tree)
    return 0


def _folders(args: list[str], verb: str) -> list[Path]:
    if not args:
        raise UserError(f"{verb} needs a folder: python -m ablate {verb} FOLDER")
    folders = [Path(a) for a in args]
    for word, folder in zip(args, folders, strict=True):
        name, given, _ = word.partition("=")
        if given and not folder.exists():
            known = did_you_mean(name, _WORDS.get(verb, ()))
            raise UserError(f"{verb} does not take '{name}='{known}; `{verb} --help` says what")
    for folder in folders:
        if not folder.is_dir():
            near = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())
            raise UserError(f"'{folder}' is not a folder{did_you_mean(folder.name, near)}")
    return folders


def _status(args: list[str]) -> int:
    from ablate.report.export import is_export
    from ablate.study.status import show

    for folder in _folders(args, "status"):
        if is_export(folder):
            raise UserError(f"'{folder}' is an exported study: `report` shows its trials")
        show(folder)
    return 0


def _report(args: list[str]) -> int:

    from ablate.report.export import export_study
    from ablate.report.page import write_report
    from ablate.study.show import plain_console

    exports = [a.partition("=")[2] for a in args if a.startswith("export=")]
    if len(exports) > 1 or "" in exports:
        raise UserError("report takes one export=DIR, such as export=analysis/results")
    for folder in _folders([a for a in args if not a.startswith("export=")], "report"):
        if exports:
            folder = export_study(folder, Path(exports[0]))
            print(f"exported: {folder}")
        page = write_report(folder, console=plain_console())
        print(f"report: {page}")
    return 0


def _import(args: list[str]) -> int:
    from ablate.report.imported import import_study

    parents = [a.partition("=")[2] for a in args if a.startswith("study.folder=")]
    if len(parents) > 1 or "" in parents:
        raise UserError("import takes one study.folder=DIR, such as study.folder=runs")
    folders = [a for a in args if not a.startswith("study.folder=")]
    for folder in _folders(folders, "import"):
        import_study(folder, Path(parents[0] if parents else "runs"))
    return 0


def _rerun(args: list[str]) -> int:
    from ablate.study.rerun import rerun

    words = [word for word in args if word.startswith("times=")]
    times = words[-1].removeprefix("times=") if words else "1"
    if not times.isdecimal() or not 1 <= int(times) <= 100:
        raise UserError(f"times is '{times}'; give a whole number from 1 to 100")
    folders = _folders([word for word in args if word not in words], "rerun")
    return max(rerun(folder, times=int(times)) for folder in folders)


def _evaluate(args: list[str]) -> int:
    from ablate.evaluate.trial import command
    from ablate.report.scores import tables
    from ablate.study.show import wide_console

    return command(args, tables, wide_console())


def _bench(args: list[str]) -> int:
    what = args[0] if args else ""
    if what == "data":
        from ablate.bench import data

        return data.run(args[1:])
    if what == "kernels":
        from ablate.bench import kernels

        return kernels.run(args[1:])
    if what == "decode":
        from ablate.bench import decode
        from ablate.compose import choices_of, compose
        from ablate.config import ArchConfig

        return decode.run(
            args[1:],
            known=[name for name in choices_of("arch") if name != "hybrid"],
            section_of=lambda name: ArchConfig.model_validate(
                compose([f"arch={name}", "scale=cpu"]).tree["arch"]
            ),
        )
    if what == "train":
        from ablate.bench import train
        from ablate.compose import compose

        return train.run(args[1:], tree_of=lambda words: compose(words).tree)
    raise UserError(f"bench has {', '.join(_BENCHES)}, got '{what}'")


_BENCHES = ("data", "kernels", "train", "decode")
_WORDS = {"report": ("export",), "import": ("study.folder",), "rerun": ("times",)}
_OF_PLAN = ("calibrate", "hours", "gpu")
_VERBS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "plan": _plan,
    "prepare": _prepare,
    "cost": _cost,
    "status": _status,
    "report": _report,
    "evaluate": _evaluate,
    "rerun": _rerun,
    "import": _import,
    "bench": _bench,
}

if __name__ == "__main__":
    sys.exit(main())
