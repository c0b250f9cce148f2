"""How a subspace is found: the leading singular vectors of a gradient, exactly or by subspace iteration.

A is G on the left side and Gᵀ on the right, (d, k) with d <= k: its column space is looked for.  G comes as itself or
as factors ``[dY1, X1, dY2, X2, …]``, G = Σ dYᵢᵀ Xᵢ with dY (tokens, m) and X (tokens, n), and is formed only where that
is cheaper than going through the factors (:mod:`qgalore_compile.subspace.cost`).

============  ======================================================================================================
method        what it does
============  ======================================================================================================
svd           exact: SVD of G, or QR of both factors and SVD of what is between
randomized    range finder: q times A Aᵀ of a random S of rank + 16 columns on the short side, then the best ``rank``
              directions of it, in order.  A random S on the long side, Halko's, costs more numbers and half a step more
power         one step of subspace iteration from the old projector: orthonormal columns of A (Aᵀ P), where Aᵀ P is the
              R that the step has projected anyway.  A basis of the subspace, not its singular vectors in order; each
              column stays near the old one of its number.  Without an old projector it is "randomized", nor does a
              stand-in's count as one: from a sketch of an earlier gradient, a step reaches 0.89 to 0.95 of the exact
              energy where the range finder reaches 0.97 to 0.99
============  ======================================================================================================

Where a parameter waits for its first refresh, :func:`sketched_subspace` gives it a rougher one.

Below the rank in tokens all of them are exact, through the factors.  Products run in float32; Gram matrices, Cholesky
factors and eigenvectors in float64, so that squaring a float32 matrix loses nothing: these are products and small
decompositions, where LAPACK's QR and SVD of tall matrices take most of the time.

Sources: Halko, Martinsson and Tropp (SIAM Review 2011), algorithms 4.4 and 5.1; Cholesky QR: Golub and Van Loan, Matrix
Computations, 4th edition, section 5.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qgalore_compile import rng
from qgalore_compile.subspace.cost import OVERSAMPLING, factors_are_cheaper
from qgalore_compile.subspace.projection import Side, project

METHODS = ("svd", "randomized", "power")

_EPS = torch.finfo(torch.float32).eps
_ROUNDING = 16 * _EPS
"""Of a product's largest column: what is smaller is rounding.  A float32 product leaves about 3 eps there."""
_ILL = 3e8
"""The squared condition from which on a Gram matrix in float64 leaves columns off orthonormal: 2.2e-16 of it is 7e-8,
half a unit in float32's last place."""
_CANCELLED = 1e-3
"""Of a sum's terms: a smaller sum of float32 products would be wrong in its fourth digit."""
_SKETCH, _COMPLETION, _PROBE = range(3)
"""Streams of random numbers.  A completion that shared the sketch's would be no random direction to what that found."""


