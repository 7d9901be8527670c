"""One pass for all evaluations, a backbone that stays what it was, and sweeps over checkpoints."""

import json

import pytest
import torch
from test_evaluate import Fake, Net
from test_runs import folder, unlabeled  # noqa: F401
from test_unsupervised_scores import Cut

from unlabeled.augment.probes import Shuffle, Turn
from unlabeled.data.decode import Crops
from unlabeled.evaluate.clustering import Clustering
from unlabeled.evaluate.contract import FINAL, Request, Result
from unlabeled.evaluate.health import Health
from unlabeled.evaluate.invariance import Invariance
from unlabeled.evaluate.knn import KNN
from unlabeled.evaluate.linear import Linear
from unlabeled.evaluate.retrieval import Retrieval
from unlabeled.evaluate.store import FeatureStore
from unlabeled.evaluate.suite import evaluate

FROZEN = {
    "knn": KNN(k=[1]),
    "other": KNN(k=[5], stage="one"),
    "linear": Linear(lrs=[0.1], epochs=2),
    "clustering": Clustering(starts=1),
}


def looking():
    """Those that look at more than the features of whole images."""
    return {
        "health": Health(decode=Crops(size=8, count=2, scale=(0.5, 1.0))),
        "retrieval": Retrieval(k=[1], patches=3),
        "invariance": Invariance(transforms={"turn": Turn(), "shuffle": Shuffle(grid=2)}),
    }


class Counted(Net):
    """Counts the images that it and all of its copies see."""

    seen = 0

    def stages(self, x):
        Counted.seen += len(x)
        return super().stages(x)


def seen(evals, out, **more):
    """Images that a backbone sees in a suite, and its scores."""
    torch.manual_seed(0)
    backbone, data = Counted(**more), Cut(noise=2, train=120, test=60)
    Counted.seen = 0
    scores = evaluate(evals, backbone=backbone, data=data, out=out, seed=0, pixels=False)
    return Counted.seen, scores.values


@pytest.mark.parametrize("end", [False, True])
def test_a_suite_of_frozen_evaluations_sees_each_image_once(tmp_path, end):
    count, scores = seen(FROZEN, tmp_path, end=end)
    assert count <= 120 + 60 + 2  # and one, twice, for the shapes
    assert {name.split("/")[0] for name in scores} == set(FROZEN)
    again, same = seen(FROZEN, tmp_path, end=end)
    assert again <= 2
    assert same == scores


def test_others_take_whole_images_from_the_same_pass(tmp_path):
    count, together = seen(FROZEN | looking(), tmp_path / "all")
    views = {"health": 2 * 60, "retrieval": 3 * 60, "invariance": 2 * 60}
    assert count <= 120 + 60 + sum(views.values()) + 2 + 2  # invariance asks for the shapes too
    for name, evaluation in looking().items():
        count, alone = seen({name: evaluation}, tmp_path / name)
        assert 0 <= count - 60 - views[name] <= 2
        assert alone
        for score, value in alone.items():
            assert together[score] == pytest.approx(value, rel=1e-4, abs=1e-5), score


class Own(Cut):
    """A data module that an evaluation has to itself."""

    def setup(self, stage):
        pass


@pytest.mark.parametrize("turn", [1, -1])
def test_data_modules_of_the_same_images_pass_once(tmp_path, turn):
    first, second, third = (Own(noise=2, train=120, test=60) for _ in range(3))
    evals = {
        "one": KNN(k=[1], stage="one", data=first),
        "two": KNN(k=[1], stage="two", data=second),
    }
    asks = Asks()
    asks.data = third
    evals = dict([*evals.items()][::turn]) | {"asks": asks}
    count, scores = seen(evals, tmp_path)
    assert count <= 120 + 60 + 3 * 2  # two of each for the shapes
    assert asks.found.shape == (2, 4 * 2 * 2)
    third.name = second.name = "others"  # and other images
    alone = {"one": evals["one"], "two": evals["two"]}
    assert seen(alone, tmp_path / "apart")[0] >= 2 * (120 + 60)
    assert {name.split("/")[0] for name in scores} == {"one", "two"}


