#!/usr/bin/env python3
"""Draws who sees whom in attention over a sequence, for docs/sequences.png, from what the operators return.

    python benchmarks/sequence_picture.py --out docs/sequences.png

All logits are equal and each value is a unit vector of its own, so that an output shows which keys its query saw.
"""
import argparse
from pathlib import Path

import torch
from torch import Tensor

from ls_vision.ops import Window, long_short_attention
from ls_vision.ops.causal import CausalGeometry, causal_attention

TOKENS, WINDOW, SUMMARIES = 32, 8, 4
CAUSAL = CausalGeometry(window_size=8, chunk_size=4, rank=1, start=0)


def seen_bidirectional() -> Tensor:
    """(tokens, summaries + tokens), true where a token sees a key."""
    keys = SUMMARIES + TOKENS
    values = torch.eye(keys)[:, None]  # (keys, 1, keys)
    tokens = torch.zeros(1, 1, TOKENS, 1, keys)
    out = long_short_attention(
        tokens, tokens, values[None, None, SUMMARIES:], Window(1, WINDOW, 0, WINDOW // 2),
        torch.zeros(1, SUMMARIES, 1, keys), values[None, :SUMMARIES])
    return out[0, 0, :, 0] > 0


def seen_causal() -> Tensor:
    """(tokens, chunk summaries + tokens), true where a token sees a key."""
    S = TOKENS // CAUSAL.chunk_size * CAUSAL.rank
    keys = S + TOKENS
    values = torch.eye(keys)[:, None]
    pair = torch.stack([torch.zeros_like(values), values], dim=1)[None]  # (1, keys, 2, 1, keys)
    nothing = torch.zeros(1, keys)
    out = causal_attention(
        torch.zeros(1, TOKENS, 1, keys), pair[:, S:], pair[:, :S], torch.zeros(CAUSAL.window_size, 1, keys),
        torch.zeros(S, 1, keys), nothing, nothing, CAUSAL, 1.)
    return out[0, :, 0] > 0


def draw(path: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), constrained_layout=True)
    for ax, seen, title in (
            (axes[0], seen_bidirectional(), f'bidirectional: window {WINDOW}, {SUMMARIES} summaries of all'),
            (axes[1], seen_causal(),
             f'causal: window {CAUSAL.window_size}, a summary of each chunk of {CAUSAL.chunk_size}')):
        extra = seen.shape[1] - TOKENS
        picture = seen.float()
        picture[:, :extra] *= 2
        ax.imshow(picture, cmap=matplotlib.colors.ListedColormap(['white', '#2a6fbb', '#c79a00']), vmin=0, vmax=2)
        ax.axvline(extra - 0.5, color='black', linewidth=1)
        ax.set(title=title, ylabel='query', xlabel='summaries (yellow) | tokens (blue)')
        ax.set_xticks([extra, extra + TOKENS - 1], ['0', str(TOKENS - 1)])
        ax.set_yticks([0, TOKENS - 1])
        ax.set_xticks(torch.arange(-0.5, seen.shape[1]).tolist(), minor=True)
        ax.set_yticks(torch.arange(-0.5, TOKENS).tolist(), minor=True)
        ax.grid(which='minor', color='#dddddd', linewidth=0.5)
        ax.tick_params(which='minor', length=0)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('sequences.png'))
    draw(parser.parse_args().out)


if __name__ == '__main__':
    main()
