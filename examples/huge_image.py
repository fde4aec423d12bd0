#!/usr/bin/env python3
"""Features of one huge image that no device holds whole: a linear ViL-LS over strips of a TIFF, one strip a process.

    torchrun --nproc_per_node 2 examples/huge_image.py scene.tif map.npy --model vil_ls_tiny_linear

Each process reads the rows of its strip alone (memory-mapped where the file allows, else by the file's own strips or
tiles). map.npy is the last stage's map, (channels, height / 32, width / 32) in float32. Needs tifffile.
"""
import argparse
import contextlib
import datetime
import os
import resource

import numpy as np
import tifffile
import timm
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import ls_vision  # noqa: F401  registers the models
from ls_vision.parallel import gather_maps, parallelize, row_multiple
from ls_vision.parallel.strips import strip_rows


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('image', help='TIFF of 8-bit RGB')
    parser.add_argument('out', help='.npy file for the stride-32 map')
    parser.add_argument('--model', default='vil_ls_tiny_linear')
    parser.add_argument('--checkpoint', help='weights; random ones by default')
    args = parser.parse_args(argv)
    check_files(args.image, args.out)
    cuda = torch.cuda.is_available()
    if 'RANK' not in os.environ:
        raise SystemExit('Start it with torchrun: torchrun --nproc_per_node 2 examples/huge_image.py IMAGE OUT')
    dist.init_process_group('nccl' if cuda else 'gloo', timeout=datetime.timedelta(minutes=30))
    if cuda:
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    device = 'cuda' if cuda else 'cpu'
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=('space',))['space']

    torch.manual_seed(0)
    model = timm.create_model(
        args.model, features_only=True, out_indices=(-1,), checkpoint_path=args.checkpoint or '').to(device).eval()
    # reading takes a while, and not the same on all ranks
    parallelize(model, mesh, timeout=1800.)
    strip = read_strip(args.image, mesh.get_local_rank(), mesh.size(), row_multiple(model))
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    x = torch.from_numpy(strip).permute(2, 0, 1).float().div_(255).sub_(mean).div_(std)
    del strip
    with torch.inference_mode():
        features = gather_maps(model(x[None].to(device))[0], mesh)[0]
    if dist.get_rank() == 0:
        np.save(args.out, features.float().cpu().numpy())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f'rank {dist.get_rank()}: {x.shape[1]} x {x.shape[2]} pixels, peak memory {peak:,.0f} MB', flush=True)
    dist.destroy_process_group()


def check_files(image: str, out: str) -> None:
    """Ends the process with one line where the image can't be read or the map could not be written."""
    folder = os.path.dirname(os.path.abspath(out))
    if not os.path.isdir(folder):
        raise SystemExit(f'{out}: there is no folder {folder}.')
    with open_page(image):
        pass


@contextlib.contextmanager
def open_page(path: str):
    """The first page of a TIFF, which ends the process with one line unless it is 8-bit RGB."""
    try:
        file = tifffile.TiffFile(path)
    except (OSError, tifffile.TiffFileError) as e:
        raise SystemExit(f'{path} is no TIFF that can be read: {e}') from e
    with file:
        page = file.pages[0]
        if page.dtype != np.uint8 or len(page.shape) != 3 or page.shape[2] != 3:
            raise SystemExit(f'{path} is {page.dtype} of shape {page.shape}, expected 8-bit RGB (height, width, 3).')
        yield page


def read_strip(path: str, rank: int, ranks: int, multiple: int) -> np.ndarray:
    """(rows, width, 3) of one rank's strip, and nothing else of the image."""
    with open_page(path) as page:
        height, width = page.shape[:2]
        rows = strip_rows(height, ranks, multiple)
        start = sum(rows[:rank])
        if page.is_memmappable:
            return np.array(tifffile.memmap(path, mode='r')[start:start + rows[rank]])
        return read_segments(page, start, rows[rank], width)


def read_segments(page, start: int, num_rows: int, width: int) -> np.ndarray:
    """The rows of a compressed page, decoded from the strips or tiles that hold them."""
    out = np.zeros((num_rows, width, 3), np.uint8)
    for index, (offset, length) in enumerate(zip(page.dataoffsets, page.databytecounts)):
        across = -(-width // page.chunks[1])
        top, left = index // across * page.chunks[0], index % across * page.chunks[1]
        first, last = max(top, start), min(top + page.chunks[0], start + num_rows, page.shape[0])
        if first >= last:
            continue
        page.parent.filehandle.seek(offset)
        data, _, _ = page.decode(page.parent.filehandle.read(length), index, jpegtables=page.jpegtables)
        part = data[0, first - top:last - top, :width - left]
        out[first - start:last - start, left:left + part.shape[1]] = part
    return out


if __name__ == '__main__':
    main()
