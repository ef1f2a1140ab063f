"""Triton kernels of otpo: the transport between two responses' tokens, and token rows moved between tokens and experts.

Importing this package imports no Triton.
"""
