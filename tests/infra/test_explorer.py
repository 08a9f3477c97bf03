"""The page that moves: what it computes and shows, against PyTorch with the same weights."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from torch.testing import assert_close

import data
import finetune
from datasets import digits, scenes
from gallery import draw, explorer
from teachers.load import Model, build
from vit import Config

PAGE = Path(draw.__file__).with_name("explorer.html")
BROWSERS = "chromium", "chromium-browser", "google-chrome"
RUN = """.map(scene => ({pixels: [...draw(scene)], nets: runAll(nets, draw(scene))}))"""
CLICK = """[
  () => all(".scene .cell")[7].click(),
  () => all(".map .cells > div")[9 + 2].click(),
  () => document.querySelector("[name=layer][value='2']").click(),
  () => document.querySelector("[name=head][value='1']").click(),
].map(act => {
  act();
  const [said, light] = [".verdict", ".map span"].map(name => all(name).map(x => x.textContent));
  return {asked: scene.asked, view: {...view}, pixels: [...draw(scene)], said, light};
})"""


def read(page: Path = PAGE) -> dict:
    return json.loads(re.search('id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def open_nets(page: Path = PAGE) -> list[Model]:
    """The page's nets in PyTorch, unpacked as the page says."""
    nets = []
    for about in read(page)["nets"]:
        raw, weights = base64.b64decode(about["weights"]), {}
        for name, rows, *columns in about["tensors"]:
            value, raw = np.frombuffer(raw, "<f4", rows), raw[4 * rows :]
            if columns:
                numbers, raw = np.frombuffer(raw, "i1", rows * columns[0]), raw[rows * columns[0] :]
                value = value[:, None] * numbers.reshape(rows, -1).astype("f4")
            weights[name] = torch.tensor(value)
        size = {name: about[name] for name in ("dim", "depth", "heads", "eps")}
        size |= {name: (about[name],) for name in ("mean", "std")}
        config = Config(24, about["patch"], 1, len(weights["head.bias"]), **size)
        model = Model(build(config).eval().requires_grad_(False), layers=about["layers"])
        for name, value in model.net.state_dict().items():
            kept = value.flatten()[-weights[name].numel() :]  # no queries and keys if it copies
            kept.copy_(weights[name].flatten())
        model.teacher = nets[0].net if model.layers else None
        nets.append(model)
    return nets


def predict(pixels: list):
    """Of PyTorch, for each net: logits, and maps (layers, scenes, heads, queries, keys)."""
    images = torch.tensor(pixels).view(-1, 1, 24, 24)
    for model in open_nets():
        yield model(images), torch.stack([qk.map() for _, qk in model.blockwise(images)])


