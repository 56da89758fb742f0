"""What --plan predicts, against what there is: parameters, what autograd keeps, the memory of a real iteration."""

import gc
import json
import os
import re
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import model
import ppo
import train
from data import UserError, run_script

ROOT = Path(__file__).parents[1]
KINDS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


def make(kind, tied, kv_heads):
    shape = dict(vocab_size=101, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)
    shape |= dict(num_key_value_heads=kv_heads, tie_word_embeddings=tied, **(dict(head_dim=24) if kind == "qwen3" else {}))
    return KINDS[kind](**shape, pad_token_id=0, eos_token_id=None, bos_token_id=None)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, tied, kv", [("qwen2", True, 2), ("qwen2", False, 4), ("qwen3", True, 2), ("llama", False, 1)]
)
def test_every_byte_that_autograd_keeps_is_counted(kind, tied, kv, dtype, checkpointed):
    config, b = make(kind, tied, kv), dtype.itemsize
    lm = model.fuse(AutoModelForCausalLM.from_config(config, attn_implementation=model.ATTENTION)).to(dtype).eval()
    if checkpointed:
        model.checkpoint_layers(lm)
    packed, keep = model.Packed([[1] * 10, [2] * 10, [3] * 12]), torch.arange(7, 32)
    weights, kept, alive = {p.untyped_storage().data_ptr() for p in lm.parameters()}, {}, []

    def keeps(tensor):
        alive.append(tensor)  # so that no address is used twice
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keeps, lambda x: x):
        ppo.Policy(lm)(packed, keep, packed.ids[0, keep], 1.0, entropy=True)
    layer, outside = ppo.kept_bytes(config, b, cuda=False)
    if checkpointed:
        layer = 64 * b
        outside -= 2 * b * model.width(config)[2] // 4  # cos and sin go by keyword, where the hooks do not see them
    expected = 32 * (3 * layer + outside) + 25 * (64 * b + 8 + 8)  # and of 25 tokens: hidden states, index, target
    assert sum(n for at, n in kept.items() if at not in weights) == expected


@pytest.mark.parametrize("kind, tied, kv", [("qwen2", True, 2), ("qwen3", False, 4), ("llama", False, 1)])
def test_parameters_are_counted_without_making_them(kind, tied, kv):
    config = make(kind, tied, kv)
    lm = AutoModelForCausalLM.from_config(config)
    size = lambda module: sum(p.numel() for p in module.parameters())
    expected = size(lm), size(lm.model.layers[0]), size(lm) - 3 * size(lm.model.layers[0]), 0 if tied else 101 * 64
    assert model.parameters(config) == expected


PUBLISHED = {"qwen2-1.5b-instruct": 1_543_714_304, "qwen2.5-math-7b-instruct": 7_615_616_512}


@pytest.mark.parametrize("preset, published", PUBLISHED.items())
def test_the_papers_models_are_known_without_network(preset, published, monkeypatch):
    monkeypatch.setattr(model.AutoConfig, "from_pretrained", None)
    assert model.parameters(model.model_shape(train.PRESETS[preset]["model"]))[0] == published


def call(monkeypatch, capsys, *argv) -> tuple[str, str, int]:
    monkeypatch.setattr(sys, "argv", ["train.py", "--plan", *argv])
    code = 0
    try:
        run_script(train.main)
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return out.out, out.err, code


def figure(out: str, name: str) -> float:
    return float(re.search(rf"^  {re.escape(name)} +([0-9.]+)$", out, re.MULTILINE)[1])


def test_the_plan_names_each_part_and_the_largest_options_that_fit_do_fit(monkeypatch, capsys):
    argv = "--preset", "qwen2.5-math-7b-instruct", "--gpus", "8", "--gpu-memory", "80"
    out, _, code = call(monkeypatch, capsys, *argv)
    P = 7.615616512
    assert code == 0 and "fits in 80 GB" in out and ": yes" in out
    assert figure(out, "policy: weights") == pytest.approx(4 * P / 8, abs=0.06)
    assert figure(out, "policy: AdamW") == pytest.approx(8 * P / 8, abs=0.06)
    assert figure(out, "critic: AdamW") == pytest.approx(8 * (P - 152064 * 3584e-9) / 8, abs=0.06)  # no output layer
    assert figure(out, "reference") == figure(out, "reward model") == pytest.approx(2 * P / 8, abs=0.06)
    assert figure(out, "sampler's copy") == pytest.approx(2 * P, abs=0.06)
    assert figure(out, "KV cache and slots") == pytest.approx(96 * 2048 * 28 * 2 * 4 * 128 * 2e-9, abs=0.06)
    slots, budget = map(int, re.search(r"largest --slots (\d+), largest --token-budget (\d+)", out).groups())
    for option, value in (("--slots", slots), ("--token-budget", budget)):
        assert call(monkeypatch, capsys, *argv, option, str(value))[2] == 0
        out, err, code = call(monkeypatch, capsys, *argv, option, str(value + 1))
        assert code == 2 and ": no" in out and "this does not fit: use" in err


