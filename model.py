"""Models and their attention: any transformers causal LM of the Qwen2 / Llama family as policy, critic or reward model.

Training and scoring never pad. Sequences lie end to end in one row (`Packed`), and the sampler decodes one token per
slot of a preallocated KV cache (`Decode`). Both are served by one function registered with transformers' attention
interface, which calls flash_attn where it is installed, torch's own kernels on CUDA, and SDPA on CPU. The models are
transformers' own; `fuse` swaps the forwards of norms and attention for faster ones that compute the same.

`ScalarModel` adds a head of one number: the critic reads it as a value, ORM and PRM as the logit of "correct". `shard`
splits the weights of any of them over the GPUs; nothing else in the project knows whether a model is sharded.

Left out: attention sinks, softcaps and sequences beyond a sliding window (refused with a sentence), tensor and pipeline
parallelism.

Nothing to run here; tests/test_model.py shows each part beside the padded model it must equal.
"""

import atexit
import inspect
import json
import math
import os
import re
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from threading import Event, Thread
from types import MethodType
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config,
)  # fmt: skip
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from data import UserError

transformers.utils.logging.disable_progress_bar()  # "Loading weights" would break up the bars that mean something

try:
    import fcntl
except ImportError:
    fcntl = None
try:
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
except ImportError:
    flash_attn_varlen_func = flash_attn_with_kvcache = None
try:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.13 wants to be told of grouped heads, torch 2.11 has no such argument and groups by itself
    GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
except ImportError:
    varlen_attn, GQA = None, {}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ATTENTION = "packed_or_decode"  # transformers matches names: it must not contain sdpa, flash or flex_attention


# ------------------------------------------------------------------------------------------------ attention


