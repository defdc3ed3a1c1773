"""Training steps that are replayed from CUDA graphs."""

from __future__ import annotations

import copy
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from localexit.train.captured import NUM_EAGER_STEPS
from localexit.train.config import FeedbackSpec
from localexit.train.data import load_data
from localexit.train.errors import NonFiniteError, RunFailedError
from localexit.train.loop import make_trainer
from localexit.train.trainer import StepResult, Trainer
from train.small_runs import small_config, write_corpus

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NUM_STEPS = 20
RULES = ["mirror", "mirror_sampled", "anchors", "anchors_shared", "dense", "hybrid", "transport", "transport_sampled"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("captured")
    write_corpus(made / "text")
    return made


def trainer_of(folder: Path, **changes: Any) -> Trainer:
    options: dict[str, Any] = {"steps": NUM_STEPS, "warmup_steps": 5, "device": "cuda", "precision": "bf16", **changes}
    config = small_config(folder / "text", **options)
    data = load_data(config, cache_dir=folder / "cache")
    precision = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return make_trainer(config, data, device=torch.device("cuda"), precision=precision)


def steps_of(trainer: Trainer, num: int = NUM_STEPS) -> list[StepResult]:
    return [trainer.train_step() for _ in range(num)]


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.local.state_dict().items()}


def assert_same_steps(trainer: Trainer, other: Trainer, *, rel: float) -> None:
    """The first one replays, the other does not."""
    results = steps_of(trainer)
    assert trainer.captured is not None
    assert trainer.captured.is_recorded
    assert other.captured is None
    for one, two in zip(results, steps_of(other), strict=True):
        assert one.losses == pytest.approx(two.losses, rel=rel)
        assert one.grad_norms == pytest.approx(two.grad_norms, rel=50 * rel)
        assert (one.step, one.tokens, one.lr) == (two.step, two.tokens, two.lr)
    assert int(trainer.local.feedback.step) == int(other.local.feedback.step) == NUM_STEPS


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", RULES)
def test_replayed_steps_are_those_of_the_host(folder: Path, rule: str, precision: str) -> None:
    options: dict[str, Any] = {"feedback": FeedbackSpec.parse(rule), "precision": precision}
    # Learning rates in fp32 and in fp64 differ in their last bits, which bf16 makes visible.
    rel = 1e-4 if precision == "fp32" else 5e-3
    assert_same_steps(trainer_of(folder, cuda_graph=True, **options), trainer_of(folder, **options), rel=rel)


# The compiler looks at the gradients of all tensors it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"backward": "deferred"},
        {"backward": "joint"},
        {"accumulate": 3},
        {"token_share": 0.5},
        {"exit_weights": (0.5, 1.0)},
        {"exit_body": "mlp"},
        {"train_blocks": False},
        {"compile": True},
        {"exits": "-1", "feedback": FeedbackSpec.parse("transport")},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_with_every_way_to_train(folder: Path, options: dict[str, Any]) -> None:
    options = {"precision": "fp32", **options}
    assert_same_steps(trainer_of(folder, cuda_graph=True, **options), trainer_of(folder, **options), rel=1e-4)


def test_a_restored_trainer_goes_on_bit_by_bit(folder: Path) -> None:
    whole, parts = trainer_of(folder, cuda_graph=True), trainer_of(folder, cuda_graph=True)
    expected = steps_of(whole)
    first = steps_of(parts, 11)
    continued = trainer_of(folder, cuda_graph=True)
    continued.restore(parts.snapshot())
    results = first + steps_of(continued, NUM_STEPS - 11)
    assert [(r.losses, r.grad_norms, r.lr) for r in results] == [(r.losses, r.grad_norms, r.lr) for r in expected]
    wanted = parameters(whole)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in parameters(continued).items())


def test_a_trainer_that_has_recorded_can_be_restored(folder: Path) -> None:
    trainer = trainer_of(folder, cuda_graph=True)
    steps_of(trainer, 6)
    snapshot = copy.deepcopy(trainer.snapshot())
    expected = [result.losses for result in steps_of(trainer, 8)]
    trainer.restore(snapshot)
    assert [result.losses for result in steps_of(trainer, 8)] == expected


def test_a_checkpoint_has_plain_numbers(folder: Path) -> None:
    captured, plain = trainer_of(folder, cuda_graph=True), trainer_of(folder)
    steps_of(captured, 6)
    steps_of(plain, 6)
    groups, wanted = captured.snapshot().state["optimizer_groups"], plain.snapshot().state["optimizer_groups"]
    assert groups == wanted


@pytest.mark.parametrize("num_before", [1, NUM_EAGER_STEPS + 3])
def test_what_is_not_finite_never_reaches_the_optimiser(folder: Path, num_before: int) -> None:
    trainer = trainer_of(folder, cuda_graph=True)
    steps_of(trainer, num_before)
    weight = trainer.local.unembedding.weight
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = torch.nan
    before = parameters(trainer)
    with pytest.raises(NonFiniteError, match="expected finite losses"):
        trainer.train_step()
    assert all(torch.equal(t.nan_to_num(), before[name].nan_to_num()) for name, t in parameters(trainer).items())
    with torch.no_grad():
        weight[0, 0] = kept
    assert all(loss is not None and loss < 7 for result in steps_of(trainer, 5) for loss in result.losses)


def test_memory_stays_after_the_first_replay(folder: Path) -> None:
    trainer = trainer_of(folder, cuda_graph=True, steps=100)
    steps_of(trainer, NUM_EAGER_STEPS + 2)
    used, held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    steps_of(trainer, 50)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (used, held)


def refusal_of_a_step_that_looks_at_numbers(folder: Path) -> str:
    trainer = trainer_of(folder, cuda_graph=True)
    trainer.local.blocks[0].register_forward_hook(lambda _block, _inputs, output: output * output[0, 0, 0].item())
    steps_of(trainer, NUM_EAGER_STEPS)
    with pytest.raises(RunFailedError) as raised:
        trainer.train_step()
    return str(raised.value)


def test_a_step_that_looks_at_numbers_is_refused(folder: Path) -> None:
    # After it PyTorch's random numbers on that GPU are of no more use to a process.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as another:
        refusal = another.submit(refusal_of_a_step_that_looks_at_numbers, folder).result()
    assert re.match(r"cuda_graph: expected a step without copies.*--resume --no-cuda-graph", refusal)
