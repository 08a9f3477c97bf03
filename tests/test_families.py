"""Teachers of the world: each family's files, in timm's and the authors' names, against timm."""

import http.server
import itertools
import json
import math
import os
import signal
import threading
from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

import attention_copy
import attention_distill
import checkpoints
import conversion
import data
import families
import finetune
import lending
import positions
import pretrain
import runs
import storage
import vit
from attention import attention_map
from augment import Normalise
from checkpoints import Model, load, read
from experiments import analysis, sinks

SMALL = dict(dim=48, depth=2, heads=3)
ONE_OF_EACH = (
    "vit_base_patch16_224.mae", "vit_small_patch16_224.dino", "deit_tiny_patch16_224.fb_in1k",
    "vit_tiny_patch16_224.augreg_in21k", "deit3_small_patch16_224.fb_in1k",
    "vit_small_patch14_dinov2.lvd142m", "vit_giant_patch14_dinov2.lvd142m",
    "vit_small_patch14_reg4_dinov2.lvd142m", "vit_small_patch16_dinov3.lvd1689m",
    "vit_small_plus_patch16_dinov3.lvd1689m", "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m",
    "vit_base_patch32_clip_quickgelu_224.openai", "vit_base_patch32_clip_224.laion2b",
    "beitv2_base_patch16_224.in1k_ft_in1k", "vit_base_patch16_siglip_224.v2_webli",
)  # fmt: skip


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.title)
def test_what_is_said_of_members_is_what_timm_says(family):
    for member in families.members(family):
        if "/timm/" not in member.url or ":" in member.name:
            continue
        with torch.device("meta"):
            net = timm.create_model(member.name, pretrained=False)
        cfg, block = net.pretrained_cfg, net.blocks[0]
        said = (member.dim, member.depth, member.heads, member.patch, member.image_size)
        theirs = (net.embed_dim, len(net.blocks), block.attn.num_heads)
        assert said == (*theirs, net.patch_embed.patch_size[0], cfg["input_size"][-1])
        assert member.url == families.TIMM.format(cfg["hf_hub_id"].removeprefix("timm/"))
        assert family.normalization == (list(cfg["mean"]), list(cfg["std"]))
        assert family.beyond.get("eps", 1e-6) == block.norm1.eps
        no_commerce = "nc" in cfg["license"] or "noncommercial" in cfg["license"]
        assert no_commerce == ("no commercial use" in family.licence)


@pytest.fixture
def small(monkeypatch):
    """All members with the components that they have, but few and narrow layers."""
    members = {k: m._replace(**SMALL) for k, m in families.MEMBERS.items()}
    monkeypatch.setattr(families, "MEMBERS", members)


def timms(name: str, **more):
    torch.manual_seed(0)
    sizes = dict(embed_dim=SMALL["dim"], depth=SMALL["depth"], num_heads=SMALL["heads"])
    net = timm.create_model(name, pretrained=False, **sizes | more).eval()
    with torch.no_grad():
        for parameter in net.parameters():  # also what begins as 0 or 1
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return net


def written(net, tmp_path):
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@torch.no_grad()
def traces_of_timms(net, images):
    """Tokens after every block, and attention maps."""
    tokens, maps, hooks = [], [], []
    for block in net.blocks:
        block.attn.fused_attn = False
        hooks.append(block.register_forward_hook(lambda _, given, out: tokens.append(out)))
        drop = block.attn.attn_drop
        hooks.append(drop.register_forward_hook(lambda _, given, out: maps.append(out)))
    net(images)
    for hook in hooks:
        hook.remove()
    return tokens, maps


