"""Mixers that filter each channel by a state space model: h_t = A_t h_{t-1} + B_t x_t with a diagonal A."""
