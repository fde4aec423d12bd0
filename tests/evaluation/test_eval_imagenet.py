"""The evaluation script on real photographs, with real weights whose accuracy is known."""
import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

import eval_imagenet
from ls_vision.evaluation import imagenet

SCRIPT = Path(eval_imagenet.__file__)
SYNSETS = ImageNetInfo().label_names()


def run(options, *argv):
    return eval_imagenet.main([*options, *map(str, argv)])


@pytest.mark.parametrize('by_number', [False, True])
def test_known_accuracy(options, make_folder, tmp_path, by_number, capsys):
    """18 of 20 and 19 of 20, published beside the weights and images; folders as in ImageNet or as in ImageNet-V2."""
    make_folder(tmp_path / 'val', by_number)
    files = [tmp_path / f'r{suffix}' for suffix in ('.json', '.csv', '.md')]
    result = run(options, '--data-dir', tmp_path, '--variant', 'v2' if by_number else 'val', '--results-file', *files)
    assert (result['top1'], result['top5'], result['images'], result['unreadable']) == (90., 95., 20, 0)
    assert json.loads(files[0].read_text()) == result
    row, = csv.DictReader(files[1].read_text().splitlines())
    assert (row['model'], row['img_size'], row['top1'], row['images']) == ('tf_efficientnet_lite0', '224', '90.0', '20')
    assert files[2].read_text().splitlines()[2] in capsys.readouterr().out
    assert '| 90.000 | 95.000 | 20 | 0 |' in files[2].read_text()


def test_tar_of_the_folder_gives_the_same(options, make_folder, tmp_path):
    make_folder(tmp_path / 'val')
    with tarfile.open(tmp_path / 'val.tar', 'w') as archive:
        for folder in sorted((tmp_path / 'val').iterdir()):
            archive.add(folder, folder.name)
    result = run(options, '--data-dir', tmp_path / 'val.tar')
    assert (result['top1'], result['top5'], result['images']) == (90., 95., 20)


def test_unreadable_images_count_as_wrong(options, make_folder, tmp_path, capsys):
    make_folder(tmp_path)
    for i, content in enumerate((b'', b'text', bytes(range(256)) * 9)):
        (tmp_path / SYNSETS[i]).mkdir(exist_ok=True)
        (tmp_path / SYNSETS[i] / f'bad{i}.jpg').write_bytes(content)
    result = run(options, '--data-dir', tmp_path)
    assert (result['images'], result['unreadable']) == (23, 3)
    assert result['top1'] == 100 * 18 / 23 and result['top5'] == 100 * 19 / 23
    assert '3 of 23 images could not be read; they count as wrong' in capsys.readouterr().out


def test_sketch_has_the_classes_of_the_validation_set(options, make_folder, tmp_path):
    make_folder(tmp_path)
    result = run(options, '--data-dir', tmp_path, '--variant', 'sketch')
    assert (result['variant'], result['images'], result['top1'], result['top5']) == ('sketch', 20, 90., 95.)


@pytest.mark.parametrize('variant', ['a', 'r'])
def test_subsets_of_200_classes(options, make_folder, tmp_path, variant):
    classes = imagenet.subset(variant)
    assert len(classes) == 200
    count = make_folder(tmp_path, classes=set(classes.tolist()))
    assert count > 1
    result = run(options, '--data-dir', tmp_path, '--variant', variant)
    # by hand: with the whole set's predictions, from the logits of these classes alone
    assert result['images'] == count
    assert result['top1'] >= 100 * (count - 2) / count


def test_subset_leaves_the_other_logits_out(photographs):
    logits = torch.zeros(1, 1000)
    logits[0, 0], logits[0, 6] = 2, 1  # class 0 is not in ImageNet-A, class 6 is its first
    assert int(logits[:, imagenet.subset('a')].argmax()) == 0
    assert imagenet.class_map([SYNSETS[6], SYNSETS[11]], 1000, imagenet.subset('a')) == {SYNSETS[6]: 0, SYNSETS[11]: 1}


def test_foreign_class_of_a_subset(options, make_folder, tmp_path):
    make_folder(tmp_path)
    with pytest.raises(SystemExit, match='are not among the 200 classes'):
        run(options, '--data-dir', tmp_path, '--variant', 'a')


def test_real_labels(options, photographs, tmp_path):
    """Photographs under the names of validation images: right where the raters' labels hold the prediction."""
    labels = imagenet.real_labels()
    assert len(labels) == 50_000
    path, target = photographs[0]
    names = {  # one whose labels hold the photograph's class, one of others, one of none
        'right': next(name for name, found in labels.items() if target in found and len(found) > 1),
        'wrong': next(name for name, found in labels.items() if found and target not in found),
        'none': next(name for name, found in labels.items() if not found)}
    (tmp_path / SYNSETS[target]).mkdir()
    for name in names.values():
        shutil.copy(path, tmp_path / SYNSETS[target] / name)
    result = run(options, '--data-dir', tmp_path, '--variant', 'real')
    assert (result['top1'], result['images']) == (50., 2)
    shutil.copy(path, tmp_path / SYNSETS[target] / 'holiday.JPEG')
    with pytest.raises(SystemExit, match=r'holiday\.JPEG is not named like an ImageNet validation image'):
        run(options, '--data-dir', tmp_path, '--variant', 'real')


