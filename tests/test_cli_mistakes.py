"""Every config field: a wrong type, a value out of range, a misspelt name. Exit code 2, the field
named in one sentence, no traceback, nothing created."""

import os
import subprocess
import sys
import typing
from pathlib import Path

import annotated_types
import pytest

from ablate import config
from ablate.__main__ import main
from ablate.compose import choices_of, compose
from ablate.errors import UserError
from ablate.study.space import cells

FIELDS = {name: info for name, info, _ in config.fields()}
# The budget of the composed config is train.tokens; the other two are null.
UNSET = {"train.flops", "train.seconds"}


def kinds(info) -> set:
    found = set()
    todo = [info.annotation]
    while todo:
        kind = todo.pop()
        if typing.get_origin(kind) is typing.Literal:
            found.add(typing.Literal)
            continue
        found.add(typing.get_origin(kind) or kind)
        if typing.get_origin(kind) not in (dict, list):
            todo.extend(typing.get_args(kind))
    return found


def wrong_type(info) -> str:
    """A word that no type of the field takes."""
    accepted = kinds(info)
    if str in accepted or typing.Literal in accepted:
        return "{a:1}" if dict not in accepted else "7"
    return "banana"


def out_of_range(info) -> list[str]:
    words = []
    whole = float not in kinds(info)
    for limit in info.metadata:
        if isinstance(limit, annotated_types.Ge):
            words.append(str(limit.ge - 1))
        if isinstance(limit, annotated_types.Gt):
            words.append(str(limit.gt - (1 if whole else 0.5)))
        if isinstance(limit, annotated_types.Le):
            words.append(str(limit.le + 1))
        if isinstance(limit, annotated_types.Lt):
            words.append(str(limit.lt + 1))
    return words


MISTAKES = [
    *((name, wrong_type(info)) for name, info in FIELDS.items()),
    *((name, word) for name, info in FIELDS.items() for word in out_of_range(info)),
    *((name, "banana") for name, info in FIELDS.items() if typing.Literal in kinds(info)),
]


