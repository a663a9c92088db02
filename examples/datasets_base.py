"""A training script on a Hugging Face data set: parquet files, a transform on the fly, a torch loader.

    python examples/datasets_base.py --data path/to/cifar10
    python examples/datasets_guarded.py --data path/to/cifar10

Prints the accuracy on the test images (ACC).
`datasets_base.py` and `datasets_guarded.py` differ in the lines marked `# trainguard`, and in nothing else.
"""

import argparse

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import get_model
from torchvision.transforms import v2

MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
EVALUATE = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
AUGMENT = v2.Compose([v2.RandomHorizontalFlip(), EVALUATE])


def through(transform):
    """For `with_transform`: a batch of columns as tensors."""

    def run(batch):
        return {"image": [transform(image.convert("RGB")) for image in batch["image"]], "label": batch["label"]}

    return run


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--model", default="resnet18", help="of torchvision")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = datasets.load_dataset("parquet", data_dir=args.data)
    train_set, test_set = splits["train"], splits["test"]
    model = get_model(args.model, num_classes=train_set.features["label"].num_classes).to(device)

    loader = DataLoader(train_set.with_transform(through(AUGMENT)), args.batch_size, shuffle=True, drop_last=True)
    held_out = DataLoader(test_set.with_transform(through(EVALUATE)), args.batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=args.epochs * len(loader))
    for epoch in range(args.epochs):
        model.train()
        for batch in loader:
            loss = nn.functional.cross_entropy(model(batch["image"].to(device)), batch["label"].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)

    model.eval()
    with torch.no_grad():
        right = [(model(batch["image"].to(device)).argmax(1).cpu() == batch["label"]).float() for batch in held_out]
    print(f"ACC {torch.cat(right).mean().item():.4f}")


if __name__ == "__main__":
    main()
