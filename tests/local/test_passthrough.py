"""Outside of training an attached model is bitwise the model, and remove() takes everything off."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from local.decoders import DECODERS, batch, build, count_hooks, gradients
from local.rules import attached

MODES = ("deferred", "stream")


def logits(output: object) -> Tensor:
    return getattr(output, "logits", output)


@pytest.mark.parametrize("name", DECODERS)
def test_without_labels_or_gradients_or_training_the_model_is_the_same(name: str) -> None:
    ids, labels = batch()
    untouched, model = build(name), build(name)
    local = attached(model, backward="stream")
    trained, expected = logits(model(ids)), logits(untouched(ids))
    assert torch.equal(trained, expected)
    trained.sum().backward()
    expected.sum().backward()
    assert all(torch.equal(grad, gradients(untouched)[key]) for key, grad in gradients(model).items())
    # Each against the same mode: some processors' kernels differ in the last bit with and without a graph.
    with torch.no_grad():
        assert torch.equal(logits(local(ids)), logits(untouched(ids)))
    with torch.inference_mode():
        assert torch.equal(logits(model(ids)), logits(untouched(ids)))
    assert torch.equal(logits(model.eval()(ids)), logits(untouched.eval()(ids)))
    if name != "plain":
        assert torch.equal(local(ids, labels).loss, untouched(ids, labels=labels).loss)
        with torch.no_grad():
            assert torch.equal(model.train()(ids, labels=labels).loss, untouched.train()(ids, labels=labels).loss)


def test_a_backward_in_eval_mode_warns_that_it_is_end_to_end() -> None:
    """`from_pretrained` leaves a model in eval mode, and a loop would train by backprop without a word."""
    model, untouched = build("llama").eval(), build("llama").eval()
    ids, labels = batch()
    local = attached(model)
    loss = local(ids, labels).loss
    with pytest.warns(UserWarning, match=r"end-to-end backprop, and no exit learns.*call train\(\)"):
        loss.backward()
    untouched(ids, labels=labels).loss.backward()
    assert all(torch.equal(grad, gradients(untouched)[key]) for key, grad in gradients(model).items())
    local.remove()
    model(ids, labels=labels).loss.backward()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("training", [False, True])
def test_generate_is_unchanged(name: str, training: bool) -> None:
    ids, _ = batch(length=3)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = build(name).train(training).generate(ids, attention_mask=torch.ones_like(ids), **options)
    model = build(name).train(training)
    attached(model, backward="stream")
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), expected)


def test_labels_outside_of_training_for_a_model_that_takes_none() -> None:
    local = attached(build("plain")).eval()
    with pytest.raises(ValueError, match="labels given outside of training"):
        local(*batch())


@pytest.mark.parametrize("name", DECODERS)
def test_remove_leaves_nothing_behind(name: str) -> None:
    model = build(name)
    ids, _ = batch()
    expected, keys, attributes = logits(model(ids)), list(model.state_dict()), set(model.__dict__)
    hooks = count_hooks(model)
    local = attached(model, backward="stream", exit_norm="copy")
    local(*batch())
    local.remove()
    local.remove()
    assert "forward" not in model.__dict__
    assert set(model.__dict__) == attributes
    assert count_hooks(model) == hooks
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model(ids)), expected)
    with pytest.raises(RuntimeError, match="was removed from its model"):
        local.evaluate(*batch())
    attached(model)


def test_remove_restores_a_forward_that_was_replaced_before() -> None:
    model = build("plain")
    original = model.forward
    model.forward = lambda tokens: original(tokens)
    replaced = model.forward
    attached(model).remove()
    assert model.forward is replaced


def test_remove_under_a_later_wrapper_only_passes_calls_on() -> None:
    model = build("llama")
    ids, labels = batch()
    local = attached(model)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    local.remove()
    assert model(ids, labels=labels).logits is not None
