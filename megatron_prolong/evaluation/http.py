"""A small client for OpenAI-compatible servers: JSON over HTTP, retries, and many requests at once."""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from megatron_prolong.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
RETRIED = {408, 409, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Client:
    """Talks to `base_url` (ending in /v1); the key is taken from the environment variable OPENAI_API_KEY.

    Attributes:
        attempts: tries per request; waits double from `first_wait_seconds`, or are what the server asks for.
        concurrency: requests under way at once.
    """

    base_url: str
    attempts: int = 6
    first_wait_seconds: float = 1.0
    timeout_seconds: float = 1800.0
    concurrency: int = 8

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The server's JSON answer.

        Raises:
            UserError: the server refuses the request, or cannot be reached after all attempts.
        """
        return self._send(Request(self._url(path), json.dumps(body).encode("utf-8"), self._headers()))

    def get(self, path: str) -> dict[str, Any]:
        """As `post`, without a body."""
        return self._send(Request(self._url(path), headers=self._headers()))

    def complete(self, path: str, body: dict[str, Any]) -> str:
        """The text of the first choice of an answer to completions or chat/completions; empty if it has none."""
        answer = self.post(path, body)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{self._url(path)}: its answer has no text: {json.dumps(answer)[:500]}; is it OpenAI-compatible?"
            ) from error
        # Half an emoji cannot be written or tokenized.
        return str(text or "").encode("utf-8", "replace").decode()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R | None]:
        """`function` of every item, in order, `concurrency` at a time.

        After an error none is begun any more. What was still answered is given, with None for the rest, so that it
        can be kept; then the error is raised.
        """
        pool = ThreadPoolExecutor(self.concurrency)
        futures = [pool.submit(function, item) for item in items]
        error: BaseException | None = None
        try:
            for future in futures:
                if not future.cancelled() and future.exception() is None:
                    yield future.result()
                    continue
                if error is None:
                    error = future.exception()
                    pool.shutdown(wait=False, cancel_futures=True)
                yield None
            if error is not None:
                raise error
        finally:
            pool.shutdown(cancel_futures=True)

    def _send(self, request: Request) -> dict[str, Any]:
        problem = ""
        for attempt in range(self.attempts):
            wait = self.first_wait_seconds * 2**attempt * random.uniform(0.8, 1.2)
            try:
                with urlopen(request, timeout=self.timeout_seconds) as response:
                    answer = json.load(response)
                if isinstance(answer, dict):
                    return answer
                problem = f"not a JSON object: {json.dumps(answer)[:500]}"
            except HTTPError as error:
                problem = f"{error.code} {error.reason}: {error.read().decode('utf-8', 'replace')[:500]}"
                if error.code not in RETRIED:
                    break
                wait = asked_wait(error.headers.get("Retry-After"), wait)
            except (URLError, OSError, HTTPException, ValueError) as error:
                problem = str(error)
            if attempt + 1 < self.attempts:
                time.sleep(wait)
        raise UserError(f"{request.full_url}: {problem}")

    def _url(self, path: str) -> str:
        return f"{self.base_url.rstrip('/')}/{path}"

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        return headers


def asked_wait(header: str | None, otherwise: float) -> float:
    """The seconds of a Retry-After header, where it says any."""
    try:
        asked = float(header) if header is not None else otherwise
    except ValueError:
        return otherwise
    return asked if 0 <= asked < math.inf else otherwise
