"""CompressAI's GDN and GDN1 on the fused op: subclasses without a parameter, a buffer or an attribute of their own.

An instance of compressai.layers.GDN becomes one of these by `module.__class__ = GDN`, and back: all they add lies in
the class. Their state_dict is CompressAI's. The bounds are computed from the attributes `minimum` and
`reparam_offset`, as CompressAI computes its buffers once: the buffers are not read, which would wait for a GPU.
"""

from __future__ import annotations

import compressai.layers
import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import gdn

__all__ = ["GDN", "GDN1"]


class GDN(compressai.layers.GDN):
    """compressai.layers.GDN in one fused pass forward and one backward.

    Takes [B, C, H, W] in every dtype that functional.gdn takes, and returns x's dtype. recompute (class or instance
    attribute): keep nothing but x for the backward pass. torch.jit.script compiles plain PyTorch instead.
    Raises what functional.gdn raises.
    Source: Ballé et al. (ICLR 2016), as in CompressAI.
    """

    recompute: bool = False
    simplified: bool = False
    __constants__ = ("simplified",)  # of TorchScript

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        if not torch.jit.is_scripting():  # TorchScript leaves the block out, and what it cannot compile with it
            return gdn(
                x,
                self.beta,
                self.gamma,
                inverse=self.inverse,
                simplified=self.simplified,
                beta_min=self.beta_reparam.minimum,
                reparam_offset=self.beta_reparam.reparam_offset,
                recompute=self.recompute,
            )
        return self._lic_fast_scripted(x)

    def _lic_fast_scripted(self, x: Tensor) -> Tensor:
        gamma = self.gamma_reparam(self.gamma)[:, :, None, None]
        norm = F.conv2d(x.abs() if self.simplified else x**2, gamma, self.beta_reparam(self.beta))
        norm = norm if self.simplified else norm.sqrt()
        return x * norm if self.inverse else x / norm


class GDN1(compressai.layers.GDN1):
    """compressai.layers.GDN1, the simplified GDN, as GDN above.

    Raises what functional.gdn raises.
    Source: Johnston et al. (2019), as in CompressAI.
    """

    recompute: bool = False
    simplified: bool = True
    __constants__ = ("simplified",)
    forward = GDN.forward
    _lic_fast_scripted = GDN._lic_fast_scripted
