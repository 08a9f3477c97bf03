"""How fast each method trains, and how much of the hardware it uses.

    python -m speed.benchmark --model large --batch 64
    python -m speed.benchmark --method distill --model large --batch 8,16,32
    python -m speed.benchmark --method finetune --data cifar10 --compile graphs

Variants, side by side in one run, each in a process of its own, a few steps in
turn:

    plain       the usual way, as the published implementation has it: float32,
                eager, maps of teacher and student stored, the teacher run to
                its last block, the loss read at every step (speed/plain.py)
    plain-amp   the same under autocast to bfloat16
    ours        what the scripts run: their task, and learner.Learner

Of several batch sizes the best of each variant counts. images/s is the median
over steps after warm-up, a whole step with optimiser and, where the recipe has
one, the average of the weights. The share of the hardware is that of its own
rate of multiplying matrices, measured in the same run (in bf16 where that is
faster). It counts the operations that a method needs, whatever a variant does
beyond (measure.operations). --record keeps the figures in
results/benchmark-DEVICE.json.
"""

import launch
from launch import Failed, print0

import math
import multiprocessing
import statistics
from functools import partial

import torch
from torch import Tensor

import attention_copy
import attention_distill
import data
import finetune
import pretrain
import vit
from augment import Normalise
from learner import Learner
from settings import Setting, Settings, parse_settings, pick, to_argv
from speed.measure import RECORD, Records, classes_of, matrix_rate, operations, peak, seconds
from speed.plain import PlainLearner, plain_task

SCRIPTS = {
    "finetune": finetune,
    "copy": attention_copy,
    "distill": attention_distill,
    "pretrain": pretrain,
}
SETTINGS = pick("image_size", "device", "amp", "compile") | {
    "data": Setting("imagenet", "whose recipe, on made-up images", choices=("cifar10", "imagenet")),
    "method": Setting("all", "finetune, copy, distill, pretrain, several with commas, or all"),
    "variant": Setting("all", "plain, plain-amp, ours, several with commas, or all"),
    "model": Setting("", "size of the ViT (empty: the recipe's)", choices=("", *vit.SIZES)),
    "patch": Setting(0, "side of a patch (0: the recipe's)"),
    "batch": Setting("64", "images at a time; of several (32,64,128) the best counts"),
    "steps": Setting(20, "steps that are timed, of each variant", low=1),
    "layers": Setting("", "layers to transfer (empty: the recipe's)"),
    **RECORD,
}
parse = partial(parse_settings, __doc__, SETTINGS)
VARIANTS = ("plain", "plain-amp", "ours")
STEPS_A_TURN = 4
IMAGES = 1_281_167  # in an epoch of ImageNet


def recipe_of(method: str, settings: Settings, batch: int) -> Settings:
    """The method's own recipe, at this model and size, with a random net and teacher."""
    asked = {"data": settings.data, "batch": batch, "device": settings.device}
    asked |= {"amp": settings.amp, "compile": settings.compile}
    asked |= {k: v for k in ("model", "patch", "image_size") if (v := getattr(settings, k))}
    transfers = method in ("copy", "distill")
    if transfers and settings.layers:
        asked["layers"] = settings.layers
    recipe = SCRIPTS[method].parse(to_argv(asked))
    return recipe.but(teacher="random" if transfers else "none")


def build(method: str, variant: str, recipe: Settings) -> tuple[Learner, Tensor, Tensor]:
    """A learner, and images and labels (mixed ones, as MixUp makes them) to learn from."""
    device = launch.device(recipe.device)
    kind, classes = data.KINDS[recipe.data], classes_of(recipe)
    size = recipe.image_size or kind.image_size
    names = [str(i) for i in range(classes)]
    normalise = Normalise(kind.normalization, device)
    made_up = data.Data(names, kind.channels, size, normalise)
    if variant != "ours":
        recipe = recipe.but(amp={"plain": "off", "plain-amp": "bf16"}[variant], compile="off")
    task = SCRIPTS[method].task(recipe, made_up)
    make = Learner
    if variant != "ours":
        task, make = plain_task(task, recipe), PlainLearner
    learner = make(task.net.train(), task.loss, recipe, 10**6)  # steps: as in a long run
    images = torch.randn(recipe.batch, kind.channels, size, size, device=device)
    labels = torch.rand(recipe.batch, classes, device=device).softmax(-1)
    return learner, images, labels


def work(pipe, method: str, variant: str, recipe: Settings, steps: int) -> None:
    """One variant, in a process and memory of its own: sends its peak, then times of steps."""
    device = launch.device(recipe.device)
    before = peak(device)
    try:
        learner, *batch = build(method, variant, recipe)
        step = partial(learner.learn, *batch, recipe.lr * 1e-3)
        for _ in range(3):  # the warm-up, and compilation
            step()
        answer = peak(device) - before
        while True:
            if device.type == "cuda":
                torch.cuda.empty_cache()  # to the others
            pipe.send(answer)
            if not pipe.recv():
                break
            step()  # not timed: others have used the device in between
            answer = [seconds(step, device) for _ in range(steps)]
    except (torch.OutOfMemoryError, ValueError) as error:
        pipe.send(error)


