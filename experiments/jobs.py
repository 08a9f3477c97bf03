"""Many runs of the scripts: several at a time, each after those it needs, and none twice."""

from launch import Failed

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import attention_copy
import attention_distill
import finetune
import pretrain
import runs
from progress import minutes
from settings import FREE

SCRIPTS = {
    "pretrain": pretrain,
    "finetune": finetune,
    "copy": attention_copy,
    "distill": attention_distill,
}
ROOT = Path(__file__).parent.parent


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
        except (OSError, IndexError):
            return None

    def begun(self) -> bool:
        """Whether its folder holds a run, finished or not, with these very settings."""
        try:
            settings = json.loads((self.out / "config.json").read_text())
        except (OSError, ValueError):
            return False
        asked = vars(SCRIPTS[self.script].parse(self.argv))
        return all(settings.get(k) == v for k, v in asked.items() if k not in FREE - {"teacher"})


class Runner:
    """Runs jobs, `workers` at a time, for at most so many minutes (0: no limit)."""

    def __init__(self, workers: int, limit: float, score: str):
        on_gpu = torch.accelerator.is_available()
        self.workers = workers or (1 if on_gpu else os.cpu_count() or 1)
        self.deadline = time.time() + 60 * limit if limit else None
        self.score = score  # what to print of each result
        self.running: set[subprocess.Popen] = set()
        self.commit, self.runs, self.seconds = runs.commit(), 0, 0.0

    def run(self, jobs: dict[str, Job]) -> dict[str, dict]:
        """The results of all jobs by name. Failed if one of them fails, or if time is up."""
        self.done, self.total = 0, len(jobs)
        print(f"{self.total} runs, {self.workers} at a time", flush=True)
        with ThreadPoolExecutor(self.workers) as pool:
            futures: dict[str, Future] = {}
            try:
                # Each job stands behind those it needs, so that no thread waits in vain.
                for name, job in jobs.items():
                    needed = [futures[other] for other in job.after]
                    futures[name] = pool.submit(self.one, name, job, needed)
                return {name: future.result() for name, future in futures.items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.running):
                    process.send_signal(signal.SIGTERM)  # it saves and leaves
                raise

    def one(self, name: str, job: Job, needed: list[Future]) -> dict:
        for future in needed:
            future.result()
        result, note = job.result(), "done before"
        if result is None:
            self.process(name, job)
            result = job.result()
            note = f"{minutes(result['seconds'])} of training"
        self.done, self.runs = self.done + 1, self.runs + 1
        self.seconds += result["seconds"]
        score = f"{result[self.score]:6.2f} %" if self.score in result else " " * 8
        print(f"{self.done:>3}/{self.total}  {score}  {name:<40} {note}", flush=True)
        return result

    def process(self, name: str, job: Job) -> None:
        """Runs a job as a process, from where it was if it was begun. Failed if it fails."""
        job.out.mkdir(parents=True, exist_ok=True)
        script = ROOT / f"{SCRIPTS[job.script].__name__}.py"
        again = "--resume" if job.begun() else "--overwrite"
        command = [sys.executable, str(script), *job.argv, again]
        threads = str(max(1, (os.cpu_count() or 1) // self.workers))
        environment = {"OMP_NUM_THREADS": threads} | os.environ
        output = job.out / "output.txt"
        with open(output, "w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
        self.running.add(process)
        try:
            process.wait(max(0.1, self.deadline - time.time()) if self.deadline else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise Failed("time is up; the same command goes on where it was") from None
        finally:
            self.running.discard(process)
        if process.returncode:
            last = output.read_text().strip().splitlines()[-1:]
            raise Failed(f"{name} failed: {' '.join(last)} (see {output})")

    def record(self, **found) -> dict:
        """What every results file says of how it came about, and what was found."""
        device = f"CPU, {os.cpu_count()} cores"
        if torch.cuda.is_available():
            device = torch.cuda.get_device_name()
        about = {
            "command": " ".join(["python", "-m", "experiments.reproduce", *sys.argv[1:]]),
            "commit": self.commit,
            "device": device,
            "torch": torch.__version__,
            "runs": self.runs,
            "runs_at_a_time": self.workers,
            "training_minutes": round(self.seconds / 60, 1),
        }
        return about | found
