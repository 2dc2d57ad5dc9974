"""The specification of every op: plain PyTorch, any floating dtype, any device."""
