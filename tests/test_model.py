"""Packed rows and cached decoding equal transformers' own padded model; the scalar head, the folders and Muon."""

import copy
import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from data import UserError, toy_tokenizer
from model import (
    ATTENTION,
    Decode,
    KVCache,
    Muon,
    Packed,
    ScalarModel,
    checkpoint_layers,
    eos_ids,
    fuse,
    load_causal_lm,
    load_tokenizer,
    side_by_side,
    toy_model,
)

VOCAB = 40
CONFIG = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
              max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None)  # fmt: skip
KINDS = {
    "qwen2": lambda **more: Qwen2Config(**CONFIG, num_key_value_heads=4, tie_word_embeddings=True, **more),
    "qwen2 gqa": lambda **more: Qwen2Config(**CONFIG, num_key_value_heads=1, tie_word_embeddings=True, **more),
    "llama gqa": lambda **more: LlamaConfig(**CONFIG, num_key_value_heads=2, tie_word_embeddings=False, **more),
    "qwen3 gqa": lambda **more: Qwen3Config(**CONFIG, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, **more),
    "mistral": lambda **more: MistralConfig(**CONFIG, num_key_value_heads=2, sliding_window=None, **more),
}
LENGTHS = {"unequal, unsorted": [5, 2, 9, 1, 4], "equal": [6, 6, 6], "runs": [3, 3, 7, 3, 3, 3, 7, 7], "one": [8]}


def tiny(kind: str, seed: int = 0):
    """transformers' own model with random weights, biases and norms included, and ours with the same weights."""
    stock = AutoModelForCausalLM.from_config(KINDS[kind](), attn_implementation="eager").eval()
    torch.manual_seed(seed)
    for name, p in stock.named_parameters():
        p.data = torch.randn_like(p) * 0.3 + ("norm" in name)
    ours = fuse(AutoModelForCausalLM.from_config(KINDS[kind](), attn_implementation=ATTENTION)).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def random_sequences(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def padded(model, sequences, **more):
    """(N, V) logits of the tokens of all sequences by one padded forward with a mask."""
    ids, mask = torch.zeros(2, len(sequences), max(map(len, sequences)), dtype=torch.long)
    for i, s in enumerate(sequences):
        ids[i, : len(s)], mask[i, : len(s)] = torch.tensor(s), 1
    return model(input_ids=ids, attention_mask=mask, **more).logits[mask.bool()]


def forward(model, ids, seqs):
    return model(input_ids=ids, position_ids=seqs.position_ids, seqs=seqs, use_cache=False).logits


def packed_forward(model, packed):
    return forward(model, packed.ids, packed)[0]


# ------------------------------------------------------------------------------------------------ attention


def test_the_layout_of_a_packed_row():
    packed = Packed([[7, 8, 9], [4], [5], [2, 3]], prompt_lengths=[1, 1, 0, 2])
    assert packed.ids.tolist() == [[7, 8, 9, 4, 5, 2, 3]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 0, 0, 1]]
    assert packed.lengths == [3, 1, 1, 2] and packed.starts == [0, 3, 4, 5] and packed.last.tolist() == [2, 3, 4, 6]
    assert packed.cu.tolist() == [0, 3, 4, 5, 7] and packed.cu.dtype == torch.int32 and packed.max_length == 3
    assert packed.runs == [(3, 1), (1, 2), (2, 1)]
    assert packed.is_response.tolist() == [False, True, True, False, True, False, False]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_and_gradients_are_those_of_the_padded_model(kind, lengths):
    stock, ours = tiny(kind)
    sequences = random_sequences(lengths)
    expected, got = padded(stock, sequences), packed_forward(ours, Packed(sequences))
    assert expected.std() > 0.5  # no triviality
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    compared = 0
    for (name, p), q in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-4 * p.grad.norm(), name
        compared += "bias" in name
    assert compared == (6 if "qwen2" in kind else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_parts_leave_the_weights_and_other_attention_alone(kind):
    stock, ours = tiny(kind)
    assert any("forward" in m.__dict__ for m in ours.modules()) and list(ours.state_dict()) == list(stock.state_dict())
    prompt = torch.tensor(random_sequences([7]))
    for model in (ours, copy.deepcopy(ours)):  # a copy's forwards are bound to the copy
        model.set_attn_implementation("eager")
        greedy = dict(do_sample=False, max_new_tokens=6, attention_mask=torch.ones_like(prompt))
        assert model.generate(prompt, **greedy).tolist() == stock.generate(prompt, **greedy).tolist()
    for p in model.parameters():
        p.data.zero_()
    torch.testing.assert_close(ours(prompt).logits, stock(prompt).logits, atol=1e-5, rtol=0)


def test_checkpointed_layers_keep_less_and_give_the_same_gradient():
    def backward(lm):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            loss = packed_forward(lm, Packed(random_sequences([9, 4, 7]))).square().mean()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in lm.parameters()]), sum(kept)

    plain, less = tiny("llama gqa")[1], tiny("llama gqa")[1]
    checkpoint_layers(less)
    (expected, much), (got, little) = backward(plain), backward(less)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert little < much / 3


