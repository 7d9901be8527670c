"""The checkpoints of a run: how many there are, which one counts, and what is refused."""

import os
import pickle
import shutil
import zipfile

import pytest
import torch
import yaml
from conftest import CONF, ROOT
from omegaconf import OmegaConf
from test_runs import TINY, checkpoint, metrics, same_weights, status, unlabeled

from unlabeled import checkpoints
from unlabeled.identity import PACED, WATCHING, differing, digest, identity

RUN = [*TINY, "evals=none", "callbacks=none", "callbacks.checkpoint.every_n_steps=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four updates, whose last two checkpoints are kept."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert unlabeled(*RUN, f"hydra.run.dir={out}") == (0, "")
    return out


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def again(folder, *more):
    return unlabeled(*RUN, f"hydra.run.dir={folder}", *more)


def kept(folder):
    found = checkpoints.found(folder / "checkpoints/last.ckpt")
    return {p.name: torch.load(p, weights_only=True)["global_step"] for p in found}


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1, {"last.ckpt": 4}),
        (3, {"last.ckpt": 4, "last-1.ckpt": 3, "last-2.ckpt": 2}),
    ],
)
def test_the_last_few_are_kept(tmp_path, keep, expected):
    assert again(tmp_path, f"callbacks.checkpoint.keep={keep}") == (0, "")
    assert kept(tmp_path) == expected
    assert sorted(os.listdir(tmp_path / "checkpoints")) == sorted(expected)


def test_fewer_are_kept_from_now_on(tmp_path):
    grow = ["method.optim.schedule=constant", "method.optim.warmup=0"]
    assert again(tmp_path, "callbacks.checkpoint.keep=4", *grow) == (0, "")
    assert len(kept(tmp_path)) == 4
    assert again(tmp_path, "trainer.max_steps=5", *grow) == (0, "")
    assert kept(tmp_path) == {"last.ckpt": 5, "last-1.ckpt": 4}


