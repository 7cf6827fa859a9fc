"""A stand-in for einops: reordering named dimensions, and dropping those of length one."""

from torch import Tensor


def rearrange(x: Tensor, pattern: str) -> Tensor:
    """``x`` with its dimensions, named on the left of the arrow, in the order of the right."""
    left, right = (side.split() for side in pattern.split("->"))
    return x.permute([left.index(name) for name in right if name in left] + missing(left, right)).reshape(
        [x.shape[left.index(name)] for name in right]
    )


def missing(left: list[str], right: list[str]) -> list[int]:
    """Places of the dimensions that are dropped."""
    return [place for place, name in enumerate(left) if name not in right]


def repeat(x: Tensor, pattern: str, **lengths: int) -> Tensor:
    """Not called in training."""
    raise NotImplementedError