def test_jobs_side_by_side_share_the_threads_and_keep_their_order():
    assert side_by_side(lambda: 1, lambda: 2, lambda: 3) == [1, 2, 3]
    torch.set_num_threads(4)
    try:
        together = threading.Barrier(2, timeout=20)  # passed only by two at once
        assert side_by_side(*[lambda: (together.wait(), torch.get_num_threads())[1]] * 2) == [2, 2]
        assert torch.get_num_threads() == 4
        with pytest.raises(ZeroDivisionError):
            side_by_side(lambda: 1, lambda: 1 / 0)
    finally:
        torch.set_num_threads(1)


def test_a_packed_sequence_sees_no_neighbour():
    _, ours = tiny("llama gqa")
    a, b, c = random_sequences([4, 6, 6])
    together, alone = packed_forward(ours, Packed([a, b, c])), packed_forward(ours, Packed([b]))
    torch.testing.assert_close(together[4:10], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_with_the_cache_is_the_full_forward_at_each_step(kind):
    stock, ours = tiny(kind)
    prompts, steps = random_sequences([5, 2, 7, 2]), 6
    owner = [0, 1, 2, 3, 0, 2]  # of each slot: the last two are copies of the first and the third
    going_on = torch.tensor(random_sequences([steps] * 6, seed=1))
    full = [stock(input_ids=torch.tensor([prompts[i] + going_on[s].tolist()])).logits[0] for s, i in enumerate(owner)]

    cache = KVCache(ours.config, 7, 16, torch.float32, "cpu")
    cache.k += 3.0  # what other samples left behind must not matter
    cache.v += 3.0
    order = [2, 0, 3, 1]
    packed = Packed([prompts[i] for i in order], cache=cache, slots=torch.tensor(order))
    prefill = packed_forward(ours, packed)[packed.last]
    torch.testing.assert_close(prefill, torch.stack([full[i][len(prompts[i]) - 1] for i in order]), atol=1e-5, rtol=0)
    cache.v[:, 0, :, 7] = 4.0
    cache.copy(torch.tensor([0, 2]), torch.tensor([4, 5]), 7)
    assert (cache.k[:, 6] == 3).all() and (cache.k[:, 1, :, 2:] == 3).all() and (cache.v[:, 4, :, 7] == 3).all()

    lengths = torch.tensor([len(prompts[i]) for i in owner])
    for t in range(steps):
        window = int(lengths.max()) + 1 if t % 2 else 16  # keys beyond the longest are masked, whatever they hold
        seqs = Decode(cache, lengths, window)
        got = forward(ours, going_on[:, t, None], seqs)[:, 0]
        expected = torch.stack([full[s][length] for s, length in enumerate(lengths.tolist())])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        lengths = lengths + 1


def test_sliding_windows_are_refused():
    layers = ["full_attention", "sliding_attention"]
    config = KINDS["qwen2"](use_sliding_window=True, sliding_window=4, layer_types=layers)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    with pytest.raises(UserError, match="sliding windows"):
        packed_forward(model, Packed(random_sequences([5, 3])))


# ------------------------------------------------------------------------------------------------ the scalar head


def with_random_head(lm, likelihood):
    model = ScalarModel(lm, likelihood)
    assert model(Packed([[2, 3]], prompt_lengths=[1])).tolist() == [0, 0]  # an untrained head says nothing
    generator = torch.Generator().manual_seed(3)
    for p in model.head.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize("likelihood", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_value_is_the_head_of_the_stock_hidden_state_and_of_the_lowest_log_probability_so_far(kind, likelihood):
    stock, ours = tiny(kind)
    model = with_random_head(ours, likelihood)
    sequences, prompt_lengths = random_sequences([9, 4, 4, 6], seed=1), [3, 1, 4, 2]
    weight, bias, expected = model.head.weight[0], model.head.bias[0], []
    lowest_seen = []
    for s, prompt in zip(sequences, prompt_lengths):
        out = stock(input_ids=torch.tensor([s]), output_hidden_states=True)
        log_p, lowest = out.logits[0].log_softmax(-1), 0.0
        for t, hidden in enumerate(out.hidden_states[-1][0]):
            if t >= prompt:
                lowest = min(lowest, log_p[t - 1, s[t]].item())
            lowest_seen.append(lowest)
            expected.append((weight[:32] @ hidden + bias + (weight[32] * lowest if likelihood else 0)).item())
    assert lowest_seen[:3] == [0, 0, 0] and len(set(lowest_seen[3:9])) > 1 and lowest_seen[13:17] == [0, 0, 0, 0]
    got = model(Packed(sequences, prompt_lengths=prompt_lengths))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("likelihood", [False, True])
def test_a_saved_scalar_model_is_the_same_when_loaded(likelihood, tmp_path):
    model = with_random_head(tiny("qwen2")[1], likelihood)
    packed = Packed(random_sequences([5, 3]), prompt_lengths=[2, 1])
    model.save(toy_tokenizer(), tmp_path)
    loaded = ScalarModel.load(tmp_path)
    assert torch.equal(loaded(packed), model(packed)) and loaded(packed).abs().min() > 0
    assert loaded.likelihood == likelihood and not loaded.training and not loaded.lm.training


# ------------------------------------------------------------------------------------------------ folders


def refusal(load, folder) -> str:
    """The one line, naming the folder, with which `load` refuses it."""
    with pytest.raises(UserError) as error:
        load(str(folder))
    message = str(error.value)
    assert str(folder) in message and "\n" not in message and len(message) > len(str(folder)) + 10
    return message


def test_a_folder_without_a_head_is_no_reward_model(tmp_path):
    tiny("qwen2")[1].save_pretrained(tmp_path)
    assert "head.safetensors" in refusal(ScalarModel.load, tmp_path)
    assert "head.safetensors" in refusal(ScalarModel.load, tmp_path / "nowhere")


@pytest.mark.parametrize("files", [[], ["config.json"], ["tokenizer.json"], ["config.json", "tokenizer_config.json"]])
@pytest.mark.parametrize("content", ["", "nonsense", "{}", '{"model_type": "nonsense"}'])
def test_folders_of_nonsense_are_refused_in_one_line(files, content, tmp_path):
    for file in files:
        (tmp_path / file).write_text(content)
    refusal(load_causal_lm, tmp_path)
    refusal(load_tokenizer, tmp_path)


def test_a_model_that_scales_its_logits_is_refused(tmp_path):
    for scaling in (1.0, 8.0):
        config = GraniteConfig(**CONFIG, num_key_value_heads=2, logits_scaling=scaling)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(scaling))
    load_causal_lm(str(tmp_path / "1.0"))
    assert "scales its logits" in refusal(load_causal_lm, tmp_path / "8.0")


def test_a_broken_or_missing_model_is_refused_in_one_line(tmp_path):
    refusal(load_causal_lm, tmp_path / "nowhere")
    refusal(load_tokenizer, tmp_path / "nowhere")
    tiny("qwen2")[1].save_pretrained(tmp_path)
    assert load_causal_lm(str(tmp_path)).config._attn_implementation == ATTENTION
    refusal(load_tokenizer, tmp_path)  # a model without a tokenizer
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refusal(load_causal_lm, tmp_path)
    weights.unlink()
    refusal(load_causal_lm, tmp_path)


def test_a_model_whose_weights_are_incomplete_is_refused(tmp_path):
    tiny("qwen2")[1].save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if "layers.1" not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    refusal(load_causal_lm, tmp_path)


def test_tokenizers_without_eos_or_with_another_vocabulary_are_refused(tmp_path):
    tok = toy_tokenizer()
    tok.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tok.get_vocab()
    KINDS["qwen2"]().save_pretrained(tmp_path)  # beside which AutoTokenizer would split like Qwen's, and lose the newline
    assert load_tokenizer(str(tmp_path)).encode("b4\n####") == tok.encode("b4\n####") != []
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "no EOS token" in refusal(load_tokenizer, tmp_path)


def test_eos_ids_are_those_of_the_generation_config_and_of_the_tokenizer():
    tok = toy_tokenizer()
    model = toy_model(tok, seed=0)
    for configured, expected in ((None, [1]), (1, [1]), (5, [1, 5]), ([7, 1, 4], [1, 4, 7])):
        model.generation_config.eos_token_id = configured
        assert eos_ids(model, tok) == expected


# ------------------------------------------------------------------------------------------------ Muon

SHAPES = [(16, 48), (48, 16), (40, 24), (16, 48)]  # two of one shape, which go together


def muon_steps(optimizer, params, steps):
    """The changes (steps, params) under random gradients, the same in each call."""
    generator, changes = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        changes.append([b - p.detach() for b, p in zip(before, params)])
    return changes


def test_muons_update_is_near_orthogonal_and_of_rms_a_fifth_of_the_rate():
    params = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES]
    for changes in muon_steps(Muon(params, lr=0.1, weight_decay=0.0), params, 3):
        for u in changes:
            singular = torch.linalg.svdvals(u)
            scale = 0.2 * 0.1 * max(u.shape) ** 0.5
            assert 0.5 < singular.min() / scale and singular.max() / scale < 1.5
            assert u.square().mean().sqrt() == pytest.approx(0.2 * 0.1, rel=0.25)
    assert not torch.equal(changes[0], changes[3])  # each of the two has its own update


def test_muon_is_torchs_muon_but_for_its_bfloat16():
    start = [torch.randn(s, generator=torch.Generator().manual_seed(5)) for s in SHAPES]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    reference = torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for a, b in zip(muon_steps(Muon(ours, 0.1, 0.9, 0.5), ours, 4), muon_steps(reference, theirs, 4), strict=True):
        for u, v in zip(a, b):
            assert (u - v).norm() < 0.03 * v.norm()
