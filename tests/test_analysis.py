"""Measures of likeness on cases whose answer is known, and the comparison of two ViTs."""

import itertools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

import attention_copy
import vit
from checkpoints import Model
from experiments import analysis


def make(seed, **changes):
    torch.manual_seed(seed)
    shape = dict(image_size=12, patch=3, channels=1, classes=10, dim=32, depth=3, heads=4)
    return vit.ViT(vit.Config(**shape | changes)).eval()


def test_divergence_is_0_of_equal_maps_and_ln_2_of_disjoint_ones_and_symmetric():
    p, q = torch.rand(2, 5, 7, dtype=torch.float64).softmax(-1).unbind()
    halves = torch.eye(2, dtype=torch.float64)
    assert analysis.jensen_shannon(p, p).abs().max() < 1e-12
    assert analysis.jensen_shannon(halves, halves.flip(0)).tolist() == pytest.approx(
        [math.log(2)] * 2
    )
    assert torch.equal(analysis.jensen_shannon(p, q), analysis.jensen_shannon(q, p))
    m = (p + q) / 2
    expected = (
        (p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)
    ) / 2  # mean of two KL divergences
    torch.testing.assert_close(analysis.jensen_shannon(p, q), expected)


def test_entropy_is_0_at_one_token_and_ln_n_at_all_alike():
    assert analysis.entropy(torch.eye(6)).tolist() == [0] * 6
    assert analysis.entropy(torch.full((6,), 1 / 6)).item() == pytest.approx(math.log(6))


def grid(side, patch):
    return vit.Config(side * patch, patch, 1, 0, 8, 1, 1)


def test_distance_is_that_between_patches_in_pixels():
    step = torch.zeros(1, 1, 10, 10)
    for i in range(10):  # each of 3x3 patches looks at the one to its right, and a bit at the class
        step[0, 0, i, 0] = 0.5
        if i:
            step[0, 0, i, i + 1 if i % 3 else i - 2] = 0.5
    assert analysis.attention_distance(step, grid(3, 4)).item() == pytest.approx(
        (1 + 1 + 2) / 3 * 4
    )
    everywhere = torch.full(
        (1, 1, 5, 5), 0.2
    )  # 2x2 patches: itself, two neighbours and the diagonal
    assert analysis.attention_distance(everywhere, grid(2, 1)).item() == pytest.approx(
        (0 + 1 + 1 + 2**0.5) / 4
    )


def test_cka_knows_rotations_scales_and_strangers():
    x = torch.randn(300, 20, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    assert analysis.cka(x, x @ rotation) == pytest.approx(1)
    assert analysis.cka(x, 5 * x + 3) == pytest.approx(1)
    assert analysis.cka(x, torch.cat([x, torch.zeros(300, 7)], dim=1)) == pytest.approx(1)
    stranger = torch.randn(
        300, 600
    )  # more features than images: the usual estimate would see a likeness of 0.2 and more
    assert abs(analysis.cka(x, stranger)) < 0.03
    half = torch.cat(
        [x[:, :10], torch.randn(300, 10)], dim=1
    )  # half of the features shared: half of the variance explained
    assert analysis.cka(x, half) == pytest.approx(0.5, abs=0.06)
    assert analysis.cka(x, half) == pytest.approx(analysis.cka(half, x))


def test_cka_tends_to_kornbliths_formula_with_many_images():
    x = torch.randn(3000, 5, dtype=torch.float64)
    y = x @ torch.randn(5, 4, dtype=torch.float64) + torch.randn(3000, 4)
    x0, y0 = x - x.mean(0), y - y.mean(0)
    usual = (y0.T @ x0).norm() ** 2 / ((x0.T @ x0).norm() * (y0.T @ y0).norm())
    assert analysis.cka(x, y) == pytest.approx(usual.item(), abs=2e-3)


@pytest.mark.parametrize("heads", [1, 3, 6])
def test_matching_is_the_best_of_all_permutations(heads):
    for seed in range(5):
        cost = np.random.default_rng(seed).random((heads, heads))
        found = analysis.match(cost)
        least = min(
            sum(cost[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(heads))
        )
        assert sorted(found) == list(range(heads)) and sum(
            cost[i, j] for i, j in enumerate(found)
        ) == pytest.approx(least)


def test_rollout_follows_looks_through_the_layers():
    to_first = torch.zeros(1, 2, 3, 3)
    to_first[..., 0] = 1
    assert analysis.rollout([to_first])[0].tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]]
    assert analysis.rollout([to_first] * 2)[0].tolist() == [
        [1, 0, 0],
        [0.75, 0.25, 0],
        [0.75, 0, 0.25],
    ]
    maps = [torch.rand(2, 4, 5, 5).softmax(-1) for _ in range(3)]
    assert analysis.rollout(maps).sum(-1).allclose(torch.ones(2, 5))


def test_a_twin_with_its_heads_shuffled_is_found_out():
    """Heads in another order: other maps head by head, the same when matched, the same features."""
    net, twin, order = make(0), make(0), [2, 0, 3, 1]
    with torch.no_grad():
        for block in twin.blocks:
            rows = torch.arange(32).view(4, 8)[order].flatten()
            for part in range(3):
                span = slice(32 * part, 32 * part + 32)
                block.attn.qkv.weight[span] = 3 * block.attn.qkv.weight[span][rows] / 3
            block.attn.proj.weight[:] = block.attn.proj.weight[:, rows]
    images = 2 * torch.randn(40, 1, 12, 12)
    found = analysis.compare(Model(net), Model(twin), images.split(16))
    assert found["images"] == 40
    for i, layer in enumerate(found["layers"]):
        assert layer["pairs"] == [order.index(h) for h in range(4)]
        assert (
            layer["matched"]
            < 1e-6
            < 1e-4
            < layer["divergence"]
            == pytest.approx(np.mean(layer["by_head"]))
        )
        assert found["cka"][i][i] == pytest.approx(1, abs=1e-6)
        assert np.take(layer["entropy"][0], order) == pytest.approx(layer["entropy"][1], abs=1e-5)


