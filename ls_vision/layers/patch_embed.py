"""Convolutional token embedding at the start of a stage.

Shapes: B batch, H x W image or grid before, H' x W' grid after, C channels of the tokens.
"""
from typing import Callable, Tuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from ..ops.graph_sizes import is_multiple


def pad_to_patches(x: Tensor, patch_size: int) -> Tensor:
    """Zeros below and to the right, so that no pixel of (B, C, H, W) is left out by patches side by side."""
    H, W = x.shape[-2], x.shape[-1]
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript does not know the condition that follows
        if torch.compiler.is_compiling() and not (is_multiple(H, patch_size) and is_multiple(W, patch_size)):
            # a graph of open size must not ask what there is to pad; less than a patch too much makes no patch more
            return F.pad(x, (0, patch_size - 1, 0, patch_size - 1))
    if H % patch_size == 0 and W % patch_size == 0:
        return x
    return F.pad(x, (0, -W % patch_size, 0, -H % patch_size))


def check_image_size(height: int, width: int, patch_size: int) -> None:
    """Raises ValueError where an image does not hold a patch."""
    if height < patch_size or width < patch_size:
        raise ValueError(
            f'Image of {height} x {width} pixels is smaller than a patch; expected {patch_size} x {patch_size}.')


# reason for both: sizes that are Proxies would decide control flow
register_notrace_function(pad_to_patches)
register_notrace_function(check_image_size)


class PatchEmbed(nn.Module):
    """Convolution and layer norm; the image may have any size.

    With `padding` 0 the patches lie side by side (ViL) and the image is padded to hold whole patches, else they overlap
    (CvT).
    """

    def __init__(
            self,
            in_chans: int,
            embed_dim: int,
            *,
            kernel_size: int,
            stride: int,
            padding: int,
            norm_layer: Callable[..., nn.Module],
            min_size: int = 1,
            device=None,
            dtype=None,
    ):
        """
        Args:
            in_chans: Channels of the image or grid.
            embed_dim: C.
            kernel_size: Side of a patch.
            stride: Distance of patches.
            padding: Zeros around the image, 0 for patches side by side.
            norm_layer: Called as norm_layer(embed_dim, device=, dtype=).
            min_size: Side of the smallest image that is accepted.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.stride = stride
        self.padding = padding
        self.min_size = min_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size, stride=stride, padding=padding, **dd)
        self.norm = norm_layer(embed_dim, **dd)

    @property
    def side_by_side(self) -> bool:
        return self.padding == 0

    def feat_size(self, img_size: Tuple[int, int]) -> Tuple[int, int]:
        """(H', W') for (H, W)."""
        if self.side_by_side:
            return -(-img_size[0] // self.stride), -(-img_size[1] // self.stride)
        overlap = self.proj.kernel_size[0] - 2 * self.padding
        return (img_size[0] - overlap) // self.stride + 1, (img_size[1] - overlap) // self.stride + 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, H', W', C).

        Raises:
            ValueError: The image is smaller than a patch.
        """
        check_image_size(x.shape[-2], x.shape[-1], self.min_size)
        if self.side_by_side:
            x = pad_to_patches(x, self.stride)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))
