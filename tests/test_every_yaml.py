"""Every YAML in conf/, swapped into the smallest run: two steps on a tiny tree of files."""

import io
import json
import math
import struct
import tarfile

import numpy as np
import pytest
import torch
from conftest import AVE_NET, CONF, LISTENING, OWN, RECORDINGS, SEEING_AND_LISTENING, SHORT
from media_files import numbered, tone
from media_files import write as film
from PIL import Image
from test_audio_data import esc50, sine, wav
from test_nyuv2 import write_nyuv2
from test_poses import write_flic, write_mpii
from test_video_data import audioset, hmdb51, kinetics, tree, ucf101
from test_yfcc import write_yfcc
from track_file import with_tracks

from unlabeled.train import run

WNIDS = ("n01440764", "n02102040")
NEVER_RUN = {  # file -> why it stands in no run of its own
    "train": "the root, in every run",
    "optim/base": "what the optimizers share; it has no optimizer",
    **dict.fromkeys(
        (
            *(f"hydra/launcher/{name}" for name in ("local", "serial", "slurm")),
            "hydra/sweeper/optuna",
        ),
        "Hydra's own group: the tests of sweeps run it",
    ),
}
MOST = 50e6  # parameters of a backbone that is trained here; beyond, it is built without memory

SMALLEST = [
    "data=folder",
    "data.root=${oc.env:UNLABELED_DATA}/folder",
    "data.eval_decode.size=16",
    "data.eval_decode.resize=16",
    "data.tier=memory",
    "data.size=16",
    "data.batch_size=8",
    "data.workers=0",
    "backbone=resnet18_tiny",
    "backbone.width=16",
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.max_steps=2",
    "trainer.log_every_n_steps=1",
    "logger=none",
    "callbacks=none",
    "evals=none",
    "baselines=false",
]

