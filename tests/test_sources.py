"""Files as people have them: every kind that Pillow opens is right, or refused by name; test files are made here."""

import io
import mimetypes

import numpy as np
import pytest
from fastcore.test import test_eq as eq, test_fail as fails
from PIL import Image

from aoe_nb.data import outliers
from aoe_nb.sources import fit, image_files, read_folder, read_images

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def reopened(im, kind, **kw):
    "The image after a trip through a file"
    f = io.BytesIO()
    im.save(f, kind, **kw)
    f.seek(0)
    return Image.open(f)


def grey(values, mode=None):
    return Image.fromarray(values) if mode is None else Image.fromarray(values).convert(mode)


# Bit depths

DEEP = {
    'PNG, 16 bits': (grey(RAMP.astype(np.uint16) * 257), 'PNG'),
    'TIFF, 16 bits': (grey(RAMP.astype(np.uint16) * 257), 'TIFF'),
    'PGM, 16 bits': (grey(RAMP.astype(np.uint16) * 257), 'PPM'),
    'TIFF, floating point': (grey(RAMP.astype(np.float32) / 255), 'TIFF'),
    'TIFF, a rounding error above 1': (grey(RAMP.astype(np.float32) / 254.99), 'TIFF'),
    'TIFF, 8 bits': (grey(RAMP), 'TIFF'),
    'WebP': (grey(RAMP, 'RGB'), 'WEBP'),
    'BMP': (grey(RAMP), 'BMP'),
    'TGA': (grey(RAMP), 'TGA'),
    'JPEG 2000': (grey(RAMP), 'JPEG2000'),
    'GIF': (grey(RAMP), 'GIF'),
    'DDS': (grey(RAMP, 'RGB'), 'DDS'),
}


@pytest.mark.parametrize('im,kind', DEEP.values(), ids=DEEP)
def test_a_ramp_is_a_ramp(im, kind):
    lossless = dict(lossless=True) if kind == 'WEBP' else {}
    eq(fit(reopened(im, kind, **lossless))[0], RAMP)


def test_one_bit():
    bits = Image.fromarray((RAMP > 99).astype(np.uint8) * 255).convert('1')
    eq(fit(reopened(bits, 'PNG')), ((RAMP > 99) * 255)[None])


@pytest.mark.parametrize(
    'values,why',
    [
        (RAMP.astype(np.float32), 'save them in'),
        (RAMP.astype(np.float32) / 255 * 1.02, 'save them in'),
        (np.full((4, 4), np.nan, np.float32), 'save them in'),
        (RAMP.astype(np.int32), 'of the kind I:'),
    ],
    ids=['0 to 255', 'beyond 1', 'nan', '32 bits'],
)
def test_values_without_a_range_are_refused(values, why):
    fails(lambda: fit(reopened(Image.fromarray(values), 'TIFF')), contains=why)


# Colours and transparency


def test_colours_of_print_come_out_as_pillow_converts_them():
    ink = Image.fromarray(NOISE).convert('CMYK')
    eq(fit(reopened(ink, 'TIFF')), np.asarray(ink.convert('RGB')).transpose(2, 0, 1))


def test_palette():
    few = Image.fromarray(NOISE).quantize(16)
    eq(fit(reopened(few, 'PNG')), np.asarray(few.convert('RGB')).transpose(2, 0, 1))


def on_white(colour, alpha):
    return np.round(255 + (np.array(colour) - 255.0) * alpha / 255)


@pytest.mark.parametrize('alpha', [0, 128, 255])
def test_what_is_transparent_lies_on_white(alpha):
    im = reopened(Image.new('RGBA', (4, 4), (10, 200, 30, alpha)), 'PNG')
    np.testing.assert_allclose(fit(im)[:, 0, 0], on_white((10, 200, 30), alpha), atol=1)
    im = reopened(Image.new('LA', (4, 4), (10, alpha)), 'PNG')
    eq(fit(im).shape, (1, 4, 4))
    np.testing.assert_allclose(fit(im)[0], on_white(10, alpha), atol=1)


