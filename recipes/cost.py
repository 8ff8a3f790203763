"""Computes the GPU hours that steps of a 7-9B model would take on H100s, from assumptions.

Nothing here was measured: a plan, to be corrected by a first run (its seconds: OUT/steps.jsonl).

    training     6 N FLOPs per token and parameter, 2 N in passes without gradient, at UTILISATION
                 of the dense bf16 peak (published for 8B on H100: 33 to 46% of it)
    sampling     TOKENS_PER_SECOND of each GPU in the own sampler with 16 sequences, of which each
                 step reads all weights; a server such as vLLM is some ten times faster
"""

from losses import recipe

PEAK = 989e12  # FLOP/s of an H100, bf16, dense
UTILISATION = 0.35
TOKENS_PER_SECOND = 500
PROMPT, ANSWER = 200, 400  # tokens of an average prompt and answer
VALIDATIONS = 11  # of a run: at its start, and after each tenth


def tokens_per_pair(loss, condition=None):
    """Tokens of the trie of an average pair: each prefix of its paths counts once."""
    rule, segments = recipe(loss, condition), set()
    for path in rule.paths:
        # behind a separator even the context answer's own copy is another text
        context = () if path.context is None else (rule.bridge, path.context)
        plain = context[1:] if rule.bridge == "turn" else context
        segments |= {segment for segment in (plain, (*context, path.target)) if segment}
    return PROMPT + ANSWER * len(segments)


def training(parameters, pairs, epochs, loss, condition=None, validation=1000):
    """GPU hours of train.py, its reference pass and its validations included."""
    rule, tokens = recipe(loss, condition), tokens_per_pair(loss, condition)
    flops = 6 * epochs * pairs * tokens + 2 * VALIDATIONS * validation * tokens
    if rule.objective.uses_reference:
        both = PROMPT + ANSWER * len(rule.reference_paths)
        flops += 2 * pairs * both
    return parameters * flops / (UTILISATION * PEAK) / 3600


def sampling(answers, tokens=ANSWER):
    """GPU hours of generate.py's own sampler."""
    return answers * tokens / TOKENS_PER_SECOND / 3600


def scoring(parameters, answers):
    """GPU hours of one forward pass of a reward model or guard over so many dialogues."""
    return 2 * parameters * answers * (PROMPT + ANSWER) / (UTILISATION * PEAK) / 3600