@torch.no_grad()
def assert_alike(ours, net, size):
    images = torch.randn(2, 3, size, size)
    tokens, maps = traces_of_timms(net, images)
    traces = list(ours.run(images))
    assert len(traces) == len(tokens) == len(maps) == SMALL["depth"]
    for (x, attended), y, p in zip(traces, tokens, maps, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(attention_map(attended), p, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_tokens_and_maps_are_timms_at_the_native_and_at_another_size(name, small, tmp_path):
    net = timms(name)
    found = read(f"{name}={written(net, tmp_path)}")
    native = families.MEMBERS[name].image_size
    assert net.patch_embed.img_size == (native, native)
    ours = load(found, classes=0).eval()
    assert_alike(ours, net, native)

    patch = ours.config.patch
    for side in (6, native // patch + 2):  # smaller and larger
        other = timms(name, img_size=side * patch)
        state, resize = net.state_dict(), families.MEMBERS[name].family.resize
        for key in state:
            if key == "pos_embed":
                first = state[key].shape[1] - (native // patch) ** 2  # has the class token one?
                state[key] = resample_abs_pos_embed(
                    state[key], [side, side], num_prefix_tokens=first, antialias=resize.antialias
                )
            if key.endswith("relative_position_bias_table"):
                shape = ((2 * side - 1) ** 2 + 3, SMALL["heads"])
                state[key] = resize_rel_pos_bias_table(state[key], (side, side), shape)
        other.load_state_dict({k: v for k, v in state.items() if "index" not in k}, strict=False)
        as_timm = replace(found, resize=positions.Resize(antialias=resize.antialias))
        assert_alike(load(as_timm, classes=0, image_size=side * patch).eval(), other, side * patch)


def theirs_of(name: str, state: dict) -> dict:
    """timm's tensors by the names of a family's authors, as they wrap them."""
    family, random = families.MEMBERS[name].family.title, torch.Generator().manual_seed(1)
    renamed = {}
    for key, value in state.items():
        if family == "DeiT III":
            for i in "12":
                key = key.replace(f"ls{i}.gamma", f"gamma_{i}")
        if "registers" in family and key == "pos_embed":  # with an entry for the class token
            value = torch.cat([torch.full_like(value[:, :1], 0.25), value], dim=1)
        if "registers" in family and key == "cls_token":
            value = value - 0.25
        if "registers" in family:
            key = key.replace("reg_token", "register_tokens")
        if "DINOv2" in family and "giant" in name:
            key = key.replace("fc1", "w12").replace("fc2", "w3")
        if family in ("DINOv3", "EUPE"):
            for i in "12":
                key = key.replace(f"gamma_{i}", f"ls{i}.gamma")
            key = key.replace("reg_token", "storage_tokens").replace("mlp.fc1_g", "mlp.w1")
            key = key.replace("mlp.fc1_x", "mlp.w2")
            key = key.replace("mlp.fc2", "mlp.w3") if "plus" in name else key
            if key.endswith("q_bias"):
                v = state[key.replace("q_bias", "v_bias")]
                noise = torch.randn(v.shape, generator=random)
                renamed[key.replace("q_bias", "qkv.bias")] = torch.cat([value, noise, v])
                mask = torch.ones(3, len(v))
                mask[1] = float("nan")
                key, value = key.replace("q_bias", "qkv.bias_mask"), mask.flatten()
            if key.endswith("v_bias"):
                continue
        renamed[key] = value
    if family in ("DINOv3", "EUPE"):
        return renamed | {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(4)}
    if "DINOv2" in family:
        return renamed | {"mask_token": torch.zeros(1, 48)}
    return {"model": renamed} if family in ("MAE", "DeiT", "DeiT III") else renamed


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in ONE_OF_EACH
        if not any(of in name for of in ("clip", "beit", "augreg", "webli"))
    ],
)
def test_the_authors_own_files_are_the_same_net(name, small, tmp_path):
    net = timms(name)
    torch.save(theirs_of(name, net.state_dict()), tmp_path / "theirs.pth")
    ours = load(read(f"{name}={tmp_path / 'theirs.pth'}"), classes=0).eval()
    assert_alike(ours, net, families.MEMBERS[name].image_size)


def test_moco_v3_is_found_within_the_state_of_its_training(small, tmp_path):
    net = timms("vit_small_patch16_224.dino")
    state = {f"module.base_encoder.{k}": v for k, v in net.state_dict().items()}
    state |= {f"module.momentum_encoder.{k}": 7 * v for k, v in net.state_dict().items()}
    state |= {
        "module.base_encoder.head.0.weight": torch.ones(3, 48),
        "module.predictor.0.weight": torch.ones(3),
    }
    torch.save(
        {"epoch": 300, "state_dict": state, "optimizer": {"state": {}}},
        tmp_path / "vit-s-300ep.pth.tar",
    )
    ours = load(read(tmp_path / "vit-s-300ep.pth.tar"), classes=0).eval()
    assert_alike(ours, net, 224)


def test_web_dino_in_its_authors_names(small, tmp_path):
    net, theirs = timms("vit_giant_patch14_dinov2.lvd142m", img_size=224), {}
    for key, value in net.state_dict().items():
        for i in range(SMALL["depth"]):
            key = key.replace(f"blocks.{i}.", f"blocks.{i}.{i}.")  # each in a chunk of its own
        theirs[key.replace("fc1", "w12").replace("fc2", "w3")] = value
    path = tmp_path / "webssl_dino300m_full2b_224.pth"
    torch.save(theirs | {"mask_token": torch.zeros(1, 48)}, path)
    assert_alike(load(read(path), classes=0).eval(), net, 224)


def test_clip_in_its_authors_names(small, tmp_path):
    name = "vit_base_patch32_clip_quickgelu_224.openai"
    net, theirs = timms(name), {}
    for key, value in net.state_dict().items():
        for timms_word, word in (
            ("patch_embed.proj.", "conv1."), ("blocks.", "transformer.resblocks."),
            ("norm_pre.", "ln_pre."), ("norm1.", "ln_1."), ("norm2.", "ln_2."),
            ("attn.qkv.", "attn.in_proj_"), ("attn.proj.", "attn.out_proj."),
            ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."), ("norm.", "ln_post."),
        ):  # fmt: skip
            key = key.replace(timms_word, word)
        if key == "cls_token":
            key, value = "class_embedding", value[0, 0]
        if key == "pos_embed":
            key, value = "positional_embedding", value[0]
        theirs[f"visual.{key}"] = value
    theirs |= {"visual.proj": torch.ones(48, 8)}
    torch.save(theirs, tmp_path / "clip.pt")
    assert_alike(load(read(f"{name}={tmp_path / 'clip.pt'}"), classes=0).eval(), net, 224)


def test_beits_pre_training_shares_one_table_of_positions(small, tmp_path):
    net = timms("beitv2_base_patch16_224.in1k_ft_in1k")
    state, table = net.state_dict(), net.blocks[0].attn.relative_position_bias_table.data
    net.blocks[1].attn.relative_position_bias_table.data = table
    state = {k: v for k, v in state.items() if "relative" not in k}
    state |= {
        "rel_pos_bias.relative_position_bias_table": table,
        "rel_pos_bias.relative_position_index": torch.zeros(2, 2),
        "cls_pt_layers.0.norm1.weight": torch.ones(48),
        "lm_head.weight": torch.ones(9, 48),
        "mask_token": torch.ones(1, 1, 48),
    }
    torch.save({"model": state}, tmp_path / "beitv2_base_patch16_224_pt1k.pth")
    ours = load(read(tmp_path / "beitv2_base_patch16_224_pt1k.pth"), classes=0).eval()
    assert_alike(ours, net, 224)


@torch.no_grad()
def test_torchvisions(small, tmp_path):
    torch.manual_seed(0)
    net = VisionTransformer(224, 16, 2, 3, 48, 192, num_classes=7).eval()
    for parameter in net.parameters():
        parameter.copy_(0.2 * torch.randn_like(parameter))
    torch.save(net.state_dict(), tmp_path / "x.pth")
    found = read(f"torchvision:vit_b_16={tmp_path / 'x.pth'}")
    for size in (224, 96, 288):
        other = VisionTransformer(size, 16, 2, 3, 48, 192, num_classes=7).eval()
        other.load_state_dict(interpolate_embeddings(size, 16, net.state_dict()))
        images, tokens = torch.randn(2, 3, size, size), []
        for layer in other.encoder.layers:
            layer.register_forward_hook(lambda _, given, out, to=tokens: to.append(out))
        other(images)
        ours = load(found, classes=0, image_size=size).eval()
        for (x, _), y in zip(ours.run(images), tokens, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def taps(x: float, count: int) -> list[float]:
    """What a cubic (Keys 1981, a = -0.75, as PyTorch has it) at x takes from each of the places."""
    a, first, found = -0.75, math.floor(x), [0.0] * count
    for i in range(first - 1, first + 3):
        d = abs(x - i)
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        found[min(max(i, 0), count - 1)] += near if d <= 1 else far
    return found


@pytest.mark.parametrize("new", [5, 11])
def test_positions_are_resized_as_the_code_of_the_family_does(new):
    """Of AugReg and SigLIP (scipy's zoom of order 1); and of DINO, which enlarges too much."""
    old, units = 7, np.eye(7)
    spots = np.linspace(0, old - 1, new)
    linear = np.stack([np.interp(spots, range(old), unit) for unit in units], axis=1)
    middles = (np.arange(new) + 0.5) * old / (new + 0.1) - 0.5
    cubic = np.array([taps(x, old) for x in middles])
    grid = torch.randn(old, old, 3, dtype=torch.float64)
    for name, weights in (
        ("vit_base_patch16_224.augreg_in1k", linear),
        ("vit_base_patch16_siglip_224.v2_webli", linear),
        ("vit_base_patch16_224.dino", cubic), ("ibot_vitb_16", cubic),
        ("vit_base_patch14_dinov2.lvd142m", cubic), ("webssl_dino1b_full2b_224", cubic),
    ):  # fmt: skip
        theirs = np.einsum("ih,jw,hwd->ijd", weights, weights, grid)
        how = families.MEMBERS[name].family.resize
        ours = positions.resized(grid.view(1, -1, 3), new, how).view(new, new, 3)
        torch.testing.assert_close(ours, torch.tensor(theirs), atol=1e-5, rtol=1e-5)


# Students ---------------------------------------------------------------------------------------


def images_of(size: int) -> data.Data:
    return data.Data([str(i) for i in range(5)], 3, size, Normalise(families.HALF, "cpu"))


def asked(script, name: str, tmp_path, *more: str):
    path = written(timms(name), tmp_path)
    return script.parse(["--data", "imagenet", "--teacher", f"{name}={path}", *more])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_student_looks_where_its_teacher_looks_learns_and_goes_to_timm(name, small, tmp_path):
    """One step of copy and of distillation; then the student is the same net in timm."""
    member = families.MEMBERS[name]
    size = 6 * member.patch
    batch, labels = torch.randn(2, 3, size, size), torch.tensor([1, 3])
    task = finetune.task(asked(finetune, name, tmp_path, "--drop-path", "0"), images_of(size))
    theirs = load(read(f"{name}={tmp_path / 'model.safetensors'}"), classes=0, image_size=size)
    tokens = (net.encode(net.embed(batch)) for net in (task.net, theirs))
    assert torch.equal(*tokens)
    terms, _ = task.loss(task.net, batch, labels)
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in task.net.parameters())
    for script in (attention_copy, attention_distill):
        settings = asked(script, name, tmp_path, "--layers", "all", "--drop-path", "0")
        assert (settings.model, settings.patch) == (name, member.patch)
        task = script.task(settings, images_of(size))
        student, teacher = task.net, task.loss.keywords["teacher"]
        components = {field: getattr(teacher.config, field) for field in families.COMPONENTS}
        assert components == {field: getattr(student.config, field) for field in components}
        terms, _ = task.loss(student, batch, labels)
        sum(terms.values()).backward()
        for n, p in student.named_parameters():  # as DDP needs it
            assert not p.requires_grad or p.grad.isfinite().all(), n
            assert p.requires_grad or (script is attention_copy and "relative" in n), n
        torch.optim.SGD(student.parameters(), lr=0.1).step()
        if script is attention_copy:
            lent = teacher.queries_keys(batch, [0, 1])
            looks = student.run(batch, given=teacher.queries_keys(batch, [0, 1]))
            for (_, used), theirs in zip(looks, lent, strict=True):
                torch.testing.assert_close(attention_map(used), attention_map(theirs))

    with torch.no_grad():
        for p in student.parameters():  # also what a step hardly moves
            p.add_(0.1 * torch.randn_like(p))
    target = name.replace("dinov3.", "dinov3_qkvb.")
    if "plus" in target:  # timm has one with the biases that a student learns
        target = "vit_small_plus_patch16_dinov3_qkvb.lvd1689m"
    pooled = {"use_fc_norm": True} if "dinov3" in target else {}
    net = timms(target, img_size=size, num_classes=5, global_pool="avg", **pooled)
    net.load_state_dict(conversion.timms(Model(student), net))
    with torch.no_grad():
        torch.testing.assert_close(net(batch), student.eval()(batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("script, name", zip(
    itertools.cycle((attention_copy, attention_distill)), ONE_OF_EACH
))  # fmt: skip
def test_a_run_with_a_named_teacher_is_resumed_to_the_same_bits(
    script, name, small, photos, tmp_path, stopped
):
    size = str(4 * families.MEMBERS[name].patch)
    more = ["--data", "folder", "--data-dir", str(photos), "--image-size", size, "--workers", "0"]
    more += ["--epochs", "2", "--warmup", "0", "--batch", "8", "--drop-path", "0.2"]
    settings = asked(script, name, tmp_path, *more)
    stopped(script, settings)
    opened = checkpoints.open_model("cut/model.pt")
    kept = {field: getattr(opened.net.config, field) for field in families.COMPONENTS}
    theirs = load(read(settings.teacher)).config
    assert kept == {field: getattr(theirs, field) for field in kept}


def test_the_same_weights_read_as_another_family_make_another_run(small, photos, tmp_path):
    name = "vit_base_patch32_clip_quickgelu_224.openai"
    path, settings = written(timms(name), tmp_path), finetune.parse(["--teacher", "none"])
    both = [read(f"{kind}={path}") for kind in (name, "vit_base_patch32_clip_224.openai")]
    assert both[0].fingerprint == both[1].fingerprint
    images = data.load(finetune.parse(on(photos)), torch.device("cpu"))
    found = [runs.identity("finetune", images, teacher, settings) for teacher in both]
    (odd,) = runs.differences(*found)
    assert odd.startswith("teacher_family was CLIP (OpenAI's)")


def test_timms_of_another_function_is_refused():
    net = vit.ViT(plain("mini", 64, 16))
    clip = "vit_base_patch32_clip_quickgelu_224.openai"
    for other, words in (
        (timms("vit_base_patch16_224.mae", img_size=64), "heads 3"),
        (timms(clip, num_heads=4), "another activation"),
    ):
        with pytest.raises(ValueError, match=words):
            conversion.timms(Model(net), other)
    same = partial(timms, "vit_base_patch16_224.mae", img_size=64, embed_dim=128, depth=6,
                   num_heads=4, num_classes=5)  # fmt: skip
    conversion.timms(Model(net), same(global_pool="avg"))
    for pool in ("max", "avgmax", "token"):
        with pytest.raises(ValueError, match=r"global_pool|another ViT"):
            conversion.timms(Model(net), same(global_pool=pool))
    with pytest.raises(ValueError, match="its teacher's maps"):
        conversion.timms(Model(net, teacher=net, layers=(0,)), same(global_pool="avg"))
    no_bias = "vit_small_patch16_dinov3.lvd1689m"
    rope = replace(net.config, positions="rope", layer_scale=0.1, registers=4, eps=1e-5, heads=4)
    with pytest.raises(ValueError, match="q_bias"):
        net = vit.ViT(rope)
        nn.init.ones_(net.blocks[0].attn.qkv.bias)
        conversion.timms(Model(net), timms(no_bias, num_heads=4, embed_dim=128, depth=6))
    qkvb = "vit_small_patch16_dinov3_qkvb.lvd1689m"
    net = vit.ViT(replace(rope, layer_scale=1.0, image_size=64, patch=16, rope_base=10.0))
    other = partial(timms, qkvb, num_heads=4, embed_dim=128, depth=6, img_size=64)
    with pytest.raises(ValueError, match="another function: on an image of noise"):
        conversion.timms(Model(net), other(num_classes=5, global_pool="avg", use_fc_norm=True))


def test_a_plain_student_takes_the_maps_of_the_tokens_that_it_has(small, tmp_path):
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    settings = asked(attention_copy, name, tmp_path, "--layers", "all", "--student", "plain")
    task = attention_copy.task(settings, images_of(84))
    student, whose = task.net, task.loss.keywords["teacher"]
    assert student.config == plain(name, image_size=84, patch=14)
    batch = torch.randn(2, 3, 84, 84)
    kept = [0, *range(5, 5 + 36)]
    looks = student.run(batch, given=whose.queries_keys(batch, [0, 1]))
    for (_, used), (_, theirs) in zip(looks, whose.teacher.run(batch), strict=True):
        p = attention_map(theirs)[:, :, kept][..., kept]
        torch.testing.assert_close(attention_map(used), p / p.sum(dim=-1, keepdim=True))


def test_heads_taken_together_are_compared_with_the_students_taken_together():
    """As in AttnDistill's code: where numbers of heads differ, those of both."""
    teacher, student = (vit.ViT(replace(plain("mini"), heads=heads)).eval() for heads in (2, 4))
    settings = attention_distill.parse(["--heads", "together"])
    whose = lending.lender(teacher, student, [0, 2], heads="together")
    batch, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 4])
    terms, also = attention_distill.loss(student, batch, labels, whose, [0, 2], settings)
    maps = [[attention_map(used) for _, used in net.run(batch)] for net in (teacher, student)]
    found = 0.0
    for i in (0, 2):
        p_t, p_s = ((p[i].log().sum(dim=1) / 10).softmax(dim=-1) for p in maps)
        found = found - (p_t * p_s.log()).sum(dim=-1).mean()
    torch.testing.assert_close(terms["attention"], 3 * found)
    assert also["kl"] > 0
    terms["attention"].backward()
    assert student.blocks[2].attn.qkv.weight.grad.abs().sum() > 0
    twin = lending.lender(student, student, [0, 2], heads="together")
    _, also = attention_distill.loss(student, batch, labels, twin, [0, 2], settings)
    assert abs(also["kl"]) < 1e-5


def test_a_teacher_of_another_depth_drops_no_paths():
    """Its layers are others: the note says so, and the student's mask would not fit."""
    teacher = vit.ViT(replace(plain("mini"), depth=4)).eval()
    student = vit.ViT(plain("mini"), drop_path=0.9)
    whose, batch = lending.lender(teacher, student, [0, 2]), torch.randn(4, 3, 32, 32)
    mask = student.draw_drop_path_mask(4, "cpu")
    assert (mask == 0).any()
    pairs = zip(whose.queries_keys(batch, [0, 2], mask), teacher.run(batch), strict=False)
    for lent, (_, used) in pairs:
        assert lent is None or torch.equal(lent.q, used.q)


def test_layers_and_heads_are_those_that_are_named(small, tmp_path):
    name = "beitv2_base_patch16_224.in1k_ft_in1k"
    more = ("--model", "mini", "--layers", "3-4", "--teacher-layers", "0-1", "--patch", "16")
    batch = torch.randn(2, 3, 96, 96)
    with pytest.raises(ValueError, match="the teacher has 3 heads and the student 4"):
        attention_copy.task(asked(attention_copy, name, tmp_path, *more), images_of(96))
    one = ("--heads", "together")
    task = attention_copy.task(asked(attention_copy, name, tmp_path, *more, *one), images_of(96))
    whose = task.loss.keywords["teacher"]
    looks = list(task.net.run(batch, given=whose.queries_keys(batch, [3, 4])))
    for i, (_, theirs) in enumerate(whose.teacher.run(batch)):
        p = attention_map(theirs)
        p = torch.softmax(p.log().sum(dim=1) / 10, dim=-1)  # AttnDistill's
        for head in range(4):
            torch.testing.assert_close(attention_map(looks[3 + i][1])[:, head], p)

    torch.save(task.export(task.net), tmp_path / "copy.pt")
    opened = checkpoints.open_model(tmp_path / "copy.pt")
    with torch.no_grad():
        torch.testing.assert_close(opened(batch), task.predict(task.net.eval(), batch))

    picked = lending.lender(vit.ViT(plain("mini")).eval(),
                            vit.ViT(replace(plain("mini"), heads=2)), [0, 2],
                            heads="1,3")  # fmt: skip
    one = lending.Lender(picked.teacher, {0: 0}, heads=(2,))
    net, lent = lending.described(one)
    assert lending.lender(net, vit.ViT(replace(plain("mini"), heads=1)), [0], *lent).heads == [2]
    images = torch.randn(2, 3, 32, 32)
    theirs = [attention_map(used)[:, [1, 3]] for _, used in picked.teacher.run(images)]
    lent = list(picked.queries_keys(images, [0, 2]))
    assert lent[1] is None
    for i in (0, 2):
        torch.testing.assert_close(attention_map(lent[i]), theirs[i])


def plain(model: str, image_size: int = 32, patch: int = 8) -> vit.Config:
    return vit.Config(image_size, patch, 3, 5, *families.size(model))


def test_a_file_is_known_by_its_name_or_its_folders():
    for source, name in (
        ("vit_base_patch16_224.mae", "vit_base_patch16_224.mae"),
        ("vit_huge_patch14_clip_224", "vit_huge_patch14_clip_224.laion2b"),
        ("beitv2_base_patch16_224", None), ("vit_base_patch16_224", None),  # there are several
        ("a/vit_base_patch16_224.mae/model.safetensors", "vit_base_patch16_224.mae"),
        ("a/dinov2_vits14_reg4_pretrain.pth", "dinov2_vits14_reg4_pretrain"),
        ("https://x.com/dino_vitbase8_pretrain.pth", "dino_vitbase8_pretrain"),
        ("https://huggingface.co/timm/vit_base_patch16_clip_224.openai/resolve/main/"
         "model.safetensors?download=true", "vit_base_patch16_clip_224.openai"),
        ("a/vit_b_16-c867db91.pth", "torchvision:vit_b_16"),
        (families.MEMBERS["ibot_vitb_16"].url, "ibot_vitb_16"),
        ("a/model.safetensors", None), ("checkpoint_teacher.pth", None), ("auto", None), ("", None),
        ("runs/model=b/model.pt", None),
    ):  # fmt: skip
        member, _ = families.locate(source)
        assert (member.name if member else None) == name, source
    for script, argv in ((pretrain, []), (finetune, ["--teacher", "mae"]), (finetune, [])):
        assert script.parse(argv).model == "micro"


# What is wrong ------------------------------------------------------------------------------------


class Answers(http.server.BaseHTTPRequestHandler):
    """/403 and /404 say so; /cut promises more than it sends; /whole sends a file.

    /kill ends who asks when half is sent.
    """

    asked: ClassVar = []

    def do_GET(self):
        self.asked.append(self.path)
        code = int(self.path[1:4]) if self.path[1:4].isdigit() else 200
        self.send_response(code)
        part = self.path.startswith(("/cut", "/kill"))
        self.send_header("Content-Length", "1000" if part else "4")
        self.end_headers()
        self.wfile.write(b"abcd")
        if self.path.startswith("/kill"):
            os.kill(os.getpid(), signal.SIGTERM)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    silent = partial(torch.hub.download_url_to_file, progress=False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", silent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("file, words", [
    ("403/model.safetensors", "those who accept their licence"), ("401/x.pth", "write NAME=FILE"),
    ("404/x.pth", "fetch it elsewhere"), ("cut/model.safetensors", "its header would be"),
    ("whole/model.safetensors", "its header would be"), ("whole/x.pth", "cut short or damaged"),
    ("whole/x-0123456789.pth", "hash"), ("whole/x.pth#md5=12ab34", "its md5 differs"),
])  # fmt: skip
def test_what_cannot_be_had_leaves_nothing_behind(
    file, words, server, failing, photos, tmp_path, monkeypatch
):
    name = "vit_small_patch16_dinov3.lvd1689m"
    member = families.MEMBERS[name]._replace(url=server + file)
    monkeypatch.setitem(families.MEMBERS, name, member)
    monkeypatch.setattr(storage, "HASHED", (server.split("/")[2],))
    code, line = failing(attention_copy, [*on(photos), "--teacher", name])
    assert code == 2 and words in line
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]


