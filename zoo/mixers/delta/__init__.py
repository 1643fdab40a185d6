"""Mixers whose state a token corrects: S_t = (diag(exp(g_t)) - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T and its kin."""