# What a choice needs to work at that size.
SMALL_CROPS = {
    "multicrop": [f"decode.parts.{part}.size=16" for part in ("global", "local")],
    "pirl": ["decode.parts.image.size=16", "decode.parts.jigsaw.size=27"],
    "jigsaw": ["decode.size=27", "decode.resize=28"],
}
SMALL_CROPS["multicrop_dino"] = SMALL_CROPS["multicrop"]
SMALL_TILES = {
    "jigsaw": ["method.augment.permutations=5", "method.augment.tile=8"],
    "pirl": ["method.augment.tile=8"],
}
METHOD = {
    "barlow_twins": ["method.width=16"],
    "byol": ["method.hidden=16"],
    "demo": ["method.clusters=4"],
    "clusterfit": ["method.source.path=SOURCE", "method.clusters=4"],
    "cpc": [
        *("decode.size=16", "decode.resize=18", "method.augment.size=8", "method.augment.stride=4"),
        *("method.width=8", "method.steps=1", "method.skip=1"),
    ],
    "deepcluster": ["method.clusters=4", "method.hidden=[8]"],
    "deepcluster_v2": [*SMALL_CROPS["multicrop"], "method.prototypes=6", "method.hidden=16"],
    "dino": [
        *SMALL_CROPS["multicrop"],
        *("method.outputs=8", "method.hidden=16", "method.bottleneck=8", "method.drop_path=0"),
    ],
    "distillation": ["method.teacher.path=TEACHER"],
    "diverse_colorization": ["method.vae.size=16", "method.vae.width=8", "method.vae.dim=8"],
    "jigsaw": [*SMALL_CROPS["jigsaw"], *SMALL_TILES["jigsaw"], "method.dim=8"],
    "mae": ["backbone=vit_tiny_small_image", "method.dim=16", "method.depth=1", "method.heads=2"],
    "moco": ["method.queue=16"],
    "moco_v2": ["method.queue=16", "method.hidden=16"],
    "none": ["backbone=checkpoint", "backbone.path=SOURCE"],
    "npid": ["method.negatives=8"],
    "pirl": [*SMALL_CROPS["pirl"], *SMALL_TILES["pirl"], "method.negatives=8"],
    "pirl_rotation": ["method.negatives=8"],
    "relative_position": [
        *("decode.size=44", "decode.count=2", "method.hidden=[8]", "method.augment.cut.size=12"),
        *("method.augment.cut.gap=2", "method.augment.cut.jitter=1"),
    ],
    "seer": [*SMALL_CROPS["multicrop"], "method.prototypes=8", "method.hidden=16"],
    "simclr": ["method.hidden=16"],
    "simsiam": ["method.dim=16", "method.bottleneck=8"],
    "swav": [*SMALL_CROPS["multicrop"], "method.prototypes=8", "method.hidden=16"],
    "vicreg": ["method.width=16"],
    "denoising_autoencoder": ["method.decoder.widths=[16, 8]"],
    "inpainting": ["method.decoder.widths=[16, 8]"],
    "inpainting_adversarial": [
        *("decode.size=32", "decode.resize=32", "method.decoder.widths=[16]"),
        *("method.decoder.units=16", "method.discriminator.side=16"),
        "method.discriminator.width=8",
    ],
}
METHOD["cpc_v2"] = METHOD["cpc"]
SMALL_CROPS["multitask"] = ["decode.tasks.relative_position.size=27"]
METHOD["multitask"] = [
    *(*SMALL_CROPS["multitask"], "method.tasks.relative_position.augment.cut.size=8"),
    *("method.tasks.relative_position.hidden=[8]", "method.tasks.colorization.width=8"),
]
TASK = {  # where a task is cut and augmented otherwise than the method
    "relative_position": [
        *SMALL_CROPS["multitask"],
        "method.tasks.relative_position.augment.cut.size=8",
        "method.tasks.relative_position.hidden=[8]",
    ]
}
METHOD["pirl_mlp"] = METHOD["pirl_jigsaw_rotation"] = METHOD["pirl"]
WITH_CELLS = [*SMALL_CROPS["jigsaw"], "method.augment.cut.size=8", "method.hidden=[8]"]
OTHERWISE = {
    "relative_position_cells": ["decode=jigsaw", *WITH_CELLS]
}  # than the method's own augmentation
WITH_TILES = ["decode.size=120", "decode.resize=120", "method.augment.tile=36", "method.dim=8"]
ALEXNET = ["data.size=64", "data.eval_decode.size=64", "data.eval_decode.resize=64"]
CIFAR = {
    **METHOD,
    "deepcluster_v2": ["method.prototypes=6", "method.hidden=16"],
    "relative_position_resnet50": WITH_CELLS,
    "jigsaw_alexnet": [
        "backbone=alexnet",
        *WITH_TILES,
        "method.augment.permutations=5",
        "method.hidden=[8]",
    ],
    "rotation_alexnet": ["backbone=alexnet_bn", *ALEXNET, "backbone.hidden=[8,8]"],
    "cpc_v2_resnet161": METHOD["cpc"],
    "moco": [*METHOD["moco"], "backbone.bn_splits=2"],
    "moco_v2": [*METHOD["moco_v2"], "backbone.bn_splits=2"],
    "swav": [*METHOD["swav"], "method.queue=16"],
    "inpainting_adversarial": [
        *("decode.size=32", "method.decoder.widths=[16]", "method.decoder.units=16"),
        *("method.discriminator.side=16", "method.discriminator.width=8"),
    ],
    "cifar10/inpainting_adversarial": [
        *("decode.size=32", "method.decoder.widths=[16, 8, 8]", "method.decoder.units=16"),
        "method.discriminator.width=8",
    ],
}
BACKBONE = {
    "alexnet": ALEXNET,
    "checkpoint": ["backbone.path=SOURCE"],
    "timm": ["backbone.name=test_resnet"],
    "torchvision": ["backbone.name=resnet18"],
}
BACKBONE["alexnet_bn"] = BACKBONE["sobel_alexnet"] = BACKBONE["alexnet"]
BACKBONE["context_alexnet"] = [*ALEXNET, "backbone.model.hidden=[8]"]
BACKBONE["patchwise"] = ["backbone.size=8", "backbone.stride=8"]
BACKBONE["classifier"] = ["backbone.path=TEACHER"]
AUGMENT = {  # the method that takes it, where it is not one of two views
    "colorization": "colorization",
    **dict.fromkeys(["clusterfit", "mild_single", "none", "single", "supervised"], "supervised"),
    **{name: name for name in ("cpc", "cpc_v2", "dino", "jigsaw", "pirl", "rotation", "swav")},
    "clip": "cpc_video",
    "frame_order": "shuffle_and_learn",
    **{"odd_one_out": "odd_one_out", "track_pair": "tracking"},
    **{"picture_sound": "avc", "clip_sound": "avid"},
    "jigsaw_small": "jigsaw",
    **dict.fromkeys(
        ["relative_position", "relative_position_cells", "relative_position_small"],
        "relative_position",
    ),
    **dict.fromkeys(
        ["denoising", "denoising_masking", "denoising_salt_and_pepper"], "denoising_autoencoder"
    ),
    **{"inpainting": "inpainting", "inpainting_blocks": "inpainting"},
    "inpainting_centre": "inpainting_adversarial",
    **{name: name for name in ("npid", "pirl_mlp", "pirl_rotation")},
}
DECODE = {
    "relative_position": "relative_position",
    "relative_position_cells": "relative_position",
    "center": "supervised",
    "one": "supervised",
    "jigsaw": "jigsaw",
    "pirl": "pirl",
}
DECODE |= {"mild": "supervised", "multicrop": "swav", "two": "simclr", "npid": "npid"}
DECODE |= {"inpainting": "inpainting", "cpc": "cpc", "cpc_v2": "cpc_v2"}
DECODE |= {"multitask": "multitask", "five_frames": "shuffle_and_learn"}
DECODE |= {"picture_sound": "avc", "clip_sound": "avid"}
DECODE |= {"clip": "cpc_video", "track_pair": "tracking"}
DECODE |= {"mae": "supervised", "moco": "simclr", "seer": "seer", "multicrop_dino": "dino"}
EVAL = {  # what an evaluation needs at that size
    "all": [
        "data.layout.test_share=0.5",
        *(f"evals.{name}.epochs=1" for name in ("linear_augmented", "semisup", "finetune")),
        *(f"evals.{name}.batch_size=8" for name in ("linear_augmented", "semisup", "finetune")),
        *("evals.finetune.lr_trunk=[0.1]", "evals.finetune.lr_head=[0.1]"),
    ],
    "knn_npid": ["EVAL.k=[5]"],
    "retrieval": ["data.layout.test_share=0.5"],
    "health": ["data.layout.test_share=0.5", "EVAL.limit=20"],
    "cross_modal_retrieval": ["experiment=scenes/avid"],
    "localisation": ["experiment=scenes/ave_net"],
    "knn/sound": ["experiment=scenes/avid", "EVAL.k=[1,5]"],
    **{
        f"{group}{p.stem}": ["EVAL.epochs=1", "EVAL.batch_size=8"]
        for group in ("", "linear/", "linear_augmented/", "finetune/", "semisup/")
        for p in (CONF / f"eval/{group}").glob("*.yaml")
        if group or p.stem in ("finetune", "linear_augmented", "semisup")
    },
}
DETECTION = [
    *("EVAL.steps=1", "EVAL.batch_size=2", "EVAL.train_sides=[32]", "EVAL.test_side=32"),
    *("EVAL.longest=32", "EVAL.pre_nms=[20,10]", "EVAL.post_nms=[10,5]", "EVAL.rois=4"),
    *("EVAL.precise=0", "EVAL.resamples=5", "EVAL.anchors=[4,8,16,32,48]"),
]
SEGMENTATION = [
    *("EVAL.steps=1", "EVAL.batch_size=2", "EVAL.crop=32", "EVAL.side=32", "EVAL.holes=1"),
    "EVAL.resamples=5",
]
for task, small_task in (("detection_voc", DETECTION), ("segmentation_voc", SEGMENTATION)):
    EVAL[task] = small_task
    EVAL |= {f"{task}/{p.stem}": small_task for p in (CONF / f"eval/{task}").glob("*.yaml")}
    EVAL["all"] += [line.replace("EVAL", f"evals.{task}") for line in small_task]
