"""The evaluation `sound`: folds, spans that answer together, machines as scikit-learn's."""

import numpy as np
import pytest
import torch
from conftest import SHORT
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from test_audio_data import RATE, esc50, module
from torch import nn

from unlabeled.backbones.audio_video import AudioVideo, Hearing
from unlabeled.backbones.load import checkpoint, fresh
from unlabeled.backbones.look_listen import LookListen
from unlabeled.data.audio_layouts import ESC50
from unlabeled.data.clip_decode import Evenly
from unlabeled.data.clip_parts import Sound as Heard
from unlabeled.data.clips import Recordings
from unlabeled.data.decode import Center, Crops
from unlabeled.data.images import Images
from unlabeled.data.layouts import Folder
from unlabeled.data.recordings import Memory
from unlabeled.data.sound_spans import Spans
from unlabeled.evaluate import finite_newton
from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.frozen import checksum
from unlabeled.evaluate.pixels import Pixels
from unlabeled.evaluate.sound import Sound
from unlabeled.evaluate.sound_heads import Softmax, SVMs
from unlabeled.evaluate.suite import evaluate, misfit, refuse
from unlabeled.methods.avc import AVC

SPANS = 3
KINDS = tuple(f"class {k}" for k in range(6))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNLABELED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def root(cache, tmp_path_factory):
    """Six classes, each with a tone of its own in noise."""
    folder = tmp_path_factory.mktemp("esc50")
    esc50(folder, KINDS, sources=2, takes=1, hertz=lambda k: 250 * (k + 1))
    return folder


def ears(space=8, **changes):
    torch.manual_seed(1)
    look = LookListen(widths=(4, 8))
    listen = Hearing(LookListen(channels=1, widths=(8, 32)), window=64, hop=32, scale=5.0)
    return AudioVideo(look, listen, space=space, **changes)


def sound(head=None, **changes):
    given = {"decode": Spans(count=SPANS), "head": head or SVMs(costs=[1e-3, 1e-1])}
    return Sound(**{**given, **changes})


def subject(data, network):
    return Subject(network, data, 0, torch.device("cpu"), lambda *args: None)


def test_machines_are_those_of_scikit_learn():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(90, 7))
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0.5) + draw.integers(0, 2, 90)
    samples, classes, costs = torch.from_numpy(x), torch.from_numpy(y), (0.01, 1.0, 30.0)
    for rows in (90, 6):  # more than features, and fewer
        given = samples[-rows:], classes[-rows:], 4
        warm = finite_newton.fit(*given, costs, tolerance=1e-7)
        for cost, found in zip(costs, warm, strict=True):
            (cold,) = finite_newton.fit(*given, [cost], tolerance=1e-7)
            wanted = [
                LinearSVC(C=cost, dual=False, tol=1e-10, max_iter=100_000).fit(
                    x[-rows:], y[-rows:] == k
                )
                for k in np.unique(y[-rows:])
            ]
            for machines in (found, cold):
                assert machines.converged.all()
                for k, svm in zip(np.unique(y[-rows:]), wanted, strict=True):
                    near = {"rtol": 1e-4, "atol": 1e-5}
                    np.testing.assert_allclose(machines.weight[:, k], svm.coef_[0], **near)
                    np.testing.assert_allclose(machines.bias[k], svm.intercept_[0], **near)
                    np.testing.assert_allclose(
                        machines(samples)[:, k], svm.decision_function(x), **near
                    )
    (few,) = finite_newton.fit(samples, classes, 4, [30.0], steps=1)
    assert not few.converged.all()


def test_machines_of_classes_that_are_not_met_say_no():
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() * 2
    (found,) = finite_newton.fit(x, y, 4, [1.0])
    assert (found(x)[:, [1, 3]] < 0).all()
    assert (found(x).argmax(1) == y).double().mean() > 0.9


def literal(root, net, costs):
    """Top-1 of every fold with scikit-learn, a loop over recordings, and the cost of each."""
    tops, chosen = [], []
    for fold in range(1, 6):
        data = module(root, ESC50(fold=fold))
        x, y = {}, {}
        for side in ("train", "test"):
            split = data._read().split(side)
            y[side] = split.labels.numpy()
            x[side] = []
            for i in range(len(split)):
                spans = [split.recording(i).sound(t, 0.25, RATE) for t in (0.0, 0.125, 0.25)]
                with torch.no_grad():
                    x[side].append(net.eval().hear(torch.stack(spans)).numpy())
            x[side] = np.stack(x[side]).astype(np.float64)

        def predicted(rows, asked, cost, x=x, y=y):
            spans = x["train"][rows]
            scale = StandardScaler().fit(spans.reshape(-1, spans.shape[2]))
            svm = LinearSVC(C=cost, dual=False, tol=1e-8, max_iter=100_000)
            svm.fit(scale.transform(spans.reshape(-1, spans.shape[2])), y["train"][rows].repeat(3))
            flat = scale.transform(asked.reshape(-1, asked.shape[2]))
            return svm.decision_function(flat).reshape(len(asked), 3, -1).mean(1).argmax(1)

        fit, held = (part.numpy() for part in data.selection())
        right = [(predicted(fit, x["train"][held], c) == y["train"][held]).mean() for c in costs]
        best = costs[int(np.argmax(right))]
        chosen.append(best)
        whole = np.arange(len(y["train"]))
        tops.append((predicted(whole, x["test"], best) == y["test"]).mean())
    return tops, chosen


