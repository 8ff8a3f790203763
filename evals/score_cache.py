"""Scores kept on disk, addressed by what they depend on: the model and the tokens."""

import hashlib
from pathlib import Path

from hub.weights import Weights
from jobs.cli import UserError
from jobs.files import Journal


class ScoreCache:
    """DIR/<digest of the model>.jsonl, one line [digest of the tokens, score] per answer.

    The model's digest covers weights, config, dtype and device type.
    """

    def __init__(self, directory, model, source):
        weight = model.embed.weight
        sha = hashlib.sha256(Weights(source).digest().encode())
        sha.update((Path(source) / "config.json").read_bytes())
        sha.update(f"{weight.dtype} {weight.device.type}".encode())
        self.journal = Journal(Path(directory) / f"{sha.hexdigest()}.jsonl", "--cache")
        self.scores = {}
        for where, row in self.journal.rows:
            try:
                key, self.scores[key] = row
            except (TypeError, ValueError) as error:
                raise UserError(f"{where}: no row of a score cache; move it away") from error

    def get(self, tokens):
        """The score of an answer's tokens, as bytes; None where there is none."""
        return self.scores.get(digest(tokens))

    def add(self, scores):
        """Keep {tokens as bytes: score}, in memory and in the file."""
        for tokens, score in scores.items():
            self.scores[digest(tokens)] = score
            self.journal.append([digest(tokens), score])


def digest(tokens):
    return hashlib.sha256(tokens).hexdigest()
