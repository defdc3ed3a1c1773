"""Blocks, tail and unembedding are found in models of any layout, verified by numbers, and nothing is disturbed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn

from local.decoders import DECODERS, VOCAB, WIDTH, Block, PlainDecoder, build
from localexit.local import attach, discover
from localexit.local.discover import scaled_linear
from localexit.local.exits import Readout
from localexit.local.trace import trace_forward


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_parts_of_known_decoders(name: str, num_blocks: int) -> None:
    model = build(name, num_blocks)
    anatomy = discover(model)
    assert anatomy.blocks == tuple(model.get_submodule(anatomy.blocks_name).children())
    assert len(anatomy.blocks) == num_blocks
    assert len(anatomy.tail) == 1
    assert anatomy.unembedding.weight.shape == (VOCAB, WIDTH)
    assert (anatomy.scale, anatomy.softcap) == (1.0, None)


def test_autocast_around_it_does_not_change_what_the_trace_sees() -> None:
    model, ids = build("plain").float().eval(), torch.arange(6)[None]
    with torch.autocast("cpu", torch.bfloat16):
        traced = trace_forward(model, ids).logits
    # With gradients some processors multiply in another order.
    with torch.no_grad():
        assert torch.equal(traced, model(ids))


def test_a_scale_of_the_logits_is_one_of_their_bias_too() -> None:
    unembedding, hidden = nn.Linear(3, 5), torch.randn(2, 3)
    as_it_is: Any = SimpleNamespace(normed=lambda hidden: hidden)
    for scale in (1.0, 2.0):
        expected = scale * unembedding(hidden)
        torch.testing.assert_close(scaled_linear(unembedding, hidden, scale), expected)
        readout = Readout(unembedding=unembedding, scale=scale, softcap=None)
        torch.testing.assert_close(readout.logits(as_it_is, hidden), expected)
        logits = nn.functional.linear(readout.normed(as_it_is, hidden), readout.weight, readout.bias())
        torch.testing.assert_close(logits, expected)


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        final_logit_softcapping=0.7,
        pad_token_id=None,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Gemma2ForCausalLM(config)


def granite() -> nn.Module:
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        logits_scaling=8.0,
        embedding_multiplier=3.0,
        pad_token_id=None,
    )
    return GraniteForCausalLM(config)


def cohere() -> nn.Module:
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        logit_scale=0.0625,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    return CohereForCausalLM(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "scale", "softcap"), [(gemma2, 1.0, 0.7), (granite, 1 / 8, None), (cohere, 0.0625, None)]
)
def test_scale_and_softcap_come_from_the_configuration(
    make: object, scale: float, softcap: float | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = make().to(dtype)
    with torch.no_grad():
        # Logits near the cap: where it matters, it must be found in bf16 too.
        model.get_output_embeddings().weight.normal_()
    anatomy = discover(model)
    assert (anatomy.scale, anatomy.softcap) == (scale, softcap)


@pytest.mark.parametrize("make", [gemma2, granite, cohere])
def test_logits_at_the_last_exit_are_the_models(make: object) -> None:
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(VOCAB, (2, 5))
    with torch.no_grad():
        expected = model(ids).logits
    assert torch.equal(attach(model, feedback="dense").exit_logits(-1, ids), expected)


class DictLayout(nn.Module):
    """Everything in one ModuleDict, the blocks in a list inside of it; returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "embed": nn.Embedding(VOCAB, WIDTH),
                "blocks": nn.ModuleList(Block(WIDTH) for _ in range(3)),
                "norm": nn.LayerNorm(WIDTH),
            }
        )
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        hidden = self.body["embed"](tokens)
        for block in self.body["blocks"]:
            hidden = block(hidden, hidden.new_zeros(()))
        return self.head(self.body["norm"](hidden)), None


class SequentialLayout(nn.Module):
    """Blocks in an nn.Sequential; a projection and dropout in the tail; a larger vocabulary than positions."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(4, WIDTH)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)))
        self.tail = nn.Sequential(nn.LayerNorm(WIDTH), nn.Dropout(0.5))
        self.project = nn.Linear(WIDTH, 5)
        self.head = nn.Linear(5, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.head(self.project(self.tail(self.blocks(hidden))))


class Experts(Block):
    """A block with more modules in a list of its own than there are blocks."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(5))

    def forward(self, hidden: Tensor, decay: Tensor) -> Tensor:
        hidden = super().forward(hidden, decay)
        return hidden + sum(expert(hidden) for expert in self.experts)


class ExpertLayout(PlainDecoder):
    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.blocks = nn.ModuleList(Experts(WIDTH) for _ in range(num_blocks))


