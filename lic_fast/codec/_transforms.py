"""Analysis and synthesis transforms of CompressAI's layers: [B, 3, 16 h, 16 w] to latents [B, M, h, w] and back."""

from __future__ import annotations

from torch import nn

_STAGES = 4


def light(n: int, m: int) -> tuple[nn.Module, nn.Module]:
    """Four strided 5x5 convolutions with GDN between them, as in Minnen et al. (2018) and CompressAI's mbt2018."""
    from compressai.layers import GDN
    from compressai.models.utils import conv, deconv

    down, up = [3, n, n, n, m], [m, n, n, n, 3]
    analysis: list[nn.Module] = []
    synthesis: list[nn.Module] = []
    for i in range(_STAGES):
        analysis += [conv(down[i], down[i + 1]), *([GDN(n)] if i < _STAGES - 1 else [])]
        synthesis += [deconv(up[i], up[i + 1]), *([GDN(n, inverse=True)] if i < _STAGES - 1 else [])]
    return nn.Sequential(*analysis), nn.Sequential(*synthesis)


def elic(n: int, m: int) -> tuple[nn.Module, nn.Module]:
    """Bottleneck residual blocks in threes and two attention blocks, after ELIC (He et al., CVPR 2022)."""
    from compressai.layers import AttentionBlock
    from compressai.models.sensetime import ResidualBottleneckBlock
    from compressai.models.utils import conv, deconv

    def blocks() -> list[nn.Module]:
        return [ResidualBottleneckBlock(n, n) for _ in range(3)]

    analysis = [conv(3, n), *blocks(), conv(n, n), *blocks(), AttentionBlock(n)]
    analysis += [conv(n, n), *blocks(), conv(n, m), AttentionBlock(m)]
    synthesis = [AttentionBlock(m), deconv(m, n), *blocks(), deconv(n, n), AttentionBlock(n)]
    synthesis += [*blocks(), deconv(n, n), *blocks(), deconv(n, 3)]
    return nn.Sequential(*analysis), nn.Sequential(*synthesis)


TRANSFORMS = {"light": light, "elic": elic}
DOWNSAMPLING = 1 << _STAGES
