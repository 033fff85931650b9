"""The paired forward against two separate passes, on every family; the losses against plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from pair import IDS, Pair
from tiny import CONFIGS, tiny_model

from nuteprune.arch import read_spec
from nuteprune.config import LoraConfig, LossConfig
from nuteprune.model.layers import build_view, fresh_lora
from nuteprune.model.losses import IGNORE, head, weights
from nuteprune.model.losses.head import head_loss
from nuteprune.model.pairing import PairedModel


def separate_passes(pair: Pair, loss: LossConfig):
    """The same loss from two whole passes that keep every layer's hidden state and all logits."""
    states = {}

    def streams(view, name):
        kept = []
        hooks = [l.layer.register_forward_hook(lambda m, a, out: kept.append(out)) for l in pair.model.layers]
        logits = pair.model.logits(IDS, view)
        for hook in hooks:
            hook.remove()
        states[name] = kept
        return logits

    with torch.no_grad():
        target = streams(pair.teacher, "teacher")
    logits = streams(pair.student, "student")
    terms = []
    for view, s, t in zip(pair.student.layers, states["student"], states["teacher"], strict=True):
        if view.kept.removed:
            continue
        if s is states["student"][-1]:  # the last hidden state of transformers is normed
            s, t = (pair.model.model.model.norm(x) for x in (s, t))
        kept = pair.student.hidden.detach() != 0
        terms.append((s - t)[..., kept].square().mean())
    layer = torch.stack(terms).sum()
    t = loss.temperature
    kl = t**2 * F.kl_div((logits / t).log_softmax(-1), (target / t).softmax(-1), reduction="sum") / IDS.numel()
    entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    return loss.layer_weight * layer + loss.kl_weight * kl + loss.label_weight * entropy


@pytest.mark.parametrize("name", CONFIGS)
def test_without_gates_and_lora_the_model_is_untouched(name):
    hf = tiny_model(name)
    with torch.no_grad():
        expected = hf(IDS).logits
        model = PairedModel(hf, read_spec(hf.config), LoraConfig())
        view = build_view(model.spec, None, model.lora(), model.scaling, torch.float32)
        # A fused projection becomes several products, which round differently, and experts are summed in another order.
        other = name.startswith("phi3") or model.spec.experts > 1
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if other else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(model.logits(IDS, view), expected, **tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_paired_loss_equals_two_separate_passes(name):
    pair = Pair(name)
    loss = LossConfig(layer_weight=0.9, label_weight=0.3, temperature=2 / 3)
    expected = separate_passes(pair, loss)
    paired = pair.model(IDS, pair.student, pair.teacher, loss).total
    torch.testing.assert_close(paired, expected, rtol=1e-6, atol=0)
    for a, b in zip(pair.gradients(paired), pair.gradients(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max() + 1e-3))


@pytest.mark.parametrize("name", CONFIGS)
def test_removed_units_cost_nothing_and_change_nothing(name):
    results = []
    for skip in (True, False):
        pair = Pair(name, skip=skip, dtype=torch.float64)
        total = pair.model(IDS, pair.student, pair.teacher, LossConfig()).total
        results.append((total, pair.gradients(total)))
    (skipped, gradients), (dense, expected) = results
    torch.testing.assert_close(skipped, dense, rtol=1e-5, atol=0)
    # Transformers norms in float32 whatever the model's type: what rounding does is measured by the whole gradient.
    largest = max(float(b.abs().max()) for b in expected)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_checkpointing_gives_the_same_loss_and_gradients(attention):
    results = []
    for checkpointing in (False, True):
        pair = Pair("llama", checkpointing, attention=attention)
        total = pair.model(IDS, pair.student, pair.teacher, LossConfig()).total
        results.append((total, pair.gradients(total)))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(a, b)


def test_no_list_of_hidden_states_is_kept():
    """The teacher's stream lives for one layer: the number of live [B, T, D] tensors does not grow with depth."""
    import gc
    import weakref

    pair = Pair("llama")
    alive, most = [], 0

    def watch(module, args, output):
        nonlocal most
        if not output.requires_grad:
            alive.append(weakref.ref(output))
        gc.collect()
        most = max(most, sum(r() is not None for r in alive))

    for layer in pair.model.layers:
        layer.layer.register_forward_hook(watch)
    pair.model(IDS, pair.student, pair.teacher, LossConfig())
    assert len(alive) == 3
    assert most <= 2


def test_no_teacher_is_the_language_model_loss():
    pair = Pair("qwen2")
    loss = pair.model(IDS, pair.student, None, LossConfig()).total
    logits = pair.model.logits(IDS, pair.student)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for a, b in zip(pair.gradients(loss), pair.gradients(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max() + 1e-3))


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_chunked_losses_equal_the_whole_in_double(chunk, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(11, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(31, 8, generator=generator, dtype=torch.float64)
    whole = (
        4
        * F.kl_div((student @ weight.T / 2).log_softmax(-1), (teacher @ weight.T / 2).softmax(-1), reduction="sum")
        / 11
    )
    labels = torch.tensor([3, 0, 30, IGNORE, 7, 7, IGNORE, 1, 2, 29, IGNORE])
    entropy = F.cross_entropy(student @ weight.T, labels, ignore_index=IGNORE)
    config = LossConfig(kl_weight=0.7, label_weight=0.3, temperature=2.0)
    total, terms = head_loss(student, weight, weights(config, taught=True), config, teacher, labels)
    torch.testing.assert_close(terms["kl"].double(), whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms["label"].double(), entropy, rtol=1e-5, atol=0)
    expected = 0.7 * whole + 0.3 * entropy
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
    (a,), (b,) = torch.autograd.grad(total, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_teacher_may_have_another_head(monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(11, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, other = (torch.randn(31, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 31, (11,), generator=generator)
    student.requires_grad_()
    config = LossConfig()
    total, _ = head_loss(student, weight, weights(config, taught=True), config, teacher, labels, other)
    logits, target = student @ weight.T, teacher @ other.T
    kl = F.kl_div(logits.log_softmax(-1), target.softmax(-1), reduction="sum") / 11
    expected = kl + F.cross_entropy(logits, labels)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
    a, b = (torch.autograd.grad(each, student)[0] for each in (total, expected))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_full_logits_never_exist_at_once(monkeypatch):
    shapes = []
    original = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: shapes.append((len(x), len(w))) or original(x, w, b))
    hidden, weight = torch.randn(50, 8, requires_grad=True), torch.randn(31, 8)
    monkeypatch.setattr(head, "CHUNK", 16)
    config = LossConfig()
    teacher, labels = torch.randn(50, 8), torch.randint(0, 31, (50,))
    head_loss(hidden, weight, weights(config, taught=True), config, teacher, labels)[0].backward()
    assert shapes
    assert max(rows for rows, _ in shapes) == 16


def test_lora_starts_alike_on_every_device():
    """From the host's generator: a GPU draws by the number of its processors, in which ranks may differ."""
    layers, states = tiny_model("llama").model.layers, []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        lora = fresh_lora(layers, LoraConfig(rank=2), torch.device(device))
        assert {factor.device.type for pair in lora.values() for factor in pair} == {device}
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
