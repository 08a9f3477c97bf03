"""The ViT against timm's, and lent attention against attention maps computed in full."""

import math

import pytest
import timm
import torch
from einops import rearrange

import vit

SHAPE = dict(image_size=32, patch=8, channels=3, classes=7)


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return vit.ViT(**SHAPE | dict(dim=48, depth=3, heads=4) | changes)


def twin_of_timm(net):
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, num_classes=7, embed_dim=48, depth=3, num_heads=4, global_pool="avg", fc_norm=True
    )


def test_timm_gives_the_same_logits_and_gradients_both_ways():
    images, labels = torch.randn(5, 3, 32, 32), torch.randint(7, (5,))
    ours = make()
    theirs = twin_of_timm(ours)
    theirs.load_state_dict(ours.state_dict())  # ours to timm, strict
    again = make(seed=1)
    again.load_state_dict(twin_of_timm(ours).state_dict())  # timm to ours, strict
    again.load_state_dict(theirs.state_dict())
    gradients = []
    for net in (lambda x: ours(x)[0], theirs.eval(), lambda x: again(x)[0]):
        logits = net(images)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        gradients.append(logits)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(gradients[0], gradients[2])
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def explicit(student, images, maps):
    """The student's forward pass written with (B, H, N, N) maps; `maps[i]` replaces its own map of block i."""
    x = student.embed(images)
    for i, block in enumerate(student.blocks):
        q, k, v = rearrange(block.attn.qkv(block.norm1(x)), "b n (p h d) -> p b h n d", p=3, h=student.heads)
        own = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1]), dim=-1)
        p = maps.get(i, own)
        y = torch.einsum("bhij,bhjd->bhid", p, v)
        x = x + block.attn.proj(rearrange(y, "b h n d -> b n (h d)"))
        x = x + block.mlp(block.norm2(x))
    return student.head(student.fc_norm(x[:, 1:].mean(1)))


@pytest.mark.parametrize("width", [48, 80])  # a teacher as wide as the student, and a wider one
@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 2], [1]])
def test_copy_is_the_teachers_softmax_map_on_the_students_values(width, layers):
    images = torch.randn(4, 3, 32, 32)
    teacher, student = make(1, dim=width).double(), make(2).double()
    images = images.double()
    with torch.no_grad():
        _, looks = teacher(images)
        maps = {i: torch.softmax(looks[i][0] @ looks[i][1].mT / math.sqrt(width / 4), dim=-1) for i in layers}
        lent = teacher.look(images, layers)
    logits = student(images, lent)[0]
    logits.square().sum().backward()
    fast = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    expected = explicit(student, images, maps)
    expected.square().sum().backward()
    torch.testing.assert_close(logits, expected)
    for name, p in student.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, msg=name)
    for i in range(3):  # queries and keys of a copied layer learn nothing, of another layer something
        assert bool(student.blocks[i].attn.qkv.weight.grad[: 2 * 48].any()) == (i not in layers)


@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_both_ways_to_attend_agree(lent, dtype, close):
    q, k, v, upstream = torch.randn(4, 2, 3, 50, 16).to(dtype).unbind()
    learns = [x.requires_grad_() for x in ((v,) if lent else (q, k, v))]
    ours, theirs = vit.attend(q, k, v), torch.softmax(q.float() @ k.float().mT / 4, dim=-1) @ v.float()
    grads = [torch.autograd.grad(y, learns, upstream.to(y.dtype)) for y in (ours, theirs)]
    for a, b in ((ours, theirs), *zip(*grads, strict=True)):
        assert (a - b).norm() < close * b.norm()


def test_look_is_what_forward_looked_with():
    net, images = make(), torch.randn(2, 3, 32, 32)
    _, looks = net(images)
    for layers in ([0], [0, 1, 2], [1, 2], [0, 2]):
        seen = net.look(images, layers)
        assert len(seen) == layers[-1] + 1
        for i, qk in enumerate(seen):
            assert (qk is None) == (i not in layers)
            if qk:
                torch.testing.assert_close(qk, looks[i])