class Gradient:
    """G, itself or as factors, formed at most once.

    Attributes:
        factors: ``[G]`` or ``[dY1, X1, …]``.
        tokens: of all products together; None where G itself is given.
        shape: (m, n).
    """

    def __init__(self, factors: Sequence[Tensor]) -> None:
        self.factors = list(factors)
        given = len(self.factors) == 1
        self.tokens = None if given else sum(factor.shape[0] for factor in self.factors[::2])
        first, last = self.factors[0], self.factors[-1]
        self.shape = (first.shape[0], first.shape[1]) if given else (first.shape[1], last.shape[1])
        self._formed: Tensor | None = None

    @classmethod
    def of(cls, factors: Sequence[Tensor] | Gradient) -> Gradient:
        """The gradient of factors, or one as it is."""
        return factors if isinstance(factors, Gradient) else cls(factors)

    def formed(self) -> Tensor:
        """G (m, n) in float32."""
        if self._formed is None:
            self._formed = full_gradient(self.factors)
        return self._formed

    def pairs(self, side: Side) -> list[tuple[Tensor, Tensor]]:
        """(left (tokens, d), right (tokens, k)) of each product, in float32: A = Σ leftᵀ right."""
        wide = [factor.to(torch.float32) for factor in self.factors]
        found = list(zip(wide[::2], wide[1::2], strict=True))
        return found if side == "left" else [(right, left) for left, right in found]

    def joined(self, side: Side) -> tuple[Tensor, Tensor]:
        """(left, right) of all products as one: A = leftᵀ right."""
        pairs = self.pairs(side)
        return torch.cat([left for left, _ in pairs]), torch.cat([right for _, right in pairs])

    def is_zero(self) -> bool:
        """Whether G is exactly zero, so that nothing tells which subspace to take.

        Of factors it is told by G ω, ω (n,) random, in 2T(m + n) operations: masked tokens and products that cancel
        each other are seen, and another G gives zero with probability 0.
        """
        if self._formed is not None or self.tokens is None:
            return not bool((self.factors[0] if self._formed is None else self._formed).any())
        probe = rng.normal((self.shape[1], 1), seed=0, step=0, param=0, stream=_PROBE)
        return not bool(_Operator(self, "left", True)(probe.to(self.factors[0].device)).any())

    def energy(self) -> float:
        """‖G‖².

        ‖dYᵀX‖² is the sum of (dY dYᵀ) ∘ (X Xᵀ): 2T²(m + n) operations, where forming G takes 2Tmn.  Of factors whose
        largest element is 1, for the square of a square of 1e-12 is no number in float32; and of G itself where
        products cancel each other and the sum is rounding.
        """
        m, n = self.shape
        if self._formed is not None or self.tokens is None or self.tokens * (m + n) >= m * n:
            return _energy(self.formed())
        grams, scale = [], 1.0
        for factor in self.joined("left"):
            largest = float(factor.abs().max())
            unit = factor / (largest or 1.0)
            grams.append(unit @ unit.t())
            scale *= largest
        products = grams[0].mul_(grams[1])
        whole, size = float(products.sum(dtype=torch.float64)), float(products.abs().sum(dtype=torch.float64))
        return whole * scale**2 if whole > _CANCELLED * size else _energy(self.formed())

    def project(self, projector: Callable[[torch.dtype], Tensor], side: Side) -> Tensor:
        """R, products in the gradient's dtype, through G where there is one.  ``projector`` gives P in a dtype."""
        if len(self.factors) == 1:
            return project(self.factors[0], projector(self.factors[0].dtype), side)
        if self._formed is not None:
            dtype = self.factors[-1].dtype  # the first one has been scaled
            return project(self._formed.to(dtype), projector(dtype), side)
        dtype = torch.promote_types(self.factors[0].dtype, self.factors[1].dtype)
        p, factors = projector(dtype), [factor.to(dtype) for factor in self.factors]
        products = [
            left.t() @ (right @ p.t()) if side == "right" else (left @ p).t() @ right
            for left, right in zip(factors[::2], factors[1::2], strict=True)
        ]
        return _added([each.to(torch.float32) for each in products])


def full_gradient(factors: Sequence[Tensor]) -> Tensor:
    """G (m, n) in float32, from itself or from its factors."""
    if len(factors) == 1:
        return factors[0].to(torch.float32)
    pairs = zip(factors[::2], factors[1::2], strict=True)
    products = [grad_output.to(torch.float32).t() @ inputs.to(torch.float32) for grad_output, inputs in pairs]
    return _added(products)


def leading_subspace(
    factors: Sequence[Tensor] | Gradient,
    rank: int,
    side: Side,
    *,
    method: str,
    power_iterations: int = 1,
    low: Tensor | None = None,
    ordered: bool = False,
    exact: bool = True,
    driver: str | None = None,
    seed: int = 0,
    step: int = 0,
    param: int = 0,
) -> Tensor:
    """The projector of a gradient, in float32: its ``rank`` leading singular vectors on ``side``, or near them.

    Args:
        factors: ``[G]`` or ``[dY1, X1, …]``, or a :class:`Gradient` of those; finite.
        rank: at most min(m, n).
        side: which singular vectors.
        method: one of ``METHODS``; the module's docstring describes them.
        power_iterations: q of the range finder, at least 1.
        low: the R of this gradient with the old projector, where "power" starts; None where there is no old one.  R of
            zeros, of a projector that catches nothing of this gradient, counts as None.
        ordered: "power" shall find singular vectors in order too: one small eigenvalue problem more.
        exact: take the exact subspace below the rank and where a sketch would span the smaller side.
        driver: of CUDA's SVD ("gesvd", "gesvdj", "gesvda"); None for PyTorch's choice.
        seed, step, param: select the random numbers of the range finder and of the completion.

    Returns:
        (r, n) on the right, (m, r) on the left, orthonormal to 1e-5 whatever the gradient's condition, rank and scale
        are.  Each vector's entry of largest magnitude is positive: a singular vector's sign is arbitrary, and moments
        outlive a refresh.  Where the gradient's numerical rank is smaller, random directions orthogonal to the rest
        complete it, the same on every path, rather than whatever LAPACK leaves there.

    Raises:
        torch.linalg.LinAlgError: the decomposition did not converge.
    """
    gradient = Gradient.of(factors)
    start = low if method == "power" and low is not None and bool(low.any()) else None
    d = gradient.shape[0 if side == "left" else 1]
    few = gradient.tokens is not None and gradient.tokens < rank
    if exact and (few or method == "svd" or (start is None and rank + OVERSAMPLING >= d)):
        through = few or _through_factors(gradient, "svd", rank, power_iterations)
        vectors, values = _exact(gradient, side, through, driver)
    elif start is not None:
        operator = _Operator(gradient, side, _through_factors(gradient, "power", rank, power_iterations))
        start = start if side == "right" else start.t()
        # columns of one size: what is rounding beside the largest is then rounding of the product
        basis = None if ordered else _orthonormal(operator(_unit_columns(start)))
        if basis is not None:
            return _laid_out(basis, side)
        vectors, values = _singular(operator(_basis(start)))
    else:
        operator = _Operator(gradient, side, _through_factors(gradient, "randomized", rank, power_iterations))
        sketch = rng.normal((d, min(rank + OVERSAMPLING, d)), seed=seed, step=step, param=param, stream=_SKETCH)
        vectors, values = _range_finder(operator, sketch.to(operator.device), power_iterations)
    return _laid_out(_complete(vectors[:, :rank], values[:rank], rank, (seed, step, param)), side)


