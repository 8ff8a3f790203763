"""Holds tokenised pairs in a few flat arrays: what data.Dataset makes and the token cache keeps."""

from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

PARTS = ("prompt", "instruct", "chosen", "rejected", "bridged_chosen", "bridged_rejected")
ANSWER_PARTS = ("chosen", "rejected")
SAME = {"instruct": "prompt", "bridged_chosen": "chosen", "bridged_rejected": "rejected"}


class Example(NamedTuple):
    """The token ids of one pair, within the limits."""

    prompt: np.ndarray
    instruct: np.ndarray  # the prompt with the refining instruction, or the prompt itself
    chosen: np.ndarray
    rejected: np.ndarray
    bridged_chosen: np.ndarray  # behind a bridge; other ids than behind a prompt where a
    bridged_rejected: np.ndarray  # SentencePiece tokenizer puts its mark at one of the two only
    closed: dict  # answer -> whether it has its end token; one that was cut has none
    where: str  # "file:row"
    crc: int  # checksum of the whole prompt, before any cut: tells which pairs share one

    def answer(self, name, bridged):
        """-> (ids of "chosen" or "rejected", whether it has its end token)."""
        return getattr(self, f"bridged_{name}" if bridged else name), self.closed[name]


@dataclass
class Examples:
    """N Examples in a few flat arrays, which may be files mapped into memory.

    A list of small arrays would take several times the memory of the ids, once in each process.
    """

    ids: np.ndarray  # (all tokens,) the PARTS of one example after the other
    starts: np.ndarray  # (N,) where each example begins in ids
    lengths: np.ndarray  # (N, 6) tokens of each of its PARTS; 0: the part that it is the SAME as
    closed: np.ndarray  # (N, 2) whether chosen and rejected have their end token
    crc: np.ndarray  # (N,) checksums of the whole prompts
    where: list  # N places "file:row"

    def __len__(self):
        return len(self.where)

    def __getitem__(self, i):
        i = range(len(self))[i]  # IndexError where there is none: a for loop ends by it
        end, parts = self.starts[i].item(), {}  # Python's numbers: numpy's are slower one by one
        for part, length in zip(PARTS, self.lengths[i].tolist(), strict=True):
            view = self.ids[end : end + length]  # nothing is copied
            parts[part] = view if length else parts.get(SAME.get(part), view)
            end += length
        closed = dict(zip(("chosen", "rejected"), self.closed[i].tolist(), strict=True))
        return Example(**parts, closed=closed, where=self.where[i], crc=self.crc[i])

    @classmethod
    def flat(cls, examples):
        """A list of Example -> Examples."""
        none = np.empty(0, np.int32)
        parts = [[none if getattr(e, SAME.get(part, ""), none) is ids else ids
                  for part, ids in zip(PARTS, e, strict=False)] for e in examples]  # fmt: skip
        lengths = [[len(part) for part in own] for own in parts]
        lengths = np.array(lengths, np.int32).reshape(-1, len(PARTS))  # also where N is 0
        sizes = lengths.sum(1, dtype=np.int64)  # (N,)
        closed = [[e.closed["chosen"], e.closed["rejected"]] for e in examples]
        closed = np.array(closed, bool).reshape(-1, 2)  # (N, 2)
        ids = np.concatenate([none, *chain.from_iterable(parts)])
        crc, where = np.array([e.crc for e in examples], np.int64), [e.where for e in examples]
        return cls(ids, sizes.cumsum() - sizes, lengths, closed, crc, where)
