"""Training frameworks: two steps of each leave the weights of a loop written by hand.

Where a framework has its own optimiser or head, all weights move and what is saved loads.
"""
import pytest
import torch
from families import PEER, SMALL, each_model, images, small
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms.functional import to_pil_image

pytestmark = pytest.mark.slow
RATE = .01


def dataset():
    """Two batches of two images, one after the other."""
    return TensorDataset(images(4), torch.arange(4))


def loader():
    return DataLoader(dataset(), batch_size=2)


def by_hand(name):
    """A small model after the two steps."""
    model = small(name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for x, y in loader():
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def check_same(model, expected):
    """Both have the same weights and buffers."""
    assert model.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, msg=lambda text, key=key: f'{key}: {text}')


def check_trained(before, model):
    """All weights have moved but those between global tokens, which the last block's output does not depend on."""
    still = [n for n, p in model.named_parameters()
             if p.requires_grad and torch.equal(p, before[n]) and not n.endswith('g2g_relative_position_bias')]
    assert not still, still


def copied(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.item('Lightning: `Trainer.fit` and `validate`: the weights of a plain loop; its checkpoint loads', 'lightning')
@each_model()
def test_lightning(name, tmp_path):
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = small(name).train()

        def training_step(self, batch, index):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.log('loss', F.cross_entropy(self.model(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=RATE)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator='cpu', logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    module, expected = Classifier(), by_hand(name)
    trainer.fit(module, loader(), loader())
    check_same(module.model, expected)
    loss = trainer.validate(module, loader(), verbose=False)[0]['loss']
    with torch.no_grad():
        x, y = dataset().tensors
        assert loss == pytest.approx(F.cross_entropy(expected.eval()(x), y).item(), rel=1e-4)
    check_same(Classifier.load_from_checkpoint(trainer.checkpoint_callback.best_model_path).model, expected)


@pytest.fixture
def accelerator_class():
    """accelerate keeps its settings for the whole process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.item('accelerate: `prepare`, `backward`, gathered outputs, `save_state`: as a plain loop', 'accelerate')
@each_model()
def test_accelerate(name, accelerator_class, tmp_path):
    accelerator = accelerator_class(cpu=True)
    model = small(name).train()
    model, optimizer, batches = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE), loader())
    for x, y in batches:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
    expected = by_hand(name)
    check_same(accelerator.unwrap_model(model), expected)
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        next(model.parameters()).zero_()
    accelerator.load_state(str(tmp_path))
    check_same(accelerator.unwrap_model(model), expected)


@pytest.mark.item('accelerate: gradients accumulated over two batches, in bfloat16', 'accelerate')
@each_model()
def test_accelerate_accumulates_in_half_precision(name, accelerator_class):
    accelerator = accelerator_class(cpu=True, mixed_precision='bf16', gradient_accumulation_steps=2)
    model = small(name).train()
    before = copied(model)
    model, optimizer, batches = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE), loader())
    for step, (x, y) in enumerate(batches):
        with accelerator.accumulate(model):
            out = model(x)
            accelerator.backward(F.cross_entropy(out, y))
            optimizer.step()
            optimizer.zero_grad()
        assert out.dtype == torch.float32 and out.isfinite().all()
        if step == 0:
            assert all(torch.equal(p, before[n]) for n, p in accelerator.unwrap_model(model).named_parameters())
    check_trained(before, accelerator.unwrap_model(model))


class Records(Dataset):
    """The images as dictionaries, as Hugging Face's Trainer takes them."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        x, y = dataset()[index]
        return dict(pixel_values=x, labels=y)


def hf_trainer(model, folder, **kwargs):
    """A Trainer that does two steps of plain SGD in the order of the data."""
    from transformers import Trainer, TrainingArguments
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=2, max_grad_norm=0,
        use_cpu=True, report_to=[], disable_tqdm=True, train_sampling_strategy='sequential', **kwargs)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.)
    return Trainer(model, arguments, train_dataset=Records(), eval_dataset=Records(), optimizers=(optimizer, constant))


@pytest.mark.item('Trainer of transformers, `TimmWrapperForImageClassification`: the weights of a plain loop; saved and loaded', 'transformers')
@each_model()
def test_hf_trainer(name, tmp_path):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
    model = TimmWrapperForImageClassification(TimmWrapperConfig(
        architecture=name, num_labels=10, num_classes=10, model_args=dict(SMALL[name], img_size=64)))
    model.timm_model.load_state_dict(small(name).state_dict())
    trainer = hf_trainer(model, tmp_path)
    trainer.train()
    expected = by_hand(name)
    check_same(model.timm_model, expected)
    x, y = dataset().tensors
    with torch.no_grad():
        loss = F.cross_entropy(expected.eval()(x), y).item()
    assert trainer.evaluate()['eval_loss'] == pytest.approx(loss, rel=1e-4)
    trainer.save_model(str(tmp_path / 'saved'))
    check_same(TimmWrapperForImageClassification.from_pretrained(tmp_path / 'saved').timm_model, expected)


@pytest.mark.item('Trainer of transformers, a head on `TimmBackbone`: all weights of the backbone train', 'transformers')
@each_model()
def test_hf_trainer_on_backbone(name, tmp_path):
    from transformers import AutoBackbone, TimmBackboneConfig

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = AutoBackbone.from_config(TimmBackboneConfig(backbone=name, out_indices=[-1]))
            self.head = nn.Linear(self.backbone.channels[-1], 4)

        def forward(self, pixel_values, labels):
            pixel_values = F.interpolate(pixel_values, size=224)  # Swin's size
            features, = self.backbone(pixel_values=pixel_values).feature_maps
            logits = self.head(features.mean(dim=(2, 3)) if features.shape[1] == self.head.in_features
                               else features.mean(dim=(1, 2)))
            return dict(loss=F.cross_entropy(logits, labels), logits=logits)

    model = Pooled()
    before = copied(model)
    hf_trainer(model, tmp_path).train()
    check_trained(before, model)
    assert name == PEER or model.backbone.channels == [model.head.in_features]


@pytest.mark.item('fastai: `Learner.fit_one_cycle`, `save`, `load` into another model, `get_preds` as the model alone', 'fastai')
@each_model()
def test_fastai_learner(name, tmp_path):
    from fastai.vision.all import DataLoaders, Learner
    batches, model = DataLoaders(loader(), loader()), small(name)
    before = copied(model)
    learner = Learner(batches, model, loss_func=F.cross_entropy, path=tmp_path)
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1, RATE)
        check_trained(before, model)
        loaded = Learner(batches, small(name), loss_func=F.cross_entropy, path=tmp_path)
        learner.save('weights')
        loaded.load('weights')
        with loaded.no_bar():
            predictions, targets = loaded.get_preds(dl=batches.valid)
    assert targets.tolist() == [0, 1, 2, 3]
    with torch.no_grad():
        torch.testing.assert_close(predictions, model.eval()(dataset().tensors[0]), rtol=1e-4, atol=1e-5)


