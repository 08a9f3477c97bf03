"""Shifted test sets: classes by name and by number, and ReaL's labels."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import vit
from common import checkpoints
from datasets import sources
from experiments import shifted_sets
from teachers.load import open_model


def make_imagenets(tmp_path, names, folders):
    """A model of 1000 classes of these names; four images in each of the folders."""
    torch.manual_seed(0)
    net = vit.ViT(vit.Config(16, 4, 3, 1000, dim=16, depth=1, heads=2))
    settings = {"data": "folder", "data_dir": str(tmp_path / "set"), "holdout": 0.0}
    about = {"classes": names, "settings": settings} if names else {"settings": settings}
    torch.save(checkpoints.export(net) | about, tmp_path / "model.pt")
    random = np.random.default_rng(0)
    for number, folder in enumerate(folders):
        (tmp_path / "set" / "val" / folder).mkdir(parents=True)
        for i in range(4):
            pixels = random.integers(0, 256, (20, 20, 3)).astype(np.uint8)
            name = f"ILSVRC2012_val_{4 * number + i + 1:08}.png"
            Image.fromarray(pixels).save(tmp_path / "set" / "val" / folder / name)
    return str(tmp_path / "model.pt"), tmp_path / "set"


def score(path, root):
    settings = shifted_sets.parse([path, "--data", "folder", "--data-dir", str(root)])
    return shifted_sets.score([open_model(path)], settings)


def test_folders_by_number_are_imagenets_classes_in_their_order(tmp_path):
    """ImageNet-V2's 0 to 999 are the sorted WordNet ids, wherever these are among the outputs."""
    wnids = [f"n{7 * i % 1000:08}" for i in range(1000)]  # not in order
    path, root = make_imagenets(tmp_path, wnids, ["n00000000", "n00000010", "n00000999"])
    named, model = score(path, root), open_model(path)
    for number in ("0", "10", "999"):
        (root / "val" / f"n{int(number):08}").rename(root / "val" / number)
    assert score(path, root) == named
    columns = shifted_sets.number_classes(model).checkpoint.classes
    assert all(wnids[columns.index(str(i))] == f"n{i:08}" for i in (0, 10, 999))
    (tmp_path / "others").mkdir()  # a file of others names no classes: ImageNet's, in order
    path, _ = make_imagenets(tmp_path / "others", None, [])
    columns = shifted_sets.number_classes(open_model(path)).checkpoint.classes
    assert columns == [str(i) for i in range(1000)] and score(path, root)["images"] == 12


def test_several_sets_each_with_some_of_the_classes(tmp_path):
    names = [f"n{i:08}" for i in range(1000)]
    path, root = make_imagenets(tmp_path, names, ["n00000001", "n00000005"])
    other = tmp_path / "other"
    other.mkdir()
    (other / "n00000005").symlink_to(root / "val" / "n00000005")
    argv = [path, path, "--workers", "0", "--json", str(tmp_path / "out.json")]
    found = shifted_sets.main(shifted_sets.parse([*argv, "--sets", f"{root},{other}"]))
    assert json.loads((tmp_path / "out.json").read_text())["sets"] == found
    assert found["folder"] == found[str(root)]
    assert found[str(other)] == {"images": 4, "top1": [100.0] * 3}  # of one class alone


def test_reals_labels_are_by_the_number_in_a_files_name(tmp_path):
    source = sources.Tensors(torch.zeros(4, 3, 2, 2), torch.zeros(4))
    source.names = [f"n/ILSVRC2012_val_{number:08}.JPEG" for number in (3, 1, 8, 2)]
    source.files = source
    view, classes = data.Eval(source, "cpu"), [f"n{i:08}" for i in range(1000)]
    images = data.Data(classes, 3, 2, None, test=view)
    p = torch.eye(1000)[[10, 20, 30, 40]]
    real = [[20, 5], [7], [10], [], [], [], [], []]  # right, wrong, right; the 8th has none
    (tmp_path / "real.json").write_text(json.dumps(real))
    found = shifted_sets.compute_real_top1(p, images, str(tmp_path / "real.json"))
    assert found == pytest.approx(100 * 2 / 3)
    names = sorted(shifted_sets.NUMBERS)  # 0, 1, 10, 100, ...
    by_number, columns = images._replace(classes=names), [int(name) for name in names]
    again = shifted_sets.compute_real_top1(p[:, columns], by_number, str(tmp_path / "real.json"))
    assert again == found
    source.names = ["n/photo.jpg"] * 4
    with pytest.raises(ValueError, match="by their names"):
        shifted_sets.compute_real_top1(p, images, str(tmp_path / "real.json"))
