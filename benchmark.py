"""How fast each method trains, and how much of the hardware it uses.

    python benchmark.py --method all --model large --batch 64              one row per method and variant
    python benchmark.py --method distill --model large --image-size 384 --batch 8,16,32       the best batch of each
    python benchmark.py --method finetune --data cifar10 --compile graphs --batch 512,2048
    python benchmark.py --maps                                             the forms of the distillation loss
    python benchmark.py --loader --data-dir /imagenet                      what the data can deliver

Variants, side by side in one run, each in a process of its own, a few steps in turn:

    plain       the usual way, as the published implementation has it: float32, eager, (B, H, N, N) maps of teacher and student
                stored, softmax of both, the teacher run to its last block, the loss read at every step
    plain-amp   the same under autocast to bfloat16
    ours        what the scripts run: their loss, and train.Learner

images/s is the median over steps after warm-up, a whole step with optimiser and, where the recipe has one, the average of
the weights. The share of the hardware is that of its own rate of multiplying matrices, measured in the same run (in
bfloat16 where that is faster than float32). It counts the operations that a method needs, whatever a variant does beyond:

    a linear layer of I inputs and O outputs costs 2 I O per token; a map, and what is seen through it, 2 N^2 D each;
    the backward pass costs twice the forward pass, but for the first layer (images need no gradient) and what is lent;
    a block that copies computes no queries and keys; the teacher ends with the queries and keys of the last used layer.

Layer norms, softmax, the optimiser and recomputation are not counted. Everything is written to results/benchmark-DEVICE.json.
"""

import copy
import json
import math
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import attention_copy
import attention_distill
import data
import finetune
import pretrain
import train
import vit

SCRIPTS = {"finetune": finetune, "copy": attention_copy, "distill": attention_distill, "pretrain": pretrain}
FLAGS = {k: data.FLAGS[k] for k in ("data_dir", "image_size", "workers")} | {
    "data": ("imagenet", "whose recipe to run: cifar10 or imagenet, on made-up images"),
    "method": ("all", "finetune, copy, distill, pretrain or all"),
    "variant": ("all", "plain, plain-amp, ours or all"),
    "model": ("", "size of the ViT (empty: the recipe's)"),
    "patch": ("", "side of a patch (empty: the recipe's)"),
    "batch": ("64", "images at a time; of several (32,64,128) the best counts"),
    "steps": (20, "steps that are timed, of each variant"),
    "layers": ("", "layers to transfer (empty: the recipe's)"),
    "device": train.FLAGS["device"],
    "amp": train.FLAGS["amp"],
    "compile": train.FLAGS["compile"],
    "maps": (False, "time the forms of the distillation loss instead, at 197, 577 and 1,025 tokens"),
    "loader": (False, "time what the loaders deliver instead"),
    "results": ("results", "where the record goes"),
}
VARIANTS = ("plain", "plain-amp", "ours")
STEPS_A_TURN = 4
IMAGES = 1_281_167  # in an epoch of ImageNet


# The usual way ------------------------------------------------------------------------------------------------------------


