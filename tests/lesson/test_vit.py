"""The ViT against timm's, and what is lent against attention maps computed in full."""

import math

import pytest
import timm
import torch
from einops import rearrange

import vit
from vit import QK, attend

SHAPE = dict(image_size=32, patch=8, channels=3, classes=7, dim=48, depth=3, heads=4)


def make(seed=0, drop_path=0.0, **changes):
    torch.manual_seed(seed)
    return vit.ViT(vit.Config(**SHAPE | changes), drop_path)


def list_qk(net, images):  # what each block attended with
    return [qk for _, qk in net.blockwise(images)]


def test_timm_gives_the_same_logits_and_gradients_both_ways():
    shape = dict(img_size=32, patch_size=8, num_classes=7, embed_dim=48, depth=3, num_heads=4)
    theirs = timm.models.VisionTransformer(**shape, global_pool="avg", fc_norm=True)
    images, labels = torch.randn(5, 3, 32, 32), torch.randint(7, (5,))
    ours, again = make(), make(seed=1)
    theirs.load_state_dict(ours.state_dict())  # ours to timm, strict
    again.load_state_dict(theirs.state_dict())  # timm to ours, strict
    found = []
    for net in (ours, theirs.eval(), again):
        found.append(net(images))
        torch.nn.functional.cross_entropy(found[-1], labels).backward()
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0], found[2])
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def explicit(net, images, maps, factors=((1, 1),) * 3):
    """Logits and maps (B, H, N, N) of a plain forward pass; `maps[i]` replaces that of block i."""
    x, own = net.embed(images), []
    for i, (block, (attended, thought)) in enumerate(zip(net.blocks, factors, strict=True)):
        qkv = block.attn.qkv(block.norm1(x))
        q, k, v = rearrange(qkv, "b n (p h d) -> p b h n d", p=3, h=net.config.heads)
        own.append((torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])).softmax(-1))
        y = torch.einsum("bhij,bhjd->bhid", maps.get(i, own[i]), v)
        x = x + attended * block.attn.proj(rearrange(y, "b h n d -> b n (h d)"))
        x = x + thought * block.mlp(block.norm2(x))
    return net.head(net.fc_norm(x[:, 1:].mean(1))), own


def assert_same_gradients(student, logits, expected):
    logits.square().sum().backward()
    fast = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    expected.square().sum().backward()
    torch.testing.assert_close(logits, expected)
    for name, p in student.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, msg=name)


@pytest.mark.parametrize("width", [48, 80])  # a teacher as wide as the student, and a wider one
@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 2], [1]])
def test_copy_is_the_teachers_softmax_map_on_the_students_values(width, layers):
    """Both drop the same branches of an image."""
    images = torch.randn(4, 3, 32, 32).double()
    teacher = make(1, dim=width).double().requires_grad_(False)
    student = make(2, drop_path=0.5).double()
    factors = student.draw_drop_path(4)
    maps = {i: p for i, p in enumerate(explicit(teacher, images, {}, factors)[1]) if i in layers}
    logits = student(images, teacher.lend(images, layers, factors), factors=factors)
    assert_same_gradients(student, logits, explicit(student, images, maps, factors)[0])
    for i in range(3):  # queries and keys of a copied layer learn nothing, of another something
        learns = student.blocks[i].attn.qkv.weight.grad[: 2 * 48].any()
        assert bool(learns) == (i not in layers)


def test_any_map_can_be_lent():
    """A map, uniform or another image's, lent as a bias, is that map on the student's values."""
    student, images = make(2).double(), torch.randn(4, 3, 32, 32).double()
    own = [qk.map().detach() for qk in list_qk(student, images)]
    maps = {0: torch.full_like(own[0], 1 / own[0].shape[-1]), 2: own[2].roll(1, 0)}
    given = [QK.from_map(maps[i]) if i in maps else None for i in range(3)]
    torch.testing.assert_close(given[2].map(), maps[2])
    assert_same_gradients(student, student(images, given), explicit(student, images, maps)[0])


