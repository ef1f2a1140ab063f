"""Triton kernels of otpo: the transport between two responses' tokens, and row moves between tokens and experts.

Importing this package imports no Triton.
"""
