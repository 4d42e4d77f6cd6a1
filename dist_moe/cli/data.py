"""The command that fetches text."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dist_moe.cli.messages import report_user_errors
from dist_moe.cli.options import Verbose

data_app = typer.Typer(help="Fetch the text that models are trained on.", no_args_is_help=True)


@data_app.callback()
def data() -> None:
    """Fetch the text that models are trained on."""


@data_app.command()
def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Names of sources; by default all built-in ones of text."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Fetch sources of text into the cache, and list them."""
    from dist_moe.data.cache import cache_folder
    from dist_moe.data.labeled.sources import LABELED, fetch_labeled
    from dist_moe.data.sources import BUILT_IN, fetch_sources

    with report_user_errors():
        texts = [name for name in names or BUILT_IN if name not in LABELED]
        records = fetch_sources(texts, cache_folder()) if texts else []
        records += fetch_labeled([name for name in names or () if name in LABELED], cache_folder())
    table = Table("source", "version", "bytes", "sha256")
    for record in records:
        table.add_row(record.name, record.version, f"{record.bytes:,}", record.sha256)
    Console().print(table)