class KVCache:
    """Keys and values of S slots: k, v are (layers, S, kv_heads, max_tokens, head_dim). A head's keys lie together, so that
    each head of each slot is a sequence of its own to whatever multiplies or attends."""

    def __init__(self, config, slots: int, max_tokens: int, dtype: torch.dtype, device):
        heads = config.num_key_value_heads
        cuda = torch.device(device).type == "cuda"
        # flash attention reads the lengths on the device: it needs no window, and one graph serves all lengths
        self.reads_lengths = cuda and dtype != torch.float32
        self.granularity = max_tokens if self.reads_lengths else 256 if cuda else 32
        # whole windows: the window of a step, and with it the rounding of its sums, must not depend on the cache's size
        max_tokens = self.window(max_tokens)
        shape = (config.num_hidden_layers, slots, heads, max_tokens, width(config)[3] // heads)
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
    """B sequences end to end in one row of N tokens; positions restart at 0 in each.

    sequences: token ids of each. prompt_lengths: how many of them are the prompt, where a model wants to know.
    cache, slots (B,): in a prefill, keys and values are also written to these slots."""

    def __init__(
        self, sequences: list[list[int]], device="cpu", prompt_lengths: list[int] | None = None,
        cache: KVCache | None = None, slots: Tensor | None = None,
    ):  # fmt: skip
        self.lengths = [len(s) for s in sequences]
        lengths = torch.tensor(self.lengths)  # (B,)
        ends = lengths.cumsum(0)
        self.starts = (ends - lengths).tolist()
        self.last = (ends - 1).to(device)  # (B,) index of each sequence's last token
        self.max_length = max(self.lengths)
        self.ids = torch.tensor([i for s in sequences for i in s], device=device)[None]  # (1, N)
        positions = torch.arange(int(ends[-1])) - torch.repeat_interleave(ends - lengths, lengths)
        self.position_ids = positions[None].to(device)  # (1, N)
        if prompt_lengths is not None:
            response = positions >= torch.repeat_interleave(torch.tensor(prompt_lengths), lengths)
            self.is_response = response.to(device)  # (N,)
        self.cu = F.pad(ends, (1, 0)).to(device, torch.int32)  # (B + 1,)
        # runs of equal length, [(length, how many)]: each run is one SDPA call (see `packed_sdpa`)
        self.runs = [(n, len(list(same))) for n, same in groupby(self.lengths)]
        self.cache = cache
        if cache is not None:
            self.token_slots = torch.repeat_interleave(slots, lengths).to(device)  # (N,)


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
            self.tokens = self.lengths.to(torch.int32)  # (B,)
            self.used = (self.tokens + 1).repeat_interleave(Hkv)  # (B * Hkv,)
            self.sequences = torch.arange(B * Hkv + 1, dtype=torch.int32, device=device)
            self.starts = self.sequences * T
        else:
            unused = torch.arange(self.window, device=device) > self.lengths[:, None]
            bias = torch.zeros(B, self.window, dtype=self.cache.k.dtype, device=device).masked_fill_(unused, -torch.inf)
            self.bias = bias.repeat_interleave(Hkv, 0)[:, None]  # (B * Hkv, 1, window)


def packed_sdpa(query, key, value, scale: float, seqs: Packed) -> Tensor:
    """SDPA over runs of equally long sequences: views of the packed row, so neither padding nor a mask."""
    sizes = [length * count for length, count in seqs.runs]
    q, k, v = (x.squeeze(0).split(sizes, 1) for x in (query, key, value))  # split, not slices: one backward for all runs
    out = []
    for (length, count), *qkv in zip(seqs.runs, q, k, v):
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
        if varlen_attn is not None:
            return varlen_attn(q, k, v, cu, cu, m, m, scale=scale, window_size=(-1, 0), **GQA)[None]
    return packed_sdpa(query, key, value, scale, seqs)


def decode_attention(layer: int, query, key, value, scale: float, seqs: Decode) -> Tensor:
    B, Hq, _, D = query.shape
    k_cache, v_cache = seqs.cache.k[layer, :B], seqs.cache.v[layer, :B]  # (B, Hkv, T, D)
    if seqs.cache.reads_lengths and flash_attn_with_kvcache is not None:
        q, k, v, k_cache, v_cache = (x.transpose(1, 2) for x in (query, key, value, k_cache, v_cache))
        # the kernel appends k and v behind these many tokens
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=seqs.tokens, softmax_scale=scale, causal=True
        )
    k_cache[seqs.rows, :, seqs.lengths] = key[:, :, 0]
    v_cache[seqs.rows, :, seqs.lengths] = value[:, :, 0]
    # Grouped-query attention: a group's query heads become query rows, so the KV heads are never repeated.
    Hkv, T = k_cache.shape[1:3]
    if seqs.cache.reads_lengths:
        # torch's copy of flash attention: each head of each slot is a packed sequence, of which it reads the used part
        q = query.reshape(B * Hq, 1, D)
        k, v = (x.flatten(0, 2)[:, None] for x in (k_cache, v_cache))  # (B * Hkv * T, 1, D), views
        group = Hq // Hkv
        out, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, seqs.sequences * group, seqs.starts, group, T, 0.0, False, False, scale=scale, seqused_k=seqs.used
        )
        return out.view(B, 1, Hq, D)
    q = query.reshape(B * Hkv, -1, D)
    k, v = (x[:, :, : seqs.window].flatten(0, 1) for x in (k_cache, v_cache))  # (B * Hkv, window, D), views
    return (torch.baddbmm(seqs.bias, q, k.mT, alpha=scale).softmax(-1) @ v).view(B, 1, Hq, D)


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, seqs=None, **kw):
    """transformers' attention interface: query (B, Hq, T, D), key and value (B, Hkv, T, D), rotated -> (B, T, Hq, D).

    `seqs`, a Packed or a Decode, travels through the model call as a keyword argument."""
    longest = seqs.max_length if isinstance(seqs, Packed) else seqs.cache.k.shape[3]
    if kw.get("softcap") is not None or getattr(module, "sinks", None) is not None or longest > (sliding_window or longest):
        window = f" (its window is {sliding_window} tokens, and {longest} are asked for)" if sliding_window else ""
        raise UserError(f"this model uses sliding windows, softcaps or sinks, which the attention here leaves out{window}")
    attend = packed_attention if isinstance(seqs, Packed) else decode_attention
    return attend(module.layer_idx, query, key, value, scaling, seqs), None


AttentionInterface.register(ATTENTION, attention)


# ------------------------------------------------------------------------------------------------ fused parts


class RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * weight (arXiv 1910.07467), over the last dimension; forward as without gradients, or the ratio would
    not start at 1."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        H = x.shape[-1]
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(H).add_(ctx.eps).rsqrt_()
        normed = x * scale
        along = grad * normed
        mean = (along @ weight)[..., None].div_(-H)
        return torch.addcmul(grad * weight, normed, mean).mul_(scale), along.flatten(0, -2).sum(0), None


