"""How element-wise kernels reach memory in vectors.

The compiler makes vectors only where it knows the alignment of the address and of the mask. So a full block of aligned
tensors takes a body of its own, without a mask, behind a branch that is uniform in the program; a tensor's last block,
and every block of a tensor that is not aligned, takes the same arithmetic with single accesses under a mask.

V, the elements of one access, is the same for all tensors of a body, whatever their dtypes: 16 bytes of the widest.
With 16 bytes of each a thread would load other elements than it stores, and all would go through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointer(address, TYPE: tl.constexpr, V: tl.constexpr):
    """The address, an integer, of elements that are read V at a time: a hint on the integer is lost in the cast."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), V * (TYPE.primitive_bitwidth // 8))


@triton.jit
def inside(offsets, n, V: tl.constexpr):
    """The mask of a block: for vectors all true, which the compiler drops."""
    if V > 1:
        mask = tl.full(offsets.shape, True, tl.int1)
    else:
        mask = offsets < n
    return mask
