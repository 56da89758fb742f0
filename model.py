"""Models and their attention: any transformers causal LM of the Qwen2 / Llama family as policy, critic or reward model.

Training and scoring never pad: sequences lie end to end in one row (`Packed`), and the sampler decodes one token per
slot of a preallocated KV cache (`Decode`). Both are read by one function in transformers' attention interface; all else
of the models is transformers' own. `Policy` reads a causal LM as log-probabilities of chosen tokens. `ScalarModel` adds
a head of one number: the critic's value, or the logit of "correct" of ORM and PRM. `shard` splits the weights of any of
them over the GPUs; nothing else in the project knows whether a model is sharded.

Left out: attention sinks, softcaps and sequences beyond a sliding window (refused with a sentence), tensor and pipeline
parallelism. Nothing to run here; tests/test_model.py shows each part beside the padded model it must equal. Needs no
other file of the project.
"""

import inspect
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

try:
    from data import UserError
except ImportError:  # in a copy elsewhere
    UserError = ValueError

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

transformers.utils.logging.disable_progress_bar()  # "Loading weights" would break up the bars that mean something

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

# torch 2.13 wants to be told of grouped heads, torch 2.11 has no such argument and groups by itself
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # f, inputs: runs again in backward
CHUNK = 2**28 if torch.cuda.is_available() else 2**24  # logits that exist at a time
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BACKEND = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
ATTENTION = "packed_or_decode"  # transformers matches names: it must not contain sdpa, flash or flex_attention


# ------------------------------------------------------------------------------------------------ attention


class KVCache:
    """Keys and values of S slots: k, v are (layers, S, kv_heads, max_tokens, head_dim), so that each head of each slot
    is a sequence of its own to whatever multiplies or attends."""

    def __init__(self, config, slots: int, max_tokens: int, dtype: torch.dtype, device):
        cuda = torch.device(device).type == "cuda"
        # flash attention reads the lengths on the device: it needs no window, and one graph serves all lengths
        self.reads_lengths = cuda and dtype != torch.float32
        self.granularity = max_tokens if self.reads_lengths else 256 if cuda else 32
        # whole windows: the window of a step, and with it the rounding of its sums, must not depend on the cache's size
        max_tokens = self.window(max_tokens)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, max_tokens, head_dim)
        # zeros, not empty: a masked key still meets its value, and 0 * nan is nan
        self.k, self.v = torch.zeros(2, *shape, dtype=dtype, device=device)

    def window(self, tokens: int) -> int:
        """How many keys a step looks at, where a slot has up to `tokens`: rounded up, so that few shapes occur."""
        return -(-tokens // self.granularity) * self.granularity

    def copy(self, source: Tensor, target: Tensor, tokens: int) -> None:
        """Copy the first `tokens` positions of the slots `source` (M,) to the slots `target` (M,)."""
        for x in (self.k, self.v):
            x[:, target, :, :tokens] = x[:, source, :, :tokens]


class Packed:
    """B sequences end to end in one row of N tokens; positions restart at 0 in each. prompt_lengths: how many tokens of
    each are the prompt, where a model wants to know. cache, slots (B,): where a prefill also writes keys and values."""

    def __init__(self, sequences: list[list[int]], device="cpu", prompt_lengths=None, cache=None, slots=None):
        self.lengths, self.cache = [len(s) for s in sequences], cache
        lengths = torch.tensor(self.lengths)  # (B,)
        ends = lengths.cumsum(0)
        self.starts = (ends - lengths).tolist()
        self.last = (ends - 1).to(device)  # (B,) index of each sequence's last token
        self.max_length = max(self.lengths)
        self.ids = torch.tensor([i for s in sequences for i in s], device=device)[None]  # (1, N)
        positions = torch.arange(int(ends[-1])) - torch.repeat_interleave(ends - lengths, lengths)
        self.position_ids = positions[None].to(device)  # (1, N)
        if prompt_lengths is not None:
            prompt_of_each = torch.repeat_interleave(torch.tensor(prompt_lengths), lengths)
            self.is_response = (positions >= prompt_of_each).to(device)  # (N,)
        if cache is not None:
            self.token_slots = torch.repeat_interleave(slots, lengths).to(device)  # (N,)
        self.cu = F.pad(ends, (1, 0)).to(device, torch.int32)  # (B + 1,)
        # runs of equal length, [(length, how many)]: each run is one SDPA call (see `packed_sdpa`)
        self.runs = [(n, len(list(same))) for n, same in groupby(self.lengths)]


@dataclass
class Decode:
    """One new token for each of the first B slots of a cache."""

    cache: KVCache
    lengths: Tensor  # (B,) tokens in the cache, before this one
    window: int  # keys to look at, on the host: at least max(lengths) + 1

    def __post_init__(self):
        B, device = len(self.lengths), self.lengths.device
        _, _, Hkv, T, _ = self.cache.k.shape
        self.position_ids = self.lengths[:, None]  # (B, 1)
        self.rows = torch.arange(B, device=device)
        if self.cache.reads_lengths:
            self.used = (self.lengths + 1).to(torch.int32).repeat_interleave(Hkv)  # (B * Hkv,)
            self.sequences = torch.arange(B * Hkv + 1, dtype=torch.int32, device=device)
        else:
            unused = torch.arange(self.window, device=device) > self.lengths[:, None]
            bias = torch.zeros(B, self.window, dtype=self.cache.k.dtype, device=device).masked_fill_(unused, -torch.inf)
            self.bias = bias.repeat_interleave(Hkv, 0)[:, None]  # (B * Hkv, 1, window)


def packed_sdpa(query, key, value, scale: float, seqs: Packed) -> Tensor:
    """SDPA over runs of equally long sequences: views of the packed row, so neither padding nor a mask."""
    sizes = [length * count for length, count in seqs.runs]
    rows = (x.squeeze(0).split(sizes, 1) for x in (query, key, value))  # split, not slices: one backward for all runs
    out = []
    for (length, count), *qkv in zip(seqs.runs, *rows):
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)  # (count, H, length, D)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        out.append(o.transpose(1, 2).flatten(0, 1))  # (count * length, Hq, D)
    return torch.cat(out)[None]


