"""Mixers whose state a token adds to, and that decays: S_t = G_t S_{t-1} + k_t v_t^T with a diagonal G."""