def test_a_run_begun_anew_leaves_none_of_the_old(copy):
    assert again(copy, "seed=3", "resume=none", "trainer.max_steps=1") == (0, "")
    assert kept(copy) == {"last.ckpt": 1}


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """One bit of a weight, which nobody would see without the checksum."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
    with path.open("r+b") as file:
        file.seek(largest.header_offset + largest.file_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def empty(path):
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_one_falls_back_to_the_one_before(run, copy, damage, caplog, capfd):
    damage(copy / "checkpoints/last.ckpt")
    code, says = again(copy)
    assert code == 0
    said = caplog.text + says + "".join(capfd.readouterr())
    assert "last.ckpt is damaged" in said
    assert "set aside, the one before is used" in said
    assert same_weights(run, copy)  # the last update was made again
    assert [row["train/loss"] for row in metrics(copy)] == [
        row["train/loss"] for row in metrics(run)
    ]
    assert (copy / "checkpoints/last.ckpt.damaged").exists()


def test_nothing_is_begun_anew_where_all_are_damaged(copy):
    for path in checkpoints.found(copy / "checkpoints/last.ckpt"):
        cut(path)
    before = (copy / "status.json").read_text()
    code, says = again(copy)
    assert code == 2
    assert "every checkpoint in" in says
    assert "resume=none" in says
    assert (copy / "status.json").read_text() == before


class Attack:
    def __reduce__(self):
        return os.system, ("touch /tmp/unlabeled-attacked",)


def test_a_checkpoint_that_could_run_code_is_refused(copy, tmp_path):
    mark = tmp_path / "attacked"
    content = checkpoint(copy)
    content["callbacks"] = Attack()
    torch.save(content, copy / "checkpoints/last.ckpt")
    code, says = again(copy)
    assert code == 2
    assert "could run code" in says
    torch.save(content, tmp_path / "foreign.ckpt")
    code, says = again(tmp_path / "new", f"resume={tmp_path / 'foreign.ckpt'}")
    assert code == 2
    assert "could run code" in says
    assert not mark.exists()
    assert not os.path.exists("/tmp/unlabeled-attacked")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of a run: it lacks optimizer_states"):
        checkpoints.read(tmp_path / "weights.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="it is no dictionary"):
        checkpoints.read(tmp_path / "list.ckpt")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(checkpoints.DamagedError):
        checkpoints.read(tmp_path / "old.ckpt")
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 24))
    with pytest.raises(ValueError, match="compressed"):
        checkpoints.read(tmp_path / "bomb.ckpt")


# Whose they are.


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("trainer.gradient_clip_val=1.0", "trainer.gradient_clip_val"),
        ("trainer.precision=bf16-mixed", "trainer.precision"),
        ("trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches"),
        ("method.optim.lr=0.7", "method.optim.lr"),
        ("decode.scale=[0.5,1.0]", "data.decode.scale"),
        ("backbone.width=8", "backbone.width"),
        ("augment@method.augment=simclr_small", "method.augment"),
        ("trainer.max_steps=9", "trainer.max_steps: choose another hydra.run.dir"),
        ("trainer.max_steps=9", "train longer from where it ended, write resume="),
        ("callbacks=chunks", "callbacks.chunks.rows"),
        ("callbacks=norm_groups", "callbacks.norm_groups.size"),
    ],
)
def test_another_run_is_refused_by_name(copy, line, key):
    lines = [x for x in RUN if x.partition("=")[0] != line.partition("=")[0]]
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.suffix != ".log"}
    code, says = unlabeled(*lines, f"hydra.run.dir={copy}", line)
    assert code == 2
    assert "holds another run, which differs in" in says
    assert key in says
    assert {p: p.read_bytes() for p in before} == before  # its config too


def test_a_run_is_known_by_its_checkpoint_alone(copy):
    (copy / "status.json").unlink()
    code, says = again(copy, "seed=9")
    assert code == 2
    assert "holds another run" in says
    assert "seed" in says


def test_places_and_devices_make_no_other_run(compose, tmp_path):
    def of(*lines):
        return identity(OmegaConf.to_container(compose(*lines), resolve=True))

    lines = ["method=simclr", "data=folder", "data.root=/a"]
    first = of(*lines)
    same = of("method=simclr", "data=folder", "data.root=/b", "trainer=ddp", "trainer.devices=4")
    assert differing(first, same) == []
    more = ["logger=wandb", "data.workers=3", "callbacks=none", "evals=none"]
    assert digest(of(*lines, *more)) == digest(first)
    watching = ["callbacks=[online_knn,online_linear]", "callbacks.checkpoint.every_n_steps=7"]
    watching += ["callbacks.finite.every_n_steps=3", "~callbacks.health"]
    assert digest(of(*lines, *watching)) == digest(first)
    assert differing(first, of(*lines, "data.batch_size=8")) == ["data.batch_size"]
    assert len(digest(first)) == 16
    copies = ["data.layout.cache=/fast", "data.layout.cache_gb=3"]
    assert digest(of("data=shards", *copies)) == digest(of("data=shards"))
    noted = of("data=shards") | {"data.layout.cache": None}  # by what counted it once
    assert differing(noted, of("data=shards", *copies)) == []


CONSTANT = ["method.optim.schedule=constant", "method.optim.warmup=0"]


@pytest.mark.parametrize(
    ("method", "more", "counts"),
    [
        ("simclr", ["method.optim.schedule=constant"], True),  # it warms up
        ("simclr", ["method.optim.warmup=0"], True),  # along a cosine
        ("simclr", CONSTANT, False),
        ("simclr", [*CONSTANT, "method.optim.weight_decay_end=0.1"], True),
        ("byol", CONSTANT, True),  # its momentum rises
        ("byol", [*CONSTANT, "method.schedule=constant"], False),
        ("swav", CONSTANT, True),  # prototypes rest at first
        ("dino", CONSTANT, True),
    ],
)
def test_the_length_makes_another_run_where_anything_depends_on_it(compose, method, more, counts):
    def of(*lines):
        cfg = compose(f"method={method}", *more, *lines)
        return identity(OmegaConf.to_container(cfg, resolve=True))

    for line in ("trainer.max_steps=9", "trainer.max_epochs=9"):
        assert differing(of(), of(line)) == ([line.partition("=")[0]] if counts else [])


def test_methods_that_ask_for_progress_are_known():
    asks = {
        p.stem
        for p in (ROOT / "src/unlabeled/methods").glob("*.py")
        if ".progress" in p.read_text()
    }
    assert asks == {*PACED, "byol"}  # whose `schedule` says whether it does


def test_callbacks_that_watch_are_known():
    there = {p.stem for p in (CONF / "callbacks").glob("*.yaml")}
    found = {
        node._target_.split(".")[2]
        for name in there
        for node in OmegaConf.load(CONF / f"callbacks/{name}.yaml").values()
        if OmegaConf.is_dict(node)
    }
    assert found == {*WATCHING, "finite", "chunks", "norm_groups"}


def test_what_stopped_may_go_on_by_skipping_but_not_the_other_way(compose):
    def of(*lines):
        return identity(OmegaConf.to_container(compose("method=simclr", *lines), resolve=True))

    stops, skips = of(), of("callbacks.finite.policy=skip", "callbacks.finite.most=3")
    assert differing(stops, skips) == []
    assert differing(skips, stops) == ["callbacks.finite.policy"]
    assert digest(stops) != digest(skips)


def test_a_callback_of_somebody_else_counts(compose):
    def of(*lines):
        return identity(OmegaConf.to_container(compose("method=simclr", *lines), resolve=True))

    theirs = "+callbacks.theirs._target_=theirs.Callback"
    assert differing(of(), of(theirs)) == ["callbacks.theirs._target_"]
    assert differing(
        of(theirs, "+callbacks.theirs.rate=1"), of(theirs, "+callbacks.theirs.rate=2")
    ) == ["callbacks.theirs.rate"]
    assert differing(of(theirs), of(theirs, "callbacks.theirs=null")) == [
        "callbacks.theirs._target_"
    ]


def test_a_source_may_move_but_not_change(compose, source, tmp_path):
    def of(path):
        cfg = compose("method=clusterfit", f"method.source.path={path}")
        return identity(OmegaConf.to_container(cfg, resolve=True))

    moved = shutil.copy(source, tmp_path / "moved.ckpt")
    assert differing(of(source), of(moved)) == []
    content = torch.load(source)
    content["state_dict"]["backbone.conv1.weight"] += 1
    torch.save(content, tmp_path / "other.ckpt")
    assert differing(of(source), of(tmp_path / "other.ckpt")) == ["method.source.path"]


@pytest.mark.parametrize(
    ("lines", "key", "name"),
    [
        (("method=tracking", "data=scenes_video"), "data.tracks", "tracks/train.npz"),
        (("method=colorization",), "method.prior", "prior.npz"),
        (("method=jigsaw",), "method.augment.permutations", "orders.npy"),
    ],
)
def test_what_a_run_reads_may_move_but_not_change(compose, tmp_path, lines, key, name):
    def of(folder, content):
        file = tmp_path / folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        place = file.parent if key == "data.tracks" else file
        cfg = compose(*lines, f"{key}={place}")
        return identity(OmegaConf.to_container(cfg, resolve=True))

    first = of("here", b"1")
    assert differing(first, of("there", b"1")) == []
    assert differing(first, of("there", b"2")) == [key]


# What ends a run that was killed after its last step.


def test_the_end_of_training_is_made_up_for(tmp_path, monkeypatch):
    from unlabeled.callbacks.held_out import HeldOut

    lines = [*(x for x in RUN if "method" not in x and x != "callbacks=none"), "method=rotation"]
    lines += ["callbacks=default", "callbacks.held_out.limit=16", "evals=none"]
    lines = [*dict.fromkeys(lines), "optim@method.optim=sgd"]
    assert unlabeled(*lines, f"hydra.run.dir={tmp_path / 'whole'}") == (0, "")

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "_measure", killed)
        assert unlabeled(*lines, f"hydra.run.dir={tmp_path / 'half'}")[0] == 130
    assert checkpoint(tmp_path / "half")["global_step"] == 4
    assert "held_out/rotation" not in metrics(tmp_path / "half")[0]
    assert unlabeled(*lines, f"hydra.run.dir={tmp_path / 'half'}") == (0, "")
    assert same_weights(tmp_path / "whole", tmp_path / "half")

    def timeless(folder):
        return [
            {k: v for k, v in row.items() if not k.startswith("perf/")} for row in metrics(folder)
        ]

    assert timeless(tmp_path / "half") == timeless(tmp_path / "whole")


def test_a_run_from_a_finished_one_has_its_checkpoint(run, tmp_path):
    assert again(tmp_path, f"resume={run}") == (0, "")
    assert same_weights(run, tmp_path)
    assert again(tmp_path) == (0, "")
    assert status(tmp_path)["epochs"] == status(run)["epochs"] == 1


def test_the_config_beside_a_run_is_its_own(run):
    config = yaml.safe_load((run / ".hydra/config.yaml").read_text())
    assert config["method"]["_target_"] == "unlabeled.methods.simclr.SimCLR"
    overrides = yaml.safe_load((run / ".hydra/overrides.yaml").read_text())
    assert "trainer.max_steps=4" in overrides
    choices = yaml.safe_load((run / ".hydra/hydra.yaml").read_text())["hydra"]["runtime"]["choices"]
    assert choices["method"] == "simclr"
