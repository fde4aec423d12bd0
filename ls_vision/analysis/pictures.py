"""Pictures of a run: its learning curve, its predictions and its long-short attention.

matplotlib is an optional dependency: it is not imported before a picture is drawn.
"""
import csv
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import torch
from torch import Tensor, nn

from ls_vision.analysis.record import Record, record
from ls_vision.models import HierarchicalTransformer
from ls_vision.runtime.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL_HINT = 'matplotlib is missing; install it with: pip install ls_vision[plots]'

INK, GREY, LIGHT = '#222222', '#777777', '#dddddd'
BLUE, ORANGE, GREEN, RED = '#2b6cb0', '#dd7621', '#2a8a4a', '#c93a3a'


@dataclass
class Samples:
    """Images as the model sees them, before normalisation, and their class indices."""

    images: Tensor  # (B, 3, H, W) uint8
    targets: Tensor  # (B,)

    def __len__(self) -> int:
        return len(self.images)


def is_available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec('matplotlib') is not None


def check_available() -> None:
    """Raises UserError where matplotlib is not installed."""
    if not is_available():
        raise UserError(INSTALL_HINT)


def pick_samples(dataset: Any, count: int, seed: int) -> Optional[Samples]:
    """Pick random images from a dataset whose transform returns uint8 images.

    Returns:
        The samples, without unreadable images, or None where there are none or the dataset cannot be indexed.
    """
    if not hasattr(dataset, '__getitem__'):
        return None
    samples = (dataset[int(i)] for i in np.random.default_rng(seed).permutation(len(dataset)))
    readable = list(islice((sample for sample in samples if sample[1] >= 0), count))
    if not readable:
        return None
    images, targets = zip(*readable, strict=True)
    return Samples(torch.stack([torch.as_tensor(np.asarray(image)) for image in images]), torch.as_tensor(targets))


def draw_learning_curve(summary: Path, path: Path) -> None:
    """Plot loss and accuracy per epoch from a run's summary.csv."""
    with open(summary, newline='') as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    epochs = [row['epoch'] + 1 for row in rows]
    figure = new_figure(9, 3.8)
    loss_axes, accuracy_axes = figure.subplots(1, 2)

    curves = (('train_loss', 'training', ORANGE), ('eval_loss', 'test', BLUE))
    _draw_curves(loss_axes, epochs, rows, curves, '{:.2f}')
    loss_axes.set_title('Loss', loc='left', fontsize=11, fontweight='bold', color=INK)
    _draw_curves(accuracy_axes, epochs, rows, (('eval_top5', 'top-5', GREY), ('eval_top1', 'top-1', BLUE)), '{:.1f} %')
    accuracy_axes.set_title('Test accuracy', loc='left', fontsize=11, fontweight='bold', color=INK)
    accuracy_axes.set_ylim(0, 103)
    accuracy_axes.yaxis.set_major_formatter('{x:.0f} %')
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1, wspace=0.06)  # type: ignore[union-attr, call-arg]
    figure.savefig(path)


def draw_predictions(
        model: nn.Module,
        samples: Samples,
        data_config: dict[str, Any],
        class_names: Optional[list[str]],
        path: Path,
) -> None:
    """Draw test images with the predicted class, its probability and, if it is wrong, the true class."""
    probabilities = predict(model, samples, data_config).softmax(dim=-1)
    confidence, predicted = probabilities.max(dim=-1)
    right = int((predicted == samples.targets).sum())

    columns = min(len(samples), 6)
    rows = -(-len(samples) // columns)
    figure = new_figure(1.75 * columns + 0.3, 2.15 * rows + 0.75)
    figure.suptitle(
        f'{len(samples)} test images drawn at random: {right} right, {len(samples) - right} wrong',
        fontsize=13, fontweight='bold', color=INK, x=0.012, ha='left',
    )
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.07)  # type: ignore[union-attr, call-arg]
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if i >= len(samples):
            axes.set_axis_off()
            continue
        truth, guess = int(samples.targets[i]), int(predicted[i])
        color = GREEN if truth == guess else RED
        show_image(axes, samples.images[i])
        for spine in axes.spines.values():
            spine.set(visible=True, color=color, linewidth=2.5)
        axes.set_title(f'{_class_name(class_names, guess)}  {confidence[i]:.0%}', fontsize=10, color=color, pad=5)
        axes.set_xlabel(
            'right' if truth == guess else f'is {_class_name(class_names, truth)}', fontsize=9, color=GREY, labelpad=4)
    figure.savefig(path)


