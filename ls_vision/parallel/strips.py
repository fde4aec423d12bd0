"""The cut of an image into strips of rows, one for each rank, and what all ranks know about it.

Strips begin at multiples of (total stride x window) of every stage, 224 pixels for windows of 7, so that no patch and
no window belongs to two ranks. The last strip takes the rest.

Shapes: B batch, C channels, H x W image or map, R rows of this rank's strip.
"""
import itertools
import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union, overload

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..layers import LongShortAttention2d
from ..layers.patch_embed import check_image_size
from ..models._hierarchical import Stage
from ..ops.numerics import autocast_dtype
from ..ops.window import make_window
from .collectives import join_rows
from .gradients import GradientMean
from .link import Link

ROW_MULTIPLE = 224
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8)


class StripGrid(Tuple[int, int]):
    """(R, W), the size of this rank's part of a grid of tokens, with what the layers of a stage need besides."""
    rows: Tuple[int, ...]
    """R of every rank."""
    seed: int
    """Of the numbers that all ranks of an image draw alike."""

    def __new__(cls, feat_size: Tuple[int, int], rows: Sequence[int], seed: int) -> 'StripGrid':
        grid = super().__new__(cls, feat_size)  # type: ignore[type-var]
        grid.rows, grid.seed = tuple(rows), seed
        return grid


class Layout(NamedTuple):
    """The strips of one image."""
    rows: Tuple[Tuple[int, ...], ...]
    """Rows of every rank's strip: of the image, then of each stage's grid."""
    seed: int


class Strips:
    """What the layers of one split model share: the ranks, and the strips of the image that they have at the moment."""

    def __init__(self, model: nn.Module, link: Link, prepare: Callable[['Strips'], None]):
        """
        Args:
            model: The split model.
            link: The ranks.
            prepare: Called before each image; makes new layers compute on strips.
        """
        self.model = model
        self.link = link
        self.prepare = prepare
        self.gradients = GradientMean(link)
        self.layout = Layout((), 0)
        self.seed = 0
        """Of the block that is computed, or recomputed in a backward pass."""

    @property
    def stages(self) -> List[Stage]:
        return [m for m in self.model.modules() if isinstance(m, Stage)]

    @torch.compiler.disable
    def begin(self, x: Tensor) -> None:
        """Learns the layout of a batch of strips.

        Args:
            x: (B, in_chans, R, W), this rank's strip.

        Raises:
            ValueError: The strips do not fit each other or the model; on all ranks alike.
        """
        self.prepare(self)
        stages = self.stages
        seed = int(torch.randint(2 ** 62, ())) if _draws(self.model) else 0
        B, C, R, W = [*x.shape, 0, 0, 0, 0][:4]
        header = dict(
            dimensions=x.dim(), batch=B, channels=C, width=W, dtype=_dtype_number(x.dtype),
            autocast=_dtype_number(autocast_dtype(x)), training=int(stages[0].training),
            gradients=int(torch.is_grad_enabled()), checkpointing=int(stages[0].grad_checkpointing))
        headers = _gather_numbers([*header.values(), R, seed], x.device, self.link)
        check_same(list(header), headers)
        rows = tuple(other[-2] for other in headers)
        if x.dim() != 4:
            raise ValueError(f'The strip has shape {list(x.shape)}, expected (batch, channels, rows, width).')
        check_image_size(sum(rows), W, stages[0].patch_embed.min_size)
        check_strips(rows, row_multiple(stages))
        self.layout = Layout((rows, *_stage_rows(stages, rows, W)), headers[0][-1])
        self.seed = self.layout.seed


def _draws(model: nn.Module) -> bool:
    """Whether anything in the model is dropped at random."""
    rates = [m.p if isinstance(m, nn.Dropout) else m.drop_prob
             for m in model.modules() if isinstance(m, (nn.Dropout, DropPath))]
    return model.training and any(rates)


def _stage_rows(stages: Sequence[Stage], rows: Sequence[int], width: int) -> List[Tuple[int, ...]]:
    """Rows of each stage's grid, of all ranks."""
    sizes = [(n, width) for n in rows]
    whole = (sum(rows), width)
    out = []
    for i, stage in enumerate(stages):
        sizes = [stage.patch_embed.feat_size(size) for size in sizes]
        whole = stage.patch_embed.feat_size(whole)
        stage_rows = tuple(n for n, _ in sizes)
        if min(stage_rows) < 1 or sum(stage_rows) != whole[0]:
            raise ValueError(
                f'Strips of {list(rows)} rows have {list(stage_rows)} rows of tokens in stage {i}, expected {whole[0]} '
                'in all and 1 or more each: move the last strip\'s boundary up.')
        out.append(stage_rows)
    return out


def row_multiple(model: Union[nn.Module, Sequence[Stage]]) -> int:
    """Pixels between two places at which an image may be cut for a model: no window of any stage spans one."""
    stages = [m for m in model.modules() if isinstance(m, Stage)] if isinstance(model, nn.Module) else model
    multiple = stride = 1
    for stage in stages:
        stride *= stage.patch_embed.stride
        windows = [make_window(m.window_size).rows for m in stage.modules() if isinstance(m, LongShortAttention2d)]
        multiple = math.lcm(multiple, stride, *(stride * window for window in windows if window > 0))
    return multiple


