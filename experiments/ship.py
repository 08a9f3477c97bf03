"""Puts the teachers of the study into weights/, where --teacher auto finds them.

    python -m experiments.ship scenes digits
    python -m experiments.ship cifar10 --data-dir cifar10

The teacher is that of seed 0, trained first if it is not there yet. A JSON file
beside it says which images and net it fits, how it was made, and its checksum.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import checkpoints, launch
from common.settings import parse_settings
from experiments.jobs import ROOT, Runner
from experiments.study import RunSettings, make_planner
from experiments.tables import TABLES

TEACHERS = {name: TABLES[f"{name}-main"] for name in ("digits", "cifar10")}
TEACHERS["scenes"] = TABLES["scenes-pointer"]


@dataclass(frozen=True)
class Settings(RunSettings):
    teachers: tuple[str, ...] = ()


WORDS = ("teachers", "one or more of " + ", ".join(TEACHERS), 0)
parse = partial(parse_settings, __doc__, Settings, {}, positional=WORDS)
FIT = ("data", "model", "patch", "image_size")  # what a run must share with it
OWN = {"digits": ("distractors",), "scenes": ("scene",)}


def ship(name: str, settings: Settings, folder: Path = ROOT / "weights") -> Path:
    """Writes NAME.pt and NAME.json. Returns the path of the first."""
    table = TEACHERS[name]
    (point,) = table.points.values()
    planner = make_planner(table.study, settings)
    ((job, teacher),) = planner.plan_teacher(0, point).items()
    found = Runner(1, "").run({job: teacher})[job]
    config, file = teacher.read_config(), folder / f"{name}.pt"
    facts = {"for": {key: config[key] for key in FIT + OWN.get(name, ())}}
    facts |= {"commit": config["commit"], "command": f"python -m experiments.ship {name}"}
    facts |= {"seconds": found["seconds"], "loss": found["loss"]}
    folder.mkdir(exist_ok=True)
    model = checkpoints.read_file(teacher.out / "model.pt")
    model["settings"] |= {"data_dir": "", "out": ""}  # places on one machine
    checkpoints.save(model, file)
    facts["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    checkpoints.write_text(file.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    return file


def main(settings: Settings) -> None:
    launch.require_one_process()
    if set(settings.teachers) - TEACHERS.keys():
        raise ValueError(f"choose from {', '.join(TEACHERS)}")
    for name in settings.teachers:
        print(f"wrote {ship(name, settings)}")


if __name__ == "__main__":
    launch.run(main, parse)