def rms_norm(module, x: Tensor) -> Tensor:
    weight, eps = module.weight, module.variance_epsilon
    x = x.to(weight.dtype)
    if torch.is_grad_enabled() and not x.is_cuda:  # where torch has a kernel for the backward as well
        return RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out, half = x * cos, x.shape[-1] // 2
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


class Rotate(torch.autograd.Function):
    """Rotary embedding (arXiv 2104.09864): x (B, T, H, D) times cos, plus (-second half, first half) times sin."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


def attention_forward(module, hidden_states: Tensor, position_embeddings, seqs=None, **more):
    if seqs is None:  # somebody else's call, such as `generate` with another attention
        return type(module).forward(module, hidden_states, position_embeddings, **more)
    q, k, v = (p(hidden_states).unflatten(-1, (-1, module.head_dim)) for p in (module.q_proj, module.k_proj, module.v_proj))
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    cos, sin = (x.unsqueeze(-2) for x in position_embeddings)  # (B, T, 1, D)
    turn = Rotate.apply if torch.is_grad_enabled() else rotate
    q, k = turn(q, cos, sin), turn(k, cos, sin)
    out, _ = attention(module, *(x.transpose(1, 2) for x in (q, k, v)), None, module.scaling, seqs=seqs)
    return module.o_proj(out.flatten(-2)), None


def fuse(model: nn.Module) -> nn.Module:
    """Give the norms and the attention of a model of the Qwen2 and Llama family forwards of fewer, larger operations. A
    small model spends most of its time between operations, and autograd's own backward of RMSNorm takes three times as
    long as the one written out here. The weights stay where they are; other architectures run transformers' code."""
    for module in model.modules():
        family, part = re.fullmatch(r"(Qwen2|Qwen3|Llama|Mistral)?(.*)", type(module).__name__).groups()
        if family and part == "RMSNorm":
            module.forward = MethodType(rms_norm, module)
        if family and part == "Attention" and getattr(module, "sliding_window", None) is None and family != "Mistral":
            module.forward = MethodType(attention_forward, module)
    return model


# ------------------------------------------------------------------------------------------------ models


def toy_model(tokenizer, seed: int, hidden: int = 64, layers: int = 3, heads: int = 4) -> nn.Module:
    """The embedded world's policy, untrained: Qwen2's architecture with 160,000 parameters."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = fuse(AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION))
    for name, p in model.named_parameters():
        if p.dim() == 2 and "embed" not in name:  # 0.02, right for wide layers, would start these narrow ones too small
            nn.init.normal_(p, std=p.shape[1] ** -0.5 * (0.5 if "o_proj" in name or "down_proj" in name else 1))
    return model


SHAPES = {  # of the paper's models, and of the reward models made from them, to plan without the hub
    "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                 num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
}  # fmt: skip


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def load_config(path: str):
    """Raises UserError if it cannot be read."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{path}: cannot read its configuration ({first_line(error)}); give a local folder") from None


def model_shape(path: str):
    """A model's configuration as far as it sets memory and time. Raises UserError if it cannot be read."""
    size = re.search(r"qwen-?2.*-(1\.5b|7b)\b", path.lower())
    return Qwen2Config(**SHAPES[size[1]]) if size and not Path(path).exists() else load_config(path)


def empty_lm(config, dtype=torch.float32) -> nn.Module:
    with torch.device("meta"):
        return fuse(AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=dtype)).eval()


@lru_cache
def parameters_of(json_config: str, kind: type) -> tuple[int, int, int, int]:
    lm = empty_lm(kind(**json.loads(json_config)))
    size = lambda module: sum(p.numel() for p in module.parameters())  # tied weights once
    layers = [size(layer) for layer in lm.base_model.layers]
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    return size(lm), max(layers), size(lm) - sum(layers), 0 if tied else size(lm.get_output_embeddings())


def parameters(config) -> tuple[int, int, int, int]:
    """Parameters of an LM, of its largest layer, of all but the layers, of an output layer that is not tied."""
    return parameters_of(config.to_json_string(use_diff=False), type(config))


