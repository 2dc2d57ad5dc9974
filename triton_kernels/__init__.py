"""Triton kernels with plain launchers: tensors in, tensors out; no choice of backend, no autograd."""
