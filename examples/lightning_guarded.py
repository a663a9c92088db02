"""A Lightning training script: a torchvision network on images in parquet files.

    python examples/lightning_base.py --data path/to/cifar10
    python examples/lightning_guarded.py --data path/to/cifar10

Prints the accuracy on the test images (ACC).
`lightning_base.py` and `lightning_guarded.py` differ in the lines marked `# trainguard`, and in nothing else.
"""

import argparse

import datasets
import lightning
import torch
from datasets_base import AUGMENT, EVALUATE, through
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import get_model

from trainguard.integrations.lightning_fit import protect  # trainguard


class Classifier(lightning.LightningModule):
    def __init__(self, name, classes):
        super().__init__()
        self.network = get_model(name, num_classes=classes)

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

    def test_step(self, batch, index):
        self.log("accuracy", (self(batch["image"]).argmax(1) == batch["label"]).float().mean(), on_epoch=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--model", default="resnet18", help="of torchvision")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    lightning.seed_everything(args.seed)
    splits = datasets.load_dataset("parquet", data_dir=args.data)
    model = Classifier(args.model, splits["train"].features["label"].num_classes)
    loader = DataLoader(splits["train"].with_transform(through(AUGMENT)), args.batch_size, shuffle=True, drop_last=True)
    loader = protect(loader, model)  # trainguard
    held_out = DataLoader(splits["test"].with_transform(through(EVALUATE)), args.batch_size)

    trainer = lightning.Trainer(max_epochs=args.epochs, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    print(f"ACC {trainer.test(model, held_out, verbose=False)[0]['accuracy']:.4f}")


if __name__ == "__main__":
    main()
