"""Changed transfers: without their change they are the methods; each change does what it says."""

import pytest
import torch
from torch.testing import assert_close

import attention_copy
import attention_distill
import checkpoints
import finetune
import pretrain
from attention import Attended, attend, attention_map, lend_map
from experiments import variants

FEW = ["--device", "cpu", "--num-labels", "20", "--batch", "10"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher's file: one epoch of MAE."""
    out = tmp_path_factory.mktemp("teacher")
    argv = ["--device", "cpu", "--epochs", "1", "--warmup", "0", "--out", str(out)]
    pretrain.main(pretrain.parse(argv))
    return str(out / "model.pt")


@pytest.fixture
def batch():
    torch.manual_seed(5)
    return torch.randn(6, 1, 12, 12), torch.randint(10, (6,))


def made(script, teacher, *argv):
    return script.task(script.parse([*FEW, "--teacher", teacher, *argv]))


def losses_and_gradients(task, batch):
    torch.manual_seed(0)  # the same branches are dropped
    task.net.train().zero_grad()
    terms, _ = task.loss(task.net, *batch)
    sum(terms.values()).backward()
    return terms, {name: p.grad for name, p in task.net.named_parameters()}


@pytest.mark.parametrize("more", ["--share-drops", "--no-share-drops"])
@pytest.mark.parametrize("how", ["copy", "distill"])
def test_without_a_change_it_is_the_method(how, more, teacher, batch):
    script = {"copy": attention_copy, "distill": attention_distill}[how]
    argv = ["--layers", "3", "--drop-path", "0.5", more]
    method, variant = made(script, teacher, *argv), made(variants, teacher, *argv, "--how", how)
    for one, other in zip(
        losses_and_gradients(method, batch), losses_and_gradients(variant, batch), strict=True
    ):
        assert_close(one, other)
    assert_close(
        method.predict(method.net.eval(), batch[0]), variant.predict(variant.net.eval(), batch[0])
    )


def test_the_teachers_weights_with_the_teachers_maps_are_at_first_the_teacher(teacher, batch):
    lent = made(variants, teacher, "--start", "teacher")
    own = made(finetune, teacher)
    ours, theirs = (task.predict(task.net.eval(), batch[0]) for task in (lent, own))
    assert_close(ours, theirs)


@pytest.mark.parametrize("part", ["q", "k", "v", "qkv"])
def test_of_what_is_lent_the_rest_is_the_students(part, teacher, batch):
    task = made(variants, teacher, "--lend", part)
    theirs = checkpoints.open_model(teacher).net
    lent = next(used for _, used in theirs.run(batch[0]))
    with torch.no_grad():
        x = task.net.blocks[0].norm1(task.net.embed(batch[0]))
        q, k, v = task.net.blocks[0].attn.project(x, 0, 3)
        own = {"q": q, "k": k, "v": v}
        expected = attend(
            Attended(**{p: getattr(lent if p in part else Attended(**own), p) for p in "qkv"})
        )
        loans = task.predict.keywords["loans"](batch[0], None, training=False)
        _, used = next(task.net.run(batch[0], given=loans))
    assert_close(attend(used), expected)


def test_mean_maps_are_the_mean_of_maps_and_other_maps_those_of_other_images(teacher, batch):
    task = made(variants, teacher, "--maps", "mean", "--bank", "70")
    loans, net = task.predict.keywords["loans"], checkpoints.open_model(teacher).net
    with torch.no_grad():
        maps = [attention_map(used) for _, used in net.run(loans.bank)]
    for loan, p in zip(loans(batch[0], None, training=False), maps, strict=True):
        assert_close(attention_map(loan), p.mean(dim=0).expand(6, -1, -1, -1), rtol=1e-4, atol=1e-6)
    other = made(variants, teacher, "--maps", "other", "--bank", "6").predict.keywords["loans"]
    loans, usual = other(batch[0], None, training=False), [used for _, used in net.run(other.bank)]
    assert_close([loan.q for loan in loans], [used.q for used in usual])
    torch.manual_seed(0)
    drawn = [other(batch[0], None, training=True)[0].q.sum(dim=(1, 2, 3)) for _ in range(5)]
    drawn = {tuple(sums.tolist()) for sums in drawn}
    assert len(drawn) > 1


def test_fixed_maps_are_what_they_are_called(teacher, batch):
    net = checkpoints.open_model(teacher).net
    assert_close(variants.uniform_map(net), torch.full((1, 4, 17, 17), 1 / 17))
    torch.manual_seed(1)
    p = variants.impulse_map(net)
    assert_close(p.sum(dim=-1), torch.ones(1, 4, 17))
    for head in p[0]:
        steps = []
        for query in (6, 7, 10, 11):  # patches with neighbours on all sides, of 4 x 4
            key = head[query].argmax().item()
            steps.append(((key - 1) // 4 - (query - 1) // 4, (key - 1) % 4 - (query - 1) % 4))
        assert len(set(steps)) == 1 and max(map(abs, steps[0])) <= 1
    task = made(variants, teacher, "--maps", "impulse", "--how", "distill")
    target = task.loss.keywords["loans"](batch[0], None, training=True)[0]
    ours = lend_map(attention_map(target))
    assert_close(attention_map(ours), attention_map(target))


def test_a_detached_loss_moves_queries_and_keys_and_no_token(teacher, batch):
    grads = {}
    for detach in ("--detach", "--no-detach"):
        argv = ["--how", "distill", "--layers", "1", "--class-weight", "0", detach]
        _, grads[detach] = losses_and_gradients(made(variants, teacher, *argv), batch)
    moved = "blocks.0.attn.qkv.weight"
    assert_close(grads["--detach"][moved], grads["--no-detach"][moved])
    assert grads["--detach"]["patch_embed.proj.weight"].abs().max() == 0
    assert grads["--no-detach"]["patch_embed.proj.weight"].abs().max() > 0


def test_losses_of_features_and_logits_against_their_formulas(teacher, batch, tmp_path):
    features = made(variants, teacher, "--how", "features", "--layers", "1-2")
    net = checkpoints.open_model(teacher).net
    terms, _ = losses_and_gradients(features, batch)
    expected = 0.0
    for i, ((ours, _), (theirs, _)) in enumerate(
        zip(features.net.run(batch[0]), net.run(batch[0]), strict=True)
    ):
        if i in (1, 2):
            for x, y in zip(ours.flatten(0, 1), theirs.flatten(0, 1), strict=True):
                x, y = ((z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt() for z in (x, y))
                expected += ((x - y) ** 2).mean().item() / (6 * 17)
    assert terms["features"].item() == pytest.approx(3 * expected, rel=1e-4)

    out = tmp_path / "tuned"
    argv = [*FEW, "--teacher", teacher, "--epochs", "1", "--warmup", "0", "--out", str(out)]
    finetune.main(finetune.parse(argv))
    path = str(out / "model.pt")
    logits = made(variants, path, "--how", "logits", "--temperature", "2")
    terms, _ = losses_and_gradients(logits, batch)
    p = (checkpoints.open_model(path)(batch[0]) / 2).softmax(-1)
    log_q = (logits.net(batch[0]) / 2).log_softmax(-1)
    soft = -sum((p[i] * log_q[i]).sum().item() for i in range(6)) / 6
    assert terms["logits"].item() == pytest.approx(3 * 4 * soft, rel=1e-5)


def test_a_probe_trains_a_head_on_what_the_teacher_sees(teacher, tmp_path):
    argv = ["--how", "probe", "--epochs", "2", "--warmup", "0", "--out", str(tmp_path)]
    variants.main(variants.parse([*FEW, "--teacher", teacher, *argv]))
    before, after = (checkpoints.read(path).weights for path in (teacher, tmp_path / "model.pt"))
    for name in after.keys() - {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}:
        assert_close(after[name], before[name], rtol=0, atol=0)
    assert after["head.weight"].abs().max() > 1e-3


def test_what_was_lent_a_fixed_map_is_not_taken_for_a_vit_of_its_own(teacher, tmp_path):
    argv = ["--maps", "uniform", "--epochs", "1", "--warmup", "0", "--out", str(tmp_path)]
    variants.main(variants.parse([*FEW, "--teacher", teacher, *argv]))
    with pytest.raises(ValueError, match="holds no ViT"):
        checkpoints.open_model(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--start", "teacher", "--teacher", "random"], "--start teacher: name a --teacher"),
        (["--how", "logits", "--teacher", "random"], "--how logits: name a --teacher"),
        (["--maps", "mine"], "--maps mine: choose one of"),
    ],
)
def test_what_cannot_be_is_said(argv, said):
    with pytest.raises(ValueError, match=said):
        variants.task(variants.parse([*FEW, *argv]))
