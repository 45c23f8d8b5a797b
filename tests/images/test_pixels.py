"""Pixels in RGB whatever a file keeps: scaled by what it says, or refused by name."""

import io

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin
import pytest

from hf_rwp.images.pixels import begins_like_an_image, decoded, ending_of, image_endings, to_rgb


def tiff(values, **tags):
    file = io.BytesIO()
    info = PIL.TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[int(tag.strip("_"))] = value
    PIL.Image.fromarray(values).save(file, "TIFF", tiffinfo=info)
    return {"path": None, "bytes": file.getvalue()}


def red(encoded):
    return np.asarray(decoded(encoded))[..., 0].ravel().tolist()


def png(values):
    file = io.BytesIO()
    PIL.Image.fromarray(values).save(file, "PNG")
    return {"path": None, "bytes": file.getvalue()}


@pytest.mark.parametrize("kind", [png, tiff])
def test_16_bits_are_scaled_to_8(kind):
    assert red(kind(np.array([[0, 0x4D12], [0xFF00, 0xFFFF]], np.uint16))) == [0, 0x4D, 0xFF, 0xFF]


@pytest.mark.parametrize("kind", [png, tiff])
@pytest.mark.parametrize("most", [255, 1023, 4095])
def test_fewer_bits_in_a_file_of_16_are_refused_where_it_does_not_say_so(kind, most):
    with pytest.raises(ValueError, match=f"16-bit values up to {most}, which do not fill 16 bits.*write it with 8"):
        decoded(kind(np.array([[0, most]], np.uint16)))
    assert red(kind(np.zeros((1, 2), np.uint16))) == [0, 0]  # black in any scale


def test_12_bits_are_scaled_by_the_largest_value_that_the_file_says():
    values = np.array([[0, 2048, 4095]], np.uint16)
    assert red(tiff(values, _281=4095)) == [0, 128, 255]
    assert red(tiff(values.astype(np.int32), _341=4095)) == [0, 128, 255]


@pytest.mark.parametrize(("values", "pixels"), [([0, 0x4D12, 0xFFFF], [0, 0x4D, 0xFF])])
def test_32_bit_integers_that_fill_16_bits_are_scaled(values, pixels):
    assert red(tiff(np.array([values], np.int32))) == pixels


@pytest.mark.parametrize("values", [[0, 255], [0, 2**20], [-5, 40000]])
def test_32_bit_integers_of_no_known_scale_are_refused(values):
    with pytest.raises(ValueError, match=r"32-bit values .*does not say what is white"):
        decoded(tiff(np.array([values], np.int32)))


@pytest.mark.parametrize(
    ("values", "pixels"), [([0, 0.5, 1], [0, 128, 255]), ([0, 100.4, 255], [0, 100, 255]), ([0, 0, 0], [0, 0, 0])]
)
def test_floats_of_0_to_1_and_of_0_to_255_are_read(values, pixels):
    assert red(tiff(np.array([values], np.float32))) == pixels


@pytest.mark.parametrize("values", [[0, 1e6], [-1, 1], [0, np.nan], [0, np.inf]])
def test_floats_of_no_known_scale_are_refused(values):
    with pytest.raises(ValueError, match=r"float values .*does not say what is white"):
        decoded(tiff(np.array([values], np.float32)))


def test_white_is_zero_where_the_file_says_so():
    image = PIL.Image.open(io.BytesIO(tiff(np.array([[0, 0xFFFF]], np.uint16))["bytes"]))
    image.load()
    image.tag_v2[262] = 0
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [255, 0]


def test_endings_are_those_that_pillow_reads():
    assert {".jpg", ".png", ".webp", ".tif", ".gif"} <= image_endings()
    assert not {".pdf", ".h5", ".txt", ""} & image_endings()


@pytest.mark.parametrize(
    ("name", "ending"),
    [("a.JPG", ".jpg"), ("a.b.png", ".png"), ("a", ""), ("a.jpg?w=3", ""), ("cat.12", ""), ("Dr. Who", "")],
)
def test_an_ending_is_a_word(name, ending):
    assert ending_of(name) == ending


def test_a_file_is_an_image_by_its_first_bytes(tmp_path):
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        PIL.Image.new("RGB", (4, 4)).save(tmp_path / kind, kind)
        assert begins_like_an_image(str(tmp_path / kind))
    (tmp_path / "text").write_text("BUT NO IMAGE")
    assert not begins_like_an_image(str(tmp_path / "text"))