@pytest.fixture
def folders(tmp_path):
    """Eight images in folders of two classes."""
    for index, x in enumerate(images(8)):
        folder = tmp_path / 'images' / 'ab'[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(x.sigmoid()).save(folder / f'{index}.png')
    return tmp_path / 'images'


@pytest.mark.item('fastai: `vision_learner` by name on folders of images: frozen body, `fine_tune`, exported learner', 'fastai')
@each_model(peer_cannot='fastai pools over the last two dimensions: the maps of Swin end in channels')
def test_fastai_vision_learner(name, folders, tmp_path):
    from fastai.vision.all import ImageDataLoaders, Resize, accuracy, aug_transforms, load_learner, vision_learner
    batches = ImageDataLoaders.from_folder(
        folders, valid_pct=.5, seed=0, bs=2, item_tfms=Resize(64), batch_tfms=aug_transforms(), num_workers=0)
    learner = vision_learner(
        batches, name, pretrained=False, metrics=accuracy, path=tmp_path, **SMALL[name], img_size=64)
    before = copied(learner.model)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(1)
        check_trained(before, learner.model)
        learner.export(tmp_path / 'learner.pkl')
    loaded = load_learner(tmp_path / 'learner.pkl')
    with loaded.no_bar(), loaded.no_logging():
        label, _, probabilities = loaded.predict(next(folders.rglob('*.png')))
    assert label in ('a', 'b') and probabilities.sum().item() == pytest.approx(1)
    check_same(loaded.model, learner.model)
