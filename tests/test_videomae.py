"""VideoMAE: cubes, tubes, an encoder that sees nothing masked, and the loss by loops."""

import pytest
import torch
from processes import mean, on_processes
from test_relative_position import alone, near
from torch import nn

from unlabeled.backbones.build import build
from unlabeled.backbones.resnet import ResNet
from unlabeled.backbones.video_transformer import VideoTransformer
from unlabeled.batch import denormalize
from unlabeled.dist import rank, world_size
from unlabeled.draws import Draws
from unlabeled.methods.videomae import VideoMAE
from unlabeled.parts.cubes import cubes, tubes, whole
from unlabeled.parts.masked import masked_error, standardized


def encoder():
    return VideoTransformer(patch=4, tubelet=2, dim=12, depth=2, heads=3)


def method(**options):
    torch.manual_seed(0)
    given = {"ratio": 0.5, "dim": 8, "depth": 1, "heads": 2, **options}
    return alone(VideoMAE(encoder(), nn.Identity(), None, **given).double())


def clips(rows=4, frames=6, height=8, width=12):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(rows, frames, 3, height, width, generator=g, dtype=torch.float64)
    share = rows // world_size()
    return {"views": [x[rank() * share : (rank() + 1) * share]], "index": torch.arange(share)}


def test_cubes_are_cut_by_column_row_and_time_and_put_together_again():
    (x,) = clips()["views"]
    cut = cubes(x, 4, 2)
    assert cut.shape == (4, 3 * 2 * 3, 2 * 4 * 4 * 3)
    number = 0
    for t in range(3):
        for row in range(2):
            for column in range(3):
                part = x[
                    :, 2 * t : 2 * t + 2, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4
                ]
                assert torch.equal(cut[:, number], part.permute(0, 1, 3, 4, 2).flatten(1))
                number += 1
    assert torch.equal(whole(cut, 4, 2, 2, 3), x)
    for wrong in ((4, 4), (5, 2)):
        with pytest.raises(ValueError, match="do not fill a clip"):
            cubes(x, *wrong)


def test_a_tube_is_masked_at_all_times_and_each_clip_has_its_own():
    order = tubes(Draws(0, rows=500), 3, 10, 9)
    assert torch.equal(order.sort(1).values, torch.arange(30).expand(500, -1))
    kept = order[:, :3]
    assert (kept % 10 == kept[:, :1] % 10).all()
    assert kept.div(10, rounding_mode="floor").sort(1).values.tolist() == [[0, 1, 2]] * 500
    share = (kept[:, 0] % 10).bincount(minlength=10) / 500
    assert (share - 0.1).abs().max() < 0.05
    several = tubes(Draws(1, rows=50), 2, 6, 2)[:, :8] % 6
    assert all(len(set(row[:4])) == 4 and set(row[:4]) == set(row[4:]) for row in several.tolist())


def test_the_loss_is_its_formula():
    made, batch = method(), clips()
    pixels, predicted, mask, _ = made.fill_in(batch)
    assert mask.sum(1).tolist() == [3 * 3] * 4  # round(0.5 * 6) places at 3 times
    assert torch.equal(mask.view(4, 3, 6), mask.view(4, 3, 6)[:, :1].expand(-1, 3, -1))
    terms = []
    for i, j in mask.nonzero().tolist():
        x = pixels[i, j]
        m = sum(x.tolist()) / len(x)
        v = sum((a - m) ** 2 for a in x.tolist()) / len(x)
        y = [(a - m) / (v + 1e-6) ** 0.5 for a in x.tolist()]
        terms.append(
            sum((a - b) ** 2 for a, b in zip(predicted[i, j].tolist(), y, strict=True)) / len(x)
        )
    assert made.loss(batch)["reconstruction"].item() == pytest.approx(sum(terms) / 36, rel=1e-9)


def test_predicting_the_mean_costs_one_and_visible_cubes_nothing():
    pixels, _, mask, _ = method().fill_in(clips())
    target = standardized(pixels)[0]
    assert masked_error(0 * target, target, mask).item() == pytest.approx(1.0, abs=1e-5)
    wild = torch.where(mask[..., None].bool(), target, 1e6)
    assert masked_error(wild, target, mask) == 0


def test_the_encoder_sees_nothing_that_is_masked():
    made, batch = method(), clips()
    pixels, predicted, mask, features = made.fill_in(batch)
    other = torch.where(mask[..., None].bool(), 7.0, pixels)
    (x,) = batch["views"]
    again = made.fill_in({**batch, "views": [whole(other, 4, 2, 2, 3)]})
    assert torch.equal(again[1], predicted)
    assert torch.equal(again[3], features)
    changed = made.fill_in({**batch, "views": [x + 1]})
    assert not torch.equal(changed[3], features)


def test_all_cubes_are_what_the_whole_clip_is_and_order_does_not_matter():
    net = encoder().double()
    (x,) = clips()["views"]
    order = torch.stack([torch.randperm(18) for _ in range(4)])
    features, tokens = net.visible(x, order)
    torch.testing.assert_close(features, net(x))
    assert tokens.shape == (4, 18, 12)
    maps = net.stages(x)
    assert list(maps) == ["block1", "block2", "head"]
    assert maps["block2"].shape == (4, 12, 2, 3)
    reversed_in_time = net(x.flip(1))
    assert not torch.allclose(reversed_in_time, features)


def test_a_picture_is_a_clip_that_stands_still():
    net = encoder()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net(x), net(x[:, None].expand(-1, 2, -1, -1, -1)))
    assert net(x).shape == (2, net.dim)
    twin = build(net.config)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x), net(x))


def alike():
    made = method()
    loss = made.loss(clips())["reconstruction"]
    loss.backward()
    return [mean(loss.detach()), *(mean(p.grad) for p in made.parameters())]


def test_processes_equal_one():
    one = alike()
    for found in on_processes(2, alike):
        for a, b in zip(one, found, strict=True):
            near(a, b, atol=1e-12)


def test_pictures_are_frames_with_and_without_what_was_masked():
    made, batch = method(), clips()
    columns = made.pictures(batch)
    (x,) = batch["views"]
    shown = denormalize(x).clamp(0, 1)[:, 3]
    torch.testing.assert_close(columns["clip"], shown)
    mask = made.fill_in(batch)[2].view(4, 3, 2, 3)[:, 1]
    large = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].bool()
    torch.testing.assert_close(
        columns["filled in"].masked_fill(large, 0), shown.masked_fill(large, 0)
    )
    grey = torch.tensor([0.485, 0.456, 0.406]).double().view(3, 1, 1)
    hidden = columns["masked"].where(large, grey)
    torch.testing.assert_close(hidden, grey.expand_as(hidden), atol=1e-6, rtol=0)


def test_wrong_settings_are_refused():
    for options, said in (({"ratio": 1.0}, "ratio is"), ({"heads": 3}, "not a multiple")):
        with pytest.raises(ValueError, match=said):
            method(**options)
    with pytest.raises(ValueError, match="masks 6 of 6"):
        method(ratio=0.99).loss(clips())
    with pytest.raises(ValueError, match="video_transformer"):
        VideoMAE(ResNet(depth=18, width=4, stem="small"), nn.Identity(), None)
    with pytest.raises(ValueError, match="do not fill a clip of 5"):
        encoder()(torch.zeros(1, 5, 3, 8, 8))
    for options in ({"patch": 0}, {"dim": 10, "heads": 3}):
        with pytest.raises(ValueError, match=r"at least 1|not a multiple"):
            VideoTransformer(**options)
