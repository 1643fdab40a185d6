"""Rotary positions (Su et al. 2021, arXiv:2104.09864), and their scalings to contexts longer than those of training."""

import dataclasses
import math

import jax.numpy as jnp

from kernels.array_typing import Array, Float, Int
from zoo.layers.rounded_once import rounded_once
from zoo.settings import setting

KINDS = {
    "none": "", "linear": "2306.15595", "llama3": "Llama 3.1's, by wavelength", "yarn": "2309.00071",
}  # fmt: skip


@dataclasses.dataclass
class RopeScaling:
    """How the frequencies f of a model trained on `original_context` tokens become those of one for `factor` times it.

    linear   f / factor
    llama3   f / factor for wavelengths above original_context / low_frequency_factor, f for those below
             original_context / high_frequency_factor, between them a mixture linear in 1 / wavelength
    yarn     f / factor for pairs that turn less than beta_slow times in original_context, f for those that turn
             more than beta_fast times, between them a mixture linear in the pair's number; and q and k are
             multiplied by attention_factor
    """

    kind: str = setting("none", "how frequencies change", choices=KINDS, also=("rope_type",))
    factor: float = setting(1.0, "the new context / the old one", at_least=1, at_most=1e6)
    original_context: int = setting(0, "of training, of llama3 and yarn", unit="token", zero="not known")
    low_frequency_factor: float = setting(1.0, "llama3's", at_least=1e-3, at_most=1e6)
    high_frequency_factor: float = setting(4.0, "llama3's", at_least=1e-3, at_most=1e6)
    beta_fast: float = setting(32.0, "yarn's: turns", above=0, at_most=1e6)
    beta_slow: float = setting(1.0, "yarn's: turns", above=0, at_most=1e6)
    attention_factor: float = setting(0.0, "yarn's", zero="0.1 ln(factor) + 1", above=0, at_most=1e3)
    truncate: bool = setting(True, "yarn's bounds are rounded outwards to whole pairs")

    def check(self) -> list[str]:
        """What is wrong with the settings, each as "<field>: message"."""
        found = []
        if self.kind == "none" and self.factor != 1:
            found.append(f"factor: {self.factor:g} does nothing with kind=none; choose another kind")
        if self.kind in ("llama3", "yarn") and not self.original_context:
            found.append(f"original_context: {self.kind} needs the number of tokens of training's contexts")
        if self.kind == "llama3" and self.low_frequency_factor >= self.high_frequency_factor:
            high = f"high_frequency_factor = {self.high_frequency_factor:g}"
            found.append(f"low_frequency_factor: got {self.low_frequency_factor:g}, expected less than {high}")
        if self.kind == "yarn" and self.beta_slow >= self.beta_fast:
            found.append(f"beta_slow: got {self.beta_slow:g}, expected less than beta_fast = {self.beta_fast:g}")
        return found

    def frequencies(self, width: int, base: float) -> tuple[Float[Array, "K/2"], float]:
        """In radians a token, of the pairs of `width` channels, and the factor of what is turned."""
        half = width // 2
        found = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
        if self.kind == "linear":
            return found / self.factor, 1.0
        if self.kind == "llama3":
            turns = found * self.original_context / (2 * math.pi)
            low, high = self.low_frequency_factor, self.high_frequency_factor
            return _mixture(found, self.factor, jnp.clip((turns - low) / (high - low), 0, 1)), 1.0
        if self.kind == "yarn":
            # The pair, a real number, that turns so many times in the original context.
            first, last = (
                width * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))
                for turns in (self.beta_fast, self.beta_slow)
            )
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, width - 1)
            ramp = (jnp.arange(half, dtype=jnp.float32) - first) / max(last - first, 1e-3)
            factor = self.attention_factor or 0.1 * math.log(self.factor) + 1
            return _mixture(found, self.factor, 1 - jnp.clip(ramp, 0, 1)), factor
        return found, 1.0


def _mixture(frequencies, factor, kept):
    return kept * frequencies + (1 - kept) * frequencies / factor


def rotary(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "B T"],
    base: float = 10_000.0,
    *,
    width: int | None = None,
    scaling: RopeScaling | None = None,
) -> Float[Array, "B T H K"]:
    """Turn the pair (x_i, x_{i + W/2}) by the angle positions * base^(-2i/W), so that q_t . k_s depends on t - s alone.

    Of the first `width` = W channels (default: all, W = K); the others stay. The halves are paired as in GPT-NeoX and
    Llama. Angles are float32: exact to 1e-3 radians up to 2^14 tokens and to 6e-2 up to 2^20.
    """
    width = x.shape[-1] if width is None else width
    half = width // 2
    frequency, factor = (scaling or RopeScaling()).frequencies(width, base)  # [W/2]
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency  # [B, T, 1, W/2]
    cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)

    def turn(x):
        x1, x2, rest = x[..., :half], x[..., half:width], x[..., width:]
        return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)

    return rounded_once(turn, x)