def test_short_numbers_are_not_measured_with_and_need_no_pass_of_their_own(tmp_path):
    torch.manual_seed(0)
    net, data = Net(), Cut(noise=2, train=120, test=60)
    own = evaluate(looking(), backbone=net, data=data, out=tmp_path / "a", seed=0, pixels=False)
    evals = {"knn": KNN(k=[1])} | looking()
    found, seen = {}, {}
    for dtype in ("float32", "bfloat16"):
        store, before = FeatureStore(tmp_path / dtype, dtype=dtype), data.scanned
        found[dtype] = evaluate(
            evals, backbone=net, data=data, out=tmp_path, seed=0, pixels=False, store=store
        )
        seen[dtype] = data.scanned - before
    assert {name: found["bfloat16"].values[name] for name in own.values} == own.values
    assert "knn/k1_t0.07/top1" in found["bfloat16"].values
    assert seen["bfloat16"] == seen["float32"]
    kept = {path.name for path in (tmp_path / "bfloat16").rglob("*.npy")}
    assert any(name.endswith("_float32.npy") for name in kept)
    assert all(
        path.parent.name.startswith("test_") for path in tmp_path.rglob("bfloat16/*/*_float32.npy")
    )


class Asks:
    """Says what it was given; asks for one of two splits."""

    data, splits, needs_labels = None, frozenset({"test"}), False

    def requests(self, shapes):
        return {Request("one", 2)}

    def tune(self, subject):
        self.found = subject.kept("test", Request("one", 2), torch.tensor([3, 1]))
        self.other = subject.kept("test", Request("one", 4), torch.tensor([3, 1]))
        self.train = subject.kept("train", FINAL, torch.tensor([3, 1]))
        return Result({}, {}, {})


def test_a_subject_has_what_the_pass_left(tmp_path):
    torch.manual_seed(0)
    asks, net, data = Asks(), Net(), Fake()
    evaluate({"asks": asks}, backbone=net, data=data, out=tmp_path, seed=0, pixels=False)
    assert asks.found is None  # nobody else looks at these images
    evals = {"asks": asks, "knn": KNN(k=[1])}
    evaluate(evals, backbone=net, data=data, out=tmp_path, seed=0, pixels=False)
    kept = FeatureStore(tmp_path / "features").find(net, data, "test", Request("one", 2))
    assert torch.equal(asks.found, kept[[3, 1]].flatten(1))
    assert asks.other is None
    assert asks.train.shape == (2, 6)


# Frozen means frozen.


class Spoils:
    """Changes a backbone that it was not given."""

    data, splits, needs_labels = None, frozenset({"test"}), False

    def __init__(self, net):
        self.net = net

    def _spoil(self):
        self.net.one[1].running_mean += 1e-3

    def requests(self, shapes):
        return {FINAL}

    def __call__(self, features):
        self._spoil()
        return Result({}, {}, {})


class SpoilsTuning(Spoils):
    def tune(self, subject):
        self._spoil()
        return Result({}, {}, {})


@pytest.mark.parametrize("kind", [Spoils, SpoilsTuning])
@pytest.mark.parametrize("which", ["backbone", "random_backbone"])
def test_a_backbone_that_an_evaluation_changes_is_an_error(tmp_path, kind, which):
    nets = {"backbone": Net(), "random_backbone": Net()}
    evals = {"spoils": kind(nets[which])}
    with pytest.raises(RuntimeError, match="of Net changed while it was evaluated"):
        evaluate(evals, data=Fake(), out=tmp_path, seed=0, **nets)
    evaluate({"fine": kind(Net())}, data=Fake(), out=tmp_path, seed=0, **nets)


@pytest.mark.parametrize("name", looking())
def test_evaluations_that_only_look_verify_it(tmp_path, name):
    with pytest.raises(RuntimeError, match="of Net changed while it was evaluated"):
        evaluate(
            {name: looking()[name]},
            backbone=Net(drift=True),
            data=Cut(noise=2, test=60),
            out=tmp_path,
            seed=0,
            pixels=False,
        )


