"""Sweeps: members and their numbers, what is repeated and what not, the table, the launchers."""

import csv
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT

from unlabeled.errors import InputError
from unlabeled.report import sweep as table
from unlabeled.sweep import array, gpus, members
from unlabeled.sweep.settings import Settings, minutes, read

APP = """
import json, os, sys, time
from pathlib import Path

def task(cfg):
    from hydra.core.hydra_config import HydraConfig
    out = Path(HydraConfig.get().runtime.output_dir)
    with (out / "starts").open("a") as file:
        print(os.getpid(), cfg.x, file=file)
    if cfg.kind == "wrong" or cfg.x == 13 and not Path("mended").exists():
        from unlabeled.errors import InputError
        raise InputError("x cannot be 13 | <b>never</b>")
    if cfg.x == 14:
        raise RuntimeError("bad luck")
    if cfg.x == 15 and not Path("mended").exists():
        print("about to die", flush=True)
        os._exit(7)
    (out / "scores.json").write_text(json.dumps({"knn/top1": 1 - abs(cfg.x - 3) / 10}))
    return cfg.x

if __name__ == "__main__":
    from unlabeled.cli import launch

    def after():
        if launched := sys.modules.get("unlabeled.sweep.launch"):
            launched.finish()

    launch(task, Path(__file__).parent / "conf", after=after)
"""
TREE = {
    "train.yaml": """
        defaults: [_self_, {override hydra/launcher: serial}]
        x: 0
        kind: right
        objective: null
        evals: {knn: {}}
        launcher: {jobs: null}
        hydra: {sweep: {dir: sweep, subdir: "${hydra:job.num}"}}
        """,
}


@pytest.fixture
def app(tmp_path):
    """Runs a sweep of a small application; (exit code, output, errors)."""
    (tmp_path / "app.py").write_text(APP)
    for name, content in TREE.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))
    for group in ("launcher", "sweeper"):
        shutil.copytree(ROOT / "conf/hydra" / group, tmp_path / "conf/hydra" / group)

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "app.py", "-m", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def rows(folder):
    with (folder / "sweep.csv").open(newline="") as file:
        return {int(row["member"]): row for row in csv.DictReader(file)}


def starts(sweep, number):
    return len((sweep / str(number) / "starts").read_text().splitlines())


@pytest.mark.parametrize("launcher", ["serial", "local"])
def test_a_member_that_fails_stops_no_other_and_is_all_that_is_repeated(app, tmp_path, launcher):
    bad = 13 if launcher == "serial" else 15  # in its own process it may even die
    lines = [f"hydra/launcher={launcher}", "launcher.jobs=2", f"x=1,{bad},2"]
    code, out, err = app(*lines)
    sweep = tmp_path / "sweep"
    assert code == (2 if bad == 13 else 1), err
    assert "a member of the sweep did not finish" in err
    assert f"hydra.sweep.dir={sweep}" in err
    found = rows(sweep)
    assert [found[i]["status"] for i in range(3)] == ["finished", "failed", "finished"]
    reason = "x cannot be 13" if bad == 13 else "ended with code 7: about to die"
    assert reason in found[1]["reason"]
    assert reason in err
    assert found[2]["overrides"].endswith("x=2")
    assert float(found[2]["knn/top1"]) == 0.9
    assert "#2 finished" in out

    (tmp_path / "mended").touch()
    code, out, err = app(*lines)
    assert code == 0, err
    assert "2 finished before" in out
    assert [starts(sweep, i) for i in range(3)] == [1, 2, 1]
    found = rows(sweep)
    assert {row["status"] for row in found.values()} == {"finished"}
    assert found[1]["tries"] == "2"

    if launcher == "local":
        return
    code, out, err = app("x=2,4,1")  # another one, among old ones
    assert code == 0, err
    assert [starts(sweep, i) for i in range(4)] == [1, 2, 1, 1]
    assert rows(sweep)[3]["overrides"].endswith("x=4")


def test_numbers_never_meet_a_folder_that_is_there(app, tmp_path):
    precious = tmp_path / "sweep/7/starts"
    precious.parent.mkdir(parents=True)
    precious.write_text("precious\n")
    code, _, err = app("x=1,2")
    assert code == 0, err
    assert sorted(rows(tmp_path / "sweep")) == [8, 9]
    assert precious.read_text() == "precious\n"


def test_folders_by_overrides_must_tell_members_apart(app, tmp_path):
    code, _, err = app("x=1,2", "hydra.sweep.subdir=at_${x}")
    assert code == 0, err
    assert (tmp_path / "sweep/at_2/starts").exists()
    code, _, err = app("x=3,4", "hydra.sweep.subdir=same")
    assert code == 2
    assert "is the folder of member" in err
    assert starts(tmp_path / "sweep", "same") == 1


