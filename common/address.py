"""Sets where on GitHub this repository is: in the badges, and in the notebooks.

python -m common.address OWNER/NAME
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import checkpoints, launch
from common.settings import Base, parse_settings

ROOT = Path(__file__).parent.parent
PAGES = "README.md", "tutorial.ipynb", "solutions.ipynb"
# In badges, and where the notebooks set REPOSITORY:
PLACE = re.compile(r'(github(?:\.com)?/)[\w.-]+/[\w.-]+?(?=/actions|/blob/|\\"| attention-)')


@dataclass(frozen=True)
class Settings(Base):
    address: tuple[str, ...] = ()


WORDS = "address", "OWNER/NAME, as in github.com/OWNER/NAME", 1
parse = partial(parse_settings, __doc__, Settings, {}, positional=WORDS)


def parse_address(given: str) -> str:
    found = re.fullmatch(r"(?:.*github\.com[/:])?(\w[\w.-]*/\w[\w.-]*?)(?:\.git)?/?", given)
    if not found:
        raise ValueError(f"'{given}': give OWNER/NAME, or https://github.com/OWNER/NAME")
    return found[1]


def main(settings: Settings) -> None:
    new = parse_address(settings.address[0])
    for page in PAGES:
        text, count = PLACE.subn(rf"\g<1>{new}", (ROOT / page).read_text())
        checkpoints.write_text(ROOT / page, text)
        print(f"{page}: {count} set")


if __name__ == "__main__":
    launch.run(main, parse)
