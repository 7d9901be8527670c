"""Detection and segmentation on two processes against one."""

import pytest
import torch
from processes import on_processes
from test_detection import Rectangles, detection, small, subject
from test_segmentation import Painted, segmentation

from unlabeled.dist import rank

pytestmark = [pytest.mark.ddp, pytest.mark.xdist_group("ddp")]


def segmented():
    """Weights and scores after two updates, with batch norm that learns."""
    net, data = small(), Painted()
    data.known["segmentation"].apply_(lambda c: 0 if c == 255 else c)  # equally many pixels count
    found = segmentation(lr=0.01).tune(subject(net, data))
    return {"state": net.state_dict(), "scores": found.scores}


def detected():
    """A detector's weights and scores, and whether frozen batch norm stayed."""
    net = small()
    if rank():  # as if only the first process's statistics were right
        net.bn1.running_mean += 1
    start = small().state_dict()
    plan = detection(norm="frozen", steps=2, lr=1e-3)
    subject_ = subject(net, Rectangles())
    model, _ = plan._model(subject_)
    moved = [k for k, v in net.state_dict().items() if "bn" in k and not torch.equal(v, start[k])]
    other = detection(norm="train", extra_norm=True, lr=1e-3).tune(subject(small(), Rectangles()))
    return {"state": model.state_dict(), "moved": moved, "n": other.details["coco/AP"]["n"]}


def everything():
    return {"segmented": segmented(), "detected": detected()}


@pytest.fixture(scope="module")
def two():
    return on_processes(2, everything)


def test_a_segmenter_is_the_same(two):
    alone = segmented()
    for found in two:
        for name, value in alone["state"].items():
            torch.testing.assert_close(
                found["segmented"]["state"][name], value, rtol=1e-3, atol=1e-5, msg=name
            )
        assert found["segmented"]["scores"] == pytest.approx(alone["scores"], abs=1e-3)


def test_a_detector_is_one(two):
    first, second = (found["detected"] for found in two)
    assert not first["moved"]
    assert not second["moved"]
    assert all(torch.equal(first["state"][k], v) for k, v in second["state"].items())
    assert first["n"] == second["n"] == 4
