"""One test per row of the list of what the original heads did wrong; each fails on the original's behaviour."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import localexit
from helpers.budget import assert_close
from helpers.cases import RULES, small_rule
from localexit import exit_cross_entropy, exit_step

WIDTH, VOCAB = 16, 40
PARALLEL = ("parallel_only", "parallel_gold", "parallel_topmass")


def factorized(mode: str = "hybrid", **options: Any) -> Any:
    chosen = {"rank": 12, "rank_exact": 6, "topk": 3, "seed": 1} | options
    return localexit.FactorizedExitHead(WIDTH, VOCAB, mode=mode, **chosen)  # type: ignore[arg-type]


def parallel(mode: str = "parallel_only", **options: Any) -> Any:
    chosen = {"residual_rank": 6, "residual_lambda": 0.5, "seed": 1} | options
    return localexit.ExactParallelExitHead(WIDTH, options.pop("vocab", VOCAB), mode=mode, **chosen)  # type: ignore[arg-type]


HEADS: dict[str, Callable[[], Any]] = {
    "dense": lambda: factorized("dense"),
    "hybrid": factorized,
    **{mode: (lambda mode=mode: parallel(mode)) for mode in PARALLEL},
}


def inputs(seed: int = 0, *, tokens: int = 6, vocab: int = VOCAB, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(2, tokens // 2, WIDTH, generator=generator)
    weight = size * torch.randn(vocab, WIDTH, generator=generator)
    return h, weight, torch.randint(vocab, (2, tokens // 2), generator=generator)


def cross_entropy(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **options)


def feedback_of(head: Any, loss: Callable[[Tensor], Tensor], seed: int = 0, **options: Any) -> Tensor:
    """What reaches h when `loss(logits)` is differentiated."""
    h, weight, targets = inputs(seed, **options)
    h.requires_grad_()
    loss(head(h, weight, targets)).backward()
    assert h.grad is not None
    return h.grad


def error_of(loss: Callable[[Tensor], Tensor], h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Raw logits, and the gradient of the loss at them, in fp64."""
    logits = (h.double() @ weight.double().T).requires_grad_()
    (error,) = torch.autograd.grad(loss(logits), logits)
    return logits.detach(), error


def along_hidden(h: Tensor, logits: Tensor, error: Tensor) -> Tensor:
    """h <e, z> / ‖h‖²."""
    h = h.double()
    return h * (error * logits).sum(-1, keepdim=True) / h.square().sum(-1, keepdim=True)


@pytest.mark.parametrize("head", HEADS)
def test_defect_01_ignored_rows_get_no_feedback(head: str) -> None:
    h, weight, targets = inputs()
    targets[0, 1] = targets[1, 2] = -100
    h.requires_grad_()
    cross_entropy(HEADS[head]()(h, weight, targets), targets).backward()
    assert h.grad is not None
    is_counted = targets != -100
    assert (h.grad[is_counted] != 0).all()
    assert (h.grad[~is_counted] == 0).all()


@pytest.mark.parametrize("factor", [0.1, 65536.0, 0.0, -1.0])
@pytest.mark.parametrize("head", HEADS)
def test_defect_02_feedback_is_proportional_to_the_upstream_gradient(head: str, factor: float) -> None:
    _, _, targets = inputs()
    once = feedback_of(HEADS[head](), lambda z: cross_entropy(z, targets))
    assert once.any()
    scaled = feedback_of(HEADS[head](), lambda z: factor * cross_entropy(z, targets))
    assert_close(scaled, factor * once, tolerance=1e-5)
    summed = feedback_of(HEADS[head](), lambda z: cross_entropy(z, targets, reduction="sum"))
    assert_close(summed, targets.numel() * once, tolerance=1e-5)


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "temperature": lambda z: z / 4,
    "negative_temperature": lambda z: -z / 2,
    "softcap": lambda z: 3 * torch.tanh(z / 3),
    "bias": lambda z: z + torch.linspace(-3, 3, VOCAB, dtype=z.dtype),
    "nothing": lambda z: z,
}


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("between", BETWEEN)
def test_defect_03_what_stands_between_logits_and_loss_counts(between: str, z_loss: float) -> None:
    h, weight, targets = inputs()

    def loss(logits: Tensor) -> Tensor:
        seen = BETWEEN[between](logits)
        return cross_entropy(seen, targets) + z_loss * seen.logsumexp(-1).square().mean()

    actual = feedback_of(parallel(), loss)
    assert_close(actual, along_hidden(h, *error_of(loss, h, weight)), tolerance=1e-5)


