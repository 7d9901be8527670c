"""Evaluations that look at images: several processes share the work, and find what one finds."""

import pytest
import test_action
import test_keypoints
import test_localisation
import test_normals
import test_sound
import torch
from processes import on_processes
from test_evaluate import Net
from test_invariance import ALL
from test_tuning import Labelled, augmented, finetune, subject
from torch import nn

from unlabeled.data.decode import Crops
from unlabeled.dist import rank
from unlabeled.evaluate import health, invariance, localisation, retrieval, sound
from unlabeled.evaluate.directions import Words
from unlabeled.evaluate.health import Health
from unlabeled.evaluate.invariance import Invariance
from unlabeled.evaluate.keypoints_scored import predicted
from unlabeled.evaluate.localisation import Localisation
from unlabeled.evaluate.normals_scored import score
from unlabeled.evaluate.pixels import Pixels
from unlabeled.evaluate.posed import Cutter, objects
from unlabeled.evaluate.retrieval import Retrieval
from unlabeled.evaluate.shares import share

pytestmark = [pytest.mark.ddp, pytest.mark.xdist_group("ddp")]


class Counting(Net):
    """Counts the images that it sees."""

    seen = 0

    def stages(self, x):
        self.seen += len(x)
        return super().stages(x)


class Hearing(test_localisation.Colours):
    """Counts the pictures that it sees."""

    seen = 0

    def stages(self, x):
        self.seen += len(x)
        return super().stages(x)


class Corner(nn.Module):
    """Key-points of crops: where their darkest and their brightest pixels are."""

    def forward(self, x):
        x = x.mean(1).flatten(1)
        return torch.stack([x.argmin(1), x.argmax(1)], 1)[..., None].expand(-1, -1, 2) / x.shape[1]


def looked():
    """Scores of every evaluation, and how many images the backbone saw for each."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (health, invariance, retrieval, sound):
            patch.setattr(module, "BATCH", 8)
        patch.setattr(localisation, "BATCH", 3)
        return _looked()


def _looked():
    torch.manual_seed(0)
    net, data = Counting(), Labelled(noise=40)
    plans = {
        "invariance": Invariance(transforms=ALL),
        "health": Health(decode=Crops(size=8, count=2, scale=(0.2, 1.0))),
        "retrieval": Retrieval(k=[1, 5], patches=2, queries=3),
    }
    scores, seen = {}, {}
    for name, plan in plans.items():
        net.seen = 0
        scores[name] = plan.tune(subject(net, data)).scores
        seen[name] = net.seen
    hearing = Hearing()
    pointing = Localisation().tune(subject(hearing, test_localisation.Marked()))
    scores["localisation"], seen["localisation"] = pointing.scores, hearing.seen
    two = {"lr_trunk": [0.0], "lr_head": [0.1, 0.5]}
    scores["finetune"] = finetune(**two).tune(subject(net, data)).scores
    scores["pixels"] = finetune().tune(subject(Pixels(), data)).scores
    given = augmented(norm="none", lrs=[0.01, 0.1], epochs=2)
    scores["augmented"] = given.tune(subject(net, data)).scores
    scores["action"] = test_action.action(epochs=3).tune(test_action.subject()).scores
    heard = test_sound.subject(test_sound.loud(), test_sound.ears())
    scores["sound"] = test_sound.sound().tune(heard).scores
    return {"scores": scores, "seen": seen, "normals": normals(), "places": places()}


def normals():
    data = test_normals.data(sizes=(4, 9))
    centres = test_normals.directions(5, 3, seed=7).float()

    def network(x, size):
        return [torch.cat([x, x[:, :2].flip(-1)], 1)]  # an answer of its own for every image

    known = Words(centres, centres[0], [])
    made = score(network, test_normals.subject(None, data), known, [None], 2)
    return {"values": made.values, "intervals": made.intervals, "shown": len(made.sheet)}


def places():
    data = test_keypoints.data()
    found = objects(data, "test", "box", test_keypoints.NAMES, boxed=True, least=1.0)
    cutter = Cutter(data, "box", 2.0, 24)
    return predicted(Corner(), cutter, found, test_keypoints.subject(None, data))


def everything():
    few = share(1)  # fewer items than processes
    rows = few.all(torch.full((few.stop - few.start, 2), 7.0 + rank()), "cpu")
    return {**looked(), "few": rows.tolist()}


def test_two_processes_share_what_one_does():
    found, alone = on_processes(2, everything), looked()
    for one in found:
        assert one["few"] in ([[7.0, 7.0]], [[8.0, 8.0]])
        assert one["few"] == found[0]["few"]
        for name, scores in alone["scores"].items():
            assert one["scores"][name] == pytest.approx(scores, abs=1e-4), name
        assert one["normals"]["values"] == pytest.approx(alone["normals"]["values"], abs=1e-9)
        for name, interval in alone["normals"]["intervals"].items():
            assert one["normals"]["intervals"][name] == pytest.approx(interval, abs=1e-9)
        assert one["normals"]["shown"] == 2
        torch.testing.assert_close(one["places"], alone["places"])
    for name, count in alone["seen"].items():
        most = max(one["seen"][name] for one in found)
        assert most <= 0.6 * count, name
