"""Readers give what the files say, and every bad record is reported."""
import json
import re

import pytest
from detection_helpers import voc_xml, write_coco
from PIL import Image

from ls_vision.detection import AnnotationError, read_annotations
from ls_vision.runtime.errors import UserError


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_coco(tmp_path):
    path = write_coco(tmp_path)
    annotations = read_annotations(str(path))
    assert annotations.class_names == ['square', 'bar']
    assert [image.image_id for image in annotations.images] == [10, 11]
    first = annotations.images[0]
    record = json.loads(path.read_text())['annotations'][1]
    left, top, width, height = record['bbox']
    assert first.boxes[1].tolist() == [left, top, left + width, top + height]
    assert first.labels.tolist() == [1, 2, 1]
    assert first.areas[1] == width * height
    assert first.segmentations[1] == record['segmentation']


def test_layout_of_coco_itself(tmp_path):
    path = write_coco(tmp_path / 'val2017')
    (tmp_path / 'annotations').mkdir()
    path = path.rename(tmp_path / 'annotations' / 'instances_val2017.json')
    assert len(read_annotations(str(path)).images) == 2


def test_photograph_in_voc(deepforest):
    annotations = read_annotations(str(deepforest / 'train'))
    assert annotations.class_names == ['Tree']
    assert annotations.num_objects == 574
    boxes = annotations.images[0].boxes
    # The outermost annotated pixels are the image's first and last.
    assert boxes.min() == 0 and boxes[:, 2].max() == 2299 and boxes[:, 3].max() == 2472
    assert read_annotations(str(deepforest / 'val')).num_objects == 279
    assert read_annotations(str(deepforest / 'transfer')).num_objects == 61


def test_layout_of_voc_itself_and_difficult_objects(tmp_path):
    for name in ('Annotations', 'JPEGImages'):
        (tmp_path / name).mkdir()
    Image.new('RGB', (40, 30)).save(tmp_path / 'JPEGImages' / 'a.jpg')
    text = voc_xml('a.jpg', (40, 30), [('dog', (1, 1, 40, 30)), ('cat', (5, 5, 9, 9))])
    text = text.replace('<name>cat</name>', '<name>cat</name><difficult>1</difficult>')
    (tmp_path / 'Annotations' / 'a.xml').write_text(text)
    annotations = read_annotations(str(tmp_path / 'Annotations'))
    assert annotations.class_names == ['cat', 'dog']
    image = annotations.images[0]
    assert image.boxes.tolist() == [[0, 0, 40, 30], [4, 4, 9, 9]]
    assert image.labels.tolist() == [2, 1] and image.crowd.tolist() == [False, True]


def spoil_coco(path):
    """One record bad in each way that there is; the first image with its three objects stays good."""
    def change(content):
        images, objects, categories = content['images'], content['annotations'], content['categories']
        images.append(dict(images[0]))  # images[4]
        images[1]['file_name'] = 'nowhere.png'
        images[2]['width'] = 1000
        (path.parent / '3.png').write_bytes(b'not an image')
        images.append(dict(id='x'))
        categories.append(dict(id=3, name='again'))
        good = dict(objects[0], id=100)
        for name, value in (
            ('bbox', [90, 10, 20, 10]), ('bbox', [1, 1, 0, 5]), ('bbox', [1, 1, 5]), ('bbox', [1, 1, float('nan'), 2]),
            ('category_id', 99), ('image_id', 77), ('id', 1), ('segmentation', [[1, 2]]), ('bbox', None),
        ):
            objects.append({**good, 'id': good['id'] + len(objects), name: value})
    edit(path, change)


COCO_PROBLEMS = [
    r'annotations\.json: images\[1\] \(id 11\): image file .*nowhere\.png is missing',
    r'images\[2\] \(id 12\): image file .*2\.png is 96 x 64, its annotation says 1000 x 64',
    r'images\[3\] \(id 13\): image file .*3\.png cannot be read',
    r'images\[4\] \(id 10\): duplicate id 10',
    r'images\[5\]: needs whole numbers',
    r'categories\[2\]: duplicate id 3',
    r'annotations\[12\] \(id 112\): box \[90\.0, 10\.0, 110\.0, 20\.0\].* outside the image of 96 x 64',
    r'annotations\[13\].*zero or negative area',
    r'annotations\[14\].*bbox \[1, 1, 5\] is not four numbers',
    r'annotations\[15\].*is not finite',
    r'annotations\[16\].*category_id 99 is not known',
    r'annotations\[17\].*image_id 77 is not among the images',
    r'annotations\[18\] \(id 1\): duplicate id 1',
    r'annotations\[19\].*polygons of three points',
    r'annotations\[20\]: needs whole numbers `id`, `image_id` and `category_id`, and a `bbox`',
]


