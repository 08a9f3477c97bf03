"""Lists public ViTs that can be teachers: python -m teachers [WORD in their names]"""

from common import launch
from teachers.zoo import FAMILIES, MODELS, list_models


def main(word: str = "") -> None:
    if not any(word.lower() in name.lower() for name in MODELS):
        raise ValueError(f"no public ViT has {word} in its name: leave it out, and see all")
    print("name, width x depth, heads, patch and image size in pixels")
    for family in FAMILIES:
        models = [model for model in list_models(family) if word.lower() in model.name.lower()]
        if models:
            hosts = ", ".join(sorted({model.url.split("/")[2] for model in models}))
            print(f"\n{family.title}: adds {family.description}")
            print(f"  licence {family.licence}, files at {hosts}")
        for name, _, dim, depth, heads, patch, size, _ in models:
            print(f"  {name:<43} {dim:>4} x {depth}, {heads:>2} heads, patch {patch:>2}, {size}")


if __name__ == "__main__":
    launch.run(lambda words: main(*[x for x in words if x not in ("-h", "--help")][:1]), list)
