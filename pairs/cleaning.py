"""Leaves out pairs by InSPO's cleaning rules (appendix D.2); what is dropped is counted.

Each rule is a flag, off by default; the paper has answers of 32 to 2048 tokens.
"""

from dataclasses import dataclass

from jobs.cli import UserError, flag
from pairs.guard import without_unsafe


@dataclass(frozen=True)
class CleaningFlags:
    """A rule each; None or False leaves it out."""

    dedup: bool = flag(False, "leave out exact duplicates")
    max_answer: int | None = flag(None, "leave out pairs with an answer over so many tokens")
    min_answer: int | None = flag(None, "leave out pairs with both answers under so many tokens")
    min_margin: float | None = flag(None, "leave out pairs with a smaller score difference")
    guard: str | None = flag(None, "leave out what this Llama-Guard-style model calls unsafe")
    guard_threshold: float = flag(0.5, "probability of unsafe from which a pair is left out")

    @classmethod
    def of(cls, s):
        """These flags alone, of a command that inherits them."""
        return cls(**{name: getattr(s, name) for name in cls.__dataclass_fields__})


def clean(pairs, rules, template, drops, guard=None):
    """The pairs that pass all rules, cheap rules first; the others are added to `drops`.

    rules: CleaningFlags. Lengths are in tokens of `template` (hub.template.Template) without the
    end token. guard: the model that --guard names, as in guard.py. UserError where nothing is left.
    """
    if rules.dedup:
        pairs = drops.sift(pairs, duplicates(pairs))
    if (least := rules.min_margin) is not None:
        passes = (pair.margin is None or pair.margin >= least for pair in pairs)
        pairs = drops.sift(pairs, (None if p else f"margin under {least:g}" for p in passes))
    if rules.max_answer is not None or rules.min_answer is not None:
        pairs = drops.sift(pairs, wrong_lengths(pairs, rules, template))
    if guard is not None:
        pairs = without_unsafe(pairs, guard, rules.guard_threshold, drops)
    if not pairs:
        raise UserError(f"no pair is left after cleaning; dropped: {drops}")
    return pairs


def duplicates(pairs):
    """Yields a reason, or None for the first pair of equal ones and the copies a weight made."""
    seen = {}
    for pair in pairs:
        prompt = tuple((m["role"], m["content"]) for m in pair.prompt)
        first = seen.setdefault((prompt, pair.chosen, pair.rejected), pair.where)
        yield None if first == pair.where else "duplicate"


def wrong_lengths(pairs, rules, template):
    """Yields a reason where an answer is over max_answer tokens, or both are under min_answer."""
    for start in range(0, len(pairs), 512):
        block = pairs[start : start + 512]
        lengths = template.lengths(t for pair in block for t in (pair.chosen, pair.rejected or ""))
        for longer in map(max, lengths[::2], lengths[1::2]):
            if rules.max_answer is not None and longer > rules.max_answer:
                yield f"answer over {rules.max_answer} tokens"
            elif rules.min_answer is not None and longer < rules.min_answer:
                yield f"both answers under {rules.min_answer} tokens"
            else:
                yield None
