"""What the scripts need for images that several processes share (`--space-parallel`)."""
import argparse
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from ..runtime.errors import UserError, first_line
from ..runtime.processes import Processes
from .model import parallelize
from .strips import row_multiple, split_image, strip_rows


def add_space_parallel(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The argument of both scripts."""
    parser.add_argument('--space-parallel', type=int, default=1, metavar='N',
                        help='processes that share each image, of which each takes a strip')


def share_images(processes: Processes, num_strips: int) -> Processes:
    """The processes where each `num_strips` of them have the same images; these count as one.

    Args:
        processes: All, each with images of its own.
        num_strips: Processes for an image; neighbours by rank, from top to bottom.

    Raises:
        UserError: The number of processes is no multiple of it.
    """
    if num_strips == 1:
        return processes
    if processes.world_size % num_strips:
        raise UserError(
            f'--space-parallel {num_strips}: there are {processes.world_size} processes, expected a multiple of '
            f'{num_strips} (torchrun --nproc_per_node)')
    shape = (processes.world_size // num_strips, num_strips)
    mesh = init_device_mesh(processes.device.type, shape, mesh_dim_names=('data', 'space'))
    return replace(processes, rank=mesh.get_local_rank('data'), world_size=shape[0], mesh=mesh)


def split_model(model: nn.Module, processes: Processes, input_size: tuple[int, int, int]) -> None:
    """Makes a model take whole images, the same in all processes that share them, and compute this process's strip.

    Args:
        model: Changed in place, where processes share images; its state dict is that of the unsplit model.
        processes: From `share_images`.
        input_size: (C, H, W) of the images.

    Raises:
        UserError: The model can't be split, or the images are too small for so many strips.
    """
    if processes.mesh is None:
        return
    mesh = processes.mesh['space']
    try:
        parallelize(model, mesh)
        multiple = row_multiple(model)
        strip_rows(input_size[1], mesh.size(), multiple)
    except ValueError as e:
        raise UserError(f'--space-parallel {mesh.size()}: {first_line(e)}') from e

    @torch.compiler.disable
    def split(module: nn.Module, images: tuple[torch.Tensor]) -> torch.Tensor:
        return split_image(images[0], mesh, multiple)

    model.register_forward_pre_hook(split)
