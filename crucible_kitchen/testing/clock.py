"""Virtual time: hours of back-off in microseconds, exact to the tick. Read next: ``crucible_kitchen.testing``."""

from typing import Any

__all__ = ["virtual_clock"]


def virtual_clock() -> tuple[str, dict[str, Any]]:
    """Return an ``anyio_backend`` whose clock jumps to the next deadline as soon as all tasks wait.

    Example::

        @pytest.fixture
        def anyio_backend():
            return virtual_clock()
    """
    import trio.testing

    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}
