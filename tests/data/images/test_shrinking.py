import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from captionlib.data.images.shrinking import shrink_image


def checkerboard(height: int, width: int, step: int) -> np.ndarray:
    on = np.add.outer(np.arange(height) // step, np.arange(width) // step) % 2
    return np.repeat((255 * on).astype(np.uint8)[..., None], 3, axis=2)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_shrinking_differs_from_pillow_by_at_most_one(data: st.DataObject, seed: int) -> None:
    width, height = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 200))
    size = data.draw(st.integers(1, width)), data.draw(st.integers(1, height))
    left, upper = data.draw(st.floats(0, width - size[0])), data.draw(st.floats(0, height - size[1]))
    box = (left, upper, data.draw(st.floats(left + size[0], width)), data.draw(st.floats(upper + size[1], height)))
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 256, (height, width, 3), np.uint8)
    for pixels in (noise, noise // 128 * 255, checkerboard(height, width, int(generator.integers(1, 30)))):
        expected = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, box)
        difference = shrink_image(pixels, size, box).astype(int) - np.asarray(expected)
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_shrinking_keeps_a_uniform_color(value: int) -> None:
    pixels = np.full((70, 90, 3), value, np.uint8)
    assert (shrink_image(pixels, (7, 5), (3.3, 0, 90, 66.6)) == value).all()
