"""Attention on the processor: a C kernel without torch or Python in it, how it is built and found, and its backend."""
