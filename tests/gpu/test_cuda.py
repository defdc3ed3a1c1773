"""What only a GPU can show: both backends against the oracle, no synchronisation, bad targets, compilation, training.

    python -m pytest tests/gpu

Skipped where there is no CUDA device; `make test` and `make test-ci` run without one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from localexit import (
    ExitStep,
    Feedback,
    SharedAnchors,
    WeightMirror,
    attach,
    exit_cross_entropy,
    exit_step,
    feedback_names,
    make_feedback,
)
from localexit.exits.functional import Preset, WeightGrad
from localexit.exits.loss import LossOptions
from localexit.exits.pairs import measured_rows
from localexit.exits.reference import reference_exit
from localexit.feedback import RULES, draws, feedback_options, rows
from localexit.feedback.base import product
from localexit.feedback.products import left_terms, right_terms
from localexit.local import compile_units

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NUM_TOKENS, HIDDEN, VOCAB = 257, 64, 1003
DRAWING = [name for name in RULES if "num_draws" in feedback_options(name)]
KERNEL_RULES = [name for name in feedback_names() if not RULES[name].rule.needs_logits]
BACKENDS = [("torch", name) for name in feedback_names()] + [("triton", name) for name in KERNEL_RULES]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Waiting for the GPU, or reading from it, is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_rule(name: str) -> Feedback:
    rule = make_feedback(name, HIDDEN, VOCAB, seed=3)
    if isinstance(rule, WeightMirror):
        rule.rows.normal_(generator=torch.Generator().manual_seed(5))
    return rule


def make_case(scale: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
    target = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
    target[5:9] = -100
    hidden[5] = torch.nan
    return {
        "hidden": hidden,
        "weight": torch.randn(VOCAB, HIDDEN, generator=generator) * scale,
        "bias": torch.randn(VOCAB, generator=generator),
        "target": target,
        "token_weight": torch.randn(NUM_TOKENS, generator=generator),
    }


def run(case: dict[str, Tensor], rule: Feedback, dtype: torch.dtype, **options: Any) -> tuple[Tensor, ...]:
    hidden, weight, bias = (case[k].cuda().to(dtype).requires_grad_() for k in ("hidden", "weight", "bias"))
    loss = exit_cross_entropy(
        hidden,
        weight,
        case["target"].cuda(),
        feedback=rule,
        linear_bias=bias,
        token_weight=case["token_weight"].cuda(),
        **options,
    )
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    return loss.detach(), hidden.grad, weight.grad, bias.grad


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double().cpu() - b).norm() / b.norm())


@pytest.mark.parametrize("chunk_bytes", [None, 100 * VOCAB * 4], ids=["one-chunk", "chunks"])
@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2, "softcap": 5.0}], ids=["plain", "z_loss-softcap"])
@pytest.mark.parametrize(("backend", "name"), BACKENDS)
def test_fp32_equals_the_oracle(backend: str, name: str, options: dict[str, Any], chunk_bytes: int | None) -> None:
    case, rule = make_case(), make_rule(name)
    expected = reference_exit(
        case["hidden"], case["weight"], case["target"], feedback=rule, linear_bias=case["bias"],
        token_weight=case["token_weight"], **options,
    )  # fmt: skip
    got = run(case, rule.cuda(), torch.float32, backend=backend, chunk_bytes=chunk_bytes, **options)
    wanted = (expected.loss, expected.feedback, expected.weight_grad, expected.bias_grad)
    # One of the 4112 draws may fall on the other side of a boundary by rounding: it moves one token's feedback.
    budgets = (1e-4, 5e-2 if name in DRAWING else 1e-4, 1e-4, 1e-4)
    errors = [relative(a, b) for a, b in zip(got, wanted, strict=True)]
    assert all(error < budget for error, budget in zip(errors, budgets, strict=True)), errors


@pytest.mark.parametrize(("backend", "name"), BACKENDS)
def test_bf16_within_budget(backend: str, name: str) -> None:
    """Twice the error of plain PyTorch in bf16, for what is exact; the feedback by the rule's own equation, loosely."""
    case = {key: value if key == "target" else value.bfloat16().float() for key, value in make_case().items()}
    rule = make_rule(name)
    arguments = (case["hidden"], case["weight"], case["target"])
    expected = reference_exit(*arguments, feedback=rule, linear_bias=case["bias"], token_weight=case["token_weight"])
    counted = case["target"] != -100
    hidden, weight, bias = (case[k].cuda().bfloat16().requires_grad_() for k in ("hidden", "weight", "bias"))
    clean = torch.where(counted.cuda()[:, None], hidden, 0)
    rows = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(clean, weight, bias).float(), case["target"].cuda(), reduction="none"
    )
    ((case["token_weight"].cuda() * rows).sum() / counted.sum()).backward()
    loss, feedback, weight_grad, bias_grad = run(case, rule.cuda(), torch.bfloat16, backend=backend)
    assert weight.grad is not None
    assert bias.grad is not None
    eps = torch.finfo(torch.bfloat16).eps
    assert relative(weight_grad, expected.weight_grad) < 2 * relative(weight.grad, expected.weight_grad) + eps
    assert relative(bias_grad, expected.bias_grad) < 2 * relative(bias.grad, expected.bias_grad) + eps
    assert relative(loss, expected.loss) < 0.02
    if name not in DRAWING and name not in ("hybrid", "parallel_topmass"):
        # Where a rounded logit decides what is picked, single tokens may differ.
        assert relative(feedback, expected.feedback) < 0.05


