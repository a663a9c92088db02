"""A timm training script in small: `create_loader` with mixup and random erasing, a model, a scheduler by updates.

    python examples/timm_base.py --data path/to/images --model resnet18
    python examples/timm_guarded.py --data path/to/images --model resnet18

DATA is an image folder with `train` and `validation` in it. Prints the accuracy on the validation images (ACC).
`timm_base.py` and `timm_guarded.py` differ in the lines marked `# trainguard`, and in nothing else.
"""

import argparse

import timm
import torch
from timm.data import FastCollateMixup, create_dataset, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from trainguard import Guard  # trainguard


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train and validation")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--mixup", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_set = create_dataset("", args.data, split="train")
    classes = len(train_set.reader.class_to_idx)
    model = timm.create_model(args.model, num_classes=classes).to(device)
    common = {"input_size": (3, args.size, args.size), "num_workers": args.workers, "device": device}
    loader = create_loader(
        train_set,
        batch_size=args.batch_size,
        is_training=True,
        re_prob=0.1,
        scale=(0.7, 1.0),
        collate_fn=FastCollateMixup(mixup_alpha=args.mixup, num_classes=classes),
        **common,
    )
    guard = Guard(epochs=args.epochs, seed=args.seed)  # trainguard
    loader = guard.protect(loader, model)  # trainguard
    held_out = create_loader(create_dataset("", args.data, split="validation"), batch_size=args.batch_size, **common)

    optimizer = create_optimizer_v2(model, opt="sgd", lr=args.lr, weight_decay=5e-4)
    scheduler, epochs = create_scheduler_v2(
        optimizer, "cosine", num_epochs=args.epochs, updates_per_epoch=len(loader), step_on_epochs=False
    )
    criterion = SoftTargetCrossEntropy()
    updates = 0
    for epoch in range(epochs):
        model.train()
        if epoch == epochs - 1:
            loader.mixup_enabled = False
        for x, y in loader:
            targets = y if y.ndim == 2 else torch.nn.functional.one_hot(y, classes).float()
            loss = criterion(model(x), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            scheduler.step_update(updates)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)

    model.eval()
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).float() for x, y in held_out]
    print(f"ACC {torch.cat(right).mean().item():.4f}")


if __name__ == "__main__":
    main()
