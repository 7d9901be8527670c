"""Average precision of boxes against pycocotools and a transcription of the VOC devkit."""

import contextlib
import io

import numpy as np
import pytest

from unlabeled.evaluate.box_precision import IOUS, Boxes, BoxPrecision

CLASSES = 4  # the last has no true box


def world(seed, images=40, *, ties=True):
    """Images with found and true boxes: some empty, some difficult, doubles, equal scores."""
    r = np.random.default_rng(seed)

    def some(n):
        corner, size = r.integers(0, 60, (n, 2)), r.integers(4, 40, (n, 2))
        return np.concatenate([corner, corner + size], 1).astype(float)

    made = []
    for i in range(images):
        n = int(r.integers(0, 5)) if i % 7 else 0
        true = Boxes(some(n), r.integers(0, CLASSES - 1, n), r.random(n) < 0.25)
        near = np.repeat(np.arange(n), r.integers(0, 3, n))
        moved = true.corners[near] + r.integers(-4, 5, (len(near), 4))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        stray = int(r.integers(0, 4)) if i % 5 else 0
        labels = np.concatenate([true.labels[near], r.integers(0, CLASSES, stray)]).astype(int)
        scores = r.random(len(labels)).round(1 if ties else 9)
        made.append((Boxes(np.concatenate([moved, some(stray)]), labels, scores), true))
    return made


def precision(images, classes=CLASSES):
    metric = BoxPrecision(classes)
    for found, true in images:
        metric.add(found, true)
    return metric


@pytest.mark.parametrize("seed", range(6))
def test_coco_equals_pycocotools(seed):
    coco = pytest.importorskip("pycocotools.coco", reason="the reference implementation")
    from pycocotools.cocoeval import COCOeval

    images = world(seed)
    known = {
        "images": [{"id": i} for i in range(len(images))],
        "categories": [{"id": c} for c in range(CLASSES)],
        "annotations": [],
    }
    answers = []
    for i, (found, true) in enumerate(images):
        for box, label, difficult in zip(*true, strict=True):
            size = box[2:] - box[:2]
            one = {"image_id": i, "category_id": int(label), "bbox": [*box[:2], *size]}
            one |= {"id": len(known["annotations"]) + 1, "area": float(size.prod())}
            known["annotations"].append({**one, "iscrowd": int(difficult)})
        for box, label, score in zip(*found, strict=True):
            one = {"image_id": i, "category_id": int(label), "score": float(score)}
            answers.append({**one, "bbox": [*box[:2], *(box[2:] - box[:2])]})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = known
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(answers), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    metric = precision(images)
    ours = metric.mean("coco")
    assert np.allclose([ours["AP"], ours["AP50"], ours["AP75"]], judge.stats[:3], atol=1e-12)
    by_class = judge.eval["precision"][:, :, :, 0, 2].mean(1).T  # class, IoU
    assert np.allclose(
        metric.by_class("coco"), np.where(by_class < 0, np.nan, by_class), equal_nan=True
    )


def devkit(images, label, minoverlap):
    """VOCevaldet and VOC 2007's VOCap: loops, whole pixels from 1, both ends inside."""
    ids, confidence, boxes, truth, npos = [], [], [], [], 0
    for i, (found, true) in enumerate(images):
        truth.append([])
        for box, c, difficult in zip(*true, strict=True):
            if c == label:
                bb = [box[0] + 1, box[1] + 1, box[2], box[3]]
                truth[i].append({"bb": bb, "diff": bool(difficult), "det": False})
                npos += not difficult
        mine = [j for j in range(len(found.labels)) if found.labels[j] == label]
        for j in sorted(mine, key=lambda j: -found.extra[j]):
            box = found.corners[j]
            ids.append(i)
            confidence.append(found.extra[j])
            boxes.append([box[0] + 1, box[1] + 1, box[2], box[3]])
    tp, fp = np.zeros(len(ids)), np.zeros(len(ids))
    order = np.argsort(-np.array(confidence), kind="stable")
    for d, at in enumerate(order):
        bb, ovmax, jmax = boxes[at], -np.inf, None
        for j, object_ in enumerate(truth[ids[at]]):
            gt = object_["bb"]
            bi = [max(bb[0], gt[0]), max(bb[1], gt[1]), min(bb[2], gt[2]), min(bb[3], gt[3])]
            iw, ih = bi[2] - bi[0] + 1, bi[3] - bi[1] + 1
            if iw > 0 and ih > 0:
                ua = (bb[2] - bb[0] + 1) * (bb[3] - bb[1] + 1)
                ua += (gt[2] - gt[0] + 1) * (gt[3] - gt[1] + 1) - iw * ih
                if iw * ih / ua > ovmax:
                    ovmax, jmax = iw * ih / ua, j
        if ovmax >= minoverlap:
            hit = truth[ids[at]][jmax]
            if not hit["diff"]:
                if not hit["det"]:
                    tp[d], hit["det"] = 1, True
                else:
                    fp[d] = 1
        else:
            fp[d] = 1
    if npos == 0:
        return np.nan
    fp, tp = np.cumsum(fp), np.cumsum(tp)
    rec, ap = tp / npos, 0.0
    with np.errstate(invalid="ignore"):
        prec = np.nan_to_num(tp / (fp + tp))
    for k in range(11):
        t = k * 0.1 if k <= 5 else 1 - (10 - k) * 0.1  # MATLAB's 0:0.1:1
        p = prec[rec >= t]
        ap += (p.max() if len(p) else 0) / 11
    return ap


