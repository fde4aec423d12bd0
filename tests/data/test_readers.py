"""The class of an image is its folder at the first level; nothing merges, vanishes or changes its number silently."""
import os
import pickle
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ls_vision.data.folders import check_class_map, is_split, read_class_map
from ls_vision.data.readers import FolderReader, natural_order, open_images
from ls_vision.runtime.errors import UserError


@pytest.fixture
def make(tmp_path):
    """Writes an image at each path below a folder, which it returns."""
    def write(*paths):
        root = tmp_path / 'data'
        root.mkdir(exist_ok=True)
        for i, path in enumerate(paths):
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (4, 4), (i, 0, 0)).save(tmp_path / 'one.png')
            file.write_bytes((tmp_path / 'one.png').read_bytes())
        return root

    return write


def tar(root, prefix=''):
    path = root.with_suffix('.tar')
    with tarfile.open(path, 'w') as archive:
        for file in sorted(p for p in root.rglob('*') if p.is_file()):
            archive.add(file, f'{prefix}{file.relative_to(root)}')
    return path


def content(dataset):
    """Red value of each image by its class."""
    names = {number: name for name, number in dataset.reader.class_to_idx.items()}
    found = {}
    for i in range(len(dataset)):
        file, target = dataset.reader[i]
        found.setdefault(names[target], set()).add(int(np.asarray(Image.open(file))[0, 0, 0]))
        file.close()
    return found


NESTED = ('cat/indoor/1.png', 'cat/outdoor/1.png', 'dog/indoor/1.png', 'dog/1.png', '.ipynb_checkpoints/1.png',
          'dog/.thumbs/1.png', 'dog/._1.png', '__MACOSX/1.png')


@pytest.mark.parametrize('prefix', [None, '', './', 'train/', './data/train/'])
def test_the_class_is_the_first_level(make, prefix):
    root = make(*NESTED)
    dataset = open_images(root if prefix is None else tar(root, prefix))
    assert dataset.reader.class_to_idx == {'cat': 0, 'dog': 1}
    assert content(dataset) == {'cat': {0, 1}, 'dog': {2, 3}}
    assert len({dataset.filename(i) for i in range(len(dataset))}) == 4
    dataset.reader.number({'dog': 0, 'cat': 5})
    assert sorted({dataset[i][1] for i in range(len(dataset))}) == [0, 5]
    assert content(dataset)['cat'] == {0, 1}


def test_archives_within_an_archive(make, tmp_path):
    root = make('a/1.png', 'b/2.png')
    for name in 'ab':
        with tarfile.open(tmp_path / f'{name}.tar', 'w') as archive:
            archive.add(next((root / name).iterdir()), '1.png')
    with tarfile.open(tmp_path / 'all.tar', 'w') as archive:
        for name in 'ab':
            archive.add(tmp_path / f'{name}.tar', f'{name}.tar')
    assert content(open_images(tmp_path / 'all.tar')) == {'a': {0}, 'b': {1}}


def test_order_is_that_of_timm(make):
    from timm.data import create_dataset

    root = make(*(f'{name}/{i}.png' for name in ('10', '9', 'B', 'a', 'c2', 'c10') for i in (10, 9, 1)))
    mine, theirs = open_images(root).reader, create_dataset('', str(root)).reader
    assert mine.class_to_idx == theirs.class_to_idx
    assert [(path, mine.class_to_idx[name]) for path, name in mine.samples] == theirs.samples


def test_names_that_differ_in_case_have_one_order():
    assert sorted(['b', 'A', 'a', 'B', '\N{SUPERSCRIPT TWO}'], key=natural_order) == ['A', 'a', 'B', 'b', '²']


@pytest.mark.parametrize(('paths', 'message'), [
    (('cat/1.png', '1.png'), r'data holds 1 images of no class, e\.g\. 1\.png'),
    (('cat/1.png', 'dog/1.heic', 'dog/2.psd'), r'class folder .*dog holds only images of types .*1 \.heic, 1 \.psd'),
    (('train/cat/1.png', 'train/dog/1.png'), "holds one class, 'train', with folders in it"),
    (('cat/readme.txt',), 'Found 0 images in subfolders'),
    (('e\u0301/1.png', '\u00e9/1.png'), "2 folders are called '\u00e9', in other bytes"),
])
def test_what_is_refused(make, paths, message):
    with pytest.raises(UserError, match=message):
        open_images(make(*paths))


@pytest.mark.parametrize(('paths', 'message'), [
    (('cat/1.png', '1.png'), 'every image must be in the folder of its class'),
    (('.cat/1.png',), 'every image must be in the folder of its class'),
    (('e\u0301/1.png', '\u00e9/1.png'), "2 folders are called '\u00e9'"),
])
def test_what_is_refused_in_an_archive(make, paths, message):
    with pytest.raises(UserError, match=message):
        open_images(tar(make(*paths)))


