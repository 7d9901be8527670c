"""The process: exit codes, messages without tracebacks, and what a cheap command imports."""

import subprocess
import sys
import textwrap

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from unlabeled.cli import building, conf_dir, launch
from unlabeled.errors import InputError
from unlabeled.precision import chosen

APP = """
import sys
from pathlib import Path

class Data:
    def __init__(self, root: str, *, size: int = 8):
        if size < 0:
            raise ValueError(f"size must be positive, got {size}")

def task(cfg):
    from hydra.utils import instantiate
    from unlabeled import cli
    print("started with seed", cfg.seed)
    with cli.building():
        instantiate(cfg.data)
    if cfg.seed == 13:
        raise RuntimeError("bad luck")
    if cfg.seed == 16:  # how Lightning starts the other processes of a run
        import subprocess
        subprocess.run([sys.executable, sys.argv[0], "seed=13", "hydra.run.dir=run"], check=False)
    if cfg.seed == 14:
        raise KeyboardInterrupt
    if cfg.seed == 15:  # how Lightning passes an interruption on
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)
    return 0.5

if __name__ == "__main__":
    sys.modules["app"] = sys.modules["__main__"]
    from unlabeled.cli import launch
    try:
        launch(task, Path(__file__).parent / "conf")
    finally:
        print("heavy:", sorted({"torch", "pytorch_lightning", "pydantic"} & set(sys.modules)))
"""
TREE = {
    "train.yaml": """
        defaults: [{data: folder}, _self_, {experiment: null}]
        seed: 0
        debug: false
        """,
    "data/folder.yaml": "{_target_: app.Data, root: here, size: 8}",
    "data/loud.yaml": "{_target_: app.Data, root: here, size: 8}\n",
    "experiment/sweep.yaml": """
        # @package _global_
        hydra: {mode: MULTIRUN, sweeper: {params: {data.size: "3,4", data: "folder,loud"}}}
        """,
    "experiment/wrong.yaml": """
        # @package _global_
        hydra: {sweeper: {params: {data.size: "3,x", data: "folder,lud"}}}
        """,
}


@pytest.fixture
def app(tmp_path):
    """Runs a command line of a small application; (exit code, output, errors)."""
    (tmp_path / "app.py").write_text(APP)
    for name, content in TREE.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "app.py", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_a_run_ends_with_0_and_keeps_its_config(app, tmp_path):
    code, out, err = app("data.size=3", "hydra.run.dir=run")
    assert (code, err) == (0, "")
    assert "started with seed 0" in out
    assert "size: 3" in (tmp_path / "run" / ".hydra" / "config.yaml").read_text()
    assert (tmp_path / "run" / "app.log").exists()  # named after the task's module


def test_a_wrong_config_ends_with_2_before_anything_is_made(app, tmp_path):
    code, out, err = app("data.sise=3", "data=lud", "seed=x", "hydra.run.dir=run")
    assert code == 2
    assert err.splitlines() == [
        "unlabeled: 3 mistakes in the config:",
        "  `data=lud`: did you mean `data=loud`?",
        "  `sise`: did you mean `size`? (`data.sise`)",
        "  `seed=x`: expected an integer",
    ]
    assert "started" not in out
    assert not (tmp_path / "run").exists()


def test_wrong_input_found_while_building_ends_with_2(app):
    code, _, err = app("data.size=-1", "hydra.run.dir=run")
    assert (code, err) == (2, "unlabeled: `data`: size must be positive, got -1\n")


def test_a_failure_ends_with_1_and_a_traceback_only_if_wanted(app):
    code, _, err = app("seed=13", "hydra.run.dir=run")
    assert code == 1
    assert err == "unlabeled: RuntimeError: bad luck\n(debug=true shows the traceback)\n"
    code, _, err = app("seed=13", "debug=true", "hydra.run.dir=run")
    assert code == 1
    assert "Traceback (most recent call last)" in err
    assert 'raise RuntimeError("bad luck")' in err


@pytest.mark.parametrize("asked", [False, True])
def test_processes_that_a_run_starts_tell_no_more_than_it_does(app, monkeypatch, asked):
    monkeypatch.setenv("HYDRA_FULL_ERROR", str(int(asked)))
    code, _, err = app("seed=16", "hydra.run.dir=run")
    assert code == 0
    assert "unlabeled: RuntimeError: bad luck\n" in err
    assert ("Traceback" in err) == asked


def test_a_sweeps_folder_that_cannot_be_is_named_as_such(app, tmp_path):
    (tmp_path / "taken").touch()
    code, _, err = app("-m", "seed=0,1", "hydra.sweep.dir=taken")
    assert code == 2
    assert err.startswith("unlabeled: cannot write in the sweep's folder")
    assert err.endswith("choose another hydra.sweep.dir\n")


@pytest.mark.parametrize("seed", [14, 15])
def test_an_interruption_ends_with_130(app, seed):
    code, _, err = app(f"seed={seed}", "hydra.run.dir=run")
    assert code == 130
    assert "Traceback" not in err


def test_a_sweep_is_checked_before_its_first_job_starts(app, tmp_path):
    code, out, err = app("-m", "data=folder,loud", "seed=0,x", "hydra.sweep.dir=sweep")
    assert code == 2
    assert "`seed=x`: expected an integer (with data=folder seed=x)" in err
    assert "started" not in out
    assert not (tmp_path / "sweep").exists()
    code, out, err = app("-m", "seed=0,13", "hydra.sweep.dir=sweep")
    assert out.count("started with seed") == 2
    assert code == 1
    assert err.endswith("unlabeled: RuntimeError: bad luck\n(debug=true shows the traceback)\n")


