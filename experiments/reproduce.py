"""Every row of the results table, with one command.

    python -m experiments.reproduce                     the digits' table
    python -m experiments.reproduce --tune --seeds 2    how recipes were chosen
    python -m experiments.reproduce --data cifar10 --data-dir cifar10

Writes results/DATA.json and .png, or results/DATA-tuning.json. Every row has
the same labels, epochs, batch and augmentation; only the rate (and what a
method has of its own) is its own, chosen on the validation images, with seeds
that the table does not use. Killed at any moment, the same command goes on
where it was.
"""

import launch

import json
import signal
import statistics
import sys
from functools import partial
from pathlib import Path

import ensemble
import finetune
import pictures
import storage
from experiments import analysis, figures
from experiments.figures import cell
from experiments.jobs import Job, Runner
from progress import validation
from settings import Setting, Settings, parse_settings, pick, to_argv

SETTINGS = pick("data", "data_dir", "scraps", "workers", "holdout") | {
    "seeds": Setting(3, "runs of each row, with seeds 0, 1, ...", low=1),
    "tune": Setting(False, "try rates on the validation images instead"),
    "jobs": Setting(0, "runs at a time (0: one per CPU core, or one on a GPU)"),
    "minutes": Setting(0.0, "stop after so long; the same command goes on (0: no limit)"),
    "runs": Setting("runs/reproduce", "where the runs go"),
    "results": Setting("results", "where the table goes"),
    "extra": Setting("", "more arguments for every training, such as '--device cpu'"),
}
parse = partial(parse_settings, __doc__, SETTINGS)

ROWS = {  # row: script, its teacher
    "from scratch": ("finetune", "none"),
    "attention copy": ("copy", "pre-trained"),
    "attention distillation": ("distill", "pre-trained"),
    "fine-tuning": ("finetune", "pre-trained"),
    "copy, random teacher": ("copy", "random"),
    "distillation, random teacher": ("distill", "random"),
    "copy, fine-tuned teacher": ("copy", "fine-tuning"),
    "fine-tuning again": ("finetune", "pre-trained"),  # in another order, for the ensemble
}
MAIN = list(ROWS)[:4]
ENSEMBLES = {
    "ensemble: fine-tuning + distillation": ("fine-tuning", "attention distillation"),
    "ensemble: fine-tuning twice": ("fine-tuning", "fine-tuning again"),
}
CHOSEN = {  # what --tune chose for rows whose recipe does not stand in their script
    "digits": {
        "copy, random teacher": ["--lr", "0.004", "--layers", "2"],
        "distillation, random teacher": ["--lr", "0.004", "--layers", "2"],
    },
}
LENGTHS = {"digits": (150, 900)}  # epochs at which the main rows are trained as well
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
TUNING = {  # what --tune tries for each row: the rates, then, at the best, something of its own
    "from scratch": ("weight-decay", (0.05, 0.2, 0.5)),
    "attention copy": ("layers", ("all", "3", "2")),
    "attention distillation": ("layers", ("3", "all", "2")),
    "fine-tuning": ("layer-decay", (1.0, 0.75, 0.5)),
    "copy, random teacher": ("layers", ("all", "3", "2")),
    "distillation, random teacher": ("layers", ("3", "all", "2")),
}


def jobs_of_seed(
    seed: int, settings: Settings, rows=tuple(ROWS), epochs: int = 0, more=(), label: str = ""
) -> dict[str, Job]:
    """The jobs of some rows for one seed, with the teachers they need, by name."""
    # The digits' teachers take a minute: each seed has its own. CIFAR's takes longer.
    taught = seed if settings.data == "digits" else 0
    common = [*images_of(settings), "--holdout", str(settings.holdout), *settings.extra.split()]
    root = Path(settings.runs) / settings.data
    teacher = f"teacher s{taught}"
    argv = [*common, "--seed", str(taught), "--out", str(root / teacher)]
    jobs = {teacher: Job("pretrain", argv, root / teacher)}
    for row in rows:
        script, source = ROWS[row]
        after = {"pre-trained": teacher, "fine-tuning": f"fine-tuning s{seed}"}.get(source)
        name = f"{row}{label} s{seed}"
        own = {"out": root / name, "teacher": root / after / "model.pt" if after else source}
        argv = [
            *common,
            *to_argv(own | {"seed": seed}),
            *CHOSEN.get(settings.data, {}).get(row, []),
            *more,
        ]
        if row == "fine-tuning again":
            argv += ["--seed", str(seed + 1000), "--subset-seed", str(seed)]
        if epochs:
            argv += ["--epochs", str(epochs)]
        jobs[name] = Job(script, argv, root / name, (after,) if after else ())
    return jobs


def images_of(settings: Settings) -> list[str]:
    """The arguments that say which images, for any script."""
    names = ("data", "data_dir", "scraps", "workers")
    return to_argv({name: getattr(settings, name) for name in names})


def summary(values: list[float]) -> dict:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": deviation, "values": values}


# The table --------------------------------------------------------------------------------------