VOC = ["EVAL.data.eval_decode.size=16", "EVAL.data.eval_decode.resize=16", "EVAL.jobs=1"]
for preset in ("svm_voc07", "svm_voc07/vissl", "svm_voc07/fair"):
    EVAL[preset] = VOC
for preset in ("lowshot_voc07", "lowshot_voc07/vissl"):
    EVAL[preset] = [*VOC, "EVAL.k=[1,2]"]
EVAL["lowshot"] = ["EVAL.jobs=1", "EVAL.k=[1,2]"]
for name in ("svm_voc07", "lowshot_voc07"):
    EVAL["all"] += [line.replace("EVAL", f"evals.{name}") for line in EVAL[name]]
EVAL["lowshot/places205"] = [*EVAL["lowshot"], "data.layout.test_share=0.5"]
RENDERED = ["data=scenes", "data.layout.size=16", "data.layout.train=16", "data.layout.test=8"]
FEW_STEPS = ["EVAL.steps=2", "EVAL.batch_size=4"]
EVAL["detection_voc/scenes"] = [*RENDERED, *DETECTION]
SCENES = {  # what they evaluate, at that size, while all else comes without evaluations
    "pretrain": ["evals=none"],
    "normals": [line.replace("EVAL", "evals.normals") for line in FEW_STEPS],
    "keypoints": [line.replace("EVAL", "evals.keypoints") for line in FEW_STEPS],
    "detection": [line.replace("EVAL", "evals.detection_voc_scenes") for line in DETECTION],
    "invariance": ["evals.knn.k=[1]", "evals.invariance.limit=8"],
}
EVAL |= {name: [*RENDERED, *FEW_STEPS] for name in ("normals", "keypoints")}
for preset in ("normals/nyuv2", "normals/nyuv2_depth"):
    EVAL[preset] = [*FEW_STEPS, "EVAL.sides=[32]", "EVAL.test_sides=[32, 40]"]
