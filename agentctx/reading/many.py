"""Several answers over one text at once: every pass computes the next token of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agentctx.reading.records import Coverage, Reply
from agentctx.reading.speech import Speech
from agentctx.runtime.sampling import choose


def spoken_together(
    speeches: Sequence[Speech], asked: Sequence[Sequence[int]], coverage: Coverage, warnings: Sequence[str]
) -> list[Reply]:
    """The replies to `asked`. Each answer ends by itself, and has its own generator."""
    live = []
    for speech, ids in zip(speeches, asked, strict=True):
        hidden = speech.listen(ids)
        if hidden is not None and speech.most > 0:
            live.append((speech, speech.request.sampling.chance(hidden.device), hidden))
    while live:
        engine = live[0][0].context.engine
        logits = engine.logits(torch.stack([hidden for _, _, hidden in live]), spoken=True)
        for row, (speech, chance, _) in zip(logits, live, strict=True):
            speech.take(choose(row, speech.request.sampling, chance))
        live = [one for one in live if _goes_on(one[0])]
        if live:
            tokens = torch.tensor([[speech.token_ids[-1]] for speech, _, _ in live])
            states = engine.step([speech.context for speech, _, _ in live], tokens, spoken=True)[:, -1]
            for speech, _, _ in live:
                speech.context.ids.append(speech.token_ids[-1])
                speech.context.computed += 1
            live = [(*one[:2], state) for one, state in zip(live, states, strict=True)]
    replies = [speech.end(coverage, warnings).reply for speech in speeches]
    return [reply for reply in replies if reply is not None]


def _goes_on(speech: Speech) -> bool:
    full = len(speech.token_ids) == speech.most
    return not full and speech.finish is None and not speech.request.cancelled.is_set()