def width(config) -> tuple[int, int, int, int]:
    """Numbers that a token is: hidden, within the MLP, in all heads' queries, in all heads' keys."""
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.hidden_size, config.intermediate_size, config.num_attention_heads * D, config.num_key_value_heads * D


def load_tokenizer(path: str, kind=AutoTokenizer):
    """Raises UserError if there is none, or none that ends its answers."""
    if Path(path).is_dir() and not any(any(Path(path).glob(p)) for p in ("tokenizer*", "vocab*", "*.model")):
        raise UserError(f"{path}: the folder has no tokenizer")  # transformers would make an empty one
    try:
        named = get_tokenizer_config(path, trust_remote_code=False).get("tokenizer_class")
        if named in ("TokenizersBackend", "PreTrainedTokenizerFast"):  # AutoTokenizer would take the model's usual one,
            kind = PreTrainedTokenizerFast  # which splits text in its own way, whatever tokenizer.json says
        tokenizer = kind.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # which exception a missing or broken tokenizer raises varies between versions
        mend = "give a local folder that has a tokenizer.json"
        raise UserError(f"{path}: cannot load a tokenizer ({first_line(error)}); {mend}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so no answer would ever end")
    return tokenizer


HEADS = ("score.", "v_head.")  # of published reward models, in their own weights


def without_head(lm: nn.Module, headless: bool) -> nn.Module:
    if headless:
        lm.set_output_embeddings(nn.Identity())
    return lm


def load_causal_lm(path: str, dtype=torch.float32, device="cpu", headless: bool = False) -> nn.Module:
    """A causal LM with our attention, from a folder or a hub name; on the "meta" device its shape alone. headless: without
    its output layer, and though it has another head. Raises UserError if it cannot be loaded."""
    if str(device) == "meta":
        return without_head(empty_lm(load_config(path), dtype), headless)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation=ATTENTION, dtype=dtype, output_loading_info=True, trust_remote_code=False,
            use_safetensors=True,
        )  # fmt: skip
    except Exception as error:
        raise UserError(f"{path}: cannot load a causal LM ({first_line(error)}); give a local folder") from None
    scaled = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    if any(getattr(model.config, name, None) not in (None, 1) for name in scaled):
        raise UserError(f"{path}: this model scales its logits, which the log-probabilities here leave out")
    if not headless and any(name.startswith(HEADS) for name in info["unexpected_keys"]):
        raise UserError(f"{path}: a reward model, no causal LM; train.py and eval.py read it with --prm")
    missing = [name for name in info["missing_keys"] if not (headless and name.startswith("lm_head."))]
    if missing:  # transformers would fill them with random numbers
        raise UserError(f"{path}: the weights lack {len(missing)} tensors, such as {min(missing)}")
    # eval: dropout in the training forward would make the ratio start off 1
    return without_head(fuse(model), headless).to(device).eval()


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


def save_lm(lm: nn.Module, tokenizer, path: str | Path, rank: int = 0) -> None:
    """A folder in Hugging Face format, written by rank 0; all ranks must call, for each holds a part of the weights."""
    weights = {}
    for name, p in lm.named_parameters():  # one by one: all of them would not fit a GPU
        p = whole(p)
        if rank == 0:
            weights[name] = p.cpu()
    if rank == 0:
        lm.save_pretrained(path, state_dict=weights)
        tokenizer.save_pretrained(path)


def eos_ids(model, tokenizer) -> list[int]:
    """All tokens that end an answer; chat models have more than one."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def checkpointed_forward(module, *args, **more):
    forward = partial(type(module).forward, module)
    if not torch.is_grad_enabled():
        return forward(*args, **more)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **more)


def checkpoint_layers(model: nn.Module) -> None:
    """Activation checkpointing: each decoder layer keeps its input alone and runs again in the backward pass. transformers'
    own switch only works in training mode, which would also switch dropout on."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = MethodType(checkpointed_forward, module)


def hidden_states(lm, packed: Packed) -> Tensor:
    """The LM's last hidden states (N, H)."""
    more = dict(position_ids=packed.position_ids, seqs=packed, use_cache=False)
    return lm.base_model(input_ids=packed.ids, **more).last_hidden_state[0]


