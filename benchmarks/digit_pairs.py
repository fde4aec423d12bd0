"""Pairs of digits, one at each end of a strip, and the question whether they are the same: a task made by rule.

Each digit alone says nothing about the answer. No token of a model with windows sees both digits, because the blank
part of the strip is longer than its windows reach (`needed_columns`), and the classifier is linear on the mean of the
tokens. Its scores are then sums of one part that depends on the left digit and one that depends on the right one, and
of such scores none has a smaller cross-entropy than equal odds, 1 bit. Its accuracy may still differ from 50 %, since
the signs of scores near zero can follow an order of the digits: of all such scores the best have 75 %.

Models also name both digits. Without that help full attention did not leave equal odds in 2,000 updates.

Shapes: B images, k digits, n places, S side of the square that a digit is drawn in.
"""
import functools

import torch
from torch import Tensor

HEIGHT, WIDTH = 16, 288
DIGITS = 6  # 0 to 5
DIGIT_HEIGHT, DIGIT_WIDTH, STROKE = 12, 7, 2
NOISE = 0.1  # standard deviation; strokes are 1, the rest is 0
SEGMENTS = ('abcdef', 'bc', 'abged', 'abgcd', 'fgbc', 'afgcd')
"""Lit segments of a seven-segment display, by digit: a top, b and c right, d bottom, e and f left, g middle."""
CLASSES = 2 + 2 * DIGITS
"""Scores of a model: different or same, then the left digit, then the right one."""


def needed_columns(window_size: int, depth: int, digit_columns: int) -> int:
    """The least columns of tokens of a strip on which no token sees both digits.

    What a token sees through `depth` blocks is `2 * depth * window_size` columns wide, as a window's keys reach over
    its queries by half a window on each side.
    """
    return 2 * depth * window_size + 2 * digit_columns - 1


def make_pairs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (B, 1, 16, 288), and (B, 3): 1 if the digits are the same, the left digit, the right digit.

    Half of the pairs are the same, on average; digits and places are uniform.
    """
    generator = torch.Generator().manual_seed(seed)
    digits = all_places()
    k, n, S, _ = digits.shape
    left = torch.randint(k, (count,), generator=generator)
    same = torch.rand(count, generator=generator) < 0.5
    right = torch.where(same, left, (left + torch.randint(1, k, (count,), generator=generator)) % k)
    places = torch.randint(n, (2, count), generator=generator)
    images = NOISE * torch.randn(count, 1, HEIGHT, WIDTH, generator=generator)
    images[:, 0, :, :S] += digits[left, places[0]]
    images[:, 0, :, -S:] += digits[right, places[1]]
    return images, torch.stack([same.long(), left, right], dim=1)


@functools.cache
def all_places() -> Tensor:
    """(k, n, S, S): each digit at all places of its square, two pixels apart."""
    squares = []
    for digit in range(DIGITS):
        strokes = draw(digit)
        for row in range(0, HEIGHT - DIGIT_HEIGHT + 1, 2):
            for column in range(0, HEIGHT - DIGIT_WIDTH + 1, 2):
                square = torch.zeros(HEIGHT, HEIGHT)
                square[row:row + DIGIT_HEIGHT, column:column + DIGIT_WIDTH] = strokes
                squares.append(square)
    return torch.stack(squares).unflatten(0, (DIGITS, -1))


def draw(digit: int) -> Tensor:
    """(12, 7): the strokes of a digit on a seven-segment display."""
    out = torch.zeros(DIGIT_HEIGHT, DIGIT_WIDTH)
    middle = DIGIT_HEIGHT // 2
    upper, lower = slice(0, middle), slice(middle, None)
    left, right, all_columns = slice(0, STROKE), slice(-STROKE, None), slice(None)
    parts = dict(
        a=(slice(0, STROKE), all_columns), d=(slice(-STROKE, None), all_columns),
        g=(slice(middle - STROKE // 2, middle + STROKE // 2), all_columns),
        f=(upper, left), b=(upper, right), e=(lower, left), c=(lower, right))
    for segment in SEGMENTS[digit]:
        out[parts[segment]] = 1.
    return out
