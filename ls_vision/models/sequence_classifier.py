"""Classifiers of one text and of two, with long-short attention (Zhu et al., NeurIPS 2021, section on LRA).

Structure and parameter names are those of the released code, so that its checkpoints load.

Shapes: B batch, N tokens, C channels.
"""
from typing import Callable, Optional, Tuple

import torch
from torch import Tensor, nn

from ..layers import LongShortAttention1d
from ..layers.checks import check_at_least, check_choice, embed

POOLINGS = ('cls_last_layer', 'cls_token', 'mean')


class SequenceBlock(nn.Module):
    """A pre-norm transformer block over tokens and, where there is one, a cls token that skips the first norm."""

    def __init__(self, dim: int, hidden_dim: int, attention: nn.Module, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mha = attention
        self.dropout1 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlpblock = nn.Sequential(
            nn.Linear(dim, hidden_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden_dim, dim),
            nn.Dropout(dropout))

    def forward(
            self,
            x: Tensor,
            padding: Optional[Tensor],
            cls: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """(B, N, C), (B, N) and (B, 1, C) -> tokens and cls token of the same shapes."""
        if cls is None:
            return self._mlp(x + self.dropout1(self.mha(self.norm1(x), padding))), None
        attended, attended_cls = self.mha(self.norm1(x), padding, cls)
        return self._mlp(x + self.dropout1(attended)), self._mlp(cls + self.dropout1(attended_cls))

    def _mlp(self, x: Tensor) -> Tensor:
        return x + self.mlpblock(self.norm2(x))


class Embeddings(nn.Module):
    """Embeddings of tokens and of their positions."""

    def __init__(self, vocab_size: int, max_length: int, dim: int, dropout: float):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, dim)
        self.position_embeddings = nn.Embedding(max_length, dim)
        for embedding in (self.word_embeddings, self.position_embeddings):
            nn.init.normal_(embedding.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N) -> (B, N, C)."""
        words = embed(self.word_embeddings, tokens)
        N, limit = tokens.shape[1], self.position_embeddings.num_embeddings
        if limit < N:
            raise ValueError(f'tokens has {N} of them in a row, expected max_length {limit} or fewer.')
        return self.dropout(words + self.position_embeddings(torch.arange(N, device=tokens.device)))


class SequenceEncoder(nn.Module):
    """From token numbers to one vector of each text."""

    def __init__(
            self,
            vocab_size: int = 512,
            max_length: int = 2048,
            dim: int = 64,
            depth: int = 2,
            num_heads: int = 2,
            hidden_dim: int = 128,
            *,
            window_size: int = 8,
            rank: int = 32,
            pooling: str = 'cls_last_layer',
            dropout: float = 0.,
            attn_drop: float = 0.,
            attention: Optional[Callable[[], nn.Module]] = None,
    ):
        """
        Args:
            vocab_size: Number of tokens; 0 is padding.
            max_length: Longest text.
            dim: C.
            depth: Number of blocks.
            num_heads: Of attention.
            hidden_dim: Width of the MLPs.
            window_size, rank: Of `LongShortAttention1d`.
            pooling: 'cls_last_layer' (a learned token that joins in the last block), 'cls_token' (from the first block
                on) or 'mean' (over all positions, padding counted as 0, as in the released code).
            dropout: Rate after embeddings, attention and MLPs.
            attn_drop: Dropout rate of attention weights.
            attention: Makes another attention layer, called as `LongShortAttention1d` is.

        Raises:
            ValueError: The pooling is unknown or a size is no whole number of 1 or more.
        """
        super().__init__()
        check_choice('pooling', pooling, POOLINGS)
        check_at_least(1, vocab_size=vocab_size, max_length=max_length, depth=depth, hidden_dim=hidden_dim)
        self.depth, self.pooling = depth, pooling
        self.embeddings = Embeddings(vocab_size, max_length, dim, dropout)
        self.cls_embed = None if pooling == 'mean' else nn.Parameter(torch.zeros(1, 1, dim))
        for i in range(depth):
            attn = attention() if attention else LongShortAttention1d(
                dim, num_heads, window_size=window_size, rank=rank, attn_drop=attn_drop)
            setattr(self, f'transformer_{i}', SequenceBlock(dim, hidden_dim, attn, dropout))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, key_padding_mask: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            tokens: (B, N) token numbers.
            key_padding_mask: (B, N) bool, True where a token is PADDING; by default where it is 0.

        Returns:
            (B, C).

        Raises:
            ValueError: A text is too long, or the tokens are not those of the vocabulary.
        """
        x, cls = self.embeddings(tokens), None
        padding = tokens == 0 if key_padding_mask is None else key_padding_mask
        for i in range(self.depth):
            if self.cls_embed is not None and i == (0 if self.pooling == 'cls_token' else self.depth - 1):
                cls = self.cls_embed.expand(x.shape[0], -1, -1)
            x, cls = getattr(self, f'transformer_{i}')(x, padding, cls)
        if cls is not None:
            return self.norm(cls)[:, 0]
        return self.norm(x).masked_fill(padding.unsqueeze(-1), 0.).mean(1)


class ClassifierHead(nn.Module):
    """(B, C) -> (B, classes)."""

    def __init__(self, dim: int, hidden_dim: int, num_classes: int):
        super().__init__()
        check_at_least(1, num_classes=num_classes)
        self.mlpblock = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlpblock(x)


class SequenceClassifier(nn.Module):
    """Classes of a text: LRA's ListOps and Text."""

    def __init__(self, num_classes: int, dim: int = 64, hidden_dim: int = 128, **encoder_args):
        """
        Args:
            num_classes: Number of classes.
            dim, hidden_dim, encoder_args: As in `SequenceEncoder`.
        """
        super().__init__()
        self.model = SequenceEncoder(dim=dim, hidden_dim=hidden_dim, **encoder_args)
        self.seq_classifer = ClassifierHead(dim, hidden_dim, num_classes)  # sic, a released name

    def forward(self, tokens: Tensor, key_padding_mask: Optional[Tensor] = None) -> Tensor:
        """(B, N) token numbers, 0 for padding -> (B, classes) logits."""
        return self.seq_classifer(self.model(tokens, key_padding_mask))


class TwoTextClassifier(nn.Module):
    """Classes of a pair of texts, both through one encoder: LRA's Retrieval."""

    def __init__(self, num_classes: int, dim: int = 64, hidden_dim: int = 128, **encoder_args):
        """
        Args:
            num_classes: Number of classes.
            dim, hidden_dim, encoder_args: As in `SequenceEncoder`.
        """
        super().__init__()
        self.model = SequenceEncoder(dim=dim, hidden_dim=hidden_dim, **encoder_args)
        self.seq_classifer = ClassifierHead(4 * dim, hidden_dim, num_classes)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two (B, N) of token numbers, 0 for padding -> (B, classes) logits."""
        a, b = self.model(first), self.model(second)
        return self.seq_classifer(torch.cat([a, b, a * b, a - b], dim=-1))
