"""Many runs of the scripts: several at a time, each after those it needs, and none twice."""

import launch
from launch import Failed

import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import attention_copy
import attention_distill
import checkpoints
import finetune
import pretrain
import runs
import storage
from experiments import variants
from progress import minutes
from related import (
    activations,
    attndistill,
    dino,
    integrated_gradients,
    linear_attention,
    reminders,
)  # fmt: skip
from settings import FREE, Settings

SCRIPTS = {
    "pretrain": pretrain,
    "finetune": finetune,
    "copy": attention_copy,
    "distill": attention_distill,
    "variants": variants,
    "activations": activations,
    "attndistill": attndistill,
    "dino": dino,
    "integrated_gradients": integrated_gradients,
    "linear_attention": linear_attention,
    "reminders": reminders,
}
ROOT = Path(__file__).parent.parent
# Imports take as long as a tenth of a run on the digits: they are done once.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__])


def work(script: str, argv: list[str], output: Path) -> None:
    """In a process of its own: what the script does when it is called with these arguments."""
    threading.Thread(target=leave_with_parent, daemon=True).start()
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [script, *argv]
    launch.run(SCRIPTS[script].main, SCRIPTS[script].parse)


def leave_with_parent() -> None:
    """Saves and leaves when the process that wants the result is gone, however it went."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class Job:
    script: str
    argv: list[str]
    out: Path
    after: tuple[str, ...] = ()  # names of jobs whose models it needs

    def result(self) -> dict | None:
        """The last row of its log, if it is finished and was run with these very settings."""
        try:
            if not (self.out / "model.pt").exists() or not self.begun():
                return None
            return json.loads((self.out / "log.jsonl").read_text().splitlines()[-1])
        except (OSError, IndexError, ValueError):
            return None

    def correct(self) -> np.ndarray:
        """Of a finished run: whether it classified each test image rightly, (images,)."""
        found = storage.read(self.out / "test.pt")
        return (found["predicted"] == found["labels"]).numpy()

    def begun(self) -> bool:
        """Whether its folder holds a run, finished or not, with these very settings."""
        try:
            settings = dict(json.loads((self.out / "config.json").read_text()))
            before = dict(settings["run"])
        except (OSError, ValueError, TypeError, LookupError):
            return False
        asked, weights = vars(self.settings()), None
        counts, teacher = asked.keys() - (FREE - {"teacher"}), Path(asked.get("teacher", ""))
        if teacher.is_file():  # wherever it is, and whichever it is by now
            counts = counts - {"teacher"}
            try:
                weights = checkpoints.read(teacher).fingerprint
            except ValueError:  # it is no ViT
                weights = checkpoints.fingerprint(storage.read(teacher)["model"])
        if before.get("teacher_weights") != weights:
            return False
        # A setting that is newer than a run was then as it is by default.
        usual = vars(SCRIPTS[self.script].parse(["--data", asked["data"]]))
        return all(settings.get(k, usual[k]) == asked[k] for k in counts)

    def settings(self) -> Settings:
        return SCRIPTS[self.script].parse(self.argv)

    def commit(self) -> str:
        return json.loads((self.out / "config.json").read_text())["commit"]


def depth(job: Job, jobs: dict[str, Job]) -> int:
    """How many jobs, one after the other, must be done before a job."""
    return max((1 + depth(jobs[name], jobs) for name in job.after), default=0)


def in_order(jobs: dict[str, Job]) -> list[tuple[str, Job]]:
    """Those that need none first, or threads would wait where others could train.

    Of these those that others need.
    """
    needed = {name for job in jobs.values() for name in job.after}
    return sorted(jobs.items(), key=lambda item: (depth(item[1], jobs), item[0] not in needed))


Made = dict[str, dict[str, list[Job]]]  # point: row: its runs, one for each seed


class Runner:
    """Runs jobs, `workers` at a time, until `limit` minutes have passed (0: no limit)."""

    def __init__(self, workers: int, limit: float, score: str):
        on_gpu = torch.accelerator.is_available()
        self.workers = workers or (1 if on_gpu else os.cpu_count() or 1)
        self.deadline = time.time() + 60 * limit if limit else None
        self.score = score  # what to print of each result
        self.running: set[multiprocessing.Process] = set()
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # which the processes inherit
        self.commits: set[str] = set()
        self.seconds: dict[Path, float] = {}  # of training, of each run

    def run(self, jobs: dict[str, Job]) -> dict[str, dict]:
        """The results of all jobs by name. Failed if one of them fails, or if time is up."""
        for job in jobs.values():
            job.settings()  # what cannot be asked for is found before anything is trained
        self.done, self.total = 0, len(jobs)
        print(f"{self.total} runs, {self.workers} at a time", flush=True)
        with ThreadPoolExecutor(self.workers) as pool:
            futures: dict[str, Future] = {}
            try:
                for name, job in in_order(jobs):
                    needed = [futures[other] for other in job.after]
                    futures[name] = pool.submit(self.one, name, job, needed)
                return {name: future.result() for name, future in futures.items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.running):
                    process.terminate()  # it saves and leaves
                raise

    def one(self, name: str, job: Job, needed: list[Future]) -> dict:
        for future in needed:
            future.result()
        result, note = job.result(), "done before"
        if result is None:
            self.process(name, job)
            result = job.result()
            note = f"{minutes(result['seconds'])} of training"
        self.done += 1
        self.seconds[job.out] = result["seconds"]
        self.commits.add(job.commit())
        score = f"{result[self.score]:6.2f} %" if self.score in result else " " * 8
        print(f"{self.done:>3}/{self.total}  {score}  {name:<40} {note}", flush=True)
        return result

    def process(self, name: str, job: Job) -> None:
        """Runs a job as a process, from where it was if it was begun. Failed if it fails."""
        job.out.mkdir(parents=True, exist_ok=True)
        again = "--resume" if job.begun() else "--overwrite"
        output = job.out / "output.txt"
        process = FORKED.Process(target=work, args=(job.script, [*job.argv, again], output))
        process.start()
        self.running.add(process)
        process.join(max(0.1, self.deadline - time.time()) if self.deadline else None)
        late = process.is_alive()
        if late:
            process.terminate()
            process.join()
        self.running.discard(process)
        if late:
            raise Failed("time is up; the same command goes on where it was")
        if process.exitcode:
            last = output.read_text().strip().splitlines()[-1:]
            raise Failed(f"{name} failed: {' '.join(last)} (see {output})")

    def record(self, name: str, extra: str, found: dict) -> dict:
        """What every results file says of how it came about, and what was found."""
        asked = f"{name} --seeds {len(found['seeds'])}"
        asked += f" --extra {shlex.quote(extra)}" if extra else ""
        device = f"CPU, {os.cpu_count()} cores"
        if torch.cuda.is_available():
            device = torch.cuda.get_device_name()
        about = {
            "command": f"python -m experiments.reproduce {asked}",
            "commit": runs.commit(),  # that they were read at
            "commits": sorted(self.commits),  # that the runs were made at
            "device": device,
            "torch": torch.__version__,
            "runs": len(self.seconds),
            "runs_at_a_time": self.workers,
            "training_minutes": round(sum(self.seconds.values()) / 60, 1),
        }
        return about | found
