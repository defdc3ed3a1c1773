"""Bad input to the Python API: an error of the right type that names the argument."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localexit import (
    DenseRandomCompressor,
    ExactParallel,
    ExactParallelExitHead,
    ExitHead,
    FactorizedExitHead,
    HybridTopKTailSketchCompressor,
    exit_cross_entropy,
    exit_step,
    make_feedback,
    orthonormal_columns,
)

N, D, V = 4, 8, 11
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _quick_and_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every refusal takes less than a second of computing, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    yield
    assert time.process_time() - start < 1
    assert list(tmp_path.iterdir()) == []


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, device=device).to(dtype)


def good() -> dict[str, Any]:
    return {
        "input": tensor(N, D),
        "linear_weight": tensor(V, D),
        "target": torch.arange(N),
        "feedback": make_feedback("dense", D, V),
    }


EXIT_CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input_not_a_tensor": ({"input": [[1.0]]}, TypeError, "input must be a tensor, got list"),
    "input_of_integers": ({"input": tensor(N, D, dtype=torch.int64)}, TypeError, "input must have one of the dtypes"),
    "input_complex": ({"input": tensor(N, D, dtype=torch.complex64)}, TypeError, "input must have one of the dtypes"),
    "input_sparse": ({"input": tensor(N, D).to_sparse()}, TypeError, "input must be a dense tensor"),
    "input_without_dimension": ({"input": tensor()}, ValueError, r"input has shape \[\]"),
    "input_too_narrow": ({"input": tensor(N, D - 1)}, ValueError, "last dimension of input must be D=8"),
    "input_empty_dimension": ({"input": tensor(N, 0)}, ValueError, "last dimension of input must be D=8"),
    "input_on_meta": (
        {"input": tensor(N, D, device="meta")},
        ValueError,
        "linear_weight is on cpu but input is on meta",
    ),
    "weight_not_a_tensor": ({"linear_weight": None}, TypeError, "linear_weight must be a tensor, got NoneType"),
    "weight_of_integers": ({"linear_weight": tensor(V, D, dtype=torch.int32)}, TypeError, "linear_weight must have"),
    "weight_a_vector": ({"linear_weight": tensor(D)}, ValueError, r"linear_weight must be \[V, D\]"),
    "weight_of_three_dimensions": ({"linear_weight": tensor(1, V, D)}, ValueError, r"linear_weight must be \[V, D\]"),
    "weight_without_rows": ({"linear_weight": tensor(0, D)}, ValueError, "V of at least 1"),
    "weight_transposed": ({"linear_weight": tensor(D, V)}, ValueError, "not transposed"),
    "weight_on_meta": ({"linear_weight": tensor(V, D, device="meta")}, ValueError, "linear_weight is on meta"),
    "target_not_a_tensor": ({"target": [0] * N}, TypeError, "target must be a tensor of token ids, got list"),
    "target_float": ({"target": tensor(N)}, TypeError, "target must hold token ids as int64 or int32"),
    "target_bool": ({"target": tensor(N, dtype=torch.bool)}, TypeError, "target must hold token ids"),
    "target_uint8": ({"target": tensor(N, dtype=torch.uint8)}, TypeError, "target must hold token ids"),
    "target_of_probabilities": ({"target": tensor(N, V)}, TypeError, "class probabilities are not supported"),
    "target_too_short": ({"target": torch.arange(N - 1)}, ValueError, r"target has shape \[3\] but input is \[4, 8\]"),
    "target_with_a_dimension_too_many": ({"target": torch.arange(N)[:, None]}, ValueError, "target has shape"),
    "target_too_large": (
        {"target": torch.arange(N) + V - 2},
        ValueError,
        r"target has 2 values outside 0\.\.10.*is 11",
    ),
    "target_negative": ({"target": torch.arange(N) - 1}, ValueError, "the first is -1; tokens to leave out.*=-100"),
    "target_sentinel": ({"target": torch.tensor([0, 2**31 - 1, 0, 0])}, ValueError, "the first is 2147483647"),
    "target_on_meta": ({"target": torch.arange(N, device="meta")}, ValueError, "target is on meta but input is on cpu"),
    "ignore_index_that_targets_do_not_have": (
        {"target": torch.tensor([0, -100, 1, 2]), "ignore_index": -1},
        ValueError,
        "the first is -100; .*ignore_index=-1",
    ),
    "ignore_index_float": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
    "ignore_index_none": ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
    "feedback_a_name": ({"feedback": "dense"}, TypeError, "feedback must be a Feedback module, got str"),
    "feedback_none": ({"feedback": None}, TypeError, "feedback must be a Feedback module, got NoneType"),
    "feedback_of_another_width": (
        {"feedback": make_feedback("dense", D + 1, V)},
        ValueError,
        r"feedback 'dense' was made for \[V, D\]=\[11, 9\] but linear_weight is \[11, 8\]",
    ),
    "feedback_of_another_vocabulary": ({"feedback": make_feedback("mirror", D, V + 1)}, ValueError, "was made for"),
    "feedback_on_meta": (
        {"feedback": make_feedback("dense", D, V).to("meta")},
        ValueError,
        "feedback 'dense' is on meta but input is on cpu",
    ),
    "bias_not_a_tensor": ({"linear_bias": 1.0}, TypeError, "linear_bias must be a tensor, got float"),
    "bias_of_the_wrong_length": ({"linear_bias": tensor(D)}, ValueError, r"linear_bias must be \[V\]=\[11\]"),
    "bias_of_integers": ({"linear_bias": tensor(V, dtype=torch.int64)}, TypeError, "linear_bias must have"),
    "bias_on_meta": ({"linear_bias": tensor(V, device="meta")}, ValueError, "linear_bias is on meta"),
    "token_weight_not_a_tensor": ({"token_weight": [1.0] * N}, TypeError, "token_weight must be a tensor, got list"),
    "token_weight_of_the_wrong_length": ({"token_weight": tensor(N + 1)}, ValueError, r"token_weight has shape \[5\]"),
    "token_weight_of_integers": ({"token_weight": tensor(N, dtype=torch.int64)}, TypeError, "token_weight must have"),
    "token_weight_on_meta": ({"token_weight": tensor(N, device="meta")}, ValueError, "token_weight is on meta"),
    "reduction_unknown": (
        {"reduction": "avg"},
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none', got 'avg'",
    ),
    "reduction_none_object": ({"reduction": None}, ValueError, "reduction must be one of"),
    "label_smoothing_one": ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\)"),
    "label_smoothing_negative": ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be"),
    "label_smoothing_nan": ({"label_smoothing": NAN}, ValueError, "label_smoothing must be"),
    "label_smoothing_text": ({"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number"),
    "z_loss_negative": ({"z_loss": -1e-4}, ValueError, "z_loss must be a finite number of at least 0"),
    "z_loss_nan": ({"z_loss": NAN}, ValueError, "z_loss must be"),
    "z_loss_none": ({"z_loss": None}, TypeError, "z_loss must be"),
    "softcap_zero": ({"softcap": 0.0}, ValueError, "softcap must be a positive number or None"),
    "softcap_infinite": ({"softcap": INF}, ValueError, "softcap must be"),
    "softcap_nan": ({"softcap": NAN}, ValueError, "softcap must be"),
    "softcap_bool": ({"softcap": True}, TypeError, "softcap must be"),
    "num_items_zero": ({"num_items": 0}, ValueError, "num_items must be a positive number"),
    "num_items_nan": ({"num_items": NAN}, ValueError, "num_items must be"),
    "num_items_infinite": ({"num_items": INF}, ValueError, "num_items must be"),
    "num_items_text": ({"num_items": "4"}, TypeError, "num_items must be"),
    "num_items_a_vector": ({"num_items": tensor(2)}, ValueError, "num_items must be a number or a 0-dim tensor"),
    "num_items_a_bool_tensor": ({"num_items": torch.tensor(True)}, TypeError, "num_items must be a number of tokens"),
    "num_items_on_meta": ({"num_items": torch.tensor(3.0, device="meta")}, ValueError, "num_items is on meta"),
    "num_items_with_sum": (
        {"num_items": 3, "reduction": "sum"},
        ValueError,
        "num_items is the divisor of reduction='mean'",
    ),
    "exit_index_negative": ({"exit_index": -1}, ValueError, "exit_index must be at least 0, got -1"),
    "exit_index_text": ({"exit_index": "last"}, TypeError, "exit_index must be an integer"),
    "chunk_bytes_zero": ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be at least 1, got 0"),
    "chunk_bytes_float": ({"chunk_bytes": 1e6}, TypeError, "chunk_bytes must be an integer"),
    "backend_unknown": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of 'auto', 'torch', 'triton', got 'cuda'",
    ),
}


def exit_under_no_grad(**arguments: Any) -> Any:
    with torch.no_grad():
        return exit_cross_entropy(**arguments)


@pytest.mark.parametrize("call", [exit_cross_entropy, exit_step, exit_under_no_grad])
@pytest.mark.parametrize("case", EXIT_CASES)
def test_exit(case: str, call: Callable[..., Any]) -> None:
    wrong, error, message = EXIT_CASES[case]
    if call is exit_step and wrong.get("reduction", "mean") not in ("mean", "sum"):
        message = "reduction must be one of 'mean', 'sum', got"
    with pytest.raises(error, match=message):
        call(**(good() | wrong))


def test_good_arguments_are_good() -> None:
    exit_cross_entropy(**good())
    exit_step(**good())


ACCUMULATORS: dict[str, tuple[dict[str, Any], str]] = {
    "grad_weight_shape": ({"grad_weight": tensor(D, V)}, r"grad_weight must be a \[11, 8\] tensor of torch.float32"),
    "grad_weight_dtype": ({"grad_weight": tensor(V, D, dtype=torch.bfloat16)}, "grad_weight must be .*got .*bfloat16"),
    "grad_weight_type": ({"grad_weight": True}, "grad_weight must be .*got bool"),
    "grad_weight_device": ({"grad_weight": tensor(V, D, device="meta")}, "grad_weight is on meta"),
    "grad_bias_shape": ({"grad_bias": tensor(D)}, r"grad_bias must be a \[11\] tensor"),
    "reduction_none": ({"reduction": "none"}, "reduction must be one of 'mean', 'sum'"),
}


@pytest.mark.parametrize("case", ACCUMULATORS)
def test_exit_step_accumulators(case: str) -> None:
    wrong, message = ACCUMULATORS[case]
    with pytest.raises(ValueError, match=message):
        exit_step(**(good() | wrong))


def rule(name: Any, *sizes: Any, **options: Any) -> Callable[[], Any]:
    return lambda: make_feedback(name, *(sizes or (D, V)), **options)


RULE_CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unknown_name": (rule("exact"), ValueError, "feedback must be one of 'dense', .*got 'exact'"),
    "name_of_another_type": (rule(["dense"]), ValueError, "feedback must be one of"),
    "hidden_size_zero": (rule("dense", 0, V), ValueError, "hidden_size must be at least 1, got 0"),
    "hidden_size_text": (rule("dense", "8", V), TypeError, "hidden_size must be an integer"),
    "vocab_size_float": (rule("dense", D, 11.0), TypeError, "vocab_size must be an integer"),
    "vocab_size_negative": (rule("dense", D, -1), ValueError, "vocab_size must be at least 1"),
    "seed_text": (rule("dense", seed="0"), TypeError, "seed must be an integer"),
    "seed_float": (rule("anchors", seed=0.5), TypeError, "seed must be an integer, got 0.5"),
    "seed_beyond_64_bits": (rule("mirror", seed=2**63), ValueError, "seed must be a 64-bit integer"),
    "option_unknown": (
        rule("dense", topk=3),
        ValueError,
        "feedback 'dense' has no option 'topk'; expected one of rank, gain",
    ),
    "option_of_another_form": (rule("mirror", num_draws=3), ValueError, "'mirror' has no option 'num_draws'"),
    "option_the_name_decides": (rule("parallel_gold", residual="topmass"), ValueError, "option 'residual'"),
    "rank_above_width": (
        rule("dense", rank=D + 1),
        ValueError,
        "rank=9 is larger than the hidden size 8.*rank=8 or less",
    ),
    "rank_zero": (rule("sketch", rank=0), ValueError, "rank must be at least 1"),
    "rank_float": (rule("sketch", rank=4.0), TypeError, "rank must be an integer"),
    "rank_bool": (rule("hybrid", rank=True), TypeError, "rank must be an integer"),
    "rank_below_rank_exact": (rule("hybrid", rank=4, rank_exact=5), ValueError, "rank_exact=5 is larger than rank=4"),
    "rank_exact_negative": (rule("hybrid", rank_exact=-1), ValueError, "rank_exact must be at least 0"),
    "topk_negative": (rule("hybrid", topk=-1), ValueError, "topk must be at least 0"),
    "topk_float": (rule("mirror_sampled", topk=1.5), TypeError, "topk must be an integer"),
    "gain_nan": (rule("dense", gain=NAN), ValueError, "gain must be a finite number"),
    "gain_text": (rule("sketch", gain="1"), TypeError, "gain must be a finite number"),
    "residual_rank_above_width": (rule("parallel_gold", residual_rank=9), ValueError, "residual_rank=9 is larger"),
    "residual_gain_infinite": (rule("parallel_gold", residual_gain=INF), ValueError, "residual_gain must be a finite"),
    "mass_threshold_zero": (rule("parallel_topmass", mass_threshold=0), ValueError, "mass_threshold must be in"),
    "mass_threshold_above_one": (rule("parallel_topmass", mass_threshold=1.1), ValueError, "mass_threshold must be in"),
    "mass_threshold_nan": (rule("parallel_topmass", mass_threshold=NAN), ValueError, "mass_threshold must be in"),
    "nucleus_cap_zero": (rule("parallel_topmass", nucleus_cap=0), ValueError, "nucleus_cap must be at least 1"),
    "residual_unknown": (
        lambda: ExactParallel(D, V, residual="tail"),
        ValueError,
        "residual must be one of None, 'gold'",
    ),  # type: ignore[arg-type]
    "num_anchors_zero": (rule("anchors", num_anchors=0), ValueError, "num_anchors must be at least 1"),
    "ridge_negative": (rule("anchors", ridge=-1e-3), ValueError, "ridge must be a finite number of at least 0"),
    "ridge_nan": (rule("mirror", ridge=NAN), ValueError, "ridge must be a finite number of at least 0"),
    "ridge_text": (rule("mirror", ridge="small"), TypeError, "ridge must be a finite number of at least 0"),
    "num_pairs_zero": (rule("mirror", num_pairs=0), ValueError, "num_pairs must be at least 1"),
    "num_draws_zero": (rule("mirror_sampled", num_draws=0), ValueError, "num_draws must be at least 1"),
    "num_draws_negative": (rule("transport_sampled", num_draws=-1), ValueError, "num_draws must be at least 1"),
}


@pytest.mark.parametrize("case", RULE_CASES)
def test_rules(case: str) -> None:
    build, error, message = RULE_CASES[case]
    with pytest.raises(error, match=message):
        build()


def factorized(**options: Any) -> Any:
    chosen = {"d_model": D, "vocab_size": V, "rank": 4, "rank_exact": 2, "topk": 2} | options
    return FactorizedExitHead(**chosen)


def parallel(**options: Any) -> Any:
    chosen = {"d_model": D, "vocab_size": V, "mode": "parallel_gold", "residual_rank": 4} | options
    return ExactParallelExitHead(**chosen)


def called(head: Any, **options: Any) -> Any:
    chosen = {"h": tensor(N, D), "shared_weight": tensor(V, D), "targets": torch.arange(N)} | options
    return head(**chosen)


def compressed(compressor: Any, grad_logits: Any = None, targets: Any = None) -> Any:
    grad_logits = tensor(N, V) if grad_logits is None else grad_logits
    return compressor.compress(grad_logits, torch.arange(N) if targets is None else targets)


def hybrid(**options: Any) -> Any:
    return HybridTopKTailSketchCompressor(V, **options)


HEAD_CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "default_rank_above_width": (
        lambda: FactorizedExitHead(D, V),
        ValueError,
        "rank=128 is larger than the hidden size 8",
    ),
    "rank_below_rank_exact": (lambda: factorized(rank_exact=8), ValueError, "rank_exact=8 is larger than rank=4"),
    "factorized_mode": (lambda: factorized(mode="sketch"), ValueError, "mode must be one of 'dense', 'hybrid'"),
    "parallel_mode": (lambda: parallel(mode="gold"), ValueError, "mode must be one of 'parallel_only'"),
    "alpha_nan": (lambda: factorized(alpha_init=NAN), ValueError, "alpha_init must be a finite number"),
    "alpha_text": (lambda: factorized(alpha_init="1"), TypeError, "alpha_init must be a finite number"),
    "head_topk": (lambda: factorized(topk=-2), ValueError, "topk must be at least 0"),
    "head_width": (lambda: factorized(d_model=0), ValueError, "d_model must be at least 1"),
    "head_width_text": (lambda: parallel(d_model="8"), TypeError, "d_model must be an integer"),
    "head_vocabulary": (lambda: factorized(vocab_size=0), ValueError, "vocab_size must be at least 1"),
    "head_seed": (lambda: factorized(seed="a"), TypeError, "seed must be an integer"),
    "residual_rank": (
        lambda: parallel(residual_rank=32),
        ValueError,
        "residual_rank=32 is larger than the hidden size 8",
    ),
    "residual_lambda": (lambda: parallel(residual_lambda=NAN), ValueError, "residual_lambda must be a finite number"),
    "head_mass_threshold": (lambda: parallel(mass_threshold=2), ValueError, "mass_threshold must be in"),
    "h_of_integers": (lambda: called(factorized(), h=tensor(N, D, dtype=torch.int64)), TypeError, "h must have one of"),
    "h_too_narrow": (lambda: called(parallel(), h=tensor(N, 7)), ValueError, "last dimension of h must be D=8"),
    "head_weight_transposed": (lambda: called(parallel(), shared_weight=tensor(D, V)), ValueError, "shared_weight is"),
    "head_weight_of_another_model": (
        lambda: called(factorized(), shared_weight=tensor(V + 1, D)),
        ValueError,
        r"shared_weight is \[V, D\]=\[12, 8\] but the head was made for \[11, 8\]",
    ),
    "targets_float": (lambda: called(factorized(), targets=tensor(N)), TypeError, "targets must hold token ids"),
    "targets_too_short": (lambda: called(parallel(), targets=torch.arange(2)), ValueError, "targets has shape"),
    "targets_too_large": (
        lambda: called(factorized(), targets=torch.arange(N) + V),
        ValueError,
        "target has 4 values outside",
    ),
    "targets_too_large_parallel": (
        lambda: called(parallel(), targets=torch.arange(N) + V),
        ValueError,
        "values outside",
    ),
    "compressor_vocabulary": (lambda: compressed(hybrid(), tensor(N, V + 1)), ValueError, "grad_logits has shape"),
    "compressor_of_integers": (
        lambda: compressed(hybrid(), tensor(N, V, dtype=torch.int64)),
        TypeError,
        "grad_logits must have one of",
    ),
    "dense_compressor_vocabulary": (
        lambda: compressed(DenseRandomCompressor(V, 4), tensor(N, 3)),
        ValueError,
        "grad_logits has shape",
    ),
    "compressor_targets_float": (lambda: compressed(hybrid(), targets=tensor(N)), TypeError, "targets must hold"),
    "compressor_targets_short": (
        lambda: compressed(hybrid(), targets=torch.arange(2)),
        ValueError,
        "targets has shape",
    ),
    "compressor_targets_large": (
        lambda: compressed(hybrid(), targets=torch.arange(N) + V),
        ValueError,
        "values outside",
    ),
    "compressor_rank": (lambda: DenseRandomCompressor(V, 0), ValueError, "rank must be at least 1"),
    "compressor_rank_exact": (lambda: hybrid(rank_exact=-1), ValueError, "rank_exact must be at least 0"),
    "compressor_rank_tail": (lambda: hybrid(rank_tail=1.5), TypeError, "rank_tail must be an integer"),
    "compressor_size": (lambda: DenseRandomCompressor(0, 4), ValueError, "vocab_size must be at least 1"),
    "columns_rank": (lambda: orthonormal_columns(4, 5), ValueError, "rank=5 is larger than the hidden size 4"),
    "columns_rank_none": (lambda: orthonormal_columns(4, None), TypeError, "rank must be an integer"),  # type: ignore[arg-type]
    "columns_dtype": (lambda: orthonormal_columns(4, 2, dtype=torch.int64), TypeError, "dtype must be floating point"),
    "exit_head_feedback": (lambda: ExitHead(D, V, feedback="exact"), ValueError, "feedback must be one of"),
    "exit_head_feedback_type": (lambda: ExitHead(D, V, feedback=3), TypeError, "feedback must be a Feedback module"),  # type: ignore[arg-type]
    "exit_head_sizes": (lambda: ExitHead(D, V, feedback=make_feedback("dense", 9, V)), ValueError, "was made for"),
    "exit_head_weight": (lambda: ExitHead(D, V, weight=torch.nn.Parameter(tensor(V, 9))), ValueError, "weight must be"),
    "exit_head_weight_dtype": (
        lambda: ExitHead(D, V, weight=torch.nn.Parameter(tensor(V, D).long(), requires_grad=False)),
        TypeError,
        "weight must have one of the dtypes",
    ),
    "exit_head_weight_type": (lambda: ExitHead(D, V, weight="tied"), TypeError, "weight must be an nn.Parameter"),  # type: ignore[arg-type]
    "exit_head_reduction": (lambda: ExitHead(D, V, reduction="avg"), ValueError, "reduction must be one of"),  # type: ignore[arg-type]
    "exit_head_backend": (lambda: ExitHead(D, V, backend="cuda"), ValueError, "backend must be one of"),  # type: ignore[arg-type]
    "exit_head_ignore_index": (lambda: ExitHead(D, V, ignore_index=None), TypeError, "ignore_index must be"),  # type: ignore[arg-type]
    "exit_head_exit_index": (lambda: ExitHead(D, V, exit_index=-1), ValueError, "exit_index must be at least 0"),
    "exit_head_softcap": (lambda: ExitHead(D, V, softcap=-30.0), ValueError, "softcap must be"),
}


@pytest.mark.parametrize("case", HEAD_CASES)
def test_heads(case: str) -> None:
    build, error, message = HEAD_CASES[case]
    with pytest.raises(error, match=message):
        build()


def test_good_heads_are_good() -> None:
    called(factorized())
    called(parallel())
    assert compressed(hybrid()).shape == (N, 128)


def test_a_dense_compressor_needs_no_targets() -> None:
    assert DenseRandomCompressor(V, 4).compress(tensor(N, V), None).shape == (N, 4)  # type: ignore[arg-type]
