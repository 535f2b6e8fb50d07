"""What a server is told when it starts, checked once."""

from dataclasses import dataclass, field

from moemerge.errors import InvalidRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a server treats its clients; what concerns the engine is in `EngineOptions`.

    Attributes:
        api_keys: Any of them opens the server; empty for no lock.
        root_path: Path under which a proxy offers the server.
        docs: Whether `/docs` and `/openapi.json` answer.
        drain_s: Seconds that running requests get after the signal to stop.
        max_choices: Answers that one request may ask for, prompts times `n`.
        max_body_bytes: Largest body.
        body_timeout_s: Seconds a body may take to arrive.
        header_timeout_s: Seconds a request's head may take to arrive.
        max_header_bytes: Longest head of a request.
        max_connections: Open connections; further ones are answered 503 and closed.
        max_unread_outputs: Outputs that wait for a slow reader before its request is cancelled.
        write_timeout_s: Seconds a client may leave sent bytes unacknowledged (Linux).
        access_log: Log a line for every request.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    root_path: str = ""
    docs: bool = True
    drain_s: float = 30.0
    max_choices: int = 128
    max_body_bytes: int = 4 * 2**20
    body_timeout_s: float = 30.0
    header_timeout_s: float = 10.0
    max_header_bytes: int = 32 * 2**10
    max_connections: int = 1024
    max_unread_outputs: int = 4096
    write_timeout_s: float = 30.0
    access_log: bool = False

    def __post_init__(self) -> None:
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise InvalidRecipe(
                f"root path is {self.root_path!r}, expected a path such as /moemerge, without / at its end"
            )
        if not 0 <= self.drain_s < float("inf"):
            raise InvalidRecipe(f"drain is {self.drain_s} seconds, expected 0 or more")
