import base64
import io

import numpy as np
import pytest
from PIL import Image

from trainguard.report.pictures import data_uri, local_box, place, trace


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


@pytest.mark.parametrize("channels", [1, 3])
def test_data_uri_keeps_small_images_exactly(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, channels), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(data_uri(pixels)).reshape(pixels.shape), pixels)


def test_data_uri_of_large_images_is_a_photograph_unless_told():
    pixels = np.zeros((200, 100, 1), dtype=np.uint8)
    assert data_uri(pixels).startswith("data:image/jpeg")
    assert data_uri(pixels, lossless=True).startswith("data:image/png")


def group(images):
    return images.mean(0).astype(np.float32), images.var(0).astype(np.float32)


def noise(n=400, side=32, seed=0):
    return np.random.default_rng(seed).random((n, side, side, 3))


def test_trace_frames_a_patch():
    clean, poisoned = noise(seed=1), noise(seed=2)
    poisoned[:, 28:31, 28:31] = 1.0
    seen = trace(*group(poisoned), *group(clean), 400, 400)
    assert seen.box == (28 / 32, 28 / 32, 31 / 32, 31 / 32)
    assert seen.difference[29, 29].min() > 200 and abs(int(seen.difference[:16].mean()) - 128) < 5
    assert seen.where[28:31, 28:31].min() > 240 and seen.where[:16].max() < 128


def test_trace_of_a_pattern_over_the_whole_image_has_no_frame_and_a_peak_in_the_spectrum():
    clean, poisoned = noise(seed=1), noise(seed=2)
    poisoned += 0.1 * np.sin(2 * np.pi * 6 * np.arange(32) / 32)[None, None, :, None]
    seen = trace(*group(poisoned), *group(clean), 400, 400)
    assert seen.box is None
    peaks = {tuple(p) for p in np.argwhere(seen.spectrum[..., 0] > 240).tolist()}
    assert peaks == {(16, 16 - 6), (16, 16 + 6)}


def test_trace_of_images_without_a_trigger_has_no_frame():
    assert trace(*group(noise(seed=1)), *group(noise(seed=2)), 400, 400).box is None


def test_a_few_kept_images_are_no_average_however_often_they_are_drawn():
    """A pixel that happens to differ in them is not a trigger."""
    flagged, few = 0.1 * noise(200, seed=1), 0.1 * noise(3, seed=2)
    few[:, 3:6, 3:6] += 0.2
    drawn = few[np.random.default_rng(3).integers(0, 3, 200)]
    assert trace(*group(flagged), *group(drawn), 200, 200).box == (3 / 32, 3 / 32, 6 / 32, 6 / 32)
    assert trace(*group(flagged), *group(drawn), 200, 3).box is None
    assert trace(*group(flagged), *group(noise(12, seed=6)), 200, 12).box is None
    patched = noise(200, seed=4)
    patched[:, 28:31, 28:31] = 1.0
    assert trace(*group(patched), *group(noise(12, seed=5)), 200, 12).box == (28 / 32, 28 / 32, 31 / 32, 31 / 32)


def test_local_box_ignores_a_far_outlier():
    z = np.zeros((32, 32), dtype=np.float32)
    z[2:7, 2:7] = 10
    z[30, 30] = 6
    assert local_box(z) == (2 / 32, 2 / 32, 7 / 32, 7 / 32)


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((0.9, 0.9, 1.0, 1.0), "at the bottom right, on 1.0% of the picture"),
        ((0.4, 0.4, 0.6, 0.6), "in the middle, on 4.0% of the picture"),
        ((0.0, 0.4, 0.1, 0.6), "at the top, on 2.0% of the picture"),
        ((0.5, 0.5, 0.5 + 1 / 224, 0.5 + 1 / 224), "in the middle, on 0.002% of the picture"),
    ],
)
def test_place_says_where_a_frame_lies(box, words):
    assert place(box) == words