def code_of(compressor: Any, error: Tensor, targets: Tensor) -> Tensor:
    """Eq. (7) token by token: gold and the largest others in magnitude in the head, all else in the tail, each once."""
    rows = error.reshape(-1, error.shape[-1]).double()
    code = torch.zeros(len(rows), compressor.rank, dtype=torch.float64)
    for i, (row, gold) in enumerate(zip(rows, targets.flatten().tolist(), strict=True)):
        others = [v for v in row.abs().argsort(descending=True).tolist() if v != gold]
        head = {gold, *others[: compressor.topk]} if compressor.rank_exact else set()
        for v, entry in enumerate(row):
            if v in head:
                code[i, : compressor.rank_exact] += entry * compressor.exact_codes[v].double()
            else:
                code[i, compressor.rank_exact + int(compressor.bucket[v])] += entry * float(compressor.sign[v])
    return code.reshape(*error.shape[:-1], -1)


def hybrid_compressor(**options: int) -> Any:
    chosen = {"rank_exact": 6, "rank_tail": 6, "topk": 3, "seed": 1} | options
    return localexit.HybridTopKTailSketchCompressor(VOCAB, **chosen)


def probabilities_minus_gold(targets: Tensor, *, size: float = 1.0) -> Tensor:
    h, weight, _ = inputs(size=size)
    return (h @ weight.T).softmax(-1) - F.one_hot(targets, VOCAB)


def test_defect_04_chosen_tokens_that_share_a_bucket_all_leave_the_tail() -> None:
    _, _, targets = inputs()
    error = probabilities_minus_gold(targets)
    compressor = hybrid_compressor(rank_tail=2, topk=8)
    assert_close(compressor.compress(error, targets), code_of(compressor, error, targets), tolerance=1e-5)


def test_defect_05_topk_is_by_magnitude_and_without_gold() -> None:
    """Negative loss weights turn the error around, and must turn its code around."""
    _, _, targets = inputs()
    error, compressor = probabilities_minus_gold(targets), hybrid_compressor(rank_tail=30)
    code = compressor.compress(error, targets)
    assert_close(compressor.compress(-error, targets), -code, tolerance=1e-6)
    assert_close(compressor.compress(-error, targets), code_of(compressor, -error, targets), tolerance=1e-5)


def test_defect_06_gold_counts_once_under_label_smoothing() -> None:
    """A confident model has a positive error at gold then, among the largest."""
    h, weight, _ = inputs(size=2.0)
    # In fp64, where no two of the many nearly equal errors are equal.
    logits = h.double() @ weight.double().T
    targets = logits.argmax(-1)
    smoothed = 0.8 * F.one_hot(targets, VOCAB) + 0.2 / VOCAB
    error, compressor = logits.softmax(-1) - smoothed, hybrid_compressor(rank_tail=30)
    assert (error.gather(-1, targets[..., None]) > 0).any()
    assert_close(compressor.compress(error, targets), code_of(compressor, error, targets), tolerance=1e-5)


def with_residual(head: Any, h: Tensor, weight: Tensor, targets: Tensor, sets: list[set[int]]) -> Tensor:
    """Eq. (8) and (9) token by token, for given sets S of tokens; the loss is the summed cross-entropy."""
    logits, error = error_of(lambda z: cross_entropy(z, targets, reduction="sum"), h, weight)
    flat = h.reshape(-1, h.shape[-1]).double()
    residual = torch.zeros_like(flat)
    for i, (row, chosen) in enumerate(zip(error.flatten(0, 1), sets, strict=True)):
        unit = flat[i] / flat[i].norm()
        base = head.Q_base.double()
        columns = base - torch.outer(unit, unit @ base)
        code = sum(row[v] * head.token_codes[v].double() for v in sorted(chosen))
        residual[i] = columns / columns.norm(dim=0) @ code
    return along_hidden(h, logits, error) + head.residual_lambda * residual.reshape(h.shape)


def nucleus_and_gold(h: Tensor, weight: Tensor, targets: Tensor, threshold: float) -> list[set[int]]:
    """The most probable tokens until their probability reaches the threshold, and gold."""
    sets = []
    probabilities = (h.double() @ weight.double().T).softmax(-1).flatten(0, 1)
    for row, gold in zip(probabilities, targets.flatten().tolist(), strict=True):
        chosen, mass = set(), 0.0
        for v in row.argsort(descending=True).tolist():
            if mass >= threshold:
                break
            chosen.add(v)
            mass += float(row[v])
        sets.append({gold, *chosen})
    return sets


