"""FFmpeg's libraries, as PyAV brings them along: media files opened for one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlabeled.data.rgb import MAX_PIXELS, UnreadableError

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.video.stream import VideoStream


def opened(path: Path) -> InputContainer:
    """A file, open. Raises what FFmpeg says if it is none; ValueError if PyAV is missing."""
    return library().open(str(path), metadata_errors="replace")


def library() -> Any:
    """PyAV, told to keep FFmpeg's messages to itself. Raises ValueError if it is missing."""
    try:
        import av
        import av.logging
    except ImportError as error:
        raise ValueError(
            "video and sound files need PyAV: pip install 'unlabeled[video]'"
        ) from error
    av.logging.set_level(None)
    return av


def pictured(file: InputContainer) -> VideoStream:
    """The stream of moving pictures, ready to decode. Raises `UnreadableError` if there is none."""
    found: Any = file.streams.best("video")
    if found is None or found.disposition & found.disposition.attached_pic:
        raise UnreadableError("it has no moving pictures")
    codec = found.codec_context
    if codec.width * codec.height > MAX_PIXELS:
        raise UnreadableError(f"{codec.width} x {codec.height} pixels")
    if not codec.is_open:
        codec.thread_count = 1
    return found


def sounded(file: InputContainer) -> AudioStream | None:
    """The sound that is played beside the pictures, ready to decode, or None."""
    found: Any = file.streams.best("audio", related=file.streams.best("video"))
    if found is not None and not found.codec_context.is_open:
        found.codec_context.thread_count = 1
    return found


@contextmanager
def reading() -> Iterator[None]:
    """Turns what decoders raise on damaged files into `UnreadableError`."""
    try:
        yield
    except (UnreadableError, MemoryError):
        raise
    except Exception as error:
        raise UnreadableError(f"{type(error).__name__}: {error}") from error
