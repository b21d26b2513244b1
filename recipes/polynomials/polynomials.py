"""Polynomial decomposition: given f = P(Q(x)), write Q. Coefficients, text, and the exact verifier.

A polynomial is a tuple of whole numbers, low to high degree. As text every coefficient is a sign and one token per
digit: -3 + 12 x^2 is "- 3 + 0 + 1 2". A prompt is f and "=", a completion is Q.

The inner function of a composition is not unique. P(Q) = P'(Q') with P'(y) = P(y - c) for Q' = Q + c, and with
P'(y) = P(-y) for Q' = -Q. So a verifier that compares with the Q that made the data is wrong; one that asks only
whether f is a polynomial in Q is wrong too, since every f is one in x, in every a x + b, and in f itself.
"""

import random
from fractions import Fraction

DEGREES = ((2, 2), (2, 3), (3, 2))
"""Degrees of P and of Q; each pair makes an equal share of the rows."""
LARGEST = 5
"""Coefficients are uniform in -LARGEST .. LARGEST, the leading one not zero."""
EQUALS = "="

Polynomial = tuple[int, ...]


def multiply(left: Polynomial, right: Polynomial) -> Polynomial:
    """The product."""
    product = [0] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            product[i + j] += a * b
    return tuple(product)


def compose(outer: Polynomial, inner: Polynomial) -> Polynomial:
    """outer(inner(x)), expanded."""
    result = (outer[-1],)
    for coefficient in reversed(outer[:-1]):
        result = multiply(result, inner)
        result = (result[0] + coefficient, *result[1:])
    return result


def to_text(polynomial: Polynomial) -> str:
    """Tokens with spaces between them."""
    return " ".join(" ".join(("-" if c < 0 else "+", *str(abs(c)))) for c in polynomial)


def from_text(text: str) -> Polynomial | None:
    """The polynomial that `to_text` wrote; None where a text is none, and where its leading coefficient is zero."""
    coefficients: list[str] = []
    for token in text.split():
        if token in ("+", "-"):
            coefficients.append(token)
        elif len(token) == 1 and token in "0123456789" and coefficients:
            coefficients[-1] += token
        else:
            return None
    if not coefficients or any(len(c) < 2 for c in coefficients) or int(coefficients[-1]) == 0:
        return None
    return tuple(map(int, coefficients))


def outer_of(f: Polynomial, inner: Polynomial) -> Polynomial | None:
    """
    The P with whole coefficients for which f = P(inner); None where there is none.

    f is divided by `inner`, the quotient again, and so on: f = c_0 + c_1 inner + c_2 inner^2 ... with remainders c_i
    of lower degree than `inner`. That is unique, so f is a polynomial in `inner` where every c_i is a constant.
    """
    rest, outer = [Fraction(c) for c in f], []
    while rest:
        quotient = [Fraction(0)] * max(len(rest) - len(inner) + 1, 0)
        for shift in reversed(range(len(quotient))):
            quotient[shift] = rest[shift + len(inner) - 1] / inner[-1]
            for j, b in enumerate(inner):
                rest[shift + j] -= quotient[shift] * b
        constant, *others = rest
        if any(others) or constant.denominator != 1:
            return None
        outer.append(int(constant))
        rest = quotient
    return tuple(outer)


def right(prompt: str, completion: str, row: dict) -> bool:
    """
    Whether a completion is an inner function of the prompt's f: 1 < deg Q < deg f, and f = P(Q) with whole P.

    Args:
        prompt: f and "=".
        completion: what a model wrote.
        row: not looked at: the Q that made f is one of many right answers.
    """
    f, inner = from_text(prompt.removesuffix(EQUALS)), from_text(completion)
    if f is None or inner is None or not 2 < len(inner) < len(f):
        return False
    return outer_of(f, inner) is not None


def draw(generator: random.Random, degree: int) -> Polynomial:
    """A random polynomial of a degree."""
    leading = generator.choice([c for c in range(-LARGEST, LARGEST + 1) if c])
    return (*(generator.randint(-LARGEST, LARGEST) for _ in range(degree)), leading)


def make_rows(count: int, seed: int, without: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """
    Rows with `prompt` and `completion`.

    Args:
        count: of rows; pairs of degrees take turns, so each has its equal share.
        seed: of the rows; the first rows of a longer draw are those of a shorter one.
        without: prompts that must not be among them, such as those of a test set.

    Returns:
        Rows of different prompts.
    """
    generator, seen, rows = random.Random(seed), set(without), []
    while len(rows) < count:
        outer_degree, inner_degree = DEGREES[len(rows) % len(DEGREES)]
        inner = draw(generator, inner_degree)
        prompt = f"{to_text(compose(draw(generator, outer_degree), inner))} {EQUALS}"
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "completion": to_text(inner)})
    return rows
