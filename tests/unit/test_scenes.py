import io
import zlib
from collections import Counter
from dataclasses import replace
from time import perf_counter

import numpy as np
import pytest
from PIL import Image

from tav_jax.worlds.tiny_scenes.detector import read_frame
from tav_jax.worlds.tiny_scenes.drawing import place, render, render_batch, truth
from tav_jax.worlds.tiny_scenes.scenes import (
    BACKGROUNDS,
    CLIPS,
    COLOURS,
    HELD_OUT,
    MOTIONS,
    SIZE,
    STYLES,
    SUBJECTS,
    WORDS,
    Scene,
    caption,
    describe,
    sample_scenes,
)
from tav_jax.worlds.tokenizer import byte_pair_merges


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def drawn(rng, n, size=SIZE, **kwargs):
    """Scenes, their images, and each subject's true x, y and radius in pixels."""
    scenes, times = sample_scenes(rng, n, **kwargs), rng.random(n)
    places = np.array([place(*each) for each in zip(scenes, times, strict=True)])
    return scenes, render_batch(scenes, times, size), places * size / SIZE


def shares_right(reading, scenes):
    names = {"subject": SUBJECTS, "colour": COLOURS, "background": BACKGROUNDS, "style": STYLES}
    return {
        kind: np.mean(
            [
                tuple(known)[index] == getattr(scene, kind)
                for index, scene in zip(getattr(reading, kind), scenes, strict=True)
            ]
        )
        for kind, known in names.items()
    }


