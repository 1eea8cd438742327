"""The family of f-divergences: f, f'' and h(r) = r f''(r), of r = p / q.

p is the generator's law at a noise level, q the teacher's, and D_f = E_q f(r) with f convex, f(1) = 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Divergence(NamedTuple):
    """A row: what it is, with m = (p + q) / 2, and functions of r > 0."""

    what: str
    text: tuple[str, str, str]  # f, f'' and h as formulas
    f: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]
    h: Callable[[Tensor], Tensor]

    def slope(self, r: Tensor) -> Tensor:
        """(h + r h')(r), the derivative of r h(r)."""
        return torch.func.jvp(lambda r: r * self.h(r), (r,), (torch.ones_like(r),))[1]


def _row(what, *parts):
    return Divergence(what, parts[::2], *parts[1::2])


# fmt: off
# From seeking to covering, by what h does as r goes to 0, where p misses q: 0, constant, r^-1/2, 1/r, 1/r^2.
ROWS = {
    "pearson": _row("chi^2, of (p - q)^2 / q", "(r - 1)^2", lambda r: (r - 1) ** 2,
                    "2", lambda r: 2 * torch.ones_like(r), "2r", lambda r: 2 * r),
    "softened_kl": _row("2 KL(m, q)", "(1+r) log((1+r)/2)", lambda r: (1 + r) * ((1 + r) / 2).log(),
                        "1/(1+r)", lambda r: 1 / (1 + r), "r/(1+r)", lambda r: r / (1 + r)),
    "softened_chi2": _row("Le Cam, of (p - q)^2 / (p + q)", "(r - 1)^2 / (1+r)",
                          lambda r: r - 3 + 4 / (1 + r), "8/(1+r)^3", lambda r: 8 / (1 + r) ** 3,
                          "8r/(1+r)^3", lambda r: 8 * r / (1 + r) ** 3),
    "kl": _row("KL(p, q), called reverse KL", "r log r", lambda r: r * r.log(),
               "1/r", lambda r: 1 / r, "1", torch.ones_like),
    "jensen_shannon": _row("(KL(p, m) + KL(q, m)) / 2",
                           "(r log r - (1+r) log((1+r)/2)) / 2",
                           lambda r: (r * r.log() - (1 + r) * ((1 + r) / 2).log()) / 2,
                           "1/(2r (1+r))", lambda r: 1 / (2 * r * (1 + r)),
                           "1/(2 (1+r))", lambda r: 1 / (2 * (1 + r))),
    "hellinger": _row("integral of (sqrt p - sqrt q)^2", "(sqrt r - 1)^2", lambda r: (r.sqrt() - 1) ** 2,
                      "1/(2 r^1.5)", lambda r: r**-1.5 / 2, "1/(2 r^0.5)", lambda r: r**-0.5 / 2),
    "softened_forward": _row("2 KL(m, p)", "(1+r) log((1+r)/2r)",
                             lambda r: (1 + r) * ((1 + r) / (2 * r)).log(),
                             "1/(r^2 (1+r))", lambda r: 1 / (r**2 * (1 + r)),
                             "1/(r (1+r))", lambda r: 1 / (r * (1 + r))),
    "jeffreys": _row("KL(p, q) + KL(q, p)", "(r - 1) log r", lambda r: (r - 1) * r.log(),
                     "1/r + 1/r^2", lambda r: 1 / r + r**-2, "1 + 1/r", lambda r: 1 + 1 / r),
    "forward_kl": _row("KL(q, p), called forward KL", "-log r", lambda r: -r.log(),
                       "1/r^2", lambda r: r**-2, "1/r", lambda r: 1 / r),
    "neyman": _row("chi^2, of (p - q)^2 / p", "(r - 1)^2 / r", lambda r: r - 2 + 1 / r,
                   "2/r^3", lambda r: 2 * r**-3, "2/r^2", lambda r: 2 * r**-2),
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