def test_local_members_run_at_once_and_in_processes_of_their_own(app, tmp_path):
    code, _, err = app("hydra/launcher=local", "launcher.jobs=2", "x=1,2", "+wait=1")
    assert code == 0, err
    said = [(tmp_path / f"sweep/{i}/starts").read_text().split()[0] for i in range(2)]
    assert said[0] != said[1]


def test_optuna_maximises_and_goes_on(app, tmp_path):
    pytest.importorskip("optuna")
    lines = ["hydra/sweeper=optuna", "objective=knn/top1", "x=range(0,8)", "kind=right"]
    code, out, err = app(*lines, "hydra.sweeper.n_trials=4")
    assert code == 0, err
    assert out.count("warning: objective=knn/top1 is of the data's test images") == 1
    assert "data=cifar10_held_out" in out
    best = max(float(row["knn/top1"]) for row in rows(tmp_path / "sweep").values())
    results = (tmp_path / "sweep/optimization_results.yaml").read_text()
    assert f"best_value: {best}" in results
    before = {i: starts(tmp_path / "sweep", i) for i in rows(tmp_path / "sweep")}
    assert set(before.values()) == {1}
    held_out = "+data.layout={_target_: unlabeled.data.layouts.HeldOut, layout: {_target_: %s}}"
    held_out %= "unlabeled.data.layouts.CIFAR10"
    code, out, err = app(*lines, "hydra.sweeper.n_trials=6", held_out)
    assert code == 0, err
    assert "test images" not in out
    after = {i: starts(tmp_path / "sweep", i) for i in rows(tmp_path / "sweep")}
    assert set(after.values()) == {1}
    assert before.keys() <= after.keys()


