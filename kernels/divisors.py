"""Sizes of blocks: what divides an axis evenly."""


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`; 1 if there is none."""
    return next(d for d in range(max(1, min(number, limit)), 0, -1) if number % d == 0)
