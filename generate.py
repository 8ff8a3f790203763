"""Generate answers: `python generate.py --model DIR --prompt TEXT` or `--data FILE --out FILE`.

From the bottom up: a token is drawn from logits (nucleus sampling), a key/value cache makes a step
cost one token per sequence, a queue keeps the rows of a batch busy, and on top of it stand IFSR's
three ways to ask for an answer (section 3.1), x the dialogue and i the instruction:

    plain       x -> y
    instruct    x, i -> y             i as a suffix of the last user turn
    refine      x, y', i -> y         a draft y' (generated as in plain, or brought along) and
                                      one more user turn i, or another --bridge, joined token by
                                      token as in training

A question of several turns (MT-Bench) is asked so at each of them, behind the answers before. A
server (--endpoint, hub/endpoint.py) may answer in place of the sampler, and should where much is
asked of a large model: vLLM schedules better than this loop.

Legend: B sequences at work, T new tokens of each, H heads, K key/value heads, G = H / K,
C head width, U slots in use, D width, V vocabulary, N candidates.
"""

import jobs.waiting  # noqa: F401  # isort: skip  (before torch loads OpenMP)
import math
import os
import sys
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers.decoders import DecodeStream

from data import BRIDGES, open_bridge
from hub.benchmarks import ANSWER_FORMATS, refuse_twins, token_counter, write_answers
from hub.endpoint import Endpoint, RequestRefused, public, together
from hub.template import INSTRUCTIONS, Refused, Template, open_template, with_suffix
from hub.weights import pinned
from jobs import cli
from jobs.cli import UserError, flag, parse, progress, run
from jobs.files import Shared, read_json, to_line
from kernels import chains
from model import load
from pairs.asks import Ask, read_asks


class Sampling(NamedTuple):
    """How tokens are drawn, and when a sequence ends."""

    max_new_tokens: int = 2048
    temperature: float = 0.7  # divides the logits; 0: the likeliest token
    top_p: float = 0.95  # mass of the nucleus that tokens are drawn from
    stop_ids: frozenset = frozenset()


