"""Mixers that keep all keys and values: softmax over the past, its windows, its decay and its projections."""
