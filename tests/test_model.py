"""Packed rows, cached decoding and log-probabilities equal transformers' own padded model; scalar heads and folders."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import model as model_file
from data import UserError, toy_tokenizer
from helpers import close, model_terms, tolerance
from model import (
    ATTENTION, Decode, KVCache, Packed, Policy, ScalarModel, attention, checkpoint_layers, eos_ids, hidden_states,
    load_causal_lm, load_tokenizer, score_logps, score_values, side_by_side, token_logps, toy_model,
)
from rollout import Batch

VOCAB = 40
CONFIG = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)
KINDS = {
    "qwen2": (Qwen2Config, dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "qwen2 gqa": (Qwen2Config, dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "llama gqa": (LlamaConfig, dict(num_key_value_heads=2, tie_word_embeddings=False)),
    "qwen3 gqa": (Qwen3Config, dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)),
    "mistral": (MistralConfig, dict(num_key_value_heads=2, sliding_window=None)),
}


def config_of(kind: str, **more):
    config, settings = KINDS[kind]
    return config(**CONFIG, **settings, **more)


def tiny(kind: str, seed: int = 0):
    """transformers' own model with random weights, biases and norms included, and ours with the same weights."""
    stock = AutoModelForCausalLM.from_config(config_of(kind), attn_implementation="eager").eval()
    torch.manual_seed(seed)
    for name, p in stock.named_parameters():
        p.data = torch.randn_like(p) * 0.3 + ("norm" in name)
    ours = AutoModelForCausalLM.from_config(config_of(kind), attn_implementation=ATTENTION).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def random_sequences(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def padded(model, sequences):
    """Logits (N, V) and last hidden states (N, H) of the tokens of all sequences by one padded forward with a mask."""
    ids, mask = torch.zeros(2, len(sequences), max(map(len, sequences)), dtype=torch.long)
    for i, s in enumerate(sequences):
        ids[i, : len(s)], mask[i, : len(s)] = torch.tensor(s), 1
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return out.logits[mask.bool()], out.hidden_states[-1][mask.bool()]


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


@pytest.mark.parametrize("lengths", [[5, 2, 9, 1, 4], [3, 3, 7, 3, 3, 3, 7, 7], [8]], ids=["unequal", "runs", "one"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_and_gradients_are_those_of_the_padded_model(kind, lengths):
    stock, ours = tiny(kind)
    sequences, terms = random_sequences(lengths), model_terms(ours.config, max(lengths))
    (expected, _), got = padded(stock, sequences), packed_forward(ours, Packed(sequences))
    assert expected.std() > 0.5  # no triviality
    close(got, expected, terms)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    biases = 0
    for (name, p), q in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= tolerance(2 * terms, p.grad.norm()), name
        biases += "bias" in name
    assert biases == (6 if "qwen2" in kind else 0)


def test_a_packed_sequence_sees_no_neighbour():
    _, ours = tiny("llama gqa")
    a, b, c = random_sequences([4, 6, 6])
    together, alone = packed_forward(ours, Packed([a, b, c])), packed_forward(ours, Packed([b]))
    close(together[4:10], alone, model_terms(ours.config, 6))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_with_the_cache_is_the_full_forward_at_each_step(kind):
    stock, ours = tiny(kind)
    prompts, steps, terms = random_sequences([5, 2, 7, 2]), 6, model_terms(ours.config, 16)
    owner = [0, 1, 2, 3, 0, 2]  # of each slot: the last two are copies of the first and the third
    going_on = torch.tensor(random_sequences([steps] * 6, seed=1))
    full = [stock(input_ids=torch.tensor([prompts[i] + going_on[s].tolist()])).logits[0] for s, i in enumerate(owner)]

    cache = KVCache(ours.config, 7, 16, torch.float32, "cpu")
    cache.k += 3.0  # what other samples left behind must not matter
    cache.v += 3.0
    order = [2, 0, 3, 1]
    packed = Packed([prompts[i] for i in order], cache=cache, slots=torch.tensor(order))
    prefill = packed_forward(ours, packed)[packed.last]
    close(prefill, torch.stack([full[i][len(prompts[i]) - 1] for i in order]), terms)
    cache.v[:, 0, :, 7] = 4.0
    cache.copy(torch.tensor([0, 2]), torch.tensor([4, 5]), 7)
    assert (cache.k[:, 6] == 3).all() and (cache.k[:, 1, :, 2:] == 3).all() and (cache.v[:, 4, :, 7] == 3).all()

    lengths = torch.tensor([len(prompts[i]) for i in owner])
    for t in range(steps):
        window = int(lengths.max()) + 1 if t % 2 else 16  # keys beyond the longest are masked, whatever they hold
        got = forward(ours, going_on[:, t, None], Decode(cache, lengths, window))[:, 0]
        close(got, torch.stack([full[s][length] for s, length in enumerate(lengths.tolist())]), terms)
        lengths = lengths + 1


def test_sequences_beyond_a_sliding_window_are_refused():
    layers = ["full_attention", "sliding_attention"]
    config = config_of("qwen2", use_sliding_window=True, sliding_window=4, layer_types=layers)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    packed_forward(lm, Packed(random_sequences([4, 3])))
    with pytest.raises(UserError, match="attends to 4 tokens at a time, and sequences may have 5"):
        packed_forward(lm, Packed(random_sequences([5, 3])))


@pytest.mark.parametrize("module, more", [(SimpleNamespace(sinks=1), {}), (SimpleNamespace(), {"softcap": 50.0})])
def test_attention_sinks_and_softcaps_are_refused(module, more):
    with pytest.raises(UserError, match="softcaps or attention sinks"):
        attention(module, *torch.ones(3, 1, 1, 2, 4), None, seqs=Packed([[2, 3]]), **more)


def test_a_model_with_another_attention_is_refused():
    stock, ours = tiny("qwen2")
    hidden_states(ours, Packed([[2, 3]]))
    with pytest.raises(UserError, match="not loaded by model.load_causal_lm"):
        hidden_states(stock, Packed([[2, 3]]))


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
    close(got, expected, 2 * model_terms(plain.config, 9))
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


# ------------------------------------------------------------------------------------------------ log-probabilities


def plain_logps(logits, targets, temperature):
    """Log-probabilities of the targets (N,) and entropies (N,) from logits (N, V), as a textbook has them."""
    p = (logits / temperature).softmax(-1)
    return p[range(len(targets)), targets].log(), -(p * p.log()).sum(-1)


def a_batch(seed=0):
    prompts, responses = random_sequences([3, 1, 4, 2, 1], seed), random_sequences([2, 6, 1, 4, 6], seed + 1)
    batch = Batch(prompts, responses, torch.zeros(5, dtype=torch.bool))
    starts = Packed([p + r for p, r in zip(prompts, responses)]).starts
    spans = [range(at + len(p) - 1, at + len(p) + len(r) - 1) for at, p, r in zip(starts, prompts, responses)]
    return batch, torch.tensor([i for span in spans for i in span])  # what predicts the response tokens, row by row


@pytest.mark.parametrize("kind, temperature", [("qwen2 gqa", 1.0), ("qwen2 gqa", 0.7), ("llama gqa", 1.6)])
@torch.no_grad()
def test_scored_log_probabilities_and_entropies_are_those_of_the_padded_model(kind, temperature):
    (stock, ours), (batch, predict_at) = tiny(kind), a_batch()
    sequences = [p + r for p, r in zip(batch.prompts, batch.responses)]
    logits = padded(stock, sequences)[0][predict_at]
    targets = torch.tensor([i for r in batch.responses for i in r])
    logp, entropy = plain_logps(logits, targets, temperature)
    assert logp.std() > 0.5 and entropy.std() > 0.05  # the model is not so dull that anything would pass
    size, terms = logits.abs().max() / temperature, model_terms(ours.config, 8) + VOCAB
    policy, micro = Policy(ours), batch.pack([0, 1, 2, 3, 4], "cpu")
    got = score_logps(policy, batch, batch.micro_batches([micro.rows], 12, "cpu")[0], temperature)
    close(got[batch.mask], logp, terms, size)
    assert (got[~batch.mask] == 0).all()
    close(policy(micro.packed, micro.predict_at, micro.targets, temperature, entropy=True)[1], entropy, terms, size)


@torch.no_grad()
def test_scored_values_end_with_that_behind_the_last_token():
    (stock, ours), (batch, predict_at) = tiny("llama gqa"), a_batch()
    critic = with_random_head(ours, likelihood=False)
    sequences = [p + r for p, r in zip(batch.prompts, batch.responses)]
    expected = critic.head(padded(stock, sequences)[1]).squeeze(1)
    values, final = score_values(critic, batch, batch.micro_batches([[0, 1, 2, 3, 4]], 12, "cpu")[0])
    close(values[batch.mask], expected[predict_at], model_terms(ours.config, 8))
    close(final, expected[Packed(sequences).last], model_terms(ours.config, 8))
    assert expected.std() > 0.5 and (values[~batch.mask] == 0).all()


@pytest.mark.parametrize("rows", [1, 3, 11], ids=lambda rows: f"{rows} rows at a time")
@pytest.mark.parametrize("temperature, bias", [(1.0, False), (0.7, True)])
def test_chunked_log_probabilities_and_gradients_are_those_of_one_log_softmax(monkeypatch, rows, temperature, bias):
    N, H, V = 11, 6, 30
    monkeypatch.setattr(model_file, "CHUNK", rows * V)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, b = (torch.randn(*n, generator=generator, requires_grad=True) for n in ((N, H), (V, H), (V,)))
    targets, g = torch.randint(V, (N,), generator=generator), torch.randn(N, generator=generator)
    inputs = [hidden, weight] + [b] * bias
    logits = hidden @ weight.T + (b if bias else 0)
    expected = plain_logps(logits, targets, temperature)
    output = SimpleNamespace(weight=weight, bias=b if bias else None)
    logp, entropy = token_logps(hidden, output, targets, temperature, entropy=True)
    size = logits.abs().max().item() / temperature
    close(logp, expected[0], H + V, size)
    close(entropy, expected[1], H + V, size)
    assert not entropy.requires_grad
    for got, want in zip(torch.autograd.grad(logp, inputs, g), torch.autograd.grad(expected[0], inputs, g)):
        close(got, want, 2 * (H + V) + N)
    with torch.no_grad():
        assert token_logps(hidden, output, targets)[1].tolist() == [0] * N  # no entropy, unless asked for


def test_the_gradient_of_a_bfloat16_weight_is_summed_over_the_chunks_in_float32(monkeypatch):
    N, H, V = 1024, 8, 6
    monkeypatch.setattr(model_file, "CHUNK", V)  # one row at a time
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator).bfloat16() for n in (N, V))
    targets, gradients = torch.randint(V, (N,), generator=generator), []
    for dtype in (torch.bfloat16, torch.float32):
        w = weight.to(dtype, copy=True).requires_grad_()
        token_logps(hidden.to(dtype), SimpleNamespace(weight=w, bias=None), targets)[0].sum().backward()
        gradients.append(w.grad.float())
    got, expected = gradients
    # rounded twice, the logits' gradient and the whole sum; a sum rounded with each of its rows would be far off
    assert (got - expected).norm() <= tolerance(1, expected.norm(), torch.bfloat16)


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
    # the log-probability has a sum over the vocabulary more, and its weight may enlarge its error
    close(got, expected, 2 * (model_terms(ours.config, 9) + VOCAB))


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
    # beside this configuration AutoTokenizer would split like Qwen's, and lose the newline
    config_of("qwen2").save_pretrained(tmp_path)
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
