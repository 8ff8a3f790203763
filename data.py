"""Turns preference pairs into rows of tokens for the model, and plans which pairs make up a step.

    pair    prompt, chosen and rejected answer, as texts                  Pair
    ids     each of them rendered by the chat template and tokenised      pairs.examples.Example
    paths   what is scored behind what, as segments of ids                Dataset.path
    trie    all paths of one pair, each shared prefix stored once         lay_out
    row     many tries in one sequence, as the model reads it             build_row
    plan    which pairs make up step t, and on which rows they fall       Plan, pack

A path names one conditional log-probability, log pi(last segment | all segments before it). The
paths of a pair share long prefixes, so they are inserted into a trie of segments. Here is that of
the averaged objective with the dialogue-turn bridge, one token per segment; * is scored:

    x -+- w* - turn - l*          tokens     x  w  turn l  l  turn w
       |                          until      7  4  4    4  7  7    7
       +- l* - turn - w*          positions  0  1  2    3  1  2    3

Four paths (x w*, x l*, x w turn l*, x l turn w*) of 12 tokens became 7. The trie is laid out in
pre-order: a token is followed by its whole subtree, which ends before index `until`. So one rule
for attention is causality, document boundaries and isolation of the branches at once:

    q sees k  iff  k <= q < until[k]          (k stands before q, and q in the subtree of k)

Legend: N pairs of a dataset, T row tokens, S scored tokens, B pairs of a row, P paths per pair;
x prompt, w chosen ("winning") answer, l rejected ("losing") answer.
"""

import heapq
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch

from hub.template import INSTRUCTIONS, PROBE, Refused, with_suffix
from hub.template import Template as Template
from jobs.cli import UserError, progress
from losses import Path
from pairs.examples import ANSWER_PARTS, Example, Examples
from pairs.layouts import Pair as Pair
from pairs.read import Drops
from pairs.read import read_pairs as read_pairs


class Bridge(NamedTuple):
    """What stands before and after an answer that is the context of another one.

    before, after: texts in which {sep} is replaced by InSPO's separator (--sep), and {turn} by what
    the chat template writes from the end of an answer to the opening of the next reply, when the
    user asks for another one by IFSR's refining instruction (--instruction).
    ended: whether the context answer keeps its end token.
    """

    before: str
    after: str
    ended: bool


BRIDGES = {  # --bridge; a new row here is a new bridge
    "sep": Bridge("{sep}", "{sep}", ended=False),  # x sep l sep w*      InSPO Eq. 14-15
    "turn": Bridge("", "{turn}", ended=True),  #     x l turn w*         IFSR Eq. 4
}


def open_bridge(name, template, instruction, sep=None):
    """A row of BRIDGES in a template's words -> (Bridge of texts, ids before, ids after).

    sep: None takes the template's separator; "" is one too.
    """
    if name not in BRIDGES:
        raise UserError(f"--bridge {name}: unknown; choose from {', '.join(BRIDGES)}")
    sep = template.separator() if sep is None else sep
    if set(template.encode([sep])[0]) & set(template.end_ids):
        raise UserError(f"--sep {sep!r} holds the token that ends generation; choose another")
    *texts, ended = BRIDGES[name]
    known = {"sep": sep, "turn": template.turn(instruction)}
    told = Bridge(*(text.format(**known) for text in texts), ended)
    (before,) = template.encode([told.before], behind=template.opening)
    (after,) = template.encode([told.after], behind=template.end if ended else PROBE)
    return told, before, after


# ----------------------------------------------------------------------------- tokenised pairs


class Limits(NamedTuple):
    """What is cut, and whether the end token of an answer is scored."""

    max_len: int  # tokens of any single path
    draft_cap: float  # share of max_len that a rejected answer may take where it is a context
    score_eos: bool = True


