"""Pairs as tokens: rendered by the checkpoint's template, tokenised, cut, and joined to paths.

A pairs.Pair becomes segments of token ids, which `Dataset.path` joins to conditional sequences:

    bridge sep     x sep l sep w*        (InSPO Eq. 14-15; l without its end token)
    bridge turn    x l turn w*           (IFSR: l ends as an answer does, a user turn brings the
                                          refining instruction, the reply opens)
"""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from hub.template import INSTRUCTIONS, Refused, with_suffix
from jobs.cli import UserError, progress
from losses import Path
from pairs.read import Drops
from rows import lay_out, trie_size

# ----------------------------------------------------------------------------- tokenised pairs

PARTS = ("prompt", "instruct", "chosen", "rejected")


@dataclass
class Example:
    """One tokenised pair. Arrays of ids; an answer that was cut has no end token (closed False).

    instruct: the prompt with the refining instruction as a suffix of the question, where a path
    asks for it; else the prompt again.
    """

    prompt: np.ndarray
    instruct: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    closed: dict  # answer -> bool
    where: str


class Examples:
    """N examples in flat memory, each made an Example when asked for; arrays may be mapped files.

    ids      (all tokens,)  the parts of one example after the other
    starts   (N, 4)         where each of PARTS begins in ids
    lengths  (N, 4)         its tokens
    closed   (N, 2)         whether chosen and rejected have their end token
    where    list of N      "file:row"
    """

    ARRAYS = ("ids", "starts", "lengths", "closed")

    def __init__(self, ids, starts, lengths, closed, where):
        self.ids, self.starts, self.lengths, self.closed = ids, starts, lengths, closed
        self.where = where

    def __len__(self):
        return len(self.where)

    def __getitem__(self, i):
        i = range(len(self))[i]
        spans = zip(self.starts[i].tolist(), self.lengths[i].tolist(), strict=True)
        parts = [self.ids[start : start + length] for start, length in spans]
        chosen, rejected = self.closed[i].tolist()
        return Example(*parts, {"chosen": chosen, "rejected": rejected}, self.where[i])

    @classmethod
    def flat(cls, blocks):
        """Blocks of Example lists -> Examples; holds one block of them at a time."""
        ids, starts, lengths, closed, where, total = [], [], [], [], [], 0
        for block in blocks:
            parts = []
            for e in block:
                own = [e.prompt, e.instruct, e.chosen, e.rejected]
                shared = e.instruct is e.prompt
                at = total + np.cumsum([0, *(0 if shared and i == 1 else len(p)
                                             for i, p in enumerate(own))])  # fmt: skip
                starts.append([at[0], at[0] if shared else at[1], at[2], at[3]])
                lengths.append([len(p) for p in own])
                closed.append([e.closed["chosen"], e.closed["rejected"]])
                where.append(e.where)
                parts += own[:1] + own[2:] if shared else own
                total = int(at[-1])
            ids.append(np.concatenate(parts) if parts else np.empty(0, np.int32))
        table = np.array(starts, np.int64).reshape(-1, 4)
        sizes = np.array(lengths, np.int32).reshape(-1, 4)
        marks = np.array(closed, bool).reshape(-1, 2)
        return cls(np.concatenate([np.empty(0, np.int32), *ids]), table, sizes, marks, where)


@dataclass
class Limits:
    """max_len holds for every path; draft_cap bounds a rejected answer that serves as context."""

    max_len: int
    draft_cap: float
    score_eos: bool = True