for preset in ("keypoints/flic", "keypoints/mpii"):
    EVAL[preset] = [*FEW_STEPS, "EVAL.side=32"]
# What a folder has nothing for.
EVAL["all"] += ["~evals.normals", "~evals.keypoints", "~evals.frame_retrieval"]
EVAL["all"] += ["~evals.cross_modal_retrieval", "~evals.action"]  # of recordings
EVAL["all"] += ["~evals.localisation"]
EVAL["all"] += ["~evals.sound", "~evals.sound_esc50"]
for preset in ("normals/nyuv2", "keypoints/flic", "keypoints/mpii"):
    key = f"evals.{preset.replace('/', '_')}"
    EVAL["all"] += [line.replace("EVAL", key) for line in EVAL[preset]]
for preset in [name for name in EVAL if name.startswith("semisup")]:
    EVAL[preset].append("EVAL.share=0.5")
FEW = ["EVAL.epochs=1", "EVAL.batch_size=4", "EVAL.test_decode.clips=2", "EVAL.lr_head=[0.1]"]
for preset in ("action", "action/linear"):
    EVAL[preset] = ["experiment=scenes/shuffle_and_learn", *FEW]
EVAL["action/clips"] = ["experiment=scenes/avid", *FEW, "EVAL.decode.frames=4"]
EVAL["action/clips"] += ["EVAL.test_decode.frames=4"]
EVAL["action/linear_clips"] = EVAL["action/clips"]
EVAL["action/avid"] = [*EVAL["action/clips"], "EVAL.folds=[]"]
TWO_SPANS = ["experiment=scenes/avid", "EVAL.decode.count=2"]
EVAL["sound"], EVAL["sound/linear"] = TWO_SPANS, [*TWO_SPANS, "EVAL.head.epochs=1"]
BRIEF = ["sound.seconds=0.25", "sound.rate=2000"]
EVAL["sound/esc50"] = [*TWO_SPANS, *(f"EVAL.decode.{line}" for line in BRIEF)]
EVAL["sound/esc50"] += ["EVAL.data.workers=0"]
MORE_THAN_SHARES = {
    "clustering",
    "health",
    "invariance",
    "normals",
}  # evaluations with scores that are no shares in [0, 1]
DATA = ["data.batch_size=4", "data.limit=8", "data.workers=0"]  # all else as the file says
HEARD = {"audio_folder", "esc50"}  # sounds without pictures: to evaluate, not to train on
HEARING = [
    *(x for x in SEEING_AND_LISTENING if x.startswith("backbone")),
    *("method=none", "evals=sound", "evals.sound.decode.count=2"),
    *(f"data.eval_decode.{line}" for line in BRIEF),
]


