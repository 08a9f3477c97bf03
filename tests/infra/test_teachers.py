"""Public teachers: each family's files, in timm's and the authors' names, against timm."""

import functools
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torchvision.io import decode_jpeg

import attention_copy
import attention_distill
import data
import finetune
import vit
from common import checkpoints
from datasets.images import centre_crop
from teachers import load, positions, zoo
from teachers.__main__ import main as list_teachers
from teachers.adapt import TeacherAdapter, adapt
from teachers.classes import match_classes
from teachers.load import build, build_vit, open_model, read_checkpoint
from teachers.to_timm import to_timm
from teachers.vit import Config

SMALL = dict(dim=48, depth=2, heads=3)
ONE_OF_EACH = (
    "vit_base_patch16_224.mae", "vit_small_patch16_224.dino", "deit_tiny_patch16_224.fb_in1k",
    "vit_tiny_patch16_224.augreg_in21k", "deit3_small_patch16_224.fb_in1k",
    "vit_small_patch14_dinov2.lvd142m", "vit_giant_patch14_dinov2.lvd142m",
    "vit_small_patch14_reg4_dinov2.lvd142m", "vit_small_patch16_dinov3.lvd1689m",
    "vit_small_plus_patch16_dinov3.lvd1689m", "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m",
    "vit_base_patch32_clip_quickgelu_224.openai", "vit_base_patch32_clip_224.laion2b",
    "vit_base_patch16_siglip_224.v2_webli",
)  # fmt: skip
MAE, DINO, DEIT, *_, EUPE, _, _, SIGLIP = ONE_OF_EACH
PUBLISHED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.FAMILIES, ids=lambda family: family.title)
def test_the_table_says_what_timm_says(family):
    for member in zoo.list_models(family):
        if "/timm/" not in member.url:
            continue
        net, cfg = make_plan(member.name.split(".")[0]), timm.get_pretrained_cfg(member.name)
        said = (member.dim, member.depth, member.heads, member.patch, member.image_size)
        theirs = (net.embed_dim, len(net.blocks), net.blocks[0].attn.num_heads)
        assert said == (*theirs, net.patch_embed.patch_size[0], cfg.input_size[-1])
        assert member.url == zoo.TIMM.format(cfg.hf_hub_id.removeprefix("timm/"))
        assert family.normalization == (tuple(cfg.mean), tuple(cfg.std))
        assert family.overrides.get("eps", 1e-6) == net.blocks[0].norm1.eps
        no_commerce = "nc" in cfg.license or "noncommercial" in cfg.license
        assert no_commerce == ("no commercial use" in family.licence)


@functools.cache
def make_plan(name: str):
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False)


@pytest.fixture
def small(monkeypatch):
    """All members with the components that they have, but few and narrow layers."""
    models = {k: m._replace(**SMALL) for k, m in zoo.MODELS.items()}
    monkeypatch.setattr(zoo, "MODELS", models)


def timms(name: str, **more):
    sizes = dict(embed_dim=SMALL["dim"], depth=SMALL["depth"], num_heads=SMALL["heads"])
    return randomise(timm.create_model(name, pretrained=False, **sizes | more).eval())


@torch.no_grad()
def randomise(net):
    torch.manual_seed(0)
    for parameter in net.parameters():  # also what begins as 0 or 1
        parameter.copy_(0.2 * torch.randn_like(parameter))
    return net


def write(net, tmp_path):
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def open_vit(source):
    return build_vit(read_checkpoint(source), classes=0).eval()


@torch.no_grad()
def traces_of_timms(net, images):
    """Tokens after every block, and attention maps."""
    tokens, maps = [], []
    for block in net.blocks:
        block.attn.fused_attn = False
        block.register_forward_hook(lambda _, given, out: tokens.append(out))
        block.attn.attn_drop.register_forward_hook(lambda _, given, out: maps.append(out))
    net(images)
    return list(zip(tokens, maps, strict=True))


