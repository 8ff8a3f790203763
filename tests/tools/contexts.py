"""What stands before an answer in IFSR's analyses, as transformers renders and reads it."""

import numpy as np
import pytest
import torch

from evals.context import INSTRUCTED, SHOWN
from hub.template import INSTRUCTIONS

INSTRUCTION = {"↑": "better", "⁰": "another", "↓": "worse"}
EVERY = INSTRUCTED | SHOWN


def user(text):
    return {"role": "user", "content": text}


def asked(row, context):
    """The dialogue of a pair under one context, up to the chosen answer."""
    instruction = INSTRUCTIONS.get(INSTRUCTION.get(context[-1]))
    if "ỹ" in context:
        draft = {"role": "assistant", "content": row["rejected"]}
        return [user(row["prompt"]), draft, user(instruction)]
    return [user(row["prompt"] + ("\n" + instruction if instruction else ""))]


class Peer:
    """transformers' model and tokenizer of a directory: ids of a context, and what follows it."""

    def __init__(self, directory):
        transformers = pytest.importorskip("transformers")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def ids(self, row, context):
        """(ids up to the answer, ids of the answer and its end)."""
        text = self.tokenizer.apply_chat_template(
            asked(row, context), tokenize=False, add_generation_prompt=True
        )
        answer = row["chosen"] + "<|im_end|>"
        both = [self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, answer)]
        return both

    @torch.no_grad()
    def run(self, ids, **options):
        return self.model(torch.tensor([ids]), **options)

    def probabilities(self, context, answer):
        """(T, V) next-token distributions, each where a token of the answer stands."""
        logits = self.run(context + answer).logits[0, len(context) - 1 : -1]
        return logits.double().softmax(-1).numpy()

    def losses(self, context, answer):
        """(T,) loss of each token of the answer."""
        return -np.log(self.probabilities(context, answer)[range(len(answer)), answer])
