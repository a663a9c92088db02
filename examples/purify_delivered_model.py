"""Somebody delivers a model: is it backdoored, and if so, can the backdoor be erased?

Needs the checkpoint, the name of its architecture, and labelled images of the kind it was trained on, one folder per
class. The images need not be clean; with `--clean`, when you know that they are, a few hundred will do.

    python examples/purify_delivered_model.py model.pt images/ --arch resnet18 --out purified

A checkpoint that would run code when it is unpickled is refused, and says so before anything of it has run.
"""

import argparse

from trainguard.purification import audit, audit_checkpoint, purify_checkpoint
from trainguard.sources import open_data

parser = argparse.ArgumentParser(description="Audit a delivered model, purify it, and audit what comes out.")
parser.add_argument("checkpoint", help="safetensors, or a state dict without code")
parser.add_argument("images", help="folder with one folder of images per class")
parser.add_argument("--arch", required=True, help="a timm or torchvision name")
parser.add_argument("--out", default="purified", help="where the purified weights go, as .safetensors with a .json")
parser.add_argument("--clean", action="store_true", help="the images are known to be clean")
parser.add_argument("--mean", type=float, nargs="+", help="of the model's normalisation, in [0, 1] pixels")
parser.add_argument("--std", type=float, nargs="+", help="likewise; without both, it is given pixels from 0 to 1")
parser.add_argument("--batches", type=int, nargs=2, help="of steps 1 and 2, in place of what purify chooses")
arguments = parser.parse_args()

images = open_data(arguments.images)
normalised = {"mean": arguments.mean, "std": arguments.std}

# Before: where do the model's adversarial examples fall?
print(audit_checkpoint(arguments.checkpoint, arch=arguments.arch, data=images, **normalised))

# The model in the file is not changed; the purified one is written beside it, with a record of how it was made.
outcome = purify_checkpoint(
    arguments.checkpoint,
    arch=arguments.arch,
    data=images,
    out=arguments.out,
    clean=arguments.clean,
    **normalised,
    adversarial_batches=arguments.batches and arguments.batches[:1],
    plain_batches=arguments.batches and arguments.batches[1:],
)
print(outcome)

# After: the pull towards one class should be gone.
print(audit(outcome.model, images, **normalised))
