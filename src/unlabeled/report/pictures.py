"""Images and the map of embeddings, written into the page itself."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

COLOURS = 10  # of the page's palette
SMALL = 64  # pixels; larger pictures are stored as JPEG


@dataclass(frozen=True)
class Tile:
    """One image: its data URI, what it shows, and whether it is of its query's class."""

    source: str
    title: str
    right: bool | None  # None where there are no labels


@dataclass(frozen=True)
class Query:
    """A query image and its neighbours, nearest first."""

    image: Tile
    neighbours: list[Tile]


def queries(arrays: Mapping[str, np.ndarray], limit: int = 12) -> list[Query]:
    """The first `limit` queries of figures/neighbours.npz with their neighbours."""
    names = [str(c) for c in arrays["classes"]] if "classes" in arrays else []
    labelled = "query_labels" in arrays and "neighbour_labels" in arrays
    found = []
    for q, image in enumerate(arrays["queries"][:limit]):
        own = int(arrays["query_labels"][q]) if labelled else -1
        near = []
        for k, neighbour in enumerate(arrays["neighbours"][q]):
            label = int(arrays["neighbour_labels"][q, k]) if labelled else -1
            title = _name(names, label)
            if "similarity" in arrays:
                title = f"{title} {arrays['similarity'][q, k]:.2f}".strip()
            near.append(Tile(_uri(neighbour), title, label == own if own >= 0 else None))
        found.append(Query(Tile(_uri(image), _name(names, own), None), near))
    return found


def hit_rate(found: list[Query]) -> float | None:
    """The share of the shown neighbours that are of their query's class."""
    marks = [tile.right for q in found for tile in q.neighbours if tile.right is not None]
    return sum(marks) / len(marks) if marks else None


def samples(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, list[str]]]:
    """(title, data URIs) of every column of figures/samples.npz: a row is an image."""
    titles = [str(t) for t in arrays["titles"]]
    return [(t, [_uri(image) for image in arrays[f"column{i}"]]) for i, t in enumerate(titles)]


def legend(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    """(name, CSS class) of the classes of a map; those beyond the palette share one entry."""
    shown, others = _classes(arrays)
    names = [str(c) for c in arrays["classes"]] if "classes" in arrays else []
    entries = [(_name(names, c) or "images", f"s{i}") for i, c in enumerate(shown)]
    return [*entries, (f"{others} other classes", "rest")] if others else entries


def scatter(arrays: Mapping[str, np.ndarray], *, side: int = 640) -> Markup:
    """The points of figures/embedding.npz, a colour per class, class names in their middle."""
    xy = np.asarray(arrays["xy"], dtype=np.float64)
    good = np.isfinite(xy).all(1)
    label = _labels(arrays)
    low, high = xy[good].min(0), xy[good].max(0)
    # One scale for both axes, as distances mean something; y points up.
    scale = (side - 24) / max((high - low).max(), 1e-9)
    place = (xy - (low + high) / 2) * scale * [1, -1] + side / 2
    shown, _ = _classes(arrays)
    names = [str(c) for c in arrays["classes"]] if "classes" in arrays else []
    parts = [_points(place[good & ~np.isin(label, shown)], "rest")]
    parts += [_points(place[good & (label == c)], f"s{i}") for i, c in enumerate(shown)]
    for c in shown:
        if name := _name(names, c):
            x, y = np.median(place[good & (label == c)], axis=0)
            parts.append(
                f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle">{escape(name)}</text>'
            )
    body = "".join(parts)
    return Markup(f'<svg class="map" viewBox="0 0 {side} {side}" role="img">{body}</svg>')


def _points(place: np.ndarray, css: str) -> str:
    # Lines of no length with round ends: a third of the bytes of as many circles.
    if not len(place):
        return ""
    path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in place)
    return f'<path class="points {css}" d="{path}"/>'


def _labels(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    return arrays["label"] if "label" in arrays else np.full(len(arrays["xy"]), -1)


def _classes(arrays: Mapping[str, np.ndarray]) -> tuple[list[int], int]:
    """The classes that get a colour, the most frequent ones, and how many do not."""
    found, counts = np.unique(_labels(arrays), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:COLOURS]
    return sorted(int(c) for c in found[order]), max(0, len(found) - COLOURS)


def _name(names: list[str], label: int) -> str:
    if label < 0:
        return ""
    return names[label] if label < len(names) else f"class {label}"


def _uri(image: np.ndarray) -> str:
    """A (h, w, 3) uint8 image as a data URI."""
    form = "JPEG" if max(image.shape[:2]) > SMALL else "PNG"
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, form, quality=88)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{form.lower()};base64,{text}"
