"""Densities convolved with a unit box, as the rate kernels take them: without underflow and without cancellation.

A density of scale s at distance d gives (e, w, by_d, by_s): the likelihood is w 2^e with e <= 0, and by_d and by_s are
the derivatives of its natural logarithm. Exponents are those of 2, which the hardware has and bits are counted in.
Formulas are those of the reference, rearranged so that no difference of near numbers is left in fp32 either; there is
one body for fp32 and fp64, which differ in their polynomials. Only functions that Triton has without libdevice are
used: its interpreter has no other.

With D = |d|, a = (D - 1/2) / s, b = (D + 1/2) / s, om(x) = 1 - exp(-x), erfcx(x) = exp(x^2) erfc(x):
Gaussian  a >= 0: p = exp(-a^2/2) (erfcx(a/r2) - exp(-D/s^2) erfcx(b/r2)) / 2, else 1 - the same with |a| and a sum;
          wide and not far: the density at d times exp of the cumulants of a uniform variable (`_wide`);
logistic  p = exp(-max(a, 0)) om(1/s) / ((1 + exp(-|a|)) (1 + exp(-b)));
Laplace   a >= 0: p = exp(-a) om(1/s) / 2, else (om(-a) + om(b)) / 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

GAUSSIAN, LOGISTIC, LAPLACE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
ROOT_2_PI = tl.constexpr(2.5066282746310002)

# erfcx(x) = v R(1 - 2 v) with v = 1 / (1 + x / 2.5), highest power first: relative errors 1.3e-7 (minimax; 4.6e-7 as
# evaluated in fp32) and 1.3e-15, for every x >= 0
ERFCX_STEP = tl.constexpr(0.4 / 2**0.5)  # for x / sqrt(2)
ERFCX_32 = tl.constexpr(
    (
        0.0001963148097274825, -0.00014175588148646057, -0.0018630103440955281, 0.0033358812797814608,
        0.011324101127684116, -0.06849515438079834, 0.18156789243221283, -0.3218610882759094, 0.4216126799583435,
    )
)  # fmt: skip
ERFCX_64 = tl.constexpr(
    (
        -1.386955405826605e-11, 1.810025166117929e-09, 2.5848158085343674e-09, -1.4297276763253707e-08,
        -2.9679824261374173e-08, 4.4859777528788816e-08, 1.817053067719037e-07, 7.65287590461112e-09,
        -7.872549683511264e-07, -9.393354423390487e-07, 2.7029522241719813e-06, 7.300477745122257e-06,
        -7.813335383110337e-06, -4.50426936008718e-05, 2.3323223494144642e-05, 0.00028107762359897705,
        -0.0001756833200423262, -0.0019275142232051635, 0.003357217721904868, 0.011344620053543768,
        -0.06850045809844763, 0.18156564665922276, -0.32186073977565927, 0.42161272812228723,
    )
)  # fmt: skip
# 1 - exp(-x) = x times this, for x < 0.35
OM_32 = tl.constexpr((-1 / 720, 1 / 120, -1 / 24, 1 / 6, -1 / 2, 1.0))


@triton.jit
def polynomial(x, COEFFICIENTS: tl.constexpr, N: tl.constexpr):
    total = x * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, N):
        total = total * x + COEFFICIENTS[i]
    return total


@triton.jit
def one_minus_exp(x):
    """(1 - exp(-x), exp(-x)) for x >= 0, the first right in all its digits."""
    fall = tl.exp2(x * -LOG2_E)
    if x.dtype == tl.float64:  # Kahan: the quotient's errors cancel
        kahan = (1 - fall) * x / -tl.log(fall)
        rise = tl.where(x > 1, 1 - fall, tl.where(fall == 1, x, kahan))
    else:
        rise = tl.where(x < 0.35, x * polynomial(x, OM_32, 6), 1 - fall)
    return rise, fall


@triton.jit
def _erfcx(x):
    """exp(x^2 / 2) erfc(x / sqrt(2)) for x >= 0."""
    v = 1 / (1 + x * ERFCX_STEP)
    t = 1 - 2 * v
    if x.dtype == tl.float64:
        r = polynomial(t, ERFCX_64, 24)
    else:
        r = polynomial(t, ERFCX_32, 9)
    return v * r


@triton.jit
def _wide(distance, r):
    """Gaussian, 1 / r wide: log2(p sqrt(2 pi) / r), the derivatives of log p by D and s, and whether they hold.

    log p = -D^2 / (2 s^2) - log(s sqrt(2 pi)) + L with L = log E exp(-z u - c u^2), u uniform in [-1, 1],
    z = D / (2 s^2), c = 1 / (8 s^2): its series in q = z^2 and c.
    """
    m = distance * r
    c = r * r * 0.125
    z = m * r * 0.5
    q = z * z
    series = q * (1 / 6 + q * (q * (1 / 2835) - 1 / 180)) - c * (1 / 3 + q * (2 / 45 - q * (4 / 945)))
    series += c * c * (2 / 45 + q * (4 / 945))
    by_q = 1 / 6 + q * (q * (1 / 945) - 1 / 90) - c * (2 / 45 - q * (8 / 945)) + c * c * (4 / 945)
    by_c = c * (4 / 45 + q * (8 / 945)) - (1 / 3 + q * (2 / 45 - q * (4 / 945)))
    by_d = -m * r * (1 - r * r * 0.5 * by_q)
    by_s = r * (m * m - 1 - 4 * q * by_q - 2 * c * by_c)
    if r.dtype == tl.float64:
        holds = (r <= 1 / 32) & (z <= 1 / 32)
    else:
        holds = (r <= 0.5) & (z <= 0.5)
    return (series - 0.5 * m * m) * LOG2_E, by_d, by_s, holds


@triton.jit
def gaussian(d, s):
    distance = tl.abs(d)
    r = 1 / s
    a = (distance - 0.5) * r
    b = (distance + 0.5) * r
    if d.dtype == tl.float64:
        drop, rho = one_minus_exp(distance * r * r)
    else:  # taken only where it is not small against what it multiplies
        rho = tl.exp2(distance * r * r * -LOG2_E)
        drop = 1 - rho
    near = _erfcx(tl.abs(a))
    far = rho * _erfcx(b)
    outside = a >= 0
    power = a * a * (-0.5 * LOG2_E)
    density = tl.where(outside, 1.0, tl.exp2(power))
    w = tl.where(outside, 0.5 * (near - far), 1 - 0.5 * density * (near + far))
    hazard = density * r / (w * ROOT_2_PI)
    by_d = -hazard * drop
    by_s = hazard * (a * drop - rho * r)
    wide_e, wide_by_d, wide_by_s, wide = _wide(distance, r)
    e = tl.where(wide, wide_e, tl.where(outside, power, 0.0))
    w = tl.where(wide, r * (1 / ROOT_2_PI), w)
    by_d = tl.where(wide, wide_by_d, by_d)
    return e, w, tl.where(d < 0, -by_d, by_d), tl.where(wide, wide_by_s, by_s)


@triton.jit
def logistic(d, s):
    distance = tl.abs(d)
    r = 1 / s
    a = (distance - 0.5) * r
    b = (distance + 0.5) * r
    outside = a >= 0
    box, rest = one_minus_exp(r)
    apart, _ = one_minus_exp(2 * distance * r)
    at_a = tl.exp2(tl.abs(a) * -LOG2_E)
    at_b = tl.exp2(b * -LOG2_E)
    share_a = 1 / (1 + at_a)
    share_b = 1 / (1 + at_b)
    both = share_a * share_b
    e = tl.where(outside, a * -LOG2_E, 0.0)
    by_d = -r * apart * both * tl.where(outside, 1.0, at_a)
    by_s = r * (a * share_a * tl.where(outside, 1.0, at_a) - b * at_b * share_b - r * rest / box)
    return e, box * both, tl.where(d < 0, -by_d, by_d), by_s


@triton.jit
def laplace(d, s):
    distance = tl.abs(d)
    r = 1 / s
    a = (distance - 0.5) * r
    b = (distance + 0.5) * r
    outside = a >= 0
    from_a, rise = one_minus_exp(tl.where(outside, r, -a))
    from_b, fall = one_minus_exp(b)
    apart, _ = one_minus_exp(2 * distance * r)
    e = tl.where(outside, a * -LOG2_E, 0.0)
    w = 0.5 * tl.where(outside, from_a, from_a + from_b)
    scaled = 0.5 * r / w
    by_d = tl.where(outside, -r, -scaled * rise * apart)
    by_s = tl.where(outside, r * (a - r * rise / from_a), scaled * (a * rise - b * fall))
    return e, w, tl.where(d < 0, -by_d, by_d), by_s


@triton.jit
def density(d, s, family):
    """(e, w, by_d, by_s) of a family that is known to the compiler, or only to the program."""
    if family == GAUSSIAN:
        e, w, by_d, by_s = gaussian(d, s)
    elif family == LOGISTIC:
        e, w, by_d, by_s = logistic(d, s)
    else:
        e, w, by_d, by_s = laplace(d, s)
    return e, w, by_d, by_s
