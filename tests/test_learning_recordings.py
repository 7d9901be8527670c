"""Minutes of training on rendered recordings: order and correspondence are learned (`slow`).

On held-out recordings, with the settings of conf/experiment/scenes, only shorter.
"""

import csv
import math

import pytest

from unlabeled.train import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TRAIN, TEST, BATCH = 1000, 400, 64
COUNT = TEST // BATCH * BATCH  # held-out recordings that are asked: whole batches


@pytest.fixture(scope="module")
def held_out(compose, tmp_path_factory):
    """A function: experiment, metric, epochs -> what the metric of held-out recordings ends at."""
    rendered = tmp_path_factory.mktemp("rendered")

    def learned(name, metric, epochs):
        out = tmp_path_factory.mktemp(name)
        cfg = compose(
            f"experiment=scenes/{name}",
            *("data=scenes_audio_video", f"data.root={rendered}", f"data.layout.train={TRAIN}"),
            *(f"data.layout.test={TEST}", f"trainer.max_epochs={epochs}"),
            *("trainer=cpu", "evals=none", "data.workers=0"),
        )
        run(cfg, out)
        with (out / "metrics.csv").open() as file:
            found = [float(row[metric]) for row in csv.DictReader(file) if row.get(metric)]
        return found[-1]

    return learned


def test_shuffle_and_learn_tells_the_order_of_frames(held_out):
    """Balanced over the answers, of which a quarter is "in order"."""
    accuracy = held_out("shuffle_and_learn", "held_out/balanced", 14)
    half = 1.96 * math.sqrt(0.25 / (COUNT / 4) + 0.25 / (COUNT * 3 / 4)) / 2  # by chance: 0.5
    print(f"order: balanced accuracy {accuracy:.3f}, by chance 0.5 ± {half:.3f}, n = {COUNT}")
    assert accuracy > 0.5 + half


def test_correspondence_tells_which_sounds_belong_to_pictures(held_out):
    """Both answers of one recording may hang together: they count as one."""
    accuracy = held_out("avc", "held_out/accuracy", 36)  # its first 300 updates stay at chance
    half = 1.96 * math.sqrt(0.25 / COUNT)
    print(f"correspondence: accuracy {accuracy:.3f}, by chance 0.5 ± {half:.3f}, n = {COUNT}")
    assert accuracy > 0.5 + half