def test_batches_do_not_change_the_result():
    nets, images = (make(0), make(1)), torch.randn(30, 1, 12, 12)
    models = [Model(net) for net in nets]
    whole, parts = (analysis.compare(*models, images.split(size)) for size in (30, 7))
    assert np.allclose(whole["cka"], parts["cka"], atol=1e-6)
    for a, b in zip(whole["layers"], parts["layers"], strict=True):
        assert a["by_head"] == pytest.approx(b["by_head"], rel=1e-4)
        assert np.allclose(a["distance"], b["distance"]) and np.allclose(a["entropy"], b["entropy"])


@torch.no_grad()
def test_maps_of_other_tokens_are_compared_over_patches():
    images = torch.randn(5, 1, 12, 12)
    a, b = Model(make(0, registers=2)), Model(make(1))
    found = analysis.compare(a, b, images.split(2))
    pairs = zip(a.run(images), b.run(images), strict=True)
    for layer, ((x, mine), (y, theirs)) in zip(found["layers"], pairs, strict=True):
        p, q = (analysis.attention_map(used) for used in (mine, theirs))
        p, q = p[:, :, 3:, 3:], q[:, :, 1:, 1:]
        p, q = (side / side.sum(dim=-1, keepdim=True) for side in (p, q))
        by_head = analysis.jensen_shannon(p, q).mean(dim=(0, 2))
        assert layer["by_head"] == pytest.approx(by_head.tolist(), rel=1e-4)
        entropies = [analysis.entropy(side).mean(dim=(0, 2)).tolist() for side in (p, q)]
        assert np.allclose(layer["entropy"], entropies)
    features = x[:, 3:].mean(dim=1), y[:, 1:].mean(dim=1)
    assert found["cka"][-1][-1] == pytest.approx(analysis.cka(*features), abs=1e-5)


def test_a_copy_student_attends_with_its_teachers_maps(tmp_path, capsys):
    argv = [
        "--teacher",
        "random",
        "--layers",
        "0,2",
        "--num-labels",
        "50",
        "--epochs",
        "1",
        "--warmup",
        "0",
    ]
    attention_copy.main(attention_copy.parse([*argv, "--out", str(tmp_path)]))
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save(
        {
            "model": state["teacher"]["model"],
            "architecture": state["teacher"]["architecture"],
            "normalization": state["normalization"],
        },
        tmp_path / "teacher.pt",
    )
    paths = [str(tmp_path / "teacher.pt"), str(tmp_path / "model.pt")]
    record = analysis.main(
        analysis.parse(
            [*paths, "--data", "digits", "--images", "60", "--out", str(tmp_path / "out")]
        )
    )
    assert json.loads((tmp_path / "out" / "analysis.json").read_text()) == record
    divergences = [layer["divergence"] for layer in record["layers"]]
    assert max(divergences[0], divergences[2]) < 1e-6 < 1e-3 < min(divergences[1], divergences[3])
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {
        f"{name}.png" for name in ("maps", "rollout", "divergence", "heads", "cka")
    }
    assert "on 60 images" in capsys.readouterr().out


@pytest.mark.parametrize("argv, words", [
    (["A"], "name two checkpoints"),
    (["random", "A"], "name two checkpoints"),
    (["A", "missing.pt"], "no checkpoint at missing.pt"),
    (["A", "B"], "patch differ (3 and 4)"),
    (["A", "random", "--layer", "9"], "--layer 9: there are 3"),
    (["A", "random", "--head", "5"], "--head 5: there are 4"),
    (["A", "random", "--images", "3"], "at least 4"),
    (["A", "NAN"], "not finite"),
    (["A", "DEEP", "--layer", "4"], "--layer 4: there are 3"),
    (["A", "HEADS"], "heads differ (4 and 2)"),
    (["A", "CUT"], "no checkpoint that can be read"),
    (["A", "ODD"], "describes no ViT"),
    (["A", "random", "--data", "folder", "--data-dir", "nowhere"], "no folder nowhere"),
])  # fmt: skip
def test_bad_input_is_one_line(argv, words, failing, tmp_path):
    nets = {
        "A": make(0),
        "B": make(1, patch=4),
        "NAN": make(2),
        "DEEP": make(3, depth=5),
        "HEADS": make(4, heads=2),
    }
    nets["NAN"].blocks[1].mlp.fc2.weight.data[0, 0] = math.nan
    for name, net in nets.items():
        torch.save({"model": net.state_dict(), "architecture": asdict(net.config)}, tmp_path / name)
    (tmp_path / "CUT").write_bytes((tmp_path / "A").read_bytes()[:9000])
    torch.save(
        {
            "model": nets["A"].state_dict(),
            "architecture": {**asdict(nets["A"].config), "heads": "4"},
        },
        tmp_path / "ODD",
    )
    argv = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in argv]
    code, line = failing(analysis, [*argv, "--out", tmp_path / "out"])
    assert code == 2 and words in line
    assert not list(tmp_path.glob("out/*"))


def test_many_heads_are_matched_as_well_as_a_swap_can():
    random = np.random.default_rng(0)
    cost = random.uniform(size=(20, 20))
    hidden = random.permutation(20)
    cost[range(20), hidden] -= 2
    assert analysis.match(cost) == hidden.tolist()
    columns = analysis.match(random.uniform(size=(18, 18)))
    assert sorted(columns) == list(range(18))
