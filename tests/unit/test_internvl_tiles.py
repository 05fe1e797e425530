"""The tiles of InternVL: cut, counted and scaled as by its authors."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictured import PLACE, image_bytes, lazy_image, save_internvl
from PIL import Image
from transformers import AutoConfig, AutoTokenizer

from emloc.data.examples import Example
from emloc.data.image import LazyImage
from emloc.data.reader import OpenCheckpoint
from emloc.models.internvl import InternVLReader, InternVLReaderSettings

TILE, PLACES = 28, 4  # pixels along the side of a tile, and tokens of a tile
MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])
SIZES = st.tuples(st.integers(1, 2000), st.integers(1, 2000)).filter(
    lambda size: max(size) <= 100 * min(size)
)


@pytest.fixture(scope="module")
def read_by(tmp_path_factory):
    """Function that returns a reader with at most `tiles` tiles."""
    folder = save_internvl(tmp_path_factory.mktemp("internvl"))
    config = AutoConfig.from_pretrained(folder)

    def make_reader(tiles: int, dtype: torch.dtype = torch.float32) -> InternVLReader:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        opened = OpenCheckpoint(folder, lambda: tokenizer, config, dtype)
        return InternVLReaderSettings(None, tiles).reader(opened)

    return make_reader


@pytest.fixture(scope="module")
def readers(read_by) -> dict[int, InternVLReader]:
    return {tiles: read_by(tiles) for tiles in (1, 6, 12)}


def noise(width: int, height: int, seed: int = 0) -> LazyImage:
    return lazy_image(f"{width} x {height}", image_bytes(width, height, seed))


def plain(width: int, height: int, colour: tuple[int, int, int] = (0, 128, 255)) -> LazyImage:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PPM")
    return lazy_image("plain", file.getvalue())


def question_about(*images: LazyImage, name: str = "row/3") -> Example:
    return Example(name, "Is it?", "yes", images=images)


# Number ------------------------------------------------------------------------------------------


def grid(width: int, height: int, most: int) -> tuple[int, int]:
    """Return the columns and rows of tiles by the rule of InternVL's authors."""
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    best, least = (1, 1), float("inf")
    for i, j in sorted(grids, key=lambda one: one[0] * one[1]):
        apart = abs(width / height - i / j)
        if apart < least or (apart == least and width * height > 0.5 * TILE**2 * i * j):
            best, least = (i, j), apart
    return best


def cut(image: Image.Image, most: int) -> torch.Tensor:
    """Return the pixels of all tiles by the rule of InternVL's authors."""
    columns, rows = grid(*image.size, most)
    large = image.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC)
    corners = [(x * TILE, y * TILE) for y in range(rows) for x in range(columns)]
    tiles = [large.crop((x, y, x + TILE, y + TILE)) for x, y in corners]
    if len(tiles) > 1:
        tiles.append(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    pixels = torch.tensor(np.stack([np.asarray(tile) for tile in tiles])) / 255
    return ((pixels - MEAN) / STD).permute(0, 3, 1, 2)


@settings(max_examples=300)
@given(size=SIZES, most=st.sampled_from([1, 6, 12]))
def test_the_number_of_tiles_follows_the_authors_rule(readers, size, most):
    columns, rows = grid(*size, most)
    assert readers[most].tile_count(*size) == columns * rows + (columns * rows > 1)


@pytest.mark.parametrize(
    ("size", "tiles"), [((28, 28), 1), ((20, 20), 1), ((40, 40), 5), ((56, 56), 5), ((84, 28), 4)]
)
def test_the_larger_grid_is_used_if_the_image_fills_half_of_it(readers, size, tiles):
    """40 x 40 is more than half of 56 x 56; 20 x 20 would be enlarged without a gain."""
    assert readers[6].tile_count(*size) == tiles


@settings(max_examples=25)
@given(size=SIZES, most=st.sampled_from([1, 6, 12]))
def test_the_number_of_image_tokens_follows_from_the_tiles(readers, size, most):
    one = readers[most].encode(question_about(plain(*size)))
    tiles = readers[most].collate([one])["pixel_values"]
    places = one.input_ids.count(readers[most].tokenizer.convert_tokens_to_ids(PLACE))
    assert places == PLACES * len(tiles)
    assert len(tiles) != 2  # a thumbnail is added only to more than one tile
    assert len(tiles) <= (1 if most == 1 else most + 1)


# Pixels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(28, 28), (90, 40), (31, 200), (7, 5), (64, 64), (3, 40)])
def test_tiles_and_thumbnail_equal_those_of_the_authors(readers, size):
    image = noise(*size)
    for most, reader in readers.items():
        pixels = reader.collate([reader.encode(question_about(image))])["pixel_values"]
        torch.testing.assert_close(pixels, cut(image.open(), most), atol=1e-5, rtol=0)


def test_pixels_are_scaled_by_mean_and_deviation_of_imagenet(read_by):
    image = plain(28, 28, (0, 128, 255))
    for dtype in (torch.float32, torch.bfloat16):
        reader = read_by(6, dtype)
        pixels = reader.collate([reader.encode(question_about(image))])["pixel_values"]
        assert (pixels.dtype, pixels.shape) == (dtype, (1, 3, TILE, TILE))
        expected = torch.tensor([-2.117904, 0.205182, 2.640000]).to(dtype)
        torch.testing.assert_close(pixels[0, :, 5, 7], expected, atol=1e-5, rtol=0)
        assert pixels.std((0, 2, 3)).max() < 1e-6


def test_pixels_of_a_batch_have_the_order_of_its_images(readers):
    shown = [(noise(28, 28, 1),), (noise(84, 28, 2), noise(28, 28, 3)), ()]
    every = [readers[6].encode(question_about(*images)) for images in shown]
    expected = torch.cat([cut(image.open(), 6) for images in shown for image in images])
    pixels = readers[6].collate(every)["pixel_values"]
    assert len(pixels) == 1 + 4 + 1
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)
    assert "pixel_values" not in readers[6].collate(every[2:])
