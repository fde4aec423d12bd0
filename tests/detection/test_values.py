"""Values of annotation files as many tools write them: read where their meaning is clear, otherwise a problem."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from detection_helpers import voc_xml, write_coco
from PIL import Image

from ls_vision.detection import read_annotations
from ls_vision.detection.datasets import read_masks
from ls_vision.detection.pictures import picture_names
from ls_vision.detection.segmentations import check_segmentation
from ls_vision.detection.values import BadValue, clip_box, flag, number, whole
from ls_vision.runtime.errors import UserError

HUGE = 10 ** 400


@pytest.mark.parametrize(('value', 'expected'), [
    ('0', False), (' 1 ', True), ('True', True), ('false', False), (1.0, True), ('1.0', True), ('', False),
    (None, False), (False, False), ('Unspecified', False), (0, False),
])
def test_flags(value, expected):
    assert flag(value, 'iscrowd') is expected


@pytest.mark.parametrize('value', [2, -1, 'maybe', float('nan'), [1], {}, '01x'])
def test_other_flags_are_refused(value):
    with pytest.raises(BadValue, match=r'iscrowd .* is neither 0 nor 1'):
        flag(value, 'iscrowd')


@pytest.mark.parametrize('value', [
    'text', [1], {}, None, True, 'nan', 'inf', '1_0', '12,5', '\N{ARABIC-INDIC DIGIT ONE}', float('nan'), -float('inf'),
    HUGE, '1' * 400,
])
def test_what_is_no_number(value):
    with pytest.raises(BadValue, match=r'area .* is not (a number|finite)') as error:
        number(value, 'area')
    assert len(str(error.value)) < 120


def test_whole_numbers():
    assert [whole(value, 'id') for value in (7, 7.0, '7', ' 7.0 ', str(2 ** 62 + 1), -3)] == [
        7, 7, 7, 7, 2 ** 62 + 1, -3]
    for value in (7.5, 'x', True, HUGE, 2 ** 63, None, '7.5'):
        with pytest.raises(BadValue, match=r'id .* is '):
            whole(value, 'id')


def test_boxes_are_clipped_before_their_area_is_tested():
    assert clip_box([-1, 0, 10, 31], 40, 30).tolist() == [0, 0, 10, 30]
    for box in ([-1, 3, 0, 9], [40, 3, 41, 9], [3, 30, 9, 30.5], [1e4, 0, 1e4 + 1e-5, 5], [5, 5, 5, 9]):
        with pytest.raises(BadValue, match='zero'):
            clip_box(box, 100_000 if box[0] > 1e3 else 40, 30)
    with pytest.raises(BadValue, match='not finite'):
        clip_box([1e308, 0, 2e308, 5], 40, 30)


@pytest.fixture
def read_coco(tmp_path):
    """Reads one image and three objects after a change of the content; returns the annotations."""
    def read(change=lambda _: None, encode=lambda content: json.dumps(content).encode(), name='a.json', **options):
        path = write_coco(tmp_path, 1)
        content = json.loads(path.read_text())
        change(content)
        (tmp_path / name).write_bytes(encode(content))
        return read_annotations(str(tmp_path / name), skip_bad=True, **options)

    return read


def of_first(kind='annotations', **values):
    return lambda content: content[kind][0].update(values)


@pytest.mark.parametrize(('change', 'message'), [
    (of_first(iscrowd=2), 'iscrowd 2 is neither 0 nor 1'),
    (of_first(area='text'), "area 'text' is not a number"),
    (of_first(area=[4]), r'area \[4\] is not a number'),
    (of_first(area=float('nan')), 'area nan is not finite'),
    (of_first(area=-5), 'area -5 is negative'),
    (of_first(area=HUGE), 'area 1000.* is not finite'),
    (of_first(bbox=[HUGE, 1, 2, 3]), 'bbox: 1000.* is not finite'),
    (of_first(bbox=[1, 1, True, 3]), 'bbox: True is not a number'),
    (of_first(bbox='1 2 3 4'), 'bbox .* is not four numbers'),
    (of_first(bbox=[-1, 3, 1, 10]), 'zero area within the image'),
    (of_first(category_id=[3]), 'category_id .* is not a number'),
    (of_first(segmentation=[['a'] * 6]), 'is not made of numbers'),
    (of_first(segmentation=[[float('nan')] * 6]), 'finite numbers'),
    (of_first(segmentation=[[HUGE] * 6]), 'is not made of numbers'),
    (of_first(segmentation=[[0, 0, 1e12, 0, 5, 5]]), 'reaches outside the image of 96 x 64'),
    (of_first(segmentation=[[[1, 2], [3, 4], [5, 6]] * 2]), 'is not made of'),
    (of_first(segmentation=dict(size=[96, 64], counts=[0, 96 * 64])), r'size \[96, 64\] .* the image is \[64, 96\]'),
    (of_first(segmentation=dict(size=[64, 96], counts=[5, 5])), 'add up to 10 pixels'),
    (of_first(segmentation=dict(size=[64, 96], counts=[-1, 64 * 96 + 1])), 'a run length is negative'),
    (of_first(segmentation=dict(size=[64, 96], counts=[64 * 96])), 'its mask is empty'),
    (of_first(segmentation=dict(size=[64, 96], counts='\x01zz')), 'is not a text of run lengths'),
    (of_first(segmentation=dict(size=[64, 96], counts='o')), 'ends within a run length'),
    (of_first(segmentation=dict(size=[64, 96], counts=None)), '`counts` None is neither'),
    (of_first(segmentation=dict(counts=[5])), 'need a `size` of height and width'),
    (of_first(segmentation='text'), "segmentation 'text' is neither"),
])
def test_a_bad_value_is_a_problem_of_its_record(read_coco, change, message):
    annotations = read_coco(change)
    assert annotations.num_objects == 2
    problem, = map(str, annotations.problems)
    assert 'annotations[0] (id 1)' in problem and len(problem) < 600
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(problem)


ODD = (
    None, True, -1, 0, 2 ** 70, HUGE, 1.5, float('nan'), float('inf'), '', ' ', 'x', '\0', '\ud800', '1', 'x' * 5000,
    [], [[]], [None], ['x'] * 4, [HUGE] * 4, {}, dict(size=[None, 'x'], counts={}),
    dict(size=[64, 96], counts='~' * 99))


@pytest.mark.parametrize('kind', ['images', 'categories', 'annotations'])
def test_no_value_of_any_kind_ends_in_a_traceback(tmp_path, kind):
    path = write_coco(tmp_path, 1)
    content = json.loads(path.read_text())
    for key in (*content[kind][0], 'supercategory', 'iscrowd', None):
        for value in ODD:
            odd = {**content, kind: [value if key is None else {**content[kind][0], key: value}, *content[kind][1:]]}
            path.write_text(json.dumps(odd))
            try:
                read_annotations(str(path), with_masks=True)
            except UserError as e:
                assert len(str(e)) < 5000
                str(e).encode()  # any terminal can print it


@pytest.mark.parametrize(('values', 'message'), [
    (dict(file_name='x' * 5000), 'x is missing'),
    (dict(file_name='a\0b.png'), r'a\\x00b.png is missing'),
    (dict(file_name='\ud800.png'), r'\\ud800.png is missing'),
    (dict(file_name=5), 'file_name 5 is not a text'),
    (dict(width=HUGE), 'width 1000.* too large'),
    (dict(width='nan'), "width 'nan' is not a number"),
    (dict(height=64.5), 'height 64.5 is not a whole number'),
])
def test_a_bad_value_of_an_image(read_coco, values, message):
    with pytest.raises(UserError, match=rf'images\[0\] \(id 10\): .*{message}') as error:
        read_coco(of_first('images', **values))
    assert len(str(error.value)) < 1000
    str(error.value).encode()  # any terminal can print it


def as_floats(content):
    for kind in content.values():
        for record in kind:
            record.update({key: float(value) for key, value in record.items() if isinstance(value, int)})


@pytest.mark.parametrize('change', [
    lambda content: None, as_floats,
    lambda content: [record.update(image_id='10', iscrowd='0', area=str(record['area'])) for record in
                     content['annotations']],
    of_first('images', file_name=' 0.png\n'),
])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le'])
def test_what_other_tools_write_is_read(read_coco, change, encoding):
    annotations = read_coco(change, lambda content: json.dumps(content).encode(encoding), 'a.JSON')
    assert annotations.problems == [] and annotations.num_objects == 3 and annotations.num_crowds == 0


def test_names_of_other_systems(tmp_path):
    path = write_coco(tmp_path, 1)
    (tmp_path / 'sub').mkdir()
    (tmp_path / '0.png').rename(tmp_path / 'sub' / 'e\u0301.png')
    path.write_text(path.read_text().replace('0.png', r'sub\\\u00e9.png'))
    assert read_annotations(str(path)).images[0].path == tmp_path / 'sub' / 'e\u0301.png'


@pytest.mark.parametrize(('encode', 'message'), [
    (lambda content: b'{"images": ' + b'[' * 100_000, 'nested too deeply'),
    (lambda content: json.dumps(content, ensure_ascii=False).replace('bar', '日').encode('gbk'), 'is not UTF-8,'),
])
def test_files_that_cannot_be_read(read_coco, encode, message):
    with pytest.raises(UserError, match=message):
        read_coco(encode=encode)


def test_a_number_of_thousands_of_digits_spoils_only_its_record(read_coco):
    annotations = read_coco(of_first(area=0), lambda content: json.dumps(content).replace(
        '"area": 0', f'"area": {"1" * 5000}', 1).encode())
    assert annotations.num_objects == 2 and 'annotations[0] (id 1): area inf' in str(annotations.problems[0])


def test_a_category_that_only_groups_the_others_is_no_class(read_coco):
    def add_root(content):
        for category in content['categories']:
            category['supercategory'] = 'shapes'
        content['categories'].insert(0, dict(id=0, name='shapes', supercategory='none'))

    annotations = read_coco(add_root)
    assert annotations.class_names == ['square', 'bar'] and "'shapes', only groups others" in annotations.notes[0]
    # one with an object is a class, and so is one that groups none but itself, as COCO's person
    assert read_coco(lambda c: (add_root(c), c['annotations'][0].update(category_id=0))).class_names[0] == 'shapes'
    own = read_coco(lambda c: c['categories'].append(dict(id=9, name='person', supercategory='person')))
    assert own.class_names == ['square', 'bar', 'person']


def test_masks_of_crowds_and_of_objects_without_any(read_coco):
    def crowd(content):
        content['annotations'][0].update(iscrowd=1, segmentation=[])

    image, = read_coco(crowd, with_masks=True).images
    assert image.crowd.tolist() == [True, False, False]
    assert read_masks(image)[0].sum() == 18 * 18  # the box stands for it
    annotations = read_coco(of_first(segmentation=None), with_masks=True)
    assert annotations.num_objects == 2
    assert 'has no segmentation, which Mask R-CNN needs' in str(annotations.problems[0])
    assert read_coco(of_first(segmentation=None)).num_objects == 3


def test_run_lengths_of_other_tools():
    from faster_coco_eval.core import mask as coco_mask

    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[5:40, 7:50] = mask[50:, 60:] = 1
    found = coco_mask.encode(np.asfortranarray(mask))
    compressed = dict(size=found['size'], counts=found['counts'].decode())
    assert check_segmentation(compressed, 96, 64) == dict(size=[64, 96], counts=compressed['counts'])
    for end in ('', '1'):
        with pytest.raises(BadValue, match='add up to'):
            check_segmentation(dict(compressed, counts=compressed['counts'][:-1] + end), 96, 64)
    with pytest.raises(BadValue, match=r'the image is \[96, 64\]'):
        check_segmentation(compressed, 64, 96)


@pytest.fixture
def read_voc(tmp_path):
    """Reads one file of two objects after a change of its text."""
    def read(change, name='a.xml'):
        Image.new('RGB', (40, 30)).save(tmp_path / 'a.png')
        found = change(voc_xml('a.png', (40, 30), [('dog', (1, 1, 40, 30)), ('cat', (5, 5, 9, 9))]))
        (tmp_path / name).write_bytes(found if isinstance(found, bytes) else found.encode())
        return read_annotations(str(tmp_path), skip_bad=True)

    return read


@pytest.mark.parametrize(('value', 'difficult'), [(' 1 ', True), ('True', True), ('0', False), ('\n0\n', False)])
def test_difficult(read_voc, value, difficult):
    annotations = read_voc(lambda text: text.replace('cat</name>', f'cat</name><difficult>{value}</difficult>'))
    assert annotations.images[0].crowd.tolist() == [False, difficult]


@pytest.mark.parametrize(('old', 'new', 'message'), [
    ('<width>40', '<width>nan', "width 'nan' is not a number"),
    ('<width>40', f'<width>{"9" * 400}', 'width .* is not finite'),
    ('a.png', 'x' * 5000, 'is missing'),
    ('a.png', '  ', 'is not a text'),
])
def test_bad_value_of_a_voc_image(read_voc, old, new, message):
    with pytest.raises(UserError, match=rf'a\.xml: .*{message}'):
        read_voc(lambda text: text.replace(old, new))


@pytest.mark.parametrize(('old', 'new', 'message'), [
    ('<xmin>5', '<xmin>1e999', 'xmin .* is not finite'),
    ('<xmin>5', '<xmin>0_5', "xmin '0_5' is not a number"),
    ('<ymax>9', '<ymax>', "ymax '' is not a number"),
    ('cat</name>', 'cat</name><difficult>maybe</difficult>', "`difficult` 'maybe' is neither 0 nor 1"),
])
def test_bad_value_of_a_voc_object(read_voc, old, new, message):
    annotations = read_voc(lambda text: text.replace(old, new))
    assert annotations.num_objects == 1
    with pytest.raises(AssertionError, match=f'object 2: .*{message}'):
        raise AssertionError(str(annotations.problems[0]))


def test_no_text_of_any_element_ends_in_a_traceback(tmp_path):
    Image.new('RGB', (40, 30)).save(tmp_path / 'a.png')
    for place in ('a.png<', '40<', '30<', 'dog<', '>1<', '>39<', '0</d'):
        for value in (
                '', ' ', 'x', '-1', '0', '1e999', 'nan', '9' * 400, 'x' * 5000, '<b>1</b>', '..', '/', '1_0', '\u0661'):
            text = voc_xml('a.png', (40, 30), [('dog', (1, 2, 39, 29))]).replace(
                '</object>', '<difficult>0</difficult></object>')
            text = text.replace(place, place.replace(place.strip('></d'), value), 1)
            (tmp_path / 'a.xml').write_text(text)
            try:
                read_annotations(str(tmp_path / 'a.xml'))
            except UserError as e:
                assert len(str(e)) < 2000


@pytest.mark.parametrize(('declared', 'encoding'), [
    ('gb2312', 'gbk'), ('GBK', 'gbk'), ('Shift_JIS', 'shift_jis'), ('big5', 'big5'), ('euc-jp', 'euc-jp'),
    ('windows-1251', None), ('utf-16', 'utf-16'), ('utf-16', 'utf-8'), ('utf-8', 'utf-8-sig'), ('utf-16', 'utf-16-be'),
])
def test_xml_of_any_encoding(read_voc, declared, encoding):
    name = '日本' if encoding else 'кот'
    text = '<?xml version="1.0" encoding="{}"?>{}'
    annotations = read_voc(lambda body: text.format(declared, body.replace('cat', name)).encode(encoding or declared))
    assert annotations.class_names == ['dog', name]


@pytest.mark.parametrize(('declared', 'message'), [
    ('klingon', "declares the encoding 'klingon', which is not known"),
    ('hex', "declares the encoding 'hex', which is not known"),
    ('ascii', "its text is not of the encoding 'ascii'"),
])
def test_xml_of_no_encoding(read_voc, declared, message):
    with pytest.raises(UserError, match=message):
        read_voc(lambda text: f'<?xml version="1.0" encoding="{declared}"?>{text.replace("cat", "日")}'.encode())


def test_files_beside(read_voc, tmp_path):
    (tmp_path / '._a.XML').write_bytes(b'\0\5\x16\7')
    annotations = read_voc(lambda text: text.replace('a.png', '\n a.png '), 'a.XML')
    assert annotations.problems == [] and annotations.num_objects == 2


def test_one_name_in_two_unicode_forms_is_one_class(read_voc):
    annotations = read_voc(lambda text: text.replace('cat', 'e\u0301').replace('dog', '\u00e9'))
    assert annotations.class_names == ['\u00e9']


def test_annotations_of_another_kind(tmp_path):
    path = write_coco(tmp_path)
    with pytest.raises(UserError, match=r'holds no VOC \.xml files; its COCO files: annotations\.json'):
        read_annotations(str(tmp_path))
    with pytest.raises(UserError, match=r'expected a COCO \.json file'):
        read_annotations(str(path.with_name('0.png')))
    (tmp_path / 'a.xml').write_text(voc_xml('0.png', (96, 64), []))
    with pytest.raises(UserError, match='Pascal VOC has no masks'):
        read_annotations(str(tmp_path), with_masks=True)


def test_pictures_of_one_name_do_not_overwrite_each_other():
    images = [SimpleNamespace(path=Path(path), image_id=i) for i, path in enumerate(('a/1.png', 'b/1.JPG', 'c/2.png'))]
    assert picture_names(images) == ['1-0.png', '1-1.png', '2.png']