def test_a_download_that_is_ended_leaves_nothing_behind(server, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        storage.fetched(server + "kill/x.pth")
    assert left.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]


def test_every_members_file_is_asked_for_and_a_query_is_part_of_what_is_asked(monkeypatch):
    asked = {}
    monkeypatch.setattr(storage, "fetch", lambda url, md5, path: asked.update({url: (md5, path)}))
    urls = [member.url for member in families.MEMBERS.values() if member.url]
    for url in (*urls, "https://a.org/x.pth?v=1", "https://a.org/x.pth?v=2"):
        storage.fetched(url)
    assert len(set(asked.values())) == len(set(urls)) + 2
    for url in urls:
        plain, _, md5 = url.partition("#md5=")
        assert asked[plain][0] == md5 and asked[plain][1].name == plain.rpartition("/")[2]
    with pytest.raises(ValueError, match="behind # may stand md5="):
        storage.fetched("https://a.org/x.pth#sha256=12ab34cd")


def test_a_file_is_downloaded_once_for_all_processes(server, tmp_path):
    Answers.asked.clear()
    start = (f"file://{tmp_path}/store", server + "whole/x.pth")
    torch.multiprocessing.start_processes(fetch_as, start, nprocs=2, start_method="fork")
    assert Answers.asked == ["/whole/x.pth"]
    assert [path.name for path in (tmp_path / "hub").rglob("*.*") if path.is_file()] == ["x.pth"]