def _exact(gradient: Gradient, side: Side, through_factors: bool, driver: str | None) -> tuple[Tensor, Tensor]:
    """Singular vectors on ``side``, as columns, and values, of G or of its factors."""
    if through_factors:
        return _from_factors(*gradient.joined(side), driver)
    return _svd(_Operator(gradient, side, False).matrix, driver)


def sketched_subspace(
    factors: Sequence[Tensor] | Gradient, rank: int, side: Side, *, seed: int = 0, step: int = 0, param: int = 0
) -> Tensor:
    """A rough projector at the price of a product: an orthonormal basis of A Ω, Ω (k, rank) random.

    The range finder without power iterations, oversampling or the decomposition that would choose among directions:
    0.83 of the energy that the exact subspace catches, where singular values fall like i^-0.5, and all of it where the
    gradient's rank is below ``rank``.  Arguments and result are those of :func:`leading_subspace`.
    """
    gradient = Gradient.of(factors)
    k = gradient.shape[1 if side == "left" else 0]
    # one product, and R: what a power step asks of G
    operator = _Operator(gradient, side, _through_factors(gradient, "power", rank, 0))
    random = rng.normal((k, rank), seed=seed, step=step, param=param, stream=_SKETCH)
    sketch = operator(random.to(operator.device))
    basis = _orthonormal(sketch)
    if basis is None:
        vectors, values = _singular(sketch)
        basis = _complete(vectors, values, rank, (seed, step, param))
    return _laid_out(basis, side)


def captured_energy(low: Tensor, factors: Sequence[Tensor] | Gradient) -> float:
    """‖R‖² / ‖G‖², without forming G where that is cheaper; NaN where G is zero.

    Args:
        low: R, of any dtype.
        factors: ``[G]`` or ``[dY1, X1, …]``, or a :class:`Gradient` of those.
    """
    gradient = Gradient.of(factors)
    whole = gradient.energy()
    return _energy(low) / whole if whole > 0 else math.nan


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _through_factors(gradient: Gradient, method: str, rank: int, iterations: int) -> bool:
    tokens = gradient.tokens
    return tokens is not None and factors_are_cheaper(method, *gradient.shape, rank, iterations, tokens)


class _Operator:
    """A (d, k): a product with it, or with its transpose, through G or through the factors."""

    def __init__(self, gradient: Gradient, side: Side, through_factors: bool) -> None:
        if through_factors:
            self.pairs: list[tuple[Tensor, Tensor]] = gradient.pairs(side)
        else:
            full = gradient.formed()
            self.pairs, self.matrix = [], full if side == "left" else full.t()
        self.device = gradient.factors[0].device

    def __call__(self, x: Tensor) -> Tensor:
        """A x (d, columns) of x (k, columns)."""
        if not self.pairs:
            return self.matrix @ x
        return _added([left.t() @ (right @ x) for left, right in self.pairs])

    def transposed(self, y: Tensor) -> Tensor:
        """Aᵀ y (k, columns) of y (d, columns)."""
        if not self.pairs:
            return self.matrix.t() @ y
        return _added([right.t() @ (left @ y) for left, right in self.pairs])


def _added(products: list[Tensor]) -> Tensor:
    return sum(products[1:], start=products[0])


# -- exact ------------------------------------------------------------------------------------------------------------


