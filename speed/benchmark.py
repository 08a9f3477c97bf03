"""How fast each method trains, and how much of the hardware it uses.

    python -m speed.benchmark --model large --batch 64
    python -m speed.benchmark --method distill --model large --batch 8,16,32
    python -m speed.benchmark --method finetune --data cifar10 --compile graphs

Variants take turns, a few steps each, in processes of their own:

    plain       the usual way, as in the published implementation: float32,
                eager, maps of teacher and student stored, the teacher run to
                its last block, the loss read at every step (speed/plain.py)
    plain-amp   the same under autocast to bfloat16, where the hardware has it
    ours        what the scripts run: their task and train.Learner

Of several batch sizes the best of each variant counts. images/s is the median
over steps after warm-up. A step includes the optimizer and, where the recipe
has one, the average of the weights. The share of the hardware is relative to its
own rate of multiplying matrices, measured in the same run. It counts the
operations that a method needs, whatever a variant does beyond
(measure.count_operations). --record writes speed/benchmark-DEVICE.json after
each batch size, so a run that is killed keeps what it has measured.
"""

import math
import multiprocessing
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial

import torch
import torchvision.transforms.v2  # noqa: F401  loaded before memory is first read
from torch import Tensor

import attention_copy
import attention_distill
import data
import finetune
import pretrain
import recipes
from common import launch
from common.launch import print0
from common.precision import choose_compilation, has_bf16
from common.settings import parse_settings, setting, to_argv
from datasets import sources
from speed import measure
from speed.plain import PlainLearner, make_plain_task
from study.jobs import leave_with_parent
from train import Learner

SCRIPTS = {
    "finetune": finetune,
    "copy": attention_copy,
    "distill": attention_distill,
    "pretrain": pretrain,
}


@dataclass(frozen=True)
class Settings(measure.Settings):
    data: str = setting("imagenet", "whose recipe, on made-up images", ("cifar10", "imagenet"))
    image_size: int = setting(0, "pixels per side (0: the data set's own)", high=4096)
    method: str = setting("all", "finetune, copy, distill, pretrain, several with commas, or all")
    model: str = setting("", "size of the ViT [the recipe's]", ("", *recipes.SIZES))
    batch: str = setting("64", "images at a time: of several (32,64,128) the best counts")
    steps: int = setting(20, "timed steps of each variant", low=1)
    amp: str = setting("auto", "mixed precision of ours", ("auto", "off", "bf16", "fp16"))
    compile: str = setting("auto", "torch.compile of ours", ("auto", "off", "on", "graphs"))


parse = partial(parse_settings, __doc__, Settings, {})
VARIANTS = ("plain", "plain-amp", "ours")
STEPS_PER_TURN = 4
IMAGES = 1_281_167  # in an epoch of ImageNet


def get_recipe(method: str, settings: Settings, batch: int):
    """The method's own recipe, at this model and size."""
    names = ("data", "device", "amp", "compile", "model", "image_size")
    asked = {name: value for name in names if (value := getattr(settings, name))}
    return SCRIPTS[method].parse(to_argv(asked | {"batch": batch, "micro_batch": batch}))


def build(method: str, variant: str, recipe) -> tuple[Learner, Tensor, Tensor]:
    """A learner of a random net, with images and labels (mixed as by MixUp) to learn from."""
    device, classes = launch.get_device(recipe.device), measure.count_classes(recipe)
    kind = recipes.DATA_SETS[recipe.data]
    size = recipe.image_size or kind.image_size
    images = torch.randn(recipe.batch, kind.channels, size, size, device=device)
    labels = torch.rand(recipe.batch, classes, device=device).softmax(-1)
    view = data.Train(sources.Tensors(images, labels), lambda x, _: x, recipe, classes, device)
    names = [str(i) for i in range(classes)]
    made_up = data.Data(names, size, kind.mean, kind.std, view)
    if variant != "ours":
        amp = {"plain": "off", "plain-amp": "bf16"}[variant]
        recipe = replace(recipe, amp=amp, compile="off")
    task, make = SCRIPTS[method].task(recipe, made_up), Learner
    if variant != "ours":
        task, make = make_plain_task(task, recipe), PlainLearner
    task.net.train()
    learner = make(task, recipe)
    learner.wrap_loss(choose_compilation(recipe.compile, device, 10**6))  # as in a long run
    return learner, images, labels


take_step: Callable  # of this process: `prepare` sets it


def prepare(method: str, variant: str, recipe) -> float:
    """Makes a variant in this process, which is its own. Returns the GiB that its steps take."""
    global take_step
    device = launch.get_device(recipe.device)
    before = measure.read_peak(device)
    learner, *batch = build(method, variant, recipe)
    take_step = partial(learner.train_step, *batch, 1e-6)
    for _ in range(3):  # the warm-up, and compilation
        take_step()
    spare_others(device)
    return measure.read_peak(device) - before


def take_turn(device: torch.device) -> list[float]:
    """Seconds of the next few steps of what `prepare` made."""
    take_step()  # not timed: others have used the device in between
    times = [measure.measure_seconds(take_step, device) for _ in range(STEPS_PER_TURN)]
    spare_others(device)
    return times