def draw_attention(
        model: nn.Module,
        samples: Samples,
        data_config: dict[str, Any],
        class_names: Optional[list[str]],
        path: Path,
) -> bool:
    """Draw the long-short attention of a model in one image.

    On the left is a query token of the first such layer with its window and the keys around it. On the right are, for
    each head, the r maps of the dynamic projection: the weight of each position in each of the r summaries that every
    token attends to. They are shown for the first long-short layer of each stage.

    Args:
        model: Any model; only long-short attention is drawn.
        samples: Images, of which the first that the model classifies correctly is drawn, or else the first.
        data_config: Normalisation of the images.
        class_names: Names by class index.
        path: PNG to write.

    Returns:
        False for a model without a dynamic projection, for which nothing is drawn.
    """
    predicted = predict(model, samples, data_config).argmax(dim=-1)
    index = int((predicted == samples.targets).int().argmax())
    image = samples.images[index]
    layers = collect_projection_maps(model, normalize(image[None], data_config, model))
    if not layers:
        return False

    _draw_attention_figure(image, _class_name(class_names, int(samples.targets[index])), layers).savefig(path)
    return True


@torch.inference_mode()
def predict(model: nn.Module, samples: Samples, data_config: dict[str, Any]) -> Tensor:
    """Logits of the samples, on the CPU."""
    return model.eval()(normalize(samples.images, data_config, model)).float().cpu()


def collect_projection_maps(model: nn.Module, image: Tensor) -> list[Record]:
    """The dynamic projection of each stage's first block for one normalised image (1, 3, H, W)."""
    if not isinstance(model, HierarchicalTransformer):
        return []
    return [r for r in record(model, image, block=0) if r.projection is not None]


