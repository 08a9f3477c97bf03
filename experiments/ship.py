"""Puts the teachers of the study into weights/, where --teacher auto finds them.

    python -m experiments.ship digits
    python -m experiments.ship cifar10 --data-dir cifar10

The teacher is that of seed 0, trained first if it is not there yet. Beside each
file, in JSON: for which images and net it is, how it was made, its checksum.
"""

import launch

import hashlib
import json
import shlex
from functools import partial
from pathlib import Path

import storage
from experiments.jobs import Runner
from experiments.reproduce import SETTINGS, runs_of
from experiments.tables import TABLES
from settings import Settings, parse_settings
from teachers import SHIPPED

TEACHERS = {"digits": TABLES["digits-main"], "cifar10": TABLES["cifar10-main"]}
parse = partial(
    parse_settings,
    __doc__,
    {name: SETTINGS[name] for name in ("jobs", "data_dir", "runs", "extra")},
    positional=("teachers", "one or more of " + ", ".join(TEACHERS)),
)
# What a run must have in common with it.
FOR = ("data", "model", "patch", "components", "image_size", "scraps")


def ship(name: str, settings: Settings, folder: Path = SHIPPED) -> Path:
    """Writes NAME.pt and NAME.json, and returns the path of the first."""
    table = TEACHERS[name]
    (point,) = table.points.values()
    runs = runs_of(table.study, settings)
    ((job, made),) = runs.pretraining(0, point).items()
    found = Runner(1, 0, "").run({job: made})[job]
    asked, file = made.settings(), folder / f"{name}.pt"
    public = runs._replace(folder=Path("runs"), extra=tuple(settings.extra.split()))
    ((_, plain),) = public.pretraining(0, point).items()
    facts = {
        "for": {key: getattr(asked, key) for key in FOR if key != "scraps" or name == "digits"},
        "command": f"python pretrain.py {shlex.join(plain.argv)}",
        "commit": made.commit(),
        "seconds": found["seconds"],
        "pixels": found["pixels"],
    }
    folder.mkdir(exist_ok=True)
    model = storage.read(made.out / "model.pt")
    model["settings"] |= {"data_dir": "", "out": ""}  # which are of one machine
    storage.save(model, file)
    facts["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    storage.write_text(file.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    return file


def main(settings: Settings) -> None:
    launch.one_process()
    for name in settings.teachers:
        if name not in TEACHERS:
            raise ValueError(f"no teacher '{name}': choose from {', '.join(TEACHERS)}")
        print(f"wrote {ship(name, settings)}")


if __name__ == "__main__":
    launch.run(main, parse)
