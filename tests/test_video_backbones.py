"""Networks of clips, and of clips and their sound."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CONF
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torchvision.models.video import r2plus1d_18

from unlabeled.backbones import load
from unlabeled.backbones.audio_video import AudioVideo, Hearing
from unlabeled.backbones.look_listen import LookListen
from unlabeled.backbones.r2plus1d import R2Plus1D, Shortcut, Spatial, Temporal
from unlabeled.evaluate.contract import FINAL, Request
from unlabeled.evaluate.forward import features_of, shapes_of
from unlabeled.evaluate.pixels import Pixels
from unlabeled.spectrogram import LogSpectrogram


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


def tiny(**changes):
    return R2Plus1D(**{"depth": 10, "width": 4, "stem": "small", **changes})


def test_r2plus1d_18_is_torchvisions():
    theirs, ours = r2plus1d_18().eval(), R2Plus1D().eval()
    for name, x in theirs.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            x.uniform_(0.5, 1.5)
    theirs.fc = nn.Identity()
    state = theirs.state_dict()
    assert list(state) == list(ours.state_dict())
    ours.load_state_dict({k: state[k].reshape(v.shape) for k, v in ours.state_dict().items()})
    x = torch.randn(2, 5, 3, 24, 32)  # odd: the last frame has no partner
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)))


@pytest.mark.parametrize(("kernel", "frames"), [(3, 1), (7, 3)])
def test_convolutions_of_space_are_three_dimensional_ones(kernel, frames):
    layer = Spatial(3, 4, kernel, stride=2, frames=frames)
    whole = layer.weight.view(4, frames, 3, kernel, kernel).transpose(1, 2)
    x = torch.randn(2, 3, 5, 9, 8)
    padding = (frames // 2, kernel // 2, kernel // 2)
    torch.testing.assert_close(layer(x), F.conv3d(x, whole, None, (1, 2, 2), padding))


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_time_are_three_dimensional_ones(stride):
    x = torch.randn(2, 3, 5, 4, 6)
    layer = Temporal(3, 4, stride=stride)
    expected = F.conv3d(x, layer.weight[..., None], None, (stride, 1, 1), (1, 0, 0))
    torch.testing.assert_close(layer(x), expected)
    layer = Shortcut(3, 4, stride=stride)
    torch.testing.assert_close(layer(x), F.conv3d(x, layer.weight[..., None], None, stride))


@pytest.mark.parametrize(("stem", "sides"), [("small", (16, 16)), ("joint", (16, 8))])
def test_stages_are_means_over_time(stem, sides):
    net = tiny(stem=stem).eval()
    x = torch.randn(2, 4, 3, 32, 32)
    first, second = sides
    sizes = [first, second, second // 2, second // 4, second // 8]
    clips = net.clips(x)
    assert [tuple(c.shape) for c in clips.values()] == [
        (2, c, t, s, s) for c, t, s in zip((4, 4, 8, 16, 32), (4, 4, 2, 1, 1), sizes, strict=True)
    ]
    for name, found in net.stages(x).items():
        torch.testing.assert_close(found, clips[name].mean(2))
    torch.testing.assert_close(net(x), net.stages(x)["res5"].mean((2, 3)))
    most = tiny(stem=stem, pool="max").eval()
    most.load_state_dict(net.state_dict())
    torch.testing.assert_close(most(x), clips["res5"].amax((2, 3, 4)))


def test_a_picture_is_a_clip_of_one_frame():
    net = tiny().eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), net(x[:, None]))


def test_order_in_time_is_seen():
    net = tiny().eval()
    x = torch.randn(2, 4, 3, 32, 32)
    assert not torch.allclose(net(x), net(x.flip(1)), atol=1e-4)


def test_group_norm_is_over_whole_clips():
    net = tiny(norm="group", pool="max").eval()
    x = torch.randn(2, 4, 3, 32, 32)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))
    stem = net.stem[:2]  # a convolution and its norm
    found, maps = stem(x.transpose(1, 2)), net.stem[0](x.transpose(1, 2))
    torch.testing.assert_close(
        found, net.stem[1](maps.flatten(2).unsqueeze(3))[..., 0].view_as(found)
    )


def test_clips_stay_channels_last_and_bf16_reaches_the_features():
    net = tiny(width=16).eval().to(memory_format=torch.channels_last)
    x = torch.randn(6, 3, 16, 16).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 3))
    for clip in net.clips(x).values():
        assert clip.is_contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x).float()
    assert F.cosine_similarity(half, net(x)).min() > 0.98


def test_wrong_settings_are_named():
    for bad in (
        {"depth": 12},
        {"width": 1},
        {"stem": "big"},
        {"pool": "sum"},
        {"middle": "none"},
        {"stem_stride": 3},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            R2Plus1D(**bad)
    with pytest.raises(ValueError, match="down"):
        LookListen(down="up")
    with pytest.raises(ValueError, match="norm"):
        both(norm="group")
    with pytest.raises(ValueError, match="hidden"):
        both(hidden=[0])


def test_avids_network_of_sound_halves_by_strides():
    net = LookListen(channels=1, stem=True, down="stride")
    maps = net.stages(torch.zeros(1, 1, 257, 198))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [
        *((64, 129, 99), (64, 65, 50), (128, 33, 25), (256, 17, 13), (512, 17, 13))
    ]
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 9
    with pytest.raises(ValueError, match="4 blocks need 16 rows"):
        net(torch.zeros(1, 1, 15, 99))


def both(**changes):
    sound = LookListen(channels=1, widths=[4, 6])
    return AudioVideo(tiny(), Hearing(sound, window=32, hop=16), **{"space": 5, **changes})


def test_both_networks_meet_in_one_space():
    net = both(hidden=[7]).eval()
    clips, audio = torch.randn(2, 4, 3, 16, 16), torch.randn(2, 400)
    h, g = net(clips), net.hear(audio)
    assert torch.equal(h, net.video(clips))
    assert torch.equal(g, net.sound.network(LogSpectrogram(window=32, hop=16, scale=1.0)(audio)))
    v, a = net.embed(h, g)
    assert v.shape == a.shape == (2, 5)
    torch.testing.assert_close(v, net.see[2](net.see[0](h).relu()))
    torch.testing.assert_close(a, net.listen[2](net.listen[0](g).relu()))
    with_norm = both(hidden=[7], norm="batch")
    v, _ = with_norm.embed(torch.randn(64, 32), torch.randn(64, 6))
    torch.testing.assert_close(v.mean(0), torch.zeros(5), atol=1e-5, rtol=0)


def test_a_checkpoint_knows_both(tmp_path):
    net = both(hidden=[7], norm="batch").eval()
    state = {f"backbone.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": state, "backbone_config": net.config}, tmp_path / "x.ckpt")
    again = load.checkpoint(str(tmp_path / "x.ckpt")).eval()
    clips, audio = torch.randn(2, 4, 3, 16, 16), torch.randn(2, 400)
    for a, b in zip(
        net.embed(net(clips), net.hear(audio)), _embedded(again, clips, audio), strict=True
    ):
        assert torch.equal(a, b)


def _embedded(net, clips, audio):
    return net.embed(net(clips), net.hear(audio))


def test_the_yaml_is_avids(compose):
    node = OmegaConf.to_container(compose("backbone=audio_video").backbone)
    with torch.device("meta"):
        net = instantiate(node)
    assert net.dim == net.sound.dim == 512
    assert net.config == node
    assert [m.out_features for m in net.see if isinstance(m, nn.Linear)] == [512, 512, 128]
    assert net.video.stem[0].weight.shape == (64, 9, 7, 7)
    assert net.video.layer1[0].conv1[0][0].out_channels == 64  # not the 144 of matched sizes
    assert instantiate(OmegaConf.load(CONF / "backbone/r2plus1d_tiny.yaml")).dim == 64


class Heard:
    """Data with clips and sound."""

    def scan(self, split, start=0, stop=None, batch_size=256):
        crops = torch.full((1, 2, 3, 16, 16), 9, dtype=torch.uint8)
        yield {"crops": [crops], "audio": torch.randn(1, 400), "index": torch.arange(1)}


def test_what_is_heard_is_a_stage():
    net = both().eval()
    shapes = shapes_of(net, Heard(), "cpu")
    assert list(shapes.maps) == ["sound", "conv1", "res2", "res3", "res4", "res5"]
    assert shapes.maps["sound"] == (6, 1, 1)
    assert shapes.pooled  # the mean over res5 is what forward gives, whatever is heard
    assert shapes.resolve(FINAL) == Request("res5")
    crops = torch.randint(0, 256, (3, 2, 3, 16, 16)).to(torch.uint8)
    batch = {"crops": [crops], "audio": torch.randn(3, 400)}
    asked = [FINAL, shapes.named("sound"), Request("res2")]
    found = features_of(net, batch, asked, "cpu")
    torch.testing.assert_close(found[Request("sound")].flatten(1), net.hear(batch["audio"]))
    assert found[FINAL].shape == (3, 32, 1, 1)
    only = features_of(net, batch, [Request("sound")], "cpu")
    assert torch.equal(only[Request("sound")], found[Request("sound")])
    deaf = shapes_of(tiny().eval(), Heard(), "cpu")
    with pytest.raises(ValueError, match="no stage 'sound'"):
        deaf.named("sound")


def test_raw_pixels_of_clips_are_those_of_their_pictures():
    x = torch.randn(2, 3, 3, 40, 36)
    found = Pixels()(x)
    assert found.shape == (2, 3 * 3 * 32 * 32)
    pictures = Pixels()(x.flatten(0, 1)).view(2, -1)
    torch.testing.assert_close(found, pictures)
