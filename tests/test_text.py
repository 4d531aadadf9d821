"""Text up to a stop string, shown as soon as nothing can take it back."""

from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import tokenizer_with

from tenfold.engine.text import StoppedText
from tenfold.sampling import SamplingParams

TOKENIZER = tokenizer_with()
words = st.text("abo ", min_size=1, max_size=9)


@given(st.text("abo ", max_size=60), st.lists(words, max_size=4))
def test_what_is_shown(text: str, stops: list[str]) -> None:
    stopped, told, shown = StoppedText(TOKENIZER, SamplingParams(stop=stops)), "", ""
    for letter in text:
        (token,) = TOKENIZER.encode(letter)
        told, shown = told + letter, shown + stopped.add(token)
        if found := [told.index(stop) for stop in stops if stop in told]:
            assert stopped.stopped and shown == told[: min(found)]
            assert stopped.finish() == ""
            return
        begun = [n for n in range(len(told)) if any(stop.startswith(told[n:]) for stop in stops)]
        assert shown == told[: min(begun, default=None)]
    assert not stopped.stopped and shown + stopped.finish() == text