# Many checkpoints, many evaluations, one command.


def on_files(root):
    """Overrides: 80 images, of which 16 are tested on."""
    return [
        *("data=folder", f"data.root={root}", "data.layout.test_share=0.2"),
        *("data.size=16", "data.batch_size=16"),
        *("data.eval_decode.size=16", "data.eval_decode.resize=16"),
    ]


def test_a_sweep_extracts_each_backbone_once(tmp_path, source, monkeypatch, folder):  # noqa: F811
    other = tmp_path / "other.ckpt"
    saved = torch.load(source, weights_only=True)
    saved["state_dict"] = {k: v + 0.01 * (v.ndim > 1) for k, v in saved["state_dict"].items()}
    torch.save(saved, other)
    passes = []
    fill = FeatureStore._fill

    def counted(self, backbone, data, split, todo, *more):
        passes.append((type(backbone).__name__, split, {r.stage for r, _ in todo}))
        return fill(self, backbone, data, split, todo, *more)

    monkeypatch.setattr(FeatureStore, "_fill", counted)
    sweep = [
        *("-m", "method=none", "backbone=checkpoint", "trainer=cpu"),
        *on_files(folder / "labelled"),
        *(f"backbone.path={source},{other}", "evals=[knn,linear]", "evals.knn.k=[1]"),
        *("evals.linear.epochs=1", "evals.linear.lrs=[0.1]"),
        f"features={tmp_path / 'features'}",
    ]
    code, errors = unlabeled(*sweep, f"hydra.sweep.dir={tmp_path / 'first'}")
    assert code == 0, errors
    # Two checkpoints; random initialisation and pixels are the same for both.
    assert sorted((name, split) for name, split, _ in passes) == sorted(
        (name, split) for name in ("Pixels", *3 * ["ResNet"]) for split in ("train", "test")
    )
    scores = [json.loads((tmp_path / f"first/{i}/scores.json").read_text()) for i in range(2)]
    assert scores[0].keys() == scores[1].keys()
    different = {name for name in scores[0] if scores[0][name] != scores[1][name]}
    assert different
    assert not any(name.startswith("baseline/") for name in different)
    assert not (tmp_path / "first/0/features").exists()
    # Again, with more evaluations: nothing is extracted twice.
    passes.clear()
    sweep = [line.replace("linear]", "linear,clustering]") for line in sweep]
    code, errors = unlabeled(*sweep, f"hydra.sweep.dir={tmp_path / 'second'}")
    assert code == 0, errors
    assert passes == []
    for i in range(2):
        again = json.loads((tmp_path / f"second/{i}/scores.json").read_text())
        assert {name: again[name] for name in scores[i]} == scores[i]
        assert "clustering/k2/nmi" in again


def test_the_store_of_a_run_is_its_own_and_goes(tmp_path, source, folder):  # noqa: F811
    base = [
        *("method=none", "backbone=checkpoint", f"backbone.path={source}", "trainer=cpu"),
        *(
            *on_files(folder / "labelled"),
            "evals=[knn]",
            "evals.knn.k=[1]",
            "feature_dtype=bfloat16",
        ),
    ]
    out = tmp_path / "own"
    code, errors = unlabeled(*base, f"hydra.run.dir={out}")
    assert code == 0, errors
    assert not (out / "features").exists()
    assert (out / "figures/neighbours.npz").exists(), "whatever the type of the features"
    out = tmp_path / "kept"
    assert unlabeled(*base, "keep_features=true", f"hydra.run.dir={out}")[0] == 0
    assert len(list((out / "features").rglob("*_bfloat16.npy"))) == 6
    (tmp_path / "file").touch()
    code, errors = unlabeled(*base, f"features={tmp_path}/file", f"hydra.run.dir={tmp_path}/no")
    assert code == 2
    assert "file: nothing can be written there (File exists)" in errors
