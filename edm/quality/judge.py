"""Rows of a comparison: a sampler's images against the data."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

from edm.images.sampler import make_sampler, sample_batches
from edm.quality.features import Inception, classifier_features
from edm.quality.metrics import (
    Reference,
    data_floor,
    evaluate_samples,
    features_of,
    inception_score,
    load_statistics,
)
from toy.files import UserError, check_apart


def feature_network(cfg: Any, data: Any, state: Any) -> Module:
    if cfg.inception:
        return Inception(cfg.inception, cfg.trust).to(state.device)
    default = Path(cfg.out).with_name(f"classifier-{Path(cfg.data).stem}.safetensors")
    cache = cfg.classifier or default
    check_apart(cfg.out, cache)
    with state.main_process_first():  # which trains; the others read its file
        return classifier_features(data, cache).to(state.device)


def timed(batches: Iterable, clock: list[float]) -> Iterator[Tensor]:
    """The images of `sample_batches`; the seconds it takes to make them are added to clock[0]."""
    batches = iter(batches)
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        clock[0] += time.perf_counter() - start
        if batch is None:
            return
        yield batch[1]


class Judge:
    """Rows of the table: each is a sampler's, against data whose own features are computed once.

    cfg: filled settings.  data: edm.images.data.Images.  state: accelerate's, of those who share the work.
    """

    def __init__(self, cfg: Any, data: Any, state: Any):
        self.cfg, self.state, self.net = cfg, state, feature_network(cfg, data, state)
        statistics = load_statistics(cfg.reference, self.net.num_features) if cfg.reference else None
        mine = data.images[state.process_index :: state.num_processes]
        features, self.probabilities = features_of(self.net, mine.split(cfg.batch))
        self.reference = Reference(features, statistics)

    def __call__(self, name: str, network: Module, about: dict) -> dict[str, float | list[int]]:
        """One sampler's row, from images of which each process makes its share."""
        cfg, state = self.cfg, self.state
        network.to(state.device)
        sample, evaluations = make_sampler(network, about, cfg.steps)
        seeds = range(cfg.samples)[state.process_index :: state.num_processes]
        batches = sample_batches(sample, network, seeds, cfg.batch, device=state.device)
        bar = tqdm(batches, name, -(-len(seeds) // cfg.batch), disable=not state.is_main_process, leave=False)
        clock = [0.0]
        row = evaluate_samples(self.net, self.reference, timed(bar, clock))
        if row["images"] != cfg.samples:
            raise UserError(f"asked for {cfg.samples} images of the {name}, got {row['images']}")
        speed = {"seconds": clock[0], "images_per_second": cfg.samples / clock[0]}
        return {"evaluations": evaluations} | row | speed

    def floor(self) -> dict[str, float | list[int]]:
        """The data's own row."""
        score = inception_score(self.probabilities)
        return data_floor(self.reference.features) | {"inception_score": score}