IMAGES_ONLY = ("data.root=", "data.tier=", "data.size=", "data.eval_decode.")
PREFIXES = (("method", ""), ("experiment", "scenes/"), ("experiment", "bunny/"))
FIVE = ["decode.tau_max=3", "decode.tau_min=1"]
RECORDED = {
    "avc": [
        *LISTENING,
        "backbone=look_listen",
        "backbone.widths=[8,16]",
        "method.sound.widths=[8]",
    ],
    "cpc_video": ["decode.frames=4", "method.dim=8"],
    "odd_one_out": ["method.augment.elements=3", "method.augment.frames=4"],
    "shuffle_and_learn": FIVE,
    **{name: OWN[name] for name in ("avid", "avid_cma")},
    "videomae": [
        *(
            "backbone=video_transformer_tiny",
            "backbone.dim=24",
            "backbone.patch=4",
            "decode.frames=4",
        ),
        *("method.dim=8", "method.depth=1", "method.heads=2"),
    ],
    "tracking": ["data.tracks=TRACKS", "method.hidden=[8]", "method.dim=8"],
}

OTHER_BACKBONE = {
    *("avc", "avid", "avid_cma"),
    "mae",
    "none",
    "jigsaw_alexnet",
    "rotation_alexnet",
    "videomae",
}  # than a ResNet, whose width can be set
PLACES = {"optim": "optim@method.optim"}


def chosen(method: str) -> list[str]:
    return [f"method={method}", *METHOD.get(method, [])]


def overrides(name: str) -> list[str]:
    """The smallest run with one file of the tree in it."""
    lines = list(SMALLEST) if name == "experiment/scenes/ave_net" else on_images(name)
    if name.rpartition("/")[2] == "frame_retrieval":
        lines = [x for x in lines if not x.startswith(("data=", *IMAGES_ONLY))]
        return [*lines, "data=scenes_video", *SHORT]
    if name == "experiment/scenes/ave_net" or name.endswith("localisation"):
        small = [x for x in lines if not x.startswith(("data=", "backbone", *IMAGES_ONLY))]
        return ["experiment=scenes/ave_net", *small, *SHORT, *AVE_NET]
    own = {f"{group}={prefix}{m}": m for m in RECORDINGS for group, prefix in PREFIXES}
    method = next((own[line] for line in lines if line in own), None)
    if method is None:
        return lines
    width = ("backbone.width",) if method in OTHER_BACKBONE else ()
    rest = [x for x in lines if not x.startswith(("data=", *IMAGES_ONLY, *width))]
    chosen_too = any(x.startswith("experiment=") for x in lines)
    data = [] if chosen_too else [f"data={RECORDINGS[method]}"]
    film = any(x.startswith("experiment=bunny/") for x in lines)
    short = [] if film else SHORT  # of rendered recordings
    return [*rest, *data, *short, *RECORDED.get(method, [])]


