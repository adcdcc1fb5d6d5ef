"""Futures that wait for one another, and what they keep."""

import weakref

from weightstream.store.futures import chain, done, new_future


def test_nothing_that_a_callback_held_is_kept_once_it_was_called() -> None:
    class Buffer:
        pass

    buffer, first = Buffer(), new_future()
    alive = weakref.ref(buffer)
    second = chain([first], lambda held=buffer: done(held is not None))  # type: ignore[misc]
    del buffer
    assert alive() is not None
    first.set_result(None)
    assert second.result() is True
    assert alive() is None