class Dataset:
    """Tokenised pairs, and the paths of each as segments of ids.

    recipe: losses.Recipe, whose paths decide which texts are needed and how long they may be.
    instruction: a key of INSTRUCTIONS or a text. sep: None takes the template's separator.
    stored: what `stored` gave in an earlier run, in place of pairs. shown: a progress bar.
    seed: of the order in which KTO borrows answers.
    drops: pairs without an Example, by reason. cuts: how many prompts and answers were shortened.
    """

    BLOCK = 512  # pairs that are rendered and tokenised at once

    def __init__(self, pairs, template, recipe, limits, instruction, sep=None, shown=False,
                 stored=None, seed=0):  # fmt: skip
        self.template, self.recipe, self.limits, self.seed = template, recipe, limits, seed
        self.score = "last" if recipe.objective.head == "reward" else "tokens"
        self.instruction = INSTRUCTIONS.get(instruction, instruction)
        contexts = {path.context for path in recipe.paths}
        self.in_context = bool(contexts & {"chosen", "rejected"})
        self.instructed = "instruct" in contexts
        self.twice = {p.target for p in recipe.paths if p.context == p.target}  # on one path
        self._bridge(sep)
        self.drops, self.cuts = Drops(), defaultdict(int)
        if stored is None:
            self.examples = Examples.flat(list(self._tokenised(pairs, shown)))
        else:
            arrays, facts = stored
            self.examples = Examples(**arrays, where=facts["where"])
            self.drops, self.cuts = Drops(**facts["drops"]), facts["cuts"]
        if not len(self.examples):
            raise UserError(f"no pair is left after tokenisation; dropped: {self.drops}")

    @classmethod
    def of(cls, s, pairs, template, recipe, **options):
        """The Dataset of these pairs under the settings of a command (jobs.cli.PathFlags)."""
        limits = Limits(s.max_len, s.draft_cap, s.score_eos)
        return cls(pairs, template, recipe, limits, s.instruction, s.sep, **options)

    def __len__(self):
        return len(self.examples)

    def stored(self):
        """What the token cache keeps of it -> ({name: array}, facts for JSON)."""
        arrays = dict(vars(self.examples))
        facts = {"where": arrays.pop("where"), "cuts": self.cuts, "drops": vars(self.drops)}
        return arrays, facts

    def _bridge(self, sep):
        """Tokenises what stands before and after a context answer, and counts its tokens."""
        t, end = self.template, self.template.end_ids
        told, self.before, self.after = open_bridge(self.recipe.bridge, t, self.instruction, sep)
        before, after, self.ended = told
        asked = ("prompt", "instruct") if self.instructed else ("prompt",)
        self.behind = dict.fromkeys(asked, "") | dict.fromkeys(ANSWER_PARTS, t.opening)
        # where the context answer and the scored one are encoded otherwise than behind a prompt
        places = {"context": before or t.opening, "target": after}
        self.places = {k: text for k, text in places.items() if not t.alike(text, t.opening)}
        self.rewritten = self.ended and t.rewrites and self.in_context
        if self.rewritten:
            self.places["context"] = places["context"]
        self.behind |= {f"bridged_{a}": p for p in self.places.values() for a in ANSWER_PARTS}
        by_token = self.in_context and self.recipe.objective.by_token
        if by_token and self.recipe.reference == "plain" and "target" in self.places:
            fault = "compares answers with the reference's token by token, but this tokenizer gives"
            fault = f"--loss {self.recipe.name} {fault} them other tokens behind the bridge"
            raise UserError(f"{fault} than behind the prompt; --reference conditioned")
        bridge = len(self.before) + len(self.after) + len(end)  # a cut context may need its end
        self.bridge_len = bridge if self.in_context else 0

    # ------------------------------------------------------------------------- texts to ids

    def _tokenised(self, pairs, shown):
        """Yields the Examples; while one block of pairs is encoded, the next is rendered.

        The tokenizer works outside of Python's lock; templates stay in the main thread, where a
        signal can stop one that never ends.
        """
        bar = progress("tokenise", len(pairs), "pair", not shown, leave=False)
        with bar, ThreadPoolExecutor(1) as encoder:
            waiting = [], encoder.submit(list)  # nothing is before the first block
            for start in range(0, len(pairs) + self.BLOCK, self.BLOCK):  # the last one is empty
                block = pairs[start : start + self.BLOCK]
                rendered = [(pair, texts) for pair in block if (texts := self._render(pair))]
                # hand this block to the tokenizer's thread, then wait for the one before
                last, waiting = waiting, (rendered, encoder.submit(self._encode, rendered))
                both = zip(last[0], last[1].result(), strict=True)
                yield from filter(None, (self._cut(pair, ids) for (pair, _), ids in both))
                bar.update(len(block))

    def _render(self, pair):
        """{part: text}: prompt, instructed prompt where a path asks for it, chosen and rejected.

        None where the template refuses the dialogue (a system turn, say), counted with its reason.
        """
        # a reward is read behind all that the template writes, also after the end of turn
        t, closed = self.template, self.score == "tokens" or self.in_context
        try:
            prompt = t.render(pair.prompt, generation=True)
            texts = {"prompt": prompt}
            if self.instructed:
                texts["instruct"] = t.render(with_suffix(pair.prompt, self.instruction), True)
            for part in (part for part in self.behind if part not in ("prompt", "instruct")):
                text = getattr(pair, part.removeprefix("bridged_"))
                followed = self.rewritten and part not in ANSWER_PARTS
                known = text is not None  # supervised training has no rejected answer
                texts[part] = t.answer(pair.prompt, text, closed, prompt, followed) if known else ""
            return texts
        except Refused as error:
            return self.drops.add(f"the chat template refuses: {error.reason}", pair.where)

    def _encode(self, rendered):
        """Tokenises what `_render` gave of some pairs -> {part: ids} of each."""
        columns = [self.template.encode((texts[part] for _, texts in rendered), behind)
                   for part, behind in self.behind.items()]  # fmt: skip
        return [dict(zip(self.behind, ids, strict=True)) for ids in zip(*columns, strict=True)]

    def _cut(self, pair, ids):
        """Shortens the prompt to at least half of max_len, then the rejected, then the chosen one.

        ids: what `_encode` gave. Answers lose their right end. -> Example, or None where nothing is
        left to be scored.
        """
        prompts = [ids.pop(part) for part in ("prompt", "instruct") if part in ids]
        both = [max(len(ids[part]) for part in ids if part.endswith(name)) for name in ANSWER_PARTS]
        crc = crc32(prompts[0])
        free = self.limits.max_len - self.bridge_len
        room = max(self.limits.max_len // 2, free - (sum(both) if self.in_context else max(both)))
        if len(prompts[-1]) > room:
            self.cuts["prompts"] += 1
        dialogues = pair.prompt, with_suffix(pair.prompt, self.instruction)
        prompts = list(map(self.template.shortened, dialogues, prompts, (room, room)))
        if not all(map(len, prompts)):  # nothing would predict the answer's first token
            return self.drops.add("no room for a question", pair.where)
        room = free - max(map(len, prompts))  # what is left for the answers
        rooms = self._rooms(room, *both) if self.in_context else (room, room)
        kept, closed = {}, {}
        for name, size, room in zip(ANSWER_PARTS, both, reversed(rooms), strict=True):
            closed[name], over = size <= room, max(0, size - room)
            for part in (part for part in ids if part.endswith(name)):
                kept[part] = ids[part][: max(0, len(ids[part]) - over)]
            if not closed[name]:
                self.cuts[f"{name} answers"] += 1
        scored = ANSWER_PARTS[: 1 if pair.rejected is None else 2]
        if any(self._scored(kept[name], closed[name]) < 1 for name in scored):
            return self.drops.add("no room for an answer", pair.where)
        n = min(len(kept[name]) for name in ANSWER_PARTS)  # the rest was trimmed or cut off
        if pair.rejected is not None and (kept["chosen"][:n] == kept["rejected"][:n]).all():
            return self.drops.add("identical answers", pair.where)
        kept = {f"bridged_{name}": kept[name] for name in ANSWER_PARTS} | kept
        return Example(prompts[0], prompts[-1], **kept, closed=closed, where=pair.where, crc=crc)

    def _rooms(self, room, chosen, rejected):
        """Most tokens of the rejected and of the chosen answer, which share `room` on one path.

        chosen, rejected: their lengths. The chosen one may take what the rejected one leaves.
        """
        half = room // 2 if "rejected" in self.twice else max(room // 2, room - chosen)
        capped = min(int(self.limits.draft_cap * self.limits.max_len), half)
        left = room - min(rejected, capped)
        return capped, min(left, room // 2) if "chosen" in self.twice else left

    def _scored(self, answer, closed):
        """How many of an answer's tokens are scored: all, or all but its end token (InSPO C.1)."""
        unscored = len(self.template.end_ids) if closed and not self.limits.score_eos else 0
        return len(answer) - unscored

    # ------------------------------------------------------------------------- ids to paths

    def path(self, i, path):
        """Joins the segments of a losses.Path for pair i.

        -> (list of id arrays, how many tokens of the last one are scored, from its first on).
        """
        example = self.examples[i]
        if path.context == "instruct" and not self.instructed:
            raise ValueError(f"{path}: the recipe of this dataset has no instructed path")
        segments = [example.instruct if path.context == "instruct" else example.prompt]
        bridged = path.context in ANSWER_PARTS and "target" in self.places
        if path.context in ANSWER_PARTS:
            segments += self._bridged(example, path.context)
        elif path.context not in (None, "instruct"):
            raise ValueError(f"{path}: unknown context; give None, instruct, chosen or rejected")
        if path.target == "mismatched":  # KTO: an answer to another prompt, whatever its length
            room = self.limits.max_len - sum(map(len, segments))
            target, closed = self.examples[self.mismatched[i]].answer("chosen", bridged)
            target, closed = target[: max(1, room)], closed and len(target) <= room
        else:
            target, closed = example.answer(path.target, bridged)
        return [*segments, target], self._scored(target, closed)

    @cached_property
    def mismatched(self):
        """(N,) the pair whose chosen answer KTO scores behind each prompt: one of another prompt.

        It is the next such pair in the order of the first epoch. In the file's order neighbours
        often share a prompt, and all of them would borrow the same answer.
        """
        order = permutation(len(self), self.seed, 0)
        prompts = self.examples.crc[order]
        last = np.flatnonzero(prompts != np.roll(prompts, -1))  # pairs before one of another prompt
        if not len(last):
            fault = f"{self.examples.where[0]}: all {len(self)} pairs have the same prompt"
            raise UserError(f"{fault}; KTO needs answers to other prompts, too")
        after = last[np.searchsorted(last, np.arange(len(self))) % len(last)] + 1  # round the end
        return order[after % len(self)][np.argsort(order)]

    def _bridged(self, example, context):
        """The segments from the end of the prompt to the opening of the answer that is scored.

        A context answer that ends as it does where it is scored is the very same segment there, so
        that the trie stores it once.
        """
        answer, closed = example.answer(context, "context" in self.places)
        end, ending = self.template.end_ids, []
        if self.ended and not closed and self.template.ends_in_turn:  # a cut one is ended again
            ending = [end]
        elif closed and not self.ended:
            answer = answer[: len(answer) - len(end)]
        return [s for s in (self.before, answer, *ending, self.after) if len(s)]

    def trie(self, i, paths):
        """The Trie of these paths of pair i."""
        return lay_out([self.path(i, path) for path in paths], self.score)

    def size(self, i, paths):
        """Counts the tokens of that trie, without laying it out."""
        return trie_size([self.path(i, path) for path in paths])

    def report(self):
        """One line on what the limits did."""
        cuts = ", ".join(f"{n} {what}" for what, n in self.cuts.items()) or "none"
        return f"{len(self)} pairs; cut: {cuts}; dropped: {self.drops}"


def plain_paths(recipe):
    """The prompt-only paths: what is deployed, and validated beside the conditioned ones."""
    return [Path(None, answer) for answer in recipe.objective.answers]


# ----------------------------------------------------------------------------- paths to a trie


@dataclass
class Trie:
    """The paths of one pair, laid out in pre-order; integer vectors as described in `Row`."""

    tokens: list = field(default_factory=list)
    positions: list = field(default_factory=list)
    until: list = field(default_factory=list)
    source: list = field(default_factory=list)
    label: list = field(default_factory=list)
    path: list = field(default_factory=list)

    def __len__(self):
        return len(self.tokens)


def lay_out(paths, score="tokens"):
    """Inserts paths into a trie of segments and lays it out in pre-order -> Trie.

    paths: list of (segments, n): segments are int arrays from the root on, and the first n tokens
    of the last one are scored. score="last" scores each path once, at its last token (for a
    reward head). Equal prefixes, compared segment by segment, are stored once. The first segment
    must not be empty: every scored token needs a token before it.
    """
    trie, children = Trie(), {}  # children: bytes of a segment -> (segment, its children, ends)
    for p, (segments, n) in enumerate(paths):
        branches = children  # of the root, which holds no token
        for segment in segments:
            if len(segment):
                _, branches, ends = branches.setdefault(segment.tobytes(), (segment, {}, []))
        ends.append((p, n))  # path p ends at this node, and n tokens of it are scored
    _walk(trie, children, depth=0, parent=-1, score=score)
    return trie


def _walk(trie, children, depth, parent, score):
    """Appends the subtrees of one node, whose last token stands at `parent`, in pre-order."""
    for segment, branches, ends in children.values():
        start, size = len(trie), len(segment)
        trie.tokens.extend(segment.tolist())
        trie.positions.extend(range(depth, depth + size))
        trie.until.extend([0] * size)  # known once the subtree is written
        for p, n in ends:
            # a token is predicted by the one before it: the segment's first by the parent's last,
            # which need not be the token before it in the row
            source, label = [parent, *range(start, start + n - 1)][:n], segment[:n].tolist()
            if score == "last":
                source, label = [start + size - 1], [0]
            trie.source += source
            trie.label += label
            trie.path += [p] * len(source)
        _walk(trie, branches, depth + size, start + size - 1, score)
        trie.until[start : start + size] = [len(trie)] * size  # the whole subtree is behind it


def trie_size(paths):
    """Counts the tokens of the trie that `lay_out(paths)` would make."""
    sizes = {}  # {all segments down to a node: tokens of that node}
    for segments, _ in paths:
        key = ()
        for segment in segments:
            if len(segment):
                key = (*key, segment.tobytes())
                sizes[key] = len(segment)
    return sum(sizes.values())


# ----------------------------------------------------------------------------- tries to a row


@dataclass
class Row:
    """Several tries in one sequence, as the model reads it."""

    tokens: torch.Tensor  # (T,) ids
    positions: torch.Tensor  # (T,) distance from the root along the token's own path, for RoPE
    until: torch.Tensor  # (T,) the index just past the token's subtree
    source: torch.Tensor  # (S,) the row index whose hidden state predicts the scored token
    label: torch.Tensor  # (S,) the id to be predicted
    path: torch.Tensor  # (S,) the log-probability it adds to: pair of the row * P + path
    spans: list  # (start, end) of each trie
    pairs: list  # B dataset indices
    n_paths: int  # P

    def to(self, device):
        """The same row with its vectors on `device`."""
        values = vars(self).values()
        return Row(*(v.to(device) if torch.is_tensor(v) else v for v in values))

    def sums(self, values):
        """(S,) values of the scored tokens -> (B, P) sums per pair and path."""
        # index_add, as backward only gathers, and no (S, B * P) one-hot matrix is made
        total = values.new_zeros(len(self.pairs) * self.n_paths)  # (B * P,)
        return total.index_add(0, self.path, values).view(len(self.pairs), self.n_paths)  # (B, P)

    def by_token(self, values, longest=None):
        """(S,) values of the scored tokens -> (B, P, longest) by path, 0 behind its last token."""
        counts = self.counts()  # (B, P)
        longest = longest or (int(counts.max()) if self.pairs else 0)
        there = torch.arange(longest, device=counts.device) < counts[..., None]  # (B, P, longest)
        # sorted by path, the tokens of each as they stand: so the mask's places are filled
        order = self.path.argsort(stable=True)
        return values.new_zeros(there.shape).masked_scatter(there, values[order])

    def counts(self):
        """(B, P) number of scored tokens."""
        return self.sums(torch.ones_like(self.path, dtype=torch.float32))


def build_row(tries, pairs, n_paths, pad_to=0):
    """Concatenates tries to a Row of at least `pad_to` tokens; padding sees only itself.

    pairs: the dataset's index of each trie. A row without tries gets one padding token: all ranks
    must run equally many rows, or the collectives of FSDP wait forever.
    """
    whole, spans = Trie(), []
    for i, trie in enumerate(tries):
        start = len(whole)
        whole.tokens += trie.tokens
        whole.positions += trie.positions
        whole.until += [start + u for u in trie.until]  # row indices from trie indices
        whole.source += [start + s for s in trie.source]
        whole.label += trie.label
        whole.path += [i * n_paths + p for p in trie.path]
        spans.append((start, len(whole)))
    padding = range(len(whole), max(pad_to, len(whole), 1))  # until k + 1: sees itself alone
    whole.tokens += [0] * len(padding)
    whole.positions += [0] * len(padding)
    whole.until += [k + 1 for k in padding]
    spans = spans or [(0, 1)]  # no kernel runs on nothing
    tensors = {name: torch.tensor(column, dtype=torch.long) for name, column in vars(whole).items()}
    return Row(**tensors, spans=spans, pairs=list(pairs), n_paths=n_paths)


def pack(sizes, row_tokens, multiple=1):
    """Distributes items over as few rows as hold them, evenly: longest first, to the emptiest row.

    sizes: tokens per item. Returns a list of rows (lists of item numbers); their number is a
    multiple of `multiple` (the ranks), and no row is over `row_tokens`.
    """
    n_rows = max(1, -(-sum(sizes) // row_tokens))  # -(-a // b) rounds up
    n_rows = -(-n_rows // multiple) * multiple
    while True:  # with more and more rows, until all fit
        rows, longest = spread_items(sizes, n_rows)
        if longest <= row_tokens:
            return rows
        if n_rows >= len(sizes):
            raise ValueError(f"an item of {max(sizes)} tokens does not fit {row_tokens}")
        n_rows += multiple


def spread_items(sizes, n_rows):
    """Distributes items over so many rows -> (rows of item numbers, tokens of the longest row)."""
    rows = [[] for _ in range(n_rows)]
    heap = [(0, r) for r in range(n_rows)]  # (tokens so far, row): the emptiest on top
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):  # the same on every rank
        filled, r = heapq.heappop(heap)
        rows[r].append(i)
        heapq.heappush(heap, (filled + sizes[i], r))
    return rows, max(filled for filled, _ in heap)


@torch.no_grad()
def scored_rows(model, trie, sizes, n_paths, row_tokens=None, label="score"):
    """Runs N items through the model in rows, in one process; yields (items, row, values).

    trie(n) makes the Trie of item n, of sizes[n] tokens. items: which of the N the row holds;
    values: (S,) what the model gives its scored tokens. row_tokens: longest row, unless one item
    is longer; None: by the device.
    """
    device = model.embed.weight.device
    row_tokens = row_tokens or (8192 if device.type == "cuda" else 2048)  # enough to keep it busy
    with progress(label, len(sizes), "item", label is None, leave=False) as bar:
        for items in pack(sizes, max(row_tokens, *sizes)):
            row = build_row([trie(n) for n in items], items, n_paths).to(device)
            yield items, row, model(row)
            bar.update(len(items))


def path_sums(model, trie, sizes, n_paths, row_tokens=None, label="score"):
    """Sums over each path's values of scored_rows, and their numbers: (N, P) each, on CPU."""
    sums = torch.zeros(len(sizes), n_paths)  # (N, P)
    counts = torch.zeros_like(sums)
    for items, row, values in scored_rows(model, trie, sizes, n_paths, row_tokens, label):
        sums[items], counts[items] = row.sums(values).cpu(), row.counts().cpu()
    return sums, counts


class Plan(NamedTuple):
    """Which pairs make up step t: a pure function of (n_pairs, batch, seed, t).

    The stream of pairs is one random permutation of the dataset per epoch, end to end; step t
    takes the next `batch` of it. A last step may be smaller, so that no pair is left out. Nothing
    is remembered, so that a run that resumes at step t needs t alone.
    """

    n_pairs: int
    batch: int
    seed: int
    epochs: float
    max_steps: int | None = None  # in place of epochs

    @property
    def total(self):
        """Pairs of the whole run."""
        if self.max_steps is not None:
            return self.max_steps * self.batch
        return round(self.epochs * self.n_pairs)

    @property
    def steps(self):
        return -(-self.total // self.batch)  # rounded up

    def pairs(self, step):
        """Dataset indices of the pairs of this step, counted from 0."""
        # places in the stream; the k-th is the (k mod N)-th pair of epoch k div N
        stream = range(step * self.batch, min((step + 1) * self.batch, self.total))
        epochs = ((k // self.n_pairs, k % self.n_pairs) for k in stream)
        return [int(permutation(self.n_pairs, self.seed, epoch)[k]) for epoch, k in epochs]

    def epoch(self, step):
        """Passes over the dataset completed after this step, as a fraction."""
        return min((step + 1) * self.batch, self.total) / self.n_pairs


@lru_cache(maxsize=4)  # a step may take the end of one epoch and the beginning of the next
def permutation(n, seed, epoch):
    """The order of the dataset in one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)  # (n,)