def packed_attention(layer: int, query, key, value, scale: float, seqs: Packed) -> Tensor:
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, D)
    if seqs.cache is not None:
        seqs.cache.k[layer][seqs.token_slots, :, seqs.position_ids[0]] = k
        seqs.cache.v[layer][seqs.token_slots, :, seqs.position_ids[0]] = v
    if q.is_cuda and q.dtype != torch.float32:
        cu, m = seqs.cu, seqs.max_length
        if flash_attn_varlen_func is not None:
            return flash_attn_varlen_func(q, k, v, cu, cu, m, m, softmax_scale=scale, causal=True)[None]
        return varlen_attn(q, k, v, cu, cu, m, m, scale=scale, window_size=(-1, 0), **GQA)[None]
    return packed_sdpa(query, key, value, scale, seqs)


def decode_attention(layer: int, query, key, value, scale: float, seqs: Decode) -> Tensor:
    B, Hq, _, D = query.shape
    k_cache, v_cache = seqs.cache.k[layer, :B], seqs.cache.v[layer, :B]  # (B, Hkv, T, D)
    k_cache[seqs.rows, :, seqs.lengths] = key[:, :, 0]
    v_cache[seqs.rows, :, seqs.lengths] = value[:, :, 0]
    # Grouped-query attention: a group's query heads become query rows, so the KV heads are never repeated.
    Hkv, T = k_cache.shape[1:3]
    if seqs.cache.reads_lengths:
        # flash attention: each head of each slot is a packed sequence, of which it reads the used part
        q, group = query.reshape(B * Hq, 1, D), Hq // Hkv
        k, v = (x.flatten(0, 2)[:, None] for x in (k_cache, v_cache))  # (B * Hkv * T, 1, D), views
        starts, more = (seqs.sequences * group, seqs.sequences * T), dict(scale=scale, seqused_k=seqs.used)
        out, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *starts, group, T, 0.0, False, False, **more)
        return out.view(B, 1, Hq, D)
    q = query.reshape(B * Hkv, -1, D)
    k, v = (x[:, :, : seqs.window].flatten(0, 1) for x in (k_cache, v_cache))  # (B * Hkv, window, D), views
    return (torch.baddbmm(seqs.bias, q, k.mT, alpha=scale).softmax(-1) @ v).view(B, 1, Hq, D)


def attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, seqs=None, **more):
    """transformers' attention interface: query (B, Hq, T, D), key and value (B, Hkv, T, D), rotated -> (B, T, Hq, D).

    `seqs`, a Packed or a Decode, travels through the model call as a keyword argument. Raises UserError for a model
    that wants what is left out."""
    longest = seqs.max_length if isinstance(seqs, Packed) else seqs.cache.k.shape[3]
    if sliding_window and longest > sliding_window:
        raise UserError(f"this model attends to {sliding_window} tokens at a time, and sequences may have {longest}")
    if more.get("softcap") is not None or getattr(module, "sinks", None) is not None:
        raise UserError("this model uses softcaps or attention sinks, which the attention here leaves out")
    attend = packed_attention if isinstance(seqs, Packed) else decode_attention
    return attend(module.layer_idx, query, key, value, scaling, seqs), None


AttentionInterface.register(ATTENTION, attention)


# ------------------------------------------------------------------------------------------------ models


def check_attention(lm: nn.Module) -> None:
    """Raises UserError for a model with another attention, which would ignore `seqs` and compute nonsense."""
    if lm.config._attn_implementation != ATTENTION:
        raise UserError("the model was not loaded by model.load_causal_lm, so its attention reads no packed rows")


@contextmanager
def loading(path: str, what: str):
    """Makes a UserError of whatever a loader raises, which varies between versions."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{path}: cannot read {what} ({reason}); give a local folder that has one") from None


def load_config(path: str):
    """Raises UserError if it cannot be read."""
    with loading(path, "a configuration"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def empty_lm(config, dtype=torch.float32, device="meta") -> nn.Module:
    """An LM with our attention, whose weights are not set."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=dtype).eval()
    if str(device) != "meta":
        lm.to_empty(device=device)
        lm.tie_weights()
    return lm


def random_lm(path: str, dtype=torch.float32, device="cpu") -> nn.Module:
    """An LM of this shape, with whatever the memory holds as its weights."""
    return empty_lm(load_config(path), dtype, device)


def toy_model(tokenizer, seed: int, hidden: int = 64, layers: int = 3, heads: int = 4) -> nn.Module:
    """The embedded world's policy, untrained: Qwen2's architecture with 160,000 parameters."""
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    for name, p in model.named_parameters():
        if p.dim() == 2 and "embed" not in name:  # 0.02, right for wide layers, would start these narrow ones too small
            nn.init.normal_(p, std=p.shape[1] ** -0.5 * (0.5 if "o_proj" in name or "down_proj" in name else 1))
    return model