def fetch_as(rank: int, store: str, url: str):
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    assert storage.fetched(url).read_bytes() == b"abcd"


def on(photos) -> list[str]:
    return ["--data", "folder", "--data-dir", str(photos), "--image-size", "112"]


def test_no_network_is_said(failing, photos, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    name = "vit_small_patch16_dinov3.lvd1689m"
    member = families.MEMBERS[name]._replace(url="http://127.0.0.1:1/model.safetensors")
    monkeypatch.setitem(families.MEMBERS, name, member)
    code, line = failing(attention_copy, [*on(photos), "--teacher", name])
    assert code == 2 and "cannot download" in line and "refused" in line


@pytest.mark.parametrize("teacher, words", [
    ("vit_small_patch16_dinov4", "no family has one of that name"),
    ("vit_base_patch16_clip_224", "is it vit_base_patch16_clip_224.openai or"),
    ("vit_small_patch16_dinov4=x.pth", "no family has a 'vit_small_patch16_dinov4'"),
    ("vit_base_patch16_224.mae=FILE", "48 wide and 2 deep, but vit_base_patch16_224.mae is 768"),
    ("vit_small_patch14_dinov2.lvd142m=FILE", "48 wide and 2 deep"),
    ("FILE", "it is no plain ViT (registers, LayerScale, SwiGLU, no positions)"),
])  # fmt: skip
def test_a_name_that_does_not_fit_its_file(teacher, words, failing, photos, tmp_path):
    net = timms("vit_small_plus_patch16_dinov3.lvd1689m")
    teacher = teacher.replace("FILE", str(written(net, tmp_path)))
    code, line = failing(attention_copy, [*on(photos), "--teacher", teacher])
    assert code == 2 and words in line


def test_what_the_family_has_not_or_the_file_lacks_is_refused(small, tmp_path):
    net = timms("vit_small_patch14_dinov2.lvd142m")
    path = written(net, tmp_path)
    for name, words in (
        ("vit_huge_patch14_224.mae", "the file has LayerScale"),
        ("vit_small_patch14_reg4_dinov2.lvd142m", "the file lacks registers"),
    ):
        with pytest.raises(ValueError, match=words):
            read(f"{name}={path}")
    state = net.state_dict()
    del state["blocks.1.norm2.bias"]
    save_file(state | {"blocks.1.extra": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"norm2.bias is missing; blocks.1.extra is not ours"):
        load(read(f"vit_small_patch14_dinov2.lvd142m={path}"), classes=0)


def test_components_are_those_that_are_named(failing, tmp_path):
    asked = pretrain.parse(["--components", "registers=2,norm_pre=1,positions=absolute+rope"])
    config = pretrain.task(asked).net.encoder.config
    assert (config.registers, config.norm_pre, config.positions) == (2, True, "absolute+rope")
    for odd, words in (
        ("register=2", "choose from class_token"), ("registers=x", "not of type int"),
        ("positions=near", "positions 'near'"), ("registers=-1", "registers -1"),
        ("positions=relative,registers=1", "no more"),
    ):  # fmt: skip
        code, line = failing(pretrain, ["--components", odd, "--out", tmp_path])
        assert code == 2 and words in line


def test_a_student_is_compared_with_its_teacher_at_its_own_size(small, photos, tmp_path):
    """The teacher was trained at 518 pixels, the student at 84: both look at images of 84."""
    name = "vit_small_patch14_dinov2.lvd142m"
    (tmp_path / name).mkdir()
    path = written(timms(name), tmp_path / name)
    argv = ["--data", "folder", "--data-dir", str(photos), "--workers", "0", "--image-size", "84"]
    argv += ["--epochs", "1", "--warmup", "0", "--batch", "8", "--layers", "all"]
    script = attention_copy
    script.main(script.parse([*argv, "--teacher", str(path), "--out", str(tmp_path / "copy")]))
    for pair in ([path, tmp_path / "copy/model.pt"], [tmp_path / "copy/model.pt", path]):
        asked = [*map(str, pair), "--out", str(tmp_path / "compared"), "--workers", "0"]
        found = analysis.main(analysis.parse(asked))
        assert found["images"] == 15 and found["data"] == "folder"
        assert max(layer["divergence"] for layer in found["layers"]) < 1e-5


def test_half_files_are_refused(small, tmp_path):
    for name, gone, words in (
        ("vit_base_patch16_224.mae", "blocks.1.attn.qkv.bias", "qkv.bias is missing"),
        ("vit_base_patch16_224.mae", "patch_embed.proj.bias", "proj.bias is missing"),
        ("beitv2_base_patch16_224.in1k_ft_in1k", "blocks.1.attn.v_bias", "qkv.bias is missing"),
        ("vit_small_patch16_dinov3.lvd1689m", "cls_token", "lacks the class token"),
    ):
        state = timms(name).state_dict()
        del state[gone]
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=words):
            load(read(f"{name}={tmp_path / 'x.pth'}"), classes=0)
    state |= {"storage_tokens": state["reg_token"]}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="two of its tensors are reg_token"):
        read(f"vit_small_patch16_dinov3.lvd1689m={tmp_path / 'x.pth'}")