@pytest.mark.parametrize(
    ("make", "name", "num_blocks", "num_tail"),
    [
        (DictLayout, "body.blocks", 3, 1),
        (SequentialLayout, "blocks", 4, 2),
        (lambda: ExpertLayout(2), "blocks", 2, 1),
        (lambda: ExpertLayout(1), "blocks", 1, 1),
    ],
)
def test_other_layouts(make: object, name: str, num_blocks: int, num_tail: int) -> None:
    anatomy = discover(make())
    assert (anatomy.blocks_name, len(anatomy.blocks), len(anatomy.tail)) == (name, num_blocks, num_tail)


class TwoLists(nn.Module):
    """Two lists of modules behind each other: what follows the shorter one could pass for a long tail."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.early = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for module in (*self.early, *self.blocks):
            hidden = module(hidden)
        return self.head(hidden)


def test_a_factor_of_zero_in_a_configuration_is_none() -> None:
    model = PlainDecoder()
    model.config = SimpleNamespace(logits_scaling=0, logit_scale=0.0, final_logit_softcapping=0)
    assert (discover(model).scale, discover(model).softcap) == (1.0, None)


def test_the_longer_of_two_lists_is_that_of_the_blocks() -> None:
    assert discover(TwoLists()).blocks_name == "blocks"


class Off(PlainDecoder):
    """All its logits are off by a share of themselves."""

    share = 0.0

    def forward(self, tokens: Tensor) -> Tensor:
        return (1 + self.share) * super().forward(tokens)


@pytest.mark.parametrize(
    ("dtype", "share"),
    [(torch.float64, 1e-11), (torch.float32, 2e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)],
)
def test_rounding_is_forgiven_and_no_more(dtype: torch.dtype, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a GPU may round matters on a GPU alone.
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    model = Off().to(dtype)
    model.share = 0.6 * share
    assert len(discover(model).blocks) == 3
    model.share = 1.6 * share
    with pytest.raises(ValueError, match="logits differ"):
        discover(model)


def test_a_given_example_is_used() -> None:
    model = DictLayout()
    model.body["embed"].forward = lambda tokens: torch.zeros(*tokens.shape, WIDTH) / (tokens == 7).all()
    assert len(discover(model, torch.full((1, 3), 7)).blocks) == 3
    assert len(discover(model, {"tokens": torch.full((1, 3), 7)}).blocks) == 3
    with pytest.raises(TypeError, match="example must be token ids"):
        discover(model, [1, 2])


class Noisy(PlainDecoder):
    """Uses global randomness, counts its calls in a buffer and replaces another one."""

    def __init__(self) -> None:
        super().__init__(2)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        self.last = torch.rand(2, 3)
        return self.dropout(super().forward(tokens))


def test_the_model_is_left_as_it_was() -> None:
    model = Noisy().train()
    model.blocks[1].eval()
    flags = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    last, random_state = model.last, torch.get_rng_state()
    discover(model)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.last is last
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


class Halved(PlainDecoder):
    def forward(self, tokens: Tensor) -> Tensor:
        return 0.5 * super().forward(tokens)


class Residual(PlainDecoder):
    """Something between the last block and the norm that is not a module."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = embedded = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden, self.decay)
        return self.head(self.norm(hidden + embedded))


class Functional(PlainDecoder):
    """Tied embeddings as a function call."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden, self.decay)
        return nn.functional.linear(self.norm(hidden), self.embed.weight)


class Recurrent(PlainDecoder):
    """The same blocks twice."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in (*self.blocks, *self.blocks):
            hidden = block(hidden, self.decay)
        return self.head(self.norm(hidden))


class Unlisted(PlainDecoder):
    """One block, in no list."""

    def __init__(self) -> None:
        super().__init__(1)
        self.block, self.blocks = self.blocks[0], None

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embed(tokens), self.decay)))


class NoEmbedding(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Halved, r"cannot reproduce the model's logits.*blocks \(3 blocks, then LayerNorm\).*a factor"),
        (Residual, "cannot reproduce the model's logits.*anything between the last block"),
        (Functional, r"no unembedding that ran once.*nn.Linear with 37 outputs.*got none"),
        (Recurrent, "no list of blocks.*each run once"),
        (Unlisted, "no list of blocks.*put the blocks into one"),
        (NoEmbedding, "no nn.Embedding.*pass example="),
    ],
)
def test_models_that_do_not_fit_are_refused_with_a_reason(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        discover(make())


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(TypeError, match="without logits"):
        discover(nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Flatten(0, 1)))


def test_an_adapter_around_the_unembedding_is_refused() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = build("plain")
    nn.utils.parametrize.register_parametrization(model.head, "weight", Doubled())
    with pytest.raises(ValueError, match="no unembedding that ran once"):
        discover(model)
