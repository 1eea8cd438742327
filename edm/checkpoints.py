"""Weights on disk: our own files, and the released .pkl files of EDM, read without executing them.

    python edm/checkpoints.py convert edm-cifar10-32x32-cond-vp.pkl teacher.safetensors
    python edm/checkpoints.py convert sid-cifar10-cond.pkl generator.safetensors --sigma-init 2.5
    python edm/checkpoints.py show teacher.safetensors

A note sigma_init makes a denoiser a one-step generator, g(z) = D(sigma_init z; sigma_init).  No .pkl names
one, neither teachers nor the one-step generators that others released in EDM's format: --sigma-init does.

A .pkl is a program that builds Python objects, and those of EDM carry source code besides.  Nothing in the
file runs, and its source code is never looked at.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder


from edm.config import SIGMA_INIT
from edm.images.checkpoints import load, save
from toy import command
from toy.files import check_new


def describe(network):
    entries = network.state_dict()
    parameters = sum(p.numel() for p in network.parameters())
    return (
        f"{parameters:,} parameters, {len(entries)} entries, "
        f"resolution {network.img_resolution}, label_dim {network.label_dim}"
    )


def convert(args):
    check_new(args.output)
    network, about = load(args.file, args.sigma_init)
    save(args.output, network, **about | {"converted_from": args.file.name})
    print(f"wrote {args.output}: {describe(network)}")


def show(args):
    network, about = load(args.file)
    print(f"config  {json.dumps(network.config)}\nabout   {json.dumps(about)}\n{describe(network)}")


def main(argv=None):
    parser = command.Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="{convert,show}")
    for function, help in (
        (convert, "write a file's network as .safetensors"),
        (show, "print what is in a file: config, notes, number of parameters"),
    ):
        added = commands.add_parser(function.__name__, help=help, description=help)
        added.set_defaults(run=function)
        added.add_argument("file", type=Path, help="a .pkl of EDM, or a .safetensors of ours")
    added = commands.choices["convert"]
    added.add_argument("output", type=Path, help="file to write; must not exist yet")
    added.add_argument("--sigma-init", type=float, within="positive", metavar="SIGMA",
                       help=f"to be noted: {SIGMA_INIT}")  # fmt: skip

    def work():
        args = parser.parse_args(argv)
        args.run(args)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
