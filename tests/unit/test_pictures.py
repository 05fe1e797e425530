"""Images: their size is read from the header, and unreadable images are refused in one line."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from emloc.data.image import LazyImage
from emloc.errors import ConfigError

ORIENTATION = 0x0112
KINDS = ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"]


def of(content: bytes) -> LazyImage:
    return LazyImage("task vqa: train/7", "key", lambda: content)


def noise(width: int = 30, height: int = 20) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file(image: Image.Image, kind: str = "PNG", orientation: int | None = None, **how) -> bytes:
    buffer = io.BytesIO()
    if orientation is not None:
        how["exif"] = Image.Exif()
        how["exif"][ORIENTATION] = orientation
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def refusal(call) -> str:
    """Return the one-line error of a refusal, which names the image and the remedy."""
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith("task vqa: train/7: ")
    assert message.endswith("set task.unreadable=skip to leave such rows out")
    assert "\n" not in message
    return message


# Size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_file_has_a_size_but_cannot_be_opened(kind):
    picture = of(file(noise(300, 200), kind)[:5000])
    assert picture.size == (300, 200)
    assert "cannot read the image: " in refusal(picture.open)


def test_the_size_of_a_png_is_read_from_its_header():
    """The file ends after signature, header (33 bytes) and the name of the next chunk."""
    assert of(file(noise())[:41]).size == (30, 20)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_image_and_size_follow_the_exif_orientation(kind, orientation):
    content = file(noise(), kind, orientation)
    opened = of(content).open()
    assert of(content).size == opened.size == ((20, 30) if 5 <= orientation <= 8 else (30, 20))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert np.array_equal(pixels(opened), pixels(expected))


def test_orientation_6_is_a_quarter_turn_clockwise():
    opened = of(file(noise(), "PNG", 6)).open()
    assert np.array_equal(pixels(opened), np.rot90(pixels(noise()), -1))


def test_an_orientation_after_the_pixels_of_a_png_is_ignored():
    """Otherwise size and image would differ, since the size is read from the header."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    late = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    content = file(noise())
    content = content[:-12] + late + content[-12:]
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(content))).size == (20, 30)
    assert of(content).size == (30, 20)
    assert np.array_equal(pixels(of(content).open()), pixels(noise()))


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (101, 1), (5, 501)])
def test_an_extremely_thin_image_is_refused(size):
    message = refusal(lambda: of(file(Image.new("RGB", size))).size)
    assert f"an image of {size[0]} x {size[1]} pixels has no tiles" in message


@pytest.mark.parametrize("size", [(100, 1), (1, 100), (500, 5), (1, 1)])
def test_an_aspect_ratio_of_100_is_accepted(size):
    assert of(file(Image.new("RGB", size))).size == size


# Colours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "I;16", "RGB"])
def test_every_colour_mode_becomes_rgb(mode):
    opened = of(file(Image.new("L", (4, 2), 255).convert(mode))).open()
    assert (opened.mode, opened.size) == ("RGB", (4, 2))


def test_colours_equal_those_of_the_file():
    grey = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    assert np.array_equal(pixels(of(file(grey)).open()), np.stack([pixels(grey)] * 3, -1))
    clear = Image.new("RGBA", (3, 2), (10, 20, 30, 0))
    assert pixels(of(file(clear)).open())[1, 2].tolist() == [10, 20, 30]
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert pixels(of(file(palette)).open())[0, 0].tolist() == [200, 100, 50]


def test_16_bit_images_are_scaled_and_32_bit_images_are_refused():
    deep = Image.fromarray(np.array([[0, 0x1234, 0xFFFF]], dtype=np.uint16))
    assert pixels(of(file(deep)).open())[0].tolist() == [[0] * 3, [0x12] * 3, [255] * 3]
    floats = file(Image.new("F", (3, 2)), "TIFF")
    assert "pixels of 32 bits (mode F) are not supported" in refusal(of(floats).open)


def test_an_image_with_invalid_exif_is_still_rotated():
    """The width is a text, which PIL reads but cannot write."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010E] = 6, "hello"
    content = file(noise(), "JPEG", exif=exif)
    odd = spoilt(content, content.index(b"\x01\x0e\x00\x02") + 1, 0)
    assert of(odd).open().size == of(odd).size == (20, 30)


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_bytes_of_no_image_are_refused(content):
    assert "cannot read the image: " in refusal(lambda: of(content).size)
    assert "cannot read the image: " in refusal(of(content).open)


def spoilt(content: bytes, place: int, value: int) -> bytes:
    return content[:place] + bytes([value]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (spoilt(file(noise()), 36, 1), "broken PNG file"),  # the length of the chunk of pixels
        (spoilt(file(noise(), "DDS"), 80, 0), ""),
        (file(noise(), exif=b"Exif\0\0MM\0*\0"), "unpack requires a buffer of 4 bytes"),
    ],
)
def test_all_errors_of_pil_become_one_line(content, reason):
    assert f"cannot read the image: {reason}" in refusal(of(content).open)


def test_a_missing_file_is_refused(tmp_path):
    picture = LazyImage("task vqa: train/7", "key", (tmp_path / "7.png").read_bytes)
    assert "No such file" in refusal(lambda: picture.size)
    assert "No such file" in refusal(picture.open)


def test_an_image_with_too_many_pixels_is_refused():
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    content = (
        file(noise())[:12] + header + struct.pack(">I", zlib.crc32(header)) + file(noise())[33:]
    )
    assert "decompression bomb" in refusal(lambda: of(content).size)


FILES = {kind: file(noise(), kind, 6 if kind in KINDS[:4] else None) for kind in KINDS}


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, derandomize=True)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_a_broken_file_is_either_read_or_refused(kind, data):
    content = bytearray(FILES[kind])
    places = st.integers(0, min(len(content), 200) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    picture = of(bytes(content[:cut] if data.draw(st.booleans()) else content))
    try:
        message, apart = "", picture.size != picture.open().size
    except ConfigError as error:
        message, apart = str(error), False
    assert not apart
    assert "\n" not in message
