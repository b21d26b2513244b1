"""Student's t distribution for any positive number of degrees of freedom, with numpy alone."""

import math

import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(400)


def t_cdf(t: float, df: float) -> float:
    """
    P(T <= t).

    With t = sqrt(df) tan(a) the density is proportional to cos(a)^(df - 1) on a finite interval, which Gauss-Legendre
    quadrature integrates to machine precision.
    """
    _check(df)
    if math.isinf(t):
        return float(t > 0)
    end = math.atan(t / math.sqrt(df))
    angles = (_NODES + 1) * end / 2
    log_constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(math.pi)
    # cos is positive on the open interval; in logarithms large df do not underflow early.
    values = np.exp((df - 1) * np.log(np.cos(angles)) + log_constant)
    return float(min(1.0, max(0.0, 0.5 + end / 2 * (_WEIGHTS @ values))))


def t_quantile(p: float, df: float) -> float:
    """
    The t with P(T <= t) = p.

    Raises:
        ValueError: p is not strictly between 0 and 1, or df is not positive.
    """
    _check(df)
    if not 0 < p < 1:
        raise ValueError(f"A quantile needs a probability between 0 and 1, and {p!r} is not.")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        low, high = high, high * 2
    t = (low + high) / 2
    while high - low > 1e-12 * high:
        missing = p - t_cdf(t, df)
        low, high = (t, high) if missing > 0 else (low, t)
        step = missing / _density(t, df)
        if abs(step) < 1e-12 * high:
            break
        t = t + step if low < t + step < high else (low + high) / 2  # Newton, or a bisection where it would leave
    return t


def _density(t: float, df: float) -> float:
    log_constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(math.pi * df)
    return math.exp(log_constant - (df + 1) / 2 * math.log1p(t * t / df))


def _check(df: float) -> None:
    if not df > 0:
        raise ValueError(f"Student's t needs a positive number of degrees of freedom, and {df!r} is not.")