def test_defect_07_topmass_counts_gold_once() -> None:
    h, weight, _ = inputs()
    targets = (h @ weight.T).argmax(-1)
    h.requires_grad_()
    head = parallel("parallel_topmass")
    cross_entropy(head(h, weight, targets), targets, reduction="sum").backward()
    assert h.grad is not None
    h = h.detach_()
    sets = nucleus_and_gold(h, weight, targets, 0.95)
    assert_close(h.grad, with_residual(head, h, weight, targets, sets), tolerance=1e-5)


def test_defect_08_the_nucleus_includes_the_token_that_crosses_the_threshold() -> None:
    """Probabilities 0.4, 0.3, 0.2, 0.1 and a threshold of 0.45: the second token belongs to the nucleus."""
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    h = torch.zeros(1, 1, WIDTH)
    h[..., 0] = 1.0
    weight = torch.zeros(4, WIDTH)
    weight[:, 0] = probabilities.log()
    head = localexit.ExactParallelExitHead(
        WIDTH, 4, mode="parallel_topmass", residual_rank=6, residual_lambda=0.5, mass_threshold=0.45, seed=1
    )
    targets = torch.tensor([[0]])
    h.requires_grad_()
    cross_entropy(head(h, weight, targets), targets, reduction="sum").backward()
    assert h.grad is not None
    assert_close(h.grad, with_residual(head, h.detach(), weight, targets, [{0, 1, 3}]), tolerance=1e-5)


def nearly_uniform(vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    h, weight, targets = inputs(vocab=vocab, size=0.01)
    return h, weight, targets


def test_defect_09_a_nucleus_of_more_than_200_tokens_is_whole() -> None:
    h, weight, targets = nearly_uniform(250)
    head = localexit.ExactParallelExitHead(
        WIDTH, 250, mode="parallel_topmass", residual_rank=6, residual_lambda=0.5, mass_threshold=0.95, seed=1
    )
    sets = nucleus_and_gold(h, weight, targets, 0.95)
    assert min(map(len, sets)) > 200
    h.requires_grad_()
    cross_entropy(head(h, weight, targets), targets, reduction="sum").backward()
    assert h.grad is not None
    assert_close(h.grad, with_residual(head, h.detach(), weight, targets, sets), tolerance=1e-5)


def test_defect_09_a_nucleus_beyond_the_cap_is_reported() -> None:
    h, weight, targets = nearly_uniform(400)
    head = localexit.ExactParallelExitHead(WIDTH, 400, mode="parallel_topmass", residual_rank=6, seed=1)
    with pytest.warns(UserWarning, match="longer than nucleus_cap=256 and was cut"):
        cross_entropy(head(h.requires_grad_(), weight, targets), targets).backward()


SEEDED: dict[str, Callable[[int | None], Any]] = {
    "dense": lambda seed: factorized("dense", seed=seed),
    "hybrid": lambda seed: factorized(seed=seed),
    "parallel_gold": lambda seed: parallel("parallel_gold", seed=seed),
    "parallel_topmass": lambda seed: parallel("parallel_topmass", seed=seed),
    "dense_compressor": lambda seed: localexit.DenseRandomCompressor(VOCAB, 4, seed=seed),
    "hybrid_compressor": lambda seed: localexit.HybridTopKTailSketchCompressor(VOCAB, seed=seed),
}


def random_buffers(module: Any) -> list[Tensor]:
    return [buffer for buffer in module.buffers() if buffer.dim() > 0]


@pytest.mark.parametrize("kind", SEEDED)
def test_defect_10_without_a_seed_torchs_generator_decides(kind: str) -> None:
    torch.manual_seed(5)
    first, second = random_buffers(SEEDED[kind](None)), random_buffers(SEEDED[kind](None))
    torch.manual_seed(5)
    again = random_buffers(SEEDED[kind](None))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("kind", ["dense", "parallel_gold"])
def test_defect_11_expander_and_codes_of_one_seed_are_independent(kind: str) -> None:
    head = SEEDED[kind](1)
    if kind == "dense":
        expander, codes = head.U, head.compressor.codebook
    else:
        expander, codes = head.Q_base, head.token_codes
    pairs = torch.stack([expander.T, codes[:WIDTH].T])
    pairs = pairs - pairs.mean(-1, keepdim=True)
    correlation = (pairs[0] * pairs[1]).sum(-1) / (pairs[0].norm(dim=-1) * pairs[1].norm(dim=-1))
    assert float(correlation.abs().mean()) < 0.4


def test_defect_12_the_default_rank_beyond_the_width_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"rank=128 is larger than the hidden size 64.*pass rank=64 or less"):
        localexit.FactorizedExitHead(64, VOCAB)


