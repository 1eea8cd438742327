"""The exercises of toy/exercises.ipynb, marked in one line each: `check(answer)`.

What an answer is compared with is in `toy/oracles.py`, the mistakes that are known by name are in
`toy/mistakes.py`, answers in `toy/solutions.py`.
"""

from functools import partial

import sim_core as sim
from toy import classroom, mistakes, oracles
from toy.marking import Exercise, mark

EXP = sim.Exp(alpha=4, beta=0.3)  # other than the defaults
PSEUDO_HUBER = oracles.DISTANCE

EXERCISES = {
    "score_from_denoiser": Exercise(
        oracles.tweedie,
        oracles.true_score,
        "It is the exact score of the bed's mixture, and its gradient too",
        mistakes.SCORE,
    ),
    "conditional_score": Exercise(
        oracles.conditional,
        lambda: oracles.conditional(oracles.slope_of_log_q),
        "It is the gradient of log q(xt|x0); along the path it is -noise/sigma, whatever theta does",
        mistakes.CONDITIONAL,
    ),
    "projection_mean": Exercise(
        oracles.projection,
        oracles.what_a_wrong_score_leaves,
        "In quadrature: 0 for the right score s; E|w - s|^2 for a wrong one, w, and u = w - s",
        mistakes.PROJECTION,
    ),
    "exp_gradient": Exercise(
        partial(oracles.row_of_table_4, EXP),
        lambda: oracles.row_by_autograd(EXP),
        "It is the derivative of d, beta included, which Table 4 forgets",
        mistakes.EXP,
    ),
    "pseudo_huber_gradient": Exercise(
        partial(oracles.row_of_table_4, PSEUDO_HUBER),
        lambda: oracles.row_by_autograd(PSEUDO_HUBER),
        "It is the derivative of d, and never longer than 1: no sample outweighs the others",
        mistakes.PSEUDO_HUBER,
    ),
    "surrogate": Exercise(
        partial(oracles.on_triple, [PSEUDO_HUBER.grad]),
        lambda: oracles.true_loss(sim.sim_loss),
        "Theorem 3.1: its gradient is that of E d(y) with the law of xt held still, to rounding",
        mistakes.SURROGATE,
    ),
    "as_printed": Exercise(
        oracles.printed,
        oracles.nothing_trains,
        "And its gradient is 0: (A.1) is 0 at every theta, and so is its derivative. Nothing would train",
        mistakes.PRINTED,
    ),
    "stopped_score": Exercise(
        oracles.stopping,
        lambda: {"value": oracles.true_score()["value"], "gradient": oracles.left_side(oracles.L2, "score")},
        "With this stop the surrogate has the gradient of the theorem's left side",
        mistakes.STOPPED,
    ),
    "full_loss": Exercise(
        partial(oracles.on_triple, [PSEUDO_HUBER.value, PSEUDO_HUBER.grad]),
        lambda: oracles.true_loss(sim.full_loss, law_moves=True),
        "Its gradient is that of E d(y) with nothing held still, which SIM's is off by 31 % here",
        mistakes.FULL,
    ),
    "sid_alphas": Exercise(
        oracles.alphas,
        lambda: {
            name: oracles.left_side(oracles.L2, "score", law_moves) / 2
            for name, law_moves in (("first", False), ("second", True))
        },
        "At the first SiD's gradient is half of SIM's with squared L2, at the second half of the full one",
        mistakes.ALPHAS,
    ),
    "draw_sigma": Exercise(
        oracles.levels,
        oracles.normal_quantiles,
        "The quantiles are those of a log-normal law",
        mistakes.SIGMA,
        tolerance=5e-3,
    ),
    "edm_weight": Exercise(
        oracles.weights,
        lambda: oracles.weights(lambda sigma, std: (sigma * std / (sigma**2 + std**2).sqrt()) ** -2),
        "It is 1 / c_out^2: every level counts alike for what the network itself has to say",
        mistakes.WEIGHT,
    ),
    "fake_loss": Exercise(
        oracles.learning,
        oracles.true_learning,
        "Its gradient moves psi towards the exact denoiser, E[x0|xt], and theta not at all",
        mistakes.FAKE,
    ),
    "generator_loss": Exercise(
        oracles.judging,
        oracles.true_judging,
        "Algorithm 2's loss has the gradient of E d(y) in denoised space, to rounding",
        mistakes.GENERATOR,
    ),
    "distill": Exercise(
        oracles.five_steps,
        lambda: oracles.five_steps(mistakes.alternating()),
        "",
        mistakes.DISTILL,
        tolerance=1e-6,
        last=classroom.on_the_ring,
    ),
    "my_target": Exercise(
        lambda answer: classroom.own_target(answer) and {}, dict, "", last=classroom.on_own_target
    ),
}


def check(answer, *tools):
    """Print what is to be said of an answer, in one line.  tools: other answers that it needs."""
    print(mark(EXERCISES, answer, *tools)[1])