@pytest.mark.parametrize("seed", range(6))
def test_voc_equals_the_devkit(seed):
    images = world(seed)
    ours = precision(images).by_class("voc07")
    theirs = [[devkit(images, c, t) for t in IOUS] for c in range(CLASSES)]
    assert np.isnan(ours[CLASSES - 1]).all()  # absent
    assert np.allclose(ours, theirs, equal_nan=True, atol=1e-12)


def one(boxes, labels, extra):
    return Boxes(
        np.array(boxes, dtype=float).reshape(-1, 4), np.array(labels, int), np.array(extra)
    )


def test_a_second_detection_of_a_box_is_wrong():
    box, other = [0, 0, 10, 10], [0, 0, 10, 11]
    true = one([box, [50, 50, 60, 60]], [0, 0], [False, False])
    found = one([box, other, [50, 50, 60, 60]], [0, 0, 0], [0.9, 0.8, 0.7])
    metric = precision([(found, true)], 1)
    # precision 1 up to recall 1/2, then 2/3: 6 of 11 recalls are at most 1/2, and 51 of 101
    assert metric.mean("voc07")["AP50"] == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert metric.mean("coco")["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_difficult_boxes_neither_count_nor_hurt():
    box, hard = [0, 0, 10, 10], [50, 50, 60, 60]
    true = one([box, hard], [0, 0], [False, True])
    missed = precision([(one([box], [0], [0.5]), true)], 1)
    found = precision([(one([hard, hard, box], [0, 0, 0], [0.9, 0.8, 0.5]), true)], 1)
    for metric in (missed, found):
        assert (
            metric.mean("voc07") == metric.mean("coco") == dict.fromkeys(["AP", "AP75", "AP50"], 1)
        )
    only = precision([(one([hard], [0], [0.9]), one([hard], [0], [True]))], 1)
    assert np.isnan(only.by_class("voc07")).all()
    assert only.mean("coco")["AP"] == 0


def test_empty_images_and_nothing_found():
    nothing = one([], [], [])
    true = one([[0, 0, 10, 10]], [0], [False])
    assert precision([(nothing, true), (nothing, nothing)]).mean("coco")["AP50"] == 0
    assert precision([(nothing, nothing)]).mean("voc07")["AP50"] == 0
    right = one([[0, 0, 10, 10]], [0], [0.5])
    alone = precision([(right, true), (nothing, nothing)]).mean("coco")
    assert alone["AP"] == 1
    stray = one([[0, 0, 10, 10]], [0], [0.9])
    assert precision([(right, true), (stray, nothing)]).mean("coco")["AP50"] == pytest.approx(0.5)


@pytest.mark.parametrize("rule", ["coco", "voc07"])
def test_weights_are_repeated_images(rule):
    images = world(3, 12, ties=False)
    times = np.random.default_rng(0).integers(0, 3, 12)
    repeated = [x for x, n in zip(images, times, strict=True) for _ in range(n)]
    weighted = precision(images).by_class(rule, times.astype(float))
    assert np.allclose(weighted, precision(repeated).by_class(rule), equal_nan=True)


def test_intervals_hold_the_value_and_shrink():
    images = world(5, 120)
    for rule in ("coco", "voc07"):
        few, many = precision(images[:20]), precision(images)
        value, (low, high) = many.mean(rule)["AP50"], many.intervals(rule, 0)["AP50"]
        assert low < value < high
        assert many.intervals(rule, 0) == many.intervals(rule, 0)
        wide = few.intervals(rule, 0)["AP50"]
        assert wide[1] - wide[0] > high - low
