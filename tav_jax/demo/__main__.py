"""python -m tav_jax.demo: a page in the browser to tune on a clip and to edit it."""

import argparse
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tav_jax.console import Parser, command, say
from tav_jax.errors import UserError
from tav_jax.files import first_unwritable_parent
from tav_jax.stopping import advise, start_job


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tav_jax.demo",
        description="Serve a page in which to tune on a clip and to edit it. It is reached from "
        "this machine only, unless --host says otherwise. Ctrl-C ends it and saves the step of a "
        "run that is being tuned.",
        epilog="example: python -m tav_jax.demo --output-dir outputs/demo",
    )
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        default="outputs/demo",
        help="takes uploads and runs (default: %(default)s)",
    )
    parser.add_argument(
        "--host",
        type=_host,
        default="127.0.0.1",
        help="address to listen at (default: %(default)s). With 0.0.0.0 everybody in the network "
        "can use this machine, without a password",
    )
    parser.add_argument("--port", type=_port, default=7860, help="default: %(default)s")
    parser.add_argument(
        "--max-upload-mb",
        metavar="MB",
        type=_megabytes,
        default=100,
        help="size of the largest file that may be uploaded (default: %(default)s)",
    )
    return parser


def _number(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and least <= int(text[:9]) <= most):
        raise argparse.ArgumentTypeError(f"'{text}': expected a number from {least} to {most}")
    return int(text)


def _host(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected an address")
    return text


def _port(text: str) -> int:
    return _number(text, 1, 65535)


def _megabytes(text: str) -> int:
    return _number(text, 1, 100_000)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo command with these arguments, by default the process's own."""
    args = _parser().parse_args(argv)
    if find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install 'tav_jax[demo]'")
    folder = Path(args.output_dir).expanduser().absolute()
    if parent := first_unwritable_parent(folder):
        raise UserError(f"--output-dir: {parent} is not a folder that can be written to")
    require_address(args.host, args.port)
    start_job()
    advise("the same command serves the page again")
    serve(folder, args.host, args.port, args.max_upload_mb)


def require_address(host: str, port: int) -> None:
    """Raise `UserError` unless this address can be listened at. Gradio would not say why not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host} --port {port}: cannot be listened at: {error}") from None


def serve(folder: Path, host: str, port: int, most_megabytes: int) -> None:
    """Serve the page until the process is stopped.

    Args:
        folder: Takes uploads and runs. No other file is served.
        host: Address to listen at.
        port: Port to listen at.
        most_megabytes: Size of the largest file that may be uploaded.

    Raises:
        UserError: The address cannot be listened at.
    """
    uploads = folder / "uploads"
    uploads.mkdir(parents=True, exist_ok=True)
    set_environment(uploads)
    # Gradio reads the environment when it is imported.
    from tav_jax.demo.jobs import Studio
    from tav_jax.demo.page import CSS, THEME, build_page
    from tav_jax.demo.queue import Queue
    from tav_jax.demo.requests import middleware

    queue, studio = Queue(), Studio(folder)
    # What is uploaded is not in them: their files may be shown, and not only be downloaded.
    shown = [studio.runs, studio.clips]
    page = build_page(studio, queue, most_megabytes)
    try:
        page.launch(
            theme=THEME,
            css=CSS,
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=False,
            inbrowser=False,
            inline=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            footer_links=[],
            run_history=False,
            allowed_paths=[str(path) for path in shown],
            blocked_paths=[],
            root_path="",
            max_file_size=most_megabytes * 2**20,
            enable_monitoring=False,
            strict_cors=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            num_workers=0,
            app_kwargs={"middleware": middleware(host if is_loopback(host) else None)},
        )
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot be listened at: {error}") from None
    say(f"serving {page.local_url} from {folder}; Ctrl-C ends it")
    queue.wait_until_stopped()


def set_environment(uploads: Path) -> None:
    """Let options alone decide what Gradio does, and its uploads go to a folder."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    settings: dict[str, Any] = {
        "GRADIO_TEMP_DIR": uploads,
        "GRADIO_EXAMPLES_CACHE": uploads,  # whose files are served, too
        "GRADIO_ANALYTICS_ENABLED": False,
    }
    os.environ.update({name: str(value) for name, value in settings.items()})
    # Gradio asks its own server whether it is there. A proxy would answer.
    for name in ("no_proxy", "NO_PROXY"):
        others = os.environ.get(name, "")
        os.environ[name] = ",".join(filter(None, [others, "127.0.0.1", "localhost"]))


def is_loopback(host: str) -> bool:
    """Tell whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