def test_a_colour_that_stands_for_transparent_lies_on_white():
    eq(fit(reopened(Image.new('L', (2, 2), 5), 'PNG', transparency=5)), np.full((1, 2, 2), 255))
    eq(fit(reopened(Image.new('L', (2, 2), 6), 'PNG', transparency=5)), np.full((1, 2, 2), 6))
    eq(fit(reopened(Image.new('RGB', (2, 2), (5, 0, 0)), 'PNG', transparency=(5, 0, 0))), np.full((3, 2, 2), 255))
    palette = Image.new('P', (2, 2))
    palette.putpalette([10, 20, 30] * 256)
    for kind in 'PNG', 'GIF':
        eq(fit(reopened(palette, kind, transparency=0)), np.full((3, 2, 2), 255))
    deep = Image.fromarray(np.array([[5, 65535 * 2 // 5]], np.uint16))
    eq(fit(reopened(deep, 'PNG', transparency=5)), [[[255, 102]]])


# Orientation and frames


@pytest.mark.parametrize(
    'orientation,turned', [(3, np.rot90(NOISE, 2)), (6, np.rot90(NOISE, -1)), (8, np.rot90(NOISE))]
)
def test_images_are_upright(orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    eq(fit(reopened(Image.fromarray(NOISE), 'PNG', exif=exif)), turned.transpose(2, 0, 1))


@pytest.mark.parametrize('kind', ['GIF', 'TIFF', 'WEBP', 'PNG'])
def test_several_frames_are_refused(kind):
    frames = [Image.fromarray(NOISE), Image.fromarray(NOISE[::-1].copy()), Image.fromarray(255 - NOISE)]
    fails(lambda: fit(reopened(frames[0], kind, save_all=True, append_images=frames[1:])), contains='holds 3 frames')


def test_a_preview_is_no_second_frame():
    photo = reopened(
        Image.fromarray(NOISE), 'MPO', save_all=True, append_images=[Image.new('RGB', (4, 4))], quality=100
    )
    eq((photo.n_frames, fit(photo).shape), (2, (3, 16, 16)))


# Folders


def test_every_damaged_file_is_named(tmp_path):
    for i in range(9):
        Image.fromarray(NOISE).save(tmp_path / f'{i}.png')
    whole = (tmp_path / '0.png').read_bytes()
    for i in range(2, 9):
        (tmp_path / f'{i}.png').write_bytes(whole[: 100 + i])
    with pytest.raises(ValueError) as e:
        outliers(tmp_path)
    assert '7 of 9' in str(e.value) and 'and 2 more' in str(e.value)
    for i in range(2, 7):
        assert f'{i}.png' in str(e.value)


@pytest.mark.parametrize('name', ['a.heic', 'a.svg'])
def test_what_nobody_can_read_is_not_left_out_silently(name, tmp_path):
    Image.fromarray(NOISE).save(tmp_path / '0.png')
    (tmp_path / name).write_text('<svg/>')
    fails(lambda: outliers(tmp_path), contains=name)


def test_files_without_an_ending_are_looked_into(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / '0.png')
    (tmp_path / '0.png').rename(tmp_path / '0')
    (tmp_path / 'README').write_text('no image')
    eq(outliers(tmp_path).x[0].numpy(), NOISE.transpose(2, 0, 1))
    eq(outliers(tmp_path / '0').x.shape, (1, 3, 16, 16))
    (tmp_path / '1').write_bytes((tmp_path / '0').read_bytes()[:200])
    fails(lambda: outliers(tmp_path), contains='/1 (')


def test_a_link_that_leads_back_adds_nothing(tmp_path):
    (tmp_path / 'a').mkdir()
    Image.fromarray(NOISE).save(tmp_path / 'a/0.png')
    (tmp_path / 'a/loop').symlink_to(tmp_path)
    (tmp_path / 'b').symlink_to(tmp_path / 'a')  # another class of the same images
    eq(image_files(tmp_path), [tmp_path / 'a/0.png', tmp_path / 'b/0.png'])


@pytest.mark.parametrize('size', [(8, 8), 8.5, -1, '8'])
def test_a_size_is_the_side_of_a_square(size, tmp_path):
    Image.fromarray(NOISE).save(tmp_path / '0.png')
    fails(lambda: outliers(tmp_path, size=size), contains='side of a square')


def test_the_systems_table_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(mimetypes, 'types_map', {})
    names = ['0.png', '1.JPG', '2.webp', '3.tif', '4.bmp', '5.ppm', '6.jp2', '7.tga']
    for name in names:
        Image.fromarray(NOISE).save(tmp_path / name)
    for name in '.hidden.png', 'notes.txt', 'data.h5', 'film.mpg':
        (tmp_path / name).write_text('no picture')
    eq([o.name for o in image_files(tmp_path)], names)
    eq(len(outliers(tmp_path)), 8)


def test_a_class_is_a_folder_at_the_top(tmp_path):
    for file in 'cat/images/0.png', 'cat/left/1.png', 'dog/2.png', '3.png':
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(NOISE).save(tmp_path / file)
    _, y, classes = read_folder(tmp_path)
    eq([classes[i] for i in y], ['cat', 'cat', 'dog', tmp_path.name])


def test_grey_and_colour_come_together_and_sizes_do_not(tmp_path):
    x = read_images([Image.fromarray(RAMP), Image.fromarray(NOISE)])
    eq(x[0], np.stack([RAMP] * 3))
    fails(lambda: read_images([Image.fromarray(RAMP), Image.fromarray(RAMP[:8])]), contains='give a size')
