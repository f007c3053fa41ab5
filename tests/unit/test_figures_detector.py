"""The detector of the world of figures: how often it is right on drawings it has not seen."""

import numpy as np
import pytest

from tav_jax.worlds.figures.detector import WEIGHTS, read, read_frames
from tav_jax.worlds.figures.drawing import draw_batch
from tav_jax.worlds.figures.scenes import ATTRIBUTES, SIZE, sample_scenes
from tav_jax.worlds.figures.train_detector import label, make_drawings, spoil


@pytest.fixture(scope="module")
def drawings():
    return make_drawings(np.random.default_rng(77), 600)


@pytest.fixture(params=["clean", "spoilt"])
def images(request, drawings):
    if request.param == "clean":
        return drawings.images
    rng = np.random.default_rng(78)
    return np.stack([spoil(rng, image) for image in drawings.images])


def test_it_is_small():
    assert WEIGHTS.stat().st_size < 1e6


def test_it_names_what_is_drawn(images, drawings):
    seen, labels = read_frames(images), drawings.labels
    present = labels.present
    assert 0.9 < present.mean() < 0.99
    assert (seen.present == present).mean() >= 0.97
    for name, values in labels.attributes.items():
        counts = np.full(len(present), True) if name in ("background", "style") else present
        assert (getattr(seen, name) == values)[counts].mean() >= 0.97, name


def test_it_finds_where_a_figure_is_and_how_far_its_verb(images, drawings):
    seen, labels = read_frames(images), drawings.labels
    present = labels.present
    places = np.stack([seen.x, seen.y], axis=1)
    apart = np.linalg.norm(places - (labels.centre + 1) * (SIZE / 2), axis=1)[present]
    assert apart.mean() < 1.5
    turn = seen.phase - np.arctan2(*labels.phase.T) / (2 * np.pi)
    assert (np.abs((turn + 0.5) % 1 - 0.5)[present] < 1 / 8).mean() >= 0.95


def test_an_attribute_without_a_figure_is_none():
    drawings = make_drawings(np.random.default_rng(5), 120)
    empty = drawings.images[~drawings.labels.present]
    assert len(empty) > 2
    assert all((values == -1).all() for values in read(empty).values())


def test_an_image_reads_alike_in_any_batch():
    rng = np.random.default_rng(6)
    scenes, times = sample_scenes(rng, 70), rng.random(70)
    images, _ = draw_batch(scenes, times)
    together, alone = read_frames(images), read_frames(images[69:])
    for name in ATTRIBUTES:
        assert getattr(together, name)[69] == getattr(alone, name)[0]
    np.testing.assert_allclose(together.x[69], alone.x[0], atol=1e-3)


def test_labels_are_what_the_scenes_say():
    rng = np.random.default_rng(8)
    scenes, times = sample_scenes(rng, 20), rng.random(20)
    labels = label(scenes, times, np.full(20, True))
    for name, values in ATTRIBUTES.items():
        assert [values[i] for i in labels.attributes[name]] == [getattr(s, name) for s in scenes]
    assert np.abs(labels.centre).max() < 1
    np.testing.assert_allclose((labels.phase**2).sum(1), 1, rtol=1e-5)
