"""Every row of the results table, with one command.

    python reproduce.py --data digits --seeds 3          the table, results/digits.json and .png
    python reproduce.py --data digits --tune             how the recipes were chosen: results/digits-tuning.json
    python reproduce.py --data cifar10 --data-dir cifar10 --minutes 9     in pieces: the same command goes on

Every row has the same labels, epochs, batch and augmentation; only the rate (and what a method has of its own) is
its own, chosen with the same effort for each row, on the validation images, with seeds that the table does not use.
Killed at any moment, the same command goes on where it was.
"""

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import analysis
import attention_copy
import attention_distill
import data
import ensemble
import finetune
import pretrain
import train

SCRIPTS = {"pretrain": pretrain, "finetune": finetune, "copy": attention_copy, "distill": attention_distill}
ROWS = {  # row: script, its teacher
    "from scratch": ("finetune", "none"),
    "attention copy": ("copy", "pre-trained"),
    "attention distillation": ("distill", "pre-trained"),
    "fine-tuning": ("finetune", "pre-trained"),
    "copy, random teacher": ("copy", "random"),
    "distillation, random teacher": ("distill", "random"),
    "copy, fine-tuned teacher": ("copy", "fine-tuning"),
    "fine-tuning again": ("finetune", "pre-trained"),  # other order of the same images, for the ensemble of two
}
MAIN = list(ROWS)[:4]
ENSEMBLES = {
    "ensemble: fine-tuning + distillation": ("fine-tuning", "attention distillation"),
    "ensemble: fine-tuning twice": ("fine-tuning", "fine-tuning again"),
}
CHOSEN = {  # what --tune chose for rows whose recipe does not stand in their script
    "digits": {"copy, random teacher": ["--lr", "0.004", "--layers", "2"],
               "distillation, random teacher": ["--lr", "0.004", "--layers", "2"]},
}  # fmt: skip
LENGTHS = {"digits": (150, 900)}  # epochs at which the main rows are trained as well
TUNING = {  # what --tune tries for each row: first the rates, then, at the best rate, something of the row's own
    "from scratch": ("weight-decay", (0.05, 0.2, 0.5)),
    "attention copy": ("layers", ("all", "3", "2")),
    "attention distillation": ("layers", ("3", "all", "2")),
    "fine-tuning": ("layer-decay", (1.0, 0.75, 0.5)),
    "copy, random teacher": ("layers", ("all", "3", "2")),
    "distillation, random teacher": ("layers", ("3", "all", "2")),
}
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
FLAGS = {k: data.FLAGS[k] for k in ("data", "data_dir", "workers", "holdout")} | {
    "seeds": (3, "runs of each row, with seeds 0, 1, ..."),
    "tune": (False, "try rates on the validation images instead"),
    "jobs": (0, "runs at a time (0: one per CPU core, or one on a GPU)"),
    "minutes": (0.0, "stop after so long; the same command goes on (0: no limit)"),
    "runs": ("runs/reproduce", "where the runs go"),
    "results": ("results", "where the table goes"),
    "extra": ("", "more arguments for every run, such as '--epochs 2'"),
}


@dataclass
class Job:
    script: str
    argv: list[str]
    out: Path
    after: tuple = ()  # names of jobs whose models it needs

    def result(self) -> dict | None:
        """The last row of its log, if it is finished and was run with these very settings."""
        try:
            if not (self.out / "model.pt").exists() or not self.begun():
                return None
            return json.loads((self.out / "log.jsonl").read_text().splitlines()[-1])
        except (OSError, IndexError):
            return None

    def begun(self) -> bool:
        """Whether its folder holds a run, finished or not, with these very settings."""
        try:
            settings = json.loads((self.out / "config.json").read_text())
        except (OSError, ValueError):
            return False
        asked = vars(SCRIPTS[self.script].options(self.argv))
        return all(settings.get(k) == v for k, v in asked.items() if k not in train.FREE)


