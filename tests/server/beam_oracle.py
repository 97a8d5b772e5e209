"""Beam search over plain lists, and a runner without a model that it can be compared with."""

import math
import random

from fake_runner import FakeRunner, next_token

from octavo.core.step import StepResult
from octavo.logprobs import TokenLogprobs

VOCAB = 31
EOS = 3


def log_probabilities(tokens, vocab=VOCAB):
    """A distribution over the next token that is a function of the tokens alone."""
    rng = random.Random(next_token(tokens, 2**31))
    logits = [4 * rng.random() for _ in range(vocab)]
    total = math.log(sum(math.exp(x) for x in logits))
    return [x - total for x in logits]


class BeamRunner(FakeRunner):
    """Gives the log-probabilities that belong to what it finds in its cache."""

    vocab_size = VOCAB

    def run(self, plan):
        result = super().run(plan)
        found = {}
        for share in plan.sequences:
            if share.samples and share.params.use_beam_search:
                stop = share.start + len(share.token_ids)
                context = [self.slots[slot] for slot in self._slots(share.block_table, stop)]
                row = log_probabilities(context, self.vocab_size)
                ranked = sorted(range(self.vocab_size), key=lambda i: -row[i])
                best = ranked[: share.params.logprobs]
                top = [row[i] for i in best]
                found[share.seq_id] = TokenLogprobs(best[0], top[0], 1, best, top)
        return StepResult(result.tokens, found)


def plain_search(prompt, width, most, penalty=1.0, early=False, stops=(EOS,), vocab=VOCAB):
    """Beam search over lists of tokens: every continuation of every beam, ranked."""
    beams, done = [(0.0, [])], []
    for length in range(1, most + 1):
        every = [
            (score + logprob, [*tokens, token])
            for score, tokens in beams
            for token, logprob in enumerate(log_probabilities([*prompt, *tokens], vocab))
        ]
        every.sort(key=lambda item: -item[0])
        every = every[: max(2, 1 + len(stops)) * width]
        last = length == most
        for score, tokens in every[:width]:
            if last or tokens[-1] in stops:
                done.append((score / length**penalty, tokens))
        done = sorted(done, key=lambda item: -item[0])[:width]
        beams = [item for item in every if item[1][-1] not in stops][:width]
        reach = most if early == "never" and penalty > 0 else length
        if len(done) == width and (early is True or beams[0][0] / reach**penalty <= done[-1][0]):
            break
    return done