@pytest.mark.parametrize(('content', 'message'), [
    (b'no archive' * 100, 'cannot be read as a tar archive'), (bytes(10240), 'found 0 images')])
def test_archives_without_images(tmp_path, content, message):
    (tmp_path / 'a.zip').write_bytes(content)
    with pytest.raises(UserError, match=r'a\.zip: expected a folder or a \.tar archive'):
        open_images(tmp_path / 'a.zip')
    (tmp_path / 'a.tar').write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / 'a.tar')


def test_what_is_left_out_is_told(make):
    root = make('cat/1.webp', 'cat/2.bmp', 'cat/3.TIF', 'cat/4.heic', 'cat/5.xcf', 'cat/notes.txt', 'dog/1.gif')
    (root / 'bird').mkdir()
    reader = FolderReader(root)
    assert len(reader) == 4 and reader.class_to_idx == {'cat': 0, 'dog': 1}
    notes = '\n'.join(reader.notes)
    assert 'cat: left out 1 .heic, types that are not read' in notes and 'bird holds no image and is no class' in notes
    assert len(FolderReader(root, ['.gif', '.webp'])) == 2


def test_links_in_a_cycle(make):
    root = make('cat/1.png', 'dog/1.png')
    (root / 'cat' / 'again').symlink_to(root / 'cat', target_is_directory=True)
    (root / 'cat' / 'all').symlink_to(root, target_is_directory=True)
    (root / 'dog' / 'gone.png').symlink_to(root / 'nowhere.png')
    reader = FolderReader(root)
    assert [os.path.relpath(path, root) for path, name in reader.samples if name == 'cat'] == [
        'cat/1.png', 'cat/all/dog/1.png', 'cat/all/dog/gone.png']


def test_names_of_other_encodings(make):
    root = make('a/1.png', unicodedata.normalize('NFD', 'é') + '/1.png')
    os.rename(os.fsencode(root / 'a'), os.fsencode(root) + b'/caf\xe9')
    assert open_images(root).reader.class_to_idx == {'café': 0, 'é': 1}
    assert len(content(open_images(root))) == 2


def test_a_class_that_is_named_like_a_split(make):
    root = make('valid/1.png', 'invalid/1.png', 'val/cat/1.png', 'evaluation/cat/1.png')
    assert not is_split(root / 'valid', None) and is_split(root / 'val', None)
    assert not is_split(root / 'evaluation', ['evaluation', 'test']) and not is_split(root / 'nowhere', None)


@pytest.mark.parametrize('text', [
    b'dog\ncat\n', b'\xef\xbb\xbfdog\r\ncat\r\n\r\n', 'dog\ncat'.encode('utf-16'), b' dog \ncat\n \n'])
def test_class_map(tmp_path, text):
    (tmp_path / 'map.txt').write_bytes(text)
    assert read_class_map('map.txt', tmp_path) == {'dog': 0, 'cat': 1}
    assert read_class_map(str(tmp_path / 'map.txt'), Path('nowhere')) == {'dog': 0, 'cat': 1}


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('map.txt', b'dog\ncat\ndog\n', "line 3 is 'dog' as in line 1; each line must name another class"),
    ('map.txt', b'dog\n\ncat\n', 'line 2 is empty'),
    ('map.txt', b'\n', 'is empty'),
    ('map.txt', 'caf\u00e9'.encode('latin-1'), 'is not UTF-8 or UTF-16'),
    ('map.pkl', pickle.dumps(dict(dog=0, cat=2)), 'must have the numbers 0 to 1, each once'),
    ('map.pkl', pickle.dumps(os.getcwd), 'cannot be read: Global posix.getcwd is not permitted'),
    ('map.pkl', b'', 'cannot be read'),
    ('map.csv', b'dog', r'expected a \.txt file'),
])
def test_bad_class_map(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf'--class-map .*{name}.* {message}'):
        read_class_map(str(tmp_path / name), tmp_path)


def test_class_map_and_folders_must_agree(tmp_path):
    with pytest.raises(UserError, match=r"--class-map m lacks 1 of the class folders of d: 'dog'; did you mean 'dgo'"):
        check_class_map(dict(dgo=0, cat=1), ['cat', 'dog'], 'm', Path('d'))
    assert check_class_map(dict(dog=0, bird=1, cat=2), ['cat', 'dog'], 'm', Path('d')) == ['bird']
    with pytest.raises(UserError, match='does not exist'):
        read_class_map('nowhere.txt', tmp_path)
