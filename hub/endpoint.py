"""Asks an OpenAI-compatible chat server for answers: vLLM, `transformers serve`, a vendor's API.

A request that fails for a reason that may pass is sent again: connections refused or broken,
timeouts, HTTP 408, 409, 425, 429 and 5xx, replies that cannot be read. The pause doubles from try
to try, with jitter, unless the server names one (Retry-After). The key is OPENAI_API_KEY of the
environment, or a user and password in the address (https://user:password@host/v1, basic
authentication); neither is ever written to a file or a message.

A server that does not know an option of ours (OpenAI's reasoning models want max_completion_tokens
in place of max_tokens, and no temperature) is asked without it from then on, which is said once.
"""

import contextlib
import itertools
import os
import random
import re
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from tqdm import tqdm

from jobs.cli import UserError

TRANSIENT = {408, 409, 425, 429}  # and 5xx
FATAL = {401, 403, 404, 405}  # a wrong key, model or address: no other request would fare better
LONGEST_PAUSE = 120.0  # seconds
# Options that a server may refuse, and what stands in for each. In this order: of two that it will
# not take together, the temperature stays.
STAND_INS = {"max_tokens": "max_completion_tokens", "seed": None, "top_p": None,
             "temperature": None, "max_completion_tokens": None}  # fmt: skip
REFUSALS = "support|recogni|unknown|unexpected|permitted|allowed|both"  # of a refusal of an option
UNKNOWN = re.compile(f"(?!.*too large).*({REFUSALS})", re.IGNORECASE)
WRONG = re.compile("available|deprecat|invalid|must", re.IGNORECASE)  # of a value; not of a length


class RequestRefused(Exception):
    """The server will not answer this one request (HTTP 4xx), however often it is asked."""


class Reply(NamedTuple):
    """What a server answered."""

    text: str
    finished: bool  # it stopped by itself
    tokens_in: int | None  # as the server counts; None where it does not say
    tokens_out: int | None


class Endpoint:
    """A chat server and the model to ask there. Threads may share it."""

    def __init__(self, url, model, timeout=600.0, retries=8, pause=1.0):
        """url: up to and including /v1; timeout, pause: seconds; retries: further tries."""
        import httpx2

        base = url.rstrip("/")
        self.url = base if base.count("/") > 2 else f"{base}/v1"
        self.name = public(self.url)
        if not url.startswith(("http://", "https://")):
            cure = "give the address, as http://127.0.0.1:8000/v1"
            raise UserError(f"--endpoint {public(url)}: {cure}")
        self.model, self.retries, self.pause = model, retries, pause
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_connections=None)  # `together` bounds them
        self.client = httpx2.Client(headers=headers, timeout=timeout, limits=limits)
        self.transport_error = httpx2.RequestError
        self.dead = threading.Event()  # a request has failed for good: the others give up too
        self.swaps, self.lock = {}, threading.Lock()  # option refused: what stands in, or None

    def chat(self, messages, **options):
        """Sends a dialogue -> Reply. options: temperature, top_p, max_tokens, seed, … of the API.

        Raises RequestRefused where the server rejects it, UserError where it cannot be reached.
        """
        body = {"model": self.model, "messages": messages, "stream": False} | options
        while True:
            sent = dict(body)
            for name, other in list(self.swaps.items()):
                if name in sent:
                    value = sent.pop(name)
                    sent |= {other: value} if other else {}
            try:
                return self._post(sent)
            except RequestRefused as refusal:
                if not self._learn(str(refusal), sent):
                    raise

    def _learn(self, said, sent):
        """Whether a refusal is of an option that was sent, and the server can be asked without."""
        named = [name for name in STAND_INS if name in sent and re.search(rf"\b{name}\b", said)]
        of_length = named[:1] and named[0].startswith("max_")
        if not named or not (UNKNOWN.match(said) or (WRONG.search(said) and not of_length)):
            return False
        with self.lock:  # a request that was under way then learns nothing new
            if named[0] not in self.swaps:
                other = self.swaps[named[0]] = STAND_INS[named[0]]
                told = f"asked with {other} instead" if other else "asked without it"
                # between progress bars
                tqdm.write(f"--endpoint {self.name}: {told} from now on: {said}", file=sys.stderr)
        return True

    def _post(self, body):
        """One request, tried again where that may help -> Reply."""
        fault, after = None, None
        for attempt in range(self.retries + 1):
            if attempt and self.dead.wait(self._pause(attempt, after)):
                break
            after = None
            try:
                response = self.client.post(f"{self.url}/chat/completions", json=body)
            except self.transport_error as error:
                fault = f"{type(error).__name__} {error}".strip()
                continue
            status, said = response.status_code, " ".join(response.text[:300].split())
            if status in TRANSIENT or status >= 500:
                fault, after = f"HTTP {status}", retry_after(response.headers.get("retry-after"))
            elif status == 200:
                try:
                    return to_reply(response.json())
                except (ValueError, LookupError, TypeError, AttributeError):
                    fault = f"a reply that is none: {response.text[:100]!r}"
            elif status in FATAL or status < 400:
                self.dead.set()
                raise UserError(f"--endpoint {self.name}: HTTP {status} for {self.model}: {said}")
            else:
                raise RequestRefused(f"HTTP {status}: {said}")
        self.dead.set()
        fault = f"--endpoint {self.name}: gave up after {attempt + 1} tries ({fault})"
        raise UserError(f"{fault}; what has come is kept: the same command goes on from there")

    def _pause(self, attempt, after):
        """Seconds before a further try: what the server asked for, else doubling with jitter."""
        if after is not None:
            return min(after, LONGEST_PAUSE)
        return min(self.pause * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.0)


def public(url):
    """An address as it may be written down or shown: without user and password."""
    return re.sub(r"^(\w+://)?.*@", r"\1", url)


def to_reply(body):
    """A chat completion as JSON -> Reply; ValueError and the like where it is not one."""
    choice, usage = body["choices"][0], body.get("usage") or {}
    text = choice["message"].get("content")
    if text is not None and not isinstance(text, str):
        raise ValueError("content is no text")
    counts = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
    cut = choice.get("finish_reason") in ("length", "content_filter")  # servers name other ends
    return Reply(text or "", not cut, *counts)


def retry_after(value):
    """The header's seconds from now, from a number or a date; None where it says nothing."""
    for seconds in (float, lambda date: parsedate_to_datetime(date).timestamp() - time.time()):
        with contextlib.suppress(TypeError, ValueError):
            return max(0.0, seconds(value))
    return None


def together(work, items, concurrency):
    """Runs work(item) in threads, `concurrency` at a time; yields (item, its result) as they end.

    After an error no further item is begun; those under way are still yielded, and then the first
    error is raised.
    """
    items, error = iter(items), None
    with ThreadPoolExecutor(concurrency) as pool:
        running = {pool.submit(work, item): item for item in itertools.islice(items, concurrency)}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item = running.pop(future)
                if future.exception() is None:
                    yield item, future.result()
                else:
                    error = error or future.exception()
                if error is None:
                    more = itertools.islice(items, 1)
                    running |= {pool.submit(work, item): item for item in more}
    if error is not None:
        raise error
