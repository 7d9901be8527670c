"""Where in a picture its sound comes from: the pointing game, and maps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.draws import subset
from unlabeled.evaluate.contract import Data, Result, Subject
from unlabeled.evaluate.cross_modal import BATCH, unprojected
from unlabeled.evaluate.forward import images
from unlabeled.evaluate.frozen import frozen
from unlabeled.evaluate.shares import share
from unlabeled.parts.sounding import overlay


class Localisation:
    """The place of a picture that is nearest to its sound should lie on what sounds.

    Every place of the last stage's map is projected as the whole picture is, and compared with the
    projected sound by cosine (Arandjelovic & Zisserman, 2018, read the place of a sound from
    AVE-Net like this). `pointing` is the share of test pictures whose best place, the middle of its
    cell, lies in the box of an object (the pointing game of Zhang et al., 2016, without their
    tolerance). Beside stand `another/pointing`, by the sound of another recording: what is found
    whatever is heard; `centre/pointing`, of the middle of the picture; and `chance/pointing`, the
    mean share of a picture that lies in boxes.

    Args:
        limit: test recordings that are used, balanced over classes.
        shown: rows of the sheet.
        data: another data module than the run's.
    """

    splits = frozenset({"test"})
    needs_labels = False

    def __init__(self, *, limit: int = 2000, shown: int = 8, data: Data | None = None) -> None:
        if limit < 2 or shown < 1:
            raise ValueError(f"limit must be at least 2 and shown 1, got {limit} and {shown}")
        self.limit, self.shown, self.data = limit, shown, data

    def obstacle(self, data: Any) -> str | None:
        """Why these data are not enough."""
        decode = getattr(data, "eval_decode", None)
        if "audio" not in getattr(decode, "gives", frozenset()):
            return "its recordings have no sound: set data.eval_decode.sound"
        if getattr(decode, "frames", None) is not None:
            return "it looks at single pictures: set data.eval_decode.frames=null"
        if "boxes" not in data.kinds("test"):
            return "the test recordings have no boxes of what sounds, as scenes_audio_video has"
        n = data.size("test")
        return f"it needs 2 test recordings, there are {n}" if n < 2 else None

    def misfit(self, backbone: nn.Module) -> str | None:
        """Why this backbone cannot."""
        if reason := unprojected(backbone):
            return reason
        return None if hasattr(backbone, "stages") else "the backbone has no maps of stages"

    def tune(self, subject: Subject) -> Result:
        """Scores the subject, which is only looked at."""
        data = subject.data
        size, labels = data.size("test"), data.labels("test")
        known = None if labels is None else labels.tolist()
        chosen = subset(known, size, min(self.limit, size), subject.seed, "localisation")
        with frozen(subject.backbone):
            places, sounds, pictures = self._embedded(subject, chosen)
        boxes = data.annotation("test", "boxes").several(chosen.tolist())
        inside = torch.stack([covered(each, pictures.shape[-2:]) for each in boxes])
        other = torch.arange(len(chosen)).roll(1)
        maps = {"": heat(places, sounds), "another/": heat(places, sounds[other])}
        per_image = {f"{name}pointing": pointed(x, inside) for name, x in maps.items()}
        middle = torch.zeros(len(chosen), 1, 1)
        per_image["centre/pointing"] = pointed(middle, inside)
        per_image["chance/pointing"] = inside.double().mean((1, 2))
        scores = {name: hits.mean().item() for name, hits in per_image.items()}
        details: dict[str, dict[str, Any]] = {
            name: {
                "protocol": "the place nearest to the sound lies in a box",
                "stage": "last, projected",
                "hyperparameters": {"limit": self.limit},
                "selection": "none",
                "chance": scores["chance/pointing"],
                **({} if name == "pointing" else {"better": "neither"}),
            }
            for name in scores
        }
        rows = slice(self.shown)
        sheet = self._sheet(pictures[rows], {name: x[rows] for name, x in maps.items()})
        return Result(scores, details, per_image, sheet)

    def _embedded(self, subject: Subject, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors of places (n, D, h, w) and sounds (n, D); pictures (n, 3, H, W) uint8."""
        positions, net = chosen.tolist(), subject.backbone
        parts = [positions[i : i + BATCH] for i in range(0, len(positions), BATCH)]
        mine = share(len(parts))
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        scan = subject.data.cut("test", mine.of(parts), subject.data.eval_decode, "plain")
        for i, batch in enumerate(scan, mine.start):
            pictures, audio = batch["crops"][0], batch["audio"].to(subject.device)
            maps = list(net.stages(images(pictures, subject.device)).values())[-1]  # type: ignore[operator]
            b, _, h, w = maps.shape
            heard = net.hear(audio)  # type: ignore[operator]
            flat = maps.permute(0, 2, 3, 1).flatten(0, 2)
            v, a = net.embed(flat, heard)  # type: ignore[operator]
            v = v.view(b, h, w, -1).permute(0, 3, 1, 2)
            found.append((v.float().cpu(), a.float().cpu(), pictures))
            subject.progress("localisation", i + 1, len(parts))
        places, sounds, pictures = (
            mine.all(torch.cat(x), subject.device) for x in zip(*found, strict=True)
        )
        return F.normalize(places, dim=1), F.normalize(sounds, dim=1), pictures

    def _sheet(self, pictures: Tensor, maps: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
        shown = pictures.float() / 255
        columns = [shown, *(overlay(shown, x) for x in maps.values())]
        drawn = [(x * 255).round().to(torch.uint8).movedim(1, -1).numpy() for x in columns]
        return {
            "maps": {
                "kind": "sheet",
                "title": "Where it sounds",
                "note": "Test pictures, how near each place is to the picture's own sound (yellow: "
                "nearest), and to that of another recording.",
                "titles": np.array(["picture", "its sound", "another's"]),
                **{f"column{i}": x for i, x in enumerate(drawn)},
            }
        }


def heat(places: Tensor, sounds: Tensor) -> Tensor:
    """(n, h, w) cosines of places (n, D, h, w) with sounds (n, D), both unit vectors."""
    return torch.einsum("ndhw,nd->nhw", places, sounds)


def covered(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """(H, W) bool: pixels whose middle lies in a box (left, top, right, bottom) of (M, 4)."""
    y, x = (torch.arange(n) + 0.5 for n in size)
    left, top, right, bottom = (side[:, None] for side in boxes.T)
    rows, columns = (top <= y) & (y <= bottom), (left <= x) & (x <= right)
    return (rows[:, :, None] & columns[:, None]).any(0)


def pointed(maps: Tensor, inside: Tensor) -> Tensor:
    """(n,) float64: 1 where the best cell's middle is inside, its share where several are equal.

    Args:
        maps: (n, h, w).
        inside: (n, H, W) bool.
    """
    (height, width), (h, w) = inside.shape[-2:], maps.shape[-2:]
    y = ((torch.arange(h) + 0.5) * height / h).long()
    x = ((torch.arange(w) + 0.5) * width / w).long()
    hit = inside[:, y][:, :, x].flatten(1)
    flat = maps.flatten(1)
    best = flat == flat.amax(1, keepdim=True)
    return (best & hit).double().sum(1) / best.double().sum(1)