def on_images(name: str) -> list[str]:
    """That run where its data are images."""
    group, _, option = name.partition("/")
    if group == "experiment":
        method = option.rpartition("/")[2]
        if option.startswith("scenes/") and method not in RECORDINGS:
            size = ["decode.size=16", "data.batch_size=8", "data.workers=0", "method.width=16"]
            small = [s for s in SMALLEST if not s.startswith(("data", "backbone=", "evals"))]
            return [f"experiment={option}", *small, *RENDERED[1:], *size, *SCENES[method]]
        small = [s for s in SMALLEST if not s.startswith(("data=", "data.root="))]
        small = [s for s in small if s != "backbone.width=16" or method not in OTHER_BACKBONE]
        own = CIFAR.get(option, CIFAR.get(method, []))
        return [f"experiment={option}", *small, *own, "trainer.devices=1"]
    if group == "method":
        small = [s for s in SMALLEST if s != "backbone.width=16" or option not in OTHER_BACKBONE]
        return [*small, *chosen(option)]
    if group == "task":
        small = [s for s in SMALLEST if s != "backbone.width=16" or option not in OTHER_BACKBONE]
        own = [line for line in METHOD.get(option, []) if not line.startswith("decode.count")]
        own = [line.replace("method.", f"method.tasks.{option}.") for line in own]
        own = [line.replace("decode.", f"decode.tasks.{option}.", 1) for line in own]
        return [*small, "method=multitask", f"task@method.tasks=[{option}]", *TASK.get(option, own)]
    if group == "augment":
        method = AUGMENT.get(option, "simclr")
        small = OTHERWISE.get(option, METHOD.get(method, []))
        return [*SMALLEST, f"method={method}", f"augment@method.augment={option}", *small]
    if group == "decode":
        method = DECODE[option]
        return [*SMALLEST, *chosen(method), f"decode={option}", *SMALL_CROPS.get(option, [])]
    if group == "backbone":
        small = [s for s in SMALLEST if s != "backbone.width=16"]
        return [*small, f"backbone={option}", *BACKBONE.get(option, []), "data.batch_size=4"]
    if group == "data":
        # oneDNN crashes on 8 channels in channels_last at 224 pixels: the backbone's own width
        small = [s for s in SMALLEST if not s.startswith(("data.", "backbone.width"))]
        root = ["data.root=${oc.env:UNLABELED_DATA}/folder"] if option == "folder" else []
        passes = ("stream", "list", "yfcc100m")
        once = ["trainer.max_epochs=1"] if option in passes else []
        few = ["data.layout.train=16", "data.layout.test=8"] if "scenes" in option else []
        few += ["data.layout.count=12"] if option == "yfcc1m" else []
        root = ["data.root=${oc.env:UNLABELED_DATA}/films"] if "video_folder" in option else root
        if option in HEARD:
            small = [s for s in small if not s.startswith(("backbone", "evals"))]
            root = ["data.root=${oc.env:UNLABELED_DATA}/sounds"] if "folder" in option else []
            return [*small, f"data={option}", *DATA, *root, *HEARING]
        return [*small, f"data={option}", *DATA, *root, *once, *few]
    if group == "trainer":
        small = [s for s in SMALLEST if not s.startswith("trainer.precision")]
        norm = ["method.norm=batch"]  # PyTorch synchronises batch norm on GPUs only
        return [*small, f"trainer={option}", "trainer.devices=1", *chosen("simclr"), *norm]
    if group == "eval":
        own = [line.replace("EVAL", "evals.one") for line in EVAL.get(option, [])]
        return [*SMALLEST, f"+eval@evals.one={option}", "baselines=true", *own]
    if group == "evals":
        key = f"evals.{option.replace('/', '_')}"
        own = [line.replace("EVAL.", f"{key}.") for line in EVAL.get(option, [])]
        return [*SMALLEST, f"evals={option}", *own]
    return [*SMALLEST, f"{PLACES.get(group, group)}={option}"]


