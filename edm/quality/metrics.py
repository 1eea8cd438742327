"""How good are these images?  Fréchet distance, Inception Score, precision and recall, class counts.

All of them look at images through one of the feature networks of features.py.
"""

import itertools
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from edm.config import LEAST_IMAGES
from edm.device import exact
from toy.files import UserError, naming

# ----------------------------------------------------------------------------------------------
# Distances between sets of features (N, F).


class Given(nn.Module):
    """torchmetrics' "feature network" where the features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, reference: Tensor | tuple[Tensor, Tensor]) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)), between Gaussians fitted with covariances over N - 1.

    features: (N, F).  reference: features (M, F), or statistics (mean (F,), covariance (F, F)).
    In float64, about a point among them: sums of squares keep their digits.  Nothing is added to the
    diagonal.  Raises UserError for less than two features.
    """
    given, device = isinstance(reference, torch.Tensor), exact(features[:0]).device
    if len(features) < 2 or (given and len(reference) < 2):
        raise UserError("a Frechet distance needs at least 2 images on either side")
    centre = exact(reference[0]).to(device)  # a feature, or the mean
    metric = FrechetInceptionDistance(Given(features.shape[1]), sync_on_compute=False).to(device)
    for part in features.split(10_000):
        metric.update(exact(part) - centre, real=False)
    if given:
        for part in reference.split(10_000):
            metric.update(exact(part) - centre, real=True)
    else:  # what two features with these statistics would have left: their sum is 0 now
        metric.real_features_num_samples += 2
        metric.real_features_cov_sum += reference[1].to(device, torch.float64)
    return metric.compute().item()