def measure(method: str, variants: list[str], settings: Settings, batch: int) -> dict[str, dict]:
    """A row for each variant whose batch fits: one process each, timed in turns."""
    recipe, spawn = recipe_of(method, settings, batch), multiprocessing.get_context("spawn")
    rows, times, pipes = {}, {}, {}
    for variant in variants:
        pipe, theirs = spawn.Pipe()
        arguments = (theirs, method, variant, recipe, STEPS_A_TURN)
        spawn.Process(target=work, args=arguments, daemon=True).start()
        theirs.close()  # so that a worker that died is the end of the file
        try:
            memory = round(receive(pipe, method, variant), 2)
            rows[variant] = {"batch": batch, "memory_gib": memory}
            pipes[variant], times[variant] = pipe, []
        except torch.OutOfMemoryError:
            print0(f"{method:9} {variant:10} {batch:5} images do not fit")
    for _ in range(math.ceil(settings.steps / STEPS_A_TURN)):
        for variant, pipe in pipes.items():
            pipe.send(True)
            times[variant] += receive(pipe, method, variant)
    for variant, took in times.items():
        pipes[variant].send(False)
        low, middle, high = statistics.quantiles(took, n=4)
        rows[variant]["images_per_s"] = round(batch / middle, 2)
        rows[variant]["quartiles"] = [round(batch / high, 2), round(batch / low, 2)]
    return rows


def receive(pipe, method: str, variant: str):
    try:
        answer = pipe.recv()
    except EOFError:
        raise Failed(f"{method} {variant} ended before its time (see above)") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def best_of_batches(
    method: str, variants: list[str], settings: Settings, batches: list[int]
) -> dict[str, dict]:
    """For each variant the row of the batch at which it was fastest."""
    best = {}
    for batch in batches:
        for variant, row in measure(method, variants, settings, batch).items():
            if variant not in best or row["images_per_s"] > best[variant]["images_per_s"]:
                best[variant] = row
    return best


def rate(best: dict[str, dict], flop: float, matrix: float) -> None:
    """Adds to each row its share of the hardware and its speed relative to the others."""
    for variant, row in best.items():
        row["gflop_per_image"] = round(flop / 1e9, 4)
        row["share"] = round(row["images_per_s"] * flop / matrix, 4)
        for other in best:
            if other != "ours":
                times = row["images_per_s"] / best[other]["images_per_s"]
                best[variant][f"times_{other}"] = round(times, 3)


def show(method: str, best: dict[str, dict]) -> None:
    for variant, row in best.items():
        speed = f"{row['batch']:5} {row['images_per_s']:9,.1f} {row['memory_gib']:6.2f}"
        ratios = [
            (row.get(f"times_{other}"), width) for other, width in (("plain", 9), ("plain-amp", 13))
        ]
        shown = "".join(f"{times:{width}.2f}" if times else " " * width for times, width in ratios)
        print0(f"{method:9} {variant:10} {speed} {row['share']:6.1%}{shown}")


def choose(text: str, known, flag: str) -> list[str]:
    """Names with commas between them, or all."""
    names = list(known if text == "all" else dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"{flag} {name}: choose {', '.join(known)} or all")
    return names


def main(settings: Settings) -> dict:
    device = launch.device(settings.device)
    methods = choose(settings.method, SCRIPTS, "--method")
    variants = choose(settings.variant, VARIANTS, "--variant")
    try:
        batches = [int(b) for b in settings.batch.split(",")]
        if min(batches) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--batch {settings.batch}: write a number, or several with commas"
        ) from None
    records, matrix = Records(settings, device), matrix_rate(device)
    print0(
        f"matrix rate {matrix / 1e12:.4g} Tflop/s; "
        f"{settings.steps} steps of each variant, in turns\n"
    )
    print0("method    variant    batch  images/s    GiB  share  x plain  x plain-amp")
    rows = {}
    for method in methods:
        recipe = recipe_of(method, settings, batches[0])
        best = rows[method] = best_of_batches(method, variants, settings, batches)
        rate(best, operations(method, recipe), matrix)
        show(method, best)
        if settings.data == "imagenet" and "ours" in best:
            hours = round(recipe.epochs * IMAGES / best["ours"]["images_per_s"] / 3600, 1)
            best["ours"] |= {
                "recipe_epochs": recipe.epochs,
                "projected_hours_of_this_device": hours,
            }
            print0(
                f"          {recipe.epochs} epochs of ImageNet at this rate: {hours:,.0f} hours "
                "of this device"
            )
    size = recipe.image_size or data.KINDS[settings.data].image_size
    about = {
        "data": settings.data,
        "model": recipe.model,
        "patch": recipe.patch,
        "image_size": size,
    }
    about |= {
        "compile": settings.compile,
        "steps": settings.steps,
        "matrix_tflops": round(matrix / 1e12, 3),
    }
    return records.add("speed.benchmark", about | {"rows": rows})


if __name__ == "__main__":
    launch.run(main, parse)
