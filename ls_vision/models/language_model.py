"""A language model with causal long-short attention (Zhu et al., NeurIPS 2021, section on enwik8 and text8).

Structure and parameter names are those of the released code.

Shapes: B batch, N tokens, C channels, V tokens of the vocabulary.
"""
from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import CausalLongShortAttention1d
from ..layers.checks import check_at_least, embed


class FeedForward(nn.Module):
    """(B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float, gelu: bool):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.act = nn.GELU() if gelu else nn.ReLU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))


class LanguageModelLayer(nn.Module):
    """Attention and a feed-forward map.

    With `pre_ln` the residual stream is the normalised one, as in all released recipes, which is not the usual
    pre-norm; without it, norms follow the sums.
    """

    def __init__(self, attention: nn.Module, dim: int, hidden_dim: int, dropout: float, pre_ln: bool, gelu: bool):
        super().__init__()
        self.pre_ln = pre_ln
        self.attn = attention
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ff = FeedForward(dim, hidden_dim, dropout, gelu)

    def forward(self, x: Tensor, **attention_args: Any) -> Tuple[Tensor, Any]:
        """(B, N, C) -> the same, and what attention returns besides its output."""
        if self.pre_ln:
            x = self.norm1(x)
        attended = self.attn(x, **attention_args)
        attended, state = attended if isinstance(attended, tuple) else (attended, None)
        if self.pre_ln:
            x = self.norm2(x + attended)
            return x + self.ff(x), state
        x = self.norm1(x + attended)
        return self.norm2(x + self.ff(x)), state


class LanguageModel(nn.Module):
    """Logits of the next token, for whole texts, segments or single tokens."""

    def __init__(
            self,
            vocab_size: int,
            dim: int = 512,
            depth: int = 12,
            num_heads: int = 8,
            hidden_dim: int = 2048,
            *,
            window_size: int = 512,
            chunk_size: int = 16,
            chunk_rank: int = 1,
            max_chunks: Optional[int] = None,
            pre_ln: bool = True,
            gelu: bool = True,
            dropout: float = 0.,
            attentions: Optional[Sequence[nn.Module]] = None,
    ):
        """
        Args:
            vocab_size: V.
            dim: C.
            depth: Number of layers.
            num_heads: Of attention.
            hidden_dim: Width of the feed-forward maps.
            window_size, chunk_size, chunk_rank, max_chunks: Of `CausalLongShortAttention1d`.
            pre_ln: Norms before attention and feed-forward map, see `LanguageModelLayer`.
            gelu: GELU in place of ReLU.
            dropout: Rate after embeddings, attention, feed-forward maps and the last layer.
            attentions: Other attention layers, `depth` of them, called as `CausalLongShortAttention1d` is.

        Raises:
            ValueError: A size is no whole number of 1 or more, or there are not `depth` attention layers.
        """
        super().__init__()
        check_at_least(1, vocab_size=vocab_size, dim=dim, depth=depth, hidden_dim=hidden_dim)
        if attentions is not None and len(attentions) != depth:
            raise ValueError(f'attentions has {len(attentions)} layers, expected depth {depth} of them.')
        self.dim = dim
        self.in_emb = nn.Embedding(vocab_size, dim)
        self.out_emb = nn.Linear(dim, vocab_size)
        self.out_emb.weight = self.in_emb.weight
        self.emb_dropout = nn.Dropout(dropout)
        layers = attentions or [
            CausalLongShortAttention1d(
                dim, num_heads, window_size=window_size, chunk_size=chunk_size, chunk_rank=chunk_rank,
                max_chunks=max_chunks, proj_drop=dropout) for _ in range(depth)]
        self.layers = nn.ModuleList(
            LanguageModelLayer(attn, dim, hidden_dim, dropout, pre_ln, gelu) for attn in layers)
        self.apply(_initialise)

    def forward(
            self,
            tokens: Tensor,
            key_padding_mask: Optional[Tensor] = None,
            *,
            states: Any = ...,
    ) -> Union[Tensor, Tuple[Tensor, List[Any]]]:
        """
        Args:
            tokens: (B, N) token numbers; any N.
            key_padding_mask: (B, N) bool, True where a token is PADDING, whose logits are of no meaning.
            states: None at the start of a text, or what the call on the tokens before returned. Left out, nothing is
                kept.

        Returns:
            (B, N, V) logits of the token after each, with `states` a pair of that and a state for each layer.

        Raises:
            ValueError: The tokens are not those of the vocabulary, or the states don't fit.
        """
        if states is not ... and states is not None and (
                not isinstance(states, (list, tuple)) or len(states) != len(self.layers)):
            found = f'{len(states)} of them' if isinstance(states, (list, tuple)) else f'a {type(states).__name__}'
            raise ValueError(f'states is {found}, expected None or the list of {len(self.layers)} of an earlier call.')
        x = self.emb_dropout(embed(self.in_emb, tokens) * self.dim ** 0.5)
        kept = []
        for i, layer in enumerate(self.layers):
            args = {} if key_padding_mask is None else {'key_padding_mask': key_padding_mask}
            if states is ...:
                x, _ = layer(x, **args)
            else:
                x, state = layer(x, state=None if states is None else states[i], **args)
                kept.append(state)
        logits = self.out_emb(self.emb_dropout(x))
        return logits if states is ... else (logits, kept)

    @torch.no_grad()
    def generate(
            self,
            tokens: Tensor,
            count: int,
            temperature: float = 1.,
            key_padding_mask: Optional[Tensor] = None,
    ) -> Tensor:
        """Continues texts token by token.

        Args:
            tokens: (B, N), N at least 1.
            count: Number of tokens to add.
            temperature: Divides the logits; 0 takes the likeliest token.
            key_padding_mask: (B, N) bool, True where a token is PADDING, which must be on the left.

        Returns:
            (B, N + count).

        Raises:
            ValueError: There is no token to begin with, a text ends with padding, or count or temperature is negative.
        """
        check_at_least(0, count=count)
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f'tokens has shape {list(tokens.shape)}, expected (batch, 1 or more).')
        if not 0 <= temperature < float('inf'):
            raise ValueError(f'temperature is {temperature}, expected 0 or more.')
        if key_padding_mask is not None and key_padding_mask[:, -1].any():
            raise ValueError('key_padding_mask is True for the last token of a text, expected padding on the left.')
        states, new, out = None, tokens, [tokens]
        for _ in range(count):
            logits, states = self(new, key_padding_mask, states=states)
            key_padding_mask = None  # what is generated is no padding
            last = logits[:, -1].float()
            if temperature == 0:
                new = last.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial(F.softmax(last / temperature, dim=-1), 1)
            out.append(new)
        return torch.cat(out, dim=1)


def _initialise(module: nn.Module) -> None:
    """The released initialisation: N(0, .02) for weights and position biases, N(1, .02) for norms, 0 for biases."""
    if isinstance(module, nn.LayerNorm):
        nn.init.normal_(module.weight, 1., 0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, 0., 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, CausalLongShortAttention1d):
        nn.init.normal_(module.r_w_bias, 0., 0.02)
        nn.init.normal_(module.r_r_bias, 0., 0.02)
