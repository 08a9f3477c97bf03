"""The animation: two students learn from the same scenes, one of them from a teacher, too."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import attention_distill
import data
import finetune
import train
from common import launch, pictures
from study.figures import COLOURS
from teachers.bundled import BUNDLED
from teachers.find import find_teacher
from teachers.load import Model, open_model
from vit import ViT

CENTRE = 5  # the token of a scene's centre cell: the class token, then nine cells
LEARNING = {
    "attention distillation": (attention_distill,),
    "from scratch": (finetune, "--teacher", "none"),
}
FRAMES = {0, 10, 20, *range(30, 126, 6), 135, 150, 165, 180, 200, 225, 250, 275, 300}  # epochs
TITLE = "Learning to look where the teacher looks"
SUBTITLE = "The square in the middle points to a cell. Which digit is there?"
DETAILS = "pointer scenes, 100 labels, seed 0 · layer 0, from the centre"
MOST = 10  # times uniform attention: all of it
PER_SECOND, HELD = 5, 3  # frames; seconds of the last one


def load_images(name: str, count: int) -> Tensor:
    """The first test images of a data set."""
    dataset = data.load(finetune.parse(["--data", name]), train=False)
    return next(dataset.test.in_order(count))[0]


def open_bundled(name: str) -> Model:
    return open_model(BUNDLED / f"{name}.pt", launch.get_device("auto"))


def draw_pointer(path: Path, *changes: str) -> None:
    """`changes`: flags for both students."""
    images = load_images("scenes", 2)
    teacher = look_from_centre(open_bundled("scenes").net, images)
    moments = [learn(script, images, *argv, *changes) for script, *argv in LEARNING.values()]
    animate(images[:, 0].cpu(), teacher, zip(*moments, strict=True), path)


def learn(script, images: Tensor, *argv: str) -> Iterator[tuple[int, Tensor, float]]:
    """Trains as train.fit does. At each of FRAMES: epoch, looks at the images, test accuracy."""
    settings = script.parse(argv)
    dataset = data.load(settings)
    task = script.task(settings, dataset, find_teacher(settings, dataset))
    source, net = dataset.train, task.net
    steps, peak = settings.epochs * source.steps, settings.blr * source.batch / 256
    warmup = round(settings.warmup * steps)
    learner = train.Learner(task, settings)
    net.train()
    for epoch in range(settings.epochs + 1):
        if epoch in FRAMES:
            found = learner.evaluate(task, net, dataset.test)
            yield epoch, look_from_centre(net, images), train.compute_top1(*found)
        for batch, labels in source.epoch(epoch) if epoch < settings.epochs else ():
            rate = train.get_learning_rate(learner.done, steps, warmup, peak, settings.final_lr)
            learner.train_step(batch, labels, rate)


@torch.no_grad()
def look_from_centre(net: ViT, images: Tensor) -> Tensor:
    """Where the centre of scenes looks in layer 0, mean of the heads: (B, 3, 3), 1 is uniform."""
    was_training = net.training
    _, qk = next(net.eval().blockwise(images))
    net.train(was_training)
    p = pictures.mean_look(qk.map(), 1, query=CENTRE)
    return p.shape[1] * p[:, 1:].unflatten(1, (3, 3)).cpu()


def animate(pixels: Tensor, teacher: Tensor, moments, path: Path) -> None:
    """A frame for each of `moments`: what learn yields, of the two nets."""
    import matplotlib.pyplot as plt
    from matplotlib.animation import PillowWriter

    fig, so_far = plt.figure(figsize=(7.2, 7), facecolor="white"), []
    pixels = (7 * pixels).round() / 7  # few colours: a small file
    writer = PillowWriter(PER_SECOND)
    writer.setup(fig, path, dpi=100)
    for moment in moments:
        so_far.append((moment[0][0], *(top1 for _, _, top1 in moment)))
        draw_frame(fig, pixels, [teacher, *(looks for _, looks, _ in moment)], so_far)
        writer.grab_frame()
    for _ in range(HELD * PER_SECOND):
        writer.grab_frame()
    writer.finish()
    plt.close(fig)


def draw_frame(fig, pixels: Tensor, looks: list[Tensor], so_far: list[tuple]) -> None:
    """Scenes and maps above, accuracies up to an epoch below. `so_far`: epoch, two accuracies."""
    fig.clear()
    say, colours = partial(fig.text, va="center"), [COLOURS[name] for name in LEARNING]
    say(0.5, 0.965, TITLE, ha="center", fontsize=18)
    say(0.5, 0.915, SUBTITLE, ha="center", fontsize=12.5)
    names = "scene", "teacher", *LEARNING
    for column, (name, colour) in enumerate(zip(names, ["black"] * 2 + colours, strict=True)):
        name = name.replace(" ", "\n")
        say(0.129 + 0.2475 * column, 0.845, name, ha="center", color=colour, fontsize=14)
        for row, gray in enumerate(pixels):
            axis = fig.add_axes((0.012 + 0.2475 * column, 0.56 - 0.247 * row, 0.2335, 0.2402))
            axis.set(xticks=[], yticks=[])
            if column:
                light = (2 * looks[column - 1][row]).round() / 2
                drawn = pictures.draw_overlay(axis, gray, light, MOST)
            else:
                axis.imshow(gray, cmap="gray", vmin=0, vmax=1, extent=(0, 24, 24, 0))
                pictures.frame(axis, CENTRE - 1, 3, 24)
    scale = fig.add_axes((0.3, 0.288, 0.4, 0.011))
    fig.colorbar(drawn, cax=scale, orientation="horizontal", ticks=[0, 1, 5, MOST])
    say(0.285, 0.293, "attention (1: uniform)", ha="right", fontsize=10.5)
    axis = fig.add_axes((0.105, 0.125, 0.61, 0.105))
    epoch, *top1 = zip(*so_far, strict=True)
    for i, (values, colour) in enumerate(zip(top1, colours, strict=True)):
        axis.plot(epoch, values, color=colour, linewidth=2.5, marker="o", markevery=[-1])
        say(0.98, 0.24 - 0.08 * i, f"{values[-1]:.0f} %", ha="right", color=colour, fontsize=26)
    say(0.98, 0.082, f"epoch {epoch[-1]}", ha="right", fontsize=13)
    axis.set(xlim=(0, 1.02 * max(FRAMES)), ylim=(0, 104), yticks=[0, 50, 100])
    axis.set(xlabel="epoch", ylabel="test top-1, %")
    axis.tick_params(labelsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    say(0.5, 0.025, DETAILS, ha="center", fontsize=10.5, color="0.3")
