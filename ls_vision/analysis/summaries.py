"""What the summaries of a model are worth in an image: how different they are, and how much attention they get.

    rows = use_of_summaries(record(model, image))
    print(table(rows))

Of r summaries some may look at the same places: then fewer would do. Counted is how many directions they span, the
participation ratio of the Gram matrix of their unit vectors, (sum of eigenvalues)^2 / sum of squared eigenvalues
= r^2 / sum of squared cosines: 1 where all are the same, r where all are orthogonal.

Shapes: h heads, r rank, N tokens, d head width.
"""
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ls_vision.analysis.record import Record
from ls_vision.analysis.tables import markdown


@dataclass
class SummaryUse:
    """One head of one block."""
    block: str
    head: int
    rank: int
    maps_rank: float
    """Effective rank of the summaries' maps over the image, 1 to r; 0 without summaries."""
    keys_rank: float
    """The same of their keys, as queries meet them."""
    overlap: float
    """Mean cosine of two summaries' maps, 0 to 1; 1 with a single one."""
    share: float
    """Of a local token's attention, the mean share that goes to summaries, ..."""
    window_share: float
    """... to the tokens of its window (of the image in full attention), ..."""
    global_share: float
    """... and to global tokens; the three sum to 1."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def use_of_summaries(records: Sequence[Record]) -> list[SummaryUse]:
    """A row for each head of each block, in order."""
    rows = []
    for record in records:
        shares = record.mean_shares
        r = record.rank
        for head in range(record.num_heads):
            maps_rank = keys_rank = overlap = 0.
            if record.projection is not None and record.summary_keys is not None:
                maps = record.projection[head].flatten(1)
                maps_rank = effective_rank(maps)
                keys_rank = effective_rank(record.summary_keys[head])
                overlap = mean_overlap(maps)
            window, summaries, global_tokens = shares[head].tolist()
            rows.append(SummaryUse(
                record.name, head, r, maps_rank, keys_rank, overlap, summaries, window, global_tokens))
    return rows


def effective_rank(vectors: Tensor) -> float:
    """How many directions (r, n) vectors span, 1 to r: the participation ratio of their cosines' matrix.

    Vectors of zeros do not count; of nothing else, 0.
    """
    cosines = _cosines(vectors)
    trace = float(cosines.trace())
    return trace ** 2 / float(cosines.square().sum()) if trace > 0 else 0.


def mean_overlap(vectors: Tensor) -> float:
    """Mean cosine of two of (r, n) vectors; 1 of a single one."""
    r = vectors.shape[0]
    cosines = _cosines(vectors)
    return float((cosines.sum() - cosines.trace()) / (r * (r - 1))) if r > 1 else 1.


def _cosines(vectors: Tensor) -> Tensor:
    unit = F.normalize(vectors.double(), dim=-1)
    return unit @ unit.t()


def table(rows: Sequence[SummaryUse]) -> str:
    """The rows as a Markdown table."""
    def number(name: str) -> Any:
        return lambda row: f'{getattr(row, name):.2f}'

    return markdown(rows, {
        'block': lambda row: row.block, 'head': lambda row: str(row.head), 'r': lambda row: str(row.rank),
        'maps span': number('maps_rank'), 'keys span': number('keys_rank'), 'overlap': number('overlap'),
        'share of summaries': number('share'), 'of the window': number('window_share'),
        'of global tokens': number('global_share')})