class PlainAttention(vit.Attention):
    """Attention that stores its map. What goes out, and may come in, are scores (B, H, N, N) before the softmax."""

    def forward(self, x: Tensor, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        scores = q * q.shape[-1] ** -0.5 @ k.mT if scores is None else scores
        y = scores.softmax(dim=-1) @ v
        return self.proj(rearrange(y, "b h n d -> b n (h d)")), scores


def plain(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, vit.Attention):
            module.__class__ = PlainAttention
    return net


def plain_loss(method: str, net: nn.Module, images: Tensor, labels: Tensor, teacher: vit.ViT, layers: list[int], args) -> dict:
    """The loss of a method in the usual way, for nets that went through `plain`."""
    if method in ("finetune", "pretrain"):
        return SCRIPTS[method].loss(net, images, labels, *([args.smoothing] if method == "finetune" else []))
    keep = net.draw_keep(len(images), images.device)
    with torch.no_grad():
        theirs = teacher(images, keep=keep)[1]
    if method == "copy":
        logits, _ = net(images, [s if i in layers else None for i, s in enumerate(theirs)], keep)
        return {"class": F.cross_entropy(logits, labels, label_smoothing=args.smoothing)}
    logits, ours = net(images, keep=keep)
    terms = [-(theirs[i].softmax(-1) * ours[i].log_softmax(-1)).sum(-1).mean() for i in layers]
    return {"class": F.cross_entropy(logits, labels, label_smoothing=args.smoothing), "attention": args.weight * sum(terms)}


class PlainLearner(train.Learner):
    """A loop as most are written: the optimiser as it comes, the average tensor by tensor, the loss read at every step."""

    def __init__(self, net: nn.Module, loss: Callable, args, steps: int):
        super().__init__(net, loss, args, steps)
        self.optimizer = torch.optim.AdamW(train.parameter_groups(net, args), lr=args.lr, betas=(0.9, args.beta2))

    def learn(self, images: Tensor, labels: Tensor, rate: float) -> None:
        with self.autocast:
            loss = sum(self.step(images, labels).values())
        loss.backward()
        if not math.isfinite(loss.item()):
            raise train.Failed("the loss is not finite")
        nn.utils.get_total_norm([p.grad for p in self.net.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            with torch.no_grad():
                for average, p in zip(self.average.parameters(), self.net.parameters(), strict=True):
                    average.mul_(self.args.ema).add_(p, alpha=1 - self.args.ema)


# What is measured ----------------------------------------------------------------------------------------------------------


def settings(method: str, args, batch: int):
    """The method's own recipe, at this model and size."""
    argv = ["--data", args.data, "--batch", str(batch), "--device", args.device, "--amp", args.amp, "--compile", args.compile]
    argv += [word for name in ("model", "patch", "image_size") if (value := getattr(args, name))
             for word in ("--" + name.replace("_", "-"), str(value))]  # fmt: skip
    if args.layers and method in ("copy", "distill"):
        argv += ["--layers", args.layers]
    recipe = SCRIPTS[method].options(argv)
    if "layers" in SCRIPTS[method].RECIPE and not args.layers and recipe.layers.isdigit():  # as deep as in the recipe's model
        full = vit.SIZES[SCRIPTS[method].options(["--data", args.data]).model][1]
        recipe.layers = str(max(1, int(recipe.layers) * vit.SIZES[recipe.model][1] // full))
    return recipe


def build(method: str, variant: str, recipe) -> tuple[train.Learner, Tensor, Tensor]:
    """A learner, and images and labels (mixed ones, as MixUp makes them) to learn from."""
    device = train.device(recipe)
    size, channels, _, _ = data.KINDS[recipe.data]
    classes = 1000 if recipe.data == "imagenet" else 10
    shape = dict(image_size=recipe.image_size or size, patch=recipe.patch, channels=channels, classes=classes)
    torch.manual_seed(0)
    teacher, layers = None, []
    if method == "pretrain":
        net = vit.build(recipe.model, **shape | {"classes": 0})
        net = pretrain.MAE(net, recipe.mask, recipe.decoder_dim, recipe.decoder_depth, recipe.decoder_heads)
    else:
        net = vit.build(recipe.model, **shape, drop_path=recipe.drop_path)
    if method in ("copy", "distill"):
        teacher = vit.build(recipe.model, **shape).to(device).eval().requires_grad_(False)
        layers = vit.parse_layers(recipe.layers, len(net.blocks))
    recipe = copy.copy(recipe)
    if variant == "ours":
        loss = {"pretrain": pretrain.loss, "finetune": lambda *step: finetune.loss(*step, recipe.smoothing),
                "copy": lambda *step: attention_copy.loss(*step, teacher, layers, recipe),
                "distill": lambda *step: attention_distill.loss(*step, teacher, layers, recipe)}[method]  # fmt: skip
        learner = train.Learner(net.to(device).train(), loss, recipe, steps=10**6)  # as in a long run
    else:
        recipe.amp, recipe.compile = {"plain": "off", "plain-amp": "bf16"}[variant], "off"
        teacher = plain(teacher) if teacher else None
        loss = partial(plain_loss, method)
        learner = PlainLearner(plain(net).to(device).train(), lambda *step: loss(*step, teacher, layers, recipe), recipe, 0)
    images = torch.randn(recipe.batch, channels, shape["image_size"], shape["image_size"], device=device)
    labels = torch.rand(recipe.batch, classes, device=device).softmax(-1)
    return learner, images, labels


def operations(method: str, recipe) -> float:
    """Floating-point operations per image of a training step (see above)."""
    dim, depth, _ = vit.SIZES[recipe.model]
    size, channels, _, _ = data.KINDS[recipe.data]
    patches = ((recipe.image_size or size) // recipe.patch) ** 2
    pixels, classes = recipe.patch**2 * channels, 1000 if recipe.data == "imagenet" else 10

    def block(tokens: int, d: int = dim) -> float:  # forward, without the map: qkv, projection, MLP, and what is seen
        return 2 * tokens * d * d * (3 + 1 + 8) + 2 * tokens**2 * d

    def look(tokens: int, d: int = dim) -> float:
        return 2 * tokens**2 * d

    def train_step(tokens: int, depth: int, d: int = dim) -> float:
        return 3 * depth * (block(tokens, d) + look(tokens, d))

    n, embed = 1 + patches, 2 * patches * pixels * dim
    if method == "pretrain":
        seen, d = 1 + int(patches * (1 - recipe.mask)), recipe.decoder_dim
        decoder = train_step(n, recipe.decoder_depth, d) + 3 * 2 * (seen * dim * d + n * d * pixels)
        return 2 * embed + train_step(seen, depth) + decoder
    student = 2 * embed + train_step(n, depth) + 3 * 2 * dim * classes
    if method == "finetune":
        return student
    layers = vit.parse_layers(recipe.layers, depth)
    teacher = embed + layers[-1] * (block(n) + look(n)) + 2 * n * dim * 2 * dim
    if method == "copy":  # of a copied block: no queries and keys, and no gradient of the map
        return teacher + student - len(layers) * 3 * (2 * n * dim * 2 * dim + look(n))
    return teacher + student + look(n)  # the teacher's last map


def matrix_rate(device: torch.device) -> float:
    """Operations per second of the device's own matrix multiplication: the best of bfloat16 and float32, and of two sizes."""
    best = 0.0
    for n in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        for dtype in (torch.bfloat16, torch.float32):
            a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
            times = [seconds(lambda a=a, b=b: a @ b, device) for _ in range(12)]
            best = max(best, 2 * n**3 / statistics.median(times))
    return best


def seconds(work: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak(device: torch.device) -> float:
    """The most memory in GiB that this process has taken so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def work(pipe, method: str, variant: str, recipe, steps: int) -> None:
    """One variant, in a process of its own, so that its memory is its own: sends its peak, and then times of steps."""
    device = train.device(recipe)
    before = peak(device)
    try:
        learner, *batch = build(method, variant, recipe)
        for _ in range(3):  # the warm-up, and compilation
            learner.learn(*batch, recipe.lr * 1e-3)
        pipe.send(peak(device) - before)
        while pipe.recv():
            learner.learn(*batch, recipe.lr * 1e-3)  # not timed: others have used the device in between
            pipe.send([seconds(lambda: learner.learn(*batch, recipe.lr * 1e-3), device) for _ in range(steps)])
            if device.type == "cuda":
                torch.cuda.empty_cache()  # to the others
    except (torch.OutOfMemoryError, ValueError) as error:
        pipe.send(error)


def measure(method: str, variants: list[str], args, batch: int) -> dict[str, dict]:
    """A row for each variant whose batch fits: one process each, timed in turns."""
    recipe, spawn = settings(method, args, batch), multiprocessing.get_context("spawn")
    rows, times, pipes = {}, {}, {}
    for variant in variants:
        pipe, theirs = spawn.Pipe()
        spawn.Process(target=work, args=(theirs, method, variant, recipe, STEPS_A_TURN), daemon=True).start()
        theirs.close()  # so that a worker that died is the end of the file
        try:
            rows[variant] = {"batch": batch, "memory_gib": round(receive(pipe, method, variant), 2)}
            pipes[variant], times[variant] = pipe, []
        except torch.OutOfMemoryError:
            train.say(f"{method:9} {variant:10} {batch:5} images do not fit")
    for _ in range(math.ceil(args.steps / STEPS_A_TURN)):
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
        raise train.Failed(f"{method} {variant} ended before its time (see above)") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def methods(args) -> dict:
    device = train.device(args)
    chosen = list(SCRIPTS if args.method == "all" else dict.fromkeys(args.method.split(",")))
    variants = list(VARIANTS if args.variant == "all" else dict.fromkeys(args.variant.split(",")))
    for kind, names, known in (("method", chosen, SCRIPTS), ("variant", variants, VARIANTS)):
        if odd := [name for name in names if name not in known]:
            raise ValueError(f"--{kind} {odd[0]}: choose {', '.join(known)} or all")
    try:
        batches = [int(b) for b in args.batch.split(",")]
    except ValueError:
        raise ValueError(f"--batch {args.batch}: write a number, or several with commas") from None
    rate = matrix_rate(device)
    train.say(f"matrix rate {rate / 1e12:.4g} Tflop/s; {args.steps} steps of each variant, in turns\n")
    train.say("method    variant    batch  images/s  GiB   share  x plain  x plain-amp")
    table = {}
    for method in chosen:
        best = {}
        for batch in batches:
            for variant, row in measure(method, variants, args, batch).items():
                if variant not in best or row["images_per_s"] > best[variant]["images_per_s"]:
                    best[variant] = row
        recipe = settings(method, args, batches[0])
        for variant, row in best.items():
            row["gflop_per_image"] = round(operations(method, recipe) / 1e9, 4)
            row["share"] = round(row["images_per_s"] * operations(method, recipe) / rate, 4)
            over = {other: row["images_per_s"] / best[other]["images_per_s"] for other in best if other != "ours"}
            row |= {f"times_{other}": round(x, 3) for other, x in over.items()}
            ratios = "".join(f"{over[k]:>{w}.2f}" if k in over else " " * w for k, w in (("plain", 9), ("plain-amp", 13)))
            train.say(f"{method:9} {variant:10} {row['batch']:5} {row['images_per_s']:9,.1f}"
                      f" {row['memory_gib']:6.2f} {row['share']:6.1%}{ratios}")  # fmt: skip
        if args.data == "imagenet" and "ours" in best:
            hours = recipe.epochs * IMAGES / best["ours"]["images_per_s"] / 3600
            best["ours"] |= {"recipe_epochs": recipe.epochs, "projected_hours_of_this_device": round(hours, 1)}
            train.say(f"          {recipe.epochs} epochs of ImageNet at this rate: {hours:,.0f} hours of this device")
        table[method] = best
    recipe = settings(chosen[0], args, batches[0])
    return {"data": args.data, "model": recipe.model, "patch": recipe.patch, "compile": args.compile, "steps": args.steps,
            "image_size": recipe.image_size or data.KINDS[args.data][0], "matrix_tflops": round(rate / 1e12, 3),
            "rows": table}  # fmt: skip


# The forms of the distillation loss ---------------------------------------------------------------------------------------


def two_fused_calls(student: vit.QK, teacher: vit.QK) -> Tensor:
    """The gradient of the attention loss by two calls of fused attention. Its value is not the loss."""
    (q, k), (q_t, k_t) = student, teacher
    gap = F.scaled_dot_product_attention(q.detach(), k.detach(), k) - F.scaled_dot_product_attention(q_t, k_t, k)
    return q.shape[-1] ** -0.5 * (q * gap).sum(dim=-1).mean()


def log_sum_exp(student: vit.QK, teacher: vit.QK) -> Tensor:
    """The attention loss as log(sum(exp(scores))) less what the teacher's map makes of them: one map instead of two."""
    (q, k), (q_t, k_t) = student, teacher
    seen, q = F.scaled_dot_product_attention(q_t, k_t, k), q * q.shape[-1] ** -0.5
    return ((q @ k.mT).float().logsumexp(dim=-1) - (q * seen).float().sum(dim=-1)).mean()


def flexible(student: vit.QK, teacher: vit.QK) -> Tensor:
    """The same, and the log(sum(exp)) by flex_attention: no map at all. To be compiled."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    (q, k), (q_t, k_t) = student, teacher
    _, aux = flex_attention(q, k, k, return_aux=AuxRequest(lse=True))
    seen = F.scaled_dot_product_attention(q_t, k_t, k)
    return (aux.lse - q.shape[-1] ** -0.5 * (q * seen).float().sum(dim=-1)).mean()


FORMS = {"plain": attention_distill.attention_loss, "at once": attention_distill.attention_loss_at_once,
         "two fused calls": two_fused_calls, "log-sum-exp": log_sum_exp}  # fmt: skip


def maps(args) -> dict:
    """Milliseconds of forward and backward pass of each form, for one layer of `large`; plain and compiled on a GPU."""
    device = train.device(args)
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    forms = dict(FORMS)
    if gpu:
        forms |= {f"{name}, compiled": torch.compile(form) for name, form in FORMS.items()}
        forms["flex, compiled"] = torch.compile(flexible)
    heads, table = vit.SIZES["large"][2], {}
    train.say(f"{'ms, one layer':26} " + " ".join(f"{n:>6} tokens" for n in (197, 577, 1025)))
    times = {}
    for tokens in (197, 577, 1025):
        images = (64 if gpu else 8) * 197 // tokens
        looks = torch.randn(4, images, heads, tokens, 64, device=device, dtype=dtype)
        q, k, q_t, k_t = (x.clone().requires_grad_(i < 2) for i, x in enumerate(looks))

        def work(form: Callable, q=q, k=k, q_t=q_t, k_t=k_t) -> None:
            with torch.autocast(device.type, dtype, enabled=gpu):
                loss = form((q, k), (q_t, k_t))
            torch.autograd.grad(loss, (q, k))

        took = {name: [] for name in forms}
        for step in range(3 + args.steps):
            for name, form in forms.items():
                lasted = seconds(lambda form=form, work=work: work(form), device)
                took[name] += [lasted] if step >= 3 else []
        for name, lasted in took.items():
            times.setdefault(name, {})[tokens] = round(1000 * statistics.median(lasted) / images, 4)
    for name, row in times.items():
        train.say(f"{name:26} " + " ".join(f"{ms:13.3f}" for ms in row.values()))
        table[name] = {str(tokens): ms for tokens, ms in row.items()}
    return {"ms_per_image_and_layer": table, "heads": heads, "dtype": str(dtype), "steps": args.steps}


# What the data can deliver --------------------------------------------------------------------------------------------------


def loader(args) -> dict:
    """images/s of the training images as a method gets them, augmented and on the device, with nothing else to do."""
    table, device = {}, train.device(args)

    def rate(part: data.Part, batch: int, least: float = 5.0) -> float:
        if len(part) < batch:
            raise ValueError(f"--batch {batch} is more than the {len(part)} training images")
        begun, count = None, 0
        for epoch in range(10**6):
            for images, _ in part.epoch(epoch):
                if begun:
                    count += len(images)
                else:  # the first batch starts the workers
                    begun = time.perf_counter()
                if begun and time.perf_counter() - begun > least:
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    return count / (time.perf_counter() - begun)

    def say(name: str, speed: float) -> None:
        table[name] = round(speed, 1)
        train.say(f"{name:52} {speed:12,.0f} images/s")

    recipe = finetune.options(["--data", "cifar10", "--device", args.device])
    images, labels = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (50_000,))
    parts = data.in_memory({"train": (images, labels)}, recipe, data.KINDS["cifar10"][2], device)
    say("CIFAR on the device, augmented and mixed", rate(data.Part(parts["train"], recipe, 10, device), recipe.batch))

    if not Path(args.data_dir).is_dir():
        train.say(f"no folder {args.data_dir}: point --data-dir at train/CLASS/* and val/CLASS/* to time JPEG files")
        return {"images_per_s": table}
    batch = args.batch.split(",")[0]
    argv = ["--data", "imagenet", "--data-dir", args.data_dir, "--device", args.device, "--batch", batch, "--memory", "0"]
    for workers in dict.fromkeys((1, args.workers)):
        recipe = finetune.options([*argv, "--workers", str(workers)])
        part = data.load(recipe, device).train
        workers = min(workers, data.cores())
        say(f"JPEG files, {workers} worker{'s' * (workers > 1)} on {data.cores()} cores", rate(part, recipe.batch))
    if device.type == "cuda":
        from torchvision import io

        files = [io.read_file(path) for path, _ in part.source.samples[:256] if path.lower().endswith(("jpg", "jpeg"))]
        took = [seconds(lambda: io.decode_jpeg(files, mode=io.ImageReadMode.RGB, device="cuda"), device) for _ in range(5)]
        say("JPEG files, decoded alone, on the GPU", len(files) / statistics.median(took))
    return {"images_per_s": table, "cores": data.cores()}


# From the command line to a record ----------------------------------------------------------------------------------------


def options(argv: list[str]):
    args = train.options(__doc__, {}, FLAGS, argv)
    args.argv = argv
    if args.data not in ("cifar10", "imagenet"):
        raise ValueError(f"--data {args.data}: choose cifar10 or imagenet")
    if args.model not in ("", *vit.SIZES):
        raise ValueError(f"no ViT is called '{args.model}': choose one of {', '.join(vit.SIZES)}")
    return args


def main(args) -> dict:
    device = train.device(args)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    path = Path(args.results) / f"benchmark-{name.replace(' ', '-') if device.type == 'cuda' else device.type}.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    try:
        records = json.loads(path.read_text()) if path.exists() else []
        commands = [record["command"] for record in records]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no records of benchmark.py: move it away, or choose other --results") from error
    train.say(f"{name}, torch {torch.__version__}")
    what = "loader" if args.loader else "maps" if args.maps else "methods"
    found = {"loader": loader, "maps": maps, "methods": methods}[what](args)
    record = {"command": " ".join(["python benchmark.py", *args.argv]), "commit": train.commit(), "device": name,
              "torch": torch.__version__, "python": platform.python_version(), **found}  # fmt: skip
    records = [old for old, command in zip(records, commands, strict=True) if command != record["command"]] + [record]
    train.write_text(path, json.dumps(records, indent=1) + "\n")
    train.say(f"\nwrote {path}")
    return record


if __name__ == "__main__":
    train.run(main, options)
