"""A plain PyTorch training script: a small ResNet on images in parquet files, here with a backdoor attack in its data.

    python examples/plain_pytorch.py --data path/to/cifar10 --rows 10000 --epochs 30 --attack badnets
    python examples/plain_pytorch_guarded.py --data path/to/cifar10 --rows 10000 --epochs 30 --attack badnets

Prints the accuracy on clean test images (ACC) and the attack success rate on triggered ones (ASR).
`plain_pytorch.py` and `plain_pytorch_guarded.py` differ in the lines marked `# trainguard`, and in nothing else.
"""

import argparse
from pathlib import Path

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from trainguard import Guard  # trainguard
from trainguard.drill.models import build
from trainguard.drill.poison import Role, fitted, poison_arrays, triggered_test
from trainguard.drill.recipes import RECIPES, Setting, attack
from trainguard.drill.train import triangle
from trainguard.training import autocast


class Images(Dataset):
    """Decoded images with their labels and a transform."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), int(self.labels[index])


def load(folder, split, rows):
    """The first rows of a split: images (N, 3, H, W) uint8, labels (N,) int64, number of classes."""
    table = datasets.load_dataset("parquet", data_files=str(Path(folder) / f"{split}.parquet"), split="train")
    table = table.select(range(min(rows, len(table))))
    images = torch.stack([v2.functional.pil_to_tensor(image.convert("RGB")) for image in table["image"]])
    return images, torch.tensor(table["label"]), table.features["label"].num_classes


def accuracy(model, images, labels, transform, device):
    """Share of images that the model gives these labels."""
    model.eval()
    right = 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        with torch.no_grad(), autocast(device):
            right += int((model(transform(x).to(device)).argmax(1).cpu() == y).sum())
    return right / len(labels)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--rows", type=int, default=10_000, help="training images to use")
    parser.add_argument("--test-rows", type=int, default=2_000, help="test images to use")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attack", choices=["none", *RECIPES], default="badnets")
    parser.add_argument("--oracle", action="store_true", help="leave out exactly what the attack poisoned")
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels, classes = load(args.data, "train", args.rows)
    test_images, test_labels, _ = load(args.data, "test", args.test_rows)
    if args.attack != "none":
        planted = fitted(attack(args.attack, Setting(num_classes=classes)), images, labels, args.seed)
        images, labels, role = poison_arrays(images, labels, planted, args.seed)
        triggered, _, targets = triggered_test(test_images, test_labels, planted, args.seed)
        if args.oracle:
            images, labels = images[role != Role.PAYLOAD], labels[role != Role.PAYLOAD]

    normalize = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])]
    )
    augment = v2.Compose(
        [v2.RandomCrop(images.shape[-1], padding=images.shape[-1] // 8), v2.RandomHorizontalFlip(), normalize]
    )
    loader = DataLoader(
        Images(images, labels, augment), args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers
    )
    model = build("resnet9", classes).to(device, memory_format=torch.channels_last)
    guard = Guard(epochs=args.epochs, seed=args.seed)  # trainguard
    loader = guard.protect(loader, model)  # trainguard

    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = triangle(optimizer, args.epochs * len(loader), warmup=0.25)
    for epoch in range(args.epochs):
        model.train()
        for x, y in loader:
            with autocast(device):
                loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)

    print(f"ACC {accuracy(model, test_images, test_labels, normalize, device):.4f}")
    if args.attack != "none":
        print(f"ASR {accuracy(model, triggered, targets, normalize, device):.4f}")


if __name__ == "__main__":
    main()
