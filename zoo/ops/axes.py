"""Logical axes that several ops have."""

OF_TOKENS = ("batch", "time")
OF_CHANNELS = ("batch", "time", "heads")
