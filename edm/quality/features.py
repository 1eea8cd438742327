"""Feature networks, through which samples are judged: Inception, or a small classifier of the data.

Each is an nn.Module in eval mode with

    net(images)                -> features (B, net.num_features), float32
    net.probabilities(images)  -> class probabilities (B, K)            images: (B, C, H, W), uint8

`Inception` is the usual one; its Fréchet distance is the FID.  Where its file is not at hand, or the
images are not photographs, `classifier_features` trains a small classifier on the data instead.  Its
numbers compare only with one another: same data, same cache file.
"""

import hashlib
import inspect
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edm.device import Single
from edm.images.checkpoints import digest
from edm.images.data import Images, to_network
from toy.files import UserError, check_writable, naming, replacing

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

    def __init__(self, path: str | Path, trust=False):
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

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.expand(-1, 3, -1, -1), return_features=True).float()

    def probabilities(self, images: Tensor) -> Tensor:
        return self.net(images.expand(-1, 3, -1, -1)).float()


class SmallClassifier(nn.Module):
    """A small convolutional classifier, to be trained; its features are the inputs of its last layer.

    images: edm.images.data.Images, which set its size: convolutions halve the resolution down to 4x4.
    Raises UserError if they have no labels.
    """

    num_features = 64

    def __init__(self, images: Images):
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

    def forward(self, images: Tensor) -> Tensor:
        return self.body(to_network(images))

    def probabilities(self, images: Tensor) -> Tensor:
        return self.head(self(images)).softmax(1)


def shifted(images: Tensor, pixels: int, rng: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) moved by up to `pixels` each way, zeros (black) coming in."""
    B, _, H, W = images.shape
    padded = F.pad(images, [pixels] * 4)
    down, right = torch.randint(2 * pixels + 1, (2, B, 1), generator=rng)
    rows, columns = down + torch.arange(H), right + torch.arange(W)  # (B, H), (B, W)
    picked = padded[torch.arange(B)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def train_classifier(images: Images, seed=0, batch_size=64, lr=4e-3) -> tuple[SmallClassifier, float]:
    """edm.images.data.Images with labels, 2 at least -> (SmallClassifier, accuracy on a tenth it never saw).

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


def read_cache(path: str | Path, origin: str) -> dict[str, Tensor]:
    """State dict of a classifier.  ValueError or the like if the file is not what was written."""
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in sorted(file.keys())}
    if about.get("origin") != origin:
        raise ValueError("made from other data or by other code")
    if about.get("weights") != digest(*state, *state.values()):
        raise ValueError("damaged")
    return state


def classifier_features(images: Images, cache: str | Path) -> SmallClassifier:
    """The classifier of edm.images.data.Images, read from the file `cache`, or trained and kept there.

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