def test_corruptions(options, weights, photographs, tmp_path):
    """One photograph everywhere, in the folder of the class that is predicted for it, but for contrast."""
    path, _ = photographs[0]
    model = timm.create_model('tf_efficientnet_lite0', checkpoint_path=weights).eval()
    transform = timm.data.create_transform(
        64, crop_pct=.875, interpolation='bicubic', mean=(.5, .5, .5), std=(.5, .5, .5))
    predicted = int(model(transform(Image.open(path).convert('RGB'))[None]).argmax())
    for i, corruption in enumerate(imagenet.ALEXNET_ERRORS):
        for severity in imagenet.SEVERITIES:
            # some below a folder of their archive, as the published ones unpack
            root = tmp_path / 'noise' / corruption if i < 3 else tmp_path / corruption
            folder = root / str(severity) / SYNSETS[(predicted + 500 * (corruption == 'contrast')) % 1000]
            folder.mkdir(parents=True)
            shutil.copy(path, folder)
    result = run(options, '--data-dir', tmp_path, '--variant', 'c', '--img-size', '64')
    assert result['images'] == 75
    assert result['mce'] == pytest.approx(100 / .853204 / 15)
    assert result['corruption_errors']['contrast'] == pytest.approx(100 / .853204)
    assert result['top1'] == pytest.approx(100 * 14 / 15)
    shutil.rmtree(tmp_path / 'fog' / '3')
    with pytest.raises(SystemExit, match='fog/3 does not exist; mCE needs 15 corruptions x 5 severities'):
        run(options, '--data-dir', tmp_path, '--variant', 'c')


def test_alexnet_itself_has_a_mean_corruption_error_of_100():
    top1 = {(name, severity): 100 - 100 * error + 3 - severity  # any spread over severities
            for name, error in imagenet.ALEXNET_ERRORS.items() for severity in imagenet.SEVERITIES}
    assert imagenet.mean_corruption_error(top1)['mce'] == pytest.approx(100)


def test_two_processes_give_the_figures_of_one(options, make_folder, tmp_path):
    make_folder(tmp_path / 'data')
    (tmp_path / 'data' / SYNSETS[0]).mkdir(exist_ok=True)
    (tmp_path / 'data' / SYNSETS[0] / 'bad.jpg').write_bytes(b'')
    results = []
    for launcher in ([], ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']):
        file = tmp_path / f'{len(results)}.json'
        subprocess.run(
            [sys.executable, *launcher, SCRIPT, *options, '--data-dir', tmp_path / 'data', '--results-file', file],
            check=True, capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})  # as torchrun sets it
        results.append(json.loads(file.read_text()))
    assert results[0] == results[1]
    assert results[0]['images'] == 21


@pytest.mark.parametrize('argv, message', [
    ([], 'no data: pass --data-dir'),
    (['--data-dir', 'nowhere'], '--data-dir nowhere does not exist'),
    (['--data-dir', '.', '--checkpont', 'x'], "unknown argument --checkpont; did you mean '--checkpoint'"),
    (['--data-dir', '.', '--pretrained'], 'pass either --checkpoint or --pretrained'),
    (['--data-dir', '.', '--results-file', 'r.txt'], r'--results-file r.txt: the suffix must be one of \.json'),
    (['--data-dir', '.', '--results-file', 'nowhere/r.md'], 'its folder does not exist'),
    (['--data-dir', '.', '--num-classes', '10', '--variant', 'a'], '--variant a is for models of 1000 classes'),
    (['--data-dir', '.', '--model', 'vil_ls_tinny'], "unknown model 'vil_ls_tinny'; did you mean 'vil_ls_tiny'"),
    (['--data-dir', '.', '--model', 'test_vit2'], 'does not fit VisionTransformer'),
    (['--data-dir', '.', '--model', 'local-dir:nowhere'], 'Config file not found: nowhere'),
    (['--data-dir', '.', '--model', 'vil_ls_tiny.wrong'], "unknown tag 'wrong' of model"),
])
def test_wrong_input_is_one_line(options, argv, message):
    with pytest.raises(SystemExit, match=message) as error:
        run(options, *argv)
    assert '\n' not in str(error.value)


def test_grey_images(make_folder, tmp_path):
    make_folder(tmp_path / 'val')
    torch.save(timm.create_model('test_vit', in_chans=1).state_dict(), tmp_path / 'model.pth')
    options = ['--model', 'test_vit', '--checkpoint', str(tmp_path / 'model.pth'), '--device', 'cpu', '--workers', '0']
    result = run(options, '--data-dir', tmp_path / 'val', '--model-kwargs', 'in_chans=1')
    assert (result['images'], result['unreadable']) == (20, 0)
    with pytest.raises(SystemExit, match='in_chans=4: images are read with 3 channels'):
        run(options[:2], '--pretrained', '--data-dir', tmp_path / 'val', '--model-kwargs', 'in_chans=4')
    with pytest.raises(SystemExit):
        run(options, '--data-dir', tmp_path / 'val', '--model-kwargs', 'in_chans')


def test_classes_that_are_not_the_models(options, tmp_path, photographs):
    for name in ('cats', 'dogs'):
        (tmp_path / name).mkdir()
        shutil.copy(photographs[0][0], tmp_path / name)
    with pytest.raises(SystemExit, match=r"2 class folders, e\.g\. \['cats', 'dogs'\], are neither .*--num-classes 2"):
        run(options, '--data-dir', tmp_path)


def test_malicious_checkpoint(options, tmp_path):
    class Gadget:
        def __reduce__(self):
            return __import__('os').system, (f'touch {tmp_path}/ran',)

    torch.save(dict(state_dict=Gadget()), tmp_path / 'bad.pth')
    result = subprocess.run(
        [sys.executable, SCRIPT, *options, '--data-dir', tmp_path, '--checkpoint', tmp_path / 'bad.pth'],
        capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith('error: checkpoint') and 'was refused: it holds' in result.stderr
    assert result.stderr.count('\n') == 1 and not (tmp_path / 'ran').exists()
