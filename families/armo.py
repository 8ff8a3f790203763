"""ArmoRM: a Llama under a head that weighs scores of single objectives by the prompt.

Wang et al. 2024, arXiv 2406.12845; RLHFlow/ArmoRM-Llama3-8B-v0.1. Its code is on the hub, is not
run, and is what GatedHead computes:

    r      = W h(last token)                                  (O,) scores of single objectives
    g      = scale * softmax(gate(h(end of the prompt)) / t)   (O,) their weights
    score  = sum_o g_o (r M)_o                                M: the reward transform matrix

Legend: T row tokens, S scored tokens, D width, O objectives.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from jobs.cli import UserError
from model import FAMILIES, LLAMA_NAMES, Family, read_llama

# Llama 3's <|eot_id|> that ends the prompt, and the assistant's header
PROMPT_END = (128009, 128006, 78191, 128007, 271)


class GatedHead(nn.Module):
    """(T, D) states after the final norm -> (S,) fp32."""

    def __init__(self, c):
        super().__init__()
        objectives, self.temperature, hidden, layers = c.own["gate"]
        self.regression = nn.Linear(c.width, objectives, bias=False)
        self.transform = nn.Parameter(torch.eye(objectives))
        self.logit_scale = nn.Parameter(torch.ones(1))
        sizes = pairwise([c.width, *[hidden] * layers, objectives])
        self.gate = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)

    def forward(self, x, row):
        rewards = F.linear(x[row.source].float(), self.regression.weight.float())  # (S, O)
        x = x[[prompt_end(row, source) for source in row.source.tolist()]].float()  # (S, D)
        for i, layer in enumerate(self.gate):
            x = F.linear(F.relu(x) if i else x, layer.weight.float(), layer.bias.float())
        weights = (x / self.temperature).softmax(-1) * self.logit_scale.float()  # (S, O)
        return (weights * (rewards @ self.transform.float())).sum(-1)


def prompt_end(row, source):
    """Row index at which the last PROMPT_END on the path to `source` begins."""
    path = (row.until[: source + 1] > source).nonzero()[:, 0]  # its ancestors, and itself
    tokens = tuple(row.tokens[path].tolist())
    for start in reversed(range(len(tokens))):
        if tokens[start : start + len(PROMPT_END)] == PROMPT_END:
            return int(path[start])
    cure = "its directory needs the Llama 3 tokenizer and chat template"
    raise UserError(f"ArmoRM finds no assistant's header of Llama 3 in a prompt; {cure}")


def read_armo(raw):
    raw.get("auto_map")  # the code on the hub
    gate = [raw.get("num_objectives", 19), raw.get("gating_temperature", 10)]
    gate += [raw.get("gating_hidden_dim", 1024), raw.get("gating_n_hidden", 3)]
    return read_llama(raw) | {"head": "reward", "own": {"gate": gate}}


ARMO_NAMES = LLAMA_NAMES | {
    "score.regression": "regression_layer",
    "score.transform": "reward_transform_matrix",
    "score.logit_scale": "gating.logit_scale",
    "score.gate.#": "gating.layers.#",
}
FAMILIES["armo"] = Family(None, read_armo, ARMO_NAMES, reward_head=GatedHead)