def load_tokenizer(path: str, kind=AutoTokenizer):
    """Raises UserError if there is none, or none that ends its answers."""
    if Path(path).is_dir() and not any(any(Path(path).glob(p)) for p in ("tokenizer*", "vocab*", "*.model")):
        raise UserError(f"{path}: the folder has no tokenizer")  # transformers would make an empty one
    with loading(path, "a tokenizer"):
        named = get_tokenizer_config(path, trust_remote_code=False).get("tokenizer_class")
        if named in ("TokenizersBackend", "PreTrainedTokenizerFast"):  # AutoTokenizer would take the model's usual one,
            kind = PreTrainedTokenizerFast  # which splits text in its own way, whatever tokenizer.json says
        tokenizer = kind.from_pretrained(path, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so no answer would ever end")
    return tokenizer


def load_causal_lm(path: str, dtype=torch.float32, device="cpu", headless: bool = False) -> nn.Module:
    """A causal LM with our attention, from a folder or a hub name; on the "meta" device its shape alone. headless:
    though its output layer is missing, or it has another head. Raises UserError if it cannot be loaded."""
    if str(device) == "meta":
        return empty_lm(load_config(path), dtype)
    how = dict(attn_implementation=ATTENTION, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    with loading(path, "a causal LM"):
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **how)
    scaled = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    if any(getattr(model.config, name, None) not in (None, 1) for name in scaled):
        raise UserError(f"{path}: this model scales its logits, which the log-probabilities here leave out")
    if not headless and any(name.startswith(("score.", "v_head.")) for name in info["unexpected_keys"]):
        raise UserError(f"{path}: a reward model, no causal LM; train.py and eval.py read it with --prm")
    missing = [name for name in info["missing_keys"] if not (headless and name.startswith("lm_head."))]
    if missing:  # transformers would fill them with random numbers
        raise UserError(f"{path}: the weights lack {len(missing)} tensors, such as {min(missing)}")
    # eval: dropout in the training forward would make the ratio start off 1
    return model.to(device).eval()


def read_tensors(path: str, prefix: str) -> dict[str, Tensor]:
    """The tensors of a folder or a hub name whose names begin with `prefix`, in float32, by the rest of their names."""
    file = lambda name: cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    index = file("model.safetensors.index.json")
    files = set(json.loads(Path(index).read_text())["weight_map"].values()) if index else {"model.safetensors"}
    out = {}
    for name in sorted(files):
        if not (found := file(name)):
            raise UserError(f"{path}: has no {name}; weights must be safetensors")
        with safe_open(found, "pt") as tensors:
            keys = [key for key in tensors.keys() if key.startswith(prefix)]
            out |= {key.removeprefix(prefix): tensors.get_tensor(key).float() for key in keys}
    return out


def save_lm(lm: nn.Module, tokenizer, path: str | Path) -> None:
    """A folder in Hugging Face format, written by rank 0; all ranks must call, for each holds a part of the weights."""
    weights = {}
    for name, p in lm.named_parameters():  # one by one: all of them would not fit a GPU
        p = whole(p)
        if rank() == 0:
            weights[name] = p.cpu()
    if rank() == 0:
        lm.save_pretrained(path, state_dict=weights)
        tokenizer.save_pretrained(path)


def eos_ids(model, tokenizer) -> list[int]:
    """All tokens that end an answer; chat models have more than one."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({*ids, tokenizer.eos_token_id} - {None})


def checkpoint_layers(model: nn.Module) -> None:
    """Activation checkpointing: each decoder layer keeps its input alone and runs again in the backward pass.
    transformers' own switch only works in training mode, which would also switch dropout on."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(recomputed, type(layer).forward, layer)


def hidden_states(lm, packed: Packed) -> Tensor:
    """The LM's last hidden states (N, H)."""
    check_attention(lm)
    inputs = dict(input_ids=packed.ids, position_ids=packed.position_ids, seqs=packed, use_cache=False)
    return lm.base_model(**inputs).last_hidden_state[0]


def token_logps(hidden: Tensor, output: nn.Linear, targets: Tensor, temperature=1.0, entropy=False):
    """log p(target) and the entropy (0 unless asked for), both (N,) float32, from hidden states (N, H) by an output
    layer. The logits exist for a chunk of rows at a time, and once more in the backward pass: (N, V) would be 2.5 GB
    for 4,096 tokens of a vocabulary of 150,000."""
    weight, bias = output.weight, output.bias
    if torch.is_grad_enabled():
        weight = weight.float()  # so that its gradient is summed over the chunks in float32

    def chunk(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype))
        logp = torch.log_softmax(logits if temperature == 1 else logits.float() / temperature, -1, dtype=torch.float32)
        spread = -(logp.exp() * logp).sum(-1).detach() if entropy else torch.zeros_like(logp[:, 0])
        return logp.gather(-1, t[:, None]).squeeze(-1), spread

    rows = max(CHUNK // len(weight), 1)
    parts = [recomputed(chunk, h, t) for h, t in zip(hidden.split(rows), targets.split(rows))]
    return torch.cat([logp for logp, _ in parts]), torch.cat([spread for _, spread in parts])


class Policy(nn.Module):
    """A causal LM read as a policy: `token_logps` of the response tokens. The sampler, the reference and the training
    forward divide by the same temperature, or the ratio would compare two different policies."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def forward(self, packed: Packed, predict_at: Tensor, targets: Tensor, temperature: float, entropy=False):
        hidden = hidden_states(self.lm, packed)[predict_at]
        return token_logps(hidden, self.lm.get_output_embeddings(), targets, temperature, entropy)


class ScalarModel(nn.Module):
    """A causal LM with a head of one number on every token: critic, ORM or PRM. Packed -> (N,) float32. head: another
    than a linear one that starts at zero. With `likelihood` the head also reads the lowest log-probability that the LM
    itself gave to a response token so far: what an LM would not have written shows here, and hardly in its hidden
    states, from which a small reward model would have to learn the world anew."""

    def __init__(self, lm: nn.Module, likelihood: bool = False, head: nn.Module | None = None):
        super().__init__()
        self.lm, self.likelihood = lm, likelihood
        self.head = head or nn.Linear(lm.config.hidden_size + likelihood, 1)
        for p in self.head.parameters() if head is None else ():
            nn.init.zeros_(p)
        self.head.to(lm.device)  # float32
        output = getattr(lm.get_output_embeddings(), "weight", None)
        if not likelihood and output is not None and output is not lm.get_input_embeddings().weight:
            output.requires_grad_(False)  # nobody reads it: neither gradient nor optimizer state

    def forward(self, packed: Packed) -> Tensor:
        hidden = hidden_states(self.lm, packed)
        x = hidden.float()  # the head computes in float32 even where the LM runs in bfloat16
        if self.likelihood:
            logp, _ = token_logps(hidden[:-1], self.lm.get_output_embeddings(), packed.ids[0, 1:])
            logp = F.pad(logp, (1, 0)) * packed.is_response  # (N,) of each token, given those before
            lowest = torch.cat([of_one.cummin(0).values for of_one in logp.split(packed.lengths)])
            x = torch.cat([x, lowest[:, None]], 1)
        return self.head(x).sum(-1)  # of one; FSDP wants no views

    def save(self, tokenizer, path: str | Path) -> None:
        """A folder with the LM in Hugging Face format and the head in head.safetensors; see `save_lm`."""
        save_lm(self.lm, tokenizer, path)
        head = {name: whole(p).cpu() for name, p in self.head.named_parameters()}
        if rank() == 0:
            save_file(head, Path(path) / "head.safetensors")
            Path(path, "head.json").write_text(json.dumps({"likelihood": self.likelihood}))

    @classmethod
    def load(cls, path: str | Path, dtype=torch.float32, device="cpu") -> "ScalarModel":
        """Raises UserError for a folder that `save` did not write."""
        weights, settings = Path(path, "head.safetensors"), Path(path, "head.json")
        if not (weights.is_file() and settings.is_file()):
            raise UserError(f"{path}: not a reward model that prm.py trained (head.safetensors, head.json are missing)")
        model = cls(load_causal_lm(path, dtype, device), **json.loads(settings.read_text()))
        if str(device) != "meta":
            model.head.load_state_dict(load_file(weights))
        return model.eval()


@torch.no_grad()  # not inference mode: what FSDP gathers there could not be trained with later
def score_logps(policy: Policy, batch, micro_batches: list, temperature: float) -> Tensor:
    """log pi of each response token (B, T), float32, on the CPU."""
    out = torch.zeros(batch.mask.shape)
    for micro in micro_batches:
        logp, _ = policy(micro.packed, micro.predict_at, micro.targets, temperature)
        batch.lay_out(out, micro.rows, logp)
    return out


@torch.no_grad()
def score_values(critic: ScalarModel, batch, micro_batches: list) -> tuple[Tensor, Tensor]:
    """The critic's raw outputs: V(s_t) (B, T) before each token, and V(s_T) (B,) behind the last."""
    out, final = torch.zeros(batch.mask.shape), torch.zeros(len(batch.mask))
    for micro in micro_batches:
        values = critic(micro.packed)
        batch.lay_out(out, micro.rows, values[micro.predict_at])
        if micro.rows:
            final[micro.rows] = values[micro.packed.last].cpu()
    return out, final


# ------------------------------------------------------------------------------------------------ several processes


@lru_cache
def gpus(kind: str):
    """All GPUs in a row, or nodes x GPUs: then weights are split within a node and copied among nodes."""
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % local:
        raise UserError(f"{world} processes, of which {local} on this node: every node must run as many")
    if world == local:
        return init_device_mesh(kind, (world,))
    return init_device_mesh(kind, (world // local, local), mesh_dim_names=("nodes", "gpus"))


def materialise(module: nn.Module, device) -> None:
    """Rank 0's weights and buffers on the device of every rank, unless they are sharded. Tied weights stay tied."""
    moved = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, x in tensors.items():
                if x is None or isinstance(x, DTensor):
                    continue
                if x not in moved:
                    new = torch.empty_like(x, device=device) if x.is_meta else x.detach().to(device)
                    dist.broadcast(new, 0)
                    moved[x] = nn.Parameter(new, x.requires_grad) if isinstance(x, nn.Parameter) else new
                tensors[name] = moved[x]


def shard(make, dtype: torch.dtype, device, offload: bool = False) -> nn.Module:
    """The model that make(device) builds, on all ranks, with FSDP2: each GPU keeps its part of the weights (with
    offload, in the CPU's memory), and gathers a layer when it computes. Weights, sums of gradients and optimizer states
    are as loaded (float32 where a model learns), all else is in `dtype`, but for a ScalarModel's head. Each of several
    nodes holds a whole model. Rank 0 alone reads the file, the others make("meta"). One process that computes in
    float32 has nothing to split and nothing to cast: its model stays as it is."""
    if world_size() == 1 and dtype == torch.float32 and not offload:
        return make(device)
    if not dist.is_initialized():
        dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    model = make("meta" if rank() else "cpu")
    units = [(module, dtype) for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    units += [(model.head, torch.float32)] if isinstance(model, ScalarModel) else []
    how = dict(mesh=gpus(device.type), offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy())
    for unit, low in [*units, (model, dtype)]:  # the model itself last: it takes what is left
        materialise(unit, device)
        fully_shard(unit, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(low, torch.float32), **how)
        if world_size() > 1:  # add the gradients up, since the losses are divided by global counts already
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    return model


def whole(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A weight, gathered from all ranks if it is sharded; then all ranks must call."""
    x = x.detach().to(dtype or x.dtype)
    return x.full_tensor() if isinstance(x, DTensor) else x


def replica(lm: nn.Module, dtype: torch.dtype, device) -> nn.Module:
    """A whole LM on each rank for the sampler, whose weights come by `sync`; the LM itself where it is not sharded."""
    if not any(isinstance(p, DTensor) for p in lm.parameters()):
        return lm
    copy = empty_lm(lm.config, dtype, device)
    for name, buffer in lm.named_buffers():
        copy.get_buffer(name).copy_(buffer)
    return copy.requires_grad_(False)


@torch.no_grad()
def sync(copy: nn.Module, lm: nn.Module) -> None:
    """Copy the LM's weights into its replica, in place; nothing to do where they are one."""
    if copy is not lm:
        for target, source in zip(copy.parameters(), lm.parameters()):
            target.copy_(whole(source, target.dtype))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def processes():
    """The device of this process, under torchrun, which ends the others when one dies, or alone."""
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps its store over restarts, in which the new processes would find the addresses of the dead:
            # rank 0 opens a store of its own, at a port 1,024 from it
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) ^ 1024)
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        dist.init_process_group(BACKEND)
    yield torch.device("cuda", local) if cuda else torch.device("cpu")
    if dist.is_initialized():
        dist.destroy_process_group()


def say(text: str) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def all_reduce(x: Tensor, op: str = "sum") -> Tensor:
    """Sum or maximum over the ranks, on the CPU."""
    y = x.detach().to("cpu", copy=True)
    if dist.is_initialized():
        dist.all_reduce(y, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return y


def barrier() -> None:
    all_reduce(torch.zeros(()))


def gather(rows: list) -> list:
    """The rows of all ranks, in the order of the ranks."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def on_rank_0(make):
    """What make() gives on rank 0, on all ranks; its UserError is everyone's."""
    box = [None]
    if rank() == 0:
        try:
            box = [make()]
        except UserError as error:
            box = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(box, 0)
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


def side_by_side(*jobs) -> list:
    """The results of the jobs (functions without arguments), on a CPU called at once, each with its share of the
    threads: sharing every small operation instead costs a fifth of an iteration of the embedded world."""
    threads = torch.get_num_threads()
    if threads == 1 or torch.cuda.is_available() or dist.is_initialized():  # collectives must keep their order
        return [job() for job in jobs]
    workers = min(len(jobs), threads)
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
        return list(pool.map(lambda job: job(), jobs))
