"""Early exits while writing: every token, exit and cached key is that of a model read from the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from local.decoders import CONTEXT, VOCAB, WIDTH, PlainDecoder, build
from local.rules import attached
from localexit import LocalModel
from localexit.inference.cache import TextCache
from localexit.inference.decoder import Decoder, check_catching_up
from localexit.inference.sampling import Sampling
from localexit.inference.strategies import ConfidentExit, FixedExit, SelfSpeculative, Strategy, Token
from localexit.inference.text import generate_ids

PROMPT = [5, 9, 30, 7]


def greedy(num: int) -> Sampling:
    return Sampling(temperature=0.0, max_new_tokens=num)


def gemma2() -> nn.Module:
    """Sliding windows on every other block, soft caps, scaled embeddings."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=20,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        sliding_window=5,
        max_position_embeddings=64,
        query_pre_attn_scalar=6,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config)


def gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return GPTNeoXForCausalLM(config)


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        ffn_dim=20,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=WIDTH,
        dropout=0.0,
    )
    return OPTForCausalLM(config)


def shaken(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in fp64 with weights large enough for its blocks to matter."""
    torch.manual_seed(0)
    model = make().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: build("plain"),
    "llama": lambda: build("llama", 4),
    "gpt2": lambda: build("gpt2"),
    "gemma2": lambda: shaken(gemma2),
    "gpt_neox": lambda: shaken(gpt_neox),
    "opt": lambda: shaken(opt),
}


def local_model(name: str, **options: object) -> LocalModel:
    return attached(MODELS[name](), **options).eval()


def written(local: LocalModel, strategy: Strategy, num: int, prompt: list[int] = PROMPT) -> list[Token]:
    strategy.check(local, greedy(num))
    limit = CONTEXT if isinstance(local.model, PlainDecoder) else None
    return list(generate_ids(Decoder(local, prompt, limit=limit), strategy=strategy, sampling=greedy(num)))


def written_only(local: LocalModel, strategy: Strategy, num: int) -> list[Token]:
    """Without the check before, which runs the model too."""
    return list(generate_ids(Decoder(local, PROMPT), strategy=strategy, sampling=greedy(num)))


def confident_reference(
    local: LocalModel, threshold: float, num: int, *, exits: Sequence[int] | None = None
) -> list[Token]:
    """Every token from a forward over the whole text, exit by exit, without any cache."""
    ids, tokens = list(PROMPT), []
    for _ in range(num):
        for index in exits or range(local.num_exits):
            logits = local.exit_logits(index, torch.tensor([ids]))[0, -1]
            if logits.softmax(-1).max() >= threshold or index == local.num_exits - 1:
                break
        tokens.append(Token(int(logits.argmax()), index))
        ids.append(tokens[-1].id)
    return tokens


def middling(local: LocalModel) -> float:
    """A threshold that some tokens reach at an early exit, and others do not."""
    ids = torch.tensor([[(7 * i + 3) % VOCAB for i in range(12)]])
    early = [local.exit_logits(index, ids).softmax(-1).max(-1).values for index in range(local.num_exits - 1)]
    return float(torch.stack(early).max(0).values.median())


@pytest.mark.parametrize("exit_body", ["norm", "block"])
@pytest.mark.parametrize("exits", ["every", "every:2"])
@pytest.mark.parametrize("name", MODELS)
def test_confident_exits_are_those_of_a_model_without_a_cache(name: str, exits: str, exit_body: str) -> None:
    local = local_model(name, exits=exits, exit_body=exit_body)
    threshold = middling(local)
    found = written(local, ConfidentExit(threshold=threshold), 12)
    assert found == confident_reference(local, threshold, 12)


def test_only_the_exits_that_are_asked_may_be_sure() -> None:
    local = local_model("llama")
    sizes = forwards_of(local.model.model.layers[0]), forwards_of(local.model.model.layers[2])
    tokens = written_only(local, ConfidentExit(threshold=1e-9, exits=(2,)), 4)
    assert [token.exit_index for token in tokens] == [2] * 4
    assert sizes[0] == sizes[1] == [4, 1, 1, 1]
    threshold = middling(local)
    found = written(local, ConfidentExit(threshold=threshold, exits=(-2, 1)), 12)
    assert found == confident_reference(local, threshold, 12, exits=(1, 2, 3))


def test_the_reference_leaves_early_and_late() -> None:
    local = local_model("llama")
    exits = {token.exit_index for token in confident_reference(local, middling(local), 12)}
    assert len(exits) > 1


def tolerance(name: str) -> dict[str, float]:
    """Of models in fp64; gemma2 has norms and a softmax in fp32, where a token alone rounds as its machine does."""
    return {"rtol": 1e-5, "atol": 1e-6} if name == "gemma2" else {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_keys_and_values_of_skipped_blocks_are_exact_once_needed(name: str) -> None:
    local = local_model(name)
    decoder = Decoder(local, PROMPT)
    for token in (3, 8, 1):
        decoder.logits(0)
        decoder.append(token)
    decoder.logits(1)
    decoder.append(2)
    decoder.logits(local.num_exits - 1)
    expected = local.model(torch.tensor([decoder.ids]), use_cache=True).past_key_values
    assert decoder._cache is not None
    for found, layer in zip(decoder._cache.layers, expected.layers, strict=True):
        length = layer.keys.shape[-2]  # a sliding window keeps the last ones only
        torch.testing.assert_close(found.keys[..., -length:, :], layer.keys, **tolerance(name))
        torch.testing.assert_close(found.values[..., -length:, :], layer.values, **tolerance(name))


@pytest.mark.parametrize("exit_body", ["norm", "block"])
@pytest.mark.parametrize("draft_tokens", [1, 3])
@pytest.mark.parametrize("draft_exit", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_speculation_writes_what_the_last_exit_writes(
    name: str, draft_exit: int, draft_tokens: int, exit_body: str
) -> None:
    local = local_model(name, exit_body=exit_body)
    strategy = SelfSpeculative(draft_exit=draft_exit, draft_tokens=draft_tokens)
    expected = [token.id for token in written(local, FixedExit(), 12)]
    assert [token.id for token in written(local, strategy, 12)] == expected
    ids = list(PROMPT)
    for token in expected:
        assert int(local.exit_logits(-1, torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)


def agreeing(factor: float = 0.0) -> LocalModel:
    """A model whose deeper blocks change little or nothing, so that the last exit agrees with the first."""
    model = build("llama", 4)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)
    return attached(model).eval()


def forwards_of(block: nn.Module) -> list[int]:
    """A list that grows by the number of tokens with every forward of a block that computes something."""
    sizes: list[int] = []
    inside = block.mlp
    inside.register_forward_hook(lambda _module, args, _output: sizes.append(args[0].shape[1]))
    return sizes


def test_an_agreed_draft_takes_one_forward_of_the_deeper_blocks() -> None:
    local = agreeing()
    sizes = forwards_of(local.model.model.layers[-1])
    shallow = forwards_of(local.model.model.layers[0])
    decoder = Decoder(local, PROMPT)
    tokens = list(generate_ids(decoder, strategy=SelfSpeculative(draft_tokens=3), sampling=greedy(8)))
    assert [token.exit_index for token in tokens] == [0, 0, 0, 3] * 2
    assert sizes == [len(PROMPT) + 3, 4]
    # The draft's own last token is read by the shallow block in the forward that verifies.
    assert shallow == [4, 1, 1, 1, 1, 1, 1, 1]


def test_blocks_after_a_sure_exit_wait() -> None:
    local = local_model("llama")
    sizes = [forwards_of(layer) for layer in local.model.model.layers]
    decoder = Decoder(local, PROMPT)
    list(generate_ids(decoder, strategy=ConfidentExit(threshold=1e-9), sampling=greedy(5)))
    assert sizes == [[4, 1, 1, 1, 1], [], [], []]
    assert decoder.num_block_tokens == 8
    decoder.logits(3)
    assert sizes == [[4, 1, 1, 1, 1, 1], [9], [9], [9]]


@pytest.mark.parametrize("name", MODELS)
def test_an_exit_with_a_block_of_its_own_reads_what_a_model_without_a_cache_would(name: str) -> None:
    local = local_model(name, exit_body="block")
    decoder = Decoder(local, PROMPT)
    for exit_index, token in ((0, 3), (0, 8), (1, 1), (0, 2), (1, 6)):
        decoder.append(3)
        decoder.logits(0)
        decoder.truncate(len(decoder.ids) - 1)
        decoder.append(token)
        found = decoder.logits(exit_index)
        expected = local.exit_logits(exit_index, torch.tensor([decoder.ids]), logits_to_keep=1)[0]
        torch.testing.assert_close(found, expected, **tolerance(name))


def test_a_block_of_an_exit_runs_only_where_it_is_asked() -> None:
    local = local_model("llama", exit_body="block")
    sizes = [forwards_of(body) for body in local.exit_bodies]
    for exit_index, blocks in ((-1, 4), (1, 3)):
        decoder = Decoder(local, PROMPT)
        list(generate_ids(decoder, strategy=FixedExit(exit_index=exit_index), sampling=greedy(3)))
        assert decoder.num_block_tokens == blocks * 6
    assert sizes == [[], [4, 1, 1], []]
    # An exit that is asked late has the text read once more.
    decoder.append(5)
    decoder.logits(0)
    assert sizes == [[8], [4, 1, 1], []]


@pytest.mark.parametrize("strategy", [SelfSpeculative(draft_tokens=3), SelfSpeculative(draft_exit=1, draft_tokens=5)])
def test_speculation_past_the_longest_context(strategy: Strategy) -> None:
    local = agreeing(0.3)
    num = 3 * CONTEXT
    expected = [token.id for token in written(local, FixedExit(), num)]
    found = written(local, strategy, num)
    assert [token.id for token in found] == expected
    assert {token.exit_index for token in found} > {3}


def test_without_a_cache_nothing_changes() -> None:
    local = local_model("gemma2")
    for strategy in (FixedExit(exit_index=1), ConfidentExit(threshold=middling(local)), SelfSpeculative()):
        decoder = Decoder(local, PROMPT, use_cache=False)
        assert list(generate_ids(decoder, strategy=strategy, sampling=greedy(8))) == written(local, strategy, 8)


def test_what_was_taken_back_leaves_nothing_behind() -> None:
    local = local_model("llama")
    decoder = Decoder(local, PROMPT)
    decoder.logits(1)
    for token in (1, 2, 3):
        decoder.append(token)
        decoder.logits(0)
    decoder.truncate(5)
    decoder.append(6)
    torch.testing.assert_close(
        decoder.logits(3, 6), local.exit_logits(3, torch.tensor([[*PROMPT, 1, 6]]))[0], rtol=1e-10, atol=1e-10
    )


def test_exits_count_from_the_last() -> None:
    local = local_model("llama")
    assert torch.equal(Decoder(local, PROMPT).logits(-1), Decoder(local, PROMPT).logits(3))


def test_a_cache_tells_its_length_to_every_version_of_transformers() -> None:
    cache = TextCache()
    cache.length = 5
    assert (cache.get_seq_length(), cache.get_query_offset(3)) == (5, 5)
    assert cache.get_mask_sizes(2, 3) == cache.get_mask_sizes(torch.tensor([5, 6]), 3) == (7, 0)


def test_logits_are_asked_for_once() -> None:
    decoder = Decoder(local_model("llama"), PROMPT)
    decoder.logits(2)
    with pytest.raises(ValueError, match="expected at most the 0 tokens that are new to exit 1"):
        decoder.logits(1)


def test_sampling_with_early_exits_is_seeded() -> None:
    local = local_model("llama")
    strategy = ConfidentExit(threshold=middling(local))
    texts = [
        list(generate_ids(Decoder(local, PROMPT), strategy=strategy, sampling=Sampling(max_new_tokens=9, seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


class Stash(PlainDecoder):
    """Its first block leaves something for the last one, by a way that skipping does not see."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = first = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden + first[:, :1] * (block is self.blocks[2]), 1.5 * self.decay)
            first = hidden if block is self.blocks[0] else first
        return self.head(self.norm(hidden))


class Pair(nn.Module):
    """A block that returns its hidden and one more tensor."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        return self.block(hidden, decay), hidden


class Pairs(PlainDecoder):
    """Its blocks' second values are not used, like attention weights that nobody asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair(block) for block in self.blocks)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden, _ = block(hidden, 1.5 * self.decay)
        return self.head(self.norm(hidden))


class UsedPairs(Pairs):
    """Here the first block's second value goes to the last block."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, values = self.embed(tokens), []
        for block in self.blocks:
            hidden, value = block(hidden + values[0] if len(values) == 2 else hidden, 1.5 * self.decay)
            values.append(value)
        return self.head(self.norm(hidden))


def test_values_that_nobody_uses_do_not_matter() -> None:
    torch.manual_seed(0)
    local = attached(Pairs().double()).eval()
    threshold = middling(local)
    assert written(local, ConfidentExit(threshold=threshold), 8) == confident_reference(local, threshold, 8)


@pytest.mark.parametrize(
    ("model", "reason"), [(Stash, "the logits then differ by"), (UsedPairs, "unsupported operand")]
)
@pytest.mark.parametrize("strategy", [ConfidentExit(), SelfSpeculative()])
def test_a_model_whose_blocks_cannot_wait_is_refused(model: type[nn.Module], reason: str, strategy: Strategy) -> None:
    torch.manual_seed(0)
    local = attached(model().double()).eval()
    with pytest.raises(ValueError, match=rf"cannot read later than those before them.*{reason}.*write with one exit"):
        strategy.check(local, greedy(1))
    FixedExit(exit_index=0).check(local, greedy(1))


def test_a_model_with_one_exit_has_nothing_to_catch_up() -> None:
    check_catching_up(attached(build("llama"), exits=[-1]).eval())


def test_exits_that_are_not_there_cannot_be_sure() -> None:
    with pytest.raises(ValueError, match="exit must be in -4..3, got 4"):
        ConfidentExit(exits=(1, 4)).check(local_model("llama"), greedy(1))


def test_speculation_is_greedy_and_drafts_before_the_last_exit() -> None:
    local = local_model("llama")
    with pytest.raises(ValueError, match=r"temperature: expected 0, got 0\.8"):
        SelfSpeculative().check(local, Sampling())
    for draft_exit in (3, -1):
        with pytest.raises(ValueError, match="draft_exit: expected an exit before the last"):
            SelfSpeculative(draft_exit=draft_exit).check(local, greedy(1))
    with pytest.raises(ValueError, match="exit must be in -4..3, got 4"):
        SelfSpeculative(draft_exit=4).check(local, greedy(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConfidentExit(threshold=0.0),
        lambda: ConfidentExit(threshold=1.1),
        lambda: SelfSpeculative(draft_tokens=0),
    ],
)
def test_bad_options_are_refused(make: Callable[[], Strategy]) -> None:
    with pytest.raises(ValueError, match="threshold|draft_tokens"):
        make()
