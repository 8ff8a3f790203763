"""InSPO's cleaning rules (appendix D.2): each a flag, off by default; what is dropped is counted.

--dedup              exact duplicates
--max_answer 2048    either answer over so many tokens
--min_answer 32      both answers under so many tokens
--min_margin M       score of chosen minus score of rejected under M, where the data has scores
--guard MODEL        flagged by a Llama-Guard-style model (guard.py)
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
        pairs = list(without_duplicates(pairs, drops))
    if rules.min_margin is not None:
        pairs = list(with_margin(pairs, rules.min_margin, drops))
    if rules.max_answer is not None or rules.min_answer is not None:
        pairs = list(of_length(pairs, rules, template, drops))
    if guard is not None:
        pairs = without_unsafe(pairs, guard, rules.guard_threshold, drops)
    if not pairs:
        raise UserError(f"no pair is left after cleaning; dropped: {drops}")
    return pairs


def without_duplicates(pairs, drops):
    """Of pairs with equal prompt and answers the first; copies that a weight made stay."""
    seen = {}
    for pair in pairs:
        prompt = tuple((m["role"], m["content"]) for m in pair.prompt)
        key = (prompt, pair.chosen, pair.rejected)
        if seen.setdefault(key, pair.where) == pair.where:
            yield pair
        else:
            drops.add("duplicate", pair.where)


def with_margin(pairs, least, drops):
    for pair in pairs:
        if pair.margin is None or pair.margin >= least:
            yield pair
        else:
            drops.add(f"margin under {least:g}", pair.where)


def of_length(pairs, rules, template, drops):
    """Pairs with no answer over max_answer tokens, and not both under min_answer."""
    for start in range(0, len(pairs), 512):
        block = pairs[start : start + 512]
        texts = [text for pair in block for text in (pair.chosen, pair.rejected or "")]
        lengths = template.lengths(texts)
        for pair, w, l in zip(block, lengths[::2], lengths[1::2], strict=True):
            if rules.max_answer is not None and max(w, l) > rules.max_answer:
                drops.add(f"answer over {rules.max_answer} tokens", pair.where)
            elif rules.min_answer is not None and max(w, l) < rules.min_answer:
                drops.add(f"both answers under {rules.min_answer} tokens", pair.where)
            else:
                yield pair