@torch.no_grad()
def assert_alike(ours, net, size):
    images = torch.randn(2, 3, size, size)
    theirs = traces_of_timms(net, ours.normalise(images))
    traces = [(x, qk.map()) for x, qk in ours.blockwise(images)]
    torch.testing.assert_close(traces, theirs, atol=1e-5, rtol=1e-5)
    if ours.config.classes:
        theirs = net(ours.normalise(images))
        torch.testing.assert_close(ours(images), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_tokens_and_maps_are_timms_at_the_native_and_at_another_size(name, small, tmp_path):
    """Of timm's files. And those of the authors make the same net."""
    net, native = timms(name), zoo.MODELS[name].image_size
    found = read_checkpoint(f"{name}={write(net, tmp_path)}")
    ours = build_vit(found).eval()
    assert bool(ours.config.classes) == bool(re.search("deit|augreg", name))
    assert_alike(ours, net, native)
    if not re.search("clip|augreg|webli", name):  # timm's alone, or a test of its own
        torch.save(theirs_of(name, net.state_dict()), tmp_path / "theirs.pth")
        again = open_vit(f"{name}={tmp_path / 'theirs.pth'}")
        images = torch.rand(1, 3, native, native)
        same = (one.forward_features(images) for one in (ours, again))
        torch.testing.assert_close(*same, atol=1e-5, rtol=1e-5)

    patch, antialias = ours.config.patch, zoo.MODELS[name].family.resize.antialias
    other, state = timms(name, img_size=6 * patch), net.state_dict()
    if "pos_embed" in state:
        first = state["pos_embed"].shape[1] - (native // patch) ** 2  # has the class token one?
        how = dict(num_prefix_tokens=first, antialias=antialias)
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [6, 6], **how)
    other.load_state_dict(state)
    as_timm = replace(found, resize=positions.Resize(antialias=antialias))
    assert_alike(build_vit(as_timm, image_size=6 * patch).eval(), other, 6 * patch)


def theirs_of(name: str, state: dict) -> dict:
    """timm's tensors by the names of a family's authors, as they wrap them."""
    family, renamed = zoo.MODELS[name].family.title, {}
    for key, value in state.items():
        if family == "DeiT III":
            key = key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if "registers" in family:
            if key == "pos_embed":  # with an entry for the class token
                value = torch.cat([torch.full_like(value[:, :1], 0.25), value], dim=1)
            value = value - 0.25 * (key == "cls_token")
            key = key.replace("reg_token", "register_tokens")
        if "DINOv2" in family and "giant" in name:  # in chunks of blocks
            key = re.sub(r"blocks\.(\d+)\.", r"blocks.\1.\1.", key)
            key = key.replace("fc1", "w12").replace("fc2", "w3")
        if family in ("DINOv3", "EUPE"):
            key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
            key = key.replace("reg_token", "storage_tokens").replace("mlp.fc1_g", "mlp.w1")
            key = key.replace("mlp.fc1_x", "mlp.w2")
            key = key.replace("mlp.fc2", "mlp.w3") if "plus" in name else key
            if key.endswith("q_bias"):
                v = state[key.replace("q_bias", "v_bias")]
                key, one = key.replace("q_bias", "qkv.bias"), torch.ones(len(v))
                renamed[key] = torch.cat([value, 7 * one, v])  # a key's, which the mask hides
                key, value = f"{key}_mask", torch.cat([one, float("nan") * one, one])
            if key.endswith("v_bias"):
                continue
        renamed[key] = value
    wraps = family in ("MAE", "DeiT", "DeiT III")
    renamed |= {"mask_token": torch.zeros(1, 48)}
    renamed |= {f"{part}.x": torch.ones(4) for part in ("decoder_embed", "rope_embed")}
    return {"model": renamed} if wraps else renamed


def test_moco_v3_is_found_within_the_state_of_its_training(small, tmp_path):
    net = timms(DINO)
    state = {f"module.base_encoder.{k}": v for k, v in net.state_dict().items()}
    state |= {f"module.momentum_encoder.{k}": 7 * v for k, v in net.state_dict().items()}
    heads = "module.base_encoder.head.0.weight", "module.predictor.0.weight"
    state |= dict.fromkeys(heads, torch.ones(3, 48))
    torch.save({"epoch": 300, "state_dict": state}, tmp_path / "vit-s-300ep.pth.tar")
    assert_alike(open_vit(tmp_path / "vit-s-300ep.pth.tar"), net, 224)


@pytest.mark.parametrize("new", [5, 11])
def test_positions_are_resized_as_the_code_of_the_family_does(new):
    """Of AugReg and SigLIP (scipy's zoom of order 1); and of DINO, which enlarges too much."""
    old, grid = 7, torch.randn(1, 3, 7, 7, dtype=torch.float64)
    spots = {
        "bilinear": torch.linspace(0, old - 1, new, dtype=torch.float64),
        "bicubic": (torch.arange(new, dtype=torch.float64) + 0.5) * old / (new + 0.1) - 0.5,
    }
    for name, mode in (
        ("vit_base_patch16_224.augreg_in1k", "bilinear"), (SIGLIP, "bilinear"),
        ("vit_base_patch16_224.dino", "bicubic"), ("ibot_vitb_16", "bicubic"),
        ("vit_base_patch14_dinov2.lvd142m", "bicubic"), ("webssl_dino1b_full2b_224", "bicubic"),
    ):  # fmt: skip
        line = (2 * spots[mode] + 1) / old - 1  # in -1..1, from edge to edge
        places = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)[None]
        theirs = F.grid_sample(grid, places, mode, "border", align_corners=False)
        tokens, how = rearrange(grid, "b c h w -> b (h w) c"), zoo.MODELS[name].family.resize
        ours = rearrange(positions.resize(tokens, new, how), "b (h w) c -> b c h w", h=new)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def images_of(size: int) -> data.Data:
    device = SimpleNamespace(device=torch.device("cpu"))
    return data.Data([str(i) for i in range(5)], size, *zoo.HALF, device)