@pytest.fixture(autouse=True)
def _nothing_is_trained(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a study was started")

    monkeypatch.setattr("ablate.data.prepare", refuse)


def fails(capsys, tmp_path, monkeypatch, *words: str) -> str:
    """Run the command with the words; what it said, after checking how it ended."""
    monkeypatch.chdir(tmp_path)
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ablate: ")
    caret = 2 if "arch.pattern" in captured.err else 0  # the pattern, and a caret below it
    assert captured.err.count("\n") <= 1 + caret, captured.err
    assert "Traceback" not in captured.err
    assert "hydra" not in captured.err.lower()
    assert list(tmp_path.iterdir()) == []
    return captured.err


@pytest.mark.parametrize(("name", "word"), MISTAKES, ids=lambda v: str(v))
def test_a_wrong_value_is_one_sentence(name, word, capsys, tmp_path, monkeypatch):
    said = fails(capsys, tmp_path, monkeypatch, "scale=cpu", f"++{name}={word}")
    assert name.split(".")[-1] in said


@pytest.mark.parametrize("name", FIELDS)
def test_a_misspelt_name_is_one_sentence(name, capsys, tmp_path, monkeypatch):
    misspelt = name[:-1] + "qx"
    said = fails(capsys, tmp_path, monkeypatch, f"{misspelt}=1")
    assert misspelt in said
    said = fails(capsys, tmp_path, monkeypatch, "scale=cpu", f"+{misspelt}=1")
    assert misspelt.split(".")[-1] in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["rum"], "rum"),
        (["+sweep=attn_ration"], "attn_ratio"),
        (["sweep=attn_ratio"], "+sweep=attn_ratio"),
        (["scale=15m"], "14m"),
        (["train.lr"], "train.lr"),
        (["status"], "status"),
        (["status", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["rerun", "nowhere"], "nowhere"),
        (["rerun", "nowhere", "times=0"], "times"),
        (["bench", "nothing"], "nothing"),
        (["data=files"], "data.path"),
        (["data=files", "data.path=nowhere.txt"], "nowhere.txt"),
        (["arch.pattern=M-Q*"], "Q"),
        (["arch.pattern=M-E*"], "mixture of experts"),
        (
            [
                "arch.pattern=M-*-",
                "arch.attention.n_heads=3",
                "arch.attention.n_kv_heads=2",
            ],
            "n_kv_heads",
        ),
        (["arch.pattern=M-S-", "arch.swa.window=4096"], "window"),
        (["arch.mamba2.d_stat=4"], "d_stat"),
        (["train.flops=1e12"], "flops"),
        (["data.mqar.pairs=100"], "pairs"),
        (["train.device=cuda"], "cuda"),
        (["+sweep=attn_ratio", "study.grid={arch.attention_shar:[0,0.5]}"], "attention_shar"),
        (["train.batch_size=64", "train.micro_batch=48"], "micro_batch"),
        (["train.flops=inf", "train.tokens=null"], "train.flops"),
        (["train.seconds=inf", "train.tokens=null"], "train.seconds"),
        (["train.clip=inf"], "train.clip"),
        (["study.margin=inf"], "study.margin"),
        (["study.name=" + 300 * "a"], "study.name"),
        (["study.tune.points=100000"], "study.tune.points"),
        (["study.n_trials=3"], "n_trials"),
        (["train=5"], "train"),
        (["-m", "seed=0,1", "scale=cpu", "train.tokens=abc"], "train.tokens"),
        (["report", "nowhere", "exprt=x"], "export"),
        (["+sweep=attn_ratio", "scale=cpu", "seed=5"], "study.seeds is [0, 1]"),
        (["plan", "+sweep=attn_ratio", "scale=cpu", "seed=5"], "study.seeds is [0, 1]"),
        (["+sweep=attn_ratio", "scale=cpu", "study.tune.octaves=2"], "study.tune.points is 0"),
        (["+sweep=attn_ratio", "scale=cpu", "study.prune=true"], "'prune' is of a 'search'"),
        (["+sweep=attn_ratio", "study.x=arch.attention_shre"], "'arch.attention_share'"),
        (["scale=cpu", "study.grid={train.lr:[1e-3,1.0000001e-3]}"], "called 'lr=0.001'"),
        (["scale=cpu", "study.arms=[a,b]"], "study.arms is '[a,b]'"),
        (["scale=cpu", "study.arms={'':{train.lr:1}}"], "put quotes within the word"),
        (["train=[1]"], "train is '[1]'"),
        (["train=null"], "train is 'null'"),
        (["arch="], "arch is ''"),
        (
            [
                "scale=cpu",
                "study.search={arch.n_layers:{low:1,high:3}}",
                "study.n_trials=2",
            ],
            "integer: true",
        ),
        (["scale=cpu", "evaluate.mqar_rows=16", "evaluate.mqar_pairs=[-4]"], "mqar_pairs"),
        (["scale=cpu", "train.keep=all", "train.checkpoint_steps=[400]"], "after 340 steps"),
        (["plan", "scale=cpu", "match.certificate={a:1}"], "match.certificate"),
        (["plan", "scale=cpu", "gpu=H1000"], "gpu is 'H1000'"),
        (["import", "study.foldr=x"], "study.folder"),
        (["data.val_a_path=a.txt", "data.val_b_path=a.txt"], "B must be another text"),
        (["-m", "scale=cpu", "train.lr=1e-3,banana"], "train.lr"),
        (["-m", "scale=cpu", "train.lrr=1e-3,2e-3"], "train.lr"),
        (["scale=cpu", "train.batch_size=1e10"], "train.batch_size"),
        (["scale=cpu", "evaluate.mqar_rows=0", "evaluate.mqar_pairs=[4]"], "'mqar_rows' is 0"),
        (
            [
                "scale=cpu",
                "study.search={train.batch_size:{low:8,high:20,step:7.9,integer:true}}",
                "study.n_trials=2",
            ],
            "'step' of whole numbers must be whole, got 7.9",
        ),
        (
            [
                "scale=cpu",
                "study.search={train.lr:{low:1e-3,high:2e-3,step:5}}",
                "study.n_trials=2",
            ],
            "'step' 5 leads out of the range from 0.001 to 0.002",
        ),
        (["arch.pattern=M-x2", "arch.n_layers=30"], "beside arch.pattern, which is 'M-x2'"),
        (["arch=mamba2_130m", "arch.attention_share=0.3"], "arch.pattern=null"),
        (["arch.unit=M-", "arch.n_layers=4", "arch.mlp_share=0.3"], "beside arch.unit"),
        (["arch.positions=[0]", "arch.placement=even"], "beside arch.positions, which is [0]"),
        (["plan", "match.target=1e6"], "while match.by is null"),
        (
            [
                "plan",
                "scale=cpu",
                "study.grid={arch.attention_share:[0,0.5]}",
                "match=mlp_width",
                "match.target=nothing",
            ],
            "match.target",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_other_mistakes(words, named, capsys, tmp_path, monkeypatch):
    assert named in fails(capsys, tmp_path, monkeypatch, *words)


@pytest.mark.parametrize("name", ["nö", "a, b", "x=[1]", 'q"uote'])
def test_a_conf_folder_of_ones_own_in_any_path(name, tmp_path, monkeypatch, capsys) -> None:
    folder = tmp_path / name / "conf" / "scale"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text("# @package _global_\ndefaults: [cpu]\n")
    monkeypatch.chdir(tmp_path / name)
    assert "tiny" in choices_of("scale")
    assert main(["cost", "scale=cpu"]) == 0


def test_brackets_are_no_markup(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "br.yaml").write_text(
        "study: {question: 'is [red] or [/blue] better?', arms: {'[a] :smile:': {train.lr: 2e-3}, "
        "'[/b]': {train.lr: 1e-3}}}"
    )
    assert main(["plan", "+sweep=br", "scale=cpu"]) == 0
    said = capsys.readouterr().out
    assert all(text in said for text in ("is [red] or [/blue] better?", "[a] :smile:", "[/b]"))


def test_stray_files_in_sweeps_stop_nothing(tmp_path, monkeypatch, capsys) -> None:
    folder = tmp_path / "sweeps"
    (folder / "d.yaml").mkdir(parents=True)
    (folder / ".#mine.yaml").symlink_to("me@host.1:2")
    (folder / "gone.yaml").symlink_to("nowhere")
    (folder / "._mine.yaml").write_bytes(b"\0\5\26\7")
    os.mkfifo(folder / "pipe.yaml")
    (folder / "mine.yaml").write_text("study: {name: mine}\n")
    (folder / "draft.yaml").write_text("study:\n\tname: x\n")
    (folder / "gqa.yaml").write_text("study:\n\tname: x\n")  # in the place of one that ships
    monkeypatch.chdir(tmp_path)
    assert compose(["scale=cpu"]).tree["study"]["name"] == "single"
    assert compose(["+sweep=mine", "scale=cpu"]).tree["study"]["name"] == "mine"
    own = set(choices_of("sweep")) & {"d", ".#mine", "gone", "._mine", "pipe", "mine", "draft"}
    assert own == {"mine", "draft"}
    for name in ("draft", "gqa"):
        assert main([f"+sweep={name}", "scale=cpu"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"ablate: sweep file {name}.yaml is not valid YAML: ")
        assert said.count("\n") == 1
    assert main(["-m", "+sweep=draft,mine", "scale=cpu"]) == 2
    assert capsys.readouterr().err.startswith("ablate: sweep file draft.yaml is not valid YAML: ")
    (folder / "draft.yaml").write_text("study: {name: draft}\n")
    assert compose(["+sweep=draft", "scale=cpu"]).tree["study"]["name"] == "draft"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- a\n- b\n", "sweep file mine.yaml is a list; it must be names with values"),
        ("defaults: [scale: 14m]", "(sweep/scale=14m: there is no such group)"),
        ("defaults: [/scale: 14m]", "written as '- override /data: files'"),
        ("defaults: [override /data: files]\ntrain: {lr: '${arch.dd}'}", "'arch.dd' not found"),
        ("defaults: [other]", "(In 'sweep/mine': Could not load 'sweep/other')"),
        ("defaults: 3", "sweep file mine.yaml: its 'defaults' cannot be used"),
    ],
)
def test_a_sweep_file_that_cannot_be_one(text, named, tmp_path, monkeypatch) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        compose(["+sweep=mine", "scale=cpu"])
    assert named in str(error.value)
    assert ("'defaults' cannot be used" in str(error.value)) == (": " in text and "dd" not in text)
    (tmp_path / "sweeps" / "mine.yaml").write_text("defaults: [override /data: files]")
    assert compose(["+sweep=mine", "scale=cpu"]).tree["data"]["source"] == "files"


def test_a_sweep_that_names_no_study_is_called_by_its_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text("study: {grid: {train.lr: [0.001, 0.002]}}")
    monkeypatch.chdir(tmp_path)
    assert compose(["+sweep=mine", "scale=cpu"]).tree["study"]["name"] == "mine"
    words = ["+sweep=mine", "scale=cpu", "study.name=single"]
    assert compose(words).tree["study"]["name"] == "single"


def test_what_a_scale_sets_can_be_set_beside_the_scale_of_this_machine(monkeypatch) -> None:
    """Without a `scale=` word the machine chooses one, whose fields are fields all the same."""
    monkeypatch.setattr("ablate.compose._scale_of_this_machine", lambda: ("14m", "some GPU"))
    for words in ([], ["scale=auto"]):
        found = compose([*words, "arch.d_model=128", "arch.n_layers=4"])
        assert (found.tree["arch"]["d_model"], found.tree["arch"]["n_layers"]) == (128, 4)
        assert found.tree["data"]["seq_len"] == 2048
        assert found.choices["scale"] == "14m"
        assert found.notes == ["scale auto: 14m (some GPU)"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["scale=cpu", "plan"], "'plan' comes first: python -m ablate plan …"),
        (
            ["+sweep=attn_ratio", "hours=3"],
            "'hours' is a word of plan: python -m ablate plan hours",
        ),
    ],
)
def test_a_verbs_words_are_told_where_they_go(words, told, capsys):
    assert main(words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["scale=auto"]])
