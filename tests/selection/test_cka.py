"""CKA against the formulas written as loops over samples, and the identities it must satisfy."""

import itertools
import math

import pytest
import torch

from echo_trainer.selection.cka import centred_gram, consecutive_cka, gram_cka, is_constant, linear_cka


def slow_hsic_biased(k, l_):
    """tr(K H L H) from its definition, element by element."""
    n = len(k)
    h = [[(1.0 if i == j else 0.0) - 1.0 / n for j in range(n)] for i in range(n)]

    def product(a, b):
        return [[sum(a[i][r] * b[r][j] for r in range(n)) for j in range(n)] for i in range(n)]

    khlh = product(product(product(k, h), l_), h)
    return sum(khlh[i][i] for i in range(n))


def slow_hsic_debiased(k, l_, counts=None):
    """Mean of K_ij L_ij - 2 K_ij L_iq + K_ij L_qr over ordered 4-tuples of distinct samples, taken `counts` times."""
    n = len(k)
    counts = counts or [1] * n
    total = weight = 0.0
    for i, j, q, r in itertools.permutations(range(n), 4):
        w = counts[i] * counts[j] * counts[q] * counts[r]
        total += w * (k[i][j] * l_[i][j] - 2 * k[i][j] * l_[i][q] + k[i][j] * l_[q][r])
        weight += w
    return total / weight


def slow_hsic_song(k, l_):
    """Equation 5 of Song et al. (2012), with zero diagonals."""
    n = len(k)
    k = [[0.0 if i == j else k[i][j] for j in range(n)] for i in range(n)]
    l_ = [[0.0 if i == j else l_[i][j] for j in range(n)] for i in range(n)]
    trace = sum(k[i][j] * l_[j][i] for i in range(n) for j in range(n))
    sums = sum(map(sum, k)) * sum(map(sum, l_))
    mixed = sum(sum(k[i]) * sum(l_[i]) for i in range(n))
    return (trace + sums / ((n - 1) * (n - 2)) - 2 * mixed / (n - 2)) / (n * (n - 3))


def slow_cka(x, y, hsic, **kwargs):
    def gram(z):
        rows = z.double().tolist()
        return [[math.fsum(a * b for a, b in zip(u, v, strict=True)) for v in rows] for u in rows]

    k, l_ = gram(x), gram(y)
    return hsic(k, l_, **kwargs) / math.sqrt(hsic(k, k, **kwargs) * hsic(l_, l_, **kwargs))


