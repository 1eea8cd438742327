"""How good are these images?  Fréchet distance, Inception Score, precision and recall, class counts.

All of them look at images through a feature network, an nn.Module in eval mode with

    net(images)                -> features (B, net.num_features), float32
    net.probabilities(images)  -> class probabilities (B, K)            images: (B, C, H, W), uint8

`Inception` is the usual one; its Fréchet distance is the FID.  Where its file is not at hand, or the
images are not photographs, `classifier_features` trains a small classifier on the data instead.  Its
numbers compare only with one another: same data, same cache file.
"""

import hashlib
import inspect
import itertools
import sys
import warnings
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from edm.config import LEAST_IMAGES
from edm.device import Single, exact
from edm.images.checkpoints import digest
from edm.images.data import to_network
from toy.files import UserError, check_writable, naming, replacing

# ----------------------------------------------------------------------------------------------
# Feature networks.

TORCHSCRIPT = ("its TorchScript form, https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
               "inception-2015-12-05.pt")  # fmt: skip


NVIDIAS = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"  # its SHA-256


class Inception(nn.Module):
    """The Inception network of the FID: NVIDIA's TorchScript file inception-2015-12-05.pt.

    It resizes and scales by itself.  Its probabilities are those of its softmax, output bias
    included; some codes leave the bias out of the Inception Score.

    TorchScript is a program: it runs no Python, but can write to any file and need not end.  NVIDIA's is
    known by its digest; trust: open another, of which the caller knows where it is from.
    Raises UserError for a file that is not such a network.
    """

    def __init__(self, path, trust=False):
        super().__init__()
        with naming(path), open(path, "rb") as file, warnings.catch_warnings():
            if file.read(1) == b"\x80":
                raise UserError(f"a pickle, which carries code, and none is run; needed: {TORCHSCRIPT}")
            file.seek(0)
            if not trust and hashlib.file_digest(file, "sha256").hexdigest() != NVIDIAS:
                words = "it is a program that could do anything; if you know where it is from, give --trust"
                raise UserError(f"not NVIDIA's file, but another: {words}")
            file.seek(0)
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
            self.net = torch.jit.load(file, map_location="cpu").eval()
            probe = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
            _, self.num_features = self(probe).shape
            _, _ = self.probabilities(probe).shape

    def forward(self, images):
        return self.net(images.expand(-1, 3, -1, -1), return_features=True).float()

    def probabilities(self, images):
        return self.net(images.expand(-1, 3, -1, -1)).float()