def test_folds_equal_scikit_learn_and_are_averaged(root):
    net, costs = ears(), [1e-3, 1e-2, 1e-1]
    wanted, chosen = literal(root, net, costs)
    before = checksum(net)
    plan = sound(SVMs(costs=costs), folds=[1, 2, 3, 4, 5])
    found = plan.tune(subject(module(root, ESC50()), net.train()))
    assert checksum(net) == before  # batch statistics too
    assert net.training
    details = found.details["svm/top1"]
    assert list(details["by_fold"].values()) == pytest.approx(wanted)
    assert found.scores["svm/top1"] == pytest.approx(np.mean(wanted))
    assert [h["cost"] for h in details["hyperparameters_by_fold"].values()] == chosen
    assert details["n"] == 60
    low, high = details["ci95"]
    assert low < found.scores["svm/top1"] <= high
    assert found.scores["svm/top1"] > 0.4  # a random network; chance is 1 in 6
    assert "standardised" in details["protocol"]
    assert "held-out training recordings" in details["selection"]
    assert set(found.scores) == {"svm/top1", "svm/top5"}
    assert "Sound(seconds=0.25, rate=4000" in details["hyperparameters"]["spans"]


def test_every_recording_is_heard_once_for_all_folds(root):
    net = ears()
    heard = []
    net.sound.register_forward_hook(lambda module, given, out: heard.append(len(given[0])))
    one = SVMs(costs=[1e-2])
    both = sound(one, folds=[2, 5]).tune(subject(module(root, ESC50()), net))
    assert sum(heard) == 60 * SPANS
    for fold in (2, 5):
        alone = sound(one).tune(subject(module(root, ESC50(fold=fold)), net))
        assert both.details["svm/top1"]["by_fold"][fold] == alone.scores["svm/top1"]
        assert alone.details["svm/top1"]["selection"] == "none: the setting is given"


def test_softmax_and_pooled_maps(root):
    net = ears()
    head = Softmax(lrs=[1e-6, 0.1], epochs=20, batch_size=32)
    found = sound(head, pool=[4, 3]).tune(subject(module(root, ESC50()), net))
    details = found.details["softmax/top1"]
    assert details["hyperparameters"]["features"] == 32 * 4 * 3
    assert details["hyperparameters"]["lr"] == 0.1
    assert details["tried"][0]["held_out_top1"] < details["tried"][1]["held_out_top1"]
    assert found.scores["softmax/top1"] > 0.6
    audio = torch.randn(2, 1000)
    maps = net.hear_stages(audio)["conv2"]
    pooled = sound(pool=[4, 3])._heard(net.eval(), audio).view(2, 32, 4, 3)
    maps = net.hear_stages(audio)["conv2"]
    high, wide = maps.shape[2] / 4, maps.shape[3] / 3
    corner = maps[:, :, : int(np.ceil(high)), : int(np.ceil(wide))].amax((2, 3))
    torch.testing.assert_close(pooled[:, :, 0, 0], corner)


class Loud:
    """Recordings with pictures, in memory, whose classes are tones; no official folds."""

    def __init__(self, *, mute=False):
        self.mute = mute

    def __call__(self, root, seed):
        time = torch.arange(RATE) / RATE
        labels = torch.arange(30) % 3
        phase = torch.rand(30, 1, generator=torch.Generator().manual_seed(0)) * 6
        audio = 0.5 * torch.sin(2 * torch.pi * (400 * (labels + 1))[:, None] * time + phase)
        frames = torch.full((30, 2, 3, 8, 8), 128, dtype=torch.uint8)
        split = Memory(frames, 2.0, None if self.mute else audio, RATE, labels, ("a", "b", "c"))
        rows = torch.arange(30)
        return {"train": split.take(rows[:18]), "test": split.take(rows[18:])}


def loud(seconds=0.25, **layout):
    heard = None if seconds is None else Heard(seconds=seconds, rate=RATE)
    decodes = {"decode": Crops(size=8), "eval_decode": Evenly(size=8, sound=heard)}
    return Recordings(
        root=".", layout=Loud(**layout), **decodes, batch_size=4, workers=0, val_share=0.3
    )


def test_recordings_with_pictures_and_baselines(tmp_path):
    data = loud()
    data.setup("test")
    plan = sound(SVMs(costs=[1e-2]))
    found = evaluate(
        {"sound": plan},
        backbone=ears(),
        random_backbone=ears(),
        data=data,
        out=tmp_path,
        seed=0,
        explicit=True,
    )
    assert found.values["sound/svm/top1"] == 1.0
    details = found.details["sound/svm/top1"]
    assert details["baselines"] == {"random": 1.0, "pixels": 1.0, "supervised": "not given"}
    assert found.values["baseline/pixels/sound/svm/top1"] == 1.0
    assert found.details["baseline/pixels/sound/svm/top1"]["hyperparameters"]["features"] == 32 * 2
    assert details["n"] == 12