def check_strips(rows: Sequence[int], multiple: int) -> None:
    """Raises ValueError where a boundary between strips is none at which windows end, or a strip is empty."""
    if any(n < 1 or n % multiple for n in rows[:-1]) or rows[-1] < 1:
        raise ValueError(
            f'The strips have {list(rows)} rows, expected multiples of {multiple}, of all but the last, which takes '
            f'the rest; split_image(images, mesh, {multiple}) cuts so.')


def strip_rows(height: int, num_ranks: int, multiple: int) -> List[int]:
    """Rows of each rank's strip: as even as multiples allow, the first ones larger.

    Raises:
        ValueError: There are more ranks than multiples.
    """
    most = -(-height // multiple)
    if num_ranks > most:
        raise ValueError(
            f'An image of {height} rows can\'t be cut into {num_ranks} strips at multiples of {multiple} rows, '
            f'expected at most {most}.')
    bounds = [0]
    for i in range(num_ranks):
        bounds.append(bounds[-1] + multiple * (most // num_ranks + (i < most % num_ranks)))
    bounds[-1] = height
    return [stop - start for start, stop in itertools.pairwise(bounds)]


def split_image(images: Tensor, mesh: DeviceMesh, multiple: int = ROW_MULTIPLE) -> Tensor:
    """This rank's strip of images that every rank of the mesh holds.

    Args:
        images: (B, C, H, W), the same on all ranks.
        mesh: Of one dimension, on whose ranks the strips lie from top to bottom.
        multiple: Rows between two places to cut at; 224 is right for windows of 7 and for CvT-LS, `row_multiple(model)`
            for any model.

    Returns:
        (B, C, R, W), a view.

    Raises:
        ValueError: The ranks have different images, or there are too many of them; on all ranks alike.
    """
    link = Link(mesh)
    names = ['number of dimensions', 'batch', 'channels', 'height', 'width', 'dtype', 'multiple', 'sum of the bits']
    shape = [*images.shape, 0, 0, 0, 0][:4]
    header = [images.dim(), *shape, _dtype_number(images.dtype), multiple, _sum_of_bits(images)]
    check_same(names, _gather_numbers(header, images.device, link))
    if images.dim() != 4:
        raise ValueError(f'images have shape {list(images.shape)}, expected (batch, channels, height, width).')
    return images.split(strip_rows(images.shape[2], link.size, multiple), dim=2)[link.rank]


@overload
def gather_maps(maps: Tensor, mesh: DeviceMesh) -> Tensor: ...
@overload
def gather_maps(maps: Sequence[Tensor], mesh: DeviceMesh) -> List[Tensor]: ...


def gather_maps(maps: Union[Tensor, Sequence[Tensor]], mesh: DeviceMesh) -> Union[Tensor, List[Tensor]]:
    """Joins strips of maps, e.g. of features, to whole ones on every rank; autograd follows.

    Args:
        maps: (B, C, R, W), or several of them.
        mesh: That the model is split over.

    Returns:
        (B, C, all rows, W), or a list of them.

    Raises:
        ValueError: The strips do not fit each other; on all ranks alike.
    """
    if not isinstance(maps, Tensor):
        return [gather_maps(one, mesh) for one in maps]
    link = Link(mesh)
    B, C, R, W = maps.shape
    headers = _gather_numbers([B, C, W, _dtype_number(maps.dtype), R], maps.device, link)
    check_same(['batch', 'channels', 'width', 'dtype'], headers)
    return join_rows(maps, [header[-1] for header in headers], link, 'maps')


def check_same(names: Sequence[str], headers: Sequence[Sequence[int]]) -> None:
    """Raises ValueError where a number differs between ranks."""
    for i, name in enumerate(names):
        values: List[Any] = [header[i] for header in headers]
        if len(set(values)) > 1:
            if name in ('dtype', 'autocast'):
                values = ['none' if v < 0 else str(_DTYPES[v]) for v in values]
            raise ValueError(
                f'The ranks of one image differ in {name}: {", ".join(map(str, values))} on ranks 0 to '
                f'{len(values) - 1}, expected the same on all.')


def _gather_numbers(numbers: Sequence[int], device: torch.device, link: Link) -> List[List[int]]:
    """Every rank's."""
    return link.gather(torch.tensor(numbers, dtype=torch.int64, device=device), 'checks').tolist()


def _dtype_number(dtype: Optional[torch.dtype]) -> int:
    return _DTYPES.index(dtype) if dtype in _DTYPES else -1


_INTEGERS: Dict[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sum_of_bits(x: Tensor) -> int:
    """A sum that is the same in any order of adding."""
    return int(x.detach().view(_INTEGERS[x.element_size()]).sum(dtype=torch.int64))