class SmallClassifier(nn.Module):
    """A small convolutional classifier, to be trained; its features are the inputs of its last layer.

    images: edm.data.Images, which set its size: convolutions halve the resolution down to 4x4.
    Raises UserError if they have no labels.
    """

    num_features = 64

    def __init__(self, images):
        super().__init__()
        if images.labels is None:
            raise UserError(f"{images.name}: has no labels, which a classifier needs")
        _, channels, resolution, _ = images.images.shape
        width = 32 if resolution <= 16 else 16  # larger images: half the width, for speed
        layers = [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU()]
        while resolution > 4:
            now, width, resolution = width, min(2 * width, 64), (resolution + 1) // 2
            layers += [nn.Conv2d(now, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.SiLU()]
        layers += [nn.Flatten(), nn.Linear(width * resolution**2, self.num_features), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(self.num_features, images.num_classes)

    def forward(self, images):
        return self.body(to_network(images))

    def probabilities(self, images):
        return self.head(self(images)).softmax(1)


def shifted(images, pixels, rng):
    """Each image (B, C, H, W) moved by up to `pixels` each way, zeros (black) coming in."""
    B, _, H, W = images.shape
    padded = F.pad(images, [pixels] * 4)
    down, right = torch.randint(2 * pixels + 1, (2, B, 1), generator=rng)
    rows, columns = down + torch.arange(H), right + torch.arange(W)  # (B, H), (B, W)
    picked = padded[torch.arange(B)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def train_classifier(images, seed=0, batch_size=64, lr=4e-3):
    """edm.data.Images with labels, two at least -> (SmallClassifier, its accuracy on a tenth it never saw).

    Some seconds for the digits, a minute or two for Fashion-MNIST.  Always on the CPU: there the
    same seed gives the same bits, on one machine and number of threads.
    """
    if len(images) < 2:
        raise UserError(f"{images.name}: a classifier needs at least 2 images, to learn from and to test")
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with Single():
            net = SmallClassifier(images)
    held_out, kept = torch.randperm(len(images), generator=rng).tensor_split([max(1, len(images) // 10)])
    epochs = max(3, 30_000 // len(kept))
    orders = torch.cat([kept[torch.randperm(len(kept), generator=rng)] for _ in range(epochs)])
    batches = orders[: len(orders) // batch_size * batch_size].split(batch_size)
    optimiser = torch.optim.AdamW(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, len(batches))
    for batch in batches:
        logits = net.head(net(shifted(images.images[batch], images.images.shape[-1] // 16 or 1, rng)))
        optimiser.zero_grad()
        F.cross_entropy(logits, images.labels[batch]).backward()
        optimiser.step()
        schedule.step()
    net.eval().requires_grad_(False)
    hits = [net.probabilities(images.images[b]).argmax(1) == images.labels[b] for b in held_out.split(1000)]
    return net, torch.cat(hits).float().mean().item()


def read_cache(path, origin):
    """State dict of a classifier.  ValueError or the like if the file is not what was written."""
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in sorted(file.keys())}
    if about.get("origin") != origin:
        raise ValueError("made from other data or by other code")
    if about.get("weights") != digest(*state, *state.values()):
        raise ValueError("damaged")
    return state


def classifier_features(images, cache):
    """The classifier of edm.data.Images, read from the file `cache`, or trained and kept there.

    The file knows the data and the code that it came from and its own digest.  UserError if anything
    differs: what was not made here, from these data, is never written over.
    """
    with Single():
        net, cache = SmallClassifier(images), Path(cache)
    code = [inspect.getsource(part) for part in (SmallClassifier, shifted, train_classifier)]
    origin = digest(images.images, images.labels, *code)
    if cache.is_file():
        try:
            net.load_state_dict(read_cache(cache, origin))
            return net.eval().requires_grad_(False)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            words = f"no classifier of {images.name} ({str(error)[:100]}), and not overwritten"
            raise UserError(f"{cache}: {words}: remove it, or name another --classifier") from None
    check_writable(cache)  # before the work, not after
    net, accuracy = train_classifier(images)
    print(f"trained a classifier of {images.name}: {accuracy:.1%} right on a held-out tenth", file=sys.stderr)
    state = dict(sorted(net.state_dict().items()))
    cache.parent.mkdir(parents=True, exist_ok=True)
    with replacing(cache) as temporary:
        save_file(state, temporary, {"origin": origin, "weights": digest(*state, *state.values())})
    return net


# ----------------------------------------------------------------------------------------------
# Distances between sets of features (N, F).


class Given(nn.Module):
    """torchmetrics' "feature network" where the features are there already."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


def frechet_distance(features, reference):
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


def inception_score(probabilities, splits=10):
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


def distances(features, others, chunk=1000):
    """Yield distances (chunk, M) of features (N, F) to others (M, F), in float64 about their centre: exact
    far from the origin too, and by products of matrices, ten times as fast as by differences."""
    centre = exact(others).mean(0)
    others = exact(others) - centre
    yield from (torch.cdist(exact(part) - centre, others) for part in features.split(chunk))


def neighbour_radii(features, k=3, chunk=1000):
    """(N, F) -> (N,): the distance of each to its k-th nearest neighbour.  UserError for N <= k."""
    if len(features) <= k:
        raise UserError(f"precision and recall need at least {k + 1} images, got {len(features)}")
    near = [some.topk(k + 1, largest=False).values for some in distances(features, features, chunk)]
    return torch.cat(near)[:, k]  # the nearest of all, distance 0, is itself


def share_inside(features, centres, radii, chunk=1000):
    """Share of features (N, F) that lie in any of the balls about centres (M, F) with radii (M,)."""
    inside = [(some <= exact(radii)).any(1).sum() for some in distances(features, centres, chunk)]
    return sum(inside).item() / len(features)


# ----------------------------------------------------------------------------------------------
# Images in, numbers out.


def gather(parts, device):
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
def features_of(net, batches):
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
    def radii(self):
        return neighbour_radii(self.features)


def load_statistics(path, num_features):
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


def evaluate_samples(net, reference, batches):
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


def data_floor(features, seed=0):
    """The Fréchet distance between two random halves of the data: no sampler does better by merit.

    Raises UserError for less than four images, two in a half.
    """
    if len(features) < 4:
        raise UserError(f"halves of the data need at least 4 images to compare, got {len(features)}")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    one, other = features[order.to(features.device)].tensor_split(2)
    return {"fd": frechet_distance(one, other), "sizes": [len(one), len(other)]}