def test_every_problem_of_a_coco_file_is_reported(tmp_path):
    path = write_coco(tmp_path, num_images=4)
    spoil_coco(path)
    with pytest.raises(AnnotationError, match=f'{len(COCO_PROBLEMS)} problems') as error:
        read_annotations(str(path))
    reported = [str(problem) for problem in error.value.problems]
    for problem in COCO_PROBLEMS:
        assert any(re.search(problem, line) for line in reported), problem
    assert len(error.value.problems) == len(COCO_PROBLEMS)


def test_skip_bad_keeps_the_rest(tmp_path):
    path = write_coco(tmp_path, num_images=4)
    spoil_coco(path)
    annotations = read_annotations(str(path), skip_bad=True)
    assert [image.image_id for image in annotations.images] == [10]
    assert annotations.num_objects == 3
    assert len(annotations.problems) == len(COCO_PROBLEMS)


@pytest.mark.parametrize(('text', 'message'), [
    ('{"images": [', r'a\.json: line 1, column 13: not valid JSON'),
    ('[1, 2]', r'a\.json: holds a list'),
    ('{"images": []}', r"has no list 'categories'"),
])
def test_malformed_json(tmp_path, text, message):
    (tmp_path / 'a.json').write_text(text)
    with pytest.raises(AnnotationError, match=message):
        read_annotations(str(tmp_path / 'a.json'))
    with pytest.raises(UserError, match='no image or no class is left'):
        read_annotations(str(tmp_path / 'a.json'), skip_bad=True)


def test_every_problem_of_voc_files_is_reported(tmp_path):
    for name in 'ab':
        Image.new('RGB', (40, 30)).save(tmp_path / f'{name}.png')
    (tmp_path / '1.xml').write_text(voc_xml('a.png', (40, 30), [
        ('dog', (1, 1, 40, 30)), ('dog', (30, 1, 50, 20)), ('dog', (5, 5, 4, 9)), ('', (1, 1, 5, 5)),
        ('cat', (1, 1, 5, 5)), ('dog', (1, 1, 5, 'x'))]))
    (tmp_path / '2.xml').write_text(voc_xml('b.png', (41, 30), []))
    (tmp_path / '3.xml').write_text(voc_xml('c.png', (40, 30), []))
    (tmp_path / '4.xml').write_text('<annotation>\n<filename>')
    (tmp_path / '5.xml').write_text('<annotation><filename>a.png</filename></annotation>')
    (tmp_path / '6.xml').write_text(voc_xml('a.png', (40, 30), []))
    with pytest.raises(AnnotationError) as error:
        read_annotations(str(tmp_path), class_names=['dog'])
    report = str(error.value)
    for problem in (
        r'1.xml: object 2: box [29.0, 0.0, 50.0, 20.0]', '1.xml: object 3: box [4.0, 4.0, 4.0, 9.0] has zero',
        '1.xml: object 4: has no `name`', "1.xml: object 5: class 'cat' is not one of dog",
        '1.xml: object 6: `bndbox` needs', '2.xml: image file', '3.xml: image file', '4.xml: line 2, column',
        '5.xml: has no `filename`', 'duplicate: two files',
    ):
        assert problem in report, problem
    assert len(error.value.problems) == 10
    kept = read_annotations(str(tmp_path), class_names=['dog'], skip_bad=True)
    assert kept.num_objects == 1


def test_class_names_of_the_training_set_rule(tmp_path):
    path = write_coco(tmp_path)
    assert read_annotations(str(path), class_names=['bar', 'square']).images[0].labels.tolist() == [2, 1, 2]
    with pytest.raises(AnnotationError, match=r"category 7: class 'bar' is not one of square"):
        read_annotations(str(path), class_names=['square'])


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r'nowhere\.json do not exist'):
        read_annotations(str(tmp_path / 'nowhere.json'))
    with pytest.raises(UserError, match=r'image folder .* does not exist'):
        read_annotations(str(write_coco(tmp_path)), image_dir=str(tmp_path / 'nowhere'))