def test_hydras_own_words_take_the_scale_that_the_machine_has(tmp_path, words):
    command = [sys.executable, "-m", "ablate", "--cfg", "job", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    own = compose(words).tree
    assert f"\n  n_layers: {own['arch']['n_layers']}\n" in done.stdout
    assert f"\n  tokens: {own['train']['tokens']}\n" in done.stdout


def test_hydras_own_words_take_choices_of_ones_own_conf(tmp_path):
    (tmp_path / "conf" / "scale").mkdir(parents=True)
    mine = "# @package _global_\ndefaults: [cpu]\narch: {n_layers: 3}\n"
    (tmp_path / "conf" / "scale" / "mine.yaml").write_text(mine)
    command = [sys.executable, "-m", "ablate", "--cfg", "job", "scale=mine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "\n  n_layers: 3\n" in done.stdout


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("workers=4", "'data.workers' or 'study.workers'"),  # the name alone, of two groups
        ("train.tokes=3", "'train.tokens'"),  # evaluate.tokens is as close, in another group
        ("trian.lr=2", "'train.lr'"),
    ],
)
def test_a_suggestion_is_a_field_that_can_be_typed(word, meant, capsys):
    assert main(["plan", word]) == 2
    assert (
        f"unknown field '{word.split('=')[0]}' (did you mean {meant}?)" in capsys.readouterr().err
    )


