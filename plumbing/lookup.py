"""
Guesses how a text goes on by what followed its last words before: answers quote, edits repeat.

    lookup = Lookup(model)
    lookup.guess([5, 6, 7, 8, 9, 6, 7], most=2)    # [8, 9], which followed 6, 7 before

This is prompt lookup (Saxena 2023), speculative decoding without a second model (Leviathan et al.
2022). The model reads the guess with its own last token, in one pass, which costs little more than
that token alone. `generate.generate` then draws each token as ever, and as long as it draws what
was guessed, it has the next logits already. So only the time depends on the guess.
"""
from kernels.quantised import Quantised
from model import Transformer

N, MOST = 2, 15  # ids that must have stood there before, most ids of a guess


class Lookup:
    """Guesses for one text. It guesses only for a model whose logits are the same to the last bit
    however many tokens it reads at once: in 8 and 4 bits they are, by torch they are not."""

    def __init__(self, model: Transformer):
        self.size = 4 if isinstance(model, Quantised) else 0  # ids of the next guess
        self.after: dict[tuple[int, ...], int] = {}  # N ids: the index after their last place
        self.known, self.guessed = 0, False  # how many ids there were at the last guess, if any

    def guess(self, ids: list[int], most: int) -> list[int]:
        """What may follow all ids of the text so far, `most` ids at most. After a good guess the
        next is longer: twice what was right, and 2 more."""
        if not self.size:
            return []
        if self.guessed:
            self.size = min(MOST, 2 * (len(ids) - self.known))
        for end in range(max(N, self.known), len(ids)):
            self.after[tuple(ids[end - N:end])] = end
        self.known = len(ids)
        at = self.after.get(tuple(ids[-N:]), len(ids))
        period = len(ids) - at  # a text that turns in a circle goes on so
        found = [ids[at + i % period] for i in range(min(self.size, most))] if period else []
        self.guessed = bool(found)
        return found
