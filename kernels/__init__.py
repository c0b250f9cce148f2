"""Kernels: region → program → source.

Nothing is generated yet: what the passes leave goes to Inductor.  This package will know Triton and C++, and nothing of
optimizers or models.
"""