def blurred(images, sigma):
    taps = np.exp(-(np.arange(-3, 4) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    for axis in (1, 2):
        pads = [(3, 3) if i == axis else (0, 0) for i in range(4)]
        wide = np.pad(images.astype(float), pads, mode="edge")
        images = sum(
            tap * wide.take(range(i, i + images.shape[axis]), axis) for i, tap in enumerate(taps)
        )
    return images


def as_jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=70)
    return np.asarray(Image.open(file))


def to_uint8(images):
    return np.rint(np.clip(images, 0, 255)).astype(np.uint8)


# What an autoencoder and a player's codec may do to an image, and worse.
DAMAGES = {
    "blur 0.5": lambda rng, images: to_uint8(blurred(images, 0.5)),
    "blur 0.8": lambda rng, images: to_uint8(blurred(images, 0.8)),
    "jpeg": lambda rng, images: np.stack([as_jpeg(image) for image in images]),
    "gain": lambda rng, images: to_uint8(images * rng.uniform(0.92, 1.08, (len(images), 1, 1, 3))),
    "noise": lambda rng, images: to_uint8(images + rng.normal(0, 8, images.shape)),
}


def test_a_scene_is_the_same_image_on_every_machine():
    scenes = sample_scenes(np.random.default_rng(0), 64, styles=STYLES)
    images = render_batch(scenes, np.linspace(0, 1, 64))
    # As drawn on one machine, once: on any other, and ever after, it has to be that.
    assert zlib.crc32(images.tobytes()) == 3805582597


def test_a_image_does_not_depend_on_its_batch(rng):
    scenes, images, _ = drawn(np.random.default_rng(1), 40, styles=STYLES)
    times = np.random.default_rng(1)
    sample_scenes(times, 40, styles=STYLES)
    for scene, time, image in zip(scenes, times.random(40), images, strict=True):
        np.testing.assert_array_equal(render_batch([scene], np.array([time]))[0], image)


def test_images_are_drawn_fast(rng):
    scenes = sample_scenes(rng, 2000)
    start = perf_counter()
    render_batch(scenes, rng.random(2000))
    print(f"{2000 / (perf_counter() - start):.0f} images a second")


@pytest.mark.parametrize("held_out", [False, True], ids=["seen", "held out"])
def test_reader_names_what_is_drawn(rng, held_out):
    scenes, images, places = drawn(rng, 400, held_out=held_out)
    reading = read_frame(images)
    assert min(shares_right(reading, scenes).values()) > 0.98
    assert reading.present.mean() > 0.98
    errors = np.hypot(reading.x - places[:, 0], reading.y - places[:, 1])
    assert np.median(errors) < 0.3
    assert np.median(np.abs(reading.radius - places[:, 2])) < 0.3


def test_reader_names_what_is_drawn_in_every_style(rng):
    scenes, images, places = drawn(rng, 400, styles=STYLES, held_out=None)
    reading = read_frame(images, styles=STYLES)
    assert min(shares_right(reading, scenes).values()) > 0.98
    errors = np.hypot(reading.x - places[:, 0], reading.y - places[:, 1])
    assert np.median(errors) < 0.3


def test_reader_works_at_64_pixels(rng):
    scenes, images, places = drawn(rng, 100, size=64, styles=STYLES)
    reading = read_frame(images, styles=STYLES)
    assert min(shares_right(reading, scenes).values()) > 0.97
    errors = np.hypot(reading.x - places[:, 0], reading.y - places[:, 1])
    assert np.median(errors) < 0.6


@pytest.mark.parametrize("styles", [STYLES[:1], STYLES], ids=["plain", "styles"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_reader_bears_damage(rng, damage, styles):
    scenes, images, places = drawn(rng, 300, styles=styles, held_out=None)
    reading = read_frame(damage(rng, images), styles=styles)
    assert min(shares_right(reading, scenes).values()) > 0.95
    assert reading.present.mean() > 0.95
    errors = np.hypot(reading.x - places[:, 0], reading.y - places[:, 1])
    assert np.median(errors) < 0.3


@pytest.mark.parametrize("styles", [STYLES[:1], STYLES], ids=["plain", "styles"])
def test_reader_sees_no_subject_on_an_empty_background(rng, styles):
    scenes = [
        replace(scene, motion="still", x=-100.0) for scene in sample_scenes(rng, 150, styles=styles)
    ]
    empty = render_batch(scenes, np.zeros(150))
    for images in (empty, *(damage(rng, empty) for damage in DAMAGES.values())):
        assert read_frame(images, styles=styles).present.mean() < 0.02


def test_reader_sees_no_subject_in_noise(rng):
    noise = rng.normal(0, 1, (100, SIZE, SIZE, 3))
    smooth = blurred(noise, 2)
    for images in (
        rng.integers(256, size=noise.shape).astype(np.uint8),
        to_uint8(128 + 50 * noise),
        to_uint8(128 + 50 * smooth / smooth.std()),
    ):
        assert read_frame(images).present.mean() < 0.02


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("style", [style for style in STYLES if style != "striped"])
def test_the_mask_is_where_the_subject_is_seen(background, style):
    scene = Scene("triangle", "red", background, style, seed=5)
    with_subject, mask = render(scene, 1)[0], truth(scene, 1).mask[0]
    without = render(replace(scene, x=-100.0), 1)[0]
    changed = np.abs(with_subject.astype(int) - without).max(axis=-1)
    assert (changed[mask == 0] == 0).all()
    assert (changed[mask == 1] > 40).all()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_true_centre_is_the_masks_centroid(subject):
    scene = Scene(subject, "red", "grass", radius=7.3, x=14.2, y=17.9)
    centre, _, [mask] = truth(scene, 1)
    rows, columns = np.indices(mask.shape) + 0.5
    centroid = [(mask * columns).sum() / mask.sum(), (mask * rows).sum() / mask.sum()]
    np.testing.assert_allclose(centroid, centre[0], atol=0.1)


# Signs of the way in x and y and of the growth, from the first frame to the last.
WAYS = {
    "still": (0, 0, 0),
    "right": (1, 0, 0),
    "left": (-1, 0, 0),
    "up": (0, -1, 0),
    "falling": (0, 1, 0),
    "bouncing": (0, 0, 0),
    "growing": (0, 0, 1),
    "circling": (0, 0, 0),
}


@pytest.mark.parametrize("motion", MOTIONS)
def test_subjects_move_as_said_and_the_reader_follows(rng, motion):
    for scene in sample_scenes(rng, 10, motions=[motion]):
        centre, radius, _ = truth(scene, 9)
        way = np.array([*(centre[-1] - centre[0]), radius[-1] - radius[0]])
        np.testing.assert_array_equal(np.sign(np.rint(way)), WAYS[motion])
        if motion == "bouncing":  # Up and down, twice.
            turns = np.sign(np.diff(centre[:, 1]))
            np.testing.assert_array_equal(turns, [-1, -1, 1, 1, -1, -1, 1, 1])
        if motion == "circling":
            middle = centre[:-1].mean(axis=0)
            away = np.linalg.norm(centre - middle, axis=1)
            np.testing.assert_allclose(away, scene.travel / 2, atol=0.01)
        if motion not in ("still", "growing"):
            assert np.ptp(centre, axis=0).max() > 5, "the motion is seen"
        reading = read_frame(render(scene, 9))
        assert np.abs(reading.x - centre[:, 0]).max() < 1
        assert np.abs(reading.y - centre[:, 1]).max() < 1


@pytest.mark.parametrize("style", STYLES)
def test_the_background_stands_still_and_the_subject_stays_inside(rng, style):
    for scene in sample_scenes(rng, 100, styles=STYLES):
        if scene.style == style:
            frames, mask = render(scene, 8).astype(int), truth(scene, 8).mask
            border = np.ones((SIZE, SIZE), bool)
            border[1:-1, 1:-1] = False
            if style in ("plain", "striped"):  # Cells and outlines may touch the border.
                assert (mask[:, border] == 0).all()
            never = (mask == 0).all(axis=0)
            assert (np.ptp(frames[:, never], axis=0) == 0).all()


def test_held_out_pairs_never_appear_unless_asked_for(rng):
    def pairs(held_out):
        scenes = sample_scenes(rng, 3000, held_out=held_out)
        return {(scene.subject, scene.colour) for scene in scenes}

    assert len(HELD_OUT) == 6
    assert not pairs(False) & HELD_OUT
    assert pairs(True) == HELD_OUT
    assert pairs(None) == {(subject, colour) for subject in SUBJECTS for colour in COLOURS}
    assert not {(clip.subject, clip.colour) for clip in CLIPS.values()} & HELD_OUT
    assert {subject for subject, _ in HELD_OUT} == set(SUBJECTS)
    assert {colour for _, colour in HELD_OUT} == set(COLOURS)


def test_captions_say_what_is_drawn_and_nothing_else(rng):
    kinds = {"subject": SUBJECTS, "colour": COLOURS, "background": BACKGROUNDS}
    seen = Counter()
    for scene in sample_scenes(rng, 3000, styles=STYLES):
        text = caption(scene, rng)
        words = text.replace(",", " ,").split()
        assert set(words) <= set(WORDS)
        seen.update(words)
        for kind, known in kinds.items():
            assert set(words) & set(known) <= {getattr(scene, kind)}
        said = [name for name, forms in MOTIONS.items() if any(form in text for form in forms)]
        assert said in ([], [scene.motion])
        assert text.endswith(f", {scene.style} style") == (scene.style != "plain")
        assert set(words) & {*SUBJECTS, "shape"}
    assert set(seen) == set(WORDS)


def test_prompts_can_leave_open_what_they_do_not_say():
    scene = CLIPS["circle-right"]
    assert next(iter(CLIPS.values())) == scene
    assert describe(scene) == "a red circle is moving right on grass"
    assert describe(scene, colour=False, background=False) == "a circle is moving right"
    assert describe(scene, subject=False, motion=False, link=" is") == "a red shape is on grass"
    assert describe(scene, motion=False, background=False) == "a red circle"
    assert describe(replace(scene, background="night")) == "a red circle is moving right at night"
    striped = replace(scene, style="striped")
    assert describe(striped) == "a red circle is moving right on grass, striped style"


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_clips_stay_inside_and_are_read_in_every_frame(clip):
    centre, _, mask = truth(clip, 8)
    border = np.ones((SIZE, SIZE), bool)
    border[1:-1, 1:-1] = False
    assert (mask[:, border] == 0).all()
    reading = read_frame(render(clip, 8))
    assert set(shares_right(reading, [clip] * 8).values()) == {1.0}
    assert reading.present.all()
    assert np.hypot(reading.x - centre[:, 0], reading.y - centre[:, 1]).max() < 0.5


def test_a_size_that_pixel_art_cannot_have_is_refused():
    with pytest.raises(ValueError, match="multiple of 16"):
        render(Scene("circle", "red", "grass", "pixel art"), 1, size=40)


def test_words_are_merged_in_one_order_however_they_come():
    merges = byte_pair_merges(WORDS)
    assert byte_pair_merges(WORDS[::-1]) == merges
    assert {"".join(pair) for pair in merges} >= {f"{w}</w>" for w in WORDS if len(w) > 1}
    assert byte_pair_merges(["ab", "ac", "bd"]) == [("a", "b</w>"), ("a", "c</w>"), ("b", "d</w>")]
