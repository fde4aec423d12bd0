"""Libraries of other fields that build timm models by name or take them as modules: torchgeo, anomalib, kornia, lightly."""
import pytest
import torch
from families import PEER, each_model, images, small
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]
CHANNELS_LAST = 'the feature maps of Swin end in channels; the library takes the second dimension for them'
BANDS = 12  # of Sentinel-2


def fit(task, records, folder):
    """One epoch of a Lightning module and its validation."""
    import lightning
    trainer = lightning.Trainer(
        max_epochs=1, accelerator='cpu', logger=False, enable_progress_bar=False, enable_checkpointing=False,
        default_root_dir=folder)
    trainer.fit(task, *[DataLoader(records, batch_size=2)] * 2)


def scenes(count=2, size=224):
    return images(count, size, channels=BANDS)


@pytest.mark.item('torchgeo: `ClassificationTask` by name with 12 bands: trains, predicts', 'torchgeo')
@each_model()
def test_torchgeo_classification(name, tmp_path):
    from torchgeo.trainers import ClassificationTask
    task = ClassificationTask(model=name, weights=None, in_channels=BANDS, task='multiclass', num_classes=10)
    before = [p.detach().clone() for p in task.parameters()]
    fit(task, [dict(image=x, label=torch.tensor(i)) for i, x in enumerate(scenes())], tmp_path)
    moved = [not torch.equal(p, q) for p, q in zip(task.parameters(), before)]
    assert sum(moved) >= len(moved) - 1  # a bias between global tokens of the last block has no part in the output
    assert task.eval()(scenes()).shape == (2, 10)


@pytest.mark.item('torchgeo: `SemanticSegmentationTask`, Unet on `tu-NAME` with 12 bands: trains, predicts', 'torchgeo')
@each_model(cvt_ls_13='three stages need `encoder_depth=4` of segmentation-models-pytorch, which torchgeo does not pass on')
def test_torchgeo_segmentation(name, tmp_path):
    from torchgeo.trainers import SemanticSegmentationTask
    task = SemanticSegmentationTask(
        model='unet', backbone=f'tu-{name}', weights=None, in_channels=BANDS, task='multiclass', num_classes=5)
    masks = torch.randint(5, (2, 224, 224))
    fit(task, [dict(image=x, mask=mask) for x, mask in zip(scenes(), masks)], tmp_path)
    with torch.no_grad():
        out = task.eval()(scenes())
    assert out.shape == (2, 5, 224, 224) and out.isfinite().all()


@pytest.mark.item('anomalib: PatchCore on `features_only` maps: a patch that is not as the training images stands out', 'anomalib')
@each_model(peer_cannot=CHANNELS_LAST)
def test_patchcore(name):
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    layers = ['layers.1', 'layers.2'] if name == PEER else ['stages.1', 'stages.2']
    model = PatchcoreModel(layers=layers, backbone=name, pre_trained=False)
    model.feature_extractor.eval()
    normal = images(1, 224) * .1
    embedding = model.train()(normal.repeat(2, 1, 1, 1))
    assert embedding.shape[1] == sum(model.feature_extractor.out_dims)
    model.subsample_embedding(sampling_ratio=.5)
    odd = normal.clone()
    odd[..., 32:96, 128:192] = 2.
    with torch.no_grad():
        score, of_odd = (model.eval()(x) for x in (normal, odd))
    assert of_odd.pred_score.item() > score.pred_score.item()
    row, column = divmod(of_odd.anomaly_map[0, 0].argmax().item(), 224)
    assert 16 <= row < 112 and 112 <= column < 208


