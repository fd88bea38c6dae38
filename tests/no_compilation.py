"""Fails if something compiles."""

from __future__ import annotations

from typing import Any

import jax


class no_compilation:
    """A context in which nothing may be compiled."""

    def __enter__(self) -> None:
        self.compiled: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **details: Any) -> None:
        if "backend_compile" in event:
            self.compiled.append(event)

    def __exit__(self, *exception: Any) -> None:
        from jax._src import monitoring
        monitoring.unregister_event_duration_listener(self._listen)
        assert not self.compiled, self.compiled