def prepare(script, name: str, tmp_path, size: int, *more: str):
    """A task on images of a size, with the teacher of this name (of timm's, random)."""
    path = write(timms(name), tmp_path)
    more = ("--drop-path", "0", *more, "--device", "cpu")
    settings = script.parse(["--data", "imagenet", "--teacher", f"{name}={path}", *more])
    return script.task(settings, images_of(size), read_checkpoint(settings.teacher))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_student_looks_where_its_teacher_looks_learns_and_goes_to_timm(name, small, tmp_path):
    """One step of each method. Then the student is the same net in timm."""
    size = 6 * zoo.MODELS[name].patch
    batch, labels = torch.randn(2, 3, size, size), torch.tensor([1, 3])
    task = prepare(finetune, name, tmp_path, size)
    found = read_checkpoint(f"{name}={tmp_path / 'model.safetensors'}")
    theirs = build_vit(found, classes=0, image_size=size)
    assert torch.equal(task.net.forward_features(batch), theirs.forward_features(batch))
    task.loss(task.net, batch, labels)[0].backward()
    assert all(p.grad.isfinite().all() for p in task.net.parameters())
    for script in (attention_copy, attention_distill):
        task = prepare(script, name, tmp_path, size, "--layers", "all")
        student, teacher = task.net, task.loss.keywords["teacher"]
        assert student.config == replace(teacher.config, classes=5)
        assert (student.config.dim, student.config.patch) == (48, zoo.MODELS[name].patch)
        task.loss(student, batch, labels)[0].backward()
        for n, p in student.named_parameters():  # as DDP needs it
            assert p.grad.isfinite().all(), n
        torch.optim.SGD(student.parameters(), lr=0.1).step()
        if script is attention_copy:
            looks = student.blockwise(batch, given=teacher.lend(batch, [0, 1]))
            maps = ([qk.map() for _, qk in trace] for trace in (looks, teacher.blockwise(batch)))
            torch.testing.assert_close(*maps)

    for p in student.parameters():  # also what a step hardly moves
        p.data.add_(0.1 * torch.randn_like(p))
    target = name.replace("dinov3.", "dinov3_qkvb.")
    if "plus" in target:  # timm has one with the biases that a student learns
        target = "vit_small_plus_patch16_dinov3_qkvb.lvd1689m"
    pooled = {"use_fc_norm": True} if "dinov3" in target else {}
    net = timms(target, img_size=size, num_classes=5, global_pool="avg", **pooled)
    torch.save(task.export(student), tmp_path / "student.pt")
    net.load_state_dict(to_timm(open_model(tmp_path / "student.pt"), net))
    theirs = net(student.normalise(batch))
    torch.testing.assert_close(theirs, student.eval()(batch), atol=1e-5, rtol=1e-5)


