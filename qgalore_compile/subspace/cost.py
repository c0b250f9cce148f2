"""G or its factors?  What R and a refresh cost either way: one set of formulas for passes, run time and report.

T tokens deep, of rank r: the projection R = G Pᵀ takes 2 T m n + 2 m n r operations through G (m, n) = dYᵀ X, and
2 T r (m + n) through the factors (:func:`projection`).

Of a refresh (:func:`cost`), d and k are the smaller and larger side of G, l = r + 16 a sketch's width and q the power
iterations.  Everything that a method asks of G is a product A x or Aᵀ y of l or r columns and, for the exact one, a
decomposition; each has two ways:

==============  ==================================  ====================================================================
                through G                           through the factors
==============  ==================================  ====================================================================
G               2 T m n, once                       never
product         2 m n l                             2 T l (m + n)
decomposition   R-SVD of G: 6 k d² + 20 d³          QR of both factors 4 (m + n) T², SVD of what is between 28 T³
==============  ==================================  ====================================================================

Sources: Golub and Van Loan, Matrix Computations, 4th edition, sections 5.2 (QR), 8.3 (symmetric eigenvalue problem) and
figure 8.6.1 (R-SVD).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import sympy

T, m, n, r, q = sympy.symbols("T m n r q", positive=True, integer=True)
OVERSAMPLING = 16
"""Columns of a sketch beyond the rank: Halko, Martinsson and Tropp (SIAM Review 2011), section 1.3."""

_MOST_TOKENS = 1 << 40


class Cost(NamedTuple):
    """What one thing costs both ways, as expressions in T, m, n, r and q."""

    through_gradient: sympy.Expr
    through_factors: sympy.Expr

    def at(self, numbers: Mapping[sympy.Symbol, int]) -> Cost:
        """With numbers for symbols."""
        return Cost(*(sympy.expand(side.subs(numbers)) for side in self))

    def falls(self, tokens: int) -> bool:
        """Whether the factors cost less, where nothing but T is open."""
        return bool((self.through_factors - self.through_gradient).subs(T, tokens) < 0)

    def inequality(self, tokens: int | None) -> str:
        """Both sides in words, at a token count or for all of them; linear in T."""
        if tokens:
            before, after = (int(side.subs(T, tokens)) for side in self)
            return f"{after:,} {'<' if after < before else '>='} {before:,}"
        return f"{sympy.sstr(self.through_factors)} < {sympy.sstr(self.through_gradient)} {self.where()}"

    def where(self) -> str:
        """For which token counts the factors cost less, where both sides are linear in T; in words."""
        difference = sympy.Poly(sympy.expand(self.through_factors - self.through_gradient), T)
        slope, constant = (difference.coeff_monomial(power) for power in (T, 1))
        if slope == 0:
            return "for every T" if constant < 0 else "for no T"
        bound = sympy.Rational(-constant, slope)
        if slope < 0:
            return "for every T" if bound < 1 else f"for T > {int(sympy.floor(bound))}"
        return "for no T" if bound <= 1 else f"for T < {int(sympy.ceiling(bound))}"


@dataclass(frozen=True)
class Projection:
    """What R costs both ways.

    Attributes:
        operations: multiplications and additions.
        traffic: bytes that the products read and write.
        tokens: T where it is known; None where it is symbolic.
    """

    operations: Cost
    traffic: Cost
    tokens: int | None

    def falls(self, hint: int) -> bool:
        """Whether neither grows through the factors, at the token count or, where that is symbolic, at ``hint``."""
        tokens = self.tokens or hint
        return self.operations.falls(tokens) and self.traffic.falls(tokens)

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        return f"operations {self.operations.inequality(self.tokens)}; bytes {self.traffic.inequality(self.tokens)}"


@lru_cache(maxsize=4096)
def projection(
    rows: int, columns: int, rank: int, side: str, products: int, itemsize: int, tokens: int | None
) -> Projection:
    """Of R = G Pᵀ ("right") or Pᵀ G ("left"), for a gradient that is a sum of so many products of ``tokens`` tokens
    each, or of any number of them; elements of ``itemsize`` bytes."""
    low, skinny = (m * r, n) if side == "right" else (n * r, m)  # skinny: the dimension that P contracts
    operations = Cost(products * _forming() + 2 * m * n * r, products * 2 * T * r * (m + n))
    # each product reads its operands and writes its result once; a sum of gradients reads and writes one more
    traffic = Cost(
        products * (T * (m + n) + m * n) + (products - 1) * m * n + m * n + skinny * r + low,
        products * (T * skinny + skinny * r + T * r + T * r + T * (m + n - skinny) + low),
    )
    numbers = {m: rows, n: columns, r: rank}
    return Projection(operations.at(numbers), Cost(*(itemsize * side for side in traffic)).at(numbers), tokens)


@cache
def cost(method: str) -> Cost:
    """Of a refresh by "svd", "randomized" or "power" (warm), the new R included."""
    d, k = sympy.Min(m, n), sympy.Max(m, n)
    width = r + OVERSAMPLING
    if method == "svd":
        core = 4 * (m + n) * T**2 + 28 * T**3 + 2 * d * T * r
        return Cost(_forming() + 6 * k * d**2 + 20 * d**3 + 2 * m * n * r, core + 2 * T * r * (m + n))
    if method == "randomized":
        columns = 2 * q * width + r
        # Cholesky QR of what is between two products: a Gram matrix and a triangular solve; then its eigenvectors
        rest = 3 * (q * k + (q - 1) * d) * width**2 + 4 * d * width**2 + 9 * width**3
    else:
        columns = 2 * r  # the old R is half of the iteration
        rest = 3 * d * r**2
    return Cost(_forming() + 2 * m * n * columns + rest, 2 * T * (m + n) * columns + rest)


def _forming() -> sympy.Expr:
    return 2 * T * m * n


@cache
def _function(method: str) -> Any:
    """Both costs as a plain function of numbers."""
    return sympy.lambdify((T, m, n, r, q), tuple(cost(method)), modules="math")


@lru_cache(maxsize=4096)
def factors_are_cheaper(method: str, rows: int, columns: int, rank: int, iterations: int, tokens: int) -> bool:
    """Whether a refresh that is given factors should leave G unformed.  No sympy after a method's first call."""
    through_gradient, through_factors = _function(method)(tokens, rows, columns, rank, iterations)
    return bool(through_factors < through_gradient)


