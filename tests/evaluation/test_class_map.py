"""Folders are matched with the model's classes by name; where that is impossible, evaluation is refused."""
import pytest
from timm.data import ImageNetInfo

from ls_vision.evaluation.imagenet import class_map
from ls_vision.runtime.errors import UserError

SYNSETS = ImageNetInfo().label_names()


@pytest.mark.parametrize(('folders', 'names', 'expected'), [
    (['1', '3'], ['1', '2', '3'], {'1': 0, '3': 2}),  # not the classes 1 and 3
    (['2'], ['cat', '2'], {'2': 1}),
    (['dog'], ['cat', 'dog'], {'dog': 1}),
    (['a', 'b'], None, {'a': 0, 'b': 1}),
    (['1', '2'], None, {'1': 0, '2': 1}),
])
def test_classes_by_name(folders, names, expected):
    assert class_map(folders, len(names or folders), class_names=names) == expected


@pytest.mark.parametrize('names', [None, SYNSETS])
def test_folders_of_imagenet(names):
    assert class_map([SYNSETS[7]], 1000, class_names=names) == {SYNSETS[7]: 7}
    assert class_map(['7', '900'], 1000, class_names=names) == {'7': 7, '900': 900}


@pytest.mark.parametrize(('folders', 'number', 'names', 'message'), [
    (['1', '3'], 3, None, 'which the checkpoint does not name'),
    (['cat', 'bird'], 2, ['cat', 'dog'], r"1 of 2 class folders, e\.g\. \['bird'\], are not among the 2 classes"),
    (['0', '1'], 2, ['cat', 'dog'], 'are not among the 2 classes of the checkpoint'),
    (['7'], 1000, [f'c{i}' for i in range(1000)], 'not among the 1000 classes of the checkpoint'),
])
def test_folders_of_other_classes(folders, number, names, message):
    with pytest.raises(UserError, match=message):
        class_map(folders, number, class_names=names)