def test_defect_13_a_rank_below_rank_exact_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"rank_exact=8 is larger than rank=4.*pass rank_exact=4 or less"):
        localexit.FactorizedExitHead(WIDTH, VOCAB, rank=4, rank_exact=8)


def test_defect_14_topk_without_exact_columns_works() -> None:
    _, _, targets = inputs()
    error, compressor = probabilities_minus_gold(targets), hybrid_compressor(rank_exact=0, topk=3)
    assert_close(compressor.compress(error, targets), code_of(compressor, error, targets), tolerance=1e-5)
    assert feedback_of(factorized(rank_exact=0), lambda z: cross_entropy(z, targets)).any()


def test_defect_15_an_unknown_mode_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="mode must be one of 'parallel_only', 'parallel_gold', 'parallel_topmass'"):
        localexit.ExactParallelExitHead(WIDTH, VOCAB, mode="parallel")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["dense", "hybrid"])
def test_defect_16_logits_that_are_not_used_are_not_kept(mode: str) -> None:
    """An unusual number of tokens: whatever is alive with that many rows and V columns is the logits."""
    h, weight, targets = inputs(tokens=26)
    logits = HEADS[mode]()(h.requires_grad_(), weight, targets)
    total = logits.sum()
    shape = logits.shape
    del logits
    gc.collect()
    alive = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and each.shape == shape]
    assert not alive
    total.backward()


@pytest.mark.parametrize("mode", PARALLEL)
def test_defect_16_logits_that_are_used_pass_through_saved_tensor_hooks(mode: str) -> None:
    h, weight, targets = inputs()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = HEADS[mode]()(h.requires_grad_(), weight, targets)
    assert logits.data_ptr() in [tensor.data_ptr() for tensor in saved]


@pytest.mark.parametrize("head", HEADS)
def test_defect_17_editing_the_logits_afterwards_is_an_error_or_changes_nothing(head: str) -> None:
    h, weight, targets = inputs()
    before = feedback_of(HEADS[head](), lambda z: cross_entropy(z, targets))
    logits = HEADS[head]()(h.requires_grad_(), weight, targets)
    loss = cross_entropy(logits, targets)
    with torch.no_grad():
        logits.mul_(3)
    if head in PARALLEL:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        loss.backward()
        assert h.grad is not None
        assert torch.equal(h.grad, before)