def most_tokens(method: str, rows: int, columns: int, rank: int, iterations: int) -> int:
    """The largest T for which the factors are cheaper; 0 for none.

    The difference of the costs is a polynomial in T whose coefficients change sign once, so there is one such bound.
    """
    low, high = 0, _MOST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        if factors_are_cheaper(method, rows, columns, rank, iterations, middle):
            low = middle
        else:
            high = middle - 1
    return low


@lru_cache(maxsize=4096)
def described(method: str, rows: int, columns: int, rank: int, iterations: int, products: int | None) -> str:
    """What a refresh costs beside the step, as the report says it.

    Args:
        method, rows, columns, rank, iterations: of the parameter and its group.
        products: how many products of T tokens the gradient is the sum of; 0 where the op is given G itself.  One
            product leaves the choice to the op; several are gathered, so that G exists.
    """
    numbers = {m: rows, n: columns, r: rank, q: iterations}
    through_gradient, through_factors = (each.subs(numbers) for each in cost(method))
    held = f"{4 * rows * columns:,} bytes for G in float32"
    if products != 1:
        return f"{method}: about {_text(through_gradient.subs(T, (products or 0) * T))} operations, {held}"
    bound = most_tokens(method, rows, columns, rank, iterations)
    if bound < rank:
        return f"{method}: about {_text(through_gradient)} operations, {held}; {_exact(rank)}"
    gradient = "" if bound == _MOST_TOKENS else f", from T = {bound + 1:,} on {_text(through_gradient)} and {held}"
    return f"{method}: about {_text(through_factors)} operations through the factors{gradient}; {_exact(rank)}"


def _exact(rank: int) -> str:
    return f"below T = {rank:,} exact"


def _text(expression: sympy.Expr) -> str:
    return str(sympy.sstr(sympy.expand(expression)))
