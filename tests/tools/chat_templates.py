"""Chat templates of every public format, and a tokenizer to go with them."""

import json

from dialogues import say
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

# The public formats, in our own words: who speaks, what closes a turn, what is refused.
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SMOLLM = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nBe nice<|im_end|>\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}"
    "{% set head = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' %}"
    "{% set text = head + m['content'] | trim + '<|eot_id|>' %}"
    "{{ bos_token + text if loop.first else text }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = """{{ bos_token }}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 is even) %}
        {{- raise_exception('roles must alternate user, assistant, user, …') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + m.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + m.content + eos_token }}
    {%- endif %}
{%- endfor %}"""
ZEPHYR = """{% for m in messages %}
{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('there is no system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MODERN = (  # what newer templates use: namespaces, loop controls, generation blocks, tools, dates
    "{%- set ns = namespace(n=0) %}{% if tools is not none %}{{ tools | tojson }}{% endif %}"
    "{{- 'Year ' + strftime_now('%Y') + '\\n' }}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if m.role == 'system' %}{{ m | tojson(indent=2, sort_keys=true) }}{% continue %}{% endif %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ ns.n }}: {{ m.content }}\n{% endif %}{% endfor %}"
)
END = {
    "chatml": (CHATML, "<|im_end|>"),
    "smollm": (SMOLLM + CHATML, "<|im_end|>"),
    "llama 3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
    "mistral, first": (
        MISTRAL.replace("' ' + m.content + eos_token", "m.content + eos_token + ' '"),
        "</s>",
    ),
    "zephyr": (ZEPHYR, "</s>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "modern": (MODERN, "<|im_end|>"),
}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]  # fmt: skip


def write_checkpoint(directory, template, special=SPECIAL, **settings):
    """A directory with a byte-level tokenizer (one merge, "a" + "b") and a chat template."""
    directory.mkdir(exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    bos = [("<s>", tokenizer.token_to_id("<s>"))]  # put in front, unless told not to
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=bos)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template} | settings
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


DIALOGUES = [
    say("Hi"),
    say(" Hi, \n", "Hello! "),
    say("1 < 2 & é\u2028?", "Yes\n\nindeed", "And \"3\"?"),
    say("a", "b", "c", "d"),
    say("Hi", "Hello", system="Be brief & 'kind', s'il vous plaît"),
]  # fmt: skip
