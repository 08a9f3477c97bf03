"""Many runs of the scripts: several at a time, each after those it needs, and none twice."""

import importlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import checkpoints, launch, runs
from common.launch import Failed
from common.settings import format_flag, get_values

RELATED = "activations attndistill integrated_gradients linear_attention reminders".split()
SCRIPTS = {name: f"related.{name}" for name in RELATED}  # imported when they are needed
SCRIPTS |= {"pretrain": "pretrain", "finetune": "finetune", "variants": "study.variants"}
SCRIPTS |= {"copy": "attention_copy", "distill": "attention_distill"}
ROOT = Path(__file__).parent.parent
# Imports take as long as a tenth of a run on the digits, so they are done once for all processes.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__, SCRIPTS["variants"]])


def load(script: str) -> Any:
    return importlib.import_module(SCRIPTS[script])


def to_argv(values: dict[str, Any]) -> list[str]:
    """The command line that gives these settings."""
    words = []
    for name, value in values.items():
        yes_or_no = format_flag(name) if value is True else format_flag(f"no_{name}")
        words += [yes_or_no] if isinstance(value, bool) else [format_flag(name), str(value)]
    return words


def work(script: str, argv: list[str], output: Path) -> None:
    """Runs a script with these arguments, in a process of its own."""
    leave_with_parent()
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [script, *argv]
    launch.run(load(script).main, load(script).parse)


def leave_with_parent() -> None:
    """From now on: ends when the process that started it has ended, killed or not."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@dataclass
class Job:
    script: str
    argv: list[str]
    out: Path
    after: tuple[str, ...] = ()  # names of all jobs that must be done before

    def get_settings(self) -> Any:
        return load(self.script).parse(self.argv)

    def read_result(self) -> dict | None:
        """The last row of its log, if it has finished with exactly these settings."""
        if not ((self.out / "model.pt").exists() and self.has_begun()):
            return None
        return json.loads((self.out / "log.jsonl").read_text().splitlines()[-1])

    def read_correct(self) -> np.ndarray:
        """Whether the finished run classified each test image correctly, (images,)."""
        tested = checkpoints.read_file(self.out / "test.pt")
        return (tested["predicted"] == tested["labels"]).numpy()

    def read_config(self) -> dict:
        return json.loads((self.out / "config.json").read_text())

    def has_begun(self) -> bool:
        """Whether its folder holds a run, finished or not, with exactly these settings."""
        try:
            config = self.read_config()
            weights_then = config["run"]["teacher_weights"]
        except (OSError, ValueError, LookupError, TypeError):
            return False
        settings = self.get_settings()
        asked, counts = get_values(settings), {*get_values(settings, free=False), "data_dir"}
        if (teacher := Path(asked.get("teacher", ""))).is_file():  # compared by its weights
            if weights_then != checkpoints.fingerprint(checkpoints.read_file(teacher)["model"]):
                return False
        elif "teacher" in asked:
            counts |= {"teacher"}
        return all(config.get(name) == asked.get(name) for name in counts)


class Runner:  # runs jobs, `workers` at a time
    def __init__(self, workers: int, score: str):
        on_gpu = torch.accelerator.is_available()
        self.workers = workers or (1 if on_gpu else os.cpu_count() or 1)
        self.score = score  # what to print of each result
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # which the processes inherit
        self.ran: dict[Path, dict] = {}  # how each run was made, and its seconds of training

    def run(self, jobs: dict[str, Job]) -> dict[str, dict]:
        """The results of all jobs by name. Failed if one of them fails."""
        for job in jobs.values():
            job.get_settings()  # wrong settings are found before anything is trained
        self.done, self.total = 0, len(jobs)
        launch.print0(f"{self.total} runs, {self.workers} at a time")
        with ThreadPoolExecutor(self.workers) as pool:
            futures: dict[str, Future] = {}
            try:
                # Those that wait for none first, or threads would wait where others could train.
                for name, job in sorted(jobs.items(), key=lambda item: len(item[1].after)):
                    needed = [futures[other] for other in job.after]
                    futures[name] = pool.submit(self.run_one, name, job, needed)
                return {name: future.result() for name, future in futures.items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise

    def run_one(self, name: str, job: Job, needed: list[Future]) -> dict:
        for future in needed:
            future.result()
        result, note = job.read_result(), "done before"
        if result is None:
            result = self.start_process(name, job)
            note = f"{result['seconds'] / 60:.1f} min of training"
        self.done += 1
        self.ran[job.out] = job.read_config() | {"seconds": result["seconds"]}
        score = f"{result[self.score]:6.2f} %" if self.score in result else ""
        print(f"{self.done:>3}/{self.total}  {score:8}  {name:<40} {note}", flush=True)
        return result

    def start_process(self, name: str, job: Job) -> dict:
        """Runs a job as a process, and resumes it if it has begun. Failed if it has no result."""
        job.out.mkdir(parents=True, exist_ok=True)
        again = "--resume" if job.has_begun() else "--overwrite"
        output = job.out / "output.txt"
        process = FORKED.Process(target=work, args=(job.script, [*job.argv, again], output))
        process.start()
        process.join()
        if result := job.read_result():  # whatever happened while the process left
            return result
        last = output.read_text().strip().splitlines()[-1:] if output.exists() else []
        raise Failed(f"{name} failed ({process.exitcode}): {' '.join(last)} (see {output})")

    def record(self, name: str, extra: str, found: dict) -> dict:
        """What was found, and how: the contents of a file in results/."""
        command = f"python -m study.reproduce {name} --seeds {len(found['seeds'])}"
        command += f" --extra {shlex.quote(extra)}" if extra else ""
        commits, devices, versions = (
            sorted({run[what] for run in self.ran.values()}) for what in ("commit", "on", "torch")
        )
        about = {"command": command, "commit": runs.read_commit(), "commits": commits}
        about |= {"device": "; ".join(devices), "torch": "; ".join(versions), "runs": len(self.ran)}
        about |= {"runs_at_a_time": self.workers, "threads": os.environ["OMP_NUM_THREADS"]}
        minutes = sum(run["seconds"] for run in self.ran.values()) / 60
        return about | {"training_minutes": round(minutes, 1)} | found
