"""OpenAI-compatible servers, spoken to by OpenAI's own client: the text of an answer, and many requests at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_prolong.errors import UserError

if TYPE_CHECKING:
    from openai import OpenAI

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Client:
    """Talks to `base_url` (ending in /v1); the key is taken from the environment variable OPENAI_API_KEY.

    Attributes:
        retries: of a request that a busy server, or none, answered; the default waits 40 seconds in all.
        concurrency: requests under way at once.
    """

    base_url: str
    retries: int = 8
    timeout_seconds: float = 1800.0
    concurrency: int = 8

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The server's JSON answer.

        Raises:
            UserError: the server refuses the request, or cannot be reached after all attempts.
        """
        return self._asked(path, lambda: self._server.post(f"/{path}", cast_to=object, body=body))

    def get(self, path: str) -> Any:
        """As `post`, without a body."""
        return self._asked(path, lambda: self._server.get(f"/{path}", cast_to=object))

    def complete(self, path: str, body: dict[str, Any]) -> str:
        """The text of the first choice of an answer to completions or chat/completions; empty if it has none."""
        answer = self.post(path, body)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{self.base_url}/{path}: its answer has no text: {in_short(answer)}; is it "
                "OpenAI-compatible?"
            ) from error
        # Half an emoji cannot be written or tokenized.
        return str(text or "").encode("utf-8", "replace").decode()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R | None]:
        """`function` of every item, in order, `concurrency` at a time.

        After an error none is begun any more. What was still answered is given, with None for the rest, so that it
        can be kept; then the error is raised. Ctrl-C waits for no answer, which may take half an hour.
        """
        calls = [(Future[R](), item) for item in items]
        waiting = iter(calls)

        def cancel() -> None:
            for future, _ in calls:
                future.cancel()

        for _ in range(self.concurrency):
            Thread(target=_work, args=(function, waiting), daemon=True).start()
        error: BaseException | None = None
        try:
            for future, _ in calls:
                if not future.cancelled() and future.exception() is None:
                    yield future.result()
                    continue
                if error is None:
                    error = future.exception()
                    cancel()
                yield None
            if error is not None:
                raise error
        finally:
            cancel()

    @cached_property
    def _server(self) -> OpenAI:
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"{self.base_url}: no address of a server; it begins with http:// or https://")
        from openai import OpenAI

        key = os.environ.get("OPENAI_API_KEY") or "none"  # one's own server asks for none, the client does
        return OpenAI(
            base_url=self.base_url, api_key=key, max_retries=self.retries, timeout=self.timeout_seconds
        )

    def _asked(self, path: str, ask: Callable[[], object]) -> Any:
        from openai import APIConnectionError, APIStatusError, OpenAIError

        problem: object
        try:
            return ask()
        except APIStatusError as error:
            problem = f"{error.status_code} {error.response.reason_phrase}: {in_short(error.response.text)}"
            if error.status_code in (401, 403):
                problem += " (the key is read from OPENAI_API_KEY)"
            if error.status_code == 404 and not self.base_url.rstrip("/").endswith("/v1"):
                problem += " (most servers' addresses end in /v1)"
        except APIConnectionError as error:
            problem = error.__cause__ or error
        except (OpenAIError, ValueError) as error:
            problem = error
        raise UserError(f"{self.base_url}/{path}: {problem}")


def _work(function: Callable[[T], R], waiting: Iterator[tuple[Future[R], T]]) -> None:
    """One waiting call after another; several threads draw from the same."""
    for future, item in waiting:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(item))
            except BaseException as error:
                future.set_exception(error)


def in_short(answer: object) -> str:
    """What a server answered, for a message: proxies and web sites answer with pages."""
    text = answer.strip() if isinstance(answer, str) else json.dumps(answer)
    return "an HTML page" if text.startswith("<") else text[:500]
