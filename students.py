"""Trains a student: its images, its teacher, its task, and the loop. All methods share it."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import data
import train
from recipes import Settings
from teachers.find import find_teacher


def main(task: Callable[..., train.Task], settings: Settings) -> dict:
    """The last row of the run's log. `task(settings, dataset, checkpoint)` is the method."""
    dataset = data.load(settings)
    pretrain = partial(import_module, "pretrain")  # makes a teacher, where there is none
    checkpoint = find_teacher(settings, dataset, pretrain)
    return train.fit(task(settings, dataset, checkpoint), settings)
