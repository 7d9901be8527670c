"""What an offline W&B run wrote, read from its `.wandb` file without W&B's own reader.

The file is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB with pieces of records. A
piece is a CRC-32 of kind and content (4 bytes, without LevelDB's mask), a length (2), a kind (1:
whole, 2, 3, 4: the first, a middle, the last part) and its content; no piece starts in a block's
last 6 bytes.
"""

import json
import zlib
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK, HEAD = 32768, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
KNOWN = b":W&B"


def pieces(data: bytes):
    """(kind, content) of every piece."""
    assert data[:4] == KNOWN, "no W&B file"
    at = HEAD
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < HEAD:
            assert not any(data[at : at + left])
            at += left
            continue
        checksum = int.from_bytes(data[at : at + 4], "little")
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        content = data[at + HEAD : at + HEAD + length]
        if len(content) < length:
            return  # a kill cut it short
        assert checksum == zlib.crc32(bytes([kind]) + content), f"damaged at byte {at}"
        yield kind, content
        at += HEAD + length


def records(path: Path):
    """The records of a file, in order."""
    parts = []
    for kind, content in pieces(path.read_bytes()):
        assert (kind in (WHOLE, FIRST)) == (not parts)
        parts.append(content)
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


class Offline:
    """One offline run's file, sorted by what its records say."""

    def __init__(self, folder: Path) -> None:
        (path,) = folder.glob("run-*.wandb")
        self.files = folder / "files"
        self.history, self.summary, self.config = [], {}, {}
        self.artifacts, self.stats, self.metadata, self.preempted = [], [], None, False
        self.run = self.exit = None
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                self.history.append(_items(record.history.item))
            elif kind == "summary":
                self.summary |= _items(record.summary.update)
            elif kind == "config":
                self.config |= _items(record.config.update)
            elif kind == "run":
                self.run = record.run
                self.config |= _items(record.run.config.update)
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "stats":
                self.stats.append({i.key: json.loads(i.value_json) for i in record.stats.item})
            elif kind == "environment":
                self.metadata = record.environment
            elif kind == "exit":
                self.exit = record.exit.exit_code
            elif kind == "preempting":
                self.preempted = True

    def column(self, name: str):
        """A metric's values by the step of their rows."""
        return [(row["_step"], row[name]) for row in self.history if name in row]


def _items(items) -> dict:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