def test_timms_of_another_function_is_refused():
    net = randomise(vit.ViT(plain("mini", 64, 16)))
    clip, mean = "vit_base_patch32_clip_quickgelu_224.openai", dict(global_pool="avg")
    same = functools.partial(timms, img_size=64, embed_dim=128, depth=6, num_heads=4, num_classes=5)
    to_timm(load.Model(net), same(MAE, **mean))
    for other in (
        same(MAE, **mean, num_heads=8), same(MAE, **mean, img_size=80), same(MAE, **mean, depth=5),
        same(MAE, global_pool="max"), same(MAE, global_pool="token"),
        same(clip, **mean, patch_size=16),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="timm's"):
            to_timm(load.Model(net), other)
    with torch.no_grad():  # 5 of 6 blocks, though the last does nearly nothing
        for p in net.blocks[5].parameters():
            p.mul_(1e-6)
    with pytest.raises(ValueError, match=r"blocks\.5"):
        to_timm(load.Model(net), same(MAE, **mean, depth=5))
    with pytest.raises(ValueError, match="its teacher's maps"):
        to_timm(load.Model(net, teacher=net, layers=(0,)), same(MAE, **mean))
    rope = Config(64, 16, 3, 5, 128, 6, 4, positions="rope", layer_scale=1.0, registers=4, eps=1e-5)
    dinov3 = "vit_small_patch16_dinov3{}.lvd1689m"
    for more, base, words in (("", 100.0, "qkv.bias"), ("_qkvb", 10.0, "outputs on noise")):
        net = randomise(build(replace(rope, rope_base=base)))
        other = same(dinov3.format(more), **mean, use_fc_norm=True)
        with pytest.raises(ValueError, match=words):
            to_timm(load.Model(net), other)


def plain(model: str, image_size: int = 32, patch: int = 8) -> vit.Config:
    return vit.Config(image_size, patch, 3, 5, *zoo.ALL_SIZES[model])


def lend_maps(lender, images, layers, **more) -> list:
    return [None if qk is None else qk.map() for qk in lender.lend(images, layers, **more)]


def test_a_student_without_registers_takes_the_maps_of_the_tokens_that_it_has():
    teacher = build(Config(84, 14, 3, 0, 48, 2, 3, registers=4, layer_scale=0.5))
    student, batch = vit.ViT(vit.Config(84, 14, 3, 5, 48, 2, 3)), torch.randn(2, 3, 84, 84)
    adapter, kept = adapt(teacher, student, [0, 1]), [0, *range(5, 5 + 36)]
    for p, (_, qk) in zip(lend_maps(adapter, batch, [0, 1]), teacher.blockwise(batch), strict=True):
        cut = qk.map()[:, :, kept][..., kept]
        torch.testing.assert_close(p, cut / cut.sum(dim=-1, keepdim=True))


