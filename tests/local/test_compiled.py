"""Compiled units: few compilations, gradients of the eager ones, and nothing but training is compiled."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from local.decoders import VOCAB, batch, build, gradients
from local.families import skip_if_broken, tiny_model, token_ids
from local.rules import attached
from localexit.local import LocalModel, attach, compile_units
from localexit.measure import audit_attached, diagnose

# The compiler looks at the gradients of all tensors it is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

# One for the norms, two for the blocks: with and without a graph before them.
FEW = 3


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counted(local: LocalModel) -> CompileCounterWithBackend:
    """Compile the units; what this took to try the backend does not count."""
    counter = CompileCounterWithBackend("aot_eager")
    compile_units(local, backend=counter)
    counter.clear()
    return counter


def train(local: LocalModel, seed: int = 0) -> None:
    ids, labels = batch(seed=seed)
    out = local(ids, labels)
    if local.backward_mode == "deferred":
        out.loss.backward()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backward": "deferred"},
        {"backward": "joint"},
        {"backward": "direct"},
        {"exits": "every:2"},
        {"exit_norm": "copy"},
        {"exit_norm": "none"},
        {"exit_body": "mlp"},
        {"exit_body": "block"},
    ],
    ids=str,
)
def test_units_that_are_alike_share_few_compilations(changes: dict[str, Any]) -> None:
    options = {"backward": "stream", **changes}
    eager, compiled = (attached(build("llama", 4), "dense", **options) for _ in range(2))
    counter = counted(compiled)
    for seed in range(4):
        for local in (eager, compiled):
            train(local, seed)
    # The MLPs are a class of their own.
    assert 0 < counter.frame_count <= FEW + (changes.get("exit_body") == "mlp")
    expected = gradients(eager)
    assert expected
    for name, grad in gradients(compiled).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


def test_only_training_is_compiled() -> None:
    """Evaluation, diagnosis, logits and the model's own forward with a cache: bitwise, and nothing new is compiled."""
    eager, compiled = (attached(build("llama", 3), backward="stream") for _ in range(2))
    counter = counted(compiled)
    (ids, labels), prompt = batch(), torch.randint(VOCAB, (1, 4))
    found: list[list[Any]] = []
    for local in (eager, compiled):
        evaluation = local.evaluate(ids, labels)
        diagnosis = diagnose(local, ids, labels)
        local.eval()
        with torch.no_grad():
            text = local.model.generate(prompt, max_new_tokens=4, do_sample=False)
            found.append([evaluation.loss, local.exit_logits(1, ids), local.model(ids).logits, text])
        found[-1].append(torch.tensor([exit_.gradient_cosine for exit_ in diagnosis.exits]))
    assert counter.frame_count == 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compiled_units_pass_the_audit() -> None:
    """Which looks at gradients that cross between units, and at which parameters a loss reaches, on a deep copy."""
    local = attached(build("llama", 3), "mirror_sampled", backward="stream")
    compile_units(local, backend="aot_eager")
    assert audit_attached(local).passed


def test_names_and_signatures_stay_as_they_are() -> None:
    eager, compiled = (attached(build("llama", 2), exit_body="block", backward="stream") for _ in range(2))
    compile_units(compiled, backend="eager")
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert [n for n, _ in compiled.named_modules()] == [n for n, _ in eager.named_modules()]
    for block, plain in zip(compiled.blocks, eager.blocks, strict=True):
        assert inspect.signature(block.forward) == inspect.signature(plain.forward)


def test_a_deep_copy_computes_with_parameters_of_its_own() -> None:
    local = attached(build("llama", 2), backward="stream")
    compile_units(local, backend="aot_eager")
    copied = copy.deepcopy(local)
    with torch.no_grad():
        for parameter in local.parameters():
            parameter.zero_()
    train(copied)
    assert not gradients(local)
    assert all(bool(grad.any()) for grad in gradients(copied).values())


def test_other_shapes_are_compiled_once_more_at_most() -> None:
    local = attached(build("llama", 3), backward="stream")
    counter = counted(local)
    for length in (6, 7, 9, 5, 8):
        ids = torch.randint(VOCAB, (2, length))
        local(ids, ids)
    assert counter.frame_count <= 2 * FEW


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma3_text", "mixtral", "mamba2", "falcon_h1"])
def test_families(family: str) -> None:
    """Blocks that differ in what they attend to, that have routers of their own, or no attention at all."""
    skip_if_broken(family)
    if family == "mixtral" and torch.__version__ < "2.12":
        pytest.skip("the compiler of torch 2.11 takes the experts' grouped products in bf16 only")
    eager, compiled = (attach(tiny_model(family), feedback="transport", backward="stream") for _ in range(2))
    counter = counted(compiled)
    for local in (eager, compiled):
        torch.manual_seed(0)
        local(token_ids(), token_ids())
    assert counter.frame_count > 0
    expected = gradients(eager)
    for name, grad in gradients(compiled).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_routers_learn_from_their_auxiliary_loss() -> None:
    """A hook inside of the blocks takes the routers' logits: their graph is kept, and breaks do not grow with depth."""
    options = {"output_router_logits": True, "num_hidden_layers": 6}
    models = [tiny_model("mixtral", **options) for _ in range(2)]
    eager, compiled = (attach(model, feedback="transport", backward="stream") for model in models)
    counter = counted(compiled)
    expected, got = (local(token_ids(), token_ids(), output_router_logits=True) for local in (eager, compiled))
    assert counter.frame_count <= 10
    assert (expected.router_losses > 0).all()
    torch.testing.assert_close(got.router_losses, expected.router_losses)
    grads = gradients(eager)
    for name, grad in gradients(compiled).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_second_time_is_refused() -> None:
    local = attached(build("llama", 2))
    compile_units(local, backend="eager")
    with pytest.raises(ValueError, match="compile: expected modules with the forward of their class, got a Llama"):
        compile_units(local, backend="eager")


def test_a_backend_that_does_not_work_is_refused_and_nothing_is_changed() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler found")

    local = attached(build("llama", 2))
    with pytest.raises(ValueError, match="compile: expected a platform where torch.compile works on 'cpu', got: .*no"):
        compile_units(local, backend=broken)
    assert not any("forward" in block.__dict__ for block in local.blocks)
