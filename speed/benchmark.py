"""How fast each method trains, and how much of the hardware it uses.

    python -m speed.benchmark --method distill --model large --batch 32,64,128
    python -m speed.benchmark --method finetune --data cifar10 --compile graphs
    python -m speed.benchmark --method loader --data-dir /imagenet

speed/README.md says what is measured. --record writes
speed/benchmark-DEVICE.json after each batch size.
"""

import itertools
import math
import multiprocessing
import statistics
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache, partial

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
from common.augment import Augment
from common.hardware import choose_compilation, has_fast_bf16
from common.launch import print0
from common.settings import parse_settings, setting
from datasets import folders, sources
from datasets.images import count_cores
from speed import measure
from speed.plain import PlainLearner, make_plain
from study.jobs import leave_with_parent, to_argv
from train import Learner

SCRIPTS = dict(finetune=finetune, copy=attention_copy, distill=attention_distill, pretrain=pretrain)


@dataclass(frozen=True)
class Settings(measure.Settings):
    data: str = setting("imagenet", "whose recipe, on made-up images", ("cifar10", "imagenet"))
    image_size: int = setting(0, "pixels per side (0: the data set's own)", high=4096)
    method: str = setting("all", "finetune, copy, distill, pretrain (with commas), all; or loader")
    model: str = setting("", "size of the ViT [the recipe's]", ("", *recipes.SIZES))
    batch: str = setting("64", "images at a time: of several (32,64,128) the best counts")
    steps: int = setting(20, "timed steps of each variant", low=1)
    amp: str = setting("auto", "mixed precision of ours", ("auto", "off", "bf16", "fp16"))
    compile: str = setting("auto", "torch.compile of ours", ("auto", "off", "on", "graphs"))
    data_dir: str = setting("", "for loader: holds train/CLASS/* and val/CLASS/*")
    workers: int = setting(8, "for loader: processes that decode images", low=1)


parse = partial(parse_settings, __doc__, Settings, {})
VARIANTS = {"plain": "off", "plain-amp": "bf16", "ours": ""}  # their --amp, if not the recipe's
STEPS_PER_TURN = 4
IMAGES = 1_281_167  # in an epoch of ImageNet


def get_recipe(method: str, settings: Settings, batch: int):
    """The method's own recipe, at this model and size."""
    names = ("data", "device", "amp", "compile", "model", "data_dir", "workers")
    asked = {name: value for name in names if (value := getattr(settings, name))}
    asked |= {"teacher": "random"} if method in ("copy", "distill") else {}
    asked["image_size"] = settings.image_size or recipes.DATA_SETS[settings.data].image_size
    return SCRIPTS[method].parse(to_argv(asked | {"batch": batch, "micro_batch": batch}))


def build(method: str, variant: str, recipe) -> tuple[Learner, Tensor, Tensor]:
    """A learner of a random net, with images and labels (mixed as by MixUp) to learn from."""
    device, kind = launch.get_device(recipe.device), recipes.DATA_SETS[recipe.data]
    size, classes = recipe.image_size, measure.CLASSES[recipe.data]
    images = torch.randn(recipe.batch, len(kind.mean), size, size, device=device)
    labels = torch.rand(recipe.batch, classes, device=device).softmax(-1)
    view = data.Train(sources.Tensors(images, labels), lambda x, _: x, recipe, classes, device)
    made_up = data.Data([*map(str, range(classes))], size, kind.mean, kind.std, view)
    if amp := VARIANTS[variant]:
        recipe = replace(recipe, amp=amp, compile="off")
    task, make = SCRIPTS[method].task(recipe, made_up), Learner
    if variant != "ours":
        make_plain(task, recipe)
        make = PlainLearner
    task.net.train()
    learner = make(task, recipe)
    learner.wrap_loss(choose_compilation(recipe.compile, device, 10**6))  # as in a long run
    return learner, images, labels


@cache
def make_step(method: str, variant: str, recipe) -> tuple[Callable, float]:
    """The training step of this process, warmed up and timed, and the GiB that it takes."""
    device = launch.get_device(recipe.device)
    before = measure.read_peak(device)
    learner, *batch = build(method, variant, recipe)
    step = partial(measure.measure_seconds, partial(learner.train_step, *batch, 1e-6), device)
    for _ in range(3):  # with compilation
        step()
    return step, measure.read_peak(device) - before


def take_turn(method: str, variant: str, recipe) -> tuple[float, list[float]]:
    """GiB, and seconds of the next few steps."""
    step, memory = make_step(method, variant, recipe)
    step()  # does not count: others have used the device in between
    times = [step() for _ in range(STEPS_PER_TURN)]
    torch.cuda.empty_cache()  # for the others
    return memory, times


