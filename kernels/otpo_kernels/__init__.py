"""Triton kernels of otpo. This release holds their place; the kernels are not in it yet."""
