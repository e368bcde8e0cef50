"""Text to token ids: all of it, or what is spread evenly over it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from test_token_batches import Letters

from spp_export.calibration.reading import (
    TokenText,
    read_pools_within,
    read_texts,
    spread,
    token_texts,
)
from spp_export.common.options import WINDOW
from spp_export.data.conversation import Conversation, Message, plain
from spp_export.data.pools import Pools


def test_texts_are_read_in_order_each_prompt_from_its_own_beginning():
    turns = Conversation((Message("user", "ab"), Message("user", "c")))
    ready = TokenText(((7, 8),))
    read = token_texts(Letters(), ["xy", turns, ready, plain("z"), ""])
    assert [text.runs for text in read] == [
        ((120, 121),),
        ((97, 98), (99,)),
        ((7, 8),),
        ((122,),),
        ((),),
    ]
    assert [text.tokens for text in read] == [2, 3, 2, 1, 0]
    assert list(read[1].pieces(1)) == [TokenText(((n,),)) for n in (97, 98, 99)]
    assert read[1].beginning(1) == TokenText(((97,),))
    assert TokenText(((), (5, 6))).beginning(9) == TokenText(((5, 6),))


def test_all_is_read_up_to_the_limit():
    texts = ["a" * 700, "b" * 30, "c" * 294]
    read = read_texts(Letters(), texts, 1024)
    assert (read.tokens, read.available, len(read.texts)) == (1024, 1024, 3)
    assert read.texts == tuple(token_texts(Letters(), texts))
    assert read.to_dict() == {"read": 1024, "of": 1024}


def test_of_a_longer_text_pieces_all_over_it_are_read():
    text = "".join(chr(1000 + n // WINDOW) for n in range(100 * WINDOW))
    read = read_texts(Letters(), [text], 10 * WINDOW)
    assert (read.tokens, read.available) == (10 * WINDOW, 100 * WINDOW)
    first = [run[0] - 1000 for run in read.texts[0].runs]
    assert all(set(run) == {run[0]} for run in read.texts[0].runs)
    assert first == list(range(9, 100, 10))


def test_texts_of_which_nothing_is_read_are_left_out():
    texts = [f"{n:0400}" for n in range(50)]
    read = read_texts(Letters(), texts, 2000)
    assert (len(read.texts), read.tokens, read.available) == (5, 2000, 20000)


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(40, 400))
def test_what_is_spread_is_even_and_within_the_limit(lengths, limit):
    taken = spread(lengths, limit)
    assert taken == sorted(set(taken))
    kept = sum(lengths[place] for place in taken)
    if sum(lengths) <= limit:
        assert taken == list(range(len(lengths)))
        return
    assert limit - 40 < kept <= limit
    # no stretch has more or less than its share, but for what one length comes to
    for end in range(len(lengths)):
        fair = limit * sum(lengths[:end]) / sum(lengths)
        assert abs(sum(lengths[place] for place in taken if place < end) - fair) <= 40


def test_pools_are_read_by_whole_prompts():
    train = (tuple("t" * 100 for _ in range(20)), ("u" * 5000,))
    val = (("v" * 10,), ("w" * 20, "x" * 30))
    read = read_pools_within(Letters(), Pools(("one", "two"), train, val, {}), 1000)
    assert [len(part) for part in read.pools.train] == [10, 1]
    assert read.pools.val == val
    assert (read.tokens, read.available) == (1000 + 5000 + 60, 2000 + 5000 + 60)