def test_copying_from_a_twin_changes_nothing():
    student, teacher, images = make(3), make(3), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(student(images, teacher.look(images, [0, 1, 2]))[0], student(images)[0])


def test_drop_path_drops_whole_branches_of_single_images_and_is_unbiased():
    net = make(drop_path=0.5)
    assert net.eval().draw_keep(4, "cpu") is None
    torch.manual_seed(0)
    keep = net.train().draw_keep(20000, "cpu")
    assert keep.shape == (3, 2, 20000) and keep[0].eq(1).all()
    for i, p in enumerate((0, 0.25, 0.5)):
        assert set(keep[i].unique().tolist()) <= {0.0, torch.tensor(1 / (1 - p)).item()}
        assert keep[i].mean().item() == pytest.approx(1, abs=0.03)
    images, none = torch.randn(2, 3, 32, 32), torch.zeros(3, 2, 2)
    none[:, :, 1] = 1  # drop every branch of image 0, none of image 1
    logits = net(images, keep=none)[0]
    pooled = net.head(net.fc_norm(net.embed(images)[:, 1:].mean(1)))
    torch.testing.assert_close(logits[0], pooled[0])
    torch.testing.assert_close(logits[1], net.eval()(images)[0][1])


def test_positions_interpolate_as_timms_do():
    pos = torch.randn(1, 1 + 49, 16)
    theirs = timm.layers.resample_abs_pos_embed(pos, new_size=[14, 14], num_prefix_tokens=1, antialias=False)
    torch.testing.assert_close(vit.interpolate(pos, 1 + 196), theirs)
    assert vit.interpolate(pos, 50) is pos
    with pytest.raises(ValueError, match="no square grid"):
        vit.interpolate(torch.randn(1, 12, 8), 17)


def test_mae_style_and_timm_files_load(tmp_path):
    torch.manual_seed(0)
    net = vit.build("tiny", image_size=32, patch=8, channels=3, classes=5)
    mae = {k: v for k, v in net.state_dict().items() if not k.startswith(("head", "fc_norm"))}
    mae |= {"norm.weight": torch.ones(192), "norm.bias": torch.zeros(192), "decoder_embed.weight": torch.ones(3, 3)}
    torch.save({"model": mae}, tmp_path / "mae.pth")
    torch.save(net.state_dict(), tmp_path / "plain.pth")

    loaded = vit.load(vit.read(tmp_path / "mae.pth"), classes=9)
    assert loaded.head.out_features == 9
    for name, p in loaded.named_parameters():
        if not name.startswith(("head", "fc_norm")):
            assert torch.equal(p, net.state_dict()[name])
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vit.load(vit.read(tmp_path / "plain.pth"))(images)[0], net(images)[0])
    larger = vit.load(vit.read(tmp_path / "plain.pth"), image_size=64)
    assert larger.tokens == 65 and torch.isfinite(larger(torch.randn(1, 3, 64, 64))[0]).all()


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    net = vit.build("tiny", image_size=32, patch=8, channels=3, classes=5)
    weights = net.state_dict()
    del weights["blocks.3.mlp.fc2.bias"]
    weights["blocks.0.ls1.gamma"] = torch.ones(192)
    weights["blocks.1.norm1.weight"] = torch.ones(7)
    torch.save(weights, tmp_path / "odd.pth")
    with pytest.raises(ValueError) as error:
        vit.load(vit.read(tmp_path / "odd.pth"))
    for words in ("blocks.3.mlp.fc2.bias is missing", "blocks.0.ls1.gamma is not ours",
                  "blocks.1.norm1.weight is (7,), not (192,)"):  # fmt: skip
        assert words in str(error.value)


def test_layers_are_written_as_count_range_or_list():
    assert vit.parse_layers("3", 12) == [0, 1, 2]
    assert vit.parse_layers("6-8", 12) == [6, 7, 8]
    assert vit.parse_layers("0,2,4-5", 12) == [0, 2, 4, 5]
    assert vit.parse_layers("all", 3) == [0, 1, 2]
    for wrong in ("99", "0", "3-99", "x", "", "5-3", "-6"):
        with pytest.raises(ValueError, match="--layers"):
            vit.parse_layers(wrong, 12)