def window_bounds(
        query: tuple[int, int],
        feat_size: tuple[int, int],
        window_size: int,
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """The window of a query token (row, column) and the keys around it, within the grid.

    Returns:
        Two boxes (top, left, bottom, right) in tokens, the end excluded.
    """
    pad = max(window_size // 2, 1)
    top, left = (position // window_size * window_size for position in query)
    window = (top, left, min(top + window_size, feat_size[0]), min(left + window_size, feat_size[1]))
    keys = (
        max(top - pad, 0), max(left - pad, 0),
        min(top + window_size + pad, feat_size[0]), min(left + window_size + pad, feat_size[1]),
    )
    return window, keys


def normalize(images: Tensor, data_config: dict[str, Any], model: nn.Module) -> Tensor:
    """(B, 3, H, W) uint8 -> normalised images on the model's device."""
    device = next(model.parameters()).device
    mean, std = (torch.tensor(data_config[name]).view(1, -1, 1, 1) for name in ('mean', 'std'))
    return ((images.float() / 255 - mean) / std).to(device)


def new_figure(width: float, height: float, constrained: bool = True) -> 'Figure':
    """A figure that needs no display and does not touch pyplot's state."""
    if not is_available():
        raise ImportError(INSTALL_HINT)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=160, facecolor='white', layout='constrained' if constrained else None)


def _draw_curves(
        axes: 'Axes',
        epochs: list[float],
        rows: list[dict[str, float]],
        curves: tuple[tuple[str, str, str], ...],
        number: str,
) -> None:
    """Curves (column, label, colour), each labelled at its end instead of in a legend."""
    from matplotlib.ticker import MaxNLocator

    highest = max(rows[-1][column] for column, _, _ in curves)
    for column, label, color in curves:
        last = rows[-1][column]
        axes.plot(epochs, [row[column] for row in rows], color=color, linewidth=2, marker='o', markersize=3.5)
        axes.annotate(
            f'{label} {number.format(last)}', (epochs[-1], last), textcoords='offset points', xytext=(7, 0),
            va='bottom' if last == highest else 'top', fontsize=9, color=color, annotation_clip=False,
        )
    axes.set_xlabel('epoch', color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis='y', color=LIGHT, linewidth=0.8)
    axes.tick_params(colors=GREY, length=0)
    for side, spine in axes.spines.items():
        spine.set(visible=side == 'bottom', color=LIGHT)


def show_image(axes: 'Axes', image: Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation='bicubic')
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_attention_figure(image: Tensor, truth: str, layers: list[Record]) -> 'Figure':
    """The window on the left, the grid of maps (a row per head) on the right; all lengths in inches."""
    heads = [(layer, head) for layer in layers for head in range(layer.num_heads)][:12]
    columns = min(max(layer.rank for layer in layers), 8)
    cell, gap, header, margin = 1.2, 0.07, 1.05, 0.3
    picture, legend, labels = 3.2, 1.15, 1.05  # the image with the window, the lines below it, the rows' names
    width = margin + picture + labels + columns * cell + margin
    height = header + max(len(heads) * cell, picture + legend) + margin
    figure = new_figure(width, height, constrained=False)

    def place(left: float, top: float, size: float) -> 'Axes':
        return figure.add_axes((left / width, 1 - (top + size) / height, size / width, size / height))

    def write(left: float, top: float, text: str, **style: Any) -> None:
        figure.text(left / width, 1 - top / height, text, va='center', **style)

    title, note = dict(fontsize=12, fontweight='bold', color=INK), dict(fontsize=9, color=GREY)
    maps_left = margin + picture + labels
    write(margin, 0.3, 'Short range', **title)
    write(margin, 0.56, f'one window of the first layer, on a test image ({truth})', **note)
    write(maps_left, 0.3, 'Long range: the dynamic projection', **title)
    write(maps_left, 0.56, 'positions that each summary is made of; numbers: peak relative to uniform weight', **note)

    feat_size = layers[0].feat_size
    draw_window(place(margin, header, picture), image, layers[0], (feat_size[0] // 2, feat_size[1] // 2))
    for row, (layer, head) in enumerate(heads):
        for column in range(min(layer.rank, columns)):
            axes = place(maps_left + column * cell, header + row * cell, cell - gap)
            assert layer.projection is not None
            draw_map(axes, image, layer.projection[head, column])
            if row == 0:
                axes.set_title(f'summary {column + 1}', fontsize=8, color=GREY, pad=4)
        name = f'{layer.feat_size[0]} x {layer.feat_size[1]} grid\nhead {head + 1}'
        write(maps_left - 0.12, header + (row + 0.46) * cell, name, fontsize=8, color=INK, ha='right')
    return figure


def draw_map(axes: 'Axes', image: Tensor, weights: Tensor) -> None:
    """A map (H, W) as heat over the grey image; the number is its peak as a multiple of its mean."""
    extent = (-0.5, image.shape[2] - 0.5, image.shape[1] - 0.5, -0.5)
    grey = image.float().mean(dim=0).numpy() / 255
    axes.imshow(0.35 + 0.65 * grey, cmap='gray', vmin=0, vmax=1, interpolation='bicubic')
    axes.imshow(weights.numpy(), cmap='inferno', alpha=0.68, extent=extent, interpolation='bilinear', vmin=0)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    peak = float(weights.max() / weights.mean().clamp(min=1e-12))
    axes.text(
        0.97, 0.04, f'{peak:.1f}x', transform=axes.transAxes, ha='right', va='bottom', fontsize=6.5, color='white')


def draw_window(axes: 'Axes', image: Tensor, layer: Record, query: tuple[int, int]) -> None:
    """The image with a query token, its window and the keys around it; everything else is darkened."""
    from matplotlib.patches import Rectangle

    feat_size = layer.feat_size
    scale = (image.shape[1] / feat_size[0], image.shape[2] / feat_size[1])  # pixels per token
    show_image(axes, image)
    for i, size in enumerate(feat_size):
        for line in range(1, size):
            draw_line = axes.axhline if i == 0 else axes.axvline
            draw_line(line * scale[i] - 0.5, color='white', linewidth=0.3, alpha=0.5)

    def outline(box: tuple[int, int, int, int], **style: Any) -> None:
        top, left, bottom, right = box
        corner = (left * scale[1] - 0.5, top * scale[0] - 0.5)
        axes.add_patch(Rectangle(corner, (right - left) * scale[1], (bottom - top) * scale[0], **style))

    if layer.window_size:
        _veil_all_but_keys(axes, outline, layer, query)
    outline((*query, query[0] + 1, query[1] + 1), facecolor='#ff3b30', edgecolor='white', linewidth=0.8)


def _veil_all_but_keys(
        axes: 'Axes',
        outline: Callable[..., None],
        layer: Record,
        query: tuple[int, int],
) -> None:
    """Outlines the window and its keys, darkens the rest, and adds a legend below the image."""
    assert layer.window_size
    window, keys = window_bounds(query, layer.feat_size, layer.window_size)
    height, width = layer.feat_size
    veil = dict(facecolor='black', alpha=0.45, linewidth=0)
    outline((0, 0, keys[0], width), **veil)
    outline((keys[2], 0, height, width), **veil)
    outline((keys[0], 0, keys[2], keys[1]), **veil)
    outline((keys[0], keys[3], keys[2], width), **veil)
    outline(keys, fill=False, edgecolor='#5ac8fa', linewidth=2)
    outline(window, fill=False, edgecolor='#ffd60a', linewidth=2)
    seen = (keys[2] - keys[0]) * (keys[3] - keys[1])
    for line, (text, color) in enumerate((
        ('query', '#ff3b30'),
        (f'its window, {layer.window_size} x {layer.window_size} queries', '#c79a00'),
        (f'the {seen} keys that the window sees', '#1f9fd6'),
        (f'and {layer.rank} summaries of the whole image', GREY),
    )):
        axes.annotate(
            ('\u25a0  ' if line < 3 else '+  ') + text, (0, 0), xycoords='axes fraction', xytext=(0, -8 - 14 * line),
            textcoords='offset points', fontsize=9, color=color, va='top')


def _class_name(class_names: Optional[list[str]], index: int) -> str:
    # a dollar would start a formula
    return class_names[index].replace('$', r'\$') if class_names is not None else f'class {index}'
