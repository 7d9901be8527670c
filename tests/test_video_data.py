"""Sets of media files as splits: folders, official lists, CSV lists; and methods on them."""

import logging
import os
import sys

import numpy as np
import pytest
import torch
from media_files import number_of, numbered, tone, write

from unlabeled.data import media_index
from unlabeled.data.clip_decode import Evenly
from unlabeled.data.clips import Recordings
from unlabeled.data.layouts import HeldOut
from unlabeled.data.recordings import Recorded
from unlabeled.data.video_layouts import HMDB51, UCF101, VideoFolder
from unlabeled.data.video_lists import AudioSet, Kinetics


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The bytes of a clip of three seconds with sound, and of one without."""
    folder = tmp_path_factory.mktemp("clip")
    heard = write(folder / "heard.mp4", numbered(40), tracks=[tone(4, 440)])
    mute = write(folder / "mute.mp4", numbered(40))
    short = write(folder / "short.mp4", numbered(4), tracks=[tone(0.4, 440)])
    return {p.stem: p.read_bytes() for p in (heard, mute, short)}


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def tree(root, data, counts, kinds=("run", "walk")):
    for side, count in counts.items():
        for kind in kinds:
            for i in range(count):
                put(root / side / kind / f"{i}.mp4", data)


def test_a_folder_of_recordings_has_classes_and_splits(tmp_path, clip):
    root = tmp_path / "set"
    tree(root, clip["heard"], {"train": 3, "val": 2})
    splits = VideoFolder()(root, 0)
    train = splits["train"]
    assert isinstance(train, Recorded)
    assert (len(train), len(splits["test"])) == (6, 4)
    assert train.classes == ("run", "walk")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.name(4) == "train/walk/1.mp4"
    assert [number_of(x) for x in train.recording(4).pictures([7, 39])] == [7, 39]
    assert number_of(train.image(0)) == 20
    some = train.take(torch.tensor([5, 0]))
    assert some.labels.tolist() == [1, 0]
    assert some.name(0) == "train/walk/2.mp4"
    assert number_of(some.recording(1).pictures([3])[0]) == 3
    assert some.identity() != train.identity()


def test_a_flat_folder_is_divided_by_a_seed_of_its_own(tmp_path, clip):
    root = tmp_path / "set"
    for i in range(10):
        put(root / f"{i}.mp4", clip["mute"])
    first, again = (VideoFolder(test_share=0.2)(root, seed) for seed in (0, 1))
    assert first["train"].labels is None
    assert (len(first["train"]), len(first["test"])) == (8, 2)
    assert first["test"].identity() == again["test"].identity()
    other = VideoFolder(test_share=0.2, split_seed=1)(root, 0)
    assert other["test"].identity() != first["test"].identity()


def test_what_does_not_sound_or_is_too_short_is_left_out_and_counted(tmp_path, clip, caplog):
    root = tmp_path / "set"
    for name in ("heard", "mute", "short"):
        for i in range(3):
            put(root / "train" / f"{name}{i}.mp4", clip[name])
    with caplog.at_level(logging.WARNING):
        train = VideoFolder(test_share=0, sound=True, shortest=1.0)(root, 0)["train"]
    assert sorted(train.name(i) for i in range(len(train))) == [
        f"train/heard{i}.mp4" for i in range(3)
    ]
    assert "of 9 recordings, 3 without sound and 3 shorter than 1 s" in caplog.text
    assert (
        "left out: train/mute0.mp4, train/mute1.mp4, train/mute2.mp4, train/short0" in caplog.text
    )
    assert "short1.mp4, and 1 more" in caplog.text
    with pytest.raises(ValueError, match="no training recording lasts 60 s and has sound"):
        VideoFolder(sound=True, shortest=60)(root, 0)


def test_the_index_is_made_once_and_only_for_what_changed(tmp_path, clip, monkeypatch):
    root = tmp_path / "set"
    tree(root, clip["heard"], {"train": 2})
    seen = []
    probe = media_index.probe
    monkeypatch.setattr(media_index, "probe", lambda path: seen.append(path.name) or probe(path))
    layout = VideoFolder(test_share=0)
    before = layout(root, 0)["train"].recording(0).facts
    assert len(seen) == 4
    after = layout(root, 0)["train"].recording(0).facts
    assert len(seen) == 4
    for a, b in zip(before, after, strict=True):
        assert np.array_equal(a, b)
    put(root / "train/run/0.mp4", clip["short"])
    put(root / "train/run/new.mp4", clip["mute"])
    train = layout(root, 0)["train"]
    assert sorted(seen[4:]) == ["0.mp4", "new.mp4"]
    assert len(train.recording(0).times) == 4
    for file in (tmp_path / "cache/media").iterdir():
        file.write_bytes(b"damaged")
    assert len(layout(root, 0)["train"].recording(0).times) == 4
    assert len(seen) == 11


def test_a_file_replaced_by_one_of_its_size_is_read_again(tmp_path, clip, monkeypatch):
    root, padded = tmp_path / "set", clip["short"]
    assert len(padded) < len(clip["heard"])
    padded += (len(clip["heard"]) - len(padded)).to_bytes(4, "big") + b"free"  # a box of nothing
    padded = padded.ljust(len(clip["heard"]), b"\0")
    tree(root, clip["heard"], {"train": 2})
    seen = []
    probe = media_index.probe
    monkeypatch.setattr(media_index, "probe", lambda path: seen.append(path.name) or probe(path))
    layout = VideoFolder(test_share=0)
    before = layout(root, 0)["train"]
    (root / "train/run/0.mp4").write_bytes(padded)
    os.utime(root / "train/run/0.mp4", ns=(1, 1))
    after = layout(root, 0)["train"]
    (at,) = [i for i in range(len(after)) if after.name(i) == "train/run/0.mp4"]
    assert seen[4:] == ["0.mp4"]
    assert after.files.sizes[at] == before.files.sizes[at]
    assert len(after.recording(at).times) == 4 < len(before.recording(at).times)
    kept = {x.recording(at).kept for x in (before, after)}
    assert len(kept) == 2  # nor is how much moves in it what it was


def test_without_pyav_the_error_says_what_to_install(tmp_path, clip, monkeypatch):
    put(tmp_path / "set/a.mp4", clip["mute"])
    VideoFolder(test_share=0)(tmp_path / "set", 0)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install 'unlabeled\[video\]'"):
        VideoFolder(test_share=0)(tmp_path / "set", 0)


def test_irregular_times_come_back_from_the_index(tmp_path):
    times = np.cumsum([0, 0.04, 0.2, 0.1, 0.5])
    root = tmp_path / "set"
    write(root / "a.mkv", numbered(5), times)
    write(root / "b.mkv", numbered(5))
    write(root / "c.mkv", numbered(5), times * 2)
    for _ in range(2):
        train = VideoFolder(test_share=0)(root, 0)["train"]
        found = [train.recording(i).times.numpy() for i in range(3)]
        for wanted, given in zip((times, np.arange(5) / 10, times * 2), found, strict=True):
            assert given == pytest.approx(wanted, abs=1e-3)


def ucf101(root, data, both=()):
    for i, kind in enumerate(("Archery", "Biking")):
        names = {"train": [], "test": []}
        for group in range(1, 7):
            for part in (1, 2):
                name = f"{kind}/v_{kind}_g{group:02d}_c{part:02d}.avi"
                put(root / "UCF-101" / name, data)
                names["test" if group > 4 else "train"].append(name)
        names["test"] += [name for name in names["train"] if name in both]
        for side, each in names.items():
            path = root / f"ucfTrainTestlist/{side}list01.txt"
            path.parent.mkdir(exist_ok=True)
            end = f" {i + 1}" if side == "train" else ""
            with path.open("a") as file:
                file.writelines(f"{name}{end}\r\n" for name in each)


def test_ucf101_and_its_groups(tmp_path, clip):
    root = tmp_path / "ucf101"
    ucf101(root, clip["mute"])
    splits = UCF101()(root, 0)
    train, test = splits["train"], splits["test"]
    assert (len(train), len(test)) == (16, 8)
    assert train.classes == ("Archery", "Biking")
    assert train.labels.tolist() == [0] * 8 + [1] * 8
    assert len(train.recording(0).times) == 40
    for share in (0.1, 0.25, 0.5):
        data = module(root, UCF101(), val_share=share)
        fit, chosen = data.selection()
        sides = [{train.groups[i].item() for i in part} for part in (fit, chosen)]
        assert not sides[0] & sides[1]
        assert sorted([*fit.tolist(), *chosen.tolist()]) == list(range(16))
        assert len(chosen) == {0.1: 4, 0.25: 4, 0.5: 8}[share]  # whole groups of two, per class
    held = HeldOut(layout=UCF101(), share=0.25)(root, 0)
    names = [{split.name(i)[:-8] for i in range(len(split))} for split in held.values()]
    assert not names[0] & names[1]
    put(root / "UCF-101/Archery/v_Archery_g01_c01.avi", clip["short"])
    assert len(UCF101(shortest=1.0)(root, 0)["train"]) == 15
    with pytest.raises(ValueError, match="fold must be 1, 2 or 3, got 4"):
        UCF101(fold=4)
    with pytest.raises(ValueError, match="trainlist02"):
        UCF101(fold=2)(root, 0)


def test_a_group_in_both_lists_of_ucf101_is_refused(tmp_path, clip):
    root = tmp_path / "ucf101"
    ucf101(root, clip["mute"], both=("Biking/v_Biking_g03_c01.avi",))
    with pytest.raises(ValueError, match="1 groups are in both lists, the first v_Biking_g03"):
        UCF101()(root, 0)


def hmdb51(root, data, fold=2):
    folder = root / "testTrainMulti_7030_splits"
    folder.mkdir(parents=True)
    for kind in ("brush_hair", "wave"):
        lines = []
        for i in range(8):
            source = f"Film{i // 2}_{kind}"
            name = f"{source}_u_cm_np1_fr_med_{i % 2}.avi"
            put(root / kind / name, data)
            lines.append(f"{name} {1 if i < 4 else 2 if i < 6 else 0} \n")
        (folder / f"{kind}_test_split{fold}.txt").write_text("".join(lines))


def test_hmdb51_takes_what_its_lists_say(tmp_path, clip):
    root = tmp_path / "hmdb51"
    hmdb51(root, clip["mute"])
    splits = HMDB51(fold=2)(root, 0)
    assert (len(splits["train"]), len(splits["test"])) == (8, 4)
    assert splits["train"].classes == ("brush_hair", "wave")
    assert splits["train"].labels.tolist() == [0] * 4 + [1] * 4
    assert splits["train"].groups.unique().numel() == 4
    with pytest.raises(ValueError, match=r"_test_split1\.txt"):
        HMDB51()(root, 0)


def kinetics(root, data, kinds=("singing", "tap dancing"), counts=(6, 3), lost=1):
    for side, count in zip(("train", "val"), counts, strict=True):
        lines = ["label,youtube_id,time_start,time_end,split,is_cc\n"]
        for k, kind in enumerate(kinds):
            for i in range(count):
                name = f"-{side}{k}{i}"
                lines.append(f'"{kind}",{name},{i * 7},{i * 7 + 10},{side},0\n')
                if i >= lost:
                    put(root / side / kind / f"{name}_{i * 7:06d}_{i * 7 + 10:06d}.mp4", data)
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / f"annotations/{side}.csv").write_text("".join(lines))


def test_kinetics_takes_the_clips_that_are_there(tmp_path, clip, caplog):
    root = tmp_path / "kinetics"
    kinetics(root, clip["heard"])
    with caplog.at_level(logging.WARNING):
        splits = Kinetics()(root, 0)
    assert (len(splits["train"]), len(splits["test"])) == (10, 4)
    assert "train.csv: of 12 clips, 2 are not there" in caplog.text
    assert splits["train"].classes == ("singing", "tap dancing")
    assert splits["test"].labels.tolist() == [0, 0, 1, 1]
    some = Kinetics(classes=["tap dancing", "laughing"], sound=True)(root, 0)["train"]
    assert some.classes == ("tap dancing", "laughing")
    assert some.labels.tolist() == [0] * 5
    (root / "annotations/train.csv").write_text("label,youtube_id\nx,y\n")
    with pytest.raises(ValueError, match=r"no column \['time_end', 'time_start'\]"):
        Kinetics()(root, 0)


def test_clips_of_one_video_are_a_group_of_kinetics(tmp_path, clip):
    root = tmp_path / "kinetics"
    kinetics(root, clip["heard"], lost=0)
    put(root / "train/other/-train00_000050_000060.mp4", clip["heard"])
    with (root / "annotations/train.csv").open("a") as file:
        file.write('"tap dancing",-train00,50,60,train,0\n')
    train = Kinetics()(root, 0)["train"]
    same = [i for i in range(13) if train.groups[i] == train.groups[12]]
    assert [train.name(i) for i in same] == [
        "train/singing/-train00_000000_000010.mp4",
        "train/other/-train00_000050_000060.mp4",
    ]
    data = module(root, Kinetics())
    assert (data.size("train"), data.sources("train")) == (13, 12)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["group"], train.groups[batch["index"]])
    assert "group" not in next(module(root, VideoFolder()).scan("test"))


def test_a_rule_of_names_says_which_clips_of_a_folder_are_of_one_video(tmp_path, clip):
    root = tmp_path / "set"
    for side, names in {"train": ["a_1", "a_2", "b_1", "c"], "val": ["d_1"]}.items():
        for name in names:
            put(root / side / "run" / f"{name}.mp4", clip["mute"])
    put(root / "train/walk/a_3.mp4", clip["mute"])
    train = VideoFolder(group=r"([^/]+)_\d+$")(root, 0)["train"]
    names = [train.name(i) for i in range(5)]
    assert names[4] == "train/walk/a_3.mp4"
    assert [train.groups.tolist().count(g) for g in train.groups.tolist()] == [3, 3, 1, 1, 3]
    whole = VideoFolder(group=r"^[^_]*")(root, 0)["train"]
    assert [whole.groups.tolist().count(g) for g in whole.groups.tolist()] == [2, 2, 1, 1, 1]
    with pytest.raises(ValueError, match=r"data\.layout\.group is no regular expression"):
        VideoFolder(group="(a")


def test_kinetics_without_any_clip_says_how_they_should_be_called(tmp_path, clip):
    root = tmp_path / "kinetics"
    kinetics(root, clip["mute"], lost=6)
    put(root / "other.mp4", clip["mute"])
    with pytest.raises(ValueError, match=r"of the 12 clips .* none lies below"):
        Kinetics()(root, 0)


def audioset(root, data, count=6):
    names = ["index,mid,display_name", '0,/m/a,"Speech"', '1,/m/b,"Dog, bark"', "2,/m/c,Bell"]
    put(root / "class_labels_indices.csv", "\n".join(names).encode())
    for side, list_ in (("t", "balanced_train_segments"), ("e", "eval_segments")):
        lines = ["# Segments csv created", "# YTID, start_seconds, end_seconds, positive_labels"]
        for i in range(count):
            mids = ("/m/b", "/m/a,/m/c", "/m/c,/m/b")[i % 3]
            lines.append(f'{side}{i}, {i}.000, {i + 10}.000, "{mids}"')
            put(root / "clips" / f"{side}{i}.mp4", data)
            if i == 3:  # two segments of one video
                lines.append(f'{side}{i}, 50.000, 60.000, "/m/c"')
                put(root / "clips" / f"{side}{i}_000050_000060.mp4", data)
        put(root / f"{list_}.csv", "\n".join(lines).encode())


def test_audioset_keeps_all_labels_as_tags(tmp_path, clip):
    root = tmp_path / "audioset"
    audioset(root, clip["heard"])
    train = AudioSet()(root, 0)["train"]
    assert train.classes == ("Speech", "Dog, bark", "Bell")
    tags = [x.tolist() for x in train.annotations["tags"].several(range(7))]
    assert tags == [[1], [0, 2], [2, 1], [1], [2], [0, 2], [2, 1]]
    assert train.groups.tolist() == [0, 1, 2, 3, 3, 4, 5]
    assert all(label in each for label, each in zip(train.labels.tolist(), tags, strict=True))
    assert AudioSet()(root, 1)["train"].labels.equal(train.labels)
    assert AudioSet(names=None)(root, 0)["train"].classes == ("/m/a", "/m/b", "/m/c")


def module(root, layout, **more):
    decode = Evenly(size=16, frames=4, rate=4.0)
    return Recordings(
        root=str(root),
        layout=layout,
        decode=decode,
        eval_decode=decode,
        **{"batch_size": 4, "workers": 0, **more},
    )


def test_unreadable_recordings_are_counted_named_and_limited(tmp_path, clip, caplog):
    root = tmp_path / "set"
    tree(root, clip["heard"], {"train": 4})
    put(root / "train/run/bad.mp4", b"no film")
    layout = VideoFolder(test_share=0)
    data = module(root, layout, max_unreadable=0.2, batch_size=9)
    data.setup("fit")
    with caplog.at_level(logging.WARNING):
        (batch,) = data.train_dataloader()
    assert batch["crops"][0].shape == (9, 4, 3, 16, 16)
    assert list(data.unreadable["train"]) == [4]
    assert "train/run/bad.mp4 (InvalidDataError" in caplog.text
    grey = next(data.scan("train", 4, 5))["crops"][0]
    assert (grey == 128).all()
    strict = module(root, layout, max_unreadable=0.0, batch_size=9)
    with pytest.raises(ValueError, match=r"1 of 9 images .*max_unreadable=0 allows"):
        list(strict.train_dataloader())


def run_on(compose, out, *lines):
    from unlabeled.train import run

    small = ["trainer=cpu", "trainer.max_steps=2", "trainer.log_every_n_steps=1"]
    small += ["callbacks=default", "evals=none", "logger=none", "data.batch_size=4"]
    sizes = ["data.eval_decode.size=16", "data.eval_decode.resize=16", "data.workers=0"]
    run(compose(*lines, *small, *sizes), out)
    return torch.load(out / "checkpoints/last.ckpt", weights_only=True)


def test_methods_learn_from_folders_with_unreadable_and_silent_files(
    tmp_path, clip, compose, caplog
):
    """In training and on held-out recordings; nothing of these files stops a run."""
    root = tmp_path / "set"
    tree(root, clip["heard"], {"train": 4, "test": 2})
    silent = write(tmp_path / "silent.mp4", numbered(40), tracks=[0 * tone(4, 440)]).read_bytes()
    for side in ("train", "test"):
        put(root / side / "run/silent.mp4", silent)
        put(root / side / "run/bad.mp4", b"no film")
        put(root / side / "run/mute.mp4", clip["mute"])
        put(root / side / "walk/short.mp4", clip["short"])
    data = ["data=audio_video_folder", f"data.root={root}", "data.max_unreadable=0.5"]
    listening = ["decode.sound.seconds=0.5", "decode.sound.rate=4000"]
    listening += [f"method.augment.spectrogram.{x}" for x in ("window=64", "hop=32")]
    narrow = ["backbone=look_listen", "backbone.widths=[8,16]", "method.sound.widths=[8]"]
    saved = run_on(compose, tmp_path / "avc", "method=avc", *data, *listening, *narrow)
    assert saved["global_step"] == 2
    frames = ["decode.tau_max=8", "decode.tau_min=4"]
    tiny = ["backbone=resnet18_tiny", "backbone.width=16"]
    lines = ["method=shuffle_and_learn", *data, *frames, *tiny, "data.layout.shortest=0"]
    with caplog.at_level(logging.WARNING):
        saved = run_on(compose, tmp_path / "order", *lines)
    assert saved["global_step"] == 2
    assert "1 have fewer pictures than the 11 that decode takes" in caplog.text
    assert "short.mp4 (" not in caplog.text  # nobody calls it unreadable
