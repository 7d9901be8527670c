"""`localisation`: the pointing game by hand, what stands beside, and AVE-Net's embeddings."""

import pytest
import torch
from conftest import AVE_NET, SHORT
from torch import nn

from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.localisation import Localisation, covered, heat, pointed
from unlabeled.evaluate.suite import evaluate
from unlabeled.truth import Kept

COUNT, SIDE = 12, 16


class Decode:
    gives, frames = frozenset({"crops", "audio"}), None


class Marked:
    """Grey pictures with a red square, and a sound that tells red (or, turned, green)."""

    eval_decode, classes = Decode(), ()

    def __init__(self, *, turned=False):
        g = torch.Generator().manual_seed(0)
        self.corner = torch.randint(0, 3, (COUNT, 2), generator=g) * 4  # (left, top), 4 wide
        self.turned = turned

    def has(self, split):
        return True

    def size(self, split):
        return COUNT

    def labels(self, split):
        return None

    def split_hash(self):
        return "x"

    def kinds(self, split):
        return frozenset({"boxes"})

    def annotation(self, split, kind):
        corner = self.corner.float()
        return Kept([box[None] for box in torch.cat([corner, corner + 4], 1)])

    def cut(self, split, parts, decode, *key):
        for positions in parts:
            pictures = torch.full((len(positions), 3, SIDE, SIDE), 100, dtype=torch.uint8)
            for row, i in enumerate(positions):
                left, top = self.corner[i].tolist()
                pictures[row, :, top : top + 4, left : left + 4] = torch.tensor(
                    [250, 0, 0], dtype=torch.uint8
                )[:, None, None]
                pictures[row, :, 12:, 12:] = torch.tensor([0, 250, 0], dtype=torch.uint8)[
                    :, None, None
                ]
            sound = torch.zeros(len(positions), 3)
            sound[:, 1 if self.turned else 0] = 1.0
            yield {"crops": [pictures], "audio": sound, "index": torch.tensor(positions)}


class Colours(nn.Module):
    """Places are their colours, sounds directions of colour."""

    dim, space = 3, 3

    def stages(self, x):
        return {"last": nn.functional.avg_pool2d(x, 4)}

    def forward(self, x):
        return self.stages(x)["last"].amax((2, 3))

    def hear(self, audio):
        return audio

    def embed(self, v, a):
        return v - v.mean(1, keepdim=True), a - a.mean(1, keepdim=True)


def found(**options):
    data = Marked(**options)
    return Localisation().tune(Subject(Colours(), data, 0, torch.device("cpu"), lambda *_: None))


def test_what_sounds_is_found_and_what_does_not_is_not():
    right, wrong = found(), found(turned=True)
    assert right.scores["pointing"] == 1.0
    assert wrong.scores["pointing"] == 0.0  # the green corner is nobody's box
    corner = Marked().corner
    boxes = 16 / SIDE**2  # the share of a picture
    assert right.scores["chance/pointing"] == pytest.approx(boxes)
    middle = ((corner == 8).all(1)).double().mean().item()  # pixel 8 is just beyond the middle
    assert right.scores["centre/pointing"] == pytest.approx(middle)
    assert right.scores["another/pointing"] == 1.0  # every sound is of red
    assert set(right.per_image) == set(right.scores)
    (sheet,) = right.figures.values()
    assert sheet["column1"].shape == (8, SIDE, SIDE, 3)


def test_pointing_is_that_of_a_loop():
    g = torch.Generator().manual_seed(1)
    places = nn.functional.normalize(torch.randn(30, 5, 4, 6, generator=g), dim=1)
    sounds = nn.functional.normalize(torch.randn(30, 5, generator=g), dim=1)
    maps = heat(places, sounds)
    boxes = [torch.tensor([[2.0, 1.0, 9.5, 5.0], [10.0, 8.0, 14.0, 15.0]])] * 30
    inside = torch.stack([covered(each, (16, 24)) for each in boxes])
    assert inside[0].sum() == 4 * 8 + 7 * 4  # middles of pixels: 1.5 to 4.5 by 2.5 to 9.5 ...
    for i in range(30):
        s = [[float(places[i, :, y, x] @ sounds[i]) for x in range(6)] for y in range(4)]
        y, x = max(((y, x) for y in range(4) for x in range(6)), key=lambda p: s[p[0]][p[1]])
        at = (4 * x + 2.5, 4 * y + 2.5)  # the pixel of a cell's middle
        hit = any(a <= at[0] <= c and b <= at[1] <= d for a, b, c, d in boxes[i].tolist())
        assert pointed(maps[i : i + 1], inside[i : i + 1]).item() == hit
    even = pointed(torch.zeros(1, 4, 6), inside[:1]).item()
    assert even == pytest.approx(inside[0, 2::4, 2::4].double().mean().item())


def test_what_it_needs_is_said():
    evals, data = {"where": Localisation()}, Marked()
    options = {"data": data, "out": None, "seed": 0, "explicit": True}
    with pytest.raises(ValueError, match=r"method\.head=distance .*backbone\.space=128"):
        evaluate(evals, backbone=nn.Flatten(), **options)
    data.kinds = lambda split: frozenset()
    assert "no boxes" in str(Localisation().obstacle(data))
    with pytest.raises(ValueError, match="limit"):
        Localisation(limit=1)


def test_ave_net_of_the_backbone_is_that_of_the_method(compose):
    """The same weights, in the backbone or beside it, answer alike; both are found by gradients."""
    from hydra.utils import instantiate

    cfg = compose("experiment=scenes/ave_net", *AVE_NET, *SHORT)
    torch.manual_seed(0)
    made = instantiate(cfg.method)
    assert made.pair is None
    v, a = torch.randn(5, made.feature_dim), torch.randn(5, made.backbone.sound.dim)
    see, hear = made.backbone.embed(v, a)
    near = [nn.functional.normalize(x, dim=1) for x in (see, hear)]
    d = (near[0] - near[1]).norm(dim=1, keepdim=True)
    assert torch.allclose(made.logits(v, a), made.head(d), atol=1e-5)
    made.logits(v, a).sum().backward()
    assert all(p.grad is not None for p in made.backbone.see.parameters())
    fused = compose("experiment=scenes/ave_net", *AVE_NET, *SHORT, "method.head=fused")
    with pytest.raises(Exception, match=r"backbone\.space is for method\.head=distance"):
        instantiate(fused.method)
