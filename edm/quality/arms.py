"""The arms of the studies on digits: what each changes in its preset, in groups, and nothing else."""

from functools import partial

import sim_core as sim

METHODS = {"sim": {}, "sid": dict(method="sid")}  # SiD with its alpha of 1.2
FIGURE2 = {  # title of the panel -> its arms
    title: {
        f"{method}-{levels}{mark}": METHODS[method] | dict(sigma_distribution=sigma) | weighting
        for method in METHODS
        for mark, weighting in (("", {}), ("-w", dict(weighting="sid")))
    }
    for levels, sigma, title in (("lognormal", "sim", "log-normal levels (B.10)"),
                                 ("karras", "karras", "Karras' levels (SiD)"))
}  # fmt: skip
START = {f"start-{sigma:g}": dict(sigma_init=sigma) for sigma in (0.5, 1.0, 2.5, 5.0, 10.0, 20.0)}
PANELS = FIGURE2 | {"sigma_init": START}  # curves over a run are drawn of these

# B.3's levels up to 4 alone: a name of this study, as nobody else cuts them there.
sim.SIGMA_DISTRIBUTIONS["pixart-cut"] = partial(sim.SIGMA_DISTRIBUTIONS["pixart"], sigma_max=4.0)
BOTH, THETA = ("", "fake_"), ("",)


def levels(name: str, whose=BOTH) -> dict[str, str]:
    return {f"{of}sigma_distribution": name for of in whose}


def lognormal(mean: float, std: float, whose: tuple[str, ...]) -> dict[str, float]:
    return {f"{of}sigma_{part}": value for of in whose for part, value in (("mean", mean), ("std", std))}


def means(*stds: float) -> dict[str, dict[str, float]]:
    return {
        f"{who}{mean:+d}-{std:g}": lognormal(float(mean), std, whose)
        for who, whose in (("both", BOTH), ("theta", THETA))
        for std in stds
        for mean in range(-4, 2)
    }


GROUPS = {
    "figure2": {arm: changes for arms in FIGURE2.values() for arm, changes in arms.items()}
    | {"default": {}, "bf16": dict(precision="bf16"), "no-share": dict(share=False)}
    | {"full": dict(method="full"), "full-l2": dict(method="full", distance="l2")},
    "b3": {  # psi's levels and weight; then theta's
        "b3-denoised": levels("pixart") | dict(fake_weighting="one"),
        "b3-edm": levels("pixart"),
        "b3-cut-edm": levels("pixart-cut"),
        "b3-noise": levels("pixart") | dict(fake_weighting="noise"),
        "b3-noise-both": levels("pixart") | dict(fake_weighting="noise", weighting="noise"),
        "b3-theta": levels("pixart", THETA),
        "preset": {},
    },
    "means": means(1.2),  # p_EDM's width
    "widths": means(0.5, 2.0),
    "start": START,
}  # fmt: skip
ARMS = {arm: changes for group in GROUPS.values() for arm, changes in group.items()}
