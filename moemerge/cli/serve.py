"""`moemerge serve`."""

import logging
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.cli.command import JsonOption, QuietOption, hint, print_json
from moemerge.cli.completion import complete_variant
from moemerge.cli.engine import (
    DeviceOption,
    DtypeOption,
    ResidentOption,
    check_resident,
    check_threads,
    load_engine,
    open_with_files,
    size_of,
)
from moemerge.errors import InvalidRecipe, NotFound
from moemerge.runner.pages import use_huge_pages

if TYPE_CHECKING:
    from moemerge.server.program import Ready

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_EXTRA = ("fastapi", "starlette", "uvicorn", "h11", "prometheus_client")


def serve(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle to serve.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8642,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            "-v",
            metavar="NAME",
            help="Serve only these; give it several times.",
            autocompletion=complete_variant,
        ),
    ] = None,
    resident: ResidentOption = "all",
    pinned: Annotated[
        list[str] | None,
        typer.Option(
            "--pin",
            metavar="NAME",
            help="Variant that is loaded at the start and stays.",
            autocompletion=complete_variant,
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option("--policy", help="mixed, grouped, or fcfs (arrival order, the paper's mode).")
    ] = "mixed",
    shares: Annotated[
        list[str] | None,
        typer.Option("--share", metavar="NAME=NUMBER", help="A variant's share of the service, mostly 1."),
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads of the CPU's products; all cores.")
    ] = None,
    device_memory: Annotated[
        str | None,
        typer.Option(
            "--device-memory", metavar="SIZE", help="For pool, residents and key/value cache; what there is."
        ),
    ] = None,
    kv_memory: Annotated[
        str | None, typer.Option("--kv-memory", metavar="SIZE", help="For the key/value cache alone.")
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Requests that run at once.")] = 64,
    max_step_tokens: Annotated[
        int, typer.Option("--max-step-tokens", min=1, help="Tokens that one step computes.")
    ] = 512,
    max_wait: Annotated[
        float,
        typer.Option("--max-wait", metavar="SECONDS", min=0, help="Wait that puts a request first."),
    ] = 10.0,
    max_queue: Annotated[
        int, typer.Option("--max-queue", min=0, help="Requests that may wait; further ones get 503.")
    ] = 256,
    max_queue_per_variant: Annotated[
        int | None,
        typer.Option("--max-queue-per-variant", min=0, help="The same for one variant; others get 429."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file", metavar="FILE", help="Ask for one of these keys, one per line, mode 600."
        ),
    ] = None,
    drain: Annotated[
        float,
        typer.Option("--drain", metavar="SECONDS", min=0, help="What running requests get after SIGTERM."),
    ] = 30.0,
    docs: Annotated[bool, typer.Option(help="Describe the API at /docs and /openapi.json.")] = True,
    root_path: Annotated[
        str, typer.Option("--root-path", metavar="PATH", help="Path under which a proxy offers the server.")
    ] = "",
    access_log: Annotated[bool, typer.Option("--access-log", help="A line per request.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Serve all variants of a bundle behind OpenAI's API.

    The variant is the `model` of a request. Tokens of different variants share one batch and one expert
    pool. SIGTERM lets running requests finish (--drain); a second one ends at once.

    Example: moemerge serve trio.moe --resident 2 --max-batch 32
    """
    use_huge_pages()
    keys, options, program = _import_server()
    from moemerge.runner.options import EngineOptions

    check_threads(threads)
    engine_options = EngineOptions(
        device=device,
        dtype=dtype,
        variants=tuple(variants) if variants else None,
        resident=check_resident(resident),
        pinned=tuple(pinned or ()),
        policy=policy,
        device_memory=size_of("--device-memory", device_memory),
        cache_memory=size_of("--kv-memory", kv_memory),
        max_batch=max_batch,
        max_step_tokens=max_step_tokens,
        max_wait_s=max_wait,
        shares=dict(_parse_share(text) for text in shares or ()),
    )
    server_options = options.ServerOptions(
        api_keys=keys.read_keys(api_key_file) if api_key_file else (),
        root_path=root_path,
        docs=docs,
        drain_s=drain,
        access_log=access_log,
    )
    _prepare_process(threads, access_log=access_log)
    if host not in _LOOPBACK and not api_key_file and not quiet:
        hint(f"warning: whoever reaches {host} may use this server; --api-key-file asks for a key")

    def announce(ready: "Ready") -> None:
        if as_json:
            print_json("serve", asdict(ready))
        elif not quiet:
            hint(f"Serving {bundle} at {ready.url}/v1: {', '.join(ready.variants)}")

    forced_by = program.serve_bundle(
        open_with_files(bundle),
        engine_options,
        server_options,
        host=host,
        port=port,
        max_queue=max_queue,
        max_queue_per_variant=max_queue_per_variant,
        on_ready=announce,
        load=partial(load_engine, quiet=quiet or as_json),
    )
    if forced_by is not None:
        hint("Stopped at once by a second signal; requests were cut off.")
        raise typer.Exit(128 + forced_by)
    if not quiet and not as_json:
        hint("Stopped.")


def _import_server() -> tuple[ModuleType, ModuleType, ModuleType]:
    """The server's modules, which need an extra.

    Raises:
        NotFound: It is not installed.
    """
    try:
        from moemerge.server import keys, options, program
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise NotFound(
            f"{error.name} is not installed, which the server needs. Run pip install 'moemerge[serve]' "
            f"(from a clone: pip install -e '.[serve]')"
        ) from error
    return keys, options, program


def _parse_share(text: str) -> tuple[str, float]:
    """A variant's name and share, `NAME=2.0`.

    Raises:
        InvalidRecipe: Something else.
    """
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise InvalidRecipe(f"--share {text!r}, expected NAME=NUMBER, for example code=2.0") from None


def _prepare_process(threads: int | None, *, access_log: bool) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)
    if access_log:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
