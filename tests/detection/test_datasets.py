"""Crops, flips and masks keep boxes on the objects."""
import numpy as np
import pytest
import torch
from detection_helpers import write_coco
from torchvision import tv_tensors

from ls_vision.detection import read_annotations
from ls_vision.detection.datasets import DetectionDataset, collate, read_masks, read_pixels
from ls_vision.detection.transforms import RandomScaleCrop, RandomTranspose, create_train_transform
from ls_vision.runtime.errors import UserError


def sample(height=200, width=300):
    """A dark image with rectangles, each bright in a channel of its own, their boxes and masks."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    boxes = torch.tensor([[20., 30, 70, 60], [150, 100, 190, 180], [240, 10, 290, 50]])
    masks = torch.zeros(3, height, width, dtype=torch.uint8)
    for i, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        image[i, top:bottom, left:right] = 200
        masks[i, top:bottom, left:right] = 1
    return tv_tensors.Image(image), dict(
        boxes=tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=(height, width)),
        labels=torch.tensor([1, 2, 3]), masks=tv_tensors.Mask(masks))


def check(image, target):
    """Boxes enclose the pixels that are bright in the channel of their label."""
    assert target['boxes'].canvas_size == tuple(image.shape[-2:])
    for box, label, mask in zip(target['boxes'], target['labels'], target['masks'], strict=True):
        rows, columns = torch.where(image[label - 1] > image.max() / 2)
        found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (found - box).abs().max() <= 2
        rows, columns = torch.where(mask)
        found = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (found - box).abs().max() <= 2


def test_transpose():
    image, target = RandomTranspose(1.)(*sample())
    assert image.shape == (3, 300, 200)
    assert target['boxes'][0].tolist() == [30, 20, 60, 70]
    check(image, target)


@pytest.mark.parametrize('scale', [(1., 1.), (.5, 2.)])
def test_crop(scale):
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        image, target = RandomScaleCrop(128, scale)(*sample())
        assert 126 <= max(image.shape[-2:]) <= 128  # a window of whole pixels
        check(image, target)
        seen |= set(target['labels'].tolist())
    assert seen == {1, 2, 3}


def test_crop_drops_what_it_hardly_shows():
    image, target = sample(100, 100)
    target['boxes'] = tv_tensors.BoundingBoxes([[0, 0, 100, 100], [0, 0, 4, 4], [0, 0, 0, 0]], format='XYXY',
                                               canvas_size=(100, 100), dtype=torch.float)
    kept = [RandomScaleCrop(50)(image, target)[1]['labels'].tolist() for _ in range(20)]
    assert all(1 not in labels for labels in kept)  # a crop shows a quarter


def test_crop_larger_than_the_image():
    image, target = RandomScaleCrop(512, (1., 1.))(*sample())
    assert image.shape == (3, 200, 300) and len(target['boxes']) == 3


def test_all_of_the_augmentation():
    transform = create_train_transform(128, (.8, 1.25), .5, .5, .5, 0.)
    for seed in range(20):
        torch.manual_seed(seed)
        image, target = transform(*sample())
        assert image.dtype == torch.float32
        check(image, target)


def test_photometric_distortion_changes_colours_alone():
    image, target = sample()
    changed, same = create_train_transform(None, (1., 1.), 0., 0., 0., 0., photometric_distort=1.)(image, target)
    assert changed.shape == image.shape and torch.equal(same['boxes'], target['boxes'])
    differences = (changed - image / 255).flatten(1).mean(1)
    assert differences.unique().numel() == 3  # each channel by something else
    plain, _ = create_train_transform(None, (1., 1.), 0., 0., 0., 0.)(image, target)
    torch.testing.assert_close(torch.Tensor(plain), image / 255)


def test_dataset(tmp_path):
    annotations = read_annotations(str(write_coco(tmp_path)))
    annotations.images[0].crowd[0] = True
    dataset = DetectionDataset(
        annotations, create_train_transform(None, (1., 1.), 0., 0., 0., 0.), with_masks=True, crops_per_image=3)
    assert len(dataset) == 6
    images, targets = collate([dataset[0], dataset[5]])
    assert [type(v) for v in (images[0], targets[0]['boxes'], targets[0]['masks'])] == [torch.Tensor] * 3
    assert [len(t['boxes']) for t in targets] == [2, 3]  # crowds are not trained on
    assert images[0].max() == pytest.approx(250 / 255)
    masks = read_masks(annotations.images[1])
    assert masks.sum() == annotations.images[1].areas.sum()


def test_run_lengths(tmp_path):
    from faster_coco_eval.core import mask as coco_mask

    image = read_annotations(str(write_coco(tmp_path))).images[0]
    masks = read_masks(image)
    image.segmentations = [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]
    assert np.array_equal(read_masks(image), masks)
    image.segmentations = None
    with pytest.raises(UserError, match='objects without a segmentation'):
        read_masks(image)


def test_images_that_cannot_be_decoded(tmp_path):
    path = write_coco(tmp_path, 3)
    content = (tmp_path / '2.png').read_bytes()
    (tmp_path / '2.png').write_bytes(content[:len(content) // 2])  # its header is intact
    annotations = read_annotations(str(path))
    transform = create_train_transform(None, (1., 1.), 0., 0., 0., 0.)
    with pytest.raises(UserError, match=r'image .*2\.png cannot be read as an image: .*--skip-bad continues without'):
        DetectionDataset(annotations, transform)[2]
    dataset = DetectionDataset(annotations, transform, crops_per_image=2, skip_bad=True)
    assert torch.equal(dataset[5][0], dataset[0][0])  # the next one, after the last the first
    assert (len(dataset), dataset.num_unreadable, dataset.unreadable.tolist()) == (6, 1, [0, 0, 1])
    assert dataset.filename(2) == str(tmp_path / '2.png')
    resumed = DetectionDataset(annotations, transform, skip_bad=True)
    resumed.mark_unreadable(dataset.unreadable.nonzero().flatten())
    assert resumed.num_unreadable == 1
    for i in range(3):
        (tmp_path / f'{i}.png').write_bytes(content[:100])
    read_pixels.cache_clear()
    with pytest.raises(UserError, match=r'none of the 3 images of .* can be decoded'):
        dataset[0]
