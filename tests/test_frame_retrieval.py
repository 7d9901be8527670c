"""Neighbours of frames: none of the same recording, and what they share."""

import pytest
import torch
from torch import nn

from unlabeled.data.clip_decode import Evenly
from unlabeled.data.clips import Recordings
from unlabeled.data.scenes_video import ScenesVideo
from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.frame_retrieval import FrameRetrieval


class Grid(nn.Module):
    """Sixteen numbers of a picture."""

    dim = 48

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    cut = Evenly(size=16, frames=4, rate=8.0)
    made = Recordings(
        root=str(tmp_path_factory.mktemp("scenes")),
        layout=ScenesVideo(size=16, train=8, test=30),
        decode=cut,
        eval_decode=Evenly(size=16),
        batch_size=4,
        workers=0,
    )
    made.setup()
    return made


def evaluation(**options):
    return FrameRetrieval(decode=Evenly(size=16, frames=4, rate=8.0), k=(1, 3), **options)


def result(data, **options):
    subject = Subject(Grid(), data, 0, torch.device("cpu"), lambda *_: None)
    return evaluation(**options).tune(subject)


def test_scores_are_those_of_loops_over_frames(data):
    found = result(data)
    clips = [data._read().split("test").recording(i) for i in range(30)]
    cut = Evenly(size=16, frames=4, rate=8.0)
    made = [cut(x, "plain", i) for i, x in enumerate(clips)]
    pixels = torch.cat([x["crops"][0] for x in made]).float() / 255
    pixels = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    z = nn.functional.normalize(Grid()(pixels), dim=1)
    ways = data.annotation("test", "motion").stacked()
    boxes = data.annotation("test", "tracks").several(range(30))
    labels = data.labels("test")
    at = [x["frames"].tolist() for x in made]
    total = {name: [] for name in ("class", "motion", "distance")}
    for q in range(120):
        order = (z @ z[q]).argsort(descending=True).tolist()
        near = [j for j in order if j // 4 != q // 4][:3]
        for j in near:
            a, b = q // 4, j // 4
            total["class"].append(float(labels[a] == labels[b]))
            total["motion"].append(float(ways[a] == ways[b]))
            one, two = boxes[a][0, at[a][q % 4]], boxes[b][0, at[b][j % 4]]
            middles = (one[:2] + one[2:] - two[:2] - two[2:]) / 2 / 16
            total["distance"].append(float(middles.norm()))
    for name, values in total.items():
        assert found.scores[f"{name}@3"] == pytest.approx(sum(values) / len(values), abs=1e-6)
        assert found.per_image[f"{name}@3"].shape == (30,)
        assert found.per_image[f"{name}@3"].mean().item() == found.scores[f"{name}@3"]
    assert found.details["distance@1"]["better"] == "lower"
    assert "better" not in found.details["class@1"]
    sheet = found.figures["frames"]
    assert sheet["queries"].shape == (8, 16, 16, 3)
    assert sheet["neighbours"].shape == (8, 8, 16, 16, 3)


def test_features_of_the_place_find_the_place(data):
    """One that sees two pixels of a corner finds the solid anywhere."""

    class Constant(nn.Module):
        dim = 2

        def forward(self, x):
            return x.new_ones(len(x), 2) + 1e-3 * x.flatten(1)[:, :2]

    subject = Subject(Constant(), data, 0, torch.device("cpu"), lambda *_: None)
    far = evaluation().tune(subject).scores["distance@3"]
    assert result(data).scores["distance@3"] != far
    assert 0.2 < far < 0.8


def test_a_supervised_run_stands_beside_what_was_trained_once(data, source):
    made = evaluation(supervised=str(source))
    subject = Subject(Grid(), data, 0, torch.device("cpu"), lambda *_: None)
    first, second = made.tune(subject), made.tune(subject)
    assert {"class@1", "supervised/class@1"} <= set(first.scores)
    assert set(first.figures) == {"frames", "supervised_frames"}
    assert set(second.figures) == {"frames"}
    assert first.scores["class@1"] == second.scores["class@1"]


def test_images_and_few_recordings_are_no_data_for_it(data, compose):
    from hydra.utils import instantiate

    images = instantiate(compose("data=fashion_mnist_mini").data)
    assert "data are images" in evaluation().obstacle(images)
    assert evaluation().obstacle(data) is None
    with pytest.raises(ValueError, match="k must list"):
        FrameRetrieval(decode=Evenly(size=8), k=())
    with pytest.raises(ValueError, match="limit must be"):
        evaluation(limit=2)
