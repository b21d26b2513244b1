"""Centered kernel alignment between representations, in sample space, as pure functions of tensors in float64.

Shape legend
    n : samples               d : features of a representation
    m : representations       b : weightings of the samples (bootstrap draws)
    suffixes: `x_nd` is (n, d), `gram_mnn` is (m, n, n), `weights_bn` is (b, n)

Linear CKA of X and Y, both (n, d), with the Gram matrices K = X X^T and L = Y Y^T and the Hilbert-Schmidt independence
criterion HSIC:

    CKA(X, Y) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))

biased (Kornblith et al., 2019, "Similarity of Neural Network Representations Revisited"; used by arXiv 2602.05988):

    HSIC(K, L) = tr(K H L H),   H = I - 1 1^T / n

    for column-centred X and Y the same as CKA = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F), the feature-space form

debiased (HSIC_1 of Song et al., 2012, "Feature Selection via Dependence Maximization"; the same as the U-centred inner
product of Székely and Rizzo, 2014), with the diagonals of K and L set to zero:

    HSIC(K, L) = 1/(n(n-3)) [ tr(K L) + (1^T K 1)(1^T L 1) / ((n-1)(n-2)) - 2 (1^T K L 1) / (n-2) ]

Cost: n^2 d for each representation once, then n^2 for each pair. The feature-space form costs n d^2 for each pair, so
the sample-space form wins whenever n < d, which is the rule here (n = 128, d = 4096).

With a weight w_i >= 0 for each sample (a bootstrap draw: how often it was drawn), the debiased HSIC is the mean over
4-tuples of *distinct* samples, each taken w_i w_j w_q w_r times. A copy of a sample is thus never compared with
itself, which would bring back the bias that the estimator removes. w = 1 gives the formulas above.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

_ROUNDING = 1e-11  # relative to the sum of squares; float32 rows that are all equal leave less, others far more


def is_constant(x_nd: Tensor) -> bool:
    """Whether a representation is the same for every sample up to rounding; its CKA is then 0/0."""
    x = x_nd.detach().to(torch.float64)
    return bool((x - x.mean(dim=0)).square().sum() <= _ROUNDING * x.square().sum())


def centred_gram(x_nd: Tensor) -> Tensor:
    """K = (X - mean) (X - mean)^T in float64, (n, n). Exactly zero for a constant representation.

    Raises:
        ValueError: not a matrix, fewer than 4 samples, or a value that is not finite.
    """
    if x_nd.ndim != 2:
        raise ValueError(f"a representation is a matrix (samples, features), got shape {tuple(x_nd.shape)}")
    if x_nd.shape[0] < 4:
        raise ValueError(f"CKA needs at least 4 samples (the debiased one divides by n - 3), got {x_nd.shape[0]}")
    x = x_nd.detach().to(torch.float64)
    if not torch.isfinite(x).all():
        raise ValueError("a representation holds NaN or infinite values, so it has no CKA")
    if is_constant(x):
        return x.new_zeros(len(x), len(x))
    centred = x - x.mean(dim=0)
    return centred @ centred.T


def _biased_hsic(k_mnn: Tensor, l_mnn: Tensor, w_bn: Tensor | None) -> Tensor:
    if w_bn is None:  # K and L are centred already
        return (k_mnn * l_mnn).sum((-2, -1))[:, None]
    # tr(W K H L H) with the weighted mean taken out by H, written out
    n_b = w_bn.sum(-1)
    kw, lw = k_mnn @ w_bn.T, l_mnn @ w_bn.T  # (m, n, b)
    pairs = torch.einsum("bi,mij,bj->mb", w_bn, k_mnn * l_mnn, w_bn)
    rows = torch.einsum("bi,mib->mb", w_bn, kw * lw)
    totals = torch.einsum("bi,mib->mb", w_bn, kw) * torch.einsum("bi,mib->mb", w_bn, lw)
    return pairs - 2 * rows / n_b + totals / n_b**2


def _debiased_hsic(k_mnn: Tensor, l_mnn: Tensor, w_bn: Tensor) -> Tensor:
    """Sum of K_ij L_ij - 2 K_ij L_iq + K_ij L_qr over distinct i, j, q, r, each with weight w_i w_j w_q w_r.

    HSIC_1 times the number of 4-tuples, which cancels in CKA. The sums over the indices that a term does not contain
    are done by hand, and tuples with equal indices are subtracted; S = sum(w), S2 = sum(w^2).
    """
    off_diagonal = 1 - torch.eye(k_mnn.shape[-1], dtype=k_mnn.dtype, device=k_mnn.device)
    k_mnn, l_mnn = k_mnn * off_diagonal, l_mnn * off_diagonal
    kl, w2_bn = k_mnn * l_mnn, w_bn**2
    k1, l1, k2, l2 = k_mnn @ w_bn.T, l_mnn @ w_bn.T, k_mnn @ w2_bn.T, l_mnn @ w2_bn.T  # (m, n, b)

    def over_pairs(p: int, q: int) -> Tensor:  # sum of w_i^p w_j^q K_ij L_ij
        return torch.einsum("bi,mij,bj->mb", w_bn**p, kl, w_bn**q)

    def over_rows(v_bn: Tensor, x_mnb: Tensor) -> Tensor:
        return torch.einsum("bi,mib->mb", v_bn, x_mnb)

    s, s2 = w_bn.sum(-1), w2_bn.sum(-1)
    a11, a12, a22, a13 = over_pairs(1, 1), over_pairs(1, 2), over_pairs(2, 2), over_pairs(1, 3)
    shared = over_rows(w2_bn, k1 * l1)
    two = (s**2 - s2) * a11 - 4 * s * a12 + 2 * a22 + 4 * a13
    three = over_rows(w_bn, s * k1 * l1 - k2 * l1 - k1 * l2) - shared - s * a12 + a22 + 2 * a13
    four = over_rows(w_bn, k1) * over_rows(w_bn, l1) - 4 * (shared - a22) - 2 * a22
    return two - 2 * three + four


def gram_cka(k_mnn: Tensor, l_mnn: Tensor, *, debiased: bool = False, weights_bn: Tensor | None = None) -> Tensor:
    """CKA of each pair of centred Gram matrices, for each weighting of the samples.

    Args:
        k_mnn, l_mnn: from [`centred_gram`], float64, the same shape.
        debiased: HSIC_1 (may be below 0 for unrelated data) rather than the biased HSIC (in [0, 1]).
        weights_bn: non-negative sample weights; None = every sample once.

    Returns:
        (m, b) with weights, else (m,). 0 where either representation does not vary (or, debiased, has no positive
        HSIC with itself): there CKA is undefined, and the published code gives 0 by clamping the denominator.

    Raises:
        ValueError: shapes that do not fit.
    """
    if k_mnn.shape != l_mnn.shape or k_mnn.ndim != 3 or k_mnn.shape[-1] != k_mnn.shape[-2]:
        raise ValueError(
            f"expected two stacks of Gram matrices of one shape (m, n, n), got {tuple(k_mnn.shape)} and "
            f"{tuple(l_mnn.shape)}; both representations must come from the same samples"
        )
    n = k_mnn.shape[-1]
    if weights_bn is not None and (weights_bn.ndim != 2 or weights_bn.shape[-1] != n):
        raise ValueError(f"expected weights of shape (b, {n}), one per sample, got {tuple(weights_bn.shape)}")
    w_bn = None if weights_bn is None else weights_bn.to(k_mnn)
    enough: Tensor | bool = True
    if debiased:
        each_bn = torch.ones(1, n, dtype=k_mnn.dtype, device=k_mnn.device) if w_bn is None else w_bn
        hsic = partial(_debiased_hsic, w_bn=each_bn)
        # 4-tuples of distinct samples need four of them; below that the sums are rounding noise
        enough = (each_bn > 0).sum(-1) >= 4
    else:
        hsic = partial(_biased_hsic, w_bn=w_bn)
    kk, ll = hsic(k_mnn, k_mnn), hsic(l_mnn, l_mnn)
    denominator = (kk.clamp_min(0) * ll.clamp_min(0)).sqrt()
    defined = (denominator > 0) & enough
    cka = torch.where(defined, hsic(k_mnn, l_mnn) / torch.where(defined, denominator, 1.0), 0.0)
    return cka[:, 0] if weights_bn is None else cka


def linear_cka(x_nd: Tensor, y_nd: Tensor, *, debiased: bool = False) -> Tensor:
    """Linear CKA of two representations of the same samples, (n, d) and (n, d'). A float64 scalar.

    CKA(X, X) = 1; rotating, translating or scaling X or Y changes nothing. The biased one tends to 1 for *unrelated*
    data when d >> n, the debiased one to 0. Raises ValueError as [`centred_gram`] and [`gram_cka`] do.
    """
    return gram_cka(centred_gram(x_nd)[None], centred_gram(y_nd)[None], debiased=debiased)[0]


def consecutive_cka(
    representations: Sequence[Tensor], *, debiased: bool = False, weights_bn: Tensor | None = None
) -> Tensor:
    """CKA(R_{i-1}, R_i) for i = 1..L of R_0..R_L, each (n, d_i): (L,), or (L, b) with weights.

    The importance of layer i is 1 minus this. Two Gram matrices are held at a time.
    """
    values = []
    before = centred_gram(representations[0])
    for representation in representations[1:]:
        after = centred_gram(representation)
        values.append(gram_cka(before[None], after[None], debiased=debiased, weights_bn=weights_bn)[0])
        before = after
    return torch.stack(values)
