"""Virtual time and seeded schedules: hours of back-off in microseconds, and a race that is a seed.

Read next: ``crucible_kitchen.testing``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["seeded_schedule", "virtual_clock"]


def virtual_clock() -> tuple[str, dict[str, Any]]:
    """Return an ``anyio_backend`` whose clock jumps to the next deadline as soon as all tasks wait.

    Example::

        @pytest.fixture
        def anyio_backend():
            return virtual_clock()
    """
    import trio.testing

    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


@contextmanager
def seeded_schedule(seed: int) -> Iterator[None]:
    """Let the seed decide in which order trio runs the tasks that can run.

    Example::

        name, options = virtual_clock()
        with seeded_schedule(7):
            anyio.run(main, backend=name, backend_options=options)
    """
    import trio._core

    _run: Any = trio._core._run  # the switch is private, so it is touched in this one place

    before = _run._ALLOW_DETERMINISTIC_SCHEDULING, _run._r.getstate()
    _run._ALLOW_DETERMINISTIC_SCHEDULING = True
    _run._r.seed(seed)
    try:
        yield
    finally:
        _run._ALLOW_DETERMINISTIC_SCHEDULING = before[0]
        _run._r.setstate(before[1])