def test_layers_and_heads_are_those_that_are_named(small, tmp_path):
    more, batch = "--model mini --layers 3:5 --teacher-layers :2", torch.rand(2, 3, 96, 96)
    with pytest.raises(ValueError, match=r"'heads': 3.*'heads': 4"):
        prepare(attention_copy, EUPE, tmp_path, 96, *more.split())
    task = prepare(attention_copy, EUPE, tmp_path, 96, "--teacher-layers", "1", "--layers", "0")
    adapter = task.loss.keywords["teacher"]
    lent, (_, own) = lend_maps(adapter, batch, [0]), list(adapter.teacher.blockwise(batch))[1]
    torch.testing.assert_close(lent[0], own.map())
    assert lent[1] is None and len(lent) == len(task.net.blocks)

    torch.save(task.export(task.net), tmp_path / "copy.pt")
    opened, expected = open_model(tmp_path / "copy.pt"), task.predict(task.net.eval(), batch)
    torch.testing.assert_close(opened(batch), expected)
    with pytest.raises(ValueError, match=r"in 0\.\.1"):
        opened(2 * batch - 1)
    assert len(repr(opened)) < 9999
    looks = [qk.map() for _, qk in opened.blockwise(batch)]
    torch.testing.assert_close(looks[0], own.map())
    teacher = vit.ViT(plain("mini")).eval().requires_grad_(False)
    student = vit.ViT(replace(plain("mini"), heads=2, depth=4))
    picked, images = adapt(teacher, student, [0, 2], heads=[1, 3]), torch.randn(2, 3, 32, 32)
    torch.save(checkpoints.export(student, picked, [0, 2]), tmp_path / "picked.pt")
    reopened = open_model(tmp_path / "picked.pt").teacher
    assert isinstance(reopened, TeacherAdapter) and reopened.adapted == picked.adapted
    theirs = [qk.map()[:, [1, 3]] for _, qk in teacher.blockwise(images)]
    for lender in (picked, reopened):
        lent = lend_maps(lender, images, [0, 2])
        assert lent[1] is lent[3] is None
        torch.testing.assert_close(lent[::2], theirs[:4:2])


def test_a_teacher_of_another_depth_drops_no_paths():
    teacher = vit.ViT(replace(plain("mini"), depth=4)).eval().requires_grad_(False)
    student = vit.ViT(plain("mini"), drop_path=0.9).train()
    adapter, batch = adapt(teacher, student, [0, 2]), torch.randn(4, 3, 32, 32)
    factors = student.draw_drop_path(4)
    lent = lend_maps(adapter, batch, [0, 2], factors=factors)
    own = [qk.map() for _, qk in teacher.blockwise(batch)]
    assert (factors == 0).any() and len(lent) == 6
    assert torch.equal(lent[0], own[0]) and torch.equal(lent[2], own[2])