def execute(where: str, expression: str):
    """The value of JavaScript under node, or in a browser that has opened the page."""
    names = BROWSERS if where == "browser" else [where]
    if not (program := next(filter(None, map(shutil.which, names)), None)):
        pytest.skip(f"{where} is not installed here")
    text, code = PAGE.read_text(), f"JSON.stringify({expression})"
    if where == "node":
        nets = re.search('<script id="nets">(.*?)</script>', text, re.DOTALL)[1]
        code = f"{nets}; const nets = {json.dumps(read()['nets'])}.map(decode); {code}"
        argv, shown = [program, "-p", "eval(fs.readFileSync(0, 'utf8'))"], "(.*)"
    else:
        code = f"const all = name => [...document.querySelectorAll(name)]; const said = {code}"
        code = f"<script>{{ {code}; document.body.textContent = said }}</script></html>"
        Path("page.html").write_text(text.replace("</html>", code))
        argv = [program, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        argv, shown = [*argv, f"--user-data-dir={Path.cwd()}", "page.html"], "<body>(.*)</body>"
    run = subprocess.run(argv, input=code, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(re.search(shown, run.stdout, re.DOTALL)[1])


@pytest.mark.parametrize("where", ["node", pytest.param("browser", marks=pytest.mark.slow)])
def test_javascript_draws_and_computes_what_python_does(where):
    """Twenty scenes of test digits: their pixels, and all nets' logits and maps."""
    names, texts = zip(*read()["digits"], strict=True)
    drawn = torch.tensor([[int(c, 17) / 16 for c in text] for text in texts])
    images, labels = digits.read_parts("cpu")["test"]
    which = torch.cdist(drawn, images.flatten(1)).argmin(dim=1)
    assert torch.equal(images[which], drawn.view(-1, 8, 8))
    assert labels[which].tolist() == [int(name) for name in names]

    rng = np.random.default_rng(0)
    chosen, noise = rng.integers(len(texts), size=(20, 9)), rng.random((20, 24 * 24))
    asked = rng.choice([i for i in range(9) if i != 4], 20)
    cells = drawn[torch.tensor(chosen)]
    cells[:, 4] = scenes.draw_squares(3, torch.Size((1, 8, 8))).flatten(1)[torch.tensor(asked)]
    clean = rearrange(cells, "n (h w) (p q) -> n (h p w q)", h=3, p=8)
    ours = [
        {"digits": [texts[i] for i in row], "asked": int(cell), "random": u.tolist()}
        | {"noise": scenes.NOISE}
        for row, cell, u in zip(chosen, asked, noise, strict=True)
    ]
    found = execute(where, json.dumps(ours) + RUN)
    pixels = [scene["pixels"] for scene in found]
    expected = scenes.add_noise(clean, torch.tensor(noise).float())
    assert_close(torch.tensor(pixels), expected, atol=1e-6, rtol=0)
    for i, (logits, maps) in enumerate(predict(pixels)):
        theirs = [scene["nets"][i] for scene in found]
        assert_close(torch.tensor([x["logits"] for x in theirs]), logits, atol=1e-3, rtol=0)
        theirs = torch.tensor([x["maps"] for x in theirs]).transpose(0, 1)
        assert_close(theirs, maps, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_a_reader_chooses_and_sees_what_pytorch_computes():
    """What the page shows after each click: answers, and light in per cent."""
    states, classes = execute("browser", CLICK), read()["classes"]
    assert [state["asked"] for state in states] == [7] * 4
    views = [tuple(state["view"].values()) for state in states]
    assert views[1:] == [(views[0][0], -1, 3), (2, -1, 3), (2, 1, 3)]
    for i, (logits, maps) in enumerate(predict([state["pixels"] for state in states])):
        for n, (state, (layer, head, query)) in enumerate(zip(states, views, strict=True)):
            p = maps[layer, n, :, query, 1:]
            expected = 100 * (p.mean(dim=0) if head < 0 else p[head])
            light = torch.tensor([float(x or 0) for x in state["light"]]).view(4, 9)[i]
            assert_close(light, expected, atol=0.51, rtol=0)
            assert not i or state["said"][i].split()[1] == classes[logits[n].argmax()]


@pytest.mark.slow
@pytest.mark.parametrize("made", [False, True])
def test_its_numbers_are_those_of_its_weights(made):
    page = Path("explorer.html") if made else PAGE
    if made:
        explorer.draw_explorer(page, "--epochs", "1", "--warmup", "0")
    text, template = page.read_text(), explorer.TEMPLATE.read_text()
    assert len(text) < 1.5e6 and all(part in text for part in template.split("@DATA@"))
    views = [data.load(finetune.parse(["--label", label])) for label in ("cell", "class")]
    for i, (about, model) in enumerate(zip(read(page)["nets"], open_nets(page), strict=True)):
        rule = Model.__call__ if i else explorer.predict_cell
        assert explorer.score(rule, model, views[i > 0]) == pytest.approx(about["top1"], abs=0.06)
        assert explorer.look_at_asked(model, views[0]) == pytest.approx(about["on_asked"], abs=0.01)