def _svd(matrix: Tensor, driver: str | None) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values."""
    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    return vectors, values


def _from_factors(left: Tensor, right: Tensor, driver: str | None) -> tuple[Tensor, Tensor]:
    """Left singular vectors (d, tokens) and values of A from QR of both factors: A = Q_l (R_l R_rᵀ) Q_rᵀ."""
    q_left, r_left = torch.linalg.qr(left.t())
    _, r_right = torch.linalg.qr(right.t(), mode="r")
    vectors, values = _svd(r_left @ r_right.t(), driver)
    return q_left @ vectors, values


# -- by iteration -----------------------------------------------------------------------------------------------------


def _range_finder(operator: _Operator, sketch: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values of A on the space that Aᵀ (A Aᵀ)^(q-1) S spans, S (d, columns) random.

    They are those of A Z for the last orthonormal Z, which costs no product with A beyond the iteration's own.
    """
    product = sketch
    for iteration in range(iterations):
        other = operator.transposed(_basis(product) if iteration else product)
        product = operator(_basis(other))
    return _singular(product)


def _orthonormal(y: Tensor) -> Tensor | None:
    """Orthonormal columns of y's range by Cholesky QR in float64; None where y has not full rank, up to rounding.

    Columns come out orthonormal up to float64's rounding times the squared condition, so an ill-conditioned y goes
    through it again: what the first time leaves is well-conditioned (Yamamoto et al., ETNA 2015).
    """
    wide = y.to(torch.float64)
    for _ in range(3):
        gram = wide.t() @ wide
        lower, failed = torch.linalg.cholesky_ex(gram)
        sizes = lower.diagonal()
        if bool(failed) or not bool(sizes.min() > _ROUNDING * sizes.max()):
            return None
        found: Tensor = torch.linalg.solve_triangular(lower.t(), wide, upper=True, left=False)
        if _one_norm(gram) * _one_norm(torch.cholesky_inverse(lower)) < _ILL:
            return found.to(torch.float32)
        wide = found
    return None


def _one_norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 1))


def _unit_columns(y: Tensor) -> Tensor:
    """Columns of length 1, those of zeros left; lengths in float64, where no square underflows."""
    lengths = torch.linalg.vector_norm(y, dim=0, keepdim=True, dtype=torch.float64)
    return (y / torch.where(lengths > 0, lengths, 1.0)).to(torch.float32)


def _basis(y: Tensor) -> Tensor:
    """As :func:`_orthonormal`, by Householder QR where that fails."""
    found = _orthonormal(y)
    return found if found is not None else torch.linalg.qr(y)[0]


def _singular(y: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values of y (d, columns) from the eigenvectors of its Gram matrix in float64.

    Values below 1e-8 of the largest are rounding: far below every threshold for the numerical rank in float32.  The
    vectors of small ones are off orthonormal by float64's rounding times the square of the largest value over theirs.
    """
    wide = y.to(torch.float64)
    squares, right = torch.linalg.eigh(wide.t() @ wide)
    values = squares.flip(0).clamp(min=0.0).sqrt()
    vectors = (wide @ right.flip(1)) / torch.where(values > 0, values, 1.0)
    return vectors.to(torch.float32), values.to(torch.float32)


# -- what all have in common ------------------------------------------------------------------------------------------


def _complete(vectors: Tensor, values: Tensor, rank: int, where: tuple[int, int, int]) -> Tensor:
    """(d, rank) orthonormal: the vectors with a value above rounding, and random directions orthogonal to them."""
    d = vectors.shape[0]
    largest = float(values[0]) if len(values) else 0.0
    # LAPACK's and NumPy's threshold for the numerical rank
    known = int((values > largest * d * _EPS).sum()) if largest > 0 else 0
    kept = vectors[:, :known]
    if known and largest**2 > _ILL * float(values[known - 1]) ** 2:  # as _singular leaves them
        kept = _basis(kept)
    if known == rank:
        return kept
    seed, step, param = where
    fill = rng.normal((d, rank - known), seed=seed, step=step, param=param, stream=_COMPLETION).to(vectors.device)
    for _ in range(2):  # once is not enough where the remainder is small: "twice is enough" (Kahan, Parlett)
        fill = fill - kept @ (kept.t() @ fill)
        fill, _ = torch.linalg.qr(fill)
    return torch.cat([kept, fill], dim=1)


def _laid_out(vectors: Tensor, side: Side) -> Tensor:
    """The projector of vectors (d, rank), each with its entry of largest magnitude positive."""
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    basis = torch.where(largest < 0, -vectors, vectors)
    return basis.contiguous() if side == "left" else basis.t().contiguous()