@pytest.mark.item('anomalib: `TimmFeatureExtractor` by stage name: channels and strides as it reports', 'anomalib')
@each_model(peer_cannot=CHANNELS_LAST)
def test_anomalib_extractor(name):
    from anomalib.models.components.feature_extractors import TimmFeatureExtractor
    layers = ['layers.1', 'layers.2'] if name == PEER else ['stages.1', 'stages.2']
    extractor = TimmFeatureExtractor(backbone=name, layers=layers, pre_trained=False)
    maps = extractor(images(1, 224))
    assert list(maps) == layers
    for layer, channels, reduction in zip(layers, extractor.out_dims, extractor.reductions):
        assert maps[layer].shape == (1, channels, 224 // reduction, 224 // reduction)


@pytest.mark.item('kornia: augmentation and normalisation before the model, gradients through both', 'kornia')
@each_model()
def test_kornia_augmentation(name):
    import kornia.augmentation as K
    chain = K.AugmentationSequential(
        K.RandomHorizontalFlip(), K.RandomResizedCrop((64, 64), scale=(.5, 1.)), K.ColorJitter(.2, .2, .2, .1),
        K.Normalize(torch.full((3,), .5), torch.full((3,), .5)))
    model = small(name).train()
    x = images(4).sigmoid().requires_grad_()
    mixed, labels = K.RandomMixUpV2(p=1., data_keys=['input', 'class'])(chain(x), torch.arange(4))
    out = model(mixed)
    first, second, share = labels.view(4, -1).unbind(dim=1)
    losses = (F.cross_entropy(out, target.long(), reduction='none') for target in (first, second))
    loss = sum(weight * value for weight, value in zip((1 - share, share), losses)).mean()
    loss.backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.item('kornia: an adversarial image is found through `kornia.geometry` and `kornia.enhance` operations', 'kornia')
@each_model()
def test_kornia_differentiable_attack(name):
    import kornia
    model, x = small(name).requires_grad_(False), images(1)
    angle, brightness = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([angle, brightness], lr=.1)
    logits = []
    for _ in range(5):
        changed = kornia.geometry.rotate(x.sigmoid(), angle)
        out = model(kornia.enhance.adjust_brightness(changed, brightness))
        optimizer.zero_grad()
        out[:, 0].sum().backward()
        assert angle.grad.isfinite().all() and angle.grad.abs().sum() > 0
        optimizer.step()
        logits.append(out[0, 0].item())
    assert logits[-1] < logits[0]


def pooled(name):
    """A backbone without a classifier, for images of other sizes as well."""
    return small(name, num_classes=0, **(dict(strict_img_size=False) if name == PEER else {}))


@pytest.mark.item('lightly: SimCLR: the loss of a pair of views falls', 'lightly')
@each_model()
def test_simclr(name):
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    backbone = pooled(name).train()
    head = SimCLRProjectionHead(backbone.num_features, 32, 16)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=.05)
    views, losses = (images(4), images(4).flip(3)), []
    for _ in range(4):
        loss = NTXentLoss()(*(head(backbone(x)) for x in views))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.item('lightly: DINO: student on global and smaller local views, teacher by momentum', 'lightly')
@each_model()
def test_dino(name):
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    student, teacher = pooled(name).train(), pooled(name)
    heads = [DINOProjectionHead(student.num_features, 32, 16, output_dim=24) for _ in range(2)]
    deactivate_requires_grad(teacher)
    deactivate_requires_grad(heads[1])
    criterion = DINOLoss(output_dim=24, warmup_teacher_temp_epochs=1)
    optimizer = torch.optim.SGD([*student.parameters(), *heads[0].parameters()], lr=.05)
    global_views, local_views = [images(4), images(4).flip(3)], [images(4, 32)]
    before = parameters_to_vector(teacher.parameters())
    for _ in range(2):
        update_momentum(student, teacher, m=.9)
        update_momentum(heads[0], heads[1], m=.9)
        targets = [heads[1](teacher(x)) for x in global_views]
        outputs = [heads[0](student(x)) for x in global_views + local_views]
        loss = criterion(targets, outputs, epoch=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    slow, fast = (parameters_to_vector(model.parameters()) - before for model in (teacher, student))
    assert 0 < slow.norm() < .5 * fast.norm()
