"""Tiny random models as Hugging Face directories: built in milliseconds, read by us and by peers.

The tokenizer has one token per byte, so any text goes in, and the ids of a text can be told by eye.
"""

import json

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from model import Transformer, config_of, hf_name

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 258,
    "pad_token_id": 258,
}
MISTRAL = LLAMA | {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "sliding_window": 8,
}
QWEN2 = LLAMA | {  # slides over 8 tokens in its second layer only
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 1,
}
REWARD = LLAMA | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
_QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 3}
_SLIDES = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}

_CHANGES = {  # 100 tokens are beyond the original positions of _LLAMA3, and every window
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama biased": {"attention_bias": True},
    "llama one kv head": {"num_key_value_heads": 1},
    "llama without gqa": {"num_key_value_heads": 4},
    "llama wide heads": {"head_dim": 16},
    "llama 3.1": {"rope_scaling": _LLAMA3, "rope_theta": 500000.0},
    "llama 3.1, small theta": {"rope_scaling": _LLAMA3, "rope_theta": 100.0},
    "llama linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama old linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral sliding": _MISTRAL | {"sliding_window": 7},
    "mistral 0.2": _MISTRAL | {"sliding_window": None},
    "qwen2": _QWEN2 | {"use_sliding_window": False, "sliding_window": 7},
    "qwen2 sliding from layer 1": _QWEN2 | _SLIDES,
}
MODELS = {name: LLAMA | changes for name, changes in _CHANGES.items()}


def build(directory, config=LLAMA, seed=0, template=CHATML):
    """Write a random model with a byte tokenizer; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = Transformer(config_of(config))
    names = {n: hf_name(model.config.family, n) for n, _ in model.named_parameters()}
    weights = {names[n]: p.detach().contiguous() for n, p in model.named_parameters()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(directory, template)
    return directory


def write_tokenizer(directory, template=CHATML):
    """tokenizer.json and tokenizer_config.json: one token per byte, and three special ones."""
    _tokenizer().save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": template}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 letters, one per byte
    vocab = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return tokenizer
