"""What each of two Lightning processes trains on: started by torchrun, checked by test_trainers.py."""

import sys
from pathlib import Path

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader
from two_processes import Numbered, flagging

import trainguard.screening.screen
from trainguard.integrations.lightning_fit import protect


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Linear(3 * 16 * 16, 3)
        self.rows = []

    def training_step(self, batch, index):
        pixels, labels, rows = batch
        self.rows += rows.tolist()
        return nn.functional.cross_entropy(self.network(pixels.flatten(1)), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Own(lightning.LightningDataModule):
    """Its loader is built in a hook, where Lightning writes down what it is built with."""

    def train_dataloader(self):
        return DataLoader(Numbered(), batch_size=8, shuffle=True)


def main(folder, form):
    torch.set_num_threads(1)
    trainguard.screening.screen.screen_images = flagging
    data = protect(Own() if form == "module" else Own().train_dataloader())
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, **quiet)
    model = Classifier()
    trainer.fit(model, data)
    seen = {"rows": model.rows, "keep": data.guard.result.keep.tolist()}
    torch.save(seen, Path(folder) / f"{trainer.global_rank}.pt")
    torch.distributed.destroy_process_group()  # else its threads may abort a process that ends


if __name__ == "__main__":
    main(*sys.argv[1:])