def table(settings: Settings, runner: Runner) -> dict:
    seeds, lengths = range(settings.seeds), LENGTHS.get(settings.data, ())
    jobs = {}
    for seed in seeds:
        jobs |= jobs_of_seed(seed, settings)
        for epochs in lengths:
            jobs |= jobs_of_seed(seed, settings, MAIN, epochs, label=f", {epochs} epochs")
    results = runner.run(jobs)

    def of_row(row: str, what: str = "test_top1") -> dict:
        return summary([results[f"{row} s{seed}"][what] for seed in seeds])

    rows = {row: of_row(row) | {"seconds": of_row(row, "seconds")["mean"]} for row in ROWS}
    for row, members in ENSEMBLES.items():
        teams = [[jobs[f"{member} s{seed}"] for member in members] for seed in seeds]
        rows[row] = summary([together(team, settings) for team in teams])
    del rows["fine-tuning again"]
    usual = finetune.parse(["--data", settings.data, *settings.extra.split()]).epochs
    by_length = {
        epochs: {row: of_row(f"{row}, {epochs} epochs") for row in MAIN} for epochs in lengths
    }
    by_length[usual] = {row: rows[row] for row in MAIN}
    teachers = [r["seconds"] for name, r in results.items() if name.startswith("teacher")]
    return runner.record(
        data=settings.data,
        seeds=list(seeds),
        measure="test top-1, %",
        rows=rows,
        teacher_seconds=statistics.mean(teachers),
        likeness_to_teacher={row: like_teacher(row, settings, jobs) for row in MAIN},
        lengths=dict(sorted(by_length.items())) if lengths else {},
    )


def together(team: list[Job], settings: Settings) -> float:
    """Test top-1 of the averaged probabilities of some runs."""
    paths = [str(job.out / "model.pt") for job in team]
    return ensemble.evaluate(paths, ensemble.parse([*paths, *images_of(settings)]))["ensemble_top1"]


def like_teacher(row: str, settings: Settings, jobs: dict[str, Job]) -> dict[str, list[dict]]:
    """Layer by layer, against the teacher: divergence of the maps (nats), CKA of the features."""
    found = []
    for seed in range(settings.seeds):
        job = jobs[f"{row} s{seed}"]
        teacher = job.after[0] if job.after else jobs[f"fine-tuning s{seed}"].after[0]
        pair = [str(jobs[teacher].out / "model.pt"), str(job.out / "model.pt")]
        asked = analysis.parse([*pair, *images_of(settings), "--images", "500"])
        a, b, images = analysis.open_pair(asked)
        patch = a.net.architecture["patch"]
        found.append(analysis.compare(a, b, analysis.first_images(images, asked), patch))
    layers = range(len(found[0]["layers"]))
    return {
        "divergence": [summary([one["layers"][i]["divergence"] for one in found]) for i in layers],
        "cka": [summary([one["cka"][i][i] for one in found]) for i in layers],
    }


def show(result: dict) -> None:
    print(
        f"\n{result['measure']}, {result['data']}, "
        f"mean ± deviation over {len(result['seeds'])} seed(s)"
    )
    for row, found in result["rows"].items():
        print(f"  {row:<38} {cell(found):>12}")
    for epochs, rows in result["lengths"].items():
        print(
            f"  {epochs} epochs: "
            + ", ".join(f"{row} {cell(found)}" for row, found in rows.items())
        )


# Tuning -----------------------------------------------------------------------------------------


def tune(settings: Settings, runner: Runner) -> dict:
    """Validation accuracy of each row for each rate, then for each setting of its own."""
    if settings.data != "digits" and not settings.holdout:
        raise ValueError(
            "--tune chooses on validation images: "
            "hold some out of the training images with --holdout 5000"
        )
    seeds = range(100, 100 + settings.seeds)
    rates = {
        row: [{"lr": rate, name: values[0]} for rate in RATES]
        for row, (name, values) in TUNING.items()
    }
    tried = attempt(rates, settings, runner, seeds)
    own = {}
    for row, (name, values) in TUNING.items():
        rate = best(tried[row]).split()[1]
        own[row] = [{"lr": rate, name: value} for value in values[1:]]
    for row, found in attempt(own, settings, runner, seeds).items():
        tried[row] |= found
    return runner.record(
        data=settings.data,
        seeds=list(seeds),
        measure="validation top-1, %",
        tried=tried,
        chosen={row: best(found) for row, found in tried.items()},
    )


def attempt(
    choices: dict[str, list[dict]], settings: Settings, runner: Runner, seeds: range
) -> dict[str, dict]:
    """Validation accuracy of each row for each of its choices, all seeds."""
    jobs, names = {}, {}
    for row, flags in ((row, flags) for row, options in choices.items() for flags in options):
        words = " ".join(f"{k} {v}" for k, v in flags.items())
        more = to_argv(flags)
        for seed in seeds:
            jobs |= jobs_of_seed(seed, settings, [row], more=more, label=f", {words}")
        names[row, words] = [f"{row}, {words} s{seed}" for seed in seeds]
    results, found = runner.run(jobs), {row: {} for row in choices}
    for (row, words), runs in names.items():
        found[row][words] = summary([validation(results[run]) for run in runs])
    return found


def best(tried: dict[str, dict]) -> str:
    return max(tried, key=lambda words: tried[words]["mean"])


def show_tuning(result: dict) -> None:
    for row, tried in result["tried"].items():
        print(f"\n{row}: chosen {result['chosen'][row]}")
        for words, found in tried.items():
            print(f"  {words:<32} {cell(found):>12}")


def main(settings: Settings) -> dict:
    launch.one_process()
    runner = Runner(settings.jobs, settings.minutes, "val_top1" if settings.tune else "test_top1")
    results = Path(settings.results)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which stops the runs as well
    results.mkdir(parents=True, exist_ok=True)
    if settings.tune:
        result, name = tune(settings, runner), f"{settings.data}-tuning"
        show_tuning(result)
    else:
        result, name = table(settings, runner), settings.data
        show(result)
        pictures.save(figures.table(result), results / f"{name}.png")
    path = results / f"{name}.json"
    storage.write_text(path, json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {path}")
    return result


if __name__ == "__main__":
    launch.run(main, parse)
