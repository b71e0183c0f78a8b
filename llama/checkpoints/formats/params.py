"""Sizes of other formats in the terms of Meta's params.json. Knows no file."""

from __future__ import annotations

from llama.model import ModelArgs


def ffn_terms(dim: int, hidden: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) that give a feed-forward of width `hidden`.

    Published values of Meta's models are preferred; any other width becomes a multiple of itself.

    Raises:
        ValueError: `dim` is not even and positive, or `hidden` is not positive.
    """
    if hidden < 1:
        raise ValueError(f"the feed-forward must have a positive width, not {hidden}")
    for multiplier in (None, 1.3, 1.2, 1.5, 1.0):
        for multiple_of in (256, 1024, 4096):
            args = ModelArgs(
                dim=dim, n_heads=1, multiple_of=multiple_of, ffn_dim_multiplier=multiplier
            )
            if args.hidden_dim == hidden:
                return multiple_of, multiplier
    # Half a unit above `hidden`: rounding then never gives less than `hidden`.
    return hidden, (hidden + 0.5) / int(2 * (4 * dim) / 3)