@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_both_ways_to_attend_agree(lent, biased, dtype, close):
    q, k, v, upstream = torch.randn(4, 2, 3, 50, 16).to(dtype).unbind()
    bias = torch.randn(3, 50, 50).to(dtype) if biased else None
    learns = [x.requires_grad_() for x in ((v,) if lent else (q, k, v))]
    scores = q.float() @ k.float().mT / 4 + (bias.float() if biased else 0)
    ours, theirs = attend(QK(q, k, bias), v), torch.softmax(scores, dim=-1) @ v.float()
    grads = [torch.autograd.grad(y, learns, upstream.to(y.dtype)) for y in (ours, theirs)]
    for a, b in ((ours, theirs), *zip(*grads, strict=True)):
        assert (a - b).norm() < close * b.norm()


@pytest.mark.parametrize("layers", [[0], [0, 1, 2], [1, 2], [0, 2], [1]])
def test_what_is_lent_is_what_the_blocks_attend_with_and_no_more_is_computed(layers):
    net, images, ran = make().requires_grad_(False), torch.randn(2, 3, 32, 32), []
    used = list_qk(net, images)
    for i, block in enumerate(net.blocks):
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    lent = list(net.lend(images, layers))
    assert len(lent) == 3 and [i for i, qk in enumerate(lent) if qk is not None] == layers
    for i in layers:
        torch.testing.assert_close(lent[i][:2], used[i][:2])
    assert ran == list(range(layers[-1]))  # of the last layer queries and keys alone


def test_other_loans_and_images_of_another_size_are_refused():
    net, images = make(), torch.randn(2, 3, 32, 32)
    spent = net.lend(images, [0, 1, 2])
    net(images, given=spent)
    for wrong in (spent, [None] * 2, [None] * 4):
        with pytest.raises(ValueError, match="zip"):
            net(images, given=wrong)
    others = [torch.randn(2, 3, *size) for size in ((40, 40), (32, 40), (16, 64))]  # 16 patches too
    for wrong in (*others, torch.ones(2, 3, 32, 32, dtype=torch.uint8)):
        for call in (net, lambda x: next(net.lend(x, [0]))):
            with pytest.raises(ValueError, match=r"pixels in 0\.\.1, 3 x 32 x 32"):
                call(wrong)


def test_drop_path_drops_whole_branches_of_single_images_and_is_unbiased():
    net = make(drop_path=0.5)
    assert net.eval().draw_drop_path(4) == [(1, 1)] * 3
    torch.manual_seed(0)
    factors = net.train().draw_drop_path(20000)
    assert factors.shape == (3, 2, 20000, 1, 1)
    for i, p in enumerate((0, 0.25, 0.5)):
        assert set(factors[i].unique().tolist()) <= {0.0, torch.tensor(1 / (1 - p)).item()}
        assert factors[i].mean().item() == pytest.approx(1, abs=0.03)
    images, one = torch.randn(2, 3, 32, 32), torch.zeros(3, 2, 2, 1, 1)
    one[:, :, 1] = 1  # drop every branch of image 0, none of image 1
    logits = net(images, factors=one)
    torch.testing.assert_close(logits[0], net.classify(net.embed(images))[0])
    torch.testing.assert_close(logits[1], net.eval()(images)[1])


class Adapter(torch.nn.ModuleList):
    """As LoRA's: beside a layer, which it stands for."""

    def forward(self, x, *rows):
        return sum(layer(x, *rows) for layer in self)


def test_hooks_and_adapters_of_qkv_take_part_in_all_that_is_projected():
    student, teacher, images = make(0), make(1), torch.rand(2, 3, 32, 32)
    merged = [make(0), make(1)]
    for net, whole in zip((student, teacher), merged, strict=True):
        for block, other in zip(net.blocks, whole.blocks, strict=True):
            beside, qkv = vit.QKV(48, 3 * 48), other.attn.qkv
            block.attn.qkv = Adapter([block.attn.qkv, beside])
            qkv.weight.data += beside.weight
            qkv.bias.data += beside.bias
    seen = []
    for net in merged:
        net.blocks[1].attn.qkv.register_forward_hook(lambda *call: seen.append(call[2].shape[-1]))
    copies = [a(images, given=b.lend(images, [0, 1])) for a, b in ((student, teacher), merged)]
    torch.testing.assert_close(*copies)
    assert seen == [2 * 48, 48]  # the teacher's queries and keys, the student's values