SWEEPS = sorted(path.stem for path in (Path(__file__).parents[1] / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_can_be_planned_as_it_ships(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", f"+sweep={name}", "tracker=none"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("verb", [[], ["plan"]])
@pytest.mark.parametrize(
    ("words", "letter"),
    [
        (["+sweep=attn_ratio", "scale=cpu", "arch.swa.window=64"], "S"),
        (["scale=cpu", "arch.pattern=M-M-", "arch.attention.n_heads=2"], "*"),
    ],
)
def test_an_option_of_layers_that_no_arm_has(capsys, tmp_path, monkeypatch, verb, words, letter):
    said = fails(capsys, tmp_path, monkeypatch, *verb, *words)
    assert f"'{words[-1]}' changes no run: no arm has a layer '{letter}'" in said


def test_a_whole_number_may_be_written_as_a_float() -> None:
    tree = compose(["scale=cpu", "data.seq_len=1e3"]).tree
    assert tree["arch"]["swa"]["window"] == 250
    assert isinstance(tree["arch"]["swa"]["window"], int)


def test_a_search_of_whole_numbers_may_have_a_whole_step() -> None:
    tree = compose(["scale=cpu", "study.n_trials=2"]).tree
    tree["study"]["search"] = {"arch.n_layers": {"low": 1.0, "high": 3.0, "step": 1.0}}
    assert cells(tree) == []


def test_an_option_of_layers_that_one_arm_has(capsys, tmp_path, monkeypatch):
    # of four layers none, one or two are attention
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "+sweep=attn_ratio", "scale=cpu", "arch.attention.n_heads=2"]) == 0
