"""A model spread over ranks, asked by a program that runs on one of them.

The main rank evaluates: it reads data, scores and writes files. Every call it makes of the model is told to the
others, which make the same call on their parts, so nothing else of the evaluation knows how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_prolong.evaluation.ending import Ending
from megatron_prolong.mcore.groups import Axis
from megatron_prolong.mcore.inference import InferenceModel, Question
from megatron_prolong.runtime.launch import World
from megatron_prolong.runtime.watchdog import Watchdog

# The others wait while the main rank prepares or scores a task, which may take long.
PATIENCE = timedelta(days=7)

Call = tuple[str, tuple[Any, ...]]
_DISMISSED: Call = ("", ())


@dataclass
class Crew:
    """The ranks of a job, which hold one or several replicas of a model, each spread over some of them.

    The methods are those of `InferenceModel`; only the main rank calls them.

    Attributes:
        ending: where its answers end.
        dp: the axis along which the model is repeated; the replicas share out what is asked.
        group: all ranks; None for a single one.
        watchdog: fed with every call: one may leave nothing to do for this rank.
        midway: a call is under way, or an error has ended it.
    """

    inference: InferenceModel
    ending: Ending
    dp: Axis
    group: dist.ProcessGroup | None
    watchdog: Watchdog | None = None
    midway: bool = False

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `InferenceModel`; sequence i is read by replica i mod dp."""
        return self._together("token_logprobs", sequences)

    def continuation_logprobs(self, questions: Sequence[Question]) -> list[list[float]]:
        """See `InferenceModel`; question i is answered by replica i mod dp."""
        return self._together("continuation_logprobs", questions)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[list[int]]:
        """See `InferenceModel`; prompt i is decoded by replica i mod dp, until `ending` is reached."""
        return self._together("generate", prompts, max_new_tokens, stop)

    def serve(self) -> None:
        """On every rank but the main one: join its calls until it is done."""
        while (call := self._agree(None)) != _DISMISSED:
            self._do(call)

    def dismiss(self) -> None:
        """The main rank is done."""
        self._agree(_DISMISSED)

    def _together(self, method: str, *arguments: Any) -> Any:
        self.midway = True
        answer = self._do(self._agree((method, arguments)))
        self.midway = False
        return answer

    def _agree(self, call: Call | None) -> Call:
        """The main rank's call, on every rank."""
        told = [call]
        if self.group is not None:
            dist.broadcast_object_list(told, src=0, group=self.group)
        assert told[0] is not None
        return told[0]

    def _do(self, call: Call) -> Any:
        if self.watchdog is not None:
            self.watchdog.feed()
        method, arguments = call
        if method != "generate":
            return self._share_out(getattr(self.inference, method), *arguments)
        prompts, max_new_tokens, stop = arguments
        ended = partial(self.ending.reached, stop=stop)
        return self._share_out(self.inference.generate, prompts, max_new_tokens, ended)

    def _share_out(
        self, method: Callable[..., list[Any]], asked: Sequence[Any], *arguments: Any
    ) -> list[Any]:
        mine = method(asked[self.dp.rank :: self.dp.size], *arguments)
        if self.dp.size == 1:
            return mine
        everyone: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, (self.dp.rank, mine), group=self.group)
        answers: list[Any] = [None] * len(asked)
        for replica, some in everyone:
            answers[replica :: self.dp.size] = some
        return answers


@contextmanager
def crew(
    inference: InferenceModel,
    ending: Ending,
    world: World,
    dp: Axis,
    watchdog: Watchdog | None = None,
) -> Iterator[Crew | None]:
    """The model for the main rank to call; on every other rank, None once the main rank is done with it."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE) if world.size > 1 else None
    members = Crew(inference, ending, dp, group, watchdog)
    if world.is_main:
        try:
            yield members
        finally:
            if not members.midway:  # else the others wait in the call, and this rank's death is what ends it
                members.dismiss()
    else:
        members.serve()
        yield None
    if group is not None:
        dist.destroy_process_group(group)
