"""Which form of linear attention a device runs, and the sizes it runs in."""

from kernels.dispatch import Device

CACHE_FLOATS = 32 * 1024  # of states that a CPU core updates token after token: they stay in its second-level cache


def order(device: Device, q, v, log_decay) -> list[str]:
    """Implementations by preference.

    On two CPU cores the recurrent form is as fast as the chunked one forward and backward, or faster, and up to three
    times as fast forward (benchmarks/kernels.py), in two thirds of the memory. A decay per key costs the chunked form
    log2(chunk) passes over q and k on top of its matmuls: there it is 2 to 3 times slower. Heads of v that share q and
    k do so in the chunked form only, and with more cores it has the matmuls to use them.
    """
    per_key = log_decay is not None and log_decay.ndim == 4
    own_heads = q.shape[-2] == v.shape[-2]
    return ["recurrent", "chunked"] if device.platform == "cpu" and (per_key or own_heads) else ["chunked"]


def chunk_size(time: int, wanted: int | None) -> int:
    """Tokens a chunk of the chunked form, a power of two: 64 unless asked, no more than `time` needs."""
    return 1 << (min(wanted or 64, time) - 1).bit_length()


def state_block(batch: int, num_heads: int, state_size: int) -> tuple[int, int]:
    """Batch entries and heads whose states, `state_size` floats each, the recurrent form updates together."""
    heads = largest_divisor(num_heads, CACHE_FLOATS // state_size)
    return (largest_divisor(batch, CACHE_FLOATS // (state_size * heads)) if heads == num_heads else 1), heads


def largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(max(1, min(number, limit)), 0, -1) if number % d == 0)
