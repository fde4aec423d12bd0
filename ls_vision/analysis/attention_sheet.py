"""One block's attention in one image, as a sheet of pictures and as arrays."""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ls_vision.analysis import pictures
from ls_vision.analysis.record import PixelAttention, Record, record, rollout
from ls_vision.analysis.zoo import ImageSize
from ls_vision.data.images import ImageError, read_image
from ls_vision.runtime.errors import UserError
from ls_vision.runtime.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRAIN = 32  # pixels of a token in the last stage
PARTS = ('window', 'long range', 'global')
PART_COLORS = (pictures.ORANGE, pictures.BLUE, pictures.GREEN)


@dataclass
class Sheet:
    """The content of a sheet."""
    title: str
    image: Tensor
    """(3, H, W) uint8, as the model saw it before normalisation."""
    block: Record
    token: tuple[int, int]
    """Row and column of the chosen token in the block's grid."""
    attention: PixelAttention
    rollout: Tensor
    """(H, W) over the first stage's grid."""

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name; maps have the shape of the block's grid, with heads first."""
        arrays = dict(
            image=self.image, token=torch.tensor(self.token), window=self.attention.window,
            summaries=self.attention.summaries, long_range=self.attention.long_range,
            global_tokens=self.attention.global_tokens, shares=self.attention.shares, rollout=self.rollout)
        if self.block.projection is not None:
            arrays['projection'] = self.block.projection
        return {name: array.numpy() for name, array in arrays.items()}


def load_image(path: Path, size: Optional[ImageSize], shorter_side: int) -> Tensor:
    """(3, H, W) uint8 of a picture file, resized to a size or else to a shorter side.

    With a shorter side the aspect ratio is kept, and both sides are rounded to multiples of 32.

    Raises:
        UserError: The file cannot be read as an image.
    """
    try:
        image = read_image(path)
    except ImageError as e:
        raise UserError(f'{path} {e}') from e
    if size is None:
        scale = shorter_side / min(image.size)
        height, width = (max(round(side * scale / GRAIN), 1) * GRAIN for side in (image.height, image.width))
        size = height, width
    resized = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def record_image(model: nn.Module, image: Tensor) -> list[Record]:
    """The attention weights of all blocks for a (3, H, W) uint8 image.

    Raises:
        UserError: The model is not of this package.
    """
    try:
        return record(model, pictures.normalize(image[None], resolve_model_data_config(model), model))
    except ValueError as e:
        raise UserError(str(e)) from e


def look(
        model: nn.Module,
        image: Tensor,
        stage: int,
        block: int,
        pixel: Optional[tuple[float, float]],
        title: str,
) -> Sheet:
    """Runs the model on an image and collects what the sheet shows.

    Args:
        model: One of this package's.
        image: (3, H, W) uint8.
        stage, block: The block to show, numbered from 0.
        pixel: Position of the query as fractions of height and width; the centre by default.
        title: Title of the sheet.

    Raises:
        UserError: The model has no such block.
    """
    records = record_image(model, image)
    chosen = next((r for r in records if (r.stage, r.block) == (stage, block)), None)
    if chosen is None:
        raise UserError(f'no block {block} in stage {stage}; expected one of {", ".join(r.name for r in records)}')
    row, col = (min(int(share * cells), cells - 1) for share, cells in zip(pixel or (0.5, 0.5), chosen.feat_size))
    return Sheet(title, image, chosen, (row, col), chosen.at(row, col), rollout(records))


def draw(sheet: Sheet, path: Path) -> None:
    """Writes the sheet as a PNG: the chosen token's attention and the rollout above, the maps of each head below."""
    _, height, width = sheet.image.shape
    big = (2.6 * min(1., width / height), 2.6 * min(1., height / width))  # width and height of a picture in inches
    rank, heads = sheet.block.rank, sheet.block.num_heads
    columns = min(max(rank, 1), 8 if rank <= 8 else 16)
    lines = math.ceil(rank / columns)  # of a head
    total_width = max(5 * (big[0] + 0.3) + 0.5, 8.)
    cell_width = (total_width - 1.3) / (8 if columns <= 8 else 16)
    cell_height = cell_width * height / width
    maps_top = 1. + big[1] + 1.4
    total_height = maps_top + heads * lines * cell_height + (0.3 if rank else -0.2)
    figure = pictures.new_figure(total_width, total_height, constrained=False)

    def place(left: float, top: float, size: tuple[float, float]) -> 'Axes':
        return figure.add_axes((
            left / total_width, 1 - (top + size[1]) / total_height, size[0] / total_width, size[1] / total_height))

    def write(left: float, top: float, text: str, **style: Any) -> None:
        figure.text(left / total_width, 1 - top / total_height, text, va='center', **style)

    name, note = dict(fontsize=10, fontweight='bold', color=pictures.INK), dict(fontsize=8, color=pictures.GREY)
    write(0.3, 0.3, sheet.title, fontsize=12, fontweight='bold', color=pictures.INK)
    attention = sheet.attention
    lefts = [0.3 + i * (big[0] + 0.3) for i in range(5)]
    tops = 0.75
    pictures.draw_window(place(lefts[0], 1., big), sheet.image, sheet.block, sheet.token)
    write(lefts[0], tops, f'{sheet.block.name}, {sheet.block.feat_size[0]} x {sheet.block.feat_size[1]}', **name)
    full = sheet.block.window_size is None
    maps = [
        ('Attention to tokens' if full else 'To the window', attention.window.mean(0)),
        ('Through summaries', attention.long_range.mean(0)), ('Rollout, all blocks', sheet.rollout)]
    for left, (text, weights) in zip(lefts[1:], maps):
        write(left, tops, text, **name)
        if weights.sum() > 0:
            pictures.draw_map(place(left, 1., big), sheet.image, weights)
        else:
            write(left, 1.3, 'none', **note)
    write(lefts[4], tops, 'Shares by head', **name)
    _draw_shares(place(lefts[4] + 0.2, 1., (big[0] - 0.2, big[1])), attention.shares)

    if sheet.block.projection is not None:
        text = f'Dynamic projection: where each of {rank} summaries takes its content from'
        write(0.3, maps_top - 0.25, text, **name)
    for head in range(heads if rank else 0):
        assert sheet.block.projection is not None
        for i in range(rank):
            line, column = divmod(i, columns)
            top = maps_top + (head * lines + line) * cell_height
            axes = place(1. + column * cell_width, top, (cell_width - 0.06, cell_height - 0.06))
            pictures.draw_map(axes, sheet.image, sheet.block.projection[head, i])
        write(0.3, maps_top + (head * lines + 0.45) * cell_height, f'head {head + 1}', fontsize=8, color=pictures.INK)
    with atomic_write(path) as file:
        figure.savefig(file, format='png')


def _draw_shares(axes: 'Axes', shares: Tensor) -> None:
    """A bar for each head, (h, 3)."""
    left = torch.zeros(len(shares))
    for part, color, values in zip(PARTS, PART_COLORS, shares.unbind(1)):
        if values.sum() > 0:
            axes.barh(range(1, len(shares) + 1), values.numpy(), left=left.numpy(), color=color, label=part, height=0.7)
        left = left + values
    axes.set(xlim=(0, 1), yticks=range(1, len(shares) + 1), xticks=[0, 0.5, 1])
    axes.invert_yaxis()
    axes.tick_params(labelsize=8, colors=pictures.GREY, length=0)
    axes.legend(fontsize=8, frameon=False, loc='upper left', bbox_to_anchor=(-0.05, -0.08), ncols=3, handlelength=1,
                columnspacing=1)
    for spine in axes.spines.values():
        spine.set_visible(False)
