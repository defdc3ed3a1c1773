"""The exit as functions: check the arguments, build the call, run it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from localexit import _checks
from localexit.exits.backends import Backend, choose_backend, stages_of
from localexit.exits.chunked import ExitCall, ExitResult, run_exit
from localexit.exits.loss import LossOptions
from localexit.exits.operators import exit_loss
from localexit.exits.pairs import choose_tokens, collect_pairs, with_state
from localexit.exits.ranks import DataParallel, VocabParallel
from localexit.exits.tiled import add_tiled_grads
from localexit.exits.vocab import local_part, local_weight, refuse_unsupported, sharded_loss, sharded_stages
from localexit.feedback.base import Feedback, accumulate_dtype
from localexit.feedback.draws import choose_rows, stratified_uniforms
from localexit.feedback.registry import from_spec
from localexit.feedback.shared import SharedAnchors

Reduction = Literal["mean", "sum", "none"]
Preset = Literal["fast", "memory"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
WeightGrad = Literal["exact", "filtered"]
WEIGHT_GRADS: tuple[WeightGrad, ...] = get_args(WeightGrad)


@dataclass(frozen=True, kw_only=True)
class ExitStats:
    """By-products of an exit, detached, in the shape of target; zero or False on ignored tokens.

    Attributes:
        lse: log-sum-exp of the logits the loss saw.
        log_prob: log-probability of the target, nats.
        argmax: int64, the most likely token (0 on ignored tokens).
        is_correct: whether it is the target.
        entropy: of the prediction, nats.
        num_tokens: 0-dim int64, tokens that count.
        num_anchors: 0-dim int64, forward pairs the rule used: fewer than it asked for when fewer tokens count.
        bad_target: 0-dim bool, whether a target was outside the vocabulary (only possible on a GPU, where the loss
            is NaN then; on the CPU it is an error).
        feedback: name of the rule.
        backend: what ran.
    """

    lse: Tensor
    log_prob: Tensor
    argmax: Tensor
    is_correct: Tensor
    entropy: Tensor
    num_tokens: Tensor
    num_anchors: Tensor
    bad_target: Tensor
    feedback: str
    backend: str


@dataclass(frozen=True, kw_only=True)
class ExitStep:
    """What `exit_step` returns.

    Attributes:
        loss: 0-dim, detached.
        feedback: in input's shape and dtype: hand it to `torch.autograd.backward(input, feedback)`; None when
            `need_feedback=False`.
        stats: by-products, or None when not asked for.
    """

    loss: Tensor
    feedback: Tensor | None
    stats: ExitStats | None


@overload
def exit_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    feedback: Feedback,
    linear_bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_items: int | float | Tensor | None = None,
    backend: Backend = "auto",
    return_stats: Literal[False] = False,
    exit_index: int = 0,
    first_row: int = 0,
    preset: Preset = "fast",
    weight_grad: WeightGrad = "exact",
    chunk_bytes: int | None = None,
    data_parallel: DataParallel | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> Tensor: ...


@overload
def exit_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    feedback: Feedback,
    linear_bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_items: int | float | Tensor | None = None,
    backend: Backend = "auto",
    return_stats: Literal[True],
    exit_index: int = 0,
    first_row: int = 0,
    preset: Preset = "fast",
    weight_grad: WeightGrad = "exact",
    chunk_bytes: int | None = None,
    data_parallel: DataParallel | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> tuple[Tensor, ExitStats]: ...


def exit_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    feedback: Feedback,
    linear_bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_items: int | float | Tensor | None = None,
    backend: Backend = "auto",
    return_stats: bool = False,
    exit_index: int = 0,
    first_row: int = 0,
    preset: Preset = "fast",
    weight_grad: WeightGrad = "exact",
    chunk_bytes: int | None = None,
    data_parallel: DataParallel | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> Tensor | tuple[Tensor, ExitStats]:
    """Cross-entropy of `input @ linear_weight.T` against target, without the [N, V] logits, with surrogate feedback.

    Equals, except that `feedback` decides what reaches `input` on the way back:

        logits = input @ linear_weight.T (+ linear_bias);  logits = softcap * tanh(logits / softcap)
        loss = F.cross_entropy(logits, target, ...) + z_loss * logsumexp(logits) ** 2

    The gradients of linear_weight and linear_bias are exact. Names follow `torch.nn.functional.linear_cross_entropy`.

    >>> from localexit import make_feedback
    >>> hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    >>> rule = make_feedback("anchors", hidden_size=8, vocab_size=50)
    >>> loss = exit_cross_entropy(hidden, weight, torch.tensor([4, 1, -100]), feedback=rule)
    >>> loss.backward()
    >>> hidden.grad.any(dim=1)  # feedback; the last token is ignored
    tensor([ True,  True, False])

    Args:
        input: hidden states [..., D]; fp32, bf16, fp16 or fp64.
        linear_weight: unembedding [V, D], `nn.Linear.weight` as it is. Products run in the promoted dtype of input
            and weight, or in the autocast dtype inside an autocast region; sums are kept in fp32 (fp64 for fp64).
        target: gold tokens, int64 or int32 [...], input's shape without the last dimension.
        feedback: the rule, made for [V, D]. Call its `update()` once per optimiser step, after all exits and
            micro-batches of it: only there a mirror learns, draws change, and shared anchors are forgotten, to be
            measured anew. For a batch that is left out call `discard()` instead. Many calls without either warn.
        linear_bias: [V].
        token_weight: like target, floating point, negative allowed: multiplies each token's loss.
        reduction: "mean" divides by `num_items` if given, else by the number of tokens that are not ignored (token
            weights do not change the divisor); "sum"; "none" returns target's shape, and recomputes the logits in
            the backward, where what reaches each token is known (one more product). Who knows the weights beforehand
            passes them as `token_weight`.
        ignore_index: target value of tokens to leave out; their hidden states may hold anything.
        label_smoothing: in [0, 1).
        z_loss: weight of the squared log-sum-exp, at least 0.
        softcap: soft cap of the logits, positive, or None.
        num_items: divisor for "mean", e.g. the number of tokens of all micro-batches (and ranks) together.
        backend: "auto" chooses and says so in the stats; a named backend runs or raises.
        return_stats: also return `ExitStats`.
        exit_index: which exit of the model this is: exits draw independently.
        first_row: number of the first token among all tokens of the optimiser step, for micro-batches and ranks: draws
            belong to (seed, step, exit, row).
        preset: "fast" needs two products of the size of the logits' (and a third for rules that multiply with all V
            rows); "memory" makes dW in a second pass over tiles of the vocabulary, in the backward: one product more,
            and next to the gradients themselves no memory that grows with V·D.
        weight_grad: "exact", or "filtered": dW without those groups of 128 neighbouring tokens in which no error of a
            row reaches 2⁻¹² (for a token weight of one) and which do not hold its gold token. Late in training most
            of V is such, and the Triton kernels then take a fraction of the product. loss, db and feedback stay
            exact. Not with the memory preset or label smoothing.
        chunk_bytes: size of the buffer for a chunk of logits; by default 64 MiB on the CPU and on a GPU 512 MiB, or
            4 GiB with the Triton kernels, for which one chunk is best; in the memory preset at most 96 MiB, and what
            the backward will need for dW.
        data_parallel: the ranks that share the batch; every one makes this call, with its own tokens. Tokens are
            chosen among those of all ranks, and "mean" divides by the tokens of all ranks over the number of ranks:
            the mean over ranks of loss and gradients is that of the whole batch. Give each rank its `first_row`.
        vocab_parallel: the ranks that share the unembedding; every one makes this call with the same tokens, its own
            rows of linear_weight and linear_bias, and its part of the rule (`VocabParallel.shard`). Every rank gets the
            whole loss and feedback, and the gradients of its rows. A `DTensor` as linear_weight that is sharded by rows
            says so itself.

    Returns:
        The loss in fp32 (fp64 for fp64 input), 0-dim or target's shape; with return_stats `(loss, stats)`. All tokens
        ignored: loss 0 and zero gradients.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices, options or the rule do not fit; on the CPU, a target outside the vocabulary;
            an argument carries a forward-mode tangent.
        RuntimeError: in a second differentiation, and under the transforms of `torch.func`.
    """
    linear_weight, vocab_parallel = local_weight(linear_weight, vocab_parallel)
    linear_bias = local_part("linear_bias", linear_bias, vocab_parallel is not None)
    _checks.reverse_mode(input=input, linear_weight=linear_weight, linear_bias=linear_bias, token_weight=token_weight)
    call = _build_call(
        input,
        linear_weight,
        target,
        feedback=feedback,
        bias=linear_bias,
        token_weight=token_weight,
        reduction=reduction,
        options=_loss_options(reduction, ignore_index, label_smoothing, z_loss, softcap),
        num_items=num_items,
        backend=backend,
        exit_index=exit_index,
        first_row=first_row,
        preset=preset,
        weight_grad=weight_grad,
        chunk_bytes=chunk_bytes,
        data_parallel=data_parallel,
        vocab_parallel=vocab_parallel,
        need_hidden=_needs_grad(input),
        need_weight=_needs_grad(linear_weight),
        need_bias=_needs_grad(linear_bias),
        need_stats=bool(return_stats),
    )
    if torch.is_grad_enabled() and feedback.training:
        feedback.note_forward(exit_index)
        collect_pairs(feedback, call, exit_index, first_row, data_parallel)
    call, state = with_state(feedback, call, exit_index, first_row, data_parallel)
    if vocab_parallel is not None:
        loss, run = sharded_loss(replace(call, rule=from_spec(feedback.spec(), state)))
        if not return_stats:
            return loss
        return loss, _stats(call, target, run.gold_logit, run.log_prob, run.argmax, run.entropy, run.is_bad)
    loss, _, gold_logit, log_prob, argmax, entropy, is_bad, *_ = exit_loss(
        call.hidden,
        call.weight,
        call.bias,
        call.target,
        call.row_weight,
        state,
        call.uniforms,
        call.anchor_rows,
        call.anchor_hidden,
        call.anchor_is_counted,
        feedback.spec(),
        call.compute_dtype,
        call.options.ignore_index,
        call.options.label_smoothing,
        call.options.z_loss,
        call.options.softcap,
        call.chunk_bytes,
        reduction != "none",
        call.need_hidden,
        call.need_weight,
        call.need_bias,
        call.need_stats,
        call.backend,
        call.preset,
        call.is_filtered,
    )
    loss = loss if reduction != "none" else loss.reshape(target.shape)
    if not return_stats:
        return loss
    return loss, _stats(call, target, gold_logit, log_prob, argmax, entropy, is_bad)


def exit_step(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    feedback: Feedback,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
    linear_bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_items: int | float | Tensor | None = None,
    backend: Backend = "auto",
    return_stats: bool = False,
    exit_index: int = 0,
    first_row: int = 0,
    preset: Preset = "fast",
    weight_grad: WeightGrad = "exact",
    chunk_bytes: int | None = None,
    data_parallel: DataParallel | None = None,
    vocab_parallel: VocabParallel | None = None,
    need_feedback: bool = True,
) -> ExitStep:
    """One exit without autograd: adds dW where it belongs, returns the loss and the feedback.

    For several exits that share one unembedding: they share one accumulator, and no [V, D] tensor is made an exit.

    >>> from localexit import make_feedback
    >>> inputs, layer, weight = torch.randn(3, 8), torch.nn.Linear(8, 8), torch.randn(50, 8)
    >>> rule, grad_weight = make_feedback("anchors", hidden_size=8, vocab_size=50), torch.zeros(50, 8)
    >>> hidden = layer(inputs)
    >>> step = exit_step(hidden, weight, torch.tensor([4, 1, 7]), feedback=rule, grad_weight=grad_weight)
    >>> hidden.backward(step.feedback)
    >>> bool(layer.weight.grad.any()), bool(grad_weight.any())
    (True, True)
    >>> rule.update()  # once per optimiser step, after all its exits

    Args:
        input, linear_weight, target, feedback, linear_bias, token_weight, reduction, ignore_index, label_smoothing,
            z_loss, softcap, num_items, backend, return_stats, exit_index, first_row, preset, weight_grad, chunk_bytes,
            data_parallel, vocab_parallel: see `exit_cross_entropy`; a loss scale goes into `token_weight`. reduction
            "none" is not for a function without a backward.
        grad_weight: [V, D] in fp32 (fp64 for fp64 products), dW is added to it in place; None skips dW. For fp32
            weights `linear_weight.grad` may be passed itself, a `DTensor` like the weight if that is one.
        grad_bias: [V], likewise for db.
        need_feedback: False skips the feedback, e.g. for a unit without trainable parameters.

    Raises:
        TypeError, ValueError: see `exit_cross_entropy`; or an accumulator of the wrong shape or dtype.
    """
    _checks.choice("reduction", reduction, ("mean", "sum"))
    with torch.no_grad():
        linear_weight, vocab_parallel = local_weight(linear_weight, vocab_parallel)
        linear_bias, grad_weight, grad_bias = (
            local_part(name, tensor, vocab_parallel is not None)
            for name, tensor in (("linear_bias", linear_bias), ("grad_weight", grad_weight), ("grad_bias", grad_bias))
        )
        call = _build_call(
            input,
            linear_weight,
            target,
            feedback=feedback,
            bias=linear_bias,
            token_weight=token_weight,
            reduction=reduction,
            options=_loss_options(reduction, ignore_index, label_smoothing, z_loss, softcap),
            num_items=num_items,
            backend=backend,
            exit_index=exit_index,
            first_row=first_row,
            preset=preset,
            weight_grad=weight_grad,
            chunk_bytes=chunk_bytes,
            data_parallel=data_parallel,
            vocab_parallel=vocab_parallel,
            need_hidden=need_feedback,
            need_weight=grad_weight is not None,
            need_bias=grad_bias is not None,
            need_stats=bool(return_stats),
        )
        dtype = accumulate_dtype(call.compute_dtype)
        _checks.accumulator("grad_weight", grad_weight, linear_weight.shape, dtype, linear_weight)
        _checks.accumulator("grad_bias", grad_bias, linear_weight.shape[:1], dtype, linear_weight)
        if feedback.training:
            feedback.note_forward(exit_index)
            collect_pairs(feedback, call, exit_index, first_row, data_parallel)
        # Bound like in the operator: a rule that needs the weight gets it here, the others their own tensors.
        call, state = with_state(feedback, call, exit_index, first_row, data_parallel)
        call = replace(call, rule=from_spec(feedback.spec(), state))
        with torch.autocast(input.device.type, enabled=False):
            result = _run_preset(call, grad_weight, grad_bias)
        return _exit_step(call, result, input, target)


def _run_preset(call: ExitCall, grad_weight: Tensor | None, grad_bias: Tensor | None) -> ExitResult:
    stages = stages_of(call.backend) if call.vocab is None else sharded_stages(call.vocab)
    if call.preset == "fast":
        return run_exit(call, weight_grad=grad_weight, bias_grad=grad_bias, stages=stages)
    result = run_exit(replace(call, need_weight=False, need_bias=False), stages=stages)
    if call.need_weight or call.need_bias:
        add_tiled_grads(call, result.gold_logit, result.log_prob, stages, weight_grad=grad_weight, bias_grad=grad_bias)
    return result


def _needs_grad(argument: Tensor | None) -> bool:
    return torch.is_grad_enabled() and isinstance(argument, Tensor) and argument.requires_grad


def _loss_options(
    reduction: Reduction, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None
) -> LossOptions:
    _checks.loss_options(reduction, label_smoothing, z_loss, softcap)
    return LossOptions(
        ignore_index=ignore_index,
        label_smoothing=float(label_smoothing),
        z_loss=float(z_loss),
        softcap=None if softcap is None else float(softcap),
    )


def _build_call(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    feedback: Feedback,
    bias: Tensor | None,
    token_weight: Tensor | None,
    reduction: Reduction,
    options: LossOptions,
    num_items: int | float | Tensor | None,
    backend: Backend,
    exit_index: int,
    first_row: int,
    preset: Preset,
    weight_grad: WeightGrad,
    chunk_bytes: int | None,
    data_parallel: DataParallel | None,
    vocab_parallel: VocabParallel | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_stats: bool,
) -> ExitCall:
    _checks.shapes(input, weight, target, bias)
    _checks.feedback_fits(feedback, input, weight)
    _checks.call_options(options.ignore_index, exit_index, chunk_bytes)
    _checks.count("first_row", first_row, minimum=0)
    _checks.num_items(num_items, reduction, input)
    _checks.token_weight(token_weight, target)
    _checks.choice("preset", preset, PRESETS)
    _checks.choice("weight_grad", weight_grad, WEIGHT_GRADS)
    if weight_grad == "filtered":
        _checks.can_filter(preset, options.label_smoothing)
    compute_dtype = product_dtype(input, weight)
    # Kernels read targets, and the bias, as they follow each other.
    flat_target = target.reshape(-1).contiguous()
    is_counted = flat_target != options.ignore_index
    if reduction == "mean":
        num_items = _divisor(is_counted, num_items, data_parallel)
    row_weight = _row_weight(is_counted, token_weight, num_items, accumulate_dtype(compute_dtype))
    draws = (feedback.seed, feedback.step, exit_index)
    call = ExitCall(
        hidden=input.reshape(-1, input.shape[-1]),
        weight=weight,
        bias=None if bias is None else bias.contiguous(),
        target=flat_target,
        row_weight=row_weight,
        compute_dtype=compute_dtype,
        rule=feedback,
        uniforms=_uniforms(feedback, exit_index, flat_target, first_row),
        options=options,
        chunk_bytes=chunk_bytes,
        need_hidden=need_hidden,
        need_weight=need_weight,
        need_bias=need_bias,
        need_stats=need_stats,
        backend=choose_backend(
            # The kernels are not there for shards.
            "torch" if backend == "auto" and vocab_parallel is not None else backend,
            device=input.device,
            compute_dtype=compute_dtype,
            rule=feedback,
            options=options,
        ),
        preset=preset,
        is_filtered=weight_grad == "filtered",
        vocab=vocab_parallel,
    )
    if vocab_parallel is not None:
        refuse_unsupported(call, reduction)
    if not feedback.num_anchors or isinstance(feedback, SharedAnchors):
        return call
    if data_parallel is None:
        return replace(call, anchor_rows=choose_rows(*draws, is_counted, feedback.num_anchors, first_row))
    anchors = choose_tokens(feedback, call, exit_index, first_row, feedback.num_anchors, data_parallel)
    return replace(call, anchor_hidden=anchors.hidden, anchor_is_counted=anchors.is_counted)


def _uniforms(feedback: Feedback, exit_index: int, target: Tensor, first_row: int) -> Tensor | None:
    """The rule's draws for each token, if it draws."""
    if not feedback.num_draws:
        return None
    rows = torch.arange(target.shape[0], device=target.device) + first_row
    return stratified_uniforms(feedback.seed, feedback.step, exit_index, rows, feedback.num_draws)


