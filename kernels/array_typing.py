"""Array types of the public ops (jaxtyping), and the legend of their dimension letters.

    B  batch          T  time, in tokens      L  length of keys and values
    H  heads of v     G  heads of q and k (attention: heads of k and v)
    K  key width      V  value width          D  channels, or the model's width
    W  taps of a convolution                  N  state of a channel (cross-entropy: tokens of a flattened batch)

The annotations are checked at run time in the test suite only (tests/conftest.py).
"""

from jax import Array
from jaxtyping import Bool, Complex, Float, Inexact
from jaxtyping import Integer as Int  # signed or not

__all__ = ["Array", "Bool", "Complex", "Float", "Inexact", "Int"]