class Dataset:
    """Tokenised pairs, and the paths of each as segments.

    recipe: decides which contexts occur (losses.Recipe), and so how long an answer may be.
    stored: (Examples, Drops, cuts) of an earlier run in place of pairs (tokens.py).
    """

    BLOCK = 512  # pairs that are rendered and tokenised at once

    def __init__(
        self, pairs, template, recipe, limits, instruction, sep=None, shown=False, stored=None
    ):
        self.template, self.recipe, self.limits = template, recipe, limits
        self.score = "last" if recipe.objective.head == "reward" else "tokens"
        sep = template.separator() if sep is None else sep
        self.instruction = INSTRUCTIONS.get(instruction, instruction)
        self.sep, self.turn = template.encode([sep, template.turn(self.instruction)])
        if set(self.sep) & set(template.end_ids):
            raise UserError(f"--sep {sep!r} holds the token that ends generation; choose another")
        bridge = len(self.sep) * 2 if recipe.bridge == "sep" else len(self.turn)
        in_context = any(path.context in ("chosen", "rejected") for path in recipe.paths)
        self.bridge_len = bridge + len(template.end_ids) if in_context else 0
        self.in_context = in_context
        self.instructed = any(path.context == "instruct" for path in recipe.paths)
        self.twice = Path("rejected", "rejected") in recipe.paths
        self.drops, self.cuts = Drops(), defaultdict(int)
        if stored is None:
            self.examples = Examples.flat(self._blocks(pairs, shown))
        else:
            self.examples, self.drops, self.cuts = stored
        if not len(self.examples):
            raise UserError(f"no pair is left after tokenisation; dropped: {self.drops}")

    def __len__(self):
        return len(self.examples)

    def _blocks(self, pairs, shown):
        """Lists of Example, a block of pairs at a time; while one is encoded, the next is rendered.

        (The tokenizer works outside the interpreter's lock; templates stay in the main thread.)
        """
        blocks = [pairs[i : i + self.BLOCK] for i in range(0, len(pairs), self.BLOCK)]
        bar = progress("tokenise", len(pairs), "pair", not shown, leave=False)
        with bar, ThreadPoolExecutor(1) as encoder:
            waiting = []
            for block in blocks:
                rendered = [(pair, texts) for pair in block if (texts := self._render(pair))]
                texts = [text for _, texts in rendered for text in texts]
                waiting.append((rendered, encoder.submit(self.template.encode, texts)))
                if len(waiting) > 1:
                    yield self._examples(*waiting.pop(0))
                bar.update(len(block))
            for block in waiting:
                yield self._examples(*block)

    def _examples(self, rendered, encoded):
        """Rendered pairs and the future of their texts' ids -> Examples, cut by the limits."""
        ids, examples = iter(encoded.result()), []
        for pair, texts in rendered:
            prompt, *instruct, chosen, rejected = (next(ids) for _ in texts)
            instruct = instruct[0] if instruct else prompt
            examples.append(self._cut(pair, prompt, instruct, chosen, rejected))
        return [example for example in examples if example is not None]

    def _render(self, pair):
        """Texts of prompt, instructed prompt where a path asks for it, chosen and rejected.

        None where the template refuses the dialogue (a system turn, say), counted with its reason.
        """
        # a reward is read behind all that the template writes, also after the end of turn
        t, closed = self.template, self.score == "tokens" or self.in_context
        try:
            prompt = t.render(pair.prompt, generation=True)
            texts = [prompt]
            if self.instructed:
                texts += [t.render(with_suffix(pair.prompt, self.instruction), generation=True)]
            texts += [t.answer(pair.prompt, pair.chosen, closed, prompt)]
            rejected = pair.rejected and t.answer(pair.prompt, pair.rejected, closed, prompt)
            return [*texts, rejected or ""]
        except Refused as error:
            return self.drops.add(f"the chat template refuses: {error.reason}", pair.where)

    def _cut(self, pair, prompt, instruct, chosen, rejected):
        """Apply the length limits: prompt to at most half, then rejected, then chosen."""
        limits, closed = self.limits, {"chosen": True, "rejected": True}
        answers = (
            len(chosen) + len(rejected) if self.in_context else max(len(chosen), len(rejected))
        )
        room = max(limits.max_len // 2, limits.max_len - self.bridge_len - answers)
        if len(instruct if self.instructed else prompt) > room:
            self.cuts["prompts"] += 1
        shared, refine = instruct is prompt, with_suffix(pair.prompt, self.instruction)
        prompt = self._shorten(pair.prompt, prompt, room)
        instruct = prompt if shared else self._shorten(refine, instruct, room)
        room = limits.max_len - self.bridge_len - max(len(prompt), len(instruct))
        if self.in_context:
            free = room // 2 if self.twice else max(room // 2, room - len(chosen))
            rejected_room = min(int(limits.draft_cap * limits.max_len), free)
            chosen_room = room - min(len(rejected), rejected_room)
        else:
            rejected_room = chosen_room = room
        if len(rejected) > rejected_room:
            rejected, closed["rejected"] = rejected[: max(0, rejected_room)], False
            self.cuts["rejected answers"] += 1
        if len(chosen) > chosen_room:
            chosen, closed["chosen"] = chosen[: max(0, chosen_room)], False
            self.cuts["chosen answers"] += 1
        if not len(prompt):
            return self.drops.add("empty prompt", pair.where)
        example = Example(prompt, instruct, chosen, rejected, closed, pair.where)
        answers = ("chosen",) if pair.rejected is None else ("chosen", "rejected")
        if any(self._scored(getattr(example, a), closed[a]) < 1 for a in answers):
            return self.drops.add("no room for an answer", pair.where)
        return example

    def _shorten(self, messages, ids, room):
        """Drop whole turns from the left (a system turn stays), then tokens from the left."""
        if len(ids) <= room:
            return ids
        system = messages[:1] if messages[0]["role"] == "system" else []
        turns = messages[len(system) :]
        while len(ids) > room and len(turns) > 2:
            turns = turns[2:]
            ids = self.template.encode([self.template.render(system + turns, generation=True)])[0]
        return ids[max(0, len(ids) - room) :]

    def _scored(self, answer, closed):
        """How many of an answer's tokens are scored."""
        return len(answer) - (
            len(self.template.end_ids) if closed and not self.limits.score_eos else 0
        )

    def path(self, i, path):
        """Segments of `path` for pair i, and how many tokens of the last one are scored."""
        example = self.examples[i]
        if path.context == "instruct" and not self.instructed:
            raise ValueError(f"{path}: the recipe of this dataset has no instructed path")
        segments = [example.instruct if path.context == "instruct" else example.prompt]
        if path.context in ("chosen", "rejected"):
            segments += self._bridged(example, path.context)
        if path.target == "mismatched":  # KTO: the next pair's chosen answer
            other = self.examples[(i + 1) % len(self.examples)]
            room = self.limits.max_len - sum(map(len, segments))
            target, closed = other.chosen[: max(1, room)], other.closed["chosen"]
            closed = closed and len(other.chosen) <= room
        else:
            target, closed = getattr(example, path.target), example.closed[path.target]
        return [*segments, target], self._scored(target, closed)

    def _bridged(self, example, context):
        """The segments from a context answer to the opening of the next reply."""
        answer, closed = getattr(example, context), example.closed[context]
        end = self.template.end_ids
        if self.recipe.bridge == "turn":
            return [answer, self.turn] if closed else [answer, end, self.turn]
        return [self.sep, answer[: len(answer) - len(end)] if closed else answer, self.sep]

    def trie(self, i, paths):
        """rows.Trie of these paths of pair i."""
        return lay_out([self.path(i, path) for path in paths], self.score)

    def size(self, i, paths):
        """Tokens of that trie."""
        return trie_size([self.path(i, path) for path in paths])

    def report(self):
        """One line on what the limits did."""
        cuts = ", ".join(f"{n} {what}" for what, n in self.cuts.items()) or "none"
        return f"{len(self)} pairs; cut: {cuts}; dropped: {self.drops}"


def plain_paths(recipe):
    """The prompt-only paths: what is deployed, and validated beside the conditioned ones."""
    return [Path(None, answer) for answer in recipe.objective.answers]
