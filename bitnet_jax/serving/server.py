"""The server as a process: it answers /health at once, loads the model in a thread, and shuts down in order."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from bitnet_jax.data.errors import DataError
from bitnet_jax.optional_packages import missing_package
from bitnet_jax.serving.embeddings import Encoder
from bitnet_jax.serving.engine import Engine
from bitnet_jax.serving.http import Serving, application
from bitnet_jax.serving.request_log import RequestLog
from bitnet_jax.serving.schemas import Served

try:
    import uvicorn
except ImportError as error:
    raise DataError(missing_package("uvicorn")) from error

GRACE_SECONDS = 30  # for answers at work when the server is asked to stop

Load = Callable[[], tuple[Engine | Encoder, Served]]


class Server:
    """One model at one address.

    Args:
      load: makes the engine; called in the engine's thread.
      on_ready: called once requests can be answered.
      port: 0 takes a free one; `address` says which.
      log: takes a line of JSON for each request; None: there is no log.
      log_prompts: the log holds the bodies of requests too.

    Raises:
      OSError: the address cannot be used.
    """

    def __init__(
        self,
        load: Load,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
        api_key: str | None = None,
        on_ready: Callable[[Server], None] = lambda server: None,
        log: Callable[[str], None] | None = None,
        log_prompts: bool = False,
    ) -> None:
        self.serving = Serving(api_key, host)
        self._load, self._on_ready = load, on_ready
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=256)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{self._socket.getsockname()[1]}"
        app = application(self.serving)
        app.router.lifespan_context = self._lifespan
        config = uvicorn.Config(
            app if log is None else RequestLog(app, log, prompts=log_prompts),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
            server_header=False,
        )
        self._uvicorn = uvicorn.Server(config)
        self._failure: BaseException | None = None
        self._engine_thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def run(self) -> None:
        """Serves until SIGINT or SIGTERM, or `stop`. Raises what `load` or the engine's thread raised."""
        self._engine_thread.start()
        self._uvicorn.run(sockets=[self._socket])
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """From another thread."""
        self._uvicorn.should_exit = True

    def _work(self) -> None:
        try:
            model, served = self._load()
            self.serving.loaded(model, served)
            self._on_ready(self)
            model.run()
        except BaseException as error:  # a server without an engine would accept requests and never answer
            self._failure = error
            self.stop()

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[None]:
        yield
        model = self.serving.engine or self.serving.encoder
        if model is not None:
            model.close()
            self._engine_thread.join(timeout=5)