def test_what_the_plan_proposes_fits(monkeypatch, capsys):
    argv = ["--preset", "qwen2-1.5b-instruct", "--gpus", "1"]
    _, err, code = call(monkeypatch, capsys, *argv)
    first = err.split("use ")[1].split(", or")[0]
    assert code == 2 and first.startswith("--checkpoint-activations --slots")
    assert call(monkeypatch, capsys, *argv, *first.split())[2] == 0
    # smaller weights in each, whole cache: what sharding divides and what it does not
    one, eight = (call(monkeypatch, capsys, *argv[:-1], gpus, *first.split())[0] for gpus in ("1", "8"))
    assert figure(one, "policy: AdamW") == pytest.approx(8 * figure(eight, "policy: AdamW"), rel=0.05)
    assert figure(one, "KV cache and slots") == figure(eight, "KV cache and slots")


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--preset toy", "the embedded world fits everywhere"),
        ("--preset qwen2-7b-instruct --gpus 3", "cannot be shared by 3 processes: choose 4095 or 4098"),
        ("--model ./nowhere/at/all --reward success", "cannot read its configuration"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(argv, words, monkeypatch, capsys):
    _, err, code = call(monkeypatch, capsys, *argv.split())
    assert code == 2 and words in err
    with pytest.raises(UserError, match="add --plan"):
        train.parse(["--preset", "toy", "--gpus", "4"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_iteration_takes_what_is_predicted(tmp_path):
    """Peak memory of sampling, scoring and update of a model of 3 million parameters in float32, within 10 %."""
    # freed blocks go back at once, or fragments would count
    env = {"MALLOC_MMAP_THRESHOLD_": "131072", "MKL_DISABLE_FAST_MM": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__)), str(tmp_path)]
    result = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ratios = json.loads(result.stdout.splitlines()[-1])
    print(result.stdout)
    assert len(ratios) == 6 and all(abs(ratio - 1) < 0.1 for ratio in ratios.values()), ratios


def measure(folder: str, *more: str) -> dict:
    """In a process of its own: peaks of one iteration beyond what was there before any model, and predictions, by phase."""
    torch.set_num_threads(1)
    status = lambda field: 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    tokenizer = train.toy_tokenizer()
    shape = dict(vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4)
    config = Qwen2Config(**shape, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
                         pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)  # fmt: skip
    lm = AutoModelForCausalLM.from_config(config)
    model.save_lm(lm, tokenizer, folder)
    reward_model = f"{folder}/prm" if "prm" in more else ""
    if reward_model:
        model.ScalarModel(lm).save(tokenizer, reward_model)
        more += ("--prm", reward_model)
    del lm
    problems = Path(folder, "problems.jsonl")
    problems.write_text("\n".join(json.dumps(vars(p)) for p in train.toy_problems("train", 40)))
    argv = f"--data {problems} --prompt {{question}} --max-prompt-tokens 32 --questions 10 --samples 1 --minibatches 1"
    argv += f" --slots 10 --max-new-tokens 96 --eval-problems 8 --token-budget 650 --model {folder}"
    o, _ = train.parse([*argv.split(), *more])
    data = train.load_data(o)
    tiny = model.toy_model(tokenizer, 0)  # so that the libraries are loaded
    packed = model.Packed([[1] * 32] * 4)
    ppo.Policy(tiny)(packed, torch.arange(64), packed.ids[0, :64], 1.0, entropy=True)[0].sum().backward()
    train.adam(tiny, 0.0, (0.9, 0.9)).step()
    gc.collect()
    before, measured = status("VmRSS"), {}
    trainer = train.Trainer(o, data, folder, reward_model, 0, 1, torch.device("cpu"))
    for optimizer in trainer.optimizers:  # zeros take no memory before they are touched
        for moments in optimizer.state.values():
            [x.add_(0) for x in moments.values()]
    for lm in (trainer.policy, trainer.critic, trainer.reference, trainer.reward_model):
        for p in lm.parameters() if lm else ():
            p.sum()  # nor do files that are mapped

    def watched(name, run):
        def call(*args, **more):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
            result = run(*args, **more)
            measured[name] = status("VmHWM") - before
            return result

        return call

    trainer.sample, trainer.score = watched("sampling", trainer.sample), watched("scoring", trainer.score)
    train.update = watched("update", train.update)
    trainer.iteration(1)
    longest = max(map(len, data[1])) + o.max_new_tokens
    chunk = ppo.TokenLogProbs.CHUNK
    parts = ppo.memory(config, o, shards=1, ranks=1, longest=longest, b=4, cuda=False, sharded=False, chunk=chunk)
    only = lambda phase: {k: v for k, v in parts.items() if not k.startswith(ppo.PHASES) or k.startswith(phase)}
    return {phase: (peak, ppo.peak(only(phase))) for phase, peak in measured.items()}


if __name__ == "__main__":
    ways, ratios = ("--reward prm", "--reward success --checkpoint-activations"), {}
    with get_context("fork").Pool(2) as pool:  # one process each, so that neither finds what the other has left behind
        found = pool.starmap(measure, [(f"{sys.argv[1]}/{i}", *more.split()) for i, more in enumerate(ways)], chunksize=1)
    for more, phases in zip(ways, found):
        for phase, (measured, predicted) in phases.items():
            ratios[f"{phase} {more}"] = predicted / measured
            print(f"{phase:10}{measured / 1e6:8.1f} MB measured{predicted / 1e6:8.1f} predicted {more}")
    print(json.dumps(ratios))
