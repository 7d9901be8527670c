"""Every mistake in a config or on a command line is found, all at once, and says what is meant."""

import itertools
import re
import textwrap

import pytest
from omegaconf import OmegaConf

from unlabeled import config, overrides
from unlabeled.annotations import nearest
from unlabeled.cli import conf_dir

TARGETS = """
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

class Net:
    def __init__(self, *, width: int = 8, norm: Literal["batch", "group"] = "batch"): ...

class Method:
    def __init__(
        self, backbone: Net, optim: object, *, temperature: float = 0.1, symmetric: bool = True
    ):
        ...

class Plain:
    def __init__(self, backbone: Net, optim: object): ...

class Data:
    def __init__(
        self, root: str, *, size: int | Sequence[int] = 8, limit: int | None = None,
        shares: Sequence[float] = (), names: Mapping[str, int] | None = None,
        path: Path | None = None, share: float = 0.5,
    ): ...

def optimizer(params, lr: float, **rest): ...

NUMBER = 3
"""

TREE = {
    "train.yaml": """
        defaults:
          - backbone: small
          - data: folder
          - callbacks: none
          - evals: standard
          - method: simclr
          - _self_
          - experiment: null
        seed: 0
        debug: false
        """,
    "backbone/small.yaml": "{_target_: pretend.Net, width: 8, norm: batch}",
    "backbone/large.yaml": "{_target_: pretend.Net, width: 64, norm: batch}",
    "data/folder.yaml": "{_target_: pretend.Data, root: here, size: 8, limit: null}",
    "data/empty.yaml": "{_target_: pretend.Data, root: '???'}",
    "callbacks/none.yaml": "",
    "evals/none.yaml": "",
    "evals/knn.yaml": "knn: {_target_: pretend.Net, width: 20}",
    "evals/linear.yaml": "linear: {_target_: pretend.Net}",
    "evals/standard.yaml": "defaults: [knn, linear]",
    "optim/sgd.yaml": "{_target_: pretend.optimizer, _partial_: true, lr: 0.1, momentum: 0.9}",
    "optim/lars.yaml": "{_target_: pretend.optimizer, _partial_: true, lr: 0.3}",
    "method/none.yaml": "",
    "method/simclr.yaml": """
        defaults: [{/optim@optim: lars}, _self_]
        _target_: pretend.Method
        backbone: ${backbone}
        temperature: 0.1
        symmetric: true
        """,
    "method/plain.yaml": """
        defaults: [{/optim@optim: lars}, _self_]
        _target_: pretend.Plain
        backbone: ${backbone}
        """,
    "experiment/paper/large.yaml": """
        # @package _global_
        defaults: [{override /method: simclr}, {override /backbone: large}]
        method: {temperature: 0.5}
        """,
}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A small config tree and the module of its targets."""
    (tmp_path / "pretend.py").write_text(TARGETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, content in TREE.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))
    return tmp_path / "conf"


@pytest.fixture
def wrong(tree):
    """What is wrong with a command line."""
    return lambda *lines, sweep=False: overrides.mistakes(tree, "train", lines, sweep=sweep)


def test_right_command_lines_have_no_mistakes(wrong):
    assert wrong() == []
    assert wrong("experiment=paper/large", "evals=[knn,linear]", "optim@method.optim=sgd") == []
    assert wrong("method=none", "evals=none", "~seed", "+new=3", "++data.limit=4") == []
    assert wrong("data=empty", "data.root=there", "hydra.run.dir=x") == []
    assert wrong("method={temperature: 0.3}", "data.size=[3,4]", "data.limit=9") == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "method.temprature=0.1",
            "`temprature`: did you mean `temperature`? (`method.temprature`)",
        ),
        ("methd.temprature=0.1", "`methd.temprature`: did you mean `method.temperature`?"),
        (
            "method={temprature: 0.3}",
            "`temprature`: did you mean `temperature`? (`method.temprature`)",
        ),
        ("method.temp=0.1", "`temp`: did you mean `temperature`? (`method.temp`)"),
        ("temperature=0.1", "`temperature`: did you mean `method.temperature`?"),
        ("method=simclrr", "`method=simclrr`: did you mean `method=simclr`?"),
        ("metod=simclr", "`metod`: did you mean `method`?"),
        ("experimnt=paper/large", "`experimnt`: did you mean `experiment`?"),
        (
            "experiment=paper/larg",
            "`experiment=paper/larg`: did you mean `experiment=paper/large`?",
        ),
        ("evals=[knn,liner]", "`evals=[knn,liner]`: did you mean `evals=[knn,linear]`?"),
        ("optim@method.optm=sgd", "`optim@method.optm`: did you mean `optim@method.optim`?"),
        ("optim=sgd", "`optim`: did you mean `optim@method.optim`?"),
        (
            "backbone=vgg",
            "`backbone=vgg`: there is no such choice; there are large and small",
        ),
        ("callbacks=null", "`callbacks=null`: there is no such choice; there are none"),
        (
            "method.zzz=0.1",
            "`method.zzz`: there is no such key; "
            "`method` has optim, backbone, temperature and symmetric",
        ),
        ("seed.x=1", "`seed.x`: `seed` is 0 and has no keys"),
        (
            "method.backbone.norm=group",
            "`method.backbone.norm`: `method.backbone` is ${backbone}; write `backbone.norm`",
        ),
        ("+seed=2", "`+seed`: there is one already; write `seed=2`"),
        ("~sed", "`sed`: did you mean `seed`?"),
        ("hydra.run.dri=x", "`dri`: did you mean `dir`? (`hydra.run.dri`)"),
        ("seed=1,2", "`seed=1,2`: several values need -m; one list is `seed=[1,2]`"),
        ("seed", "`seed`: not an override like key=value (missing EQUAL at '<EOF>')"),
        ("=3", "`=3`: not an override like key=value (there is no key)"),
        ("seed=abc", "`seed=abc`: expected an integer"),
        ("debug=1", "`debug=1`: expected true or false"),
        ("data=empty", "`data.root`: no value given"),
        ("backbone.norm=grup", "`backbone.norm=grup`: expected batch or group"),
        ("data.limit=true", "`data.limit=true`: expected an integer or null"),
    ],
)
def test_one_mistake(wrong, line, says):
    found = wrong(line)
    assert len(found) == 1
    assert found[0].startswith(says)


def test_all_mistakes_of_a_line_at_once(wrong):
    found = wrong(
        "method=simclrr",
        "method.temprature=hot",
        "backbone=vgg",
        "backbone.anything=3",  # nobody can know what an unknown backbone has
        "optim@method.optm=sgd",
        "method.optim.momentun=x",
        "data.sise=9",
        "x={",
        "seed=1,2",
    )
    assert [re.match(r"`([^=`]*)", line)[1] for line in found] == [
        "x",
        "seed",
        "method",
        "backbone",
        "optim@method.optm",
        "temprature",
        "momentun",
        "sise",
        "method.temperature",
    ]
    assert found[-1] == "`method.temperature=hot`: expected a number"


def test_every_combination_of_a_sweep_is_checked(wrong):
    lines = ["method=simclr,plain", "seed=0,1,2", "backbone.norm=batch,grup"]
    norm = wrong(*lines, sweep=True)
    assert norm == [
        "`backbone.norm=grup`: expected batch or group; did you mean group? "
        "(with method=simclr seed=0 backbone.norm=grup)"
    ]
    common, own = wrong("method=simclr,plain", "method.temperature=0.1", "sed=1", sweep=True)
    assert common == "`sed`: did you mean `seed`?"
    assert own.startswith("`method.temperature`: there is no such key")
    assert own.endswith("(with method=plain)")
    assert wrong("method=glob(*)", "seed=range(0,3)", sweep=True) == []
    assert wrong("method=simclr,plain", "data.share=interval(a,0.3)", sweep=True) != []
    assert wrong("method=simclr,plain", "+data.share=interval(0.1,0.3)", sweep=True) == []


def test_a_large_sweep_composes_each_choice_but_not_each_combination(tree, monkeypatch):
    composed = []
    monkeypatch.setattr(overrides, "MOST_JOBS", 3)
    monkeypatch.setattr(
        overrides,
        "_of_job",
        lambda loader, name, job, *, targets, cfg: (
            composed.append([o.input_line for o in job]) or []
        ),
    )
    overrides.mistakes(
        tree, "train", ["method=simclr,plain,none", "backbone=small,large", "seed=1,2"], sweep=True
    )
    assert {line for job in composed for line in job if not line.startswith("seed")} == {
        *("method=simclr", "method=plain", "method=none", "backbone=small", "backbone=large")
    }
    assert len(composed) < 6


def test_another_folder_of_choices(tree, tmp_path):
    (tmp_path / "mine" / "method").mkdir(parents=True)
    (tmp_path / "mine" / "method" / "own.yaml").write_text("defaults: [simclr, _self_]\n")
    for line, says in [
        ("method=own", []),
        ("method=onw", ["`method=onw`: did you mean `method=own`?"]),
    ]:
        assert overrides.mistakes(tree, "train", [line], more=str(tmp_path / "mine")) == says


def test_a_broken_tree_says_which_file(wrong, tree):
    (tree / "method" / "bad.yaml").write_text("defaults: [{/optim@optim: gone}]\n")
    (found,) = wrong("method=bad")
    assert "method/bad" in found
    assert "optim/gone" in found


def check(node):
    return config.mistakes(OmegaConf.create({"x": node}))


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (
            {"_target_": "pretend.Nett"},
            "`x._target_`: there is no pretend.Nett; did you mean pretend.Net?",
        ),
        (
            {"_target_": "unlabeled.optm.Optim"},
            "`x._target_`: there is no unlabeled.optm; did you mean unlabeled.optim.Optim?",
        ),
        ({"_target_": "pretend.NUMBER"}, "`x._target_`: pretend.NUMBER is not callable"),
        (
            {"_target_": "broken.Net"},
            "`x._target_`: cannot import broken.Net: No module named 'gone'",
        ),
        ({"_target_": "pretend.Net", "widht": 3}, "`x.widht`: Net takes no `widht`; did you mean"),
        (
            {"_target_": "pretend.Net", "foo": 3},
            "`x.foo`: Net takes no `foo`; it takes width and norm",
        ),
        ({"_target_": "pretend.Data"}, "`x.root`: no value given (Data needs `root`)"),
        ({"_target_": "pretend.Net", "width": "a"}, "`x.width=a`: expected an integer"),
        ({"_target_": "pretend.Net", "width": True}, "`x.width=true`: expected an integer"),
        ({"_target_": "pretend.Net", "width": 1.5}, "`x.width=1.5`: expected an integer"),
        ({"_target_": "pretend.Net", "width": None}, "`x.width=null`: expected an integer"),
        (
            {"_target_": "pretend.Data", "root": "r", "size": [1, "b"]},
            "`x.size=[1, 'b']`: expected an integer or a list, each an integer",
        ),
        (
            {"_target_": "pretend.Data", "root": "r", "shares": 0.5},
            "`x.shares=0.5`: expected a list, each a number",
        ),
        (
            {"_target_": "pretend.Data", "root": "r", "names": {"a": "b"}},
            "`x.names={'a': 'b'}`: expected a mapping to an integer or null",
        ),
        ({"_target_": "pretend.Data", "root": 3}, "`x.root=3`: expected a string"),
        ({"_traget_": "pretend.Net"}, "`x._traget_`: did you mean `x._target_`?"),
        ({"a": "${nowhere}"}, "`x.a`: cannot resolve ${nowhere}"),
        ({"a": "${oc.env:NOT_SET_HERE}"}, "`x.a`: cannot resolve ${oc.env:NOT_SET_HERE}"),
        ([{"_target_": "pretend.Net", "width": "a"}], "`x[0].width=a`: expected an integer"),
        (
            {"_target_": "unlabeled.optim.Optim", "optimizer": "sgd", "lr": 1.0},
            "`x.optimizer=sgd`: expected ",
        ),
        (
            {
                "_target_": "unlabeled.optim.Optim",
                "optimizer": {"_target_": "pretend.optimizer", "_partial_": True},
                "lr": 1.0,
                "schedule": "cosin",
            },
            "`x.schedule=cosin`: expected cosine, step or constant; did you mean cosine?",
        ),
        (
            {"_target_": "pytorch_lightning.Trainer", "precision": "bf17"},
            "`x.precision=bf17`: expected ",
        ),
    ],
)
def test_targets_and_their_arguments(tree, node, says):
    (tree.parent / "broken.py").write_text("import gone\n")
    (found,) = check(node)
    assert found.startswith(says)


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "pretend.Net", "width": 3, "norm": "group"},
        {"_target_": "pretend.Data", "root": "r", "size": [1, 2], "shares": [1, 0.5], "share": 1},
        {"_target_": "pretend.Data", "root": "r", "path": "p", "names": {"a": 1}, "limit": None},
        {"_target_": "pretend.optimizer", "_partial_": True, "anything": "goes"},
        {"_target_": "pretend.Method", "backbone": {"_target_": "pretend.Net"}, "optim": {}},
        {"_target_": "pretend.Data", "root": "r", "shares": [{"_target_": "builtins.float"}]},
        {"_target_": "pytorch_lightning.Trainer", "precision": "auto", "max_epochs": 3},
        {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1, "nesterov": True},
        {"a": "${hydra:runtime.output_dir}"},
    ],
)
def test_right_targets_pass(tree, node):
    assert check(node) == []


def test_what_is_missing_is_named_once_and_references_are_followed(tree):
    cfg = OmegaConf.create(
        {
            "size": "???",
            "net": {"_target_": "pretend.Net", "width": "${size}"},
            "data": {"_target_": "pretend.Data", "root": "${net.norm}", "limit": "${word}"},
            "word": "many",
        }
    )
    assert config.mistakes(cfg) == [
        "`size`: no value given",
        "`data.limit=many`: expected an integer or null",
        "`data.root`: cannot resolve ${net.norm} (Interpolation key 'net.norm' not found)",
    ]


def test_check_raises_all_of_them_in_one_error(tree):
    cfg = OmegaConf.create({"seed": "x", "a": {"_target_": "pretend.Net", "foo": 1, "width": "w"}})
    with pytest.raises(config.InputError, match="3 mistakes in the config") as error:
        config.check(cfg)
    for name in ("seed=x", "a.foo", "a.width=w"):
        assert f"`{name}`" in str(error.value)


def test_nearest():
    assert nearest("temprature", ["temperature", "momentum"]) == "temperature"
    assert nearest("temp", ["temperature", "momentum"]) == "temperature"
    assert nearest("mo", ["momentum", "mode"]) != "momentum"
    assert nearest("zzz", ["temperature"]) is None
    assert nearest("knn", ["knn"]) is None  # it is that one


# The real tree.

CONF = conf_dir()
GIVEN_BY_USER = {  # keys that are ??? by design, a value to check them with, and why
    "data.root": ("/nowhere", "only the user knows where the images lie"),
    "backbone.name": ("resnet18", "any model of the library may be meant"),
    "backbone.path": ("/nowhere", "the run to load"),
    "backbone.checkpoint": ("/nowhere", "the run to load"),
    "method.source.path": ("/nowhere", "the run whose features are clustered"),
    "method.teacher.path": ("/nowhere", "the supervised run that is distilled"),
    "method.source.checkpoint": ("/nowhere", "the run whose features are clustered"),
}


NEVER_CHOSEN = {"optim/base": "what the optimizers share"}
PLACES = {
    "augment": "augment@method.augment",
    "optim": "optim@method.optim",
    "eval": "+eval@evals.one",
}


def rounds():
    """Command lines that together choose every file of the tree.

    A method or an experiment brings choices of its own and comes alone; others do not touch
    one another, so each line chooses one of every group.
    """
    groups = {}
    for path in sorted(CONF.rglob("*.yaml")):
        name = path.relative_to(CONF).with_suffix("").as_posix()
        group, _, option = name.partition("/")
        if option and group != "hydra" and name not in NEVER_CHOSEN:
            groups.setdefault(group, []).append(f"{PLACES.get(group, group)}={option}")
    for group in ("method", "experiment"):
        yield from ([line] for line in groups.pop(group, []))
    tasks = [line.partition("=")[2] for line in groups.pop("task")]
    yield ["method=multitask", f"task@method.tasks=[{','.join(tasks)}]", "backbone=vit_small"]
    for lines in itertools.zip_longest(*groups.values()):
        yield [line for line in lines if line]


@pytest.mark.parametrize("lines", list(rounds()), ids=" ".join)
def test_every_file_of_the_tree_composes_and_passes_the_check(lines):
    found = overrides.mistakes(CONF, "train", lines)
    missing = [re.match(r"`([^`]*)`: no value given", line) for line in found]
    given = [m[1] for m in missing if m and m[1] in GIVEN_BY_USER]
    if given:
        values = [f"{key}={GIVEN_BY_USER[key][0]}" for key in given]
        found = overrides.mistakes(CONF, "train", [*lines, *values])
    assert found == []


def test_slips_in_a_set_of_tasks_are_found():
    lines = ["method=multitask", "task@method.tasks=[rotation,jigsw]", "method.tasks.jigsaw.din=8"]
    assert overrides.mistakes(CONF, "train", lines) == [
        "`task@method.tasks=[rotation,jigsw]`: did you mean `task@method.tasks=[rotation,jigsaw]`?",
        "`din`: did you mean `dim`? (`method.tasks.jigsaw.din`)",
    ]


def test_the_tree_finds_a_slip_of_the_pen():
    assert overrides.mistakes(CONF, "train", ["method=simclr", "method.temprature=0.1"]) == [
        "`temprature`: did you mean `temperature`? (`method.temprature`)"
    ]
