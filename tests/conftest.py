"""Tiny runs of everything: composed from the real config tree, on the embedded images."""

import os
from pathlib import Path

import pytest
import torch
from track_file import with_tracks

torch.set_num_threads(1)  # tensors are tiny, and tests run side by side
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so do children, whose sums must round alike
os.environ.setdefault("WANDB_MODE", "disabled")
ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
METHODS = sorted(p.stem for p in (CONF / "method").glob("*.yaml") if p.stem != "none")

# Methods that predict labels or pixels, and compare no embeddings. Every other one must show
# callbacks its embeddings, `watch(embeddings=...)`, and must not collapse.
PRETEXT = {
    "avc",
    *("clusterfit", "colorization", "deepcluster", "demo", "denoising_autoencoder", "distillation"),
    "diverse_colorization",
    *("inpainting", "inpainting_adversarial", "jigsaw", "mae", "multitask", "relative_position"),
    *("odd_one_out", "rotation", "shuffle_and_learn", "supervised", "videomae"),
}
# They learn from recordings, of experiment/scenes: which set of them.
RECORDINGS = {
    "avc": "scenes_audio_video",
    **dict.fromkeys(("avid", "avid_cma"), "scenes_audio_video"),
    **dict.fromkeys(
        ["cpc_video", "odd_one_out", "shuffle_and_learn", "tracking", "videomae"], "scenes_video"
    ),
}
MANUAL = {"inpainting_adversarial"}  # they step by themselves, and Lightning clips nothing there

SHORT = ["data.layout.size=16", "data.layout.train=64", "data.layout.test=16"]  # those recordings

# What makes any method small enough for a test: its small-image settings where it has them.
SMALL = [
    "data=fashion_mnist_mini",
    "data.limit=64",
    "data.batch_size=16",
    "backbone=resnet18_tiny",
    "backbone.width=16",
    "trainer=cpu",
    "trainer.max_epochs=2",
    "callbacks=none",
    "evals=none",
]
LISTENING = [
    *("decode.sound.seconds=0.5", "decode.sound.rate=2000"),
    *("method.augment.spectrogram.window=32", "method.augment.spectrogram.hop=20"),
]
SEEING_AND_LISTENING = [
    *("backbone=audio_video", "backbone@backbone.video=r2plus1d_tiny", "backbone.video.width=4"),
    *("backbone.hidden=[8]", "backbone.space=8", "decode=clip_sound", "decode.frames=2"),
    *("backbone.sound.network.widths=[8,16]", "backbone.sound.window=32", "backbone.sound.hop=20"),
    *("decode.sound.seconds=0.5", "decode.sound.rate=2000", "method.negatives=24"),
    *("data.eval_decode.frames=2", "data.eval_decode.sound=${decode.sound}"),
]
AGREEING = ["method.agreement.positives=4", "method.agreement.alone=1"]
AGREEING += ["method.agreement.negatives=8", "method.agreement.every_n_epochs=1"]
AVE_NET = [  # its settings are those of an experiment, not of a method
    *("backbone.video.widths=[4,8]", "backbone.sound.network.widths=[4,8]", "backbone.space=8"),
    *("backbone.sound.window=32", "backbone.sound.hop=20", "data.eval_decode.size=16"),
    *("decode.sound.seconds=0.25", "decode.sound.rate=2000"),
]
SMALL_STEM = ["backbone.stem=small", "backbone.stem_stride=2"]  # leaves more than one place
OWN = {
    "avid": SEEING_AND_LISTENING,
    "avid_cma": [*SEEING_AND_LISTENING, *AGREEING],
    "avc": [
        *LISTENING,
        "backbone=look_listen",
        "backbone.widths=[8,16]",
        "method.sound.widths=[8]",
    ],
    "colorization": ["method.grey=null"],  # the images have no colours
    "moco": ["method.queue=40", "backbone.bn_splits=2"],
    "moco_v2": ["method.queue=40", "backbone.bn_splits=2"],
    "mae": ["backbone=vit_tiny_small_image"],
    "multitask": ["method.tasks.colorization.grey=null"],
    "tracking": [*SMALL_STEM, "data.tracks=TRACKS", "method.dim=16", "method.negatives=3"],
    "cpc_video": [
        *(*SMALL_STEM, "method.widths=[16]", "method.dim=12", "decode.frames=5", "method.chunk=7"),
    ],
    "odd_one_out": SMALL_STEM,
    "shuffle_and_learn": [*SMALL_STEM, "method.widths=[16]"],
    "videomae": [
        "backbone=video_transformer_tiny",
        "backbone.dim=24",
        "backbone.patch=4",
        "decode.frames=4",
    ],
    "npid": ["method.negatives=24"],
    "pirl": ["method.negatives=24"],
    "pirl_jigsaw_rotation": ["method.negatives=24"],
    "pirl_mlp": ["method.negatives=24"],
    "pirl_rotation": ["method.negatives=24"],
    "simsiam": ["method.dim=32", "method.bottleneck=8"],
    "seer": ["method.prototypes=12"],
    "swav": ["method.queue=16", "method.prototypes=12"],
    "clusterfit": ["method.clusters=5"],
    "deepcluster": ["method.clusters=5", "method.every_n_epochs=1"],
    "deepcluster_v2": ["method.prototypes=12"],
    "demo": ["method.clusters=5"],
    "dino": ["method.outputs=12", "method.hidden=16", "method.bottleneck=8"],
    "jigsaw": ["method.augment.permutations=10"],
    "denoising_autoencoder": ["method.decoder.widths=[16, 8, 8]"],
    "inpainting": ["method.decoder.widths=[16, 8, 8]"],
    "inpainting_adversarial": [
        *("augment@method.augment=inpainting_centre", "method.augment.overlap=2"),
        *("method.predicts=hole", "method.augment.cell=0.13"),
        *("method.decoder.widths=[16, 8]", "method.decoder.units=16"),
        *("method.discriminator.side=14", "method.discriminator.width=8"),
    ],
}


