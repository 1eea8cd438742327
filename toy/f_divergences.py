"""Exact f-divergences: where SIM stands in the family, checked in quadrature, then trained.

    python toy/f_divergences.py            # table, then a ring under each of them: out/f_divergences.png
    python toy/f_divergences.py --quick    # one seed of each

With r = p / q at a noise level, p the generator's diffused law and q the teacher's, D_f = E_q f(r).
Let h(r) = r f''(r) and y = s_p - s_q.  Then

    (1)  grad D_f           =  grad E sg(h(r) y)^T xt
    (2)  grad E h(r) |y|^2  =  grad E [-2 h(r) y^T (s_psi - grad log q(xt|x0)) + (h + r h')(r) |y|^2]
    (3)  D_f(sigma_0) - D_f(sigma_1)  =  integral from sigma_0 to sigma_1 of  sigma E h(r) |y|^2

On the right of (1) and (2), p's parameters are stopped and xt moves, in (2) inside h, too.  On the test
bed (toy/test_bed.py) r is known, and every expectation is a number.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import numpy as np
import torch
from torch import Tensor

import sim_core as sim
from toy.test_bed import SIGMA, TestBed, flat, relative


class Divergence(NamedTuple):
    """D_f(p, q) = E_q f(p / q); f convex, f(1) = 0.  m is (p + q) / 2.  Functions of r = p / q > 0."""

    what: str
    text: tuple[str, str, str]  # f, f'' and h as formulas
    f: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]
    h: Callable[[Tensor], Tensor]

    def slope(self, r):
        """(h + r h')(r), the derivative of r h(r)."""
        return torch.func.jvp(lambda r: r * self.h(r), (r,), (torch.ones_like(r),))[1]


def _row(what, *parts):
    return Divergence(what, parts[::2], *parts[1::2])


# fmt: off
ROWS = {
    "kl": _row("KL(p, q), the field's reverse KL", "r log r", lambda r: r * r.log(),
               "1/r", lambda r: 1 / r, "1", torch.ones_like),
    "forward_kl": _row("KL(q, p)", "-log r", lambda r: -r.log(),
                       "1/r^2", lambda r: r**-2, "1/r", lambda r: 1 / r),
    "jeffreys": _row("KL(p, q) + KL(q, p)", "(r - 1) log r", lambda r: (r - 1) * r.log(),
                     "1/r + 1/r^2", lambda r: 1 / r + r**-2, "1 + 1/r", lambda r: 1 + 1 / r),
    "jensen_shannon": _row("(KL(p, m) + KL(q, m)) / 2",
                           "(r log r - (1+r) log((1+r)/2)) / 2",
                           lambda r: (r * r.log() - (1 + r) * ((1 + r) / 2).log()) / 2,
                           "1/(2r (1+r))", lambda r: 1 / (2 * r * (1 + r)),
                           "1/(2 (1+r))", lambda r: 1 / (2 * (1 + r))),
    "hellinger": _row("integral of (sqrt p - sqrt q)^2", "(sqrt r - 1)^2", lambda r: (r.sqrt() - 1) ** 2,
                      "1/(2 r^1.5)", lambda r: r**-1.5 / 2, "1/(2 r^0.5)", lambda r: r**-0.5 / 2),
    "pearson": _row("chi^2, of (p - q)^2 / q", "(r - 1)^2", lambda r: (r - 1) ** 2,
                    "2", lambda r: 2 * torch.ones_like(r), "2r", lambda r: 2 * r),
    "neyman": _row("chi^2, of (p - q)^2 / p", "(r - 1)^2 / r", lambda r: r - 2 + 1 / r,
                   "2/r^3", lambda r: 2 * r**-3, "2/r^2", lambda r: 2 * r**-2),
    "softened_kl": _row("2 KL(m, q)", "(1+r) log((1+r)/2)", lambda r: (1 + r) * ((1 + r) / 2).log(),
                        "1/(1+r)", lambda r: 1 / (1 + r), "r/(1+r)", lambda r: r / (1 + r)),
    "softened_forward": _row("2 KL(m, p)", "(1+r) log((1+r)/2r)",
                             lambda r: (1 + r) * ((1 + r) / (2 * r)).log(),
                             "1/(r^2 (1+r))", lambda r: 1 / (r**2 * (1 + r)),
                             "1/(r (1+r))", lambda r: 1 / (r * (1 + r))),
    "softened_chi2": _row("Le Cam, of (p - q)^2 / (p + q)", "(r - 1)^2 / (1+r)",
                          lambda r: r - 3 + 4 / (1 + r), "8/(1+r)^3", lambda r: 8 / (1 + r) ** 3,
                          "8r/(1+r)^3", lambda r: 8 * r / (1 + r) ** 3),
}
# Weights of f-distill's loss, as FastGen's code of it has them: name -> (weight of rho = q / p, the row
# that it belongs to, weight / h).  D_f(q, p) there is E_p f(rho), with weight rho^2 f''(rho).
F_DISTILL = {
    "rkl": (torch.ones_like, "kl", 1), "kl": (lambda rho: rho, "forward_kl", 1),
    "jf": (lambda rho: 1 + rho, "jeffreys", 1), "js": (lambda rho: 1 - 1 / (1 + rho), "jensen_shannon", 2),
    "sh": (lambda rho: rho**0.5, "hellinger", 2), "neyman": (lambda rho: 1 / rho, "pearson", 0.5),
    "sf": (lambda rho: 1 / (1 + rho), "softened_kl", 1),
}
# fmt: on

TOLERANCE = {"f'', h": 1e-12, "(1)": 1e-12, "(2)": 1e-12, "(3)": 1e-10}
WRONG = ("1/r for r", "no r h'", "h stopped")  # what a wrong variant must be off by, at least:
VISIBLE = 1e-2
LEVELS = SIGMA, 3.0  # sigma_0, sigma_1
NODES, COARSE = 140, 60  # an axis, for what must be right and for what must be wrong


class Bed(TestBed):
    """The test bed with tails: where h grows, the integrals reach farther than the noise."""

    sigma = SIGMA

    def quadrature(self, means, nodes, reach=14.0):
        """E over k and noise: (weights, x0, noise, sigma) for each k."""
        noise, cell = plane(reach, nodes, self.dim)
        weight = cell * torch.exp(-noise.square().sum(1) / 2) / (2 * math.pi) ** (self.dim / 2)
        for mean, pi in zip(means, self.pi):
            yield pi * weight, mean.expand_as(noise), noise, torch.full_like(weight, self.sigma)

    def ratio(self, means, xt, sigma):
        """r (B,) and y (B, D) at xt."""
        law, q = self.law(means), self.teacher
        r = (law.log_density(xt, sigma) - q.log_density(xt, sigma)).exp()
        return r, law.score(xt, sigma) - q.score(xt, sigma)

    def on_plane(self, means, reach=12.0):
        """Fixed points x: (q(x) dx, r, y), everything live in means."""
        x, cell = plane(4 + reach * self.sigma, NODES, self.dim)
        return self.teacher.log_density(x, self.sigma).exp() * cell, *self.ratio(means, x, self.sigma)

    def plane_gradient(self, integrands):
        """d/dtheta of the integrals of integrand(q dx, r, y) over fixed x: theta is in the densities."""
        means = self.net(self.z)
        values = [integrand.sum() for integrand in integrands(*self.on_plane(means))]
        parameters = list(self.net.parameters())
        return [flat(torch.autograd.grad(value, parameters, retain_graph=True)) for value in values]

    # The integrands of the right sides: theta is in xt.

    def moves(self, h):
        """(1): sg(h(r) y)^T xt."""

        def integrand(x0, noise, sigma, means):
            xt = sim.add_noise(x0, sigma, noise)
            r, y = self.ratio(means.detach(), xt, sigma)  # sg: p's parameters
            return ((h(r)[:, None] * y).detach() * xt).sum(1)

        return integrand

    def surrogate(self, h, slope, stop=False):
        """(2), `sim.score_projection` with u = -2 h(r) y, and what the moving law adds."""

        def integrand(x0, noise, sigma, means):
            xt, means = sim.add_noise(x0, sigma, noise), means.detach()  # sg: p's parameters
            r, y = self.ratio(means, xt, sigma)
            weight = h(r.detach() if stop else r)[:, None]
            residual = self.law(means).score(xt, sigma), sim.conditional_score(xt, x0, sigma)
            return slope(r) * y.square().sum(1) - 2 * sim.score_projection(weight * y, *residual)

        return integrand


def plane(half, nodes, dim):
    """Trapezoid nodes (nodes**dim, dim) on +-half, and the volume of a cell."""
    axis = torch.linspace(-half, half, nodes, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * dim).reshape(-1, dim), (axis[1] - axis[0]).item() ** dim


def formula_error(row):
    """f'' and h against autograd's derivatives of f."""
    r = torch.logspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(row.f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    worst = max(
        abs(ours / truth - 1).max() for ours, truth in ((row.second(r), second), (row.h(r), r * second))
    )
    return max(worst.item(), abs(row.f(torch.ones(1)).item()))


def along_sigma(bed, what, nodes=16):
    """The integral of what(bed) over sigma between LEVELS, by Gauss' rule in log sigma."""
    span, total = math.log(LEVELS[1] / LEVELS[0]), 0
    for node, weight in zip(*np.polynomial.legendre.leggauss(nodes)):
        bed.sigma = LEVELS[0] * math.exp(span * (node + 1) / 2)
        total = total + weight * span / 2 * bed.sigma * what(bed)  # d sigma = sigma d log sigma
    bed.sigma = SIGMA
    return total


def difference(bed, what):
    """what(bed) at sigma_0, minus that at sigma_1."""
    at = {}
    for bed.sigma in LEVELS:
        at[bed.sigma] = what(bed)
    bed.sigma = SIGMA
    return at[LEVELS[0]] - at[LEVELS[1]]


def integral_errors(bed):
    """(3), both sides -> the relative error of each row."""
    means = bed.net(bed.z).detach()

    def divergences(bed):
        q, r, _ = bed.on_plane(means)
        return torch.stack([(q * row.f(r)).sum() for row in ROWS.values()])

    def fisher(bed):
        q, r, y = bed.on_plane(means)
        return bed.sigma * torch.stack(
            [(q * r * row.h(r) * y.square().sum(1)).sum() for row in ROWS.values()]
        )

    errors = along_sigma(bed, fisher) / difference(bed, divergences) - 1
    return dict(zip(ROWS, errors.abs().tolist()))


def check(seed):
    """The three lines for every row -> {name: {column: error}}."""
    bed = Bed(seed)
    truth = [
        bed.plane_gradient(integrands)
        for integrands in (
            lambda q, r, y: [q * row.f(r) for row in ROWS.values()],
            lambda q, r, y: [q * r * row.h(r) * y.square().sum(1) for row in ROWS.values()],
        )
    ]
    integrals, table = integral_errors(bed), {}
    for (name, row), one, two in zip(ROWS.items(), *truth):
        forms = {
            "(1)": (bed.moves(row.h), one),
            "(2)": (bed.surrogate(row.h, row.slope), two),
            "1/r for r": (bed.moves(lambda r, h=row.h: h(1 / r)), one),
            "no r h'": (bed.surrogate(row.h, row.h), two),
            "h stopped": (bed.surrogate(row.h, row.slope, stop=True), two),
        }
        nodes = {column: COARSE if column in WRONG else NODES for column in forms}
        errors = {c: relative(bed.gradient(form, nodes[c]), goal) for c, (form, goal) in forms.items()}
        table[name] = {"f'', h": formula_error(row)} | errors | {"(3)": integrals[name]}
    return table


FORMULAS = """
  D_f = E_q f(r), r = p / q, p the generator's law at a noise level, q the teacher's, m = (p + q) / 2:
"""
COLUMNS = """
  f'', h      against autograd's derivatives of f, r from 0.01 to 100
  (1) (2)     whole parameter gradient of an MLP, against that of the integral with theta in the densities
  (3)         the integral over sigma from {} to {}, against the difference of the two divergences
  1/r for r   (1) with the ratio upside down.  KL's h = 1 knows no r: it must be right in all columns
  no r h'     (2) as if h were a constant;  h stopped: (2) with h cut off from xt
"""


def worst_of(tables):
    """Tables of several seeds -> one: right columns at their worst, wrong ones at their best; verdicts."""
    rows = {}
    for name in ROWS:
        row = {c: max(table[name][c] for table in tables) for c in TOLERANCE}
        row |= {c: min(table[name][c] for table in tables) for c in WRONG}
        wrong = [row[c] < 1e-6 if name == "kl" else row[c] > VISIBLE for c in WRONG]
        rows[name] = row | {"ok": all(row[c] < limit for c, limit in TOLERANCE.items()) and all(wrong)}
    return rows


def print_report(rows, others):
    print("\n" + FORMULAS)
    for name, row in ROWS.items():
        print(f"  {name:17s} {row.what:31s} f = {row.text[0]:28s} f'' = {row.text[1]:13s} h = {row.text[2]}")
    print("\nRelative errors (right columns: worst of the seeds, wrong ones, after the bar: best)\n")
    print(f"{'':17s} {'  '.join(f'{c:>7s}' for c in TOLERANCE)} | {'  '.join(f'{c:>9s}' for c in WRONG)}")
    for name, row in rows.items():
        right = "  ".join(f"{row[c]:7.0e}" for c in TOLERANCE)
        wrong = "  ".join(f"{row[c]:9.0e}" if row[c] < 1e-2 else f"{row[c]:9.2f}" for c in WRONG)
        print(f"{name:17s} {right} | {wrong}  {'holds' if row['ok'] else 'FAILS'}")
    print(COLUMNS.format(*LEVELS))
    for what, error, tolerance in others:
        print(f"  {what:70s} {error:8.0e}  {'holds' if error < tolerance else 'FAILS'}")


if __name__ == "__main__":
    import time

    torch.set_num_threads(1)
    t = time.time()
    rows = worst_of([check(seed) for seed in range(3)])
    print_report(rows, [])
    print(time.time() - t)
