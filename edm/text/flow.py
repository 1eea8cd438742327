"""Networks that predict a velocity, as most new ones do, and which networks those are.

On the straight path x_t = (1 - t) x_0 + t eps the velocity is v = eps - x_0.  Dividing by 1 - t gives EDM's
form with sigma = t / (1 - t), so that

    D(x; sigma) = x_t - t v(x_t, 1000 t, caption),    t = sigma / (1 + sigma),    x_t = x / (1 + sigma).

They are trained at a logit-normal t: ln sigma = ln(t / (1 - t)) ~ N(0, 1).  A scheduler's `shift` s moves t
to s t / (1 + (s - 1) t), which multiplies sigma by s: ln sigma ~ N(ln s, 1).  Weight 1 on velocities is
1 / t^2 = (1 + 1 / sigma)^2 on denoised latents.

What a network predicts stands in no file of weights, but in scheduler/scheduler_config.json beside it.
"""

import math
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

import sim_core as sim
from edm.images.foreign import read_json
from edm.text.pixart import LatentDenoiser, PixArtDenoiser
from toy.files import UserError, naming

CONFIG, MAX_TIMESTEPS = "scheduler/scheduler_config.json", 10**5
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
OTHERS = tuple(  # these say by prediction_type what they are made for
    f"{name}Scheduler"
    for name in "DDIM DDPM DEISMultistep DPMSolverMultistep DPMSolverSinglestep EulerAncestralDiscrete "
    "EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LMSDiscrete PNDM SASolver "
    "UniPCMultistep".split()
)


class FlowDenoiser(LatentDenoiser):
    """denoiser(xt, sigma, **cond) -> D, like xt, in float32 (float64 if the weights are).

    transformer: of diffusers, whose velocity at t is told the time `timesteps` t, not rounded.  shift: of its
    scheduler, which decides the levels that it is trained on and nothing else.
    """

    def __init__(self, transformer: Module, shift=1.0, timesteps=1000):
        super().__init__(transformer)
        self.shift, self.timesteps = shift, timesteps

    def draw_levels(self, rng: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
        """What it is trained on -> sigma, weight (n,): a logit-normal t, weight 1 on velocities."""
        how = dict(generator=rng, device=rng.device, dtype=torch.float32)
        sigma = sim.lognormal_sigma(n, math.log(self.shift), 1.0, **how)
        return sigma, (1 + 1 / sigma) ** 2

    def velocity(self, x: Tensor, t: float | Tensor, **cond) -> Tensor:
        """v(x_t, t): x (B, C, H, W) on the straight path, t (B,) in (0, 1], or a number -> like x."""
        x, t = self.start(x, t)
        return self.predict(x, self.timesteps * t.flatten(), cond)

    def forward(self, xt: Tensor, sigma: float | Tensor, **cond) -> Tensor:
        x, level = self.start(xt, sigma)
        t, x = level / (1 + level), x / (1 + level)
        return x - t * self.velocity(x, t.flatten(), **cond)


# ----------------------------------------------------------------------------------------------
# Which is which.  What is said of a network, in a student's notes too: nothing, where it predicts noise, or
# {"predicts": "velocity", "shift": s, "timesteps": 1000}.


def denoiser_of(transformer: Module, about: dict[str, Any]) -> LatentDenoiser:
    """The denoiser around it, by what is said of it."""
    if about.get("predicts", "noise") == "noise":
        return PixArtDenoiser(transformer)
    return FlowDenoiser(transformer, about.get("shift", 1.0), about.get("timesteps", 1000))


def predictions(about: dict[str, Any]) -> dict[str, Any]:
    """Of all notes, those that say what a network predicts."""
    return {name: about[name] for name in ("predicts", "shift", "timesteps") if name in about}


def told(about: dict[str, Any]) -> Iterator[str]:
    """What a user should know of it: lines."""
    if "shift" in about:
        yield (
            f"the teacher predicts velocities, trained at ln sigma ~ N({math.log(about['shift']):.2f}, 1): "
            "see --sigma-mean, --sigma-std"
        )


def read_predictions(*folders) -> dict[str, Any]:
    """What the network of a pipeline predicts, from the first of the folders with a scheduler's settings.

    UserError, naming the file, for what is neither noise nor a velocity; {}, so noise, where there is none.
    """
    for path in (Path(folder, CONFIG) for folder in folders):
        if os.path.lexists(path):
            with naming(path):
                return predictions_of(read_json(path))
    return {}


def predictions_of(config: Any) -> dict[str, Any]:
    name, flow_path = config.get("_class_name"), config.get("_class_name") in FLOW
    if not (flow_path or name in OTHERS):
        raise UserError(f"scheduler {reprlib.repr(name)} is not known here, so neither what is predicted")
    for option in ("invert_sigmas", "use_dynamic_shifting"):
        if config.get(option):
            raise UserError(f"{name} with {option} is not supported")
    steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas") or ()
    if type(steps) is not int or not 1 <= steps <= MAX_TIMESTEPS or len(betas) > MAX_TIMESTEPS:
        raise UserError(f"its timesteps must be from 1 to {MAX_TIMESTEPS:,}, got {reprlib.repr(steps)}")
    says = config.get("prediction_type", "flow_prediction" if flow_path else "epsilon")
    flow_path = flow_path or bool(config.get("use_flow_sigmas"))
    if says == "epsilon" and not flow_path:
        return {}
    if says != "flow_prediction" or not flow_path:
        words = f"{'with' if flow_path else 'without'} use_flow_sigmas"
        raise UserError(
            f"prediction_type {reprlib.repr(says)} {words}: only noise (epsilon) and velocities "
            "(flow_prediction with use_flow_sigmas, or a FlowMatch scheduler) are supported"
        )
    shift = config.get("shift" if name in FLOW else "flow_shift", 1.0)
    if type(shift) not in (int, float) or not 1e-6 <= shift < 1e6:
        raise UserError(f"its shift must be a positive number, got {reprlib.repr(shift)}")
    return {"predicts": "velocity", "shift": float(shift), "timesteps": steps}
