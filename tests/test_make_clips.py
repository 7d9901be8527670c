"""scripts/make_clips.py: a film becomes clips whose pictures and sound are those of their spans."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from media_files import number_of, numbered, write

from unlabeled.data.media import Film
from unlabeled.data.media_index import probe

SCRIPT = Path(__file__).parents[1] / "scripts/make_clips.py"


@pytest.fixture
def cut(monkeypatch, capsys):
    """A function: arguments -> exit code and what was said, as of a call of the script."""
    spec = importlib.util.spec_from_file_location("make_clips", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["make_clips.py", *map(str, arguments)])
        code = 0
        try:
            script.main()
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return called


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Six seconds at 10 pictures a second, whose sound has a click at 0.3 s of each second."""
    clicks = np.zeros((1, 6 * 16000), dtype=np.float32)
    clicks[0, 4800::16000] = 0.9
    folder = tmp_path_factory.mktemp("film")
    return write(folder / "film.mkv", numbered(60), tracks=[clicks], sound_codec="flac", group=25)


def test_clips_have_the_pictures_and_the_sound_of_their_spans(cut, film, tmp_path):
    spans = ("--train", 0, 4, "--test", 4, 6, "--seconds", 1, "--side", 24)
    done = cut(film, tmp_path, *spans)
    assert done.returncode == 0, done.stderr
    assert "4 clips to train on and 2 to test on" in done.stdout
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.mp4"))
    starts = [f"train/{i:05d}.000.mp4" for i in range(4)]
    assert found == sorted([*starts, "test/00004.000.mp4", "test/00005.000.mp4"])
    for name in found:
        clip = Film(tmp_path / name, probe(tmp_path / name))
        second = int(Path(name).stem[:5])
        pictures = clip.pictures(range(len(clip.times)))
        assert pictures.shape == (10, 3, 24, 32)
        assert [number_of(x) for x in pictures] == list(range(10 * second, 10 * second + 10))
        assert clip.times.numpy() == pytest.approx(np.arange(10) / 10, abs=1e-4)
        assert clip.seconds == pytest.approx(1.0, abs=0.01)
        click = int(clip.sound(0.0, 1.0, 16000).abs().argmax())
        assert abs(click / 16000 - 0.3) < 0.002


def test_it_goes_on_where_it_was_stopped(cut, film, tmp_path):
    spans = ("--train", 0, 3, "--test", 3, 6, "--seconds", 1, "--side", 24)
    assert cut(film, tmp_path, *spans).returncode == 0
    files = sorted(tmp_path.rglob("*.mp4"))
    before = {path: path.stat().st_mtime_ns for path in files}
    gone = [files[1], files[4]]
    bytes_of = {path: path.read_bytes() for path in gone}
    for path in gone:
        path.unlink()
    assert cut(film, tmp_path, *spans).returncode == 0
    for path in files:
        if path in gone:
            assert path.read_bytes() == bytes_of[path]
        else:
            assert path.stat().st_mtime_ns == before[path]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--train", "0", "4", "--test", "3", "6"), "do not overlap"),
        (("--train", "0", "40", "--test", "40", "60"), "lasts 6.0 s"),
        (("--seconds", "0"), "--seconds must be positive"),
    ],
)
def test_wrong_spans_end_with_2(cut, film, tmp_path, arguments, said):
    done = cut(film, tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_file_that_is_no_film_ends_with_2(cut, tmp_path):
    (tmp_path / "text.mp4").write_text("no film")
    done = cut(tmp_path / "text.mp4", tmp_path / "out")
    assert done.returncode == 2
    assert "cannot be read" in done.stderr