class ScalarModel(nn.Module):
    """A causal LM with a head of one number on every token: critic, ORM or PRM. Packed -> (N,) float32.

    head: another than a linear one that starts at zero. format: how the text is put to it, see prm.FORMATS.

    With `likelihood` the head also reads the lowest log-probability that the LM itself gave to a response token so far.
    At each token an LM knows what it would have written; what was written instead shows here, and hardly in its hidden
    states, from which a small reward model would have to learn the world anew."""

    def __init__(self, lm: nn.Module, likelihood: bool = False, head: nn.Module | None = None, format: str = "own"):
        super().__init__()
        self.lm, self.likelihood, self.format = lm, likelihood, format
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
            x = torch.cat([x, self.lowest_log_prob(hidden, packed)[:, None]], 1)
        return self.head(x).sum(-1)  # of one; FSDP wants no views

    def lowest_log_prob(self, hidden: Tensor, packed: Packed) -> Tensor:
        logp = self.lm.get_output_embeddings()(hidden[:-1]).float().log_softmax(-1)  # (N - 1, V)
        logp = F.pad(logp.gather(-1, packed.ids[0, 1:, None]).squeeze(-1), (1, 0))  # (N,) of each token, given those before
        logp = logp * packed.is_response
        return torch.cat([x.cummin(0).values for x in logp.split(packed.lengths)])

    def save(self, tokenizer, path: str | Path, rank: int = 0) -> None:
        """A folder with the LM in Hugging Face format and the head in head.safetensors; see `save_lm`."""
        save_lm(self.lm, tokenizer, path, rank)
        head = {name: whole(p).cpu() for name, p in self.head.named_parameters()}
        if rank == 0:
            save_file(head, Path(path) / "head.safetensors")
            Path(path, "head.json").write_text(json.dumps({"likelihood": self.likelihood}))

    @classmethod
    def load(cls, path: str | Path, dtype=torch.float32, device="cpu") -> "ScalarModel":
        """Raises UserError for a folder that `save` did not write."""
        for name in ("head.safetensors", "head.json"):
            if not Path(path, name).is_file():
                raise UserError(f"{path}: not a reward model that prm.py trained (it has no {name})")
        model = cls(load_causal_lm(path, dtype, device), json.loads(Path(path, "head.json").read_text())["likelihood"])
        if str(device) != "meta":
            model.head.load_state_dict(load_file(Path(path, "head.safetensors")))
        return model.eval()