@pytest.mark.parametrize("spread", [1.0, 8.0, 80.0])
@pytest.mark.parametrize(("num_tokens", "width", "vocab_size"), [(5, 8, 8), (300, 72, 1000), (1000, 768, 4104)])
def test_the_product_with_exponentials_equals_two_kernels(
    num_tokens: int, width: int, vocab_size: int, spread: float
) -> None:
    from localexit.kernels.launch import error_pass, product_pass

    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_tokens, width, generator=generator).bfloat16().cuda()
    weight = (torch.randn(vocab_size, width, generator=generator) * spread / width**0.5).bfloat16().cuda()
    target = torch.randint(vocab_size, (num_tokens,), generator=generator).cuda()
    options = LossOptions(z_loss=1e-3)
    # In fp32, what the products of two bf16 numbers sum to.
    expected_values = hidden.float() @ weight.float().T
    expected = error_pass(expected_values, target, options, bias=None, need_groups=True)
    values = torch.full((num_tokens, vocab_size), torch.nan, device="cuda", dtype=torch.bfloat16)
    row_weight, is_counted = torch.rand(num_tokens, device="cuda"), torch.ones_like(target, dtype=torch.bool)
    rows = {"is_counted": is_counted, "row_weight": row_weight, "clean": torch.full_like(hidden, torch.nan)}
    got = product_pass(hidden, weight, target, options, **rows, out=values, need_groups=True)
    assert torch.equal(rows["clean"], hidden)
    assert torch.equal(got.weighted_scale, row_weight * got.scale)
    error, expected_error = (v.float() * r.scale[:, None] for v, r in ((values, got), (expected_values, expected)))
    assert torch.allclose(got.gold_logit, expected.gold_logit, rtol=1e-5, atol=1e-4)
    if spread > 60:
        # Redone from differences to gold in bf16, as exact as logits in bf16 are.
        assert torch.allclose(got.log_prob, expected.log_prob, rtol=2**-7, atol=1e-3)
        assert error.isfinite().all()
        assert torch.allclose(error.sum(1), expected_error.sum(1), atol=0.02)
        return
    # Half a unit of bf16.
    assert (error - expected_error).abs().max() < 0.006 * expected_error.abs().max()
    assert torch.allclose(got.log_prob, expected.log_prob, rtol=1e-5, atol=1e-4)
    assert torch.allclose(got.group_sum, expected.group_sum, rtol=1e-2, atol=1e-6)
    assert torch.allclose(got.group_max, expected.group_max, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", KERNEL_RULES)
def test_bf16_within_budget_without_bias(name: str) -> None:
    """As `test_bf16_within_budget`, where the product takes the exponentials itself."""
    case = make_case()
    hidden, weight = case["hidden"].bfloat16(), case["weight"][:1000].bfloat16()
    target = torch.where(case["target"] < 1000, case["target"], 3)
    rule = make_feedback(name, HIDDEN, 1000, seed=3)
    if isinstance(rule, WeightMirror):
        rule.rows.normal_(generator=torch.Generator().manual_seed(5))
    expected = reference_exit(hidden.float(), weight.float(), target, feedback=rule)
    grad_weight = torch.zeros(1000, HIDDEN, device="cuda")
    step = exit_step(
        hidden.cuda(), weight.cuda(), target.cuda(), feedback=rule.cuda(), grad_weight=grad_weight, backend="triton"
    )
    assert relative(grad_weight, expected.weight_grad) < 1e-2
    assert relative(step.loss, expected.loss) < 1e-4
    if name not in DRAWING and name not in ("hybrid", "parallel_topmass"):
        assert relative(step.feedback, expected.feedback) < 0.05


@pytest.mark.parametrize(("backend", "name"), BACKENDS)
def test_an_exit_does_not_wait_for_the_gpu(backend: str, name: str) -> None:
    case, rule = make_case(), make_rule(name).cuda()
    inputs = [case[key].cuda() for key in ("hidden", "weight", "target")]
    total = torch.zeros(VOCAB, HIDDEN, device="cuda")

    def step() -> None:
        exit_step(*inputs, feedback=rule, grad_weight=total, backend=backend, return_stats=True)
        rule.update()

    # The first step compiles kernels and makes the libraries' work spaces.
    step()
    with no_synchronisation():
        step()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_bad_target_makes_the_loss_nan_and_reads_nothing_outside(backend: str) -> None:
    case, rule = make_case(), make_rule("mirror_sampled").cuda()
    target = case["target"].cuda()
    target[3], target[4] = VOCAB, -7
    hidden, weight = case["hidden"].cuda(), case["weight"].cuda()
    loss, stats = exit_cross_entropy(
        hidden, weight, target, feedback=rule, reduction="none", backend=backend, return_stats=True
    )
    assert loss.isnan().nonzero()[:, 0].tolist() == [3, 4]
    assert bool(stats.bad_target)
    assert stats.backend == backend


# The compiler advises to use TF32, and uses what is deprecated.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated")
@pytest.mark.parametrize("name", ["dense", "mirror_sampled", "anchors", "anchors_sampled", "anchors_shared"])
def test_compiled_equals_eager(name: str) -> None:
    case = make_case()
    eager = run(case, make_rule(name).cuda(), torch.bfloat16)
    rule = make_rule(name).cuda()

    @torch.compile(fullgraph=True)
    def compiled(hidden: Tensor, weight: Tensor, target: Tensor, token_weight: Tensor, bias: Tensor) -> Tensor:
        return exit_cross_entropy(hidden, weight, target, feedback=rule, token_weight=token_weight, linear_bias=bias)

    leaves = [case[k].cuda().bfloat16().requires_grad_() for k in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    loss = compiled(hidden, weight, case["target"].cuda(), case["token_weight"].cuda(), bias)
    loss.backward()
    for got, expected in zip((loss, *(leaf.grad for leaf in leaves)), eager, strict=True):
        assert got is not None
        assert relative(got.detach(), expected.double().cpu()) < 1e-2


@pytest.mark.parametrize("name", ["dense", "anchors", "mirror_sampled"])
def test_few_compilations_over_numbers_of_tokens(name: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    case, rule = make_case(), make_rule(name).cuda()
    counter = CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return exit_cross_entropy(hidden, weight, target, feedback=rule)

    for num_tokens in (NUM_TOKENS, 100, 31, 200):
        results = []
        for call in (compiled, lambda *given: exit_cross_entropy(*given, feedback=rule)):
            hidden = case["hidden"][:num_tokens].cuda().bfloat16().requires_grad_()
            weight = case["weight"].cuda().bfloat16().requires_grad_()
            loss = call(hidden, weight, case["target"][:num_tokens].cuda())
            loss.backward()
            results.append((loss.detach(), hidden.grad, weight.grad))
            rule.discard()
        for got, expected in zip(*results, strict=True):
            assert relative(got, expected.double().cpu()) < 1e-2
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("backend", "name"), BACKENDS)
def test_master_weights_under_autocast(backend: str, name: str) -> None:
    """fp32 W, bf16 hidden states: the products of bf16 weights, a gradient in fp32."""
    case, rule = make_case(), make_rule(name).cuda()
    hidden, target = case["hidden"].cuda().bfloat16(), case["target"].cuda()
    results = []
    for is_master in (True, False):
        rule.discard()
        weight = case["weight"].cuda()
        weight = (weight if is_master else weight.bfloat16()).requires_grad_()
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=is_master):
            loss = exit_cross_entropy(leaf, weight, target, feedback=rule, backend=backend)
        loss.backward()
        assert weight.grad is not None
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad, weight.grad))
    (loss, feedback, weight_grad), expected = results
    assert (loss.dtype, feedback.dtype, weight_grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert torch.equal(loss, expected[0])
    # `transport` reads W as it is under autocast too: rounded, so all feedback is the same.
    assert relative(feedback, expected[1].double().cpu()) < 1e-2
    assert relative(weight_grad, expected[2].double().cpu()) < 1e-2


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("backend", "name"), BACKENDS)
def test_recomputation_gives_the_same_bits(backend: str, name: str, use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    case, results = make_case(), []
    for is_recomputed in (False, True):
        rule = make_rule(name).cuda()
        hidden, weight = (case[key].cuda().bfloat16().requires_grad_() for key in ("hidden", "weight"))
        target = case["target"].cuda()

        def block(hidden: Tensor, weight: Tensor = weight, target: Tensor = target, rule: Feedback = rule) -> Tensor:
            return exit_cross_entropy(1.0 * hidden, weight, target, feedback=rule, backend=backend)

        loss = checkpoint(block, hidden, use_reentrant=use_reentrant) if is_recomputed else block(hidden)
        loss.backward()
        rule.update()
        results.append((loss.detach(), hidden.grad, weight.grad, *rule.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("backend", "name"), BACKENDS)
def test_a_side_stream_gives_the_same_bits(backend: str, name: str) -> None:
    case = make_case()
    expected = run(case, make_rule(name).cuda(), torch.bfloat16, backend=backend)
    rule, stream = make_rule(name).cuda(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Something long before it: whatever runs on another stream than this one comes too early.
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy * 1e-3
        got = run(case, rule, torch.bfloat16, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("preset", ["fast", "memory"])
@pytest.mark.parametrize(("backend", "name"), BACKENDS)
def test_a_device_that_is_not_the_current_one(backend: str, name: str, preset: str) -> None:
    case, results = make_case(), []
    for device in ("cuda:0", "cuda:1"):
        rule = make_rule(name).to(device)
        if isinstance(rule, WeightMirror):
            rule.rows = rule.rows.bfloat16()
        hidden, weight = (case[key].to(device, torch.bfloat16).requires_grad_() for key in ("hidden", "weight"))
        loss = exit_cross_entropy(
            hidden, weight, case["target"].to(device), feedback=rule, backend=backend, preset=preset
        )
        loss.backward()
        rule.update()
        results.append([tensor.cpu() for tensor in (loss.detach(), hidden.grad, weight.grad, *rule.buffers())])
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("preset", ["fast", "memory"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_arguments_that_do_not_lie_number_by_number(has_bias: bool, preset: Preset) -> None:
    case, results = make_case(), []
    for is_strided in (False, True):
        given = {key: case[key].cuda() for key in ("hidden", "bias", "target")}
        if is_strided:
            given = {key: torch.stack([value, value + 1], dim=-1)[..., 0] for key, value in given.items()}
        hidden, bias = given["hidden"].bfloat16().requires_grad_(), given["bias"].requires_grad_()
        weight = case["weight"].cuda().bfloat16().requires_grad_()
        loss = exit_cross_entropy(
            hidden,
            weight,
            given["target"],
            feedback=make_rule("dense").cuda(),
            linear_bias=bias if has_bias else None,
            backend="triton",
            preset=preset,
        )
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(strided, plain)


@pytest.mark.parametrize("name", ["dense", "anchors", "anchors_shared", "mirror_sampled"])
def test_forward_and_backward_can_be_captured_in_a_graph(name: str) -> None:
    case, rule = make_case(), make_rule(name).cuda()
    hidden, weight = (case[key].cuda().bfloat16().requires_grad_() for key in ("hidden", "weight"))
    target = case["target"].cuda()

    def step() -> Tensor:
        hidden.grad = weight.grad = None
        loss = exit_cross_entropy(hidden, weight, target, feedback=rule)
        loss.backward()
        rule.discard()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss = step()
        assert hidden.grad is not None
        assert weight.grad is not None
        wanted = [tensor.clone() for tensor in (loss, hidden.grad, weight.grad)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    got = (loss, hidden.grad, weight.grad)
    for tensor in got:
        tensor.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", ["dense", "anchors", "mirror_sampled", "transport"])
def test_fp16_under_a_grad_scaler(name: str) -> None:
    """Plain PyTorch runs it: a mean over 16384 tokens, scaled by 65536, against the oracle."""
    case, rule = make_case(), make_rule(name)
    hidden, weight = case["hidden"].half(), case["weight"].half()
    arguments = (hidden.float(), weight.float(), case["target"])
    expected = reference_exit(*arguments, feedback=rule, num_items=16384)
    leaves = [tensor.cuda().requires_grad_() for tensor in (hidden, weight)]
    scaler = torch.amp.GradScaler("cuda", init_scale=65536.0)
    given = (*leaves, case["target"].cuda())
    loss, stats = exit_cross_entropy(*given, feedback=rule.cuda(), num_items=16384, return_stats=True)
    scaler.scale(loss).backward()
    assert (loss.dtype, stats.backend) == (torch.float32, "torch")
    assert relative(loss.detach(), expected.loss) < 1e-3
    budget = 5e-2 if name in DRAWING else 4 * torch.finfo(torch.float16).eps
    for leaf, exact in zip(leaves, (expected.feedback, expected.weight_grad), strict=True):
        assert leaf.grad is not None
        assert relative(leaf.grad, 65536 * exact) < budget
    with pytest.raises(ValueError, match="float16"):
        exit_cross_entropy(*given, feedback=rule, backend="triton")


def test_the_choice_is_in_the_stats() -> None:
    case = make_case()
    inputs = [case[key].cuda() for key in ("hidden", "weight", "target")]
    for name, backend in (("anchors", "triton"), ("parallel", "torch")):
        _, stats = exit_cross_entropy(*inputs, feedback=make_rule(name).cuda(), return_stats=True)
        assert stats.backend == backend


# The compiler looks at the gradients of all tensors it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mode", ["stream", "deferred"])
def test_local_training_under_autocast(mode: str, is_compiled: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
    )
    local = attach(LlamaForCausalLM(config).cuda(), feedback="mirror_sampled", backward=mode)
    if is_compiled:
        compile_units(local)
    optimizer = torch.optim.AdamW(local.parameters(), lr=3e-3)
    # A fixed batch: what is learned is seen at once.
    batch = torch.randint(256, (8, 64), device="cuda")
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = local(input_ids=batch, labels=batch)
        if mode == "deferred":
            output.loss.backward()
        optimizer.step()
        local.update()
        losses.append(output.exit_losses.float().cpu())
    assert (losses[-1] < losses[0] - 1.0).all()


@pytest.mark.parametrize(("backend", "name"), BACKENDS)
def test_two_runs_are_bitwise_the_same(backend: str, name: str) -> None:
    case = make_case()
    once, again = (run(case, make_rule(name).cuda(), torch.bfloat16, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("weight_grad", ["exact", "filtered"])
@pytest.mark.parametrize("name", ["dense", "anchors", "mirror_sampled"])
def test_a_step_can_be_captured_in_a_graph(name: str, weight_grad: WeightGrad) -> None:
    case, rule = make_case(), make_rule(name).cuda()
    hidden, weight, target = (case[key].cuda() for key in ("hidden", "weight", "target"))
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    total = torch.zeros(VOCAB, HIDDEN, device="cuda")

    def step() -> ExitStep:
        return exit_step(hidden, weight, target, feedback=rule, grad_weight=total, weight_grad=weight_grad)

    expected = step()
    wanted = total.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # On a side stream, and once before the capture.
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    total.zero_()
    graph.replay()
    assert torch.equal(total, wanted)
    assert torch.equal(captured.loss, expected.loss)
    assert expected.feedback is not None
    assert captured.feedback is not None
    assert torch.equal(captured.feedback, expected.feedback)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_exits_share_what_the_first_has_measured(backend: str) -> None:
    """In bf16, rows too; both exits against the oracle, for which W is fewer anchors than directions of the first."""
    case, expected = make_case(), None
    rule, on_gpu = (make_feedback("anchors_shared", HIDDEN, VOCAB, seed=3, num_anchors=32) for _ in range(2))
    on_gpu.cuda()
    weight = case["weight"].bfloat16()
    for index, order in enumerate((torch.arange(NUM_TOKENS), torch.arange(NUM_TOKENS).flip(0))):
        hidden, target = case["hidden"].bfloat16()[order], case["target"][order]
        given = {"reduction": "sum", "exit_index": index}
        step = exit_step(hidden.cuda(), weight.cuda(), target.cuda(), feedback=on_gpu, backend=backend, **given)
        shared = None if expected is None else expected.rows
        expected = reference_exit(hidden, weight, target, feedback=rule, rows=shared, **given)
        assert step.feedback is not None
        # Where a rounded logit decides what is picked, single tokens may differ.
        assert relative(step.feedback, expected.feedback) < 0.15
        assert on_gpu.rows.dtype == torch.bfloat16
        assert relative(on_gpu.rows, expected.rows) < 1e-2


@pytest.mark.parametrize("name", ["dense", "mirror_sampled"])
def test_a_filtered_dw_on_the_kernels_equals_the_plain_one(name: str) -> None:
    case = make_case()
    case["hidden"] = case["hidden"] + 3 * case["weight"][case["target"].clamp_min(0)]
    results = {
        (backend, kind): run(case, make_rule(name).cuda(), torch.float32, backend=backend, weight_grad=kind)
        for backend, kind in (("triton", "filtered"), ("torch", "filtered"), ("torch", "exact"))
    }
    loss, feedback, weight_grad, bias_grad = results["triton", "filtered"]
    plain, exact = results["torch", "filtered"], results["torch", "exact"]
    assert relative(weight_grad, plain[2].double().cpu()) < 1e-4
    assert relative(weight_grad, exact[2].double().cpu()) > 1e-4
    assert relative(bias_grad, exact[3].double().cpu()) < 1e-4
    assert torch.allclose(loss, exact[0])
    assert relative(feedback, exact[1].double().cpu()) < 5e-2


@pytest.mark.parametrize("storage", ["bf16", "fp32"])
def test_a_mirror_learns_the_same_by_parts_and_by_the_kernels(
    storage: rows.Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case()
    inputs = [case[key].cuda() for key in ("hidden", "weight", "target")]
    learned = []
    for by_kernel in (False, True):
        monkeypatch.setattr(rows, "runs_kernel", lambda _, by_kernel=by_kernel: by_kernel)
        mirror = WeightMirror(HIDDEN, VOCAB, storage=storage, num_pairs=128).cuda()
        for _ in range(3):
            exit_step(*inputs, feedback=mirror)
            mirror.update()
        learned.append(mirror.rows.double().cpu())
    by_parts, by_kernel = learned
    assert relative(by_parts, case["weight"].double()) < 0.1
    # Rounded at random, each in its own way, three times; or two terms of every number instead of all of it.
    assert relative(by_kernel, by_parts) < (3 * torch.finfo(torch.bfloat16).eps if storage == "bf16" else 2**-14)


@pytest.mark.parametrize("num_exits", [1, 3])
def test_a_mirror_in_fp32_is_corrected_in_parts_of_its_terms(num_exits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same update in fp64: what two terms leave out, and the solve magnifies."""
    # Rows of a tile, and a part that is none.
    monkeypatch.setattr(rows, "TERM_BYTES", 128 * 6 * 40 * num_exits)
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, device="cuda")
    exact, mirror = (WeightMirror(HIDDEN, VOCAB, num_pairs=40).cuda() for _ in range(2))
    mirror.rows.copy_(0.5 * weight)
    exact.rows = mirror.rows.double()
    for index in range(num_exits):
        hidden = 1 + torch.randn(40, HIDDEN, generator=generator, device="cuda")
        logits = (hidden.double() @ weight.double().T).float()
        pairs = rows.Pairs(hidden=hidden, logits=logits, keys=torch.arange(40, device="cuda"))
        mirror.collect(index, pairs)
        exact.collect(index, pairs)
    mirror.update()
    exact.update()
    assert relative(mirror.rows, exact.rows.cpu()) < 2**-15
    assert relative(exact.rows, 0.5 * weight.double().cpu()) > 0.1


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("num_rows", "length", "width"), [(1, 1, 1), (7, 33, 5), (257, 1003, 64), (256, 4096, 512)])
def test_a_product_of_terms_leaves_out_less_than_its_bound(
    num_rows: int, length: int, width: int, is_transposed: bool
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    a = torch.randn(num_rows, length, generator=generator, device="cuda")
    b = torch.randn(length, width, generator=generator, device="cuda")
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    given = a.T.contiguous().T if is_transposed else a
    terms = product(left_terms(given), right_terms(b), torch.float32)
    # What is left out, and sums of 3 K numbers that a tensor core may truncate 16 at a time.
    assert float(((terms.double() - exact).abs() / size).max()) < 2**-15 + (1 + 3 * length / 16) * 2**-22
    # In the norm no more than a sixteenth of that, and far below bf16.
    assert relative(terms, exact.cpu()) < 2**-17 + length * 2**-26
    assert length == 1 or relative(product(a.bfloat16(), b.bfloat16(), torch.float32), exact.cpu()) > 2**-11


def test_shared_anchors_in_bf16_are_solved_as_exactly_as_bf16_stores_them() -> None:
    """Hidden states of few directions: what one term of each number leaves out would be a twelfth of B."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.arange(1.0, 257).pow(-1.5)
    directions = torch.linalg.qr(torch.randn(256, 256, generator=generator)).Q
    hidden = (torch.randn(384, 256, generator=generator) * sizes) @ directions
    hidden = torch.nn.functional.normalize(hidden).mul(16).bfloat16()
    weight = (torch.randn(1500, 256, generator=generator) / 16).bfloat16()
    is_counted, rule = torch.ones(384, dtype=torch.bool), SharedAnchors(256, 1500, num_anchors=384)
    measured = measured_rows(rule.cuda(), hidden.cuda(), is_counted.cuda(), weight.cuda())
    expected = measured_rows(rule.cpu(), hidden.double(), is_counted, weight)
    rounding = relative(expected.rows.bfloat16(), expected.rows)
    assert measured.rows.dtype == torch.bfloat16
    assert relative(measured.rows, expected.rows) < 1.2 * rounding


@pytest.mark.parametrize("is_kernel", [False, True])
@pytest.mark.parametrize("num", [1, 7, 16, 28])
def test_draws_are_the_same_bits_on_every_device(num: int, is_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, is_counted = torch.arange(5000), torch.arange(5000) % 3 != 0
    step = torch.tensor(7)
    for seed in (0, 3, 2**62 + 12345):
        expected = draws.stratified_uniforms(seed, step, 2, tokens, num), draws.choice_keys(seed, step, 2, is_counted)
        with monkeypatch.context() as patched:
            if not is_kernel:
                patched.setattr(draws, "runs_kernel", lambda *_: False)
            assert draws.runs_kernel(step.cuda(), tokens.cuda()) == is_kernel
            drawn = draws.stratified_uniforms(seed, step.cuda(), 2, tokens.cuda(), num)
            keys = draws.choice_keys(seed, step.cuda(), 2, is_counted.cuda())
        assert torch.equal(drawn.cpu(), expected[0])
        assert torch.equal(keys.cpu(), expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_residuals_of_a_mirror_miss_nothing_of_the_hidden_states(dtype: torch.dtype) -> None:
    from localexit.feedback.ridge import apart_from_mean
    from localexit.kernels.mirror import residuals

    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(1000, 300, generator=generator, device="cuda").to(dtype)
    hidden = 3 + 0.1 * torch.randn(150, 300, generator=generator, device="cuda")
    logits = (hidden.double() @ weight.double().T + 0.01).float()
    apart, in_fp64 = apart_from_mean(hidden), apart_from_mean(hidden.double())
    measured = in_fp64.logits(logits.double())
    expected = measured - in_fp64.hidden @ weight.double().T
    rounded = measured - apart.hidden.bfloat16().double() @ weight.double().T
    actual = residuals(weight, apart, logits.split([20, 130]))
    # What is left is the result's own rounding to bf16, and that of the mean's second half.
    error = float((actual.double() - expected).abs().max())
    assert error < 0.02 * float((rounded - expected).abs().max())
    assert error < 2**-8 * float(expected.abs().max()) + 2e-3


def test_memory_of_a_stream_does_not_grow_with_depth_under_autocast() -> None:
    """Neither activations, nor the copies of weights that autocast keeps while its region lasts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, peaks = 512, []
    for num_blocks in (2, 12):
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=num_blocks,
            num_attention_heads=8,
            use_cache=False,
        )
        local = attach(LlamaForCausalLM(config).cuda(), feedback="dense", backward="stream")
        ids = torch.randint(VOCAB, (2, 64), device="cuda")
        for _ in range(2):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                local(ids, ids)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # A block's weights in bf16 are 16 D² numbers.
    assert peaks[1] - peaks[0] < 10 * 0.1 * 16 * width**2 * 2