class Runner:
    """Runs jobs as processes, several at a time, each after those it needs."""

    def __init__(self, args):
        self.workers = args.jobs or (1 if torch.accelerator.is_available() else os.cpu_count() or 1)
        self.deadline = time.time() + 60 * args.minutes if args.minutes else None
        self.score = "val_top1" if args.tune else "test_top1"
        self.running: set[subprocess.Popen] = set()
        self.commit, self.runs, self.seconds = train.commit(), 0, 0.0

    def run(self, jobs: dict[str, Job]) -> dict[str, dict]:
        """The results of all jobs by name. Failed if one of them fails, or if time is up."""
        self.done, self.total = 0, len(jobs)
        with ThreadPoolExecutor(self.workers) as pool:
            futures = {}
            try:
                for name, job in jobs.items():  # a job stands behind those it needs, so that no thread waits in vain
                    futures[name] = pool.submit(self.one, name, job, [futures[other] for other in job.after])
                return {name: future.result() for name, future in futures.items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.running):
                    process.send_signal(signal.SIGTERM)  # it saves and leaves
                raise

    def one(self, name: str, job: Job, needed: list) -> dict:
        for future in needed:
            future.result()
        result, note = job.result(), "done before"
        if result is None:
            self.process(name, job)
            result = job.result()
            note = f"{train.clock(result['seconds'])} of training"
        self.done, self.runs, self.seconds = self.done + 1, self.runs + 1, self.seconds + result["seconds"]
        score = f"{result[self.score]:6.2f} %" if self.score in result else " " * 8
        print(f"{self.done:>3}/{self.total}  {score}  {name:<48} {note}", flush=True)
        return result

    def process(self, name: str, job: Job) -> None:
        job.out.mkdir(parents=True, exist_ok=True)
        here = Path(__file__).parent
        script = SCRIPTS[job.script].__name__ + ".py"
        again = "--resume" if job.begun() else "--overwrite"
        command = [sys.executable, str(here / script), *job.argv, again]
        threads = str(max(1, (os.cpu_count() or 1) // self.workers))
        with open(job.out / "output.txt", "w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                                       env=os.environ | {"OMP_NUM_THREADS": threads})  # fmt: skip
            self.running.add(process)
            try:
                process.wait(max(0.1, self.deadline - time.time()) if self.deadline else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                process.wait()
                raise train.Failed("time is up; the same command goes on where it was") from None
            finally:
                self.running.discard(process)
        if process.returncode:
            last = (job.out / "output.txt").read_text().strip().splitlines()[-1:]
            raise train.Failed(f"{name} failed: {' '.join(last)} (see {job.out / 'output.txt'})")


def jobs_of_seed(seed: int, args, rows=tuple(ROWS), epochs: int = 0, more=(), label: str = "") -> dict[str, Job]:
    """The jobs of some rows for one seed, with the teachers they need, by name."""
    # The digits' teachers take a minute: each seed has its own. CIFAR's takes longer: one serves all seeds.
    taught = seed if args.data == "digits" else 0
    common = ["--data", args.data, "--data-dir", args.data_dir, "--workers", str(args.workers),
              "--holdout", str(args.holdout), *args.extra.split()]  # fmt: skip
    root = Path(args.runs) / args.data
    teacher = f"teacher s{taught}"
    jobs = {teacher: Job("pretrain", [*common, "--seed", str(taught), "--out", str(root / teacher)], root / teacher)}
    for row in rows:
        script, source = ROWS[row]
        after = {"pre-trained": teacher, "fine-tuning": f"fine-tuning s{seed}"}.get(source)
        name = f"{row}{label} s{seed}"
        argv = [*common, "--seed", str(seed), "--out", str(root / name), *CHOSEN.get(args.data, {}).get(row, []), *more]
        argv += ["--teacher", str(root / after / "model.pt") if after else source]
        if row == "fine-tuning again":
            argv[argv.index("--seed") + 1 : argv.index("--seed") + 2] = [str(seed + 1000), "--subset-seed", str(seed)]
        if epochs:
            argv += ["--epochs", str(epochs)]
        jobs[name] = Job(script, argv, root / name, (after,) if after else ())
    return jobs


def summary(values: list[float]) -> dict:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None, "values": values}


def record(args, runner: Runner, **found) -> dict:
    """What every results file says of how it came about."""
    device = f"CPU, {os.cpu_count()} cores ({platform.machine()})"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {"command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": runner.commit,
            "device": device, "torch": torch.__version__, "runs": runner.runs, "runs_at_a_time": runner.workers,
            "training_minutes": round(runner.seconds / 60, 1), "data": args.data} | found  # fmt: skip


def table(args, runner: Runner) -> dict:
    seeds = range(args.seeds)
    jobs, lengths = {}, LENGTHS.get(args.data, ())
    for seed in seeds:
        jobs |= jobs_of_seed(seed, args)
        for epochs in lengths:
            jobs |= jobs_of_seed(seed, args, MAIN, epochs, label=f", {epochs} epochs")
    results = runner.run(jobs)

    rows = {row: summary([results[f"{row} s{seed}"]["test_top1"] for seed in seeds]) for row in ROWS}
    for row in rows:
        rows[row]["seconds"] = summary([results[f"{row} s{seed}"]["seconds"] for seed in seeds])["mean"]
    same = ["--data", args.data, "--data-dir", args.data_dir, "--workers", str(args.workers)]
    for row, members in ENSEMBLES.items():
        paths = [[str(jobs[f"{member} s{seed}"].out / "model.pt") for member in members] for seed in seeds]
        rows[row] = summary([ensemble.evaluate(pair, ensemble.options([*pair, *same]))["ensemble_top1"] for pair in paths])
    del rows["fine-tuning again"]
    likeness = {row: like_teacher(row, args, jobs, same) for row in MAIN}
    usual = finetune.options(["--data", args.data, *args.extra.split()]).epochs
    by_length = {epochs: {row: summary([results[f"{row}, {epochs} epochs s{seed}"]["test_top1"] for seed in seeds])
                          for row in MAIN} for epochs in lengths}  # fmt: skip
    by_length[usual] = {row: rows[row] for row in MAIN}
    teachers = [r["seconds"] for name, r in results.items() if name.startswith("teacher")]
    return record(args, runner, seeds=list(seeds), measure="test top-1, %", rows=rows,
                  teacher_seconds=statistics.mean(teachers), likeness_to_teacher=likeness,
                  lengths=dict(sorted(by_length.items())) if lengths else {})  # fmt: skip


def like_teacher(row: str, args, jobs: dict[str, Job], same: list[str]) -> dict[str, list[dict]]:
    """Layer by layer: divergence of a row's maps from the teacher's (nats), and CKA of its features with the teacher's."""
    found = []
    for seed in range(args.seeds):
        job = jobs[f"{row} s{seed}"]
        teacher = job.after[0] if job.after else jobs[f"fine-tuning s{seed}"].after[0]
        options = analysis.options([str(jobs[teacher].out / "model.pt"), str(job.out / "model.pt"), *same, "--images", "500"])
        a, b, patch, images = analysis.open_pair(options)
        found.append(analysis.compare(a, b, analysis.batches(images, options), patch))
    layers = range(len(found[0]["layers"]))
    return {"divergence": [summary([one["layers"][i]["divergence"] for one in found]) for i in layers],
            "cka": [summary([one["cka"][i][i] for one in found]) for i in layers]}  # fmt: skip


def tune(args, runner: Runner) -> dict:
    """Validation accuracy of each row for each rate, then for each setting of its own, with seeds 100, 101, ..."""
    seeds, tried = range(100, 100 + args.seeds), {row: {} for row in TUNING}
    if args.data != "digits" and not args.holdout:
        raise ValueError("--tune chooses on validation images: hold some out of the training images with --holdout 5000")

    def attempt(settings: dict[str, list[dict]]) -> None:
        jobs, names = {}, {}
        for row, choices in settings.items():
            for choice in choices:
                words = " ".join(f"{k} {v}" for k, v in choice.items())
                more = [word for k, v in choice.items() for word in (f"--{k}", str(v))]
                for seed in seeds:
                    jobs |= jobs_of_seed(seed, args, [row], more=more, label=f", {words}")
                names[row, words] = [f"{row}, {words} s{seed}" for seed in seeds]
        results = runner.run(jobs)
        for (row, words), runs in names.items():
            tried[row][words] = summary([results[name].get("val_top1_ema", results[name]["val_top1"]) for name in runs])

    def best(row: str) -> str:
        return max(tried[row], key=lambda words: tried[row][words]["mean"])

    attempt({row: [{"lr": rate, option: values[0]} for rate in RATES] for row, (option, values) in TUNING.items()})
    rates = {row: best(row).split()[1] for row in TUNING}
    attempt({row: [{"lr": rates[row], option: value} for value in values[1:]] for row, (option, values) in TUNING.items()})
    return record(args, runner, seeds=list(seeds), measure="validation top-1, %", tried=tried,
                  chosen={row: best(row) for row in TUNING})  # fmt: skip


def cell(found: dict) -> str:
    return f"{found['mean']:.1f}" + (f" ± {found['std']:.1f}" if found["std"] is not None else "")


def show(result: dict) -> None:
    print(f"\n{result['measure']}, {result['data']}, mean ± deviation over {len(result['seeds'])} seed(s)")
    for row, found in result["rows"].items():
        print(f"  {row:<38} {cell(found):>12}")
    for epochs, rows in result["lengths"].items():
        print(f"  {epochs} epochs: " + ", ".join(f"{row} {cell(found)}" for row, found in rows.items()))


def chart(result: dict, path: Path) -> None:
    """The table as bars; and for the main rows, layer by layer, how far maps and features are from the teacher's."""
    import matplotlib.pyplot as plt

    figure, (bars, *others) = analysis.figure(1, 3, width=13.5, height=3.6, width_ratios=(4, 3, 3))
    for y, (row, found) in enumerate(result["rows"].items()):
        colour = analysis.COLOURS.get(row, analysis.COLOURS["ensemble"] if "+" in row else "#DDDDDD")
        bars.barh(y, found["mean"], xerr=found["std"] or 0, color=colour, ecolor="#333333", capsize=2)
        bars.text(1, y, f" {cell(found)}", va="center", color="white" if row in MAIN[2:] else "black")
    bars.set_yticks(range(len(result["rows"])), result["rows"])
    bars.invert_yaxis()
    bars.set(xlabel="test accuracy (top-1, %)", xlim=(0, 100), title="What is transferred, and how well it works")
    bars.spines[["top", "right"]].set_visible(False)
    panels = (("divergence", "divergence from the teacher's (nats)", "Distance of maps"),
              ("cka", "CKA with the teacher's", "Likeness of features"))  # fmt: skip
    for axis, (what, label, title) in zip(others, panels, strict=True):
        series = {row: [x["mean"] for x in found[what]] for row, found in result["likeness_to_teacher"].items()}
        analysis.lines(axis, series, label, title)
    others[1].set_ylim(0, 1.02)
    others[1].get_legend().remove()  # it is that of the panel beside it
    figure.savefig(path, dpi=160)
    plt.close(figure)


def options(argv: list[str]):
    return train.options(__doc__, {}, FLAGS, argv)


def main(args) -> dict:
    if args.seeds < 1:
        raise ValueError("--seeds 0: at least one run of each row is needed")
    runner, results = Runner(args), Path(args.results)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which stops the runs as well
    results.mkdir(parents=True, exist_ok=True)
    if args.tune:
        result = tune(args, runner)
        for row, tried in result["tried"].items():
            print(f"\n{row}: chosen {result['chosen'][row]}")
            for words, found in tried.items():
                print(f"  {words:<32} {cell(found):>12}")
    else:
        result = table(args, runner)
        show(result)
        chart(result, results / f"{args.data}.png")
    path = results / f"{args.data}{'-tuning' if args.tune else ''}.json"
    train.write_text(path, json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {path}")
    return result


if __name__ == "__main__":
    train.run(main, options)