def test_raw_spectrograms_tell_nothing_of_level_but_of_tones():
    time = torch.arange(2000) / RATE
    audio = torch.stack(
        [a * torch.sin(2 * torch.pi * h * time) for a in (0.1, 0.5) for h in (300, 900)]
    )
    x = Pixels().hear(audio)
    assert x.shape == (4, 32 * 6)
    x = x - x.mean(1, keepdim=True)
    near = torch.cdist(x, x) + torch.eye(4) * 1e9
    assert near.argmin(1).tolist() == [2, 3, 0, 1]


def test_a_diverged_network_is_no_score(root):
    net = ears()
    with torch.no_grad():
        net.sound.network.blocks[1][0].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="did the training diverge"):
        sound().tune(subject(module(root, ESC50()), net))


def test_what_cannot_be_is_said(tmp_path, root):
    plan = sound(folds=[1, 2])
    images = Images(
        root=str(tmp_path), layout=Folder(), decode=Crops(size=8), eval_decode=Center(size=8)
    )
    assert "these are images" in plan.obstacle(images)
    assert "no sound" in plan.obstacle(loud(mute=True))
    assert "set data.eval_decode.sound" in plan.obstacle(loud(seconds=None))
    assert "no official splits [1, 2]" in plan.obstacle(loud())
    assert sound().obstacle(loud()) is None
    assert plan.obstacle(module(root, ESC50())) is None
    assert "LookListen does not listen: choose" in misfit(plan, LookListen(widths=(4, 8)))
    assert "has no maps of sound: set pool=null" in misfit(sound(pool=[2, 2]), Pixels())
    assert misfit(sound(pool=[2, 2]), ears()) is None
    data = module(root, ESC50())
    with pytest.raises(ValueError, match="'mine' cannot run: the backbone Linear does not listen"):
        refuse({"mine": sound()}, data, nn.Linear(2, 2))
    given = {"backbone": LookListen(widths=(4, 8)), "data": data, "out": tmp_path, "seed": 0}
    assert "does not listen" in evaluate({"mine": sound()}, **given).skipped["mine"]
    for make, said in (
        (lambda: sound(folds=[1, 1]), "names a split twice"),
        (lambda: sound(pool=[2]), "two positive numbers of cells"),
        (lambda: SVMs(costs=[]), "costs must list positive numbers"),
        (lambda: SVMs(steps=0), "steps must be at least 1"),
        (lambda: Softmax(lrs=[0.0]), "lrs must list positive"),
        (lambda: Softmax(epochs=0), "epochs and batch_size"),
        (lambda: Softmax(momentum=1.0), "momentum must lie in"),
    ):
        with pytest.raises(ValueError, match=said):
            make()
    held = module(root, ESC50(), val_share=0.0)
    held.selection = lambda: (torch.arange(48), torch.arange(0))
    with pytest.raises(ValueError, match="no training recordings are left"):
        sound().tune(subject(held, ears()))


def test_correspondence_trains_both_networks_of_one_backbone(compose, tmp_path):
    """`method=avc method.sound=null`: what it learns of sound can be evaluated."""
    from unlabeled.train import run

    lines = ["method=avc", "backbone=look_listen_pair", "method.sound=null", "evals=sound"]
    lines += ["method.augment.spectrogram=null", "data=scenes_audio_video", *SHORT]
    lines += ["backbone.video.widths=[8,16]", "backbone.sound.network.widths=[8]", "logger=none"]
    lines += ["backbone.sound.window=32", "backbone.sound.hop=20", "data.batch_size=16"]
    lines += ["decode.sound.seconds=0.5", "decode.sound.rate=2000", "trainer=cpu"]
    lines += ["data.eval_decode.sound=${decode.sound}", "trainer.max_epochs=1", "callbacks=none"]
    lines += ["evals.sound.decode.count=2", "data.workers=0"]
    scores = run(compose(*lines), tmp_path)
    names = ("", "baseline/random/", "baseline/pixels/")
    assert {f"{name}sound/svm/top1" for name in names} <= set(scores)
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    trained = checkpoint(str(tmp_path)).state_dict()
    assert any(name.startswith("sound.network") for name in trained)
    assert not any(name.startswith(("see", "listen")) for name in trained)
    twin = fresh(saved["backbone_config"], seed=0).state_dict()
    weights = [name for name in twin if name.endswith("weight")]
    assert all(not trained[name].equal(twin[name]) for name in weights)


def test_correspondence_says_what_hears():
    with pytest.raises(ValueError, match="sound=null needs a backbone that hears"):
        AVC(LookListen(widths=(4,)), nn.Identity(), None, sound=None)
    with pytest.raises(ValueError, match=r"method\.augment\.spectrogram=null"):
        ears().hear(torch.zeros(2, 1, 33, 20))
