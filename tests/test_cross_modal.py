"""`cross_modal_retrieval`: recall by hand, ties, what stands beside, the sheet."""

import numpy as np
import pytest
import torch
from torch import nn

from unlabeled.evaluate.cross_modal import CrossModalRetrieval, recall
from unlabeled.evaluate.suite import evaluate, obstacle
from unlabeled.report import html

COUNT, CLASSES = 30, 3


class Decode:
    def __init__(self, *gives):
        self.gives = frozenset(gives)


class Recorded:
    """Clips of one colour and a sound that is as loud, or of another recording."""

    def __init__(self, *, gives=("crops", "audio"), turned=0, labelled=True):
        self.eval_decode, self.turned, self.labelled = Decode(*gives), turned, labelled
        self.classes = [str(i) for i in range(CLASSES)] if labelled else []
        self.level = torch.arange(COUNT)

    def has(self, split):
        return True

    def size(self, split):
        return COUNT

    def labels(self, split):
        return self.level % CLASSES if self.labelled else None

    def split_hash(self):
        return "x"

    def cut(self, split, parts, decode, *key):
        for positions in parts:
            at = torch.tensor(positions)
            clips = (self.level[at] * 8).to(torch.uint8).view(-1, 1, 1, 1, 1)
            sound = ((at + self.turned) % COUNT).float()
            yield {
                "crops": [clips.expand(-1, 2, 3, 4, 4).clone()],
                "audio": sound[:, None].expand(-1, 9) * 8 / 255,
                "index": at,
            }


class Ear(nn.Module):
    """Places both on a circle, by how bright and how loud they are."""

    def __init__(self, *, deaf=False):
        super().__init__()
        self.dim, self.deaf, self.gain = 2, deaf, nn.Parameter(torch.ones(1))

    def on_circle(self, level):
        angle = level * 255 / 8 / COUNT * 2 * torch.pi
        return torch.stack([angle.cos(), angle.sin()], 1) * self.gain

    def forward(self, x):
        from unlabeled.batch import denormalize

        return self.on_circle(denormalize(x).mean((1, 2, 3, 4)))

    def hear(self, audio):
        return self.on_circle(audio.mean(1) * (0 if self.deaf else 1))

    def embed(self, seen, heard):
        return seen, heard


def scored(data, net=None, out=None, **settings):
    evals = {"cross": CrossModalRetrieval(**settings)}
    given = {"data": data, "out": out, "seed": 0, "explicit": True}
    return evaluate(evals, backbone=net or Ear(), **given).values


def test_recall_is_that_of_a_loop():
    s = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    for k in (1, 3, 20):
        expected = [float(sum(bool(s[i, j] > s[i, i]) for j in range(20)) < k) for i in range(20)]
        assert recall(s, k).tolist() == expected


def test_ties_count_by_chance():
    s = torch.ones(6, 6)
    assert recall(s, 1).tolist() == pytest.approx([1 / 6] * 6)
    assert recall(s, 4).tolist() == pytest.approx([4 / 6] * 6)
    s[0, 1], s[1, 1] = 2.0, 2.0  # one is nearer than the first's own; the second's own is alone
    assert recall(s, 2)[:2].tolist() == pytest.approx([1 / 5, 1.0])


def test_what_belongs_together_is_found(tmp_path):
    scores = scored(Recorded(), out=tmp_path)
    for way in ("video_to_sound", "sound_to_video"):
        assert scores[f"cross/{way}/recall@1"] == 1.0
        assert scores[f"cross/{way}/class@1"] == 1.0
    assert scores["cross/chance/recall@5"] == pytest.approx(5 / COUNT)
    assert scores["cross/chance/class@1"] == pytest.approx(1 / 3)
    turned = scored(Recorded(turned=3), out=tmp_path)
    assert turned["cross/video_to_sound/recall@1"] == 0.0
    assert turned["cross/video_to_sound/recall@5"] == 0.0
    assert turned["cross/video_to_sound/recall@10"] == 1.0  # 3 on either side are as near or nearer
    assert turned["cross/video_to_sound/class@1"] == 1.0


def test_who_hears_nothing_has_what_chance_has(tmp_path):
    scores = scored(Recorded(), Ear(deaf=True), tmp_path)
    for k in (1, 5, 10):
        assert scores[f"cross/video_to_sound/recall@{k}"] == pytest.approx(k / COUNT)


def test_baseline_and_sheet_stand_beside(tmp_path):
    evals = {"cross": CrossModalRetrieval(queries=4)}
    options = {"data": Recorded(), "out": tmp_path, "seed": 0}
    scores = evaluate(evals, backbone=Ear(), random_backbone=Ear(deaf=True), **options)
    details = scores.details["cross/video_to_sound/recall@1"]
    assert details["baselines"]["random"] == pytest.approx(1 / COUNT)
    assert details["chance"] == pytest.approx(1 / COUNT)
    assert details["ci95"] == [1.0, 1.0]
    sheet = scores.figures["cross/video_to_sound"]
    assert sheet["kind"] == "neighbours"
    assert sheet["queries"].shape == (4, 4, 4, 3)
    assert np.array_equal(sheet["queries"], sheet["neighbours"][:, 0])
    scores.write(tmp_path)
    assert "From each clip to the nearest sounds" in html.write(tmp_path).read_text()


def test_unlabelled_recordings_have_recall_alone(tmp_path):
    scores = scored(Recorded(labelled=False), out=tmp_path, limit=12)
    assert not [name for name in scores if "class@1" in name]
    assert scores["cross/chance/recall@1"] == pytest.approx(1 / 12)


def test_without_classes_a_sheet_marks_the_recording_itself(tmp_path):
    evals = {"cross": CrossModalRetrieval()}
    options = {"data": Recorded(labelled=False), "out": tmp_path, "seed": 0}
    sheet = evaluate(evals, backbone=Ear(), **options).figures["cross/video_to_sound"]
    same = (sheet["neighbours"] == sheet["queries"][:, None]).all((2, 3, 4))
    marked = sheet["neighbour_labels"] == sheet["query_labels"][:, None]
    assert np.array_equal(same, marked)
    assert marked.sum(1).tolist() == [1] * 8
    level = sheet["queries"][:, 0, 0, 0] // 8
    names = sheet["classes"][sheet["query_labels"]]
    assert names.tolist() == [f"recording {i}" for i in level]


def test_what_cannot_be_is_refused(tmp_path):
    for bad in ({"k": []}, {"k": [0]}, {"limit": 1}, {"queries": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            CrossModalRetrieval(**bad)
    assert "eval_decode.sound" in obstacle(CrossModalRetrieval(), Recorded(gives=("crops",)))
    with pytest.raises(ValueError, match="backbone=audio_video"):
        scored(Recorded(), nn.Identity(), tmp_path)
