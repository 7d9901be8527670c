"""Keys stay out of all that a run writes, and code and markup out of what it is given."""

import ast
import logging
import re

import pytest
from conftest import ROOT
from test_checkpoints import RUN
from test_runs import status, unlabeled

from unlabeled.folder import Folder
from unlabeled.redact import hidden

KEY = "0123456789abcdef0123456789abcdef01234567"
FILES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
NEVER = {  # call -> what it would do with input from outside
    *("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load"),
    *("yaml.unsafe_load", "yaml.full_load", "marshal.loads", "shelve.open"),
}
OURS = {("worker.py", "pickle.loads")}  # what the process that started it sends down a pipe


def test_a_key_is_nowhere_in_a_runs_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "run"
    lines = [*RUN, "logger=wandb", f"logger.wandb.project=p_{KEY[:6]}", f"hydra.run.dir={out}"]
    code, says = unlabeled(*lines, f"+hydra.job.env_set.WANDB_API_KEY={KEY}", f"seed={1}")
    assert code == 0, says
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"status.json", "config.yaml", "hydra.yaml", "metrics.csv"} <= {p.name for p in files}
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in "".join(capfd.readouterr())
    assert "WANDB_API_KEY=(hidden)" in status(out)["command"]


@pytest.mark.parametrize(
    "launcher",
    ["serial", pytest.param("local", marks=pytest.mark.slow)],  # a process each
)
def test_a_key_is_nowhere_in_a_sweeps_folder(tmp_path, capfd, launcher):
    lines = ["method=none", "evals=none", "trainer=cpu", "backbone.width=8", "data.limit=64"]
    lines += [f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}", "seed=0,-1"]
    given = f"export WANDB_API_KEY={KEY}"
    lines += [f"+hydra.job.env_set.WANDB_API_KEY={KEY}", f"launcher.setup=['{given}','{given} a']"]
    code, says = unlabeled("-m", *lines)
    assert code == 2  # the second member's seed
    files = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    there = {"multirun.yaml", "sweep.csv", "sweep.md", "sweep.html", "0.json", "status.json"}
    assert there <= files.keys()
    assert not [name for name, content in files.items() if KEY.encode() in content]
    assert KEY not in says + "".join(capfd.readouterr())
    assert b"WANDB_API_KEY=(hidden)" in files["multirun.yaml"]
    code, says = unlabeled("-m", *lines)  # members are known by what is left of their overrides
    assert code == 2
    assert len(list((tmp_path / ".members").glob("*.json"))) == 2


def test_a_key_in_quotes_is_hidden():
    said = f"logger.wandb.api_key='{KEY}' api_key: \"{KEY}\" secret=null"
    assert hidden(said) == "logger.wandb.api_key='(hidden)' api_key: \"(hidden)\" secret=null"


def test_a_key_in_an_error_is_not_kept(tmp_path, monkeypatch):
    from unlabeled.method import Method

    def broken(*args):
        raise RuntimeError(f"401 for {KEY}")

    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.setattr(Method, "on_train_batch_start", broken)
    code, says = unlabeled(*RUN, f"hydra.run.dir={tmp_path}", "debug=true")
    assert code == 1
    assert "401 for (hidden)" in says
    assert "Traceback" in says
    assert KEY not in says
    assert "401 for (hidden)" in status(tmp_path)["reason"]


def test_a_run_whose_data_need_a_key_goes_on_and_logs_none(compose, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", KEY)
    place = f"pipe:curl -H 'Authorization:Bearer {KEY}' https://host/0.tar"
    cfg = compose("method=none", "data=shards")
    cfg.data.layout.train = place
    before = logging.getLogRecordFactory()
    handler = logging.FileHandler(tmp_path / "train.log")
    logging.getLogger().addHandler(handler)
    try:
        for _ in range(2):  # the second start knows it is the same run
            with Folder(tmp_path, cfg) as folder:
                logging.getLogger("unlabeled.data.reading").warning("cannot read %s", place)
                assert KEY not in str(folder.identity)  # which checkpoints hold
    finally:
        logging.getLogger().removeHandler(handler)
        logging.setLogRecordFactory(before)
        handler.close()
    said = (tmp_path / "train.log").read_text()
    assert said.count("Bearer (hidden)") == 2
    assert KEY not in said


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_no_code_of_others_is_run(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        place = f"{path}:{node.lineno}"
        assert name not in NEVER or (path.name, name) in OURS, place
        assert given.get("shell", "False") == "False", place
        assert given.get("allow_pickle", "False") == "False", place
        assert given.get("weights_only", "True") == "True" or name == "trainer.save_checkpoint"
        if name == "torch.load":
            assert given.get("weights_only") == "True", place


def test_templates_escape_what_they_show():
    sources = "".join(p.read_text() for p in (ROOT / "src/unlabeled/report").rglob("*.py"))
    environments = re.findall(r"Environment\([^)]*", sources)
    assert environments
    assert all("autoescape=True" in found for found in environments)
