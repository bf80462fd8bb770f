"""The passes after a prompt: plain ones, those that verify drafts, or a captured one."""

from collections.abc import Iterator

import torch

from mllama.runtime.completion import Generation
from mllama.runtime.decode_graph import DecodeGraph
from mllama.runtime.drafts import Drafter
from mllama.runtime.prefill import PromptCache
from mllama.runtime.sampler import Sampler
from mllama.runtime.step_graph import HostCopy


class Passes:
    """The passes of one generation after its prompt. Plain decoding is the case without drafts and
    graph.

    Args:
        prompt: the cache that has the prompt.
        sampler: selects tokens.
        drafter: guesses tokens of a single row, from the prompt on; None for none.
        graph: the captured pass to run in place of others; None for none. Not with a drafter.
        result: counts drafts.
    """

    def __init__(
        self,
        prompt: PromptCache,
        sampler: Sampler,
        drafter: Drafter | None,
        graph: DecodeGraph | None,
        result: Generation,
    ):
        self._prompt, self._sampler, self._result = prompt, sampler, result
        self._drafter, self._graph = drafter, graph
        self._drafts: list[int] = []  # of the last pass
        self._place = 0  # of the last token in the pass

    def tokens(self, logits: torch.Tensor, room: int) -> Iterator[list[int]]:
        """The next token of each row, `room` times. A pass appends them when more are asked for; a
        captured one is launched before, and runs while they are read.

        Args:
            logits: [B, V], after the prompt.
            room: at least 1.

        Raises:
            ValueError: to sample, a row's largest logit must be finite.
        """
        tokens, graph = self._sampler(logits), self._graph  # (B,)
        on_host, running = HostCopy(tokens), False
        for wanted in reversed(range(room)):
            ahead = graph.launch() if graph is not None and running and wanted else None
            ids = on_host.tolist()
            if min(ids) < 0:
                raise ValueError(
                    "logits must have a finite maximum in each row to draw from, row "
                    f"{ids.index(min(ids))} has none"
                )
            yield ids
            if not wanted:
                return
            if graph is None:
                tokens = self._sampler(self._append(tokens, wanted))
                on_host = HostCopy(tokens)
                continue
            if not running:  # not before: the first token need not wait for a capture
                graph.start(tokens, self._prompt.next_inputs(tokens), self._sampler, wanted)
                ahead, running = graph.launch(), True
            self._prompt.note(ids)
            on_host = ahead

    def _append(self, tokens: torch.Tensor, wanted: int) -> torch.Tensor:
        """The logits [B, V] after one more token per row, int64 [B].

        Args:
            tokens: the tokens.
            wanted: how many more may be asked for, this one included.
        """
        drafts: list[int] = []
        if self._drafter is not None:
            token = int(tokens[0])
            self._drafter.add(token)
            if self._drafts[self._place : self._place + 1] == [token]:
                self._place += 1
                self._result.num_accepted_tokens += 1
                return self._logits[:, self._place]
            self.finish()
            drafts = self._text_of(self._drafter.propose(wanted - 1))
            self._result.num_drafted_tokens += len(drafts)
        ids = tokens[:, None]
        if drafts:
            ids = torch.cat([ids, ids.new_tensor([drafts])], 1)
        self._logits = self._prompt.append(ids)
        self._drafts = drafts  # not before: the pass may be interrupted
        return self._logits[:, 0]

    def finish(self) -> None:
        """Drop drafts that were not reached from the cache."""
        self._prompt.drop_last(len(self._drafts) - self._place)
        self._drafts, self._place = [], 0

    def _text_of(self, drafts: list[int]) -> list[int]:
        """Drafts before the first placeholder of an image, which may be no input."""
        vocabulary = self._prompt.model.spec.text.vocab_size
        ends = (place for place, token in enumerate(drafts) if token >= vocabulary)
        return drafts[: next(ends, len(drafts))]