@pytest.mark.parametrize(
    "words",
    [
        ("data=folder,loud", "-m", "seed=0,x"),
        ("data=folder,loud", "seed=0,x", "--multirun"),
        ("data=folder,loud", "seed=0,x", "hydra.mode=MULTIRUN"),
    ],
)
def test_a_sweep_is_checked_wherever_its_flag_stands(app, tmp_path, words):
    code, out, err = app(*words, "hydra.sweep.dir=sweep")
    assert code == 2
    assert "`seed=x`: expected an integer (with data=folder seed=x)" in err
    assert "started" not in out
    assert not (tmp_path / "sweep").exists()
    right = [word.replace("seed=0,x", "seed=1,2") for word in words]
    code, out, err = app(*right, "hydra.sweep.dir=sweep")
    assert (code, err) == (0, "")
    assert out.count("started with seed 1") == out.count("started with seed 2") == 2


def test_flags_with_values_stand_anywhere(app):
    for words in (
        ("--cfg", "job", "data.size=3", "seed=4"),
        ("data.size=3", "--cfg", "job", "seed=4"),
        ("data.size=3", "seed=4", "--cfg", "job"),
        ("data.size=3", "--cfg=job", "seed=4"),
    ):
        code, out, err = app(*words)
        assert (code, err) == (0, "")
        assert "size: 3" in out
        assert "seed: 4" in out


def test_a_sweep_that_a_file_asks_for_is_checked(app, tmp_path):
    for flags in (["-m"], ["hydra.mode=MULTIRUN"]):
        code, out, err = app("experiment=wrong", *flags, "seed=1,2", "hydra.sweep.dir=sweep")
        assert code == 2
        assert "`data=lud`: did you mean `data=loud`?" in err
        assert "`data.size=x`" in err
        assert "started" not in out
    code, out, err = app("experiment=wrong", "-m", "data.size=1", "data=loud", "hydra.sweep.dir=s")
    assert (code, err) == (0, "")  # the command line's values win
    code, out, err = app("experiment=sweep", "hydra.sweep.dir=sweep")
    assert (code, err) == (0, "")
    assert out.count("started with seed 0") == 4
    code, out, err = app("experiment=sweep", "seed=1,x", "hydra.sweep.dir=sweep")
    assert code == 2
    assert "`seed=x`: expected an integer" in err
    code, out, err = app("experiment=wrong", "hydra.run.dir=run")  # no sweep: nothing to check
    assert (code, err) == (0, "")


def test_cheap_commands_import_nothing_heavy(app):
    code, out, err = app("--cfg", "job", "data.size=3")
    assert (code, err) == (0, "")
    assert "size: 3" in out
    assert "heavy: []" in out
    code, out, err = app("--help")
    assert (code, err) == (0, "")
    assert "folder, loud" in out
    assert "heavy: []" in out
    code, out, err = app("--cfg", "job", "data.sise=3")
    assert code == 2
    assert "`sise`: did you mean `size`? (`data.sise`)" in err
    assert "heavy: []" in out


def test_another_folder_of_choices(app, tmp_path):
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "own.yaml").write_text("defaults: [folder, _self_]\n")
    code, out, err = app("--config-dir", "mine", "data=own", "hydra.run.dir=run")
    assert (code, err) == (0, "")
    assert "started" in out


def test_unknown_flags_end_with_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["unlabeled", "--hlp"])
    with pytest.raises(SystemExit) as stop:
        launch(lambda cfg: None)
    assert stop.value.code == 2
    assert "--hlp" in capsys.readouterr().err


class Refuses:
    def __init__(self, error):
        raise {"value": ValueError("too small"), "own": RuntimeError("a bug")}[error]


def test_building_names_the_node_whose_constructor_refuses(tmp_path):
    node = {"inner": {"_target_": f"{__name__}.Refuses", "error": "value"}}
    with pytest.raises(InputError, match=r"^`inner`: too small$"), building():
        instantiate(node)
    with pytest.raises(InputError, match="No such file"), building():
        (tmp_path / "gone").read_text()
    with pytest.raises(InputError, match=r"^once$"), building():
        raise InputError("once")


def test_building_leaves_other_errors_alone():
    node = {"inner": {"_target_": f"{__name__}.Refuses", "error": "own"}}
    with pytest.raises(InstantiationException, match="a bug"), building():
        instantiate(node)
    with pytest.raises(KeyError), building():
        {}["x"]


@pytest.mark.parametrize("asked", ["64-true", "bf16-true", 64])
def test_parameters_are_kept_in_single_precision(asked):
    with pytest.raises(ValueError, match=f"trainer.precision={asked} keeps .* choose bf16-mixed"):
        chosen(asked, "cpu")
    assert chosen("bf16-mixed", "cpu") == "bf16-mixed"


def test_the_tree_is_found():
    assert (conf_dir() / "train.yaml").is_file()


@pytest.mark.parametrize("line", ["--help", "--cfg job"])
def test_the_real_command_line_is_light(line, tmp_path):
    """No torch is imported to help, or to show a config."""
    code = (
        "import sys\nsys.argv = ['unlabeled', *sys.argv[1:]]\nfrom unlabeled.train import main\n"
        "try:\n    main()\nfinally:\n    print('heavy:', 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *line.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert "heavy: False" in done.stdout, done.stderr
