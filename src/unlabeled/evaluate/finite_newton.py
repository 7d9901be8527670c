"""Linear support vector machines of all classes at once, by a finite Newton method.

Keerthi and DeCoste, JMLR 2005. For each class, with signs y_i = 1 or -1 and a feature that is 1,

    f(w) = |w|^2 / 2 + C sum_i max(0, 1 - y_i w.x_i)^2

is convex and piecewise quadratic: Newton steps, each solved by conjugate gradients on the samples
inside the margin and shortened until f falls enough, end at its only minimum. It is that of
scikit-learn's LinearSVC(loss="squared_hinge"), whose solver takes one class after the other, on one
thread: products with the features of all classes together take a fraction of the time, and one
Cholesky factor, of the Hessian if all samples were inside, leaves few gradient steps to do.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-4  # of a gradient's length, of its length at zero: as scikit-learn's
SOLVES = 100  # most steps of conjugate gradients
HALVINGS = 30


class Machines(NamedTuple):
    """x @ weight + bias > 0 where the class is."""

    weight: Tensor  # (d, C) float64
    bias: Tensor  # (C,)
    converged: Tensor  # (C,) bool

    def __call__(self, x: Tensor) -> Tensor:
        """(n, C) of features (n, d)."""
        return x @ self.weight + self.bias


def fit(
    x: Tensor,
    y: Tensor,
    classes: int,
    costs: Sequence[float],
    *,
    steps: int = 100,
    tolerance: float = TOLERANCE,
) -> list[Machines]:
    """Machines for every class against all others, for each cost.

    Args:
        x: (n, d) float64.
        y: (n,) int64 classes.
        classes: C; a class that is not met gets a machine that says no.
        costs: C of the formula; each search starts where that of the cost before ended.
        steps: most Newton steps.
        tolerance: of a gradient's length, of its length at zero.
    """
    x, basis = torch.cat([x, x.new_ones(len(x), 1)], dim=1), None
    if len(x) < x.shape[1]:  # machines lie in the span of the samples
        basis, corner = torch.linalg.qr(x.T)
        x = corner.T.contiguous()
    signs = torch.full((len(x), classes), -1.0, dtype=x.dtype, device=x.device)
    signs[torch.arange(len(x), device=x.device), y] = 1.0
    gram, w, found = x.T @ x, x.new_zeros(x.shape[1], classes), []
    for cost in costs:
        one = torch.eye(len(gram), dtype=x.dtype, device=x.device)
        factor = torch.linalg.cholesky(one + 2 * cost * gram)
        w, converged = _descended(x, signs, w, cost, factor, steps, tolerance)
        whole = w if basis is None else basis @ w
        found.append(Machines(whole[:-1], whole[-1], converged))
    return found


def _descended(
    x: Tensor,
    signs: Tensor,
    w: Tensor,
    cost: float,
    factor: Tensor,
    steps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """The minimum from w on, and which classes are there."""
    enough = tolerance * (2 * cost * (x.T @ signs)).norm(dim=0)  # the gradient at zero
    out, left = x @ w, steps
    while True:
        slack = (1 - signs * out).clamp(min=0)
        gradient = w - 2 * cost * (x.T @ (signs * slack))
        going = gradient.norm(dim=0) > enough
        if not left or not going.any():
            return w, ~going
        step = _solved(x, (slack > 0).to(x.dtype), -gradient * going, cost, factor)
        moved = x @ step
        share = _share(w, step, signs, out, moved, gradient, cost)
        w, out, left = w + share * step, out + share * moved, left - 1


def _solved(x: Tensor, inside: Tensor, target: Tensor, cost: float, factor: Tensor) -> Tensor:
    """About s of H s = target (d, C), H = 1 + 2 cost x' diag(inside) x of each column."""
    s, rest = torch.zeros_like(target), target.clone()
    near = torch.cholesky_solve(rest, factor)
    way, product = near, (rest * near).sum(0)
    enough = rest.square().sum(0) * 1e-4  # a hundredth of the length
    for _ in range(SOLVES):
        going = rest.square().sum(0) > enough
        if not going.any():
            break
        bent = way + 2 * cost * (x.T @ (inside * (x @ way)))
        length = going * product / (way * bent).sum(0).clamp(min=1e-300)
        s += length * way
        rest = rest - length * bent
        near = torch.cholesky_solve(rest, factor)
        now = (rest * near).sum(0)
        way = near + now / product.clamp(min=1e-300) * way
        product = now
    return s


def _share(
    w: Tensor,
    step: Tensor,
    signs: Tensor,
    out: Tensor,
    moved: Tensor,
    gradient: Tensor,
    cost: float,
) -> Tensor:
    """(C,): 1, or so often halved that each objective falls enough; 0 where there is no step."""

    def objective(share: Tensor) -> Tensor:
        slack = (1 - signs * (out + share * moved)).clamp(min=0)
        return (w + share * step).square().sum(0) / 2 + cost * slack.square().sum(0)

    slope = (gradient * step).sum(0)
    share, before = torch.ones_like(slope), objective(torch.zeros_like(slope))
    for _ in range(HALVINGS):
        good = objective(share) <= before + 1e-4 * share * slope
        if good.all():
            break
        share = torch.where(good, share, share / 2)
    return share
