"""A Hugging Face Trainer script: a small ResNet on images in parquet files.

    python examples/hf_trainer_base.py --data path/to/cifar10 --out checkpoints
    python examples/hf_trainer_guarded.py --data path/to/cifar10 --out checkpoints

Prints the accuracy on the test images (ACC).
`hf_trainer_base.py` and `hf_trainer_guarded.py` differ in the lines marked `# trainguard`, and in nothing else.
"""

import argparse

import datasets
import torch
from torchvision.transforms import v2
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
EVALUATE = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
AUGMENT = v2.Compose([v2.RandomHorizontalFlip(), EVALUATE])


def through(transform):
    """For `with_transform`: a batch of columns as the model wants it."""

    def run(batch):
        pixels = [transform(image.convert("RGB")) for image in batch["image"]]
        return {"pixel_values": pixels, "labels": batch["label"]}

    return run


def share_right(predicted):
    return {"accuracy": float((predicted.predictions.argmax(1) == predicted.label_ids).mean())}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--out", default="checkpoints")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    splits = datasets.load_dataset("parquet", data_dir=args.data)
    classes = splits["train"].features["label"].num_classes
    settings = TrainingArguments(
        args.out,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=1e-3,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        seed=args.seed,
    )
    torch.manual_seed(args.seed)
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")
    config.num_labels = classes
    trainer = Trainer(
        ResNetForImageClassification(config),
        settings,
        train_dataset=splits["train"].with_transform(through(AUGMENT)),
        eval_dataset=splits["test"].with_transform(through(EVALUATE)),
        compute_metrics=share_right,
    )
    trainer.train()
    print(f"ACC {trainer.evaluate()['eval_accuracy']:.4f}")


if __name__ == "__main__":
    main()
