"""Unreadable files are counted exactly; unusual but valid files are read."""
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_helpers import write_images

import eval_imagenet
import train_imagenet
from ls_vision.analysis import pictures
from ls_vision.data.images import StrictImageDataset, read_image


def bad_files(count: int):
    """Truncated JPEGs and PNGs, empty files, text and random bytes: (suffix, content) in turn."""
    rng = np.random.default_rng(0)
    encoded = {}
    for kind in ('jpeg', 'png'):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(file, kind)
        encoded[kind] = file.getvalue()
    kinds = [
        ('.jpg', lambda: encoded['jpeg'][:rng.integers(1, len(encoded['jpeg']) // 2)]),
        ('.png', lambda: encoded['png'][:rng.integers(1, len(encoded['png']) // 2)]),
        ('.jpg', lambda: b''),
        ('.png', lambda: b'This is a text, not an image.\n' * 20),
        ('.jpeg', lambda: rng.bytes(2000)),
    ]
    for i in range(count):
        suffix, content = kinds[i % len(kinds)]
        yield suffix, content()


def odd_images() -> dict[str, bytes]:
    """Valid images of unusual kinds, by file name."""
    rng = np.random.default_rng(1)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))

    def encode(image: Image.Image, kind: str, **options) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    palette = rgb.quantize(16)
    return {
        'one_pixel.png': encode(rgb.resize((1, 1)), 'png'),
        'cmyk.jpg': encode(rgb.convert('CMYK'), 'jpeg'),
        'sixteen_bits.png': encode(Image.fromarray(rng.integers(0, 65536, (40, 30), dtype=np.uint16)), 'png'),
        'palette_with_alpha.png': encode(palette, 'png', transparency=bytes(range(16))),
        'animated.png': encode(rgb, 'png', save_all=True, append_images=[rgb.rotate(90), rgb.rotate(180)]),
        'png_named.jpg': encode(rgb, 'png'),
        'exif_rotated.jpg': encode(rgb, 'jpeg', exif=exif),
        'grey_with_alpha.png': encode(rgb.convert('LA'), 'png'),
    }


@pytest.fixture
def damaged_folder(tmp_path: Path) -> Path:
    """400 good and 200 bad training images, 8 odd ones; 100 good and 50 bad test images."""
    root = tmp_path / 'damaged'
    write_images(root / 'train', 200)
    write_images(root / 'val', 50, seed=1)
    for split, count in (('train', 200), ('val', 50)):
        for i, (suffix, content) in enumerate(bad_files(count)):
            (root / split / ('dark', 'light')[i % 2] / f'bad{i}{suffix}').write_bytes(content)
    for name, content in odd_images().items():
        (root / 'train' / 'dark' / name).write_bytes(content)
    return root


@pytest.mark.parametrize('workers', ['0', '2'])
def test_exact_counts_in_training_and_evaluation(config, damaged_folder, workers, capsys):
    options = ['--config', str(config), '--data-dir', str(damaged_folder), '--batch-size', '16', '--workers', workers,
               '--max-unreadable', '.5', '--epochs', '2']
    result = train_imagenet.main(options)
    out = capsys.readouterr().out
    assert ', 200 training images unreadable, test loss' in out
    assert ', 50 test images unreadable, counted as wrong' in out
    epochs = [json.loads(line) for line in (result['output'] / 'metrics.jsonl').read_text().splitlines()]
    assert [epoch['train_unreadable'] for epoch in epochs if 'train_loss' in epoch] == [200, 200]
    assert (result['images'], result['unreadable']) == (150, 50)
    assert result['top1'] <= 100 * 100 / 150

    evaluated = eval_imagenet.main([
        '--model', 'vil_ls_tiny', '--model-kwargs', 'img_size=32', 'patch_size=4', 'embed_dims=(8,16,16,16)',
        'num_heads=(1,2,2,2)', 'depths=(1,1,1,1)', 'window_size=2', 'rank=3', '--num-classes', '2', '--img-size', '32',
        '--checkpoint', str(result['output'] / 'last.pth.tar'), '--data-dir', str(damaged_folder), '--device', 'cpu',
        '--workers', workers])
    assert (evaluated['images'], evaluated['unreadable'], evaluated['top1']) == (150, 50, result['top1'])


def test_too_many_end_the_run(config, damaged_folder):
    with pytest.raises(SystemExit, match=r'of 608 training images cannot be read, more than --max-unreadable 0\.01 .*'
                       r'e\.g\. .*bad\d+\.\w+: cannot be read as an image: '):
        train_imagenet.main(['--config', str(config), '--data-dir', str(damaged_folder)])


@pytest.mark.parametrize('name', sorted(odd_images()))
def test_odd_image_is_read(tmp_path, name):
    (tmp_path / name).write_bytes(odd_images()[name])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Pillow's, about palettes
        image = read_image(tmp_path / name)
    assert image.mode == 'RGB' and image.size in ((30, 40), (1, 1))


def test_sixteen_bits_are_scaled(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(tmp_path / 'deep.png')
    assert np.asarray(read_image(tmp_path / 'deep.png'))[0, :, 0].tolist() == [0, 100, 255]


def test_evaluation_never_shows_a_neighbour(tmp_path):
    import timm

    write_images(tmp_path / 'data', 2)
    (tmp_path / 'data' / 'dark' / '0.png').write_bytes(b'')
    dataset = StrictImageDataset(timm.data.create_dataset('', str(tmp_path / 'data')), replace=False)
    image, target = dataset[0]
    assert np.asarray(image).max() == 0 and target == -1
    assert dataset.num_unreadable == 1
    dataset.transform = np.array
    assert 0 < len(pictures.pick_samples(dataset, 24, seed=0)) == len(dataset) - 1  # drawn pictures neither
    replacing = StrictImageDataset(timm.data.create_dataset('', str(tmp_path / 'data')), replace=True)
    assert np.array_equal(np.asarray(replacing[0][0]), np.asarray(dataset[1][0])) and replacing[0][1] == 0


def test_nothing_can_be_read(tmp_path):
    import timm

    write_images(tmp_path / 'data', 1)
    for path in (tmp_path / 'data').rglob('*.png'):
        path.write_bytes(b'')
    dataset = StrictImageDataset(timm.data.create_dataset('', str(tmp_path / 'data')), replace=True)
    with pytest.raises(RuntimeError, match='none of the 2 images can be read'):
        dataset[0]
