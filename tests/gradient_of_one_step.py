"""Run by test_train.py, alone and under torchrun: writes the gradient of the first step, and the loss that it saw.

    gradient_of_one_step.py OUTPUT DATA ACCUM_STEPS
"""
import sys
from pathlib import Path

import torch

import evaluate
import train


class Recorder:
    """In the optimiser's place: keeps the gradient and leaves the weights alone."""
    param_groups = [{}]

    def __init__(self, model):
        self.model, self.gradients = model, []

    def step(self):
        self.gradients.append({name: parameter.grad.clone() for name, parameter in self.model.named_parameters()})

    def zero_grad(self):
        self.model.zero_grad()


output, folder, accum_steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
place = evaluate.join_processes()
recipe = train.make_recipe({"data": folder, "image_size": 32, "batch_size": 24, "accum_steps": accum_steps, "workers": 0,
                            "drop_path": 0.0, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0})
run = train.prepare(recipe, place, resuming=False)
recorder = Recorder(run.student.model)
run = run._replace(student=run.student._replace(optimizer=recorder))
progress = train.Progress(place, recipe, output.parent, run.sampler.steps, {"step": 0, "epoch_sums": None})
list(train.train_epoch(run, place, 0, progress))
if place.rank == 0:
    torch.save({"gradient": recorder.gradients[0], "losses": progress.epoch_sums}, output)
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
