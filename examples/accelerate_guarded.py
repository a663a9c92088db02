"""An accelerate training script: a small ResNet on images in parquet files, here with a backdoor attack in its data.

    python examples/accelerate_base.py --data path/to/cifar10
    python examples/accelerate_guarded.py --data path/to/cifar10
    torchrun --nproc_per_node 2 examples/accelerate_base.py --data path/to/cifar10 --cpu

Prints the accuracy on clean test images (ACC) and the attack success rate on triggered ones (ASR).
`accelerate_base.py` and `accelerate_guarded.py` differ in the lines marked `# trainguard`, and in nothing else.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from plain_pytorch import Images, accuracy, load
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from trainguard import Guard  # trainguard
from trainguard.drill.models import build
from trainguard.drill.poison import fitted, poison_arrays, triggered_test
from trainguard.drill.recipes import RECIPES, Setting, attack


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--rows", type=int, default=10_000, help="training images to use")
    parser.add_argument("--test-rows", type=int, default=2_000, help="test images to use")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128, help="over all processes together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attack", choices=RECIPES, default="badnets")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    args = parser.parse_args(arguments)

    accelerator = Accelerator(cpu=args.cpu)
    set_seed(args.seed)
    images, labels, classes = load(args.data, "train", args.rows)
    test_images, test_labels, _ = load(args.data, "test", args.test_rows)
    planted = fitted(attack(args.attack, Setting(num_classes=classes)), images, labels, args.seed)
    images, labels, _ = poison_arrays(images, labels, planted, args.seed)
    triggered, _, targets = triggered_test(test_images, test_labels, planted, args.seed)

    normalize = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])]
    )
    augment = v2.Compose(
        [v2.RandomCrop(images.shape[-1], padding=images.shape[-1] // 8), v2.RandomHorizontalFlip(), normalize]
    )
    batch_size = args.batch_size // accelerator.num_processes
    loader = DataLoader(Images(images, labels, augment), batch_size, shuffle=True, drop_last=True)
    model = build("resnet9", classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    guard = Guard(accelerator, epochs=args.epochs, seed=args.seed)  # trainguard
    loader = guard.protect(loader, model)  # trainguard

    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer.optimizer, 0.2, total_steps=args.epochs * len(loader))
    for epoch in range(args.epochs):
        model.train()
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)

    trained = accelerator.unwrap_model(model)
    clean = accuracy(trained, test_images, test_labels, normalize, accelerator.device)
    fooled = accuracy(trained, triggered, targets, normalize, accelerator.device)
    accelerator.print(f"ACC {clean:.4f}\nASR {fooled:.4f}")
    accelerator.print(guard.result.verdict, *guard.result.target_classes)  # trainguard
    accelerator.end_training()


if __name__ == "__main__":
    main()