def small(method: str) -> list[str]:
    """Overrides of a tiny run of a method."""
    own = OWN.get(method, [])
    if method in RECORDINGS:
        other = any(line.startswith("backbone=") for line in own)
        without = ("data=", "data.limit", *(("backbone",) if other else ()))
        rest = [x for x in SMALL if not x.startswith(without)]
        return with_tracks([f"experiment=scenes/{method}", *rest, *SHORT, *own])
    has = (CONF / f"experiment/cifar10/{method}.yaml").exists()
    chosen = [f"experiment=cifar10/{method}"] if has else [f"method={method}"]
    other = any(line.startswith("backbone=") for line in own)
    return [*chosen, *(x for x in SMALL if not (other and x.startswith("backbone"))), *own]


@pytest.fixture(scope="session")
def compose():
    """A function: overrides -> config, as the command line composes it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    def composed(*overrides: str):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra_compose("train", overrides=list(overrides))

    return composed


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A checkpoint of a tiny network, for methods that start from one."""
    from unlabeled.backbones.resnet import ResNet

    config = {"_target_": "unlabeled.backbones.resnet.ResNet", "depth": 18, "width": 4}
    config["stem"] = "small"
    torch.manual_seed(5)
    net = ResNet(depth=18, width=4, stem="small")
    path = tmp_path_factory.mktemp("source") / "last.ckpt"
    state = {f"backbone.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": state, "backbone_config": config}, path)
    return path


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A checkpoint of a tiny supervised run, with its classifier of ten classes."""
    from unlabeled.backbones.resnet import ResNet

    torch.manual_seed(6)
    net, head = ResNet(depth=18, width=4, stem="small"), torch.nn.Linear(32, 10)
    path = tmp_path_factory.mktemp("teacher") / "last.ckpt"
    state = {f"backbone.{k}": v for k, v in net.state_dict().items()}
    state |= {f"head.{k}": v for k, v in head.state_dict().items()}
    torch.save({"state_dict": state, "backbone_config": net.config}, path)
    return path


@pytest.fixture
def tiny(compose, source, teacher):
    """A function: method, more overrides -> (method, data, trainer), ready to fit."""
    import pytorch_lightning as pl
    from hydra.utils import instantiate

    def made(method: str, *more: str, **trainer):
        needs = {"clusterfit": [f"method.source.path={source}"]}
        needs["distillation"] = [f"method.teacher.path={teacher}"]
        own = needs.get(method, [])
        cfg = compose(*small(method), *own, *more)
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        settings = {
            "precision": "32-true",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
        }
        return (
            instantiate(cfg.method),
            instantiate(cfg.data),
            instantiate(cfg.trainer, **{**settings, **trainer}),
        )

    return made