def test_a_file_of_ours_is_what_it_says_wherever_it_lies(tmp_path):
    out = tmp_path / "vit_tiny_patch16_224.augreg_in21k"
    out.mkdir()
    about = {"normalization": ([0.1] * 3, [0.2] * 3), "method": "scratch"}
    for name in ("model.pt", "vit_tiny_patch16_224.augreg_in21k.pt"):
        torch.save(checkpoints.export(vit.ViT(plain("mini"))) | about, out / name)
        found = read(out / name)
        assert (found.method, found.normalization) == ("scratch", ([0.1] * 3, [0.2] * 3))


def test_what_is_the_readers_is_never_removed(failing, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    mine = tmp_path / "mine.pth"
    mine.write_bytes(b"no checkpoint")
    for source in (f"file://{mine}", str(mine), f"http://x/../../{mine}"):
        code, _ = failing(attention_copy, ["--teacher", source, "--out", tmp_path / "run"])
        assert code == 2 and mine.read_bytes() == b"no checkpoint"


@pytest.mark.parametrize("argv, words", [
    (["--layers", "1,0"], "from the first to the last"),
    (["--layers", "0,1", "--teacher-layers", "3,1"], "from the first to the last"),
    (["--heads", "2,1"], "from the first to the last"), (["--layers", "inf%"], "write a count"),
    (["--layers", "0%"], "choose at least one"), (["--layers", "200%"], "4 layers"),
    (["--components", "registers=4"], "this teacher has its own"),
])  # fmt: skip
def test_what_would_be_done_otherwise_than_asked_is_refused(argv, words, failing, tmp_path):
    torch.manual_seed(0)
    net = vit.ViT(vit.Config(12, 3, 1, 0, 64, 4, 4))
    torch.save(checkpoints.export(net), tmp_path / "teacher.pt")
    more = ["--teacher", tmp_path / "teacher.pt", "--out", tmp_path / "run"]
    code, line = failing(attention_copy, [*argv, *more])
    assert code == 2 and words in line


# Sinks --------------------------------------------------------------------------------------------


def test_sinks_are_those_of_loops_and_of_planted_ones():
    torch.manual_seed(0)
    config = replace(plain("mini"), registers=2)
    net = vit.ViT(config).eval().requires_grad_(False)
    images = torch.randn(5, 3, 32, 32)
    layers = sinks.sinks(checkpoints.Model(net), images.split(2))
    for layer, (_, used) in zip(layers, net.run(images), strict=True):
        p, norms = attention_map(used), used.v.norm(dim=-1)
        for head in range(4):
            share, value = [], []
            for image in range(5):
                to = p[image, head].mean(dim=0)
                best = int(to[3:].argmax()) + 3
                share.append([to[0], to[1] + to[2], to[best]])
                of = norms[image, head] / norms[image, head, 3:].mean()
                value.append([of[0], (of[1] + of[2]) / 2, of[best]])
            for i, place in enumerate(sinks.PLACES):
                for what, cells in (("share", share), ("values", value)):
                    mean = sum(cell[i] for cell in cells) / 5
                    assert layer[f"{what}: {place}"][head] == pytest.approx(mean.item(), rel=1e-5)


def test_sinks_of_several_teachers_from_the_command_line(small, photos, tmp_path, capsys):
    names = ("vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m")
    for name in names:
        (tmp_path / name).mkdir()
        written(timms(name, img_size=84), tmp_path / name)
    paths = [str(tmp_path / name / "model.safetensors") for name in names]
    argv = [*paths, "--data", "folder", "--data-dir", str(photos), "--workers", "0"]
    sinks.main(sinks.parse([*argv, "--out", str(tmp_path / "sinks.json")]))
    printed = capsys.readouterr().out
    assert (
        "registers" in printed.split(names[1])[1] and "registers" not in printed.split(names[0])[0]
    )
    found = json.loads((tmp_path / "sinks.json").read_text())["models"]
    layers = found[paths[1]]["layers"]
    assert len(layers) == 2 and len(layers[0]["share: registers"]) == 3
    assert found[paths[0]]["images"] == 15