def time_variants(method: str, variants: list[str], recipe, steps: int) -> dict[str, dict]:
    """A row for each variant whose batch fits in memory: one process each, timed in turns."""
    spawn, times, memory = multiprocessing.get_context("spawn"), defaultdict(list), {}
    start = partial(ProcessPoolExecutor, 1, spawn, initializer=leave_with_parent)
    pools, rows = {variant: start() for variant in variants}, {}
    for variant in math.ceil(steps / STEPS_PER_TURN) * variants:
        try:
            if variant in pools:
                turn = pools[variant].submit(take_turn, method, variant, recipe)
                memory[variant], took = turn.result()
                times[variant] += took
        except RuntimeError as error:
            killed = isinstance(error, BrokenProcessPool)  # perhaps for its memory
            if not (killed or launch.is_out_of_memory(error)):
                raise
            pools.pop(variant).shutdown()
            print0(f"{method:9} {variant:10} {recipe.batch:5} images do not fit")
    for variant, pool in pools.items():
        pool.shutdown()
        slow, middle, fast = (recipe.batch / x for x in statistics.quantiles(times[variant])[::-1])
        row = {"batch": recipe.batch, "memory_gib": round(memory[variant], 2)}
        row |= {"images_per_s": round(middle, 2), "quartiles": [round(slow, 2), round(fast, 2)]}
        rows[variant] = row
    return rows


def compare(best: dict[str, dict], method: str, recipe, matrix: float) -> None:
    """Adds to each row its share of the hardware and its speed relative to others. Shows it."""
    flop = measure.count_operations(method, recipe)
    for variant, row in best.items():
        speed = row["images_per_s"]
        row |= {"gflop_per_image": round(flop / 1e9, 4), "share": round(speed * flop / matrix, 4)}
        for other in sorted(best.keys() - {"ours"}):
            row[f"times_{other}"] = round(speed / best[other]["images_per_s"], 3)
        ratios = (row.get(f"times_{other}", math.nan) for other in ("plain", "plain-amp"))
        shown = f"{row['batch']:5} {speed:9,.1f} {row['memory_gib']:6.2f} {row['share']:6.1%}  "
        print0(f"{method:9} {variant:10} " + shown + "  ".join(f"{x:7.2f}" for x in ratios))
    if recipe.data == "imagenet" and "ours" in best:
        hours = round(recipe.epochs * IMAGES / best["ours"]["images_per_s"] / 3600, 1)
        best["ours"] |= {"recipe_epochs": recipe.epochs, "projected_hours_of_this_device": hours}
        print0(f"          {recipe.epochs} epochs of ImageNet: {hours:,.0f} hours at this rate")


def time_loader(settings: Settings, device: torch.device) -> dict:
    """images/s of files, streamed as in training: read, decoded, cropped and augmented."""
    kind = recipes.DATA_SETS["imagenet"]
    recipe = get_recipe("finetune", settings, int(settings.batch))
    parts = folders.load(recipe, kind, recipe.image_size, device)
    augment = Augment(recipe, kind, device, cropped=True)
    view = data.Train(parts.train, augment, recipe, len(parts.classes), device)
    batches = itertools.chain.from_iterable(map(view.epoch, itertools.count()))
    next(batches)  # starts the workers
    count, seconds = 0, 0.0
    while seconds < 5:
        seconds += measure.measure_seconds(partial(next, batches), device)
        count += view.batch
    cores, speed = count_cores(), count / seconds
    print0(f"loader: {speed:,.0f} images/s, {settings.workers} workers on {cores} cores")
    return {"loader_images_per_s": round(speed, 1), "workers": settings.workers, "cores": cores}


def main(settings: Settings) -> dict:
    device = launch.get_device(settings.device)
    if settings.method == "loader":
        found = time_loader(settings, device)
        return measure.add_record(settings, device, "speed.benchmark", found)
    methods = list(SCRIPTS) if settings.method == "all" else settings.method.split(",")
    if not set(methods) <= SCRIPTS.keys():
        raise ValueError(f"--method {settings.method}: choose {', '.join(SCRIPTS)}, all or loader")
    variants = [name for name in VARIANTS if name != "plain-amp" or has_fast_bf16(device.type)]
    batches = [int(word) for word in settings.batch.split(",")]
    matrix = measure.measure_matrix_rate(device)
    print0(f"{launch.device_name(device)}, matrix rate {matrix / 1e12:.4g} Tflop/s\n")
    print0("method    variant    batch  images/s    GiB  share  x plain  x plain-amp")
    rows: dict[str, dict] = {}
    for method in methods:
        best = rows.setdefault(method, {})
        for batch in batches:
            recipe = get_recipe(method, settings, batch)
            for variant, row in time_variants(method, variants, recipe, settings.steps).items():
                if row["images_per_s"] >= best.setdefault(variant, row)["images_per_s"]:
                    best[variant] = row
            compare(best, method, recipe, matrix)
            names = "data", "model", "patch", "compile", "image_size"
            about = {name: getattr(recipe, name) for name in names} | {"steps": settings.steps}
            about |= {"matrix_tflops": round(matrix / 1e12, 3), "rows": rows}
            record = measure.add_record(settings, device, "speed.benchmark", about)
    return record


if __name__ == "__main__":
    launch.run(main, parse)
