"""Sequence Zoo: language models whose token mixer is picked by a flag."""
