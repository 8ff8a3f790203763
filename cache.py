"""Scores kept on disk, addressed by what they depend on: the model and the tokens."""

import hashlib
import json
from pathlib import Path

from cli import UserError
from weights import Weights


class ScoreCache:
    """DIR/<digest of the model>.jsonl, one line [digest of the tokens, score] per answer.

    The model's digest covers weights, config, dtype and device type. A line that was cut off is
    skipped, and its score computed again.
    """

    def __init__(self, directory, model, source):
        weight = model.embed.weight
        sha = hashlib.sha256(Weights(source).digest().encode())
        sha.update((Path(source) / "config.json").read_bytes())
        sha.update(f"{weight.dtype} {weight.device.type}".encode())
        self.file = Path(directory) / f"{sha.hexdigest()}.jsonl"
        self.scores = {}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            for line in self.file.read_text("utf-8").split("\n") if self.file.exists() else []:
                self._read(line)
        except OSError as error:
            raise UserError(f"--cache {directory}: {error.strerror}") from error

    def _read(self, line):
        try:
            key, score = json.loads(line)
            self.scores[key] = float(score)
        except (ValueError, TypeError):
            pass

    def get(self, tokens):
        """The score of an answer's tokens, as bytes; None where there is none."""
        return self.scores.get(digest(tokens))

    def add(self, scores):
        """Keep {tokens as bytes: score}, in memory and in the file."""
        new = {digest(tokens): score for tokens, score in scores.items()}
        self.scores |= new
        with open(self.file, "a", encoding="utf-8") as f:
            f.write("\n" + "".join(json.dumps(item) + "\n" for item in new.items()))


def digest(tokens):
    return hashlib.sha256(tokens).hexdigest()
