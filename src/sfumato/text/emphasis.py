"""Words that count for more or less: `(word)`, `((word))`, `(word:1.3)`, `[word]`, as A1111's web UI reads them.

A pair of round brackets multiplies the weight of what it holds by 1.1, or by the number after its colon; square ones
divide by 1.1; a backslash makes a bracket an ordinary character. The states of the encoder are multiplied by the
weights of their pieces, and all states of a window by one more number, so that their mean stays what it was.
"""

import re

import torch
from torch import Tensor

ROUND, SQUARE = 1.1, 1 / 1.1
NUMBER = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)")
ESCAPED = "()[]\\"


def weighed(text: str) -> tuple[str, list[float]]:
    """The prompt without its marks, and the weight of each of its characters.

    A bracket that is never closed holds all the rest; one that was never opened is an ordinary character.
    """
    plain: list[str] = []
    weights: list[float] = []
    opened: list[tuple[str, int]] = []  # which bracket, and where what it holds begins

    def close(kind: str, by: float) -> bool:
        at = next((i for i in reversed(range(len(opened))) if opened[i][0] == kind), None)
        if at is None:
            return False
        _scale(weights, opened.pop(at)[1], by)
        return True

    i = 0
    while i < len(text):
        one, step = text[i], 1
        number = NUMBER.match(text, i)
        if one == "\\" and text[i + 1 : i + 2] and text[i + 1] in ESCAPED:
            one, step = text[i + 1], 2
        elif one in "([":
            opened.append((one, len(plain)))
            one = ""
        elif number and close("(", float(number[1])):
            one, step = "", len(number[0])
        elif (one == ")" and close("(", ROUND)) or (one == "]" and close("[", SQUARE)):
            one = ""
        if one:
            plain.append(one)
            weights.append(1.0)
        i += step
    for kind, begin in opened:
        _scale(weights, begin, ROUND if kind == "(" else SQUARE)
    return "".join(plain), weights


def _scale(weights: list[float], begin: int, by: float) -> None:
    for i in range(begin, len(weights)):
        weights[i] *= by


def of_pieces(spans: list[tuple[int, int]], weights: list[float], shift: int = 0) -> list[float]:
    """The weight of each piece, that of its last character; 1 for pieces that stand for no character of the prompt.

    spans: from which to which character each piece reaches, with the space before it or without. shift: of the prompt
    within what was cut into pieces.
    """
    out = []
    for start, end in spans:
        inside = [i - shift for i in range(start, end) if 0 <= i - shift < len(weights)]
        out.append(weights[inside[-1]] if inside else 1.0)
    return out


def emphasised(states: Tensor, weights: Tensor) -> Tensor:
    """States (B, L, width) times weights (B, L), with the mean that each row had before."""
    before = states.float()
    after = before * weights[:, :, None]
    old, new = before.mean((1, 2), keepdim=True), after.mean((1, 2), keepdim=True)
    ratio = torch.where(new.abs() > 1e-8, old / new, torch.ones_like(new))
    return (after * ratio).to(states.dtype)