def product_dtype(input: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of an exit's products: autocast's inside an autocast region, else the promoted one; fp64 stays."""
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(input.dtype, weight.dtype)


def _divisor(
    is_counted: Tensor, num_items: int | float | Tensor | None, data_parallel: DataParallel | None
) -> int | float | Tensor:
    """What "mean" divides this rank's sum by."""
    if data_parallel is None:
        return is_counted.sum().clamp_min(1) if num_items is None else num_items
    if num_items is None:
        num_items = data_parallel.total(is_counted.sum()).clamp_min(1)
    return num_items / data_parallel.size


def _row_weight(
    is_counted: Tensor, token_weight: Tensor | None, divisor: int | float | Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What each row's loss is multiplied by: its weight over the divisor, if any; [N]."""
    if token_weight is None:
        row_weight = torch.ones_like(is_counted, dtype=dtype)
    else:
        row_weight = token_weight.reshape(-1).to(dtype)
    return row_weight if divisor is None else row_weight / divisor


def _exit_step(call: ExitCall, result: ExitResult, input: Tensor, target: Tensor) -> ExitStep:
    feedback = result.feedback
    stats = None
    if call.need_stats:
        stats = _stats(call, target, result.gold_logit, result.log_prob, result.argmax, result.entropy, result.is_bad)
    return ExitStep(
        loss=result.weighted_loss.sum(),
        feedback=None if feedback is None else feedback.to(input.dtype).reshape(input.shape),
        stats=stats,
    )


def _stats(
    call: ExitCall,
    target: Tensor,
    gold_logit: Tensor,
    log_prob: Tensor,
    argmax: Tensor,
    entropy: Tensor,
    is_bad: Tensor,
) -> ExitStats:
    is_counted = call.target != call.options.ignore_index
    num_tokens = is_counted.sum()
    shape = target.shape
    return ExitStats(
        lse=(gold_logit - log_prob).reshape(shape),
        log_prob=log_prob.reshape(shape),
        argmax=argmax.reshape(shape),
        is_correct=((argmax == call.target) & is_counted).reshape(shape),
        entropy=entropy.reshape(shape),
        num_tokens=num_tokens,
        num_anchors=_num_anchors(call, num_tokens),
        bad_target=is_bad.any(),
        feedback=call.rule.name,
        backend=call.backend,
    )


def _num_anchors(call: ExitCall, num_tokens: Tensor) -> Tensor:
    if call.num_measured is not None:
        return call.num_measured
    if call.anchor_is_counted is not None:
        return call.anchor_is_counted.sum()
    return num_tokens.clamp_max(call.rule.num_anchors)
