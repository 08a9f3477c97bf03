"""Settings: a frozen dataclass for each script, with type, default and help side by side.

    @dataclass(frozen=True)
    class Settings(recipes.Settings):
        attention_weight: float = setting(3.0, "weight of the attention loss")

A recipe changes defaults, of all data sets whose name begins with its own. A flag beats both.
"""

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

Recipes = dict[str, dict[str, Any]]  # recipe: setting: default


def setting(default, help="", choices=None, low=0, high=math.inf, free=False, only=""):
    """A field that is also a flag of its default's type. A tuple takes words without a flag.

    Without help it works the same, but --help does not list it. `low`, `high`: bounds of a number,
    or of the number of words. `free`: may change between a run and its --resume.
    `only`: beginnings of the data sets that accept it, as words.
    """
    about = dict(help=help, choices=choices, low=low, high=high, free=free, only=only)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Base:
    given: frozenset = field(default=frozenset(), compare=False, repr=False)  # on the command line
    unused: ClassVar = ()  # names of settings that a script inherits and has no use for: no flags


def list_flags(cls: type[Base]) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in fields(cls) if "help" in f.metadata and f.name not in cls.unused}


def format_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def get_values(settings: Base, free: bool = True) -> dict[str, Any]:
    """All of them. Without the `free` ones: those that shape what is learned."""
    flags = list_flags(type(settings)).items()
    return {k: getattr(settings, k) for k, flag in flags if free or not flag.metadata["free"]}


def merge_recipes(base: Recipes, **changes: dict) -> Recipes:
    return base | {name: base[name] | more for name, more in changes.items()}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (--help lists the settings)")


def parse_settings(doc: str, cls: type, recipes: Recipes | Callable, argv: Sequence[str]) -> Any:
    """The settings of a command line. ValueError names a flag that is unknown or out of bounds.

    `recipes`: may be a function of what is given.
    """
    flags, actions, words = list_flags(cls), dict[str, Any](), list[str]()
    parser = Parser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,  # ours knows the data set
    )
    parser._negative_number_matcher = re.compile(r"-\d")  # as in --layers -6:
    parser.add_argument("--help", "-h", action="store_true", help=argparse.SUPPRESS)
    for name, f in flags.items():
        how: dict[str, Any] = dict(type=type(f.default), metavar="X", choices=f.metadata["choices"])
        if isinstance(f.default, bool):
            how = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(f.default, tuple):
            words.append(name)
            how = dict(nargs="*")
        actions[name] = parser.add_argument(name if name in words else format_flag(name), **how)
    given = vars(parser.parse_intermixed_args(list(argv)))
    data = given.get("data", flags["data"].default if "data" in flags else "")
    known = recipes(given) if callable(recipes) else recipes
    name = max(filter(data.startswith, known), key=len, default="")
    if variant := given.get("recipe"):
        name += f"_{variant}"
        if name not in known:
            raise ValueError(f"--recipe {variant}: there is none for --data {data}")
    recipe = known.get(name, {})
    if given.pop("help", False):
        for name, f in flags.items():
            about, default = f.metadata["help"], recipe.get(name, f.default)
            if f.metadata["only"] and not data.startswith(tuple(f.metadata["only"].split())):
                about = ""
            if about and default not in ("", (), -1, 0):
                about += f" [{default}]"
            actions[name].help = about.replace("%", "%%") or argparse.SUPPRESS
        in_front = "".join(f"{name.upper()} ... " for name in words)
        parser.usage = f"%(prog)s {in_front}[--NAME VALUE ...]"
        if recipe:
            parser.epilog = f"[Defaults] are those of --data {data}. Others: --data NAME --help."
        parser.print_help()
        parser.exit()
    for name in words:
        about = flags[name].metadata
        if not about["low"] <= len(given.get(name, ())) <= about["high"]:
            raise ValueError(f"name {about['help']} (--help shows how)")
    for name, value in given.items():
        low, high = flags[name].metadata["low"], flags[name].metadata["high"]
        if isinstance(value, int | float) and not (low <= value <= high and value < math.inf):
            bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise ValueError(f"{format_flag(name)} {value}: must be {bounds}")
    return cls(**recipe | given, given=frozenset(given))


def parse_layers(text: str, depth: int, name: str = "layers") -> list[int]:
    """Numbers from 0, written as Python slices (`:18`, `-6:`, `3`, `0,2,4:7`), `75%` or `all`."""
    found: list[int] = []
    try:
        spans = ":" if text == "all" else text
        if text.endswith("%"):
            share = int(text[:-1])
            spans = f":{max(int(share > 0), depth * share // 100)}"
        for part in spans.split(","):
            bounds = [int(bound) if bound else None for bound in part.split(":")]
            if max(map(abs, filter(None, bounds)), default=0) > depth:
                raise IndexError
            found += range(depth)[slice(*bounds)] if ":" in part else [range(depth)[int(part)]]
    except (ValueError, TypeError, IndexError):
        found = []
    if not found or found != sorted(set(found)):
        remedy = f"choose some of 0 to {depth - 1}, in order: :18, 6:12, -6:, 0,2,4:7, 75% or all"
        raise ValueError(f"{format_flag(name)} {text}: {remedy}")
    return found
