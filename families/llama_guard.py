"""Computes how likely a Llama-Guard-style model is to call a dialogue unsafe (Inan et al. 2023).

Such a model is a language model whose chat template wraps a dialogue in its policy and asks for
"safe" or "unsafe". Nothing is sampled: the verdict is the softmax over the log-probabilities of
these answers (arXiv 2312.06674). pairs/cleaning.py keeps verdicts and filters by them.
"""

import hashlib
import math
from functools import cached_property

from data import lay_out, scored_rows, trie_size
from hub.template import Refused, open_template
from hub.weights import Weights, resolve
from model import load, plain_attention

ANSWERS = ("safe", "\n\nsafe", "unsafe", "\n\nunsafe")  # some guards open with a blank line


class Guard:
    """A guard by its HF directory or hub id; weights are loaded when it is first asked.

    judge: what a call runs, `verdicts` or what shares it over processes (train.load_data).
    """

    def __init__(self, source, device="auto", attend=plain_attention):
        self.directory = resolve(source, "--guard")
        self.device, self.attend = device, attend  # the latter as in model.Transformer
        self.judge = self.verdicts

    @cached_property
    def template(self):
        return open_template(self.directory)

    @cached_property
    def model(self):
        model = load(self.directory, None, self.device, head="logps", flag="--guard")
        model.attend = self.attend
        return model

    @cached_property
    def identity(self):
        """sha256 of what decides the verdicts: weights, configuration, tokenizer and template."""
        files = [(self.directory / name).read_bytes() for name in ("config.json", "tokenizer.json")]
        weights, template = Weights(self.directory).digest(), self.template.source
        return hashlib.sha256(b"".join([weights.encode(), *files, template.encode()])).hexdigest()

    def __call__(self, dialogues):
        return self.judge(dialogues)

    def verdicts(self, dialogues):
        """{key: messages} -> yields (key, probability of unsafe), in no particular order.

        nan where the guard's template refuses the dialogue.
        """
        texts = {}
        for key, messages in dialogues.items():
            try:
                texts[key] = self.template.render(messages, generation=True)
            except Refused:
                yield key, math.nan
        if not texts:
            return
        keys, t = list(texts), self.template
        answers = t.encode(ANSWERS, behind=t.opening)
        prompts = t.encode(texts.values())
        paths = [[([prompt, answer], len(answer)) for answer in answers] for prompt in prompts]
        trie, sizes = (lambda n: lay_out(paths[n])), [trie_size(four) for four in paths]
        for items, row, values in scored_rows(self.model, trie, sizes, len(ANSWERS), label=None):
            unsafe = row.sums(values).softmax(1)[:, 2:].sum(1)  # (B, 4) -> (B,)
            yield from zip((keys[n] for n in items), unsafe.tolist(), strict=True)