# ------------------------------------------------------------------------------------------------ sharding


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
    """The model that make(device) builds, on all ranks, with FSDP2: each GPU keeps its part of the weights, and gathers a
    layer when it computes. Weights, sums of gradients and what the optimizer keeps are as loaded (float32 where a model
    learns), all else is in `dtype`, but for a ScalarModel's head. Among several nodes each node holds a whole model.

    Rank 0 alone reads the file, the others make("meta"). offload: what is kept stays in the CPU's memory. One process that
    computes in float32 has nothing to split and nothing to cast: its model stays as it is."""
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    if alone and dtype == torch.float32 and not offload:
        return make(device)
    if not dist.is_initialized():
        dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    model = on_rank_0(lambda: make("cpu"), share=False) or make("meta")
    units = [(module, dtype) for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    units += [(model.head, torch.float32)] if isinstance(model, ScalarModel) else []
    for unit, low in [*units, (model, dtype)]:  # the model itself last: it takes what is left
        materialise(unit, device)
        fully_shard(
            unit, mesh=gpus(device.type), reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(low, torch.float32),
            offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
        )  # fmt: skip
        if dist.get_world_size() > 1:  # add the gradients up, since the losses are divided by global counts already
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    return model


def whole(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A weight, gathered from all ranks if it is sharded; then all ranks must call."""
    x = x.detach().to(dtype or x.dtype)
    return x.full_tensor() if isinstance(x, DTensor) else x


def replica(lm: nn.Module, dtype: torch.dtype, device) -> nn.Module:
    """A whole LM of the same shape on each rank, for the sampler, whose weights come by `sync`; the LM itself where it is
    not sharded."""
    if not any(isinstance(p, DTensor) for p in lm.parameters()):
        return lm
    copy = empty_lm(lm.config, dtype).to_empty(device=device)
    copy.tie_weights()
    for name, buffer in lm.named_buffers():
        copy.get_buffer(name).copy_(buffer)
    return copy.requires_grad_(False)


@torch.no_grad()
def sync(copy: nn.Module, lm: nn.Module) -> None:
    """Copy the LM's weights into its replica, in place; nothing to do where they are one."""
    if copy is not lm:
        for target, source in zip(copy.parameters(), lm.parameters()):
            target.copy_(whole(source, target.dtype))


def last_micro_batch(model: nn.Module, last: bool) -> None:
    """Among several nodes, sum the gradients once per step; within a node they are summed in each backward pass, since
    nobody has room for all of them."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


# ------------------------------------------------------------------------------------------------ several processes


BACKEND = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


@atexit.register
def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def meet(store, rank: int, world: int):
    """A part of the store that is this start's own. torchrun keeps one store over all its restarts, in which the new
    processes would find the addresses of the dead; nor do its nodes always agree on the number of restarts."""
    me = uuid4().hex
    if rank:
        store.set(f"hello{rank}", me)
        start = store.get(me).decode()  # waits for rank 0's answer to this very process
        store.set(f"{start}{rank}", "here")
        return dist.PrefixStore(start, store)
    missing = set(range(1, world))
    while missing:  # a greeting of the dead is answered too, in vain
        for other in [r for r in missing if store.check([f"hello{r}"])]:
            store.set(store.get(f"hello{other}").decode(), me)
        missing = {r for r in missing if not store.check([f"{me}{r}"])}
        time.sleep(0.02)
    return dist.PrefixStore(me, store)


def start_processes() -> tuple[int, int, torch.device]:
    """Rank, world size and device, under torchrun or alone."""
    rank, world, local = (int(os.environ.get(*x)) for x in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    if world > 1 and not dist.is_initialized():
        store = meet(next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))[0], rank, world)
        # rank 0 alone may load or write for long; the others wait for it, and `watching` tells waiting from dead
        dist.init_process_group(BACKEND, store=store, rank=rank, world_size=world, timeout=timedelta(hours=12))
    return rank, world, torch.device("cuda", local) if cuda else torch.device("cpu")


def all_reduce(x: Tensor, op: str = "sum") -> Tensor:
    """Sum or maximum over the ranks, on the CPU."""
    if not dist.is_initialized():
        return x
    y = x.to("cpu", copy=True)
    dist.all_reduce(y, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return y


def barrier() -> None:
    all_reduce(torch.zeros(()))


@contextmanager
def watching(rank: int, world: int, every: float = 2.0, patience: float = 45.0):
    """Meanwhile each process says every few seconds that it lives, and looks after one other. When one stops, the others
    are told which and why, and stop as well; in a collective they would wait for it for hours."""
    if world == 1:
        yield
        return
    store = dist.distributed_c10d._get_default_store().clone()  # of its own: who waits on one locks it
    over, me = Event(), f"{socket.gethostname()} {os.getpid()}"
    keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    linger = lambda: time.sleep(2 * every if keeps_store else 0)  # until the others have read why

    def look(count: int, seen: dict) -> str:
        """Why to stop, or nothing."""
        store.set(f"beat{rank}", f"{me} {count}")
        if store.check(["stopped"]):
            return store.get("stopped").decode()
        peer = (rank + 1) % world
        beat = store.get(f"beat{peer}").decode() if store.check([f"beat{peer}"]) else ""
        if beat != seen.get("beat"):
            seen.update(beat=beat, time=time.monotonic())
        host, pid = beat.split()[:2] if beat else ("", 0)
        silent = time.monotonic() - seen["time"]
        gone = host == socket.gethostname() and Path("/proc/self").exists() and not Path(f"/proc/{pid}").exists()
        if silent < patience and not gone:
            return ""
        how = f"has not been heard of for {silent:.0f} s" if silent >= patience else "has died"
        store.set("stopped", f"rank {peer} (process {pid} on {host}) {how}")
        return store.get("stopped").decode()

    def watch():
        count, seen, why = 0, {}, ""
        while not why and not over.wait(every):
            try:
                why, count = look(count, seen), count + 1
            except Exception as error:
                why = f"the first node cannot be reached ({first_line(error)})"
        if why and not over.is_set():
            print(f"rank {rank} stops: {why}", file=sys.stderr, flush=True)
            linger()
            os._exit(1)  # the main thread may be waiting in a collective, where no exception reaches it

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
        barrier()  # who leaves early is not dead
    except BaseException as error:
        if not isinstance(error, UserError) and re.search("gloo|nccl|connection", str(error), re.IGNORECASE):
            time.sleep(patience + 2 * every)  # a peer is gone: our thread will soon say which, and stop us
        over.set()
        thread.join(10)
        store.set("stopped", f"rank {rank} ({me}) stopped: {first_line(error)}")
        linger()
        atexit.unregister(leave)  # which would wait for what the others never send
        raise
    over.set()
    thread.join(10)  # Python cannot end in peace while a thread is within the store's calls


def side_by_side(*jobs) -> list:
    """The results of the jobs (functions without arguments), on a CPU called at once, each with its share of the threads:
    two threads that share every small operation are slower than two that have a model each."""
    threads = torch.get_num_threads()
    if threads == 1 or torch.cuda.is_available() or dist.is_initialized():  # collectives must keep their order
        return [job() for job in jobs]
    workers = min(len(jobs), threads)
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
        return list(pool.map(lambda job: job(), jobs))


def on_rank_0(make, share: bool = True):
    """make() of rank 0, on all ranks (with share=False on rank 0, and None elsewhere). Its UserError is everyone's."""
    out = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            out = make()
        except UserError as error:
            out = error
    if dist.is_initialized():
        box = [out if share or isinstance(out, UserError) else None]
        dist.broadcast_object_list(box, 0)
        out = box[0] if share or isinstance(box[0], UserError) else out
    if isinstance(out, UserError):
        raise out
    return out


def lock(path: Path, wait: bool = False):
    """An open file that nobody else can lock until it is closed, or this process ends, however that happens. Raises
    UserError if another process holds it, or waits for that one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")
    if fcntl is None:  # Windows, where two runs in one folder go unnoticed
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read()
        if not wait:
            raise UserError(f"{path.parent} is in use by {holder}: wait for it, or choose another name") from None
        print(f"waiting for {holder}, which is making {path.parent}", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def gather(rows: list) -> list:
    """The rows of all ranks, in the order of the ranks."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


class Muon(torch.optim.Optimizer):
    """Muon (kellerjordan.github.io/posts/muon) for the hidden matrices of small models: momentum, orthogonalised by
    Newton-Schulz iterations in float32.

    torch.optim.Muon iterates in bfloat16, one matrix at a time, which on a CPU takes longer than the whole backward
    pass of the embedded model; here all matrices of one shape go together. The update has the RMS of AdamW's (arXiv
    2502.16982)."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in {p.shape for p in group["params"]}:
                params = [p for p in group["params"] if p.shape == shape]
                x = torch.stack([p.grad for p in params])  # (matrices, rows, columns)
                momentum = self.state[params[0]].setdefault("momentum", torch.zeros_like(x))
                momentum.lerp_(x, 1 - group["momentum"])
                x = x.lerp(momentum, group["momentum"])
                x = x.mT if shape[0] > shape[1] else x
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.mT if shape[0] > shape[1] else x
                for p, u in zip(params, x):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=-0.2 * group["lr"] * max(shape) ** 0.5)


class NonFinite(UserError):
    """Three gradients in a row were not finite."""


def optimizer_step(model: nn.Module, optimizers: list, max_grad_norm: float) -> float:
    """Sum the gradients over the ranks (losses are already divided by global counts), clip, step; returns their norm.

    A step whose norm is not finite is skipped. Raises NonFinite at the third in a row."""
    params = [p for p in model.parameters() if p.requires_grad]
    if dist.is_initialized() and not isinstance(params[0], DTensor):  # those of sharded models are summed already
        for p in params:  # a rank without rows has none, but must take part
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = nn.utils.parameters_to_vector([p.grad for p in params])
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, [p.grad for p in params])
    norm = whole(nn.utils.clip_grad_norm_(params, max_grad_norm)).item()
    for optimizer in optimizers:
        if math.isfinite(norm):
            optimizer.step()
        optimizer.skipped = 0 if math.isfinite(norm) else getattr(optimizer, "skipped", 0) + 1
        optimizer.zero_grad()
        if optimizer.skipped == 3:
            raise NonFinite(f"three gradients in a row were not finite ({norm})")
    return norm