def draw_tokens(logits, uniforms, sampling):
    """Nucleus sampling (Holtzman et al. 2020): (B, V) logits -> (B,) token ids.

    The nucleus is the smallest set of likeliest tokens that holds top_p of the probability mass.
    uniforms: (B,) random numbers in [0, 1), one per sequence.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / sampling.temperature).softmax(-1)  # (B, V)
    top, ids = candidates(probs, sampling.top_p)  # (B, N), likeliest first if not all count
    # a token is in the nucleus if the tokens before it do not fill it yet
    keep = top.cumsum(-1) - top < sampling.top_p
    # Inverse CDF: on a line where every token of the nucleus takes a stretch as long as its
    # probability, u times the whole length falls into the stretch of token k with probability
    # p_k / sum(p). One number per sequence is all the randomness that a draw needs.
    mass = (top * keep).cumsum(-1)
    place = torch.searchsorted(mass, uniforms[:, None] * mass[:, -1:], right=True)  # (B, 1)
    place = place.minimum(keep.sum(-1, keepdim=True) - 1)  # fp32 may have rounded u up to 1
    return ids.gather(-1, place).squeeze(-1)


def candidates(probs, top_p, few=256):
    """The likeliest tokens' probabilities, descending, and ids, (B, N) each, N enough for top_p.

    A nucleus seldom has hundreds of tokens, and sorting a whole vocabulary costs as much as a
    forward pass of a small model; where all of it is the nucleus, no order is needed.
    """
    if top_p >= 1:
        return probs, torch.arange(probs.shape[-1], device=probs.device).expand_as(probs)
    top, ids = probs.topk(min(few, probs.shape[-1]))
    enough = (top.sum(-1) >= top_p).all()  # for every sequence of the batch
    return (top, ids) if enough else probs.sort(-1, descending=True)


class KVCache:
    """Keys and values of a batch, per layer (2, B, K, U, C); slot t of a row holds position t.

    Rows are of unequal length and each fills slots of its own from 0 on, so there is no padding:
    who sees whom is a matter of positions alone. What a former sequence left in a row lies at
    positions that its successor overwrites before it can see them.
    """

    def __init__(self, model, rows):
        c = self.config = model.config
        self.groups = c.heads // c.kv_heads  # grouped-query attention: G query heads share a key
        new = model.embed.weight.new_zeros
        self.layers = [new(2, rows, c.kv_heads, 0, c.head_width) for _ in range(c.n_layers)]

    def attend(self, rows, positions, used):
        """What `Transformer.hidden` takes: one attention rule per layer.

        rows: slice of B rows; positions: (B, T) of the new tokens, which also are their slots;
        used: U, one more than the largest of them (known to the caller, or a GPU would wait here).
        """
        c, room = self.config, self.layers[0].shape[3]
        if used > room:  # by powers of two, since growing copies everything
            more = max(256, 1 << (used - 1).bit_length()) - room
            # zeros, not empty memory: a masked weight of 0 times NaN would still be NaN
            self.layers = [F.pad(layer, (0, 0, 0, more)) for layer in self.layers]
        slots = torch.arange(used, device=positions.device)
        # causality and the sliding window, both by the query's position less the key's
        age = positions[:, None, :, None] - slots  # (B, 1, T, U)
        masks = {w: age >= 0 if w is None else (age >= 0) & (age < w) for w in set(c.windows)}
        # the G query heads of a key/value head attend as if they were G times as many queries
        masks = {w: mask.repeat(1, 1, self.groups, 1) for w, mask in masks.items()}
        return [
            partial(self._attend, layer[:, rows, :, :used], positions, masks[window])
            for layer, window in zip(self.layers, c.windows, strict=True)
        ]

    def _attend(self, cached, positions, mask, q, k, v):
        """Stores the new keys and values of one layer, then lets the queries look at all.

        cached: (2, B, K, U, C) view; mask: (B, 1, G T, U); q: (B, H, T, C); k, v: (B, K, T, C).
        """
        rows = torch.arange(len(k), device=k.device)[:, None]  # (B, 1)
        # keys come already rotated by their position, so they are never touched again
        for kept, new in zip(cached, (k, v), strict=True):
            kept.transpose(1, 2)[rows, positions] = new.transpose(1, 2)  # (B, T, K, C)
        q = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, H, T, C) -> (B, K, G T, C)
        y = chains.fast_attention(q, *cached, mask, self.config.scale, self.config.attn_cap)
        return y.unflatten(2, (-1, k.shape[2])).flatten(1, 2)  # (B, H, T, C)


@dataclass(eq=False)
class Sequence:
    """A prompt and what has been generated behind it.

    seed: any tuple of integers. A sequence draws its own random numbers, so what becomes of it
    depends on no other sequence of the batch (but for the rounding of the batch's matmuls).
    """

    prompt: list  # ids
    seed: tuple = (0,)
    on_token: object = None  # called with every id of the answer, as it comes
    tag: object = None  # whatever the caller wants to find again
    answer: list = field(default_factory=list)  # ids, without the one that stopped it
    finished: bool = False  # it stopped by itself
    room: float = 0  # tokens that the answer may have: --max_new_tokens, or positions that are left

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)

    def take(self, token, sampling):
        """Appends a drawn token. Returns whether the sequence is at its end."""
        self.finished = token in sampling.stop_ids
        if not self.finished:  # the stop token is no part of the answer
            self.answer.append(token)
            if self.on_token:
                self.on_token(token)
        return self.finished or len(self.answer) == self.room


@torch.no_grad()
def complete(model, queue, sampling, batch=16):
    """Yields the Sequences of a deque as they end; the caller may append to it meanwhile.

    At most `batch` are at work. One that ends makes room for the next at once, so a long answer
    holds up no other (continuous batching). No answer goes beyond the positions of the model.
    """
    positions = model.config.positions or math.inf
    cache, active = KVCache(model, batch), []  # row r of the cache belongs to active[r]
    while queue or active:
        while queue and len(active) < batch:  # one by one: a batch of prompts would need padding
            seq = queue.popleft()
            seq.room = min(sampling.max_new_tokens, positions - len(seq.prompt))
            if seq.room < 1:
                yield seq
                continue
            active.append(seq)
            if ids := active[-1].prompt[:-1]:  # the last token is the next step's
                feed(model, cache, len(active) - 1, [ids], [list(range(len(ids)))])
        if not active:
            continue
        # every sequence is fed its last token, and draws the next
        last = [[(seq.answer or seq.prompt)[-1]] for seq in active]  # (B, 1)
        places = [[len(seq.prompt) + len(seq.answer) - 1] for seq in active]  # (B, 1)
        logits = model.to_logits(feed(model, cache, 0, last, places)[:, 0])  # (B, V)
        uniforms = torch.tensor([seq.rng.random() for seq in active], device=logits.device)
        tokens = draw_tokens(logits, uniforms, sampling).tolist()  # the step's one wait for a GPU
        ended = [row for row, seq in enumerate(active) if seq.take(tokens[row], sampling)]
        # The last row moves into each gap, so that rows 0 to B - 1 stay those in use. From the end,
        # so that the row that moves is one that goes on.
        for row in reversed(ended):
            yield active[row]
            for layer in cache.layers:
                layer[:, row] = layer[:, len(active) - 1]
            active[row] = active[-1]
            active.pop()


def feed(model, cache, first, ids, positions):
    """Puts (B, T) ids at (B, T) positions into rows `first` on -> (B, T, D) states."""
    used = 1 + max(map(max, positions))
    ids, positions = torch.tensor([ids, positions], device=model.embed.weight.device)
    rules = cache.attend(slice(first, first + len(ids)), positions, used)
    return model.hidden(ids, positions, rules)


# ----------------------------------------------------------------------------- the three ways

MODES = ("plain", "instruct", "refine")


class Dialogue:
    """An Ask on its way through its turns, in one of the MODES, and the row that it becomes.

    Of `n` per question, answer k to question q is number q n + k. Its turn t draws its random
    numbers from (seed, q, 2 t, k), its refinement from (seed, q, 2 t + 1, k), whatever else is
    asked and in whatever order: so a run that was cut off goes on with the numbers that it would
    have drawn, and a larger n leaves the answers of a smaller one as they are.
    """

    def __init__(self, ask, number, mode="plain", instruction=INSTRUCTIONS["better"], seed=0, n=1):
        self.ask, self.number, self.mode, self.instruction = ask, number, mode, instruction
        self._seed, self.turn = seed, 0  # turns that are answered and left behind
        self._question, self._sample = divmod(number, n)
        self.row = {"prompt": ask.prompt} | ask.about | ({"sample": self._sample} if n > 1 else {})
        if ask.turns:
            self.row["turns"] = 1 + len(ask.turns)
        if mode == "refine" and ask.draft is not None:
            if not isinstance(ask.draft, str):
                raise UserError(f"{ask.where}: its draft is {ask.draft!r:.40}; expected text")
            self.row["draft"] = ask.draft

    @property
    def stage(self):
        """What is to be generated next: "draft" or "answer"."""
        return "draft" if self.mode == "refine" and "draft" not in self.row else "answer"

    @property
    def seed(self):
        stage = 2 * self.turn + ("draft" in self.row)
        return (self._seed, self._question, stage, self._sample)

    @property
    def question(self):
        """Messages that end with the user's own turn."""
        asked = self.row["prompt"]
        return with_suffix(asked, self.instruction) if self.mode == "instruct" else asked

    def take(self, text, finished):
        """Takes what was generated; returns whether it was the answer to the last turn.

        The prompt of the finished row is all that was said before the last answer.
        """
        if self.stage == "draft":
            self.row["draft"] = text
            return False
        self.row |= {"answer": text, "finished": self.row.get("finished", True) and finished}
        if self.turn == len(self.ask.turns):
            return True
        if "draft" in self.row:
            self.row.setdefault("earlier_drafts", []).append(self.row.pop("draft"))
        following = {"role": "user", "content": self.ask.turns[self.turn]}
        said = {"role": "assistant", "content": text}
        self.row["prompt"] = [*self.row["prompt"], said, following]
        self.turn += 1
        return False


@dataclass
class Answers:
    """Answers Dialogues by the own sampler."""

    model: torch.nn.Module
    template: Template
    sampling: Sampling
    batch: int = 16
    on_token: object = None  # called with "draft" or "answer", and every token as it comes
    bridge: str = "turn"  # a row of data.BRIDGES, between a draft and its refinement
    sep: str | None = None
    beyond: bool = False  # whether an answer was cut where the model has no more positions

    def __call__(self, dialogues):
        """Yields (number, row {prompt, answer, [draft,] finished, …}) as Dialogues end."""
        queue, most = deque(map(self.sequence, dialogues)), self.model.config.positions or math.inf
        if long := [seq for seq in queue if len(seq.prompt) >= most]:
            where, n = long[0].tag[1].ask.where or "the question", len(long[0].prompt)
            raise UserError(f"{where}: {n} tokens, and the model has {most} positions; shorten it")
        for seq in complete(self.model, queue, self.sampling, self.batch):
            stage, dialogue = seq.tag
            self.beyond |= not seq.finished and seq.room < self.sampling.max_new_tokens
            if dialogue.take(self.template.decode(seq.answer), seq.finished):
                yield dialogue.number, dialogue.row
            else:
                # First in the queue: at its end it would wait for the drafts of all other prompts,
                # every row would come last of all, and a kill would lose all of them.
                queue.appendleft(self.sequence(dialogue, seq if stage == "draft" else None))

    def sequence(self, dialogue, draft=None):
        """What the sampler continues: the ids that training puts before the same answer.

        draft: the ended Sequence of the draft. Behind nothing but the prompt its ids are taken as
        they were sampled: its text, tokenised again, may have others. Any other draft is tokenised.
        """
        template, question, x = self.template, dialogue.question, draft and draft.prompt
        try:
            if not draft:
                (x,) = template.encode([template.render(question, generation=True)])
            ids = [x]
            if "draft" in dialogue.row:
                how = self.bridge, template, dialogue.instruction, self.sep
                (opens, _, ended), before, after = open_bridge(*how)
                if draft and not opens and not (ended and template.rewrites):
                    said = [*draft.answer, *(template.end_ids if ended else [])]
                else:
                    text = template.answer(question, dialogue.row["draft"], followed=ended)
                    (said,) = template.encode([text], behind=opens or template.opening)
                    said = said if ended else said[: len(said) - len(template.end_ids)]
                ids += [before, said, after]
        except Refused as error:
            raise UserError(f"{dialogue.ask.where or 'the question'}: {error}") from error
        ids = [int(i) for part in ids for i in part]
        hear = self.on_token and partial(self.on_token, dialogue.stage)
        return Sequence(ids, dialogue.seed, hear, (dialogue.stage, dialogue))


def in_order(numbered, numbers):
    """(number, row) as they end -> rows in the order of `numbers`, each as soon as it can."""
    waiting, held = deque(numbers), {}
    for number, row in numbered:
        held[number] = row
        while waiting and waiting[0] in held:
            yield held.pop(waiting.popleft())
    yield from (held[number] for number in sorted(held))  # behind one that a server refused


@dataclass
class RemoteAnswers:
    """Answers Dialogues by messages to an Endpoint, `concurrency` of them at a time."""

    endpoint: Endpoint
    sampling: Sampling
    concurrency: int = 8
    refused: list = field(default_factory=list)  # (number, what the server said)

    def __call__(self, dialogues):
        """Yields (number, row) as Dialogues end; one that the server refuses goes to `refused`."""
        for dialogue, refusal in together(self._answer, dialogues, self.concurrency):
            if refusal is None:
                yield dialogue.number, dialogue.row
            else:
                self.refused.append((dialogue.number, refusal))

    def _answer(self, dialogue):
        """Asks until the last turn is answered -> None, or why the server refuses."""
        sampling, ended = self.sampling, False
        while not ended:
            messages = dialogue.question
            if "draft" in dialogue.row:
                said = [("assistant", dialogue.row["draft"]), ("user", dialogue.instruction)]
                messages = messages + [{"role": who, "content": text} for who, text in said]
            # a seed of 31 bits, told by the numbers that the own sampler draws from
            seed = int(np.random.SeedSequence(dialogue.seed).generate_state(1)[0] >> 1)
            options = {"temperature": sampling.temperature, "top_p": sampling.top_p}
            options |= {"max_tokens": sampling.max_new_tokens, "seed": seed}
            try:
                text, finished, *told = self.endpoint.chat(messages, **options)
            except RequestRefused as refusal:
                return str(refusal)
            if None not in told:  # a server may leave its counts out
                before = dialogue.row.get("usage", (0, 0))
                dialogue.row["usage"] = [a + b for a, b in zip(before, told, strict=True)]
            ended = dialogue.take(text, finished)


@dataclass(frozen=True)
class GenerateFlags(cli.ModelFlags, cli.InstructionFlags, cli.SamplingFlags, cli.EndpointFlags):
    model: str | None = flag(None, "HF directory or hub id, or the --endpoint's name for it")
    prompt: str | None = flag(None, "one question; its answer streams to the terminal")
    data: str | None = flag(None, "questions, prompts or pairs: a file, a glob or a hub id")
    mode: str = flag("plain", "what is asked", MODES)
    draft: str | None = flag(None, "text to refine, of --prompt; --data has it as draft or answer")
    bridge: str = flag("turn", "between a draft and its refinement", tuple(BRIDGES))
    sep: str | None = flag(None, "separator of --bridge sep; default: as in training")
    out: str | None = flag(None, "file, continued if it is there; default: standard output")
    format: str = flag("jsonl", "of --out, told in docs/evaluation.md", tuple(ANSWER_FORMATS))
    name: str | None = flag(None, "what the benchmark's file calls the model; default: --model")
    n: int = flag(1, "answers per question, each with random numbers of its own", least=1)
    seed: int = flag(0, "random numbers: prompt i draws from (seed, i)")
    limit: int | None = flag(None, "only the first N prompts", least=1)


def check_flags(s, world=1):
    """Raise UserError for flags that make no sense."""
    if s.model is None:
        raise UserError("--model is missing; give a Hugging Face directory or a hub id")
    if bool(s.prompt) == bool(s.data):
        raise UserError("give either --prompt TEXT or --data FILE")
    if s.mode != "refine" and (s.draft is not None or s.bridge != "turn"):
        raise UserError("--draft and --bridge are for --mode refine")
    if s.draft is not None and s.prompt is None:
        raise UserError("--draft refines an answer to --prompt; in --data it is a column")
    if s.endpoint and s.bridge != "turn":
        fault = f"--bridge {s.bridge}: a chat server knows turns alone"
        raise UserError(f"{fault}; leave --endpoint out")
    if not s.out and (s.format != "jsonl" or world > 1):
        raise UserError("--out FILE is needed for a benchmark's format and for several processes")
    if s.n > 1 and (s.format != "jsonl" or s.temperature == 0):
        cure = "a benchmark's file holds one answer per question, and --temperature 0 knows but one"
        raise UserError(f"--n {s.n}: {cure}")
    if s.format == "alpaca_eval" and not s.out.endswith(".json"):
        raise UserError(f"--out {s.out}: alpaca_eval reads .json files alone")
    if s.endpoint and world > 1:
        raise UserError("--endpoint wants a single process; --concurrency N asks N at once")


def load_model(directory, dtype=None, device="auto", head="logps", name="--model", fold=False):
    """What every command that reads a model needs: model.load's Transformer, and its Template."""
    model = load(directory, dtype, device, head, name)
    model.attend = chains.attend  # rows are scored chain by chain: same values, less work
    return model, open_template(model.directory, fold)


def stop_ids(template):
    """Ids that end an answer: eos_token_id of both configs, and the template's end of turn."""
    ids = list(template.end_ids) if len(template.end_ids) == 1 else []
    for name in ("generation_config.json", "config.json"):
        eos = read_json(template.directory / name).get("eos_token_id")
        ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
    return frozenset(int(i) for i in ids)


def open_rows(s, asks, settings, rank, world):
    """The rows of --out, to go on with. UserError if it holds rows of another run.

    In any format but jsonl they lie in OUT.rows.jsonl, with seeds and settings, beside OUT itself.
    """

    def check(where, n, row):
        row, ask = row if isinstance(row, dict) else {}, asks[n]
        said, first = row.get("prompt"), len(ask.prompt)  # behind these, every other turn is ours
        users = ask.prompt + [{"role": "user", "content": turn} for turn in ask.turns]
        same = isinstance(said, list) and said[:first] + said[first + 1 :: 2] == users
        drafts = [*row.get("earlier_drafts", []), row.get("draft")]
        differs = {"prompt": not same, "n": row.get("sample", 0) != n % s.n}
        differs["draft"] = s.mode == "refine" and ask.draft not in (None, drafts[0])
        names = (*settings, "bridge", "sep")  # the last two where they matter
        differs |= {name: row.get(name) != settings.get(name) for name in names}
        if row.get("endpoint") and settings.get("endpoint"):  # a server may have moved since
            differs["endpoint"] = False
        if faults := [name for name, other in differs.items() if other]:
            raise UserError(f"{where}: of another run ({faults[0]} differs); move the file away")

    file = s.out if s.format == "jsonl" else f"{s.out}.rows.jsonl"
    return Shared(file, len(asks), check, rank, world)


class Stream:
    """Prints tokens as they come: an answer to standard output, a draft to standard error."""

    def __init__(self, template):
        self.tokenizer, self.stage, self.file = template.tokenizer, None, None

    def __call__(self, stage, token):
        if stage != self.stage:
            self.close()
            self.stage, self.file = stage, sys.stderr if stage == "draft" else sys.stdout
            self.text = DecodeStream(skip_special_tokens=True)  # waits for whole characters
        print(self.text.step(self.tokenizer, token) or "", end="", file=self.file, flush=True)

    def close(self):
        if self.file:
            print(file=self.file, flush=True)


def answerer(s):
    """What answers: the own sampler with --model loaded, or the server at --endpoint."""
    sampling = Sampling(s.max_new_tokens, s.temperature, s.top_p)
    if s.endpoint:
        endpoint = Endpoint(s.endpoint, s.model, s.timeout, s.retries)
        return RemoteAnswers(endpoint, sampling, s.concurrency)
    model, template = load_model(s.model, s.dtype, s.device, fold=s.fold_system)
    return Answers(model, template, sampling._replace(stop_ids=stop_ids(template)), s.batch)


def produce(s, asks, numbers, store, settings):
    """Answer these of the Asks: into the store, else to standard output in their order.

    An answer to --prompt streams to the terminal as well; a server's is printed when it is whole.
    """
    one, answers, stream = s.prompt is not None, answerer(s), None
    answers.bridge, answers.sep = s.bridge, s.sep
    if one and s.n == 1 and not s.endpoint:
        answers.on_token = stream = Stream(answers.template)
    how = (s.mode, settings.get("instruction"), s.seed, s.n)
    numbered = answers(Dialogue(asks[n], n, *how) for n in numbers)
    if store is None:
        numbered = enumerate(in_order(numbered, numbers))
    hidden, done, faults = one or (store and store.rank), len(asks) - len(numbers), Counter()
    with progress("generate", len(asks), "answer", hidden, initial=done) as bar:
        for n, row in numbered:
            bar.update()
            faults["were cut at --max_new_tokens"] += not row["finished"]
            faults["are empty"] += not row["answer"]
            if store:
                store.append(n, row | settings)
            elif not one:
                sys.stdout.buffer.write(to_line(row | settings))
                sys.stdout.buffer.flush()
            if one and not stream:
                print(row["answer"])
    if stream:
        stream.close()
    for fault, count in faults.items():
        if "cut" in fault and not s.endpoint and answers.beyond:
            fault += f" or the model's {answers.model.config.positions} positions"
        if count:
            print(f"{count} answers {fault}", file=sys.stderr)
    if s.endpoint and answers.refused:
        number, said = min(answers.refused)
        fault = f"the server refused {len(answers.refused)} of {len(numbers)} prompts"
        raise UserError(f"{fault}, as number {number + 1}: {said}; the other answers are kept")


def main():
    s = pinned(parse(GenerateFlags, __doc__.splitlines()[0]))
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    check_flags(s, world)
    one = [Ask([{"role": "user", "content": s.prompt}], s.draft)]
    asks, tokens = one if s.data is None else read_asks(s.data, s.limit), None
    if s.mode == "refine" and s.data:
        brought = sum(ask.draft is not None for ask in asks)
        print(f"{brought} of {len(asks)} drafts are the data's, the rest ours", file=sys.stderr)
    asks = [ask for ask in asks for _ in range(s.n)]
    if s.format == "arena_hard":
        refuse_twins(asks, s.data or "--prompt")
        tokens = token_counter(s.model)
    # what a row says of how it came about
    names = ("model", "mode", "seed", "temperature", "top_p", "max_new_tokens")
    settings = {name: getattr(s, name) for name in names}
    if s.mode != "plain":
        settings["instruction"] = INSTRUCTIONS.get(s.instruction, s.instruction)
    if s.bridge != "turn":
        settings |= {"bridge": s.bridge, "sep": s.sep}
    if s.endpoint:
        settings["endpoint"] = public(s.endpoint)
    store = open_rows(s, asks, settings, rank, world) if s.out else None
    numbers = store.mine if store else list(range(len(asks)))
    if numbers:
        produce(s, asks, numbers, store, settings)
    if store and store.join() and s.format != "jsonl":
        write_answers(s.out, s.format, store.name, s.name or s.model, tokens)


if __name__ == "__main__":
    run(main)
