"""
Keeps what a model thinks before it answers apart from its answer; may be skipped.
"""
from collections.abc import Callable

from tokenizer import StreamDecoder, Tokenizer


class Answer(StreamDecoder):
    """Text of a growing reply, without the thoughts between <think> and </think>: `on_thought` gets
    those as they grow. `prompt` is what the reply follows; it may end with <think>."""

    def __init__(self, tok: Tokenizer, prompt: list[int], on_thought: Callable[[str], object]):
        super().__init__(tok)
        self.on_thought, self.aside = on_thought, StreamDecoder(tok)  # aside: of the thoughts
        self.thinking = tok.thoughts[0] in prompt[-2:]  # a line end may follow it
        self.started = True  # else line ends are passed over, which stand after the thoughts

    def push(self, token: int) -> str:
        if token in self.tok.thoughts:
            self.thinking, self.started = token == self.tok.thoughts[0], False
            self.aside = StreamDecoder(self.tok)
            self.on_thought("" if self.thinking else "\n")
            return ""
        if self.thinking:
            self.on_thought(self.aside.push(token))
            return ""
        text = super().push(token)
        text = text if self.started else text.lstrip("\n")
        self.started = self.started or bool(text)
        return text