def inception_score(probabilities: Tensor, splits=10) -> float:
    """exp E KL(p(y|x) || p(y)), averaged over random parts, from probabilities (N, K).

    Parts: `splits`, or as many as leave ten images to each, for it is at most the number of images in a part.
    """
    splits = max(1, min(splits, len(probabilities) // 10))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # it keeps everything in memory: we know
        torch.manual_seed(0)
        metric = InceptionScore(Given(probabilities.shape[1]), splits=splits, sync_on_compute=False)
        metric.update(probabilities.cpu().double().clamp_min(1e-300).log())
        return metric.compute()[0].item()


def distances(features: Tensor, others: Tensor, chunk=1000) -> Iterator[Tensor]:
    """Yield distances (chunk, M) of features (N, F) to others (M, F), in float64 about their centre: exact
    far from the origin too, and by products of matrices, ten times as fast as by differences."""
    centre = exact(others).mean(0)
    others = exact(others) - centre
    yield from (torch.cdist(exact(part) - centre, others) for part in features.split(chunk))


def neighbour_radii(features: Tensor, k=3, chunk=1000) -> Tensor:
    """(N, F) -> (N,): the distance of each to its k-th nearest neighbour.  UserError for N <= k."""
    if len(features) <= k:
        raise UserError(f"precision and recall need at least {k + 1} images, got {len(features)}")
    near = [some.topk(k + 1, largest=False).values for some in distances(features, features, chunk)]
    return torch.cat(near)[:, k]  # the nearest of all, distance 0, is itself


def share_inside(features: Tensor, centres: Tensor, radii: Tensor, chunk=1000) -> float:
    """Share of features (N, F) that lie in any of the balls about centres (M, F) with radii (M,)."""
    inside = [(some <= exact(radii)).any(1).sum() for some in distances(features, centres, chunk)]
    return sum(inside).item() / len(features)


# ----------------------------------------------------------------------------------------------
# Images in, numbers out.


def gather(parts: list[Tensor], device: str | torch.device) -> Tensor | None:
    """What the processes have, each a list of rows to be joined -> all rows, in the order from which each
    took its [rank::world]: the first has most, and others may have none."""
    rows = torch.cat(parts) if parts else None
    if not dist.is_initialized():
        return rows
    shapes = [None] * dist.get_world_size()
    dist.all_gather_object(shapes, None if rows is None else rows.shape)
    rows = torch.empty(0, *shapes[0][1:], device=device, dtype=torch.float32) if rows is None else rows
    padded = torch.cat([rows, rows.new_zeros(shapes[0][0] - len(rows), *rows.shape[1:])])
    gathered = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(gathered, padded)
    return torch.stack(gathered, 1).flatten(0, 1)[: sum(shape[0] for shape in shapes if shape)]


@torch.no_grad()
def features_of(net: nn.Module, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Batches of uint8 images -> features (N, F) and class probabilities (N, K), of all processes.

    Under torch.distributed every process calls this with its share, the images [rank::world].
    """
    device = next(itertools.chain(net.parameters(), net.buffers()), torch.empty(0)).device
    features, probabilities = [], []
    for images in batches:
        images = images.to(device)
        features.append(net(images))
        probabilities.append(net.probabilities(images))
    return gather(features, device), gather(probabilities, device)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: features (N, F) of the data, and for the Fréchet distance
    published statistics (mean (F,), covariance (F, F)) in their place, if there are any."""

    features: torch.Tensor
    statistics: tuple | None = None

    @cached_property
    def radii(self) -> Tensor:
        return neighbour_radii(self.features)


def load_statistics(path: str | Path, num_features: int) -> tuple[Tensor, Tensor]:
    """EDM's reference file, an .npz with mu (F,) and sigma (F, F) -> (mean, covariance), float64."""
    with naming(path), zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as file:
        members = archive.getinfo("mu.npy"), archive.getinfo("sigma.npy")
        if max(member.file_size for member in members) > 2**20 + 16 * num_features**2:
            raise UserError(f"larger than mu and sigma of {num_features} features")
        mean, covariance = (torch.tensor(file[key], dtype=torch.float64) for key in ("mu", "sigma"))
        if mean.shape != (num_features,) or covariance.shape != (num_features, num_features):
            shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise UserError(f"mu and sigma are {shapes}, but the network has {num_features} features")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise UserError("mu or sigma is not finite")
    return mean, covariance


def evaluate_samples(net: nn.Module, reference: Reference, batches: Iterable) -> dict[str, float | list[int]]:
    """Images (batches of uint8 (B, C, H, W)) against a Reference.  As `features_of`, distributed.

    fd                Fréchet distance to the data: 0 best (the FID, if net is Inception)
    inception_score   1 to K; it does not look at the data
    precision         share of images among the data, recall: share of the data among the images;
                      "among": within the distance of a member to its third nearest neighbour
                      (Kynkäänniemi et al. 2019, arXiv:1904.06991)
    class_histogram   how many images the network takes for each class
    brightness        mean grey level, from 0, black, to 1
    images            how many there were
    """
    greys = []

    def seen():
        for images in batches:
            greys.append(images.float().flatten(1).mean(1) / 255)
            yield images

    features, probabilities = features_of(net, seen())
    greys = [grey.to(features.device) for grey in greys]
    if (fewest := min(len(features), len(reference.features))) < LEAST_IMAGES:
        raise UserError(f"{fewest} images are too few: an evaluation needs {LEAST_IMAGES}, samples and data")
    data = reference.features
    return {
        "fd": frechet_distance(features, reference.statistics or data),
        "inception_score": inception_score(probabilities),
        "precision": share_inside(features, data, reference.radii),
        "recall": share_inside(data, features, neighbour_radii(features)),
        "class_histogram": probabilities.argmax(1).bincount(minlength=probabilities.shape[1]).tolist(),
        "brightness": gather(greys, features.device).mean().item(),
        "images": len(features),
    }


def data_floor(features: Tensor, seed=0) -> dict[str, float | list[int]]:
    """The Fréchet distance between two random halves of the data: no sampler does better by merit.

    Raises UserError for less than four images, two in a half.
    """
    if len(features) < 4:
        raise UserError(f"halves of the data need at least 4 images to compare, got {len(features)}")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    one, other = features[order.to(features.device)].tensor_split(2)
    return {"fd": frechet_distance(one, other), "sizes": [len(one), len(other)]}
