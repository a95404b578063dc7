"""Run by test_train.py, alone and under torchrun: writes the gradient of a distilled step, and the losses that it saw.

    gradient_of_one_step.py OUTPUT DATA ACCUM_STEPS

One step of 384 views, mixed and erased: a half, a third and a quarter of them are multiples of 32, so that they find
the same partners however they are divided. No path is dropped, which would differ from rank to rank.
"""
import sys
from pathlib import Path

import torch
from torch import nn

import evaluate
import teacher
import train

BATCH = 384


class PixelTeacher(nn.Module):
    """A teacher of three classes that tells them by the middle pixel's colour: a rule that depends on nothing else."""

    def forward(self, images):
        return images[:, :, 16, 16]


class Recorder:
    """In the optimiser's place: keeps the gradient and leaves the weights alone."""
    param_groups = [{}]

    def __init__(self, model):
        self.model, self.gradients = model, []

    def step(self):
        self.gradients.append({name: parameter.grad.clone() for name, parameter in self.model.named_parameters()})

    def zero_grad(self):
        self.model.zero_grad()


def main():
    output, folder, accum_steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    teacher.load_teacher = lambda *_: PixelTeacher()
    world = evaluate.init_processes()
    recipe = train.make_recipe({"data": folder, "image_size": 32, "batch_size": BATCH, "accum_steps": accum_steps,
                                "workers": 0, "distill": "hard", "any_teacher": True, "drop_path": 0.0, "erasing": 0.5,
                                "mix_group": 64})
    run = train.build(recipe, world, output.parent)
    recorder, meter = Recorder(run.model), train.Meter(run)
    train.train_epoch(run._replace(optimizer=recorder), 0, iter(run.loader), meter)
    meter.close()
    if world.rank == 0:
        losses = torch.tensor(run.state["epoch_sums"]).mean(dim=0)           # a row per process
        torch.save({"gradient": recorder.gradients[0], "losses": losses}, output)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