def test_optuna_survives_members_that_fail(app, tmp_path):
    pytest.importorskip("optuna")
    lines = ["hydra/sweeper=optuna", "objective=knn/top1", "x=choice(2,14)"]
    code, _, err = app(*lines, "hydra.sweeper.n_trials=5")
    assert code == 1
    assert "RuntimeError: bad luck" in err
    found = rows(tmp_path / "sweep").values()
    assert {row["status"] for row in found} == {"finished", "failed"}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["hydra/sweeper=optuna", "x=1,2"], "optuna needs a score"),
        (["objective=kn/top1", "x=1,2"], "did you mean knn/...?"),
        (["+launcher.nodse=2", "x=1,2"], "did you mean `nodes`?"),
        (["+launcher.time=never", "+launcher.gpus_per_node=-1", "x=1,2"], "at least 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(app, tmp_path, lines, says):
    if "hydra/sweeper=optuna" in lines:
        pytest.importorskip("optuna")
    code, _, err = app(*lines)
    assert code == 2, err
    assert says in err
    assert not (tmp_path / "sweep/0").exists()


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    members.lock(tmp_path)
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        from unlabeled.sweep import members
        members.lock(Path(sys.argv[1]))
    """)
    line = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert "another sweep runs in this folder" in done.stderr
    members.release(tmp_path)
    assert subprocess.run(line, capture_output=True, check=False).returncode == 0


def test_members_are_told_apart_by_what_changes_results():
    same = members.key(["seed=1", "method=byol", "launcher.time=60", "debug=true"])
    assert same == members.key(["method=byol", "launcher.time=90", "seed=1", "resume=none"])
    assert same != members.key(["seed=2", "method=byol"])
    assert members.key(["data.workers=2"]) == members.key(["data.root=x"]) == ()
    assert members.key(["data.limit=2"]) != ()


def test_a_failed_member_that_was_run_by_hand_is_finished(tmp_path):
    (planned,) = members.plan(tmp_path, [["seed=1"]], objective=None)
    members.started(tmp_path, 0)
    members.ended(tmp_path, 0, "failed", "out of luck")
    (tmp_path / "0").mkdir()
    (tmp_path / "0/status.json").write_text(json.dumps({"state": "failed"}))
    (planned,) = members.plan(tmp_path, [["seed=1"]], objective=None)
    assert (planned.state, planned.number) == ("queued", 0)
    (tmp_path / "0/status.json").write_text(json.dumps({"state": "finished"}))
    (planned,) = members.plan(tmp_path, [["seed=1"]], objective=None)
    assert planned.state == "finished"


def test_a_broken_record_is_named(tmp_path):
    members.plan(tmp_path, [["seed=1"]], objective=None)
    (tmp_path / ".members/0.json").write_text("{")
    with pytest.raises(InputError, match=r"0\.json: not a record"):
        members.plan(tmp_path, [["seed=1"]], objective=None)


def test_the_table(tmp_path):
    jobs = [["method=byol", f"seed={i}", "note=a|b<i>"] for i in range(3)]
    members.plan(tmp_path, jobs, objective="knn/k20/top1")
    for i, score in enumerate([0.25, 0.5]):
        (tmp_path / str(i)).mkdir()
        members.started(tmp_path, i)
        scores = {"knn/k1/top1": 0.9, "knn/k20/top1": score, "baseline/random/knn/k20/top1": 0.1}
        (tmp_path / str(i) / "scores.json").write_text(json.dumps(scores))
        (tmp_path / str(i) / "report.html").touch()
        members.ended(tmp_path, i, "finished")
    members.started(tmp_path, 2)
    members.ended(tmp_path, 2, "failed", "ValueError: <script>alert(1)</script> a|b")
    table.write(tmp_path)
    text = (tmp_path / "sweep.md").read_text().splitlines()
    head = "| `member` | `seed` | `status` | `time` | `knn/k20/top1` | `reason` |"
    assert text[0] == head
    assert text[2].startswith("| 0 | 0 | finished | 0:00 | 25.0 % |") or "| – |" in text[2]
    assert "a\\|b" in text[4]
    page = (tmp_path / "sweep.html").read_text()
    assert "<b>50.0 %</b>" in page
    assert "<b>25.0 %</b>" not in page
    assert '<a href="1/report.html">' in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<code>note=a|b&lt;i&gt;</code>" in page
    found = rows(tmp_path)
    assert found[1]["knn/k20/top1"] == "0.5"
    assert found[2]["knn/k20/top1"] == ""
    for i in range(2):  # where less is better, the least is the best
        details = {"knn/k20/top1": {"better": "lower"}}
        (tmp_path / str(i) / "scores_details.json").write_text(json.dumps(details))
    table.write(tmp_path)
    page = (tmp_path / "sweep.html").read_text()
    assert "<b>25.0 %</b>" in page
    assert "<b>50.0 %</b>" not in page


def test_differing_keys():
    lines = [["a=1", "b=2", "+c=1", "launcher.time=9"], ["a=1", "b=3"]]
    assert table.differing(lines) == ["b", "c"]
    assert table.clock(3723) == "1:02:03"
    assert table.clock(59.6) == "1:00"


@pytest.mark.parametrize(
    ("time", "wanted"),
    [(60, 60), ("90", 90), ("1:30", 2), ("2:00:00", 120), ("1-12", 2160), ("1-0:30", 1470)],
)
def test_times(time, wanted):
    assert minutes(time) == wanted


def test_settings_name_all_that_is_wrong():
    node = {"nodes": 0, "jobs": "two", "partion": "x", "time": "1h"}
    with pytest.raises(InputError) as error:
        read(node)
    for part in ("at least 1", "expected an integer", "did you mean `partition`?"):
        assert part in str(error.value)
    with pytest.raises(InputError, match="not a time"):
        read({"time": "1h"})
    with pytest.raises(InputError, match=r"shorter than launcher\.warning"):
        read({"time": 2, "warning": 120})
    assert read({"gpus_per_node": 8}).tasks == 8
    assert read({}).tasks == 1


def test_the_config_has_the_settings_and_their_defaults(compose):
    from omegaconf import OmegaConf

    assert read(OmegaConf.to_container(compose().launcher)) == Settings()


def test_what_slurm_is_asked_for():
    settings = read({
        "nodes": 2, "gpus_per_node": 8, "cpus_per_task": 6, "memory": 200, "time": "1-0",
        "account": "vision", "partition": "gpu", "constraint": "a100", "jobs": 3, "warning": 90,
        "options": {"mail-type": "END"}, "setup": ["module load cuda"],
    })  # fmt: skip
    given = array.parameters(settings)
    assert given["nodes"] == 2
    assert given["tasks_per_node"] == given["gpus_per_node"] == 8
    assert given["timeout_min"] == 1440
    assert given["mem_gb"] == 200
    assert given["slurm_array_parallelism"] == 3
    assert given["slurm_signal_delay_s"] == 90
    assert given["slurm_additional_parameters"] == {"requeue": True, "mail-type": "END"}
    assert given["slurm_setup"][0] == "module load cuda"
    assert (given["slurm_account"], given["slurm_partition"]) == ("vision", "gpu")
    assert given["slurm_constraint"] == "a100"
    sizes = array.sizes(settings, ["seed=0"], "auto")
    assert sizes == ["trainer.num_nodes=2", "trainer.devices=8", "trainer.strategy=ddp"]
    assert array.sizes(settings, ["trainer.devices=8"], "ddp_spawn") == sizes[:2]
    assert array.sizes(Settings(), ["trainer.devices=8"], "auto") == []
    with pytest.raises(InputError, match=r"launcher\.nodes=2 with 8 processes"):
        array.sizes(settings, ["trainer.num_nodes=1"], "auto")


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    found = gpus.visible()
    assert found == ["3", "5", "6", "7"]
    assert [gpus.share(found, slot, 2) for slot in range(2)] == [["3", "5"], ["6", "7"]]
    assert [gpus.share(found, slot, 1) for slot in (0, 3, 4)] == [["3"], ["7"], ["3"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.visible() == []


def test_without_slurm_the_launcher_says_so(app, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    code, _, err = app("hydra/launcher=slurm", "x=1,2")
    assert code == 2, err
    assert "there is no `sbatch` here" in err