def watch_parent() -> None:
    """A benchmark that is killed takes its processes with it."""
    threading.Thread(target=leave_with_parent, daemon=True).start()


def spare_others(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def time_variants(method: str, variants: list[str], settings: Settings, batch: int) -> dict:
    """A row for each variant whose batch fits: one process each, timed in turns."""
    recipe, spawn = get_recipe(method, settings, batch), multiprocessing.get_context("spawn")
    device, rows, times = launch.get_device(settings.device), {}, defaultdict(list)
    start = partial(ProcessPoolExecutor, 1, spawn, initializer=watch_parent)
    pools = {variant: start() for variant in variants}

    def ask(variant: str, work: Callable, *args):
        """What its process answers. A variant whose memory does not suffice is left out."""
        try:
            return pools[variant].submit(work, *args).result()
        except RuntimeError as error:
            killed = isinstance(error, BrokenProcessPool)  # perhaps for its memory
            if not (killed or launch.is_out_of_memory(error)):
                raise
            pools.pop(variant).shutdown()
            print0(f"{method:9} {variant:10} {batch:5} images do not fit")

    memory = {variant: ask(variant, prepare, method, variant, recipe) for variant in variants}
    for _ in range(math.ceil(settings.steps / STEPS_PER_TURN)):
        for variant in list(pools):
            times[variant] += ask(variant, take_turn, device) or []
    for variant, pool in pools.items():
        pool.shutdown()
        low, middle, high = statistics.quantiles(times[variant], n=4)
        rows[variant] = {
            "batch": batch,
            "memory_gib": round(memory[variant], 2),
            "images_per_s": round(batch / middle, 2),
            "quartiles": [round(batch / high, 2), round(batch / low, 2)],
        }
    return rows


def keep_best(best: dict[str, dict], rows: dict[str, dict]) -> None:
    """Of each variant the row of the batch at which it was fastest."""
    for variant, row in rows.items():
        if variant not in best or row["images_per_s"] > best[variant]["images_per_s"]:
            best[variant] = row


def add_ratios(best: dict[str, dict], flop: float, matrix: float) -> None:
    """Adds to each row its share of the hardware, and its speed relative to the others."""
    for row in best.values():
        row["gflop_per_image"] = round(flop / 1e9, 4)
        row["share"] = round(row["images_per_s"] * flop / matrix, 4)
        for other in [name for name in best if name != "ours"]:
            row[f"times_{other}"] = round(row["images_per_s"] / best[other]["images_per_s"], 3)


def project_hours(row: dict, epochs: int) -> None:
    """Adds how long the recipe would take on ImageNet, on this device alone."""
    hours = round(epochs * IMAGES / row["images_per_s"] / 3600, 1)
    row |= {"recipe_epochs": epochs, "projected_hours_of_this_device": hours}
    print0(f"          {epochs} epochs of ImageNet: {hours:,.0f} hours at this rate")


def show(method: str, best: dict[str, dict]) -> None:
    for variant, row in best.items():
        speed = f"{row['batch']:5} {row['images_per_s']:9,.1f} {row['memory_gib']:6.2f}"
        ratios = (row.get(f"times_{other}", math.nan) for other in ("plain", "plain-amp"))
        shown = "  ".join(f"{times:7.2f}" for times in ratios)
        print0(f"{method:9} {variant:10} {speed} {row['share']:6.1%}  {shown}")


def main(settings: Settings) -> dict:
    device = launch.get_device(settings.device)
    methods = list(SCRIPTS) if settings.method == "all" else settings.method.split(",")
    if not set(methods) <= SCRIPTS.keys():
        raise ValueError(f"--method {settings.method}: choose {', '.join(SCRIPTS)} or all")
    variants = [name for name in VARIANTS if name != "plain-amp" or has_bf16(device.type)]
    batches = [int(word) for word in settings.batch.split(",")]
    matrix = measure.measure_matrix_rate(device)
    spare_others(device)
    print0(f"{launch.device_name(device)}, matrix rate {matrix / 1e12:.4g} Tflop/s")
    print0(f"{settings.steps} steps of each variant, in turns\n")
    print0("method    variant    batch  images/s    GiB  share  x plain  x plain-amp")
    rows: dict[str, dict] = {}
    for method in methods:
        recipe = get_recipe(method, settings, batches[0])
        about = {name: getattr(recipe, name) for name in ("data", "model", "patch", "compile")}
        about["image_size"] = recipe.image_size or recipes.DATA_SETS[settings.data].image_size
        about |= {"steps": settings.steps, "matrix_tflops": round(matrix / 1e12, 3), "rows": rows}
        best, flop = rows.setdefault(method, {}), measure.count_operations(method, recipe)
        for batch in batches:
            keep_best(best, time_variants(method, variants, settings, batch))
            add_ratios(best, flop, matrix)
            show(method, best)
            if settings.data == "imagenet" and "ours" in best:
                project_hours(best["ours"], recipe.epochs)
            whole = (method, batch) == (methods[-1], batches[-1])
            record = measure.add_record(settings, device, "speed.benchmark", about, whole)
    return record


if __name__ == "__main__":
    launch.run(main, parse)
