"""One reader for every picture: bits, bands, orientation and size are handled by rules, never dropped silently."""
import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from ls_vision.analysis.attention_sheet import load_image
from ls_vision.data.images import ImageError, check_header, map_pixels, read_image
from ls_vision.detection import AnnotationError, read_annotations
from ls_vision.detection.datasets import read_pixels
from ls_vision.runtime.errors import UserError

GREY = np.full((32, 64), 32768, np.uint16)


@pytest.fixture
def write(tmp_path):
    """Writes an array as TIFF."""
    def write_tiff(pixels, name='a.tif', **options):
        tifffile.imwrite(tmp_path / name, pixels, **options)
        return tmp_path / name

    return write_tiff


@pytest.mark.parametrize(('pixels', 'options', 'expected'), [
    (GREY, {}, 128), (GREY, dict(byteorder='>'), 128), (np.dstack([GREY] * 3), dict(photometric='rgb'), 128),
    (GREY.astype(np.int32), {}, 128), (GREY.astype(np.int32) // 2, {}, 64),
    (np.full((32, 64), .5, np.float32), {}, 128), (np.ones((32, 64), np.float32), {}, 255),
])
def test_one_brightness_in_classification_detection_and_attention(write, pixels, options, expected):
    path = write(pixels, **options)
    for found in (np.asarray(read_image(path)), read_pixels(path, (64, 32)), load_image(path, (32, 64), 32)):
        assert found.min() == found.max() == expected


def test_16_bits_in_png(tmp_path):
    Image.fromarray(GREY).save(tmp_path / 'a.png')
    assert np.asarray(read_image(tmp_path / 'a.png')).max() == 128


@pytest.mark.parametrize(('pixels', 'options', 'message'), [
    (GREY.astype(np.int32) - 40_000, {}, 'whole numbers go from -7232 to -7232; accepted are 0 to 65535'),
    (GREY.astype(np.int32) * 2, {}, 'whole numbers go from 65536 to 65536; accepted are 0 to 65535'),
    (np.full((32, 64), 300, np.float32), {}, 'floats go from 300 to 300; accepted are 0 to 1'),
    (np.full((32, 64), np.nan, np.float32), {}, 'floats go from nan'),
    (np.full((32, 64, 3), .5, np.float32), dict(photometric='rgb'), 'has 3 bands of 32 bits'),
    (np.zeros((32, 64, 4), np.uint8), dict(photometric='rgb', extrasamples=['unspecified']), 'has 4 bands; one'),
    (np.zeros((32, 64, 5), np.uint8), dict(photometric='rgb', extrasamples=['unspecified'] * 2), 'has 5 bands; one'),
    (np.zeros((32, 64, 2), np.uint8), dict(extrasamples=['unspecified'], planarconfig='contig'), 'has 2 bands; one'),
    (np.zeros((32, 64, 8), np.uint8), dict(photometric='minisblack', planarconfig='contig'), 'has 8 bands of 8 bits'),
    (np.zeros((4, 32, 64), np.uint8), dict(photometric='minisblack', planarconfig='separate'), 'has 4 bands of 8'),
])
def test_what_is_refused_by_all_three(write, pixels, options, message):
    path = write(pixels, **options)
    for read in (read_image, read_pixels, lambda path: load_image(path, (32, 64), 32)):
        with pytest.raises((ImageError, UserError), match=message):
            read(path)


def test_transparency_is_dropped(write):
    pixels = np.full((32, 64, 4), 90, np.uint8)
    for options in (dict(photometric='rgb', extrasamples=['unassalpha']), dict(photometric='separated')):
        assert read_image(write(pixels, **options)).mode == 'RGB'


def test_12_bits_in_16_are_pointed_out(write):
    with pytest.warns(UserWarning, match='no value above 2048: if it holds 12 bits, multiply them by 16'):
        assert np.asarray(read_image(write(GREY // 16))).max() == 8


def write_turned(path, orientation, size=(40, 24)):
    """A black image whose upper left corner, as stored, is white."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, quality=100)
    return path


# The corner of the shown image at which the stored upper left one lies: rows, columns.
CORNERS = {5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp'])
@pytest.mark.parametrize('orientation', [5, 6, 7, 8])
def test_the_annotation_tells_whether_exif_was_applied(tmp_path, suffix, orientation):
    path = write_turned(tmp_path / f'a.{suffix}', orientation)
    stored, turned = (np.asarray(read_image(path, size=size)) for size in ((40, 24), (24, 40)))
    assert stored.shape == (24, 40, 3) and stored[0, 0].min() > 200
    assert turned.shape == (40, 24, 3) and turned[CORNERS[orientation]].min() > 200
    assert read_image(path).size == (40, 24)  # classification, as timm
    with pytest.raises(ImageError, match=rf'is 40 x 24 \(EXIF orientation {orientation}\), its annotation says 9 x 9'):
        check_header(path, (9, 9))


@pytest.mark.parametrize(('orientation', 'size'), [(2, (40, 24)), (3, (40, 24)), (4, (40, 24)), (6, (24, 24))])
def test_exif_that_the_size_does_not_tell_is_refused(tmp_path, orientation, size):
    path = write_turned(tmp_path / 'a.jpg', orientation, size)
    for read in (lambda: check_header(path, size), lambda: read_image(path, size=size)):
        with pytest.raises(ImageError, match=f'has the EXIF orientation {orientation}, and its size does not tell'):
            read()


@pytest.mark.parametrize('orientation', [3, 6])
def test_orientation_behind_the_pixels_of_a_png(tmp_path, orientation):
    """As some tools write it. Decoding tells, the header alone does not."""
    path = write_turned(tmp_path / 'a.png', orientation)
    content = path.read_bytes()
    start, end = content.index(b'eXIf') - 4, content.index(b'IEND') - 4
    size = 12 + int.from_bytes(content[start:start + 4], 'big')
    path.write_bytes(content[:start] + content[start + size:end] + content[start:start + size] + content[end:])
    check_header(path, (40, 24))
    if orientation == 6:
        check_header(path, (24, 40))
        assert read_image(path, size=(24, 40)).size == (24, 40)
    else:
        with pytest.raises(ImageError, match='has the EXIF orientation 3'):
            read_image(path, size=(40, 24))


@pytest.mark.parametrize('orientation', [1, 0, 9])
def test_upright_exif(tmp_path, orientation):
    assert read_image(write_turned(tmp_path / 'a.jpg', orientation), size=(40, 24)).size == (40, 24)


def test_orientation_of_tiff(write):
    turned = write(np.zeros((24, 40, 3), np.uint8), extratags=[(274, 'H', 1, 6, True)])
    assert read_image(turned, size=(24, 40)).size == (24, 40)
    with pytest.raises(ImageError, match=r'has the orientation 6 \(EXIF\).* as it is stored, which is not read'):
        check_header(turned, (40, 24))
    with pytest.raises(ImageError, match='has the EXIF orientation 3'):
        check_header(write(np.zeros((24, 40, 3), np.uint8), extratags=[(274, 'H', 1, 3, True)]), (40, 24))


@pytest.fixture
def big(tmp_path, monkeypatch):
    """The annotations of an image of more than twice the pixels at which Pillow warns, which it refuses."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 89_478)  # a thousandth of Pillow's own
    Image.new('1', (2000, 100)).save(tmp_path / 'big.png')
    content = dict(
        images=[dict(id=1, file_name='big.png', width=2000, height=100)], categories=[dict(id=1, name='a')],
        annotations=[dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 5, 5])])
    (tmp_path / 'a.json').write_text(json.dumps(content))
    return tmp_path / 'a.json'


def test_the_annotation_vouches_for_a_large_image(big):
    image, = read_annotations(str(big)).images
    assert read_pixels(image.path, (image.width, image.height)).shape == (3, 100, 2000)
    big.write_text(big.read_text().replace('2000', '1999'))
    with pytest.raises(AnnotationError, match='is 2000 x 100, its annotation says 1999 x 100'):
        read_annotations(str(big))
    big.write_text(big.read_text().replace('1999', '99'))
    with pytest.raises(AnnotationError, match=r'could be decompression bomb .* LS_VISION_MAX_PIXELS'):
        read_annotations(str(big))
    assert Image.MAX_IMAGE_PIXELS == 89_478


def test_crops_of_uncompressed_tiff_need_not_decode_the_whole(write):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    for options in ({}, dict(rowsperstrip=7), dict(byteorder='>')):
        path = write(pixels, photometric='rgb', **options)
        assert isinstance(map_pixels(path, (300, 200)), np.memmap)
        assert np.array_equal(read_pixels.__wrapped__(path, (300, 200)).permute(1, 2, 0), pixels)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ImageError, match='cannot be read as an image'):
        map_pixels(path)


@pytest.mark.parametrize('options', [
    dict(compression='zlib'), dict(tile=(64, 64)), dict(planarconfig='separate'),
    dict(extratags=[(274, 'H', 1, 3, True)])])
def test_other_tiff_is_decoded(write, options):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    stored = pixels.transpose(2, 0, 1) if 'planarconfig' in options else pixels
    path = write(stored, photometric='rgb', **options)
    assert map_pixels(path) is None
    expected = pixels[::-1, ::-1] if 'extratags' in options else pixels
    assert np.array_equal(read_pixels(path).permute(1, 2, 0), expected)
    assert map_pixels(write(pixels[..., 0], 'grey.tif')) is None


def test_an_option_lifts_the_limit(tmp_path, monkeypatch):
    Image.new('1', (300, 200)).save(tmp_path / 'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10_000)
    with pytest.raises(ImageError, match='Set the environment variable LS_VISION_MAX_PIXELS'):
        read_image(tmp_path / 'a.png')
    monkeypatch.setenv('LS_VISION_MAX_PIXELS', '60000')
    image = read_image(tmp_path / 'a.png')
    assert image.crop((1, 1, 300, 200)).size == (299, 199)  # as training does, which Pillow checks too
    monkeypatch.setenv('LS_VISION_MAX_PIXELS', '59999')
    with pytest.raises(ImageError, match='has 60000 pixels, more than LS_VISION_MAX_PIXELS=59999'):
        read_image(tmp_path / 'a.png')
    monkeypatch.setenv('LS_VISION_MAX_PIXELS', 'many')
    with pytest.raises(ImageError, match="LS_VISION_MAX_PIXELS='many' is not a number of pixels"):
        read_image(tmp_path / 'a.png')