FILES = sorted(p.relative_to(CONF).with_suffix("").as_posix() for p in CONF.rglob("*.yaml"))


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A folder with a tiny data set in each layout, under the name conf/data gives it."""
    root = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0)

    def write(folder, classes, count, side=40):
        for kind in classes:
            (folder / kind).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image = pixels.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / kind / f"{i}.png")

    write(root / "folder", ["cat", "dog"], 20)
    write(root / "stream", ["a", "a/b/c", "d/e"], 8)
    write(root / "list", ["x"], 8)
    (root / "list/train.txt").write_text("".join(f"x/{i}.png\n" for i in range(8)))
    for name, test, classes in (
        ("imagenet", "val", WNIDS),
        ("imagenette", "val", WNIDS),
        ("cifar10", "test", ("cat", "dog")),
        ("cifar100", "test", ("cat", "dog")),
    ):
        side = 32 if name.startswith("cifar") else 40
        write(root / name / "train", classes, 8, side)
        write(root / name / test, classes, 4, side)
    for name in ("imagenet22k", "imagenet9k"):
        write(root / name, WNIDS, 6)
    (root / "imagenet9k/wnids.txt").write_text("\n".join(WNIDS))
    official(root, pixels, write)
    archived(root)
    write_yfcc(root / "yfcc100m", 16)
    filmed(root)
    (root / "fashion_mnist").mkdir()
    for side, count in (("train", 16), ("t10k", 8)):
        images = pixels.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
            (root / f"fashion_mnist/{side}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return root


def archived(root):
    """Shards of the images of a folder, with the number of their class."""
    for side, images in (("train", range(16)), ("val", range(16, 20))):
        (root / f"shards/{side}").mkdir(parents=True)
        with tarfile.open(root / f"shards/{side}/00000.tar", "w") as archive:
            for i in images:
                for k, kind in enumerate(("cat", "dog")):
                    archive.add(root / f"folder/{kind}/{i}.png", f"{kind}{i}.png")
                    label = tarfile.TarInfo(f"{kind}{i}.cls")
                    label.size = 1
                    archive.addfile(label, io.BytesIO(str(k).encode()))


def filmed(root):
    """A clip of two seconds, wherever sets of recordings have theirs."""
    clip = film(root / "clip.mp4", numbered(20), tracks=[tone(2, 440)]).read_bytes()
    tree(root / "films", clip, {"train": 4, "val": 2})
    tree(root / "bunny", clip, {"train": 8, "test": 2}, kinds=[""])
    ucf101(root / "ucf101", clip)
    hmdb51(root / "hmdb51", clip, fold=1)
    kinetics(root / "kinetics", clip)
    audioset(root / "audioset", clip, count=8)
    esc50(root / "esc50")
    for i in range(16):
        wav(
            root / f"sounds/{('train', 'test')[i // 12]}/{i % 2}/{i}.wav", sine(200 + 200 * (i % 2))
        )


def official(root, pixels, write):
    """The layouts that are lists of images or binary files."""
    write(root / "places205/images256/a", ["bar", "abbey"], 8)
    lists = root / "places205/trainvalsplit_places205"
    lists.mkdir()
    for side in ("train", "val"):
        lines = [
            f"a/{name}/{i}.png {k}" for k, name in enumerate(["abbey", "bar"]) for i in range(8)
        ]
        (lists / f"{side}_places205.csv").write_text("\n".join(lines))
    write(root / "inaturalist18/train_val2018", ["a", "b"], 8)
    images = [
        {"id": i, "file_name": f"train_val2018/{'ab'[i % 2]}/{i // 2}.png"} for i in range(16)
    ]
    content = {
        "images": images,
        "annotations": [{"image_id": i, "category_id": i % 2} for i in range(16)],
        "categories": [{"id": i, "name": f"kind {i}"} for i in range(2)],
    }
    for side in ("train", "val"):
        (root / f"inaturalist18/{side}2018.json").write_text(json.dumps(content))
    write_nyuv2(root / "nyuv2", (8, 3), normals="packed")
    write_flic(root / "flic", (8, 4))
    write_mpii(root / "mpii", 12)
    stl = root / "stl10/stl10_binary"
    stl.mkdir(parents=True)
    for side, count in (("unlabeled", 10), ("train", 10), ("test", 4)):
        pixels.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(stl / f"{side}_X.bin")
        (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(stl / f"{side}_y.bin")
    (stl / "class_names.txt").write_text("\n".join("abcdefghij"))
    for year, sets in (("2007", ("trainval", "test")), ("2012", ("trainval",))):
        voc(root / f"VOCdevkit/VOC{year}", sets, write)
    segmented(root / "VOCdevkit/VOC2012", pixels)


def voc(folder, sets, write):
    """Eight images of each set; those of even number show a cat, the others a dog."""
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    write(folder, ["JPEGImages"], 8 * len(sets))
    for i in range(8 * len(sets)):
        (folder / f"JPEGImages/{i}.png").rename(folder / f"JPEGImages/{i}.jpg")
        box = "<xmin>3</xmin><ymin>5</ymin><xmax>30</xmax><ymax>33</ymax>"
        thing = f"<object><name>{('cat', 'dog')[i % 2]}</name><bndbox>{box}</bndbox></object>"
        (folder / f"Annotations/{i}.xml").write_text(f"<annotation>{thing}</annotation>")
    for k, name in enumerate(sets):
        ids = "".join(f"{i}\n" for i in range(8 * k, 8 * k + 8))
        (folder / f"ImageSets/Main/{name}.txt").write_text(ids)


def segmented(folder, pixels):
    """The same images of 2012 as training and test images, with a class for every pixel."""
    (folder / "ImageSets/Segmentation").mkdir()
    for name in ("train", "val", "train_aug"):
        (folder / f"ImageSets/Segmentation/{name}.txt").write_text("0\n1\n2\n3\n4\n5\n6\n7\n")
    for name in ("SegmentationClass", "SegmentationClassAug"):
        (folder / name).mkdir()
        for i in range(8):
            values = pixels.integers(0, 21, (40, 40), dtype=np.uint8)
            Image.fromarray(values).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with the weights of a tiny network."""
    from unlabeled.backbones.resnet import ResNet

    net = ResNet(depth=18, width=16, stem="small")
    state = {f"backbone.{key}": value for key, value in net.state_dict().items()}
    path = tmp_path_factory.mktemp("trained") / "last.ckpt"
    torch.save({"state_dict": state, "backbone_config": net.config}, path)
    head = torch.nn.Linear(net.dim, 2)
    state |= {f"head.{key}": value for key, value in head.state_dict().items()}
    torch.save({"state_dict": state, "backbone_config": net.config}, path.with_stem("teacher"))
    return path


