import numpy as np
from PIL import Image

from tokenwise.comparison.pictures import WIDTH, draw, encode


def drawn(group, image=None):
    image = np.zeros((4, 4, 3), dtype=np.uint8) if image is None else image
    picture = {"image": encode(Image.fromarray(image)), "grid": [2, 2], "group": group}
    return np.asarray(draw(picture))


def test_what_is_kept_stays_and_what_is_dropped_is_grey():
    image = np.random.default_rng(0).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    found = drawn([0, -1, 1, 2], image)
    scale = WIDTH // 4
    assert found.shape == (WIDTH, WIDTH, 3)
    assert np.array_equal(found[: 2 * scale : scale, : 2 * scale : scale], image[:2, :2])
    gone = found[: 2 * scale, 2 * scale :]
    assert np.ptp(gone, axis=2).max() == 0  # no colour is left
    assert abs(gone.astype(int) - 128).max() < 20
    assert np.array_equal(drawn([0, 1, 2, 3], image)[::scale, ::scale], image)


def test_merged_patches_have_their_mean_colour_and_a_border():
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    image[:2, :2] = 200
    found = drawn([0, 0, 1, 2], image)
    inside = WIDTH // 4
    assert found[inside, inside].tolist() == [130] * 3  # 0.3 of 200 and 0.7 of the mean, 100
    assert found[inside, 3 * inside].tolist() == [70] * 3
    assert found[WIDTH // 2, inside].min() > 180
    assert found[WIDTH // 2 + 5, WIDTH // 2].max() == 0  # none between patches on their own