class LargestOutput(TorchDispatchMode):
    """Keeps the size of the largest tensor any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for each in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return output


@pytest.mark.parametrize("name", RULES)
def test_defect_18_no_tensor_of_tokens_times_vocabulary_exists(name: str) -> None:
    tokens, width, vocab = 64, 8, 60
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    target = torch.randint(vocab, (tokens,), generator=generator)
    rule = small_rule(name, width, vocab)
    accumulator = torch.zeros_like(weight)
    with LargestOutput() as largest:
        exit_step(hidden, weight, target, feedback=rule, grad_weight=accumulator, chunk_bytes=2 * vocab * 4)
    assert accumulator.any()
    # The sampled rules gather whole groups of entries for their draws; a real vocabulary has many groups.
    assert largest.numel <= 4 * 128 * 4
    assert largest.numel < tokens * vocab

    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        exit_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), target, feedback=rule)
    assert max(saved) < tokens * vocab


def wrong_signs(feedback: Tensor, h: Tensor, exact: Tensor) -> int:
    """Rows whose feedback points the other way along h."""
    return int(((feedback.double() * h.double()).sum(-1) * (exact * h.double()).sum(-1) < 0).sum())


@pytest.mark.parametrize("form", ["head", "exit"])
def test_defect_19_softmax_and_sums_are_in_fp32(form: str) -> None:
    """Peaked logits in bf16: in a bf16 softmax one direction in twelve was wrong."""
    tokens = 600
    h, weight, _ = inputs(tokens=tokens, size=1.0)
    h, weight = h.bfloat16(), (1.5 * weight).bfloat16()
    logits = h.double() @ weight.double().T
    targets = logits.argmax(-1)

    def loss(z: Tensor) -> Tensor:
        return cross_entropy(z, targets, reduction="sum")

    exact = along_hidden(h, *error_of(loss, h, weight))
    h.requires_grad_()
    if form == "head":
        loss(parallel()(h, weight, targets).float()).backward()
    else:
        rule = localexit.ExactParallel(WIDTH, VOCAB)
        exit_cross_entropy(h, weight, targets, feedback=rule, reduction="sum").backward()  # type: ignore[union-attr]
    assert h.grad is not None
    assert wrong_signs(h.grad, h.detach(), exact) <= tokens // 100


@pytest.mark.parametrize("head", HEADS)
def test_defect_20_autocast_does_not_reach_the_backward(head: str) -> None:
    _, _, targets = inputs()
    plain = feedback_of(HEADS[head](), lambda z: cross_entropy(z, targets))
    h, weight, _ = inputs()
    h.requires_grad_(), weight.requires_grad_()
    loss = cross_entropy(HEADS[head]()(h, weight, targets), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    assert h.grad is not None
    assert torch.equal(h.grad, plain)


def products(run: Callable[[], Any]) -> int:
    """Matrix products in what `run` does, inside operators too."""
    with torch.autograd.profiler.profile() as profile:
        run()
    names = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
    return sum(event.name in names for event in profile.function_events)


@pytest.mark.parametrize("form", ["dense", "hybrid", "parallel_gold", "exit"])
def test_defect_21_frozen_inputs_cost_nothing(form: str) -> None:
    h, weight, targets = inputs()
    rule = localexit.Dense(WIDTH, VOCAB)

    def step(*, train_h: bool, train_weight: bool) -> None:
        hidden, matrix = h.clone().requires_grad_(train_h), weight.clone().requires_grad_(train_weight)
        if form == "exit":
            loss = exit_cross_entropy(hidden, matrix, targets, feedback=rule)
            assert isinstance(loss, Tensor)
        else:
            loss = cross_entropy(HEADS[form]()(hidden, matrix, targets), targets)
        loss.backward()
        assert (hidden.grad is not None) == train_h
        assert (matrix.grad is not None) == train_weight

    both, without_h, without_weight = (
        products(lambda kwargs=kwargs: step(**kwargs))
        for kwargs in (
            {"train_h": True, "train_weight": True},
            {"train_h": False, "train_weight": True},
            {"train_h": True, "train_weight": False},
        )
    )
    assert without_h < both
    assert without_weight == both - 1


@pytest.mark.parametrize("head", HEADS)
def test_defect_22_a_second_differentiation_is_an_error(head: str) -> None:
    h, weight, targets = inputs()
    h.requires_grad_(), weight.requires_grad_()
    loss = cross_entropy(HEADS[head]()(h, weight, targets), targets)
    (feedback,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        feedback.square().sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_defect_22_nor_can_an_exit_be_differentiated_twice(reduction: str) -> None:
    h, weight, targets = inputs()
    rule = localexit.Dense(WIDTH, VOCAB)
    loss = exit_cross_entropy(
        h.requires_grad_(),
        weight.requires_grad_(),
        targets,
        feedback=rule,
        reduction=reduction,  # type: ignore[arg-type]
    )
    (feedback,) = torch.autograd.grad(loss.sum(), h, create_graph=True)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        feedback.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_defect_23_orthonormal_in_any_dtype_and_a_gain_in_fp32(dtype: torch.dtype) -> None:
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    columns = localexit.orthonormal_columns(64, 16, dtype=dtype, seed=0)
    assert columns.dtype == dtype
    assert torch.allclose(columns.double().T @ columns.double(), torch.eye(16, dtype=torch.float64), atol=2 * eps)
    head = factorized(alpha_init=0.1).to(dtype)
    assert head.U.dtype == dtype
    assert torch.allclose(head.U.double().T @ head.U.double(), torch.eye(12, dtype=torch.float64), atol=2 * eps)
    assert head.alpha.dtype == torch.float32
    assert head.alpha == torch.tensor(0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_defect_23_a_converted_head_works(dtype: torch.dtype) -> None:
    h, weight, targets = inputs()
    for head in HEADS.values():
        hidden = h.to(dtype).requires_grad_()
        cross_entropy(head().to(dtype)(hidden, weight.to(dtype), targets), targets).backward()
        assert hidden.grad is not None
        assert hidden.grad.dtype == dtype


def test_defect_24_an_integer_gain_is_a_number_like_any_other() -> None:
    _, _, targets = inputs()
    head = factorized(alpha_init=2)
    assert head.alpha.dtype == torch.float32
    half = feedback_of(factorized(alpha_init=1.0), lambda z: cross_entropy(z, targets))
    assert_close(feedback_of(head, lambda z: cross_entropy(z, targets)), 2 * half, tolerance=1e-6)
    head.alpha.fill_(0.5)
    assert_close(feedback_of(head, lambda z: cross_entropy(z, targets)), half / 2, tolerance=1e-6)