def test_a_file_is_known_by_its_name_or_its_folders(capsys):
    for source, name in (
        (f"a/{MAE}/model.safetensors", MAE),
        (r"C:\a\webssl_mae300m_full2b_224.pth", "webssl_mae300m_full2b_224"),
        ("https://huggingface.co/timm/vit_base_patch16_clip_224.laion2b/resolve/main/"
         "model.safetensors?download=true", "vit_base_patch16_clip_224.laion2b"),
        (zoo.MODELS["mae_pretrain_vit_base"].url, "mae_pretrain_vit_base"),
        ("a/model.safetensors", None), ("checkpoint_teacher.pth", None),
    ):  # fmt: skip
        model = zoo.recognise(source)
        assert (model.name if model else None) == name, source
    assert zoo.locate("vit_huge_patch14_clip_224")[0].name == "vit_huge_patch14_clip_224.laion2b"
    assert zoo.locate("ibot_vitb_16=a.pth")[1] == "a.pth"
    for wrong, words in (
        ("vit_base_patch16_224", r"is it vit_base_patch16_224\.mae or"),
        ("no_such_file.pth", "neither a file nor"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            read_checkpoint(wrong)
    list_teachers("siglip")
    listed = re.findall(r"^  (\S+) .* heads", capsys.readouterr().out, re.MULTILINE)
    assert listed == [name for name in zoo.MODELS if "siglip" in name]


def test_no_positions_are_left_out_in_silence(tmp_path, monkeypatch):
    """EVA-02's are rotary, of which its file has no tensor. And ~ is the user's folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    net = timm.create_model("eva02_tiny_patch14_224", pretrained=False, depth=1)
    write(net, tmp_path)
    with pytest.raises(ValueError, match="rope"):
        read_checkpoint("tiny=~/model.safetensors")


def test_a_name_that_does_not_fit_its_file_is_refused(tmp_path, request, monkeypatch):
    path = write(timms("vit_small_plus_patch16_dinov3.lvd1689m"), tmp_path)
    with pytest.raises(ValueError, match="'dim': 48, 'depth': 2"):
        read_checkpoint(f"{MAE}={path}")
    with pytest.raises(ValueError, match=r"how it attends .* NAME=FILE"):
        read_checkpoint(path)
    request.getfixturevalue("small")  # from here on
    path, mae14 = tmp_path / "x.pth", "vit_huge_patch14_224.mae"
    dinov2, reg4 = "vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m"
    for name, gone, theirs, words in (
        (dinov2, "", mae14, "ls1.gamma"), (mae14, "", dinov2, "ls1.gamma"),
        (dinov2, "", reg4, "registers"), (reg4, "", dinov2, "registers"),
        ("vit_small_patch16_dinov3.lvd1689m", "", MAE, "registers"),
        ("beitv2_base_patch16_224.in1k_ft_in1k", "", MAE, "pos_embed"),
        (MAE, "blocks.1.attn.qkv.bias", MAE, "qkv.bias"),
        (EUPE, "blocks.1.attn.v_bias", EUPE, "blocks.1.attn"),
        (MAE, "patch_embed.proj.bias", MAE, "proj.bias"),
    ):  # fmt: skip
        torch.save({k: v for k, v in timms(name).state_dict().items() if k != gone}, path)
        with pytest.raises(ValueError, match=words):
            open_vit(f"{theirs}={path}")
    monkeypatch.setitem(zoo.ALL_SIZES, "small", (48, 2, 6))
    state = timms(DINO).state_dict()
    torch.save(state, tmp_path / "vit-s-300ep.pth.tar")
    torch.save({f"module.base_encoder.{k}": v for k, v in state.items()}, path)
    moco = "vit-s-300ep.pth.tar"
    for name, file in (("small", moco), (DINO, moco), ("small", "x.pth")):
        with pytest.raises(ValueError, match="vit-s-300ep"):
            read_checkpoint(f"{name}={tmp_path / file}")


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs published files in ../shared")
@pytest.mark.parametrize("name", [DEIT, "vit_tiny_patch16_224.augreg_in21k_ft_in1k"])
def test_published_files_say_of_photographs_what_timm_says(name):
    """Of 1,000 photographs. And they go to timm as they are, at any size."""
    path = PUBLISHED / "teachers" / f"{name}.safetensors"
    model, net = open_model(path), timm.create_model(name, pretrained=False).eval()
    net.load_state_dict(load_file(path))
    archive = np.load(PUBLISHED / "imagenet-sample.npz")
    files = torch.from_numpy(archive["jpeg"]).split(archive["length"].tolist())
    crop = centre_crop(224, 0.875)
    images = torch.stack([crop(decode_jpeg(file, mode="RGB")) for file in files]) / 255
    mean, std = (torch.tensor(net.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        pairs = [(model(x), net((x - mean) / std)) for x in images.split(50)]
    ours, theirs = (torch.cat(logits).argmax(dim=-1) for logits in zip(*pairs, strict=True))
    assert torch.equal(ours, theirs)
    ids = archive["wnid"].tolist()
    columns = match_classes(model, sorted(ids))
    labels = torch.tensor([columns[sorted(ids).index(one)] for one in ids])
    assert (ours == labels).float().mean() > 0.5
    for size in (224, 96):
        model = open_model(path, image_size=size)
        twin = timm.create_model(name, pretrained=False, img_size=size)
        twin.load_state_dict(to_timm(model, twin))