@pytest.fixture
def alone():
    """Leaves no process group behind: `trainer=ddp` opens one even for a single process."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_the_exceptions_exist():
    assert set(FILES) >= NEVER_RUN.keys()
    groups = {name.split("/")[0] for name in FILES} - {"train"}
    for group, table in (("method", METHOD), ("backbone", BACKBONE), ("augment", AUGMENT)):
        assert {f"{group}/{option}" for option in table} <= set(FILES)
    assert {f"decode/{option}" for option in DECODE} == {f for f in FILES if f[:7] == "decode/"}
    assert groups <= {
        *("augment", "backbone", "callbacks", "data", "decode", "eval", "evals"),
        *("experiment", "hydra", "logger", "method", "optim", "task", "trainer"),
    }, "a new group: say in `overrides` how one of its files is swapped into a run"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", [name for name in FILES if name not in NEVER_RUN])
def test_runs_for_two_steps(name, compose, roots, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("UNLABELED_DATA", str(roots))
    if name == "logger/wandb":
        monkeypatch.setenv("WANDB_MODE", "offline")
    if name == "logger/tensorboard":
        pytest.importorskip("tensorboard", reason="an optional package")
    lines = [line.replace("SOURCE", str(trained)) for line in with_tracks(overrides(name))]
    lines = [line.replace("TEACHER", str(trained.with_stem("teacher"))) for line in lines]
    if not any(line.startswith(("method=", "experiment=")) for line in lines):
        lines += chosen("simclr")
    cfg = compose(*lines)
    group, _, option = name.partition("/")
    if group == "backbone" and parameters(cfg) > MOST:
        return
    out = tmp_path / "run"
    scores = run(cfg, out)
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    if "method=none" in lines:
        assert scores or name == "method/none"
        return
    saved = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    weights = {k: v for k, v in saved["state_dict"].items() if k.startswith("backbone.")}
    assert weights
    assert all(w.isfinite().all() for w in weights.values())
    if group in ("eval", "evals") and option != "none":
        expected = {"one"} if group == "eval" else {option.replace("/", "_")}
        expected = {"knn", "linear"} if option in ("all", "standard") else expected
        prefixes = {k.split("/")[0] for k in scores} - {"baseline"}
        assert prefixes == expected or (option == "all" and prefixes > expected)
        assert all(math.isfinite(value) for value in scores.values())
        if option.split("/")[0] not in MORE_THAN_SHARES | {"all"}:
            assert all(0 <= value <= 1 for value in scores.values())
    if group == "logger" and option in ("wandb", "tensorboard"):
        assert list(out.rglob("events.out.*" if option == "tensorboard" else "run-*.wandb"))
    if group == "callbacks" and option.startswith("online"):
        header = (out / "metrics.csv").read_text().splitlines()[0]
        assert f"online/{option.removeprefix('online_')}_top1" in header.split(",")


def parameters(cfg) -> float:
    """Parameters of the backbone, built on the meta device, and there pushed through if large."""
    from hydra.utils import instantiate

    if cfg.backbone.get("path"):
        return 0.0  # its weights are read, and it is as large as what was trained
    with torch.device("meta"):
        net = instantiate(cfg.backbone)
    count = sum(math.prod(p.shape) for p in net.parameters())
    if count > MOST:
        assert net(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, net.dim)
    return count
