"""Reward heads: hidden states of a row -> one fp32 score per scored token (its last, of a path).

bf16 scores of good answers would tie, so all of it is computed in fp32.

Legend: T row tokens, S scored tokens, D width, O objectives.
"""

import torch
import torch.nn.functional as F
from torch import nn

from jobs.cli import UserError


class LinearHead(nn.Linear):
    """`score` of transformers' *ForSequenceClassification; with a bias, OASST's `out_proj`."""

    def __init__(self, c):
        super().__init__(c.width, 1, bias=c.score == "oasst")

    def forward(self, x, row):
        """x: (T, D) after the final norm -> (S,)."""
        bias = None if self.bias is None else self.bias.float()
        scores = F.linear(x[row.source].float(), self.weight.float(), bias)  # (S, 1)
        return scores.sum(-1)  # no squeeze: FSDP's hooks can be lost on a view


class GatedHead(nn.Module):
    """ArmoRM (Wang et al. 2024, arXiv 2406.12845; RLHFlow/ArmoRM-Llama3-8B-v0.1).

        r      = W h(last token)                                 (O,) scores of single objectives
        g      = scale * softmax(gate(h(end of the prompt)) / t)  (O,) their weights
        score  = sum_o g_o (r M)_o                               M: the reward transform matrix

    The prompt ends at the <|eot_id|> that opens the last `PROMPT_END`, Llama 3's end of turn and
    header of the assistant.
    """

    PROMPT_END = (128009, 128006, 78191, 128007, 271)

    def __init__(self, c):
        super().__init__()
        gate, widths = c.gate, [c.width] + [c.gate["hidden"]] * c.gate["layers"]
        self.temperature = gate["temperature"]
        self.regression = nn.Linear(c.width, gate["objectives"], bias=False)
        self.transform = nn.Parameter(torch.eye(gate["objectives"]))
        self.logit_scale = nn.Parameter(torch.ones(1))
        sizes = zip(widths, [*widths[1:], gate["objectives"]], strict=True)
        self.gate = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)

    def forward(self, x, row):
        """x: (T, D) after the final norm -> (S,)."""
        ends = [prompt_end(row, source, self.PROMPT_END) for source in row.source.tolist()]
        rewards = F.linear(x[row.source].float(), self.regression.weight.float())  # (S, O)
        return (self.weights(x[ends].float()) * (rewards @ self.transform.float())).sum(-1)

    def weights(self, x):
        """(S, D) states at the end of the prompt -> (S, O) weights of the objectives."""
        for i, layer in enumerate(self.gate):
            x = F.linear(F.relu(x) if i else x, layer.weight.float(), layer.bias.float())
        return (x / self.temperature).softmax(-1) * self.logit_scale.float()


def prompt_end(row, source, pattern):
    """Row index at which the last `pattern` on the path to `source` begins."""
    index = torch.arange(source + 1, device=row.tokens.device)
    path = index[row.until[: source + 1] > source]  # the ancestors of `source`, and itself
    windows = row.tokens[path].unfold(0, min(len(pattern), len(path)), 1)
    wanted = torch.tensor(pattern, device=windows.device)
    found = (windows == wanted).all(-1).nonzero() if windows.shape[1] == len(pattern) else []
    if not len(found):
        raise UserError(
            "ArmoRM finds no assistant's header of Llama 3 in a prompt; its directory needs the "
            "Llama 3 tokenizer and chat template"
        )
    return int(path[int(found[-1])])


REWARDS = {"linear": LinearHead, "oasst": LinearHead, "armo": GatedHead}