def pair(kind, n, d, d2, seed=0):
    """X and Y of float32 rows: unrelated, nearly equal, of low rank, in clusters, or with one huge feature."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    if kind == "random":
        return x, torch.randn(n, d2, generator=g)
    mix = torch.randn(d, d2, generator=g)
    if kind == "related":
        return x, x @ mix + 0.3 * torch.randn(n, d2, generator=g)
    if kind == "low-rank":
        return x[:, :1] @ torch.randn(1, d, generator=g), torch.tanh(x[:, :1]) @ torch.randn(1, d2, generator=g)
    if kind == "clusters":
        centres = 5 * torch.randn(3, d, generator=g)
        label = torch.arange(n) % 3
        return centres[label] + 0.1 * x, (centres[label] + 0.5 * x) @ mix
    x[:, 0] = 1000 + 50 * x[:, 0]  # a massive activation, far from the origin
    return x, x @ mix


KINDS = ["random", "related", "low-rank", "clusters", "massive"]
SHAPES = [(4, 3, 5), (7, 1, 2), (6, 40, 33), (13, 5, 64)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d", "d2"), SHAPES)
def test_equals_the_slow_formula(kind, n, d, d2):
    x, y = pair(kind, n, d, d2)
    assert linear_cka(x, y).dtype == torch.float64
    assert float(linear_cka(x, y)) == pytest.approx(slow_cka(x, y, slow_hsic_biased), rel=1e-9, abs=1e-9)
    hsic = slow_hsic_debiased if n <= 7 else slow_hsic_song
    expected = slow_cka(x - x.mean(0), y - y.mean(0), hsic)
    assert float(linear_cka(x, y, debiased=True)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_debiased_references_agree(kind):
    x, y = pair(kind, 7, 4, 3, seed=1)
    assert slow_cka(x, y, slow_hsic_debiased) == pytest.approx(slow_cka(x, y, slow_hsic_song), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sample_space_equals_feature_space(kind):
    x, y = (z.double() for z in pair(kind, 50, 9, 14))
    x, y = x - x.mean(0), y - y.mean(0)
    feature = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert float(linear_cka(x, y)) == pytest.approx(float(feature), rel=1e-12)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_identities(kind, debiased):
    x, y = (z.double() for z in pair(kind, 30, 6, 8, seed=2))
    g = torch.Generator().manual_seed(5)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64)).Q
    value = float(linear_cka(x, y, debiased=debiased))
    assert float(linear_cka(x, x, debiased=debiased)) == pytest.approx(1, abs=1e-9)
    assert float(linear_cka(y, x, debiased=debiased)) == pytest.approx(value, abs=1e-9)
    assert float(linear_cka(x, y @ rotation, debiased=debiased)) == pytest.approx(value, abs=1e-7)
    assert float(linear_cka(-0.01 * x, 300 * y + 7, debiased=debiased)) == pytest.approx(value, abs=1e-7)
    order = torch.randperm(30, generator=g)
    assert float(linear_cka(x[order], y[order], debiased=debiased)) == pytest.approx(value, abs=1e-9)


def test_it_is_not_invariant_to_every_linear_map():
    x, _ = pair("random", 40, 6, 6)
    stretched = x * torch.tensor([10.0, 1, 1, 1, 1, 1])
    assert float(linear_cka(x, stretched)) < 0.9


def test_independent_data_of_many_features():
    values = [
        [float(linear_cka(*pair("random", 128, 4096, 4096, seed=s), debiased=b)) for b in (False, True)]
        for s in (0, 1)
    ]
    for biased, debiased in values:
        assert biased > 0.9  # what n << d does to the biased one
        assert abs(debiased) < 0.05


def test_a_weight_is_a_number_of_copies_for_the_biased_one():
    x, y = pair("related", 9, 5, 4)
    index = torch.tensor([0, 2, 2, 2, 3, 5, 5, 8, 8])
    weights = torch.bincount(index, minlength=9)[None].float()
    got = gram_cka(centred_gram(x)[None], centred_gram(y)[None], weights_bn=weights)
    assert got.shape == (1, 1)
    assert float(got) == pytest.approx(float(linear_cka(x[index], y[index])), rel=1e-10)


def test_a_weighted_debiased_value_never_compares_copies():
    x, y = pair("related", 7, 5, 4, seed=3)
    counts = [0, 2, 1, 1, 3, 1, 2]
    got = gram_cka(
        centred_gram(x)[None], centred_gram(y)[None], debiased=True, weights_bn=torch.tensor([counts]).float()
    )
    assert float(got) == pytest.approx(slow_cka(x, y, slow_hsic_debiased, counts=counts), rel=1e-7)
    copies = torch.repeat_interleave(torch.arange(7), torch.tensor(counts))
    assert abs(float(got) - float(linear_cka(x[copies], y[copies], debiased=True))) > 1e-3


def test_a_draw_of_fewer_than_four_samples():
    x, y = pair("random", 5, 3, 3)
    weights = torch.tensor([[5.0, 0, 0, 0, 0], [2, 2, 1, 0, 0], [2, 1, 1, 1, 0]])
    biased = gram_cka(centred_gram(x)[None], centred_gram(y)[None], weights_bn=weights)[0]
    debiased = gram_cka(centred_gram(x)[None], centred_gram(y)[None], debiased=True, weights_bn=weights)[0]
    copies = [0, 0, 1, 1, 2]
    assert float(biased[1]) == pytest.approx(float(linear_cka(x[copies], y[copies])), rel=1e-9)
    assert debiased[:2].tolist() == [0, 0]
    assert torch.isfinite(debiased).all()
    assert debiased[2] != 0


@pytest.mark.parametrize("debiased", [False, True])
def test_a_chain_of_representations(debiased):
    chain = [pair("related", 20, 6, d, seed=i)[1] for i, d in enumerate((3, 8, 8, 5))]
    weights = torch.tensor([[1.0] * 20, [2.0] * 10 + [0.0] * 10])
    got = consecutive_cka(chain, debiased=debiased, weights_bn=weights)
    assert got.shape == (3, 2)
    alone = [float(linear_cka(a, b, debiased=debiased)) for a, b in itertools.pairwise(chain)]
    assert got[:, 0].tolist() == pytest.approx(alone, abs=1e-12)
    assert consecutive_cka(chain, debiased=debiased).tolist() == pytest.approx(alone, abs=1e-12)
    assert (got[:, 0] - got[:, 1]).abs().min() > 1e-6


def test_a_constant_representation_has_cka_zero():
    x, _ = pair("random", 16, 8, 8)
    constant = torch.full((16, 8), 0.1) + torch.randn(8)
    assert is_constant(constant)
    assert not is_constant(x)
    assert not is_constant(constant + 1e-3 * x)
    assert torch.equal(centred_gram(constant), torch.zeros(16, 16, dtype=torch.float64))
    for debiased in (False, True):
        assert float(linear_cka(constant, x, debiased=debiased)) == 0


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, 8), "at least 4 samples"),
        (torch.randn(8), "a matrix"),
        (torch.tensor([[1.0, float("nan")]] * 5), "NaN"),
    ],
)
def test_bad_representations(x, message):
    with pytest.raises(ValueError, match=message):
        centred_gram(x)


def test_shapes_that_do_not_fit():
    k = centred_gram(torch.randn(6, 3))[None]
    with pytest.raises(ValueError, match="same samples"):
        gram_cka(k, centred_gram(torch.randn(7, 3))[None])
    with pytest.raises(ValueError, match="one per sample"):
        gram_cka(k, k, weights_bn=torch.ones(2, 5))
