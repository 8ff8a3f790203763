"""Reads judges' verdicts: one table of labels, one parser, for every benchmark.

A judge argues and then names its verdict in brackets, [[A>B]] or [[7]]. It may name others on the
way ("at first sight [[A>B]], but …"), so the last one in a text counts.
"""

import re

STRONG = 3  # how often a strong verdict counts in Arena-Hard

VERDICTS = {  # label -> (score of A, weight)
    "A>>B": (1.0, STRONG),
    "A>B": (1.0, 1),
    "A=B": (0.5, 1),
    "B>A": (0.0, 1),
    "B>>A": (0.0, STRONG),
}
SPELLINGS = {"A<<B": "B>>A", "A<B": "B>A", "B=A": "A=B", "B<A": "A>B", "B<<A": "A>>B"}
LETTERS = {"A": "A>B", "B": "B>A", "C": "A=B"}  # MT-Bench's [[A]], [[B]], and [[C]] for a tie


def to_label(text):
    """A label as VERDICTS has it, of that or its mirrored spelling; None for anything else."""
    label = SPELLINGS.get(text, text)
    return label if label in VERDICTS else None


def read_verdict(text):
    """The label of the last verdict in a judge's text; None where there is none.

    In doubled brackets, or in single ones where there are no doubled, as Arena-Hard reads it.

    >>> read_verdict("[[A>B]]? No. My final verdict is: [[B>>A]].")
    'B>>A'
    """
    found = _last(text.upper(), r"\[\[\s*([ABC<>=]+)\s*\]\]", r"\[([AB][<>=]+[AB])\]")
    return found and to_label(LETTERS.get(found, found))


def read_grade(text):
    """The last [[7]] or [[7.5]] of a judge's text, else its last [7]; None if not from 1 to 10."""
    found = _last(text, r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]")
    return float(found) if found and 1 <= float(found) <= 10 else None


def _last(text, *patterns):
    """What the first of the patterns that occurs in a text finds last."""
    every = (re.findall(pattern, text) for pattern in patterns)
    return next((found[-1] for found in every if found), None)
